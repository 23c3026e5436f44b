"""Fused kernels for parallel LLM inference: drop-in PyTorch modules over torch.distributed.

Importing needs neither a GPU nor Triton nor the compiled extension; `fused-parallel doctor` tells what is there.
"""

from . import comm
from ._version import __version__
from .comm.groups import finalize, init
from .errors import NoFusedKernelError, PeerTimeoutError
from .ops._dispatch import use

__all__ = [
    "NoFusedKernelError",
    "PeerTimeoutError",
    "__version__",
    "comm",
    "finalize",
    "init",
    "use",
]
