"""Each step as one CUDA graph, with a learning rate that changes; needs a GPU."""

import torch
from torch import nn

import fastsam


def main(steps=12):
    torch.manual_seed(0)
    x, y = torch.randn(16, 20, device="cuda"), torch.randint(0, 3, (16,), device="cuda")
    model = nn.Sequential(
        nn.Linear(20, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 3)
    ).cuda()
    optimizer = fastsam.FusedSAM(
        model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    step = fastsam.SAMStep(model, optimizer, nn.functional.cross_entropy, capture=True)
    for _ in range(steps):
        loss = step(x, y)
        scheduler.step()
    return loss.item()


if __name__ == "__main__":
    print(f"loss {main():.3f}")
