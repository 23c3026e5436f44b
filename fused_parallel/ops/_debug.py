"""FUSED_PARALLEL_DEBUG=1: before a collective, compare what the ranks are about to do, and raise where they differ."""

from __future__ import annotations

import functools
import os

import torch
import torch.distributed as dist

from ..comm.collectives import all_gather_object


@functools.cache
def debugging() -> bool:
    return os.environ.get("FUSED_PARALLEL_DEBUG", "0") not in ("", "0")


def check_agreement(op: str, pg: dist.ProcessGroup, *tensors: torch.Tensor | None) -> None:
    """Raise ValueError on every rank if operation, shapes, dtypes or mode differ between ranks (debug mode only).

    Costs a host-side exchange, so it is skipped during CUDA graph capture.
    """
    if not debugging() or pg.size() == 1:
        return
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return
    from ._dispatch import current_mode

    mine = f"{op}({', '.join(f'{t.dtype}{list(t.shape)}' for t in tensors if t is not None)}) mode={current_mode()}"
    everyone = all_gather_object(mine, pg)
    if len(set(everyone)) > 1:
        listing = "; ".join(f"rank {dist.get_global_rank(pg, i)}: {call}" for i, call in enumerate(everyone))
        raise ValueError(f"the ranks of one group disagree on the call: {listing}")
