"""Byte pair encoding in plain code: chapter 12."""

import itertools
import json
import os

import pytest
import tiktoken
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from llama_tut import tokens
from llama_tut.tools.tokenizers import (
    byte_characters,
    last_merge,
    load_tiktoken,
    train_bpe,
)

SAMPLES = (
    "two  spaces,   three\n\n\nand lines \t\n end ",
    "don't we'll I'VE it's they'RE 1234567 3.14159",
    "🙂 👩‍👩‍👧 and 你好，世界。 Ünïcödé \u200b",
    "x**2 == 0x1F  # 100%\r\n\tif (a): b['c'] = 'd'\x00",
    "",
)
TEXT = (tokens.__doc__ + json.__doc__ + itertools.__doc__) * 2


@pytest.fixture(scope="module")
def bpe():
    return tokens.BPE(tokens.train(tokens.count_words([TEXT]), 400))


def test_merges_of_the_page():
    words = {"low": 5, "lower": 2, "widest": 3, "newest": 6}
    bpe = tokens.BPE(tokens.train(words, tokens.FIRST_MERGE + 6))
    new = [token.decode() for token in bpe.tokens[tokens.FIRST_MERGE :]]
    assert new == ["es", "est", "lo", "low", "ew", "new"]
    assert bpe.decode(bpe.encode("lowest")) == "lowest"
    assert [bpe.tokens[i] for i in bpe.encode("lowest")] == [b"low", b"est"]


def test_join_does_not_use_a_token_twice():
    assert tokens.join([1, 1, 1], (1, 1), 2) == [2, 1]
    assert tokens.join([1, 2, 1, 2], (1, 2), 3) == [3, 3]
    assert tokens.join([2, 1], (1, 2), 3) == [2, 1]


def test_the_earliest_merge_goes_first_wherever_it_stands():
    a, b, c = (tokens.BYTE_IDS[ord(letter)] for letter in "abc")
    bpe = tokens.BPE([(b, c), (a, b)])
    assert bpe.encode("abc") == [a, tokens.FIRST_MERGE]
    assert bpe.encode("abab") == [tokens.FIRST_MERGE + 1] * 2


def test_training_stops_when_nothing_is_left_to_merge():
    merges = tokens.train({"ab": 1}, 1000)
    assert len(merges) == 1


def test_equals_tokenizers(bpe):
    library = train_bpe([TEXT], 400)
    letters = byte_characters()
    spelled = ["".join(letters[byte] for byte in t) for t in bpe.tokens]
    model = json.loads(library.to_str())["model"]
    assert model["merges"] == [[spelled[a], spelled[b]] for a, b in bpe.merges]
    assert [model["vocab"][t] for t in spelled[1:]] == list(range(1, 400))
    library.encode_special_tokens = True
    for text in (*SAMPLES, tokens.BPE.__doc__, "a <|endoftext|> b"):
        assert library.encode(text).ids == bpe.encode(text)
        assert bpe.decode(bpe.encode(text)) == text


def test_llama3_pattern_equals_tokenizers():
    """The library with Llama 3's expression, which its Rust engine runs."""
    pattern = tokens.LLAMA3_PATTERN
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern.pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=380,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator([TEXT], trainer)
    merges = tokens.train(tokens.count_words([TEXT], pattern), 380)
    bpe = tokens.BPE(merges, pattern)
    for text in (*SAMPLES, TEXT):
        assert library.encode(text).ids == bpe.encode(text)
    assert pattern.findall("12345678") == ["123", "456", "78"]


@pytest.mark.parametrize("pattern", ["GPT2_PATTERN", "LLAMA3_PATTERN"])
def test_equals_tiktoken_with_our_ranks(pattern):
    pattern = getattr(tokens, pattern)
    merges = tokens.train(tokens.count_words([TEXT], pattern), 380)
    bpe = tokens.BPE(merges, pattern)
    encoding = tiktoken.Encoding(
        "ours",
        pat_str=pattern.pattern,
        mergeable_ranks={t: n for n, t in enumerate(bpe.tokens) if n},
        special_tokens={"<|endoftext|>": 0},
    )
    for text in (*SAMPLES, TEXT):
        assert encoding.encode_ordinary(text) == bpe.encode(text)


@pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ,
    reason="GPT-2's vocabulary: set TIKTOKEN_CACHE_DIR",
)
def test_equals_gpt2_with_its_own_merges():
    """GPT-2 numbers its bytes from 0, we from 1: every id is one more."""
    gpt2 = load_tiktoken()
    ranks = gpt2._mergeable_ranks
    by_rank = sorted(ranks, key=ranks.get)
    assert [token[0] for token in by_rank[:256]] == tokens.BYTES
    pairs = (last_merge(token, ranks) for token in by_rank[256:])
    merges = [(ranks[a] + 1, ranks[b] + 1) for a, b in pairs]
    bpe = tokens.BPE(merges)
    assert gpt2._pat_str  # the same cuts, whatever its spelling
    for text in (*SAMPLES, TEXT, tokens.BPE.__doc__):
        ids = gpt2.encode_ordinary(text)
        assert [token - 1 for token in bpe.encode(text)] == ids
        assert bpe.decode(bpe.encode(text)) == text


def test_bytes_that_are_no_text_do_not_stop_decoding():
    bpe = tokens.BPE([])
    assert bpe.decode([tokens.BYTE_IDS[0xF0]]) == "\N{REPLACEMENT CHARACTER}"
    assert bpe.decode([0]) == "<|endoftext|>"
