"""Schedules of rho: their values by hand, what they leave alone, and how they are saved; every warning is an error."""

from __future__ import annotations

import copy
import io
import math

import cases
import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    SequentialLR,
    StepLR,
)

import fastsam
from fastsam import FusedSAM, methods, radius, when
from fastsam.schedules import (
    ConstantRho,
    CosineRho,
    LambdaRho,
    LinearRho,
    RhoFollowsLR,
    RhoScheduler,
    SequentialRho,
)

NAMES = ["matrix", "63", "transposed"]


def optimizer_of(rho=(0.3, 0.1), params=None, **options) -> FusedSAM:
    params = params or cases.make_params(names=NAMES)
    groups = [dict(params=params[i::2], rho=r) for i, r in enumerate(rho)]
    return FusedSAM(groups, SGD, lr=0.1, momentum=0.9, **options)


def radii(opt) -> list[float]:
    return [float(group["rho"]) for group in opt.param_groups]


def followed(scheduler: RhoScheduler, steps: int) -> list[list[float]]:
    """The radii of the groups in each step."""
    seen = []
    for _ in range(steps):
        seen.append(radii(scheduler.optimizer))
        assert scheduler.get_last_rho() == seen[-1]
        scheduler.step()
    return seen


BY_HAND = {
    "constant": (ConstantRho, dict(), lambda t, rho: rho),
    "constant, warmed up": (ConstantRho, dict(warmup_steps=4), lambda t, rho: rho * min(t / 4, 1)),
    "constant, then another": (
        ConstantRho,
        dict(total_steps=6, start=0.5, end=0.2, warmup_steps=2),
        lambda t, _: 0.25 * t if t < 2 else 0.5 if t < 6 else 0.2,
    ),
    "linear": (LinearRho, dict(total_steps=8), lambda t, rho: rho * max(1 - t / 8, 0)),
    "linear, rising": (LinearRho, dict(total_steps=8, start=0.1, end=0.5), lambda t, _: 0.1 + 0.4 * min(t / 8, 1)),
    "linear, warmed up, by group": (
        LinearRho,
        dict(total_steps=8, start=[0.4, 0.8], end=[0.2, 0.4], warmup_steps=2),
        lambda t, rho: (1 if rho == 0.3 else 2) * (0.2 * t if t < 2 else 0.4 - 0.2 * min((t - 2) / 6, 1)),
    ),
    "cosine": (
        CosineRho,
        dict(total_steps=9, end=0.05, warmup_steps=1),
        lambda t, rho: 0 if t < 1 else 0.05 + (rho - 0.05) * (1 + math.cos(math.pi * min((t - 1) / 8, 1))) / 2,
    ),
    "lambda": (LambdaRho, dict(rho_lambda=lambda t: 1 / (1 + t)), lambda t, rho: rho / (1 + t)),
    "lambdas": (
        LambdaRho,
        dict(rho_lambda=[lambda t: 2.0 * t, lambda t: 0.5]),
        lambda t, rho: 0.6 * t if rho == 0.3 else 0.05,
    ),
}


@pytest.mark.parametrize("cls, options, expected", BY_HAND.values(), ids=list(BY_HAND))
def test_values_by_hand(cls, options, expected):
    opt = optimizer_of()
    before = [(g["lr"], g["momentum"]) for g in opt.param_groups]
    found = followed(cls(opt, **options), 11)
    for t, values in enumerate(found):
        assert values == pytest.approx([expected(t, 0.3), expected(t, 0.1)], abs=1e-15), t
    assert [(g["lr"], g["momentum"]) for g in opt.param_groups] == before


def test_one_after_the_other():
    opt = optimizer_of()
    parts = [ConstantRho(opt, warmup_steps=2), LinearRho(opt, 4, end=0.1), LambdaRho(opt, lambda t: 7.0)]
    found = [values[0] for values in followed(SequentialRho(opt, parts, [3, 7]), 9)]
    assert found == pytest.approx([0, 0.15, 0.3, 0.3, 0.25, 0.2, 0.15, 2.1, 2.1])


LATER = {  # by name, a scheduler and a learning-rate scheduler beside it
    "LinearRho": lambda o: LinearRho(o, 9, end=0.02, warmup_steps=2),
    "CosineRho": lambda o: CosineRho(o, 9, start=[0.2, 0.4], warmup_steps=2),
    "ConstantRho": lambda o: ConstantRho(o, 5, warmup_steps=2, end=0.05),
    "LambdaRho": lambda o: LambdaRho(o, lambda t: 1 / (1 + t)),
    "RhoFollowsLR": lambda o: RhoFollowsLR(o, 0.4, 0.1),
    "SequentialRho": lambda o: SequentialRho(o, [LinearRho(o, 4), CosineRho(o, 4)], [3]),
}


def train(opt, params, schedulers, first, last) -> None:
    for step in range(first, last):
        opt.step(cases.closure_of(params, step % 3, NAMES))
        for scheduler in schedulers:
            scheduler.step()


@pytest.mark.parametrize("rho_first", [True, False], ids=["rho first", "lr first"])
@pytest.mark.parametrize("name", LATER)
def test_resumed_half_way_bit_for_bit(name, rho_first):
    def build(params):
        opt = optimizer_of(params=params)
        made = [LATER[name], lambda o: CosineAnnealingLR(o, 7)]
        schedulers = [make(opt) for make in (made if rho_first else made[::-1])]
        return opt, (schedulers if rho_first else schedulers[::-1])

    params = cases.make_params(names=NAMES)
    opt, schedulers = build(params)
    train(opt, params, schedulers[::-1], 0, 4)
    file = io.BytesIO()
    torch.save([opt.state_dict(), *(s.state_dict() for s in schedulers)], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    others = [nn.Parameter(param.detach().clone()) for param in params]
    again, resumed = build(others)
    if rho_first:  # in any order
        again.load_state_dict(saved[0])
    for scheduler, held in zip(resumed, saved[1:], strict=True):
        scheduler.load_state_dict(held)
    if not rho_first:
        again.load_state_dict(saved[0])
    for pair in ((opt, params, schedulers), (again, others, resumed)):
        train(pair[0], pair[1], pair[2][::-1], 4, 9)
    assert again.param_groups[0]["rho"] == opt.param_groups[0]["rho"]
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    assert [s.last_epoch for s in resumed] == [9, 9]


def test_built_anew_after_a_checkpoint_that_saved_no_scheduler():
    opt = optimizer_of()
    scheduler = LinearRho(opt, 10)
    for _ in range(6):
        scheduler.step()
    other = optimizer_of()
    with pytest.raises(ValueError, match="LinearRho: last_epoch=5 needs 'initial_rho'"):
        LinearRho(other, 10, last_epoch=5)
    other.load_state_dict(opt.state_dict())
    assert LinearRho(other, 10, last_epoch=5).get_last_rho() == scheduler.get_last_rho() == radii(other)


def test_objects_as_functions_are_saved():
    class Halving:
        every = 1

        def __call__(self, step):
            return 0.5 ** (step // self.every)

    def build():
        return LambdaRho(optimizer_of(), [Halving(), lambda t: 1.0])

    scheduler, again = build(), build()
    scheduler.rho_lambdas[0].every = 2
    for _ in range(4):
        scheduler.step()
    again.load_state_dict(scheduler.state_dict())
    assert radii(again.optimizer) == [0.3 / 4, 0.1]


def test_it_is_a_scheduler_of_torch_and_leaves_the_learning_rate_to_others():
    opt = optimizer_of()
    rho, lr = LinearRho(opt, 10), LinearLR(opt, 0.5, total_iters=4)
    assert isinstance(rho, LRScheduler) and "initial_lr" in opt.param_groups[0]
    both = ChainedScheduler([lr, rho])
    for _ in range(2):
        opt.step(cases.closure_of(opt.param_groups[0]["params"], 0, NAMES[::2]))
        both.step()
    assert opt.param_groups[0]["lr"] == pytest.approx(0.075) and radii(opt) == pytest.approx([0.24, 0.08])
    assert both.get_last_lr() == rho.get_last_lr() == lr.get_last_lr()
    again = optimizer_of()
    other = ChainedScheduler([LinearLR(again, 0.5, total_iters=4), LinearRho(again, 10)])
    other.load_state_dict(both.state_dict())
    assert radii(again) == radii(opt)
    with pytest.raises(KeyError, match="initial_lr"):  # it resets the learning rate, which nobody schedules here
        alone = optimizer_of()
        SequentialLR(alone, [LinearRho(alone, 3), LinearRho(alone, 4)], [3])


def test_schedulers_before_the_first_step_warn_of_the_learning_rate_alone():
    opt = optimizer_of()
    LinearRho(opt, 10).step()
    scheduler = StepLR(opt, 1)
    with pytest.warns(UserWarning, match="lr_scheduler.step"):
        scheduler.step()


def test_a_tensor_is_written_in_place():
    rho = torch.tensor(0.3)
    opt = optimizer_of(rho=(rho, 0.1))
    found = followed(LinearRho(opt, 4), 4)
    assert opt.param_groups[0]["rho"] is rho and float(rho) == 0
    assert [values[0] for values in found] == pytest.approx([0.3, 0.225, 0.15, 0.075])
    assert LinearRho(opt, 2).get_last_rho() == pytest.approx([0.3, 0.1])


@pytest.mark.parametrize("on", ["opt", "base"])
@pytest.mark.parametrize("option", ["when", "radius", "plain"])
def test_the_perturbation_is_as_long_as_it_says(backend, device, option, on):
    options = {"when": dict(when=when.every(2)), "radius": dict(radius=radius.mixed(0.4)), "plain": {}}[option]
    params = cases.make_params(names=NAMES, device=device)
    opt = FusedSAM(params, SGD, lr=0.1, rho=0.5, backend=backend, **options)
    scheduler = CosineRho(opt if on == "opt" else opt.base_optimizer, 6, end=0.1)
    for step in range(6):
        cases.closure_of(params, step, NAMES)()
        n = math.sqrt(sum(float(p.grad.double().square().sum()) for p in params if p.grad is not None))
        old = [p.detach().clone() for p in params]
        if opt.first_step():
            length = math.sqrt(
                sum(float((p.detach() - o).double().square().sum()) for p, o in zip(params, old, strict=True))
            )
            rho = 0.1 + 0.4 * (1 + math.cos(math.pi * step / 6)) / 2
            assert length == pytest.approx(rho * (0.6 * n + 0.4) if option == "radius" else rho, rel=1e-4)
        else:
            assert option == "when" and step % 2 == 1
        opt.step()
        scheduler.step()


def test_a_joint_and_a_part_of_one():
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        parts = [FusedSAM(m.parameters(), SGD, lr=lr, rho=0.4) for m, lr in zip(model, (0.1, 0.002), strict=True)]
        return fastsam.joint(*parts)

    opt = build()
    LambdaLR(opt, lambda t: 0.5)
    assert RhoFollowsLR(opt, 0.4, 0.2).get_last_rho() == pytest.approx([0.3, 0.3])
    opt = build()
    scheduler = LinearRho(opt, 4)
    scheduler.step()
    assert radii(opt) == pytest.approx([0.3, 0.3])
    LinearRho(opt.optimizers[0], 4, start=1.0)
    assert radii(opt) == pytest.approx([1.0, 0.3])
    copied = copy.deepcopy(opt)
    assert LinearRho(copied, 4, last_epoch=0).get_last_rho() == pytest.approx([0.3, 0.3])


def test_the_largest_learning_rate_is_known_from_the_scheduler_that_is_there():
    opt = optimizer_of()
    OneCycleLR(opt, [0.2, 0.4], total_steps=10)
    scheduler = RhoFollowsLR(opt, 1.0)
    assert scheduler.lr_max == [0.2, 0.4] and radii(opt) == pytest.approx([1 / 25, 1 / 25])
    assert RhoFollowsLR(opt, 1.0, lr_max=0.1).get_last_rho() == pytest.approx([0.08, 0.16])


def test_groups_that_are_added_later():
    opt = optimizer_of()
    scheduler = LinearRho(opt, 4)
    scheduler.step()
    opt.add_param_group(dict(params=[nn.Parameter(torch.ones(2))], rho=0.8))
    opt.base_optimizer.add_param_group(dict(params=[nn.Parameter(torch.ones(2))]))
    scheduler.step()
    assert radii(opt) == pytest.approx([0.15, 0.05, 0.4, 0.025])


def test_a_group_that_is_added_to_the_base_is_scheduled_from_the_step_after_its_first_on():
    opt = optimizer_of()
    scheduler = LinearRho(opt.base_optimizer, 4)
    opt.base_optimizer.add_param_group(dict(params=[nn.Parameter(torch.ones(2))]))
    scheduler.step()
    assert scheduler.get_last_rho() == pytest.approx([0.225, 0.075])
    opt.prepare()
    assert radii(opt) == pytest.approx([0.225, 0.075, 0.05])
    scheduler.step()
    assert radii(opt) == pytest.approx([0.15, 0.05, 0.025])


def test_other_methods():
    opt = methods.MSAM(cases.make_params(names=NAMES), SGD, rho=3.0, lr=0.1, momentum=0.9)
    assert ConstantRho(opt, warmup_steps=3).get_last_rho() == [0.0]


def scheduled_alone(o):
    return SequentialRho(o, [StepLR(o, 1)], [])


REFUSED = [
    (lambda o: LinearRho(SGD(o.param_groups[0]["params"], lr=0.1), 5), "LinearRho: the optimizer must have rho .* SGD"),
    (lambda o: CosineRho(o, 5, warmup_steps=5), "CosineRho: 0 <= warmup_steps < total_steps .* got warmup_steps=5"),
    (lambda o: ConstantRho(o, warmup_steps=-1), "0 <= warmup_steps"),
    (lambda o: LinearRho(o, 5, start=-0.1), "LinearRho: start must be >= 0, got -0.1"),
    (lambda o: LinearRho(o, 5, end=[0.1, math.nan]), r"end must be >= 0, got \[0.1, nan\]"),
    (lambda o: LinearRho(o, 5, end=[0.1]), "end must be one for all parameter groups, or one for each of the 2, got 1"),
    (lambda o: LambdaRho(o, lambda t: -1.0), r"LambdaRho: rho must be >= 0, got -0.3 for param_groups\[0\] in step 0"),
    (scheduled_alone, "SequentialRho: all schedulers must be schedulers of rho of the same optimizer, got StepLR"),
    (lambda o: SequentialRho(o, [ConstantRho(o)], [3]), "one milestone between two schedulers.* got 1 schedulers"),
    (lambda o: RhoFollowsLR(o, 0.1, 0.2), "RhoFollowsLR: 0 <= rho_min <= rho_max and lr_min < lr_max must hold"),
]


@pytest.mark.parametrize("make, message", REFUSED, ids=[message[:30] for _, message in REFUSED])
def test_what_is_refused(make, message):
    opt = optimizer_of()
    with pytest.raises(ValueError, match=message):
        make(opt)
    assert radii(opt) == [0.3, 0.1]
