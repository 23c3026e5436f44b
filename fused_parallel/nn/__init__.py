"""Drop-in modules; parameters are named and shaped like those of the modules they replace."""

from .attention import ParallelAttention, QKVParallelLinear
from .embedding import ParallelLMHead, VocabParallelEmbedding
from .heads import HeadLayout
from .kv_cache import KVCache
from .linear import ColumnParallelLinear, RowParallelLinear
from .mlp import ParallelMLP
from .pipeline_stage import PipelineStage
from .quantize import quantize_
from .rms_norm import RMSNorm
from .rotary import RotaryEmbedding
from .speculative_verifier import SpeculativeVerifier
from .streamed_layers import StreamedLayers

__all__ = [
    "ColumnParallelLinear",
    "HeadLayout",
    "KVCache",
    "ParallelAttention",
    "ParallelLMHead",
    "ParallelMLP",
    "PipelineStage",
    "QKVParallelLinear",
    "RMSNorm",
    "RotaryEmbedding",
    "RowParallelLinear",
    "SpeculativeVerifier",
    "StreamedLayers",
    "VocabParallelEmbedding",
    "quantize_",
]
