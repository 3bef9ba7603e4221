"""Muon for matrices beside AdamW for the rest, with one perturbation over both."""

import torch
from torch import nn

import fastsam


def main(steps=30):
    torch.manual_seed(0)
    x, y = torch.randn(16, 20), torch.randint(0, 3, (16,))
    model = nn.Sequential(
        nn.Linear(20, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 3)
    )
    matrices = [param for param in model.parameters() if param.dim() == 2]
    others = [param for param in model.parameters() if param.dim() != 2]
    optimizer = fastsam.joint(
        fastsam.FusedSAM(matrices, torch.optim.Muon, lr=0.02, rho=0.05),
        fastsam.FusedSAM(others, torch.optim.AdamW, lr=1e-2, rho=0.05),
        max_grad_norm=1.0,  # of all second gradients together
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    step = fastsam.SAMStep(model, optimizer, nn.functional.cross_entropy)
    for _ in range(steps):
        loss = step(x, y)
        scheduler.step()  # of both learning rates
    return loss.item()


if __name__ == "__main__":
    print(f"loss {main():.3f}")
