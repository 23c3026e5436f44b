"""Cutting a stack of layers into pipeline stages."""

from __future__ import annotations

import itertools


def split_layers(num_layers: int, num_stages: int) -> list[range]:
    """Contiguous layer ranges, one a stage; sizes differ by at most one, the last stages get the smaller ones (they
    also hold the norm and the head). Raises ValueError with fewer layers than stages."""
    if num_layers < num_stages:
        raise ValueError(f"pp={num_stages} does not fit a model of {num_layers} layers: every stage needs one at least")
    size, extra = divmod(num_layers, num_stages)
    bounds = [0]
    for stage in range(num_stages):
        bounds.append(bounds[-1] + size + (stage < extra))
    return [range(a, b) for a, b in itertools.pairwise(bounds)]
