"""Tokenizers: trained, saved, read back, and GPT-2's."""

import json
import os
import random
import re
import shutil
import time

import numpy as np
import pytest
from transformers import AutoTokenizer

from llama_tut.tools import prepare, tokenizers
from llama_tut.tools.files import InputError

SAMPLES = (
    "two  spaces,   three\n\n\nand lines \t\n end ",
    "don't we'll I'VE it's they'RE",
    "🙂 👩‍👩‍👧 and 你好，世界。 Ünïcödé \u200b",
    "x**2 + 3.14159 == 0x1F  # 100%",
    "a\r\nb\x00c",
)
SPECIAL = "before <|endoftext|> after"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A trained tokenizer as a folder."""
    folder = tmp_path_factory.mktemp("bpe")
    text = (tokenizers.__doc__ + prepare.prepare.__doc__) * 3
    tokenizers.save_tokenizer(tokenizers.train_bpe([text], 400), folder)
    return folder


def test_bpe_round_trip_and_ids_of_auto_tokenizer(bpe):
    encode = tokenizers.Encoder(tokenizers.read_tokenizer(bpe))
    auto = AutoTokenizer.from_pretrained(bpe)
    for sample in SAMPLES:
        (ids,) = encode([sample])
        assert ids.dtype == np.uint32
        assert ids.tolist() == auto(sample).input_ids
        assert auto.decode(ids) == sample
    assert len(auto) == 400
    assert auto.eos_token == auto.bos_token == tokenizers.END_OF_TEXT
    assert auto.eos_token_id == 0


def test_bpe_is_the_same_every_time(bpe):
    text = (tokenizers.__doc__ + prepare.prepare.__doc__) * 3
    again = tokenizers.train_bpe(iter([text]), 400)
    assert again.to_str(True) == (bpe / "tokenizer.json").read_text()


def hard_texts(number):
    """Texts whose words are hard to cut: any characters, and runs of spaces."""
    draw = random.Random(0)
    pieces = [*" \t\n\r\u00a0\u3000\u200d'_aéß²½٣日😀", "  ", "'s", "12345"]
    pieces += [SPECIAL, "x" * 300, " " * 100, "e\u0301", "\x00", "\ufeff"]
    for _ in range(number):
        count = draw.randrange(60)
        if draw.random() < 0.5:
            yield "".join(draw.choices(pieces, k=count))
        else:
            places = range(1, 0xD800), range(0xE000, 0x20000)
            yield "".join(
                chr(draw.choice(draw.choice(places))) for _ in range(count)
            )


def test_the_fast_twin_gives_the_same_ids(bpe):
    pytest.importorskip("fastokens")
    tokenizer = tokenizers.read_tokenizer(bpe)
    encode = tokenizers.Encoder(tokenizer)
    assert encode.twin is not None
    texts = list(hard_texts(3000))
    fast = [ids.tolist() for ids in encode(texts)]
    encode.twin = None
    assert fast == [ids.tolist() for ids in encode(texts)]


def test_a_twin_that_errs_is_not_used(bpe, monkeypatch):
    tokenizer = tokenizers.read_tokenizer(bpe)
    wrong = [np.array([1, 2], np.uint32)]
    monkeypatch.setattr(tokenizers, "encode_flat", lambda twin, texts: wrong)
    assert tokenizers.Encoder(tokenizer).twin is None


def test_special_token_in_a_document_stays_text(bpe):
    (ids,) = tokenizers.Encoder(tokenizers.read_tokenizer(bpe))([SPECIAL])
    assert 0 not in ids
    assert tokenizers.read_tokenizer(bpe).decode(ids) == SPECIAL


def test_merges_come_back_from_ranks(bpe):
    model = json.loads((bpe / "tokenizer.json").read_text())["model"]
    byte_of = {c: b for b, c in tokenizers.byte_characters().items()}
    names = sorted(model["vocab"], key=model["vocab"].get)[1:]
    ranks = {bytes(byte_of[c] for c in t): i for i, t in enumerate(names)}
    rebuilt = json.loads(tokenizers.tokenizer_from_ranks(ranks).to_str())
    assert rebuilt["model"]["merges"] == model["merges"]


needs_gpt2 = pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ,
    reason="GPT-2's vocabulary: set TIKTOKEN_CACHE_DIR",
)


@needs_gpt2
def test_gpt2_ids_equal_tiktokens(tmp_path):
    gpt2 = tokenizers.load_tiktoken()
    folder = tmp_path / "gpt2"
    ranks = gpt2._mergeable_ranks
    tokenizers.save_tokenizer(tokenizers.tokenizer_from_ranks(ranks), folder)
    reader = tokenizers.read_tokenizer(folder)
    fast, slow = tokenizers.Encoder(reader), tokenizers.Encoder(reader)
    slow.twin = None
    auto = AutoTokenizer.from_pretrained(folder)
    for sample in (*SAMPLES, SPECIAL, prepare.prepare.__doc__):
        ids = gpt2.encode_ordinary(sample)
        assert fast([sample])[0].tolist() == ids
        assert slow([sample])[0].tolist() == ids
        if sample != SPECIAL:
            assert auto(sample).input_ids == ids
    assert auto.eos_token_id == gpt2.eot_token == 50256
    assert tokenizers.separator_id(folder, reader) == 50256


def test_no_gpt2_and_no_network(monkeypatch):
    def fail(name):
        raise ConnectionError("no route")

    monkeypatch.setattr("tiktoken.get_encoding", fail)
    with pytest.raises(InputError, match="TIKTOKEN_CACHE_DIR"):
        tokenizers.load_tiktoken()


@pytest.mark.parametrize(
    "special, config, expected",
    [
        (["<|im_start|>", "<|endoftext|>"], {"bos_token": "<|im_start|>"}, 1),
        (["<|begin_of_text|>", "<|end_of_text|>"], {}, 0),
        (["<s>", "</s>"], {"bos_token": {"content": "<s>"}}, 0),
        (["<s>", "</s>"], {"bos_token": None, "eos_token": "</s>"}, 1),
    ],
)
def test_separator_of_other_tokenizers(tmp_path, special, config, expected):
    core = tokenizers.byte_level(tokenizers.models.BPE())
    core.add_special_tokens(special)
    (tmp_path / "tokenizer.json").write_text(core.to_str())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    reader = tokenizers.read_tokenizer(tmp_path)
    assert tokenizers.separator_id(tmp_path, reader) == expected


def test_a_tokenizer_without_separator_is_refused(tmp_path):
    core = tokenizers.byte_level(tokenizers.models.BPE())
    (tmp_path / "tokenizer.json").write_text(core.to_str())
    with pytest.raises(InputError, match="no end-of-text"):
        tokenizers.separator_id(tmp_path, tokenizers.read_tokenizer(tmp_path))


def test_tokenizer_folder_is_refused_when_unreadable(tmp_path):
    with pytest.raises(InputError, match="neither bpe nor gpt2"):
        tokenizers.read_tokenizer(tmp_path / "gtp2")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(
        InputError, match="tokenizer.json cannot be read as a tokenizer"
    ):
        tokenizers.read_tokenizer(tmp_path)
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(
    "config, says",
    [('{"bos_token": ', "no readable JSON"), ("[1]", "no JSON object")],
)
def test_a_damaged_tokenizer_config_is_one_line(tmp_path, config, says):
    core = tokenizers.byte_level(tokenizers.models.BPE())
    core.add_special_tokens(["<s>"])
    (tmp_path / "tokenizer.json").write_text(core.to_str())
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(InputError, match=f"tokenizer_config.json.*{says}"):
        tokenizers.separator_id(tmp_path, tokenizers.read_tokenizer(tmp_path))


def test_a_token_that_is_no_name_is_passed_over(tmp_path):
    core = tokenizers.byte_level(tokenizers.models.BPE())
    core.add_special_tokens(["</s>"])
    (tmp_path / "tokenizer.json").write_text(core.to_str())
    config = {"bos_token": 7, "eos_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    reader = tokenizers.read_tokenizer(tmp_path)
    assert tokenizers.separator_id(tmp_path, reader) == 0


def test_one_long_word_is_cut_for_training_and_said(capsys):
    word = "".join(random.Random(0).choices("ACGT", k=200_000))
    start = time.process_time()
    trained = tokenizers.train_bpe([word, "short words"], 300)
    assert time.process_time() - start < 5
    assert trained.get_vocab_size() == 300
    said = capsys.readouterr().err
    assert "cut 200 times" in said and said.count("\n") == 1
    tokenizers.train_bpe(["short words"], 257)
    assert capsys.readouterr().err == ""


def test_cutting_loses_no_letter():
    for text in ("a" * 95 + " b", " " * 40 + "ab", "", "x" * 10, "\n" * 11):
        parts = tokenizers.cut_long_words(text, 10)
        assert "".join(parts) == text
        runs = [re.findall(r"\S+|\s+", part) for part in parts]
        assert all(len(run) <= 10 for found in runs for run in found)


def test_cut_gives_the_beginning_of_so_many_tokens(bpe):
    encode = tokenizers.Encoder(tokenizers.read_tokenizer(bpe))
    text = "def prepare(corpus): make é 你 a folder\n" * 3
    (ids,) = encode([text])
    for count in (0, 1, 7, 20, len(ids)):
        part = encode.cut(text, count)
        assert text.startswith(part)
        assert abs(len(encode([part])[0]) - count) <= 2
