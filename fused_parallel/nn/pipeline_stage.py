"""A slice of a model that runs as one stage of a pipeline."""

from __future__ import annotations

import torch
from torch import nn

from ..comm import collectives
from ..comm.groups import resolve_group


class PipelineStage(nn.Module):
    """Runs `module` between a receive from the previous stage and a send to the next one.

    Args:
        module: this stage's slice; called as module(x, **kwargs) and returning one tensor.
        group: the pipeline's ProcessGroup or 1-D DeviceMesh; stages are in rank order.

    forward(x, shape, dtype, device, **kwargs): on the first stage `x` is the input, on the others it is ignored and a
    tensor of `shape` and `dtype` is received. Returns the module's output on the last stage, None on the others, which
    have sent theirs. Sends and receives block the stream (NCCL) or the host (Gloo); not capturable in CUDA graphs.
    """

    def __init__(self, module: nn.Module, *, group) -> None:
        super().__init__()
        self.module = module
        self.group = resolve_group(group)
        self.stage, self.num_stages = self.group.rank(), self.group.size()

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.num_stages - 1

    def receive(self, shape, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The previous stage's output."""
        return collectives.recv_(torch.empty(shape, dtype=dtype, device=device), self.stage - 1, self.group)

    def send(self, x: torch.Tensor) -> None:
        """Hand `x` to the next stage."""
        collectives.send(x.contiguous(), self.stage + 1, self.group)

    def forward(self, x: torch.Tensor | None, shape, dtype: torch.dtype, device: torch.device, **kwargs):
        if not self.is_first:
            x = self.receive(shape, dtype, device)
        out = self.module(x, **kwargs)
        if self.is_last:
            return out
        self.send(out)
        return None
