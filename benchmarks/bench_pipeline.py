"""A Llama model cut into two stages: decoding of one sequence, of micro-batches, and prefill in chunks.

    torchrun --nproc-per-node 2 benchmarks/bench_pipeline.py [--model llama-3-70b] [--layers 40] [--batch 1]

Without torchrun it starts one rank a GPU. Random weights, `--context` tokens in the cache. A round is one token of
every sequence: the first stage receives the tokens of the round before, the last one computes logits, takes the largest
and sends the tokens back. Each stage's round is one CUDA graph (prefill: eager), replayed without a barrier in between.
Rows, microseconds a round:

    fused          the stages' channels; a micro-batch's tokens leave as soon as they are there
    nccl           dist.send and dist.recv, tokens of all micro-batches after the last one (sends that block would
                   otherwise wait for each other)
    compute_only   what the stages take alone: their sum for one micro-batch, else the slower one's times the number of
                   micro-batches (decode), times (chunks + stages - 1) (prefill): the time without any communication

Printed beside them: time over that of compute_only, and for micro-batches the share of the no-bubble throughput.
`bytes`: hidden states and tokens that cross the boundary.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from _common import Bench, main, parser
from bench_decode_step import MODELS, _config, _fill

import fused_parallel as fp
from fused_parallel.pipeline.stage_links import StageLinks
from fused_parallel.testing.timer import quantile


class Channels:
    """Hidden states and tokens through fp's channels."""

    together = False  # tokens leave micro-batch by micro-batch

    def __init__(self, mesh, batch: int, rows: int, hidden: int, micro: int, dtype) -> None:
        size = max(batch * rows * hidden * dtype.itemsize, 1 << 16)
        self.links = StageLinks(mesh.get_group("pp"), mesh.get_group("tp"), slots=max(4, micro), slot_bytes=size)
        self.shape, self.dtype = (batch, rows, hidden), dtype

    def hidden(self, m: int):
        received = self.links.receive(self.shape, self.dtype)
        return received.tensor, received.release

    def send_hidden(self, m: int, x: torch.Tensor) -> None:
        self.links.send(x)

    def tokens(self, m: int, ids: torch.Tensor) -> torch.Tensor:
        return self.links.share(ids)

    send_tokens = tokens

    def close(self) -> None:
        fp.check()
        for channel in self.links.channels.values():
            channel.close()


class Library:
    """The same by dist.send and dist.recv."""

    together = True

    def __init__(self, mesh, batch: int, rows: int, hidden: int, micro: int, dtype) -> None:
        self.peer = 1 - dist.get_rank()
        self.buffers = [torch.empty(batch, rows, hidden, dtype=dtype, device="cuda") for _ in range(micro)]

    def hidden(self, m: int):
        dist.recv(self.buffers[m], self.peer)
        return self.buffers[m], lambda: None

    def send_hidden(self, m: int, x: torch.Tensor) -> None:
        dist.send(x, self.peer)

    def tokens(self, m: int, ids: torch.Tensor) -> torch.Tensor:
        dist.recv(ids, self.peer)
        return ids

    def send_tokens(self, m: int, ids: torch.Tensor) -> torch.Tensor:
        dist.send(ids, self.peer)
        return ids

    def close(self) -> None:
        pass


class Alone:
    """No communication: what the stage computes, on random hidden states."""

    together = False

    def __init__(self, mesh, batch: int, rows: int, hidden: int, micro: int, dtype) -> None:
        self.x = torch.randn(batch, rows, hidden, device="cuda").to(dtype)

    def hidden(self, m: int):
        return self.x, lambda: None

    def send_hidden(self, m: int, x: torch.Tensor) -> None:
        pass

    def tokens(self, m: int, ids: torch.Tensor) -> torch.Tensor:
        return ids

    send_tokens = tokens

    def close(self) -> None:
        pass


class Decode:
    """A round of `micro` micro-batches of `batch` sequences on this rank's stage."""

    def __init__(self, model: fp.LlamaForCausalLM, batch: int, micro: int, context: int) -> None:
        self.model, self.micro = model, micro
        self.caches = [model.make_cache(batch, context) for _ in range(micro)]
        for cache in self.caches:
            cache.k.normal_(), cache.v.normal_()
            cache.lens.fill_(context - 1)
        vocabulary = model.config.vocab_size
        self.ids = [torch.randint(vocabulary, (batch, 1), device=model.device) for _ in range(micro)]
        self.first = model.pp_group.rank() == 0

    def prime(self, links) -> None:
        """The last stage sends the tokens that the first round begins with."""
        if not self.first:
            for m in range(self.micro):
                links.send_tokens(m, self.ids[m])

    def round(self, links) -> None:
        if links.together and self.first:
            for m in range(self.micro):
                links.tokens(m, self.ids[m])
        for m, (ids, cache) in enumerate(zip(self.ids, self.caches, strict=True)):
            if self.first:
                if not links.together:
                    links.tokens(m, ids)
                links.send_hidden(m, self.model.model(ids, cache, cache.positions(1)))
                continue
            x, release = links.hidden(m)
            out = self.model.model(x, cache, cache.positions(1))
            release()
            ids.copy_(self.model.lm_head(out)[..., : self.model.config.vocab_size].argmax(-1))
            if not links.together:
                links.send_tokens(m, ids)
        if links.together and not self.first:
            for m in range(self.micro):
                links.send_tokens(m, self.ids[m])


class Prefill:
    """`micro` chunks of `rows` tokens of one prompt on this rank's stage."""

    def __init__(self, model: fp.LlamaForCausalLM, rows: int, micro: int) -> None:
        self.model, self.micro, self.rows = model, micro, rows
        self.cache = model.make_cache(1, rows * micro)
        self.ids = torch.randint(model.config.vocab_size, (micro, 1, rows), device=model.device)
        self.first = model.pp_group.rank() == 0

    def prime(self, links) -> None:
        """Prompts are there."""

    def round(self, links) -> None:
        self.cache.lens.zero_()
        for m in range(self.micro):
            positions = self.cache.positions(self.rows)
            if self.first:
                links.send_hidden(m, self.model.model(self.ids[m], self.cache, positions))
            else:
                x, release = links.hidden(m)
                out = self.model.model(x, self.cache, positions)
                release()
            self.cache.lens += self.rows
        if not self.first:
            self.model.lm_head(out[:, -1:])


def _time(bench: Bench, work, links, graph: bool, replays: int, rounds: int) -> list[float]:
    """Microseconds a round, `rounds` times over `replays` rounds without a barrier."""
    work.prime(links)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work.round(links)
    torch.cuda.synchronize()
    step: Callable = functools.partial(work.round, links)
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured, stream=stream):
            work.round(links)
        step = captured.replay
    times = []
    for number in range(rounds + 2):
        torch.cuda.synchronize()
        dist.barrier(group=bench.pg)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(stream):
            start.record()
            for _ in range(replays):
                step()
            end.record()
        torch.cuda.synchronize()
        if number >= 2:
            times.append(1e3 * start.elapsed_time(end) / replays)
    links.close()
    return times


def _case(bench: Bench, mesh, model, make: Callable, shape: dict, rows: int, graph: bool, replays: int) -> None:
    """All rows of one workload; `make()` gives the work of this rank."""
    micro, batch, hidden = shape["microbatches"], shape["batch"], model.config.hidden_size
    sizes = (batch, rows, hidden)
    bytes = micro * batch * (rows * hidden * bench.dtype.itemsize + 8)
    about = {"shape": shape, "bytes": bytes}
    work = make()
    alone = _time(bench, work, Alone(mesh, *sizes, micro, bench.dtype), graph, replays, 12)
    stages = bench.everyone(alone)
    medians = [quantile(s, 0.5) for s in stages]
    mode = "graph" if graph else "eager"
    if "tokens" in shape:  # the chunks of one prompt fill the pipeline once
        ideal = [max(pair) * (micro + 1) / micro for pair in zip(*stages, strict=True)]
    elif micro == 1:
        ideal = [sum(pair) for pair in zip(*stages, strict=True)]
    else:
        ideal = [max(pair) for pair in zip(*stages, strict=True)]
    bench.say(f"the stages alone: {medians[0]:.1f} and {medians[1]:.1f} us")
    base = bench.record("pipeline", "compute_only", mode, ideal, **about)
    for impl, links in (("fused", Channels), ("nccl", Library)):
        times = bench.attempt(
            f"pipeline {impl}",
            lambda links=links: _time(bench, work, links(mesh, *sizes, micro, bench.dtype), graph, replays, 12),
        )
        if times is not None:
            timing = bench.record("pipeline", impl, mode, times, **about)
            ratio = timing.us_p50 / base.us_p50
            bubble = 1 - sum(medians) / (2 * timing.us_p50)
            bench.say(f"  x{ratio:.4f} of it, {1 / ratio:.3f} of its throughput; bubble {bubble:.1%} of both stages")


def run(arguments: argparse.Namespace) -> int:
    bench = Bench(arguments)
    if bench.world != 2 or bench.device.type != "cuda":
        sys.exit(f"bench_pipeline: needs two GPUs, here are {bench.world} ranks on {bench.device.type}")
    config = _config(arguments.model, arguments.layers)
    mesh = fp.init(pp=2, device="cuda", timeout=120)
    with torch.no_grad():
        model = fp.LlamaForCausalLM(config, mesh=mesh, dtype=bench.dtype)
        _fill(model, bench.pg.rank())
        bench.say(f"{arguments.model} with {config.num_hidden_layers} layers: {len(model.layer_range)} on this stage")
        for batch in arguments.batch:
            for micro in (1, 4, 8):
                shape = {"stages": 2, "microbatches": micro, "batch": batch}
                work = functools.partial(Decode, model, batch, micro, arguments.context)
                _case(bench, mesh, model, work, shape, 1, True, 10)
        chunk, micro = arguments.chunk, 8
        shape = {"stages": 2, "microbatches": micro, "batch": 1, "tokens": chunk}
        _case(bench, mesh, model, functools.partial(Prefill, model, chunk, micro), shape, chunk, False, 1)
    return bench.finish()


if __name__ == "__main__":
    p = parser(__doc__)
    p.add_argument("--model", choices=MODELS, default="llama-3-70b")
    p.add_argument("--layers", type=int, default=40, help="fewer than the model has, where memory does not suffice")
    p.add_argument("--batch", type=int, nargs="+", default=(1, 8), help="sequences of a micro-batch")
    p.add_argument("--context", type=int, default=1024)
    p.add_argument("--chunk", type=int, default=1024, help="tokens of a chunk of the prompt")
    main(run, p)
