"""Fixtures of several files: a small model, the tiny corpus, the options of a short run."""

import random

import pytest
from small_model import save_small_model
from training_setup import OPTIONS, tiny_data

from llama_tut.tools.options import configure
from llama_tut.tools.prepare import prepare


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The small model, saved; who changes it takes a copy."""
    return save_small_model(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The tiny corpus as a data folder; who changes it takes a copy."""
    return tiny_data(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def config(data, tmp_path):
    """A run of 16 steps in a folder of its own."""
    return configure(
        {"data": str(data), "out": str(tmp_path / "run"), **OPTIONS}
    )


@pytest.fixture(scope="session")
def stories(tmp_path_factory):
    """A data folder with lines that share their letters with the next."""
    folder, draw = tmp_path_factory.mktemp("stories"), random.Random(0)
    topics = ["a b c d", "e f g h", "i j k l", "m n o p", "q r s t"]
    lines = []
    for n in range(3000):  # ten lines a topic
        words = topics[n // 10 % len(topics)].split()
        lines.append(" ".join(draw.choices(words, k=9)))
    (folder / "text.txt").write_text("\n".join(lines))
    how = dict(tokenizer="bpe", vocab_size=280, val_share=0.3)
    prepare([folder / "text.txt"], folder / "data", 1, **how)
    return folder / "data"
