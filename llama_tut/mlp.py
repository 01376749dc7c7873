# From notebooks/06_mlp.ipynb by scripts/export.py: edit the notebook.
"""SwiGLU MLP: gated neurons, for each token alone.

Letters: B batch, T time, D hidden_size, I intermediate_size.
"""

from torch import nn
from torch.nn import functional as F

# The class


class LlamaMLP(nn.Module):
    """Gated MLP: down(silu(gate(x)) * up(x)), the same for each token.

    Source: Shazeer, 2020 (arXiv 2002.05202), there called SwiGLU; names as in
    transformers' `LlamaMLP`.

    Args:
        config: a `LlamaConfig`; hidden_size and intermediate_size are read.
    """

    def __init__(self, config):
        super().__init__()
        D, I = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, I, bias=False)
        self.up_proj = nn.Linear(D, I, bias=False)
        self.down_proj = nn.Linear(I, D, bias=False)

    def init_weights(self, std, output_std, generator=None):
        """Draw the matrices from N(0, std^2); down_proj has `output_std`.

        Args:
            generator: a `torch.Generator` on the weights' device, or None.
        """
        for layer in (self.gate_proj, self.up_proj):
            nn.init.normal_(layer.weight, std=std, generator=generator)
        weight = self.down_proj.weight
        nn.init.normal_(weight, std=output_std, generator=generator)

    def forward(self, x):
        """x [B, T, D] -> [B, T, D]."""
        gate = F.silu(self.gate_proj(x))  # [B, T, I]
        value = self.up_proj(x)  # [B, T, I]
        return self.down_proj(gate * value)  # [B, T, D]
