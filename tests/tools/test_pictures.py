"""Pictures: a folder that is written, read and found again; one file."""

import numpy as np
import pytest
import torch
from PIL import Image
from small_model import caller, refused, save_small_model

from llama_tut.tools import pictures
from llama_tut.tools.files import InputError
from llama_tut.tools.pictures import (
    check_same_tokenizer,
    prepare_pictures,
    read_picture,
    read_pictures,
    write_picture,
)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text model over bytes."""
    return save_small_model(tmp_path_factory.mktemp("text") / "model")


@pytest.mark.parametrize("corpus", ["digits", "words"])
def test_a_folder_is_written_read_and_found_again(corpus, text, tmp_path):
    info = prepare_pictures(corpus, text, tmp_path / "data", 50)
    assert prepare_pictures(corpus, text, tmp_path / "data", 50) == info
    drawn, texts, groups = read_pictures(tmp_path / "data", "train")
    assert len(drawn) == len(texts) == len(groups) == info.train_documents
    assert len(list((tmp_path / "data" / "examples").iterdir())) >= 8
    assert 0 < info.bigram_nats < info.unigram_nats
    with pytest.raises(InputError, match="another data set"):
        prepare_pictures(corpus, text, tmp_path / "data", 51)


def test_folders_that_cannot_be_used(text, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="holds files"):
        prepare_pictures("digits", text, tmp_path / "full", 8)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="exists and is no folder"):
        prepare_pictures("digits", text, tmp_path / "file", 8)
    with pytest.raises(InputError, match="tokenizer.json"):
        prepare_pictures("digits", tmp_path, tmp_path / "out", 8)
    np.savez(tmp_path / "train.npz", pictures=np.zeros(3))
    with pytest.raises(InputError, match="damaged"):
        read_pictures(tmp_path, "train")


def test_a_failed_call_leaves_nothing_and_goes_on(text, tmp_path, monkeypatch):
    def fail(*arguments):
        raise InputError("no network")

    out = tmp_path / "data"
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "make_pictures", fail)
        with pytest.raises(InputError, match="no network"):
            prepare_pictures("digits", text, out, 8)
    assert not out.exists()
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "save_examples", fail)  # in the middle
        with pytest.raises(InputError, match="no network"):
            prepare_pictures("digits", text, out, 8)
    assert prepare_pictures("digits", text, out, 8).train_documents == 8
    (out / "dataset.json").write_text("{")
    with pytest.raises(InputError, match="dataset.json"):
        prepare_pictures("digits", text, out, 8)


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


def test_prepare_from_the_command_line(text, tmp_path, monkeypatch, capsys):
    call = caller("prepare", monkeypatch, capsys)
    monkeypatch.setitem(pictures.CORPORA, "digits", 16)
    out = tmp_path / "data"
    code, said, _ = call(
        "--corpus", "digits", "--tokenizer", text, "--out", out
    )
    assert code == 0 and "16 to train on and 382 held out" in said
    refused(call("--corpus", "digits", "--out", out), "--tokenizer")
