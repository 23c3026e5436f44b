"""Asynchronous, ordered messages between two ranks: the boundary between two stages of a pipeline."""

from __future__ import annotations

import contextlib
import datetime
import pickle
import warnings

import torch
import torch.distributed as dist

from ..errors import PeerTimeoutError
from . import groups
from .capabilities import local_capabilities
from .groups import resolve_group
from .messages import ALIGNMENT, layout_of, layout_of_spec
from .p2p_distributed import DistributedTransport
from .p2p_ring import PUSH_BYTES, make_ring
from .topology import host_identity
from .workspace import unwatch, watch

MAX_SLOTS = 64
_PATIENCE_S = 5.0
_TRANSPORTS = ("auto", "memory", "distributed")

# (ranks of a pair) -> channels made so far: names that both ends count alike. Never reset: a store may outlive a group.
_made: dict[tuple, int] = {}
# Channels live until they are closed: one that is collected would take messages with it that are still on their way.
_open: dict[P2PChannel, None] = {}


class Pair:
    """Two ranks of a group that agree on something through the store: no communicator needed. rank, peer: global."""

    def __init__(self, pg: dist.ProcessGroup, peer: int, timeout: float) -> None:
        self.group, self.timeout = pg, timeout
        self.rank, self.peer = dist.get_rank(), dist.get_global_rank(pg, peer)
        self.index = int(self.rank > self.peer)
        key = (min(self.rank, self.peer), max(self.rank, self.peer))
        count = _made[key] = _made.get(key, 0) + 1
        self.name = f"fused_parallel/p2p/{key[0]}-{key[1]}/{count}"
        self.store = dist.PrefixStore(self.name, dist.distributed_c10d._get_default_store())

    def exchange(self, what: str, value):
        """[value of the lower rank, value of the higher], any picklable objects; waits for the other."""
        self.store.set(f"{what}/{self.index}", pickle.dumps(value))
        key = f"{what}/{1 - self.index}"
        try:
            self.store.wait([key], datetime.timedelta(seconds=self.timeout))
        except (dist.DistError, RuntimeError) as error:
            raise PeerTimeoutError(
                f"p2p: rank {self.rank} makes a channel to rank {self.peer}, which did not make its end within "
                f"{self.timeout:g} s: it died, or makes its channels in another order"
            ) from error
        other = pickle.loads(self.store.get(key))
        return [value, other] if self.index == 0 else [other, value]


def _why_no_ring(pair: Pair, device: torch.device) -> str | None:
    """Why the two ranks cannot exchange through each other's memory; None if they can. The same on both ends."""
    index = torch.cuda.current_device() if device.type == "cuda" else None
    ends = pair.exchange("end", (host_identity(), index, local_capabilities().cuda_kernels and index is not None))
    if not all(kernels for _, _, kernels in ends):
        return "one of the ranks has no CUDA kernels"
    if ends[0][0] != ends[1][0]:
        return "the ranks are on different hosts"
    if ends[0][1] == ends[1][1]:
        return "the ranks share a GPU"
    reaches = torch.cuda.can_device_access_peer(index, ends[1 - pair.index][1])
    return None if all(pair.exchange("reaches", reaches)) else "the GPUs have no access to each other's memory"


class SentMessage:
    """A message on its way. Its tensors are the sender's again: on a GPU in stream order, on a CPU at once."""

    __slots__ = ("_ticket", "_transport")

    def __init__(self, transport, ticket) -> None:
        self._transport, self._ticket = transport, ticket

    def wait(self) -> None:
        """Block the host until the message has left this rank (over torch.distributed: until the peer took it)."""
        self._transport.wait(self._ticket)


class ReceivedMessage:
    """`tensors`: the message as it was sent, a tensor, a tuple or a dict. Between GPUs of one host they are the slot
    itself: valid until `release`, and in stream order only. A context manager gives the tensors and releases them."""

    def __init__(self, channel: P2PChannel, slot: int, tensors, capture: int) -> None:
        self.tensors = tensors
        self._channel, self._slot, self._capture, self._released = channel, slot, capture, False

    def release(self) -> None:
        """Give the slot back: what the current stream does after this call may not touch the tensors. Once only; what
        was received in a captured graph is released in the same capture, or a replay would find its slot taken."""
        if self._released:
            raise RuntimeError("p2p: this message has been released already")
        transport = self._channel._transport
        now = transport.capture_id()
        if now != self._capture:
            raise RuntimeError(
                "p2p: a message received while a CUDA graph is captured must be released in that capture, one received "
                "outside of it outside"
            )
        transport.release(self._slot)
        self._released = True
        self._channel._held.discard(self._slot)

    def __enter__(self):
        return self.tensors

    def __exit__(self, kind, error, trace) -> None:
        if not self._released:
            self.release()


class _Opened:
    """Between `__enter__` and `__exit__` the caller writes the message; then it is complete."""

    def __init__(self, channel: P2PChannel, layout) -> None:
        self._channel, self._layout = channel, layout

    def __enter__(self):
        self._slot = self._channel._next_send()
        tensors = self._channel._transport.open(self._slot, self._layout)
        self._channel._sent += 1
        return self._layout.packed(tensors)

    def __exit__(self, kind, error, trace) -> None:
        # After an error too: the peer waits for this slot, and both ends count it.
        self._channel._transport.announce(self._slot)


class P2PChannel:
    """Ordered, asynchronous messages between this rank and another, both ways.

    Args:
        group: ProcessGroup or 1-D DeviceMesh that both ranks are in.
        peer: the other's rank in `group`. Making a channel is collective over the two ranks, synchronises, and is not
            captured in CUDA graphs. Of several channels between one pair, both make the same one first.
        slots: messages of one direction that may be under way or not yet released, 1 to 64.
        slot_bytes: largest message, in bytes; every tensor in it begins at a multiple of 256. Between GPUs of one host
            each end holds slots * slot_bytes bytes of device memory.
        device: of the tensors; default: the GPU where the group has NCCL, else the CPU.
        timeout: seconds that bound every wait; default: the group's.
        transport: "memory" (through the peer's memory), "distributed" (torch.distributed: NCCL, Gloo), or "auto":
            memory where both GPUs reach each other's, else distributed, with one warning on a GPU that says why.

    All arguments but `group` and `peer` are alike on both ends.

    Streams: calls work on the current stream and do not block the host, except over Gloo and in `recv()` without a
    spec. Sends on several streams follow each other in call order, and so do receives; the two directions are
    independent.

    CUDA graphs (`capturable`): `send`, `open`, `recv(spec)` and `release` may be captured and replayed any number of
    times. A captured message keeps its slot, so both ends capture (and replay) the same steps in the same order, and a
    graph with n messages uses n slots at most: capture several steps to have several slots deep. See docs/pipeline.md.

    Errors: ValueError for a message that does not fit; fp.PeerTimeoutError, from the next call or `fp.check()`, names a
    peer that died or fell silent for `timeout`; fp.MessageMismatchError when another message came than `recv(spec)` was
    told. After either the channel is of no use any more, on both ends.
    """

    def __init__(
        self,
        group,
        peer: int,
        *,
        slots: int = 4,
        slot_bytes: int = 16 << 20,
        device: torch.device | str | None = None,
        timeout: float | None = None,
        transport: str = "auto",
    ) -> None:
        pg = resolve_group(group)
        if not isinstance(peer, int) or not 0 <= peer < pg.size() or peer == pg.rank():
            raise ValueError(
                f"P2PChannel: peer must be another rank of the group of {pg.size()}, got {peer!r} on rank {pg.rank()}"
            )
        if not isinstance(slots, int) or not 1 <= slots <= MAX_SLOTS:
            raise ValueError(f"P2PChannel: slots must be an integer from 1 to {MAX_SLOTS}, got {slots!r}")
        if not isinstance(slot_bytes, int) or slot_bytes < 1:
            raise ValueError(f"P2PChannel: slot_bytes must be a positive integer, got {slot_bytes!r}")
        if transport not in _TRANSPORTS:
            raise ValueError(f"P2PChannel: transport must be one of {', '.join(_TRANSPORTS)}, got {transport!r}")
        if timeout is None:
            timeout = groups.timeout_of(pg)
        self.group, self.peer = pg, peer
        slot_bytes += -slot_bytes % ALIGNMENT
        device = self._device_of(pg, device)
        pair = Pair(pg, peer, timeout)
        mine = (slots, slot_bytes, transport, device.type)
        ends = pair.exchange("arguments", mine)
        if ends[0] != ends[1]:
            raise ValueError(
                f"P2PChannel: (slots, slot_bytes, transport, device) must be alike on both ends, got {ends[0]} on rank "
                f"{min(pair.rank, pair.peer)} and {ends[1]} on rank {max(pair.rank, pair.peer)}"
            )
        reason = "transport='distributed' is asked for" if transport == "distributed" else _why_no_ring(pair, device)
        if reason is not None and transport == "memory":
            raise RuntimeError(f"P2PChannel: transport='memory' is asked for, but {reason}")
        if reason is None:
            self._begin(make_ring(pair, slots, slot_bytes, timeout, PUSH_BYTES), slots)
        else:
            if transport == "auto" and device.type == "cuda":
                warnings.warn(f"P2PChannel: messages go over torch.distributed (NCCL), because {reason}", stacklevel=2)
            self._begin(DistributedTransport(pair, device, slots, slot_bytes, timeout), slots)
            groups.note_connections()

    def _begin(self, transport, slots: int) -> None:
        self._transport, self.slots, self.slot_bytes = transport, slots, transport.slot_bytes
        self.device = transport.device
        self._sent = self._received = 0  # messages, captured ones once: what chooses the slot
        self._held: set[int] = set()
        watch(self)
        _open[self] = None

    @classmethod
    def _over(cls, transport, slots: int) -> P2PChannel:
        """A channel over a transport that is there already: virtual ranks of one GPU."""
        channel = cls.__new__(cls)
        channel.group, channel.peer = None, transport.peer
        channel._begin(transport, slots)
        return channel

    @staticmethod
    def _device_of(pg: dist.ProcessGroup, device) -> torch.device:
        if device is None:
            device = "cuda" if "nccl" in dist.get_backend_config(pg) else "cpu"
        device = torch.device(device)
        return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device

    @property
    def capturable(self) -> bool:
        """Whether messages can be captured in CUDA graphs: between GPUs that reach each other's memory."""
        return self._transport.capturable

    @property
    def transport(self) -> str:
        """ "memory" or "distributed", the same on both ends."""
        return self._transport.name

    @property
    def is_open(self) -> bool:
        """False after `close` and after fp.finalize()."""
        return self in _open

    def _next_send(self) -> int:
        self._transport.check()
        return self._sent % self.slots

    def _fitting(self, layout):
        if layout.bytes > self.slot_bytes:
            raise ValueError(
                f"P2PChannel: the message {layout} takes {layout.bytes} bytes, more than the channel's slot_bytes="
                f"{self.slot_bytes}; make the channel with larger slots, or send it in pieces"
            )
        return layout

    def send(self, tensors, add: torch.Tensor | None = None) -> SentMessage:
        """Send a tensor, or a tuple, list or dict (string keys) of tensors of any dtypes, on the channel's device.

        Tensors that are not contiguous are copied first. Does not wait for the peer, unless all slots are taken: then
        the stream waits for one (over torch.distributed the host does).

        add: a tensor like `tensors`, which is one tensor then: what travels is their sum, with the bits of torch's
        addition. A pushed message (fp32, fp16, bf16, between GPUs of one host) is added by the kernel that writes to
        the peer's slot: the last addition of a stage needs no kernel, and no memory, of its own.
        """
        layout, parts = layout_of(tensors)
        if add is not None and (layout.packed(parts) is not tensors or layout_of(add)[0] != layout):
            raise ValueError(
                f"P2PChannel: add goes with one tensor of its shape and dtype; it is {layout_of(add)[0]}, the message "
                f"{layout}"
            )
        for part in parts if add is None else (*parts, add):
            if part.device != self.device:
                raise ValueError(f"P2PChannel: a tensor is on {part.device}, the channel on {self.device}")
            if part.requires_grad and torch.is_grad_enabled():
                raise ValueError("P2PChannel: inference only, a tensor requires grad; use torch.no_grad() or .detach()")
        self._fitting(layout)
        ticket = self._transport.send(self._next_send(), layout, parts, add)
        self._sent += 1  # not before: a message that was refused is not counted
        return SentMessage(self._transport, ticket)

    def open(self, spec) -> _Opened:
        """A context manager that gives the message's tensors for the caller's kernels to write, the last layer's
        epilogue for one: between GPUs of one host they are the peer's slot. The message leaves at the end of the block,
        in stream order; no other send of the channel inside. `spec`: as of `recv`."""
        return _Opened(self, self._fitting(layout_of_spec(spec)))

    def recv(self, spec=None) -> ReceivedMessage:
        """The next message.

        Args:
            spec: (shape, dtype) or a tensor like the one to come, or a tuple, list or dict of such: the header is
                compared on the device, nothing waits on the host. None: the shapes come in the header, the host waits.

        Raises RuntimeError if all slots hold messages that have not been released: the next one could never come.
        """
        layout = None if spec is None else self._fitting(layout_of_spec(spec))
        self._transport.check()
        capture, slot = self._transport.capture_id(), self._received % self.slots
        if slot in self._held:
            raise RuntimeError(
                f"P2PChannel: the message before it in slot {slot} of {self.slots} has not been released, so the next "
                "one cannot come; release messages in the order they came, or make the channel with more slots"
            )
        layout, tensors = self._transport.receive(slot, layout)
        self._received += 1
        self._held.add(slot)
        return ReceivedMessage(self, slot, layout.packed(tensors), capture)

    def check(self) -> None:
        """Raise what has been recorded against this channel (fp.check() asks all channels)."""
        self._transport.check()

    def close(self, patience: float | None = None) -> None:
        """Wait until all messages have left (over torch.distributed: have been taken, each within `patience` seconds,
        default the timeout); fp.finalize() does it for every channel."""
        _open.pop(self, None)
        unwatch(self)
        self._transport.close(patience)


def close_all() -> None:
    """Close every channel of this process, in the order they were made; errors are not raised any more."""
    for channel in list(_open):
        # A peer that leaves without taking what was sent to it does not hold this rank up for long, and whoever waited
        # for one that is gone has been told.
        with contextlib.suppress(RuntimeError):
            channel.close(_PATIENCE_S)
    _open.clear()


def forget() -> None:
    """Drop all channels, when torch.distributed was shut down without fp.finalize()."""
    _open.clear()
