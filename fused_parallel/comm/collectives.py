"""The torch.distributed collectives behind the reference implementations: named errors, and time that can be counted.

Every function runs on the current stream, returns without host synchronisation on a GPU, and does nothing in a world
of one. A failure (dead or silent peer) surfaces as PeerTimeoutError naming the operation and the ranks waited for.
"""

from __future__ import annotations

import contextlib
import contextvars
import datetime
import time
from collections import deque
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from ..errors import PeerTimeoutError

# Newer torch renamed these two; the old names warn there, the new ones do not exist before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_timer: contextvars.ContextVar[CommunicationTimer | None] = contextvars.ContextVar("fp_comm_timer", default=None)


@dataclass
class CommunicationTimer:
    """Counts the time this rank spends in collectives within `with timer:`, waiting for slower peers included.

    On CPUs it is wall time of the blocking calls; on GPUs the time between events around each call on its stream
    (calls captured in CUDA graphs are not counted, nor kernels that multiply and exchange: there is no telling which
    part of their time is which). `seconds()` synchronises the device.
    """

    host_seconds: float = 0.0
    waiting_host_seconds: float = 0.0  # of them in receives of the stage before: a pipeline's bubble
    calls: int = 0
    bytes: int = 0
    _events: deque[tuple[torch.cuda.Event, torch.cuda.Event, bool]] = field(default_factory=deque)

    def __enter__(self) -> CommunicationTimer:
        self._token = _timer.set(self)
        return self

    def __exit__(self, *exc) -> None:
        _timer.reset(self._token)

    def seconds(self) -> float:
        if self._events:
            torch.cuda.synchronize()
            self._take_in(len(self._events))
        return self.host_seconds

    def waiting_seconds(self) -> float:
        """The part of `seconds()` spent in point-to-point receives."""
        self.seconds()
        return self.waiting_host_seconds

    def _around(self, start: torch.cuda.Event, end: torch.cuda.Event, waiting: bool) -> None:
        self._events.append((start, end, waiting))
        if len(self._events) > _MOST_EVENTS:  # a long answer has hundreds a token
            self._take_in(2)

    def _take_in(self, count: int) -> None:
        for _ in range(count):
            start, end, waiting = self._events[0]
            if not end.query():
                return
            self._events.popleft()
            self._add(start.elapsed_time(end) * 1e-3, waiting)

    def _add(self, seconds: float, waiting: bool) -> None:
        self.host_seconds += seconds
        self.waiting_host_seconds += seconds if waiting else 0.0


_MOST_EVENTS = 4096  # that a CommunicationTimer keeps, if those before are over

# How long a rank that lost the others waits for them to say that they lost someone, too.
_GRACE_S = 2.0


def _names(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _verdict(pg: dist.ProcessGroup, peer: int | None) -> str:
    """Who is to blame; `peer`: who was waited for, if one. A dead rank takes its neighbours' connections with it, so
    that living ranks seem lost, too. Those that live say so in the store (which is on rank 0, or with torchrun); who
    says nothing is dead or stopped."""
    everyone = [r for r in dist.get_process_group_ranks(pg) if r != dist.get_rank()]
    try:
        store = dist.distributed_c10d._get_default_store()
        patience = store.timeout
        store.set_timeout(datetime.timedelta(seconds=_GRACE_S))  # the store may be on the lost rank
        try:
            key = f"fused_parallel/lost_a_peer/{pg.group_name}/"
            store.set(key + str(dist.get_rank()), "1")
            end = time.monotonic() + _GRACE_S
            silent = everyone
            while silent and time.monotonic() < end:
                silent = [r for r in silent if not store.check([key + str(r)])]
                time.sleep(0.02)
        finally:
            store.set_timeout(patience)
    except RuntimeError:
        return "it is dead or stopped, or the rank that holds the group's store is (rank 0)"
    if peer in silent:
        silent = [peer]  # others may not have noticed yet
    if silent:
        return f"{_names(silent)} said nothing since: dead, stopped, or in another operation"
    return (
        "all ranks report the same, so none is dead: they run different operations or shapes (FUSED_PARALLEL_DEBUG=1 "
        "compares them)"
    )


def counting() -> bool:
    """Whether a CommunicationTimer counts now."""
    return _timer.get() is not None


def counted(tensor: torch.Tensor):
    """Count what is done within as communication of `tensor`, if a CommunicationTimer counts now."""
    return counted_bytes(tensor.numel() * tensor.element_size(), tensor.is_cuda)


def counted_bytes(bytes: int, on_gpu: bool, waiting: bool = False):
    """As `counted`, of so many bytes; `on_gpu`: it is done on the current stream of the current GPU; `waiting`: it is a
    point-to-point receive."""
    timer = _timer.get()
    # A generator's context costs a microsecond: not where nobody counts.
    return _UNCOUNTED if timer is None else _count(timer, bytes, on_gpu, waiting)


_UNCOUNTED = contextlib.nullcontext()


@contextlib.contextmanager
def _count(timer: CommunicationTimer, bytes: int, on_gpu: bool, waiting: bool):
    if on_gpu and torch.cuda.is_current_stream_capturing():
        yield
        return
    timer.calls += 1
    timer.bytes += bytes
    if on_gpu:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        yield
        end.record()
        timer._around(start, end, waiting)
    else:
        begin = time.perf_counter()
        yield
        timer._add(time.perf_counter() - begin, waiting)


@contextlib.contextmanager
def measured(op: str, tensor: torch.Tensor, pg: dist.ProcessGroup, peer: int | None = None, waiting: bool = False):
    """Count what is done within, and turn its failure into a PeerTimeoutError that names `peer` (a global rank; None:
    all others of `pg`)."""
    try:
        with counted_bytes(tensor.numel() * tensor.element_size(), tensor.is_cuda, waiting):
            yield
    except torch.OutOfMemoryError:
        raise  # this rank's own trouble
    except RuntimeError as error:
        waited = [peer] if peer is not None else [r for r in dist.get_process_group_ranks(pg) if r != dist.get_rank()]
        raise PeerTimeoutError(
            f"{op} on rank {dist.get_rank()} got no answer from {_names(waited)}; {_verdict(pg, peer)}. The group "
            "cannot be used any more: end this job on all ranks and start it again. Cause: "
            f"{str(error).splitlines()[0]}"
        ) from error


def all_gather_object(value, pg: dist.ProcessGroup) -> list:
    """Every rank's `value` (any picklable object), in rank order: for agreements outside the hot path."""
    if pg.size() == 1:
        return [value]
    values: list = [None] * pg.size()
    with measured("all_gather_object", torch.empty(0), pg):
        dist.all_gather_object(values, value, group=pg)
    return values


def all_reduce_(x: torch.Tensor, pg: dist.ProcessGroup) -> torch.Tensor:
    """Sum the contiguous `x` over the group, in place."""
    if pg.size() > 1 and x.numel():
        with measured("all_reduce", x, pg):
            dist.all_reduce(x, group=pg)
    return x


def all_gather(x: torch.Tensor, pg: dist.ProcessGroup) -> torch.Tensor:
    """[n, ...] per rank -> [world * n, ...] on every rank, in rank order along dim 0."""
    x = x.contiguous()
    if pg.size() == 1:
        return x.clone()
    out = x.new_empty((x.shape[0] * pg.size(), *x.shape[1:]))
    if x.numel():
        with measured("all_gather", out, pg):
            _all_gather(out, x, group=pg)
    return out


def reduce_scatter(x: torch.Tensor, pg: dist.ProcessGroup) -> torch.Tensor:
    """[world * n, ...] per rank -> [n, ...]: this rank's part, along dim 0, of the sum over ranks."""
    x = x.contiguous()
    if pg.size() == 1:
        return x.clone()
    out = x.new_empty((x.shape[0] // pg.size(), *x.shape[1:]))
    if x.numel():
        with measured("reduce_scatter", x, pg):
            _reduce_scatter(out, x, group=pg)
    return out


def broadcast_(x: torch.Tensor, src: int, pg: dist.ProcessGroup) -> torch.Tensor:
    """Overwrite the contiguous `x` with that of group rank `src`."""
    if pg.size() > 1 and x.numel():
        source = dist.get_global_rank(pg, src)
        with measured("broadcast", x, pg, peer=None if source == dist.get_rank() else source):
            dist.broadcast(x, source, group=pg)
    return x


def send(x: torch.Tensor, dst: int, pg: dist.ProcessGroup) -> None:
    """Send the contiguous `x` to group rank `dst`, which calls `recv_` with the same shape and dtype."""
    peer = dist.get_global_rank(pg, dst)
    if x.numel():
        with measured("send", x, pg, peer=peer):
            dist.send(x, peer, group=pg)


def recv_(x: torch.Tensor, src: int, pg: dist.ProcessGroup) -> torch.Tensor:
    """Fill the contiguous `x` with what group rank `src` sends."""
    peer = dist.get_global_rank(pg, src)
    if x.numel():
        with measured("recv", x, pg, peer=peer):
            dist.recv(x, peer, group=pg)
    return x
