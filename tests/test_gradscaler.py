"""torch.amp.GradScaler: protocols, overflow in either pass, clipping. Scales are powers of two: equality is exact."""

from __future__ import annotations

import inspect
import math

import cases
import oracle
import pytest
import torch
from oracle import assert_same, bits
from torch.nn.utils import clip_grad_norm_

from fastsam import FusedSAM

BASES = [
    cases.Config("sgd", torch.optim.SGD, dict(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.01, rho=0.2)),
    cases.Config("asam", torch.optim.SGD, dict(lr=0.1, momentum=0.9, rho=0.5, adaptive=True, eta=0.01)),
    cases.Config("adamw", torch.optim.AdamW, dict(lr=0.01, weight_decay=0.1, amsgrad=True, rho=0.2)),
    cases.Config("unfused", torch.optim.RMSprop, dict(lr=0.01, momentum=0.5, rho=0.2)),
]
each_base = pytest.mark.parametrize("config", **cases.ids(BASES))


class Run:
    """A small model and an optimizer; `scaler` may be disabled."""

    def __init__(self, config: cases.Config, backend: str, scaled: bool = True):
        self.device = cases.device_of(backend)
        self.model = cases.small_model().to(self.device)
        self.params = list(self.model.parameters())
        self.opt = cases.fused(self.params, config, backend)
        self.scaler = torch.amp.GradScaler(self.device, init_scale=1024.0, growth_interval=1000, enabled=scaled)

    def backward(self, seed: int, bad: float | None = None) -> None:
        x, y = (t.to(self.device) for t in cases.batch(seed))
        loss = torch.nn.functional.mse_loss(self.model(x), y)
        self.scaler.scale(loss).backward()
        if bad is not None:
            self.params[0].grad[0, 0] = bad

    def step(
        self, protocol: str = "recommended", seed: int = 0, bad: tuple[float | None, float | None] = (None, None)
    ) -> None:
        scaler, opt = self.scaler, self.opt
        opt.zero_grad()
        self.backward(seed, bad[0])
        if "unscale both" in protocol:
            scaler.unscale_(opt)
            opt.first_step(zero_grad=True)
            scaler.update()
        else:
            opt.first_step(zero_grad=True)
        self.backward(seed + 100, bad[1])
        if "unscale" in protocol or "clip" in protocol:
            scaler.unscale_(opt)
        if "clip" in protocol:
            clip_grad_norm_(self.params, 0.05)
        scaler.step(opt)
        scaler.update()


PROTOCOLS = ["recommended", "unscale", "unscale and clip", "unscale both passes", "unscale both passes and clip"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@each_base
def test_equal_to_the_unscaled_run(backend, config, protocol):
    scaled, plain = Run(config, backend), Run(config, backend, scaled=False)
    for seed in range(5):
        scaled.step(protocol, seed)
        plain.step("clip" if "clip" in protocol else "recommended", seed)
        for p, q in zip(scaled.params, plain.params, strict=True):
            assert_same(p, q, what=f"step {seed}")
    oracle.assert_same_state(scaled.opt, plain.opt)
    assert scaled.scaler.get_scale() == 1024.0


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("protocol", ["recommended", "unscale"])
@each_base
def test_overflow_in_pass_1_is_a_base_step(backend, config, protocol, bad):
    scaled, plain = Run(config, backend), Run(config, backend, scaled=False)
    scaled.step(protocol, 0, (bad, None))
    plain.backward(100)
    plain.opt.base_step()
    for p, q in zip(scaled.params, plain.params, strict=True):
        assert_same(p, q)
    oracle.assert_same_state(scaled.opt, plain.opt)
    assert scaled.scaler.get_scale() == 1024.0, "pass 1 alone does not count as an overflow of the step"


@pytest.mark.parametrize("first", [None, math.inf])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("protocol", ["recommended", "unscale", "unscale and clip"])
@each_base
def test_overflow_in_pass_2_restores_and_skips(backend, config, protocol, bad, first):
    run = Run(config, backend)
    run.step(protocol, 0)  # so that there is state
    before, state = [bits(p) for p in run.params], oracle.saved_state(run.opt)
    state = {k: {n: torch.as_tensor(v).clone() for n, v in entry.items()} for k, entry in state.items()}
    run.step(protocol, 1, (first, bad))
    assert not run.opt.perturbed
    assert [bits(p) for p in run.params] == before
    for k, entry in oracle.saved_state(run.opt).items():
        for name, value in entry.items():
            assert_same(torch.as_tensor(value), state[k][name], what=name)
    assert run.scaler.get_scale() == 512.0
    other = Run(config, backend)  # and the run goes on as if nothing had been
    other.step(protocol, 0), other.step(protocol, 2), run.step(protocol, 2)
    for p, q in zip(run.params, other.params, strict=True):
        assert_same(p, q)


@each_base
def test_overflow_in_the_very_first_step(backend, config):
    # torch has no state then, and its first step is still to come.
    run, other = Run(config, backend), Run(config, backend)
    before = [bits(p) for p in run.params]
    run.step(bad=(None, math.inf))
    assert [bits(p) for p in run.params] == before and oracle.saved_state(run.opt) == {}
    run.step(seed=1), other.step(seed=1)
    for p, q in zip(run.params, other.params, strict=True):
        assert_same(p, q)
    oracle.assert_same_state(run.opt, other.opt)


@pytest.mark.parametrize("way", ["recommended", "after first_step"])
@each_base
def test_a_closure_in_scaler_step_is_refused_with_the_recipe(backend, config, way):
    run = Run(config, backend)
    run.backward(0)
    before = [bits(p) for p in run.params]
    if way == "after first_step":
        run.opt.first_step()
    with pytest.raises(RuntimeError, match=r"(?s)scaler\.scale.*first_step.*scaler\.step"):
        run.scaler.step(run.opt, lambda: run.backward(1))
    assert not run.opt.perturbed and [bits(p) for p in run.params] == before


def test_no_parameter_named_grad_scaler():
    # GradScaler inspects the signature and would switch to a deprecated protocol.
    assert "grad_scaler" not in inspect.signature(FusedSAM.step).parameters
    assert FusedSAM._step_supports_amp_scaling is True


@each_base
def test_gradients_stay_scaled_and_untouched(backend, config):
    run = Run(config, backend)
    run.backward(0)
    run.opt.first_step(zero_grad=True)
    run.backward(1)
    grads = [(p.grad, p.grad.clone()) for p in run.params]
    run.scaler.step(run.opt)
    for p, (grad, value) in zip(run.params, grads, strict=True):
        assert p.grad is grad
        assert_same(grad, value)


@each_base
def test_a_scale_that_is_no_power_of_two(backend, config):
    # 1/3000 is inexact: two roundings more than the unscaled run.
    scaled, plain = Run(config, backend), Run(config, backend, scaled=False)
    scaled.scaler = torch.amp.GradScaler(scaled.device, init_scale=3000.0)
    for seed in range(3):
        scaled.step("recommended", seed), plain.step("recommended", seed)
    for p, q in zip(scaled.params, plain.params, strict=True):
        torch.testing.assert_close(p, q)


def test_learning_with_autocast_and_a_scaler(backend):
    run = Run(BASES[0], backend)
    x, y = (t.to(run.device) for t in cases.batch())
    losses = []
    for _ in range(20):
        for pass_ in (1, 2):
            with torch.autocast(run.device, torch.bfloat16):
                loss = torch.nn.functional.mse_loss(run.model(x), y)
            run.scaler.scale(loss).backward()
            if pass_ == 1:
                losses.append(loss.item())
                run.opt.first_step(zero_grad=True)
        run.scaler.step(run.opt)
        run.scaler.update()
        run.opt.zero_grad()
    assert losses[-1] < 0.8 * losses[0]


# What a refused step leaves behind.


class Stop(BaseException):
    """Neither an Exception nor anything the package can know."""


def stop(*_):
    raise Stop


def without_first_step(run):
    run.scaler.step(run.opt)


def with_a_closure(run):
    run.opt.first_step()
    run.scaler.step(run.opt, lambda: run.backward(1))


def with_a_failing_pre_hook(run):
    run.opt.first_step()
    handle = run.opt.register_step_pre_hook(stop)
    try:
        run.scaler.step(run.opt)
    finally:
        handle.remove()


def with_a_failing_post_hook(run):
    run.opt.first_step()
    handle = run.opt.register_step_post_hook(stop)
    try:
        run.scaler.step(run.opt)
    finally:
        handle.remove()


def with_a_failing_base(run):
    run.opt.first_step()
    run.opt._update = stop
    try:
        run.scaler.step(run.opt)
    finally:
        del run.opt._update


WAYS = [
    without_first_step,
    with_a_closure,
    with_a_failing_pre_hook,
    with_a_failing_post_hook,
    with_a_failing_base,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@each_base
def test_a_step_that_raised_leaves_no_scale_behind(backend, config, way):
    run, plain = Run(config, backend), Run(config, backend, scaled=False)
    run.backward(0)
    with pytest.raises((RuntimeError, Stop)):
        way(run)
    assert not hasattr(run.opt, "grad_scale") and not hasattr(run.opt, "found_inf")
    run.opt.restore()
    run.opt.load_state_dict(plain.opt.state_dict())
    with torch.no_grad():
        for p, q in zip(run.params, plain.params, strict=True):
            p.copy_(q)
    run.scaler = plain.scaler  # the user goes on without one, in two calls and with a closure
    for seed in range(2):
        run.step(seed=seed), plain.step(seed=seed)
        for other in (run, plain):
            other.opt.step(cases.model_closure(other.model, other.opt, seed + 7))
    for p, q in zip(run.params, plain.params, strict=True):
        assert_same(p, q)


# unscale_ in the first pass, and no update() after it: nothing unscales the gradients of the second.


@pytest.mark.parametrize("clip", [None, 0.05, 1e3])
@pytest.mark.parametrize("scale", [256.0, 65536.0])
@each_base
def test_unscale_in_the_first_pass_alone_is_refused(backend, config, scale, clip):
    run, plain = Run(config, backend), Run(config, backend, scaled=False)
    run.scaler = torch.amp.GradScaler(run.device, init_scale=scale)
    before = [bits(p) for p in run.params]
    run.backward(0)
    run.scaler.unscale_(run.opt)
    if clip is not None:
        clip_grad_norm_(run.params, clip)
    run.opt.first_step(zero_grad=True)
    run.backward(100)
    with pytest.raises(RuntimeError, match=rf"(?s)unscale_.*loss scale {scale}.*first_step.*update"):
        run.scaler.step(run.opt)
    assert not run.opt.perturbed and [bits(p) for p in run.params] == before
    run.scaler.update()
    run.step("unscale", 3), plain.step("recommended", 3)  # as the message says
    for p, q in zip(run.params, plain.params, strict=True):
        assert_same(p, q)


def test_the_check_waits_for_the_device_in_few_steps(backend, monkeypatch):
    run = Run(BASES[0], backend)
    looked = []
    growth = type(run.opt._sam.buckets).growth
    monkeypatch.setattr(
        type(run.opt._sam.buckets), "growth", lambda *args: looked.append(step) or growth(*args), raising=True
    )
    for step in range(1, 20):
        run.step("unscale", step)
    assert looked == [1, 2, 4, 8, 16]
    for step in range(20, 30):
        run.step("recommended", step)
    assert looked == [1, 2, 4, 8, 16]


@pytest.mark.parametrize("p", [1.5, math.inf])
def test_unscaling_is_not_judged_without_the_2_norm(backend, p):
    run = Run(BASES[0], backend)
    run.opt.p = p
    run.step("unscale")
    run.step("unscale both passes")


def test_a_first_pass_clipped_to_little_is_no_false_alarm(backend):
    run = Run(BASES[0], backend)
    run.scaler = torch.amp.GradScaler(run.device, init_scale=65536.0)
    run.backward(0)
    run.scaler.unscale_(run.opt)
    clip_grad_norm_(run.params, 1e-3)
    run.opt.first_step(zero_grad=True)
    run.scaler.update()
    run.backward(1)
    run.scaler.unscale_(run.opt)
    run.scaler.step(run.opt)
