"""Reference of add_rms_norm and rms_norm: plain torch, sums in fp32, rounded where the kernel rounds."""

from __future__ import annotations

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x32 = x.float()
    scale = torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + eps)
    normed = (x32 * scale * weight.float()).to(x.dtype)
    return normed.contiguous()


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    new_residual = (x.float() + residual.float()).to(x.dtype).contiguous()
    return rms_norm(new_residual, weight, eps), new_residual
