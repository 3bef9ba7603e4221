"""autocast and a GradScaler, which is updated once a step."""

import torch
from torch import nn

import fastsam


def main(steps=12):
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y = torch.randn(16, 20, device=device), torch.randint(0, 3, (16,), device=device)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 3)).to(device)
    optimizer = fastsam.FusedSAM(
        model.parameters(), torch.optim.SGD, lr=0.1, rho=0.05, max_grad_norm=1.0
    )
    scaler = torch.amp.GradScaler(device)
    step = fastsam.SAMStep(
        model,
        optimizer,
        nn.functional.cross_entropy,
        scaler=scaler,
        autocast=torch.float16,
    )
    for _ in range(steps):
        loss = step(x, y)
    return loss.item()


if __name__ == "__main__":
    print(f"loss {main():.3f}")
