"""Transport of a P2PChannel through the peer's memory: csrc/p2p.cu, two rings of slots in symmetric memory."""

from __future__ import annotations

import torch

from .. import _ext
from ..errors import MessageMismatchError, PeerTimeoutError
from . import collectives
from .messages import HEADER_BYTES, Layout, layout_of_header

# Larger messages go by the copy engine, which takes no multiprocessor but needs three nodes of a graph instead of one.
PUSH_BYTES = 4 << 20


def _raw_stream(device: int) -> int:
    return torch._C._cuda_getCurrentRawStream(device)


def _readable(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy, as a kernel reads it: in one piece, aligned to a vector."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


class RingTransport:
    """One end over the extension's P2PEnd. Slots are chosen by the channel.

    Args:
        mine, theirs: uint8, this end's buffer and the other's as mapped here.
        rank, peer: their names in errors (global ranks).
        push_bytes: largest message that multiprocessors push; larger ones go by the copy engine. Of this end only: the
            receiver cannot tell.
    """

    name, capturable = "memory", True

    def __init__(
        self, mine, theirs, rank: int, peer: int, slots: int, slot_bytes: int, timeout: float, push_bytes: int
    ) -> None:
        extension, device = _ext.extension(), mine.device
        self.device, self.index, self.push_bytes = device, device.index, push_bytes
        self.rank, self.peer = rank, peer
        self.slot_bytes = slot_bytes
        control = torch.zeros(extension.p2p_control_bytes, dtype=torch.uint8, device=device)
        self._record = torch.zeros(extension.p2p_record_bytes, dtype=torch.uint8, pin_memory=True)
        self._header = torch.zeros(HEADER_BYTES, dtype=torch.uint8, pin_memory=True)
        self._mine, self._theirs, self._owned = mine, theirs, (control,)
        self._failures = {code: name for name, code in extension.p2p_failures}
        self._expected: dict[int, Layout] = {}  # slot -> of the last receive(layout), for the error
        self._views: dict = {}
        self.native = extension.P2PEnd(
            rank=rank,
            peer=peer,
            mine=mine.data_ptr(),
            theirs=theirs.data_ptr(),
            slots=slots,
            slot_bytes=slot_bytes,
            control=control.data_ptr(),
            record=self._record.data_ptr(),
            timeout_seconds=timeout,
            device=device.index,
        )

    def _slot_views(self, buffer: torch.Tensor, slot: int, layout: Layout) -> list[torch.Tensor]:
        key = (buffer is self._mine, slot, layout.hash)
        views = self._views.get(key)
        if views is None:
            if len(self._views) > 4096:  # shapes that change in every call: views are cheap to make again
                self._views.clear()
            offset = _ext.extension().p2p_payload_offset(self.slot_bytes, slot)
            views = self._views[key] = layout.views(buffer[offset : offset + max(layout.bytes, 1)])
        return views

    def capture_id(self) -> int:
        """Of the capture that the current stream is in; 0: none."""
        return _ext.extension().stream_capture_id(_raw_stream(self.index))

    def send(self, slot: int, layout: Layout, tensors: list[torch.Tensor], add: torch.Tensor | None = None) -> int:
        """Queue the message; the tensors are the caller's again in stream order. Returns the stream."""
        pushed = layout.bytes <= self.push_bytes
        if add is not None and not (pushed and layout.bytes and add.dtype in _ext.DTYPE_CODES):
            tensors, add = [tensors[0] + add], None
        stream, added, code = _raw_stream(self.index), 0, 0
        # Kept in a name until the launch: a temporary's memory is the next one's.
        if len(tensors) == 1:  # most messages; the general way takes half a microsecond more
            kept = _readable(tensors[0])
            pieces = [(kept.data_ptr(), layout.bytes, 0)] if layout.bytes else []
        else:
            kept = [_readable(x) for x in tensors]
            places = zip(kept, layout.sizes, layout.offsets, strict=True)
            pieces = [(x.data_ptr(), size, at) for x, size, at in places if size]
        if add is not None:
            add = _readable(add)
            added, code = add.data_ptr(), _ext.DTYPE_CODES[add.dtype]
        with collectives.counted_bytes(layout.bytes, True):
            if pushed:
                self.native.push(slot, layout.header, pieces, 0, added, code, stream)
            else:
                self.native.open(slot, layout.header, stream)
                self.native.copy(slot, pieces, stream)
                self.native.announce(slot, stream)
        return stream

    def open(self, slot: int, layout: Layout) -> list[torch.Tensor]:
        """The message's tensors in the peer's slot, for kernels that come next on this stream to write."""
        self.native.open(slot, layout.header, _raw_stream(self.index))
        return self._slot_views(self._theirs, slot, layout)

    def announce(self, slot: int) -> None:
        """What `open` gave is written: the message is complete."""
        self.native.announce(slot, _raw_stream(self.index))

    def receive(self, slot: int, layout: Layout | None) -> tuple[Layout, list[torch.Tensor]]:
        """The next message of the slot, checked on the device; without a layout, waits for the header on the host."""
        stream = _raw_stream(self.index)
        if layout is None:
            if self.capture_id():
                raise RuntimeError(
                    "p2p: recv() reads the header on the host, which a CUDA graph cannot hold: pass a spec in a capture"
                )
            with collectives.counted_bytes(0, True, waiting=True):
                self.native.receive(slot, 0, self._header.data_ptr(), stream)
            torch.cuda.current_stream(self.device).synchronize()
            self.check()
            layout = layout_of_header(bytes(self._header.numpy()))
        else:
            self._expected[slot] = layout
            with collectives.counted_bytes(layout.bytes, True, waiting=True):
                self.native.receive(slot, layout.hash, 0, stream)
        return layout, self._slot_views(self._mine, slot, layout)

    def release(self, slot: int) -> None:
        """What this stream did so far has read the slot."""
        self.native.release(slot, _raw_stream(self.index))

    def wait(self, stream: int) -> None:
        """Block the host until the sends queued on `stream` have left."""
        # An external stream of address 0 would be a new one, not the default stream.
        default = torch.cuda.default_stream(self.device)
        (torch.cuda.ExternalStream(stream, device=self.device) if stream else default).synchronize()
        self.check()

    def check(self) -> None:
        """Raise what a kernel recorded; the channel stays failed. Reads host memory only."""
        code = self.native.failure()
        if code == 0:
            return
        why, message = self._failures[code], self.native.failed_message()
        if why == "mismatch":
            sent = layout_of_header(bytes(self._record[64:].numpy()))
            expected = [layout for layout in self._expected.values() if layout.hash != sent.hash]
            wanted = " or ".join(dict.fromkeys(map(str, expected)))
            raise MessageMismatchError(
                f"p2p: rank {self.rank} expects {wanted}, rank {self.peer} sent {sent}. The channel "
                "cannot be used any more"
            )
        text = {
            "no_credit": f"waited in vain for rank {self.peer} to release a slot",
            "no_message": f"waited in vain for a message of rank {self.peer}",
            "peer_failed": f"was told by rank {self.peer} that the channel failed there",
            "out_of_step": f"waited in vain for a message of rank {self.peer} while another slot holds one: the two "
            "ends count differently (a step captured in a CUDA graph on one end only, or replayed more often)",
        }[why]
        raise PeerTimeoutError(
            f"p2p: rank {self.rank} {text} (message {message} of its slot): that rank died, stopped, or runs another "
            "sequence of operations. The channel cannot be used any more: end this job on all ranks, start it again"
        )

    def close(self, patience: float | None) -> None:
        """Wait until what was sent is in the peer's memory: a process that ends takes its kernels along. Their waits
        are bounded by the channel's timeout."""
        torch.cuda.synchronize(self.device)
        self._views.clear()


def make_ring(pair, slots: int, slot_bytes: int, timeout: float, push_bytes: int) -> RingTransport:
    """The two ends' buffers, mapped into each other; collective over the pair (p2p.Pair), synchronises."""
    import torch.distributed._symmetric_memory as symmetric_memory

    device = torch.device("cuda", torch.cuda.current_device())
    size = _ext.extension().p2p_buffer_bytes(slots, slot_bytes)
    buffer = symmetric_memory.empty(size, dtype=torch.uint8, device=device)
    if pair.group.size() == 2:
        name, mine, other = pair.group.group_name, pair.group.rank(), 1 - pair.group.rank()
    else:
        # Symmetric memory of two ranks of a larger group: under a name of its own, over the same store.
        name, mine, other = pair.name, pair.index, 1 - pair.index
        torch._C._distributed_c10d._SymmetricMemory.set_group_info(name, pair.index, 2, pair.store)
    handle = symmetric_memory.rendezvous(buffer, name)
    if handle.rank != mine:
        raise RuntimeError(f"p2p: symmetric memory counts this rank as {handle.rank}, the pair as {mine}")
    theirs = handle.get_buffer(other, (size,), torch.uint8)
    buffer[: _ext.extension().p2p_payload_offset(slot_bytes, 0)].zero_()
    ring = RingTransport(buffer, theirs, pair.rank, pair.peer, slots, slot_bytes, timeout, push_bytes)
    ring._owned += (handle,)
    torch.cuda.synchronize(device)
    pair.exchange("zeroed", None)  # no end may set a flag before the other's are zero
    return ring
