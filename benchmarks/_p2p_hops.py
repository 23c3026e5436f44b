"""Hops of bench_p2p: a message to the other rank by this library, by torch.distributed, by torch's symmetric memory."""

from __future__ import annotations

import torch
import torch.distributed as dist
from _common import Bench

import fused_parallel as fp


class Fused:
    """Hops over a channel; `push_bytes`: largest pushed message, None for the default.

    As a stage of a pipeline does, it releases a message after it has sent its own: in a captured round of `calls` calls
    the release is not between a message and the answer to it, but for the last.
    """

    def __init__(
        self, bench: Bench, bytes: int, calls: int = 1, push_bytes: int | None = None, slots: int | None = None
    ) -> None:
        self.rank = bench.pg.rank()
        slots = slots or (4 if bytes <= 16 << 20 else 2)
        self.channel = fp.comm.P2PChannel(bench.pg, 1 - self.rank, slots=slots, slot_bytes=bytes)
        if push_bytes is not None and self.channel.transport == "memory":
            self.channel._transport.push_bytes = push_bytes
        self.calls, self.captured, self.held = calls, 0, None

    def send(self, x: torch.Tensor) -> None:
        self.channel.send(x)
        self._after()

    def receive(self, x: torch.Tensor, out: torch.Tensor | None = None) -> None:
        self.held = self.channel.recv(x)
        if out is not None:
            out.copy_(self.held.tensors)
        self._after(received=True)

    def _after(self, received: bool = False) -> None:
        capturing = is_capturing()
        self.captured += capturing
        # What was captured is released in the same capture: the last call keeps nothing.
        keep = received and capturing and self.captured % self.calls != 0
        if self.held is not None and not keep:
            self.held.release()
            self.held = None

    def close(self) -> None:
        self.channel.close()


def is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class Library:
    """Hops by dist.send and dist.recv."""

    def __init__(self, bench: Bench, bytes: int, calls: int = 1, slots: int | None = None) -> None:
        self.rank = bench.pg.rank()
        self.buffer = torch.empty(bytes // bench.dtype.itemsize, dtype=bench.dtype, device=bench.device)

    def send(self, x: torch.Tensor) -> None:
        dist.send(x, 1 - self.rank)

    def receive(self, x: torch.Tensor, out: torch.Tensor | None = None) -> None:
        dist.recv(self.buffer, 1 - self.rank)
        if out is not None:
            out.copy_(self.buffer)

    def close(self) -> None:
        pass


class Symmetric:
    """Hops by a copy to the peer's buffer in torch's symmetric memory, announced by its signals. One message deep: safe
    because directions alternate."""

    def __init__(self, bench: Bench, bytes: int, calls: int = 1) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        self.rank, count = bench.pg.rank(), bytes // bench.dtype.itemsize
        self.buffer = symmetric_memory.empty(count, dtype=bench.dtype, device=bench.device)
        self.handle = symmetric_memory.rendezvous(self.buffer, bench.pg.group_name)
        self.theirs = self.handle.get_buffer(1 - self.rank, (count,), bench.dtype)

    def send(self, x: torch.Tensor) -> None:
        self.theirs.copy_(x)
        self.handle.put_signal(dst_rank=1 - self.rank, channel=0)

    def receive(self, x: torch.Tensor, out: torch.Tensor | None = None) -> None:
        self.handle.wait_signal(src_rank=1 - self.rank, channel=0)
        if out is not None:
            out.copy_(self.buffer)

    def close(self) -> None:
        pass


def synchronize(bench: Bench) -> None:
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier(group=bench.pg)
