"""SAM by hand: a closure, as other torch optimizers take it, runs twice a step."""

from contextlib import nullcontext

import torch
from torch import nn

from fastsam import FusedSAM, freeze_running_stats


def main(steps=12):
    torch.manual_seed(0)
    x, y = torch.randn(16, 20), torch.randint(0, 3, (16,))
    model = nn.Sequential(
        nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3)
    )
    optimizer = FusedSAM(
        model.parameters(), torch.optim.AdamW, lr=1e-2, weight_decay=0.1, rho=0.05
    )

    def closure():
        optimizer.zero_grad()
        with freeze_running_stats(model) if optimizer.perturbed else nullcontext():
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for _ in range(steps):
        loss = optimizer.step(closure)  # at w
    return loss.item()


if __name__ == "__main__":
    print(f"loss {main():.3f}")
