"""all_gather_matmul with the gathering hidden behind the own rows' matmul.

The matmuls are torch's, on the caller's stream. The blocks are gathered beside them on the workspace's side stream, by
few CTAs whose priority lets them take the first multiprocessors that become free. Streams are forked and joined by
events, so that all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..comm.tuning import Choice
from ..comm.workspace import AllReduceWorkspace
from .all_reduce import launch_part


class _Side:
    """Work on the workspace's side stream between a fork from the caller's stream and the join."""

    def __init__(self, workspace: AllReduceWorkspace) -> None:
        self.workspace, self.stream = workspace, workspace.side_stream
        self.main = torch.cuda.current_stream(workspace.device)
        workspace.check()
        workspace.native.order(self.main.cuda_stream)

    def run(self, function: Callable[[], object]) -> torch.cuda.Event:
        """`function()` on the side stream behind all that is on the caller's by now; the event of its end."""
        self.stream.wait_stream(self.main)
        self.workspace.native.move_to(self.stream.cuda_stream)
        with torch.cuda.stream(self.stream):
            function()
            return self.stream.record_event()

    def join(self) -> None:
        self.main.wait_stream(self.stream)
        self.workspace.native.move_to(self.main.cuda_stream)


def all_gather_matmul(
    x: torch.Tensor, weight: torch.Tensor, workspace: AllReduceWorkspace, choice: Choice
) -> torch.Tensor:
    """The ranks' x [M / W, K] in rank order @ weight.T, [M, N]. The own rows come first, while the others' travel."""
    world, rank, (n, k) = workspace.pg.size(), workspace.pg.rank(), weight.shape
    rows = len(x)
    out, transposed = x.new_empty(world, rows, n), weight.t()
    gathered = x.new_empty(world * rows, k)
    side = _Side(workspace)
    block = max(1, choice.rows // world)
    arrived = []
    for first in range(0, rows, block):
        end = min(first + block, rows)
        into = gathered[world * first : world * end]

        def gather(x=x[first:end], into=into) -> None:
            launch_part("all_gather", x, into, workspace, choice.ctas)

        # All are launched at once, behind what the caller's stream holds before the matmuls.
        arrived.append((first, end, into, side.run(gather)))
    torch.mm(x, transposed, out=out[rank])
    for first, end, into, event in arrived:
        side.main.wait_event(event)
        for source in range(world):
            if source != rank:
                torch.mm(into.view(world, end - first, k)[source], transposed, out=out[source, first:end])
    side.join()
    return out.view(world * rows, n)
