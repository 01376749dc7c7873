"""Handwritten digits: held out by form, in pairs, from the known file."""

import pytest
import torch

from llama_tut.tools import digits, pretrained
from llama_tut.tools.digits import (
    NAMES,
    digit_pairs,
    digits_of,
    distort,
    read_digits,
)
from llama_tut.tools.files import InputError


def test_the_cut_is_where_a_form_begins():
    _, labels = read_digits()
    (train, first), (val, second) = digits_of("train"), digits_of("val")
    assert len(train) + len(val) == len(labels) == 1797
    for labels in (first, second):
        assert labels[:20].tolist() == [*range(10), *range(10)]
    assert val.min() == 0 and val.max() == 1


def test_held_out_pictures_stand_once_on_each_side_and_as_they_are():
    drawn, texts = digit_pairs("val", 0)
    whole, labels = digits_of("val")
    assert torch.equal(drawn[:, :, :8], whole)
    keys = [
        sorted(p.numpy().tobytes() for p in half)
        for half in (whole, drawn[:, :, 8:])
    ]
    assert keys[0] == keys[1]
    names = [f" {NAMES[i]} " for i in labels]
    assert all(t.startswith(n) for t, n in zip(texts, names, strict=False))


def test_training_pairs_are_drawn_again_the_same():
    first, second = digit_pairs("train", 50), digit_pairs("train", 50)
    assert torch.equal(first[0], second[0]) and first[1] == second[1]
    assert not torch.equal(first[0], digit_pairs("train", 50, seed=1)[0])


def test_distortion_keeps_the_ink_and_moves_it_little():
    whole, _ = digits_of("val")
    moved = distort(whole, torch.Generator().manual_seed(0))
    assert moved.min() >= 0 and moved.max() <= 1 + 1e-6
    ratio = moved.sum((1, 2)) / whole.sum((1, 2))
    assert 0.9 < ratio.median() < 1.1 and not torch.equal(moved, whole)


def test_the_digits_out_of_reach_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_TUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InputError, match="handwritten digits") as error:
        read_digits()
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").glob("digits*"))


def test_another_file_in_the_package_is_refused(tmp_path, monkeypatch):
    def download(wheel, folder, ending, what):
        (folder / "digits.csv.gz").write_bytes(b"something else")
        return folder / "digits.csv.gz"

    monkeypatch.setenv("LLAMA_TUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digits, "download_from_wheel", download)
    with pytest.raises(InputError, match="SHA-256"):
        read_digits()
    assert pretrained.cache_folder() == tmp_path / "cache"
