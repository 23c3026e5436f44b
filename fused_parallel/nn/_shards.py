"""Which part of a full checkpoint tensor each rank's parameter holds, and how it is filled.

One description serves full state dicts (`load_state_dict`), in-place conversion of torch modules and safetensors files
read slice by slice, so that each rank touches only its shard.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Piece:
    """Indices [start, stop) along the sharded dimension of a full tensor, held from `dest` on in the local parameter.

    `source` names the full tensor beside the module: "weight" is the module's own name, "../q_proj.weight" a sibling's
    (merged projections). `full` is the full tensor's size along the dimension.
    """

    source: str
    start: int
    stop: int
    dest: int
    full: int


@dataclass(frozen=True)
class Shard:
    """A local parameter's content along `dim`; what the pieces leave uncovered is padding and is zero."""

    dim: int
    size: int
    pieces: tuple[Piece, ...]


# read(source, dim, start, stop) -> that slice of the full tensor
Reader = Callable[[str, int, int, int], torch.Tensor]


def even_range(size: int, rank: int, world: int) -> tuple[int, int, int]:
    """(start, stop, local size) of a rank's share of `size`, padded to a multiple of `world`."""
    local = -(-size // world)
    start = min(rank * local, size)
    return start, min(start + local, size), local


def even_shard(dim: int, size: int, rank: int, world: int, source: str) -> Shard:
    """Rank's equal share of `size` along `dim`; the last ranks' may be padded with zeros."""
    start, stop, local = even_range(size, rank, world)
    return Shard(dim, local, (Piece(source, start, stop, 0, size),))


def stacked(shards: list[Shard]) -> Shard:
    """Several shards one after the other in one parameter (merged projections)."""
    pieces, offset = [], 0
    for shard in shards:
        pieces += [Piece(p.source, p.start, p.stop, offset + p.dest, p.full) for p in shard.pieces]
        offset += shard.size
    return Shard(shards[0].dim, offset, tuple(pieces))


@torch.no_grad()
def fill(parameter: torch.Tensor, shard: Shard, read: Reader) -> None:
    """Fill a local parameter with its pieces; padding becomes zero."""
    if sum(p.stop - p.start for p in shard.pieces) < shard.size:
        parameter.zero_()
    for p in shard.pieces:
        if p.stop > p.start:
            value = read(p.source, shard.dim, p.start, p.stop)
            parameter.narrow(shard.dim, p.dest, p.stop - p.start).copy_(value)


class ShardedModule(nn.Module):
    """Base of modules that hold a shard. `shards` maps parameter names to their Shard; absent ones are replicated.

    `load_state_dict` takes, for each parameter, either this rank's shard or the full tensor(s) under the names of the
    modules that were replaced; parameters never require gradients.
    """

    def __init__(self, group) -> None:
        super().__init__()
        from ..comm.capabilities import agree
        from ..comm.groups import resolve_group

        self.group = resolve_group(group)
        self.tp_rank, self.tp_size = self.group.rank(), self.group.size()
        self.shards: dict[str, Shard] = {}
        self.quantized: str | None = None  # by nn.quantize_
        self.on_cpu = False  # whether a weight in host memory may be multiplied there (nn.StreamedLayers)
        agree(self.group)

    def add_parameter(self, name: str, shape: tuple[int, ...], shard: Shard | None, device=None, dtype=None) -> None:
        parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)
        setattr(self, name, parameter)
        if shard is not None:
            self.shards[name] = shard

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        for name, shard in self.shards.items():
            key = prefix + name
            # Merged parameters were put together by the parent (merge_siblings); others come whole or as the shard.
            if key in state_dict and state_dict[key].shape != getattr(self, name).shape:
                state_dict[key] = local_part(getattr(self, name), shard, {name: state_dict[key]}, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        sizes = ", ".join(f"{n}={list(p.shape)}" for n, p in self.named_parameters(recurse=False))
        return f"rank {self.tp_rank} of {self.tp_size}, {sizes}"


def full_shape(parameter: torch.Tensor, shard: Shard, piece: Piece) -> list[int]:
    """Shape of the full tensor that a piece of the parameter comes from."""
    shape = list(parameter.shape)
    shape[shard.dim] = piece.full
    return shape


def local_part(parameter: torch.Tensor, shard: Shard, full: dict[str, torch.Tensor], prefix: str) -> torch.Tensor:
    """The local tensor that `full` (full tensors by source name) gives; ValueError where a shape does not fit."""
    for piece in shard.pieces:
        if piece.source not in full:
            raise ValueError(
                f"{prefix}{', '.join(full)}: a merged parameter loads the separate full tensors "
                f"({', '.join(dict.fromkeys(p.source[3:] for p in shard.pieces))}) or this rank's shard "
                f"{list(parameter.shape)}"
            )
        shape, expected = list(full[piece.source].shape), full_shape(parameter, shard, piece)
        if shape != expected:
            raise ValueError(
                f"{prefix}{piece.source.removeprefix('../')}: has shape {shape}, expected {expected} (the full tensor) "
                f"or {list(parameter.shape)} (this rank's shard)"
            )
    local = torch.empty_like(parameter, device="cpu" if parameter.is_meta else parameter.device)
    fill(local, shard, lambda source, dim, start, stop: full[source].narrow(dim, start, stop - start))
    return local


def merge_siblings(module: nn.Module) -> None:
    """Let `module` load full tensors of projections that one of its children holds merged (q, k, v; gate, up).

    torch hands each child only the keys below its own name, so the parent moves the siblings' tensors there first.
    """

    def before_load(owner, state_dict, prefix, *_):
        for child_name, child in owner.named_children():
            for name, shard in getattr(child, "shards", {}).items():
                keys = {p.source: prefix + p.source[3:] for p in shard.pieces if p.source.startswith("../")}
                if keys and all(key in state_dict for key in keys.values()):
                    full = {source: state_dict.pop(key) for source, key in keys.items()}
                    state_dict[f"{prefix}{child_name}.{name}"] = local_part(getattr(child, name), shard, full, prefix)

    module.register_load_state_dict_pre_hook(before_load)


@torch.no_grad()
def fill_from_full(new: nn.Module, full: nn.Module) -> None:
    """Fill the shards of `new` from the module `full` that it replaces, which holds the whole parameters."""
    for name, parameter in new.named_parameters(recurse=False):
        whole = getattr(full, name)
        if name in new.shards:
            parameter.copy_(local_part(parameter, new.shards[name], {name: whole}, ""))
        else:
            parameter.copy_(whole)


def become(old: nn.Module, new: nn.Module) -> None:
    """Give the object `old` the class, parameters and attributes of `new`, keeping its hooks."""
    hooks = {key: value for key, value in old.__dict__.items() if "_hooks" in key}
    training = old.training
    old.__class__ = new.__class__
    old.__dict__.clear()
    old.__dict__.update(new.__dict__)
    old.__dict__.update(hooks)
    old.train(training)
