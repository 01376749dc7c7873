# From notebooks/03_rmsnorm.ipynb by scripts/export.py: edit the notebook.
"""RMSNorm: give each vector the root mean square 1.

Letters: B batch, T time, D hidden_size.
"""

import torch
from torch import nn

# The class


class LlamaRMSNorm(nn.Module):
    """Norm with a gain [D], after Zhang and Sennrich (arXiv 1910.07467)."""

    def __init__(self, hidden_size, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))  # [D]
        self.eps = eps

    def init_weights(self, std=None, output_std=None, generator=None):
        """Set the gain to 1; a norm draws nothing at random."""
        nn.init.ones_(self.weight)

    def forward(self, x):
        """x [B, T, D] -> the same shape, in the dtype of `weight * x`."""
        # In float16 the squares overflow; in bfloat16 their mean is rounded.
        x32 = x.float()  # [B, T, D]
        mean_square = x32.square().mean(-1, keepdim=True)  # [B, T, 1]
        y = x32 * torch.rsqrt(mean_square + self.eps)  # [B, T, D]
        return self.weight * y.to(x.dtype)  # [B, T, D]
