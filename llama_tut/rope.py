# From notebooks/04_rope.ipynb by scripts/export.py: edit the notebook.
"""Rotary position embedding: turn queries and keys by their position.

Letters: B batch, T time, H heads, C head_dim; `...` stands for any axes.
"""

import torch
from torch import nn

# Frequencies


def inverse_frequencies(config, device=None):
    """The frequency of each pair in radians a token -> [C/2], float32.

    Source: Su et al., 2021 (arXiv 2104.09864), section 3.2.

    Args:
        config: a `LlamaConfig` (reads head_dim, rope_theta, rope_scaling).
        device: where to make the numbers.
    """
    C = config.head_dim
    exponent = torch.arange(0, C, 2, device=device).float() / C  # [C/2]
    frequencies = 1.0 / config.rope_theta**exponent  # [C/2]
    if config.rope_scaling is not None:
        frequencies = scale_frequencies(
            frequencies, config.rope_scaling
        )  # [C/2]
    return frequencies  # [C/2]


# The rotation


def apply_rotary(x, cos, sin):
    """Turn each pair (i, i + C/2) of x by its angle; the dtype stays.

    Args:
        x: queries or keys, [B, H, T, C] (any number of heads).
        cos, sin: float32, [T, C/2], or [B, 1, T, C/2] where each row of the
            batch has positions of its own.
    """
    a, b = x.chunk(2, dim=-1)  # [..., T, C/2], [..., T, C/2]
    first = a * cos - b * sin  # [..., T, C/2]
    second = b * cos + a * sin  # [..., T, C/2]
    turned = torch.cat((first, second), dim=-1)  # [..., T, C]
    return turned.to(x.dtype)  # [..., T, C]


# The class


class LlamaRotaryEmbedding(nn.Module):
    """Tables of cosines and sines for given positions, always float32.

    Holds no tensor: a cast of the model cannot round the frequencies.

    Args:
        config: a `LlamaConfig`.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, position_ids):
        """Integer positions -> cos, sin.

        [T] gives [T, C/2] each; [B, T] gives [B, 1, T, C/2].
        """
        if position_ids.dim() == 2:
            position_ids = position_ids[:, None]  # [B, 1, T]
        device = position_ids.device
        frequencies = inverse_frequencies(self.config, device)  # [C/2]
        angle = position_ids[..., None].float() * frequencies  # [..., T, C/2]
        return angle.cos(), angle.sin()  # [..., T, C/2], [..., T, C/2]


# Llama 3.1: slower hands for a longer context


def apply_llama3_scaling(frequencies, scaling):
    """Slow down the pairs that turn too rarely in the original context.

    Source: `_compute_llama3_parameters` of transformers, after Meta's Llama
    3.1; the order of operations is kept, so results are equal bit for bit.

    Args:
        frequencies: radians a token, [C/2].
        scaling: a `RopeScaling`.
    """
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * torch.pi / frequencies  # [C/2]
    turns = scaling.original_max_position_embeddings / wavelength  # [C/2]
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # [C/2]
    slow = (1 - keep) * frequencies / scaling.factor  # [C/2]
    return slow + keep * frequencies  # [C/2]


def scale_frequencies(frequencies, scaling):
    """Slow the pairs down for a longer context, as the config asks.

    Source: the types "llama3" and "linear" of transformers; linear, which
    divides each position by the factor, is from Chen et al., 2023 (arXiv
    2306.15595).

    Args:
        frequencies: radians a token, [C/2].
        scaling: a `RopeScaling`.
    """
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor  # [C/2]
    return apply_llama3_scaling(frequencies, scaling)  # [C/2]
