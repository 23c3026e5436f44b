"""Transport of a P2PChannel over torch.distributed's isend and irecv: Gloo on CPUs, NCCL between hosts."""

from __future__ import annotations

import datetime
import time
from collections import deque

import torch
import torch.distributed as dist

from ..errors import MessageMismatchError, PeerTimeoutError
from . import collectives
from .messages import ALIGNMENT, HEADER_BYTES, Layout, layout_of_header

# Gloo matches sends and receives of a pair by tag, NCCL by order.
_HEADER_TAG, _PAYLOAD_TAG = 1, 2


class DistributedTransport:
    """A message is two sends, header and payload, of one packed copy: the caller's tensors are his again at once. Each
    direction has a communicator of its own: NCCL queues the operations of one behind each other, so that a receive
    would hold back the sends behind it. They are made and used once at construction, which is collective over the
    pair.

    Messages wait at the sender, `slots` at most; the next send blocks the host until the oldest has been taken.
    """

    name, capturable = "distributed", False

    def __init__(self, pair, device: torch.device, slots: int, slot_bytes: int, timeout: float) -> None:
        self.device, self.pair, self.slots, self.slot_bytes, self.timeout = device, pair, slots, slot_bytes, timeout
        self._works: deque = deque()  # of each message on the way: what must live until it has left
        self._unchecked: deque = deque()  # (event, header in pinned memory, layout) of messages received on a GPU
        self._failed = False
        self._both = [self._backend(direction) for direction in ("up", "down")]
        self._out, self._in = self._both if pair.index == 0 else self._both[::-1]
        self._probe()

    def _backend(self, direction: str):
        store = dist.PrefixStore(f"{self.pair.name}/{direction}", self.pair.store)
        timeout = datetime.timedelta(seconds=self.timeout)
        if self.device.type == "cpu":
            return dist.ProcessGroupGloo(store, self.pair.index, 2, timeout)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        backend = dist.ProcessGroupNCCL(store, self.pair.index, 2, options)
        backend.eager_connect_single_device(self.device)
        return backend

    def _probe(self) -> None:
        """One word each way: connections that are made at first use are made here. First upwards, on both ends: NCCL
        connects a communicator on the host, where one end's first send waits for the other's first receive."""
        word = torch.zeros(16, dtype=torch.uint8, device=self.device)
        other = 1 - self.pair.index
        for backend in self._both:
            with self._measured("p2p channel", word):
                does = backend.send if backend is self._out else backend.recv
                self._finish(does([word], other, _HEADER_TAG))
        if self.device.type == "cuda":
            # Headers' pinned memory, which torch's allocator keeps (until a graph is captured in this process): taking
            # some may wait for kernels, and a send's kernel waits for the peer.
            _ = [torch.empty(HEADER_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(4 * self.slots)]
            torch.cuda.synchronize(self.device)

    def _measured(self, op: str, tensor: torch.Tensor):
        return collectives.measured(op, tensor, self.pair.group, peer=self.pair.peer, waiting=op == "p2p recv")

    @staticmethod
    def _finish(work, patience: float | None = None) -> None:
        if not (work.wait() if patience is None else work.wait(datetime.timedelta(seconds=patience))):
            raise RuntimeError("the operation was aborted")

    def capture_id(self) -> int:
        """A capture is refused: none."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "p2p: this channel goes over torch.distributed, which cannot be captured in a CUDA graph; only "
                "channels between GPUs that reach each other's memory can"
            )
        return 0

    def send(self, slot: int, layout: Layout, tensors: list[torch.Tensor], add: torch.Tensor | None = None):
        """Queue the message. Returns its works."""
        self.capture_id()  # refuses
        self._make_room()
        payload = torch.empty(layout.bytes, dtype=torch.uint8, device=self.device)
        for x, view in zip(tensors, layout.views(payload), strict=True):
            view.copy_(x) if add is None else torch.add(x, add, out=view)
        return self._send(layout, payload)

    def _send(self, layout: Layout, payload: torch.Tensor):
        header = torch.frombuffer(bytearray(layout.header.ljust(HEADER_BYTES, b"\0")), dtype=torch.uint8)
        header, other = header.to(self.device), 1 - self.pair.index
        with self._measured("p2p send", payload):
            works = [self._out.send([header], other, _HEADER_TAG)]
            if layout.bytes:
                works.append(self._out.send([payload], other, _PAYLOAD_TAG))
        self._works.append((works, header, payload))
        return works

    def _make_room(self) -> None:
        while len(self._works) >= self.slots:
            self.wait(self._works[0][0])

    def wait(self, works, patience: float | None = None) -> None:
        """Block the host until the peer has taken the message of `works` and those before it, `patience` seconds for
        each at most (None: the channel's timeout)."""
        while self._works and any(entry[0] is works for entry in self._works):
            oldest, _, payload = self._works[0]
            with self._failing(), self._measured("p2p send", payload):
                for work in oldest:
                    if self.device.type == "cpu":
                        self._finish(work, patience)
                    else:
                        self._poll(work, patience or self.timeout)
            self._works.popleft()

    def _poll(self, work, patience: float) -> None:
        # NCCL's wait() blocks the stream and not the host.
        end = time.monotonic() + patience
        while not work.is_completed():
            if time.monotonic() > end:
                raise RuntimeError(f"nothing for {patience:g} s")
            time.sleep(50e-6)

    def _failing(self):
        return _Failing(self)

    def open(self, slot: int, layout: Layout) -> list[torch.Tensor]:
        """Memory of this rank for the message's tensors."""
        self.capture_id()  # refuses
        self._make_room()
        self._opened = layout, torch.empty(layout.bytes, dtype=torch.uint8, device=self.device)
        return layout.views(self._opened[1])

    def announce(self, slot: int) -> None:
        """Send what `open` gave."""
        self._send(*self._opened)

    def receive(self, slot: int, layout: Layout | None) -> tuple[Layout, list[torch.Tensor]]:
        """The next message, in memory of its own; blocks the host on CPUs and without a layout, else the stream."""
        other, on_cpu = 1 - self.pair.index, self.device.type == "cpu"
        header = torch.empty(HEADER_BYTES, dtype=torch.uint8, device=self.device)
        with self._failing(), self._measured("p2p recv", header):
            self._finish(self._in.recv([header], other, _HEADER_TAG))
            if not on_cpu:
                pinned = torch.empty(HEADER_BYTES, dtype=torch.uint8, pin_memory=True).copy_(header, non_blocking=True)
                event = torch.cuda.Event()
                event.record()
                if layout is not None:
                    # A message of another size than expected is NCCL's to fail on; the rest is checked when it came.
                    self._unchecked.append((event, pinned, layout))
                else:
                    event.synchronize()
                    header = pinned
        if on_cpu or layout is None:
            sent = layout_of_header(bytes(header.numpy()))
            if layout is not None:
                self._compare(sent, layout)
            layout = sent
        payload = torch.empty(layout.bytes + -layout.bytes % ALIGNMENT, dtype=torch.uint8, device=self.device)
        payload = payload[: layout.bytes]
        if layout.bytes:
            with self._failing(), self._measured("p2p recv", payload):
                self._finish(self._in.recv([payload], other, _PAYLOAD_TAG))
        return layout, layout.views(payload)

    def _compare(self, sent: Layout, expected: Layout) -> None:
        if sent.hash != expected.hash:
            self._failed = True
            raise MessageMismatchError(
                f"p2p: rank {self.pair.rank} expects {expected}, rank {self.pair.peer} sent {sent}. The channel cannot "
                "be used any more"
            )

    def release(self, slot: int) -> None:
        """A message has memory of its own: nothing to give back."""

    def check(self) -> None:
        """Raise if the channel has failed, or if a message that came since was not the expected one."""
        if self._failed:
            raise PeerTimeoutError(
                f"p2p: the channel of rank {self.pair.rank} to rank {self.pair.peer} has failed before and cannot be "
                "used any more"
            )
        while self._unchecked and self._unchecked[0][0].query():
            _, header, expected = self._unchecked.popleft()
            self._compare(layout_of_header(bytes(header.numpy())), expected)

    def close(self, patience: float | None) -> None:
        """Wait until the peer has taken all messages, unless the channel failed."""
        if not self._failed and self._works:
            self.wait(self._works[-1][0], patience)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            for backend in self._both:  # in one order on both ends: it may be collective
                backend.shutdown()


class _Failing:
    """Remembers that an operation within failed."""

    def __init__(self, transport: DistributedTransport) -> None:
        self.transport = transport

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        self.transport._failed |= kind is not None
