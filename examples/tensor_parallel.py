"""Tensor parallelism in a page: torchrun --nproc-per-node 2 examples/tensor_parallel.py"""

import torch

import fused_parallel as fp

gpus = torch.cuda.device_count() >= 2
mesh = fp.init(tp=2, device="cuda" if gpus else "cpu")  # NCCL or Gloo; ranks and addresses come from torchrun
device, rank = mesh.device_type, mesh["tp"].get_local_rank()

mlp = fp.nn.ParallelMLP(hidden_size=1024, intermediate_size=4096, group=mesh["tp"], device=device)
torch.manual_seed(0)  # the same whole weights on every rank; each loads its shard
sizes = {"gate": (4096, 1024), "up": (4096, 1024), "down": (1024, 4096)}
mlp.load_state_dict({f"{name}_proj.weight": torch.randn(size) / 32 for name, size in sizes.items()})
x = torch.randn(8, 1024).to(device)
print(f"rank {rank} holds {sum(p.numel() for p in mlp.parameters())} weights, result {mlp(x).norm().item():.4f}")
fp.finalize()
