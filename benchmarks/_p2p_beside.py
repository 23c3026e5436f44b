"""Parts `matmul` and `causes` of bench_p2p: a matmul beside a stream of messages, and what of it is in its way."""

from __future__ import annotations

import ctypes
import functools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _common import Bench
from _p2p_hops import Fused, Library, Symmetric, synchronize

from fused_parallel.comm.topology import sm_clock_mhz
from fused_parallel.testing.timer import quantile

BESIDE_BYTES = 64 << 20
PAIRS = 40


class Matmul:
    """An 8192^3 matmul of this rank, timed beside something on another stream, in turns with the matmul alone."""

    def __init__(self, bench: Bench, size: int = 8192, calls: int = 10) -> None:
        self.bench, self.size, self.calls = bench, size, calls
        self.a, self.b = (bench.random(size, size, seed=s) for s in (1, 2))
        self.out = torch.empty_like(self.a)
        self.side, self.main = torch.cuda.Stream(priority=-1), torch.cuda.Stream()

    def timed(self, beside: Callable[[int], None] | None, times: int, here: bool = True) -> tuple[float, bool, int]:
        """(us per matmul, whether `beside(i)`, i < times, went on until the last matmul ended, SM clock in MHz);
        `here`: whether this rank multiplies."""
        start, end, idle, began = (torch.cuda.Event(enable_timing=True) for _ in range(4))
        synchronize(self.bench)
        with torch.cuda.stream(self.side):
            for i in range(times if beside else 0):
                beside(i)
                if i == 0:
                    began.record()
            idle.record()
        with torch.cuda.stream(self.main):
            if beside:
                self.main.wait_event(began)
            torch.cuda._sleep(200_000)
            start.record()
            for _ in range(self.calls if here else 0):
                torch.matmul(self.a, self.b, out=self.out)
            end.record()
        time.sleep(6e-3)  # amid the matmuls, 14 ms
        clock = sm_clock_mhz(self.bench.device.index) or 0
        torch.cuda.synchronize()
        return 1e3 * start.elapsed_time(end) / self.calls, not beside or end.elapsed_time(idle) >= 0, clock

    def pairs(self, beside: Callable[[int], None], times: int, here: bool, pairs: int):
        """Of this rank: (us alone, us beside, MHz alone, MHz beside) of each pair, and whether all were covered."""
        for _ in range(3):
            self.timed(beside, times, here)
        found, covered = [], True
        for number in range(pairs):
            pair: dict[bool, tuple[float, int]] = {}
            for with_it in ((True, False), (False, True))[number % 2]:
                us, whole, clock = self.timed(beside if with_it else None, times, here)
                pair[with_it] = us, clock
                covered &= whole or not here
            found.append((pair[False][0], pair[True][0], pair[False][1], pair[True][1]))
        return found, covered

    def alone(self) -> float:
        """Microseconds, of the slower rank."""
        return max(self.bench.everyone(self.timed(None, 0)[0]))


def beside_messages(bench: Bench) -> None:
    """The matmul alone and beside a stream of messages, in turns."""
    matmul, x = Matmul(bench), bench.random(BESIDE_BYTES // bench.dtype.itemsize, seed=3)
    floor = bench.ceilings.matmul_us(*[matmul.size] * 3, bench.dtype.itemsize)
    about = {"shape": {"bytes": BESIDE_BYTES}, "bytes": 3 * matmul.a.nbytes, "floor_us": floor}
    for impl, make in (("fused", Fused), ("nccl", Library), ("fused_push", lambda b, n: Fused(b, n, 1, 1 << 40))):
        hops = bench.attempt(f"matmul beside {impl}", lambda make=make: make(bench, BESIDE_BYTES))
        if hops is None:
            continue
        # As long as the matmuls last, and half as long again: 64 MB take some 170 us.
        messages = int(1.5 * matmul.alone() * matmul.calls / bench.ceilings.transfer_us(BESIDE_BYTES)) + 5
        beside = functools.partial(_message, hops, x)
        found, covered = matmul.pairs(beside, messages, True, PAIRS)
        ratios = [r / s for s, r, *_ in found]
        told = bench.everyone((quantile(ratios, 0.2), quantile(ratios, 0.5), quantile(ratios, 0.8), covered))
        for rank, (p20, p50, p80, whole) in enumerate(told):
            note = "" if whole else "; messages ended before the matmuls: not comparable"
            bench.say(f"matmul beside {impl}, rank {rank}: x{p50:.4f} (p20 {p20:.4f}, p80 {p80:.4f}){note}")
        if all(whole for *_, whole in told):
            bench.record("p2p", "matmul_only", "eager", [s for s, *_ in found], **about)
            bench.record("p2p", f"matmul_beside_{impl}", "eager", [r for _, r, *_ in found], **about)
        synchronize(bench)
        hops.close()


def _message(hops, x: torch.Tensor, _: int) -> None:
    hops.send(x) if hops.rank == 0 else hops.receive(x)


def causes(bench: Bench, pairs: int = 12) -> None:
    """What of a stream of 64 MB messages slows a matmul: each line leaves something out."""
    matmul, rank = Matmul(bench), bench.pg.rank()
    x = bench.random(BESIDE_BYTES // bench.dtype.itemsize, seed=3)
    own, small = torch.empty_like(x), x[:8]
    host = bench.attempt("pinned memory", lambda: torch.empty(x.shape, dtype=x.dtype, pin_memory=True))
    wide = bench.attempt("causes", lambda: Fused(bench, BESIDE_BYTES))
    copying = bench.attempt("causes", lambda: Fused(bench, 1 << 12, 1, -1))  # waits and flags, all but no data
    raw = bench.attempt("causes", lambda: Symmetric(bench, BESIDE_BYTES))
    if wide is None or copying is None or raw is None or host is None:
        return
    alone, us = matmul.alone(), bench.ceilings.transfer_us(BESIDE_BYTES)
    cycles = int(us * 1e-6 * 1.7e9)  # about one message's time
    bench.say(f"\nan 8192^3 matmul takes {alone:.0f} us alone, 64 MB some {us:.0f} us; median ratios:")

    def message(i: int, hops=wide, tensor=x, gap: int = 0) -> None:
        if gap and rank == 0:
            torch.cuda._sleep(gap * cycles)  # one thread on one multiprocessor
        _message(hops, tensor, i)

    def copy(i: int) -> None:
        if rank == 0:
            raw.theirs.copy_(x)

    # what, beside(i), us of one, ranks that multiply
    lines = [
        ("messages 0 -> 1 (waits, flags, copies)", message, us, (0, 1)),
        ("the same, only rank 0 (sender) multiplies", message, us, (0,)),
        ("the same, only rank 1 (receiver) multiplies", message, us, (1,)),
        ("copies 0 -> 1 without waits and flags", copy, us, (0, 1)),
        (
            "waits and flags: 16 bytes every message's time",
            functools.partial(message, hops=copying, tensor=small, gap=1),
            us,
            (0, 1),
        ),
        ("messages, a gap of 3 times their length", functools.partial(message, gap=3), 4 * us, (0, 1)),
        ("a sleeping thread alone, no data", lambda i: torch.cuda._sleep(cycles), us, (0, 1)),
        ("copies within each GPU (torch's copy)", lambda i: own.copy_(x), us / 5, (0, 1)),
        ("copies to the host's pinned memory", lambda i: host.copy_(x, non_blocking=True), 6 * us, (0, 1)),
    ]
    marks = bench.attempt("stream memory operations", lambda: _Marks(bench))
    if marks is not None:  # last: its waits have no bound

        def marked(i: int) -> None:
            marks.before(rank)
            copy(i)
            marks.after(rank)

        lines.append(("copies, waits and flags by stream memory operations", marked, us, (0, 1)))
    for what, beside, each, multiply in lines:
        times = int(2 * alone * matmul.calls / each) + 5
        found, covered = matmul.pairs(beside, times, rank in multiply, pairs)
        mine = None
        if rank in multiply:
            covered |= beside is copy and rank == 1  # which queues nothing
            ratio = quantile([b / a for a, b, *_ in found], 0.5)
            mine = ratio, *(quantile([row[k] for row in found], 0.5) for k in (2, 3)), covered
        told = bench.everyone(mine)
        cells = [
            f"rank {r}: x{t[0]:.4f}, SM {t[1]:.0f} -> {t[2]:.0f} MHz{'' if t[3] else ' (ended early)'}"
            for r, t in enumerate(told)
            if t is not None
        ]
        bench.say(f"  {what:<52} {'   '.join(cells)}")
    # Last: the profiler may leave launches slower.
    bench.say(f"  its kernel: {_kernel(matmul)}\n")
    synchronize(bench)
    for hops in (wide, copying):
        hops.close()


class _Marks:
    """A flag and a credit of copies from rank 0 to rank 1, set and awaited by the stream itself: no kernel."""

    GEQ = 0  # CU_STREAM_WAIT_VALUE_GEQ

    def __init__(self, bench: Bench) -> None:
        self.driver, self.count = ctypes.CDLL("libcuda.so.1"), 0
        words = Symmetric(bench, 4096)
        self.words = words
        self.mine, self.theirs = words.buffer.data_ptr(), words.theirs.data_ptr()
        words.buffer.zero_()
        torch.cuda.synchronize()
        spare = words.buffer[1024:]
        self._call("cuStreamWriteValue32_v2", spare.data_ptr(), 7)
        self._call("cuStreamWaitValue32_v2", spare.data_ptr(), 7)
        torch.cuda.synchronize()
        if spare.view(torch.int32)[0].item() != 7:
            raise RuntimeError("a stream memory write did not arrive")

    def _call(self, function: str, address: int, value: int) -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        code = getattr(self.driver, function)(
            stream, ctypes.c_uint64(address), ctypes.c_uint32(value), ctypes.c_uint(self.GEQ)
        )
        if code != 0:
            raise RuntimeError(f"{function}: CUDA error {code}")

    def before(self, rank: int) -> None:
        """Rank 0 waits for the copy before the last to be taken, rank 1 for this one."""
        self.count += 1
        awaited = self.count if rank == 1 else self.count - 2
        if awaited > 0:
            self._call("cuStreamWaitValue32_v2", self.mine, awaited)

    def after(self, rank: int) -> None:
        """Rank 0 says that the copy is there, rank 1 that it is taken."""
        self._call("cuStreamWriteValue32_v2", self.theirs, self.count)


def _kernel(matmul: Matmul) -> str:
    """The matmul's kernel and what it leaves free on a multiprocessor, as the profiler sees it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        try:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                torch.matmul(matmul.a, matmul.b, out=matmul.out)
                torch.cuda.synchronize()
            profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
            kernel = next(e for e in events if e.get("cat") == "kernel")
        except (RuntimeError, AssertionError, OSError, ValueError, StopIteration) as error:
            return f"not known, {type(error).__name__}: {error}"
    known = {key: kernel["args"].get(key) for key in ("grid", "block", "registers per thread", "shared memory")}
    return f"{kernel['name']} {known}"
