"""What the code blocks of README and documentation may use without defining it; a pytest plugin."""

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, StackDataset, TensorDataset

import fastsam
from fastsam import FusedSAM, methods, radius, when


def pytest_markdown_docs_globals() -> dict[str, Any]:
    """Names for one block: a small model with its data and an optimizer, all new."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    dataset = TensorDataset(torch.randn(32, 6), torch.randint(0, 3, (32,)))
    x, y = dataset[:8]
    return {
        **dict(FusedSAM=FusedSAM, fastsam=fastsam, methods=methods, nn=nn, radius=radius, torch=torch, when=when),
        **dict(DataLoader=DataLoader, StackDataset=StackDataset),
        **dict(model=model, loss_fn=nn.functional.cross_entropy, x=x, y=y, n_classes=3, epochs=2),
        **dict(dataset=dataset, loader=DataLoader(dataset, 8)),
        "optimizer": FusedSAM(model.parameters(), torch.optim.SGD, lr=0.1),
        "scaler": torch.amp.GradScaler("cpu"),
        "matrices": [param for param in model.parameters() if param.dim() == 2],
        "others": [param for param in model.parameters() if param.dim() != 2],
    }
