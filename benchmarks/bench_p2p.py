"""One hop of a message between two GPUs: send, flight, wait.

    torchrun --nproc-per-node 2 benchmarks/bench_p2p.py [--bytes 16384 131072 ...] [--no-matmul]

Without torchrun it starts one rank a GPU. Calls alternate in direction, each waits for the one before it, so a call is
one hop: send, flight and wait; a message is released after the answer has been sent. Rows:

    fused                fp.comm.P2PChannel through the peer's memory
    fused_push           the same, every size pushed by multiprocessors
    fused_copy           the same, every size sent by the copy engine
    nccl                 dist.send and dist.recv (gloo with --device cpu)
    torch_symmetric      a copy into torch's symmetric memory, put_signal and wait_signal
    *_host_only          host time of one eager send whose slot is free (16 KB)
    matmul_only          an 8192^3 matmul of both ranks, alone
    matmul_beside_*      the same beside a stream of 64 MB messages from rank 0 to rank 1, in turns with the one above;
                         the ratios of the pairs are printed

`bytes`: the message (of matmuls: the operands and the result); `floor_us`: launch + bytes over the link (the matmul's).
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from _common import Bench, main, parser

import fused_parallel as fp
from fused_parallel.testing.timer import quantile

SIZES = (16 << 10, 128 << 10, 1 << 20, 2 << 20, 4 << 20, 16 << 20, 128 << 20)
BESIDE_BYTES = 64 << 20
PAIRS = 40


class Fused:
    """Hops over a channel; `push_bytes`: largest pushed message, None for the default.

    As a stage of a pipeline does, it releases a message after it has sent its own: in a captured round of `calls` calls
    the release is not between a message and the answer to it, but for the last.
    """

    def __init__(self, bench: Bench, bytes: int, calls: int = 1, push_bytes: int | None = None) -> None:
        self.rank = bench.pg.rank()
        slots = 4 if bytes <= 16 << 20 else 2
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

    def __init__(self, bench: Bench, bytes: int, calls: int = 1) -> None:
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


def _hops(bench: Bench, impl: str, make: Callable, bytes: int) -> None:
    calls = 20 if bytes <= 16 << 20 else 8
    hops = bench.attempt(f"p2p {impl}", lambda: make(bench, bytes, calls))
    if hops is None:
        return
    count = itertools.count()

    def fn(x: torch.Tensor) -> None:
        hops.send(x) if next(count) % 2 == hops.rank else hops.receive(x)

    def of_rank(rank: int) -> torch.Tensor:
        generator = torch.Generator(bench.device).manual_seed(rank + 1)
        size = bytes // bench.dtype.itemsize
        return torch.empty(size, device=bench.device, dtype=bench.dtype).normal_(generator=generator)

    bench.measure(
        "p2p",
        impl,
        fn,
        lambda i: (bench.random(bytes // bench.dtype.itemsize, seed=i),),
        shape={"bytes": bytes},
        bytes=bytes,
        floor_us=bench.ceilings and bench.ceilings.launch_us + bench.ceilings.transfer_us(bytes),
        check=lambda inputs: _check(hops, *inputs, of_rank),
        calls=calls,
    )
    _synchronize(bench)
    fp.check()
    hops.close()


def _synchronize(bench: Bench) -> None:
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier(group=bench.pg)


def _host_time(bench: Bench, bytes: int = 16 << 10) -> None:
    """Host time of sends that need not wait; the other rank's receives are not counted."""
    for impl, make in (("fused_host_only", Fused), (f"{bench.backend}_host_only", Library)):
        hops, x, times = make(bench, bytes), bench.random(bytes // bench.dtype.itemsize, seed=1), []
        for _ in range(60):
            _synchronize(bench)
            took = 0.0
            for _ in range(4):  # as many as there are slots
                begin = time.perf_counter()
                if hops.rank == 0:
                    hops.send(x)
                    took += time.perf_counter() - begin
                else:
                    hops.receive(x)
            times.append(1e6 * took / 4)
        times = bench.everyone(times)[0]  # rank 0 sends
        bench.record("p2p", impl, "eager", times[10:], shape={"bytes": bytes}, bytes=bytes)
        _synchronize(bench)
        hops.close()


def _beside(bench: Bench, size: int = 8192, calls: int = 10) -> None:
    """The matmul alone and beside a stream of messages, in turns."""
    a, b = (bench.random(size, size, seed=s) for s in (1, 2))
    out, x = torch.empty_like(a), bench.random(BESIDE_BYTES // bench.dtype.itemsize, seed=3)
    side, main_stream = torch.cuda.Stream(priority=-1), torch.cuda.Stream()
    floor = bench.ceilings.matmul_us(size, size, size, bench.dtype.itemsize)
    about = {"shape": {"bytes": BESIDE_BYTES}, "bytes": 3 * a.nbytes, "floor_us": floor}

    def timed(hops, messages: int) -> tuple[float, bool]:
        """(us per matmul, whether messages were on their way until the last matmul ended)."""
        start, end, idle = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        _synchronize(bench)
        began = torch.cuda.Event()
        with torch.cuda.stream(side):
            for i in range(messages):
                hops.send(x) if hops.rank == 0 else hops.receive(x)
                if i == 0:
                    began.record()
            idle.record()
        with torch.cuda.stream(main_stream):
            if messages:
                main_stream.wait_event(began)
            torch.cuda._sleep(200_000)
            start.record()
            for _ in range(calls):
                torch.matmul(a, b, out=out)
            end.record()
        torch.cuda.synchronize()
        return 1e3 * start.elapsed_time(end) / calls, messages == 0 or end.elapsed_time(idle) >= 0

    for impl, make in (("fused", Fused), ("nccl", Library), ("fused_push", lambda b, n: Fused(b, n, 1, 1 << 40))):
        hops = bench.attempt(f"matmul beside {impl}", lambda make=make: make(bench, BESIDE_BYTES))
        if hops is None:
            continue
        alone = max(bench.everyone(timed(None, 0)[0]))
        # As long as the matmuls last, and half as long again: 64 MB take some 170 us.
        messages = int(1.5 * alone * calls / (bench.ceilings.transfer_us(BESIDE_BYTES))) + 5
        for _ in range(3):
            timed(hops, messages)
        singles, besides, covered = [], [], True
        for number in range(PAIRS):
            for beside in (number % 2, 1 - number % 2):
                us, whole = timed(hops, messages if beside else 0)
                (besides if beside else singles).append(us)
                covered &= whole
        ratios = [r / s for r, s in zip(besides, singles, strict=True)]
        told = bench.everyone((quantile(ratios, 0.2), quantile(ratios, 0.5), quantile(ratios, 0.8), covered))
        for rank, (p20, p50, p80, whole) in enumerate(told):
            note = "" if whole else "; messages ended before the matmuls: not comparable"
            bench.say(f"matmul beside {impl}, rank {rank}: x{p50:.4f} (p20 {p20:.4f}, p80 {p80:.4f}){note}")
        if all(whole for *_, whole in told):
            bench.record("p2p", "matmul_only", "eager", singles, **about)
            bench.record("p2p", f"matmul_beside_{impl}", "eager", besides, **about)
        _synchronize(bench)
        hops.close()


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
        for bytes in arguments.bytes:
            for impl, make in impls.items():
                _hops(bench, impl, make, bytes)
        _host_time(bench)
        if on_gpu and not arguments.no_matmul:
            _beside(bench)
    return bench.finish()


if __name__ == "__main__":
    p = parser(__doc__)
    p.add_argument("--bytes", type=int, nargs="+", default=SIZES)
    p.add_argument("--no-matmul", action="store_true", help="leave out the matmul beside a stream of messages")
    main(run, p)
