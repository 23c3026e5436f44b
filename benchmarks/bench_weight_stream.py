"""Passes through a stack of layers whose weights are streamed from host memory, against the rate of plain copies.

    python benchmarks/bench_weight_stream.py [--gb 60] [--tokens 1 8 64] [--resident 0 0.5] [--quantize int4]
    torchrun --nproc-per-node 2 benchmarks/bench_weight_stream.py --gb 30

As many Llama-70B-shaped layers as `--gb` (10^9 bytes a rank, not quantised; default 60, or what three fifths of this
machine's free memory allow), of random weights made in pinned memory. On several ranks tp = the ranks: each streams its
shards over its own link, all at once. A pass ends when the host has the next token, as in generation, and its time is
that from the end of the pass before. Rows, with `gb` what a pass copies, `resident` the share of layers on the device:

    fused              nn.StreamedLayers
    fused_first_token  the same from a standstill, nothing copied ahead
    fused_<quantize>   quantised weights
    fused_cpu          with --cpu: some layers computed on the CPU instead of copied (`bytes`: of all of them)
    copy_only          the same blocks copied, one after the other and nothing else: the plain pinned rate
    sync_loop          a plain loop: copy a layer's matrices, wait, compute (from the same pinned memory)
    accelerate         accelerate's CPU offload hooks (AlignDevicesHook) on the layers' linears, same pinned memory

floor_us: the time of copy_only just before. The peers are measured at the first of `--tokens`, on which their time
hardly depends. Every row is written as soon as it is measured; with `--gb 30` all should take about a minute, pinning
included, and nothing is begun after `--seconds`. accelerate is a pure Python wheel: pip download --no-deps accelerate.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from _common import Budget, relative
from torch import nn

import fused_parallel as fp
from fused_parallel.models.config import LlamaConfig
from fused_parallel.offload.host_memory import room
from fused_parallel.testing.results import RESULTS, append, make_row, show
from fused_parallel.testing.timer import Timing, gather_timing

DTYPE = torch.bfloat16
CONTEXT = 256


class SyncLoop(nn.Module):
    """What one writes first: a layer's matrices to the device, wait, compute."""

    def __init__(self, layers: fp.nn.StreamedLayers) -> None:
        super().__init__()
        self.stack = list(layers.named_children())
        self.device = layers.device

    def values(self):
        return [layer for _, layer in self.stack]

    def items(self):
        for name, layer in self.stack:
            hosts = [(p, p.data) for p in layer.parameters()]
            for parameter, host in hosts:
                parameter.data = host.to(self.device, copy=True)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            yield name, layer
            for parameter, host in hosts:
                parameter.data = host


def with_accelerate(layers: fp.nn.StreamedLayers) -> nn.ModuleDict:
    """The same layers with accelerate's hooks, which take over their memory: for good."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    stack = nn.ModuleDict(dict(layers.named_children()))
    for module in list(stack.modules()):
        if isinstance(module, (fp.nn.ColumnParallelLinear, fp.nn.RowParallelLinear)):
            # Without a weights map the hook keeps parameter.to("cpu"), which is the pinned memory itself.
            add_hook_to_module(module, AlignDevicesHook(execution_device=layers.device, offload=True))
    return stack


class Stack:
    """The model, its inputs and the places of its layers."""

    def __init__(self, arguments: argparse.Namespace, layers: int, resident: float, mesh) -> None:
        self.arguments, self.mesh = arguments, mesh
        self.world, self.pg = mesh["tp"].size(), mesh["tp"].get_group()
        hidden, intermediate, heads = arguments.hidden, arguments.intermediate, arguments.hidden // 128
        config = LlamaConfig(
            vocab_size=arguments.vocabulary,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=min(8, heads),
            head_dim=128,
            rms_norm_eps=1e-5,
            rope_theta=500000.0,
            dtype="bfloat16",
        )
        per_layer = layer_bytes(arguments) // self.world
        resident_bytes = int(resident * layers + 0.5) * (per_layer + 4096)
        offload = fp.Offload(resident_bytes=resident_bytes, cpu=arguments.cpu)
        options = {"quantize": arguments.quantize} if arguments.quantize else {}
        begin = time.perf_counter()
        self.model = fp.LlamaForCausalLM(config, mesh=mesh, offload=offload, **options)
        self.device, self.layers = self.model.device, self.model.model.layers
        self.pin_seconds = time.perf_counter() - begin
        self._fill()
        self.fill_seconds = time.perf_counter() - begin - self.pin_seconds
        self.cache = self.model.make_cache(1, CONTEXT + max(arguments.tokens))
        self.cache.k.normal_(), self.cache.v.normal_()
        self.cache.lens.fill_(CONTEXT)

    def _fill(self) -> None:
        """Random weights, at a scale that keeps activations of order one, made on the device."""
        generator = torch.Generator(self.device).manual_seed(1 + self.mesh["tp"].get_local_rank())
        for module in self.model.modules():
            for name, p in module.named_parameters(recurse=False):
                if p.dim() == 1:
                    p.fill_(1.0)
                elif p.dtype in (torch.uint8, torch.int8):
                    p.copy_(torch.randint(-128, 128, p.shape, device=self.device, generator=generator).to(p.dtype))
                else:
                    values = torch.empty(p.shape, device=self.device, dtype=p.dtype)
                    scale = 0.5 * p.shape[1] ** -0.5
                    if name == "scales":  # of integers that are uniform over their range
                        scale = 0.5 * module.in_features**-0.5 / (4.6 if self.arguments.quantize == "int4" else 74)
                        values.uniform_(0.9 * scale, 1.1 * scale, generator=generator)
                    else:
                        values.normal_(0, scale, generator=generator)
                    p.copy_(values)

    def step(self, tokens: int, number: int) -> torch.Tensor:
        """One pass over `tokens` random tokens; the logits."""
        ids = torch.randint(self.arguments.vocabulary, (1, tokens), generator=torch.Generator().manual_seed(number)).to(
            self.device
        )
        return self.model.lm_head(self.model.model(ids, self.cache, self.cache.positions(tokens)))

    def passes(self, step: Callable[[int], torch.Tensor], count: int, warmup: int = 1) -> list[float]:
        """Microseconds from the end of a pass to the end of the next, the host reading a token after each."""
        self.barrier()
        ends = [time.perf_counter()]
        for number in range(warmup + count):
            int(step(number).reshape(-1)[-1])
            ends.append(time.perf_counter())
        return [1e6 * (end - begin) for begin, end in itertools.pairwise(ends)][warmup:]

    def timed(self, tokens: int, count: int, warmup: int = 1) -> list[float]:
        """`passes` of the model."""
        return self.passes(lambda number: self.step(tokens, number), count, warmup)

    def barrier(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if self.world > 1:
            dist.barrier(group=self.pg)

    def copies(self) -> list[float]:
        """Microseconds that plain copies of all blocks take, back to back."""
        blocks = self.layers.blocks
        slots = [torch.empty(max(b.numel() for b in blocks), dtype=torch.uint8, device=self.device) for _ in range(2)]

        def copy(_: int) -> torch.Tensor:
            for i, block in enumerate(blocks):
                slots[i % 2][: block.numel()].copy_(block, non_blocking=True)
            return slots[(len(blocks) - 1) % 2][:1]

        return self.passes(copy, self.arguments.passes)

    def first_token(self, tokens: int) -> float:
        """Microseconds of a pass from a standstill."""
        broken_off = iter(self.layers)
        next(broken_off)
        broken_off.close()  # what was copied ahead does not count any longer
        return self.timed(tokens, 1, warmup=0)[0]


def layer_bytes(arguments: argparse.Namespace) -> int:
    """Of the matrices of one whole layer, not quantised."""
    hidden, heads = arguments.hidden, arguments.hidden // 128
    attention = hidden * (2 * heads + 2 * min(8, heads)) * 128
    return DTYPE.itemsize * (attention + 3 * hidden * arguments.intermediate)


class Report:
    """Rows, printed and kept as they come."""

    def __init__(self, arguments: argparse.Namespace, world: int, on_gpu: bool) -> None:
        self.rows: list[dict[str, str]] = []
        self.world, self.on_gpu = world, on_gpu
        self.directory = arguments.results or (RESULTS if on_gpu else None)

    def add(self, stack: Stack, impl: str, us: list[float], tokens: int, resident: float, floor: Timing) -> Timing:
        timing, size = gather_timing(us, stack.pg), stack.layers.host_bytes
        row = make_row(
            "weight_stream",
            impl,
            timing,
            world_size=self.world,
            dtype=DTYPE,
            mode="eager",
            shape={"gb": f"{size / 1e9:.1f}", "tokens": tokens, "resident": f"{resident:g}"},
            bytes=size,
            floor_us=floor.us_p50,
            device="cuda" if self.on_gpu else "cpu",
        )
        if dist.get_rank() == 0:
            self.rows.append(row)
            if self.directory:
                append([row], self.directory)
            rate = size / timing.us_p50 * 1e-3
            share = floor.us_p50 / timing.us_p50
            print(
                f"{impl} {row['shape']}: {timing.us_p50 / 1e3:.2f} ms, {rate:.2f} GB/s a rank, {share:.1%}", flush=True
            )
        return timing


def run_fused(stack: Stack, report: Report, impl: str, resident: float, budget: Budget) -> Timing | None:
    """The streamed passes, each number of tokens beside plain copies; the last of those."""
    floor = None
    for tokens in stack.arguments.tokens:
        if budget.over(f"{impl}, {tokens} tokens, resident {resident:g}"):
            return floor
        copies = stack.copies()
        floor = gather_timing(copies, stack.pg)
        report.add(stack, "copy_only", copies, tokens, resident, floor)
        stack.timed(tokens, 1, warmup=0)  # what is made at first use
        cold = stack.first_token(tokens)
        report.add(stack, impl, stack.timed(tokens, stack.arguments.passes), tokens, resident, floor)
        report.add(stack, f"{impl}_first_token", [cold], tokens, resident, floor)
        if stack.arguments.cpu and dist.get_rank() == 0:
            on_cpu, layers = stack.layers.on_cpu(tokens), len(stack.layers)
            print(f"{len(on_cpu)} of {layers} layers on the CPU at {tokens} tokens", flush=True)
    return floor


def run_peers(stack: Stack, report: Report, resident: float, floor: Timing, budget: Budget) -> list[str]:
    """sync_loop and accelerate on the same weights; what was wrong. The stack is of no use afterwards."""
    streamed, wrong, tokens = stack.layers, [], stack.arguments.tokens[0]
    expected = stack.step(tokens, 0)

    def measure(impl: str) -> None:
        error = relative(stack.step(tokens, 0), expected)
        if not error < 0.02:
            wrong.append(f"{impl} at {tokens} tokens: relative error {error:.1e}")
        report.add(stack, impl, stack.timed(tokens, 2), tokens, resident, floor)

    stack.barrier()
    if budget.over("sync_loop and accelerate"):
        return wrong
    stack.model.model.layers = SyncLoop(streamed)
    measure("sync_loop")
    if budget.over("accelerate"):
        return wrong
    try:
        stack.model.model.layers = with_accelerate(streamed)
    except ImportError as error:
        if dist.get_rank() == 0:
            print(f"not measured: accelerate ({error})", flush=True)
    else:
        measure("accelerate")
    return wrong


def run(arguments: argparse.Namespace) -> int:
    budget = Budget(0.0)
    mesh = fp.init(device=arguments.device, timeout=300)
    world, on_gpu = mesh["tp"].size(), mesh.device_type == "cuda"
    free = min(bound.available for bound in room()) * 0.6 / world
    gb = arguments.gb or min(60.0, free * 1e-9)
    budget.seconds, budget.group = arguments.seconds or max(60.0, 2 * gb), mesh["tp"].get_group()
    layers = max(2, round(gb * 1e9 / (layer_bytes(arguments) / world)))
    report, wrong = Report(arguments, world, on_gpu), []
    impl = "fused" + (f"_{arguments.quantize}" if arguments.quantize else "") + ("_cpu" if arguments.cpu else "")
    for resident in arguments.resident:
        if budget.over(f"resident {resident:g}"):
            break
        stack = Stack(arguments, layers, resident, mesh)
        if dist.get_rank() == 0:
            print(
                f"{layers} layers on each of {world} rank(s), {stack.layers.host_bytes / 1e9:.1f} GB in host memory: "
                f"made and pinned in {stack.pin_seconds:.1f} s, filled in {stack.fill_seconds:.1f} s",
                flush=True,
            )
        floor = run_fused(stack, report, impl, resident, budget)
        if floor is not None and resident == 0 and impl == "fused" and not arguments.no_peers:
            wrong += run_peers(stack, report, resident, floor, budget)
        stack.layers.release()
        del stack
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    if dist.get_rank() == 0:
        show(report.rows)
        for text in wrong:
            print("WRONG", text, file=sys.stderr)
    fp.finalize()
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, help="10^9 bytes of layers a rank")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--resident", type=float, nargs="+", default=[0.0, 0.5], help="shares of layers on the device")
    parser.add_argument("--passes", type=int, default=3, help="measured passes of each row (peers: 2)")
    parser.add_argument("--seconds", type=float, help="begin nothing after so long (default: 60, or 2 for every GB)")
    parser.add_argument("--quantize", choices=("int8", "int4"))
    parser.add_argument("--cpu", action="store_true", help="compute layers on the CPU where that wins (one rank)")
    parser.add_argument("--no-peers", action="store_true", help="leave sync_loop and accelerate out")
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--intermediate", type=int, default=28672)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the script out")
    parser.add_argument("--results", metavar="DIR", help=f"folder of the CSV file (default {RESULTS}; on cpu none)")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_weight_stream: needs a CUDA GPU, torch sees none; to try the script: --device cpu")
    if not all(0 <= share < 1 for share in arguments.resident):
        parser.error(f"--resident must be shares of at least 0 and below 1, got {arguments.resident}")
    with torch.inference_mode():
        return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
