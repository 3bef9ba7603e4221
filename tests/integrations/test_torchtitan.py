"""The shape of torchtitan's loop: parts of a model, an optimizer each, one norm, checkpoints of distributed torch."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from plain import same, state
from torch.distributed.checkpoint.state_dict import StateDictOptions as Options
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import fastsam

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "torchtitan_loop.py"))


def batches(steps):
    generator = torch.Generator().manual_seed(6)

    def draw(high):
        return torch.randint(high, (4, 8), generator=generator)

    return [[(draw(20), draw(3)) for _ in range(2)] for _ in range(steps)]


def train(parts, optimizers, schedulers, given):
    for micro_batches in given:
        EXAMPLE["train_step"](parts, optimizers, schedulers, micro_batches, max_norm=0.3)
    return state(torch.nn.ModuleList(parts))


def test_the_parts_are_one_model():
    parts, optimizers, schedulers = EXAMPLE["build"]()
    found = train(parts, optimizers, schedulers, batches(4))
    parts, *_ = EXAMPLE["build"]()
    whole = torch.nn.Sequential(*parts)
    one = fastsam.FusedSAM(whole.parameters(), "adamw", lr=1e-2, weight_decay=0.1, rho=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(one, 20)

    class Container:
        zero_grad, step = one.zero_grad, one.step
        first_step = staticmethod(lambda: one.first_step(zero_grad=True))

    same(train([whole[0], whole[1]], Container, [scheduler], batches(4)), found, rtol=1e-5, atol=1e-6)


def save(parts, optimizers):
    options = Options(flatten_optimizer_state_dict=True)
    pairs = zip(parts, optimizers.optimizers, strict=True)
    return [get_optimizer_state_dict(part, one, options=options) for part, one in pairs]


@pytest.mark.parametrize("way", ["distributed", "container"])
def test_training_resumes_half_way(way):
    given = batches(4)
    whole = train(*EXAMPLE["build"](), given)
    parts, optimizers, schedulers = EXAMPLE["build"]()
    train(parts, optimizers, schedulers, given[:2])
    weights = [state(part) for part in parts]
    saved = save(parts, optimizers) if way == "distributed" else optimizers.state_dict()
    rates = [scheduler.state_dict() for scheduler in schedulers]
    parts, optimizers, schedulers = EXAMPLE["build"]()
    for part, own in zip(parts, weights, strict=True):
        part.load_state_dict(own)
    if way == "distributed":
        options = Options(flatten_optimizer_state_dict=True)
        for part, one, own in zip(parts, optimizers.optimizers, saved, strict=True):
            set_optimizer_state_dict(part, one, own, options=options)
    else:
        optimizers.load_state_dict(saved)
    for scheduler, own in zip(schedulers, rates, strict=True):
        scheduler.load_state_dict(own)
    same(train(parts, optimizers, schedulers, given[2:]), whole)
