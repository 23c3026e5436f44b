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


def eager_layer_us(world_size: int, device: str = "cuda") -> dict[str, float]:
    """The host's microseconds for a Llama layer's prefill, not captured: of models so small that a GPU waits for the
    host, what eight layers more take; in a process for each GPU, all at once, the slowest. `first` and `later` of a
    prompt's chunks; `tp_first` and `tp_later`, with several GPUs, where they are one tensor-parallel group, whose
    collectives are launched, too, and whose ranks wait for each other. On a CPU, where computing counts, too, it is
    of no use but to test this.

    Raises RuntimeError if it cannot be measured.
    """
    of_ranks = launch(_on_rank, world_size, device, timeout=_TIMEOUT_S, environment=rank_environment())
    return {key: max(of_rank[key] for of_rank in of_ranks) for key in of_ranks[0]}


def _on_rank(device: str) -> dict[str, float]:
    world = int(os.environ["WORLD_SIZE"])
    alone = init(tp=1, dp=world, device=device, timeout=_TIMEOUT_S)
    found = _of_mesh(alone, "")
    if world > 1:
        found |= _of_mesh(init(tp=world, device=device, timeout=_TIMEOUT_S), "tp_")
    return found


def _of_mesh(mesh, prefix: str) -> dict[str, float]:
    from ..models.config import LlamaConfig  # they import this package
    from ..models.llama import LlamaForCausalLM

    tp = mesh.get_group("tp").size()
    # Divisible by every tp up to 8 and more, and of 64 a head, as the kernels want.
    sizes = {"hidden_size": 64 * max(4, tp), "intermediate_size": 128 * max(4, tp), "num_attention_heads": max(4, tp)}
    took = []
    for layers in (_FEW, _FEW + _MORE):
        config = LlamaConfig.from_dict({**sizes, "vocab_size": 512, "num_hidden_layers": layers})
        with torch.no_grad():
            model = LlamaForCausalLM(config, mesh=mesh, dtype=torch.bfloat16)
            for weight in model.parameters():
                weight.normal_(0, 0.05)
            dist.barrier()
            took.append(_queued_us(model))
    few, more = took
    return {prefix + name: (b - a) / _MORE for name, a, b in zip(("first", "later"), few, more, strict=True)}


def _queued_us(model, rounds: int = 15, warmup: int = 3) -> tuple[float, float]:
    """The host's median time in a prompt's first chunk and in one after it; the GPU has done all of it before the
    next."""
    cache = model.make_cache(1, 2 * _TOKENS)
    ids = torch.randint(model.config.vocab_size, (1, _TOKENS), device=model.device)
    took = ([], [])
    for _ in range(warmup + rounds):
        cache.reset()
        for chunk in range(2):
            cache.lens.fill_(chunk * _TOKENS)
            cache.context = chunk * _TOKENS
            begin = time.perf_counter()
            model(ids, cache)
            took[chunk].append(1e6 * (time.perf_counter() - begin))
            if ids.is_cuda:
                torch.cuda.synchronize()
    first, later = (quantile(us[warmup:], 0.5) for us in took)
    return first, later
