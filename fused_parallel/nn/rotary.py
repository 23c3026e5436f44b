"""Rotary position embedding, with Llama 3's frequency scaling (Su et al. 2021; Llama 3 herd of models, 2024)."""

from __future__ import annotations

import math

import torch
from torch import nn


def inverse_frequencies(head_dim: int, theta: float, scaling: dict | None) -> torch.Tensor:
    """float32 [head_dim / 2]. `scaling` is transformers' dict: None or rope_type "default", "linear" or "llama3".

    Raises ValueError for a rope_type that is not implemented.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
    if kind == "default":
        return frequencies
    if kind == "linear":
        return frequencies / scaling["factor"]
    if kind != "llama3":
        raise ValueError(f"rope_type {kind!r} is not supported; supported are default, linear and llama3")
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    context = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / frequencies
    # Short wavelengths stay, long ones are slowed by `factor`, those between are interpolated.
    smooth = ((context / wavelength - low) / (high - low)).clamp(0, 1)
    return frequencies * smooth + frequencies / factor * (1 - smooth)


class RotaryEmbedding(nn.Module):
    """cos and sin for given positions: int64 [B, S] -> two tensors [B, S, head_dim] of `dtype`, computed in fp32."""

    def __init__(self, head_dim: int, theta: float, scaling: dict | None = None, device=None) -> None:
        super().__init__()
        self._frequencies = inverse_frequencies(head_dim, theta, scaling)
        self.register_buffer("inv_freq", self._frequencies.to(device), persistent=False)

    def _apply(self, fn, *args, **kwargs):
        # .to(dtype) must not round the frequencies: angles of thousands of positions would be off by radians.
        super()._apply(fn, *args, **kwargs)
        self.inv_freq = self._frequencies.to(self.inv_freq.device)
        return self

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        angle = positions.unsqueeze(-1).float() * self.inv_freq
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos().to(dtype), angle.sin().to(dtype)
