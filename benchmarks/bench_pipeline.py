"""A Llama model cut into two stages: decoding of one sequence, of micro-batches, and prefill in chunks.

    torchrun --nproc-per-node 2 benchmarks/bench_pipeline.py [--model llama-3-70b] [--layers 40] [--batch 1]

Without torchrun it starts one rank a GPU. Random weights, `--context` tokens in the cache. A round is one token of
every sequence: the first stage receives the tokens of the round before, the last one computes logits, takes the largest
and sends the tokens back. Each stage's round is one CUDA graph, replayed without a barrier in between; prefill is
eager, and a round of four micro-batches once more. Rows, microseconds a round:

    fused               the stages' channels; a micro-batch's tokens leave as soon as they are there
    fused_added_before  as that, but the stage's last addition is a kernel of its own, before the push
    nccl                dist.send and dist.recv, tokens of all micro-batches after the last one (sends that block would
                        otherwise wait for each other)
    torch_pipelining    torch.distributed.pipelining's ScheduleGPipe, forward only; eager: it cannot be captured
    compute_only        what the stages take alone: their sum for one micro-batch, else the slower one's times the
                        number of micro-batches (decode), times (chunks + stages - 1) (prefill): the time without any
                        communication

Printed beside them: time over that of compute_only, and for micro-batches the share of the no-bubble throughput.
`bytes`: hidden states and tokens that cross the boundary. Peers are measured at the first batch size and in prefill; a
row is written as soon as it is measured. With --device cpu: a small model over Gloo, eager, to try the script out.
"""

from __future__ import annotations

import argparse
import functools
import gc
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from _common import Bench, main, parser
from bench_decode_step import MODELS, _config, _fill

import fused_parallel as fp
from fused_parallel.models.config import LlamaConfig
from fused_parallel.pipeline.stage_links import StageLinks
from fused_parallel.testing.timer import quantile

ROUND_S, ROUNDS = 0.12, 8  # of one measurement: seconds, and how often
WAIT_S = 20  # for a peer: a run that hangs loses no more than that
SMALL = dict(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=8)
SMALL |= dict(num_key_value_heads=2, rope_theta=1e4, rms_norm_eps=1e-5, model_type="llama", torch_dtype="bfloat16")


class Channels:
    """Hidden states and tokens through fp's channels."""

    together = False  # tokens leave micro-batch by micro-batch

    def __init__(self, mesh, work: Decode | Prefill) -> None:
        size = max(work.hidden_bytes, 1 << 16)
        # As many slots as messages of a round: tokens are a round ahead (`prime`), so both ends would not capture a
        # message in the same slot otherwise.
        self.links = StageLinks(mesh.get_group("pp"), mesh.get_group("tp"), slots=work.micro, slot_bytes=size)
        self.shape, self.dtype = work.shape, work.model.dtype

    def hidden(self, m: int):
        received = self.links.receive(self.shape, self.dtype)
        return received.tensor, received.release

    def send_hidden(self, m: int, x: torch.Tensor, add: torch.Tensor) -> None:
        self.links.send(x, add)

    def tokens(self, m: int, ids: torch.Tensor) -> torch.Tensor:
        return self.links.share(ids)

    send_tokens = tokens

    def close(self) -> None:
        fp.check()
        for channel in self.links.channels.values():
            channel.close()


class AddedBefore(Channels):
    """The same with the stage's last addition as a kernel of its own: what it saves to form the sum while pushing."""

    def send_hidden(self, m: int, x: torch.Tensor, add: torch.Tensor) -> None:
        self.links.send(x + add)


class Library:
    """The same by dist.send and dist.recv."""

    together = True

    def __init__(self, mesh, work: Decode | Prefill) -> None:
        self.peer = 1 - dist.get_rank()
        self.buffers = [torch.empty(work.shape, dtype=work.model.dtype, device=work.device) for _ in range(work.micro)]

    def hidden(self, m: int):
        dist.recv(self.buffers[m], self.peer)
        return self.buffers[m], lambda: None

    def send_hidden(self, m: int, x: torch.Tensor, add: torch.Tensor) -> None:
        dist.send(x + add, self.peer)

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

    def __init__(self, mesh, work: Decode | Prefill) -> None:
        self.x = torch.randn(work.shape, device=work.device).to(work.model.dtype)

    def hidden(self, m: int):
        return self.x, lambda: None

    def send_hidden(self, m: int, x: torch.Tensor, add: torch.Tensor) -> None:
        x + add  # the model's last addition, which is computation

    def tokens(self, m: int, ids: torch.Tensor) -> torch.Tensor:
        return ids

    send_tokens = tokens

    def close(self) -> None:
        pass


class Pipelining(Library):
    """torch.distributed.pipelining's GPipe schedule of the same slices, forward only. It knows no way back for tokens:
    those travel by dist.send and dist.recv."""

    def __init__(self, mesh, work: Decode | Prefill) -> None:
        from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

        super().__init__(mesh, work)
        hidden = torch.empty(work.shape, dtype=work.model.dtype, device="meta")
        ids, out = work.ids[0].to("meta"), work.example().to("meta")
        ends = ((ids, hidden), (hidden, out))[not work.first]
        stage = PipelineStage(
            _Slice(work), int(not work.first), 2, work.device, *[(x,) for x in ends], group=mesh.get_group("pp")
        )
        self.schedule = ScheduleGPipe(stage, work.micro)

    def round(self, work: Decode | Prefill) -> None:
        out = self.schedule.step(*([torch.cat(list(work.ids))] if work.first else []))
        for m, ids in enumerate(work.ids if work.gives_tokens else ()):
            if work.first:
                self.tokens(m, ids)
            else:
                self.send_tokens(m, out[m * len(ids) : (m + 1) * len(ids)])


class _Slice(torch.nn.Module):
    """A stage's work as a module of one argument; calls come micro-batch by micro-batch."""

    def __init__(self, work: Decode | Prefill) -> None:
        super().__init__()
        self.compute, self.first, self.micro, self.calls = work.compute, work.first, work.micro, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.compute(self.calls % self.micro, x)
        self.calls += 1
        # The schedule holds the result to the strides of the example, of one row, too.
        return out[0] + out[1] if self.first else out.clone(memory_format=torch.contiguous_format)


class Decode:
    """A round of `micro` micro-batches of `batch` sequences on this rank's stage."""

    gives_tokens = True

    def __init__(self, model: fp.LlamaForCausalLM, batch: int, micro: int, context: int) -> None:
        self.model, self.micro, self.device = model, micro, model.device
        self.shape = (batch, 1, model.config.hidden_size)
        self.hidden_bytes = batch * model.config.hidden_size * model.dtype.itemsize
        self.caches = [model.make_cache(batch, context) for _ in range(micro)]
        for cache in self.caches:
            cache.k.normal_(), cache.v.normal_()
            cache.lens.fill_(context - 1)
        vocabulary = model.config.vocab_size
        self.ids = [torch.randint(vocabulary, (batch, 1), device=model.device) for _ in range(micro)]
        self.first = model.pp_group.rank() == 0

    def example(self) -> torch.Tensor:
        """Like what the last stage's `compute` gives."""
        return self.ids[0]

    def compute(self, m: int, x: torch.Tensor):
        """What this stage makes of micro-batch m: two tensors whose sum is the hidden states, or the next tokens."""
        cache = self.caches[m]
        out = self.model.model(x, cache, cache.positions(1))
        if self.first:
            return out
        return self.model.lm_head(out)[..., : self.model.config.vocab_size].argmax(-1)

    def prime(self, links) -> None:
        """The last stage sends the tokens that the first round begins with."""
        if not self.first and not links.together:
            for m in range(self.micro):
                links.send_tokens(m, self.ids[m])

    def drain(self, links) -> None:
        """The first stage takes the tokens of the last round: nothing is left on the way."""
        if self.first and not links.together:
            for m in range(self.micro):
                links.tokens(m, self.ids[m])

    def round(self, links) -> None:
        for m, ids in enumerate(self.ids):
            if self.first:
                if not links.together:
                    links.tokens(m, ids)
                links.send_hidden(m, *self.compute(m, ids))
                continue
            x, release = links.hidden(m)
            ids.copy_(self.compute(m, x))
            release()
            if not links.together:
                links.send_tokens(m, ids)
        # All at the end: nothing is on its way between rounds, which not every library would hold.
        for m, ids in enumerate(self.ids if links.together else ()):
            links.tokens(m, ids) if self.first else links.send_tokens(m, ids)


class Prefill:
    """`micro` chunks of `rows` tokens of one prompt on this rank's stage."""

    gives_tokens = False

    def __init__(self, model: fp.LlamaForCausalLM, rows: int, micro: int) -> None:
        self.model, self.micro, self.rows, self.device = model, micro, rows, model.device
        self.shape = (1, rows, model.config.hidden_size)
        self.hidden_bytes = rows * model.config.hidden_size * model.dtype.itemsize
        self.cache = model.make_cache(1, rows * micro)
        self.ids = torch.randint(model.config.vocab_size, (micro, 1, rows), device=model.device)
        self.first = model.pp_group.rank() == 0

    def example(self) -> torch.Tensor:
        """Like what the last stage's `compute` gives."""
        return torch.empty(1, 1, self.shape[-1], dtype=self.model.dtype)

    def compute(self, m: int, x: torch.Tensor):
        """What this stage makes of chunk m: two tensors whose sum is the hidden states, or the last token's."""
        if m == 0:
            self.cache.lens.zero_()
        out = self.model.model(x, self.cache, self.cache.positions(self.rows))
        self.cache.lens += self.rows
        if self.first:
            return out
        if m == self.micro - 1:
            self.model.lm_head(out[:, -1:])
        return out[:, -1:]

    def prime(self, links) -> None:
        """Prompts are there."""

    drain = prime

    def round(self, links) -> None:
        for m in range(self.micro):
            if self.first:
                links.send_hidden(m, *self.compute(m, self.ids[m]))
            else:
                x, release = links.hidden(m)
                self.compute(m, x)
                release()


def _time(bench: Bench, work: Decode | Prefill, links, graph: bool) -> list[float]:
    """Microseconds a round, ROUNDS times: of decoding over rounds that follow each other, the first of which, in which
    the stages fill, is not counted; of a prompt from begin to end."""
    on_gpu = bench.device.type == "cuda"
    step: Callable = functools.partial(work.round, links)
    if isinstance(links, Pipelining):
        step = functools.partial(links.round, work)
    stream = torch.cuda.Stream() if on_gpu else None

    def timed(replays: int) -> float:
        _synchronize(bench)
        if not on_gpu:
            if work.gives_tokens:
                step()
            begin = time.perf_counter()
            for _ in range(replays):
                step()
            return 1e6 * (time.perf_counter() - begin) / replays
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(stream):
            if work.gives_tokens:
                step()
            start.record()
            for _ in range(replays):
                step()
            end.record()
        torch.cuda.synchronize()
        return 1e3 * start.elapsed_time(end) / replays

    _synchronize(bench)  # what was made on another stream
    with torch.cuda.stream(stream):  # of None: the current one
        work.prime(links)
    timed(1)
    if graph:
        captured = torch.cuda.CUDAGraph()
        gc.collect()  # graphs and channels of earlier cases: collected meanwhile they would break the capture
        gc.disable()
        try:
            with torch.cuda.graph(captured, stream=stream):
                step()
        finally:
            gc.enable()
        step = captured.replay
    us = max(bench.everyone(timed(1)))
    replays = max(1, min(20, round(ROUND_S * 1e6 / us))) if work.gives_tokens else 1
    times = [timed(replays) for _ in range(ROUNDS if us * replays < 2e6 * ROUND_S else ROUNDS // 2)]
    with torch.cuda.stream(stream):
        work.drain(links)
    _synchronize(bench)
    links.close()
    return times


def _synchronize(bench: Bench) -> None:
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier(group=bench.pg)


def _case(bench: Bench, mesh, work: Decode | Prefill, shape: dict, modes: tuple[str, ...], peers: bool) -> None:
    """All rows of one workload of this rank. With `peers` also those that are not fused: each takes as long."""
    micro = work.micro
    about = {"shape": shape, "bytes": micro * (work.hidden_bytes + (8 * shape["batch"] if work.gives_tokens else 0))}
    for mode in modes:
        alone = _time(bench, work, Alone(mesh, work), mode == "graph")
        stages = bench.everyone(alone)
        medians = [quantile(s, 0.5) for s in stages]
        if not work.gives_tokens:  # the chunks of one prompt fill the pipeline once
            ideal = [max(pair) * (micro + 1) / micro for pair in zip(*stages, strict=True)]
        elif micro == 1:
            ideal = [sum(pair) for pair in zip(*stages, strict=True)]
        else:
            ideal = [max(pair) for pair in zip(*stages, strict=True)]
        bench.say(f"the stages alone, {mode}: {medians[0]:.1f} and {medians[1]:.1f} us")
        base = bench.record("pipeline", "compute_only", mode, ideal, **about)
        # What may hang or fail comes last.
        impls = {"fused": Channels}
        if peers:
            impls |= {"fused_added_before": AddedBefore} if work.gives_tokens else {}
            impls |= {bench.backend: Library}
            impls |= {"torch_pipelining": Pipelining} if mode == "eager" else {}
        for impl, links in impls.items():
            if bench.arguments.impls and impl not in bench.arguments.impls:
                continue
            times = bench.attempt(
                f"pipeline {impl}",
                lambda links=links, mode=mode: _time(bench, work, links(mesh, work), mode == "graph"),
            )
            if times is not None:
                timing = bench.record("pipeline", impl, mode, times, **about)
                ratio = timing.us_p50 / base.us_p50
                bubble = 1 - sum(medians) / (2 * timing.us_p50)
                bench.say(
                    f"  x{ratio:.4f} of it, {1 / ratio:.3f} of its throughput; bubble {bubble:.1%} of both stages"
                )


def run(arguments: argparse.Namespace) -> int:
    bench = Bench(arguments, floors=False)
    on_gpu = bench.device.type == "cuda"
    if bench.world != 2:
        sys.exit(f"bench_pipeline: two ranks, got {bench.world}: torchrun --nproc-per-node 2 ...")
    config = _config(arguments.model, arguments.layers) if on_gpu else LlamaConfig.from_dict(SMALL)
    mesh = fp.init(pp=2, device=arguments.device, timeout=WAIT_S)
    with torch.no_grad():
        model = fp.LlamaForCausalLM(config, mesh=mesh, dtype=bench.dtype)
        _fill(model, bench.pg.rank())
        bench.say(f"{arguments.model} with {config.num_hidden_layers} layers: {len(model.layer_range)} on this stage")
        name = f"{arguments.model if on_gpu else 'small'}:{config.num_hidden_layers}"
        usual: tuple[str, ...] = ("graph",) if on_gpu else ("eager",)
        chunk, micro = (arguments.chunk, 8) if on_gpu else (16, 8)

        def decode(batch: int, micro: int, modes: tuple[str, ...], peers: bool) -> None:
            shape = {"model": name, "stages": 2, "microbatches": micro, "batch": batch}
            _case(bench, mesh, Decode(model, batch, micro, arguments.context), shape, modes, peers)

        # In the order of what is asked of them: a run may be cut short.
        for number, batch in enumerate(arguments.batch):
            for parts in arguments.microbatches:
                decode(batch, parts, usual, number == 0)
        shape = {"model": name, "stages": 2, "microbatches": micro, "batch": 1, "tokens": chunk}
        _case(bench, mesh, Prefill(model, chunk, micro), shape, ("eager",), True)
        if on_gpu:  # what torch.distributed.pipelining can be compared with
            decode(arguments.batch[-1], 4, ("eager",), True)
    return bench.finish()


if __name__ == "__main__":
    p = parser(__doc__)
    p.add_argument("--model", choices=MODELS, default="llama-3-70b")
    p.add_argument("--layers", type=int, default=40, help="fewer than the model has, where memory does not suffice")
    p.add_argument("--batch", type=int, nargs="+", default=(1, 8), help="sequences of a micro-batch")
    p.add_argument("--microbatches", type=int, nargs="+", default=(1, 4, 8))
    p.add_argument("--context", type=int, default=1024)
    p.add_argument("--chunk", type=int, default=1024, help="tokens of a chunk of the prompt")
    main(run, p)
