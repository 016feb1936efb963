"""Write the notebooks from the book: book/<part>/<name>.md -> .ipynb beside it.

    python tools/notebooks.py                        every chapter
    python tools/notebooks.py book/theory/score.md   these chapters only
    python tools/notebooks.py --check                print what differs, exit 1 if any
    python tools/notebooks.py --force                overwrite edited notebooks too

A notebook holds no outputs. A cell's id is a hash of its source, so that an edit
changes one cell of the diff and a second run changes nothing. A cell whose id is not
that of its source was written by a person: such a notebook is left alone. What only
MyST reads (numbered formulas, folded derivations, references) becomes what every
notebook viewer shows.
"""

import argparse
import difflib
import hashlib
import json
import re
import sys
from pathlib import Path

import jupytext
import nbformat

ROOT = Path(__file__).resolve().parents[1]
# Seconds after which nbmake stops a chapter: a guard against hanging, not a budget.
TIMEOUT = 900
FENCE = re.compile(r"(`{3,}|:{3,})(?:\{([\w-]+)\})?[ ]*(.*)")
LABEL = re.compile(r"^`{3,}\{math\}\n:label: (\S+)", re.MULTILINE)
NOTE = """*Generated from `{chapter}`. Try what you like here; what is to stay belongs
into that file, from which `make format export notebooks` makes this notebook and the
package anew.*"""
ROLE = re.compile(r"\{([\w:]+)\}`([^`]+)`")


def equation_numbers(root):
    """Map each equation's label to its chapter's name and its number there."""
    return {
        label: (path.stem, number)
        for path in root.glob("book/*/*.md")
        for number, label in enumerate(LABEL.findall(path.read_text()), start=1)
    }


def plain_role(role, chapter, numbers):
    """Replace a MyST role, a match of ROLE, by plain Markdown."""
    kind, content = role.groups()
    if kind == "eq" and content in numbers:
        name, number = numbers[content]
        return f"({number})" if name == chapter else f"({number} of {name})"
    if kind.startswith("cite"):
        return f"[[{content}](../references.bib)]"
    if kind == "doc":
        text, path = re.fullmatch(r"(?:(.*?)\s*<)?(.*?)>?", content).groups()
        return f"[{text or Path(path).name}]({path}.md)"
    return f"`{content}`"


def plain_fence(kind, title, body, chapter, numbers):
    """Turn the lines of a MyST directive into lines of plain Markdown."""
    options = []
    while body and (option := re.match(r":([\w-]+):\s*(.*)", body[0])):
        options.append(option.groups())
        body = body[1:]
    options = dict(options)
    if kind == "math":
        formula = [title, *body] if title else body
        if any("\\\\" in line for line in formula):
            formula = ["\\begin{aligned}", *formula, "\\end{aligned}"]
        if label := options.get("label"):
            formula = [*formula, f"\\tag{{{numbers[label][1]}}}"]
        return ["$$", *formula, "$$"]
    inner = plain(body, chapter, numbers)
    heading = title if kind == "admonition" else kind.capitalize()
    if options.get("class") == "dropdown":
        heading = f"<details><summary>{heading}</summary>"
        return [heading, "", *inner, "", "</details>"]
    return [f"> {line}".rstrip() for line in [f"**{heading}**", "", *inner]]


def plain(lines, chapter, numbers):
    """Turn lines of MyST into lines of plain Markdown."""
    done, lines = [], iter(lines)
    for line in lines:
        fence = FENCE.fullmatch(line)
        if not fence:
            done.append(ROLE.sub(lambda r: plain_role(r, chapter, numbers), line))
            continue
        mark, kind, title = fence.groups()
        body = []
        for inner in lines:
            if inner.rstrip() == mark:
                break
            body.append(inner)
        if kind:
            done += plain_fence(kind, title, body, chapter, numbers)
        else:
            done += [line, *body, mark]
    return done


def digest(source):
    """Return the id of a cell with this source."""
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def is_edited(text):
    """Tell whether a person wrote into a notebook, by a cell that has another's id."""
    try:
        cells = json.loads(text)["cells"]
    except (ValueError, KeyError):  # Git's marks of a conflict
        return False
    return any(
        cell.get("id", "").split("-")[0] != digest("".join(cell["source"]))
        for cell in cells
    )


def notebook_source(chapter, numbers):
    """Return the text of a chapter's notebook, or None if it has no code cell."""
    notebook = jupytext.read(chapter, fmt="md:myst")
    if all(cell.cell_type != "code" for cell in notebook.cells):
        return None
    seen = {}
    note = NOTE.format(chapter="/".join(chapter.parts[-3:]))
    title, _, rest = notebook.cells[0].source.partition("\n")
    notebook.cells[0].source = f"{title}\n\n{note}\n{rest}"
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            lines = cell.source.splitlines()
            cell.source = "\n".join(plain(lines, chapter.stem, numbers))
        name = digest(cell.source)
        count = seen[name] = seen.get(name, 0) + 1
        cell.id = name if count == 1 else f"{name}-{count}"
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
    parser.add_argument("--force", action="store_true", help="overwrite edits")
    args = parser.parse_args(argv)
    chapters = [c.resolve() for c in args.chapters] or sorted(root.glob("book/*/*.md"))
    numbers = equation_numbers(root)
    files = {c.with_suffix(".ipynb"): notebook_source(c, numbers) for c in chapters}
    files = {path: text for path, text in files.items() if text is not None}
    stale = set() if args.chapters else {*root.glob("book/*/*.ipynb")} - files.keys()
    drift, kept = False, []
    for path in [*files, *sorted(stale)]:
        old = path.read_text() if path.exists() else ""
        text = files.get(path)
        if old == text:
            continue
        drift = True
        name = str(path.relative_to(root))
        if text is None:
            print("no chapter for", name)
        if args.check and text is not None:
            lines = old.splitlines(True), text.splitlines(True)
            sys.stdout.writelines(difflib.unified_diff(*lines, name, name))
        elif args.check:
            continue
        elif is_edited(old) and not args.force:
            kept.append(name)
        elif text is None:
            path.unlink()
        else:
            path.write_text(text)
            print("wrote", name)
    if args.check and drift:
        print("Notebooks differ: run `make notebooks`.", file=sys.stderr)
    if kept:
        print(
            f"Edited, and left as they are: {', '.join(kept)}. Copy what should stay "
            "to the chapter, the .md beside it; `python tools/notebooks.py --force` "
            "then overwrites the notebook.",
            file=sys.stderr,
        )
    return 1 if kept or (args.check and drift) else 0


if __name__ == "__main__":
    sys.exit(main())
