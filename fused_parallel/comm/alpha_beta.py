"""The two-parameter cost model of a transfer: time = alpha + bytes / beta."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class AlphaBeta:
    """`alpha_us`: what an empty transfer costs. `beta_gb_per_s`: the rate of large ones, in 10^9 bytes per second; None
    if larger transfers took no longer. `relative_residual`: root mean square of (model - measured) / measured."""

    alpha_us: float
    beta_gb_per_s: float | None
    relative_residual: float

    def us(self, bytes: float) -> float:
        """The model's time for a transfer of `bytes`, in microseconds."""
        return self.alpha_us + (bytes / self.beta_gb_per_s * 1e-3 if self.beta_gb_per_s else 0.0)


def fit_alpha_beta(bytes: Sequence[float], us: Sequence[float]) -> AlphaBeta:
    """Least squares over (bytes, microseconds) points, of the *relative* errors: in absolute ones the largest transfer
    alone would decide, and alpha would be noise. Neither parameter is negative.

    Raises ValueError for fewer than two different sizes or times that are not positive.
    """
    if len(bytes) != len(us) or len(set(bytes)) < 2 or not all(t > 0 for t in us):
        raise ValueError(f"fit_alpha_beta: needs two or more sizes and as many positive times, got {bytes} and {us}")
    # Minimise sum(w * (alpha + slope * s - t)^2) with w = 1 / t^2.
    w = [1 / t**2 for t in us]
    sw = sum(w)
    mean_s = sum(wi * s for wi, s in zip(w, bytes, strict=True)) / sw
    mean_t = sum(wi * t for wi, t in zip(w, us, strict=True)) / sw
    covariance = sum(wi * (s - mean_s) * (t - mean_t) for wi, s, t in zip(w, bytes, us, strict=True))
    slope = covariance / sum(wi * (s - mean_s) ** 2 for wi, s in zip(w, bytes, strict=True))
    alpha = mean_t - slope * mean_s
    if slope <= 0:
        slope, alpha = 0.0, mean_t
    elif alpha < 0:
        alpha = 0.0
        slope = sum(wi * s * t for wi, s, t in zip(w, bytes, us, strict=True)) / sum(
            wi * s * s for wi, s in zip(w, bytes, strict=True)
        )
    errors = [((alpha + slope * s - t) / t) ** 2 for s, t in zip(bytes, us, strict=True)]
    return AlphaBeta(alpha, 1e-3 / slope if slope else None, math.sqrt(sum(errors) / len(errors)))
