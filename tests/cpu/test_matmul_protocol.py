"""The exchange of the persistent matmul (csrc/matmul_all_reduce.cuh) on the host: ranks that go through calls of any
shapes, in random interleavings, must never sum or copy a tile of another call, and never wait for ever.

What is a tile here is a panel of one in the kernel: each has a flag of its own.

What is taken for granted: a tile arrives before its flag (the copy is complete before the release); tiles and flags of
different messages arrive in any order; all that a call sends has arrived when the call ends, and the next call of that
rank begins after it (stream order). The order of tiles within a call is left open: the kernel's is one of them.
"""

import random
from dataclasses import dataclass
from typing import NamedTuple

import pytest


class Violation(Exception):
    """Something the protocol promises did not hold."""


class Kind(NamedTuple):
    """A call: how many tiles each rank owns, and whether it is a reduce-scatter."""

    owned: tuple
    scatter: bool


@dataclass(frozen=True)
class Rules:
    """The protocol, and ways to get it wrong."""

    data_halves: int = 2
    flag_halves: int = 2
    flag_after_data: bool = True
    all_partials: bool = True  # False: the last source's partial is not awaited
    exact: bool = True  # False: a later call's number ends a wait, too


class Run:
    def __init__(self, kinds, world, rules, seed):
        self.kinds, self.world, self.rules, self.draw = kinds, world, rules, random.Random(seed)
        self.data = [{} for _ in range(world)]  # rank -> (half, slot) -> (call, sender, owner, tile, is a sum)
        self.flags = [{} for _ in range(world)]  # rank -> (half, slot) -> call
        self.call = [0] * world
        self.todo = [set() for _ in range(world)]
        for rank in range(world):
            self.begin(rank)

    def slot(self, on, peer, tile, is_sum, kind):
        return ((self.world - 1 if is_sum else 0) + peer - (peer > on)) * max(kind.owned) + tile

    def peers(self, rank):
        return [r for r in range(self.world) if r != rank]

    def begin(self, rank):
        """The rank's next call, if there is one: partials to send, own tiles to sum, sums of others to copy."""
        self.call[rank] += 1
        if self.call[rank] > len(self.kinds):
            return
        kind = self.kinds[self.call[rank] - 1]
        for owner in range(self.world):
            for tile in range(kind.owned[owner]):
                if owner == rank:
                    self.todo[rank].add(("sum", rank, tile))
                else:
                    self.todo[rank].add(("send", owner, owner, tile, False))
                    if not kind.scatter:
                        self.todo[rank].add(("copy", owner, tile))

    def at(self, rank, on, peer, tile, is_sum, halves):
        call = self.call[rank]
        return call % halves, self.slot(on, peer, tile, is_sum, self.kinds[call - 1])

    def arrived(self, rank, peer, tile, is_sum):
        flag = self.flags[rank].get(self.at(rank, rank, peer, tile, is_sum, self.rules.flag_halves), 0)
        return flag == self.call[rank] if self.rules.exact else flag >= self.call[rank]

    def enabled(self, rank, action):
        if action[0] == "copy":
            return self.arrived(rank, action[1], action[2], True)
        if action[0] == "sum":
            sources = self.peers(rank)
            if not self.rules.all_partials:
                sources = sources[:-1]
            return all(self.arrived(rank, source, action[2], False) for source in sources)
        return True

    def take(self, rank, action):
        call, kind = self.call[rank], self.kinds[self.call[rank] - 1]
        self.todo[rank].remove(action)
        if action[0] in ("send", "data", "flag"):
            # A message is two arrivals at the peer, of the tile and of its flag.
            _, to, owner, tile, is_sum = action
            if action[0] == "send":
                self.todo[rank] |= {("data", *action[1:])}
                if not self.rules.flag_after_data:
                    self.todo[rank] |= {("flag", *action[1:])}
            elif action[0] == "data":
                place = self.at(rank, to, rank, tile, is_sum, self.rules.data_halves)
                self.data[to][place] = (call, rank, owner, tile, is_sum)
                if self.rules.flag_after_data:
                    self.todo[rank] |= {("flag", *action[1:])}
            else:
                self.flags[to][self.at(rank, to, rank, tile, is_sum, self.rules.flag_halves)] = call
        elif action[0] == "sum":
            tile = action[2]
            for source in self.peers(rank):
                self.expect(rank, source, tile, False, (call, source, rank, tile, False))
            if not kind.scatter:
                self.todo[rank] |= {("send", peer, rank, tile, True) for peer in self.peers(rank)}
        else:
            _, owner, tile = action
            self.expect(rank, owner, tile, True, (call, owner, owner, tile, True))
        if not self.todo[rank]:
            self.begin(rank)

    def expect(self, rank, peer, tile, is_sum, value):
        found = self.data[rank].get(self.at(rank, rank, peer, tile, is_sum, self.rules.data_halves))
        if found != value:
            raise Violation(f"rank {rank} took {found} for {value}")

    def go(self):
        # Ranks are given weights that change now and then, so that some run far ahead of others.
        while any(self.todo):
            weights = [self.draw.choice((0.01, 0.1, 1.0)) for _ in range(self.world)]
            for _ in range(self.draw.randrange(1, 60)):
                ready = [[a for a in sorted(todo, key=str) if self.enabled(r, a)] for r, todo in enumerate(self.todo)]
                if not any(ready):
                    if any(self.todo):
                        raise Violation(f"all wait: {self.call}")
                    return
                ranks = [r for r in range(self.world) if ready[r]]
                rank = self.draw.choices(ranks, [weights[r] for r in ranks])[0]
                self.take(rank, self.draw.choice(ready[rank]))


def explore(world, rules, runs, seed):
    """The first violation in `runs` random runs, or None."""
    draw = random.Random(seed)
    for _ in range(runs):
        kinds = [
            Kind(tuple(draw.randint(1, 3) for _ in range(world)), draw.random() < 0.5)
            for _ in range(draw.randint(2, 5))
        ]
        try:
            Run(kinds, world, rules, draw.random()).go()
        except Violation as violation:
            return str(violation)
    return None


@pytest.mark.parametrize("world", [2, 3, 4])
def test_no_tile_of_another_call_is_taken_and_nobody_waits_for_ever(world, seed):
    assert explore(world, Rules(), {2: 700, 3: 300, 4: 100}[world], seed) is None


@pytest.mark.parametrize(
    "rules",
    [
        Rules(data_halves=1),
        # Right for two ranks, not for three: another peer's flag of the next call, elsewhere by its shape.
        Rules(flag_halves=1, exact=False),
        Rules(flag_after_data=False),
        Rules(all_partials=False),
        Rules(flag_halves=1),
    ],
    ids=str,
)
def test_wrong_protocols_are_found(rules, seed):
    assert explore(3, rules, 1500, seed) is not None


def test_one_flag_for_both_halves_is_right_for_two_ranks(seed):
    """Each flag has one sender then, whose calls follow each other."""
    assert explore(2, Rules(flag_halves=1, exact=False), 700, seed) is None
