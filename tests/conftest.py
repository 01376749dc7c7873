"""Fixtures of several files: the tiny corpus, and the options of a short run."""

import pytest
from training_setup import OPTIONS, tiny_data

from llama_tut.tools.options import configure


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
