"""What is taken although it is odd, and what is refused by name with what to do instead."""

from __future__ import annotations

import copy

import cases
import oracle
import pytest
import torch
from oracle import assert_same, bits
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, AdamW

from fastsam import FusedSAM

NAMES = ["matrix", "scalar", "63", "transposed", "above a chunk"]


# A base whose groups hold other things than numbers.


class Plain(torch.optim.Optimizer):
    """A base that reads nothing of its groups."""

    def __init__(self, params, **defaults):
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=0.1)


NO_NUMBERS = {
    "lr=None": dict(lr=None),
    "no lr": dict(),
    "lr a tuple": dict(lr=(0.1, 0.2)),
    "lr a string": dict(lr="auto"),
    "lr a function": dict(lr=lambda step: 0.1),
    "lr two numbers in a tensor": dict(lr=torch.tensor([0.1, 0.2])),
    "weight_decay=None": dict(lr=0.1, weight_decay=None),
    "weight_decay a tuple": dict(lr=0.1, weight_decay=(0.1, 0.2)),
    "weight_decay a dict": dict(lr=0.1, weight_decay={"kernel": 0.1}),
}
each_odd_group = pytest.mark.parametrize("options", NO_NUMBERS.values(), ids=list(NO_NUMBERS))


@pytest.mark.parametrize("kwargs", [{}, dict(max_grad_norm=100.0), dict(p=3.0)], ids=["plain", "clipped", "p=3"])
@pytest.mark.parametrize("way", ["closure", "two calls", "base_step"])
@each_odd_group
def test_a_base_without_numbers_for_lr_and_weight_decay(backend, device, options, way, kwargs):
    p = Parameter(torch.ones(2, device=device))
    opt = FusedSAM([p], Plain, rho=0.05, backend=backend, **options, **kwargs)

    def closure():
        p.grad = torch.ones_like(p)

    if way == "closure":
        opt.step(closure)
    elif way == "two calls":
        closure(), opt.first_step(), closure(), opt.step()
    else:
        closure(), opt.base_step()
    torch.testing.assert_close(p.detach().cpu(), torch.full((2,), 0.9))
    opt.load_state_dict(opt.state_dict()), opt.refresh(), opt.prepare(), opt.stats(), copy.deepcopy(opt)


@each_odd_group
def test_a_step_without_first_step_is_refused_there_too(options):
    p = Parameter(torch.ones(2))
    opt = FusedSAM([p], Plain, **options)
    p.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="first_step"):
        opt.step()


@pytest.mark.parametrize("lr", [0, 0.0, torch.tensor(0.0), torch.zeros(1)])
def test_an_lr_of_0_in_any_form_lets_the_base_step_alone(lr):
    p = Parameter(torch.ones(2))
    opt = FusedSAM([p], Plain, lr=lr)
    p.grad = torch.ones(2)
    opt.step()
    torch.testing.assert_close(p.detach(), torch.full((2,), 0.9))


def test_a_relative_adafactor():
    class Adafactor(Plain):
        def __init__(self, params, lr=None, relative_step=True):
            super().__init__(params, lr=lr, relative_step=relative_step)

    p = Parameter(torch.ones(2))
    opt = FusedSAM([p], Adafactor, rho=0.3)
    p.grad = torch.ones(2)
    opt.first_step()
    torch.testing.assert_close(p.detach(), 1 + 0.3 * torch.full((2,), 0.5**0.5))
    opt.step()


@pytest.mark.parametrize("decay", [(0.1, 0.2), "auto", torch.tensor([0.1, 0.2])], ids=["tuple", "string", "tensor"])
def test_climbing_along_a_decay_that_is_no_number_is_refused(decay):
    p = Parameter(torch.ones(2))
    opt = FusedSAM([p], Plain, weight_decay=decay, perturb_with_weight_decay=True)
    with pytest.raises(ValueError, match=r"perturb_with_weight_decay=True needs a number.*use perturb_with"):
        opt.step(lambda: setattr(p, "grad", torch.ones(2)))


@pytest.mark.parametrize("decay", [0.5, None, torch.tensor(0.5)], ids=["number", "None", "tensor"])
def test_climbing_along_a_decay_of_a_base_that_is_not_fused(decay):
    p = Parameter(torch.tensor([1.0, 0.0]))
    opt = FusedSAM([p], Plain, rho=0.05, weight_decay=decay, perturb_with_weight_decay=True)
    p.grad = torch.tensor([0.0, 0.5])
    opt.first_step()
    climbed = [0.0, 0.05] if decay is None else [0.05 * 0.5**0.5] * 2
    torch.testing.assert_close(p.detach(), torch.tensor([1.0, 0.0]) + torch.tensor(climbed))


# Another default device or dtype.


def set_default(kind):
    if kind == "meta":
        torch.set_default_device("meta")
    elif kind is not None:
        torch.set_default_dtype(kind)


@pytest.fixture
def defaults():
    """`set_default`, undone after the test."""
    dtype = torch.get_default_dtype()
    yield set_default
    torch.set_default_device(None)
    torch.set_default_dtype(dtype)


DEFAULTS = pytest.mark.parametrize("kind", ["meta", torch.float64, torch.bfloat16], ids=str)
OPTIONS = [
    cases.Config("sgd", SGD, dict(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.01, rho=0.2)),
    cases.Config("adamw", AdamW, dict(lr=0.01, weight_decay=0.1, amsgrad=True, rho=0.2, adaptive=True, eta=0.01)),
    cases.Config("nadam", torch.optim.NAdam, dict(lr=0.01, momentum_decay=0.02, rho=0.2, max_grad_norm=1.0)),
    cases.Config("radam", torch.optim.RAdam, dict(lr=0.01, betas=(0.8, 0.95), rho=0.2, p=3.0)),
    cases.Config("rprop", torch.optim.Rprop, dict(lr=0.01, rho=0.2)),
    cases.Config("rmsprop", torch.optim.RMSprop, dict(lr=0.01, momentum=0.5, centered=True, rho=0.2, flatten=True)),
    cases.Config("masters", AdamW, dict(lr=0.01, rho=0.2, master_weights=True)),
    cases.Config("stochastic", AdamW, dict(lr=0.01, rho=0.2, stochastic_rounding=True, rounding_seed=5)),
    cases.Config("states", SGD, dict(lr=0.1, momentum=0.9, rho=0.2, state_dtype=torch.bfloat16)),
]


def trained(config, backend, device, kind, when):
    """Weights and states after a few steps, with a default set before the optimizer, before its second step or not."""
    dtype = torch.bfloat16 if config.name in ("masters", "stochastic") else torch.float32
    params = cases.make_params(dtype, NAMES, device=device)
    grads = [[cases.gradient(p, 10 * i + k, coupling=0) for k, p in enumerate(params)] for i in range(10)]
    found = torch.ones(()), torch.full((), 1024.0)

    def step(opt, i):
        for pass_ in range(2):
            for p, g in zip(params, grads[2 * i + pass_], strict=True):
                p.grad = g
            opt.step() if pass_ else opt.first_step()

    set_default(kind if when == "before" else None)
    opt = cases.fused(params, config, backend)
    step(opt, 0)
    set_default(kind)
    step(opt, 1)
    params[0].data = params[0].data.clone()  # tables are made anew
    step(opt, 2)
    if config.name != "rprop":  # torch's own Rprop makes tensors on the default device
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    step(opt, 3)
    opt.found_inf, opt.grad_scale = (scalar.to(device) for scalar in found)
    step(opt, 4)
    opt.stats(), opt.refresh(), opt.prepare()
    return params, opt.state_dict()["state"]


@pytest.mark.parametrize("when", ["before", "later"])
@DEFAULTS
@pytest.mark.parametrize("config", **cases.ids(OPTIONS))
@pytest.mark.filterwarnings("ignore:FusedSAM. param_groups.* is no longer in the flat buffer")
def test_another_default_device_or_dtype_changes_nothing(backend, device, defaults, config, kind, when):
    expected, state = trained(config, backend, device, None, when)
    found, other = trained(config, backend, device, kind, when)
    torch.set_default_device(None)
    for p, q in zip(found, expected, strict=True):
        assert_same(p, q)
    assert {k: set(v) for k, v in other.items()} == {k: set(v) for k, v in state.items()}
    for k, entry in state.items():
        for name, value in entry.items():
            if isinstance(value, Tensor) and config.name != "rprop":
                assert other[k][name].device == value.device
                assert_same(other[k][name], value, what=name)
