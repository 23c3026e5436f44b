"""The host's part of decoding: it queues rounds, and reads what they gave one or more rounds later.

A host that reads each round before it queues the next leaves the device idle meanwhile: for as long as launching a
graph, waiting for it and bringing tokens back takes. A round needs nothing of the host, so the next one may be queued
already. What the host finds out late is that a sequence has ended: it is then fed for another round, whose tokens do
not count.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from .adaptive import AdaptiveLength
from .round import Round, Snapshot
from .tree import Tree

AHEAD = 2  # captured rounds that are queued and not read: one at work, one behind it


class Told(NamedTuple):
    """What a round gave: how many tokens were drafted, and in which tree; of each sequence its tokens; of each that
    lived how many tokens were drafted and how many of them accepted; and the seconds that captures took before it was
    read."""

    length: int
    tree: Tree | None
    rows: list[list[int]]
    pairs: list[tuple[int, int]]
    capturing: float


_NOTHING = (0, 0, 0, 0)


@dataclass
class _Queued:
    length: int
    tree: Tree | None
    told: Snapshot
    carried: tuple  # the outcome of the round whose time it brings to all ranks
    since: float
    usual: bool  # its time is that of a round of its kind

    @property
    def most(self) -> int:
        """Tokens that it may give a sequence."""
        return 1 + (self.length if self.tree is None else self.tree.depth)

    def outcome(self, lived: list[list[int]]) -> tuple:
        """What `AdaptiveLength.record` takes, but for the time; by what `Round.told` has of the sequences that
        lived."""
        drafted = sum(row[-3] for row in lived)
        if self.tree is None:
            right, wrong = sum(row[-2] for row in lived), sum(row[-2] < row[-3] for row in lived)
            return self.length, drafted, right, wrong, (), self.length * len(lived)
        counts = [[0, 0] for _ in range(max(self.tree.places) + 1)]
        for row in lived:
            for place, accepted in self.tree.judged[row[-4] + 1]:
                counts[place][not accepted] += 1
        return self.tree, drafted, *counts[0], counts[1:]


def run_ahead(
    round_: Round,
    needed: Callable[[int], bool],
    living: Callable[[], list[bool]],
    check: Callable[[], None],
    *,
    ahead: int,
    adaptive: AdaptiveLength | None = None,
    capture: bool = False,
) -> Iterator[Told]:
    """Queue rounds while `needed`, asked with the most tokens that those not read yet may give a sequence, and yield
    them in order; `ahead` are queued before the first of them is read. `living()`: the sequences that go on, by what
    has been yielded; a round after the last of them has ended yields no pairs. `adaptive` chooses lengths and trees;
    with `capture` each is captured first.

    Ranks that are told alike queue alike.
    """
    queued: deque[_Queued] = deque()
    seen = _NOTHING  # of the round read last
    carried = False  # whether a round brings its time to all ranks
    read, capturing = 0.0, 0.0
    chosen = None  # and not queued yet
    while True:
        while len(queued) < ahead and needed(sum(q.most for q in queued)):
            since = time.perf_counter()
            if adaptive is not None:
                chosen = adaptive.choose() if chosen is None else chosen
                round_.draft_next(chosen)
                if capture and queued and (round_.must_catch_up() or round_.wants_capture()):
                    break  # both take time, which would count as that of the rounds queued: those are read first
                chosen = None
                if capture:
                    round_.catch_up()
                    since = time.perf_counter()
                    if round_.capture(replay=True):
                        capturing += time.perf_counter() - since
                        since = time.perf_counter()
            if carried and adaptive is not None:  # two in a row, where nothing was queued for a while
                seen = _NOTHING
                round_.clock.fill_(0)
            carried = True
            round_.go_on(living())
            replayed = round_.run()  # eager among captured ones, a round costs more than it should
            tree = None if round_.tree is None else round_.tree.tree
            queued.append(_Queued(round_.k, tree, Snapshot(round_.told), seen, since, replayed or not capture))
        if not queued:
            return
        q = queued.popleft()
        told, lived = q.told.read(), living()
        check()
        took = time.perf_counter() - max(read, q.since)
        read = time.perf_counter()
        of_living = [row for row, lives in zip(told, lived, strict=True) if lives]
        if adaptive is not None:
            # Every rank hears what a round before took on one of them, so that all choose alike.
            adaptive.record(q.carried[0], told[0][-1], *q.carried[1:])
            round_.clock.fill_(int(1e6 * took) if q.usual else 0)
            seen = q.outcome(of_living)
        carried = False
        yield Told(q.length, q.tree, [row[:-4] for row in told], [(row[-3], row[-2]) for row in of_living], capturing)
        capturing = 0.0
