"""The part of a Hugging Face Llama configuration that inference needs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from ..nn.rotary import inverse_frequencies

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class LlamaConfig:
    """Names and meanings as in transformers' LlamaConfig."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    dtype: str = "float32"

    @classmethod
    def from_dict(cls, config: dict) -> LlamaConfig:
        """From the contents of a config.json. Raises ValueError for another architecture or a missing entry."""
        if not isinstance(config, dict):
            raise ValueError(f"a model's configuration must be a mapping, got {type(config).__name__}")
        kind = config.get("model_type", "llama")
        if kind != "llama":
            raise ValueError(f"model_type {kind!r} is not supported; fp.LlamaForCausalLM reads model_type 'llama'")
        act = config.get("hidden_act", "silu")
        if act != "silu":
            raise ValueError(f"hidden_act {act!r} is not supported; expected 'silu'")
        missing = [
            name
            for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
            if config.get(name) is None
        ]
        if missing:
            raise ValueError(f"the configuration lacks {', '.join(missing)}")
        counts = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name in counts:
            if not isinstance(config[name], int) or config[name] < 1:
                raise ValueError(f"{name} must be a positive integer, got {config[name]!r}")
        # transformers 5 moved rope_theta and rope_scaling into rope_parameters
        rope = config.get("rope_parameters") or config.get("rope_scaling")
        heads = config["num_attention_heads"]
        made = cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=(rope or {}).get("rope_theta") or config.get("rope_theta") or 10000.0,
            rope_scaling=rope,
            max_position_embeddings=config.get("max_position_embeddings", 2048),
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            attention_bias=config.get("attention_bias", False),
            mlp_bias=config.get("mlp_bias", False),
            bos_token_id=config.get("bos_token_id"),
            eos_token_id=config.get("eos_token_id"),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."),
        )
        if made.dtype not in DTYPES:
            raise ValueError(f"dtype {made.dtype!r} is not supported; supported are {', '.join(DTYPES)}")
        inverse_frequencies(made.head_dim, made.rope_theta, made.rope_scaling)  # refuses what it cannot do
        return made

    @classmethod
    def from_pretrained(cls, path: str | Path) -> LlamaConfig:
        """From `path`/config.json. Raises FileNotFoundError or ValueError that name the file."""
        file = Path(path) / "config.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} not found: expected a Hugging Face model directory with config.json and *.safetensors"
            )
        try:
            return cls.from_dict(json.loads(file.read_text()))
        except KeyError as error:
            raise ValueError(f"{file}: an entry lacks {error}") from error
        except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"{file}: {error}") from error
