"""What the book needs beside Jupyter Book: a label on exported cells, and maths offline."""

import shutil
from pathlib import Path

import mathjax
from docutils import nodes

MATHJAX = Path(mathjax.__file__).parent / "static" / "mathjax" / "es5"


def label_exported_cells(app, doctree, docname):
    """Over each cell tagged `export`, say which file it goes into, with a link."""
    folder, _, stem = docname.rpartition("/")
    if folder != "notebooks":
        return
    module = stem.split("_", 1)[1]
    uri = app.builder.get_relative_uri(docname, f"_modules/llama_tut/{module}")
    for cell in list(doctree.findall(nodes.container)):
        if "tag_export" not in cell.get("classes", []):
            continue
        link = nodes.reference(
            "", f"llama_tut/{module}.py", internal=True, refuri=uri
        )
        label = nodes.paragraph("", "goes into ", link, classes=["goes-into"])
        cell.parent.insert(cell.parent.index(cell), label)


def drop_thebe(app, pagename, templatename, context, doctree):
    """Leave out thebe's scripts: nothing here runs in the page, and they log errors."""
    for key in ("script_files", "css_files"):
        context[key] = [
            file for file in context.get(key, []) if "thebe" not in str(file)
        ]


def copy_mathjax(app, error):
    """Put MathJax beside the pages, so that maths shows without a network."""
    if error or app.builder.format != "html":
        return
    target = Path(app.outdir) / "_static" / "mathjax"
    (target / "output").mkdir(parents=True, exist_ok=True)
    shutil.copy(MATHJAX / "tex-mml-chtml.js", target)
    shutil.copytree(
        MATHJAX / "output" / "chtml",
        target / "output" / "chtml",
        dirs_exist_ok=True,
    )


def setup(app):
    app.connect("doctree-resolved", label_exported_cells)
    app.connect("html-page-context", drop_thebe, priority=900)
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
