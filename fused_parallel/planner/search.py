"""The search over tensor, pipeline and replica parallelism, dtype, offload and speculation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..pipeline.stage_links import SLOTS as MOST_MICROBATCHES  # of fp.generate
from .cluster import Cluster
from .cost import QUANTIZED_ROWS, StageCost, Step, eager_layer_us, expected_tokens, send_us, stage_cost
from .model import ACTIVATION_BYTES, ModelShape
from .result import Candidate
from .schedule import Schedule, simulate
from .workload import Workload

# Not for weights, KV and activations: CUDA's context, NCCL's and the symmetric buffers, the allocator's gaps. From one
# row of planner.csv: what was taken on the GPU less what tensors took, 8B on TP2.
RESERVED_GB = 3.8
MAX_CHUNK = 8192  # tokens of prompts in one pass; bounds the activations
MIN_CHUNK = 256
DRAFTED = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)
DEQUANTIZED_PEAK = {"int8": 2, "int4": 2}  # bytes a weight of the matrix that is dequantised for a matmul
SLOTS = 2  # device blocks of a streamed layer (fused_parallel.nn.StreamedLayers)


@dataclass(frozen=True)
class Memory:
    """GB on the fullest rank."""

    weights: float
    kv: float
    activations: float
    reserved: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.kv + self.activations + self.reserved


def balanced_stages(model: ModelShape, pp: int, tp: int, dtype: str) -> list[int]:
    """Layers of each stage: the last gets fewer, by as many as its head reads bytes for; the first of the others take
    what does not divide."""
    head = model.vocab_params(tp) * ACTIVATION_BYTES / model.layer_bytes(tp, dtype)
    last = model.layers if pp == 1 else max(1, round((model.layers + head) / pp - head))
    if pp == 1:
        return [last]
    size, extra = divmod(model.layers - last, pp - 1)
    return [size + (s < extra) for s in range(pp - 1)] + [last]


class Search:
    """All plans of one model, cluster and workload; costs are kept by what they depend on."""

    def __init__(self, model: ModelShape, cluster: Cluster, workload: Workload) -> None:
        self.model, self.cluster, self.workload = model, cluster, workload
        self.least_missing: tuple[float, str] | None = None  # GB and the sentence of the plan closest to fitting
        self._costs: dict[tuple, StageCost] = {}
        self._prefills: dict[tuple, tuple[float, float, int | None]] = {}
        self._decodes: dict[tuple, tuple[Schedule, list[StageCost], list[float]]] = {}
        self._drafts: dict[int, float] = {}
        self._sizes: dict[tuple, list[tuple[float, float]]] = {}  # GB of weights and of a token's KV, by stage
        self._draft_gb = (0.0, 0.0)  # the same of the draft
        if draft := workload.draft:
            kv = draft.kv_bytes_per_token(draft.layers, 1) / 1e9
            self._draft_gb = (draft.stage_bytes(0, [draft.layers], 1, "bf16") / 1e9, kv)

    def run(self) -> Iterator[Candidate]:
        """Every plan that fits, in no order."""
        for dtype in self.workload.dtypes:
            for tp in self.model.tp_degrees(self.cluster.gpus):
                for pp in _stage_counts(min(self.model.layers, self.cluster.gpus // tp)):
                    for dp, batch in self._replicas(self._room(tp, pp)):
                        yield from self._plans(dtype, tp, pp, dp, batch)

    def _groups(self, tp: int) -> tuple[int, int]:
        """Tensor-parallel groups that an island and a host hold, 0 where a group is larger: one stays in an island if
        it can, and takes whole ones if not."""
        island, per_host = self.cluster.island, self.cluster.gpus_per_host
        if tp <= island:
            return island // tp, island // tp * (per_host // island)
        return 0, per_host // island // math.ceil(tp / island)

    def _room(self, tp: int, pp: int) -> int:
        """Replicas that the cluster holds when a tensor-parallel group stays in a host if it can, and then a replica;
        what is larger takes whole hosts."""
        per_host, hosts = self.cluster.gpus_per_host, self.cluster.hosts
        groups = self._groups(tp)[1]
        if groups == 0:
            return hosts // (math.ceil(tp / per_host) * pp)
        return hosts * (groups // pp) if pp <= groups else hosts // math.ceil(pp / groups)

    def _replicas(self, room: int) -> Iterator[tuple[int, int]]:
        """(replicas, requests over all of them): powers of two, and as many as there is room for."""
        for batch in self.workload.batches:
            most = min(room, batch)
            for dp in sorted({*(2**i for i in range(most.bit_length())), most} - {0}):
                yield dp, batch

    def _plans(self, dtype: str, tp: int, pp: int, dp: int, batch: int) -> Iterator[Candidate]:
        stages = balanced_stages(self.model, pp, tp, dtype)
        share = math.ceil(batch / dp)
        draft_counts = (0, *DRAFTED) if self.workload.draft else (0,)
        for drafting in (False, True) if self.workload.draft else (False,):
            counts = [k for k in draft_counts if (k > 0) == drafting]
            most = self.fit(dtype, tp, stages, share, dp, counts[-1])
            whole = most[0] is not None and most[1] == 0  # beside all layers; then fewer drafted tokens fit, too
            fits = [(k, most if whole else self.fit(dtype, tp, stages, share, dp, k)) for k in counts]
            streamed = {k: layers for k, (memory, layers) in fits if memory is not None}
            if not streamed:
                continue
            groups = {1, min(pp, share, MOST_MICROBATCHES)}
            yield self._best(dtype, tp, stages, dp, batch, share, streamed, groups)

    def _best(self, dtype, tp, stages, dp, batch, share, streamed_by_drafted, groups) -> Candidate:
        """Of draft lengths and micro-batch counts the one that decodes fastest, all else equal."""
        options = []
        for drafted, streamed in streamed_by_drafted.items():
            for micro in groups:
                schedule, costs, drafts = self.decode_round(dtype, tp, stages, share, micro, streamed, drafted)
                accepted = expected_tokens(self.workload.acceptance, drafted) if drafted else 1.0
                options.append((schedule.period / accepted, drafted, micro, schedule, costs, drafts))
        tpot, drafted, micro, schedule, costs, drafts = min(options, key=lambda o: o[:3])
        streamed = streamed_by_drafted[drafted]
        ranks = self.memory(dtype, tp, stages, share, drafted, streamed)
        memory = max(ranks, key=lambda m: m.total)
        ttft, occupied, chunk = self._prefill(dtype, tp, stages, streamed)
        rounds_us = self.workload.output * tpot + share * occupied
        throughput = batch * self.workload.output / rounds_us * 1e6
        gpus = tp * len(stages) * dp
        total = schedule.period * len(stages)  # of all stages together
        shares = {
            name: micro * sum(getattr(c, name) for c in costs) / total
            for name in ("weights", "compute", "kv", "communication", "host")
        }
        shares["stream"] = micro * sum(max(0.0, c.stream_us - c.busy) for c in costs) / total
        shares["draft"] = micro * sum(drafts) / total
        shares["bubble"] = max(0.0, 1 - sum(shares.values()))
        return Candidate(
            tp=tp,
            pp=len(stages),
            dp=dp,
            stages=tuple(stages),
            dtype=dtype,
            batch=batch,
            microbatches=micro,
            prefill_chunk=chunk,
            resident=1 - streamed / self.model.layers,
            drafted=drafted,
            gpus=gpus,
            backend=self.cluster.backend,
            ttft_ms=ttft / 1e3,
            tpot_ms=tpot / 1e3,
            tokens_per_s=throughput,
            gpu_s_per_token=gpus / throughput,
            stage_ms=tuple((c.us + d) / 1e3 for c, d in zip(costs, drafts, strict=True)),
            hop_ms=tuple(us / 1e3 for us in self._hops(tp, stages, math.ceil(share / micro) * (drafted + 1))),
            stage_gb=tuple(m.total for m in ranks),
            memory_gb={k: getattr(memory, k) for k in ("weights", "kv", "activations", "reserved", "total")},
            shares=shares,
        )

    def memory(
        self, dtype: str, tp: int, stages: list[int], batch: int, drafted: int, streamed: int = 0
    ) -> list[Memory]:
        """Of a rank of each stage, for a replica's `batch` requests; `streamed` layers are in host memory."""
        model, workload = self.model, self.workload
        capacity = self._capacity(len(stages), drafted)
        tokens = batch * capacity
        queries = batch * (drafted + 1)
        passed = max(min(batch * workload.input, MAX_CHUNK), queries)
        activations = model.activation_bytes(passed, queries, tp) / 1e9
        if dtype in DEQUANTIZED_PEAK and passed > QUANTIZED_ROWS:
            activations += DEQUANTIZED_PEAK[dtype] * max(k * n for _, k, n in model.matmuls(tp)) / 1e9
        key = (dtype, tp, tuple(stages))
        if key not in self._sizes:
            self._sizes[key] = [
                (model.stage_bytes(s, stages, tp, dtype) / 1e9, model.kv_bytes_per_token(layers, tp) / 1e9)
                for s, layers in enumerate(stages)
            ]
        more = -(streamed - SLOTS) * model.layer_bytes(tp, dtype) / 1e9 if streamed else 0.0
        more += self._draft_gb[0] if drafted else 0.0  # every rank holds the draft
        ranks = [Memory(gb + more, tokens * kv, activations, RESERVED_GB) for gb, kv in self._sizes[key]]
        if drafted:  # which those of the last stage run
            last, draft = ranks[-1], workload.draft.activation_bytes(passed, batch, 1) / 1e9
            kv = last.kv + tokens * self._draft_gb[1]
            ranks[-1] = Memory(last.weights, kv, max(activations, draft), RESERVED_GB)
        return ranks

    def _capacity(self, stages: int, drafted: int) -> int:
        """Tokens a sequence's cache has room for: fp.generate leaves some for what a round may take it too far, and for
        one more round (in micro-batches two) while it stands still."""
        return self.workload.input + self.workload.output + (drafted + 1) * (2 if stages == 1 else 3)

    def fit(
        self, dtype: str, tp: int, stages: list[int], batch: int, dp: int, drafted: int
    ) -> tuple[Memory | None, int]:
        """(memory of the fullest rank, layers streamed from the host), or (None, 0) where it does not fit. Layers are
        streamed, as few as possible, only without a pipeline and where they would not fit otherwise."""
        model, workload, room = self.model, self.workload, self.cluster.gpu.memory_gb
        ranks = self.memory(dtype, tp, stages, batch, drafted)
        fullest = max(ranks, key=lambda m: m.total)
        missing = fullest.total - room
        if missing <= 0:
            return fullest, 0
        where = f"of {fullest.total:.1f} GB on its fullest GPU (a {self.cluster.gpu.name} has {room:.1f})"
        layer = model.layer_bytes(tp, dtype) / 1e9
        if len(stages) == 1 and workload.offload:
            streamed = math.ceil(missing / layer) + SLOTS
            replicas = min(dp, max(1, self.cluster.gpus_per_host // tp))
            on_host = streamed * layer * min(tp, self.cluster.gpus_per_host) * replicas
            host = self.cluster.host_memory_gb
            if streamed <= model.layers and (host is None or on_host <= host):
                return self.memory(dtype, tp, stages, batch, drafted, streamed)[0], streamed
            if streamed > model.layers:
                missing -= max(0, model.layers - SLOTS) * layer
                where = f"on its fullest GPU (a {self.cluster.gpu.name} has {room:.1f}) even with every layer streamed"
            else:
                missing, where = on_host - host, f"of {on_host:.1f} GB in a host's memory (it has {host:.1f})"
        if self.least_missing is None or missing < self.least_missing[0]:
            plan = f"TP{tp} PP{len(stages)} x{dp} in {dtype} with a batch of {batch} a replica"
            self.least_missing = (missing, f"{plan} lacks {missing:.1f} GB {where}")
        return None, 0

    def _cost(self, dtype: str, tp: int, layers: int, head: bool, step: Step, streamed: int) -> StageCost:
        key = (dtype, tp, layers, head, step, streamed)
        if key not in self._costs:
            self._costs[key] = stage_cost(
                self.model,
                self.cluster,
                step,
                tp=tp,
                layers=layers,
                dtype=dtype,
                head=head,
                streamed=streamed,
                judged=True,
            )
        return self._costs[key]

    def _stages(self, dtype, tp, stages, step, streamed) -> list[StageCost]:
        return [self._cost(dtype, tp, layers, s == len(stages) - 1, step, streamed) for s, layers in enumerate(stages)]

    def _hops(self, tp: int, stages: list[int], tokens: int) -> list[float]:
        """Each rank sends its 1/tp of the hidden states to the next stage, which gathers them."""
        size = tokens * self.model.hidden * ACTIVATION_BYTES / tp
        of_island, of_host = self._groups(tp)

        def reach(s: int) -> str:
            if of_host == 0 or s // of_host != (s + 1) // of_host:
                return "hosts"
            return "host" if of_island == 0 or s // of_island != (s + 1) // of_island else "island"

        return [send_us(self.cluster, reach(s), size) for s in range(len(stages) - 1)]

    def decode_round(
        self, dtype: str, tp: int, stages: list[int], share: int, micro: int, streamed: int, drafted: int
    ) -> tuple[Schedule, list[StageCost], list[float]]:
        """A round of a replica's `share` requests in `micro` micro-batches: its schedule in microseconds, the cost of a
        micro-batch on each stage, and of its drafting there."""
        key = (dtype, tp, len(stages), share, micro, streamed, drafted)
        if key not in self._decodes:
            size = math.ceil(share / micro)
            context = self.workload.input + self.workload.output // 2  # halfway through the answer
            costs = self._stages(dtype, tp, stages, Step(size, drafted + 1, context, drafted + 1), streamed)
            drafts = [0.0] * len(stages)
            if drafted:
                drafts[-1] = drafted * self._draft_us(size, context)  # the last stage's ranks draft
            if streamed and drafted:  # the first layers are copied while the draft runs: as many as there are slots
                ahead = min(drafts[-1], SLOTS / streamed * costs[0].stream_us)
                costs[0] = dataclasses.replace(costs[0], stream_us=costs[0].stream_us - ahead)
            times = [c.us + d for c, d in zip(costs, drafts, strict=True)]
            hops = self._hops(tp, stages, size * (drafted + 1))
            schedule = simulate(times, hops, micro, rounds=3, depends=True)
            self._decodes[key] = (schedule, costs, drafts)
        return self._decodes[key]

    def _draft_us(self, batch: int, context: int) -> float:
        """A step of the draft, which every rank runs whole."""
        if batch not in self._drafts:
            draft = self.workload.draft
            step = Step(batch, 1, context, 1)
            cost = stage_cost(
                draft, self.cluster, step, tp=1, layers=draft.layers, dtype="bf16", head=True, judged=True
            )
            self._drafts[batch] = cost.us
        return self._drafts[batch]

    def prefill_us(self, dtype, tp, stages, streamed: int, chunks: int) -> tuple[float, float, int | None]:
        """What _prefill gives, for a prompt in so many chunks."""
        length = self.workload.input
        size = math.ceil(length / chunks)
        # Later chunks attend to the earlier ones, and it is the last that the last stage takes alone.
        steps = [Step(1, min(size, length - start), start, 1) for start in range(0, length, size)]
        costs = [self._stages(dtype, tp, stages, step, streamed) for step in steps]
        times = [[c.us for c in of_stage] for of_stage in zip(*costs, strict=True)]
        queueing = [eager_layer_us(self.cluster, tp, first=step is steps[0]) for step in steps]
        queued = [[layers * us for us in queueing] for layers in stages]
        last = simulate(times, self._hops(tp, stages, size), len(steps), queued_us=queued).last
        return last, max(map(sum, [*times, *queued])), size if chunks > 1 else None

    def _prefill(self, dtype, tp, stages, streamed) -> tuple[float, float, int | None]:
        """(time to the first token of a prompt alone, time a prompt keeps the slowest stage, tokens of a chunk or None
        where it passes whole): over the number of chunks that gives the first token soonest."""
        key = (dtype, tp, len(stages), streamed)
        if key not in self._prefills:
            length, results = self.workload.input, []
            chunks = math.ceil(length / MAX_CHUNK)
            while not results or (len(stages) > 1 and chunks <= 4 * len(stages) and length / chunks >= MIN_CHUNK):
                results.append(self.prefill_us(dtype, tp, stages, streamed, chunks))
                chunks *= 2
            self._prefills[key] = min(results, key=lambda r: r[:2])
        return self._prefills[key]


def _stage_counts(limit: int) -> list[int]:
    """Pipeline stages worth trying: all small counts, then powers of two, up to 32."""
    return [pp for pp in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32) if pp <= limit]
