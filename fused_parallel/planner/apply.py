"""Running a plan: the mesh it asks for, and the options of the model and of `fp.generate` that it stands for."""

from __future__ import annotations

import dataclasses
import datetime
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh

from ..comm import groups
from ..models.config import DTYPES, LlamaConfig
from ..models.llama import LlamaDecoderLayer
from ..nn import quantize_
from ..nn.streamed_layers import streamed_bytes
from ..offload import Offload
from ..pipeline.stage_links import SLOTS
from ..reference.quantized_matmul import KINDS
from .model import load_model
from .result import Candidate, Plan
from .search import MAX_CHUNK


def init(
    tp: int | None = None,
    pp: int | None = None,
    dp: int | None = None,
    *,
    plan: Plan | str | Path | None = None,
    timeout: float | datetime.timedelta = groups.DEFAULT_TIMEOUT_S,
    device: str | torch.device | None = None,
) -> DeviceMesh:
    """Start torch.distributed from torchrun's environment (if it is not running yet) and make the device mesh.

    Args:
        tp, pp, dp: sizes of tensor, pipeline and data parallelism (default: pp and dp 1, tp what is left of the world);
            their product must be the world size.
        plan: a `fp.Plan`, or the path of its JSON: its best entry gives the sizes (dp: its replicas), and
            `fp.planned(mesh)` tells what else it says. Sizes given as well must be the plan's.
        timeout: seconds (or a timedelta) that bound every wait for a peer, in every group of the mesh.
        device: "cuda" (NCCL) or "cpu" (Gloo); default: cuda when a GPU is visible.

    Returns:
        A DeviceMesh with the dimensions ("dp", "pp", "tp"); `mesh["tp"]` is what operations take as `group=`. Ranks of
        one tp group are neighbours. Without torchrun's environment: a world of one.

    Raises:
        ValueError: sizes that do not fit the world or contradict the plan, a file that is no plan, a rank without a
            GPU.
        RuntimeError: the rendezvous failed; the message says what to do.
    """
    if plan is None:
        return groups.init(tp, 1 if pp is None else pp, 1 if dp is None else dp, timeout=timeout, device=device)
    answer = plan if isinstance(plan, Plan) else read_plan(plan)
    best = answer.best
    for name, value in (("tp", tp), ("pp", pp), ("dp", dp)):
        if value is not None and value != getattr(best, name):
            raise ValueError(
                f"fp.init: {name}={value!r} contradicts the plan, which is {best.label}; leave {name} out, or plan anew"
            )
    _, world, _ = groups.rank_and_world()
    if world != best.gpus:
        raise ValueError(
            f"fp.init: the plan ({best.label}, for {answer.cluster}) is for {best.gpus} rank(s), but the world has "
            f"{world}; start that many (torchrun --nproc-per-node N on each host), or plan for the GPUs there are"
        )
    mesh = groups.init(best.tp, best.pp, best.dp, timeout=timeout, device=device)
    mesh.fused_parallel_plan = Planned(answer, mesh)
    return mesh


def planned(mesh: DeviceMesh) -> Planned:
    """What the plan that `fp.init(plan=...)` made this mesh from says. ValueError for a mesh made without one."""
    found = getattr(mesh, "fused_parallel_plan", None)
    if found is None:
        raise ValueError("fp.planned: this mesh was made without a plan: fp.init(plan=...)")
    return found


def read_plan(path: str | Path) -> Plan:
    """The plan in a file that `fused-parallel plan --json` (or `Plan.to_json`) wrote. Raises FileNotFoundError, or
    ValueError naming the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"plan {path}: there is no such file (fused-parallel plan ... --json > {path} makes it)"
        )
    try:
        return Plan.from_json(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


@dataclass(frozen=True)
class Planned:
    """A plan's best entry on the mesh that was made for it:

    mesh = fp.init(plan="plan.json")
    planned = fp.planned(mesh)
    model = fp.LlamaForCausalLM.from_pretrained(path, mesh=mesh, **planned.model_options(path))
    fp.generate(model, prompts, 256, draft=draft, **planned.generate_options(len(prompts), draft))
    """

    plan: Plan
    mesh: DeviceMesh

    @property
    def entry(self) -> Candidate:
        """What is run."""
        return self.plan.best

    def model_options(self, model: str | Path | LlamaConfig, dtype: torch.dtype | None = None) -> dict[str, object]:
        """Keywords of `LlamaForCausalLM.from_pretrained` (or of the class): split, quantize and offload.

        Args:
            model: the model's directory, or its configuration.
            dtype: of parameters and activations, if it is not the checkpoint's: layers are weighed in it. Plans count
                2 bytes for whatever is not quantised, so float32 takes twice the memory.

        Raises ValueError for a model of other shapes than the plan's, and for a dtype of weights that this library has
        no layers for (fp8).
        """
        config = model if isinstance(model, LlamaConfig) else LlamaConfig.from_pretrained(model)
        self._check_model(config)
        entry = self.entry
        if entry.dtype != "bf16" and entry.dtype not in KINDS:
            raise ValueError(
                f"the plan ({entry.label}) keeps weights in {entry.dtype}, for which there are no layers here; plan "
                f"with --dtype out of bf16, {', '.join(KINDS)}"
            )
        quantize = entry.dtype if entry.dtype in KINDS else None
        offload = None
        if entry.resident < 1:
            per_layer = self._layer_bytes(config, quantize, dtype or DTYPES[config.dtype])
            # An offloaded plan has one stage; its share is one of whole layers.
            offload = Offload(resident_bytes=round(entry.resident * config.num_hidden_layers) * per_layer)
        return {"split": list(entry.stages), "quantize": quantize, "offload": offload}

    def generate_options(self, prompts: int, draft: object) -> dict[str, object]:
        """Keywords of `fp.generate` on this rank's replica: num_draft_tokens, microbatches and prefill_chunk.

        Args:
            prompts: how many this replica continues; micro-batches are at most as many, and chunks of the prompts as
                long as the planned memory allows.
            draft: what `fp.generate` is given as draft. Only whether there is one matters here.

        Raises ValueError where the plan drafts and there is no draft, or the other way round, and for more
        micro-batches than `fp.generate` has.
        """
        entry = self.entry
        if entry.drafted and draft is None:
            was = self.plan.request.get("draft")
            raise ValueError(
                f"the plan drafts {entry.drafted} tokens a round (it was made with {was}): give a draft (--draft)"
            )
        if draft is not None and not entry.drafted:
            raise ValueError(
                f"the plan ({entry.label}) drafts nothing, but there is a draft: leave it out, or plan with --draft "
                "and --acceptance"
            )
        micro = min(entry.microbatches, max(1, prompts))
        if micro > SLOTS:
            raise ValueError(
                f"the plan decodes in {entry.microbatches} micro-batches; fp.generate has at most {SLOTS}: plan anew"
            )
        # The activations were planned for so many tokens in a pass, over all prompts that pass together.
        most = max(1, MAX_CHUNK // math.ceil(max(1, prompts) / micro))
        options: dict[str, object] = {"microbatches": micro, "prefill_chunk": min(entry.prefill_chunk or most, most)}
        return {**options, "num_draft_tokens": entry.drafted} if entry.drafted else options

    def replica_prompts(self, prompts: int) -> range:
        """Which of so many prompts this rank's replica continues. Raises ValueError for fewer prompts than replicas,
        of which some would have nothing to do."""
        replicas, mine = self.entry.dp, self.mesh.get_local_rank("dp")
        if prompts < replicas:
            raise ValueError(
                f"the plan has {replicas} replicas, which take a prompt each at least; there are {prompts} prompt(s)"
            )
        return range(prompts * mine // replicas, prompts * (mine + 1) // replicas)

    def _check_model(self, config: LlamaConfig) -> None:
        given = dataclasses.asdict(load_model(config))
        other = [key for key, value in self.plan.shape.items() if key != "name" and value != given.get(key)]
        if other:
            raise ValueError(
                f"the plan is for {self.plan.model}, this model has other shapes: "
                + ", ".join(f"{key} {given.get(key)} (plan: {self.plan.shape[key]})" for key in other)
            )

    def _layer_bytes(self, config: LlamaConfig, quantize: str | None, dtype: torch.dtype) -> int:
        """Bytes that a resident layer takes on this rank, padding included, found on a layer without memory."""
        layer = LlamaDecoderLayer(config, 0, group=self.mesh.get_group("tp"), device="meta", dtype=dtype)
        return streamed_bytes(layer if quantize is None else quantize_(layer, quantize))
