"""SAM in a loop: SAMStep runs both passes, and keeps BatchNorm and dropout right."""

import torch
from torch import nn

import fastsam


def main(epochs=3):
    torch.manual_seed(0)
    inputs, targets = torch.randn(64, 20), torch.randint(0, 3, (64,))
    model = nn.Sequential(
        nn.Linear(20, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(32, 3),
    )
    optimizer = fastsam.FusedSAM(
        model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    step = fastsam.SAMStep(model, optimizer, nn.functional.cross_entropy)
    for _ in range(epochs):
        for x, y in zip(inputs.split(16), targets.split(16), strict=True):
            loss = step(x, y)
        scheduler.step()
    return loss.item()


if __name__ == "__main__":
    print(f"loss {main():.3f}")
