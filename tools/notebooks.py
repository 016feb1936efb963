"""Write the notebooks from the book: book/<part>/<name>.md -> .ipynb beside it.

    python tools/notebooks.py                        every chapter
    python tools/notebooks.py book/theory/score.md   these chapters only
    python tools/notebooks.py --check                print what differs, exit 1 if any

A notebook holds no outputs. A cell's id is a hash of its source, so that an edit
changes one cell of the diff and a second run changes nothing.
"""

import argparse
import difflib
import hashlib
import sys
from pathlib import Path

import jupytext
import nbformat

ROOT = Path(__file__).resolve().parents[1]
# Seconds after which nbmake stops a chapter: a guard against hanging, not a budget.
TIMEOUT = 900


def notebook_source(chapter):
    """Return the text of a chapter's notebook, or None if it has no code cell."""
    notebook = jupytext.read(chapter, fmt="md:myst")
    if all(cell.cell_type != "code" for cell in notebook.cells):
        return None
    seen = {}
    for cell in notebook.cells:
        digest = hashlib.sha256(cell.source.encode()).hexdigest()[:12]
        count = seen[digest] = seen.get(digest, 0) + 1
        cell.id = digest if count == 1 else f"{digest}-{count}"
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata = {
        "execution": {"timeout": TIMEOUT},
        "kernelspec": notebook.metadata["kernelspec"],
        "language_info": {"name": "python"},
    }
    nbformat.validate(notebook)
    return nbformat.writes(notebook, indent=1, sort_keys=True) + "\n"


def main(argv=None, root=ROOT):
    """Write or check the notebooks; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chapters", nargs="*", type=Path, help="default: all")
    parser.add_argument("--check", action="store_true", help="write nothing, diff")
    args = parser.parse_args(argv)
    chapters = [c.resolve() for c in args.chapters] or sorted(root.glob("book/*/*.md"))
    files = {c.with_suffix(".ipynb"): notebook_source(c) for c in chapters}
    files = {path: text for path, text in files.items() if text is not None}
    stale = set() if args.chapters else {*root.glob("book/*/*.ipynb")} - files.keys()
    drift = False
    for path, text in files.items():
        old = path.read_text() if path.exists() else ""
        if old == text:
            continue
        drift = True
        name = str(path.relative_to(root))
        if args.check:
            lines = old.splitlines(True), text.splitlines(True)
            sys.stdout.writelines(difflib.unified_diff(*lines, name, name))
        else:
            path.write_text(text)
            print("wrote", name)
    for path in sorted(stale):
        drift = True
        print("no chapter for", path.relative_to(root))
        if not args.check:
            path.unlink()
    if args.check and drift:
        print("Notebooks differ: run `make notebooks`.", file=sys.stderr)
    return 1 if args.check and drift else 0


if __name__ == "__main__":
    sys.exit(main())
