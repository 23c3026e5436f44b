"""Loading of the compiled extension `fused_parallel._C`, which is optional."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

# The numbers of enum DType in csrc/common/dtype.h.
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# The kernels' limits where there are no kernels to ask; tests/cpu/test_tuning.py compares them with the extension's.
LIMITS = {"matmul_decode_max_rows": 64, "matmul_tile_rows": 128, "verify_attention_max_new_tokens": 64}


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("fused_parallel._C"), None
    except ModuleNotFoundError:
        return None, (
            "fused_parallel._C was not built: no C++ compiler or no Python.h (python3-dev) was found when the package "
            "was installed; install them and reinstall the package"
        )
    except ImportError as error:
        return None, f"fused_parallel._C is there but cannot be loaded: {error}"


def extension() -> ModuleType | None:
    """The extension module, or None where it was not built or cannot be loaded."""
    return _load()[0]


def why_no_extension() -> str | None:
    """Why `extension()` is None; None if it is there."""
    return _load()[1]


@functools.cache
def limit(name: str) -> int:
    """A constant of the kernels that decides, with or without them, what is theirs: one of LIMITS."""
    return getattr(extension(), name, LIMITS[name])


@functools.cache
def why_no_kernels() -> str | None:
    """Why the CUDA kernels of the extension cannot run in this process; None if they can.

    It depends on the installation and on GPU 0 only, so it is asked once; call it after the environment (for example
    CUDA_VISIBLE_DEVICES) is settled.
    """
    if extension() is None:
        return why_no_extension()
    if not extension().cuda_built:
        return f"the extension has no CUDA kernels: {extension().why_no_cuda}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than compute capability 8.0, the least that is supported"
    return None
