"""Sentences: what limits a plan, and where the communication wall lies."""

from __future__ import annotations

import math

from .cluster import NCCL, Cluster
from .cost import Step, expected_tokens, stage_cost
from .model import ModelShape
from .result import Candidate, WallRow
from .search import Search
from .workload import Workload

LIMITS = {
    "weights": "reading weights from GPU memory: fewer bytes (fp8, int4), more tensor-parallel ranks or, at a small "
    "batch, speculation would help",
    "compute": "arithmetic: more GPUs or a faster dtype would help, a larger batch would not",
    "kv": "reading the KV cache: a shorter context or a smaller batch would help",
    "communication": "all-reduces: fewer tensor-parallel ranks, a faster link or pipeline stages would help",
    "host": "the constant of each layer (small kernels and the gaps between them): fused kernels would help, more GPUs "
    "would not",
    "stream": "weights arriving from host memory: speculation, a smaller dtype or another GPU would help",
    "draft": "drafting: a smaller draft or fewer drafted tokens would help",
    "bubble": "stages waiting for each other: more requests in flight would fill them",
}


def explain(c: Candidate, cluster: Cluster, workload: Workload) -> tuple[str, ...]:
    """What a plan's step consists of, what limits it, and how full its memory is."""
    parts = sorted(((v, k) for k, v in c.shares.items() if v >= 0.005), reverse=True)
    sentences = [
        f"{c.label} on {c.gpus} GPU(s): a token takes {c.tpot_ms:.2f} ms: "
        + ", ".join(f"{v:.0%} {k}" for v, k in parts)
        + ".",
        f"It is limited by {LIMITS[c.limit]}.",
    ]
    gb, room = c.memory_gb, cluster.gpu.memory_gb
    sentences.append(
        f"The fullest GPU holds {gb['total']:.1f} of {room:.1f} GB: {gb['weights']:.1f} weights, {gb['kv']:.1f} KV, "
        f"{gb['activations']:.1f} activations, {gb['reserved']:.1f} reserved"
        + ("; memory limits how large the batch may grow." if gb["total"] > 0.9 * room else ".")
    )
    if c.tp > cluster.gpus_per_host:
        sentences.append(
            f"Tensor parallelism spans {math.ceil(c.tp / cluster.gpus_per_host)} hosts over {cluster.inter.name}; "
            f"it was chosen because its predicted time wins even so."
        )
    if cluster.islands:
        order = ",".join(str(gpu) for island in cluster.islands for gpu in island)
        span = "stays in an island" if c.tp <= cluster.island else f"spans islands over {cluster.between.name}"
        sentences.append(
            f"A tensor-parallel group {span}: start the ranks of a host on its GPUs in the order {order} "
            "(CUDA_VISIBLE_DEVICES)."
        )
    if c.pp > 1:
        sentences.append(
            f"{c.pp} stages of {', '.join(map(str, c.stages))} layers pass {c.microbatches} micro-batch(es); they wait "
            f"{c.shares['bubble']:.0%} of the time, for each other and for transfers. Their GPUs hold "
            f"{', '.join(f'{gb:.1f}' for gb in c.stage_gb)} GB."
        )
    if c.resident < 1:
        sentences.append(
            f"{c.resident:.0%} of the layers stay on the GPU, the others come from host memory at "
            f"{cluster.gpu.host_gb_s:.1f} GB/s a GPU in every step."
        )
    if c.backend == NCCL and cluster.ours is not None:
        sentences.append("These are the costs of plain torch and NCCL, which FUSED_PARALLEL=reference runs.")
    if c.drafted:
        tokens = expected_tokens(workload.acceptance, c.drafted)
        sentences.append(
            f"Each round drafts {c.drafted} tokens and yields {tokens:.2f} on average at an acceptance of "
            f"{workload.acceptance:g}."
        )
    return tuple(sentences)


def wall(model: ModelShape, cluster: Cluster, workload: Workload) -> tuple[tuple[WallRow, ...], tuple[str, ...]]:
    """A decoding step by tensor-parallel degree (1, 2, 4, ... up to what the cluster and the model allow) at the
    smallest and the largest batch of the workload, and where it lies that another GPU stops paying."""
    degrees = [n for n in model.tp_degrees(min(cluster.gpus, 64)) if n & (n - 1) == 0]
    context, dtype = workload.input + workload.output // 2, workload.dtypes[0]
    search = Search(model, cluster, workload)
    rows, texts = [], []

    def cost(tp: int, batch: int):
        return stage_cost(
            model, cluster, Step(batch, 1, context, 1), tp=tp, layers=model.layers, dtype=dtype, head=True
        )

    for batch in sorted({min(workload.batches), max(workload.batches)}):
        here = []
        for tp in degrees:
            c = cost(tp, batch)
            share = math.ceil(batch * tp / degrees[-1])  # of a replica, where the largest group is cut into several
            memory, streamed = search.fit(dtype, tp, [model.layers], batch, 1, 0)
            busy = min(batch, degrees[-1] // tp)
            rate = batch / cost(tp, share).us * 1e6 / (busy * tp)
            compute = c.weights + c.compute + c.kv
            fits = memory is not None and streamed == 0
            memory, streamed = search.fit(dtype, tp, [model.layers], share, 1, 0)
            share_fits = memory is not None and streamed == 0
            ms = [v / 1e3 for v in (c.us, compute, c.communication, c.host)]
            here.append(WallRow(batch, tp, *ms, tokens_per_s_per_gpu=rate, fits=fits, share_fits=share_fits))
        rows += here
        texts.append(_sentence(here))
    return tuple(rows), tuple(texts)


def _sentence(rows: list[WallRow]) -> str:
    fastest = min(rows, key=lambda r: r.tpot_ms)
    cheapest = max([r for r in rows if r.share_fits] or rows, key=lambda r: r.tokens_per_s_per_gpu)
    text = f"Wall at batch {rows[0].batch}: while decoding, a token is fastest at TP{fastest.tp} "
    text += f"({fastest.tpot_ms:.2f} ms, {fastest.communication_ms / fastest.tpot_ms:.0%} communication)"
    after = [r for r in rows if r.tp > fastest.tp]
    if after:
        text += f"; TP{after[0].tp} takes {after[0].tpot_ms:.2f} ms, so more GPUs make it slower"
    elif len(rows) > 1:
        gain = rows[-2].tpot_ms / rows[-1].tpot_ms
        text += f", the largest degree there is; its last doubling made it {gain:.2f} times as fast"
    held = "" if cheapest.share_fits else " (though no degree holds model and KV without offload)"
    return text + f"; decoded tokens a GPU are most at TP{cheapest.tp}, with replicas for the rest{held}."
