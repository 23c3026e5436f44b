"""The Python side of the channel through memory, against a stand-in for the extension that works in host memory: slots,
offsets, headers, errors. The kernels themselves: tests/gpu/test_p2p.py."""

import ctypes
import random
import types

import pytest
import torch

import fused_parallel as fp
from fused_parallel import _ext
from fused_parallel.comm import p2p_ring
from fused_parallel.comm.messages import ALIGNMENT, HEADER_BYTES, layout_of
from fused_parallel.comm.p2p import P2PChannel
from fused_parallel.testing import messages

FIRST = 20480  # bytes before the slots
FAILURES = [("no_credit", 1), ("no_message", 2), ("mismatch", 3), ("peer_failed", 4), ("out_of_step", 5)]


def payload_offset(slot_bytes, slot):
    return FIRST + slot * (HEADER_BYTES + slot_bytes) + HEADER_BYTES


class StandIn:
    """P2PEnd: what it is told is done at once. Flags and credits are counts, so that misuse is noticed."""

    def __init__(self, rank, peer, mine, theirs, slots, slot_bytes, control, record, timeout_seconds, device):
        self.mine, self.theirs, self.slot_bytes = mine, theirs, slot_bytes
        self.code, self.capture, self.log = 0, 0, []

    def failure(self):
        return self.code

    def failed_message(self):
        return 7

    def push(self, slot, header, pieces, ctas, added, dtype, stream):
        self.log.append("push + add" if added else "push")
        assert added % 16 == 0 and (not added or len(pieces) == 1)
        self.fill(slot, header, pieces)
        if added:
            ((_, size, offset),) = pieces
            self.add(self.theirs + payload_offset(self.slot_bytes, slot) + offset, added, size, dtype)

    @staticmethod
    def add(target, added, size, code):
        dtype = next(d for d, c in _ext.DTYPE_CODES.items() if c == code)
        x, y = (torch.frombuffer((ctypes.c_uint8 * size).from_address(p), dtype=dtype) for p in (target, added))
        x += y

    def open(self, slot, header, stream):
        self.log.append("open")
        self.fill(slot, header, [])

    def copy(self, slot, pieces, stream):
        self.log.append("copy")
        self.fill(slot, b"", pieces)

    def fill(self, slot, header, pieces):
        start = self.theirs + payload_offset(self.slot_bytes, slot)
        ctypes.memmove(start - HEADER_BYTES, header, len(header))
        for source, size, offset in pieces:
            assert source % 16 == 0 and offset % ALIGNMENT == 0 and 0 < size <= self.slot_bytes - offset
            ctypes.memmove(start + offset, source, size)

    def announce(self, slot, stream):
        self.log.append("announce")

    def receive(self, slot, hash, to_host, stream):
        start = self.mine + payload_offset(self.slot_bytes, slot) - HEADER_BYTES
        header = ctypes.string_at(start, HEADER_BYTES)
        assert hash in (0, int.from_bytes(header[:8], "little"))
        if to_host:
            ctypes.memmove(to_host, header, HEADER_BYTES)

    def release(self, slot, stream):
        self.log.append(f"release {slot}")


@pytest.fixture
def ends(monkeypatch):
    """Two ends of three slots of 128 KiB; up to 4096 bytes are pushed."""
    captures = {"now": 0}
    extension = types.SimpleNamespace(
        p2p_control_bytes=2048,
        p2p_record_bytes=64 + HEADER_BYTES,
        p2p_failures=FAILURES,
        P2PEnd=StandIn,
        p2p_payload_offset=payload_offset,
        stream_capture_id=lambda stream: captures["now"],
    )
    zeros = torch.zeros
    monkeypatch.setattr(
        p2p_ring, "_ext", types.SimpleNamespace(extension=lambda: extension, DTYPE_CODES=_ext.DTYPE_CODES)
    )
    monkeypatch.setattr(p2p_ring, "_raw_stream", lambda index: 0)
    monkeypatch.setattr(torch, "zeros", lambda *args, pin_memory=False, **kwargs: zeros(*args, **kwargs))
    stream = types.SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    slots, slot_bytes = 3, 1 << 17
    buffers = [zeros(FIRST + slots * (HEADER_BYTES + slot_bytes), dtype=torch.uint8) for _ in range(2)]
    rings = [
        p2p_ring.RingTransport(buffers[r], buffers[1 - r], r, 1 - r, slots, slot_bytes, 1.0, 4096) for r in range(2)
    ]
    channels = [P2PChannel._over(ring, slots) for ring in rings]
    yield *channels, captures
    for channel in channels:
        channel.close()


def test_random_messages(ends, seed):
    rng = random.Random(seed)
    for _ in range(300):
        message, sender = messages.random_message(rng), rng.randrange(2)
        ends[sender].send(message)
        with ends[1 - sender].recv(messages.spec_of(message, rng)) as got:
            assert messages.same(got, message)


def test_slots_in_turn_and_transport_by_size(ends):
    first, second, _ = ends
    log, addresses = first._transport.native.log, []
    for size in (4096, 4097, 10, 10, 10, 10):
        first.send(torch.zeros(size, dtype=torch.uint8))
        with second.recv() as got:
            addresses.append(got.data_ptr())
    assert log == ["push", "open", "copy", "announce", "push", "push", "push", "push"]
    assert addresses[:3] == addresses[3:] and len(set(addresses)) == 3
    assert second._transport.native.log == [f"release {i % 3}" for i in range(6)]
    with first.open((((3,), torch.float32), ((2, 2), torch.int64))) as (a, b):
        a.fill_(2), b.fill_(3)
    with second.recv() as (a, b):
        assert a.tolist() == [2, 2, 2] and b.tolist() == [[3, 3], [3, 3]]
    assert log[-2:] == ["open", "announce"]


@pytest.mark.parametrize(
    "dtype, size, log",
    [
        (torch.bfloat16, 2048, ["push + add"]),
        (torch.float32, 700, ["push + add"]),
        (torch.float16, 2049, ["open", "copy", "announce"]),  # too large to be pushed: added before
        (torch.int64, 30, ["push"]),  # no such kernel
        (torch.float32, 0, ["push"]),
    ],
)
def test_a_sum_is_formed_by_what_pushes_it(ends, dtype, size, log):
    first, second, _ = ends
    a, b = ((torch.randn(size + 1) * 100).to(dtype)[1:] for _ in range(2))  # neither is aligned
    first.send(a, b)
    with second.recv(a) as got:
        assert torch.equal(got, a + b)
    assert first._transport.native.log == log


def test_sums_that_are_refused(ends):
    first, _, _ = ends
    x = torch.zeros(3)
    for message, add in ((x, torch.zeros(4)), (x, x.double()), ((x,), x), ((), x), ({"x": x}, x)):
        with pytest.raises(ValueError, match="add goes with one tensor of its shape and dtype; it is float"):
            first.send(message, add)


def test_captures(ends):
    first, second, captures = ends
    for _ in range(3):
        first.send(torch.zeros(3))
    eager = second.recv(((3,), torch.float32))
    captures["now"] = 5
    with pytest.raises(RuntimeError, match="must be released in that capture, one received outside of it outside"):
        eager.release()
    with pytest.raises(RuntimeError, match=r"recv\(\) reads the header on the host"):
        second.recv()
    captured = second.recv(((3,), torch.float32))  # the refused one took no slot
    captures["now"] = 6
    with pytest.raises(RuntimeError, match="must be released in that capture"):
        captured.release()
    captures["now"] = 5
    captured.release()
    captures["now"] = 0
    eager.release()
    with pytest.raises(RuntimeError, match="released already"):
        eager.release()


def test_errors_name_what_happened(ends):
    first, second, _ = ends
    ring = second._transport
    first.send(torch.zeros(3))
    with second.recv(torch.zeros(3)):
        pass
    ring._expected[1] = layout_of(torch.zeros(4))[0]
    header = layout_of(torch.zeros(3))[0].header
    ring._record[64 : 64 + len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    for code, text in (
        (1, "rank 1 waited in vain for rank 0 to release a slot"),
        (2, r"waited in vain for a message of rank 0 \(message 7 of its slot\)"),
        (4, "was told by rank 0 that the channel failed there"),
        (5, "another slot holds one: the two ends count differently"),
    ):
        ring.native.code = code
        for call in (fp.check, second.recv, lambda: second.send(torch.zeros(1))):
            with pytest.raises(fp.PeerTimeoutError, match=text):
                call()
    ring.native.code = 3
    with pytest.raises(fp.MessageMismatchError, match=r"rank 1 expects float32 \[4\], rank 0 sent float32 \[3\]"):
        fp.check()
    ring.native.code = 0
