"""Printed words: held out by font and by word, and never cut."""

import itertools

import pytest

from llama_tut.tools.printed_words import (
    FONTS,
    GROUPS,
    draw_word,
    font_files,
    word_list,
    word_pictures,
)


def test_fonts_and_words_are_held_out_apart():
    files = {split: set(font_files(split)) for split in FONTS}
    assert all(path.is_file() for path in files["train"] | files["val"])
    assert not files["train"] & files["val"]
    families = [set(FONTS[split]) for split in ("train", "val")]
    for one, other in itertools.product(*families):
        assert one != other
    known, new = set(word_list(False)), set(word_list(True))
    assert not known & new and 0.1 < len(new) / len(known | new) < 0.3
    _, texts, groups = word_pictures("val", 40)
    for said, group in zip(texts, groups, strict=True):
        assert (said.replace(" ", "") in new) == GROUPS[group][1]
    assert (
        not {t.replace(" ", "") for t in word_pictures("train", 40)[1]} & new
    )


@pytest.mark.parametrize("font", font_files("train") + font_files("val"))
def test_a_word_is_never_cut(font):
    """The corners of the picture's ink do not depend on where it stands."""
    counts = {
        int((draw_word("wgmfj", font, 14, *place) > 0).sum())
        for place in itertools.product((0, 0.5, 1), repeat=2)
    }
    assert len(counts) == 1 and counts.pop() > 40
