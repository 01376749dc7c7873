"""Words in the fonts that matplotlib brings: what chapter 27 reads second."""

import functools
import re
from pathlib import Path

import numpy as np
import torch

from llama_tut.tools.documents import hash_place

FONTS = {  # family: files; whole families are held out
    "train": {
        "DejaVu Sans": ["", "-Bold", "-Oblique", "-BoldOblique"],
        "DejaVu Sans Mono": ["", "-Bold", "-Oblique", "-BoldOblique"],
        "STIX General": ["", "Bol", "Italic", "BolIta"],
        "cmss10": [""],
        "cmtt10": [""],
    },
    "val": {
        "DejaVu Serif": ["", "-Bold", "-Italic", "-BoldItalic"],
        "cmr10": [""],
        "cmb10": [""],
        "cmti10": [""],
    },
}
WORD_HEIGHT, WORD_WIDTH = 16, 48
GROUPS = (  # of the validation pictures: known or new words and fonts
    ("known words, known fonts", False, False),
    ("known words, new fonts", False, True),
    ("new words, known fonts", True, False),
    ("new words, new fonts", True, True),
)


def font_files(split):
    """The paths of the fonts of a split, as matplotlib ships them."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return [
        folder / f"{family.replace(' ', '')}{style}.ttf"
        for family, styles in FONTS[split].items()
        for style in styles
    ]


def word_list(new):
    """Words of three to five letters in Python's own reference, sorted.

    A fifth of them is held out, by a hash of the word.
    """
    import pydoc_data.topics

    text = "\n".join(pydoc_data.topics.topics.values())
    words = sorted(set(re.findall(r"\b[a-z]{3,5}\b", text)))
    return [word for word in words if (hash_place(word) < 0.2) == new]


@functools.cache
def load_font(path, size):
    """A TrueType file's letters in `size` pixels; a file is read once."""
    from PIL import ImageFont

    return ImageFont.truetype(path, size)


def draw_word(word, font, size, across, down):
    """A word as ink on paper, uint8 [16, 48], 255 is ink.

    Args:
        font: path of a TrueType file.
        size: of the letters in pixels; smaller where the word is too wide.
        across, down: from 0 to 1, where in the free space it stands.
    """
    from PIL import Image, ImageDraw

    while True:
        type = load_font(font, size)
        left, top, right, bottom = type.getbbox(word)
        if right - left <= WORD_WIDTH and bottom - top <= WORD_HEIGHT:
            break
        size -= 1
    image = Image.new("L", (WORD_WIDTH, WORD_HEIGHT))
    x = across * (WORD_WIDTH - (right - left)) - left
    y = down * (WORD_HEIGHT - (bottom - top)) - top
    ImageDraw.Draw(image).text((round(x), round(y)), word, 255, type)
    return np.asarray(image)


def spelled(word):
    """The text that belongs to a picture of a word: its letters, apart."""
    return "".join(f" {letter}" for letter in word)


def word_pictures(split, count, seed=0):
    """Words in fonts of 11 to 14 pixels: float32 [M, 16, 48], texts, groups.

    Groups are numbers of GROUPS; training pictures are all of group 0.
    """
    random = np.random.default_rng(seed + (split == "val"))
    pictures, texts, groups = [], [], []
    for group, (_, new_words, new_fonts) in enumerate(GROUPS):
        if split == "train" and group:
            break
        words = word_list(new_words)
        fonts = font_files("val" if new_fonts else "train")
        share = count if split == "train" else count // len(GROUPS)
        for _ in range(share):
            word, font = random.choice(words), random.choice(fonts)
            size, place = int(random.integers(11, 15)), random.random(2)
            pictures.append(draw_word(str(word), font, size, *place))
            texts.append(spelled(word))
            groups.append(group)
    pictures = torch.from_numpy(np.stack(pictures)).float() / 255
    return pictures, texts, groups
