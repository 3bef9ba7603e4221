"""Accelerate: one call runs both passes, of a batch in two parts."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastsam
from fastsam.integrations.accelerate import sam_step


def main(epochs=4):
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = fastsam.FusedSAM(
        model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * 4)
    loader = DataLoader(
        TensorDataset(torch.randn(64, 20), torch.randint(0, 3, (64,))), batch_size=16
    )
    model, optimizer, loader, scheduler = accelerator.prepare(
        model, optimizer, loader, scheduler
    )
    step = sam_step(
        accelerator, model, optimizer, nn.functional.cross_entropy, micro_batches=2
    )
    for _ in range(epochs):
        for x, y in loader:
            loss = step(x, y)
            scheduler.step()
    return loss.item()


if __name__ == "__main__":
    print(f"loss {main():.3f}")
