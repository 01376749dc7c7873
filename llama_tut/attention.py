# From notebooks/05_attention.ipynb by scripts/export.py: edit the notebook.
"""Attention: each token reads a weighted average of the values before it.

Letters: B batch, T time of the queries, S time of the keys, D hidden_size,
H heads, K kv heads, C head_dim.
"""

import torch
from torch import nn
from torch.nn import functional as F

from llama_tut.rope import apply_rotary

# PyTorch's own


def causal_mask(T, S, device=None):
    """bool [T, S], True = may read; the queries are the last T of S tokens."""
    everything = torch.ones(T, S, dtype=torch.bool, device=device)  # [T, S]
    return everything.tril(S - T)  # [T, S]


def attend(q, k, v, attention_mask=None):
    """Scaled dot product attention -> [B, H, T, C].

    q [B, H, T, C] belongs to the last T of S tokens, k and v [B, K, S, C] to
    all. `attention_mask`, bool like [B, 1, T, S], replaces the causal rule.
    """
    T, S = q.shape[2], k.shape[2]
    if attention_mask is None and 1 < T < S:  # is_causal counts from key 0
        attention_mask = causal_mask(T, S, q.device)  # [T, S]
    causal = attention_mask is None and T > 1
    return F.scaled_dot_product_attention(
        q, k, v, attention_mask, is_causal=causal, enable_gqa=True
    )  # [B, H, T, C]


# The class


class LlamaAttention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions."""

    attend = staticmethod(attend)  # an instance may get another: chapter 19

    def __init__(self, config):
        super().__init__()
        D, C = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = C
        self.q_proj = nn.Linear(D, H * C, bias=False)
        self.k_proj = nn.Linear(D, K * C, bias=False)
        self.v_proj = nn.Linear(D, K * C, bias=False)
        self.o_proj = nn.Linear(H * C, D, bias=False)

    def init_weights(self, std, output_std, generator=None):
        """Draw the matrices; `output_std` is for o_proj, which writes."""
        for matrix in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            own = output_std if matrix is self.o_proj else std
            nn.init.normal_(matrix.weight, std=own, generator=generator)

    def forward(self, x, cos, sin, attention_mask=None, cache=None):
        """Normalised x [B, T, D], cos and sin of chapter 4 -> [B, T, D]."""
        shape = (*x.shape[:2], -1, self.head_dim)
        q = self.q_proj(x).view(shape).transpose(1, 2)  # [B, H, T, C]
        k = self.k_proj(x).view(shape).transpose(1, 2)  # [B, K, T, C]
        v = self.v_proj(x).view(shape).transpose(1, 2)  # [B, K, T, C]
        q = apply_rotary(q, cos, sin)  # [B, H, T, C]
        k = apply_rotary(k, cos, sin)  # [B, K, T, C]
        if cache is not None:
            k, v = cache.update(k, v)  # [B, K, S, C], [B, K, S, C]
        y = self.attend(q, k, v, attention_mask)  # [B, H, T, C]
        return self.o_proj(y.transpose(1, 2).flatten(2))  # [B, T, D]
