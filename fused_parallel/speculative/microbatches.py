"""Decoding in micro-batches, so that no stage of a pipeline waits while the others work.

Each micro-batch is a Round of its own. A rank visits them in turn; on the last stage a visit runs the model, verifies,
drafts the next tokens and sends verdict and drafts in one message, on the others it receives that message (of the visit
before) and runs its layers. So while one micro-batch is on its way, a stage works on the next ones.

The host must not wait for what it has just queued, or the device would run dry: before visit n of a micro-batch it
reads what round n - 2 gave, on every stage alike, so that all agree when a micro-batch ends. A finished sequence is
therefore fed for one more round, whose tokens do not count.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import torch

from .round import Round


class _Snapshot:
    """A small tensor on its way to the host."""

    def __init__(self, x: torch.Tensor) -> None:
        self._event = None
        if not x.is_cuda:
            self._copy = x
            return
        self._copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self._copy.copy_(x, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def read(self) -> list:
        if self._event is not None:
            self._event.synchronize()
        return self._copy.tolist()


class MicroBatch:
    """One Round and what a rank knows of it."""

    def __init__(self, round_: Round) -> None:
        self.round, self.visits = round_, 0
        self._weights: torch.Tensor | None = None
        self._alive = [True] * round_.tokens.shape[0]
        self._snapshots: deque[_Snapshot] = deque()

    def start(self) -> None:
        """After the prefill: the last stage drafts, and tells the others."""
        if self.round.is_last:
            self._weights = self.round.propose()
            verdict = torch.zeros_like(self._message()[:, : self.round.k + 3])  # of no round: not looked at
            self._send(verdict)

    def _message(self) -> torch.Tensor:
        drafts, k = self.round.drafts, self.round.k
        return torch.empty(drafts.shape[0], (k + 3) + (k + 1), dtype=drafts.dtype, device=drafts.device)

    def _send(self, verdict: torch.Tensor) -> None:
        self.round.share(torch.cat((verdict, self.round.drafts), 1))

    def _receive(self) -> None:
        """The verdict of the round before, and the drafts of the next."""
        r, k = self.round, self.round.k
        message = r.share(self._message())
        if self.visits > 0:
            self._take(message[:, : k + 3])
        r.drafts.copy_(message[:, k + 3 :])

    def _take(self, verdict: torch.Tensor) -> None:
        r = self.round
        drafted = r.drafted.clone()
        r.update(verdict)
        counts = torch.stack((drafted, r.accepted), 1).long()
        self._snapshots.append(_Snapshot(torch.cat((r.tokens, counts), 1)))

    def known(self) -> list | None:
        """Of the round before the last visited one: for each sequence its tokens, how many were drafted, how many of
        them accepted. None before there is one. Once before each visit, on every rank."""
        return self._snapshots.popleft().read() if self.visits >= 2 else None

    def visit(self, alive: list[bool]) -> None:
        """Queue the next round on this rank; `alive`: by what `known` has told."""
        r = self.round
        if not r.is_last:
            self._receive()
        # After the update of the round before, which the last stage made before it knew this, too.
        if alive != self._alive:
            self._alive = alive
            on_host = torch.tensor(alive)
            # From pinned memory: a copy from other memory waits for all that the stream has been given.
            r.alive.copy_(on_host.pin_memory() if r.alive.is_cuda else on_host, non_blocking=True)
        if r.is_last:
            verdict = r.share_in_stage(r.judge(self._weights))
            self._take(verdict)
            self._weights = r.propose()
            self._send(verdict)
        else:
            r.propose()
            r.judge(None)
        self.visits += 1

    def finish(self) -> None:
        """The message of the last visit has been sent, and must be taken."""
        if not self.round.is_last:
            self._receive()


def run(batches: list[MicroBatch], alive: Callable[[int], list[bool]], check: Callable[[], None]) -> Iterator:
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
                batch.finish()
                open_.remove(m)
