"""A notebook is the source of its module: both directions, and imports that point back."""

import ast
import subprocess
import sys
from pathlib import Path

import export
import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent

TABLE = export.modules()
ORDER = [module.stem for module in TABLE.values()]
TOOLS = sorted((export.PACKAGE / "tools").glob("*.py"))


def names(source):
    """Names of the classes, functions and constants a source defines on top."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = getattr(node, "targets", None) or [node.target]
            found |= {t.id for t in targets if isinstance(t, ast.Name)}
    return found


@pytest.mark.parametrize("notebook", TABLE, ids=lambda p: p.stem)
def test_module_is_what_the_notebook_exports(notebook):
    module = TABLE[notebook]
    assert module.exists(), f"run: make export ({module.name} is missing)"
    assert module.read_text() == export.export(notebook), "run: make export"


@pytest.mark.parametrize("notebook", TABLE, ids=lambda p: p.stem)
def test_every_exported_definition_arrives(notebook):
    cells = nbformat.read(notebook, as_version=4).cells
    wanted = set()
    for cell in cells:
        if "export" in cell.metadata.get("tags", []):
            wanted |= names(cell.source)
    assert wanted and wanted == names(TABLE[notebook].read_text())


@pytest.mark.parametrize("module", TABLE.values(), ids=lambda p: p.stem)
def test_module_reads_as_written_by_hand(module):
    text = module.read_text()
    tree = ast.parse(text)
    assert text.startswith("# From notebooks/"), (
        "first line names its notebook"
    )
    assert "Letters:" in (ast.get_docstring(tree) or "")
    classes = [n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
    assert len(classes) == len(set(classes)), "one class in one cell"
    kinds = [isinstance(n, ast.Import | ast.ImportFrom) for n in tree.body[1:]]
    assert True not in kinds[kinds.index(False) :], "imports stand on top"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names)


def imported(path):
    """The modules of llama_tut that a file imports, without `llama_tut.`."""
    for node in ast.walk(ast.parse(path.read_text())):
        sources = []
        if isinstance(node, ast.ImportFrom):
            sources = [node.module or ""]
            if sources == ["llama_tut.fast"]:  # its modules, by name
                sources = [f"llama_tut.fast.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            sources = [alias.name for alias in node.names]
        for source in sources:
            assert source.split(".")[0] not in ("scripts", "benchmarks")
            if source.startswith("llama_tut."):
                yield source.removeprefix("llama_tut.")


@pytest.mark.parametrize("module", TABLE.values(), ids=lambda p: p.stem)
def test_imports_point_to_earlier_chapters(module):
    for other in imported(module):
        if other.partition(".")[0] == "tools":
            continue
        name = other.removeprefix("fast.")
        assert ORDER.index(name) < ORDER.index(module.stem), (
            f"{module.stem} imports the later chapter {other}"
        )


@pytest.mark.parametrize("module", TOOLS, ids=lambda p: p.stem)
def test_tools_know_no_chapter_but_config(module):
    for other in imported(module):
        assert other.partition(".")[0] in ("config", "tools"), (
            f"{module.stem} imports the chapter {other}"
        )


def test_no_module_without_a_notebook():
    for folder in (export.PACKAGE, export.PACKAGE / "fast"):
        known = {p for p in TABLE.values() if p.parent == folder}
        found = set(folder.glob("*.py")) - {folder / "__init__.py"}
        assert found == known


def test_check_finds_a_difference(tmp_path, monkeypatch, capsys):
    """--check exits 1, and names the module, when one byte differs."""
    for path in export.PACKAGE.glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "rmsnorm.py").write_text("# edited by hand\n")
    (tmp_path / "orphan.py").write_text("")
    monkeypatch.setattr(export, "PACKAGE", tmp_path)
    monkeypatch.setattr(export, "ROOT", tmp_path)
    monkeypatch.setattr(
        export, "ruff", lambda s, *a, run=export.ruff: run_in(ROOT, run, s, a)
    )
    monkeypatch.setattr(sys, "argv", ["export.py", "--check"])
    assert export.main() == 1
    said = capsys.readouterr().err
    assert "rmsnorm.py differs" in said and "orphan.py has no" in said
    assert "rope.py" not in said


def run_in(root, run, source, args):
    """Call ruff with the project's settings whatever `export.ROOT` is."""
    saved, export.ROOT = export.ROOT, root
    try:
        return run(source, *args)
    finally:
        export.ROOT = saved


def test_an_exported_magic_is_refused(tmp_path):
    cell = nbformat.v4.new_code_cell(
        "%time 1 + 1", metadata={"tags": ["export"]}
    )
    path = tmp_path / "03_rmsnorm.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)
    with pytest.raises(SyntaxError):
        export.export(path)


def test_ruff_is_content():
    for args in (["check", "."], ["format", "--check", "."]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *args],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout
