"""all_reduce, reduce_scatter and all_gather of activations."""

from __future__ import annotations

import torch
import torch.distributed as dist

from .. import _ext
from ..comm import collectives
from ..comm.groups import group_from_name, resolve_group
from ..comm.tuning import ONE, TWO, Choice
from ..comm.workspace import AllReduceWorkspace, existing_workspace, why_no_workspace, workspace_of
from ..reference import all_reduce as reference
from . import _direct
from ._debug import check_agreement
from ._dispatch import choose_fused, choose_library
from ._library import check_floating, register


def why_not_fused(x: torch.Tensor, pg: dist.ProcessGroup) -> str | None:
    """Why the kernels over peer memory do not take a tensor like x; from what all ranks share."""
    if not x.is_cuda:
        return f"there is a kernel for CUDA tensors only, not for {x.device.type}"
    return why_no_workspace(pg)


def kernel_choice(op: str, x: torch.Tensor, pg: dist.ProcessGroup, why_not=why_not_fused) -> Choice | None:
    """How the kernels do `op` for one rank's payload `x`; None where they do not."""
    if pg.size() == 1:
        return None  # nothing to communicate, and nothing to say about it
    if not choose_fused(op, lambda: why_not(x, pg), on_gpu=x.is_cuda):
        return None
    bytes = x.numel() * x.element_size()
    choice = workspace_of(pg).choice(op, bytes)
    if choice.algorithm != "library":
        return choice
    if choose_library(op, bytes):
        return None
    return TWO if op == "all_reduce" and pg.size() > 2 else ONE


def known_choice(op: str, x: torch.Tensor, pg: dist.ProcessGroup, why_not) -> Choice | None:
    """After the long way: the choice that calls like it may take by the short one, None if they may not. A kernel that
    fp.use("fused") took against the table is not for all modes."""
    if not _direct.may_remember(pg) or existing_workspace(pg).choice(op, x.nbytes).algorithm == "library":
        return None
    return kernel_choice(op, x, pg, why_not)


def aligned(x: torch.Tensor) -> torch.Tensor:
    """`x`, or a copy of it, contiguous and aligned to 16 bytes."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def launch_all_reduce(x: torch.Tensor, out: torch.Tensor, workspace: AllReduceWorkspace, choice: Choice) -> None:
    """out = sum of x; both contiguous and aligned, perhaps the same."""
    workspace.check()
    with collectives.counted(x):
        workspace.native.all_reduce(
            x.data_ptr(),
            out.data_ptr(),
            x.numel(),
            choice.algorithm == "two_shot",
            choice.threads,
            choice.ctas,
            _ext.DTYPE_CODES[x.dtype],
            _direct.raw_stream(workspace.device_index),
        )


def all_reduce_(x: torch.Tensor, pg: dist.ProcessGroup) -> torch.Tensor:
    """Sum the contiguous `x` in place; without checks and without torch's dispatcher, for operations that end in it."""
    if (choice := kernel_choice("all_reduce", x, pg)) is None:
        return collectives.all_reduce_(x, pg)
    if x.data_ptr() % 16 == 0:
        launch_all_reduce(x, x, workspace_of(pg), choice)
        return x
    out = torch.empty_like(x)
    launch_all_reduce(aligned(x), out, workspace_of(pg), choice)
    return x.copy_(out)


def _all_reduce(x: torch.Tensor, group_name: str) -> torch.Tensor:
    pg = group_from_name(group_name)
    check_agreement("all_reduce", pg, x)
    if (choice := kernel_choice("all_reduce", x, pg)) is None:
        return reference.all_reduce(x, pg)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    x = aligned(x)  # kept in a name: a temporary would give its memory back before the kernel is queued
    launch_all_reduce(x, out, workspace_of(pg), choice)
    return out


def _all_reduce_out(x: torch.Tensor, out: torch.Tensor, group_name: str) -> None:
    pg = group_from_name(group_name)
    check_agreement("all_reduce", pg, x)
    if (choice := kernel_choice("all_reduce", x, pg)) is None:
        reference.all_reduce_out(x, out, pg)
        return
    direct = out.is_contiguous() and out.data_ptr() % 16 == 0
    whole = out if direct else torch.empty_like(x, memory_format=torch.contiguous_format)
    x = aligned(x)
    launch_all_reduce(x, whole, workspace_of(pg), choice)
    if not direct:
        out.copy_(whole)


def _why_no_part(part: torch.Tensor, pg: dist.ProcessGroup) -> str | None:
    """Why reduce_scatter or all_gather has no kernel; `part`: what one rank contributes or gets."""
    if (reason := why_not_fused(part, pg)) is not None:
        return reason
    bytes, most = part.numel() * part.element_size(), workspace_of(pg).slot_bytes
    fits = bytes % 16 == 0 and bytes <= most
    return None if fits else f"its kernel takes parts of a multiple of 16 up to {most} bytes"


def launch_part(op: str, x: torch.Tensor, out: torch.Tensor, workspace: AllReduceWorkspace) -> torch.Tensor:
    """`op` "reduce_scatter" or "all_gather" of the contiguous, aligned x into out."""
    workspace.check()
    with collectives.counted(x):
        getattr(workspace.native, op)(
            x.data_ptr(),
            out.data_ptr(),
            min(x.numel(), out.numel()),
            0,  # the default grid
            _ext.DTYPE_CODES[x.dtype],
            _direct.raw_stream(workspace.device_index),
        )
    return out


def reduce_scatter_(x: torch.Tensor, pg: dist.ProcessGroup) -> torch.Tensor:
    """The operation without checks and without torch's dispatcher, for operations that end in it."""
    if pg.size() > 1:
        out = x.new_empty((x.shape[0] // pg.size(), *x.shape[1:]))
        if kernel_choice("reduce_scatter", out, pg, _why_no_part) is not None:
            return launch_part("reduce_scatter", aligned(x), out, workspace_of(pg))
    return collectives.reduce_scatter(x, pg)


def all_gather_(x: torch.Tensor, pg: dist.ProcessGroup) -> torch.Tensor:
    """As `reduce_scatter_`."""
    if kernel_choice("all_gather", x, pg, _why_no_part) is not None:
        out = x.new_empty((x.shape[0] * pg.size(), *x.shape[1:]))
        return launch_part("all_gather", aligned(x), out, workspace_of(pg))
    return collectives.all_gather(x, pg)


def _reduce_scatter(x: torch.Tensor, group_name: str) -> torch.Tensor:
    pg = group_from_name(group_name)
    check_agreement("reduce_scatter", pg, x)
    return reduce_scatter_(x, pg)


def _all_gather(x: torch.Tensor, group_name: str) -> torch.Tensor:
    pg = group_from_name(group_name)
    check_agreement("all_gather", pg, x)
    return all_gather_(x, pg)


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
    workspace = _direct.workspace_for(group)
    if workspace is not None and out is None and _direct.plain(x, index := workspace.device_index):
        known = workspace.known.get(("all_reduce", x.dtype, x.numel()))
        if known is not None:
            out = torch.empty_like(x)
            try:
                workspace.native.all_reduce(x.data_ptr(), out.data_ptr(), *known, _direct.raw_stream(index))
            except RuntimeError:
                workspace.check()
                raise
            return out
    check_floating("all_reduce", ("out",), x=x, out=out)
    pg = resolve_group(group)
    name = pg.group_name
    if out is None:
        out = _all_reduce_op(x, name)
        _remember(x, group, pg)
        return out
    if out.shape != x.shape:
        raise ValueError(f"all_reduce: out has shape {tuple(out.shape)}, x has {tuple(x.shape)}; they must be equal")
    _all_reduce_out_op(x, out, name)
    return out


def _remember(x: torch.Tensor, group, pg: dist.ProcessGroup) -> None:
    if (choice := known_choice("all_reduce", x, pg, why_not_fused)) is not None:
        n, code = x.numel(), _ext.DTYPE_CODES[x.dtype]
        arguments = (n, choice.algorithm == "two_shot", choice.threads, choice.ctas, code)
        _direct.remember(group, pg, ("all_reduce", x.dtype, n), arguments)


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
