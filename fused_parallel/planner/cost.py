"""What a step costs: roofline matmuls, alpha-beta communication, and one constant a layer. Times in microseconds."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from functools import cache

from .cluster import CLUSTERS, Cluster
from .hardware import GPU, Link
from .measured import LAYER_CONSTANT_BATCH, PAIR_CONTEXT, PAIR_DECODE_MS
from .model import ACTIVATION_BYTES, WEIGHT_BYTES, ModelShape, load_model

# Attention kernels reach less of the tensor cores than matmuls do: published forward rates of FlashAttention lie
# between 35 % (version 2) and 75 % (version 3) of an H100's; the middle is an assumption.
ATTENTION_SHARE = 0.5
# Bytes and operations overlap, but not fully where both matter: (a^3 + b^3)^(1/3) is between max(a, b) and the sum.
OVERLAP = 3


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


def link_all_reduce_us(link: Link, ranks: int, size: float) -> float:
    """An all-reduce of `size` bytes a rank over `ranks` GPUs on one link: the measured table, between its sizes along
    straight lines and beyond them at the rate of its last two, else the link's formula."""
    if ranks == 1:
        return 0.0
    if ranks in link.table and len(link.table[ranks]) > 1:
        points = link.table[ranks]
        at = bisect.bisect_left([b for b, _ in points], size)
        if at == 0:
            return points[0][1]
        (b0, t0), (b1, t1) = points[min(at, len(points) - 1) - 1], points[min(at, len(points) - 1)]
        return max(t0, t0 + (size - b0) * (t1 - t0) / (b1 - b0))
    bus = link.bus_gb_s * (min(ranks, 8) / 2) ** -link.sharing  # the survey ends at 8 GPUs
    return link.start_us + link.hop_us * (ranks - 1) + 2 * (ranks - 1) / ranks * size / bus / 1e3


def all_reduce_us(cluster: Cluster, tp: int, size: float) -> float:
    """An all-reduce of `size` bytes a rank over `tp` GPUs, which fill one host before the next: within the hosts as on
    the link, between them a tree for the latency and the adapters' rate for the bytes."""
    inside = min(tp, cluster.gpus_per_host)
    time = link_all_reduce_us(cluster.intra, inside, size)
    hosts = math.ceil(tp / cluster.gpus_per_host)
    if hosts > 1:
        net = cluster.inter
        time += net.start_us + 2 * math.ceil(math.log2(hosts)) * net.hop_us
        time += 2 * (hosts - 1) / hosts * size / (net.bus_gb_s * cluster.nics) / 1e3
    return time


def send_us(cluster: Cluster, across_hosts: bool, size: float) -> float:
    """Sending `size` bytes from a GPU to another one, on its host or on the next: there by one adapter."""
    link = cluster.inter if across_hosts else cluster.intra
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
) -> StageCost:
    """One rank's cost of a stage of `layers` layers, `streamed` of which come from host memory, and of the head."""
    gpu = cluster.gpu
    weights = compute = 0.0
    for _, k, n in model.matmuls(tp):
        us, reads = matmul_us(gpu, step.tokens, k, n, dtype)
        weights, compute = (weights + us * layers, compute) if reads else (weights, compute + us * layers)
    bandwidth = gpu.hbm_gb_s * gpu.memory_share * 1e3  # bytes a microsecond
    seen = step.context + step.queries
    kv = step.batch * seen * model.kv_bytes_per_token(layers, tp) / bandwidth
    # Each query sees the context and, causally, half of the new ones: 4 operations a head and element.
    attended = step.tokens * (step.context + (step.queries + 1) / 2)
    flops = 4 * attended * (model.heads // tp) * model.head_dim * layers
    compute += flops / (gpu.bf16_tflops * ATTENTION_SHARE) / 1e6
    # Norms, residual, rotary and gate: 8 passes over the hidden states and 3 over a rank's part of the MLP.
    passes = step.tokens * (8 * model.hidden + 3 * model.intermediate / tp) * ACTIVATION_BYTES * layers / bandwidth
    host = layers * (layer_us(cluster) if layer_constant is None else layer_constant)
    communication = 0.0
    if tp > 1:
        size = step.tokens * model.hidden * ACTIVATION_BYTES
        communication = 2 * layers * all_reduce_us(cluster, tp, size)
    if head:
        us, reads = matmul_us(gpu, step.batch * step.logits, model.hidden, math.ceil(model.vocab / tp))
        weights, compute = (weights + us, compute) if reads else (weights, compute + us)
        if tp > 1:  # each rank's best of its part of the vocabulary: a few bytes a row
            communication += all_reduce_us(cluster, tp, step.batch * step.logits * 24)
    stream = streamed * model.layer_bytes(tp, dtype) / gpu.host_gb_s / 1e3
    return StageCost(weights, compute + passes, kv, communication, host, stream)


def layer_us(cluster: Cluster) -> float:
    """Everything in a layer that this model does not name (small kernels, launches, gaps)."""
    return _layer_us() if cluster.layer_us is None else cluster.layer_us


@cache
def _layer_us() -> float:
    """From one measured step, without all-reduces, of Llama-3-70B's shapes on two H200: the rest of its time."""
    model = load_model("llama-3-70b")
    measured = PAIR_DECODE_MS[LAYER_CONSTANT_BATCH][1] * 1e3
    step = Step(LAYER_CONSTANT_BATCH, 1, PAIR_CONTEXT, 1)
    cost = stage_cost(
        model, CLUSTERS["2xh200"], step, tp=2, layers=model.layers, dtype="bf16", head=True, layer_constant=0.0
    )
    return (measured - cost.busy + cost.communication) / model.layers


def expected_tokens(acceptance: float, drafted: int) -> float:
    """Tokens a round of speculation yields: accepted ones and one of the target's own, when each drafted token is
    accepted with probability `acceptance` if all before it were: (1 - a^(k+1)) / (1 - a)."""
    if not 0 <= acceptance <= 1:
        raise ValueError(f"acceptance must be between 0 and 1, got {acceptance}")
    if acceptance == 1:
        return drafted + 1.0
    return (1 - acceptance ** (drafted + 1)) / (1 - acceptance)
