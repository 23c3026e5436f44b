"""The pace of the persistent matmul's sending (csrc/matmul_all_reduce_exchange.cuh) on the host: a CTA's three threads,
which bring operands, multiply and send, wait for each other in a ring, and must always come to the end.

All waits are for counts that only grow, so the order in which the threads take turns changes nothing: either all of
them end, or none ever does. What peers send is taken to be there: they wait for none of this (test_matmul_protocol.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

STAGES, PARTS, PIECES = 3, 2, 4


@dataclass(frozen=True)
class Rules:
    """The kernel's, and ways to get it wrong."""

    rooms: int = PARTS  # 1: all of a result must have been sent before anything of the next is left
    eighths: int = 7  # of the time until the next result, in which pieces are sent
    doubled: bool = True  # False: before the last tile's parts, the time of one of them only


class Cta:
    def __init__(self, tiles: int, depths: int, rules: Rules):
        self.tiles, self.depths, self.rules = tiles, depths, rules
        self.asked = self.freed = self.handed_over = 0  # steps, steps, results
        self.sent = [0] * PARTS  # of the results of whole tiles
        self.sent_at: list[tuple[int, int]] = []  # (a piece's due step, the step it was sent at)

    def is_last(self, tile: int) -> bool:
        return tile + 1 >= self.tiles

    def brings(self) -> Iterator[None]:
        for tile in range(self.tiles):
            for _ in range(self.depths * (PARTS if self.is_last(tile) else 1)):
                while self.asked - self.freed >= STAGES:
                    yield
                self.asked += 1
                yield

    def multiplies(self) -> Iterator[None]:
        for tile in range(self.tiles):
            for part in range(PARTS if self.is_last(tile) else 1):
                for _ in range(self.depths):
                    while self.asked <= self.freed:
                        yield
                    self.freed += 1
                    yield
                needed = [part] if self.is_last(tile) and self.rules.rooms > 1 else range(PARTS)
                while any(self.sent[room] < tile for room in needed):
                    yield
                self.handed_over += part == 0

    def sends(self) -> Iterator[None]:
        following = 0
        for tile in range(self.tiles):
            following += self.depths
            longer = self.is_last(tile + 1) and self.rules.doubled
            span = self.depths * (PARTS if longer else 1)
            while self.handed_over <= tile:
                yield
            pieces = PIECES * (1 if self.is_last(tile) else PARTS)
            for piece in range(pieces):
                due = following + piece * span * self.rules.eighths // (8 * PARTS * PIECES)
                while due > self.asked:
                    yield
                if piece == PIECES:
                    self.sent[0] += 1
                self.sent_at.append((due, self.asked))
                yield
            self.sent[pieces // PIECES - 1] += 1

    def ends(self) -> bool:
        """Whether all threads come to their ends."""
        threads, before = [self.brings(), self.multiplies(), self.sends()], None
        while threads:
            threads = [thread for thread in threads if next(thread, self) is not self]
            now = self.asked, self.freed, self.handed_over, *self.sent, len(self.sent_at), len(threads)
            if now == before:
                return False
            before = now
        return True


def stuck(rules: Rules) -> list[tuple[int, int]]:
    """The (tiles, steps along K) of which a CTA does not come to its end."""
    return [(t, d) for t in range(1, 6) for d in (*range(1, 40), 64, 224) if not Cta(t, d, rules).ends()]


def test_every_cta_comes_to_its_end():
    assert stuck(Rules()) == []


@pytest.mark.parametrize("rules", [Rules(rooms=1), Rules(eighths=12)], ids=str)
def test_waits_for_steps_that_need_the_result_to_be_sent_are_found(rules):
    assert stuck(rules)


def test_pieces_are_spread_over_the_time_until_the_next_result():
    cta = Cta(3, 64, Rules())
    assert cta.ends()
    first, before_last = [[due for due, _ in cta.sent_at[at : at + 8]] for at in (0, 8)]
    assert first == [64 + 7 * piece for piece in range(8)]
    assert before_last == [128 + 14 * piece for piece in range(8)]  # over both parts of the last tile
    # Sent when due: only of the first is it known too late, a result being handed over after the operands of the next
    # have been asked for.
    assert all(due <= at <= due + STAGES for due, at in cta.sent_at[:16])
