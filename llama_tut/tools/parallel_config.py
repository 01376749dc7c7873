"""Options of scripts/train.py for parallel training, and what they refuse."""

import math
from dataclasses import dataclass
from typing import Literal

from llama_tut.config import option
from llama_tut.tools.files import require
from llama_tut.tools.options import check_choices


@dataclass(frozen=True)
class ParallelOptions:
    """where the model lies (chapter 24)"""

    parallel: Literal["ddp", "fsdp"] = option(
        "ddp", "a rank holds all weights, or a piece of each"
    )
    tensor_parallel: int = option(1, "ranks that one matrix is cut over")
    recompute: bool = option(
        False, "compute layers again in the backward pass"
    )

    def __post_init__(self):
        check_choices(self)
        require(
            self.tensor_parallel > 0,
            f"--tensor-parallel {self.tensor_parallel} must be at least 1",
        )


def check_layout(options, optimizer, W):
    """Raise InputError if W ranks cannot train as the options say."""
    tp = options.tensor_parallel
    require(
        options.parallel == "fsdp" or tp == 1 or W == tp,
        f"--tensor-parallel {tp} on {W} ranks leaves {W // tp} "
        "groups: say --parallel fsdp as well, or start fewer ranks",
    )
    require(
        optimizer != "muon",
        "--optimizer muon wants whole matrices, which --parallel fsdp "
        "and --tensor-parallel cut: take --optimizer adamw",
    )


def check_divisible(config, W):
    """Raise InputError, in one line, if W ranks cannot cut this LLaMA."""
    for number, what in (
        (config.num_attention_heads, "attention heads"),
        (config.num_key_value_heads, "kv heads"),
        (config.intermediate_size, "intermediate_size"),
    ):
        require(
            number % W == 0,
            f"--tensor-parallel {W} cannot cut this model: its {what} "
            f"({number}) must be divisible by {W}",
        )
    V = config.vocab_size  # rows are dealt out in equal pieces, but the last
    require(
        V > (W - 1) * math.ceil(V / W),
        f"--tensor-parallel {W} leaves a rank without words: the vocabulary "
        f"has {V}",
    )
