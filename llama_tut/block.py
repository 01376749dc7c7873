"""DRAFT"""
from torch import nn
from llama_tut.rmsnorm import LlamaRMSNorm
from llama_tut.attention import LlamaAttention
from llama_tut.mlp import LlamaMLP

class LlamaDecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LlamaAttention(config)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)
    def forward(self, x, cos, sin, attention_mask=None, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attention_mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))
