"""Fused kernels for parallel LLM inference: drop-in PyTorch modules over torch.distributed.

Importing needs neither a GPU nor Triton nor the compiled extension; `fused-parallel doctor` tells what is there.
"""

from . import comm, nn
from ._version import __version__
from .comm.groups import finalize
from .comm.workspace import check
from .errors import MessageMismatchError, NoFusedKernelError, PeerTimeoutError
from .models.config import LlamaConfig
from .models.llama import LlamaForCausalLM
from .offload import Offload
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
    quantized_matmul,
    reduce_scatter,
    rms_norm,
    rotary_cache_write,
    sample,
    silu_mul,
    use,
    verify,
    verify_attention,
    verify_tree,
)
from .planner import Plan, Workload, init, plan, planned
from .speculative import Generation, GenerationStats, generate

__all__ = [
    "Generation",
    "GenerationStats",
    "LlamaConfig",
    "LlamaForCausalLM",
    "MessageMismatchError",
    "NoFusedKernelError",
    "Offload",
    "PeerTimeoutError",
    "Plan",
    "VerifyResult",
    "Workload",
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
    "plan",
    "planned",
    "quantized_matmul",
    "reduce_scatter",
    "rms_norm",
    "rotary_cache_write",
    "sample",
    "silu_mul",
    "use",
    "verify",
    "verify_attention",
    "verify_tree",
]


def parallelize(model, mesh, parallelize_plan="auto", *, split=None):
    """Spread a model that every rank holds whole over the mesh, in place, and return it.

    Args:
        model: a transformers causal language model (Llama, Mistral, Qwen2), or with a plan any module.
        mesh: of `fp.init`: "tp" splits heads, features and vocabulary, "pp" cuts the layers into stages.
        parallelize_plan: "auto", or a mapping from module names to "colwise", "colwise_gather_output", "rowwise" or a
            torch ParallelStyle (tp only).
        split: layers of each pipeline stage; default: balanced by their weights.

    The model takes the same inputs and gives the same whole logits on every rank. Details, conditions and errors:
    `help(fused_parallel.integrations.transformers.parallelize)`, which is imported at the first call.
    """
    from .integrations.transformers import parallelize

    return parallelize(model, mesh, parallelize_plan, split=split)
