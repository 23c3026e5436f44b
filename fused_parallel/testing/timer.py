"""The one timer of tests and benchmarks: collectives and single-GPU kernels, in CUDA graphs, eager, or on CPUs."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..comm.groups import resolve_group

ROTATION_BYTES = 256 << 20  # several times the largest L2 there is, so that no input is found in it
_LEAD_CYCLES = 400_000  # about 0.2 ms on the device, in which the host gets ahead of it


@dataclass(frozen=True)
class Timing:
    """Microseconds per call on the slowest rank, the one with the largest median.

    `skew_pct` is how far the fastest rank's median lies below the slowest's, in per cent of the slowest's.
    """

    us_p20: float
    us_p50: float
    us_p80: float
    skew_pct: float


@dataclass(frozen=True)
class Comparison:
    """Two functions timed in turns. `ratio_*` are quantiles over the rounds of ours / peer: below 1, ours is faster.

    `sm_mhz` holds the SM clock's (lowest, median, highest) reading over the rounds on this rank's GPU; None without
    nvidia-ml-py.
    """

    ours: Timing
    peer: Timing
    ratio_p20: float
    ratio_p50: float
    ratio_p80: float
    sm_mhz: tuple[int, int, int] | None


def quantile(values: Sequence[float], q: float) -> float:
    """The `q`-quantile (0 to 1) of `values`, linear between neighbours."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def rotation_sets(set_bytes: int, calls: int, mutates: bool = False) -> int:
    """How many input sets of `set_bytes` each `calls` calls are given in turn (see `time_collective`)."""
    if mutates:
        return calls
    return min(calls, max(1, math.ceil(ROTATION_BYTES / max(1, set_bytes))))


def time_collective(
    fn: Callable,
    *,
    inputs: Callable[[int], tuple] | None = None,
    group=None,
    mode: str = "graph",
    mutates: bool = False,
    calls: int = 20,
    rounds: int = 30,
    warmup: int = 3,
    device: str | torch.device | None = None,
    after_capture: Callable[[], object] | None = None,
) -> Timing:
    """Time `fn` on all ranks of a group at once.

    Args:
        fn: called as `fn(*inputs(i))` on this rank. Its outputs are dropped.
        inputs: `inputs(i)` makes input set `i`, a tuple, in random data on this rank's device. The calls of a round
            take the sets in turn; there are as many as total 256 MB, at most one a call. Where one set a call is less
            than 256 MB, other memory is read between rounds to make up for it: no call finds its input in the L2.
            None: `fn()` has no inputs, or what it reads may stay in the cache.
        group: ProcessGroup or 1-D DeviceMesh whose ranks all make this call; None: this process alone.
        mode: "graph" times replays of a CUDA graph of `calls` calls, launch costs of the host excluded; "eager" times
            the calls as Python makes them. On CPUs only "eager".
        mutates: `fn` overwrites its inputs: each call of a round has its own set, restored before every round.
        calls: calls in a round; rounds: how often a round is measured; warmup: unmeasured rounds before.
        device: default that of the inputs, else the current GPU if there is one, else the CPU.
        after_capture: called on every rank once its graph is captured, before the first replay; never in mode "eager".
            For functions whose captured calls need more before they can run, such as addresses from other ranks.

    Returns:
        Timing, the same on all ranks. On GPUs by device events on a stream of its own; every round starts with a
        barrier on that stream (graph) or across the hosts (eager, CPU). Synchronises the device.

    Raises:
        ValueError: unknown mode, graph mode on a CPU, or a count below 1.
    """
    subject = Subject(fn, inputs, group, mode, mutates, calls, device, after_capture)
    return time_in_turns([subject], rounds, warmup)[0]


def time_in_turns(subjects: Sequence[Subject], rounds: int = 30, warmup: int = 3) -> list[Timing]:
    """Time several functions, a round of one after a round of the other, the first of them changing from turn to turn:
    all of them at the clocks and the power that all of them together leave, which a matmul lowers for what runs next.

    The subjects, of one group, are timed on the stream of the first; `rounds` and `warmup` are of each. The Timing of
    each, the same on all ranks.
    """
    _check_count("rounds", rounds, 1)
    everyone = _gather(subjects[0].pg, _take_turns(subjects, rounds, warmup))
    return [_timing([rank[number] for rank in everyone]) for number in range(len(subjects))]


def _take_turns(
    subjects: Sequence[Subject], rounds: int, warmup: int, after_turn: Callable[[], object] = lambda: None
) -> list[list[float]]:
    """This rank's microseconds per call in each round of each subject. `after_turn`: while the device is at work."""
    for subject in subjects[1:]:
        if subject.stream is not None:
            subjects[0].stream.wait_stream(subject.stream)  # which waits for its inputs
        subject.stream = subjects[0].stream  # rounds on streams of their own would overlap
    for _ in range(warmup):
        for subject in subjects:
            subject.round()
    measured: list[list[Callable[[], float]]] = [[] for _ in subjects]
    for number in range(rounds):
        for turn in range(len(subjects)):
            at = (number + turn) % len(subjects)
            measured[at].append(subjects[at].round())
        after_turn()
    return [[1e6 * seconds() / subject.calls for seconds in of] for subject, of in zip(subjects, measured, strict=True)]


def gather_timing(us: Sequence[float], group) -> Timing:
    """Timing of microseconds that each rank of `group` measured itself, the same on all of them."""
    return _timing(_gather(resolve_group(group), list(us)))


def compare(
    ours: Callable,
    peer: Callable,
    *,
    inputs: Callable[[int], tuple] | None = None,
    peer_inputs: Callable[[int], tuple] | None = None,
    group=None,
    mode: str = "graph",
    mutates: bool = False,
    calls: int = 20,
    rounds: int = 30,
    warmup: int = 3,
    device: str | torch.device | None = None,
) -> Comparison:
    """Time two functions in turns, for margins smaller than the drift of clocks and power.

    Each round runs `calls` calls of one and then of the other, the order changing from round to round, and gives one
    ratio of their times (each the slowest rank's). `peer_inputs` defaults to `inputs`; the rest as `time_collective`.
    `rounds` is at least 30.
    """
    _check_count("rounds", rounds, 30)
    a = Subject(ours, inputs, group, mode, mutates, calls, device)
    b = Subject(peer, peer_inputs or inputs, group, mode, mutates, calls, device)
    clocks: list[int | None] = []
    everyone = _gather(a.pg, _take_turns([a, b], rounds, warmup, lambda: clocks.append(_sm_mhz(a.device))))
    slowest_a = [max(rank) for rank in zip(*(t[0] for t in everyone), strict=True)]
    slowest_b = [max(rank) for rank in zip(*(t[1] for t in everyone), strict=True)]
    ratios = [x / y for x, y in zip(slowest_a, slowest_b, strict=True)]
    seen = sorted(mhz for mhz in clocks if mhz is not None)
    return Comparison(
        ours=_timing([t[0] for t in everyone]),
        peer=_timing([t[1] for t in everyone]),
        ratio_p20=quantile(ratios, 0.2),
        ratio_p50=quantile(ratios, 0.5),
        ratio_p80=quantile(ratios, 0.8),
        sm_mhz=(seen[0], seen[len(seen) // 2], seen[-1]) if seen else None,
    )


class Subject:
    """A function with its input sets, captured if need be; the arguments as of `time_collective`. `round()` runs it
    `calls` times and returns a function that waits for its end and gives the seconds that took."""

    def __init__(
        self, fn, inputs=None, group=None, mode="graph", mutates=False, calls=20, device=None, after_capture=None
    ):
        if mode not in ("graph", "eager"):
            raise ValueError(f'timer: mode must be "graph" or "eager", got {mode!r}')
        _check_count("calls", calls, 1)
        self.fn, self.calls, self.after_capture = fn, calls, after_capture
        self.pg = resolve_group(group) if group is not None else None
        first = _as_tuple(inputs(0)) if inputs else ()
        tensors = _tensors(first)
        self.device = torch.device(device) if device is not None else _device_of(tensors)
        if self.device.type != "cuda" and mode == "graph":
            raise ValueError(f'timer: mode="graph" needs a GPU, the inputs are on {self.device}; use mode="eager"')
        set_bytes = sum(t.numel() * t.element_size() for t in tensors)
        count = rotation_sets(set_bytes, calls, mutates) if tensors else 1
        self.sets = [first, *(_as_tuple(inputs(i)) for i in range(1, count))]
        # On what fn overwrites: the values as made, to start every round from.
        self.fresh = [[t.clone() for t in _tensors(s)] for s in self.sets] if mutates else None
        self.round, self.stream = self._cpu_round, None
        if self.device.type == "cuda":
            if self.device.index is None:
                self.device = torch.device("cuda", torch.cuda.current_device())
            missing = ROTATION_BYTES - count * set_bytes if tensors else 0
            self.filler = torch.ones(max(0, missing) // 4, device=self.device)
            self.flag = torch.zeros(1, device=self.device)
            self.stream = torch.cuda.Stream(self.device)
            self.stream.wait_stream(torch.cuda.current_stream(self.device))  # all of this was made there
            self.round = self._graph_round if mode == "graph" else self._eager_round
            if mode == "graph":
                self.graph = self._capture()

    def _run(self) -> None:
        for number in range(self.calls):
            self.fn(*self.sets[number % len(self.sets)])

    @torch.no_grad()
    def _capture(self) -> torch.cuda.CUDAGraph:
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            for number in range(min(3, self.calls)):  # workspaces, handles and compilation stay out of the capture
                self.fn(*self.sets[number % len(self.sets)])
            self._restore()
            torch.cuda.synchronize(self.device)
            if self.pg is not None and self.pg.size() > 1:
                dist.barrier(group=self.pg)
            graph = torch.cuda.CUDAGraph()
            # A graph of an earlier subject that is collected meanwhile breaks the capture.
            gc.collect()
            gc.disable()
            try:
                with torch.cuda.graph(graph, stream=self.stream):
                    self._run()
            finally:
                gc.enable()
            if self.after_capture is not None:
                self.after_capture()
        return graph

    def _restore(self) -> None:
        if self.fresh is not None:
            for values, fresh in zip(self.sets, self.fresh, strict=True):
                for tensor, value in zip(_tensors(values), fresh, strict=True):
                    tensor.copy_(value)

    def _prepare(self) -> None:
        self._restore()
        if self.filler.numel():
            self.filler.sum()  # read, not written: dirty lines would be written back inside the measurement

    def _align(self) -> None:
        if self.pg is not None and self.pg.size() > 1:
            dist.all_reduce(self.flag, group=self.pg)

    @torch.no_grad()
    def _graph_round(self) -> Callable[[], float]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            self._prepare()
            torch.cuda._sleep(_LEAD_CYCLES)  # the host launches all that follows before the device reaches it
            self._align()
            start.record()
            self.graph.replay()
            end.record()
        return lambda: _seconds(start, end)

    @torch.no_grad()
    def _eager_round(self) -> Callable[[], float]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            self._prepare()
            self._align()
            self.stream.synchronize()
            start.record()
            self._run()
            end.record()
        return lambda: _seconds(start, end)

    @torch.no_grad()
    def _cpu_round(self) -> Callable[[], float]:
        self._restore()
        if self.pg is not None and self.pg.size() > 1:
            dist.barrier(group=self.pg)
        begin = time.perf_counter()
        self._run()
        took = time.perf_counter() - begin
        return lambda: took


def _check_count(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"timer: {name} must be at least {least}, got {value}")


def _as_tuple(values) -> tuple:
    return tuple(values) if isinstance(values, (tuple, list)) else (values,)


def _tensors(values) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    if isinstance(values, (tuple, list)):
        return [t for v in values for t in _tensors(v)]
    return []


def _device_of(tensors: list[torch.Tensor]) -> torch.device:
    if tensors:
        return tensors[0].device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _seconds(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def _gather(pg: dist.ProcessGroup | None, mine) -> list:
    if pg is None or pg.size() == 1:
        return [mine]
    everyone: list = [None] * pg.size()
    dist.all_gather_object(everyone, mine, group=pg)
    return everyone


def _timing(everyone: list[list[float]]) -> Timing:
    medians = [quantile(rank, 0.5) for rank in everyone]
    slowest = everyone[medians.index(max(medians))]
    return Timing(
        us_p20=quantile(slowest, 0.2),
        us_p50=max(medians),
        us_p80=quantile(slowest, 0.8),
        skew_pct=100 * (max(medians) - min(medians)) / max(medians),
    )


def _sm_mhz(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    from ..comm.topology import sm_clock_mhz

    return sm_clock_mhz(device.index)
