"""ParallelStyles for `torch.distributed.tensor.parallel.parallelize_module`, with this library's linear layers inside.

Unlike torch's ColwiseParallel and RowwiseParallel, parameters become plain local tensors, not DTensors, and inputs and
outputs are plain tensors: an input whole on every rank, an output of a column-parallel layer this rank's part.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from ..nn.embedding import shard_embedding_
from ..nn.linear import ColumnParallelLinear, RowParallelLinear, shard_linear_


class FusedColwiseParallel(ParallelStyle):
    """Turn a torch.nn.Linear into a ColumnParallelLinear, in place.

    Args:
        gather_output: give all output features on every rank (an output head that callers expect whole).
    """

    def __init__(self, *, gather_output: bool = False) -> None:
        super().__init__()
        self.gather_output = gather_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return shard_linear_(module, ColumnParallelLinear, group=device_mesh, gather_output=self.gather_output)


class FusedRowwiseParallel(ParallelStyle):
    """Turn a torch.nn.Linear into a RowParallelLinear, in place, or a torch.nn.Embedding into a VocabParallelEmbedding.

    Args:
        input_is_parallel: forward gets this rank's part of the input, as a column-parallel layer gives it; else the
            whole.
    """

    def __init__(self, *, input_is_parallel: bool = True) -> None:
        super().__init__()
        self.input_is_parallel = input_is_parallel

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, nn.Embedding):
            return shard_embedding_(module, group=device_mesh)
        return shard_linear_(module, RowParallelLinear, group=device_mesh, input_is_parallel=self.input_is_parallel)
