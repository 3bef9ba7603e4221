"""The recipe for large models: SAM in the last quarter of the training alone.

Micro-batches accumulate without communication, each rank perturbs by its own part and
runs them again, and what they add up to is clipped once. Run it with
`torchrun --nproc-per-node 2 examples/big_model.py`.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastsam


def main(steps=24):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(50, 16), nn.Flatten(), nn.Linear(8 * 16, 50)
    ).bfloat16()
    parallel = DistributedDataParallel(model)
    begins = steps * 3 // 4
    optimizer = fastsam.FusedSAM(
        parallel.parameters(),
        "adamw",
        lr=1e-2,
        weight_decay=0.1,
        rho=0.05,
        master_weights=True,
        max_grad_norm=1.0,
        when=fastsam.when.after(begins),
    )
    scheduler = fastsam.schedules.rewarmed_tail(optimizer, steps, begins, warmup=2)
    step = fastsam.SAMStep(
        parallel,
        optimizer,
        nn.functional.cross_entropy,
        micro_batches=4,
        perturb="local",
    )
    torch.manual_seed(1 + dist.get_rank())
    tokens, following = torch.randint(0, 50, (16, 8)), torch.randint(0, 50, (16,))
    for _ in range(steps):
        loss = step(tokens, following)
        scheduler.step()
    return loss.item()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    loss = main()
    if dist.get_rank() == 0:
        print(f"loss {loss:.3f}")
    dist.destroy_process_group()
