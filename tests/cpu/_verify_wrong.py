"""Mistakes in the reference of verification, made on purpose: tests that tell right from wrong must fail on each."""

from __future__ import annotations

import torch

from fused_parallel.reference import verify as reference
from fused_parallel.reference import verify_tree as tree_reference


def residual_p(monkeypatch):
    """After a refusal from p instead of max(p - q, 0)."""
    for module in (reference, tree_reference):
        monkeypatch.setattr(module, "residual", lambda log_scale, logp, logq: logp + log_scale[..., None])


def residual_unscaled(monkeypatch):
    """max(p - q, 0) where block needs max(p_i p - q, 0)."""
    right = reference.residual
    wrong = lambda log_scale, logp, logq: right(torch.zeros_like(log_scale), logp, logq)  # noqa: E731
    monkeypatch.setattr(reference, "residual", wrong)


def thresholds_of_rejection(monkeypatch):
    """Block keeps the longest draft that rejection would accept by itself."""
    scales, seen = reference._block_log_scales, []

    def remember(ratio):
        seen[:] = [ratio]
        return scales(ratio)

    def longest(u, log_scales, beyond, drafts, greedy):
        length = torch.arange(1, u.shape[1] + 1)
        kept = torch.where((u.log() < seen[0]) & (length <= drafts[:, None]), length, 0)
        return torch.cat((torch.zeros_like(drafts)[:, None], kept), 1).amax(1)

    monkeypatch.setattr(reference, "_block_log_scales", remember)
    monkeypatch.setattr(reference, "_accepted_by_block", longest)


def siblings_not_normalised(monkeypatch):
    """What a refused sibling leaves of p goes to the next one unnormalised."""
    monkeypatch.setattr(tree_reference, "_normalise", lambda weights, otherwise: weights)


def siblings_left_in_q(monkeypatch):
    """Siblings drawn without replacement are verified as if drawn with it."""
    refuse = tree_reference._refuse_drawn
    wrong = lambda p, q, removed, *rest: refuse(p, q, torch.zeros_like(removed), *rest)  # noqa: E731
    monkeypatch.setattr(tree_reference, "_refuse_drawn", wrong)
