# From notebooks/04_rope.ipynb by scripts/export.py: edit the notebook.
"""Rotary position embedding: turn queries and keys by their position.

Letters: B batch, T time, H heads, C head_dim; `...` stands for any axes.
"""

import torch
from torch import nn

# Frequencies


def inverse_frequencies(config, device=None):
    """Radians per token by which each pair turns -> [C/2], float32.

    Source: Su et al., 2021 (arXiv 2104.09864), section 3.2.
    """
    C, scaling = config.head_dim, config.rope_scaling
    exponent = torch.arange(0, C, 2, device=device).float() / C  # [C/2]
    frequencies = 1.0 / config.rope_theta**exponent  # [C/2]
    if scaling is None:
        return frequencies  # [C/2]
    if scaling.rope_type == "linear":  # Chen et al., 2023 (arXiv 2306.15595)
        return frequencies / scaling.factor  # [C/2]
    return apply_llama3_scaling(frequencies, scaling)  # [C/2]


# The rotation


def apply_rotary(x, cos, sin):
    """Turn each pair (i, i + C/2) of x [B, H, T, C]; the dtype stays.

    `cos` and `sin` are float32, [T, C/2], or [B, 1, T, C/2] where each row of
    the batch has positions of its own.
    """
    a, b = x.chunk(2, dim=-1)  # [..., T, C/2], [..., T, C/2]
    first = a * cos - b * sin  # [..., T, C/2]
    second = b * cos + a * sin  # [..., T, C/2]
    turned = torch.cat((first, second), dim=-1)  # [..., T, C]
    return turned.to(x.dtype)  # [..., T, C]


# The class


class LlamaRotaryEmbedding(nn.Module):
    """Float32 tables; holds no tensor that a cast of the model could round."""

    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, position_ids):
        """Positions [T] -> cos, sin [T, C/2]; [B, T] -> [B, 1, T, C/2]."""
        if position_ids.dim() == 2:
            position_ids = position_ids[:, None]  # [B, 1, T]
        omega = inverse_frequencies(self.config, position_ids.device)  # [C/2]
        angle = position_ids[..., None].float() * omega  # [..., T, C/2]
        return angle.cos(), angle.sin()  # [..., T, C/2], [..., T, C/2]


# Llama 3.1: slower hands for a longer context


def apply_llama3_scaling(frequencies, scaling):
    """Slow the pairs that turn too rarely in the original context -> [C/2].

    Source: Meta's Llama 3.1, with transformers' order of operations.
    """
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * torch.pi / frequencies  # [C/2]
    turns = scaling.original_max_position_embeddings / wavelength  # [C/2]
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # [C/2]
    slow = (1 - keep) * frequencies / scaling.factor  # [C/2]
    return slow + keep * frequencies  # [C/2]
