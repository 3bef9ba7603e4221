"""A batch in four parts: one perturbation for all, or one for each (m-SAM)."""

import torch
from torch import nn

import fastsam


def main(steps=12, sharpness="micro"):
    torch.manual_seed(0)
    x, y = torch.randn(32, 20), torch.randint(0, 3, (32,))
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = fastsam.FusedSAM(
        model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05
    )
    step = fastsam.SAMStep(
        model,
        optimizer,
        nn.functional.cross_entropy,
        micro_batches=4,
        sharpness=sharpness,
    )
    for _ in range(steps):
        loss = step(x, y)
    return loss.item()


if __name__ == "__main__":
    print(f"loss {main():.3f} with 'micro', {main(sharpness='batch'):.3f} with 'batch'")
