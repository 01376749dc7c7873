"""DRAFT"""
from __future__ import annotations
from dataclasses import dataclass, asdict, replace

class InputError(Exception):
    """Bad input: one line that says what is wrong and what to do."""

@dataclass(frozen=True)
class RopeScaling:
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

@dataclass(frozen=True)
class LlamaConfig:
    vocab_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 352
    num_hidden_layers: int = 4
    num_attention_heads: int = 2
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    initializer_range: float | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple | None = None

    def __post_init__(self):
        fill = lambda k, v: getattr(self, k) is None and object.__setattr__(self, k, v)
        fill("num_key_value_heads", self.num_attention_heads)
        fill("head_dim", self.hidden_size // self.num_attention_heads)
        fill("initializer_range", 0.5 / self.hidden_size ** 0.5)
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError("heads do not divide")
