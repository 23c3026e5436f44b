"""Verification of drafted tokens as a module, for models that end in one."""

from __future__ import annotations

import torch
from torch import nn

from ..comm.groups import resolve_group
from ..ops.verify import METHODS, VerifyResult, verify
from ..ops.verify_tree import verify_tree


class SpeculativeVerifier(nn.Module):
    """Holds how to verify; forward is `fp.verify`, or `fp.verify_tree` where `parents` is given. No parameters.

    Args:
        method: "rejection", "block" or "greedy", as in `fp.verify`; trees have a rule of their own (`siblings=`).
        vocab_size: ids at or above it are padding; default: none are.
        vocab_group: ProcessGroup or 1-D DeviceMesh whose ranks hold the vocabulary's shards; default: not sharded.

    Shapes, streams, graphs and errors are those of the two operations.
    """

    def __init__(self, method: str = "rejection", vocab_size: int | None = None, vocab_group=None):
        super().__init__()
        if method not in METHODS:
            raise ValueError(
                f"SpeculativeVerifier: method must be one of {', '.join(map(repr, METHODS))}, got {method!r}"
            )
        self.method, self.vocab_size = method, vocab_size
        self.vocab_group = None if vocab_group is None else resolve_group(vocab_group)

    def forward(
        self,
        target_logits: torch.Tensor,
        draft_tokens: torch.Tensor,
        draft_logits: torch.Tensor | None = None,
        *,
        parents: torch.Tensor | None = None,
        **options,
    ) -> VerifyResult:
        """Verify [B, k] drafts, or the nodes of a tree; `options` are the operation's other keywords."""
        options |= {"vocab_size": self.vocab_size, "vocab_group": self.vocab_group}
        if parents is not None:
            return verify_tree(target_logits, draft_tokens, parents, draft_logits, **options)
        return verify(target_logits, draft_tokens, draft_logits, method=self.method, **options)

    def extra_repr(self) -> str:
        return f"method={self.method!r}, vocab_size={self.vocab_size}"
