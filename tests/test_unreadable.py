"""Tensors whose memory does not hold their values, or that have none: lazily conjugated, negated, wrapped."""

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, AdamW

from fastsam import FusedSAM

STEPS = 3
OPTIONS = {SGD: dict(lr=0.07, momentum=0.8, dampening=0.3, weight_decay=0.02), AdamW: dict(lr=0.03, weight_decay=0.1)}


def complex_values(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))


VIEWS = {
    "conjugated": lambda seed=0: complex_values(4, 3, seed=seed).conj(),
    "conjugated and transposed": lambda seed=0: complex_values(4, 3, seed=seed).mH,
    "conjugated 0-dim": lambda seed=0: complex_values(1, seed=seed)[0].conj(),
    "negated": lambda seed=0: torch._neg_view(complex_values(4, 3, seed=seed).real.contiguous()),
    "negated with gaps": lambda seed=0: complex_values(4, 3, seed=seed).conj().imag,
    "negated 0-dim": lambda seed=0: complex_values(1, seed=seed)[0].conj().imag,
    "negated of one element": lambda seed=0: complex_values(1, seed=seed).conj().imag,
    "negated of one element in three dimensions": lambda seed=0: complex_values(1, 1, 1, seed=seed).conj().imag,
}


def resolved(tensor):
    """The same values, in memory of their own."""
    return tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)


def train(params, gradients, base, backend, **options):
    """The weights and states after some steps with the gradients (step, pass, parameter) -> tensor."""
    opt = FusedSAM(params, base, rho=0.3, backend=backend, **OPTIONS[base], **options)
    for step in range(STEPS):
        for i, half in enumerate((opt.first_step, opt.step)):
            for j, p in enumerate(params):
                p.grad = gradients(step, i, j)
            half()
    states = [opt.state[p] for p in params]
    return [resolved(p) for p in params], [{k: resolved(v) for k, v in held.items()} for held in states]


def assert_same_run(found, expected):
    torch.testing.assert_close(found[0], expected[0])
    assert [held.keys() for held in found[1]] == [held.keys() for held in expected[1]]
    torch.testing.assert_close(found[1], expected[1])


# torch makes a negated tensor only as the imaginary part of a conjugate, which is dense with one element alone. The
# first of these is made by a private function: as a gradient, no kernel can tell it from others.
PRIVATE = "negated"


@pytest.mark.parametrize("base", OPTIONS)
@pytest.mark.parametrize("name", [name for name in VIEWS if name != PRIVATE])
def test_gradients_that_are_lazy_views_count_by_their_values(backend, device, base, name):
    runs = [
        train(
            [Parameter(resolved(VIEWS[name](seed=99)).to(device))],
            lambda step, i, j, change=change: change(VIEWS[name](seed=10 * step + i).to(device)),
            base,
            backend,
        )
        for change in (lambda grad: grad, resolved)
    ]
    assert_same_run(*runs)


@pytest.mark.parametrize("base", OPTIONS)
@pytest.mark.parametrize("name", VIEWS)
def test_parameters_that_are_lazy_views_are_stepped_by_their_values(backend, device, base, name):
    def make(seed):
        return VIEWS[name](seed).to(device)

    def gradients(step, i, j):
        return resolved(make(10 * step + i)) if j == 0 else torch.full((5,), 0.5 + step + i, device=device)

    runs = [
        train([Parameter(view), Parameter(torch.linspace(-1, 1, 5, device=device))], gradients, base, backend)
        for view in (make(99), resolved(make(99)))
    ]
    assert_same_run(*runs)


class Scaled(Tensor):
    """A wrapper without memory: it holds twice its values, as a quantized weight would hold codes."""

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        out = func(*pytree.tree_map(unwrapped, args), **pytree.tree_map(unwrapped, kwargs or {}))
        if func.__name__.split(".")[0].endswith("_") and isinstance(args[0], Scaled):
            return args[0]
        return pytree.tree_map(lambda t: Scaled(t) if isinstance(t, Tensor) else t, out)

    def __repr__(self):
        return f"Scaled({self.inner})"


def unwrapped(tensor):
    return tensor.inner if isinstance(tensor, Scaled) else tensor


@pytest.mark.parametrize("base", OPTIONS)
def test_trainable_wrappers_are_served_by_the_reference(backend, device, base):
    values, others = torch.linspace(-1, 1, 6, device=device).view(2, 3), torch.linspace(-2, 2, 5, device=device)

    def run(wrap):
        params = [Parameter(wrap(values.clone())), Parameter(others.clone())]
        opt = FusedSAM(params, base, rho=0.3, backend=backend, **OPTIONS[base])
        for step in range(STEPS):

            def closure(step=step):
                opt.zero_grad()
                ((params[0] * (step + 1.0)).pow(2).sum() + params[1].pow(2).sum()).backward()

            opt.step(closure)
        return [unwrapped(p.detach()).clone() for p in params]

    for a, b in zip(run(Scaled), run(lambda x: x), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_that_are_wrappers_are_read_by_their_values(backend, device):
    def gradients(wrap):
        return lambda step, i, j: wrap(torch.linspace(-1, 1, 7, device=device) * (1 + step + i))

    plain = train([Parameter(torch.linspace(0, 1, 7, device=device))], gradients(lambda g: g), SGD, backend)
    wrapped = train([Parameter(torch.linspace(0, 1, 7, device=device))], gradients(Scaled), SGD, backend)
    assert_same_run(wrapped, plain)


def test_frozen_wrappers_do_not_matter(backend, device):
    frozen = Parameter(Scaled(torch.ones(4, device=device)), requires_grad=False)
    p = Parameter(torch.linspace(0, 1, 7, device=device))
    opt = FusedSAM([frozen, p], SGD, lr=0.5, rho=0.3, backend=backend)
    for half in (opt.first_step, opt.step):
        p.grad = torch.ones_like(p)
        half()
    torch.testing.assert_close(p.detach(), torch.linspace(0, 1, 7, device=device) - 0.5)
    assert frozen.inner.tolist() == [1.0] * 4
