"""Tensor parallelism: split layers beside whole ones, which count once in SAM's norm.

Run it with `torchrun --nproc-per-node 2 examples/tensor_parallel.py`.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import fastsam


def main(steps=12):
    torch.manual_seed(0)  # the same weights and data on all ranks
    model = nn.Sequential(
        nn.LayerNorm(20), nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 3)
    )
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, {"1": ColwiseParallel(), "3": RowwiseParallel()})
    optimizer = fastsam.FusedSAM(
        model.parameters(),
        torch.optim.SGD,
        lr=0.1,
        momentum=0.9,
        rho=0.05,
        max_grad_norm=1.0,
    )
    step = fastsam.SAMStep(model, optimizer, nn.functional.cross_entropy)
    x, y = torch.randn(16, 20), torch.randint(0, 3, (16,))
    for _ in range(steps):
        loss = step(x, y)
    return loss.item()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    loss = main()
    if dist.get_rank() == 0:
        print(f"loss {loss:.3f}")
    dist.destroy_process_group()
