"""What the planner answers: ranked plans with their predicted figures, and the wall."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from .._table import print_table

PLAN_VERSION = 3


@dataclass(frozen=True)
class Candidate:
    """One plan and its prediction.

    tp, pp, dp: tensor-parallel ranks, pipeline stages, replicas; stages: layers of each stage; batch: requests in
    flight over all replicas; microbatches a replica's are cut into; prefill_chunk: tokens of a prompt that pass at
    once (None: whole); resident: share of the layers on the GPU; drafted: tokens a round of speculation (0: none);
    backend: whose costs these are, this library's ("ours") or plain torch's and NCCL's ("nccl").
    ttft_ms, tpot_ms: time to the first token of a prompt alone, and a token of each request after it. tokens_per_s:
    output tokens over all replicas, their prefills included. stage_ms, hop_ms: what a micro-batch takes on each stage
    in decoding, and from each to the next. stage_gb: memory of a rank of each stage; memory_gb: of the fullest, by what
    it holds. shares: of a decoding step's time on all stages; they add up to 1.
    """

    tp: int
    pp: int
    dp: int
    stages: tuple[int, ...]
    dtype: str
    batch: int
    microbatches: int
    prefill_chunk: int | None
    resident: float
    drafted: int
    gpus: int
    backend: str
    ttft_ms: float
    tpot_ms: float
    tokens_per_s: float
    gpu_s_per_token: float
    stage_ms: tuple[float, ...]
    hop_ms: tuple[float, ...]
    stage_gb: tuple[float, ...]
    memory_gb: dict[str, float]
    shares: dict[str, float]
    explanation: tuple[str, ...] = ()

    @property
    def limit(self) -> str:
        """What a decoding step spends most of its time on."""
        return max(self.shares, key=lambda name: self.shares[name])

    @property
    def label(self) -> str:
        """In short: TP4 PP2 x2 bf16, ..."""
        text = f"TP{self.tp} PP{self.pp} x{self.dp} {self.dtype} b{self.batch}"
        if self.resident < 1:
            text += f" {self.resident:.0%} resident"
        return text + (f" k={self.drafted}" if self.drafted else "")


@dataclass(frozen=True)
class WallRow:
    """One tensor-parallel degree at one batch: a group of `tp` GPUs that serves all of it, and, for comparing equal
    numbers of GPUs, the tokens a second and GPU of as many such groups as replace the largest, each with its part of
    the batch. fits, share_fits: whether a group holds the model and the KV of the whole batch, of its part."""

    batch: int
    tp: int
    tpot_ms: float
    compute_ms: float
    communication_ms: float
    host_ms: float
    tokens_per_s_per_gpu: float
    fits: bool
    share_fits: bool


@dataclass(frozen=True)
class Plan:
    """The answer of fp.plan. shape: the model's, field by field of ModelShape; entries: the best plans, best first;
    frontier: of all plans those that no other beats in both TPOT and throughput; by_tp: the best plan of each
    tensor-parallel degree; wall and wall_text: where another GPU stops paying."""

    model: str
    shape: dict[str, object]
    cluster: str
    rank: str
    request: dict[str, object]
    searched: int
    entries: tuple[Candidate, ...]
    frontier: tuple[Candidate, ...]
    by_tp: tuple[Candidate, ...]
    wall: tuple[WallRow, ...]
    wall_text: tuple[str, ...]

    @property
    def best(self) -> Candidate:
        """The first entry."""
        return self.entries[0]

    def to_json(self) -> str:
        """All of it as JSON, which from_json reads."""
        return json.dumps({"plan_version": PLAN_VERSION, **dataclasses.asdict(self)}, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that to_json wrote. Raises ValueError for anything else."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ValueError(f"a plan must be JSON: {error}") from error
        version = data.pop("plan_version", None) if isinstance(data, dict) else None
        if version != PLAN_VERSION:
            raise ValueError(f"plan_version is {version!r}, this library reads {PLAN_VERSION}; plan again")
        try:
            lists = ("stages", "stage_ms", "hop_ms", "stage_gb", "explanation")
            for name in ("entries", "frontier", "by_tp"):
                data[name] = tuple(Candidate(**{**c, **{k: tuple(c[k]) for k in lists}}) for c in data[name])
            data["wall"] = tuple(WallRow(**row) for row in data["wall"])
            if not data["entries"]:
                raise TypeError("entries is empty")
            data["wall_text"] = tuple(data["wall_text"])
            return cls(**data)
        except (KeyError, TypeError) as error:
            raise ValueError(f"the plan is incomplete or has unknown entries: {error}") from error

    def table(self, rows: int = 10) -> None:
        """Print the best plans, why the first is as fast as it is, and the wall."""
        columns = ["#", "TP", "PP", "DP", "dtype", "batch", "resident", "k", "kernels", "TTFT ms", "TPOT ms", "tok/s"]
        columns += ["GPU-s/tok", "comm %", "bubble %", "GB/GPU", "limit"]
        print_table(
            f"{self.model} on {self.cluster}, by {self.rank}: {self.searched} plan(s) fit",
            columns,
            [_row(i, c) for i, c in enumerate(self.entries[:rows], 1)],
        )
        for text in (*self.best.explanation, *self.wall_text):
            print(f"- {text}")

    def plot(self, path: str | Path) -> None:
        """Draw throughput against TPOT with the frontier labelled, the step of each TP degree's best plan, the wall,
        and the timeline of a pipeline. Needs matplotlib."""
        from .plot import draw

        draw(self, path)


def _row(number: int, c: Candidate) -> list[object]:
    return [
        number,
        c.tp,
        c.pp,
        c.dp,
        c.dtype,
        c.batch,
        f"{c.resident:.0%}",
        c.drafted,
        c.backend,
        f"{c.ttft_ms:.1f}",
        f"{c.tpot_ms:.2f}",
        f"{c.tokens_per_s:.1f}",
        f"{c.gpu_s_per_token:.3g}",
        f"{100 * c.shares['communication']:.0f}",
        f"{100 * c.shares['bubble']:.0f}",
        f"{c.memory_gb['total']:.1f}",
        c.limit,
    ]
