"""DistributedDataParallel with m-sharpness: each rank perturbs by its own part.

Only the second pass communicates. Run it with
`torchrun --nproc-per-node 2 examples/data_parallel.py`.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastsam


def main(steps=12):
    torch.manual_seed(0)  # the same weights on all ranks
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 3))
    parallel = DistributedDataParallel(model)
    optimizer = fastsam.FusedSAM(
        parallel.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05
    )
    step = fastsam.SAMStep(
        parallel, optimizer, nn.functional.cross_entropy, perturb="local"
    )
    torch.manual_seed(1 + dist.get_rank())  # other data
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
