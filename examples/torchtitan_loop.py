"""A loop as torchtitan's: an optimizer for each part, one perturbation over all."""

import torch
from torch import nn

import fastsam


class OptimizersContainer:
    """One optimizer a model part; `fastsam.joint` gives them one norm."""

    def __init__(self, model_parts, **options):
        self.optimizers = [
            fastsam.FusedSAM(part.parameters(), "adamw", **options)
            for part in model_parts
        ]
        self.sam = (
            fastsam.joint(*self.optimizers)
            if len(self.optimizers) > 1
            else self.optimizers[0]
        )

    def first_step(self):
        return self.sam.first_step(zero_grad=True)

    def step(self):
        self.sam.step()

    def zero_grad(self):
        self.sam.zero_grad()

    def state_dict(self):
        return self.sam.state_dict()

    def load_state_dict(self, state_dict):
        self.sam.load_state_dict(state_dict)


def forward_backward(model_parts, micro_batches):
    tokens = sum(labels.numel() for _, labels in micro_batches)
    total = 0.0
    for hidden, labels in micro_batches:
        for part in model_parts:
            hidden = part(hidden)
        loss = (
            nn.functional.cross_entropy(
                hidden.flatten(0, 1), labels.flatten(), reduction="sum"
            )
            / tokens
        )
        loss.backward()
        total += loss.item()
    return total


def train_step(model_parts, optimizers, schedulers, micro_batches, max_norm=1.0):
    optimizers.zero_grad()
    loss = forward_backward(model_parts, micro_batches)
    if optimizers.first_step():
        forward_backward(model_parts, micro_batches)
    nn.utils.clip_grad_norm_(
        [param for part in model_parts for param in part.parameters()], max_norm
    )
    optimizers.step()
    for scheduler in schedulers:
        scheduler.step()
    return loss


def build():
    torch.manual_seed(0)
    first = nn.Sequential(nn.Embedding(20, 16), nn.Linear(16, 32))
    model_parts = [first, nn.Sequential(nn.ReLU(), nn.Linear(32, 3))]
    optimizers = OptimizersContainer(model_parts, lr=1e-2, weight_decay=0.1, rho=0.05)
    schedulers = [
        torch.optim.lr_scheduler.CosineAnnealingLR(one, 20)
        for one in optimizers.optimizers
    ]
    return model_parts, optimizers, schedulers


def main(steps=10):
    model_parts, optimizers, schedulers = build()
    micro_batches = [
        (torch.randint(20, (4, 8)), torch.randint(3, (4, 8))) for _ in range(2)
    ]
    for _ in range(steps):
        loss = train_step(model_parts, optimizers, schedulers, micro_batches)
    return loss


if __name__ == "__main__":
    print(f"loss {main():.3f}")
