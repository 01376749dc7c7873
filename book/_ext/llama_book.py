"""What the book needs beside Jupyter Book.

A label on exported cells, links from names in the text to the modules page and
from there back to the sections that build them, and maths offline.
"""

import re
import shutil
from pathlib import Path

import mathjax
from docutils import nodes
from sphinx import addnodes

MATHJAX = Path(mathjax.__file__).parent / "static" / "mathjax" / "es5"


def module_file(docname):
    """Path in llama_tut of the module that a chapter builds, without `.py`.

    `notebooks/05_attention` -> `attention`, `19_fast_training` ->
    `fast/training`; None for other pages.
    """
    folder, _, stem = docname.rpartition("/")
    if folder != "notebooks":
        return None
    return stem.split("_", 1)[1].replace("fast_", "fast/", 1)


def label_exported_cells(app, doctree, docname):
    """Over each cell tagged `export`, say which file it goes into, with a link."""
    module = module_file(docname)
    if module is None:
        return
    uri = app.builder.get_relative_uri(docname, f"_modules/llama_tut/{module}")
    for cell in list(doctree.findall(nodes.container)):
        if "tag_export" not in cell.get("classes", []):
            continue
        link = nodes.reference(
            "", f"llama_tut/{module}.py", internal=True, refuri=uri
        )
        label = nodes.paragraph("", "goes into ", link, classes=["goes-into"])
        cell.parent.insert(cell.parent.index(cell), label)


def public_objects(env):
    """{name: [(full name, page, anchor)]} of all that the modules page lists.

    An object has two names: `rmsnorm.LlamaRMSNorm` and `LlamaRMSNorm`.
    """
    found = {}
    for full, entry in env.get_domain("py").objects.items():
        package, _, name = full.partition(".")
        if package == "llama_tut" and name:
            place = (full, entry.docname, entry.node_id)
            names = {full, name}
            if entry.objtype != "module":
                names |= {name.partition(".")[2]}
            for one in names - {""}:
                found.setdefault(one, []).append(place)
    return found


def own_module(docname):
    """The module that a chapter builds; None for other pages."""
    module = module_file(docname)
    return f"llama_tut.{module.replace('/', '.')}." if module else None


def find_object(literal, docname, objects):
    """(full name, page, anchor) of the public object named, or None.

    A name in several modules is that of the chapter at hand. A plain word such
    as `score` means the function in its own chapter only, and there not in an
    exercise, where it may be an argument.
    """
    own = own_module(docname)
    name = re.sub(r"\(.*\)$", "", literal.astext())
    places = objects.get(name, [])
    here = [place for place in places if own and place[0].startswith(own)]
    if re.fullmatch("[a-z]+", literal.astext()):
        return here[0] if here and not in_exercise(literal) else None
    return (here or (places if len(places) == 1 else [None]))[0]


def in_exercise(node):
    """Whether the node stands in an exercise's statement."""
    while node.parent is not None:
        node = node.parent
        if "exercise" in node.get("classes", []):
            return True
    return False


# "transformers' `LlamaAttention`" is not ours: words of one sentence.
OTHER = r"(transformers|torch|PyTorch|nanoGPT)\b"
BEFORE = re.compile(rf"\b{OTHER}[^.;]{{0,40}}$")
AFTER = re.compile(rf"^ of {OTHER}")


def link_names(app, doctree, docname):
    """Make inline code that names a public object a link to its entry."""
    objects = public_objects(app.env)
    for literal in list(doctree.findall(nodes.literal)):
        parent = literal.parent
        if isinstance(parent, nodes.reference | nodes.title):
            continue
        place = find_object(literal, docname, objects)
        if not place:
            continue
        index = parent.index(literal)
        before = parent[index - 1].astext() if index else ""
        after = parent[index + 1 : index + 2]
        if BEFORE.search(before) or any(
            AFTER.search(a.astext()) for a in after
        ):
            continue
        full, page, anchor = place
        uri = app.builder.get_relative_uri(docname, page) + f"#{anchor}"
        link = nodes.reference(
            "", "", internal=True, refuri=uri, reftitle=full
        )
        parent.replace(literal, link)
        link += literal


DEFINITION = re.compile(r"^(?:class|def) (\w+)|^([A-Z_]+) =", re.M)


def building_sections(env):
    """{full name: (page, anchor, title)}: where the chapters build each object."""
    found = {}
    for docname in sorted(env.found_docs):
        own = own_module(docname)
        if not own:
            continue
        for cell in env.get_doctree(docname).findall(nodes.container):
            section = cell.parent
            if "tag_export" not in cell.get("classes", []) or not isinstance(
                section, nodes.section
            ):
                continue
            place = (docname, section["ids"][0], section[0].astext())
            for names in DEFINITION.findall(cell.astext()):
                found[own + "".join(names)] = place
    return found


def link_chapters(app, doctree, docname):
    """Beside each entry of the modules page, a link to the section that builds it."""
    if docname != "book/modules":
        return
    sections = building_sections(app.env)
    for signature in doctree.findall(addnodes.desc_signature):
        full = (signature.get("ids") or [""])[0]
        if full not in sections:
            continue
        page, anchor, title = sections[full]
        uri = app.builder.get_relative_uri(docname, page) + f"#{anchor}"
        number = int(page.rpartition("/")[2][:2])
        link = nodes.reference(
            "", f"[chapter {number}]", internal=True, refuri=uri
        )
        link["reftitle"] = title
        link["classes"].append("built-in")
        signature += link


QUOTED = re.compile(r"(?<!`)`([^`]+)`(?!`)(\w?)")


def literal_names(app, what, name, obj, options, lines):
    """Names in `single` quotes are code, in docstrings as in the chapters."""

    def literal(match):
        inside = " ".join(match[1].split())
        return f"``{inside}``" + (rf"\ {match[2]}" if match[2] else "")

    lines[:] = QUOTED.sub(literal, "\n".join(lines)).split("\n")


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
    app.connect("doctree-resolved", link_names)
    app.connect("doctree-resolved", link_chapters)
    app.connect("autodoc-process-docstring", literal_names)
    app.connect("html-page-context", drop_thebe, priority=900)
    app.connect("build-finished", copy_mathjax)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
