"""Accelerate: the weights of the plain loop by closures, two calls and whole steps; what would be wrong is refused."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import pytest
import torch
from plain import BATCH, LOSS, STEPS, loader, network, optimizer_of, same, state, train, train_protected

import fastsam

accelerate = pytest.importorskip("accelerate")

from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402

from fastsam.integrations.accelerate import sam_step  # noqa: E402


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return accelerate.Accelerator(cpu=True)


def prepared(accelerator, schedule=False, **make):
    model = network(**make)
    optimizer = optimizer_of(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    return accelerator.prepare(model, optimizer, loader(), scheduler)


def closure_of(accelerator, model, optimizer, x, y):
    def closure():
        optimizer.zero_grad()
        loss = LOSS(model(x), y)
        accelerator.backward(loss)
        return loss

    return closure


@pytest.mark.parametrize("way", ["closure", "first_step", "sam_step"])
def test_it_is_the_plain_loop(accelerator, way):
    model, optimizer, batches, scheduler = prepared(accelerator)
    step = sam_step(accelerator, model, optimizer, LOSS)
    for x, y in batches:
        closure = closure_of(accelerator, model, optimizer, x, y)
        if way == "closure":
            optimizer.step(closure)
        elif way == "first_step":
            closure()
            fastsam.unwrap(optimizer).first_step(zero_grad=True)
            closure()
            optimizer.step()
        else:
            step(x, y)
        scheduler.step()
    same(state(model), train(schedule=True))


@pytest.mark.parametrize("sharpness", ["batch", "micro"])
def test_micro_batches(accelerator, sharpness):
    model = network(norm=True, dropout=0.3)
    model, optimizer, batches = accelerator.prepare(model, optimizer_of(model), loader(batch=2 * BATCH))
    step = sam_step(accelerator, model, optimizer, LOSS, micro_batches=2, sharpness=sharpness)
    torch.manual_seed(9)
    for x, y in batches:
        step(x, y)
    same(state(model), train_protected(micro_batches=2, sharpness=sharpness))
    assert model[1].num_batches_tracked == STEPS


def test_accumulation_of_the_accelerator_is_refused():
    GradientState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    model, optimizer, *_ = prepared(accelerator)
    with pytest.raises(ValueError, match="must be 1, got 4: give batches of the whole step, and micro_batches=4"):
        sam_step(accelerator, model, optimizer, LOSS)


def test_training_resumes_half_way(accelerator, tmp_path):
    model, optimizer, batches, scheduler = prepared(accelerator)
    step = sam_step(accelerator, model, optimizer, LOSS)
    for i, (x, y) in enumerate(batches):
        if i == STEPS // 2:
            accelerator.save_state(str(tmp_path))
        step(x, y)
        scheduler.step()
    whole = state(model)
    AcceleratorState._reset_state(reset_partial_state=True)
    again = accelerate.Accelerator(cpu=True)
    model, optimizer, batches, scheduler = prepared(again)
    again.load_state(str(tmp_path))
    step = sam_step(again, model, optimizer, LOSS)
    for i, (x, y) in enumerate(batches):
        if i >= STEPS // 2:
            step(x, y)
            scheduler.step()
    same(state(model), whole)
    same(state(model), train(schedule=True))


# Loss scaling, which Accelerate itself has on GPUs alone.


@pytest.fixture
def scaled(accelerator):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model = network()
    raw = optimizer_of(model)
    optimizer = AcceleratedOptimizer(raw, scaler=scaler)
    accelerator.scaler = scaler
    return accelerator, model, optimizer, raw


@pytest.mark.parametrize("gradients", [False, True])
def test_a_closure_under_loss_scaling_is_refused(scaled, gradients):
    accelerator, model, optimizer, raw = scaled
    before = state(model)
    x, y = next(iter(loader()))
    accelerator.scaler.scale(torch.ones(()))  # without any loss before, torch says so itself
    if gradients:
        closure_of(accelerator, model, optimizer, x, y)()
    with pytest.raises(RuntimeError, match=r"fastsam.unwrap\(optimizer\).first_step\(zero_grad=True\)"):
        optimizer.step(closure_of(accelerator, model, optimizer, x, y))
    same(state(model), before)
    assert not raw.perturbed


@pytest.mark.parametrize("way", ["first_step", "sam_step"])
def test_loss_scaling_changes_nothing(scaled, way):
    accelerator, model, optimizer, _ = scaled
    step = sam_step(accelerator, model, optimizer, LOSS)
    for x, y in loader():
        if way == "sam_step":
            step(x, y)
            continue
        closure = closure_of(accelerator, model, optimizer, x, y)
        closure()
        fastsam.unwrap(optimizer).first_step(zero_grad=True)
        closure()
        optimizer.step()
        assert not optimizer.step_was_skipped
    same(state(model), train())


def test_the_example():
    path = Path(__file__).parents[2] / "examples" / "accelerate_loop.py"
    AcceleratorState._reset_state(reset_partial_state=True)
    assert 0 < runpy.run_path(str(path))["main"]() < math.log(3)
