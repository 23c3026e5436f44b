"""What a process takes of its GPU beside tensors, by steps: CUDA, fp.init, the first all-reduce, a model, generation.

    python benchmarks/memory_steps.py

Prints, on rank 0, in GB: all that is taken of the GPU, what torch has allocated and reserved, and what is taken beyond
that: the planner's reserve (RESERVED_GB of planner/search.py) is the last after generation, and the allocator's gaps.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from _common import main
from bench_planner import config_of, fill

import fused_parallel as fp


def run(arguments: argparse.Namespace) -> int:
    def say(what: str) -> None:
        torch.cuda.synchronize()
        if dist.is_initialized() and dist.get_rank():
            return
        free, whole = torch.cuda.mem_get_info()
        taken, allocated, reserved = whole - free, torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        numbers = (taken, allocated, reserved, taken - reserved)
        print(f"{what:20}" + "".join(f"{n / 1e9:9.2f}" for n in numbers), flush=True)

    if os.environ["RANK"] == "0":
        print(f"{'GB':20}" + "".join(f"{name:>9}" for name in ("taken", "tensors", "reserved", "beside")))
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.zeros(1, device="cuda")
    say("CUDA")
    mesh = fp.init(tp=int(os.environ["WORLD_SIZE"]))
    say("fp.init")
    dist.all_reduce(torch.ones(8, device="cuda"), group=mesh.get_group("tp"))
    say("all-reduce (NCCL)")
    with torch.no_grad():
        model = fp.LlamaForCausalLM(config_of(arguments.model), mesh=mesh, device="cuda", dtype=torch.bfloat16)
        fill(model, 0)
        say("model")
        prompts = torch.randint(1000, (32, 1024), generator=torch.Generator().manual_seed(0)).tolist()
        fp.generate(model, prompts, 32, prefill_chunk=256)
        say("generate")
        fp.generate(model, prompts, 32, prefill_chunk=256, cuda_graph=True)
        say("generate, captured")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.set_defaults(device="cuda")
    p.add_argument("--model", default="llama-3-8b")
    main(run, p)
