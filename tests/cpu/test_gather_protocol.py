"""The gather of all_gather_matmul (csrc/matmul_all_reduce.cu, .cuh) on the host: ranks that go through calls of any
shapes, cut by rows or along K, in random interleavings, must never multiply anything but this call's x, and never wait
for ever.

What is taken for granted: a rank's copies are carried out in their order, each complete before the next begins; what
one copy writes arrives in any order; a call ends when its tiles are done and its copies have been made. The order of
tiles is left open: the kernel's is one of them.
"""

import random
from dataclasses import dataclass
from typing import NamedTuple

import pytest

CHUNKS = 4  # at most


class Violation(Exception):
    """Something the protocol promises did not hold."""


class Call(NamedTuple):
    """Rows of tiles of each rank, steps along K, and those of a chunk: one of them is all that there is."""

    rows: int
    depths: int
    chunk_rows: int
    chunk_depths: int


@dataclass(frozen=True)
class Rules:
    """The protocol, and ways to get it wrong."""

    flag_after_data: bool = True
    every_chunk: bool = True  # False: a tile waits for its first chunk only
    awaits_entry: bool = True
    takes_flags_back: bool = True
    same_cut: bool = True  # False: rank 0 cuts the other way


def call_of(draw) -> Call:
    rows, depths = draw.randint(1, 5), draw.randint(1, 6)
    if draw.random() < 0.5:
        return Call(rows, depths, -(-rows // draw.randint(1, CHUNKS)), depths)
    return Call(rows, depths, rows, -(-depths // draw.randint(1, CHUNKS)))


class Run:
    """Tasks are generators; what they yield is a condition to wait for, or None: anybody's turn."""

    def __init__(self, calls, world, rules, seed):
        self.calls, self.world, self.rules, self.draw = calls, world, rules, random.Random(seed)
        self.memory = [{} for _ in range(world)]  # rank -> place in its buffer -> (call, source, row, depth)
        self.come = [[[0] * CHUNKS for _ in range(world)] for _ in range(world)]
        self.entered = [[0] * world for _ in range(world)]
        self.tasks = [[self.stream(rank)] for rank in range(world)]
        self.waits = {}

    def peers(self, rank):
        return [r for r in range(self.world) if r != rank]

    def cut(self, rank, call) -> Call:
        c = self.calls[call - 1]
        if self.rules.same_cut or rank != 0:
            return c
        return c._replace(chunk_rows=max(2, c.chunk_depths), chunk_depths=c.depths)

    def place(self, on, source, row, depth, c):
        return ((source - (source > on)) * c.rows + row) * c.depths + depth

    def stream(self, rank):
        for call in range(1, len(self.calls) + 1):
            if self.rules.takes_flags_back:
                for source in range(self.world):
                    self.come[rank][source] = [0] * CHUNKS
                    yield None
            for peer in self.peers(rank):
                self.entered[peer][rank] = call
                yield None
            if self.rules.awaits_entry:
                for peer in self.peers(rank):
                    yield lambda peer=peer, call=call: self.entered[rank][peer] >= call
            c = self.calls[call - 1]
            tiles = [self.tile(rank, call, source, row) for source in self.peers(rank) for row in range(c.rows)]
            begun = [self.copies(rank, call), *tiles]
            self.tasks[rank] += begun
            yield lambda begun=begun: not any(task in self.tasks[rank] for task in begun)

    def copies(self, rank, call):
        c, chunk = self.cut(rank, call), 0
        for first in range(0, c.rows, c.chunk_rows):
            for step in range(0, c.depths, c.chunk_depths):
                for peer in self.peers(rank):
                    if not self.rules.flag_after_data:
                        self.come[peer][rank][chunk] = 1
                    rows = range(first, min(first + c.chunk_rows, c.rows))
                    parts = [(r, d) for r in rows for d in range(step, min(step + c.chunk_depths, c.depths))]
                    self.draw.shuffle(parts)
                    for row, depth in parts:
                        self.memory[peer][self.place(peer, rank, row, depth, c)] = (call, rank, row, depth)
                        yield None
                    self.come[peer][rank][chunk] = 1
                    yield None
                chunk += 1

    def tile(self, rank, call, source, row):
        c = self.cut(rank, call)
        chunk, next_chunk = row // c.chunk_rows, 0
        for depth in range(c.depths):
            if depth == next_chunk:
                yield lambda chunk=chunk: self.come[rank][source][chunk] != 0
                chunk += 1
                next_chunk += c.chunk_depths if self.rules.every_chunk else c.depths
            found = self.memory[rank].get(self.place(rank, source, row, depth, c))
            if found != (call, source, row, depth):
                raise Violation(f"rank {rank} multiplied {found} for {(call, source, row, depth)}")
            yield None

    def ready(self, task) -> bool:
        condition = self.waits.get(task)
        return condition is None or condition()

    def go(self):
        # Ranks are given weights that change now and then, so that some run far ahead of others.
        while any(self.tasks):
            weights = [self.draw.choice((0.01, 0.1, 1.0)) for _ in range(self.world)]
            for _ in range(self.draw.randrange(1, 60)):
                ready = [[task for task in tasks if self.ready(task)] for tasks in self.tasks]
                ranks = [r for r in range(self.world) if ready[r]]
                if not ranks:
                    if any(self.tasks):
                        raise Violation("all wait")
                    return
                rank = self.draw.choices(ranks, [weights[r] for r in ranks])[0]
                task = self.draw.choice(ready[rank])
                try:
                    self.waits[task] = next(task)
                except StopIteration:
                    self.tasks[rank].remove(task)


def explore(world, rules, runs, seed):
    """The first violation in `runs` random runs, or None."""
    draw = random.Random(seed)
    for _ in range(runs):
        calls = [call_of(draw) for _ in range(draw.randint(2, 4))]
        try:
            Run(calls, world, rules, draw.random()).go()
        except Violation as violation:
            return str(violation)
    return None


@pytest.mark.parametrize("world", [2, 3])
def test_nothing_but_this_calls_rows_is_multiplied_and_nobody_waits_for_ever(world, seed):
    assert explore(world, Rules(), {2: 1000, 3: 400}[world], seed) is None


@pytest.mark.parametrize(
    "rules",
    [
        Rules(flag_after_data=False),
        Rules(every_chunk=False),
        Rules(awaits_entry=False),
        Rules(takes_flags_back=False),
        Rules(same_cut=False),
    ],
    ids=str,
)
def test_wrong_protocols_are_found(rules, seed):
    assert explore(2, rules, 300, seed) is not None
