"""Decoding in micro-batches, so that no stage of a pipeline waits while the others work.

Each micro-batch is a Round of its own. A rank visits them in turn; on the last stage a visit runs the model, verifies,
drafts the next tokens and sends verdict and drafts in one message, on the others it receives that message (of the visit
before) and runs its layers. So while one micro-batch is on its way, a stage works on the next ones.

The host must not wait for what it has just queued, or the device would run dry: before visit n of a micro-batch it
reads what round n - 2 gave, on every stage alike, so that all agree when a micro-batch ends. A finished sequence is
therefore fed for one more round, whose tokens do not count.

Captured, a visit is a CUDA graph: one on the last stage, two on the others, as the message of the visit before is taken
by itself when a micro-batch has ended. A captured message keeps its slot, so both ends must capture a message at the
same count: the first round is eager, and its messages are taken before the capture instead of in the next visit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import torch

from .round import Round, Snapshot, graph_of


class MicroBatch:
    """One Round and what a rank knows of it. `_receive` and `_work` queue their part of a visit, or replay it."""

    def __init__(self, round_: Round) -> None:
        self.round, self.visits = round_, 0
        self._receive, self._work = self._receive_message, self._run_round
        self._taken = True  # no message of the last stage is on its way
        self._weights: torch.Tensor | None = None
        self._snapshots: deque[Snapshot] = deque()

    def start(self) -> None:
        """After the prefill: the last stage drafts, and tells the others."""
        if self.round.is_last:
            self._weights = self.round.propose()
            verdict = torch.zeros_like(self._message()[:, : self.round.k + 3])  # of no round: not looked at
            self._send(verdict)
        self._taken = self.round.is_last

    def capture(self) -> None:
        """From the second visit on, replay graphs. After the first visits of all micro-batches and `take` of all; on
        every rank, in the order of the visits."""
        if not self.round.is_last:
            self._receive = graph_of(self._receive_message)
        self._work = graph_of(self._run_round)

    def take(self) -> None:
        """Of the visit before: its verdict, and the drafts of the next."""
        if not self._taken:
            self._receive()
            self._taken = True
            if self.visits > 0:
                self._snapshots.append(Snapshot(self.round.told))

    def _message(self) -> torch.Tensor:
        drafts, k = self.round.drafts, self.round.k
        return torch.empty(drafts.shape[0], (k + 3) + (k + 1), dtype=drafts.dtype, device=drafts.device)

    def _send(self, verdict: torch.Tensor) -> None:
        self.round.share(torch.cat((verdict, self.round.drafts), 1))

    def _receive_message(self) -> None:
        r, k = self.round, self.round.k
        message = r.share(self._message())
        if self.visits > 0:
            r.update(message[:, : k + 3])
        r.drafts.copy_(message[:, k + 3 :])

    def _run_round(self) -> None:
        r = self.round
        if not r.is_last:
            r.propose()
            r.judge(None)
            return
        verdict = r.share_in_stage(r.judge(self._weights))
        r.update(verdict)
        weights = r.propose()
        if weights is not None:
            self._weights.copy_(weights)  # where a replay finds them
        self._send(verdict)

    def known(self) -> list | None:
        """Of the round before the last visited one what `Round.told` holds. None before there is one. Once before each
        visit, on every rank."""
        return self._snapshots.popleft().read() if self.visits >= 2 else None

    def visit(self, alive: list[bool]) -> None:
        """Queue the next round on this rank; `alive`: by what `known` has told."""
        r = self.round
        self.take()
        # After the update of the round before, which the last stage made before it knew this, too.
        r.go_on(alive)
        self._work()
        self._taken = r.is_last
        if r.is_last:
            self._snapshots.append(Snapshot(self.round.told))
        self.visits += 1


def run(
    batches: list[MicroBatch], alive: Callable[[int], list[bool]], check: Callable[[], None], capture: bool = False
) -> Iterator:
    """Visit micro-batches in turn until all have ended, yielding (micro-batch, length drafted, what was known of its
    sequences, which of them lived); `alive(m)` is asked after that has been dealt with."""
    for batch in batches:
        batch.start()
    open_ = list(range(len(batches)))
    while open_:
        for m in list(open_):
            batch = batches[m]
            lived = alive(m)
            known = batch.known()
            if known is not None:
                check()
                yield m, batch.round.k, known, lived
            if any(alive(m)):
                batch.visit(alive(m))
            else:
                batch.take()  # the message of the last visit has been sent
                open_.remove(m)
        if capture:
            for m in open_:
                batches[m].take()
            for m in open_:
                batches[m].capture()
            capture = False
