"""What the tests of matmuls with communication share on the ranks: the kernels' choice, memory that is poisoned, and
layers of integers, whose sums are exact."""

from __future__ import annotations

import contextlib
import importlib

import torch

import fused_parallel as fp
from fused_parallel.comm import resolve_group
from fused_parallel.comm.capabilities import agree
from fused_parallel.comm.tuning import Choice, default_table
from fused_parallel.comm.workspace import workspace_of

OPS = ("matmul_all_reduce", "matmul_all_reduce_add_rms_norm", "matmul_reduce_scatter")
EPS = 1e-5
# Not the functions of these names that the package has.
matmul, scatter = (
    importlib.import_module(f"fused_parallel.ops.{name}") for name in ("matmul_all_reduce", "matmul_reduce_scatter")
)


def use_table(group, table: dict) -> None:
    """Let the group choose by `table` (the defaults for what it leaves out), and make its workspace."""
    pg = resolve_group(group)
    fp.all_reduce(torch.ones(8, device="cuda"), group=group)
    agree(pg).tuning.update(default_table(pg.size()) | table)
    workspace_of(pg).forget_choices()


def use_kernels(group, few: int = 400 << 10) -> None:
    """Let all sizes that they take go to the kernels: results of up to `few` bytes to that for few rows."""
    of_ops = {op: [(few, Choice("decode")), (None, Choice("persistent"))] for op in OPS}
    use_table(group, of_ops | {"all_gather_matmul": [(None, Choice("persistent"))]})


@contextlib.contextmanager
def poisoned():
    """Memory that torch leaves uninitialised, that of outputs above all, holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # with which it is filled by default
    try:
        assert torch.empty(1000, device="cuda").isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Layer:
    """A layer of integers. All that ranks hold is made on every rank: `xs`, `weights` [m, k], [n, k] are the ranks' own
    parts. |x| <= 2 and |weight| <= 1, so with k up to 128 of all ranks together sums are up to 256, and exact in bf16.

    fill(step) changes what a layer is given, in place."""

    def __init__(self, group, m: int, n: int, k: int = 0):
        self.group, self.pg = group, resolve_group(group)
        self.rank, world = self.pg.rank(), self.pg.size()
        k = k or 128 // world
        assert k * world <= 128
        self.m, self.n, self.k = m, n, k
        generator = torch.Generator("cuda").manual_seed(m + n)

        def drawn(most, *shape):
            return torch.randint(-most, most + 1, shape, device="cuda", generator=generator).bfloat16()

        self.weights, self.bias = [drawn(1, n, k) for _ in range(world)], drawn(8, n)
        self.norm = torch.randn(n, device="cuda", generator=generator).bfloat16()
        self.xs, self.residual = [drawn(2, m, k) for _ in range(world)], drawn(8, m, n)
        self.rows = [drawn(2, m // world, k) for _ in range(world)] if m % world == 0 else []
        self.x, self.weight = self.xs[self.rank], self.weights[self.rank]

    def fill(self, step: int) -> None:
        generator = torch.Generator("cuda").manual_seed(step)
        for tensors, most in ((self.xs, 2), (self.rows, 2), ([self.residual], 8)):
            for t in tensors:
                t.copy_(torch.randint(-most, most + 1, t.shape, device="cuda", generator=generator))

    def few(self) -> list[torch.Tensor]:
        """Both all-reduce forms."""
        g = {"group": self.group}
        out = [
            fp.matmul_all_reduce(self.x, self.weight, **g),
            fp.matmul_all_reduce(self.x, self.weight, self.bias, **g),
        ]
        return [*out, *fp.matmul_all_reduce_add_rms_norm(self.x, self.weight, self.residual, self.norm, EPS, **g)]

    def scattered(self) -> torch.Tensor:
        return fp.matmul_reduce_scatter(self.x, self.weight, group=self.group)

    def gathered(self) -> torch.Tensor:
        return fp.all_gather_matmul(self.rows[self.rank], self.weight, group=self.group)

    def run(self) -> list[torch.Tensor]:
        """All four operations, or those that take an odd number of rows."""
        return self.few() + ([self.scattered(), self.gathered()] if self.rows else [])

    def algorithms_of_few(self) -> set[str]:
        return {matmul.algorithm(op, self.x, self.weight, self.pg) for op in OPS[:2]}

    def algorithms(self) -> set[str]:
        """How those of `run` are done; "whole" is none of the kernels."""
        found = self.algorithms_of_few()
        if self.rows:
            found.add(matmul.algorithm(OPS[2], self.x, self.weight, self.pg))
            beside = scatter._gathers_beside(self.rows[self.rank], self.weight, self.pg)
            found.add("persistent" if beside else "whole")
        return found

    def wrong(self, got: list[torch.Tensor]) -> torch.Tensor:
        """A bool on the GPU: whether results of `few` or `run` differ from what they must be."""
        total = sum(x.float() @ w.float().t() for x, w in zip(self.xs, self.weights, strict=True))
        new = total + self.residual.float()
        normed = new * (new.square().mean(-1, keepdim=True) + EPS).rsqrt() * self.norm.float()
        exact = [total, total + self.bias.float(), new]
        if len(got) > 4:
            exact.append(total.chunk(len(self.xs))[self.rank])
            exact.append(torch.cat(self.rows).float() @ self.weight.float().t())
        near = (got[2].float() - normed).abs() <= 0.02 * normed.abs() + 1e-3  # false for NaN
        bad = ~near.all()
        for out, expected in zip([*got[:2], *got[3:]], exact, strict=True):
            bad |= (out != expected.bfloat16()).any()
        return bad
