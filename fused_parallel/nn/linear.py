"""Column- and row-parallel linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ._shards import Shard, ShardedModule, become, even_shard, fill_from_full, stacked
from .rms_norm import RMSNorm


class ColumnParallelLinear(ShardedModule):
    """`torch.nn.Linear` with the output features split over the ranks of `group`.

    Args:
        in_features: size of the input's last dimension, whole on every rank.
        out_features: full size of the output, padded with zeros to a multiple of the group; several sizes make one
            merged layer (one matmul for gate and up).
        bias: whether there is a bias, split like the weight.
        group: ProcessGroup or 1-D DeviceMesh.
        gather_output: return all output features on every rank (one output only).
        sequence_parallel: the ranks hold rows of the input, which are gathered (`all_gather_matmul`); not with
            gather_output.
        names: for a merged layer, the names of the layers it replaces, beside it in the state dict.
        shards: instead of equal shares, each output's Shard of dim 0 (attention heads).

    Parameters, not initialised: `weight` [local out, in_features], `bias` [local out]. `load_state_dict` takes the full
    tensors of the layer it replaces, of which it keeps this rank's part, or this rank's shards.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | Sequence[int],
        bias: bool = False,
        *,
        group,
        gather_output: bool = False,
        sequence_parallel: bool = False,
        names: Sequence[str] | None = None,
        shards: Sequence[Shard] | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(group)
        if in_features < 1 or min([out_features] if isinstance(out_features, int) else out_features) < 1:
            raise ValueError(f"ColumnParallelLinear: sizes must be positive, got {in_features} and {out_features}")
        sizes = [out_features] if isinstance(out_features, int) else list(out_features)
        if names is None and len(sizes) > 1:
            raise ValueError("ColumnParallelLinear: several outputs need the names of the layers they replace")
        if gather_output and len(sizes) > 1:
            raise ValueError("ColumnParallelLinear: gather_output works with one output")
        if gather_output and sequence_parallel:
            raise ValueError("ColumnParallelLinear: sequence_parallel leaves the outputs split; not with gather_output")
        self.sequence_parallel = sequence_parallel
        self.in_features, self.out_features, self.gather_output = in_features, sum(sizes), gather_output
        if shards is None:
            shards = [even_shard(0, n, self.tp_rank, self.tp_size, "") for n in sizes]
        for parameter in ("weight", "bias") if bias else ("weight",):
            sources = [f"../{n}.{parameter}" for n in names] if names else [parameter]
            shard = stacked([_named(s, source) for s, source in zip(shards, sources, strict=True)])
            shape = (shard.size, in_features) if parameter == "weight" else (shard.size,)
            self.add_parameter(parameter, shape, shard, device, dtype)
        if not bias:
            self.register_parameter("bias", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] -> [..., local out] (outputs of a merged layer one after the other), or [...,
        out_features] with `gather_output`. With `sequence_parallel` x [M / tp, in_features] -> [M, local out]."""
        if self.sequence_parallel:
            out = ops.all_gather_matmul(x, self.weight, group=self.group)
            return out if self.bias is None else out.add_(self.bias)
        if is_apart(self, x):
            out = local_product(self, x)
            out = out if self.bias is None else out.add_(self.bias)
        else:
            out = ops.linear(x, self.weight, self.bias)
        return gather_last(out, self.out_features, self.group) if self.gather_output else out


def _named(shard: Shard, source: str) -> Shard:
    return Shard(shard.dim, shard.size, tuple(replace(p, source=source) for p in shard.pieces))


def gather_last(x: torch.Tensor, size: int, group) -> torch.Tensor:
    """[..., n] per rank -> [..., size]: the ranks' last dimensions concatenated, padding cut off."""
    if group.size() == 1:
        return x[..., :size]
    parts = ops.all_gather(x.movedim(-1, 0).contiguous(), group=group)
    return parts[:size].movedim(0, -1).contiguous()


class RowParallelLinear(ShardedModule):
    """`torch.nn.Linear` with the input features split over the ranks of `group` and the output summed over them.

    Args:
        in_features: full size of the input, padded with zeros to a multiple of the group.
        out_features: size of the output, whole on every rank.
        bias: whether there is a bias: whole on every rank, added once.
        group: ProcessGroup or 1-D DeviceMesh.
        input_is_parallel: forward gets this rank's part of the input (of a column-parallel layer); else the whole, of
            which it takes its part.
        sequence_parallel: each rank keeps its rows of the output (`matmul_reduce_scatter`).
        shard: instead of an equal share, the Shard of the weight's dim 1 (attention heads).

    Parameters, not initialised: `weight` [out_features, local in], `bias` [out_features]. `load_state_dict` takes the
    full tensors of the layer it replaces, of which it keeps this rank's part, or this rank's shards.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        group,
        input_is_parallel: bool = True,
        sequence_parallel: bool = False,
        shard: Shard | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(group)
        if in_features < 1 or out_features < 1:
            raise ValueError(f"RowParallelLinear: sizes must be positive, got {in_features} and {out_features}")
        self.in_features, self.out_features, self.input_is_parallel = in_features, out_features, input_is_parallel
        self.sequence_parallel = sequence_parallel
        shard = shard or even_shard(1, in_features, self.tp_rank, self.tp_size, "weight")
        self.add_parameter("weight", (out_features, shard.size), _named(shard, "weight"), device, dtype)
        if bias:
            self.add_parameter("bias", (out_features,), None, device, dtype)
        else:
            self.register_parameter("bias", None)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None = None,
        norm: RMSNorm | None = None,
    ):
        """x [..., local in] -> out [..., out_features], whole on every rank. With `residual` [..., out_features]:
        residual + out; with `norm` (an RMSNorm), too: (norm(sum), sum) for sum = residual + out, in one operation. With
        `sequence_parallel` x [M, local in], and out and residual are [M / tp, out_features]: this rank's rows."""
        if not self.input_is_parallel:
            x = take_part(x, self.weight_shard if self.quantized else self.shards["weight"])
        if norm is not None and residual is None:
            raise ValueError("RowParallelLinear: norm needs a residual to add to")
        if self.sequence_parallel:
            out = ops.matmul_reduce_scatter(x, self.weight, group=self.group)
            out = out if self.bias is None else out.add_(self.bias)
            if norm is not None:
                return ops.add_rms_norm(out, residual, norm.weight, norm.variance_epsilon)
            return out if residual is None else residual + out
        if is_apart(self, x):
            return self._apart(x, residual, norm)
        if norm is None:
            out = ops.matmul_all_reduce(x, self.weight, self.bias, group=self.group)
            return out if residual is None else residual + out
        return ops.matmul_all_reduce_add_rms_norm(
            x,
            self.weight,
            residual,
            norm.weight,
            norm.variance_epsilon,
            self.bias,
            group=self.group,
        )

    def _apart(self, x: torch.Tensor, residual: torch.Tensor | None, norm: RMSNorm | None):
        """forward as two operations: the product, then what sums it."""
        out = local_product(self, x)
        if norm is not None and self.bias is None:
            eps = norm.variance_epsilon
            return ops.all_reduce_add_rms_norm(out, residual, norm.weight, eps, group=self.group)
        out = ops.all_reduce(out, group=self.group)
        out = out if self.bias is None else out + self.bias
        if norm is not None:
            return ops.add_rms_norm(out, residual, norm.weight, norm.variance_epsilon)
        return out if residual is None else residual + out


def is_apart(layer: ShardedModule, x: torch.Tensor) -> bool:
    """Whether the product is an operation of its own: of a quantised weight, or of one that is left in host memory."""
    return layer.quantized is not None or (layer.on_cpu and layer.weight.device != x.device)


def local_product(layer: ShardedModule, x: torch.Tensor) -> torch.Tensor:
    """x [..., K] times this rank's weight, without bias or communication. With `layer.on_cpu` it is computed where the
    weight is: a GPU's x goes to the CPU and back for a weight in host memory, and the host waits."""
    here = x
    if layer.on_cpu:
        here = x.to(layer.scales.device if layer.quantized is not None else layer.weight.device)
    if layer.quantized is not None:
        return ops.quantized_matmul(here, layer.values, layer.scales).to(x.device)
    return F.linear(here, layer.weight).to(x.device)


def take_part(x: torch.Tensor, shard: Shard) -> torch.Tensor:
    """This rank's slice of the last dimension, padded with zeros to the shard's size."""
    (piece,) = shard.pieces
    part = x[..., piece.start : piece.stop]
    return F.pad(part, (0, shard.size - part.shape[-1]))


def shard_linear_(
    linear: nn.Linear,
    kind: type[ColumnParallelLinear] | type[RowParallelLinear],
    *,
    group,
    shard: Shard | None = None,
    **options,
) -> nn.Module:
    """Turn a `torch.nn.Linear` holding the full weight into a parallel layer, in place (the object stays the same).

    `shard` and `options` are the constructor's. Hooks and the module's place in its parents survive.
    """
    # A subclass computes something else, which the parallel layer would drop.
    if type(linear) is not nn.Linear:
        raise TypeError(f"cannot shard a {type(linear).__name__}: expected torch.nn.Linear itself, not a subclass")
    if linear.weight.is_meta:
        raise ValueError("cannot shard a layer on the meta device: load the weights first")
    with torch.no_grad():
        special = {} if shard is None else ({"shards": [shard]} if kind is ColumnParallelLinear else {"shard": shard})
        new = kind(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            group=group,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
            **special,
            **options,
        )
        fill_from_full(new, linear)
    become(linear, new)
    return linear
