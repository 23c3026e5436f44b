"""What `fp.generate` returns: tokens, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class GenerationStats:
    """What one `fp.generate` call cost on this rank. Seconds are wall time; communication includes waiting for
    peers."""

    sequences: int
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    rounds: int
    drafted: int
    accepted: int
    communication_seconds: float | None  # as comm.CommunicationTimer counts; None: in CUDA graphs
    rounds_by_length: dict[int, int]  # how many rounds drafted 0, 1, ... tokens
    rounds_by_tree: dict[tuple[int, int], int]  # how many of them drafted a tree of so many nodes and so deep
    streamed_bytes: int  # of offloaded weights, copied to the device by passes that were not captured
    stream_seconds: float  # for how long those copies ran
    bubble: float | None = None  # share of the time in which this pipeline stage waited for another; None: no stages

    @property
    def tokens_per_second(self) -> float:
        """New tokens after the first of each sequence, over the decode time, all sequences together."""
        return (self.new_tokens - self.sequences) / self.decode_seconds if self.decode_seconds > 0 else 0.0

    @property
    def acceptance(self) -> float | None:
        """Accepted over drafted tokens; None when nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def link_utilisation(self) -> float | None:
        """Share of prefill and decode time in which weights were copied to the device; None where none were."""
        total = self.prefill_seconds + self.decode_seconds
        return self.stream_seconds / total if self.stream_seconds and total > 0 else None

    @property
    def stream_gb_per_second(self) -> float | None:
        """Rate of those copies while they ran, in 10^9 bytes a second; None where there were none."""
        return self.streamed_bytes / self.stream_seconds * 1e-9 if self.stream_seconds else None

    @property
    def communication_share(self) -> float | None:
        """Share of prefill and decode time spent in collectives; None where rounds were captured in a graph."""
        if self.communication_seconds is None:
            return None
        total = self.prefill_seconds + self.decode_seconds
        return self.communication_seconds / total if total > 0 else 0.0


@dataclass
class Generation:
    """tokens: for each prompt its new token ids, ending with the end-of-sequence token if it was reached."""

    tokens: list[list[int]]
    stats: GenerationStats
