"""all_reduce, reduce_scatter and all_gather of activations."""

from __future__ import annotations

import torch
import torch.distributed as dist

from .. import _ext
from ..comm import collectives
from ..comm.groups import group_from_name, resolve_group
from ..comm.workspace import SLOT_BYTES, why_no_workspace, workspace_of
from ..reference import all_reduce as reference
from ._debug import check_agreement
from ._dispatch import NO_KERNEL, choose_fused
from ._library import check_floating, register

# Above this payload, at more than two ranks, every byte counts more than every microsecond: two-shot sends 2 (W - 1) /
# W of the payload, one-shot W - 1 times it. At two ranks they send the same.
ONE_SHOT_BYTES = 256 << 10
UNTRIED = 'its kernels have run on virtual ranks of one GPU only; fp.use("fused") takes them'


def why_not_fused(x: torch.Tensor, pg: dist.ProcessGroup, most_bytes: int) -> str | None:
    """Why the kernels over peer memory do not take a payload like x; from what all ranks share."""
    if not x.is_cuda:
        return f"there is a kernel for CUDA tensors only, not for {x.device.type}"
    if (reason := why_no_workspace(pg)) is not None:
        return reason
    if x.numel() * x.element_size() > most_bytes:
        return f"the payload is above {most_bytes} bytes"
    return None


def say_no_kernel(op: str, x: torch.Tensor, pg: dist.ProcessGroup) -> None:
    """Of an operation without a kernel: tell so once, or raise under fp.use("fused"); not where there is one rank."""
    if pg.size() > 1:
        choose_fused(op, NO_KERNEL, on_gpu=x.is_cuda)


def aligned(x: torch.Tensor) -> torch.Tensor:
    """`x`, or a copy of it, contiguous and aligned to 16 bytes."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _launch(x: torch.Tensor, out: torch.Tensor, pg: dist.ProcessGroup) -> None:
    """out = sum of x, by the kernel for its size; out contiguous and aligned, perhaps x itself."""
    workspace = workspace_of(pg)
    workspace.check()
    x = aligned(x)
    bytes = x.numel() * x.element_size()
    workspace.native.all_reduce(
        x=x.data_ptr(),
        out=out.data_ptr(),
        elements=x.numel(),
        two_shot=bytes > (SLOT_BYTES if pg.size() == 2 else ONE_SHOT_BYTES),
        dtype=_ext.DTYPE_CODES[x.dtype],
        stream=torch.cuda.current_stream(x.device).cuda_stream,
    )


def _takes_kernel(x: torch.Tensor, pg: dist.ProcessGroup) -> bool:
    if pg.size() == 1:
        return False  # nothing to communicate, and nothing to say about it
    return choose_fused(
        "all_reduce",
        lambda: why_not_fused(x, pg, SLOT_BYTES * pg.size() // 2),
        on_gpu=x.is_cuda,
        untried=UNTRIED,
    )


def all_reduce_(x: torch.Tensor, pg: dist.ProcessGroup) -> torch.Tensor:
    """Sum the contiguous `x` in place; without checks and without torch's dispatcher, for operations that end in it."""
    if _takes_kernel(x, pg):
        out = x if x.data_ptr() % 16 == 0 else torch.empty_like(x)
        _launch(x, out, pg)
        return x if out is x else x.copy_(out)
    return collectives.all_reduce_(x, pg)


def _all_reduce(x: torch.Tensor, group_name: str) -> torch.Tensor:
    pg = group_from_name(group_name)
    check_agreement("all_reduce", pg, x)
    if _takes_kernel(x, pg):
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        _launch(x, out, pg)
        return out
    return reference.all_reduce(x, pg)


def _all_reduce_out(x: torch.Tensor, out: torch.Tensor, group_name: str) -> None:
    pg = group_from_name(group_name)
    check_agreement("all_reduce", pg, x)
    if not _takes_kernel(x, pg):
        reference.all_reduce_out(x, out, pg)
    elif out.is_contiguous() and out.data_ptr() % 16 == 0:
        _launch(x, out, pg)
    else:
        whole = torch.empty_like(x, memory_format=torch.contiguous_format)
        _launch(x, whole, pg)
        out.copy_(whole)


def _part_by_kernel(op: str, x: torch.Tensor, part: torch.Tensor, pg: dist.ProcessGroup) -> bool:
    """Whether reduce_scatter or all_gather takes its kernel; `part`: what one rank contributes or gets."""
    if pg.size() == 1:
        return False

    def reason() -> str | None:
        if part.numel() * part.element_size() % 16:
            return "its kernel takes parts of a multiple of 16 bytes"
        return why_not_fused(part, pg, SLOT_BYTES)

    return choose_fused(op, reason, on_gpu=x.is_cuda, untried=UNTRIED)


def _launch_part(op: str, x: torch.Tensor, out: torch.Tensor, pg: dist.ProcessGroup) -> torch.Tensor:
    workspace = workspace_of(pg)
    workspace.check()
    x = aligned(x)
    getattr(workspace.native, op)(
        x=x.data_ptr(),
        out=out.data_ptr(),
        elements=min(x.numel(), out.numel()),
        dtype=_ext.DTYPE_CODES[x.dtype],
        stream=torch.cuda.current_stream(x.device).cuda_stream,
    )
    return out


def _reduce_scatter(x: torch.Tensor, group_name: str) -> torch.Tensor:
    pg = group_from_name(group_name)
    check_agreement("reduce_scatter", pg, x)
    if pg.size() > 1:
        out = x.new_empty((x.shape[0] // pg.size(), *x.shape[1:]))
        if _part_by_kernel("reduce_scatter", x, out, pg):
            return _launch_part("reduce_scatter", x, out, pg)
    return collectives.reduce_scatter(x, pg)


def _all_gather(x: torch.Tensor, group_name: str) -> torch.Tensor:
    pg = group_from_name(group_name)
    check_agreement("all_gather", pg, x)
    if _part_by_kernel("all_gather", x, x, pg):
        return _launch_part("all_gather", x, x.new_empty((x.shape[0] * pg.size(), *x.shape[1:])), pg)
    return collectives.all_gather(x, pg)


_all_reduce_op = register(
    "all_reduce(Tensor x, str group_name) -> Tensor",
    _all_reduce,
    lambda x, group_name: torch.empty_like(x, memory_format=torch.contiguous_format),
)
_all_reduce_out_op = register(
    "all_reduce_out(Tensor x, Tensor(a!) out, str group_name) -> ()",
    _all_reduce_out,
    lambda x, out, group_name: None,
)
_reduce_scatter_op = register(
    "reduce_scatter(Tensor x, str group_name) -> Tensor",
    _reduce_scatter,
    lambda x, group_name: x.new_empty((x.shape[0] // group_from_name(group_name).size(), *x.shape[1:])),
)
_all_gather_op = register(
    "all_gather(Tensor x, str group_name) -> Tensor",
    _all_gather,
    lambda x, group_name: x.new_empty((x.shape[0] * group_from_name(group_name).size(), *x.shape[1:])),
)


def all_reduce(x: torch.Tensor, *, group, out: torch.Tensor | None = None) -> torch.Tensor:
    """Sum `x` over the ranks of `group`.

    Args:
        x: any shape, fp16, bf16 or fp32; the same shape and dtype on every rank.
        group: ProcessGroup or 1-D DeviceMesh.
        out: where the sum goes, of x's shape and dtype; may be `x` itself (in place). Default: a new tensor.

    Returns:
        The sum, contiguous unless `out` is given, on every rank.

    Runs on the current stream; capturable in CUDA graphs; traced by torch.compile as one node.

    Raises:
        TypeError, ValueError: bad dtype, shape or group.
        PeerTimeoutError: a rank died or did not answer within the group's timeout.
    """
    check_floating("all_reduce", ("out",), x=x, out=out)
    name = resolve_group(group).group_name
    if out is None:
        return _all_reduce_op(x, name)
    if out.shape != x.shape:
        raise ValueError(f"all_reduce: out has shape {tuple(out.shape)}, x has {tuple(x.shape)}; they must be equal")
    _all_reduce_out_op(x, out, name)
    return out


def reduce_scatter(x: torch.Tensor, *, group) -> torch.Tensor:
    """Sum `x` over the ranks and keep this rank's part of dim 0.

    Args:
        x: [world * n, ...], fp16, bf16 or fp32, alike on every rank.
        group: ProcessGroup or 1-D DeviceMesh.

    Returns:
        [n, ...]: rows [rank * n, (rank + 1) * n) of the sum.

    Raises ValueError if dim 0 is not divisible by the group's size (pad it), else as `all_reduce`. Streams, graphs and
    torch.compile: as `all_reduce`.
    """
    check_floating("reduce_scatter", x=x)
    pg = resolve_group(group)
    check_divisible("reduce_scatter", x, pg.size())
    return _reduce_scatter_op(x, pg.group_name)


def all_gather(x: torch.Tensor, *, group) -> torch.Tensor:
    """Concatenate the ranks' `x` along dim 0, in rank order.

    Args:
        x: [n, ...], fp16, bf16 or fp32, the same shape on every rank.
        group: ProcessGroup or 1-D DeviceMesh.

    Returns:
        [world * n, ...], the same on every rank. Errors, streams, graphs and torch.compile: as `all_reduce`.
    """
    check_floating("all_gather", x=x)
    if x.dim() == 0:
        raise ValueError("all_gather: x must have at least one dimension, got a scalar")
    return _all_gather_op(x, resolve_group(group).group_name)


def check_divisible(op: str, x: torch.Tensor, world: int) -> None:
    """Raise ValueError unless dim 0 of `x` splits evenly over `world` ranks."""
    if x.dim() == 0 or x.shape[0] % world:
        raise ValueError(
            f"{op}: dim 0 of x must be divisible by the group's {world} ranks, got shape {tuple(x.shape)}; pad it"
        )
