"""The tools that turn chapters into modules, notebooks and pages."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import book_extension
import browser
import executed
import export
import nbformat
import new
import notebooks
import pytest
from format_cells import format_chapter
from jupyter_cache import get_cache

ROOT = Path(__file__).resolve().parents[1]
TOC = re.compile(r"- file: (\S+)")
HEADER = """\
---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

"""
CHAPTER = '''\
# Squares

One sentence.

```{code-cell} ipython3
:tags: [export]

import math
```

```python
# Not a heading
```

## Area

```{code-cell} ipython3
---
tags: [export]
---
LIMIT: float = 3.0
low, _hidden = 1, 2


def area(x):
    """Square of x."""
    return x**2
```

```{code-cell} ipython3
:tags: [check]

assert area(3) == 9
```

## Side

```{code-cell} ipython3
:tags: [export]

def side(x):
    """Root of x."""
    return math.sqrt(x)
```

```{code-cell} ipython3
:tags: [check]

assert area(3) == 9
```
'''
MODULE = '''\
"""Squares.

Exported by tools/export.py from book/shapes/squares.md; edit the chapter.
"""

__all__ = [
    "LIMIT",
    "low",
    "area",
    "side",
]

import math


# %% Area
LIMIT: float = 3.0
low, _hidden = 1, 2


def area(x):
    """Square of x."""
    return x**2


# %% Side
def side(x):
    """Root of x."""
    return math.sqrt(x)
'''


@pytest.fixture
def root(tmp_path):
    """Make a project with one chapter."""
    part = tmp_path / "book" / "shapes"
    part.mkdir(parents=True)
    (part / "squares.md").write_text(HEADER + CHAPTER)
    return tmp_path


@pytest.mark.parametrize("kind", ["agent", "study"])
def test_a_new_chapter_passes_as_it_stands(kind, tmp_path, capsys):
    """In a copy of the project, with a name as long as any."""
    for part in ("som", "book/baselines", "book/studies", "tests/examples.py"):
        here, there = ROOT / part, tmp_path / part
        there.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if here.is_dir() else shutil.copy
        copy(here, there)
    for name in ("_toc.yml", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    name = "a_rather_long_name"
    assert new.main([kind, name], tmp_path) == 0
    part, chapters = (
        new.KINDS[kind][0],
        TOC.findall((tmp_path / "_toc.yml").read_text()),
    )
    chapter, tests = f"book/{part}/{name}", f"tests/{part}/test_{name}.py"
    assert chapters.count(chapter) == 1 and set(chapters) > set(
        TOC.findall((ROOT / "_toc.yml").read_text())
    )
    before = [c for c in chapters[: chapters.index(chapter)] if f"/{part}/" in c]
    assert {"agent": "book/baselines/nclql", "study": before[-1]}[kind] in before
    for tool in (export, notebooks):
        assert tool.main(["--check", str(tmp_path / f"{chapter}.md")], tmp_path) == 0
    text = (tmp_path / f"{chapter}.md").read_text()
    assert format_chapter(text) == text and "TITLE" not in text and "NAME" not in text
    ruff = str(Path(sys.executable).parent / "ruff")
    pytest_here = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        tests,
    ]
    for command in ([ruff, "check"], [ruff, "format", "--check"], pytest_here):
        paths = [] if command is pytest_here else [tests]
        env = {**os.environ, "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(
            [*command, *paths], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert new.main([kind, name], tmp_path) == 1
    assert new.main([kind, "No Name"], tmp_path) == 1
    said = capsys.readouterr().err
    assert "is there already" in said and "'No Name' is no name of a module" in said


def test_export_writes_the_module_and_its_package(root):
    assert export.main([], root) == 0
    assert (root / "som/shapes/squares.py").read_text() == MODULE
    assert "book/shapes" in (root / "som/shapes/__init__.py").read_text()
    assert export.main(["--check"], root) == 0


def test_export_check_shows_the_difference_and_repairs_nothing(root, capsys):
    export.main([], root)
    module = root / "som/shapes/squares.py"
    module.write_text(MODULE.replace("x**2", "x**3"))
    assert export.main(["--check"], root) == 1
    assert "-    return x**3\n+    return x**2\n" in capsys.readouterr().out
    assert "x**3" in module.read_text()


def test_export_removes_a_module_whose_chapter_is_gone(root):
    export.main([], root)
    by_hand = root / "som/shapes/by_hand.py"
    by_hand.write_text("")
    (root / "book/shapes/squares.md").unlink()
    assert export.main(["--check"], root) == 1
    assert export.main([], root) == 0
    assert [p.name for p in (root / "som/shapes").iterdir()] == ["by_hand.py"]


def test_export_names_the_chapter_and_section_of_a_syntax_error(root, capsys):
    chapter = root / "book/shapes/squares.md"
    chapter.write_text(chapter.read_text().replace("def side(x):", "def side(x:"))
    assert export.main([], root) == 1
    assert "book/shapes/squares.md, section 'Side'" in capsys.readouterr().err


def test_a_change_of_prose_leaves_the_module_alone(root):
    export.main([], root)
    chapter = root / "book/shapes/squares.md"
    chapter.write_text(
        chapter.read_text().replace("One sentence.", "Another.\n\nMore.")
    )
    assert export.main(["--check"], root) == 0


def test_notebook_has_stable_distinct_ids_and_no_outputs(root):
    assert notebooks.main([], root) == 0
    path = root / "book/shapes/squares.ipynb"
    first = json.loads(path.read_text())
    ids = [cell["id"] for cell in first["cells"]]
    assert len(set(ids)) == len(ids)
    code = [cell for cell in first["cells"] if cell["cell_type"] == "code"]
    assert len(code) == 5
    assert all(cell["outputs"] == [] for cell in code)
    assert first["metadata"]["execution"]["timeout"] == notebooks.TIMEOUT
    chapter = root / "book/shapes/squares.md"
    chapter.write_text(chapter.read_text().replace("One sentence.", "Another."))
    assert notebooks.main(["--check"], root) == 1
    assert notebooks.main([], root) == 0
    second = json.loads(path.read_text())
    changed = [
        a["id"] != b["id"] for a, b in zip(first["cells"], second["cells"], strict=True)
    ]
    assert sum(changed) == 1


def test_notebooks_check_reports_a_notebook_without_chapter(root, capsys):
    notebooks.main([], root)
    (root / "book/shapes/old.ipynb").write_text("{}")
    assert notebooks.main(["--check"], root) == 1
    assert "no chapter for book/shapes/old.ipynb" in capsys.readouterr().out


def test_first_cell_says_where_edits_belong(root):
    notebooks.main([], root)
    notebook = json.loads((root / "book/shapes/squares.ipynb").read_text())
    sources = ["".join(cell["source"]) for cell in notebook["cells"]]
    said = ["Generated from `book/shapes/squares.md`" in source for source in sources]
    assert said == [True] + [False] * (len(sources) - 1)


@pytest.mark.parametrize("edit", ["cell", "new cell"])
def test_an_edited_notebook_is_not_overwritten(root, capsys, edit):
    notebooks.main([], root)
    path = root / "book/shapes/squares.ipynb"
    notebook = nbformat.read(path, 4)
    code = next(c for c in notebook.cells if c.cell_type == "code")
    code.outputs = [nbformat.v4.new_output("stream", name="stdout", text="9")]
    nbformat.write(notebook, path)
    assert notebooks.main([], root) == 0  # outputs alone are no edit
    if edit == "cell":
        notebook.cells[-1].source += "\nprint(area(4))"
    else:
        notebook.cells.append(nbformat.v4.new_code_cell("print(area(4))"))
    nbformat.write(notebook, path)
    before = path.read_text()
    assert notebooks.main([], root) == 1
    assert path.read_text() == before
    said = capsys.readouterr().err
    assert "book/shapes/squares.ipynb" in said and "--force" in said
    (root / "book/shapes/squares.md").rename(root / "book/shapes/other.md")
    assert notebooks.main([], root) == 1
    assert path.read_text() == before  # nor is it removed with its chapter
    (root / "book/shapes/other.md").rename(root / "book/shapes/squares.md")
    assert notebooks.main(["--force"], root) == 0
    assert "area(4)" not in path.read_text()


def test_notebooks_show_formulas_and_references_without_myst():
    source = r"""See {eq}`eq-b`, {eq}`eq-a`, {cite}`x2020,y2021`, {doc}`../theory/sde`.
````{admonition} Derivation
:class: dropdown

```{math}
:label: eq-b
a &= b \\
&= c
```
````
```{note}
Mind {py:obj}`f`.
```
```python
{eq}`eq-a`
```"""
    expected = r"""See (2), (1 of sde), [[x2020,y2021](../references.bib)], [sde](../theory/sde.md).
<details><summary>Derivation</summary>


$$
\begin{aligned}
a &= b \\
&= c
\end{aligned}
\tag{2}
$$

</details>
> **Note**
>
> Mind `f`.
```python
{eq}`eq-a`
```"""  # noqa: E501
    numbers = {"eq-a": ("sde", 1), "eq-b": ("score", 2)}
    assert notebooks.plain(source.split("\n"), "score", numbers) == expected.split("\n")


def test_cache_key_follows_package_and_records(tmp_path, monkeypatch):
    monkeypatch.setattr(executed, "ROOT", tmp_path)
    for name in ("som/theory/sde.py", "book/results/run.json", "book/theory/sde.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    keys = [executed.digest()]
    for name in ("som/theory/sde.py", "book/results/run.json"):
        (tmp_path / name).write_text("2")
        keys.append(executed.digest())
    monkeypatch.setenv("SOM_SCALE", "full")
    keys.append(executed.digest())
    assert len(set(keys)) == 4
    (tmp_path / "book/theory/sde.md").write_text("2")
    assert executed.digest() == keys[-1]


def test_a_chapter_that_pytest_ran_is_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(executed, "ROOT", tmp_path)
    monkeypatch.setattr(executed, "KEPT", tmp_path / ".executed")
    output = nbformat.v4.new_output("stream", name="stdout", text="3\n")
    cell = nbformat.v4.new_code_cell("print(3)", execution_count=1, outputs=[output])
    cell.metadata["execution"] = {"iopub.status.busy": "today"}
    executed.keep(tmp_path / "book/a.ipynb", nbformat.v4.new_notebook(cells=[cell]))
    stale = tmp_path / ".executed/0123456789abcdef"
    stale.mkdir()

    cache = get_cache(tmp_path / "cache")
    executed.give(cache)
    assert not stale.exists()
    fresh = nbformat.v4.new_code_cell("print(3)")
    _, merged = cache.merge_match_into_notebook(nbformat.v4.new_notebook(cells=[fresh]))
    assert merged.cells[0].outputs[0].text == "3\n"
    edited = nbformat.v4.new_code_cell("print(1 + 2)")
    with pytest.raises(KeyError):
        cache.match_cache_notebook(nbformat.v4.new_notebook(cells=[edited]))


def test_signatures_on_the_api_page_keep_their_shapes():
    shown = book_extension.source_signature(
        None, "function", "", textwrap.indent, None, "", ""
    )
    assert shown == ("(text, prefix, predicate=None)", None)


def test_broken_links_finds_missing_pages_and_anchors(tmp_path):
    (tmp_path / "data.txt").write_text("")
    base = "http://127.0.0.1:1/"
    links = [
        base + "a.html#here",
        base + "a.html#gone",
        base + "b.html",
        base + "data.txt?v=1",
        "https://elsewhere.org/",
    ]
    pages = {"a.html": {"ids": ["here"], "links": links}}
    assert list(browser.broken_links(pages, base, tmp_path)) == [
        ("a.html", "no anchor 'gone' in a.html"),
        ("a.html", "no page b.html"),
    ]


def test_console_errors_and_foreign_requests_are_reported():
    base = "http://127.0.0.1:1/"
    request = "Network.requestWillBeSent"
    events = [
        {"method": request, "params": {"request": {"url": base + "a.html"}}},
        {"method": request, "params": {"request": {"url": "https://cdn.org/x.js"}}},
        {
            "method": "Log.entryAdded",
            "params": {"entry": {"level": "error", "text": "404", "url": "x.png"}},
        },
    ]
    assert browser.console_errors(events, base) == [
        "request leaves the machine: https://cdn.org/x.js",
        "log: 404 x.png",
    ]


PAGE = textwrap.dedent("""\
    <!doctype html><meta name="viewport" content="width=device-width">
    <article>{}</article>
""")
FAULTS = {
    "no alt text": "<img src='data:image/gif;base64,R0lGODlhAQABAAAAACw='>",
    "not rendered": "<span class='math'>x</span>",
    "raw markup": r"<p>\(x\)</p>",
    "overflow": "<div style='width: 900px'>wide</div>",
    "request leaves": "<script src='https://cdn.invalid/x.js'></script>",
    "exception": "<script>throw new Error('no')</script>",
    "broken link": "<a href='gone.html'>gone</a>",
}


@pytest.mark.skipif(
    not any(map(browser.shutil.which, browser.CHROMIUM)), reason="no Chromium here"
)
def test_browser_finds_every_kind_of_fault(tmp_path, capsys):
    (tmp_path / "index.html").write_text(PAGE.format("<p>fine</p>"))
    assert browser.main([str(tmp_path)]) == 0
    for number, body in enumerate(FAULTS.values()):
        Path(tmp_path, f"fault{number}.html").write_text(PAGE.format(body))
    assert browser.main([str(tmp_path)]) == 1
    found = capsys.readouterr().err
    assert "index.html" not in found
    for number, fault in enumerate(FAULTS):
        assert f"fault{number}.html: {fault}" in found


def test_format_touches_cells_only():
    text = "# T\n\nx = {1:2}\n\n```{code-cell} ipython3\n:tags: [check]\n\n"
    yaml = "```{code-cell} ipython3\n---\ntags: [figure]\n---\n"
    before = f"{text}x = {{1:2}}\n```\n\n{yaml}y=[ 1 ]\n```\n"
    after = f"{text}x = {{1: 2}}\n```\n\n{yaml}y = [1]\n```\n"
    assert format_chapter(before) == after
