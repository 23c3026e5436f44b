"""Choice between an operation's fused and reference implementations.

The choice must be the same on all ranks of a group, else one rank polls in a kernel while its peer sits in NCCL. So it
may depend on shape, dtype and what the group agreed on (`comm.capabilities`), never on alignment, strides or addresses.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import os
import warnings
from collections.abc import Callable

from ..errors import NoFusedKernelError

MODES = ("auto", "fused", "reference")
_mode: contextvars.ContextVar[str | None] = contextvars.ContextVar("fused_parallel_mode", default=None)
_log = logging.getLogger("fused_parallel")
_told: set[tuple[str, str]] = set()


@functools.cache
def environment_mode() -> str:
    """The mode that the environment variable FUSED_PARALLEL asks for (`auto` when unset); read once a process."""
    mode = os.environ.get("FUSED_PARALLEL", "auto")
    if mode not in MODES:
        raise ValueError(f"FUSED_PARALLEL={mode!r} in the environment: must be one of {', '.join(MODES)}")
    return mode


def current_mode() -> str:
    """The mode in force: that of the innermost `fp.use`, else of the environment."""
    return _mode.get() or environment_mode()


@contextlib.contextmanager
def use(mode: str):
    """Within the block, choose implementations by `mode`; all ranks of a group must use the same.

    Args:
        mode: "auto" (fused where there is a kernel for the call and the group's tuning table does not prefer
            torch.distributed, else reference, with one warning that says why),
            "fused" (raise `fp.NoFusedKernelError` instead of falling back to torch.distributed or to plain torch for
            what a kernel does) or "reference" (plain torch and torch.distributed). The environment variable
            FUSED_PARALLEL sets the default.

    A matmul with communication is done in one of several ways by shape and dtype (`fp.matmul_all_reduce`): by one
    kernel, or by torch's matmul (cuBLAS) and the fused collective in turn. The second is no fallback: it is taken
    without a warning and under "fused", too, which refuses only what the collective that follows has no kernel for.

    The mode is read when an operation runs, also in code compiled by torch.compile; a captured CUDA graph keeps what
    was in force at capture. It belongs to this thread: threads started inside the block have the environment's.
    Not to be entered inside a compiled function.
    """
    if mode not in MODES:
        raise ValueError(f"fp.use({mode!r}): mode must be one of {', '.join(MODES)}")
    token = _mode.set(mode)
    try:
        yield
    finally:
        _mode.reset(token)


def choose_fused(op: str, unsupported: str | Callable[[], str | None] | None, *, on_gpu: bool) -> bool:
    """Whether this call takes the fused implementation.

    `unsupported` is None if it can, else the reason, computed from what all ranks share; a function where finding out
    may be collective, so that it is asked only where a kernel is wanted. A reason is told once per operation: as a
    warning on a GPU, where it costs speed, as a log line on a CPU, where nothing else exists.
    """
    mode = current_mode()
    if mode == "reference":
        return False
    reason = unsupported() if callable(unsupported) else unsupported
    if reason is None:
        return True
    if mode == "fused":
        raise NoFusedKernelError(f'{op}: fused kernels are asked for (fp.use("fused") or FUSED_PARALLEL), but {reason}')
    if (op, reason) not in _told:
        _told.add((op, reason))
        text = f"{op}: using the reference implementation (torch and torch.distributed), because {reason}"
        if on_gpu:
            warnings.warn(text, stacklevel=3)
        else:
            _log.info(text)
    return False


def choose_library(op: str, bytes: int) -> bool:
    """Whether a call that the group's tuning table leaves to torch.distributed goes there: not under fp.use("fused").
    Told once per operation, in the log."""
    if current_mode() == "fused":
        return False
    if (op, "tuning") not in _told:
        _told.add((op, "tuning"))
        _log.info("%s: payloads such as %d bytes go to torch.distributed, by this group's tuning table", op, bytes)
    return True
