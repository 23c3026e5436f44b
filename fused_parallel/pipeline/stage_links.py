"""The channels between the stages of a pipeline, and how hidden states and tokens travel through them."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..comm.collectives import all_gather_object
from ..comm.p2p import P2PChannel
from ..ops._dispatch import current_mode
from ..ops.all_reduce import all_gather_

# Slots bound the micro-batches that can be under way (speculative/microbatches.py).
SLOTS, SLOT_BYTES = 8, 8 << 20

# From this size on the ranks of a stage send a slice each, and the next stage gathers them: it costs an all-gather,
# some 3 us or more, and saves (1 - 1 / tp) of the transfer. Between GPUs of one host some 380 GB/s, between hosts 40.
SLICE_BYTES = {"memory": 4 << 20, "distributed": 256 << 10}

_TRANSPORT = {"reference": "distributed", "fused": "memory", "auto": "auto"}


class Received:
    """Hidden states, `tensor`; `release` when nothing that is queued later reads them."""

    def __init__(self, tensor: torch.Tensor, handle=None) -> None:
        self.tensor, self._handle = tensor, handle

    def release(self) -> None:
        if self._handle is not None:
            self._handle.release()
            self._handle = None

    def shares_memory(self, x: torch.Tensor) -> bool:
        """Whether x lies in the slot."""
        return self._handle is not None and x.untyped_storage().data_ptr() == self.tensor.untyped_storage().data_ptr()


class StageLinks:
    """This rank's channels to the stages before and after its own, and for tokens between the last stage and all
    others. With tensor parallelism rank r of a stage talks to rank r of the other.

    Args:
        pp: the group of the stages, in rank order; two or more.
        tp: the group of this stage's ranks, which hold the same hidden states.

    Construction is collective over both groups. `slice_bytes` may be changed, alike on all ranks.
    """

    def __init__(self, pp: dist.ProcessGroup, tp: dist.ProcessGroup, slots=SLOTS, slot_bytes=SLOT_BYTES) -> None:
        self.stage, self.last, self.tp = pp.rank(), pp.size() - 1, tp
        self.channels: dict[int, P2PChannel] = {}
        # In one order on all ranks: of the pairs not yet made, the first always has both its ends waiting for it.
        for a, b in sorted({(i, i + 1) for i in range(self.last)} | {(i, self.last) for i in range(self.last)}):
            if self.stage in (a, b):
                peer = a + b - self.stage
                mode = _TRANSPORT[current_mode()]
                self.channels[peer] = P2PChannel(pp, peer, slots=slots, slot_bytes=slot_bytes, transport=mode)
        neighbours = [c for p, c in self.channels.items() if abs(p - self.stage) == 1]
        kinds = {peer: c.transport for peer, c in self.channels.items()}
        # A boundary's two stages must decide alike; all its pairs are known to each of them.
        everyone = all_gather_object(kinds, tp) if tp.size() > 1 else [kinds]
        self.slice_bytes = {
            peer: min(SLICE_BYTES[rank[peer]] for rank in everyone) for peer in kinds if abs(peer - self.stage) == 1
        }
        self.slot_bytes = min(c.slot_bytes for c in neighbours)

    @property
    def open(self) -> bool:
        """False once fp.finalize() has closed the channels."""
        return all(channel.is_open for channel in self.channels.values())

    @property
    def capturable(self) -> bool:
        """Whether a stage's step can be captured in a CUDA graph."""
        return all(channel.capturable for channel in self.channels.values())

    def _part(self, elements: int, bytes: int, peer: int) -> int:
        """Elements that each rank of a stage sends: a slice, or all."""
        sliced = self.tp.size() > 1 and elements % self.tp.size() == 0 and bytes >= self.slice_bytes[peer]
        return elements // self.tp.size() if sliced else elements

    def send(self, x: torch.Tensor, add: torch.Tensor | None = None) -> None:
        """Hand x, or x + add (alike), to the next stage, which receives it with the same shape and dtype. Where it is
        pushed, it is added by the kernel that writes to the next stage's memory; of a slice only that is added."""
        peer = self.stage + 1
        part, most = self._part(x.numel(), x.nbytes, peer), self.slot_bytes // x.element_size()
        pieces = []
        for whole in (x, add):
            if whole is not None:
                flat = whole.reshape(-1)
                if part < x.numel():
                    flat = flat[self.tp.rank() * part : (self.tp.rank() + 1) * part]
                pieces.append(flat.split(most))
        for piece in zip(*pieces, strict=True):
            self.channels[peer].send(*piece)

    def receive(self, shape, dtype: torch.dtype) -> Received:
        """The hidden states that the stage before sent."""
        peer, channel = self.stage - 1, self.channels[self.stage - 1]
        elements = torch.Size(shape).numel()
        part = self._part(elements, elements * dtype.itemsize, peer)
        most = self.slot_bytes // dtype.itemsize
        if part == elements and part <= most:
            handle = channel.recv(((part,), dtype))
            return Received(handle.tensors.view(shape), handle)
        flat = torch.empty(part, dtype=dtype, device=channel.device)
        for piece in flat.split(most):
            with channel.recv(piece) as got:
                piece.copy_(got)
        return Received((all_gather_(flat, self.tp) if part < elements else flat).view(shape))

    def share(self, x: torch.Tensor) -> torch.Tensor:
        """Overwrite x with that of the last stage, which sends it to every other; contiguous and small (tokens)."""
        if self.stage == self.last:
            for peer in range(self.last):
                self.channels[peer].send(x)
        else:
            with self.channels[self.last].recv(x) as got:
                x.copy_(got)
        return x


_links: dict[tuple[str, str, str], StageLinks] = {}


def links_of(pp: dist.ProcessGroup, tp: dist.ProcessGroup) -> StageLinks | None:
    """The links of a pipeline in the mode of `fp.use` that is in force ("reference": over torch.distributed), which all
    models on it share; made at the first call, which is collective. None where there is one stage."""
    if pp.size() == 1:
        return None
    key = (pp.group_name, tp.group_name, current_mode())
    found = _links.get(key)
    if found is None or not found.open:
        found = _links[key] = StageLinks(pp, tp)
    return found
