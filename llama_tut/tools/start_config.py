"""The option of scripts/train.py for a model's first weights, and its limits."""

from dataclasses import dataclass
from typing import Literal

from llama_tut.config import option
from llama_tut.tools.files import require
from llama_tut.tools.options import check_choices

LARGEST_TABLE = 2**26  # pairs of tokens: some GB while they are fitted


@dataclass(frozen=True)
class StartOptions:
    """the first weights (chapter 19)"""

    first_weights: Literal["random", "counts"] = option(
        "random",
        "embedding and head: random (always with --plain), or fitted to counts "
        "of pairs",
    )

    def __post_init__(self):
        check_choices(self)


def check_start(config):
    """Raise InputError if a model of this LlamaConfig cannot start from counts."""
    require(
        not config.tie_word_embeddings,
        "--first-weights counts fits the head by itself: say "
        "--no-tie-word-embeddings as well",
    )
    V = config.vocab_size
    require(
        V**2 <= LARGEST_TABLE,
        f"--first-weights counts makes a table of {V:,} x {V:,} pairs, which is too "
        "large: leave it out, or take a vocabulary of at most "
        f"{int(LARGEST_TABLE**0.5):,}",
    )
