"""Byte pair encoding in plain code: chapter 12."""

from llama_tut.tokens import join, learn_merges


def test_merges_of_the_paper():
    words = {"low": 5, "lower": 2, "widest": 3, "newest": 6}
    merges = ["".join(pair) for pair in learn_merges(words, 6)]
    assert merges == ["st", "est", "ow", "low", "west", "ne"]
    assert join(("a", "b", "a", "b"), ("a", "b")) == ("ab", "ab")
