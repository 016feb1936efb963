"""The floor plan: chapters, modules and tests mirror each other, arrows run one way."""

import ast
import importlib
import inspect
import json
import shutil
from pathlib import Path

import export
import jupytext
import notebooks
import pytest
import readme
import yaml

ROOT = Path(__file__).resolve().parents[1]
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
PAGES = [page["file"] for part in TOC["parts"] for page in part["chapters"]]
CHAPTERS = [page for page in PAGES if page.count("/") == 2]
EXPORTING = [c for c in CHAPTERS if export.module_source(ROOT / f"{c}.md")]


def module_name(chapter):
    """Name the module of a chapter."""
    return chapter.replace("book/", "som/", 1).replace("/", ".")


def imported(source):
    """List the som.<part>.<name> modules that a source imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return found & {module_name(chapter) for chapter in CHAPTERS}


def code_cells(chapter):
    """List the sources of a chapter's code cells."""
    cells = jupytext.read(ROOT / f"{chapter}.md", fmt="md:myst").cells
    return [cell.source for cell in cells if cell.cell_type == "code"]


def test_every_chapter_is_in_the_table_of_contents():
    files = {str(p.relative_to(ROOT).with_suffix("")) for p in ROOT.glob("book/*/*.md")}
    assert files == set(CHAPTERS)


def test_package_is_what_the_chapters_export(capsys):
    assert export.main(["--check"]) == 0, capsys.readouterr().out


def test_notebooks_are_what_the_chapters_say(capsys):
    assert notebooks.main(["--check"]) == 0, capsys.readouterr().out


def test_no_record_names_a_temporary_folder():
    records = sorted((ROOT / "book/results").rglob("*.json"))
    named = [p.relative_to(ROOT) for p in records if "/tmp/" in p.read_text()]
    assert records and not named


def test_results_in_the_readme_are_those_of_the_records(tmp_path, capsys):
    assert readme.main(["--check"]) == 0, capsys.readouterr().err
    for folder in ("book/results/compared", "book/results/studies", "book/_static"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "book/_static/nine_tasks.png").unlink()
    (tmp_path / "book/results/compared/ppo.json").unlink()
    shutil.copy(ROOT / "README.md", tmp_path)
    assert readme.main(["--check"], tmp_path) == 1
    assert readme.main([], tmp_path) == 0 == readme.main(["--check"], tmp_path)
    assert (tmp_path / "book/_static/nine_tasks.png").stat().st_size > 10_000
    rows = (tmp_path / "README.md").read_text().count("\n| ")
    assert rows == (ROOT / "README.md").read_text().count("\n| ") - 1


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_notebook_carries_no_outputs(chapter):
    notebook = json.loads((ROOT / f"{chapter}.ipynb").read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)


@pytest.mark.parametrize("chapter", EXPORTING)
def test_module_has_its_tests(chapter):
    part, name = chapter.split("/")[1:]
    assert (ROOT / "tests" / part / f"test_{name}.py").exists()


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_chapter_imports_only_earlier_chapters(chapter):
    earlier = {module_name(c) for c in CHAPTERS[: CHAPTERS.index(chapter)]}
    cells = "\n".join(
        line
        for source in code_cells(chapter)
        for line in source.splitlines()
        if not line.lstrip().startswith(("%", "!"))
    )
    assert imported(cells) <= earlier


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_cells_fit_78_columns(chapter):
    lines = [line for source in code_cells(chapter) for line in source.splitlines()]
    assert [line for line in lines if len(line) > 78] == []


@pytest.mark.parametrize("chapter", EXPORTING)
def test_public_functions_and_classes_are_documented(chapter):
    module = importlib.import_module(module_name(chapter))
    public = {name: getattr(module, name) for name in module.__all__}
    missing = [
        name
        for name, value in public.items()
        if (inspect.isroutine(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
        and not value.__doc__
    ]
    assert missing == []
