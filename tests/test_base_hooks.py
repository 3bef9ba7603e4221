"""What users put on the base optimizer itself: step hooks and a patched `step`, called as the well-known file does."""

from __future__ import annotations

import types

import cases
import oracle
import pytest
import torch
from oracle import assert_same, bits

from fastsam import FusedSAM, passes

NAMES = ["matrix", "transposed", "64"]
BASES = [
    cases.Config("sgd", torch.optim.SGD, dict(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.01, rho=0.4)),
    cases.Config("adamw", torch.optim.AdamW, dict(lr=0.01, weight_decay=0.1, amsgrad=True, rho=0.4)),
    cases.Config("adagrad", torch.optim.Adagrad, dict(lr=0.05, lr_decay=0.1, initial_accumulator_value=0.2, rho=0.4)),
    cases.Config("nadam", torch.optim.NAdam, dict(lr=0.01, momentum_decay=0.02, rho=0.4)),
    cases.Config("rprop", torch.optim.Rprop, dict(lr=0.01, etas=(0.4, 1.3), rho=0.4)),
]
each_base = pytest.mark.parametrize("config", **cases.ids(BASES))


class Pair:
    """FusedSAM and SAM by hand side by side, in two calls."""

    def __init__(self, config, backend, **kwargs):
        device = cases.device_of(backend)
        self.ours, self.theirs = cases.make_params(names=NAMES, device=device), cases.make_params(names=NAMES)
        self.opt, self.hand = cases.fused(self.ours, config, backend, **kwargs), cases.by_hand(self.theirs, config)
        self.bases = self.opt.base_optimizer, self.hand.base

    def step(self, seed, way="two calls"):
        if way == "base_step":
            for params in (self.ours, self.theirs):
                cases.set_gradients(params, seed, 2, NAMES)
            self.opt.base_step(), self.hand.base.step()
            return
        if way == "closure":
            self.opt.step(cases.closure_of(self.ours, seed, NAMES))
        else:
            cases.set_gradients(self.ours, seed, 1, NAMES)
            self.opt.first_step()
            cases.set_gradients(self.ours, seed, 2, NAMES)
            self.opt.step()
        self.hand.step(cases.closure_of(self.theirs, seed, NAMES))

    def check(self):
        def close(a, b, what=""):
            torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-5, atol=1e-6, msg=lambda m: f"{what}: {m}")

        for name, a, b in zip(NAMES, self.ours, self.theirs, strict=True):
            close(a.detach(), b.detach(), name)
        oracle.assert_same_state(self.opt, self.hand.base, close)


@torch.no_grad()
def clamp(base, args, kwargs):
    for group in base.param_groups:
        for p in group["params"]:
            p.clamp_(-0.6, 0.6)


@torch.no_grad()
def halve_in_place(base, args, kwargs):
    for group in base.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                p.grad.mul_(0.5)


@torch.no_grad()
def centralize(base, args, kwargs):
    for group in base.param_groups:
        for p in group["params"]:
            p.grad = None if p.grad is None else p.grad - p.grad.mean()


@torch.no_grad()
def drop_one(base, args, kwargs):
    base.param_groups[0]["params"][1].grad = None


def set_lr(base, args, kwargs):
    base.param_groups[0]["lr"] = 0.03


@pytest.mark.parametrize("way", ["closure", "two calls", "base_step"])
@pytest.mark.parametrize("hook", [clamp, halve_in_place, centralize, drop_one, set_lr], ids=lambda hook: hook.__name__)
@each_base
def test_pre_hooks_equal_those_of_sam_by_hand(backend, config, hook, way):
    pair = Pair(config, backend)
    for base in pair.bases:
        base.register_step_pre_hook(hook)
    for seed in (1, 3, 5):
        pair.step(seed, way)
        pair.check()


@pytest.mark.parametrize("way", ["closure", "two calls", "base_step"])
@each_base
def test_post_hooks_equal_those_of_sam_by_hand(backend, config, way):
    pair = Pair(config, backend)
    for base in pair.bases:
        base.register_step_post_hook(clamp)
    for seed in (1, 3, 5):
        pair.step(seed, way)
        pair.check()
    assert all(p.abs().max() <= 0.6 for p in pair.ours)


@pytest.mark.parametrize("made", ["instance", "class"])
@each_base
def test_hooks_are_called_once_a_step_with_torchs_arguments(backend, config, made):
    params, calls = cases.make_params(names=NAMES, device=cases.device_of(backend)), []
    options = {key: value for key, value in config.options.items() if key != "rho"}
    if made == "instance":
        base = config.base(params, **options)
        opt = FusedSAM(None, base, rho=0.4, backend=backend)
    else:
        opt = FusedSAM(params, config.base, rho=0.4, backend=backend, **options)
        base = opt.base_optimizer
    before = [bits(p) for p in params]

    def pre(*given):
        assert [bits(p) for p in params] == before and not opt.perturbed
        calls.append(("pre", *given))

    handles = [
        base.register_step_pre_hook(pre),
        base.register_step_post_hook(lambda *given: calls.append(("post", *given))),
        opt.register_step_pre_hook(lambda *_: calls.append("own pre")),
        opt.register_step_post_hook(lambda *_: calls.append("own post")),
    ]
    opt.step(cases.closure_of(params, 1, NAMES))
    assert calls == ["own pre", ("pre", base, (base,), {}), ("post", base, (base,), {}), "own post"]
    for handle in handles:
        handle.remove()
    opt.step(cases.closure_of(params, 3, NAMES))
    assert len(calls) == 4


@each_base
def test_arguments_that_a_pre_hook_gives_reach_the_step(backend, config):
    pair, called = Pair(config, backend), []
    for base in pair.bases:
        base.register_step_pre_hook(lambda base, args, kwargs: (args, {"closure": lambda: called.append(1)}))
    for seed in (1, 3):
        pair.step(seed)
    assert len(called) == 4  # two steps of both
    pair.check()


@each_base
def test_a_pre_hook_that_returns_nonsense_is_refused(backend, config):
    params = cases.make_params(names=NAMES, device=cases.device_of(backend))
    opt, before = cases.fused(params, config, backend), [bits(p) for p in params]
    opt.base_optimizer.register_step_pre_hook(lambda *_: "nonsense")
    with pytest.raises(RuntimeError, match=r"FusedSAM: a step pre-hook of .* must return None or .*'nonsense'"):
        opt.step(cases.closure_of(params, 1, NAMES))
    assert [bits(p) for p in params] == before and not opt.perturbed


@pytest.mark.parametrize("register", ["register_step_pre_hook", "register_step_post_hook"])
@each_base
def test_a_hook_that_raises_leaves_no_perturbation(backend, config, register):
    pair = Pair(config, backend)

    def fail(*_):
        raise KeyError("mine")

    handles = [getattr(base, register)(fail) for base in pair.bases]
    with pytest.raises(KeyError, match="mine"):
        pair.opt.step(cases.closure_of(pair.ours, 1, NAMES))
    assert not pair.opt.perturbed
    with pytest.raises(KeyError, match="mine"):
        pair.hand.step(cases.closure_of(pair.theirs, 1, NAMES))
    for handle in handles:
        handle.remove()
    pair.step(3)
    pair.check()


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Rprop])
def test_hooks_see_weights_not_masters_and_masters_follow(backend, base):
    device = cases.device_of(backend)
    params = cases.make_params(torch.bfloat16, NAMES, device=device)
    opt = FusedSAM(params, base, lr=0.01, rho=0.4, master_weights=True, backend=backend)
    seen = []

    def pre(base, args, kwargs):
        seen.append([p for group in base.param_groups for p in group["params"]])
        clamp(base, args, kwargs)

    opt.base_optimizer.register_step_pre_hook(pre)
    opt.base_optimizer.register_step_post_hook(clamp)
    for seed in (1, 3):
        opt.step(cases.closure_of(params, seed, NAMES))
    assert all(a is b for held in seen for a, b in zip(held, params, strict=True))
    assert all(p.abs().max() <= 0.6016 for p in params)
    opt.state_dict()
    assert all(torch.equal(opt.state[p]["master"].bfloat16(), p) for p in params)


@pytest.mark.parametrize("base, calls", [(torch.optim.SGD, ["pre", "post"]), (torch.optim.Rprop, [])])
def test_an_overflow_keeps_hooks_from_a_base_that_is_not_fused(backend, base, calls):
    # A GradScaler always calls step() of an optimizer that handles the scale, fused ones of torch included.
    params, seen = cases.make_params(names=NAMES, device=cases.device_of(backend)), []
    opt = FusedSAM(params, base, lr=0.1, backend=backend)
    opt.base_optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    opt.base_optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    before = [bits(p) for p in params]
    cases.set_gradients(params, 1, 1, NAMES)
    opt.first_step()
    opt.grad_scale = torch.tensor(1024.0, device=params[0].device)
    opt.found_inf = torch.tensor(1.0, device=params[0].device)
    opt.step()
    assert seen == calls and [bits(p) for p in params] == before


# a patched step


def patch(base, calls, bound):
    original = base.step

    def patched(*args):
        calls.append(1)
        return original()

    base.step = types.MethodType(patched, base) if bound else patched


@pytest.mark.parametrize("scheduler", [None, "before", "after"])
@each_base
def test_a_patched_step_equals_that_of_sam_by_hand(backend, config, scheduler):
    pair, calls = Pair(config, backend), []
    for base in pair.bases:
        if scheduler == "before":
            torch.optim.lr_scheduler.LambdaLR(base, lambda _: 1.0)
        patch(base, calls, bound=True)
        if scheduler == "after":
            torch.optim.lr_scheduler.LambdaLR(base, lambda _: 1.0)
        base.register_step_post_hook(clamp)
    for seed in (1, 3):
        pair.step(seed)
        pair.check()
    assert len(calls) == 4  # two steps of both
    for base in pair.bases:  # from here on it is fused again, with the state that the patched step left
        del base.step
    for seed in (5, 7):
        pair.step(seed)
        pair.check()
    assert len(calls) == 4
    for base in pair.bases:
        patch(base, calls, bound=False)
    pair.step(9, "base_step")
    pair.check()
    assert len(calls) == 6


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Rprop])
def test_a_patched_step_works_on_the_masters(backend, base):
    device = cases.device_of(backend)
    runs = []
    for patched in (False, True):
        params, calls = cases.make_params(torch.bfloat16, NAMES, device=device), []
        opt = FusedSAM(params, base, lr=0.01, rho=0.4, master_weights=True, backend=backend)
        for seed in (1, 3, 5):
            if patched and seed == 3:
                patch(opt.base_optimizer, calls, bound=False)
            if patched and seed == 5:
                del opt.base_optimizer.step
            opt.step(cases.closure_of(params, seed, NAMES))
        assert len(calls) == patched
        runs.append((opt, params))
    for p, q in zip(*(params for _, params in runs), strict=True):
        torch.testing.assert_close(p, q)
    oracle.assert_same_state(
        runs[1][0], runs[0][0], lambda a, b, what: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    )


@each_base
def test_a_patched_step_that_raises_restores(backend, config):
    params = cases.make_params(names=NAMES, device=cases.device_of(backend))
    opt, before = cases.fused(params, config, backend), [bits(p) for p in params]

    def fail():
        raise KeyError("mine")

    opt.base_optimizer.step = fail
    cases.set_gradients(params, 1, 1, NAMES)
    grads = [p.grad for p in params]
    opt.first_step()
    with pytest.raises(KeyError, match="mine"):
        opt.step()
    assert [bits(p) for p in params] == before and not opt.perturbed
    assert all(p.grad is grad for p, grad in zip(params, grads, strict=True))


@pytest.mark.parametrize("on", ["base", "both"])
def test_a_scheduler_alone_leaves_the_base_fused(backend, monkeypatch, on):
    monkeypatch.setattr(passes, "step_base", lambda *_: pytest.fail("the base steps by itself"))
    params = cases.make_params(names=NAMES, device=cases.device_of(backend))
    opt = cases.fused(params, BASES[0], backend)
    for wrapped in (opt.base_optimizer, opt) if on == "both" else (opt.base_optimizer,):
        torch.optim.lr_scheduler.StepLR(wrapped, 1)
    opt.step(cases.closure_of(params, 1, NAMES))


def test_a_step_without_hooks_has_the_same_bits(backend):
    runs = []
    for hooked in (False, True):
        params = cases.make_params(names=NAMES, device=cases.device_of(backend))
        opt = cases.fused(params, BASES[1], backend)
        if hooked:
            opt.base_optimizer.register_step_pre_hook(lambda *_: None)
        for seed in (1, 3):
            opt.step(cases.closure_of(params, seed, NAMES))
        runs.append(params)
    for p, q in zip(*runs, strict=True):
        assert_same(p, q)
