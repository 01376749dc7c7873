# From notebooks/07_block.ipynb by scripts/export.py: edit the notebook.
"""Decoder layer. Letters: B batch, T time, D hidden_size."""

from torch import nn

from llama_tut.attention import LlamaAttention
from llama_tut.mlp import LlamaMLP
from llama_tut.rmsnorm import LlamaRMSNorm

# The class


class LlamaDecoderLayer(nn.Module):
    """Pre-norm block, as in transformers; config: `LlamaConfig`."""

    def __init__(self, config):
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = LlamaRMSNorm(D, eps)
        self.self_attn = LlamaAttention(config)
        self.post_attention_layernorm = LlamaRMSNorm(D, eps)
        self.mlp = LlamaMLP(config)

    def init_weights(self, std, output_std, generator=None):
        """Draw all four parts; `output_std` is for what writes."""
        for part in self.children():
            part.init_weights(std, output_std, generator)

    def forward(self, x, cos, sin, attention_mask=None, cache=None):
        """x [B, T, D] -> [B, T, D]; the rest goes to `LlamaAttention`."""
        y = self.input_layernorm(x)  # [B, T, D]
        x = x + self.self_attn(y, cos, sin, attention_mask, cache)  # [B, T, D]
        return x + self.mlp(self.post_attention_layernorm(x))  # [B, T, D]
