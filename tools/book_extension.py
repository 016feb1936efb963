"""Sphinx extension: ties each chapter to its module and to the API page.

Every export cell gets a link to the API page, every exporting chapter a closing
section with what it exported, every API entry a link to the section that derives it.
Chapters run again when the package or a recorded run changes.
"""

import ast
import importlib
import inspect
import sys
import textwrap
from pathlib import Path

import yaml
from docutils import nodes
from jupyter_cache import get_cache
from sphinx import addnodes
from sphinx.pycode import ModuleAnalyzer

sys.path.insert(0, str(Path(__file__).parent))
import executed
from export import public_names

ROOT = Path(__file__).resolve().parents[1]
API = "book/api"


def key_cache(app, config):
    """Give each state of package and records its own folder of executed chapters."""
    config.som_digest = executed.digest()
    cache = Path(app.outdir).parent / ".jupyter_cache" / config.som_digest
    config.nb_execution_cache_path = str(cache)
    executed.give(get_cache(cache))


def module_of(docname):
    """Return the name of the module that a chapter exports, or None."""
    parts = docname.split("/")
    if len(parts) == 3 and (ROOT / "som" / parts[1] / f"{parts[2]}.py").exists():
        return f"som.{parts[1]}.{parts[2]}"
    return None


def module_entry(module):
    """Return the API page's section of a module, as MyST."""
    documented = {
        name for _, name in ModuleAnalyzer.for_module(module).find_attr_docs()
    }
    namespace = importlib.import_module(module)
    # Sphinx leaves out constants that carry no `#:` comment: name them one by one.
    constants = [
        name
        for name in namespace.__all__
        if name not in documented
        and not inspect.isroutine(value := getattr(namespace, name))
        and not (inspect.isclass(value) and value.__module__ == module)
    ]
    directives = [
        f".. automodule:: {module}",
        "   :members:",
        "   :member-order: bysource",
        "",
        *(f".. autodata:: {module}.{name}\n   :no-value:" for name in constants),
    ]
    return "\n".join(["", f"## {module}", "```{eval-rst}", *directives, "```", ""])


def list_modules(app, docname, source):
    """Append to the API page one section for each module, in the book's order."""
    if docname == API:
        toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
        chapters = [c["file"] for part in toc["parts"] for c in part["chapters"]]
        modules = [module_of(chapter) for chapter in chapters]
        source[0] += "".join(module_entry(module) for module in modules if module)


def api_link(docname, full_name):
    """Return a cross-reference to a name on the API page, resolved at the end."""
    name = full_name.rpartition(".")[2]
    reference = addnodes.pending_xref(
        "",
        nodes.literal(name, name, classes=["xref", "py"]),
        refdomain="py",
        reftype="obj",
        reftarget=full_name,
        refdoc=docname,
        refwarn=True,
    )
    reference["py:module"] = reference["py:class"] = None
    return reference


def chapter_links(app, doctree):
    """Link a chapter's export cells to the API and close it with what it exported."""
    docname = app.env.docname
    module = module_of(docname)
    if module is None:
        return
    labels = app.env.domaindata["std"]["labels"]
    rows = []
    for cell in list(doctree.findall(nodes.container)):
        tags = (cell.get("cell_metadata") or {}).get("tags", [])
        if cell.get("nb_element") != "cell_code" or "export" not in tags:
            continue
        source = next(cell.findall(nodes.literal_block)).astext()
        names = public_names(ast.parse(source))
        if not names:
            continue
        section = cell.parent
        while not isinstance(section, nodes.section):
            section = section.parent
        heading = next(section.findall(nodes.title)).astext()
        line = nodes.paragraph("", "API: ", classes=["som-api"])
        for name in names:
            labels[f"derived-{module}.{name}".lower()] = (
                docname,
                section["ids"][0],
                heading,
            )
            line += [api_link(docname, f"{module}.{name}"), nodes.Text(" · ")]
            rows.append((name, section["ids"][0], heading))
        line.pop()
        cell.parent.insert(cell.parent.index(cell) + 1, line)
    if rows:
        add_summary(doctree, docname, module, rows)


def add_summary(doctree, docname, module, rows):
    """Insert the section 'What this chapter exported', before the exercises."""
    title = "What this chapter exported"
    entries = nodes.bullet_list(classes=["som-exported"])
    for name, section_id, heading in rows:
        here = nodes.reference("", heading, refid=section_id, internal=True)
        text = nodes.paragraph("", "", api_link(docname, f"{module}.{name}"))
        text += [nodes.Text(", from "), here]
        entries += nodes.list_item("", text)
    path = module.replace(".", "/") + ".py"
    intro = nodes.paragraph("", "Its export cells make up the module ")
    intro += [nodes.literal(path, path), nodes.Text(":")]
    section = nodes.section(
        "",
        nodes.title(title, title),
        intro,
        entries,
        ids=["what-this-chapter-exported"],
    )
    chapter = next(doctree.findall(nodes.section))
    ends = [
        child
        for child in chapter.children
        if isinstance(child, nodes.section) and "exercises" in child["ids"]
    ]
    at = chapter.index(ends[0]) if ends else len(chapter.children)
    chapter.insert(at, section)


def skip_generated(app, what, name, obj, skip, options):
    """Leave out what named tuples and flax.struct add to a class."""
    alias = (inspect.getdoc(obj) or "").startswith("Alias for field number")
    return True if alias or (what == "class" and name == "replace") else None


class _Qualified(ast.NodeTransformer):
    """Names of the package's classes with their module: two share one name."""

    def __init__(self, names):
        self.names = names

    def visit_Name(self, node):
        kind = self.names.get(node.id)
        if not (inspect.isclass(kind) and kind.__module__.startswith("som.")):
            return node
        return ast.parse(f"{kind.__module__}.{node.id}", mode="eval").body


def source_signature(app, what, name, obj, options, signature, returns):
    """Show a signature as the chapter writes it: shapes, no expanded types."""
    if what not in ("class", "function", "method"):
        return None
    try:
        node = ast.parse(textwrap.dedent(inspect.getsource(obj))).body[0]
    except (OSError, TypeError):
        return None
    qualified = _Qualified(vars(sys.modules[obj.__module__]))
    for part in ast.walk(node):
        for field in ("annotation", "returns"):
            if hint := getattr(part, field, None):
                setattr(part, field, qualified.visit(hint))
    if isinstance(node, ast.ClassDef):
        methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
        made = [method for method in methods if method.name == "__init__"]
        if not made:
            fields = [ast.unparse(n) for n in node.body if isinstance(n, ast.AnnAssign)]
            return f"({', '.join(fields)})", None
        node = made[0]
    if what != "function" and node.args.args and node.args.args[0].arg == "self":
        node.args.args.pop(0)
    returns = ast.unparse(node.returns) if node.returns and what != "class" else None
    return f"({ast.unparse(node.args)})", returns


def api_entry(app, what, name, obj, options, lines):
    """Say on an API entry where the book derives it."""
    if what == "module" and name.count(".") == 2:
        chapter = name.replace("som.", "book/", 1).replace(".", "/")
        lines[:] = [f"Exported from the chapter :doc:`/{chapter}`."]
        return
    if what == "data" and "\n".join(lines).strip() == inspect.getdoc(type(obj)):
        lines.clear()
    module, _, member = name.rpartition(".")
    if module_of(module.replace("som.", "book/", 1).replace(".", "/")):
        exported = importlib.import_module(module).__all__
        if member in exported:
            lines += ["", f"Derived in §\\ :ref:`derived-{module}.{member}`."]


def setup(app):
    """Register the handlers with Sphinx."""
    app.add_config_value("som_digest", "", "env")
    # Titles with formulas are in the sidebar of pages that have no formula.
    app.set_html_assets_policy("always")
    # Jupyter Book always loads thebe: its script fetches from another host when
    # used and, declared twice, is an error on the console.
    for event in ("env-before-read-docs", "doctree-resolved"):
        app.events.listeners[event] = [
            listener
            for listener in app.events.listeners[event]
            if listener.handler.__module__ != "sphinx_thebe"
        ]
    app.connect("config-inited", key_cache)
    app.connect("source-read", list_modules)
    # Before the table of contents of the page is collected (priority 500).
    app.connect("doctree-read", chapter_links, priority=400)
    app.connect("autodoc-skip-member", skip_generated)
    app.connect("autodoc-process-signature", source_signature)
    # After napoleon has read the docstring.
    app.connect("autodoc-process-docstring", api_entry, priority=900)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
