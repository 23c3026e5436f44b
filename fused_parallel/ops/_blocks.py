"""Matmuls by blocks of rows, the communication of one block hidden behind the matmul of the next.

The matmuls are torch's, on the caller's stream. The collectives of finished blocks run beside them on the workspace's
side stream, whose priority lets their few CTAs take the first multiprocessors that become free; the last block, behind
which nothing is left to hide, is done on the caller's stream by the whole GPU. Streams are forked and joined by events,
so that all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..comm.tuning import ONE, Choice
from ..comm.workspace import AllReduceWorkspace
from .all_reduce import launch_all_reduce, launch_part
from .all_reduce_add_rms_norm import launch_reduce_norm_into


def split(rows: int, block: int) -> list[tuple[int, int]]:
    """[(first, end)] of blocks of `block` rows; the last is half as long, because it is not hidden."""
    last = min(rows, max(block // 2, 1))
    ends = [*range(block, rows - last + 1, block)]
    if not ends or ends[-1] != rows - last:
        ends.append(rows - last)
    starts = [0, *ends]
    return [(a, b) for a, b in zip(starts, [*ends, rows], strict=True) if b > a]


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


def _limited(choice: Choice, ctas: int) -> Choice:
    """`choice` by a kernel, with at most `ctas` CTAs (0: as many as it likes)."""
    if choice.algorithm == "library":
        choice = ONE
    return choice._replace(ctas=ctas) if ctas else choice


def _each_block(
    blocks: list[tuple[int, int]], workspace: AllReduceWorkspace, matmul: Callable, communicate: Callable, ctas: int
) -> None:
    """matmul(first, end) on the caller's stream, then communicate(first, end, ctas) beside the next one's."""
    side = _Side(workspace)
    for first, end in blocks[:-1]:
        matmul(first, end)
        side.run(lambda first=first, end=end: communicate(first, end, ctas))
    matmul(*blocks[-1])
    side.join()
    communicate(*blocks[-1], 0)


def matmul_all_reduce(
    x: torch.Tensor, weight: torch.Tensor, workspace: AllReduceWorkspace, choice: Choice
) -> torch.Tensor:
    """x [M, K] @ weight.T summed over the ranks, [M, N]."""
    out, transposed = x.new_empty(x.shape[0], weight.shape[0]), weight.t()

    def communicate(first: int, end: int, ctas: int) -> None:
        part = out[first:end]
        launch_all_reduce(part, part, workspace, _limited(workspace.choice("all_reduce", part.nbytes), ctas))

    _each_block(
        split(len(x), choice.rows),
        workspace,
        lambda first, end: torch.mm(x[first:end], transposed, out=out[first:end]),
        communicate,
        choice.ctas,
    )
    return out


def matmul_all_reduce_add_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    workspace: AllReduceWorkspace,
    choice: Choice,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, the residual [M, N] added and the sum normalised: (normed, new_residual)."""
    partial, transposed = x.new_empty(x.shape[0], weight.shape[0]), weight.t()
    normed, new_residual = torch.empty_like(partial), torch.empty_like(partial)

    def communicate(first: int, end: int, ctas: int) -> None:
        part = slice(first, end)
        launch_reduce_norm_into(
            partial[part],
            residual[part],
            norm_weight,
            normed[part],
            new_residual[part],
            eps,
            workspace,
            _limited(workspace.choice("all_reduce_add_rms_norm", partial[part].nbytes), ctas),
        )

    _each_block(
        split(len(x), choice.rows),
        workspace,
        lambda first, end: torch.mm(x[first:end], transposed, out=partial[first:end]),
        communicate,
        choice.ctas,
    )
    return normed, new_residual


def matmul_reduce_scatter(
    x: torch.Tensor, weight: torch.Tensor, workspace: AllReduceWorkspace, choice: Choice
) -> torch.Tensor:
    """x [M, K] @ weight.T summed over the ranks; this rank's [M / W, N]. A block holds the same rows of every owner."""
    world, (n, _) = workspace.pg.size(), weight.shape
    rows = len(x) // world
    out, transposed = x.new_empty(rows, n), weight.t()
    of_owner = x.view(world, rows, -1)
    partial = x.new_empty(world * rows, n)  # block after block, in each the owners' parts

    def matmul(first: int, end: int) -> None:
        for owner in range(world):
            at = world * first + owner * (end - first)
            torch.mm(of_owner[owner, first:end], transposed, out=partial[at : at + end - first])

    def communicate(first: int, end: int, ctas: int) -> None:
        launch_part("reduce_scatter", partial[world * first : world * end], out[first:end], workspace, ctas)

    _each_block(split(rows, max(1, choice.rows // world)), workspace, matmul, communicate, choice.ctas)
    return out


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
