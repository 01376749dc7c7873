# From notebooks/06_mlp.ipynb by scripts/export.py: edit the notebook.
"""SwiGLU MLP. Letters: B batch, T time, D hidden_size, I intermediate_size."""

from torch import nn
from torch.nn import functional as F

# The class


class LlamaMLP(nn.Module):
    """Gated MLP (Shazeer, 2020, arXiv 2002.05202); config: `LlamaConfig`."""

    def __init__(self, config):
        super().__init__()
        D, I = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, I, bias=False)
        self.up_proj = nn.Linear(D, I, bias=False)
        self.down_proj = nn.Linear(I, D, bias=False)

    def init_weights(self, std, output_std, generator=None):
        """Draw from N(0, std^2); `down_proj` writes and has `output_std`."""
        stds = std, std, output_std
        for layer, s in zip(self.children(), stds, strict=True):
            nn.init.normal_(layer.weight, std=s, generator=generator)

    def forward(self, x):
        """x [B, T, D] -> [B, T, D]."""
        gate = F.silu(self.gate_proj(x))  # [B, T, I]
        value = self.up_proj(x)  # [B, T, I]
        return self.down_proj(gate * value)  # [B, T, D]
