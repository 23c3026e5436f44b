"""What the benchmarks of several ranks share: starting ranks, physical floors, one row after the other."""

from __future__ import annotations

import argparse
import functools
import gc
import math
import os
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

import fused_parallel as fp
from fused_parallel.comm import probe_device
from fused_parallel.comm.launch import launch
from fused_parallel.comm.probe import load_profile
from fused_parallel.comm.probe_collectives import rank_environment
from fused_parallel.testing import results
from fused_parallel.testing.timer import Subject, Timing, quantile, time_collective, time_in_turns
from fused_parallel.testing.tolerances import RELATIVE_ERROR

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Ceilings:
    """Rates of this machine that the floors are computed from. A floor is the time that the least work for a result
    takes at these rates: no implementation on this machine gets below it, but for the drift of clocks. The time a flag
    needs to reach a peer is not in it: the probe does not measure that.

    `launch_us`: the smallest kernel's share of a CUDA graph.
    `link_gb_per_s`: between two GPUs, each way with both ways at once. `memory_gb_per_s`: the faster of copying (read +
    write) and reading one GPU's memory. `matmul_tflop_per_s`: the best of several matmul shapes.
    """

    launch_us: float
    link_gb_per_s: float
    memory_gb_per_s: float
    matmul_tflop_per_s: float

    def transfer_us(self, bytes: float) -> float:
        return bytes / self.link_gb_per_s * 1e-3

    def memory_us(self, bytes: float) -> float:
        return bytes / self.memory_gb_per_s * 1e-3

    def matmul_us(self, m: int, k: int, n: int, itemsize: int) -> float:
        """The longer of computing [m, k] x [k, n] and moving operands and result through memory once."""
        compute = 2 * m * k * n / self.matmul_tflop_per_s * 1e-6
        return max(compute, self.memory_us((m * k + k * n + m * n) * itemsize))

    @classmethod
    def from_profile(cls, profile: dict) -> Ceilings:
        """From what `fused-parallel probe` measured; ValueError if the profile lacks one of them."""
        copies = [p for p in profile["peer_copies"] if p["direction"] == "both_ways"]
        gpus = [g for g in profile["gpus"] if g["memory"] and g["matmul"] and g["graph_kernel_us"]]
        if not copies or not gpus:
            raise ValueError("the profile has no GPU-to-GPU copies, GPU memory or GPU matmuls; see its not_measured")
        return cls(
            launch_us=min(g["graph_kernel_us"] for g in gpus),
            link_gb_per_s=max(point["gb_per_s"] for p in copies for point in p["points"]),
            memory_gb_per_s=max(max(g["memory"]["copy_gb_per_s"], g["memory"]["read_gb_per_s"]) for g in gpus),
            matmul_tflop_per_s=max(m["tflop_per_s"] for g in gpus for m in g["matmul"]),
        )

    @classmethod
    def measured(cls) -> Ceilings:
        """Measured now, by the probe's functions, from this process, on GPUs 0 and 1."""
        gpu = {
            "graph_kernel_us": probe_device.graph_kernel_us(0),
            "memory": probe_device.hbm(0, quick=True),
            "matmul": probe_device.gpu_matmul(0, quick=True),
        }
        return cls.from_profile({"gpus": [gpu], "peer_copies": probe_device.peer_copies(0, 1, quick=True)})


class Budget:
    """Time for a benchmark, in seconds from when this is made: what has not begun by then is left out, and named."""

    def __init__(self, seconds: float, group: dist.ProcessGroup | None = None) -> None:
        self.seconds, self.group, self.begin = seconds, group, time.monotonic()

    def over(self, what: str) -> bool:
        """Whether the time is over, on the first rank's clock for all of `group`; then `what` is not to be begun."""
        late = [time.monotonic() - self.begin > self.seconds]
        if self.group is not None and self.group.size() > 1:
            dist.broadcast_object_list(late, dist.get_global_rank(self.group, 0), group=self.group)
        if late[0] and (self.group is None or self.group.rank() == 0):
            print(f"not measured: {what}: {self.seconds:g} s are over (--seconds)", flush=True)
        return late[0]

    @staticmethod
    def argument(parser: argparse.ArgumentParser, default: float) -> None:
        parser.add_argument(
            "--seconds", type=float, default=default, help=f"begin nothing after so long (default {default:g})"
        )


def parser(description: str) -> argparse.ArgumentParser:
    """An argument parser with the arguments that all benchmarks take."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    p.add_argument("--modes", nargs="+", choices=("graph", "eager"), default=["graph", "eager"])
    p.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: two Gloo ranks, to try the script out"
    )
    p.add_argument("--impls", nargs="+", metavar="NAME", help="measure only these rows")
    p.add_argument(
        "--results",
        metavar="DIR",
        help=f"folder of the CSV files to append to (default {results.RESULTS}; with --device cpu none)",
    )
    p.add_argument(
        "--profile",
        metavar="FILE",
        help="take floor_us' ceilings from this `fused-parallel probe --out` file; else they are measured first",
    )
    return p


def main(run: Callable[[argparse.Namespace], int], p: argparse.ArgumentParser) -> None:
    """Parse the command line and run `run(arguments)` on every rank: torchrun's, else one new rank a GPU. Exits."""
    arguments = p.parse_args()
    for name, value in rank_environment().items():
        os.environ.setdefault(name, value)
    if "RANK" in os.environ:
        sys.exit(run(arguments))
    world = 2
    if arguments.device == "cuda":
        world = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if world < 2:
            sys.exit(
                f"{p.prog}: needs two or more GPUs, torch sees {world}. To try the script on CPU ranks: --device cpu "
                "(fused-parallel bench NAME -- --device cpu)"
            )
    sys.exit(max(launch(run, world, arguments, timeout=1800, environment=rank_environment())))


@dataclass
class Bench:
    """One benchmark's run on this rank. Made after `fp.init`; every method is called by all ranks alike."""

    arguments: argparse.Namespace
    floors: bool = True  # whether rows have floor_us: then ceilings are measured
    # Graphs of what `measure` was given since the last `take_turns()` are timed there, in turns: for matmuls, whose
    # power and heat slow down what is measured after them. All of their inputs are there at once.
    in_turns: bool = False
    pg: dist.ProcessGroup = field(init=False)
    device: torch.device = field(init=False)
    ceilings: Ceilings | None = field(init=False)
    rows: list[dict[str, str]] = field(init=False, default_factory=list)
    wrong: list[str] = field(init=False, default_factory=list)
    failed: set[tuple[str, str]] = field(init=False, default_factory=set)  # (impl, mode) that did not run
    waiting: list[tuple[Subject, int, Callable[[Timing], None]]] = field(init=False, default_factory=list)

    def __post_init__(self):
        fp.init(device=self.arguments.device, timeout=120)
        self.pg = dist.group.WORLD
        on_gpu = self.arguments.device == "cuda"
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        self.dtype = DTYPES[self.arguments.dtype]
        self.backend = "nccl" if on_gpu else "gloo"
        self.directory = self.arguments.results or (results.RESULTS if on_gpu else None)
        # Eager first: what fails in a capture may leave its streams unusable.
        self.modes = [m for m in ("eager", "graph") if m in self.arguments.modes and (on_gpu or m == "eager")]
        self.world = self.pg.size()
        if self.world < 2:
            raise SystemExit("needs two or more ranks: torchrun --nproc-per-node 2 ..., or without torchrun")
        self.ceilings = self._ceilings() if on_gpu and self.floors else None
        if self.ceilings is not None:
            self.say(f"floor_us from {self.ceilings}")

    def _ceilings(self) -> Ceilings | None:
        found: list = [None]
        if self.pg.rank() == 0:
            try:
                path = self.arguments.profile
                found = [Ceilings.from_profile(load_profile(path)) if path else Ceilings.measured()]
            except (OSError, ValueError, RuntimeError) as error:
                found = [error]
        dist.broadcast_object_list(found, 0, group=self.pg)
        if isinstance(found[0], Exception):
            raise SystemExit(f"no ceilings for floor_us: {found[0]}")
        torch.cuda.empty_cache()
        return found[0]

    def say(self, *text: object) -> None:
        """Print on rank 0."""
        if self.pg.rank() == 0:
            print(*text, flush=True)

    def random(self, *shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
        """Normal random data in the benchmark's dtype, from (`seed`, this rank)."""
        generator = torch.Generator(self.device).manual_seed(seed * self.world + self.pg.rank())
        values = torch.empty(*shape, device=self.device, dtype=self.dtype)
        return values.normal_(0, scale, generator=generator)

    def everyone(self, value) -> list:
        """Every rank's `value`, in rank order."""
        values: list = [None] * self.world
        dist.all_gather_object(values, value, group=self.pg)
        return values

    def attempt(self, what: str, function: Callable):
        """`function()`, or None if it fails on any rank, with the reason printed: a peer that is not there is left out.

        Only for what fails before it waits for a peer.
        """
        value, error = None, None
        try:
            value = function()
        except (RuntimeError, ValueError, NotImplementedError, AttributeError, ImportError) as e:
            error = textwrap.shorten(f"{type(e).__name__}: {e}", 200)
            # At once: the other ranks may be waiting for this one where they cannot hear of it.
            print(f"rank {self.pg.rank()}: {what}: {error}", file=sys.stderr, flush=True)
        errors = self.everyone(error)
        if any(errors):
            self.say(f"not measured: {what}: {next(e for e in errors if e)}")
            return None
        return value

    def measure(
        self,
        op: str,
        impl: str,
        fn: Callable,
        inputs: Callable[[int], tuple],
        *,
        shape: dict[str, int],
        bytes: int,
        floor_us: float | None,
        check: Callable[[tuple], float],
        tolerance: float | None = None,
        **timing,
    ) -> None:
        """Check `fn` with `check(fresh inputs)`, which gives this rank's relative error, then time it in all modes.

        `timing` goes to `time_collective` (in turns: only `calls` and `rounds`). Results beyond the tolerance (default:
        twice the dtype's) give no row and fail the benchmark. What does not run in a mode is not tried in it again.
        """
        if self.arguments.impls and impl not in self.arguments.impls:
            return
        name = f"{op} {impl} {results.shape_key(**shape)}"
        error = self.attempt(name, lambda: check(inputs(0)))
        if error is None:
            return
        error = max(self.everyone(float("inf") if math.isnan(error) else error))
        # Backends round after each addition, ours once: room for the former.
        if not error <= (tolerance or 2 * RELATIVE_ERROR[self.dtype]):
            self.wrong.append(f"{name}: relative error {error:.1e}")
            self.say("WRONG", self.wrong[-1])
            return
        for mode in self.modes:
            if (impl, mode) in self.failed:
                continue
            add = functools.partial(self._add, op, impl, mode, shape=shape, bytes=bytes, floor_us=floor_us)
            if self.in_turns and mode == "graph":
                got = self.attempt(f"{name} {mode}", lambda: Subject(fn, inputs, self.pg, calls=timing["calls"]))
                if got is not None:
                    self.waiting.append((got, timing["rounds"], add))
            else:
                got = self.attempt(
                    f"{name} {mode}",
                    lambda mode=mode: time_collective(fn, inputs=inputs, group=self.pg, mode=mode, **timing),
                )
                if got is not None:
                    add(got)
            if got is None:
                self.failed.add((impl, mode))

    def take_turns(self) -> None:
        """Time what `measure` has kept for it."""
        if self.waiting:
            subjects, rounds, add = zip(*self.waiting, strict=True)
            self.waiting.clear()
            for row, timing in zip(add, time_in_turns(subjects, max(rounds)), strict=True):
                row(timing)

    def _add(self, op: str, impl: str, mode: str, timing: Timing, *, shape: dict, bytes: int, floor_us) -> None:
        about = {"world_size": self.world, "dtype": self.dtype, "mode": mode, "shape": shape}
        row = results.make_row(op, impl, timing, bytes=bytes, floor_us=floor_us, device=self.device.type, **about)
        self.rows.append(row)
        if self.directory and self.pg.rank() == 0:  # at once: a run that is cut short keeps what it has
            results.append([row], self.directory)
        self.say(f"{op} {impl} {results.shape_key(**shape)} {mode}: {timing.us_p50:.2f} us")

    def record(
        self,
        op: str,
        impl: str,
        mode: str,
        values: list[float],
        *,
        shape: dict[str, object],
        bytes: int,
        floor_us: float | None = None,
    ) -> Timing:
        """A row of what a benchmark has timed itself: microseconds per call of this rank, one value a round."""
        everyone = self.everyone(values)
        medians = [quantile(v, 0.5) for v in everyone]
        slowest = everyone[medians.index(max(medians))]
        skew = 100 * (max(medians) - min(medians)) / max(medians)
        timing = Timing(quantile(slowest, 0.2), max(medians), quantile(slowest, 0.8), skew)
        self._add(op, impl, mode, timing, shape=shape, bytes=bytes, floor_us=floor_us)
        return timing

    def finish(self) -> int:
        """Print the table, leave the group; the exit code."""
        self.take_turns()
        if self.pg.rank() == 0:
            results.show(self.rows)
            if self.directory:
                print(f"appended to the CSV files in {self.directory}")
            for text in self.wrong:
                print("WRONG", text, file=sys.stderr)
        code = 1 if self.wrong or not self.rows else 0
        dist.barrier(group=self.pg)
        fp.finalize()
        return code


def memory_bytes_per_us(tell: bool = True) -> float:
    """The rate that floors of one GPU are computed from, of the current one: of copying or reading its memory, the
    faster. Printed, if `tell`."""
    memory = probe_device.hbm(torch.cuda.current_device(), quick=True)
    torch.cuda.empty_cache()
    rate = max(memory["copy_gb_per_s"], memory["read_gb_per_s"]) * 1e3
    if tell:
        print(f"floor_us from {rate * 1e-6:.2f} TB/s", flush=True)
    return rate


def told(rows: list[dict[str, str]], wrong: list[str]) -> int:
    """The table of a benchmark of one process, and what was wrong; its exit code."""
    results.show(rows)
    for text in wrong:
        print("WRONG", text, file=sys.stderr)
    return 1 if wrong else 0


def captured(step: Callable[[], object], on_gpu: bool = True) -> Callable[[], object]:
    """`step` as a CUDA graph's replay, after a call outside it, in which is made what is made at first use; on a CPU as
    it is."""
    if not on_gpu:
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    gc.collect()  # a graph collected during the capture would break it
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def relative(out: torch.Tensor, ref: torch.Tensor) -> float:
    """||out - ref|| / ||ref|| in float64, on the tensors' own device: these are too large to compare on the CPU."""
    return ((out.double() - ref.double()).norm() / ref.double().norm()).item()
