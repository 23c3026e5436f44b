"""verify: accept or replace a chain of drafted tokens so that the output follows the target model exactly."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ..reference import verify as reference
from ._debug import check_agreement
from ._dispatch import choose_fused
from ._library import register
from ._sampling import INTEGERS, check_logits, check_seed, check_tensor, options, shard, vocabulary
from ._verify_kernel import METHODS, launch, launch_known, remember, why_not_fused


class VerifyResult(NamedTuple):
    """What `fp.verify` and `fp.verify_tree` return. k is the number of drafts; of a tree, its max_depth.

    tokens: int64 [B, k + 1]: the accepted drafts, then one token drawn from the target; -1 after that.
    num_accepted: int32 [B]: the accepted drafts, so request b gains num_accepted[b] + 1 tokens.
    logprobs: float32 [B, k + 1] or None: of each returned token under the target (temperature and filters applied;
        greedy requests: at temperature 1, without filters); 0 after the last.
    path: of a tree, int64 [B, max_depth]: the accepted nodes, -1 after the last. None for `fp.verify`.
    """

    tokens: torch.Tensor
    num_accepted: torch.Tensor
    logprobs: torch.Tensor | None = None
    path: torch.Tensor | None = None


def _verify_impl(
    target_logits, draft_tokens, draft_logits, seed, step, temperature, num_draft_tokens, top_k, top_p, min_p,
    method: str, vocab_size: int, group_name: str, return_logprobs: bool,
):  # fmt: skip
    part = shard(target_logits, vocab_size, group_name)
    if part.pg:
        check_agreement("verify", part.pg, target_logits, draft_logits, draft_tokens, temperature, top_k, top_p, min_p)
    filters = (top_k, top_p, min_p)
    unsupported = functools.partial(why_not_fused, target_logits, draft_tokens, draft_logits, filters, part)
    if choose_fused("verify", unsupported, on_gpu=target_logits.is_cuda):
        return launch(
            target_logits, draft_tokens, draft_logits, seed, step, temperature, num_draft_tokens, filters, method,
            part, return_logprobs=return_logprobs,
        )  # fmt: skip
    tokens, accepted, logprobs = reference.verify(
        target_logits, draft_tokens, draft_logits, seed, step, temperature, num_draft_tokens, top_k, top_p, min_p,
        method, part,
    )  # fmt: skip
    return tokens, accepted, logprobs if return_logprobs else logprobs.new_empty(tokens.shape[0], 0)


def _verify_fake(
    target_logits, draft_tokens, draft_logits, seed, step, temperature, num_draft_tokens, top_k, top_p, min_p,
    method, vocab_size, group_name, return_logprobs,
):  # fmt: skip
    batch, columns = target_logits.shape[:2]
    return (
        seed.new_empty((batch, columns)),
        seed.new_empty((batch,), dtype=torch.int32),
        seed.new_empty((batch, columns if return_logprobs else 0), dtype=torch.float32),
    )


_verify = register(
    "verify(Tensor target_logits, Tensor draft_tokens, Tensor? draft_logits, Tensor seed, Tensor step, "
    "Tensor temperature, Tensor? num_draft_tokens, Tensor? top_k, Tensor? top_p, Tensor? min_p, str method, "
    "SymInt vocab_size, str group_name, bool return_logprobs) -> (Tensor, Tensor, Tensor)",
    _verify_impl,
    _verify_fake,
)


def check_drafts(op: str, target_logits, draft_tokens, draft_logits, num_draft_tokens) -> None:
    """Shapes, dtypes and devices of a round: target [B, k + 1, V] beside drafts [B, k], [B, k, V] and [B]."""
    check_logits(op, "target_logits", target_logits, ("B", "k + 1", "V"))
    batch, rows, width = target_logits.shape
    if rows == 0:
        raise ValueError(
            f"{op}: target_logits has no row, shape {tuple(target_logits.shape)}; it needs one per draft and one more"
        )
    check_tensor(op, "draft_tokens", draft_tokens, (batch, rows - 1), (torch.int64,), target_logits)
    if draft_logits is not None:
        check_logits(op, "draft_logits", draft_logits, ("B", "k", "V"))
        check_tensor(op, "draft_logits", draft_logits, (batch, rows - 1, width), (draft_logits.dtype,), target_logits)
    if num_draft_tokens is not None:
        check_tensor(op, "num_draft_tokens", num_draft_tokens, (batch,), INTEGERS, target_logits)


def verify(
    target_logits: torch.Tensor,
    draft_tokens: torch.Tensor,
    draft_logits: torch.Tensor | None = None,
    *,
    seed: torch.Tensor,
    step: torch.Tensor,
    temperature: torch.Tensor | float,
    num_draft_tokens: torch.Tensor | None = None,
    top_k: torch.Tensor | int | None = None,
    top_p: torch.Tensor | float | None = None,
    min_p: torch.Tensor | float | None = None,
    method: str = "rejection",
    vocab_size: int | None = None,
    vocab_group=None,
    return_logprobs: bool = False,
) -> VerifyResult:
    """Accept a prefix of each request's k drafted tokens and draw one more, so that all follow the target model.

    Whatever the draft, the tokens returned are distributed as if each had been drawn from the target alone, over any
    number of rounds. k = 0 ([B, 1, V] and [B, 0]) is plain sampling.

    Args:
        target_logits: [B, k + 1, V], float16, bfloat16 or float32, raw: row i scores the token after i drafts. With
            `vocab_group`, this rank's shard [B, k + 1, V / world]; shards are of equal width, the last ones padded.
        draft_tokens: int64 [B, k], of global ids. The first that the draft cannot have drawn ends the request's draft
            (outside the vocabulary, such as a -1 placeholder; or of no weight in draft_logits): it is not accepted and
            its place is drawn from the target itself.
        draft_logits: [B, k, V] (sharded like the target; its own floating dtype): the log-weights the drafts were
            drawn from, normalised or not; no temperature or filter is applied, only padding is masked, as `fp.sample`
            does. None: the draft is a point mass (n-gram lookup, greedy draft). Not read for greedy requests.
        seed: int64 [B] tensor on the device of the logits, read when a graph is replayed.
        step: likewise, below 2**62, counts the rounds of a request. No (seed, step) may come twice, or the output is
            biased.
        temperature: float [B] tensor, or one number for all, of the target; 0 (and negative, and NaN) is greedy: a
            draft is accepted if it is the argmax, the lowest id where several are equal.
        num_draft_tokens: int32 [B], makes k ragged: the drafts from there on are ignored, and where all before are
            accepted, target row num_draft_tokens[b] gives the last token. Values beyond 0..k count as the nearest.
        top_k: integer [B] tensor or number: keeps the tokens whose logit is at least the k-th largest. 0 is off.
        top_p: float [B] tensor or number: of what top_k left, renormalised, keeps the shortest prefix in descending
            order with mass top_p or more, and what equals its last. 0 and 1 are off.
        min_p: float [B] tensor or number: keeps the tokens with at least min_p of the most likely one's probability.
            0 is off. All three concern the target, not the draft.
        method: "rejection" (token by token), "block" (the whole draft at once: never fewer accepted on average) or
            "greedy" (as if every temperature were 0).
        vocab_size: ids at or above it are padding, masked in target and draft; default: none are.
        vocab_group: ProcessGroup or 1-D DeviceMesh whose ranks hold the vocabulary in rank order. All other arguments
            are the same on its ranks, and so are the results; given the same logits, they are those of the whole
            vocabulary on one rank. A few numbers a row are exchanged, never the vocabulary; top_k and top_p cost more
            exchanges (docs/verify.md).
        return_logprobs: also return the tokens' log-probabilities.

    Returns:
        VerifyResult(tokens int64 [B, k + 1], num_accepted int32 [B], logprobs float32 [B, k + 1] or None).

    NaN logits count as -inf, +inf as the largest float32; a row with no finite logit yields token 0, with
    log-probability -inf. The result is always in the vocabulary.

    The reference computes in float64; the CUDA kernels decide alike but for near ties (docs/verify.md). All noise is a
    function of (seed, step, position, stream, token id): a request's result does not depend on the rest of the batch.
    At most three kernels, and one more each for filters and for each exchange of vocab_group. Runs on the current
    stream without host synchronisation; can be captured in CUDA graphs (with vocab_group after one call of the group
    outside a capture, which makes its workspace) and traced by torch.compile(fullgraph=True).

    Raises:
        TypeError, ValueError: dtypes, shapes, devices, numbers or names that do not fit; logits that want a gradient.
        PeerTimeoutError: a rank of vocab_group died or did not answer within the group's timeout.

    Sources: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding"; Chen et al. 2023,
    "Accelerating Large Language Model Decoding with Speculative Sampling"; Sun et al. 2024, "Block Verification
    Accelerates Speculative Decoding".
    """
    signature = None
    if method in METHODS:
        inputs = (
            target_logits, draft_logits, draft_tokens, seed, step, None, temperature, num_draft_tokens, top_k, top_p,
            min_p, None,
        )  # fmt: skip
        signed = ("verify", method, type(vocab_size), vocab_size, return_logprobs)
        outputs, signature = launch_known(vocab_group, inputs, signed)
        if outputs is not None:
            return VerifyResult(*outputs)
    check_drafts("verify", target_logits, draft_tokens, draft_logits, num_draft_tokens)
    check_seed("verify", seed, step, target_logits)
    if method not in METHODS:
        raise ValueError(f"verify: method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    temperature, top_k, top_p, min_p = options("verify", target_logits, temperature, top_k, top_p, min_p)
    vocab_size, group_name = vocabulary("verify", target_logits, vocab_size, vocab_group)
    tokens, accepted, logprobs = _verify(
        target_logits, draft_tokens, draft_logits, seed, step, temperature, num_draft_tokens, top_k, top_p, min_p,
        method, vocab_size, group_name, return_logprobs,
    )  # fmt: skip
    if signature is not None:
        remember(
            vocab_group, signature, inputs, target_logits, draft_tokens, draft_logits, seed, step, temperature,
            num_draft_tokens, (top_k, top_p, min_p), method, shard(target_logits, vocab_size, group_name),
            return_logprobs=return_logprobs,
        )  # fmt: skip
    return VerifyResult(tokens, accepted, logprobs if return_logprobs else None)
