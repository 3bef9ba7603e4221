"""Several FusedSAM optimizers under one norm: as one FusedSAM, as by hand, and what is refused."""

from __future__ import annotations

import copy
import gc
import math
import pickle

import cases
import pytest
import torch
from oracle import assert_same, bits
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, StepLR

import fastsam
from fastsam import FusedSAM, methods, when
from fastsam.joint import Joint

SGD = dict(lr=0.1, momentum=0.9, weight_decay=0.01)


def model_of(device: str = "cpu") -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 90), nn.Tanh(), nn.Linear(90, 3)).to(device)


def halves(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    return list(model[0].parameters()), list(model[2].parameters())


def two(model: nn.Module, backend: str = "auto", **options) -> Joint:
    first, last = halves(model)
    return fastsam.joint(
        FusedSAM(first, "sgd", rho=0.2, backend=backend, **SGD, **options),
        FusedSAM(last, "adamw", rho=0.4, lr=0.01, backend=backend, **options),
    )


def backward(model: nn.Module, seed: int, scale=lambda loss: loss) -> torch.Tensor:
    x, y = (t.to(next(model.parameters()).device) for t in cases.batch(seed))
    loss = nn.functional.mse_loss(model(x), y)
    scale(loss).backward()
    return loss


def take(model: nn.Module, opt: torch.optim.Optimizer, seed: int, form: str = "two calls") -> None:
    if form == "closure":
        calls = iter((seed, seed + 100))

        def closure() -> torch.Tensor:
            opt.zero_grad()
            return backward(model, next(calls))

        assert opt.step(closure) > 0
        return
    opt.zero_grad()
    backward(model, seed)
    if opt.first_step(zero_grad=True):
        assert opt.perturbed
        backward(model, seed + 100)
    opt.second_step() if form == "two calls" else opt.step()
    assert not opt.perturbed


def weights(model: nn.Module) -> list[bytes]:
    return [bits(p) for p in model.parameters()]


class Mixed(nn.Sequential):
    """A float32 half and a float64 half: two buckets, also within one optimizer."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(5, 90), nn.Tanh(), nn.Linear(90, 3).double())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[2](self[1](self[0](x)).double()).float()


@pytest.mark.parametrize("p", [2.0, 3.0, 1.5, math.inf])
@pytest.mark.parametrize("form", ["two calls", "closure"])
def test_equal_to_one_optimizer_with_the_same_buckets(form, p):
    ours, theirs = Mixed(), Mixed()
    options = dict(rho=0.3, p=p, backend="reference", **SGD)
    opt = fastsam.joint(*(FusedSAM(half, **options) for half in halves(ours)))
    one = FusedSAM([{"params": half} for half in halves(theirs)], **options)
    for seed in range(4):
        take(ours, opt, seed, form)
        take(theirs, one, seed, form)
        assert weights(ours) == weights(theirs)


@pytest.mark.parametrize("adaptive", [False, True])
def test_equal_to_one_optimizer_that_has_one_bucket(backend, device, adaptive):
    """To rounding: it adds the squares of all in one tree, the joint those of each part in one of its own."""
    ours, theirs = model_of(device), model_of(device)
    options = dict(rho=0.3, adaptive=adaptive, eta=0.01, backend=backend, **SGD)
    opt = fastsam.joint(*(FusedSAM(half, **options) for half in halves(ours)))
    one = FusedSAM([{"params": half} for half in halves(theirs)], **options)
    for seed in range(4):
        take(ours, opt, seed)
        take(theirs, one, seed)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", ["two calls", "closure", "step"])
def test_two_bases_by_hand(backend, device, form):
    model, hand = model_of(device), model_of(device)
    opt = two(model, backend)
    first, last = halves(hand)
    bases = torch.optim.SGD(first, **SGD), torch.optim.AdamW(last, lr=0.01)
    for seed in range(5):
        take(model, opt, seed, form)
        hand.zero_grad()
        backward(hand, seed)
        with torch.no_grad():
            norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in hand.parameters())) + 1e-12
            old = [p.clone() for p in hand.parameters()]
            for rho, part in ((0.2, first), (0.4, last)):
                for p in part:
                    p += p.grad * (rho / norm)
        hand.zero_grad()
        backward(hand, seed + 100)
        with torch.no_grad():
            for p, w in zip(hand.parameters(), old, strict=True):
                p.copy_(w)
        for base in bases:
            base.step()
        for a, b in zip(model.parameters(), hand.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def test_the_perturbation_has_length_rho():
    model = model_of()
    opt = fastsam.joint(*(FusedSAM(half, rho=0.5, lr=0.1) for half in halves(model)))
    old = [p.detach().clone() for p in model.parameters()]
    backward(model, 0)
    opt.first_step()
    e = [(p - w).detach() for p, w in zip(model.parameters(), old, strict=True)]
    assert math.sqrt(sum(float(part.double().square().sum()) for part in e)) == pytest.approx(0.5, rel=1e-5)
    with opt.unperturbed():
        assert all(torch.equal(p, w) for p, w in zip(model.parameters(), old, strict=True))
    assert opt.perturbed
    opt.restore()
    assert not opt.perturbed and all(torch.equal(p, w) for p, w in zip(model.parameters(), old, strict=True))


def test_a_base_that_is_not_fused_and_methods():
    model = model_of()
    first, last = halves(model)
    opt = fastsam.joint(
        FusedSAM(first, torch.optim.Adamax, lr=0.01, rho=0.1),
        methods.WSAM(last[:1], lr=0.1, rho=0.1),
        methods.SparseSAM(last[1:], lr=0.1, rho=0.1),
    )
    losses = []
    for _ in range(40):
        losses.append(opt.step(lambda: (opt.zero_grad(), backward(model, 0))[1]).item())
    assert losses[-1] < 0.6 * losses[0]
    assert all(part.stats().loss_increase is not None for part in opt.optimizers)


@pytest.mark.parametrize("bad_pass", [1, 2])
def test_overflow_under_a_grad_scaler(backend, device, bad_pass):
    """In the first pass nothing climbs, also where the other part overflowed; in the second nothing steps."""
    model, plain = model_of(device), model_of(device)
    opt, expected = two(model, backend), two(plain, backend)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    before = weights(model)
    backward(model, 0, scaler.scale)
    if bad_pass == 1:
        model[2].bias.grad[0] = math.inf
    opt.first_step(zero_grad=True)
    assert (weights(model) == before) == (bad_pass == 1)
    backward(model, 100, scaler.scale)
    if bad_pass == 2:
        model[2].bias.grad[0] = math.inf
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == (1024.0 if bad_pass == 1 else 512.0)
    if bad_pass == 1:
        backward(plain, 100)
        expected.base_step()
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            assert_same(a, b)
    else:
        assert weights(model) == before
    for holder in (opt, *opt.optimizers):
        assert not hasattr(holder, "found_inf") and not hasattr(holder, "grad_scale")


def test_a_method_sees_that_nothing_climbed():
    """WSAM adds a multiple of g2 - g1, which is no sharpness where another part's overflow kept all at w."""
    model, plain = model_of(), model_of()
    first, last = halves(model)
    opt = fastsam.joint(methods.WSAM(first, lr=0.1), FusedSAM(last, lr=0.1))
    backward(model, 0)
    model[2].bias.grad[0] = math.inf
    opt.first_step(zero_grad=True)
    backward(model, 100)
    opt.step()
    backward(plain, 100)
    torch.optim.SGD(plain[0].parameters(), lr=0.1).step()
    for a, b in zip(first, plain[0].parameters(), strict=True):
        assert_same(a, b)


def test_a_scaled_run_is_the_unscaled_one():
    model, plain = model_of(), model_of()
    opt, expected = two(model), two(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for seed in range(3):
        opt.zero_grad()
        backward(model, seed, scaler.scale)
        opt.first_step(zero_grad=True, scaler=scaler)
        backward(model, seed + 100, scaler.scale)
        if seed == 1:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        take(plain, expected, seed)
    assert weights(model) == weights(plain)
    with pytest.raises(RuntimeError, match="cannot unscale the closure's gradients"):
        scaler.step(opt, lambda: None)


def test_saved_and_resumed_half_way():
    model = model_of()
    opt = two(model, when=when.every(2))
    for seed in range(3):
        take(model, opt, seed)
    saved = pickle.loads(pickle.dumps((model.state_dict(), opt.state_dict())))
    again = model_of()
    resumed = two(again, when=when.every(2))
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for seed in range(3, 7):
        take(model, opt, seed)
        take(again, resumed, seed)
    assert weights(model) == weights(again)
    assert [group["sam_steps"] for group in resumed.state_dict()["param_groups"]] == [7, 7]


def test_its_checkpoint_is_that_of_one_optimizer():
    ours, theirs = Mixed(), Mixed()
    opt = fastsam.joint(*(FusedSAM(half, **SGD) for half in halves(ours)))
    one = FusedSAM([{"params": half} for half in halves(theirs)], **SGD)
    take(ours, opt, 0)
    one.load_state_dict(copy.deepcopy(opt.state_dict()))
    theirs.load_state_dict(ours.state_dict())
    take(ours, opt, 1)
    take(theirs, one, 1)
    assert weights(ours) == weights(theirs)
    opt.load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match=r"parameter groups of \[2, 2\] parameters, .* got \[4\]"):
        opt.load_state_dict(torch.optim.SGD(theirs.parameters(), lr=0.1).state_dict())
    backward(ours, 2)
    opt.first_step()
    with pytest.raises(RuntimeError, match="needs the unperturbed weights"):
        opt.state_dict()


def test_distributed_checkpoints_take_it_for_one_optimizer():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, again = model_of(), model_of()
    opt, resumed = two(model), two(again)
    take(model, opt, 0)
    saved = copy.deepcopy(get_optimizer_state_dict(model, opt))
    assert set(saved["state"]) == {name for name, _ in model.named_parameters()}
    again.load_state_dict(model.state_dict())
    set_optimizer_state_dict(again, resumed, saved)
    take(model, opt, 1)
    take(again, resumed, 1)
    assert weights(model) == weights(again)


def test_copies_are_joint_optimizers_of_their_own():
    model = model_of()
    opt = two(model)
    take(model, opt, 0)
    model2, opt2 = copy.deepcopy((model, opt))
    model3, opt3 = pickle.loads(pickle.dumps((model, opt)))
    for m, o in ((model, opt), (model2, opt2), (model3, opt3)):
        take(m, o, 1)
    assert weights(model) == weights(model2) == weights(model3)
    with pytest.raises(RuntimeError, match="shares its norm with others"):
        opt3.optimizers[0].first_step()


@pytest.mark.parametrize("schedule", [lambda o: StepLR(o, 2, 0.5), lambda o: OneCycleLR(o, 0.2, total_steps=8)])
def test_schedulers(schedule):
    """One on the joint is one on each part."""
    model, other = model_of(), model_of()
    opt, parts = (fastsam.joint(*(FusedSAM(half, rho=0.2, **SGD) for half in halves(m))) for m in (model, other))
    on_joint, on_parts = schedule(opt), [schedule(part) for part in parts.optimizers]
    rates = set()
    for seed in range(5):
        take(model, opt, seed)
        take(other, parts, seed)
        for scheduler in (on_joint, *on_parts):
            scheduler.step()
        rates.add(opt.param_groups[0]["lr"])
        assert [g["lr"] for g in opt.param_groups] == [g["lr"] for g in parts.param_groups]
    assert len(rates) > 1 and weights(model) == weights(other)


class Failing(FusedSAM):
    """Raises where it is told to."""

    fails = False

    def ascent(self, g1):
        if self.fails:
            raise ArithmeticError("asked for")
        return g1


@pytest.mark.parametrize("where", ["first", "last", "closure", "forward"])
def test_an_exception_restores_all(where):
    model = model_of()
    opt = fastsam.joint(*(Failing(half, rho=0.3, lr=0.1) for half in halves(model)))
    take(model, opt, 0)
    before, calls = weights(model), iter(range(2))
    if where in ("first", "last"):
        opt.optimizers[0 if where == "first" else 1].fails = True

    def closure() -> None:
        opt.zero_grad()
        backward(model, 1)
        if next(calls) == 1 and where == "closure":
            raise ArithmeticError

    if where == "forward":  # a loop that gives a batch up
        backward(model, 1)
        opt.first_step()
        with pytest.warns(UserWarning, match="called twice"):
            opt.first_step()
        opt.restore()
    else:
        with pytest.raises(ArithmeticError):
            opt.step(closure)
    assert not opt.perturbed and weights(model) == before
    for part in opt.optimizers:
        part.fails = False
    take(model, opt, 2)
    assert weights(model) != before


def test_a_part_that_fails_to_step_leaves_no_weight_perturbed():
    model = model_of()
    opt = fastsam.joint(*(FusedSAM(half, rho=0.3, lr=0.1) for half in halves(model)))

    def hook(*_) -> None:
        raise ArithmeticError

    handle = opt.optimizers[0].base_optimizer.register_step_pre_hook(hook)
    before = weights(model)
    with pytest.raises(ArithmeticError):
        take(model, opt, 0)
    assert not opt.perturbed and weights(model) == before
    handle.remove()
    take(model, opt, 1)


def test_steps_of_one_pass():
    model, other = model_of(), model_of()
    opt, alone = two(model, when=when.after(2)), two(other)
    opt.zero_grad()
    backward(model, 0)
    assert not opt.begin_step() and not opt.first_step() and not opt.first_step()
    opt.step()
    backward(other, 0)
    alone.base_step()
    assert weights(model) == weights(other)
    calls = []
    opt.step(lambda: (opt.zero_grad(), calls.append(0), backward(model, 1))[2])
    assert len(calls) == 1
    take(model, opt, 2)


def test_optimizers_that_disagree_on_the_passes():
    model = model_of()
    first, last = halves(model)
    opt = fastsam.joint(FusedSAM(first, lr=0.1), FusedSAM(last, lr=0.1, when=when.after(1)))
    backward(model, 0)
    with pytest.raises(RuntimeError, match=r"optimizer 0 \(FusedSAM\) 2, optimizer 1 \(FusedSAM\) 1; give all"):
        opt.first_step()
    assert not opt.perturbed


def test_gradients_there_before_the_closure():
    model, other = model_of(), model_of()
    opt, expected = two(model, closure_calls=1), two(other)
    with pytest.raises(RuntimeError, match="needs the gradients at w before"):
        opt.step(lambda: None)
    backward(model, 0)
    opt.step(lambda: backward(model, 100))
    take(other, expected, 0)
    assert weights(model) == weights(other)


def test_loops_that_are_wrong_are_told():
    model = model_of()
    opt = two(model)
    opt.step()  # nothing to do
    with pytest.raises(RuntimeError, match="does not clear the gradients"):
        opt.step(lambda: backward(model, 0))
    with pytest.raises(RuntimeError, match=r"step\(\) needs a closure, or first_step\(\) before it"):
        opt.step()
    for part in opt.optimizers:
        with pytest.raises(RuntimeError, match="shares its norm with others"):
            part.first_step()
    with pytest.raises(ValueError, match="must be added to one of the optimizers"):
        opt.add_param_group({"params": []})
    first = opt.optimizers[0]
    del opt, part
    gc.collect()
    assert first.first_step(zero_grad=True)
    first.restore()


def test_groups_and_state_are_live():
    model = model_of()
    opt = two(model)
    take(model, opt, 0)
    extra = nn.Parameter(torch.ones(3))
    opt.optimizers[1].add_param_group({"params": [extra], "rho": 0.1})
    assert len(opt.param_groups) == 3 and opt.param_groups[2] is opt.optimizers[1].param_groups[1]
    assert set(opt.state) == set(model.parameters()) and len(opt.state) == 4
    weight = model[2].weight
    opt.state[weight]["exp_avg"].zero_()
    assert float(opt.optimizers[1].state[weight]["exp_avg"].abs().sum()) == 0
    del opt.state[weight]
    assert weight not in opt.state and extra not in opt.state
    opt.param_groups = list(opt.param_groups)
    with pytest.raises(ValueError, match="there must be 3 parameter groups, got 1"):
        opt.param_groups = [{}]
    with pytest.raises(KeyError):
        opt.state[nn.Parameter(torch.ones(1))]
    opt.prepare()
    opt.refresh()
    take(model, opt, 1)
    assert "optimizer 1 (FusedSAM): " in repr(opt)


def test_a_parameter_cannot_be_added_to_a_second_part():
    model = model_of()
    opt = two(model)
    with pytest.raises(ValueError, match=r"of shape \[90, 5\] is in optimizer 0 .* and in optimizer 1"):
        opt.optimizers[1].add_param_group({"params": [model[0].weight]})
    assert len(opt.param_groups) == 2
    take(model, opt, 0)


def test_a_checkpoint_that_does_not_fit_loads_nothing():
    model, other = model_of(), model_of()
    opt, expected = two(model), two(other)
    for seed in range(2):
        take(model, opt, seed)
        take(other, expected, seed)
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["momentum_buffer"].zero_()
    last = max(saved["state"])
    key = next(key for key, value in saved["state"][last].items() if value.dim() > 0)
    saved["state"][last][key] = torch.zeros(99)
    with pytest.raises(ValueError, match=rf"state\['{key}'\] of .* got \[99\]; .* Nothing was loaded"):
        opt.load_state_dict(saved)
    take(model, opt, 2)
    take(other, expected, 2)
    assert weights(model) == weights(other)


class Dividing(FusedSAM):
    def ascent(self, g1):
        self.divide_by(self.squared_norm(g1))
        return g1


REFUSED = [
    (lambda a, b: [FusedSAM(a, lr=0.1)], "takes two or more FusedSAM optimizers, got 1"),
    (lambda a, b: [FusedSAM(a, lr=0.1), torch.optim.SGD(b, lr=0.1)], r"got optimizer 1 \(SGD\); wrap it"),
    (lambda a, b: [FusedSAM(a, lr=0.1), FusedSAM(b, lr=0.1, p=3)], "p must be the same .* 2.0 .* and 3"),
    (lambda a, b: [FusedSAM(a, lr=0.1, closure_calls=1), FusedSAM(b, lr=0.1)], "closure_calls must be the"),
    (
        lambda a, b: [FusedSAM(a, lr=0.1), methods.MSAM(b, "adamw")],
        r"optimizer 1 \(MSAM\) cannot be joint: it pert",
    ),
    (
        lambda a, b: [methods.PreconditionedSAM(a, "adamw"), FusedSAM(b)],
        r"\(PreconditionedSAM\) cannot be joint",
    ),
    (
        lambda a, b: [FusedSAM(a, lr=0.1, max_grad_norm=1.0), FusedSAM(b, lr=0.1)],
        "has max_grad_norm=1.0",
    ),
    (lambda a, b: [FusedSAM(a, lr=0.1, renormalize=True), FusedSAM(b, lr=0.1)], "has renormalize=True"),
    (lambda a, b: [FusedSAM(a, lr=0.1, when=when.by_grad_norm()), FusedSAM(b, lr=0.1)], "has when=.*gradients alone"),
    (lambda a, b: [FusedSAM(a, lr=0.1), FusedSAM([*b, a[0]], lr=0.1)], r"of shape \[90, 5\] is in optimizer 0"),
    (lambda a, b: 2 * [FusedSAM(a, lr=0.1)], "is joint already"),
]


@pytest.mark.parametrize("make, message", REFUSED, ids=[message[:30] for _, message in REFUSED])
def test_what_cannot_be_joint(make, message):
    with pytest.raises(ValueError, match=f"fastsam.joint: .*{message}"):
        fastsam.joint(*make(*halves(model_of())))


def test_what_is_joint_already_and_what_divides_by_a_number():
    model = model_of()
    first, last = halves(model)
    a, b = FusedSAM(first, lr=0.1), Dividing(last, lr=0.1)
    opt = fastsam.joint(a, b)
    with pytest.raises(ValueError, match="is joint already"):
        fastsam.joint(b, a)
    before = weights(model)
    backward(model, 0)
    with pytest.raises(RuntimeError, match="Dividing divides by a number of its own"):
        opt.first_step()
    assert not opt.perturbed and weights(model) == before
