"""Layers that stay in files: read, one pass after the other, ahead of their use."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch


class DiskReader:
    """Reads layers in a fixed order, again and again, on a thread of its own, as far ahead as there are blocks.

    Args:
        order: the layers, as every pass takes them.
        read: read(layer, block) fills the block.
        blocks: of host memory, each large enough for any of the layers.
    """

    def __init__(
        self, order: Sequence[int], read: Callable[[int, torch.Tensor], None], blocks: Sequence[torch.Tensor]
    ) -> None:
        self._order, self._read = list(order), read
        # With each free block the copy out of it that must have happened before it is written.
        self._free: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque((block, None) for block in blocks)
        self._begun: deque[tuple[int, torch.Tensor, Future]] = deque()
        self._next = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fused_parallel disk")

    def _begin(self) -> None:
        while self._free:
            block, event = self._free.popleft()
            layer = self._order[self._next % len(self._order)]
            self._next += 1
            self._begun.append((layer, block, self._thread.submit(self._fill, layer, block, event)))

    def _fill(self, layer: int, block: torch.Tensor, event: torch.cuda.Event | None) -> None:
        if event is not None:
            event.synchronize()
        self._read(layer, block)

    def take(self, layer: int) -> torch.Tensor:
        """The block with `layer`, once it is read; `give_back` it before the next is taken."""
        self._begin()
        if self._begun[0][0] != layer:  # a pass was broken off: what was read ahead is not what comes next
            self.forget()
            self._next = self._order.index(layer)
            self._begin()
        _, block, future = self._begun.popleft()
        try:
            future.result()
        except BaseException:
            self._free.append((block, None))
            raise
        return block

    def forget(self) -> None:
        """Drop what has been read ahead; it is read again."""
        self._next -= len(self._begun)
        while self._begun:
            _, block, future = self._begun.popleft()
            future.exception()  # over, however it ended
            self._free.append((block, None))

    def give_back(self, block: torch.Tensor, event: torch.cuda.Event | None) -> None:
        """The block may be written again after `event` (None: now); the next layer's read begins."""
        self._free.append((block, event))
        self._begin()

    def close(self) -> None:
        """Wait for the read that runs, and drop the others."""
        self._thread.shutdown(wait=True, cancel_futures=True)
