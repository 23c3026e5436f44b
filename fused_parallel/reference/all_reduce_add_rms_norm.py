"""Reference of all_reduce_add_rms_norm: the backend's all-reduce, then add_rms_norm."""

from __future__ import annotations

import torch
import torch.distributed as dist

from .add_rms_norm import add_rms_norm
from .all_reduce import all_reduce


def all_reduce_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, pg: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    return add_rms_norm(all_reduce(x, pg), residual, weight, eps)
