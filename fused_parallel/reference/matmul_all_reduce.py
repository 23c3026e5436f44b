"""References of the matmuls with a collective: torch's linear, then or before it the backend's collective.

The partial product is rounded to the tensors' dtype before it travels, as in the fused kernels; the bias is added once,
after the sum.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ..comm import collectives
from .add_rms_norm import add_rms_norm


def matmul_all_reduce(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, pg: dist.ProcessGroup
) -> torch.Tensor:
    out = collectives.all_reduce_(F.linear(x, weight).contiguous(), pg)
    return out if bias is None else out + bias


def matmul_all_reduce_add_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    bias: torch.Tensor | None,
    pg: dist.ProcessGroup,
) -> tuple[torch.Tensor, torch.Tensor]:
    return add_rms_norm(matmul_all_reduce(x, weight, bias, pg), residual, norm_weight, eps)


def matmul_reduce_scatter(x: torch.Tensor, weight: torch.Tensor, pg: dist.ProcessGroup) -> torch.Tensor:
    return collectives.reduce_scatter(F.linear(x, weight), pg)


def all_gather_matmul(x: torch.Tensor, weight: torch.Tensor, pg: dist.ProcessGroup) -> torch.Tensor:
    return F.linear(collectives.all_gather(x, pg), weight)
