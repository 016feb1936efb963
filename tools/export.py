"""Write the package from the book: book/<part>/<name>.md -> som/<part>/<name>.py.

    python tools/export.py                        every chapter
    python tools/export.py book/theory/score.md   these chapters only
    python tools/export.py --check                print what differs, exit 1 if any

A cell tagged `export` goes to the module as it stands, in order. The module's
docstring names its chapter, `# %% title` marks the section a cell came from, and
`__all__` lists the public names that the cells define.
"""

import argparse
import ast
import difflib
import re
import sys
from pathlib import Path

import jupytext

ROOT = Path(__file__).resolve().parents[1]
MARK = "Exported by tools/export.py from"


def headings(markdown):
    """Yield (level, title) of the headings of a Markdown cell, fences left out."""
    fence = ""
    for line in markdown.splitlines():
        found = re.match(r"\s*(`{3,}|~{3,}|:{3,})", line)
        if found and not fence:
            fence = found[1]
        elif found and line.strip().startswith(fence):
            fence = ""
        elif not fence and (heading := re.match(r"(#+)\s+(.*?)\s*#*$", line)):
            yield len(heading[1]), heading[2]


def public_names(tree):
    """List the public classes, functions and constants a module's body defines."""
    names = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [
                n.id
                for t in node.targets
                for n in ast.walk(t)
                if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            ]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
    return list(dict.fromkeys(n for n in names if not n.startswith("_")))


def export_cells(chapter):
    """Return a chapter's title and its (section title, source) pairs to export."""
    title, section, cells = "", "", []
    for cell in jupytext.read(chapter, fmt="md:myst").cells:
        if cell.cell_type == "markdown":
            for level, text in headings(cell.source):
                title, section = (text, "") if level == 1 else (title, text)
        elif "export" in cell.metadata.get("tags", []):
            cells.append((section, cell.source.strip("\n")))
    return title, cells


def module_source(chapter, root=ROOT):
    """Return the text of a chapter's module, or None if it exports nothing."""
    title, cells = export_cells(chapter)
    if not cells:
        return None
    for section, source in cells:
        try:
            ast.parse(source)
        except SyntaxError as error:
            where = f"{chapter.relative_to(root)}, section '{section or title}'"
            raise SyntaxError(f"{where}: {error.msg}: {error.text}") from None
    names = public_names(ast.parse("\n".join(source for _, source in cells)))
    listed = "".join(f'    "{name}",\n' for name in names)
    raw = "r" if "\\" in title else ""
    blocks = [
        f'{raw}"""{title}.\n\n{MARK} {chapter.relative_to(root)}; edit the chapter.\n'
        f'"""\n\n__all__ = [\n{listed}]'
    ]
    last = ""
    for section, source in cells:
        mark = f"# %% {section}\n" if section != last else ""
        blocks.append(mark + source)
        last = section
    return blocks[0] + "\n\n" + "\n\n\n".join(blocks[1:]) + "\n"


def package_source(folder, root=ROOT):
    """Return the text of a part's `__init__.py`: a docstring, no imports."""
    return f'"""{MARK} {folder.relative_to(root)}: one module a chapter."""\n'


def expected(chapters, root=ROOT):
    """Map each path to write to its text; also return the chapters' errors."""
    files, errors = {}, []
    for chapter in chapters:
        try:
            source = module_source(chapter, root)
        except (SyntaxError, ValueError) as error:
            errors.append(str(error))
            continue
        if source is not None:
            part = root / "som" / chapter.parent.name
            files[part / "__init__.py"] = package_source(chapter.parent, root)
            files[part / f"{chapter.stem}.py"] = source
    return files, errors


def orphans(files, root=ROOT):
    """List exported modules whose chapter is gone or exports nothing."""
    modules = sorted((root / "som").glob("*/*.py"))
    return [m for m in modules if m not in files and MARK in m.read_text()[:400]]


def main(argv=None, root=ROOT):
    """Export or check; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chapters", nargs="*", type=Path, help="default: all")
    parser.add_argument("--check", action="store_true", help="write nothing, diff")
    args = parser.parse_args(argv)
    chapters = [c.resolve() for c in args.chapters]
    files, errors = expected(chapters or sorted((root / "book").glob("*/*.md")), root)
    stale = [] if chapters or errors else orphans(files, root)
    drift = list(stale)
    for path, text in files.items():
        old = path.read_text() if path.exists() else ""
        if old != text or not path.exists():
            drift.append(path)
            name = str(path.relative_to(root))
            if args.check:
                lines = old.splitlines(True), text.splitlines(True)
                sys.stdout.writelines(difflib.unified_diff(*lines, name, name))
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
                print("wrote", name)
    for path in stale:
        print("no chapter exports", path.relative_to(root))
        if not args.check:
            path.unlink()
    for error in errors:
        print(error, file=sys.stderr)
    if args.check and drift:
        print("The package differs from the book: run `make export`.", file=sys.stderr)
    return 1 if errors or (args.check and drift) else 0


if __name__ == "__main__":
    sys.exit(main())
