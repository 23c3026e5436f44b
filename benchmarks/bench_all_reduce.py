"""All-reduce of activations, alone and followed by residual addition and RMSNorm, against torch and FlashInfer.

    torchrun --nproc-per-node 2 benchmarks/bench_all_reduce.py [--tokens 1 64 ...] [--hidden 8192]

Without torchrun it starts one rank a GPU. Rows: `fused` (this library's kernels over peer memory), `nccl`,
`torch_one_shot` and `torch_two_shot` (torch symmetric memory); op all_reduce_add_rms_norm: `fused` and
`nccl_add_rms_norm` (NCCL, then this library's add_rms_norm kernel). With `pip install 'fused-parallel[peers]'`, for up
to 1024 tokens: `flashinfer_trtllm`, `flashinfer_trtllm_early` and `flashinfer_trtllm_two_shot` (TensorRT-LLM's kernels,
launched with PDL) for both operations, `flashinfer_vllm` (vLLM's) for the first; see benchmarks/_flashinfer.py. What
is not installed or does not run is named and left out.
`bytes` is one rank's payload. `floor_us` = launch + the longer of link time, 2 (W - 1) / W * bytes each way, and, with
the norm, memory time: x and residual read, both results written.
"""

from __future__ import annotations

import argparse
import functools
from types import SimpleNamespace

import _flashinfer
import torch
import torch.distributed as dist
from _common import Bench, main, parser, relative

import fused_parallel as fp
from fused_parallel import _ext
from fused_parallel.comm import collectives
from fused_parallel.ops.add_rms_norm import add_rms_norm
from fused_parallel.ops.all_reduce import why_not_fused

TOKENS = (1, 8, 32, 64, 128, 256, 512, 1024, 8192)
EPS = 1e-5


def _calls(bytes: int) -> int:
    return 20 if bytes <= 16 << 20 else 5  # long calls need no long rounds, and every call has inputs of its own


def _sum(bench: Bench, x: torch.Tensor) -> torch.Tensor:
    """The float64 sum over ranks of this benchmark's inputs."""
    return collectives.all_gather(x, bench.pg).view(bench.world, *x.shape).double().sum(0)


def _symmetric_buffer(bench: Bench, elements: int) -> torch.Tensor:
    import torch.distributed._symmetric_memory as symmetric_memory

    if bench.device.type != "cuda":
        raise RuntimeError("torch's symmetric memory is for GPUs")
    if not torch.cuda.can_device_access_peer(bench.device.index, (bench.device.index + 1) % torch.cuda.device_count()):
        raise RuntimeError("these GPUs have no access to each other's memory")
    buffer = symmetric_memory.empty(elements, dtype=bench.dtype, device=bench.device)
    symmetric_memory.rendezvous(buffer, bench.pg.group_name)
    return buffer


def _all_reduce(
    bench: Bench, tokens: int, hidden: int, buffer: torch.Tensor | None, flashinfer: SimpleNamespace
) -> None:
    size = tokens * hidden
    bytes = size * bench.dtype.itemsize
    c = bench.ceilings
    floor = c and c.launch_us + c.transfer_us(2 * (bench.world - 1) / bench.world * bytes)

    def plain(i: int) -> tuple[torch.Tensor]:
        return (bench.random(tokens, hidden, seed=i),)

    def symmetric(i: int) -> tuple[torch.Tensor]:
        return (buffer[i * size : (i + 1) * size].view(tokens, hidden).copy_(plain(i)[0]),)

    # impl -> (function, whether it works in place, its inputs)
    impls = {bench.backend: (lambda x: collectives.all_reduce_(x, bench.pg), True, plain)}
    if why_not_fused(bench.random(tokens, hidden, seed=0), bench.pg) is None:
        impls["fused"] = (functools.partial(fp.all_reduce, group=bench.pg), False, plain)
    if buffer is not None:
        name, ops = bench.pg.group_name, torch.ops.symm_mem
        impls["torch_one_shot"] = (lambda x: ops.one_shot_all_reduce(x, "sum", name), False, symmetric)
        impls["torch_two_shot"] = (lambda x: ops.two_shot_all_reduce_(x, "sum", name), True, symmetric)
    trtllm, vllm = flashinfer.trtllm, flashinfer.vllm
    for impl, how in (trtllm.variants(tokens) if trtllm else {}).items():
        impls[impl] = (functools.partial(trtllm.all_reduce, **how), False, plain)
    if vllm and tokens <= _flashinfer.MAX_TOKENS:
        impls["flashinfer_vllm"] = (vllm.all_reduce, False, plain)
    for impl, (fn, in_place, inputs) in impls.items():

        def check(values: tuple[torch.Tensor], fn=fn) -> float:
            expected = _sum(bench, values[0])
            return relative(fn(*values), expected)

        bench.measure(
            "all_reduce",
            impl,
            fn,
            inputs,
            shape={"tokens": tokens, "hidden": hidden},
            bytes=bytes,
            floor_us=floor,
            check=check,
            mutates=in_place,
            calls=_calls(bytes),
            after_capture=vllm.register_captured if impl == "flashinfer_vllm" else None,
        )


def _all_reduce_add_rms_norm(bench: Bench, tokens: int, hidden: int, flashinfer: SimpleNamespace) -> None:
    bytes = tokens * hidden * bench.dtype.itemsize
    c = bench.ceilings
    link = c and c.transfer_us(2 * (bench.world - 1) / bench.world * bytes)
    floor = c and c.launch_us + max(link, c.memory_us(4 * bytes))
    weight = bench.random(hidden, seed=-1)
    dist.broadcast(weight, 0, group=bench.pg)

    def inputs(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        residual = bench.random(tokens, hidden, seed=-2 - i)
        dist.broadcast(residual, 0, group=bench.pg)
        return bench.random(tokens, hidden, seed=i), residual

    def fn(x: torch.Tensor, residual: torch.Tensor):
        return add_rms_norm(collectives.all_reduce_(x, bench.pg), residual, weight, EPS)

    def fused(x: torch.Tensor, residual: torch.Tensor):
        return fp.all_reduce_add_rms_norm(x, residual, weight, EPS, group=bench.pg)

    impls = {f"{bench.backend}_add_rms_norm": (fn, True)}
    if why_not_fused(bench.random(tokens, hidden, seed=0), bench.pg) is None:
        impls["fused"] = (fused, False)
    trtllm = flashinfer.trtllm
    for impl, how in (trtllm.variants(tokens) if trtllm else {}).items():
        peer = functools.partial(trtllm.all_reduce_add_rms_norm, weight=weight, eps=EPS, **how)
        impls[impl] = (peer, False)

    def check(values: tuple[torch.Tensor, torch.Tensor], fn) -> float:
        new_residual = _sum(bench, values[0]) + values[1].double()
        scale = (new_residual.square().mean(-1, keepdim=True) + EPS).rsqrt()
        normed, added = fn(*values)
        return max(relative(normed, new_residual * scale * weight.double()), relative(added, new_residual))

    for impl, (call, in_place) in impls.items():
        bench.measure(
            "all_reduce_add_rms_norm",
            impl,
            call,
            inputs,
            shape={"tokens": tokens, "hidden": hidden},
            bytes=bytes,
            floor_us=floor,
            check=functools.partial(check, fn=call),
            mutates=in_place,
            calls=_calls(bytes),
        )


def run(arguments: argparse.Namespace) -> int:
    bench = Bench(arguments)
    with fp.use("fused" if bench.device.type == "cuda" else "auto"):
        return _run(bench, arguments)


def _run(bench: Bench, arguments: argparse.Namespace) -> int:
    hidden = arguments.hidden
    most = max(t * hidden * _calls(t * hidden * bench.dtype.itemsize) for t in arguments.tokens)
    buffer = bench.attempt("torch_one_shot, torch_two_shot", lambda: _symmetric_buffer(bench, most))
    flashinfer = SimpleNamespace(trtllm=None, vllm=None)
    if not arguments.impls or any(name.startswith("flashinfer") for name in arguments.impls):
        flashinfer = _flashinfer.peers(bench, hidden)
    for tokens in arguments.tokens:
        _all_reduce(bench, tokens, hidden, buffer, flashinfer)
    why_not = _ext.why_no_kernels() if bench.device.type == "cuda" else None
    if why_not:
        bench.say(f"not measured: all_reduce_add_rms_norm: no add_rms_norm kernel here: {why_not}")
    else:
        for tokens in arguments.tokens:
            _all_reduce_add_rms_norm(bench, tokens, hidden, flashinfer)
    return bench.finish()


if __name__ == "__main__":
    p = parser(__doc__)
    p.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help=f"default {' '.join(map(str, TOKENS))}")
    p.add_argument("--hidden", type=int, default=8192)
    main(run, p)
