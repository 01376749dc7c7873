"""DRAFT"""
import torch
from torch import nn

def inverse_frequencies(config):
    C = config.head_dim
    return config.rope_theta ** (-torch.arange(0, C, 2).float() / C)

class LlamaRotaryEmbedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.register_buffer("inv_freq", inverse_frequencies(config), persistent=False)
    def forward(self, position_ids):
        angles = position_ids[..., None].float() * self.inv_freq
        return angles.cos(), angles.sin()

def apply_rotary(x, cos, sin):
    """x [B,H,T,C], cos, sin [T,C/2] or [B,1,T,C/2]"""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)
