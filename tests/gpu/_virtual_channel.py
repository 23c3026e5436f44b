"""Both ends of a channel on one GPU: two buffers, two streams. The protocol and the bits are those of two GPUs; only
the link is missing."""

from __future__ import annotations

import contextlib

import torch

from fused_parallel import _ext
from fused_parallel.comm.p2p import P2PChannel
from fused_parallel.comm.p2p_ring import RingTransport


class VirtualChannel:
    """`ends[0]` and `ends[1]`, to be used inside `on(0)` and `on(1)`, which select the end's stream."""

    def __init__(self, slots=4, slot_bytes=1 << 20, timeout=20.0, push_bytes=2 << 20) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        size = _ext.extension().p2p_buffer_bytes(slots, slot_bytes)
        buffers = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2)]
        timeouts = timeout if isinstance(timeout, tuple) else (timeout, timeout)
        self.ends = []
        for rank in range(2):
            mine, theirs = buffers[rank], buffers[1 - rank]
            ring = RingTransport(mine, theirs, rank, 1 - rank, slots, slot_bytes, timeouts[rank], push_bytes)
            self.ends.append(P2PChannel._over(ring, slots))
        # Payloads start as what no message holds, so that what never came is noticed.
        first = _ext.extension().p2p_payload_offset(slot_bytes, 0)
        for buffer in buffers:
            buffer[first:].fill_(0xA5)
        self.streams = [torch.cuda.Stream() for _ in range(2)]
        torch.cuda.synchronize()

    @contextlib.contextmanager
    def on(self, rank: int):
        self.streams[rank].wait_stream(torch.cuda.current_stream())  # what the test made
        with torch.cuda.stream(self.streams[rank]):
            yield self.ends[rank]

    def close(self) -> None:
        """Whatever happened, nothing is left to wait for, and fp.check() of later tests does not hear of it."""
        torch.cuda.synchronize()
        for end in self.ends:
            end.close()


@contextlib.contextmanager
def virtual_channel(**options):
    channel = VirtualChannel(**options)
    try:
        yield channel
    finally:
        channel.close()
