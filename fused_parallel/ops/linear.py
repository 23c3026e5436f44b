"""linear and linear_silu_mul: torch.nn.functional.linear, with a kernel for few rows, where reading the weight is all
that counts."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .. import _ext
from . import _direct
from ._dispatch import choose_fused
from ._library import as_rows, check_floating, register, why_no_kernel_for
from .all_reduce import aligned
from .matmul_all_reduce import check_matmul
from .silu_mul import silu_mul


def _takes_kernel(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Shapes that it does not take are cuBLAS's, and no fallback."""
    n, k = weight.shape
    if not x.is_cuda or x.element_size() != 2 or n % 8 or k % 8 or n == 0:
        return False
    if not 0 < x.numel() <= _ext.limit("matmul_decode_max_rows") * k:
        return False
    if torch.cuda.get_device_capability(x.device)[0] != 9:
        return False
    return choose_fused("linear", why_no_kernel_for(x), on_gpu=True)


def _launch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gated: bool) -> torch.Tensor:
    # Kept in names until after the launch: a temporary would give its memory back before the kernel is queued.
    rows, given = aligned(as_rows(x)), weight
    weight = aligned(given)
    bias = None if bias is None else aligned(bias)
    n = weight.shape[0] // (2 if gated else 1)
    out = x.new_empty(*x.shape[:-1], n)
    _ext.extension().matmul_decode_only(
        rows.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        rows.shape[0],
        n,
        weight.shape[1],
        gated,
        weight is not given,  # a copy that the kernel before makes
        _ext.DTYPE_CODES[x.dtype],
        x.device.index,
        _direct.raw_stream(x.device.index),
    )
    return out


def _impl(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return _launch(x, weight, bias, False) if _takes_kernel(x, weight) else F.linear(x, weight, bias)


def _impl_gated(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if weight.shape[0] % 16 == 0 and _takes_kernel(x, weight):
        return _launch(x, weight, None, True)
    return silu_mul(F.linear(x, weight))


_op = register(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _impl,
    lambda x, weight, bias: x.new_empty(*x.shape[:-1], weight.shape[0]),
)
_op_gated = register(
    "linear_silu_mul(Tensor x, Tensor weight) -> Tensor",
    _impl_gated,
    lambda x, weight: x.new_empty(*x.shape[:-1], weight.shape[0] // 2),
)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias on one GPU, as torch.nn.functional.linear.

    Args:
        x: [..., K]; weight: [N, K], torch's layout; bias: [N] or None; fp16, bf16 or fp32.

    Returns:
        [..., N], summed in fp32 and rounded once.

    For up to 64 rows of fp16 or bf16 on a Hopper GPU, with N and K multiples of 8, a kernel that begins to read the
    weight before the kernels before it in the stream have ended: none since the last ordinary launch, copy or event
    wait may write the weight. Everything else is torch's. A local operation that knows no group. Runs on the current
    stream; capturable in CUDA graphs; traced by torch.compile as one node.

    Raises:
        TypeError, ValueError: bad dtype or shape, or a gradient wanted while grad mode is on.
    """
    check_floating("linear", ("bias",), x=x, weight=weight, bias=bias)
    check_matmul("linear", x, weight, bias)
    return _op(x, weight, bias)


def linear_silu_mul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for (gate, up) = x @ weight.T: `linear`, then `silu_mul`, rounded in
    between as there.

    Args:
        x: [..., K]; weight: [2 * size, K], gate before up; fp16, bf16 or fp32.

    Returns:
        [..., size]. Else as `linear`, for few rows one kernel.
    """
    check_floating("linear_silu_mul", x=x, weight=weight)
    check_matmul("linear_silu_mul", x, weight)
    if weight.shape[0] == 0 or weight.shape[0] % 2:
        raise ValueError(f"linear_silu_mul: weight must be [2 * size, K] with size >= 1, got {tuple(weight.shape)}")
    return _op_gated(x, weight)
