"""The drawings "you are here" are those that the script draws, one a chapter."""

import re
import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "book" / "_static" / "here"
DRAW = runpy.run_path(str(ROOT / "book" / "draw.py"))
CHAPTERS, PIECES, SVG = DRAW["CHAPTERS"], DRAW["pieces"](), DRAW["svg"]
STEMS = [p.stem[3:] for p in sorted((ROOT / "notebooks").glob("*_*.ipynb"))]


def test_every_chapter_has_a_drawing_and_no_drawing_is_left_over():
    assert set(STEMS) <= set(CHAPTERS)
    assert {path.stem for path in HERE.glob("*")} == set(CHAPTERS)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_file_is_what_the_script_draws(chapter):
    written = (HERE / f"{chapter}.svg").read_text()
    assert written == SVG(chapter), "run python book/draw.py"
    ElementTree.fromstring(written)  # well-formed


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_colours_pieces_that_exist(chapter):
    names = CHAPTERS[chapter][1].split()
    assert names and set(names) <= {name for name, _ in PIECES}
    assert SVG(chapter).count('<g class="on">') > 0


def test_everything_stays_on_the_page():
    for _, drawing in PIECES:
        for rect in re.findall(r"<rect [^>]*>", drawing):
            x, y, w, h = (
                float(re.search(rf' {k}="([\d.]+)"', rect)[1])
                for k in ("x", "y", "width", "height")
            )
            assert x >= 4 and x + w <= DRAW["WIDTH"] - 4
            assert y >= 4 and y + h <= DRAW["HEIGHT"] - 4
