"""Evaluate with an average of the weights, which the optimizer keeps and saves."""

import copy

import torch
from torch import nn

import fastsam


def main(steps=40):
    torch.manual_seed(0)
    x, y = torch.randn(16, 20), torch.randint(0, 3, (16,))
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = fastsam.FusedSAM(
        model.parameters(), "adamw", lr=1e-2, rho=0.05, ema_decay=0.9
    )
    step = fastsam.SAMStep(model, optimizer, nn.functional.cross_entropy)
    for _ in range(steps):
        step(x, y)
    with optimizer.averaged_weights(), torch.no_grad():
        loss = nn.functional.cross_entropy(model(x), y)
        ema_model = copy.deepcopy(model)  # or torch.save(model.state_dict(), "ema.pt")
    assert not torch.equal(
        ema_model[0].weight, model[0].weight
    )  # the model has its own weights again
    return loss.item()


if __name__ == "__main__":
    print(f"loss {main():.3f}")
