"""Relative error bounds per dtype, against a float64 oracle: ||out - ref|| / ||ref||."""

from __future__ import annotations

import torch

# One rounding to the dtype costs at most 2**-(mantissa bits + 1) an element; the bounds leave room for the few
# roundings an operation is allowed (partial, sum, output).
RELATIVE_ERROR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def relative_error(out: torch.Tensor, ref: torch.Tensor, scale: torch.Tensor | None = None) -> float:
    """||out - ref|| / ||ref|| in float64 (the plain norm where ref is zero); nan if out holds nan or inf.

    `scale`: what to divide by the norm of instead, where sums cancel: the sum of the terms' magnitudes.
    """
    out, ref = out.double().cpu(), ref.double().cpu()
    if out.shape != ref.shape:
        raise ValueError(f"shapes differ: {tuple(out.shape)} and {tuple(ref.shape)}")
    if not out.numel():
        return 0.0
    size = (ref if scale is None else scale.double().cpu()).norm()
    return ((out - ref).norm() / (size if size > 0 else 1)).item()


def assert_close(out: torch.Tensor, ref: torch.Tensor, *, factor: float = 1.0, scale=None) -> None:
    """Raise AssertionError unless `out` is within `factor` times its dtype's bound of the float64 oracle `ref`; `scale`
    as in `relative_error`."""
    bound = RELATIVE_ERROR[out.dtype] * factor
    error = relative_error(out, ref, scale)
    if not error <= bound:
        raise AssertionError(f"relative error {error:.3e} exceeds {bound:.1e} for {out.dtype}")
