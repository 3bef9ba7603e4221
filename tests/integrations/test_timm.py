"""timm: its registry, weight-decay groups, schedules, Lookahead and loss scaler, with steps of one call."""

from __future__ import annotations

import logging
import math
import runpy
from pathlib import Path

import pytest
import torch
from plain import LOSS, STEPS, loader, network, same, state
from stub_torchvision import torchvision
from torch import nn

import fastsam

with torchvision():
    timm = pytest.importorskip("timm")
    from timm import optim, scheduler, utils
    from timm.optim import create_optimizer_v2

from fastsam.integrations.timm import register  # noqa: E402

COSINE = dict(t_initial=STEPS, warmup_t=2, warmup_lr_init=0.01, t_in_epochs=False)
SAM = dict(lr=0.2, momentum=0.8, weight_decay=0.02, rho=0.3)


@pytest.fixture(autouse=True)
def _names():
    register()


def train_timm(name, model=None, loss_scaler=None, schedule=False, clip=None, **options):
    """As timm's own training script: one backward pass, `optimizer.step()`."""
    model = network() if model is None else model
    optimizer = create_optimizer_v2(model, name, **options)
    sam = fastsam.unwrap(optimizer)
    cosine = scheduler.CosineLRScheduler(optimizer, **COSINE) if schedule else None  # which sets lr at once
    for i, (x, y) in enumerate(loader()):

        def second_pass(x=x, y=y):
            loss = LOSS(model(x), y)
            (loss if loss_scaler is None else loss_scaler._scaler.scale(loss)).backward()

        sam.attach_second_pass(second_pass)
        if schedule:
            cosine.step_update(i)
        optimizer.zero_grad()
        loss = LOSS(model(x), y)
        if loss_scaler is None:
            loss.backward()
            optimizer.step()
        else:
            loss_scaler(loss, optimizer, clip_grad=clip, parameters=model.parameters())
    return model, optimizer


def train_plain(model=None, lrs=None, decay=0.02, **options):
    """The two-call loop over the same groups."""
    model = network() if model is None else model
    params = [p for p in model.parameters() if p.dim() == 1], [p for p in model.parameters() if p.dim() > 1]
    groups = [{"params": params[0], "weight_decay": 0.0}, {"params": params[1], "weight_decay": decay}]
    optimizer = fastsam.FusedSAM(groups, **{"lr": 0.2, "rho": 0.3, **options})
    for i, (x, y) in enumerate(loader()):
        for group in optimizer.param_groups:
            group["lr"] = lrs[i] if lrs else group["lr"]
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        optimizer.first_step(zero_grad=True)
        LOSS(model(x), y).backward()
        optimizer.step()
    return model, optimizer


def test_names():
    names = register()
    assert {"fastsamsgd", "fastsamadamw", "fastsamlion"} <= set(names)
    assert set(names) <= set(optim.list_optimizers()) and not any("_" in name for name in names)
    assert "fastgsamadamw" in register("gsam")
    optimizer = create_optimizer_v2(network(), "fastgsamadamw", lr=0.1, alpha=0.3, betas=(0.8, 0.95), eps=1e-5)
    assert isinstance(optimizer, fastsam.methods.GSAM) and isinstance(optimizer.base_optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.95) and optimizer.param_groups[0]["eps"] == 1e-5
    with pytest.raises(ValueError, match="there is no method 'sammy'; known are sam, asam"):
        register("sammy")
    with pytest.raises(ValueError, match='groups of its own, as timm does, too; use fastsam.create."samon"'):
        register("samon")


def test_registering_again_says_nothing(caplog):
    with caplog.at_level(logging.WARNING):
        register()
    assert not caplog.records


def test_it_is_the_plain_loop():
    model, optimizer = train_timm("fastsamsgd", **SAM)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.02]
    same(state(model), state(train_plain(momentum=0.8)[0]))
    assert create_optimizer_v2(network(), "fastsamsgd").param_groups[0]["momentum"] == 0.9


def test_adamw():
    options = dict(betas=(0.8, 0.95), eps=1e-6)
    model, _ = train_timm("fastsamadamw", lr=0.2, rho=0.3, weight_decay=0.02, **options)
    same(state(model), state(train_plain(base_optimizer="adamw", **options)[0]))


def test_schedule():
    model, _ = train_timm("fastsamsgd", schedule=True, **SAM)
    reference = scheduler.CosineLRScheduler(torch.optim.SGD(network().parameters(), lr=0.2), **COSINE)
    lrs = [reference._get_lr(i)[0] for i in range(STEPS)]
    assert lrs[0] == 0.01
    same(state(model), state(train_plain(lrs=lrs, momentum=0.8)[0]))


def test_lookahead(monkeypatch):
    made = optim.Lookahead.__init__
    monkeypatch.setattr(optim.Lookahead, "__init__", lambda self, base: made(self, base, alpha=0.5, k=2))
    model, optimizer = train_timm("lookahead_fastsamsgd", **SAM)
    assert isinstance(optimizer, optim.Lookahead)
    # Its slow weights begin with the fast ones of its first exchange, not with the model's.
    plain = network()
    params = [p for p in plain.parameters() if p.dim() == 1], [p for p in plain.parameters() if p.dim() > 1]
    groups = [{"params": params[0], "weight_decay": 0.0}, {"params": params[1], "weight_decay": 0.02}]
    sam = fastsam.FusedSAM(groups, lr=0.2, rho=0.3, momentum=0.8)
    slow = None
    for i, (x, y) in enumerate(loader()):
        sam.zero_grad()
        LOSS(plain(x), y).backward()
        sam.first_step(zero_grad=True)
        LOSS(plain(x), y).backward()
        sam.step()
        if i % 2 == 1:
            fast = [p.detach().clone() for p in plain.parameters()]
            slow = fast if slow is None else [s.add(f - s, alpha=0.5) for s, f in zip(slow, fast, strict=True)]
            for p, s in zip(plain.parameters(), slow, strict=True):
                p.data.copy_(s)
    same(state(model), state(plain))
    saved = optimizer.state_dict()
    again = create_optimizer_v2(network(), "lookahead_fastsamsgd", **SAM)
    again.load_state_dict(saved)
    for a, b in zip(optimizer.state_dict()["state"].values(), again.state_dict()["state"].values(), strict=True):
        same(a, b)


def test_loss_scaler():
    scaler = utils.NativeScaler(device="cpu")
    model, _ = train_timm("fastsamsgd", loss_scaler=scaler, **SAM)
    same(state(model), state(train_plain(momentum=0.8)[0]))


def test_clipping_under_the_loss_scaler_is_the_optimizers():
    scaler = utils.NativeScaler(device="cpu")
    model = network()
    before = state(model)
    with pytest.raises(RuntimeError, match="clip with FusedSAM's max_grad_norm="):
        train_timm("fastsamsgd", model, scaler, clip=0.1, **SAM)
    same(state(model), before)
    model, _ = train_timm("fastsamsgd", loss_scaler=utils.NativeScaler(device="cpu"), max_grad_norm=0.1, **SAM)
    same(state(model), state(train_plain(momentum=0.8, max_grad_norm=0.1)[0]))


def test_lookahead_under_the_loss_scaler_is_refused():
    model = network()
    before = state(model)
    with pytest.raises(RuntimeError, match="Lookahead"):
        train_timm("lookahead_fastsamsgd", model, utils.NativeScaler(device="cpu"), **SAM)
    same(state(model), before)


def test_running_statistics():
    model = network(norm=True)
    optimizer = create_optimizer_v2(model, "fastsamsgd", **SAM)

    def second_pass():
        with fastsam.freeze_running_stats(model):
            LOSS(model(x), y).backward()

    optimizer.attach_second_pass(second_pass)
    for x, y in loader():
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        optimizer.step()
    assert model[1].num_batches_tracked == STEPS
    assert isinstance(model[1], nn.BatchNorm1d)


def test_the_example():
    path = Path(__file__).parents[2] / "examples" / "timm_loop.py"
    assert 0 < runpy.run_path(str(path))["main"]() < math.log(3)
