"""Reference of all_reduce, reduce_scatter and all_gather: the backend's collectives."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..comm import collectives


def all_reduce(x: torch.Tensor, pg: dist.ProcessGroup) -> torch.Tensor:
    return collectives.all_reduce_(x.clone(memory_format=torch.contiguous_format), pg)


def all_reduce_out(x: torch.Tensor, out: torch.Tensor, pg: dist.ProcessGroup) -> None:
    if out.is_contiguous():
        if out.data_ptr() != x.data_ptr() or not x.is_contiguous():
            out.copy_(x)
        collectives.all_reduce_(out, pg)
    else:
        out.copy_(all_reduce(x, pg))
