"""Perturbations in another norm than the second, and those of the loss with its weight decay."""

from __future__ import annotations

import math

import cases
import numpy as np
import pytest
import torch
from oracle import bits
from torch.nn import Parameter

from fastsam import FusedSAM

NAMES = ["matrix", "empty", "63", "above a chunk", "transposed", "two chunks and a row"]
NAMES = NAMES[2:4] if cases.interpreted() else NAMES  # the interpreter is slow
KINDS = {"sam": {}, "asam": dict(adaptive=True), "asam_eta": dict(adaptive=True, eta=0.03)}
RHO = 0.7


def climbed(backend, device, dtype=torch.float32, scale=1.0, **options):
    """Weights, gradients and the perturbation, in float64."""
    params = cases.make_params(dtype, NAMES, device=device)
    before = [p.detach().double().clone() for p in params]
    opt = FusedSAM(params, torch.optim.SGD, rho=RHO, lr=0.1, backend=backend, **options)
    for i, p in enumerate(params):
        p.grad = cases.gradient(p, i) * scale
    opt.first_step()
    e = [p.detach().double() - w for p, w in zip(params, before, strict=True)]
    opt.restore()
    assert all(torch.equal(p.detach().double(), w) for p, w in zip(params, before, strict=True))
    return before, [p.grad.double() for p in params], e


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors]).cpu()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [1.1, 1.5, 2.0, 3.0, 8.0, math.inf])
def test_length_rho_and_steepest_ascent(backend, device, p, kind):
    """||e / T||_p = rho, and <g, e> = rho ||T g||_q, the most that it can be (Hoelder)."""
    before, grads, e = climbed(backend, device, torch.float64, p=p, **KINDS[kind])
    q = 1.0 if p == math.inf else p / (p - 1)
    w, g, e = flat(before), flat(grads), flat(e)
    t = w.abs() + KINDS[kind].get("eta", 0.0) if kind != "sam" else torch.ones_like(w)
    assert torch.linalg.vector_norm(e / t, p).item() == pytest.approx(RHO, rel=1e-7)
    assert torch.dot(g, e).item() == pytest.approx(RHO * torch.linalg.vector_norm(t * g, q).item(), rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [1.1, 1.5, 3.0, math.inf])
def test_other_precisions_are_as_close_as_their_last_place(backend, device, p, dtype):
    before, grads, _ = climbed(backend, device, dtype, p=p, adaptive=True, eta=0.03)
    w, g = flat(before), flat(grads)
    t, q = w.abs() + 0.03, 1.0 if p == math.inf else p / (p - 1)
    x = t * g
    ratio = torch.ones_like(x) if q == 1 else (x.abs() / torch.linalg.vector_norm(x, q)) ** (q - 1)
    expected = w + RHO * t * x.sign() * ratio
    e = flat(climbed(backend, device, dtype, p=p, adaptive=True, eta=0.03)[2])
    # T g and w + e are rounded, to float32 and to the weights' dtype; the power q - 1 <= 10 multiplies the first error.
    torch.testing.assert_close(w + e, expected, rtol=2 * torch.finfo(dtype).eps, atol=2e-6)


def test_p_2_is_the_default_bit_for_bit_and_the_loss_scale_cancels(backend, device):
    plain, two = climbed(backend, device)[2], climbed(backend, device, p=2.0)[2]
    assert [bits(e) for e in plain] == [bits(e) for e in two]
    for p in (1.5, math.inf):
        a, b = (flat(climbed(backend, device, p=p, scale=s)[2]) for s in (1.0, 1024.0))
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_gradients_that_are_not_finite(backend, device, bad):
    """p = inf has no norm that would tell: such elements stay, the others climb. Otherwise nothing climbs."""
    for p, others in ((math.inf, 1.5), (3.0, 1.0)):
        w = Parameter(torch.ones(4, device=device))
        opt = FusedSAM([w], torch.optim.SGD, rho=0.5, lr=0.1, p=p, backend=backend)
        w.grad = torch.tensor([2.0, bad, 0.0, 3.0], device=device)
        opt.first_step()
        assert w.tolist() == [others, 1.0, 1.0, others]
        opt.restore()
        assert (w == 1).all()


def test_zero_gradients_perturb_nothing(backend, device):
    for p in (1.5, 4.0, math.inf):
        w = Parameter(torch.ones(4, device=device))
        opt = FusedSAM([w], torch.optim.SGD, rho=0.5, lr=0.1, p=p, backend=backend)
        w.grad = torch.zeros_like(w)
        opt.first_step()
        assert (w == 1).all()


@pytest.mark.parametrize("wrong", [1.0, 0.5, -2.0, math.nan])
def test_norms_without_a_dual_one_are_refused(wrong):
    with pytest.raises(ValueError, match=r"p must be in \(1, inf\], got"):
        FusedSAM([Parameter(torch.ones(2))], torch.optim.SGD, p=wrong)


# ---- p from 1.001 (q = 1001) to 1e6, gradients from 1e-8 to 1e8: sum(abs(g)^q) itself has no range for that.

PS = [1.001, 1.01, 1.1, 1.5, 3.0, 1e3, 1e6]
SCALES = [1e-8, 1.0, 1e8]
if cases.interpreted():  # a second each
    PS, SCALES = [1.001, 3.0, 1e6], [1e-8, 1e8]
DTYPES = torch.float32, torch.bfloat16, torch.float64  # a bucket each
LENGTHS = [8192 + 65, 1, 0, 300] if cases.interpreted() else [2 * 8192 + 65, 1, 0, 300]


def in_logarithms(t, g, p):
    """The perturbation of length RHO and the norm, for T and gradients [n] in float64: sums of powers as logarithms.

    NORM_EPS shortens the perturbation as it does for p = 2: rho g / (norm + eps) is norm / (norm + eps) too short.
    """
    t, g = t.numpy(), g.numpy()
    with np.errstate(divide="ignore"):
        size = np.log(t) + np.log(np.abs(g))
    largest, q = size.max(), p / (p - 1)
    norm = largest + np.log(np.exp(q * (size - largest)).sum()) / q
    length = RHO * np.exp(norm) / (np.exp(norm) + 1e-12)
    return torch.from_numpy(length * t * np.sign(g) * np.exp((size - norm) / (p - 1))), np.exp(norm)


def near_the_largest(n, dtype, seed, scale):
    """Gradients of which every second is close to the largest, where p near 1 still sees it; some are 0."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(n, generator=generator, dtype=torch.float64).clamp(-3, 3)
    close = 1 - (1e-3 * seed + torch.rand(n, generator=generator, dtype=torch.float64)) / 100
    g[::2] = 4 * close[::2] * torch.where(g[::2] < 0, -1, 1)
    g[5::7] = 0
    g[3::11] *= 1e-30
    return (g * scale).to(dtype)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("p", PS)
def test_every_p_and_every_size_of_gradients(backend, device, p, scale):
    shapes = [(n, dtype) for dtype in DTYPES for n in LENGTHS]
    params = [Parameter(torch.zeros(n, dtype=dtype, device=device)) for n, dtype in [*shapes, (300, torch.float32)]]
    opt = FusedSAM(params, torch.optim.SGD, rho=RHO, lr=0.1, p=p, backend=backend)
    grads = [near_the_largest(n, dtype, i, scale) for i, (n, dtype) in enumerate(shapes)]
    grads += [torch.zeros(300)]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.to(device)
    opt.first_step()
    g = torch.cat([grad.double() for grad in grads])
    expected, norm = in_logarithms(torch.ones_like(g), g, p)
    for param, e in zip(params, expected.split([len(grad) for grad in grads]), strict=True):
        # The weights are 0, so w + e is e, rounded: twice to bfloat16. The power turns 2^-53 into some 1000 of these.
        precision = max(2 * torch.finfo(param.dtype).eps, 1e-10)
        torch.testing.assert_close(param.detach().double().cpu(), e, rtol=precision, atol=1e-40)
    assert opt.stats().first_norm.item() == pytest.approx(norm, rel=1e-10)
    assert opt.stats().first_overflows.item() == 0
    opt.restore()
    assert not any(param.any() for param in params)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("p", PS)
def test_every_p_with_the_weights_metric(backend, device, p, scale):
    """T in the compute type, T g in float64: rounded to float32, p = 1.001 shows it a thousandfold."""
    for dtype, rtol, atol in ((torch.float32, 1e-6, 5e-7), (torch.float64, 1e-9, 1e-14)):
        before, grads, e = climbed(backend, device, dtype, scale, p=p, **KINDS["asam_eta"])
        t = (flat(before).to(dtype).abs() + 0.03).double()
        expected, _ = in_logarithms(t, flat(grads), p)
        torch.testing.assert_close(flat(e), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("p", [1.001, 3.0, 1e6])
def test_one_element_that_is_not_finite_is_noticed(backend, device, p, bad):
    params = [Parameter(torch.ones(n, dtype=dtype, device=device)) for n in LENGTHS for dtype in DTYPES]
    opt = FusedSAM(params, torch.optim.SGD, rho=RHO, lr=0.1, p=p, backend=backend)
    for count, place in enumerate((1, 3), start=1):  # in the last of two or more chunks, as the only element of one
        for i, param in enumerate(params):
            param.grad = torch.full_like(param, float(i))
        params[place].grad[-1] = bad
        opt.first_step()
        assert all((param == 1).all() for param in params)
        stats = opt.stats()
        assert stats.first_norm.isnan() if math.isnan(bad) else stats.first_norm == math.inf
        assert stats.first_overflows.item() == count
        opt.restore()


@pytest.mark.parametrize("p", PS)
def test_no_gradient_at_all_has_a_norm_of_0(backend, device, p):
    params = [Parameter(torch.ones(n, device=device)) for n in LENGTHS]
    opt = FusedSAM(params, torch.optim.SGD, rho=RHO, lr=0.1, p=p, backend=backend)
    for param in params:
        param.grad = torch.zeros_like(param)
    opt.first_step()
    assert all((param == 1).all() for param in params)
    assert (opt.stats().first_norm.item(), opt.stats().first_overflows.item()) == (0, 0)


# ---- perturb_with_weight_decay.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, dict(maximize=True), dict(p=3.0)], ids=str)
def test_perturbs_as_if_the_decay_were_in_the_loss(backend, device, options, kind):
    """The same weights as from gradients that hold the decay already."""
    runs = []
    sign = -1 if options.get("maximize") else 1
    for inside in (True, False):
        params = cases.make_params(torch.float32, NAMES, device=device)
        groups = [dict(params=params[:3], weight_decay=0.3), dict(params=params[3:], weight_decay=0.0)]
        opt = FusedSAM(
            groups, torch.optim.SGD, rho=RHO, lr=0.1, perturb_with_weight_decay=inside, backend=backend,
            **options, **KINDS[kind],
        )  # fmt: skip
        for i, p in enumerate(params):
            p.grad = cases.gradient(p, i)
            if not inside and i < 3:
                p.grad.add_(p.detach(), alpha=sign * 0.3)
        opt.first_step()
        runs.append([p.detach().clone() for p in params])
        opt.restore()
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(runs[0][0], cases.make_params(torch.float32, NAMES, device=device)[0])


def test_by_default_the_decay_is_outside(backend, device):
    runs = []
    for weight_decay in (0.0, 0.5):
        w = Parameter(torch.tensor([1.0, 2.0], device=device))
        opt = FusedSAM([w], torch.optim.SGD, rho=0.5, lr=0.1, weight_decay=weight_decay, backend=backend)
        w.grad = torch.tensor([3.0, -4.0], device=device)
        opt.first_step()
        runs.append(bits(w))
    assert runs[0] == runs[1]
