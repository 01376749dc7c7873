"""Write llama_tut/NAME.py from the cells tagged `export` of notebooks/NN_NAME.ipynb.

NN_fast_NAME.ipynb writes llama_tut/fast/NAME.py.

python scripts/export.py            write every module
python scripts/export.py --check    write nothing, exit 1 on a difference
"""

import argparse
import ast
import subprocess
import sys
from pathlib import Path

import nbformat
from jinja2 import DictLoader
from nbconvert import PythonExporter
from nbconvert.preprocessors import Preprocessor

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
PACKAGE = ROOT / "llama_tut"

TEMPLATE = """\
{% extends 'base/null.j2' %}
{%- block header -%}
# From notebooks/{{ resources.metadata.name }}.ipynb by scripts/export.py: edit the notebook.
{{ nb.metadata.module_head }}
{%- endblock -%}
{%- block input %}
{{ cell.source }}
{% endblock -%}
{%- block markdowncell -%}{%- endblock -%}
"""


def split_imports(source):
    """Part a cell's source: (docstring, top-level imports, the rest)."""
    lines = source.splitlines()
    docstring, imports = [], []
    taken = set()
    for position, node in enumerate(ast.parse(source).body):
        span = range(node.lineno - 1, node.end_lineno)
        is_text = isinstance(node, ast.Expr) and isinstance(
            getattr(node.value, "value", None), str
        )
        if position == 0 and is_text:
            docstring += [lines[i] for i in span]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            imports += [lines[i] for i in span]
        else:
            continue
        taken.update(span)
    rest = [line for i, line in enumerate(lines) if i not in taken]
    return "\n".join(docstring), "\n".join(imports), "\n".join(rest).strip()


def headings(markdown):
    """The section headings (## and deeper) of a markdown cell, in order."""
    return [
        line.lstrip("# ").strip()
        for line in markdown.splitlines()
        if line.startswith(("## ", "### "))
    ]


class KeepExported(Preprocessor):
    """Keep cells tagged `export`, each under the heading of its section.

    Imports and the module's docstring move to the top of the module.
    """

    def preprocess(self, nb, resources):
        docstrings, imports, kept = [], [], []
        heading = None
        for cell in nb.cells:
            if cell.cell_type == "markdown":
                heading = (headings(cell.source) or [heading])[-1]
            if "export" not in cell.metadata.get("tags", []):
                continue
            docstring, moved, rest = split_imports(cell.source)
            docstrings.append(docstring)
            imports.append(moved)
            if rest:
                title, heading = heading, None
                cell.source = f"# {title}\n\n{rest}" if title else rest
                kept.append(cell)
        docstring = "\n".join(filter(None, docstrings))
        if not docstring:
            name = resources["metadata"]["name"]
            raise SystemExit(
                f"{name}: the first exported cell needs the module's docstring"
            )
        nb.cells = kept
        nb.metadata["module_head"] = "\n".join(
            [docstring, "", *filter(None, imports)]
        )
        return nb, resources


class ModuleExporter(PythonExporter):
    """nbconvert's Python exporter, for one module of the package."""

    template_file = "module.py.j2"
    preprocessors = [KeepExported]

    def __init__(self, **kwargs):
        loader = DictLoader({self.template_file: TEMPLATE})
        super().__init__(extra_loaders=[loader], **kwargs)


def ruff(source, *args):
    """`source` after one ruff command, with the project's settings."""
    result = subprocess.run(
        [sys.executable, "-m", "ruff", *args, "--stdin-filename=m.py", "-"],
        input=source,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if result.returncode:
        raise SystemExit(result.stdout + result.stderr)
    return result.stdout


def export(path):
    """The text of the module that the notebook at `path` builds."""
    text, _ = ModuleExporter().from_filename(str(path))
    text = ruff(text, "check", "--quiet", "--select=I,F401", "--fix")
    return ruff(text, "format", "--quiet")


def has_exports(path):
    """Whether any cell of the notebook is tagged `export`."""
    cells = nbformat.read(path, as_version=4).cells
    return any("export" in c.metadata.get("tags", []) for c in cells)


def module_path(stem):
    """NN_NAME -> NAME.py; NN_fast_NAME -> fast/NAME.py."""
    name = stem.split("_", 1)[1]
    return name.replace("fast_", "fast/", 1) + ".py"


def modules(notebooks=NOTEBOOKS):
    """{notebook: module path} for the notebooks that build a module."""
    return {
        path: PACKAGE / module_path(path.stem)
        for path in sorted(notebooks.glob("[0-9][0-9]_*.ipynb"))
        if has_exports(path)
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "names", nargs="*", help="notebook stems, as 03_rmsnorm (default: all)"
    )
    parser.add_argument(
        "--check", action="store_true", help="exit 1 on any difference"
    )
    args = parser.parse_args()
    table = modules()
    unknown = set(args.names) - {path.stem for path in table}
    if unknown:
        parser.error(f"no such notebook: {', '.join(sorted(unknown))}")
    stale = []
    for notebook, module in table.items():
        if args.names and notebook.stem not in args.names:
            continue
        text = export(notebook)
        if module.exists() and module.read_text() == text:
            continue
        stale.append(
            f"{module.relative_to(ROOT)} differs from {notebook.name}"
        )
        if not args.check:
            module.write_text(text)
            print(f"{notebook.name} -> {module.relative_to(ROOT)}")
    if not args.names:
        known = set(table.values()) | {
            PACKAGE / "__init__.py",
            PACKAGE / "fast" / "__init__.py",
        }
        stale += [
            f"{module.relative_to(ROOT)} has no notebook"
            for module in sorted(
                [*PACKAGE.glob("*.py"), *PACKAGE.glob("fast/*.py")]
            )
            if module not in known
        ]
    if args.check and stale:
        print("\n".join(stale), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
