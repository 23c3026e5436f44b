"""One hop of a message between two GPUs: send, flight, wait.

    torchrun --nproc-per-node 2 benchmarks/bench_p2p.py [--parts hops sums host matmul causes] [--bytes 16384 ...]

Without torchrun it starts one rank a GPU. A row is written as soon as it is measured. Parts:

hops: calls alternate in direction, each waits for the one before it, so a call is one hop: send, flight and wait; a
message is released after the answer has been sent.

    fused                fp.comm.P2PChannel through the peer's memory
    fused_push           the same, every size pushed by multiprocessors
    fused_copy           the same, every size sent by the copy engine
    nccl                 dist.send and dist.recv (gloo with --device cpu)
    torch_symmetric      a copy into torch's symmetric memory, put_signal and wait_signal

sums (p2p_sum): there and back, each end adds its own to what it got and sends on the sum, as the last layer of a stage.

    fused_sum            send(got, add): the kernel that pushes adds
    fused_add_send       send(got + add): two kernels
    fused_add_open       the addition writes to the peer's slot, which `open` gave before the message was there: the
                         kernel that waits for the slot is off the path, the flag's is on it
    nccl                 dist.recv, addition, dist.send

host: host time of one eager send whose slot is free (16 KB): *_host_only the mean of 32 in a row; of the first one
after a pause, and of the extension's call alone, the medians are printed.

matmul: matmul_only is an 8192^3 matmul of both ranks, alone, matmul_beside_* the same beside a stream of 64 MB messages
from rank 0 to rank 1, in turns with the one above; the ratios of the pairs are printed.

causes: a table (no rows in the CSV) of what slows that matmul: copies alone, waits alone, one rank's matmul, gaps
between messages, copies within a GPU, waits without kernels; with the SM clock of both.

`bytes`: the message (of matmuls: the operands and the result); `floor_us`: launch + bytes over the link (the matmul's).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from _common import Bench, main, parser

import fused_parallel as fp
from fused_parallel.comm.topology import sm_clock_mhz
from fused_parallel.testing.timer import quantile

SIZES = (16 << 10, 128 << 10, 1 << 20, 16 << 20, 128 << 20, 4 << 20)
SUM_SIZES = (16 << 10, 128 << 10, 1 << 20)
BESIDE_BYTES = 64 << 20
PAIRS = 40
PARTS = ("hops", "sums", "host", "matmul", "causes")


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
        capturing = _is_capturing()
        self.captured += capturing
        # What was captured is released in the same capture: the last call keeps nothing.
        keep = received and capturing and self.captured % self.calls != 0
        if self.held is not None and not keep:
            self.held.release()
            self.held = None

    def close(self) -> None:
        self.channel.close()


def _is_capturing() -> bool:
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


def _check(hops, x: torch.Tensor, of_rank: Callable[[int], torch.Tensor]) -> float:
    """A message each way, compared bit by bit with what the other rank drew."""
    mine, out = of_rank(hops.rank), torch.full_like(x, float("nan"))
    for sender in (0, 1):
        if hops.rank == sender:
            hops.send(mine)
        else:
            hops.receive(x, out)
    return 0.0 if torch.equal(out, of_rank(1 - hops.rank)) else float("inf")


def _drawn(bench: Bench, size: int, rank: int) -> torch.Tensor:
    """What `rank` sends to be checked; every rank can draw it."""
    generator = torch.Generator(bench.device).manual_seed(rank + 1)
    return torch.empty(size, device=bench.device, dtype=bench.dtype).normal_(generator=generator)


def _hops(bench: Bench, impl: str, make: Callable, bytes: int) -> None:
    calls = 20 if bytes <= 16 << 20 else 8
    hops = bench.attempt(f"p2p {impl}", lambda: make(bench, bytes, calls))
    if hops is None:
        return
    count = itertools.count()

    def fn(x: torch.Tensor) -> None:
        hops.send(x) if next(count) % 2 == hops.rank else hops.receive(x)

    bench.measure(
        "p2p",
        impl,
        fn,
        lambda i: (bench.random(bytes // bench.dtype.itemsize, seed=i),),
        shape={"bytes": bytes},
        bytes=bytes,
        floor_us=bench.ceilings and bench.ceilings.launch_us + bench.ceilings.transfer_us(bytes),
        check=lambda inputs: _check(hops, *inputs, lambda r: _drawn(bench, bytes // bench.dtype.itemsize, r)),
        calls=calls,
    )
    _synchronize(bench)
    fp.check()
    hops.close()


def _synchronize(bench: Bench) -> None:
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier(group=bench.pg)


class Sums:
    """Round trips in which each end adds its own tensor to what it got and sends on the sum. Before the first, `prime`
    puts a message on its way to rank 1; after the last, `drain` takes it."""

    def __init__(self, bench: Bench, bytes: int) -> None:
        self.rank, self.bytes = bench.pg.rank(), bytes
        self.spec = (bytes // bench.dtype.itemsize,), bench.dtype
        # A round trip is a message each way and a graph holds 20: with 4 slots the message on its way between graphs
        # lies in the slot that the next replay expects.
        self.channel = fp.comm.P2PChannel(bench.pg, 1 - self.rank, slots=4, slot_bytes=bytes)

    def prime(self, x: torch.Tensor) -> None:
        if self.rank == 0:
            self.channel.send(x)

    def drain(self) -> None:
        if self.rank == 1:
            self.channel.recv(self.spec).release()
        self.channel.close()

    def __call__(self, add: torch.Tensor, out: torch.Tensor | None = None) -> None:
        """`out`: also a copy of what came."""
        with self.channel.recv(self.spec) as got:
            if out is not None:
                out.copy_(got)
            self.channel.send(got, add)


class AddSend(Sums):
    def __call__(self, add: torch.Tensor, out: torch.Tensor | None = None) -> None:
        with self.channel.recv(self.spec) as got:
            if out is not None:
                out.copy_(got)
            self.channel.send(got + add)


class AddOpen(Sums):
    def __call__(self, add: torch.Tensor, out: torch.Tensor | None = None) -> None:
        with contextlib.ExitStack() as stack:
            slot = stack.enter_context(self.channel.open(self.spec))
            received = self.channel.recv(self.spec)
            if out is not None:
                out.copy_(received.tensors)
            torch.add(received.tensors, add, out=slot)
        received.release()


class LibrarySums(Sums):
    """Nothing is on its way between round trips, which not every library would hold: rank 0 sends first."""

    def __init__(self, bench: Bench, bytes: int) -> None:
        self.rank, size = bench.pg.rank(), bytes // bench.dtype.itemsize
        self.got, self.sum = (torch.empty(size, dtype=bench.dtype, device=bench.device) for _ in range(2))

    def prime(self, x: torch.Tensor) -> None:
        self.sum.copy_(x)

    def drain(self) -> None:
        pass

    def __call__(self, add: torch.Tensor, out: torch.Tensor | None = None) -> None:
        if self.rank == 0:
            dist.send(self.sum, 1)
        dist.recv(self.got, 1 - self.rank)
        if out is not None:
            out.copy_(self.got)
        torch.add(self.got, add, out=self.sum)
        if self.rank == 1:
            dist.send(self.sum, 0)


def _check_sums(sums: Sums, x: torch.Tensor, of_rank: Callable[[int], torch.Tensor]) -> float:
    """Prime, one round trip: rank 1 gets what rank 0 drew, rank 0 that and what rank 1 drew, bit by bit."""
    first, second = of_rank(0), of_rank(1)
    out = torch.full_like(x, float("nan"))
    sums.prime(first)
    sums(of_rank(sums.rank), out)
    return 0.0 if torch.equal(out, first if sums.rank == 1 else first + second) else float("inf")


def _sums(bench: Bench, bytes: int) -> None:
    impls = {"fused_sum": Sums, "fused_add_send": AddSend, "fused_add_open": AddOpen, bench.backend: LibrarySums}
    for impl, make in impls.items():
        if bench.arguments.impls and impl not in bench.arguments.impls:
            continue
        sums = bench.attempt(f"p2p_sum {impl}", lambda make=make: make(bench, bytes))
        if sums is None:
            continue
        size = bytes // bench.dtype.itemsize
        bench.measure(
            "p2p_sum",
            impl,
            sums,
            lambda i, size=size: (bench.random(size, seed=i),),
            shape={"bytes": bytes},
            bytes=2 * bytes,
            floor_us=bench.ceilings and 2 * (bench.ceilings.launch_us + bench.ceilings.transfer_us(bytes)),
            check=lambda inputs, sums=sums, size=size: _check_sums(sums, *inputs, lambda r: _drawn(bench, size, r)),
        )
        sums.drain()
        _synchronize(bench)
        fp.check()


def _host_time(bench: Bench, bytes: int = 16 << 10, sends: int = 32) -> None:
    """Host time of sends that need not wait; the other rank's receives are not counted."""
    for impl, make in (("fused_host_only", Fused), (f"{bench.backend}_host_only", Library)):
        hops, x = make(bench, bytes, slots=sends), bench.random(bytes // bench.dtype.itemsize, seed=1)
        firsts, means, natives = [], [], []
        native = impl.startswith("fused") and hops.channel.transport == "memory"
        for number in range(60):
            if native and number == 40:  # the last rounds: how much of it is the extension's call
                hops.channel._transport.native = _Timed(hops.channel._transport.native, natives)
            _synchronize(bench)
            took = []
            for _ in range(sends):
                if hops.rank == 0:
                    begin = time.perf_counter()
                    hops.send(x)
                    took.append(1e6 * (time.perf_counter() - begin))
                else:
                    hops.receive(x)
            if took and 10 <= number < 40:
                firsts.append(took[0]), means.append(sum(took) / sends)
        firsts, means, natives = bench.everyone((firsts, means, natives))[0]  # rank 0 sends
        bench.record("p2p", impl, "eager", means, shape={"bytes": bytes}, bytes=bytes)
        told = f"  the first after a pause {quantile(firsts, 0.5):.2f} us"
        bench.say(told + (f"; the extension's call {quantile(natives, 0.5):.2f} us" if natives else ""))
        _synchronize(bench)
        hops.close()


class _Timed:
    """The extension's end of a channel, with the microseconds of each push in `times`."""

    def __init__(self, native, times: list[float]) -> None:
        self.native, self.times = native, times

    def push(self, *arguments) -> None:
        begin = time.perf_counter()
        self.native.push(*arguments)
        self.times.append(1e6 * (time.perf_counter() - begin))

    def __getattr__(self, name: str):
        return getattr(self.native, name)


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
        _synchronize(self.bench)
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


def _beside(bench: Bench) -> None:
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
        _synchronize(bench)
        hops.close()


def _message(hops, x: torch.Tensor, _: int) -> None:
    hops.send(x) if hops.rank == 0 else hops.receive(x)


def _causes(bench: Bench, pairs: int = 12) -> None:
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
    _synchronize(bench)
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


def run(arguments: argparse.Namespace) -> int:
    bench = Bench(arguments)
    if bench.world != 2:
        raise SystemExit(f"bench_p2p: two ranks, got {bench.world}: torchrun --nproc-per-node 2 ...")
    on_gpu = bench.device.type == "cuda"
    impls = {"fused": Fused, bench.backend: Library}
    if on_gpu:
        impls |= {
            "fused_push": lambda b, n, calls: Fused(b, n, calls, 1 << 40),
            "fused_copy": lambda b, n, calls: Fused(b, n, calls, -1),
            "torch_symmetric": Symmetric,
        }
    with torch.no_grad():
        for bytes in arguments.bytes if "hops" in arguments.parts else ():
            for impl, make in impls.items():
                _hops(bench, impl, make, bytes)
        for bytes in SUM_SIZES if "sums" in arguments.parts else ():
            _sums(bench, bytes)
        if "host" in arguments.parts:
            _host_time(bench)
        if on_gpu and "matmul" in arguments.parts:
            _beside(bench)
        if on_gpu and "causes" in arguments.parts:
            _causes(bench)
    code = bench.finish()
    return 0 if list(arguments.parts) == ["causes"] else code  # which has no rows


if __name__ == "__main__":
    p = parser(__doc__)
    p.add_argument("--bytes", type=int, nargs="+", default=SIZES)
    p.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    main(run, p)
