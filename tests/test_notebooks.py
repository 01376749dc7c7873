"""Each notebook is committed as executed, tidy, and shaped as CONTRIBUTING.md asks."""

from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda p: p.stem)
def notebook(request):
    nb = nbformat.read(request.param, as_version=4)
    nb.path = request.param
    return nb


def code_cells(nb):
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def pictures(nb):
    """The code cells whose output is a picture."""
    return [
        cell
        for cell in code_cells(nb)
        if any("image/png" in o.get("data", {}) for o in cell.outputs)
    ]


def test_executed_in_order(notebook):
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1)), "run: make execute"


def test_metadata_is_tidy(notebook):
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    name = notebook.path.stem.split("_", 1)[1]
    ids = [cell.id for cell in notebook.cells]
    assert ids == [f"{name}-{i:02d}" for i in range(1, len(ids) + 1)]


def test_outputs_are_small_and_clean(notebook):
    assert notebook.path.stat().st_size < 400_000
    for cell in code_cells(notebook):
        for output in cell.outputs:
            assert output.get("name") != "stderr", cell.id
            assert output.output_type != "error", cell.id
            kinds = set(output.get("data", {}))
            assert kinds <= {"text/plain", "image/png", "text/html"}, cell.id


def test_a_cell_fits_a_screen(notebook):
    for cell in code_cells(notebook):
        lines = cell.source.splitlines()
        tagged = "export" in cell.metadata.get("tags", [])
        assert len(lines) <= (45 if tagged else 30), f"{cell.id} is long"
        assert max(map(len, lines)) <= 80, f"{cell.id} is wide"


def test_prose_keeps_up_with_code(notebook):
    words = sum(
        len(c.source.split())
        for c in notebook.cells
        if c.cell_type == "markdown"
    )
    lines = sum(
        len(c.source.splitlines())
        for c in code_cells(notebook)
        if "remove-cell" not in tags(c)  # the cell for Colab: not on the page
    )
    assert words / lines >= 4, f"{words / lines:.1f} words a line of code"


def test_has_a_described_picture(notebook):
    assert pictures(notebook), "each chapter has a picture"
    for cell in pictures(notebook):
        mystnb = cell.metadata.get("mystnb", {})
        assert mystnb.get("image", {}).get("alt"), f"{cell.id} has no alt text"
        assert mystnb.get("figure", {}).get("caption"), cell.id


def tags(cell):
    return cell.metadata.get("tags", [])


def test_predicts_breaks_and_counts(notebook):
    for tag, least in (("predict", 2), ("break", 1), ("cost", 1)):
        cells = [c for c in code_cells(notebook) if tag in tags(c)]
        assert len(cells) >= least, f"{len(cells)} cells tagged {tag}"
        assert all("assert" in c.source for c in cells), tag


MUSEUM = ("fault", "seen in", "caught by", "not caught by")


def test_each_fault_has_its_label(notebook):
    """A section "Break it" says what is wrong, where it was, what catches it."""
    for cell in notebook.cells:
        if "## Break it: " in cell.source:
            for row in MUSEUM:
                assert f"| {row} | " in cell.source, (cell.id, row)


def test_says_its_parts(notebook):
    text = "\n".join(
        c.source for c in notebook.cells if c.cell_type == "markdown"
    )
    number, name = notebook.path.stem.split("_", 1)
    assert text.startswith(f"# {int(number)} "), "the title has its number"
    for part in ("## Input, output, role", "## What it costs"):
        assert part in text, part
    assert "has not shown" in text
