"""The same model, data and seed for all frameworks, and what a plain loop makes of them."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastsam

STEPS, BATCH = 4, 6
OPTIONS = dict(lr=0.2, momentum=0.8, weight_decay=0.02, rho=0.3)
LOSS = nn.functional.cross_entropy


def data(dtype=torch.float32):
    generator, count = torch.Generator().manual_seed(5), STEPS * BATCH
    return torch.randn(count, 5, generator=generator, dtype=dtype), torch.randint(0, 3, (count,), generator=generator)


def loader(batch=BATCH, dtype=torch.float32):
    return DataLoader(TensorDataset(*data(dtype)), batch_size=batch)


def network(norm=False, dropout=0.0):
    torch.manual_seed(3)
    layers = [nn.Linear(5, 8), *([nn.BatchNorm1d(8)] if norm else []), nn.Tanh()]
    return nn.Sequential(*layers, *([nn.Dropout(dropout)] if dropout else []), nn.Linear(8, 3))


def optimizer_of(model, **options):
    return fastsam.FusedSAM(model.parameters(), torch.optim.SGD, **{**OPTIONS, **options})


def state(model):
    """Weights and buffers, copied."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a, b, rtol=0.0, atol=0.0):
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def train(epochs=1, model=None, optimizer=None, clip=None, autocast=None, schedule=False, dtype=torch.float32):
    """The plain loop, with a closure."""
    model = (network() if model is None else model).to(dtype)
    optimizer = optimizer_of(model) if optimizer is None else optimizer
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5) if schedule else None
    for x, y in itertools.chain(*[loader(dtype=dtype)] * epochs):

        def closure(x=x, y=y):
            optimizer.zero_grad()
            with torch.autocast("cpu", autocast, cache_enabled=False) if autocast else nullcontext():
                loss = LOSS(model(x), y)
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            return loss

        optimizer.step(closure)
        if scheduler is not None:
            scheduler.step()
    return state(model)


def train_protected(**kwargs):
    """SAMStep: running statistics count once, dropout draws the same masks, from the seed 9."""
    model = network(norm=True, dropout=0.3)
    step = fastsam.SAMStep(model, optimizer_of(model), LOSS, **kwargs)
    torch.manual_seed(9)
    for x, y in loader(batch=BATCH * kwargs.get("micro_batches", 1)):
        step(x, y)
    return state(model)
