"""Fused kernels for parallel LLM inference: drop-in PyTorch modules over torch.distributed.

Importing needs neither a GPU nor Triton nor the compiled extension; `fused-parallel doctor` tells what is there.
"""

from . import comm, nn
from ._version import __version__
from .comm.groups import finalize, init
from .comm.workspace import check
from .errors import NoFusedKernelError, PeerTimeoutError
from .models.config import LlamaConfig
from .models.llama import LlamaForCausalLM
from .ops import (
    VerifyResult,
    add_rms_norm,
    all_gather,
    all_gather_matmul,
    all_reduce,
    all_reduce_add_rms_norm,
    matmul_all_reduce,
    matmul_all_reduce_add_rms_norm,
    matmul_reduce_scatter,
    reduce_scatter,
    rms_norm,
    sample,
    use,
    verify,
    verify_attention,
    verify_tree,
)
from .speculative import Generation, GenerationStats, generate

__all__ = [
    "Generation",
    "GenerationStats",
    "LlamaConfig",
    "LlamaForCausalLM",
    "NoFusedKernelError",
    "PeerTimeoutError",
    "VerifyResult",
    "__version__",
    "add_rms_norm",
    "all_gather",
    "all_gather_matmul",
    "all_reduce",
    "all_reduce_add_rms_norm",
    "check",
    "comm",
    "finalize",
    "generate",
    "init",
    "matmul_all_reduce",
    "matmul_all_reduce_add_rms_norm",
    "matmul_reduce_scatter",
    "nn",
    "parallelize",
    "reduce_scatter",
    "rms_norm",
    "sample",
    "use",
    "verify",
    "verify_attention",
    "verify_tree",
]


def parallelize(model, mesh, parallelize_plan="auto"):
    """Spread a transformers model, or any module with a plan, over the mesh, in place; see
    `fused_parallel.integrations.transformers.parallelize` for arguments and errors. Imported on first use."""
    from .integrations.transformers import parallelize

    return parallelize(model, mesh, parallelize_plan)
