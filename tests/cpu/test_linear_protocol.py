"""The stages of the persistent linear kernel (csrc/linear.cuh) on the host, in every order that its threads and copies
can run in: each block of the weight is read from the stage it was brought to, nothing is overwritten while it is read,
and nobody waits for ever.

A CTA is one thread that brings blocks, copies that arrive in any order, and warps that multiply. A block is read from
the moment that its product is started until it is waited for, one block later or at the tile's end. In a cluster each
CTA brings its own block of the weight and a part of the tokens for all. What is taken for granted: an mbarrier
completes a phase with the last of its arrivals and bytes, and lets a wait for a parity pass if the phase under way has
the other one.
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
    release_to_all: bool = True  # False: of a cluster, a block is released to this CTA's bringing thread alone
    meet_at_end: bool = True  # False: a CTA ends without waiting for the others of its cluster
    meet_with_release: bool = True  # False: they meet while what they have released to each other is still under way


@dataclass(frozen=True)
class Shape:
    tiles: int
    depths: int
    stages: int
    warps: int
    ctas: int = 1  # of a cluster


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
    if rules.meet_at_end and shape.ctas > 1:
        steps += [("arrive", fill), ("met", fill)]
    return steps


def explore(shape, rules):
    """Goes through all states; returns their number, or raises Violation."""
    fills, ctas = shape.tiles * shape.depths, range(shape.ctas)
    warps = [(cta, warp) for cta in ctas for warp in range(shape.warps)]
    number = {warp: at for at, warp in enumerate(warps)}
    steps = warp_steps(shape, rules)
    # Of a fill: its weight, with the bringing thread's arrival, and in a cluster every CTA's share of the tokens.
    parts = {"weight", *(ctas if shape.ctas > 1 else ())}
    releases = shape.warps * (shape.ctas if rules.release_to_all else 1)

    # (brought, under way, told, at, full, empty, holds, started)
    # brought: fills, by CTA; under way: (fill, part, to); told: releases to another CTA, under way: (fill, warp, to);
    # full: (phase, parts there); empty: (phase, arrivals); holds: the fill that is there, by CTA and stage;
    # started: the fills that a warp reads.
    def passes(phase, parity):
        return phase % 2 != parity

    def changed(values, index, value):
        return (*values[:index], value, *values[index + 1 :])

    def slot(cta, stage):
        return cta * shape.stages + stage

    def arrived(empty, cta, fill):
        stage = slot(cta, place(shape, rules, fill)[0])
        phase, arrivals = empty[stage]
        return changed(empty, stage, (phase + 1, 0) if arrivals + 1 == releases else (phase, arrivals + 1))

    def following(state):
        brought, under_way, told, at, full, empty, holds, started = state
        for cta in ctas:
            fill = brought[cta]
            if fill == fills:
                continue
            stage, round_ = fill % shape.stages, fill // shape.stages
            parity = (round_ - rules.of_round_before) % 2
            if round_ > 0 and rules.wait_for_empty and not passes(empty[slot(cta, stage)][0], parity):
                continue
            copies = {(fill, "weight", cta)} | ({(fill, cta, to) for to in ctas} if shape.ctas > 1 else set())
            now_holds = holds
            for to in {to for *_, to in copies}:
                mine = [number[warp] for warp in warps if warp[0] == to]
                if any(other % shape.stages == stage for warp in mine for other in started[warp]):
                    raise Violation(f"fill {fill} overwrites a stage in use")
                held = holds[slot(to, stage)]
                if held is not None and held != fill and not all(steps.index(("start", held)) < at[w] for w in mine):
                    raise Violation(f"fill {fill} overwrites {held} before all have read it")
                if any(
                    other != fill and other % shape.stages == stage and there == to for other, _, there in under_way
                ):
                    raise Violation(f"fill {fill} overwrites a stage in use")
                now_holds = changed(now_holds, slot(to, stage), None)
            now = changed(brought, cta, fill + 1)
            yield now, under_way | copies, told, at, full, empty, now_holds, started
        for copy in under_way:  # in any order
            fill, part, to = copy
            stage = slot(to, fill % shape.stages)
            phase, there = full[stage]
            if phase != fill // shape.stages:
                raise Violation(f"{copy} is counted in round {phase}")
            there, now_holds = there | {part}, holds
            if there == parts:
                phase, there, now_holds = phase + 1, frozenset(), changed(holds, stage, fill)
            now_full = changed(full, stage, (phase, there))
            yield brought, under_way - {copy}, told, at, now_full, empty, now_holds, started
        for release in told:
            fill, warp, to = release
            if all(at[number[other]] == len(steps) for other in warps if other[0] == to):
                raise Violation(f"what warp {warp} releases of {fill} comes to a CTA that has ended")
            yield brought, under_way, told - {release}, at, full, arrived(empty, to, fill), holds, started
        for cta, name in warps:
            warp = number[cta, name]
            if at[warp] == len(steps):
                continue
            kind, what = steps[at[warp]]
            now_empty, now_started, now_told = empty, started, told
            if kind == "start":
                stage, parity = place(shape, rules, what)
                if not passes(full[slot(cta, stage)][0], parity):
                    continue
                if holds[slot(cta, stage)] != what:
                    raise Violation(f"warp {warp} reads {holds[slot(cta, stage)]} for {what}")
                now_started = changed(started, warp, started[warp] | {what})
            elif kind == "wait":
                now_started = changed(started, warp, started[warp] - {what})
            elif kind == "release":
                now_empty = arrived(empty, cta, what)
                if rules.release_to_all:
                    now_told = told | {(what, warp, to) for to in ctas if to != cta}
            elif kind == "arrive":
                if rules.meet_with_release and any(of == warp for _, of, _ in told):
                    continue
            elif kind == "met" and any(position <= steps.index(("arrive", what)) for position in at):
                continue
            now_at = changed(at, warp, at[warp] + 1)
            yield brought, under_way, now_told, now_at, full, now_empty, holds, now_started

    stages = shape.ctas * shape.stages
    begin = (
        (0,) * shape.ctas,
        frozenset(),
        frozenset(),
        (0,) * len(warps),
        ((0, frozenset()),) * stages,
        ((0, 0),) * stages,
        (None,) * stages,
        (frozenset(),) * len(warps),
    )
    seen, todo = {begin}, [begin]
    while todo:
        state = todo.pop()
        reached = list(following(state))
        ended = min(state[0]) == fills and not state[1] and all(position == len(steps) for position in state[3])
        if not reached and not ended:
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
] + [Shape(tiles, depths, 2, 1, ctas=2) for tiles, depths in ((1, 1), (1, 2), (1, 3), (1, 5), (2, 1), (3, 1))]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.tiles}x{s.depths}-{s.stages}-{s.warps}-{s.ctas}")
def test_every_order_is_right(shape):
    assert explore(shape, Rules()) > shape.tiles * shape.depths


@pytest.mark.parametrize("depths", range(1, 6))
def test_one_tile_needs_no_last_release(depths):
    """As in csrc/matmul_all_reduce_decode.cuh, whose CTAs have one tile each."""
    assert explore(Shape(1, depths, 2, 1, ctas=2), Rules(release_last=False)) > depths


@pytest.mark.parametrize(
    "rules, shape",
    [
        (Rules(release_last=False), Shape(3, 2, 3, 2)),
        (Rules(stages_run_on=False), Shape(2, 3, 2, 1)),
        (Rules(release_after_wait=False), Shape(1, 5, 2, 1)),
        (Rules(wait_for_empty=False), Shape(1, 5, 2, 1)),
        (Rules(of_round_before=False), Shape(3, 1, 2, 1)),
        (Rules(release_to_all=False), Shape(1, 3, 2, 1, ctas=2)),
        (Rules(of_round_before=False), Shape(1, 3, 2, 1, ctas=2)),
        (Rules(meet_at_end=False), Shape(1, 1, 2, 1, ctas=2)),
        (Rules(meet_with_release=False), Shape(1, 1, 2, 1, ctas=2)),
    ],
    ids=str,
)
def test_wrong_protocols_are_found(rules, shape):
    with pytest.raises(Violation):
        explore(shape, rules)
