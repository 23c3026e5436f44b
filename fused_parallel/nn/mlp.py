"""The gated MLP of the Llama family, split over the ranks."""

from __future__ import annotations

import torch
from torch import nn

from .. import ops
from ._shards import merge_siblings
from .linear import ColumnParallelLinear, RowParallelLinear, is_apart
from .rms_norm import RMSNorm


class ParallelMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), as transformers' LlamaMLP, the intermediate size split over the ranks of `group`.

    Loads state dicts with gate_proj, up_proj and down_proj; gate and up are held merged in `gate_up_proj`. An
    intermediate size that the group does not divide is padded with zeros. forward: x [..., hidden] -> [..., hidden];
    with `residual` and `norm`, (norm(sum), sum) for sum = residual + output. With `sequence_parallel` every rank holds
    its rows of all of these: x, residual and output are [M / tp, hidden].
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        bias: bool = False,
        *,
        group,
        sequence_parallel: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.gate_up_proj = ColumnParallelLinear(
            hidden_size,
            (intermediate_size, intermediate_size),
            bias,
            group=group,
            names=("gate_proj", "up_proj"),
            sequence_parallel=sequence_parallel,
            device=device,
            dtype=dtype,
        )
        kwargs = {"group": group, "sequence_parallel": sequence_parallel, "device": device, "dtype": dtype}
        self.down_proj = RowParallelLinear(intermediate_size, hidden_size, bias, **kwargs)
        merge_siblings(self)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None, norm: RMSNorm | None = None):
        merged = self.gate_up_proj
        plain = type(merged) is ColumnParallelLinear and merged.bias is None and not merged.sequence_parallel
        plain = plain and not (merged._forward_hooks or merged._forward_pre_hooks or "forward" in vars(merged))
        if not plain or is_apart(merged, x):
            return self.down_proj(ops.silu_mul(merged(x)), residual, norm)
        return self.down_proj(ops.linear_silu_mul(x, merged.weight), residual, norm)
