"""What the tests of the matmul kernels share: what they need, operands of virtual ranks, the sum to expect, and the
kernel without an exchange."""

from __future__ import annotations

import pytest
import torch

from fused_parallel import _ext

NEEDS_HOPPER = [
    pytest.mark.skipif(_ext.why_no_kernels() is not None, reason=f"no CUDA kernels: {_ext.why_no_kernels()}"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="the kernel needs a Hopper"
    ),
]


def operands(world: int, m: int, k: int, n: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Each rank's x [m, k] and weight [n, k], such that the sum of the products is of order one."""
    xs = [torch.randn(m, k, device="cuda").to(dtype) for _ in range(world)]
    weights = [(torch.randn(n, k, device="cuda") * (world * k) ** -0.5).to(dtype) for _ in range(world)]
    return xs, weights


def summed_products(xs: list[torch.Tensor], weights: list[torch.Tensor]) -> torch.Tensor:
    """float64 sum of the ranks' products, each rounded to the dtype, as they travel."""
    return sum((x.double() @ w.double().t()).to(x.dtype).double() for x, w in zip(xs, weights, strict=True))


def launch_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    gated: bool = False,
    fresh_weight: bool = False,
    stream: torch.cuda.Stream | None = None,
) -> None:
    """The kernel of `linear`, or with `gated` of `linear_silu_mul`, into `out`."""
    _ext.extension().matmul_decode_only(
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        out=out.data_ptr(),
        m=x.shape[0],
        n=out.shape[1],
        k=x.shape[1],
        gated=gated,
        fresh_weight=fresh_weight,
        dtype=_ext.DTYPE_CODES[x.dtype],
        device=x.device.index,
        stream=(stream or torch.cuda.current_stream()).cuda_stream,
    )
