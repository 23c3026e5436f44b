"""In-place tensor and pipeline parallelism for transformers' models, and for any module with a plan."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from ..comm import collectives
from ..nn import ColumnParallelLinear, HeadLayout, RowParallelLinear
from ..nn.embedding import shard_embedding_
from ..nn.linear import shard_linear_
from ..pipeline import StageLinks, links_of, split_layers
from .parallel_style import FusedColwiseParallel, FusedRowwiseParallel

# Families with the Llama layout: model.layers[i].self_attn.{q,k,v,o}_proj and .mlp.{gate,up,down}_proj.
LLAMA_FAMILY = ("llama", "mistral", "qwen2")

_STYLES = {
    "colwise": FusedColwiseParallel,
    "colwise_gather_output": lambda: FusedColwiseParallel(gather_output=True),
    "rowwise": FusedRowwiseParallel,
}


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    parallelize_plan: str | Mapping[str, str | ParallelStyle] = "auto",
    *,
    split: Sequence[int] | None = None,
) -> nn.Module:
    """Spread a model that every rank holds whole over the mesh, in place.

    Args:
        model: a transformers causal language model of the Llama family (Llama, Mistral, Qwen2), or with a plan any
            module. The same weights on every rank.
        mesh: of `fp.init`: "tp" splits heads, features and vocabulary; "pp" cuts the layers into stages and drops the
            others' layers.
        parallelize_plan: "auto" for the Llama family; else a mapping from module names (wildcards as in torch's
            parallelize_module) to "colwise", "colwise_gather_output", "rowwise" or a ParallelStyle. Plans are for tp
            only.
        split: layers of each pipeline stage; default: such that the weights of the stages, the head's among them, take
            equal time to read.

    Returns:
        `model`, which takes the same inputs and gives the same logits, whole, on every rank; its parameters no longer
        require gradients. Every rank calls the model at the same time with the same inputs: where tokens are sampled
        (`model.generate(do_sample=True)`), all ranks must have the same random state (`torch.manual_seed`), or they
        drift apart and wait for each other. With pp, models take input_ids only, and hidden states and caches are this
        stage's.

    Raises ValueError for an unknown architecture, a module the plan names in vain, sizes that do not fit the mesh, or a
    model that has been parallelized or has no weights; TypeError for a bad plan or a layer that is a subclass of
    torch.nn.Linear or torch.nn.Embedding (it would lose what it adds).
    """
    if not isinstance(mesh, DeviceMesh) or not {"tp", "pp"} <= set(mesh.mesh_dim_names or ()):
        raise TypeError('fp.parallelize: mesh must be the DeviceMesh of fp.init, with dimensions "pp" and "tp"')
    if parallelize_plan == "auto":
        _parallelize_llama(model, mesh, split)
    elif split is not None:
        raise ValueError(f"fp.parallelize: split={split!r} is for pipeline stages, which a plan does not make")
    else:
        _parallelize_by_plan(model, mesh, parallelize_plan)
    model.requires_grad_(False)
    return model


def _parallelize_by_plan(model: nn.Module, mesh: DeviceMesh, plan) -> None:
    if not isinstance(plan, Mapping) or not plan:
        raise TypeError(f'fp.parallelize: parallelize_plan must be "auto" or a mapping with entries, got {plan!r}')
    if mesh["pp"].size() > 1:
        raise ValueError(
            "fp.parallelize: a plan covers tensor parallelism only; pp > 1 needs the Llama family and 'auto'"
        )
    styles = {}
    for name, style in plan.items():
        if isinstance(style, str):
            if style not in _STYLES:
                raise ValueError(
                    f"fp.parallelize: unknown style {style!r} for {name!r}; expected one of {', '.join(_STYLES)}"
                )
            style = _STYLES[style]()
        if not any(fnmatch.fnmatch(module, name) for module, _ in model.named_modules()):
            raise ValueError(f"fp.parallelize: the plan names {name!r}, but the model has no such module")
        styles[name] = style
    parallelize_module(model, mesh["tp"], styles)


def _parallelize_llama(model: nn.Module, mesh: DeviceMesh, split) -> None:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in LLAMA_FAMILY or not hasattr(model, "lm_head"):
        raise ValueError(
            f"fp.parallelize: 'auto' knows the causal language models of {', '.join(LLAMA_FAMILY)}, not "
            f'{type(model).__name__!r}; pass parallelize_plan={{"path.to.linear": "colwise" | "rowwise", ...}}'
        )
    if any(isinstance(module, (ColumnParallelLinear, RowParallelLinear)) for module in model.modules()):
        raise ValueError("fp.parallelize: this model has been parallelized already")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("fp.parallelize: the model is on the meta device; load its weights first")
    config, base, tp = model.config, model.model, mesh["tp"]
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    layout = HeadLayout.of(heads, kv_heads, tp.get_local_rank(), tp.size())
    _cut_stages(model, mesh, split)
    tied = isinstance(base.embed_tokens, nn.Embedding) and isinstance(model.lm_head, nn.Linear)
    tied = tied and model.lm_head.weight is base.embed_tokens.weight

    for layer in base.layers:
        attention, mlp = layer.self_attn, layer.mlp
        dim = attention.head_dim
        shard_linear_(attention.q_proj, ColumnParallelLinear, group=tp, shard=layout.q_shard(0, dim))
        shard_linear_(attention.k_proj, ColumnParallelLinear, group=tp, shard=layout.kv_shard(0, dim))
        shard_linear_(attention.v_proj, ColumnParallelLinear, group=tp, shard=layout.kv_shard(0, dim))
        shard_linear_(attention.o_proj, RowParallelLinear, group=tp, shard=layout.q_shard(1, dim))
        attention.num_key_value_groups = layout.local_q // layout.local_kv
        shard_linear_(mlp.gate_proj, ColumnParallelLinear, group=tp)
        shard_linear_(mlp.up_proj, ColumnParallelLinear, group=tp)
        shard_linear_(mlp.down_proj, RowParallelLinear, group=tp)
    if isinstance(base.embed_tokens, nn.Embedding):
        shard_embedding_(base.embed_tokens, group=tp)
    head = model.lm_head.head if isinstance(model.lm_head, _SendLogits) else model.lm_head
    if isinstance(head, nn.Linear):
        shard_linear_(head, ColumnParallelLinear, group=tp, gather_output=True)
        if tied:
            head.weight = base.embed_tokens.weight


class _ReceiveHidden(nn.Module):
    """Stands for the embedding on later stages: gives the previous stage's hidden states, in the dtype of this stage's
    `layers` at that time."""

    def __init__(self, hidden_size: int, layers: nn.ModuleList, links: StageLinks) -> None:
        super().__init__()
        self.hidden_size, self.links = hidden_size, links
        self._layers = [layers]  # in a list: not a sub-module of this one, too

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        dtype = next(self._layers[0].parameters()).dtype
        received = self.links.receive((*input_ids.shape, self.hidden_size), dtype)
        # A copy: the model may keep what its embedding gives, and nothing tells when it is done with it.
        hidden = received.tensor.clone()
        received.release()
        return hidden


class _SendHidden(nn.Module):
    """Stands for the final norm on earlier stages: hands the hidden states to the next stage."""

    def __init__(self, links: StageLinks) -> None:
        super().__init__()
        self.links = links

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.links.send(hidden_states)
        return hidden_states


class _SendLogits(nn.Module):
    """The last stage's head: computes the logits and gives them to all stages."""

    def __init__(self, head: nn.Module, pp) -> None:
        super().__init__()
        self.head, self.pp = head, pp

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return collectives.broadcast_(self.head(hidden_states).contiguous(), self.pp.size() - 1, self.pp)


class _ReceiveLogits(nn.Module):
    """Stands for the head on earlier stages: gives the last stage's logits."""

    def __init__(self, vocab_size: int, pp) -> None:
        super().__init__()
        self.vocab_size, self.pp = vocab_size, pp

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        logits = hidden_states.new_empty(*hidden_states.shape[:-1], self.vocab_size)
        return collectives.broadcast_(logits, self.pp.size() - 1, self.pp)


def _refuse_embeddings(module: nn.Module, args, kwargs) -> None:
    # A later stage would take them for its own input and leave the stage before it waiting.
    if kwargs.get("inputs_embeds") is not None:
        raise ValueError("a model cut into pipeline stages takes input_ids, not inputs_embeds")


def _cut_stages(model: nn.Module, mesh: DeviceMesh, split) -> None:
    """Keep this stage's layers; receive and send where the model had its embedding, norm and head."""
    pp = mesh.get_group("pp")
    if pp.size() == 1 and split is None:
        return
    config, base = model.config, model.model
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if len(kinds) > 1:
        raise ValueError(f"fp.parallelize: pp needs layers of one kind of attention, this model mixes {sorted(kinds)}")
    stage, last = pp.rank(), pp.size() - 1
    costs = [sum(p.numel() for p in layer.parameters()) for layer in base.layers]
    vocabulary = config.vocab_size * config.hidden_size
    mine = split_layers(costs, pp.size(), head=vocabulary, embedding=vocabulary, split=split)[stage]
    if pp.size() == 1:
        return
    links = links_of(pp, mesh.get_group("tp"))
    base.layers = nn.ModuleList(base.layers[i] for i in mine)
    for index, layer in enumerate(base.layers):
        layer.self_attn.layer_idx = index  # transformers' cache counts from the first layer it sees
    base.register_forward_pre_hook(_refuse_embeddings, with_kwargs=True)
    if stage > 0:
        base.embed_tokens = _ReceiveHidden(config.hidden_size, base.layers, links)
    if stage < last:
        base.norm = _SendHidden(links)
        model.lm_head = _ReceiveLogits(config.vocab_size, pp)
    else:
        model.lm_head = _SendLogits(model.lm_head, pp)
