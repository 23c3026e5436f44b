"""The stages of the persistent linear kernel (csrc/linear.cuh) on the host, in every order that its threads and copies
can run in: each block of the weight is read from the stage it was brought to, nothing is overwritten while it is read,
and nobody waits for ever.

A CTA is one thread that brings blocks, copies that arrive in any order, and warps that multiply. A block is read from
the moment that its product is started until it is waited for, one block later or at the tile's end. What is taken for
granted: an mbarrier completes a phase with the last of its arrivals and lets a wait for a parity pass if the phase
under way has the other one.
"""

from dataclasses import dataclass

import pytest


class Violation(Exception):
    """Something the protocol promises did not hold."""


@dataclass(frozen=True)
class Rules:
    """The protocol, and ways to get it wrong."""

    release_last: bool = True  # False: a tile's last block is not released
    stages_run_on: bool = True  # False: warps begin every tile at stage 0, parity 0
    release_after_wait: bool = True  # False: a block is released as soon as its product is started
    wait_for_empty: bool = True
    of_round_before: bool = True  # False: the wait for an empty stage has the parity of the fill's own round


@dataclass(frozen=True)
class Shape:
    tiles: int
    depths: int
    stages: int
    warps: int


def place(shape, rules, fill):
    """Stage and parity of a fill, as the warps count them."""
    if not rules.stages_run_on:
        fill %= shape.depths
    return fill % shape.stages, fill // shape.stages % 2


def warp_steps(shape, rules):
    """What a warp does, in order; each step is taken at once, when it may be."""
    steps = []
    for tile in range(shape.tiles):
        for depth in range(shape.depths):
            fill = tile * shape.depths + depth
            steps.append(("start", fill))
            if not rules.release_after_wait:
                steps += [("release", fill), ("wait", fill)]
            elif depth > 0:
                steps += [("wait", fill - 1), ("release", fill - 1)]
        if rules.release_after_wait:
            steps.append(("wait", fill))
            if rules.release_last:
                steps.append(("release", fill))
    return steps


def explore(shape, rules):
    """Goes through all states; returns their number, or raises Violation."""
    fills, warps = shape.tiles * shape.depths, range(shape.warps)
    steps = warp_steps(shape, rules)

    # (brought, under way, at, full, empty, holds, started)
    # full: (phase, arrived) a stage; empty: (phase, arrivals); holds: the fill in a stage; started: the fills that a
    # warp reads.
    def passes(phase, parity):
        return phase % 2 != parity

    def changed(values, index, value):
        return (*values[:index], value, *values[index + 1 :])

    def following(state):
        brought, under_way, at, full, empty, holds, started = state
        if brought < fills:
            stage, round_ = brought % shape.stages, brought // shape.stages
            parity = (round_ - rules.of_round_before) % 2
            if round_ == 0 or not rules.wait_for_empty or passes(empty[stage][0], parity):
                if any(fill % shape.stages == stage for reads in (*started, under_way) for fill in reads):
                    raise Violation(f"fill {brought} overwrites a stage in use")
                if holds[stage] is not None and not all(
                    steps.index(("start", holds[stage])) < position for position in at
                ):
                    raise Violation(f"fill {brought} overwrites {holds[stage]} before all have read it")
                yield brought + 1, under_way | {brought}, at, full, empty, changed(holds, stage, None), started
        for fill in under_way:  # in any order
            stage = fill % shape.stages
            yield (
                brought,
                under_way - {fill},
                at,
                changed(full, stage, full[stage] + 1),
                empty,
                changed(holds, stage, fill),
                started,
            )
        for warp in warps:
            if at[warp] == len(steps):
                continue
            kind, what = steps[at[warp]]
            now_empty, now_started = empty, started
            if kind == "start":
                stage, parity = place(shape, rules, what)
                if not passes(full[stage], parity):
                    continue
                if holds[stage] != what:
                    raise Violation(f"warp {warp} reads {holds[stage]} for {what}")
                now_started = changed(started, warp, started[warp] | {what})
            elif kind == "wait":
                now_started = changed(started, warp, started[warp] - {what})
            elif kind == "release":
                stage, _ = place(shape, rules, what)
                phase, arrivals = empty[stage]
                arrivals += 1
                now_empty = changed(empty, stage, (phase + 1, 0) if arrivals == shape.warps else (phase, arrivals))
            yield (
                brought,
                under_way,
                changed(at, warp, at[warp] + 1),
                full,
                now_empty,
                holds,
                now_started,
            )

    nothing = (None,) * shape.stages
    begin = (
        0,
        frozenset(),
        (0,) * shape.warps,
        (0,) * shape.stages,
        ((0, 0),) * shape.stages,
        nothing,
        (frozenset(),) * shape.warps,
    )
    seen, todo = {begin}, [begin]
    while todo:
        state = todo.pop()
        reached = list(following(state))
        if not reached and (state[0] < fills or state[1] or any(position < len(steps) for position in state[2])):
            raise Violation(f"all wait: {state}")
        for one in reached:
            if one not in seen:
                seen.add(one)
                todo.append(one)
    return len(seen)


SHAPES = [
    Shape(tiles, depths, stages, warps)
    for tiles in (1, 2, 3)
    for depths in (1, 2, 3, 5)
    for stages in (2, 3, 4)
    for warps in (1, 2)
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.tiles}x{s.depths}-{s.stages}-{s.warps}")
def test_every_order_is_right(shape):
    assert explore(shape, Rules()) > shape.tiles * shape.depths


@pytest.mark.parametrize(
    "rules, shape",
    [
        (Rules(release_last=False), Shape(3, 2, 3, 2)),
        (Rules(stages_run_on=False), Shape(2, 3, 2, 1)),
        (Rules(release_after_wait=False), Shape(1, 5, 2, 1)),
        (Rules(wait_for_empty=False), Shape(1, 5, 2, 1)),
        (Rules(of_round_before=False), Shape(3, 1, 2, 1)),
    ],
    ids=str,
)
def test_wrong_protocols_are_found(rules, shape):
    with pytest.raises(Violation):
        explore(shape, rules)
