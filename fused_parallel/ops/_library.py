"""Registration of the library's operations with torch.library, and the checks every operation shares.

`define` + `impl` + `register_fake` instead of the `custom_op` decorator: a call through them costs about 3 us of host
time, through the decorator about 27 us.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import _ext

_LIBRARY = torch.library.Library("fused_parallel", "DEF")


def register(schema: str, impl: Callable, fake: Callable):
    """Define `fused_parallel::<schema>`, with one implementation for all devices and a fake one for tracing.

    Returns the OpOverload to call. The implementation chooses between fused and reference at run time.
    """
    name = schema.split("(", 1)[0]
    # needs_fixed_stride_order: under torch.compile the inputs arrive with the strides the eager call would see, so
    # that both choose alike.
    _LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))
    _LIBRARY.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_parallel::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.fused_parallel, name).default


FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_floating(op: str, optional: tuple[str, ...] = (), **tensors: torch.Tensor | None) -> None:
    """All given tensors: floating dtype fp16, bf16 or fp32, the same dtype and device, and no gradient wanted. Those
    named in `optional` may be None."""
    first_name, first = None, None
    for name, t in tensors.items():
        if t is None and name in optional:
            continue
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(t).__name__}")
        if t.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{op}: {name} has dtype {t.dtype}; supported are float16, bfloat16 and float32")
        if first is None:
            first_name, first = name, t
        elif t.dtype != first.dtype:
            raise TypeError(f"{op}: {name} has dtype {t.dtype} but {first_name} has {first.dtype}; convert one of them")
        elif t.device != first.device:
            raise ValueError(f"{op}: {name} is on {t.device} but {first_name} is on {first.device}")
    check_no_grad(op, **tensors)


def check_no_grad(op: str, **tensors: torch.Tensor | None) -> None:
    """Refuse tensors that want gradients while grad mode is on: the library is for inference and has no backward."""
    if not torch.is_grad_enabled():
        return
    for name, t in tensors.items():
        if isinstance(t, torch.Tensor) and t.requires_grad:
            raise ValueError(
                f"{op}: {name} requires a gradient, and this library has no backward pass; "
                f"call it under torch.no_grad() or torch.inference_mode(), or pass {name}.detach()"
            )


def why_no_kernel_for(x: torch.Tensor) -> str | None:
    """Why a kernel of this GPU alone cannot run on `x`; None if it can."""
    return _ext.why_no_kernels() if x.is_cuda else f"there is a kernel for CUDA tensors only, not for {x.device.type}"


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` as [rows, size] with contiguous elements in a row: a view where the strides allow one, else a copy."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
