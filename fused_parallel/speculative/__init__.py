"""Speculative decoding: drafts, and the generation loop that verifies them."""

from .generate import Generation, GenerationStats, generate

__all__ = ["Generation", "GenerationStats", "generate"]
