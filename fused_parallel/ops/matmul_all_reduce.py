"""matmul_all_reduce and matmul_all_reduce_add_rms_norm: a row-parallel linear layer with what follows it.

Many rows go to one persistent kernel, whose tiles travel while the next are computed (csrc/matmul_all_reduce.cu), few
to one that is bound by reading the weight (csrc/matmul_all_reduce_decode.cu). What is between, and all that these do
not take (fp32, N or K no multiple of 8, GPUs other than Hopper), is torch's matmul and the operation that follows,
which chooses its implementation itself: "whole". That is a way of its own and no fallback, in every mode. Either way a
rank's partial product is rounded to the dtype before it travels.
"""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist
import torch.nn.functional as F

from .. import _ext
from ..comm.groups import group_from_name, resolve_group
from ..comm.workspace import workspace_of
from . import _direct
from ._debug import check_agreement
from ._dispatch import choose_fused
from ._library import as_rows, check_floating, register
from .add_rms_norm import add_norm, check_norm
from .all_reduce import aligned, all_reduce_, why_not_fused
from .all_reduce_add_rms_norm import reduce_add_norm


def algorithm(op: str, x: torch.Tensor, weight: torch.Tensor, pg: dist.ProcessGroup) -> str:
    """How `op` of x [..., K] and weight [N, K] is done: "persistent", "decode" (the kernels), or "whole", matmul and
    collective one after the other. From what all ranks share. Raises NoFusedKernelError under fp.use("fused") where the
    group has no kernels at all; what "whole" ends in asks for itself."""
    if pg.size() == 1 or not choose_fused(op, lambda: why_not_fused(x, pg), on_gpu=x.is_cuda):
        return "whole"
    workspace = workspace_of(pg)
    n, k = weight.shape
    m = x.numel() // max(k, 1)
    if not workspace.hopper or x.element_size() != 2 or k % 8 or n % 8 or k == 0 or m == 0:
        return "whole"
    choice = workspace.choice(op, m * n * x.element_size())
    if not choice.suits(m, k, n):
        return "whole"
    chosen = choice.algorithm
    if chosen == "decode" and workspace.takes_decode(m, n):
        return chosen
    if chosen == "persistent" and m > _ext.extension().matmul_tile_rows * (pg.size() - 1):
        most = workspace.matmul().most_rows(n, op == "matmul_reduce_scatter")
        # Every launch needs a row of tiles for every rank, and scattered rows go in one.
        fits = m <= most if op == "matmul_reduce_scatter" else most > 0 and min(_launches(m, most)) >= pg.size()
        return chosen if fits else "whole"
    return "whole"


def _launches(m: int, most_rows: int) -> list[int]:
    """Rows of tiles of each launch: as few launches as fit the slots, of about as many rows each."""
    tile = _ext.extension().matmul_tile_rows
    tile_rows = -(-m // tile)
    launches = -(-tile_rows // (most_rows // tile))
    return [tile_rows * (i + 1) // launches - tile_rows * i // launches for i in range(launches)]


def launch_matmul(x: torch.Tensor, weight: torch.Tensor, pg: dist.ProcessGroup, scatter: bool) -> torch.Tensor:
    """The kernel on x [M, K] and weight [N, K]: their product summed over the ranks, [M, N], or with `scatter` this
    rank's [M / W, N] of it."""
    workspace = workspace_of(pg)
    workspace.check()
    native, tile = workspace.matmul(), _ext.extension().matmul_tile_rows
    x, weight = aligned(x), aligned(weight)
    (m, k), n = x.shape, weight.shape[0]
    out = x.new_empty(m // pg.size() if scatter else m, n)
    parts = [-(-m // tile)] if scatter else _launches(m, native.most_rows(n, False))
    bounds = [min(sum(parts[:i]) * tile, m) for i in range(len(parts) + 1)]
    for first, end in itertools.pairwise(bounds):
        native.matmul_all_reduce(
            x.data_ptr() + first * k * x.element_size(),
            weight.data_ptr(),
            out.data_ptr() + first * n * x.element_size(),
            end - first,
            n,
            k,
            scatter,
            _ext.DTYPE_CODES[x.dtype],
            _direct.raw_stream(workspace.device_index),
        )
    return out


def _launch_decode(x, weight, bias, residual, norm_weight, eps: float, pg: dist.ProcessGroup):
    """The kernel for few rows: the sum, or with a residual (normed, new_residual)."""
    workspace = workspace_of(pg)
    workspace.check()
    # Kept in names until after the launch: a temporary would give its memory back before the kernel is queued.
    x, given = aligned(as_rows(x)), weight
    weight = aligned(given)
    bias, residual, norm_weight = (None if t is None else aligned(t) for t in (bias, residual, norm_weight))
    (m, k), n = x.shape, weight.shape[0]
    out = x.new_empty(m, n)
    new_residual = None if residual is None else torch.empty_like(out)
    _ext.extension().matmul_all_reduce_decode(
        workspace.native,
        x.data_ptr(),
        weight.data_ptr(),
        *(0 if t is None else t.data_ptr() for t in (bias, residual, norm_weight, out, new_residual)),
        m,
        n,
        k,
        eps,
        weight is not given,  # a copy that a kernel just before makes
        _ext.DTYPE_CODES[x.dtype],
        _direct.raw_stream(workspace.device_index),
    )
    return out, new_residual


def _impl(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, group_name: str) -> torch.Tensor:
    op, shape = "matmul_all_reduce", (*x.shape[:-1], weight.shape[0])
    pg = group_from_name(group_name)
    check_agreement(op, pg, x, weight, bias)
    chosen = algorithm(op, x, weight, pg)
    if chosen == "decode":
        return _launch_decode(x, weight, bias, None, None, 0.0, pg)[0].view(shape)
    if chosen == "persistent":
        out = launch_matmul(as_rows(x), weight, pg, scatter=False).view(shape)
    else:
        out = all_reduce_(F.linear(x, weight), pg)
    return out if bias is None else out.add_(bias)


def _impl_norm(x, weight, residual, norm_weight, eps: float, bias, group_name: str):
    op, shape = "matmul_all_reduce_add_rms_norm", (*x.shape[:-1], weight.shape[0])
    pg = group_from_name(group_name)
    check_agreement(op, pg, x, weight, residual, norm_weight, bias)
    chosen = algorithm(op, x, weight, pg)
    if chosen == "decode":
        normed, new_residual = _launch_decode(x, weight, bias, residual, norm_weight, eps, pg)
        return normed.view(shape), new_residual.view(shape)
    if chosen == "persistent":
        out = launch_matmul(as_rows(x), weight, pg, scatter=False).view(shape)
    else:
        partial = F.linear(x, weight)
        if bias is None:
            return reduce_add_norm(partial, residual, norm_weight, eps, pg)
        out = all_reduce_(partial, pg)
    return add_norm(out if bias is None else out.add_(bias), residual, norm_weight, eps)


def _fake(x, weight, bias, group_name):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_norm(x, weight, residual, norm_weight, eps, bias, group_name):
    return _fake(x, weight, bias, group_name), _fake(x, weight, bias, group_name)


_op = register("matmul_all_reduce(Tensor x, Tensor weight, Tensor? bias, str group_name) -> Tensor", _impl, _fake)
_op_norm = register(
    "matmul_all_reduce_add_rms_norm(Tensor x, Tensor weight, Tensor residual, Tensor norm_weight, float eps, "
    "Tensor? bias, str group_name) -> (Tensor, Tensor)",
    _impl_norm,
    _fake_norm,
)


def check_matmul(op: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Raise ValueError unless x [..., K], weight [N, K] and bias [N] fit."""
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: x [..., K] and weight [N, K] must share K, got {tuple(x.shape)} and {tuple(weight.shape)}; "
            "both hold this rank's part of K"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"{op}: bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")


def matmul_all_reduce(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, group
) -> torch.Tensor:
    """x @ weight.T summed over the ranks, plus bias: a row-parallel linear layer.

    Args:
        x: [..., K / tp], fp16, bf16 or fp32: this rank's columns of the input.
        weight: [N, K / tp], torch's layout: this rank's columns of the weight.
        bias: [N] or None, the whole bias on every rank; added once, after the sum.
        group: ProcessGroup or 1-D DeviceMesh.

    Returns:
        [..., N], the same on every rank. Each rank's partial product is rounded to the dtype before the sum.

    Raises:
        TypeError, ValueError: bad dtype, shape or group.
        NoFusedKernelError: under fp.use("fused"), where the group's ranks have no kernels for each other.
        PeerTimeoutError: a rank died or did not answer within the group's timeout.
        RuntimeError: the first call of the group, or its first with many rows, which make the memory that is exchanged
            through, is captured in a CUDA graph.

    fp16 and bf16 with N and K / tp multiples of 8 go to one kernel on Hopper GPUs where the group's tuning table
    prefers it; all else to torch's matmul and the fused all-reduce in turn, without a warning, under fp.use("fused"),
    too.

    Runs on the current stream; capturable in CUDA graphs after those first calls; traced by torch.compile as one node.
    """
    check_floating("matmul_all_reduce", ("bias",), x=x, weight=weight, bias=bias)
    check_matmul("matmul_all_reduce", x, weight, bias)
    return _op(x, weight, bias, resolve_group(group).group_name)


def matmul_all_reduce_add_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    bias: torch.Tensor | None = None,
    *,
    group,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`matmul_all_reduce`, then the residual added and the sum normalised (`all_reduce_add_rms_norm`).

    Args:
        x: [..., K / tp]; weight: [N, K / tp]; bias: [N] or None: as `matmul_all_reduce`.
        residual: [..., N], the same on every rank.
        norm_weight: [N]; eps: of the RMSNorm.
        group: ProcessGroup or 1-D DeviceMesh.

    Returns:
        (normed [..., N], new_residual [..., N]), the same on every rank.

    Else as `matmul_all_reduce`. What no kernel of the matmul takes ends in `all_reduce_add_rms_norm`, or with a bias in
    `all_reduce` and `add_rms_norm`; the first has a kernel on Hopper GPUs for rows of a multiple of 16 bytes (N of 8 in
    16 bits, of 4 in fp32) up to 64 KB, and fp.use("fused") refuses other rows there.
    """
    op = "matmul_all_reduce_add_rms_norm"
    check_floating(op, ("bias",), x=x, weight=weight, residual=residual, norm_weight=norm_weight, bias=bias)
    check_matmul(op, x, weight, bias)
    check_norm(op, (*x.shape[:-1], weight.shape[0]), residual, norm_weight, eps)
    return _op_norm(x, weight, residual, norm_weight, eps, bias, resolve_group(group).group_name)
