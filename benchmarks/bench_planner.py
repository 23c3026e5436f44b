"""Whole steps of Llama-shaped models on two GPUs, and peak memory: what the planner's predictions are compared with.

    torchrun --nproc-per-node 2 benchmarks/bench_planner.py [--models llama-3-8b llama-3-70b:40] [--what decode prefill]
    python -m fused_parallel.planner.validate --steps benchmarks/results/planner.csv

Without torchrun it starts one rank a GPU. Random weights; a model is a preset or a config.json, with `:N` cut to N
layers. TP1 (both ranks hold it whole and run at once; left out where it does not fit), TP2 and PP2. Rows, by `what`:

    decode     fused: a round of fp.generate without the host (model, verification, the token to all ranks), captured,
               one token a sequence after `ctx` cached ones. torch_nccl: the same in plain torch, captured, up to each
               sequence's best token (TP only). PP with micro > 1: bench_pipeline's round, captured.
    prefill    fused: fp.generate's prefill of one prompt of `ctx` tokens, eager, in chunks of `chunk`
    speculate  fused: a captured round that drafts k tokens with the model `draft`, held whole on every rank
    offload    fused: rounds with `streamed` of the layers in host memory, from the host reading one's tokens to the
               next's; one that drafts k tokens, captured
    memory     fused: fp.generate of `batch` prompts of `ctx` tokens and `new` new ones, microseconds for all of it.
               `bytes` is the peak of rank `rank`: of=torch what tensors took at most, of=device all that is taken on
               the GPU at the end, with cached blocks, CUDA's context and the buffers of NCCL, which every one of the
               `--meshes` has: name one of them

Elsewhere `bytes` are the weights (without the embedding) and the cache of the fullest rank, and `floor_us` launch +
reading them once. Every row is written as soon as it is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import time
from collections.abc import Callable

import bench_pipeline
import torch
import torch.distributed as dist
from _common import Bench, captured, main, parser, relative
from bench_decode_step import TOLERANCE, _plain

import fused_parallel as fp
from fused_parallel.models.config import LlamaConfig
from fused_parallel.models.llama import LlamaDecoderLayer
from fused_parallel.nn.streamed_layers import streamed_bytes
from fused_parallel.planner.model import load_config, load_model
from fused_parallel.planner.search import MAX_CHUNK
from fused_parallel.speculative.round import Round

WHAT = ("decode", "prefill", "speculate", "offload", "memory")
REPLAYS = 2  # back to back in a measurement, whose end waits for all ranks
WARMUP = 2
RESERVE = 0.8  # of a GPU's memory that the weights of a model held whole may take


def config_of(name: str) -> LlamaConfig:
    """Of a preset or file, with `:N` cut to N layers; long enough for every case here."""
    name, _, layers = name.partition(":")
    config = load_config(name)[0]
    cut = {"num_hidden_layers": int(layers)} if layers else {}
    return dataclasses.replace(config, max_position_embeddings=1 << 17, eos_token_id=None, **cut)


def fill(model: fp.LlamaForCausalLM, seed: int) -> None:
    """Random weights that keep activations of order one, made on the device; norms are 1, alike on all ranks."""
    generator = torch.Generator(model.device).manual_seed(seed)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            p.fill_(1.0)
            continue
        # Layers in host memory are filled through the device: its generator is the fast one.
        to = p if p.device == model.device else torch.empty(p.shape, device=model.device, dtype=p.dtype)
        to.normal_(0, 0.5 * p.shape[1] ** -0.5 if "embed" not in name else 1.0, generator=generator)
        if to is not p:
            p.copy_(to)


class Cases:
    """What is measured on one model and arrangement."""

    def __init__(self, bench: Bench, arguments: argparse.Namespace, name: str, mesh, **options) -> None:
        self.bench, self.arguments, self.mesh = bench, arguments, mesh
        self.on_gpu = bench.device.type == "cuda"
        self.before = torch.cuda.memory_allocated() if self.on_gpu else 0
        self.model = fp.LlamaForCausalLM(config_of(name), mesh=mesh, device=bench.device, dtype=bench.dtype, **options)
        # A replica's ranks draw alike, so that both hold the same model.
        fill(self.model, mesh.get_local_rank("tp") + 8 * mesh.get_local_rank("pp"))
        self.tp, self.pp = mesh["tp"].size(), mesh["pp"].size()
        split = bench.everyone(len(self.model.layer_range))[:: self.tp][: self.pp]
        self.about = {"model": name, "tp": self.tp, "pp": self.pp, "split": "+".join(map(str, split))}
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        if self.model.model.embed_tokens is not None:  # of which a few rows are read
            weights -= self.model.model.embed_tokens.weight.nbytes
        self.weights = weights

    def record(self, what: str, impl: str, mode: str, us: list[float], *, cache: int = 0, **shape) -> None:
        bytes = max(self.bench.everyone(self.weights + cache))
        c = self.bench.ceilings
        self.bench.record(
            "planner",
            impl,
            mode if self.on_gpu else "eager",
            us,
            shape=self.about | {"what": what, **shape},
            bytes=bytes,
            floor_us=c and c.launch_us + c.memory_us(bytes),
        )

    def time(self, step: Callable[[], object], reset: Callable[[], object], replays: int = REPLAYS) -> list[float]:
        """Microseconds of a step, once a round; `reset` comes before each."""
        took = []
        for _ in range(WARMUP + self.arguments.rounds):
            reset()
            if not self.on_gpu:
                dist.barrier(group=self.bench.pg)
                begin = time.perf_counter()
                for _ in range(replays):
                    step()
                took.append(1e6 * (time.perf_counter() - begin) / replays)
                continue
            torch.cuda.synchronize()
            dist.barrier(group=self.bench.pg)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(replays):
                step()
            end.record()
            torch.cuda.synchronize()
            took.append(1e3 * start.elapsed_time(end) / replays)
        return took[WARMUP:]

    def round(self, batch: int, context: int, draft=None, k: int = 0) -> tuple[Round, Callable[[], None]]:
        """A generation's state after `context` tokens of each sequence, and what sets it back to that."""
        device, vocabulary = self.bench.device, self.model.config.vocab_size
        room = (k + 1) * (max(REPLAYS, self.arguments.rounds + WARMUP) + 2)
        state = Round(
            self.model,
            draft,
            k,
            batch,
            context + room,
            seed=torch.arange(batch, device=device),
            temperature=torch.zeros(batch, device=device),
            sampling={},
            method="rejection",
        )
        caches = [state.cache] + ([state.drafter.cache] if draft is not None and state.drafter is not None else [])
        for cache in caches:
            cache.k.normal_(), cache.v.normal_()
        generator = torch.Generator(device).manual_seed(batch)
        state.history.random_(vocabulary, generator=generator)
        return state, lambda: state.cache.lens.fill_(context)

    def decode(self, batch: int, context: int) -> None:
        """All rows of one batch."""
        shape = {"batch": batch, "ctx": context}
        state, reset = self.round(batch, context)
        reset()
        if self.on_gpu:
            gc.collect()
            state.capture()
        cache = state.cache.nbytes
        self.record("decode", "fused", "graph", self.time(state.run, reset), cache=cache, **shape)
        if self.pp == 1:
            self._decode_plain(state, shape)
        del state, reset
        if self.pp > 1 and self.on_gpu and batch > 1:
            micro = min(self.pp, batch)
            work = bench_pipeline.Decode(self.model, batch // micro, micro, context)
            took = bench_pipeline._time(self.bench, work, bench_pipeline.Channels(self.mesh, work), True)
            self.record("decode", "fused", "graph", took, cache=cache, **shape, micro=micro)

    def _decode_plain(self, state: Round, shape: dict) -> None:
        context, batch, pg = shape["ctx"], shape["batch"], self.model.tp_group
        step, ids = _plain(self.model, pg, context), torch.zeros(batch, 1, dtype=torch.int64, device=self.bench.device)
        state.cache.lens.fill_(context - 1)
        expected, got = self.model(ids, state.cache).view(batch, -1), step(ids, state.cache).view(batch, -1)
        error = max(self.bench.everyone(relative(got, expected)))
        if not error <= TOLERANCE:
            self.bench.wrong.append(f"planner torch_nccl {self.about} {shape}: relative error {error:.1e}")
            self.bench.say("WRONG", self.bench.wrong[-1])
            return
        best = torch.empty(pg.size() * batch, 2, device=self.bench.device)

        def whole() -> torch.Tensor:
            values, at = step(ids, state.cache).view(batch, -1).float().max(-1)
            mine = torch.stack((values, at.float()), -1)
            dist.all_gather_into_tensor(best, mine, group=pg)
            return best.view(-1, batch, 2)[..., 0].argmax(0)

        run = captured(whole, self.on_gpu)
        took = self.time(run, lambda: None)
        self.record("decode", "torch_nccl", "graph", took, cache=state.cache.nbytes, **shape)

    def prefill(self, length: int, chunk: int) -> None:
        """One prompt, `chunk` tokens at a time."""
        device = self.bench.device
        state, _ = self.round(1, length)
        ids = torch.randint(self.model.config.vocab_size, (1, length), device=device)
        dist.broadcast(ids, 0, group=self.bench.pg)
        lens = torch.full((1,), length, dtype=torch.int32, device=device)
        took = self.time(lambda: state.prefill(ids, lens, chunk), lambda: None, replays=1)
        self.record("prefill", "fused", "eager", took, batch=1, ctx=length, chunk=chunk)

    def speculate(self, batch: int, context: int, draft: fp.LlamaForCausalLM, named: str, k: int) -> None:
        """A captured round with drafting."""
        state, reset = self.round(batch, context, draft, k)
        reset()
        if self.on_gpu:
            gc.collect()
            state.capture()
        shape = {"batch": batch, "ctx": context, "draft": named, "k": k}
        self.record("speculate", "fused", "graph", self.time(state.run, reset), cache=state.cache.nbytes, **shape)

    def offload(self, batch: int, context: int, streamed: int, draft=None, named: str = "", k: int = 0) -> None:
        """Rounds in a row, each until the host has its tokens, as in fp.generate."""
        state, reset = self.round(batch, context, draft, k)
        reset()
        if k and self.on_gpu:  # drafting eagerly is bound by the host
            gc.collect()
            state.capture()
        took, count = [], WARMUP + self.arguments.rounds
        dist.barrier(group=self.bench.pg)
        end = time.perf_counter()
        for _ in range(count):
            begin = end
            state.run()
            state.tokens.tolist()
            end = time.perf_counter()
            took.append(1e6 * (end - begin))
        shape = {"batch": batch, "ctx": context, "streamed": streamed} | ({"draft": named, "k": k} if k else {})
        mode = "graph" if k else "eager"
        self.record("offload", "fused", mode, took[WARMUP:], cache=state.cache.nbytes, **shape)

    def memory(self, batch: int, length: int, new: int) -> None:
        """The peak of a generation with the passes that a plan would make."""
        prompts = torch.randint(
            self.model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0)
        ).tolist()
        micro = min(self.pp, batch)
        chunk = max(1, MAX_CHUNK // -(-batch // micro))
        if self.on_gpu:
            gc.collect(), torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        dist.barrier(group=self.bench.pg)
        begin = time.perf_counter()
        fp.generate(self.model, prompts, new, microbatches=micro, prefill_chunk=chunk)
        took = 1e6 * (time.perf_counter() - begin)
        peak = taken = 0
        if self.on_gpu:
            peak = torch.cuda.max_memory_allocated() - self.before
            free, whole = torch.cuda.mem_get_info()
            taken = whole - free
        everyone = self.bench.everyone((peak, taken))
        shape = self.about | {"what": "memory", "batch": batch, "ctx": length, "new": new, "micro": micro}
        for rank, values in enumerate(everyone):
            for of, bytes in zip(("torch", "device"), values, strict=True):
                self.bench.record(
                    "planner", "fused", "eager", [took], shape=shape | {"of": of, "rank": rank}, bytes=bytes
                )


def _fits_whole(name: str, bench: Bench) -> bool:
    if bench.device.type != "cuda":
        return True
    model = load_model(config_of(name))
    return model.params() * 2 < RESERVE * torch.cuda.get_device_properties(bench.device).total_memory


def _clear() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _model(bench: Bench, arguments: argparse.Namespace, name: str, mesh) -> None:
    cases = Cases(bench, arguments, name, mesh)
    what = arguments.what
    if "memory" in what:  # first: nothing else has left blocks behind
        cases.memory(arguments.memory_batch, arguments.context, 32)
    if "decode" in what:
        for batch in arguments.batch:
            cases.decode(batch, arguments.context)
            _clear()
    if "prefill" in what:
        for length in arguments.prompts:
            # Whole, and where there are stages cut into as many chunks as keep them busy.
            for chunk in sorted({length, length // 4} if cases.pp > 1 and length >= 2048 else {length}):
                # Out of memory is alike on all ranks of one stage; what else there is to measure is not lost with it.
                bench.attempt(f"prefill of {length} by {chunk}", functools.partial(cases.prefill, length, chunk))
                _clear()


def _offload(bench: Bench, arguments: argparse.Namespace, mesh, draft) -> None:
    name = arguments.offload_model
    layers = config_of(name).num_hidden_layers
    for streamed in (layers, layers // 2):
        offload = fp.Offload(resident_bytes=(layers - streamed) * _layer_bytes(name, mesh, bench))
        cases = Cases(bench, arguments, name, mesh, offload=offload)
        try:
            cases.offload(1, arguments.context, streamed)
            if streamed == layers:
                cases.offload(max(arguments.batch), arguments.context, streamed)
                cases.offload(1, arguments.context, streamed, draft, arguments.draft, 8)
        finally:
            if bench.device.type == "cuda":
                torch.cuda.synchronize()
            cases.model.model.layers.release()
        del cases
        _clear()


def _layer_bytes(name: str, mesh, bench: Bench) -> int:
    layer = LlamaDecoderLayer(config_of(name), 0, group=mesh.get_group("tp"), device="meta", dtype=bench.dtype)
    return streamed_bytes(layer)


def run(arguments: argparse.Namespace) -> int:
    bench = Bench(arguments)
    with torch.no_grad():
        return _run(bench, arguments)


def _run(bench: Bench, arguments: argparse.Namespace) -> int:
    if bench.world != 2:
        raise SystemExit(f"bench_planner: TP2 and PP2 need two ranks, here are {bench.world}")
    init = functools.partial(fp.init, device=bench.device.type, timeout=120)
    sizes = {"tp1": {"dp": 2, "tp": 1}, "tp2": {"tp": 2}, "pp2": {"pp": 2, "tp": 1}}
    meshes = {named: init(**sizes[named]) for named in arguments.meshes}
    for name in arguments.models:
        for named, mesh in meshes.items():
            if named == "tp1" and not _fits_whole(name, bench):
                bench.say(f"left out: {name} on one GPU, which is too small for it")
                continue
            if set(arguments.what) & {"decode", "prefill", "memory"}:
                _model(bench, arguments, name, mesh)
            _clear()
    if {"speculate", "offload"} & set(arguments.what) and "tp2" in meshes:
        tp2 = meshes["tp2"]
        draft = fp.LlamaForCausalLM(config_of(arguments.draft), mesh=None, device=bench.device, dtype=bench.dtype)
        fill(draft, 0)
        if "speculate" in arguments.what:
            cases = Cases(bench, arguments, arguments.models[-1], tp2)
            for batch in (min(arguments.batch), max(arguments.batch)):
                cases.speculate(batch, arguments.context, draft, arguments.draft, 4)
            del cases
            _clear()
        if "offload" in arguments.what:
            _offload(bench, arguments, tp2, draft)
    return bench.finish()


if __name__ == "__main__":
    p = parser(__doc__)
    p.add_argument("--models", nargs="+", default=["llama-3-8b", "llama-3-70b:40"], metavar="NAME[:LAYERS]")
    p.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT))
    p.add_argument("--meshes", nargs="+", choices=("tp1", "tp2", "pp2"), default=("tp1", "tp2", "pp2"))
    p.add_argument("--batch", type=int, nargs="+", default=(1, 8, 32, 64))
    p.add_argument("--context", type=int, default=1024)
    p.add_argument("--prompts", type=int, nargs="+", default=(512, 2048, 8192), help="lengths to prefill")
    p.add_argument("--rounds", type=int, default=10, help="measurements of each figure; the median counts")
    p.add_argument("--memory-batch", type=int, default=32, help="prompts of the generation whose memory is read")
    p.add_argument("--offload-model", default="llama-3-70b:10", metavar="NAME[:LAYERS]")
    p.add_argument("--draft", default="llama-3-8b", metavar="NAME[:LAYERS]")
    main(run, p)
