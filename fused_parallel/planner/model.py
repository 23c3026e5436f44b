"""Shapes of a Llama-family model, and what they weigh on each rank."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from ..models.config import LlamaConfig

# Published shapes: the config.json of meta-llama/Meta-Llama-3-8B, -3-70B and Llama-3.1-405B.
PRESETS = {
    "llama-3-8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
    "llama-3-70b": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
    "llama-3-405b": dict(hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128),
}

# Bytes a parameter of the decoder layers takes; the embedding, the head and the norms stay in bf16.
# int8 and int4 are this library's (nn.quantize_): int4 has a bf16 scale for each group of 128, int8 one a row, which is
# less than a thousandth and not counted.
WEIGHT_BYTES = {"bf16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5 + 2 / 128}
ACTIVATION_BYTES = 2  # activations and what is communicated are bf16
KV_BYTES = {"bf16": 2, "fp8": 1}  # an element of the KV cache


@dataclass(frozen=True)
class ModelShape:
    """What of a configuration costs time or memory. Counts are of parameters, sizes of bytes."""

    name: str
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool = False
    kv_dtype: str = "bf16"

    def kv_heads_per_rank(self, tp: int) -> int:
        """KV heads a rank holds; with more ranks than KV heads each is held by several."""
        return max(1, self.kv_heads // tp)

    def matmuls(self, tp: int) -> list[tuple[str, int, int]]:
        """(name, K, N) of the four matmuls of a layer, per rank."""
        heads = self.heads // tp
        inter = math.ceil(self.intermediate / tp)
        qkv = (heads + 2 * self.kv_heads_per_rank(tp)) * self.head_dim
        return [
            ("qkv", self.hidden, qkv),
            ("o", heads * self.head_dim, self.hidden),
            ("gate_up", self.hidden, 2 * inter),
            ("down", inter, self.hidden),
        ]

    def layer_params(self, tp: int = 1) -> int:
        """Parameters of a layer on one rank, its two norms (never split) included."""
        return sum(k * n for _, k, n in self.matmuls(tp)) + 2 * self.hidden

    def vocab_params(self, tp: int = 1) -> int:
        """Parameters of the embedding, or of the head, on one rank: rows split over the ranks."""
        return math.ceil(self.vocab / tp) * self.hidden

    def params(self) -> int:
        """All parameters of the model."""
        return self.layers * self.layer_params() + (1 if self.tied else 2) * self.vocab_params() + self.hidden

    def layer_bytes(self, tp: int, dtype: str) -> float:
        """Bytes of one layer's weights on one rank."""
        norms = 2 * self.hidden
        return (self.layer_params(tp) - norms) * WEIGHT_BYTES[dtype] + norms * ACTIVATION_BYTES

    def stage_bytes(self, stage: int, layers: list[int], tp: int, dtype: str) -> float:
        """Bytes of weights on a rank of pipeline stage `stage`, where stage s has layers[s] layers: the first stage
        also holds the embedding, the last the final norm and the head (a tied one once, where they are the same)."""
        total = layers[stage] * self.layer_bytes(tp, dtype)
        first, last = stage == 0, stage == len(layers) - 1
        tables = int(first) + int(last) - int(first and last and self.tied)
        return total + (tables * self.vocab_params(tp) + (self.hidden if last else 0)) * ACTIVATION_BYTES

    def kv_bytes_per_token(self, layers: int, tp: int) -> int:
        """Bytes of keys and values of one token in `layers` layers on one rank."""
        return 2 * layers * self.kv_heads_per_rank(tp) * self.head_dim * KV_BYTES[self.kv_dtype]

    def activation_bytes(self, tokens: int, batch: int, tp: int) -> float:
        """An estimate of the largest live activations of a step over `tokens` tokens with `batch` rows of logits:
        hidden states in and out, the residual and its norm; the widest matmul output and its activation; and the
        logits once in bf16 and once in fp32 (a sampler's copy)."""
        widest = max(n for _, _, n in self.matmuls(tp))
        return tokens * (4 * self.hidden + 1.5 * widest) * ACTIVATION_BYTES + batch * math.ceil(self.vocab / tp) * 6

    def tp_degrees(self, limit: int) -> list[int]:
        """Tensor-parallel degrees up to `limit` that split the heads evenly and the KV heads evenly or by copies."""
        return [
            n
            for n in range(1, min(limit, self.heads) + 1)
            if self.heads % n == 0 and (self.kv_heads % n == 0 or n % self.kv_heads == 0)
        ]


def load_model(source: str | Path | dict | LlamaConfig | ModelShape) -> ModelShape:
    """The shapes of a model: a preset's name, a config.json or the directory it is in, its contents, or LlamaConfig.

    Raises ValueError for an unknown name (listing the presets) and for a configuration that LlamaConfig refuses.
    """
    return source if isinstance(source, ModelShape) else _shape(*load_config(source))


def load_config(source: str | Path | dict | LlamaConfig) -> tuple[LlamaConfig, str]:
    """(configuration, name) of a model, named as for load_model; the same errors."""
    if isinstance(source, LlamaConfig):
        return source, f"llama-{source.hidden_size}x{source.num_hidden_layers}"
    if isinstance(source, dict):
        return LlamaConfig.from_dict(source), str(source.get("_name_or_path") or "config")
    if str(source) in PRESETS:
        config = dict(PRESETS[str(source)], vocab_size=128256, num_key_value_heads=8, dtype="bfloat16")
        return LlamaConfig.from_dict(config), str(source)
    path = Path(source)
    if path.is_dir():
        return LlamaConfig.from_pretrained(path), path.name
    if not path.is_file():
        raise ValueError(
            f"model {str(source)!r} is neither a file, a directory nor a preset; presets: {', '.join(PRESETS)}"
        )
    try:
        config = json.loads(path.read_text())
        return LlamaConfig.from_dict(config), path.parent.name or path.stem
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a model's config.json: no JSON ({error})") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _shape(config: LlamaConfig, name: str) -> ModelShape:
    return ModelShape(
        name=name,
        vocab=config.vocab_size,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        tied=config.tie_word_embeddings,
    )
