"""Which split of a model over which GPUs is fastest, predicted from measured costs; see docs/planning.md."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..models.config import LlamaConfig
from .apply import Planned, init, planned
from .cluster import CLUSTERS, NCCL, OURS, Cluster, from_profile, load_cluster
from .explain import explain, wall
from .hardware import LINKS
from .model import ModelShape, load_model
from .result import Candidate, Plan, WallRow
from .search import Search
from .workload import Workload

__all__ = ["CLUSTERS", "Candidate", "Cluster", "ModelShape", "Plan", "WallRow", "Workload", "from_profile"]
__all__ += ["Planned", "init", "load_cluster", "load_model", "plan", "planned"]

KEPT = 50  # ranked plans an answer keeps


def plan(
    model_config: str | Path | dict | LlamaConfig | ModelShape,
    cluster: str | Path | dict | Cluster,
    workload: Workload | dict | None = None,
) -> Plan:
    """Search tensor x pipeline x replica parallelism, dtype, offload and speculation, and rank what fits.

    Args:
        model_config: a preset ("llama-3-8b", "llama-3-70b", "llama-3-405b"), a config.json or its directory, its
            contents, or a LlamaConfig.
        cluster: a preset, "this" (probes this machine, which takes seconds), a YAML or JSON description, a probe
            profile, or a Cluster.
        workload: a Workload, or its fields as a dictionary; default: one request of 1024 + 256 tokens, by latency.

    Returns:
        Plan: predictions, not measurements; docs/planning.md tells how far off they were where they could be compared.

    Runs on the CPU alone and starts no process, but for the cluster "this". Raises ValueError for unknown names, for
    contradictory input, where nothing fits (with what is missing, and what would help) and where no plan meets the SLOs
    (with the best there is).
    """
    model, where = load_model(model_config), load_cluster(cluster)
    asked = workload if isinstance(workload, Workload) else Workload(**(workload or {}))
    model = dataclasses.replace(model, kv_dtype=asked.kv_dtype)
    best: dict[tuple, Candidate] = {}
    for backend in _backends(where, asked):
        search = Search(model, where.of(backend), asked)
        for c in search.run():
            key = (c.tp, c.pp, c.dp, c.dtype, c.batch, c.drafted > 0)
            if key not in best or c.tpot_ms < best[key].tpot_ms:
                best[key] = c
    found = list(best.values())
    if not found:
        raise ValueError(_nothing_fits(model, where, asked, search))
    allowed = [
        c
        for c in found
        if (asked.slo_tpot_ms is None or c.tpot_ms <= asked.slo_tpot_ms)
        and (asked.slo_ttft_ms is None or c.ttft_ms <= asked.slo_ttft_ms)
    ]
    if not allowed:
        tpot, ttft = min(c.tpot_ms for c in found), min(c.ttft_ms for c in found)
        limits = {"TPOT": asked.slo_tpot_ms, "TTFT": asked.slo_ttft_ms}
        wanted = " and ".join(f"{name} {ms:g} ms" for name, ms in limits.items() if ms is not None)
        raise ValueError(
            f"none of {len(found)} plans that fit meets {wanted}: "
            f"the least TPOT is {tpot:.2f} ms, the least TTFT {ttft:.1f} ms (not always of the same plan)"
        )
    ranks = {
        "latency": lambda c: (c.ttft_ms + (asked.output - 1) * c.tpot_ms, c.gpus, -c.tokens_per_s),
        "throughput": lambda c: (-c.tokens_per_s, c.tpot_ms, c.gpus),
        "cost": lambda c: (c.gpu_s_per_token, c.tpot_ms, c.gpus),
    }
    allowed.sort(key=ranks[asked.rank])
    firsts = {c.tp: c for c in reversed(allowed)}  # of each degree the one that is ranked first
    rows, texts = wall(model, where.of(allowed[0].backend), asked)
    return Plan(
        model=model.name,
        shape=dataclasses.asdict(model),
        cluster=where.name,
        rank=asked.rank,
        request=_request(asked),
        searched=len(found),
        entries=tuple(dataclasses.replace(c, explanation=explain(c, where, asked)) for c in allowed[:KEPT]),
        frontier=tuple(dataclasses.replace(c, explanation=explain(c, where, asked)) for c in _frontier(allowed)),
        by_tp=tuple(dataclasses.replace(c, explanation=explain(c, where, asked)) for c in firsts.values()),
        wall=rows,
        wall_text=texts,
    )


def _backends(cluster: Cluster, workload: Workload) -> list[str]:
    """Whose costs are searched."""
    have = [OURS, NCCL] if cluster.ours is not None else [NCCL]
    if workload.backend == "best":
        return have
    return [workload.backend or have[0]]


def _frontier(candidates: list[Candidate]) -> list[Candidate]:
    """Those that no other beats in both TPOT and throughput, by TPOT."""
    front: list[Candidate] = []
    for c in sorted(candidates, key=lambda c: (c.tpot_ms, -c.tokens_per_s)):
        if not front or c.tokens_per_s > front[-1].tokens_per_s:
            front.append(c)
    return front


def _request(workload: Workload) -> dict[str, object]:
    """The workload in JSON types."""
    request = {f.name: getattr(workload, f.name) for f in dataclasses.fields(workload)}
    draft = workload.draft.name if workload.draft else None
    return {**request, "batch": list(workload.batches), "dtypes": list(workload.dtypes), "draft": draft}


def _nothing_fits(model: ModelShape, cluster: Cluster, workload: Workload, search: Search) -> str:
    """What is missing, and of what would help, each tried, the cheapest first."""
    text = f"{model.name} fits {cluster.name} ({cluster.gpus} x {cluster.gpu.name}) under no plan"
    text += f"; the closest, {search.least_missing[1]}."

    def fits(where: Cluster = cluster, **changes) -> bool:
        tried = dataclasses.replace(workload, **changes)
        return any(True for backend in _backends(where, tried) for _ in Search(model, where.of(backend), tried).run())

    fixes = [f"{t} weights" for t in ("fp8", "int4") if t not in workload.dtypes and fits(dtypes=(t,))]
    if not workload.offload and fits(offload=True):
        fixes.append("offload")
    batch = min(workload.batches) // 2
    while batch and not fits(batch=(batch,)):
        batch //= 2
    if batch:
        fixes.append(f"a batch of {batch}")
    # Of the same kind: in this host up to eight, then more hosts (by InfiniBand NDR where nothing joins them yet).
    per_host, hosts = cluster.gpus_per_host, cluster.hosts
    while per_host * hosts < 1024:
        per_host, hosts = (2 * per_host, hosts) if hosts == 1 and per_host < 8 else (per_host, 2 * hosts)
        more = dataclasses.replace(
            cluster,
            gpus_per_host=per_host,
            hosts=hosts,
            islands=(),
            between=None,
            inter=cluster.inter or LINKS["ib-ndr"],
        )
        if fits(more):
            fixes.append(f"{per_host * hosts} such GPUs")
            break
    return f"{text} What would help, cheapest first: {', '.join(fixes) or 'nothing that was tried: a smaller model'}"
