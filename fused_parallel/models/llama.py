"""The Llama family from this library's modules: tensor and pipeline parallel, reading Hugging Face checkpoints.

Modules are named as in transformers, so that its state dicts load; q, k, v and gate, up are held merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..comm.groups import local_group
from ..nn import (
    KVCache,
    ParallelAttention,
    ParallelLMHead,
    ParallelMLP,
    PipelineStage,
    RMSNorm,
    RotaryEmbedding,
    StreamedLayers,
    VocabParallelEmbedding,
    quantize_,
)
from ..nn.attention import lens_after
from ..offload import Offload
from ..pipeline import split_layers
from .checkpoint import Checkpoint, load_weights
from .config import DTYPES, LlamaConfig


class LlamaDecoderLayer(nn.Module):
    """One layer; `index` is its place in this stage's KV cache. forward gets the normed input and the running residual,
    and returns both for what follows: normed by `next_norm`, or not added yet where that is None (end of a stage)."""

    def __init__(self, config: LlamaConfig, index: int, *, group, device, dtype) -> None:
        super().__init__()
        c = config
        kwargs = {"group": group, "device": device, "dtype": dtype}
        self.self_attn = ParallelAttention(
            c.hidden_size,
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
            layer=index,
            bias=c.attention_bias,
            **kwargs,
        )
        self.mlp = ParallelMLP(c.hidden_size, c.intermediate_size, bias=c.mlp_bias, **kwargs)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, device=device, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps, device=device, dtype=dtype)

    def forward(self, x, residual, cos, sin, cache, positions, lens, next_norm: RMSNorm | None, tree_mask=None):
        x, residual = self.self_attn(
            x, cos, sin, cache, positions, residual, self.post_attention_layernorm, lens, tree_mask
        )
        if next_norm is None:
            return self.mlp(x), residual
        return self.mlp(x, residual, next_norm)


class LlamaModel(nn.Module):
    """This stage's slice: embedding (first stage), layers, final norm (last stage)."""

    def __init__(
        self,
        config: LlamaConfig,
        layers: range,
        first: bool,
        last: bool,
        *,
        group,
        device,
        dtype,
        offload: Offload | None = None,
        quantize: str | None = None,
        progress: bool = False,
    ) -> None:
        super().__init__()
        kwargs = {"group": group, "device": device, "dtype": dtype}
        later = offload is not None or quantize is not None  # memory of the layers is made afterwards
        of_layers = kwargs | {"device": "meta"} if later else kwargs
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, **kwargs) if first else None
        # A ModuleDict keyed by the global index keeps transformers' names on every stage.
        stack = {str(i): LlamaDecoderLayer(config, i - layers.start, **of_layers) for i in layers}
        if quantize is not None:
            for layer in stack.values():
                quantize_(layer, quantize)
                if offload is None:
                    layer.to_empty(device=device)
        if offload is None:
            self.layers: nn.ModuleDict | StreamedLayers = nn.ModuleDict(stack)
        else:
            if offload.cpu and group.size() > 1:
                raise ValueError(f"Offload(cpu=True) is for one tensor-parallel rank, not for {group.size()}")
            self.layers = StreamedLayers(stack, device=device, progress=progress, **vars(offload))
            if quantize is not None and self.layers.disk_bytes and offload.cache_dir is None:
                self.layers.release()
                raise ValueError(
                    f"offload=Offload(host_bytes={offload.host_bytes}) leaves layers in their files, which hold no "
                    f"quantised weights; name a directory where they can be kept (cache_dir), give host_bytes more, or "
                    f"leave quantize={quantize!r} out"
                )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, device=device, dtype=dtype) if last else None
        self.rotary_emb = RotaryEmbedding(config.head_dim, config.rope_theta, config.rope_scaling, device)

    def forward(self, x: torch.Tensor, cache: KVCache, positions: torch.Tensor, tree=None):
        """Ids [B, S] on the first stage, else the previous stage's hidden states [B, S, hidden] -> normed hidden states
        on the last stage, else two tensors whose sum is the hidden states: PipelineStage adds them on their way.
        `positions` [B, S] are those in the cache; in a `tree` the tokens stand elsewhere in the text."""
        residual = x if self.embed_tokens is None else self.embed_tokens(x)
        # What all layers share is computed once.
        offsets, mask = (None, None) if tree is None else tree
        cos, sin = self.rotary_emb(positions if tree is None else positions[:, :1] + offsets, residual.dtype)
        lens = lens_after(positions)
        layers = list(self.layers.values())
        norms = [layer.input_layernorm for layer in layers[1:]] + [self.norm]
        normed = layers[0].input_layernorm(residual)
        streamed = isinstance(self.layers, StreamedLayers)
        passing = self.layers.items(x.shape[0] * x.shape[1]) if streamed else self.layers.items()
        for (_, layer), norm in zip(passing, norms, strict=True):
            normed, residual = layer(normed, residual, cos, sin, cache, positions, lens, norm, mask)
        return (residual, normed) if self.norm is None else normed


class LlamaForCausalLM(nn.Module):
    """A Llama model, or this rank's part of it on a mesh.

    Args:
        config: a LlamaConfig.
        mesh: of `fp.init`; its "tp" and "pp" dimensions are used. None: every rank holds the whole model (a draft).
        device, dtype: of the parameters; default: the mesh's device and the config's dtype.
        offload: keep the layers in host memory and stream them (`fp.Offload`).
        quantize: "int8" or "int4": the layers' matrices are quantised (`nn.quantize_`), embedding and head are not.
        progress: show a bar while host memory is pinned.
        split: layers of each pipeline stage; default: such that the stages' weights, the head's among them, take equal
            time to read.

    Parameters hold this rank's shards and are uninitialised: use `from_pretrained` or `load_state_dict`.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        mesh: DeviceMesh | None,
        device=None,
        dtype: torch.dtype | None = None,
        offload: Offload | None = None,
        quantize: str | None = None,
        progress: bool = False,
        split: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if offload is not None and not isinstance(offload, Offload):
            raise TypeError(
                f"LlamaForCausalLM: offload must be an fp.Offload, got {offload!r}: fp.Offload(resident_bytes=...)"
            )
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"LlamaForCausalLM: dtype must be a torch.dtype such as torch.bfloat16, got {dtype!r}")
        self.config, self.mesh = config, mesh
        self.tp_group = local_group() if mesh is None else mesh.get_group("tp")
        self.pp_group = pp_group = local_group() if mesh is None else mesh.get_group("pp")
        vocabulary = config.vocab_size * config.hidden_size
        self.layer_range = split_layers(
            [layer_parameters(config)] * config.num_hidden_layers,
            pp_group.size(),
            head=vocabulary,
            embedding=vocabulary,
            split=split,
        )[pp_group.rank()]
        first, last = pp_group.rank() == 0, pp_group.rank() == pp_group.size() - 1
        device = torch.device(device) if device is not None else default_device(mesh)
        kwargs = {"group": self.tp_group, "device": device, "dtype": dtype or DTYPES[config.dtype]}
        self._device = device
        options = {"offload": offload, "quantize": quantize, "progress": progress}
        self.model = LlamaModel(config, self.layer_range, first, last, **options, **kwargs)
        try:
            self.lm_head = ParallelLMHead(config.hidden_size, config.vocab_size, **kwargs) if last else None
        except BaseException:
            if self.offloaded:
                self.model.layers.release()
            raise
        if last and first and config.tie_word_embeddings:
            self.lm_head.tie(self.model.embed_tokens)
        # Not a sub-module: it would name every parameter a second time.
        object.__setattr__(self, "stage", PipelineStage(self.model, group=pp_group, tp_group=self.tp_group))
        self.register_load_state_dict_pre_hook(LlamaForCausalLM._fit_state_dict)
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        mesh: DeviceMesh | None,
        dtype: torch.dtype | None = None,
        device=None,
        offload: Offload | None = None,
        quantize: str | None = None,
        progress: bool = False,
        split: Sequence[int] | None = None,
    ) -> LlamaForCausalLM:
        """Load a Hugging Face directory (config.json and safetensors); each rank reads only what it holds.

        Args:
            path: the directory.
            mesh: of `fp.init`, or None: the whole model on every rank.
            dtype: of parameters and activations; default: the checkpoint's.
            device: default: the mesh's.
            offload: keep the layers in host memory (read straight into it) and stream them; None: on the device.
            quantize: "int8" or "int4": quantise the layers' matrices while they are read, on the model's device, each
                rank its part; embedding and head keep their dtype. Offloaded, they travel quantised.
            progress: show bars on stderr (rank 0 only) while memory is pinned and files are read.
            split: layers of each pipeline stage; default: balanced.

        Raises FileNotFoundError or ValueError naming the file that is missing, corrupt or of another model, and
        RuntimeError where host memory does not suffice. Then, and when interrupted, pinned memory is given back.
        """
        config = LlamaConfig.from_pretrained(path)
        checkpoint = Checkpoint(path)
        model = cls(
            config,
            mesh=mesh,
            device=device,
            dtype=dtype,
            offload=offload,
            quantize=quantize,
            progress=progress,
            split=split,
        )
        try:
            model._load(checkpoint, progress)
        except BaseException:
            if model.offloaded:
                model.model.layers.release()
            raise
        return model

    def _load(self, checkpoint: Checkpoint, progress: bool) -> None:
        tied = {"lm_head.weight": "model.embed_tokens.weight"} if self.config.tie_word_embeddings else {}
        options = {"device": self._device, "progress": progress}
        if self.offloaded:
            options |= {"from_files": self.model.layers.from_files, "written": self.model.layers.written}
        used = load_weights(self, checkpoint, renamed=tied, **options)
        unknown = sorted(k for k in checkpoint.keys() - used if not self._is_elsewhere(k) and k not in tied)
        if unknown:
            raise ValueError(
                f"{checkpoint.path}: the checkpoint holds tensors for which config.json has no place, such as "
                f"{unknown[0]!r} ({len(unknown)} in all); config.json and weights do not belong together "
                "(num_hidden_layers, attention_bias, mlp_bias?)"
            )

    def _is_elsewhere(self, key: str) -> bool:
        """Whether a tensor of the whole model's checkpoint belongs to another stage, or is computed."""
        parts = key.split(".")
        if key.startswith("model.layers.") and parts[2].isdigit():
            index = int(parts[2])
            if index < self.config.num_hidden_layers and index not in self.layer_range:
                return True
        absent = {
            "model.embed_tokens.weight": self.model.embed_tokens is None,
            "model.norm.weight": self.model.norm is None,
            "lm_head.weight": self.lm_head is None,
        }
        return absent.get(key, False) or key.endswith("rotary_emb.inv_freq")

    def _fit_state_dict(self, state_dict, prefix, *_) -> None:
        embedding, head = prefix + "model.embed_tokens.weight", prefix + "lm_head.weight"
        if self.config.tie_word_embeddings and embedding in state_dict:  # files have a tied weight once
            state_dict.setdefault(head, state_dict[embedding])
        for key in [k for k in state_dict if k.startswith(prefix) and self._is_elsewhere(k[len(prefix) :])]:
            del state_dict[key]

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self._device if self.offloaded else next(self.model.layers.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters and activations."""
        return next(iter(self.model.layers.values())).input_layernorm.weight.dtype

    @property
    def offloaded(self) -> bool:
        """Whether layers are streamed from host memory."""
        return isinstance(self.model.layers, StreamedLayers)

    @property
    def streamed_bytes(self) -> int:
        """Bytes that offloaded layers have copied to the device since the model was made; 0 where all are there."""
        return self.model.layers.streamed_bytes if self.offloaded else 0

    @property
    def stream_seconds(self) -> float:
        """For how long the copies of offloaded layers have run, captured ones left out."""
        return self.model.layers.copy_seconds if self.offloaded else 0.0

    def prefetch(self) -> None:
        """Start what can be started of the next forward pass before its input is there: copies of offloaded layers."""
        if self.offloaded:
            self.model.layers.prefetch()

    def make_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty KV cache for this rank's layers and heads."""
        attention = next(iter(self.model.layers.values())).self_attn.qkv_proj
        return KVCache(
            len(self.model.layers),
            batch,
            capacity,
            attention.layout.local_kv,
            attention.head_dim,
            device=self.device,
            dtype=self.dtype,
        )

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        cache: KVCache | None = None,
        logits_at: torch.Tensor | None = None,
        tree: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor | None:
        """Logits of the tokens that follow `cache`.

        Args:
            input_ids: int64 [B, S], the same on every rank of the model.
            cache: its first `cache.lens` tokens are the context; the S tokens are written behind them, `lens` stays
                (the caller counts the tokens that it accepts). None: no context.
            logits_at: int64 [B]: only the logits after that token of each sequence.
            tree: the tokens are branches, not one text: (int64 [S], how far each stands behind the first; bool
                [B, S, S], which of the S each one sees, itself among them). They are cached in the order given.

        Returns:
            On the last stage [B, S, local vocabulary] ([B, 1, local vocabulary] with `logits_at`), else None.
        """
        batch, new = input_ids.shape
        if cache is None:
            cache = self.make_cache(batch, new)
            cache.context = 0
        elif cache.batch != batch:
            raise ValueError(f"input_ids has batch {batch}, the cache {cache.batch}")
        cache.check_room(new)
        positions = cache.positions(new)
        hidden = self.stage(
            input_ids,
            (batch, new, self.config.hidden_size),
            self.dtype,
            cache=cache,
            positions=positions,
            tree=tree,
        )
        if hidden is None:
            return None
        if logits_at is not None:
            hidden = hidden[torch.arange(batch, device=hidden.device), logits_at].unsqueeze(1)
        return self.lm_head(hidden)


def layer_parameters(config: LlamaConfig) -> int:
    """Weights of one whole layer, norms and biases left out."""
    heads = (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    return config.hidden_size * (heads + 3 * config.intermediate_size)


def default_device(mesh: DeviceMesh | None) -> torch.device:
    """The device this rank of the mesh computes on."""
    on_gpu = "nccl" in dist.get_backend_config() if mesh is None else mesh.device_type == "cuda"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
