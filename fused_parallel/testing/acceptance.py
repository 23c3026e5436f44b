"""Acceptance as one would like it: for measuring speculation with models whose agreement means nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from .. import ops

_STEPS = 4096  # rounds until the draws repeat
_MOST = 64  # drafts a round


@contextlib.contextmanager
def forced_acceptance(rate: float, *, seed: int = 0) -> Iterator[None]:
    """Within the block, `fp.generate` accepts each drafted token with probability `rate`, whatever the models say.

    Only the decision is replaced, after `fp.verify` has done all of its work: the draws come from a table made here,
    the same on every rank of one `seed`, by the request's round and the draft's place in it. All requests of a batch
    share them, so that they end together and no figure contains a tail of rounds for the last ones. The token after the
    accepted drafts is the one that verification drew, wherever that was. A few small kernels a round come on top, none
    where nothing is drafted; may be captured in CUDA graphs, which keep the rate of their capture.

    Trees are not forced. Raises ValueError: a rate outside 0..1.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"forced_acceptance: rate must be between 0 and 1, got {rate!r}")
    usual = ops.verify
    draws = torch.rand(_STEPS, _MOST, generator=torch.Generator().manual_seed(seed)) < rate
    # How many drafts of a round of any length are accepted: those before the first refusal.
    table = draws.long().cumprod(1).sum(1)
    of_device: dict[torch.device, torch.Tensor] = {}

    def verify(target_logits, draft_tokens, draft_logits=None, *, step, num_draft_tokens=None, **options):
        given = {"step": step, "num_draft_tokens": num_draft_tokens} | options
        result = usual(target_logits, draft_tokens, draft_logits, **given)
        k = draft_tokens.shape[1]
        if k == 0:
            return result
        if k > _MOST:
            raise ValueError(f"forced_acceptance: at most {_MOST} drafts a round, got {k}")
        counts = of_device[step.device][step % _STEPS].clamp(max=k)
        if num_draft_tokens is not None:
            counts = torch.minimum(counts, num_draft_tokens.long().clamp(0, k))
        drawn = result.tokens.gather(1, result.num_accepted.long().unsqueeze(1))
        place, last = torch.arange(k + 1, device=step.device), counts.unsqueeze(1)
        tokens = torch.nn.functional.pad(draft_tokens, (0, 1))
        tokens = torch.where(place < last, tokens, torch.where(place == last, drawn, -1))
        return result._replace(tokens=tokens, num_accepted=counts.int())

    def prepared(target_logits, draft_tokens, *args, **options):
        # Not inside a capture: prefill verifies, too, and comes before.
        device = target_logits.device
        if device not in of_device:
            of_device[device] = table.to(device)
        return verify(target_logits, draft_tokens, *args, **options)

    ops.verify = prepared
    try:
        yield
    finally:
        ops.verify = usual
