"""The memory that the fused collectives of a group exchange through: symmetric buffers, counters, the record of failures."""

from __future__ import annotations

import torch
import torch.distributed as dist

from .. import _ext
from ..errors import PeerTimeoutError

# Payload of a one-shot all-reduce, and half that of a two-shot one at two ranks. Three generations of one slot for each
# rank: 96 MiB a GPU at two ranks.
SLOT_BYTES = 16 << 20


class AllReduceWorkspace:
    """One rank's workspace of a group whose ranks reach each other's memory. Made once, before graphs are captured: the
    constructor is collective and synchronises; it is never freed or grown while the process lives.

    Args:
        pg: a group of 2 to 8 ranks on one host, one CUDA device each.
        timeout_seconds: bound of every wait for a peer inside a kernel.
    """

    def __init__(self, pg: dist.ProcessGroup, timeout_seconds: float, slot_bytes: int = SLOT_BYTES) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        extension, device = _ext.extension(), torch.device("cuda", torch.cuda.current_device())
        size = extension.all_reduce_workspace_bytes(pg.size(), slot_bytes)
        self.pg, self.device, self.slot_bytes = pg, device, slot_bytes
        self._buffer = symmetric_memory.empty(size, dtype=torch.uint8, device=device)
        self._handle = symmetric_memory.rendezvous(self._buffer, pg.group_name)
        self.native, self._owned = make_native(
            pg.rank(), list(self._handle.buffer_ptrs), slot_bytes, timeout_seconds, device
        )
        self.native.reset(torch.cuda.current_stream(device).cuda_stream)
        # No rank may push before every rank's buffer holds the sentinel.
        torch.cuda.synchronize(device)
        dist.barrier(group=pg, device_ids=[device.index])
        torch.cuda.synchronize(device)

    def check(self) -> None:
        """Raise PeerTimeoutError if a kernel has recorded a failed wait; the group stays failed."""
        rank = self.native.failed_rank()
        if rank >= 0:
            peer = dist.get_global_rank(self.pg, rank)
            raise PeerTimeoutError(
                f"{self.native.failure()} of its group, which is global rank {peer}: it died, stopped, or runs another "
                "sequence of operations. The group cannot be used any more: end this job on all ranks and start it again"
            )


def make_native(
    rank: int, bases: list[int], slot_bytes: int, timeout_seconds: float, device: torch.device, max_ctas: int | None = None
):
    """(extension's workspace over the ranks' buffers at `bases`, the tensors it lives on). `max_ctas`: default one CTA for
    each multiprocessor, so that all are resident at once."""
    extension = _ext.extension()
    control = torch.zeros(extension.all_reduce_control_bytes, dtype=torch.uint8, device=device)
    record = torch.zeros(extension.all_reduce_record_bytes, dtype=torch.uint8, pin_memory=True)
    if max_ctas is None:
        max_ctas = torch.cuda.get_device_properties(device).multi_processor_count
    native = extension.AllReduceWorkspace(
        rank=rank,
        bases=bases,
        slot_bytes=slot_bytes,
        control=control.data_ptr(),
        record=record.data_ptr(),
        timeout_seconds=timeout_seconds,
        device=device.index,
        max_ctas=max_ctas,
    )
    return native, (control, record)
