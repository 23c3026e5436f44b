"""verify_tree: accept a path through a tree of drafted tokens so that the output follows the target model exactly."""

from __future__ import annotations

import functools

import torch

from ..reference import verify_tree as reference
from ._debug import check_agreement
from ._dispatch import choose_fused
from ._library import register
from ._sampling import check_seed, check_tensor, options, shard, vocabulary
from ._verify_kernel import launch_known, launch_tree, remember, why_not_fused
from .verify import VerifyResult, check_drafts

SIBLINGS = ("without_replacement", "deterministic")


def _verify_tree_impl(
    target_logits, draft_tokens, parents, draft_logits, seed, step, temperature, num_draft_tokens, top_k, top_p, min_p,
    max_depth: int, vocab_size: int, group_name: str, return_logprobs: bool,
):  # fmt: skip
    part = shard(target_logits, vocab_size, group_name)
    if part.pg:
        check_agreement(
            "verify_tree", part.pg, target_logits, draft_logits, draft_tokens, temperature, top_k, top_p, min_p
        )
    filters = (top_k, top_p, min_p)
    unsupported = functools.partial(why_not_fused, target_logits, draft_tokens, draft_logits, filters, part, tree=True)
    if choose_fused("verify_tree", unsupported, on_gpu=target_logits.is_cuda):
        return launch_tree(
            target_logits, draft_tokens, parents, draft_logits, seed, step, temperature, num_draft_tokens, filters,
            max_depth, part, return_logprobs=return_logprobs,
        )  # fmt: skip
    tokens, accepted, logprobs, path = reference.verify_tree(
        target_logits, draft_tokens, parents.expand_as(draft_tokens), draft_logits, seed, step, temperature,
        num_draft_tokens, top_k, top_p, min_p, max_depth, part,
    )  # fmt: skip
    return tokens, accepted, logprobs if return_logprobs else logprobs.new_empty(tokens.shape[0], 0), path


def _verify_tree_fake(
    target_logits, draft_tokens, parents, draft_logits, seed, step, temperature, num_draft_tokens, top_k, top_p, min_p,
    max_depth, vocab_size, group_name, return_logprobs,
):  # fmt: skip
    batch = target_logits.shape[0]
    return (
        seed.new_empty((batch, max_depth + 1)),
        seed.new_empty((batch,), dtype=torch.int32),
        seed.new_empty((batch, max_depth + 1 if return_logprobs else 0), dtype=torch.float32),
        seed.new_empty((batch, max_depth)),
    )


_verify_tree = register(
    "verify_tree(Tensor target_logits, Tensor draft_tokens, Tensor parents, Tensor? draft_logits, Tensor seed, "
    "Tensor step, Tensor temperature, Tensor? num_draft_tokens, Tensor? top_k, Tensor? top_p, Tensor? min_p, "
    "SymInt max_depth, SymInt vocab_size, str group_name, bool return_logprobs) -> (Tensor, Tensor, Tensor, Tensor)",
    _verify_tree_impl,
    _verify_tree_fake,
)


def verify_tree(
    target_logits: torch.Tensor,
    draft_tokens: torch.Tensor,
    parents: torch.Tensor,
    draft_logits: torch.Tensor | None = None,
    *,
    seed: torch.Tensor,
    step: torch.Tensor,
    temperature: torch.Tensor | float,
    siblings: str = "without_replacement",
    max_depth: int | None = None,
    num_draft_tokens: torch.Tensor | None = None,
    top_k: torch.Tensor | int | None = None,
    top_p: torch.Tensor | float | None = None,
    min_p: torch.Tensor | float | None = None,
    vocab_size: int | None = None,
    vocab_group=None,
    return_logprobs: bool = False,
) -> VerifyResult:
    """Accept a path from the root of each request's tree of N drafted tokens and draw one more token after it.

    Node by node, the children of the last accepted node are tried in order, each against what the refusals before it
    left of the target; the first accepted is followed. The tokens returned are distributed as the target's own,
    provided the siblings were chosen as `siblings` says.

    Args:
        target_logits: [B, N + 1, V]: row 0 scores the children of the root, row j + 1 those of node j.
        draft_tokens: int64 [B, N]. A node whose token is outside the vocabulary (such as a -1 placeholder) is passed
            over, and with it what hangs below.
        parents: int64 [N] or [B, N]: the node each node follows, -1 for the root. A parent stands before its children
            (parents[j] < j); a node for which that does not hold is never reached.
        draft_logits: [B, N, V], for "without_replacement" and only there: row j holds the log-weights q that node j was
            drawn from before any sibling was removed, so siblings have equal rows. No temperature or filter is applied.
        siblings: "without_replacement": siblings were drawn one after the other, in node order, from q without its
            earlier siblings (the rule of rejection: accept if u q(x) < p(x), else p becomes max(p - q, 0) normalised,
            and q loses x; a sibling to which q leaves no weight is passed over). Top-k siblings do *not* qualify.
            "deterministic": siblings were chosen in any way that the target's randomness does not know, such as the
            draft's top-k (accept with probability p(x), else p loses x and is normalised).
        max_depth: nodes deeper than this are never accepted; it sets the result's width, 0..N. Default N, which fits
            any tree.
        num_draft_tokens: int32 [B]: the nodes from there on are passed over.
        vocab_group: as in `fp.verify`, but the logits are gathered first.
        seed, step, temperature, top_k, top_p, min_p, vocab_size, return_logprobs: as in `fp.verify`.

    Returns:
        VerifyResult(tokens int64 [B, max_depth + 1], num_accepted int32 [B], logprobs or None, path int64
        [B, max_depth] of the accepted nodes, -1 after the last).

    A chain (parents -1, 0, 1, ...) gives the tokens of `fp.verify` with method="rejection". `KVCache.keep_path` moves
    the accepted nodes' keys and values together. The CUDA kernels take up to 63 nodes, and differ from the reference as
    docs/verify.md says. Everything else, streams, graphs and errors included, as in
    `fp.verify`.

    Sources: Miao et al. 2024, "SpecInfer"; Chen et al. 2024, "Sequoia: Scalable, Robust, and Hardware-aware
    Speculative Decoding" (sampling without replacement).
    """
    signature = None
    if vocab_group is None and siblings in SIBLINGS and (siblings == "deterministic") == (draft_logits is None):
        inputs = (
            target_logits, draft_logits, draft_tokens, seed, step, None, temperature, num_draft_tokens, top_k, top_p,
            min_p, parents,
        )  # fmt: skip
        signed = ("verify_tree", type(max_depth), max_depth, type(vocab_size), vocab_size, return_logprobs)
        outputs, signature = launch_known(vocab_group, inputs, signed)
        if outputs is not None:
            return VerifyResult(*outputs)
    check_drafts("verify_tree", target_logits, draft_tokens, draft_logits, num_draft_tokens)
    check_seed("verify_tree", seed, step, target_logits)
    batch, nodes = draft_tokens.shape
    if isinstance(parents, torch.Tensor) and parents.dim() == 1:
        check_tensor("verify_tree", "parents", parents, (nodes,), (torch.int64,), target_logits)
    else:
        check_tensor("verify_tree", "parents", parents, (batch, nodes), (torch.int64,), target_logits)
    if siblings not in SIBLINGS:
        raise ValueError(f"verify_tree: siblings must be one of {', '.join(map(repr, SIBLINGS))}, got {siblings!r}")
    if siblings == "without_replacement" and draft_logits is None:
        raise ValueError(
            'verify_tree: siblings="without_replacement" needs draft_logits, the weights the siblings were drawn from; '
            'siblings="deterministic" does not'
        )
    if siblings == "deterministic" and draft_logits is not None:
        raise ValueError(
            'verify_tree: siblings="deterministic" takes no draft_logits, got shape '
            f'{tuple(draft_logits.shape)}; siblings drawn from them need siblings="without_replacement"'
        )
    if max_depth is None:
        max_depth = nodes
    if isinstance(max_depth, bool) or not isinstance(max_depth, int):
        raise TypeError(f"verify_tree: max_depth must be an integer, got {max_depth!r}")
    if not 0 <= max_depth <= nodes:
        raise ValueError(f"verify_tree: max_depth must be between 0 and the tree's {nodes} nodes, got {max_depth}")
    temperature, top_k, top_p, min_p = options("verify_tree", target_logits, temperature, top_k, top_p, min_p)
    vocab_size, group_name = vocabulary("verify_tree", target_logits, vocab_size, vocab_group)
    tokens, accepted, logprobs, path = _verify_tree(
        target_logits, draft_tokens, parents, draft_logits, seed, step, temperature, num_draft_tokens, top_k, top_p,
        min_p, max_depth, vocab_size, group_name, return_logprobs,
    )  # fmt: skip
    if signature is not None:
        remember(
            vocab_group, signature, inputs, target_logits, draft_tokens, draft_logits, seed, step, temperature,
            num_draft_tokens, (top_k, top_p, min_p), "rejection", shard(target_logits, vocab_size, group_name),
            return_logprobs=return_logprobs, parents=parents, max_depth=max_depth,
        )  # fmt: skip
    return VerifyResult(tokens, accepted, logprobs if return_logprobs else None, path)
