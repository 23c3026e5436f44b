"""The kernels of csrc/verify.cu behind `verify` and `sample`: what they cannot do, and their launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .. import _ext
from ..comm import collectives
from ..comm.workspace import existing_workspace, slot_bytes_for, why_no_workspace, workspace_of
from ..reference.noise import STREAMS
from ..reference.vocab_shard import VocabShard
from . import _direct

METHODS = ("rejection", "block", "greedy")  # in the order of enum VerifyMethod of csrc/verify.h
ALL, ROWS, BEYOND, DRAW, FINISH = range(5)  # enum VerifyPart


def _world(part: VocabShard) -> int:
    return part.pg.size() if part.pg else 1


def _why_no_peers(part: VocabShard, records: int) -> str | None:
    """Why the ranks cannot exchange so many records inside the kernels. The same on all; collective at first."""
    if (why := why_no_workspace(part.pg)) is not None:
        return why
    bytes = records * _ext.extension().verify_record_bytes
    most = slot_bytes_for(part.pg.size())
    return None if bytes <= most else f"records of {bytes} bytes do not fit the slots of {most}"


def why_not_fused(
    target_logits, draft_tokens, draft_logits, filters, part: VocabShard, *, tree: bool = False
) -> str | None:
    """Why the reference must do this call; None if the kernels can. Target [B, k + 1, width], `filters` top_k, top_p
    and min_p, the rest as in `verify` or `verify_tree`. The same on all ranks, and collective at a group's first
    call."""
    if not target_logits.is_cuda:
        return f"there are kernels for CUDA tensors only, not for {target_logits.device.type}"
    if (why := _ext.why_no_kernels()) is not None:
        return why
    extension, k = _ext.extension(), draft_tokens.shape[1]
    most = extension.verify_max_tree_nodes if tree else extension.verify_max_draft_tokens
    if k > most:
        return f"the kernels verify up to {most} {'nodes' if tree else 'drafts'} a request, not {k}"
    if draft_logits is not None and draft_logits.dtype not in (target_logits.dtype, torch.float32):
        return f"the kernels read draft_logits in {target_logits.dtype} or float32, not in {draft_logits.dtype}"
    if part.vocab_size > 2**30:
        return f"the kernels know vocabularies up to 2**30, not {part.vocab_size}"
    if tree:
        return None  # shards are gathered first
    if _world(part) > extension.verify_max_shards:
        return f"the kernels combine up to {extension.verify_max_shards} shards, not {_world(part)}"
    if _world(part) > 1 and any(f is not None for f in filters):
        why = _why_no_peers(part, _rows(draft_tokens, draft_logits))
        if why is not None:
            return f"filters over shards need the exchange through the peers' memory, and {why}"
    return None


def _rows(draft_tokens: torch.Tensor, draft_logits: torch.Tensor | None) -> int:
    """Rows of target and draft."""
    batch, k = draft_tokens.shape
    return batch * (k + 1 + (0 if draft_logits is None else k))


def _readable(logits: torch.Tensor) -> torch.Tensor:
    """Rows of contiguous elements: the kernels read any row and batch strides in place."""
    return logits if logits.stride(-1) == 1 else logits.contiguous()


def _stream(device: torch.device) -> int:
    return _direct.raw_stream(device.index)


def launch(
    target_logits,
    draft_tokens,
    draft_logits,
    seed,
    step,
    temperature,
    num_draft_tokens,
    filters,
    method: str,
    part: VocabShard,
    position: torch.Tensor | None = None,
    stream: str = "residual",
    *,
    return_logprobs: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """tokens, num_accepted and logprobs ([B, 0] unless asked for) as of `verify`, on the current stream.

    `filters`: top_k, top_p and min_p; `position` int64 [B] is that of row 0 in the noise (None: 0), `stream` that of
    the last token.
    """
    parts = Parts(
        target_logits, draft_tokens, draft_logits, seed, step, temperature, num_draft_tokens, filters, method, part,
        position, stream, return_logprobs=return_logprobs,
    )  # fmt: skip
    if _world(part) == 1:
        parts.whole()
    elif _why_no_peers(part, _rows(draft_tokens, draft_logits)) is None:
        workspace = workspace_of(part.pg)
        workspace.check()
        parts.whole(workspace.native)
    else:
        parts.gathered(lambda sent: collectives.all_gather(sent[None], part.pg))
    return parts.tokens, parts.accepted, parts.logprobs


def launch_tree(
    target_logits,
    draft_tokens,
    parents,
    draft_logits,
    seed,
    step,
    temperature,
    num_draft_tokens,
    filters,
    max_depth: int,
    part: VocabShard,
    *,
    return_logprobs: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """tokens, num_accepted, logprobs ([B, 0] unless asked for) and path as of `verify_tree`, on the current stream. The
    kernel walks the whole vocabulary: its shards are gathered, a tree's rows being few."""
    if _world(part) > 1:
        target_logits = _gathered(target_logits, part)
        draft_logits = None if draft_logits is None else _gathered(draft_logits, part)
        part = VocabShard(target_logits.shape[-1], part.vocab_size)
    parts = Parts(
        target_logits, draft_tokens, draft_logits, seed, step, temperature, num_draft_tokens, filters, "rejection",
        part, return_logprobs=return_logprobs, parents=parents, max_depth=max_depth,
    )  # fmt: skip
    parts.whole()
    return parts.tokens, parts.accepted, parts.logprobs, parts.path


def _gathered(logits: torch.Tensor, part: VocabShard) -> torch.Tensor:
    """[B, rows, width] per rank -> [B, rows, world * width], the padding at the end."""
    return collectives.all_gather(logits[None], part.pg).movedim(0, 2).flatten(2)


class Parts:
    """A call, ready to be launched, and its outputs. `rank` and `world`: instead of those of `part.pg`. With `parents`
    [k] or [B, k] a tree of `max_depth`."""

    def __init__(
        self, target_logits, draft_tokens, draft_logits, seed, step, temperature, num_draft_tokens, filters,
        method: str, part: VocabShard, position=None, stream: str = "residual", *, return_logprobs: bool = False,
        rank: int | None = None, world: int | None = None, parents=None, max_depth: int | None = None,
    ) -> None:  # fmt: skip
        batch, rows, _ = target_logits.shape
        columns = rows if parents is None else max_depth + 1
        self.extension = extension = _ext.extension()
        world = _world(part) if world is None else world
        rank = (part.pg.rank() if part.pg else 0) if rank is None else rank
        first = rank * part.width
        width = min(max(part.vocab_size - first, 0), part.width)
        # Kept until after the launch: a temporary would give its memory back before the kernels are queued.
        target_logits = _readable(target_logits)
        has_draft = draft_logits is not None and rows > 1
        draft_logits = _readable(draft_logits) if has_draft else None
        small = [draft_tokens, seed, step, position, temperature, num_draft_tokens, *filters, parents]
        small = [t if t is None else t.contiguous() for t in small]
        seed, num_draft_tokens, parents = small[1], small[5], small[9]
        self.tokens = seed.new_empty((batch, columns))
        self.path = seed.new_empty((batch, 0 if parents is None else max_depth))
        self.accepted = seed.new_empty((batch,), dtype=torch.int32)
        self.logprobs = seed.new_empty((batch, columns if return_logprobs else 0), dtype=torch.float32)
        scratch_bytes = extension.verify_scratch_bytes(batch, rows - 1, width, has_draft, parents is not None)
        self.scratch = seed.new_empty(-(-scratch_bytes // 8))
        self._kept = (target_logits, draft_logits, small)
        self._records = {
            ROWS: batch * (rows + (rows - 1 if has_draft and method != "greedy" else 0)),
            BEYOND: batch * (rows - 1),
            DRAW: batch,
        }
        self._sums = has_draft and rows > 2 and method == "block"
        # What follows is in the order of the extension's `verify`, which is called by position (csrc/bindings.cpp).
        self.inputs = [0 if t is None else t.data_ptr() for t in (target_logits, draft_logits, *small)]
        self._outputs = (
            self.tokens.data_ptr(),
            self.accepted.data_ptr(),
            self.logprobs.data_ptr() if return_logprobs else 0,
            0 if parents is None else self.path.data_ptr(),
            self.scratch.data_ptr(),
        )
        self.numbers = (
            target_logits.stride(0),
            target_logits.stride(1),
            draft_logits.stride(0) if has_draft else 0,
            draft_logits.stride(1) if has_draft else 0,
            0 if num_draft_tokens is None else num_draft_tokens.element_size(),
            batch,
            rows - 1,  # k
            width,
            first if width else 0,
            part.vocab_size,
            rank,
            world,
            METHODS.index(method),
            0 if parents is None or parents.dim() == 1 else parents.shape[1],  # parents_batch_stride
            0 if parents is None else max_depth,
            STREAMS[stream],
            _ext.DTYPE_CODES[target_logits.dtype],
            _ext.DTYPE_CODES[draft_logits.dtype] if has_draft else 0,
            seed.device.index,
        )

    def arguments(self, part: int, sent=None, received=None, peers=None) -> tuple:
        """The extension's, for a launch of `part` on the current stream."""
        exchanged = [0 if t is None else t.data_ptr() for t in (sent, received)]
        stream = _stream(self.tokens.device)
        return *self.inputs, *self._outputs, *exchanged, peers, stream, part, *self.numbers

    def _run(self, part: int, sent=None, received=None, peers=None) -> None:
        self.extension.verify(*self.arguments(part, sent, received, peers))

    def whole(self, peers=None) -> None:
        """Everything; `peers`: the extension's workspace of the group that shares the vocabulary."""
        self._run(ALL, peers=peers)

    def gathered(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Everything, with `gather` of int64 records [n, 4] into [world, n, 4] between the kernels."""
        received = None
        for part in (ROWS, BEYOND, DRAW) if self._sums else (ROWS, DRAW):
            sent = self.tokens.new_empty((self._records[part], self.extension.verify_record_bytes // 8))
            self._run(part, sent, received)
            received = gather(sent)
        self._run(FINISH, None, received)


class Known(NamedTuple):
    """What the long way found for calls of one signature: all but addresses."""

    numbers: tuple[int, ...]
    tokens: tuple[int, ...]  # shapes
    logprobs: tuple[int, ...] | None  # None: not wanted
    path: tuple[int, ...] | None
    scratch: int


# Of calls without vocab_group; the others' are in their group's workspace. Nothing in it depends on an address. None:
# calls like that always go the long way.
_known: dict[tuple, Known | None] = {}
_UNSEEN = object()


def launch_known(group, inputs: tuple, options: tuple) -> tuple[tuple | None, tuple | None]:
    """The short way (ops/_direct.py) for `inputs`, what a caller gave in the order of `Parts.inputs`, and the options
    that matter beside them: (tokens, num_accepted, logprobs or None, path or None), and the call's signature.

    The first is None where the call must go the long way; if the second is not, `remember` may be told afterwards.
    """
    target, seed = inputs[0], inputs[3]
    if not _direct.untraced() or type(target) is not torch.Tensor or not target.is_cuda:
        return None, None
    index = target.get_device()
    signature, addresses = [index, options], []
    for t in inputs:
        if t is None:
            signature.append(None)
            addresses.append(0)
        elif type(t) is torch.Tensor and t.get_device() == index and not t.requires_grad:
            signature += t.dtype, t.shape, t.stride()
            addresses.append(t.data_ptr())
        else:
            return None, None
    signature = tuple(signature)
    workspace = peers = None
    if group is None:
        known = _known.get(signature, _UNSEEN)
    elif _direct.watched():
        return None, None
    else:
        workspace = _direct.workspace_for(group)
        known = _UNSEEN if workspace is None else workspace.known.get(signature, _UNSEEN)
    if known is _UNSEEN:
        return None, signature
    if known is None:
        return None, None
    numbers, tokens, logprobs, path, scratch = known
    if workspace is not None:
        workspace.check()
        peers = workspace.native
    # These ways to call torch take half the time of a shape in one argument.
    tokens = seed.new_empty(*tokens)
    accepted = torch.empty_like(seed, dtype=torch.int32)
    logprobs = None if logprobs is None else seed.new_empty(*logprobs, dtype=torch.float32)
    path = None if path is None else seed.new_empty(*path)
    scratch = seed.new_empty(scratch)
    _ext.extension().verify(
        *addresses,
        tokens.data_ptr(),
        accepted.data_ptr(),
        0 if logprobs is None else logprobs.data_ptr(),
        0 if path is None else path.data_ptr(),
        scratch.data_ptr(),
        0,  # sent
        0,  # received
        peers,
        _direct.raw_stream(index),
        ALL,
        *numbers,
    )
    return (tokens, accepted, logprobs, path), signature


def remember(
    group, signature: tuple, inputs: tuple, target_logits, draft_tokens, draft_logits, seed, step, temperature,
    num_draft_tokens, filters, method: str, part: VocabShard, position=None, stream: str = "residual", *,
    flat: bool = False, **options,
) -> None:  # fmt: skip
    """After the long way for a call of this signature: the short way for the next ones, if the kernels took it and read
    the caller's tensors as they are. What follows `inputs` is as for `Parts`; `flat`: the caller wants tokens [B]."""
    tree = "parents" in options
    if why_not_fused(target_logits, draft_tokens, draft_logits, filters, part, tree=tree) is not None:
        return
    if part.pg and (
        existing_workspace(part.pg) is None or _why_no_peers(part, _rows(draft_tokens, draft_logits)) is not None
    ):
        return
    parts = Parts(
        target_logits, draft_tokens, draft_logits, seed, step, temperature, num_draft_tokens, filters, method, part,
        position, stream, **options,
    )  # fmt: skip
    known = None  # where the kernels read a copy of something
    if parts.inputs == [0 if t is None else t.data_ptr() for t in inputs]:
        known = Known(
            parts.numbers,
            tuple(parts.tokens.shape[:1] if flat else parts.tokens.shape),
            tuple(parts.logprobs.shape) if options.get("return_logprobs") else None,
            tuple(parts.path.shape) if tree else None,
            parts.scratch.numel(),
        )
    if part.pg:
        _direct.remember(group, part.pg, signature, known)
    else:
        _direct.keep(_known, signature, known)
