"""The pace of the persistent matmul's sending (csrc/matmul_all_reduce_exchange.cuh) on the host: the threads of a CTA
that bring operands, multiply and send halves of tiles wait for each other in a ring, and must always come to the end.

All waits are for counts that only grow, so the order in which the threads take turns changes nothing: either all of
them end, or none ever does. What peers send is taken to be there: they wait for none of this (test_matmul_protocol.py).
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

KERNEL = Path(__file__).parents[2].joinpath("csrc", "matmul_all_reduce_exchange.cuh").read_text()
CONSUMERS, PIECES = 2, 8
STAGES = int(re.search(r"kStages = kSends \? (\d+) :", KERNEL)[1])
# Of the time of a tile, in which the pieces of the one before are sent.
EIGHTHS = int(re.search(r"due = next \+ piece \* depths \* (\d+) / \(8 \* kPieces\);", KERNEL)[1])


class Cta:
    def __init__(self, tiles: int, depths: int, eighths: int = EIGHTHS):
        self.tiles, self.depths, self.eighths = tiles, depths, eighths
        self.asked = 0  # steps whose operands have been asked for
        # Of each half of the tiles: steps multiplied, results handed over, results sent.
        self.multiplied, self.handed_over, self.sent = ([0] * CONSUMERS for _ in range(3))
        self.sent_at: list[tuple[int, int]] = []  # (a piece's due step, the step it was sent at), of the first half

    def brings(self) -> Iterator[None]:
        for _ in range(self.tiles * self.depths):
            while self.asked - min(self.multiplied) >= STAGES:  # a stage is free when both have read it
                yield
            self.asked += 1
            yield

    def multiplies(self, half: int) -> Iterator[None]:
        for tile in range(self.tiles):
            for _ in range(self.depths):
                while self.asked <= self.multiplied[half]:
                    yield
                self.multiplied[half] += 1
                yield
            while self.sent[half] < tile:  # the result before is where this one is left
                yield
            self.handed_over[half] += tile + 1 < self.tiles  # the last it sends itself

    def sends(self, half: int) -> Iterator[None]:
        for tile in range(self.tiles - 1):
            while self.handed_over[half] <= tile:
                yield
            for piece in range(PIECES):
                due = (tile + 1) * self.depths + piece * self.depths * self.eighths // (8 * PIECES)
                while due > self.asked:
                    yield
                if half == 0:
                    self.sent_at.append((due, self.asked))
                yield
            self.sent[half] += 1

    def ends(self) -> bool:
        """Whether all threads come to their ends."""
        threads, before = [self.brings()], None
        for half in range(CONSUMERS):
            threads += [self.multiplies(half), self.sends(half)]
        while threads:
            threads = [thread for thread in threads if next(thread, self) is not self]
            now = (self.asked, *self.multiplied, *self.handed_over, *self.sent, len(self.sent_at), len(threads))
            if now == before:
                return False
            before = now
        return True


def stuck(eighths: int) -> list[tuple[int, int]]:
    """The (tiles, steps along K) of which a CTA does not come to its end."""
    depths = (*range(1, 40), 64, 224)
    return [(t, d) for t in range(1, 6) for d in depths if not Cta(t, d, eighths).ends()]


def test_every_cta_comes_to_its_end():
    assert stuck(EIGHTHS) == []


@pytest.mark.parametrize("eighths", [10, 16])
def test_waits_for_steps_that_need_the_result_to_be_sent_are_found(eighths):
    assert stuck(eighths)


def test_pieces_are_spread_over_the_next_tile():
    cta = Cta(3, 64)
    assert cta.ends()
    assert [due for due, _ in cta.sent_at] == [64 * tile + 7 * piece for tile in (1, 2) for piece in range(PIECES)]
    # When due, but for the first: a result comes after the first operands of the next tile have been asked for.
    assert all(due <= at <= due + STAGES for due, at in cta.sent_at)
