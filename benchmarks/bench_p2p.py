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
import itertools
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from _common import Bench, main, parser
from _p2p_beside import beside_messages, causes
from _p2p_hops import Fused, Library, Symmetric, synchronize

import fused_parallel as fp
from fused_parallel.testing.timer import quantile

SIZES = (16 << 10, 128 << 10, 1 << 20, 16 << 20, 128 << 20, 4 << 20)
SUM_SIZES = (16 << 10, 128 << 10, 1 << 20)
PARTS = ("hops", "sums", "host", "matmul", "causes")


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
    synchronize(bench)
    fp.check()
    hops.close()


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
        synchronize(bench)
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
            synchronize(bench)
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
        synchronize(bench)
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
            beside_messages(bench)
        if on_gpu and "causes" in arguments.parts:
            causes(bench)
    code = bench.finish()
    return 0 if list(arguments.parts) == ["causes"] else code  # which has no rows


if __name__ == "__main__":
    p = parser(__doc__)
    p.add_argument("--bytes", type=int, nargs="+", default=SIZES)
    p.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    main(run, p)
