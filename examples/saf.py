"""SAF: a loss that stays near the outputs of epochs ago, without a second pass."""

import torch
from torch import nn
from torch.utils.data import DataLoader, StackDataset, TensorDataset

import fastsam


def main(epochs=10):
    torch.manual_seed(0)
    dataset = TensorDataset(torch.randn(64, 20), torch.randint(0, 3, (64,)))
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    saf = fastsam.losses.SAF(len(dataset), 3, lag=2, start=3)
    loader = DataLoader(
        StackDataset(dataset, range(len(dataset))), batch_size=16, shuffle=True
    )
    for epoch in range(epochs):
        saf.set_epoch(epoch)
        for (x, y), indices in loader:
            optimizer.zero_grad()
            loss = saf(model(x), y, indices)
            loss.backward()
            optimizer.step()
    return loss.item()


if __name__ == "__main__":
    print(f"loss {main():.3f}")
