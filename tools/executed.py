"""Chapters that pytest has run need not run again for the book.

nbmake throws away what it has executed. Here it is kept, under a hash of all that a
chapter reads beside its own text, and handed to the book's cache of executed pages,
which asks in addition that no code cell has changed.
"""

import hashlib
import os
import shutil
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / ".executed"
READ = ("som/**/*.py", "book/results/**/*", "constraints.txt", "tools/*.sh")


def digest():
    """Hash what a chapter reads: package, records, versions, the scale of its cells."""
    files = [f for pattern in READ for f in ROOT.glob(pattern) if f.is_file()]
    total = hashlib.sha256(os.environ.get("SOM_SCALE", "smoke").encode())
    for path in sorted(files):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{path.relative_to(ROOT)} {content}\n".encode())
    return total.hexdigest()[:16]


def keep(source, notebook):
    """Keep the notebook that a run without an error has left."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # nbmake's times; the book has none
    path = KEPT / digest() / Path(source).resolve().relative_to(ROOT)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    nbformat.write(notebook, unfinished)
    unfinished.replace(path)


def give(cache):
    """Hand what was kept to a jupyter-cache, and forget what is out of date."""
    now = digest()
    for folder in KEPT.glob("*"):
        if folder.name != now:
            shutil.rmtree(folder, ignore_errors=True)
    for path in sorted((KEPT / now).rglob("*.ipynb")):
        source = ROOT / path.relative_to(KEPT / now).with_suffix(".md")
        cache.cache_notebook_file(str(path), uri=str(source), overwrite=True)
