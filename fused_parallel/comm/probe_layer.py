"""What the host takes to queue a layer's kernels one by one. Used by `comm.probe`."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist

from ..testing.timer import quantile
from .groups import init
from .launch import launch
from .probe_collectives import rank_environment

_TIMEOUT_S = 120
_FEW, _MORE = 4, 8  # layers of a model, and how many more the other one has
_TOKENS = 128  # beyond those that decoding passes at once, so it goes the way of a prefill


def eager_layer_us(world_size: int, device: str = "cuda") -> float:
    """The host's microseconds for a Llama layer's prefill, not captured: of models so small that a GPU waits for the
    host, what eight layers more take; in a process for each GPU, all at once, the slowest. On a CPU, where computing
    counts, too, it is of no use but to test this.

    Raises RuntimeError if it cannot be measured.
    """
    return max(launch(_on_rank, world_size, device, timeout=_TIMEOUT_S, environment=rank_environment()))


def _on_rank(device: str) -> float:
    from ..models.config import LlamaConfig  # they import this package
    from ..models.llama import LlamaForCausalLM

    mesh = init(tp=1, dp=int(os.environ["WORLD_SIZE"]), device=device, timeout=_TIMEOUT_S)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "vocab_size": 512}
    took = []
    for layers in (_FEW, _FEW + _MORE):
        config = LlamaConfig.from_dict({**sizes, "num_hidden_layers": layers})
        with torch.no_grad():
            model = LlamaForCausalLM(config, mesh=mesh, dtype=torch.bfloat16)
            for weight in model.parameters():
                weight.normal_(0, 0.05)
            dist.barrier(group=mesh.get_group("dp"))
            took.append(_queued_us(model))
    return (took[1] - took[0]) / _MORE


def _queued_us(model, rounds: int = 15, warmup: int = 3) -> float:
    """The host's median time in a prefill; the GPU has done all of it before the next."""
    cache = model.make_cache(1, 2 * _TOKENS)
    ids = torch.randint(model.config.vocab_size, (1, _TOKENS), device=model.device)
    took = []
    for _ in range(warmup + rounds):
        cache.reset()
        cache.context = 0
        begin = time.perf_counter()
        model(ids, cache)
        took.append(1e6 * (time.perf_counter() - begin))
        if ids.is_cuda:
            torch.cuda.synchronize()
    return quantile(took[warmup:], 0.5)
