"""Learning-rate schedulers on the optimizer and on its `.base_optimizer`; every warning is an error."""

from __future__ import annotations

import cases
import pytest
import torch
from oracle import SamByHand, assert_same
from torch.nn import Parameter
from torch.optim import SGD, AdamW, RMSprop
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from fastsam import FusedSAM

NAMES = ["matrix", "63", "transposed"]
SCHEDULERS = {
    "StepLR": lambda o: StepLR(o, 2, 0.5),
    "ExponentialLR": lambda o: ExponentialLR(o, 0.8),
    "LambdaLR": lambda o: LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, 5),
    "WarmRestarts": lambda o: CosineAnnealingWarmRestarts(o, 2),
    "OneCycleLR": lambda o: OneCycleLR(o, 0.2, total_steps=8),  # cycles momentum and betas, too
    "CyclicLR": lambda o: CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "SequentialLR": lambda o: SequentialLR(o, [LinearLR(o, 0.1, total_iters=2), ExponentialLR(o, 0.9)], [2]),
    "ReduceLROnPlateau": lambda o: ReduceLROnPlateau(o, factor=0.5, patience=0),
}
OPTIONS = {SGD: dict(momentum=0.9, weight_decay=0.01), AdamW: dict(betas=(0.8, 0.95)), RMSprop: dict(momentum=0.5)}


def advance(scheduler) -> None:
    scheduler.step(*([1.0] if isinstance(scheduler, ReduceLROnPlateau) else []))


WAYS = ["closure", "first_step/second_step", "first_step/step"]
SCHEDULES = [(base, name, "closure") for base in OPTIONS for name in SCHEDULERS]
SCHEDULES += [(base, name, way) for base in (SGD, AdamW) for name in ("StepLR", "OneCycleLR") for way in WAYS[1:]]


@pytest.mark.parametrize("on", ["opt", "base"])
@pytest.mark.parametrize("base, name, way", SCHEDULES)
def test_schedules_are_followed(backend, device, base, name, on, way):
    ours, theirs = cases.make_params(names=NAMES, device=device), cases.make_params(names=NAMES)
    opt = FusedSAM(ours, base, rho=0.2, lr=0.1, backend=backend, **OPTIONS[base])
    hand = SamByHand([dict(params=theirs)], base, rho=0.2, lr=0.1, **OPTIONS[base])
    scheduler, other = SCHEDULERS[name](opt if on == "opt" else opt.base_optimizer), SCHEDULERS[name](hand.base)
    seen = set()
    for _ in range(6):
        closure = cases.closure_of(ours, 0, NAMES)
        if way == "closure":
            opt.step(closure)
        else:
            closure(), opt.first_step(), closure()
            opt.second_step() if way.endswith("second_step") else opt.step()
        hand.step(cases.closure_of(theirs, 0, NAMES))
        advance(scheduler), advance(other)
        assert opt.param_groups[0]["lr"] == hand.base.param_groups[0]["lr"]
        seen.add(opt.param_groups[0]["lr"])
    assert len(seen) > 1
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach())


@pytest.mark.parametrize("on", ["opt", "base"])
def test_a_scheduler_before_the_first_step_still_warns(backend, on):
    opt = FusedSAM([Parameter(torch.ones(3))], SGD, lr=0.1, backend=backend)
    scheduler = StepLR(opt if on == "opt" else opt.base_optimizer, 1)
    with pytest.warns(UserWarning, match="lr_scheduler.step"):
        scheduler.step()


@pytest.mark.parametrize("dims", [0, 1, 2])
@pytest.mark.parametrize("base", [SGD, AdamW])
def test_tensor_learning_rate_keeps_its_identity(backend, device, base, dims):
    p = Parameter(torch.ones(5, device=device))
    lr = torch.full((1,) * dims, 0.5)
    opt = FusedSAM([p], base, lr=lr, backend=backend)
    scheduler = ExponentialLR(opt, 0.5)

    def closure():
        p.grad = torch.ones_like(p)

    moved = []
    for _ in range(3):
        before = p.detach().clone()
        opt.step(closure)
        moved.append(float((p.detach() - before).abs().max()))
        scheduler.step()
    assert opt.param_groups[0]["lr"] is lr and lr.shape == (1,) * dims
    torch.testing.assert_close(
        torch.tensor(moved), torch.tensor([0.5, 0.25, 0.125]), rtol=0.06, atol=0
    )  # AdamW's decay


@pytest.mark.parametrize(
    "key, value", [("lr", 0.3), ("momentum", 0.0), ("weight_decay", 0.4), ("rho", 0.9), ("eta", 0.2)]
)
def test_values_written_into_a_group_count_from_the_next_step_on(backend, device, key, value):
    ours, others = cases.make_params(names=NAMES, device=device), cases.make_params(names=NAMES, device=device)
    options = dict(
        rho=0.2, adaptive=True, eta=0.01, lr=0.1, momentum=0.0 if key == "momentum" else 0.9, weight_decay=0.01
    )
    opt = FusedSAM(ours, SGD, backend=backend, **dict(options, momentum=0.9))
    other = FusedSAM(others, SGD, backend=backend, **{**options, key: value})
    opt.param_groups[0][key] = value
    for step in range(3):
        opt.step(cases.closure_of(ours, step, NAMES))
        other.step(cases.closure_of(others, step, NAMES))
    for p, q in zip(ours, others, strict=True):
        assert_same(p, q)


def test_momentum_and_amsgrad_may_be_switched_on_late(backend, device):
    # Dampening tells the first step with momentum from the first step.
    for base, key, value in ((SGD, "momentum", 0.9), (AdamW, "amsgrad", True)):
        options = dict(rho=0.2, lr=0.1, **(dict(dampening=0.3) if base is SGD else {}))
        ours, theirs = cases.make_params(names=NAMES, device=device), cases.make_params(names=NAMES)
        opt = FusedSAM(ours, base, backend=backend, **options)
        hand = SamByHand([dict(params=theirs)], base, **options)
        for step in range(4):
            if step == 2:
                opt.param_groups[0][key] = value
                hand.base.param_groups[0][key] = value
                if base is AdamW:  # torch itself wants the entry there
                    for p in theirs:
                        hand.base.state[p]["max_exp_avg_sq"] = torch.zeros_like(p)
            opt.step(cases.closure_of(ours, 0, NAMES))
            hand.step(cases.closure_of(theirs, 0, NAMES))
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p.detach().cpu(), q.detach())
