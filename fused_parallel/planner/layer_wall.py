"""The communication wall: what one decoder layer computes and what it communicates, by batch and tensor-parallel
degree; measured on this machine's ranks, or predicted for others."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .._table import print_table
from ..comm import collectives
from ..comm.groups import init, local_group, resolve_group
from ..comm.launch import RankPool
from ..comm.probe_collectives import rank_environment
from ..models.config import LlamaConfig
from ..models.llama import LlamaDecoderLayer
from ..nn import KVCache, RMSNorm, RotaryEmbedding, RowParallelLinear
from ..nn.attention import lens_after
from ..ops import add_rms_norm
from ..testing.timer import ROTATION_BYTES, time_collective
from .cluster import Cluster
from .cost import Step, layer_us, stage_cost
from .model import ModelShape, load_model

_TIMEOUT_S = 120
DISTURBED = 0.05  # of a layer's time: computing cannot take so much longer than the layer
_MOST_LAYERS = 32  # of a stack that is timed; small layers are several, so that no call finds its weights in a cache
# Who adds up what the ranks computed. All else in a layer is this library's in both.
OURS, NCCL, GLOO = "fused_parallel", "NCCL", "Gloo"


@dataclass(frozen=True)
class LayerTime:
    """Microseconds of one layer's decoding step of `batch` sequences on `tp` ranks, the slowest rank's median.

    backend: who added up what the ranks computed. compute_us: the layer with a rank's sizes and no peers.
    communication_us: what the whole layer takes beyond that; slightly negative where the two do not differ by more than
    they vary.
    """

    backend: str
    batch: int
    tp: int
    compute_us: float
    communication_us: float

    @property
    def us(self) -> float:
        """The whole layer."""
        return self.compute_us + self.communication_us


@dataclass(frozen=True)
class LayerWall:
    """Rows by backend, batch and degree. machine: where they were measured, or what they were predicted for."""

    model: str
    machine: str
    context: int
    measured: bool
    rows: tuple[LayerTime, ...]

    def of(self, backend: str, batch: int) -> list[LayerTime]:
        """One backend's rows at one batch, by degree."""
        return sorted((r for r in self.rows if (r.backend, r.batch) == (backend, batch)), key=lambda r: r.tp)

    @property
    def backends(self) -> list[str]:
        """Those of the rows, in their order."""
        return list(dict.fromkeys(r.backend for r in self.rows))

    @property
    def batches(self) -> list[int]:
        """Those of the rows."""
        return sorted({r.batch for r in self.rows})

    def sentences(self) -> list[str]:
        """Where the wall lies at each batch: the degree beyond which a layer is no faster, and for whom."""
        texts = []
        for batch in self.batches:
            parts = []
            for backend in self.backends:
                rows = self.of(backend, batch)
                best = min(rows, key=lambda r: r.us)
                text = f"{backend}: fastest at TP{best.tp} ({best.us:.1f} us a layer"
                text += f", {_share(best)}% communication)" if best.tp > 1 else ")"
                after = [r for r in rows if r.tp > best.tp]
                if after:
                    text += f", TP{after[0].tp} takes {after[0].us:.1f}"
                crossed = [r for r in rows if r.communication_us > r.compute_us]
                if crossed:
                    text += f"; from TP{crossed[0].tp} on it communicates longer than it computes"
                parts.append(text)
            texts.append(f"Batch {batch}: " + ". ".join(parts) + ".")
        if any(r.communication_us < -DISTURBED * r.us for r in self.rows):
            texts.append(
                "In some rows computing alone took longer than the whole layer, which other work on this machine must "
                "have caused: measure again."
            )
        if GLOO in self.backends:
            texts.append("On CPUs this library's all-reduce is Gloo's, too: what lies between them is noise.")
        return texts

    def table(self) -> None:
        """Print the rows, and where the wall lies."""
        rows = [
            [r.batch, r.tp, r.backend, f"{r.compute_us:.1f}", f"{r.communication_us:.1f}", f"{r.us:.1f}", _share(r)]
            for batch in self.batches
            for r in sorted((r for r in self.rows if r.batch == batch), key=lambda r: r.tp)
        ]
        columns = ["batch", "TP", "backend", "compute us", "communication us", "layer us", "communication %"]
        print_table(f"{self.title}, one layer", columns, rows)
        for text in self.sentences():
            print(f"- {text}")

    @property
    def title(self) -> str:
        """What the rows are of."""
        how = "measured on" if self.measured else "predicted for"
        return f"{self.model}, {how} {self.machine}, decoding after {self.context} tokens"

    def plot(self, path: str | Path) -> None:
        """Draw a panel a batch: stacked bars by degree. Needs matplotlib."""
        from .plot import draw_wall

        draw_wall(self, path)


def _share(row: LayerTime) -> str:
    return f"{max(0.0, 100 * row.communication_us / row.us):.0f}" if row.tp > 1 else "0"


def predict_wall(
    model: ModelShape, cluster: Cluster, batches: Sequence[int], context: int, degrees: Sequence[int] | None = None
) -> LayerWall:
    """The cost model's layer on `cluster`, as measure_wall measures it: with NCCL's all-reduce and with this library's,
    the rest of the layer this library's in both. Where the cluster has no costs of this library's kernels: with NCCL
    and plain torch's layer alone.

    degrees: default 1, 2, 4, ... up to what the cluster and the model allow. Raises ValueError for a degree that the
    model or the cluster does not have.
    """
    possible = model.tp_degrees(cluster.gpus)
    chosen = _degrees(degrees, possible, f"{model.name} on {cluster.gpus} GPU(s)")
    backends, rows = [(NCCL, cluster)], []
    if cluster.ours is not None:
        ours = cluster.of("ours")
        backends = [(NCCL, dataclasses.replace(cluster, layer_us=layer_us(ours))), (OURS, ours)]
    for batch, (name, costs), tp in itertools.product(batches, backends, chosen):
        cost = stage_cost(model, costs, Step(batch, 1, context, 1), tp=tp, layers=1, dtype="bf16", head=False)
        rows.append(LayerTime(name, batch, tp, cost.busy - cost.communication, cost.communication))
    return LayerWall(model.name, cluster.name, context, False, tuple(rows))


def _degrees(asked: Sequence[int] | None, possible: list[int], where: str) -> list[int]:
    if asked is None:
        return [n for n in possible if n & (n - 1) == 0]
    wrong = [n for n in asked if n not in possible]
    if wrong:
        raise ValueError(f"wall: TP{wrong[0]} is not possible for {where}; possible: {', '.join(map(str, possible))}")
    return sorted(set(asked))


def measure_wall(
    config: LlamaConfig,
    name: str,
    batches: Sequence[int],
    context: int,
    degrees: Sequence[int] | None = None,
    *,
    device: str | None = None,
    rounds: int = 20,
    progress: Callable[[str], object] = lambda what: None,
) -> LayerWall:
    """Time one layer of `config`, random weights, on 1, 2, 4, ... ranks of this machine: with this library's
    row-parallel layers, and with torch's matmul, torch.distributed's all-reduce (NCCL, Gloo) and `fp.add_rms_norm` in
    their place.

    Args:
        batches, context: sequences that are decoded by one token each, after so many cached ones.
        degrees: default powers of two up to the GPUs (on CPUs: 1 and 2) that the model allows; each is measured on
            ranks of its own.
        device: "cuda" (bfloat16, in CUDA graphs) or "cpu" (float32, eager); default cuda where there is a GPU.
        rounds: measurements of each figure; the median counts.
        progress: is told what is measured next.

    Raises ValueError for a degree that the model or the machine does not have; RuntimeError or PeerTimeoutError if the
    ranks fail.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    shape = dataclasses.replace(load_model(config), name=name)
    if device == "cuda":
        most = torch.cuda.device_count() if torch.cuda.is_available() else 0
        machine = f"{most} x {torch.cuda.get_device_name(0)}" if most else "no GPU"
    else:
        most, machine = max(2, *(degrees or [2])), "this CPU (Gloo, float32)"
    chosen = _degrees(degrees, shape.tp_degrees(most), f"{name} on {machine}")
    if not chosen:
        raise ValueError(f"wall: there is nothing to measure on {machine}; --cluster PRESET predicts")
    rows: list[LayerTime] = []
    for tp in chosen:
        with RankPool(tp, rank_environment()) as pool:
            progress(f"TP{tp}")
            seconds = 300 * (1 + len(batches))
            rows += pool.run(_time_layers, config, device, tuple(batches), context, rounds, timeout=seconds)[0]
    return LayerWall(name, machine, context, True, tuple(rows))


def rank_config(config: LlamaConfig, tp: int) -> LlamaConfig:
    """A model whose layers are as large as a rank's of `tp`."""
    return dataclasses.replace(
        config,
        num_attention_heads=config.num_attention_heads // tp,
        num_key_value_heads=max(1, config.num_key_value_heads // tp),
        intermediate_size=math.ceil(config.intermediate_size / tp),
    )


def _time_layers(config: LlamaConfig, device: str, batches: tuple[int, ...], context: int, rounds: int):
    """On every rank: the rows of this degree, the same on all."""
    pg = init(device=device, timeout=_TIMEOUT_S)["tp"].get_group()
    found = []
    for batch, backend in itertools.product(batches, (NCCL if device == "cuda" else GLOO, OURS)):
        us = {}
        # The layer without peers first, alone in memory.
        for of, members in ((rank_config(config, pg.size()), local_group()), (config, pg)):
            if members is pg and pg.size() == 1:
                us[pg] = us[local_group()]
                continue
            stack = _Stack(of, members, device, batch, context, by_torch=backend != OURS)
            timing = time_collective(
                stack,
                inputs=stack.inputs,
                group=pg,
                mode="graph" if device == "cuda" else "eager",
                calls=max(1, 8 // stack.count),
                rounds=rounds,
            )
            us[members] = timing.us_p50 / stack.count
            del stack
        own = us[local_group()]
        found.append(LayerTime(backend, batch, pg.size(), own, us[pg] - own))
    return found


class _TorchRow(nn.Module):
    """In a RowParallelLinear's place: torch's matmul and torch.distributed's all-reduce, then add_rms_norm."""

    def __init__(self, row: RowParallelLinear) -> None:
        super().__init__()
        self.weight, self.bias, self.pg = row.weight, row.bias, resolve_group(row.group)

    def forward(self, x: torch.Tensor, residual: torch.Tensor, norm: RMSNorm) -> tuple[torch.Tensor, torch.Tensor]:
        out = collectives.all_reduce_(F.linear(x, self.weight), self.pg)
        out = out if self.bias is None else out.add_(self.bias)
        return add_rms_norm(out, residual, norm.weight, norm.variance_epsilon)


class _Stack:
    """Layers of random weights that run one after the other, as many as make their weights larger than caches."""

    def __init__(
        self, config: LlamaConfig, group, device: str, batch: int, context: int, *, by_torch: bool = False
    ) -> None:
        on_gpu = device == "cuda"
        where = torch.device(device, torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        self.dtype, self.where, self.batch, self.hidden = (
            torch.bfloat16 if on_gpu else torch.float32,
            where,
            batch,
            config.hidden_size,
        )
        kwargs = {"group": group, "device": where, "dtype": self.dtype}
        self.layers = [LlamaDecoderLayer(config, 0, **kwargs)]
        size = sum(p.numel() * p.element_size() for p in self.layers[0].parameters())
        self.count = min(_MOST_LAYERS, max(2, math.ceil(ROTATION_BYTES / size))) if on_gpu else 1
        self.layers += [LlamaDecoderLayer(config, i, **kwargs) for i in range(1, self.count)]
        if by_torch:
            for layer in self.layers:
                layer.self_attn.o_proj = _TorchRow(layer.self_attn.o_proj)
                layer.mlp.down_proj = _TorchRow(layer.mlp.down_proj)
        generator = torch.Generator(where).manual_seed(0)
        for p in (p for layer in self.layers for p in layer.parameters()):
            p.requires_grad_(False)
            # Norms stay 1: they are the same on all ranks, as they must be. Products keep the size of their inputs.
            p.fill_(1.0) if p.dim() == 1 else p.normal_(0, p.shape[1] ** -0.5, generator=generator)
        qkv = self.layers[0].self_attn.qkv_proj
        kv = (qkv.layout.local_kv, qkv.head_dim)
        self.cache = KVCache(self.count, batch, context + 1, *kv, device=where, dtype=self.dtype)
        self.cache.k.normal_(generator=generator), self.cache.v.normal_(generator=generator)
        self.cache.lens.fill_(context)
        self.positions = self.cache.positions(1)
        rotary = RotaryEmbedding(config.head_dim, config.rope_theta, config.rope_scaling, where)
        self.cos, self.sin = rotary(self.positions, self.dtype)
        self.lens = lens_after(self.positions)

    def inputs(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Normed hidden states and the residual, [batch, 1, hidden], the same on all ranks."""
        generator = torch.Generator(self.where).manual_seed(1 + index)
        shape = (2, self.batch, 1, self.hidden)
        x, residual = torch.randn(shape, dtype=self.dtype, device=self.where, generator=generator)
        return x, residual

    def __call__(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            norm = self.layers[0].input_layernorm
            x, residual = layer(x, residual, self.cos, self.sin, self.cache, self.positions, self.lens, norm)
        return x
