"""Fixtures of several files: a small model, the tiny corpus, the options of a short run."""

import pytest
from small_model import save_small_model
from training_setup import OPTIONS, tiny_data

from llama_tut.tools.options import configure


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
