"""What a plan is asked to serve."""

from __future__ import annotations

from dataclasses import dataclass

from .cluster import NCCL, OURS
from .model import KV_BYTES, WEIGHT_BYTES, ModelShape, load_model

RANKINGS = ("latency", "throughput", "cost")
BACKENDS = (OURS, NCCL, "best")


@dataclass(frozen=True)
class Workload:
    """Requests of `input` prompt tokens and `output` new ones; `batch` of them in flight over the whole cluster (one
    number or several to choose from).

    rank: "latency" (the whole request's time), "throughput" (output tokens a second over all replicas) or "cost"
    (GPU-seconds an output token). slo_tpot_ms, slo_ttft_ms: plans beyond these are left out. draft, acceptance: a
    smaller model (anything load_model takes) and the probability that a token it drafts is accepted. dtypes: of the
    weights, out of bf16, fp8, int8, int4; kv_dtype: of the cache, bf16, or fp8, which can be planned but not run.
    offload: whether layers may stay in host memory where they do not fit. backend: the costs of this library's kernels
    ("ours"), of plain torch and NCCL ("nccl"), or of each plan the faster ("best"); None: ours where the cluster has
    them, else nccl.
    """

    input: int = 1024
    output: int = 256
    batch: int | tuple[int, ...] = 1
    rank: str = "latency"
    slo_tpot_ms: float | None = None
    slo_ttft_ms: float | None = None
    draft: ModelShape | str | None = None
    acceptance: float | None = None
    dtypes: tuple[str, ...] = ("bf16",)
    kv_dtype: str = "bf16"
    offload: bool = True
    backend: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("input", self.input), ("output", self.output), *(("batch", b) for b in self.batches)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"workload: {name} must be a positive integer, got {value!r}")
        if not self.batches:
            raise ValueError(f"workload: batch must hold at least one number, got {self.batch!r}")
        if self.rank not in RANKINGS:
            raise ValueError(f"workload: rank must be one of {', '.join(RANKINGS)}, got {self.rank!r}")
        if self.backend is not None and self.backend not in BACKENDS:
            raise ValueError(f"workload: backend must be one of {', '.join(BACKENDS)}, got {self.backend!r}")
        for name, limit in (("slo_tpot_ms", self.slo_tpot_ms), ("slo_ttft_ms", self.slo_ttft_ms)):
            if limit is not None and not limit > 0:
                raise ValueError(f"workload: {name} must be positive, got {limit!r}")
        unknown = [d for d in self.dtypes if d not in WEIGHT_BYTES]
        if unknown or not self.dtypes:
            raise ValueError(f"workload: dtypes must be out of {', '.join(WEIGHT_BYTES)}, got {self.dtypes!r}")
        if self.kv_dtype not in KV_BYTES:
            raise ValueError(f"workload: kv_dtype must be one of {', '.join(KV_BYTES)}, got {self.kv_dtype!r}")
        if (self.draft is None) != (self.acceptance is None):
            raise ValueError(
                f"workload: draft and acceptance belong together (--draft needs --acceptance, such as 0.8), got "
                f"{self.draft!r} and {self.acceptance!r}"
            )
        if self.acceptance is not None and not 0 <= self.acceptance <= 1:
            raise ValueError(f"workload: acceptance must be between 0 and 1, got {self.acceptance!r}")
        if self.draft is not None:
            object.__setattr__(self, "draft", load_model(self.draft))

    @property
    def batches(self) -> tuple[int, ...]:
        """The batches to choose from."""
        return tuple(self.batch) if isinstance(self.batch, (tuple, list)) else (self.batch,)
