"""Cutting a stack of layers into pipeline stages."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence


def split_layers(
    layers: int | Sequence[float],
    num_stages: int,
    *,
    head: float = 0.0,
    embedding: float = 0.0,
    split: Sequence[int] | None = None,
) -> list[range]:
    """Contiguous ranges of layers, one a stage.

    Args:
        layers: how many, or what each costs: measured time, or the bytes of its weights, which is what a decoded token
            waits for. A layer's memory is taken to be in proportion.
        num_stages: stages; each gets a layer at least.
        head: what the last stage computes besides (norm and head), in the same unit as `layers`.
        embedding: what the first stage holds besides, without reading it.
        split: layers of each stage, where they are known; nothing is balanced then.

    The slowest stage is as fast as can be; among such cuts the fullest stage is as empty as can be; among those, stages
    are as even as can be, and what does not divide goes to the first ones. Raises ValueError with fewer layers than
    stages, and for a split that does not add up.
    """
    costs = [1.0] * layers if isinstance(layers, int) else [float(cost) for cost in layers]
    count = len(costs)
    if split is not None:
        sizes = list(split)
        if len(sizes) != num_stages or sum(sizes) != count or any(not isinstance(n, int) or n < 1 for n in sizes):
            raise ValueError(
                f"split={sizes!r} does not fit: it needs a number of layers, at least 1, for each of {num_stages} "
                f"stage(s), {count} in all"
            )
        bounds = [0, *itertools.accumulate(sizes)]
        return [range(a, b) for a, b in itertools.pairwise(bounds)]
    if count < num_stages:
        raise ValueError(f"pp={num_stages} does not fit a model of {count} layers: every stage needs one at least")
    sums = [0.0, *itertools.accumulate(costs)]

    def time(stage: int, a: int, b: int) -> float:
        return sums[b] - sums[a] + (head if stage == num_stages - 1 else 0.0)

    def memory(stage: int, a: int, b: int) -> float:
        return time(stage, a, b) + (embedding if stage == 0 else 0.0)

    def best(cost: Callable, combine: Callable, *limits: tuple[Callable, float]) -> tuple[float, list[int]]:
        """The least `combine` of the stages' `cost`, and the bounds; stages above a limit are not allowed."""
        found = [(0.0, [0])] + [(math.inf, [])] * count
        for stage in range(num_stages):
            after = [(math.inf, [])] * (count + 1)
            for b in range(stage + 1, count - (num_stages - 1 - stage) + 1):
                # From the back: of equal cuts the one with more layers in front stays.
                for a in range(b - 1, stage - 1, -1):
                    if any(of(stage, a, b) > limit * (1 + 1e-9) for of, limit in limits):
                        continue
                    value = combine(found[a][0], cost(stage, a, b))
                    if value < after[b][0] * (1 - 1e-12):
                        after[b] = value, [*found[a][1], b]
            found = after
        return found[count]

    slowest, _ = best(time, max)
    fullest, _ = best(memory, max, (time, slowest))
    _, bounds = best(time, lambda total, cost: total + cost * cost, (time, slowest), (memory, fullest))
    return [range(a, b) for a, b in itertools.pairwise(bounds)]
