"""Each notebook is committed as executed, tidy, and shaped as CONTRIBUTING.md asks."""

import re
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


def tags(cell):
    return cell.metadata.get("tags", [])


def is_plot(cell):
    """Whether a code cell's output is a picture."""
    outputs = cell.get("outputs", [])
    return any("image/png" in o.get("data", {}) for o in outputs)


def prose(nb):
    """The text of all markdown cells."""
    texts = [c.source for c in nb.cells if c.cell_type == "markdown"]
    return "\n\n".join(texts)


def test_executed_in_order(notebook):
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1)), "run: make execute"


def test_metadata_is_tidy(notebook):
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.language_info.version.startswith("3.11.")
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
        longest = 45 if "export" in tags(cell) else 30
        assert len(lines) <= longest, f"{cell.id} is long"
        assert max(map(len, lines)) <= 80, f"{cell.id} is wide"


def test_prose_keeps_up_with_code(notebook):
    lines = sum(
        len(c.source.splitlines())
        for c in code_cells(notebook)
        if "remove-cell" not in tags(c)  # the cell for Colab: not on the page
    )
    words = len(prose(notebook).split())
    assert words / lines >= 3, f"{words / lines:.1f} words a line of code"


def test_exported_code_is_looked_at(notebook):
    """No long stretch of exported lines without an output to look at."""
    unseen = 0
    for cell in code_cells(notebook):
        if cell.outputs:
            unseen = 0
        elif "export" in tags(cell):
            unseen += len(cell.source.splitlines())
            assert unseen <= 60, f"{cell.id}: {unseen} lines without an output"


def test_has_a_described_picture(notebook):
    plots = [cell for cell in notebook.cells if is_plot(cell)]
    assert plots, "each chapter has a picture"
    for cell in plots:
        mystnb = cell.metadata.get("mystnb", {})
        assert mystnb.get("image", {}).get("alt"), f"{cell.id} has no alt text"
        assert mystnb.get("figure", {}).get("caption"), cell.id


def test_opens_with_a_question_and_a_picture(notebook):
    number, name = notebook.path.stem.split("_", 1)
    first = notebook.cells[0].source
    assert re.match(rf"# {int(number)} \S", first), "the title has its number"
    assert re.search(r"\*\*[^*]+\?\*\*", first), "a bold question comes first"
    early = notebook.cells[:6]
    assert any(is_plot(c) or ".svg)" in c.source for c in early), (
        "no picture within the first six cells"
    )
    here = f"../book/_static/here/{name}.svg"
    assert any(here in cell.source for cell in early), f"{here} is not shown"


def test_no_line_of_a_paragraph_begins_a_list_by_accident(notebook):
    """A formula that is wrapped before its minus sign is torn in two."""
    for cell in notebook.cells:
        if cell.cell_type != "markdown":
            continue
        text = re.sub(r"```.*?```|\$\$.*?\$\$", "", cell.source, flags=re.S)
        lines = text.splitlines()
        begins = re.compile(r"([-+*>]|1[.)])( |$)")
        item = re.compile(r"\s*([-+*>:|#]|\d+[.)]|  )")
        for before, line in zip(lines, lines[1:], strict=False):
            torn = begins.match(line) and before and not item.match(before)
            lead = before.rstrip().endswith((":", "$$", "-->"))
            assert not torn or lead, line


def test_asks_breaks_and_counts(notebook):
    for tag, least in (("predict", 2), ("break", 1), ("cost", 1)):
        cells = [c for c in code_cells(notebook) if tag in tags(c)]
        assert len(cells) >= least, f"{len(cells)} cells tagged {tag}"
        assert all("assert" in c.source for c in cells), tag


def test_no_answer_stands_in_front_of_its_question(notebook):
    """The answer is folded; what cannot be derived is not called a prediction."""
    text = prose(notebook)
    assert text.count("<details>") == text.count("</details>")
    assert text.count("<details>") >= 2, "two questions with folded answers"
    assert "**Predict" not in text, "ask, and fold the answer"


MUSEUM = ("fault", "seen in", "caught by", "not caught by")


def test_each_fault_has_its_label(notebook):
    """A section "Break it" says what is wrong, where it was, what catches it."""
    for cell in notebook.cells:
        if "## Break it: " in cell.source:
            for row in MUSEUM:
                assert f"| {row} | " in cell.source, (cell.id, row)


def test_says_its_parts(notebook):
    assert "## What it costs" in prose(notebook)
    assert "has not shown" in prose(notebook)
