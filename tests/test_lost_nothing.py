"""Promise 6: whatever happens between the two passes, the weights come back."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import cases
import oracle
import pytest
import torch
from oracle import assert_same, bits
from torch.nn import Parameter

from fastsam import FusedSAM

NAMES = ["matrix", "scalar", "63", "transposed", "above a chunk", "channels_last"]
BASES = [
    cases.Config("sgd", torch.optim.SGD, dict(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.01, rho=0.4)),
    cases.Config("asam", torch.optim.SGD, dict(lr=0.1, momentum=0.9, rho=0.4, adaptive=True, eta=0.01)),
    cases.Config("adamw", torch.optim.AdamW, dict(lr=0.01, weight_decay=0.1, amsgrad=True, rho=0.4)),
    cases.Config("unfused", torch.optim.RMSprop, dict(lr=0.01, momentum=0.5, rho=0.4)),
]
pytestmark = pytest.mark.filterwarnings(cases.NO_GRADIENTS)
each_base = pytest.mark.parametrize("config", **cases.ids(BASES))


class Stop(BaseException):
    """Neither an Exception nor anything the package can know."""


@pytest.fixture(params=BASES, ids=[c.name for c in BASES])
def problem(request, backend, device):
    params = cases.make_params(names=NAMES, device=device)
    opt = cases.fused(params, request.param, backend)
    opt.step(cases.closure_of(params, 0, NAMES))  # so that there is state
    return opt, params


def picture(opt: torch.optim.Optimizer, params: list[Parameter]) -> list[bytes]:
    """Every bit of weights and state."""
    state = [torch.as_tensor(value) for entry in oracle.saved_state(opt).values() for value in entry.values()]
    return [bits(t) for t in [*params, *state]]


@pytest.mark.parametrize(
    "error", [ValueError, KeyboardInterrupt, Stop, torch.OutOfMemoryError], ids=lambda e: e.__name__
)
@pytest.mark.parametrize("call", [1, 2])
def test_exceptions_in_the_closure(problem, error, call):
    opt, params = problem
    before, closure, calls = picture(opt, params), cases.closure_of(params, 1, NAMES), []

    def failing():
        calls.append(closure())
        if len(calls) == call:
            raise error("mine")

    with pytest.raises(error, match="mine"):
        opt.step(failing)
    assert len(calls) == call and not opt.perturbed
    assert picture(opt, params) == before
    opt.step(cases.closure_of(params, 2, NAMES))


def test_exception_in_the_closure_after_first_step(problem):
    opt, params = problem
    before = picture(opt, params)
    cases.set_gradients(params, 1, 1, NAMES)
    opt.first_step()

    def failing():
        raise Stop

    with pytest.raises(Stop):
        opt.step(failing)
    assert not opt.perturbed and picture(opt, params) == before


def test_the_base_s_own_refusal_brings_the_weights_back(backend, device):
    class Refuses(torch.optim.SGD):
        def step(self, closure=None):
            raise NotImplementedError("not today")

    params = cases.make_params(names=NAMES, device=device)
    opt = FusedSAM(params, Refuses, lr=0.1, backend=backend)
    before = [bits(p) for p in params]
    with pytest.raises(NotImplementedError, match="not today"):
        opt.step(cases.closure_of(params, 1, NAMES))
    assert not opt.perturbed and [bits(p) for p in params] == before


@each_base
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_overflow_in_pass_1_makes_a_base_step(backend, device, config, bad):
    ours, theirs = cases.make_params(names=NAMES, device=device), cases.make_params(names=NAMES)
    opt, base = cases.fused(ours, config, backend), cases.by_hand(theirs, config).base
    before = [bits(p) for p in ours]
    cases.set_gradients(ours, 0, 1, NAMES)
    ours[2].grad[5] = bad
    opt.first_step()
    assert [bits(p) for p in ours] == before
    for params in (ours, theirs):
        cases.set_gradients(params, 0, 2, NAMES)
    opt.second_step()
    base.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach().cpu(), b.detach())
    oracle.assert_same_state(opt, base, lambda a, b, what: torch.testing.assert_close(a.cpu(), b))


@each_base
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_overflow_in_pass_2_does_what_torch_does(backend, device, config, bad):
    ours, theirs = cases.make_params(names=NAMES, device=device), cases.make_params(names=NAMES)
    opt, hand = cases.fused(ours, config, backend), cases.by_hand(theirs, config)
    for params, first, second in ((ours, opt.first_step, opt.second_step), (theirs, hand.climb, hand.descend)):
        cases.set_gradients(params, 0, 1, NAMES)
        first()
        cases.set_gradients(params, 0, 2, NAMES)
        params[2].grad[5] = bad
        second()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach().cpu(), b.detach(), equal_nan=True)


@each_base
def test_overflowing_squares_make_a_base_step(backend, device, config):
    # Squares of 1e30 are beyond fp32: documented, and harmless.
    ours, theirs = cases.make_params(names=["63"], device=device), cases.make_params(names=["63"])
    opt, base = cases.fused(ours, config, backend), cases.by_hand(theirs, config).base
    for p in (*ours, *theirs):
        p.data.add_(1.0)
        p.grad = torch.full_like(p, 1e30)
    opt.first_step()
    assert_same(ours[0], theirs[0])
    ours[0].grad, theirs[0].grad = torch.ones_like(ours[0]), torch.ones_like(theirs[0])
    opt.second_step(), base.step()
    torch.testing.assert_close(ours[0].detach().cpu(), theirs[0].detach())


def test_no_second_gradients(problem):
    opt, params = problem
    before = picture(opt, params)
    for _ in range(2):
        cases.set_gradients(params, 1, 1, NAMES)
        opt.first_step(zero_grad=True)
        opt.second_step()
        assert picture(opt, params) == before


def test_no_gradients_at_all(problem):
    opt, params = problem
    for p in params:
        p.grad = None
    before = picture(opt, params)
    opt.first_step(), opt.second_step(), opt.step(), opt.base_step()
    assert opt.step(lambda: 3.0) == 3.0
    assert picture(opt, params) == before


@each_base
def test_learning_rate_0_keeps_every_bit(backend, device, config):
    params = cases.make_params(names=NAMES, device=device)
    opt = cases.fused(params, config._replace(options=dict(config.options, lr=0.0)), backend)
    before, addresses = [bits(p) for p in params], [p.data_ptr() for p in params]
    for step in range(3):
        opt.step(cases.closure_of(params, step, NAMES))
    assert [bits(p) for p in params] == before and [p.data_ptr() for p in params] == addresses


@each_base
def test_restore_keeps_nan_payloads_and_minus_zero(backend, device, config):
    payload = torch.tensor([0x7FC00123, -2147483648, 0x7F800000, 0x3F800000], dtype=torch.int32).view(torch.float32)
    p, q = Parameter(payload.clone().to(device)), Parameter(torch.ones(3, device=device))
    opt = cases.fused([p, q], config, backend)
    before = bits(p), bits(q)
    for leave in (opt.restore, opt.second_step):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        if config.name == "asam":
            p.grad = None  # a NaN weight would make the norm NaN
        opt.first_step(zero_grad=True)
        leave()
        assert (bits(p), bits(q)) == before


REFUSED = {
    "state_dict": lambda opt: opt.state_dict(),
    "load_state_dict": lambda opt: opt.load_state_dict({}),
    "add_param_group": lambda opt: opt.add_param_group(dict(params=[Parameter(torch.ones(2))])),
    "deepcopy": lambda opt: copy.deepcopy(opt),
    "pickle": lambda opt: pickle.dumps(opt),
    "unflatten": lambda opt: opt.unflatten(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_saving_while_perturbed_is_refused_with_the_way_out(problem, name):
    opt, params = problem
    before = picture(opt, params)
    cases.set_gradients(params, 1, 1, NAMES)
    opt.first_step(zero_grad=True)
    perturbed = [bits(p) for p in params]
    with pytest.raises(RuntimeError, match=r"with opt\w*\.unperturbed\(\)"):
        REFUSED[name](opt)
    assert opt.perturbed and [bits(p) for p in params] == perturbed
    opt.second_step()
    assert picture(opt, params) == before
    if name != "load_state_dict":
        REFUSED[name](opt)


def test_a_stale_backup_is_never_read(problem):
    # Whatever was backed up in earlier steps is NaN now: the wrong source would show.
    opt, params = problem
    backups = [segment.backup for bucket in opt._sam.buckets.items for segment in bucket.segments]
    assert len(backups) == len(params)
    for step in range(1, cases.STEPS):
        for backup in backups:
            backup.fill_(math.nan)
        cases.set_gradients(params, step, 1, NAMES)
        if step % 2:
            params[0].grad = None
        if step % 3 == 0 and params[1].grad is not None:
            params[1].grad.fill_(math.inf)
        opt.first_step()
        cases.set_gradients(params, step, 2, NAMES)
        if step % 3 == 1:
            params[2].grad = None
        opt.second_step()
        assert all(bool(p.isfinite().all()) for p in params)


def test_a_step_that_finds_no_gradient_on_any_parameter_warns_once(backend, device):
    # What happens after `model.load_state_dict(..., assign=True)`: the optimizer holds the old Parameter objects.
    model = torch.nn.Linear(3, 2).to(device)
    opt = FusedSAM(model.parameters(), torch.optim.SGD, lr=0.1, backend=backend)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)

    def closure():
        model(torch.ones(1, 3, device=device)).sum().backward()

    with pytest.warns(UserWarning, match="no parameter had a gradient"):
        opt.step(closure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(closure)


class NoMemory:
    """Stands for torch functions that allocate; call number `fails_at` finds no memory."""

    def __init__(self, monkeypatch, fails_at: int) -> None:
        self.calls, self.fails_at = 0, fails_at
        for name in ("empty", "zeros", "cat"):
            monkeypatch.setattr(torch, name, self.wrapped(getattr(torch, name)))

    def wrapped(self, function):
        def allocate(*args, **kwargs):
            self.calls += 1
            if self.calls == self.fails_at:
                raise torch.OutOfMemoryError("no memory")
            return function(*args, **kwargs)

        return allocate


LATE = {
    "at first": dict(),
    "momentum": dict(momentum=0.9),
    "thawed": dict(thaw=True),
    "another dtype": dict(double=True),
    "first gradient": dict(shows=True),
    "perturb": dict(perturb=True),
}


@pytest.mark.parametrize("late", LATE.values(), ids=LATE)
def test_running_out_of_memory_in_any_allocation_can_be_survived(monkeypatch, backend, device, late):
    """What failed is asked for again by the next step, which then is as if nothing had happened."""

    def run(fails_at):
        params = [Parameter(torch.full((n,), 0.5, device=device)) for n in (5, 8200)]
        params[1].requires_grad_("thaw" not in late)
        options = dict(perturb="perturb" not in late, momentum=0.9 if "shows" in late else 0.0)
        opt = FusedSAM(params, torch.optim.SGD, rho=0.3, lr=0.1, backend=backend, **options)
        failed = False
        for step in range(3):
            silent = params[1:] if "shows" in late and step == 0 else []
            if late and step == 1:
                opt.param_groups[0].update({k: v for k, v in late.items() if k in ("momentum", "perturb")})
                params[1].requires_grad_()
                for p in params if "double" in late else ():
                    p.grad, p.data = None, p.data.double()
            before = [bits(p) for p in params]
            for attempt in range(2):
                with monkeypatch.context() as patch:
                    memory = NoMemory(patch, fails_at if step == bool(late) and attempt == 0 else 0)
                    try:
                        opt.step(closure_of_ones(params, opt, silent))
                        break
                    except torch.OutOfMemoryError:
                        failed = True
                assert [bits(p) for p in params] == before and not opt.perturbed
                assert memory.calls > 0
        return [bits(p) for p in params], failed

    expected, _ = run(0)
    fails_at, failed = 0, True
    while failed:
        fails_at += 1
        found, failed = run(fails_at)
        assert found == expected
    assert fails_at > 2


def closure_of_ones(params, opt, silent=()):
    def closure():
        opt.zero_grad()
        for i, p in enumerate(params):
            wanted = p.requires_grad and not any(p is other for other in silent)
            p.grad = torch.full_like(p, 1.0 + i) if wanted else None
        return torch.ones(())

    return closure
