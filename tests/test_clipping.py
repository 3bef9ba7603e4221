"""`max_grad_norm` is clip_grad_norm_ before the base step, with no write to a gradient; and what `stats()` tells."""

from __future__ import annotations

import math

import cases
import pytest
import torch
from oracle import assert_same_state, bits
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

from fastsam import FusedSAM

CONFIGS = [
    *(config for config in cases.CONFIGS if config.name in ("groups", "dampening", "adamw_groups")),
    cases.Config("unfused", torch.optim.Adamax, dict(lr=0.01, rho=0.2, weight_decay=0.01)),
]
each_config = pytest.mark.parametrize("config", **cases.ids(CONFIGS))


@pytest.mark.filterwarnings(cases.NO_GRADIENTS)
@pytest.mark.parametrize("max_norm", [3.0, 1e6], ids=["clips", "too large to clip"])
@each_config
def test_equals_clip_grad_norm_before_the_step(backend, device, config, max_norm):
    ours, theirs = cases.make_params(device=device), cases.make_params()
    opt, hand = cases.fused(ours, config, backend, max_grad_norm=max_norm), cases.by_hand(theirs, config)
    for step in range(cases.STEPS):
        for params in (ours, theirs):
            cases.set_gradients(params, step, 1)
        opt.first_step()
        hand.climb()
        for params in (ours, theirs):
            cases.set_gradients(params, step, 2)
        before = [None if p.grad is None else bits(p.grad) for p in ours]
        opt.step()
        assert [None if p.grad is None else bits(p.grad) for p in ours] == before
        hand.back()
        norm = clip_grad_norm_(theirs, max_norm)
        hand.base.step()
        torch.testing.assert_close(opt.stats().second_norm.cpu().float(), norm)
        for p, q in zip(ours, theirs, strict=True):
            # The two norms add in different orders, which is a last place of the factor and then of the update.
            torch.testing.assert_close(p.detach().cpu(), q.detach())
    assert_same_state(opt, hand.base, lambda a, b, what: torch.testing.assert_close(a.cpu(), b))


def test_a_factor_of_1_changes_no_bit(backend, device):
    runs = [cases.make_params(device=device) for _ in range(2)]
    opts = [cases.fused(p, CONFIGS[0], backend, max_grad_norm=m) for p, m in zip(runs, (None, 1e6), strict=True)]
    for opt, params in zip(opts, runs, strict=True):
        opt.step(cases.closure_of(params, 0))
    assert [bits(p) for p in runs[0]] == [bits(p) for p in runs[1]]


@each_config
def test_under_a_grad_scaler_the_unscaled_norm_counts(backend, device, config):
    def run(scale):
        model = cases.small_model().to(device)
        opt = cases.fused(list(model.parameters()), config, backend, max_grad_norm=0.03)
        scaler = torch.amp.GradScaler(device, init_scale=scale, enabled=scale > 1)
        for seed in range(4):
            for finish in (lambda: opt.first_step(), lambda: scaler.step(opt)):
                opt.zero_grad()
                x, y = (t.to(device) for t in cases.batch(seed))
                scaler.scale(torch.nn.functional.mse_loss(model(x), y)).backward()
                finish()
            scaler.update()
        return list(model.parameters())

    for p, q in zip(run(1.0), run(1024.0), strict=True):  # a power of two rounds nothing
        assert bits(p) == bits(q)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_shows(backend, device, bad):
    p = Parameter(torch.ones(5, device=device))
    opt = FusedSAM([p], torch.optim.SGD, lr=0.1, max_grad_norm=1.0, backend=backend)
    p.grad = torch.tensor([1.0, bad, 1.0, 1.0, 1.0], device=device)
    opt.base_step()
    assert p.isnan().all()


def test_clipping_may_be_switched_on_and_off(backend, device):
    p = Parameter(torch.zeros(4, device=device))
    opt = FusedSAM([p], torch.optim.SGD, lr=1.0, backend=backend)
    p.grad = torch.full_like(p, 2.0)  # of length 4
    for max_norm, expected in ((None, -2.0), (1.0, -2.5), (None, -4.5)):
        opt.max_grad_norm = max_norm
        opt.base_step()
        torch.testing.assert_close(p.detach(), torch.full_like(p, expected))


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.inf, math.nan])
def test_norms_that_nothing_can_be_clipped_to_are_refused(wrong):
    with pytest.raises(ValueError, match="max_grad_norm must be > 0, or None for no clipping, got"):
        FusedSAM([Parameter(torch.ones(2))], torch.optim.SGD, max_grad_norm=wrong)


# ---- stats().


def test_stats_before_the_first_step_are_empty():
    assert set(FusedSAM([Parameter(torch.ones(2))], torch.optim.SGD).stats()) == {None}


def test_norms_and_loss_increase(backend, device):
    w = Parameter(torch.tensor([3.0, 4.0], device=device))
    opt = FusedSAM([w], torch.optim.SGD, rho=0.5, lr=0.1, max_grad_norm=100.0, backend=backend)

    def closure():
        opt.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    opt.step(closure)
    stats = opt.stats()
    expected = {"first_norm": 10.0, "second_norm": 11.0, "loss_increase": 5.5**2 - 25.0}
    for name, value in expected.items():  # w + e = 1.1 w
        assert getattr(stats, name).item() == pytest.approx(value, rel=1e-6), name
    assert not stats.loss_increase.requires_grad
    assert (stats.first_overflows.item(), stats.second_overflows.item()) == (0, 0)
    assert FusedSAM([w], torch.optim.SGD, backend=backend).stats().second_norm is None


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adamax], ids=["fused", "unfused"])
def test_overflows_of_either_pass_are_counted(backend, device, base):
    p, q = (Parameter(torch.ones(3, device=device)) for _ in range(2))
    opt = FusedSAM([p, q], base, rho=0.1, lr=0.01, backend=backend)
    scaler = torch.amp.GradScaler(device, init_scale=4.0)
    passes = [(1.0, 1.0), (math.inf, 1.0), (1.0, math.nan), (math.nan, 1.0), (math.inf, math.inf)]
    for first, second in passes:
        scaler.scale(p.sum())  # makes the scaler's tensors
        for grad, finish in ((first, opt.first_step), (second, lambda: scaler.step(opt))):
            p.grad = torch.full_like(p, grad)
            finish()
        scaler.update(4.0)
    stats = opt.stats()
    assert (stats.first_overflows.item(), stats.second_overflows.item()) == (3, 2)


@pytest.mark.parametrize("p", [2.0, 3.0])
def test_overflows_are_counted_where_the_first_bucket_has_nothing_but_empty_tensors(backend, device, p):
    params = [Parameter(torch.zeros(0, device=device, dtype=torch.float64)), Parameter(torch.ones(3, device=device))]
    opt = FusedSAM(params, torch.optim.SGD, rho=0.1, lr=0.01, p=p, backend=backend)
    for value in (1.0, math.inf, math.nan, 1.0):
        for param in params:
            param.grad = torch.full_like(param, value)
        opt.first_step()
        for param in params:
            param.grad = torch.zeros_like(param)
        opt.step()
    assert opt.stats().first_overflows.item() == 2
