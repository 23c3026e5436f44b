"""Speculative decoding: drafts, and the generation loop that verifies them."""

from .generate import generate
from .generation import Generation, GenerationStats

__all__ = ["Generation", "GenerationStats", "generate"]
