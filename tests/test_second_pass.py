"""`attach_second_pass`: loops of others, which call `step()` alone, take whole SAM steps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastsam

X, Y = torch.randn(12, 5, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 3
OPTIONS = dict(lr=0.2, momentum=0.8, weight_decay=0.02, rho=0.3)


def make(joint=False, **options):
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    parts = [model[0], model[2]] if joint else [model]
    made = [fastsam.FusedSAM(part.parameters(), torch.optim.SGD, **{**OPTIONS, **options}) for part in parts]
    return model, fastsam.joint(*made) if joint else made[0]


def backward(model, scaler=None):
    loss = nn.functional.cross_entropy(model(X), Y)
    (loss if scaler is None else scaler.scale(loss)).backward()
    return loss


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


JOINT = pytest.mark.parametrize("joint", [False, True], ids=["one", "joint"])


def by_hand(steps=5, **options):
    model, optimizer = make(**options)
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model)
        if optimizer.first_step(zero_grad=True):
            backward(model)
        optimizer.step()
    return weights(model)


@pytest.mark.parametrize("options", [{}, {"when": fastsam.when.every(2)}, {"max_grad_norm": 0.1}, {"joint": True}])
def test_step_takes_both_passes(options):
    model, optimizer = make(**options)
    calls = []

    def second():
        calls.append(optimizer.perturbed)
        backward(model)

    optimizer.attach_second_pass(second)
    for _ in range(4):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
    assert torch.equal(weights(model), by_hand(4, **options))
    assert calls == [True] * (2 if "when" in options else 4)


@JOINT
def test_a_warm_up_from_zero_fills_the_momentum_with_second_gradients(joint):
    results = []
    for attached in (False, True):
        model, optimizer = make(joint)
        if attached:
            optimizer.attach_second_pass(lambda model=model: backward(model))
        for lr in (0.0, 0.0, 0.3):
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
            backward(model)
            if not attached:
                optimizer.first_step(zero_grad=True)
                backward(model)
            optimizer.step()
        results.append(weights(model))
    assert torch.equal(*results)


@JOINT
def test_distributed_checkpoints_create_state_without_the_second_pass(joint):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model, optimizer = make(joint, weight_decay=0.0)
    optimizer.attach_second_pass(lambda: pytest.fail("there is no batch"))
    before = weights(model)
    saved = get_optimizer_state_dict(model, optimizer)
    assert torch.equal(weights(model), before)
    assert all(not entry["momentum_buffer"].any() for entry in saved["state"].values())


def test_it_is_left_alone_by_the_other_ways_to_step():
    model, optimizer = make()
    optimizer.attach_second_pass(lambda: pytest.fail("not asked for"))
    optimizer.step()  # no gradients: nothing
    backward(model)
    optimizer.base_step()
    optimizer.zero_grad()
    backward(model)
    optimizer.first_step(zero_grad=True)
    backward(model)
    optimizer.step()
    optimizer.step(lambda: (optimizer.zero_grad(), backward(model))[1])
    assert copy.deepcopy(optimizer)._sam.second_pass is None
    optimizer.attach_second_pass(None)
    with pytest.raises(RuntimeError, match="attach_second_pass"):
        optimizer.step()


@JOINT
def test_an_exception_in_it_brings_the_weights_back(joint):
    model, optimizer = make(joint)
    optimizer.attach_second_pass(lambda: 1 / 0)
    before = weights(model)
    backward(model)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert torch.equal(weights(model), before) and not optimizer.perturbed


def scaled_loop(model, optimizer, scaler, steps=5):
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model, scaler)
        scaler.step(optimizer)
        scaler.update()
    return weights(model)


@JOINT
@pytest.mark.parametrize("enabled", [True, False])  # GradScaler(enabled=use_amp) is how loops are written
@pytest.mark.parametrize("options", [{}, {"radius": fastsam.radius.unnormalized()}], ids=["sam", "by the scale"])
def test_grad_scaler(joint, enabled, options):
    model, optimizer = make(joint, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
    optimizer.attach_second_pass(lambda: backward(model, scaler))
    assert torch.equal(scaled_loop(model, optimizer, scaler), by_hand(joint=joint, **options))


@JOINT
@pytest.mark.parametrize("overflows", ["first", "second"])
def test_an_overflow_in_the_second_pass_halves_the_scale(overflows, joint):
    model, optimizer = make(joint, momentum=0.0, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    infinite = {"first": False, "second": False}

    def spoil(which):
        if infinite[which]:
            next(model.parameters()).grad[0, 0] = float("inf")

    def second():
        backward(model, scaler)
        spoil("second")

    optimizer.attach_second_pass(second)
    scaled_loop(model, optimizer, scaler, 1)
    before = weights(model)
    infinite[overflows] = True
    optimizer.zero_grad()
    backward(model, scaler)
    spoil("first")
    scaler.step(optimizer)
    scaler.update()
    assert not optimizer.perturbed
    if overflows == "second":
        assert torch.equal(weights(model), before)
        assert scaler.get_scale() == 2.0**9
    else:  # no perturbation: the base optimizer's step, and its gradients were finite
        backward_once, plain = make(momentum=0.0, weight_decay=0.0)
        nn.utils.vector_to_parameters(before, backward_once.parameters())
        backward(backward_once)
        plain.base_step()
        assert torch.equal(weights(model), weights(backward_once))
        assert scaler.get_scale() == 2.0**10


@JOINT
def test_unscaling_before_it_is_refused(joint):
    model, optimizer = make(joint)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer.attach_second_pass(lambda: backward(model, scaler))
    before = weights(model)
    backward(model, scaler)
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="max_grad_norm"):
        scaler.step(optimizer)
    assert torch.equal(weights(model), before)


class Wrapper(torch.optim.Optimizer):
    """As others wrap optimizers."""

    def __init__(self, optimizer, name):
        setattr(self, name, optimizer)


def test_unwrap():
    model, optimizer = make()
    other = fastsam.FusedSAM([nn.Parameter(torch.ones(2))], lr=0.1)
    joint = fastsam.joint(optimizer, other)
    for inner in (optimizer, joint):
        assert fastsam.unwrap(inner) is inner
        for name in ("optimizer", "_optimizer", "_base_optimizer"):
            assert fastsam.unwrap(Wrapper(Wrapper(inner, name), "optimizer")) is inner
    for wrong in (optimizer.base_optimizer, Wrapper(optimizer.base_optimizer, "optimizer"), model, None):
        with pytest.raises(ValueError, match="fastsam.unwrap: there must be a FusedSAM or a fastsam.joint, got"):
            fastsam.unwrap(wrong)


def test_an_attribute_of_a_subclass_is_no_inner_optimizer():
    _, optimizer = make()
    for own in (optimizer.base_optimizer, "sgd", None):
        optimizer.optimizer = own
        assert fastsam.unwrap(Wrapper(optimizer, "_optimizer")) is optimizer


def test_deepspeeds_flat_parameters_are_not_taken_for_the_models():
    _, optimizer = make()
    flat = type("DeepSpeedZeroOptimizer", (Wrapper,), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})
    with pytest.raises(ValueError, match="got Wrapper, with DeepSpeedZeroOptimizer within"):
        fastsam.unwrap(Wrapper(flat(optimizer, "optimizer"), "optimizer"))


def test_sam_step_takes_a_wrapper():
    model, optimizer = make()
    step = fastsam.SAMStep(model, Wrapper(optimizer, "optimizer"), nn.functional.cross_entropy)
    for _ in range(5):
        step(X, Y)
    assert torch.equal(weights(model), by_hand())
