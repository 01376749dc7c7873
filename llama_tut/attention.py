# From notebooks/05_attention.ipynb by scripts/export.py: edit the notebook.
"""Attention: each token reads a weighted average of the values before it.

Letters: B batch, T time of the queries, S time of the keys, D hidden_size,
H heads, K kv heads, G = H/K heads of a group, C head_dim; `...` stands for
any axes.
"""

import torch
from torch import nn
from torch.nn import functional as F

from llama_tut.rope import apply_rotary

# Fewer queries than keys


def causal_mask(T, S, device=None):
    """Which keys each query may read: the queries are the last T of S tokens.

    Returns:
        bool [T, S], True where the key is not after the query.
    """
    everything = torch.ones(T, S, dtype=torch.bool, device=device)  # [T, S]
    return everything.tril(S - T)  # [T, S]


# Fold: heads of a group become rows


def attend_block(q, k, v, mask=None):
    """Attention as two matrix products for each group of heads.

    Args:
        q: queries over sqrt(C), [B, H, T, C]: the last T of S tokens.
        k, v: keys and values, [B, K, S, C]; K divides H.
        mask: bool, True = may read, [T, S] or [B, 1, T, S]; None: causal.

    Returns:
        [B, H, T, C]; a row that may read nothing is finite but has no meaning.
    """
    B, H, T, C = q.shape
    K, S = k.shape[1:3]
    G = H // K
    rows = q.reshape(B, K, G * T, C)  # [B, K, G*T, C]
    scores = rows @ k.mT  # [B, K, G*T, S]
    if mask is None and T > 1:
        mask = causal_mask(T, S, q.device)  # [T, S]
    if mask is not None:
        lowest = max(torch.finfo(scores.dtype).min / 2, -1e38)
        bias = scores.new_zeros(mask.shape)  # [..., T, S]
        bias = bias.masked_fill(~mask, lowest).unsqueeze(-3)  # [..., 1, T, S]
        scores = scores.view(B, K, G, T, S) + bias  # [B, K, G, T, S]
        scores = scores.view(B, K, G * T, S)  # [B, K, G*T, S]
    weights = F.softmax(scores, dim=-1, dtype=torch.float32)  # [B, K, G*T, S]
    out = weights.to(v.dtype) @ v  # [B, K, G*T, C]
    return out.view(B, H, T, C)  # [B, H, T, C]


# Blocks: do not compute the future


def join(pieces):
    """Tensors [..., t, C] of some lengths t in a row; one is not copied."""
    if len(pieces) == 1:
        return pieces[0]  # [..., C]
    return torch.cat(pieces, dim=2)  # [..., C]


def causal_blocks(q, k, v, size):
    """Causal attention by blocks of `size` queries, each with its keys.

    Args and result as in `attend`, but q is over sqrt(C).
    """
    rows = q.split(size, dim=2)
    ends = [block.shape[2] for block in rows]
    ends[0] += k.shape[2] - q.shape[2]  # earlier tokens go to the first
    keys, values = k.split(ends, dim=2), v.split(ends, dim=2)
    blocks = [
        attend_block(block, join(keys[:i]), join(values[:i]))
        for i, block in enumerate(rows, start=1)
    ]
    return join(blocks)  # [B, H, T, C]


def masked_blocks(q, k, v, mask, size):
    """The same by the rule of `mask`; each block gets all keys."""
    B, T, S = q.shape[0], q.shape[2], k.shape[2]
    masks = mask.broadcast_to(B, 1, T, S).split(size, dim=2)
    blocks = [
        attend_block(block, k, v, part)
        for block, part in zip(q.split(size, dim=2), masks, strict=True)
    ]
    return join(blocks)  # [B, H, T, C]


def attend(q, k, v, mask=None):
    """Scaled dot product attention; shared keys are never repeated.

    Args:
        q: queries, [B, H, T, C]: the last T of S tokens.
        k, v: keys and values, [B, K, S, C]; K divides H.
        mask: bool, True = may read, broadcastable to [B, 1, T, S]. It is the
            whole rule; None stands for the causal one.

    Returns:
        [B, H, T, C] in the dtype of v.
    """
    T, S, C = q.shape[2], k.shape[2], q.shape[3]
    half = q.dtype in (torch.bfloat16, torch.float16)
    fused = half if q.is_cuda else not (half or torch.is_grad_enabled())
    if fused and mask is None and T == S:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )  # [B, H, T, C]
    q = q * C**-0.5  # [B, H, T, C]
    size = max(32, -(-T // 8))  # rows of a block: at most 8 blocks
    if mask is None:
        return causal_blocks(q, k, v, size)  # [B, H, T, C]
    return masked_blocks(q, k, v, mask, size)  # [B, H, T, C]


# The class


class LlamaAttention(nn.Module):
    """Grouped-query attention with rotary positions; config: `LlamaConfig`.

    Source: Ainslie et al., 2023 (arXiv 2305.13245); the names of the four
    matrices are those of transformers' `LlamaAttention`.
    """

    def __init__(self, config):
        super().__init__()
        D, C = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = C
        self.q_proj = nn.Linear(D, H * C, bias=False)
        self.k_proj = nn.Linear(D, K * C, bias=False)
        self.v_proj = nn.Linear(D, K * C, bias=False)
        self.o_proj = nn.Linear(H * C, D, bias=False)

    def forward(self, x, cos, sin, attention_mask=None, cache=None):
        """x [B, T, D] -> [B, T, D].

        Args:
            x: the normed stream at the T newest positions.
            cos, sin: tables of `LlamaRotaryEmbedding` for them.
            attention_mask: bool, True = may read, broadcastable to
                [B, 1, T, S]; it is the whole rule. None: causal.
            cache: None, or one layer's cache. Its `update(k, v)` appends and
                returns all keys and values, [B, K, S, C].
        """
        shape = (*x.shape[:2], -1, self.head_dim)
        q = self.q_proj(x).view(shape).transpose(1, 2)  # [B, H, T, C]
        k = self.k_proj(x).view(shape).transpose(1, 2)  # [B, K, T, C]
        v = self.v_proj(x).view(shape).transpose(1, 2)  # [B, K, T, C]
        q = apply_rotary(q, cos, sin)  # [B, H, T, C]
        k = apply_rotary(k, cos, sin)  # [B, K, T, C]
        if cache is not None:
            k, v = cache.update(k, v)  # [B, K, S, C], [B, K, S, C]
        y = attend(q, k, v, attention_mask)  # [B, H, T, C]
        y = y.transpose(1, 2).flatten(2)  # [B, T, H*C]
        return self.o_proj(y)  # [B, T, D]
