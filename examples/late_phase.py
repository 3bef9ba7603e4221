"""SAM in the last quarter of the training, with a learning rate that rises again."""

import torch
from torch import nn

import fastsam


def main(steps=40):
    torch.manual_seed(0)
    x, y = torch.randn(16, 20), torch.randint(0, 3, (16,))
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 3))
    begins = steps * 3 // 4
    optimizer = fastsam.FusedSAM(
        model.parameters(), "adamw", lr=1e-2, rho=0.05, when=fastsam.when.after(begins)
    )
    scheduler = fastsam.schedules.rewarmed_tail(optimizer, steps, begins, warmup=4)
    step = fastsam.SAMStep(model, optimizer, nn.functional.cross_entropy)
    for _ in range(steps):
        loss = step(x, y)  # one pass, from `begins` on two
        scheduler.step()
    return loss.item()


if __name__ == "__main__":
    print(f"loss {main():.3f}")
