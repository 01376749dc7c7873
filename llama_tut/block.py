# From notebooks/07_block.ipynb by scripts/export.py: edit the notebook.
"""Decoder layer: attention and MLP, each reads the stream and adds to it.

Letters: B batch, T time, D hidden_size, C head_dim.
"""

from torch import nn

from llama_tut.attention import LlamaAttention
from llama_tut.mlp import LlamaMLP
from llama_tut.rmsnorm import LlamaRMSNorm

# The class


class LlamaDecoderLayer(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)).

    Names and order of transformers' `LlamaDecoderLayer`; config:
    `LlamaConfig`.
    """

    def __init__(self, config):
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = LlamaRMSNorm(D, eps)
        self.self_attn = LlamaAttention(config)
        self.post_attention_layernorm = LlamaRMSNorm(D, eps)
        self.mlp = LlamaMLP(config)

    def forward(self, x, cos, sin, attention_mask=None, cache=None):
        """x [B, T, D], cos and sin [T, C/2] -> [B, T, D].

        `attention_mask` and `cache` (this layer's) go to `LlamaAttention`.
        """
        how = cos, sin, attention_mask, cache
        read = self.input_layernorm(x)  # [B, T, D]
        x = x + self.self_attn(read, *how)  # [B, T, D]
        read = self.post_attention_layernorm(x)  # [B, T, D]
        return x + self.mlp(read)  # [B, T, D]
