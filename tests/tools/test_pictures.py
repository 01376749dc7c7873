"""Pictures: digits by form, words by font, a folder of both, one file."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from small_model import caller, refused, save_small_model

from llama_tut.tools import pictures, pretrained
from llama_tut.tools.files import InputError
from llama_tut.tools.pictures import (
    FONTS,
    GROUPS,
    NAMES,
    check_same_tokenizer,
    digit_pairs,
    digits_of,
    distort,
    draw_word,
    font_files,
    prepare_pictures,
    read_digits,
    read_picture,
    read_pictures,
    word_list,
    word_pictures,
    write_picture,
)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text model over bytes."""
    return save_small_model(tmp_path_factory.mktemp("text") / "model")


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


@pytest.mark.parametrize("corpus", ["digits", "words"])
def test_a_folder_is_written_read_and_found_again(corpus, text, tmp_path):
    info = prepare_pictures(corpus, text, tmp_path / "data", 50)
    assert prepare_pictures(corpus, text, tmp_path / "data", 50) == info
    drawn, texts, groups = read_pictures(tmp_path / "data", "train")
    assert len(drawn) == len(texts) == len(groups) == info.train_documents
    assert len(list((tmp_path / "data" / "examples").iterdir())) >= 8
    assert 0 < info.bigram_nats < info.unigram_nats
    with pytest.raises(InputError, match="other data"):
        prepare_pictures(corpus, text, tmp_path / "data", 51)


def test_folders_that_cannot_be_used(text, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        prepare_pictures("digits", text, tmp_path / "full", 8)
    with pytest.raises(InputError, match="tokenizer.json"):
        prepare_pictures("digits", tmp_path, tmp_path / "out", 8)
    np.savez(tmp_path / "train.npz", pictures=np.zeros(3))
    with pytest.raises(InputError, match="damaged"):
        read_pictures(tmp_path, "train")


def test_another_tokenizer_is_refused(text, tmp_path):
    prepare_pictures("digits", text, tmp_path / "data", 8)
    check_same_tokenizer(tmp_path / "data", text)
    other = tmp_path / "other"
    other.mkdir()
    content = (text / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(content.replace('"a"', '"\\u0144"'))
    with pytest.raises(InputError, match="another tokenizer"):
        check_same_tokenizer(tmp_path / "data", other)


def test_a_file_is_read_as_ink(tmp_path):
    drawn = torch.rand(8, 16).mul(255).round() / 255
    write_picture(tmp_path / "a.png", drawn)
    torch.testing.assert_close(read_picture(tmp_path / "a.png", 8, 16), drawn)
    clear = Image.new("RGBA", (16, 8), (0, 0, 0, 0))  # paper shows through
    clear.save(tmp_path / "b.png")
    assert read_picture(tmp_path / "b.png", 8, 16).abs().max() == 0


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    write_picture(tmp_path / "a.png", torch.rand(16, 16))
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    for name, words in (
        ("none.png", "no file"),
        ("text.png", "no picture"),
        ("cut.png", "no picture"),
        ("a.png", r"16 x 16 pixels, the model reads 16 x 8"),
    ):
        with pytest.raises(InputError, match=words):
            read_picture(tmp_path / name, 8, 16)


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
    monkeypatch.setattr(pictures, "download_from_wheel", download)
    with pytest.raises(InputError, match="SHA-256"):
        read_digits()
    assert pretrained.cache_folder() == tmp_path / "cache"


def test_prepare_from_the_command_line(text, tmp_path, monkeypatch, capsys):
    call = caller("prepare", monkeypatch, capsys)
    monkeypatch.setitem(pictures.CORPORA, "digits", 16)
    out = tmp_path / "data"
    code, said, _ = call(
        "--corpus", "digits", "--tokenizer", text, "--out", out
    )
    assert code == 0 and "16 to train on and 382 held out" in said
    refused(call("--corpus", "digits", "--out", out), "--tokenizer")
