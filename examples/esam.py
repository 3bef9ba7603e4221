"""ESAM: half of the weights are perturbed, and half of the samples run again.

They are those whose loss the perturbation raises most.
"""

import torch
from torch import nn

import fastsam


def main(steps=12):
    torch.manual_seed(0)
    x, y = torch.randn(32, 20), torch.randint(0, 3, (32,))
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = fastsam.methods.ESAM(
        model.parameters(), torch.optim.SGD, beta=0.5, lr=0.1, momentum=0.9, rho=0.05
    )
    step = fastsam.SAMStep(
        model, optimizer, nn.CrossEntropyLoss(reduction="none"), select=0.5
    )
    for _ in range(steps):
        loss = step(x, y)
    return loss.item()


if __name__ == "__main__":
    print(f"loss {main():.3f}")
