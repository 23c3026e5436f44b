"""What a step costs: roofline matmuls, alpha-beta communication, and one constant a layer. Times in microseconds."""

from __future__ import annotations

import bisect
import dataclasses
import math
from dataclasses import dataclass
from functools import cache

from .cluster import CLUSTERS, NCCL, OURS, Cluster, EagerLayer
from .hardware import GPU, Link
from .measured import (
    EAGER_LAYER_US,
    H100_CONTEXT,
    H100_DECODE_LAYERS,
    H100_DECODE_US,
    H200_HBM_GB_S,
    LAYER_CONSTANT_BATCH,
    PAIR_CONTEXT,
    PAIR_DECODE_MS,
    Points,
    verify_constants,
)
from .model import ACTIVATION_BYTES, WEIGHT_BYTES, ModelShape, load_model

# Bytes and operations overlap, but not fully where both matter: (a^3 + b^3)^(1/3) is between max(a, b) and the sum.
OVERLAP = 3


# Beyond so many rows this library dequantises a weight before each matmul (ops/quantized_matmul.py), which reads and
# writes so many bytes a weight; the matmul reads 2 more.
QUANTIZED_ROWS = 16
DEQUANTIZED_BYTES = {"int8": 3, "int4": 2.5}


@dataclass(frozen=True)
class StageCost:
    """Microseconds of a pipeline stage's step by what it waits for; `compute` and `weights` are the matmuls, counted
    where they are bound. `stream_us` runs beside all of it."""

    weights: float = 0.0
    compute: float = 0.0
    kv: float = 0.0
    communication: float = 0.0
    host: float = 0.0
    stream_us: float = 0.0

    @property
    def busy(self) -> float:
        """All but the stream."""
        return self.weights + self.compute + self.kv + self.communication + self.host

    @property
    def us(self) -> float:
        """The stage's time: what it does, or the weights that arrive meanwhile, whichever takes longer."""
        return max(self.busy, self.stream_us)


def matmul_us(gpu: GPU, m: int, k: int, n: int, dtype: str = "bf16") -> tuple[float, bool]:
    """(time of [m, k] by a weight of `dtype` [n, k], whether reading the bytes is the longer part)."""
    moved = k * n * WEIGHT_BYTES[dtype] + (m * k + m * n) * ACTIVATION_BYTES
    reading = moved / (gpu.hbm_gb_s * gpu.memory_share) / 1e3
    rate = gpu.fp8_tflops if dtype == "fp8" and gpu.fp8_tflops else gpu.bf16_tflops
    computing = 2 * m * k * n / (rate * gpu.compute_share) / 1e6
    together = (reading**OVERLAP + computing**OVERLAP) ** (1 / OVERLAP)
    return gpu.matmul_start_us + together, reading >= computing


def _along(points: Points, size: float) -> float:
    """A measured table at `size` bytes: between its sizes along straight lines, beyond them at the rate of the last
    two, below them the smallest's time."""
    at = bisect.bisect_left([b for b, _ in points], size)
    if at == 0:
        return points[0][1]
    (b0, t0), (b1, t1) = points[min(at, len(points) - 1) - 1], points[min(at, len(points) - 1)]
    return max(t0, t0 + (size - b0) * (t1 - t0) / (b1 - b0))


def link_all_reduce_us(link: Link, ranks: int, size: float, flows: int | None = None) -> float:
    """An all-reduce of `size` bytes a rank over `ranks` GPUs on one link: its measured table, else its formula.

    flows: how many at a time share the link, where that is not the number of ranks: islands send as one."""
    if ranks == 1:
        return 0.0
    if len(link.table.get(ranks, ())) > 1:
        return _along(link.table[ranks], size)
    bus = link.bus_gb_s * (min(flows or ranks, 8) / 2) ** -link.sharing  # the survey ends at 8 GPUs
    return link.start_us + link.hop_us * (ranks - 1) + 2 * (ranks - 1) / ranks * size / bus / 1e3


def all_reduce_us(cluster: Cluster, tp: int, size: float, after_matmul: bool = False) -> float:
    """An all-reduce of `size` bytes a rank over `tp` GPUs, which fill one island before the next and one host before
    the next: within them as on their link, over islands as on the link between them, between hosts a tree for the
    latency and the adapters' rate for the bytes.

    after_matmul: what it adds to a row-parallel layer's matmul, where kernels hide a part of it behind that."""
    inside, island = min(tp, cluster.gpus_per_host), cluster.island
    if inside <= island:
        link = cluster.link(tp)
        if after_matmul and len(link.behind.get(tp, ())) > 1:
            return _along(link.behind[tp], size)
        time = link_all_reduce_us(link, inside, size)
    else:
        time = link_all_reduce_us(cluster.between, inside, size, flows=math.ceil(inside / island))
    hosts = math.ceil(tp / cluster.gpus_per_host)
    if hosts > 1:
        net = cluster.inter
        time += net.start_us + 2 * math.ceil(math.log2(hosts)) * net.hop_us
        time += 2 * (hosts - 1) / hosts * size / (net.bus_gb_s * cluster.nics) / 1e3
    return time


def send_us(cluster: Cluster, reach: str, size: float) -> float:
    """Sending `size` bytes from a GPU to another one: of its "island", of its "host", or of the next of the "hosts",
    and there by one adapter."""
    link = {"island": cluster.link(1), "host": cluster.between, "hosts": cluster.inter}[reach]
    return link.p2p_us + size / link.p2p_gb_s / 1e3


@dataclass(frozen=True)
class Step:
    """One forward pass: `batch` sequences with `queries` new tokens each after `context` cached ones; `logits` rows of
    the head each (all queries when verifying, one in a prefill)."""

    batch: int
    queries: int
    context: int
    logits: int

    @property
    def tokens(self) -> int:
        """Rows of the matmuls."""
        return self.batch * self.queries


def stage_cost(
    model: ModelShape,
    cluster: Cluster,
    step: Step,
    *,
    tp: int,
    layers: int,
    dtype: str,
    head: bool,
    streamed: int = 0,
    layer_constant: float | None = None,
    judged: bool = False,
) -> StageCost:
    """One rank's cost of a stage of `layers` layers, `streamed` of which come from host memory, and of the head; with
    `judged`, of sampling or verifying from its logits, too."""
    gpu = cluster.gpu
    weights = compute = 0.0
    bandwidth = gpu.hbm_gb_s * gpu.memory_share * 1e3  # bytes a microsecond
    dequantised = cluster.backend == OURS and dtype in DEQUANTIZED_BYTES and step.tokens > QUANTIZED_ROWS
    for _, k, n in model.matmuls(tp):
        us, reads = matmul_us(gpu, step.tokens, k, n, "bf16" if dequantised else dtype)
        if dequantised:
            weights += k * n * DEQUANTIZED_BYTES[dtype] / bandwidth * layers
        weights, compute = (weights + us * layers, compute) if reads else (weights, compute + us * layers)
    seen = step.context + step.queries
    kv = step.batch * seen * model.kv_bytes_per_token(layers, tp) / bandwidth
    # Each query sees the context and, causally, half of the new ones: 4 operations a head and element.
    attended = step.tokens * (step.context + (step.queries + 1) / 2)
    flops = 4 * attended * (model.heads // tp) * model.head_dim * layers
    compute += flops / (gpu.bf16_tflops * gpu.attention_share) / 1e6
    # Norms, residual, rotary and gate: 8 passes over the hidden states and 3 over a rank's part of the MLP.
    passes = step.tokens * (8 * model.hidden + 3 * model.intermediate / tp) * ACTIVATION_BYTES * layers / bandwidth
    host = layers * (layer_us(cluster) if layer_constant is None else layer_constant)
    communication = 0.0
    if tp > 1:
        size = step.tokens * model.hidden * ACTIVATION_BYTES
        communication = 2 * layers * all_reduce_us(cluster, tp, size, after_matmul=True)
    if head:
        us, reads = matmul_us(gpu, step.batch * step.logits, model.hidden, math.ceil(model.vocab / tp))
        weights, compute = (weights + us, compute) if reads else (weights, compute + us)
        if tp > 1:  # each rank's best of its part of the vocabulary: a few bytes a row
            communication += all_reduce_us(cluster, tp, step.batch * step.logits * 24)
        if judged:
            host += verify_us(cluster, step.batch * step.logits * math.ceil(model.vocab / tp) * ACTIVATION_BYTES)
    stream = streamed * model.layer_bytes(tp, dtype) / gpu.host_gb_s / 1e3
    return StageCost(weights, compute + passes, kv, communication, host, stream)


def verify_us(cluster: Cluster, size: float) -> float:
    """Sampling or verifying from `size` bytes of logits on a rank: measured on an H200, rates by memory bandwidth."""
    start, rate = verify_constants(cluster.backend == OURS)
    return start + size / (rate * cluster.gpu.hbm_gb_s / H200_HBM_GB_S) / 1e3


def layer_us(cluster: Cluster) -> float:
    """Everything in a layer that this model does not name (small kernels, launches, gaps): the cluster's, else that of
    its backend, measured on H100; plain torch's also on H200, which is taken for all other GPUs."""
    if cluster.layer_us is not None:
        return cluster.layer_us
    if cluster.backend == OURS:
        return _h100_layer_us("fused")
    return _h100_layer_us("torch_nccl") if cluster.gpu.name == "h100" else _h200_layer_us()


def eager_layer_us(cluster: Cluster, tp: int, first: bool) -> float:
    """What the host takes to queue a layer's kernels one by one, as in a prefill, of a prompt's first chunk or a later
    one: the cluster's, else that of a machine of ours."""
    us = EAGER_LAYER_US if cluster.eager_layer_us is None else cluster.eager_layer_us
    if not isinstance(us, EagerLayer):
        return us
    if tp == 1 or us.tp_first is None:
        return us.first if first else us.later
    return us.tp_first if first else us.tp_later


@cache
def _h200_layer_us() -> float:
    """From one measured step, without all-reduces, of Llama-3-70B's shapes on two H200: the rest of its time."""
    model = load_model("llama-3-70b")
    measured = PAIR_DECODE_MS[LAYER_CONSTANT_BATCH][1] * 1e3
    cost = _decode_step(CLUSTERS["2xh200"], model, PAIR_CONTEXT)
    return (measured - cost.busy + cost.communication) / model.layers


@cache
def _h100_layer_us(impl: str) -> float:
    """From one measured step of 20 layers of Llama-3-70B's shapes on two H100, by plain torch and NCCL or by this
    library: the rest of its time."""
    model = dataclasses.replace(load_model("llama-3-70b"), layers=H100_DECODE_LAYERS)
    cluster = CLUSTERS["2xh100"].of(OURS if impl == "fused" else NCCL)
    cost = _decode_step(cluster, model, H100_CONTEXT)
    return (H100_DECODE_US[impl][LAYER_CONSTANT_BATCH] - cost.busy) / model.layers


def _decode_step(cluster: Cluster, model: ModelShape, context: int) -> StageCost:
    step = Step(LAYER_CONSTANT_BATCH, 1, context, 1)
    return stage_cost(model, cluster, step, tp=2, layers=model.layers, dtype="bf16", head=True, layer_constant=0.0)


def expected_tokens(acceptance: float, drafted: int) -> float:
    """Tokens a round of speculation yields: accepted ones and one of the target's own, when each drafted token is
    accepted with probability `acceptance` if all before it were: (1 - a^(k+1)) / (1 - a)."""
    if not 0 <= acceptance <= 1:
        raise ValueError(f"acceptance must be between 0 and 1, got {acceptance}")
    if acceptance == 1:
        return drafted + 1.0
    return (1 - acceptance ** (drafted + 1)) / (1 - acceptance)
