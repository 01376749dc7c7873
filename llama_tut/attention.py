"""DRAFT"""
import torch
from torch import nn
from torch.nn import functional as F
from llama_tut.rope import apply_rotary

def attend(q, k, v, mask=None):
    T, S = q.shape[2], k.shape[2]
    if mask is None and T > 1 and S > T:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1, enable_gqa=True)

class LlamaAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, H, K, C = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.head_dim = C
        self.q_proj = nn.Linear(D, H * C, bias=False)
        self.k_proj = nn.Linear(D, K * C, bias=False)
        self.v_proj = nn.Linear(D, K * C, bias=False)
        self.o_proj = nn.Linear(H * C, D, bias=False)
    def forward(self, x, cos, sin, attention_mask=None, cache=None):
        B, T, _ = x.shape
        q, k, v = (p(x).view(B, T, -1, self.head_dim).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        if cache is not None:
            k, v = cache.update(k, v)
        y = attend(q, k, v, attention_mask)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))
