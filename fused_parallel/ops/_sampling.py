"""Checks that sample, verify and verify_tree share: of metadata only, so that nothing waits for the device."""

from __future__ import annotations

import torch

from ..comm.groups import group_from_name, resolve_group
from ..reference.vocab_shard import VocabShard
from ._library import check_floating

INTEGERS = (torch.int32, torch.int64)


def check_logits(op: str, name: str, logits: torch.Tensor, dims: tuple[str, ...]) -> None:
    """`logits`: a floating tensor of these dimensions, of which the last, the vocabulary, is not empty."""
    check_floating(op, **{name: logits})
    if logits.dim() != len(dims):
        raise ValueError(f"{op}: {name} must be [{', '.join(dims)}], got shape {tuple(logits.shape)}")
    if logits.shape[-1] == 0:
        raise ValueError(f"{op}: {name} has an empty vocabulary, shape {tuple(logits.shape)}")


def check_tensor(op: str, name: str, t, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], like: torch.Tensor):
    """`t`: a tensor of this shape, of one of these dtypes, on the device of `like`; returns it."""
    if not isinstance(t, torch.Tensor):
        raise TypeError(
            f"{op}: {name} must be a tensor on {like.device}, got {t!r} of type {type(t).__name__}"
            + ("; a number would be baked into a captured graph" if isinstance(t, (int, float)) else "")
        )
    if t.dtype not in dtypes:
        raise TypeError(f"{op}: {name} has dtype {t.dtype}, expected {' or '.join(str(d) for d in dtypes)}")
    if t.shape != torch.Size(shape):
        raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, expected {tuple(shape)}")
    if t.device != like.device:
        raise ValueError(f"{op}: {name} is on {t.device} but the logits are on {like.device}")
    return t


def check_seed(op: str, seed, step, like: torch.Tensor) -> None:
    """seed and step: int64 [B] tensors beside `like` [B, ...]."""
    check_tensor(op, "seed", seed, like.shape[:1], (torch.int64,), like)
    check_tensor(op, "step", step, like.shape[:1], (torch.int64,), like)


def _per_request(op: str, name: str, value, like: torch.Tensor, dtype: torch.dtype, off=(), high: float | None = None):
    """An option of each request as a tensor [B] of `dtype`, from such a tensor or from one number for all.

    None for None and for the numbers in `off`, which disable it.
    """
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        dtypes = INTEGERS if dtype == torch.int64 else floats
        return check_tensor(op, name, value, like.shape[:1], dtypes, like).to(dtype)
    if dtype == torch.int64 and not isinstance(value, int):
        raise TypeError(f"{op}: {name} must be an integer, got {value!r}")
    if value in off:
        return None
    if not value >= 0 or (high is not None and value > high):
        limits = "0 or more" if high is None else f"between 0 and {high}"
        raise ValueError(f"{op}: {name} must be {limits}, got {value!r}")
    return torch.full(like.shape[:1], value, dtype=dtype, device=like.device)


def options(op: str, like: torch.Tensor, temperature, top_k, top_p, min_p) -> tuple[torch.Tensor | None, ...]:
    """temperature, top_k, top_p and min_p as tensors [B]; a filter that one number disables for all becomes None."""
    if temperature is None:
        raise TypeError(f"{op}: temperature must be a float tensor [B] or a number, got None; 0 is greedy")
    return (
        _per_request(op, "temperature", temperature, like, torch.float32),
        _per_request(op, "top_k", top_k, like, torch.int64, off=(0,)),
        _per_request(op, "top_p", top_p, like, torch.float32, off=(0, 1), high=1),
        _per_request(op, "min_p", min_p, like, torch.float32, off=(0,), high=1),
    )


def vocabulary(op: str, logits: torch.Tensor, vocab_size: int | None, vocab_group) -> tuple[int, str]:
    """(number of ids that are not padding, name of the group or "") for logits [..., width] of one shard."""
    world, name = 1, ""
    if vocab_group is not None:
        pg = resolve_group(vocab_group)
        world, name = pg.size(), pg.group_name
    padded = logits.shape[-1] * world
    if vocab_size is None:
        return padded, name
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise TypeError(f"{op}: vocab_size must be an integer, got {vocab_size!r}")
    if not 1 <= vocab_size <= padded:
        raise ValueError(
            f"{op}: vocab_size must be between 1 and {padded} ({world} shard(s) of {logits.shape[-1]} columns), "
            f"got {vocab_size}"
        )
    return vocab_size, name


def shard(logits: torch.Tensor, vocab_size: int, group_name: str) -> VocabShard:
    """This rank's columns, from what an operation's schema carries."""
    return VocabShard(logits.shape[-1], vocab_size, group_from_name(group_name) if group_name else None)
