"""What all ranks of a group can do: agreed once per group, so that every rank chooses the same implementation."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist

from .. import _ext
from .._version import __version__
from . import tuning
from .collectives import all_gather_object


@dataclass(frozen=True)
class Capabilities:
    """Properties of one rank, or what all ranks of a group have in common."""

    version: str
    cuda_kernels: bool  # the extension is built with CUDA and this rank computes on a GPU it has code for
    compute_capability: tuple[int, int]  # (0, 0) without a GPU; of a group: the lowest
    multiprocessors: int = 0  # of a group: 0 if its GPUs differ
    tuning: tuning.Table | None = None  # of a group whose ranks all have kernels: rank 0's


@functools.cache
def local_capabilities() -> Capabilities:
    """This rank's own capabilities."""
    if not torch.cuda.is_available():
        return Capabilities(__version__, False, (0, 0))
    multiprocessors = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
    return Capabilities(__version__, _ext.why_no_kernels() is None, torch.cuda.get_device_capability(), multiprocessors)


_agreed: dict[str, Capabilities] = {}


def refuse_capture(what: str) -> None:
    """Raise RuntimeError where the current stream is captured: `what` happens once, with the host waiting for it."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{what}, which cannot be captured in a CUDA graph: run the operation once before the capture"
        )


def agree(pg: dist.ProcessGroup) -> Capabilities:
    """What all ranks of `pg` have in common. Collective on its first call for a group; cached after that.

    Modules and `fp.parallelize` call it when they are made, so that no operation does in its hot path.
    Raises RuntimeError when the ranks run different versions of the library, or when the first call is captured in a
    CUDA graph, ValueError when rank 0's tuning table cannot be read.
    """
    name = pg.group_name
    if name not in _agreed:
        if pg.size() > 1:
            refuse_capture("the first operation of a group agrees with its ranks on how it is done")
        everyone = all_gather_object(local_capabilities(), pg)
        kernels = pg.size() > 1 and all(c.cuda_kernels for c in everyone)
        table: tuning.Table | ValueError | None = None
        if kernels and pg.rank() == 0:
            try:
                table = tuning.load(pg.size())
            except ValueError as error:  # every rank must hear of it, or the others wait for rank 0
                table = error
        if kernels:
            table = all_gather_object(table, pg)[0]
        if isinstance(table, ValueError):
            raise table
        versions = sorted({c.version for c in everyone})
        if len(versions) > 1:
            raise RuntimeError(
                f"the ranks of group {name} run different versions of fused_parallel ({', '.join(versions)}); "
                "install the same version on all hosts"
            )
        _agreed[name] = Capabilities(
            version=versions[0],
            cuda_kernels=all(c.cuda_kernels for c in everyone),
            compute_capability=min(c.compute_capability for c in everyone),
            multiprocessors=everyone[0].multiprocessors if len({c.multiprocessors for c in everyone}) == 1 else 0,
            tuning=table,
        )
    return _agreed[name]


def forget() -> None:
    """Drop all agreements; group names are used again after torch.distributed is shut down."""
    _agreed.clear()
