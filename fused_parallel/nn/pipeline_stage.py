"""A slice of a model that runs as one stage of a pipeline."""

from __future__ import annotations

import torch
from torch import nn

from ..comm.groups import local_group, resolve_group
from ..pipeline.stage_links import links_of


class PipelineStage(nn.Module):
    """Runs `module` between a receive from the previous stage and a send to the next one.

    Args:
        module: this stage's slice; called as module(x, **kwargs) and returning one tensor. On all stages but the last
            it may return two alike, (x, add), and leave their sum to the send, which forms it on its way.
        group: the pipeline's ProcessGroup or 1-D DeviceMesh; stages are in rank order. Construction is collective.
        tp_group: the group of this stage's ranks, which hold the same hidden states: each sends its slice of large ones
            and the next stage gathers them. Default: this rank alone.

    forward(x, shape, dtype, **kwargs): on the first stage `x` is the input, on the others it is ignored and a tensor of
    `shape` and `dtype` is received, which `module` must not keep. Returns the module's output on the last stage, None
    on the others, which have sent theirs. Sends do not wait for the next stage, receives block the stream (the host
    over Gloo); where `capturable`, a whole step may be captured in a CUDA graph. Errors: as fp.comm.P2PChannel.
    """

    def __init__(self, module: nn.Module, *, group, tp_group=None) -> None:
        super().__init__()
        self.module = module
        self.group = resolve_group(group)
        self.stage, self.num_stages = self.group.rank(), self.group.size()
        self.links = None
        if self.num_stages > 1:
            self.links = links_of(self.group, local_group() if tp_group is None else resolve_group(tp_group))

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.num_stages - 1

    @property
    def capturable(self) -> bool:
        """Whether steps can be captured in CUDA graphs: on one stage, or between GPUs that reach each other."""
        return self.links is None or self.links.capturable

    def share(self, x: torch.Tensor) -> torch.Tensor:
        """Overwrite the contiguous `x` with the last stage's, on every stage: sampled tokens on their way back."""
        return x if self.links is None else self.links.share(x)

    def forward(self, x: torch.Tensor | None, shape, dtype: torch.dtype, **kwargs):
        received = None
        if not self.is_first:
            received = self.links.receive(shape, dtype)
            x = received.tensor
        out = self.module(x, **kwargs)
        if self.is_last and received is not None and received.shares_memory(out):
            out = out.clone()  # a module that returns its input: the slot goes back
        if not self.is_last:
            self.links.send(*(out if isinstance(out, tuple) else (out,)))
        if received is not None:
            received.release()
        return out if self.is_last else None
