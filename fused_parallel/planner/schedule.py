"""An event-by-event simulation of micro-batches passing through pipeline stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """first: when the first micro-batch left the last stage; last: when all were through; period: time between two
    rounds of the same micro-batch once the pipeline is full; idle: share of the stages' time spent waiting in it.
    events: where recorded, (stage, micro-batch, round, start, end), in order of time within a stage."""

    first: float
    last: float
    period: float
    idle: float
    events: tuple[tuple[int, int, int, float, float], ...]


def simulate(
    stage_us: Sequence[float | Sequence[float]],
    hop_us: Sequence[float],
    microbatches: int,
    *,
    rounds: int = 1,
    depends: bool = False,
    queued_us: Sequence[float | Sequence[float]] | None = None,
    record: bool = False,
) -> Schedule:
    """Run `rounds` rounds of `microbatches` micro-batches through the stages.

    Stage s takes stage_us[s] for each, or stage_us[s][i] for micro-batch i; hop_us[s] passes between the end on stage s
    and the earliest start on s + 1 (a transfer occupies no stage). With `depends`, a micro-batch's next round starts on
    stage 0 after its last one left the last stage, as in decoding, where a token must be known before the next;
    without, as chunks of prompts do.
    queued_us: what the host of stage s needs to queue a micro-batch's kernels, given likewise, where they are not in a
    CUDA graph: it starts at once, waits for nothing, and no micro-batch ends before all of it is queued.
    """
    if len(hop_us) != len(stage_us) - 1:
        raise ValueError(f"{len(stage_us)} stages need {len(stage_us) - 1} hops, got {len(hop_us)}")
    if microbatches < 1 or rounds < 1:
        raise ValueError(f"microbatches and rounds must be at least 1, got {microbatches} and {rounds}")
    stages = len(stage_us)
    takes = [_of_each(us, microbatches) for us in stage_us]
    queueing = [_of_each(us, microbatches) for us in queued_us or [0.0] * stages]
    free, queued = [0.0] * stages, [0.0] * stages
    ready = [0.0] * microbatches
    done: list[list[float]] = []
    events = []
    for turn in range(rounds):
        for micro in range(microbatches):
            at = ready[micro] if depends else 0.0
            for s in range(stages):
                start = max(at, free[s])
                queued[s] += queueing[s][micro]
                free[s] = end = max(start + takes[s][micro], queued[s])
                if record:
                    events.append((s, micro, turn, start, end))
                at = end + hop_us[s] if s < stages - 1 else end
            ready[micro] = at
        done.append(list(ready))
    period = done[-1][0] - done[-2][0] if rounds > 1 else done[-1][-1]
    idle = 1 - sum(map(sum, takes)) / (stages * period) if period > 0 else 0.0
    return Schedule(done[0][0], done[-1][-1], period, max(0.0, idle), tuple(events))


def _of_each(us: float | Sequence[float], microbatches: int) -> Sequence[float]:
    return us if isinstance(us, Sequence) else [us] * microbatches
