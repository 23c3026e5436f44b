"""RMSNorm as a module, with the residual addition in it."""

from __future__ import annotations

import torch
from torch import nn

from ..ops.add_rms_norm import add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """Drop-in for transformers' LlamaRMSNorm and torch.nn.RMSNorm over the last dimension; for inference only.

    Args:
        hidden_size: size of the last dimension.
        eps: added to the mean square; also readable as `variance_epsilon`, as in transformers.
        device, dtype: of the parameter `weight` [hidden_size], which starts as ones.

    Every rank holds the whole weight. Streams, graphs and errors are those of `fp.add_rms_norm`.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6, device=None, dtype=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype), requires_grad=False)
        self.eps = eps

    @property
    def variance_epsilon(self) -> float:
        return self.eps

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """normed [..., hidden_size] of x, or (normed, x + residual) when a residual is given."""
        if residual is None:
            return rms_norm(x, self.weight, self.eps)
        return add_rms_norm(x, residual, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
