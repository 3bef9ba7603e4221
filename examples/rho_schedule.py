"""rho rises with the warm-up of the learning rate, and falls to a third."""

import torch
from torch import nn

import fastsam


def main(steps=40):
    torch.manual_seed(0)
    x, y = torch.randn(16, 20), torch.randint(0, 3, (16,))
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = fastsam.create(
        "sam", "adamw", model, lr=1e-2, weight_decay=0.1, rho=0.09
    )
    rho = fastsam.schedules.CosineRho(optimizer, steps, end=0.03, warmup_steps=4)
    lr = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    step = fastsam.SAMStep(model, optimizer, nn.functional.cross_entropy)
    for _ in range(steps - 1):
        loss = step(x, y)
        rho.step()  # in either order
        lr.step()
    return loss.item()


if __name__ == "__main__":
    print(f"loss {main():.3f}")
