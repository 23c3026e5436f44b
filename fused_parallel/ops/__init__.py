"""The functional operations: schema, fake, checks and choice of implementation, one file per operation."""

from ._dispatch import use
from .add_rms_norm import add_rms_norm, rms_norm
from .all_reduce import all_gather, all_reduce, reduce_scatter
from .all_reduce_add_rms_norm import all_reduce_add_rms_norm
from .linear import linear, linear_silu_mul
from .matmul_all_reduce import matmul_all_reduce, matmul_all_reduce_add_rms_norm
from .matmul_reduce_scatter import all_gather_matmul, matmul_reduce_scatter
from .quantized_matmul import quantized_matmul
from .rotary_cache_write import rotary_cache_write
from .sample import sample
from .silu_mul import silu_mul
from .verify import VerifyResult, verify
from .verify_attention import verify_attention
from .verify_tree import verify_tree

__all__ = [
    "VerifyResult",
    "add_rms_norm",
    "all_gather",
    "all_gather_matmul",
    "all_reduce",
    "all_reduce_add_rms_norm",
    "linear",
    "linear_silu_mul",
    "matmul_all_reduce",
    "matmul_all_reduce_add_rms_norm",
    "matmul_reduce_scatter",
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
