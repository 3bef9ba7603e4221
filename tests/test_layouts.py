"""Parameters and gradients of every layout: tied, empty, strided, with gaps, complex, sparse, moved by the user."""

from __future__ import annotations

import warnings

import cases
import oracle
import pytest
import torch
from oracle import SamByHand, assert_same, bits
from torch.nn import Parameter
from torch.optim import SGD, AdamW

from fastsam import FusedSAM

BASES = [
    cases.Config("sgd", SGD, dict(lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.01, rho=0.3)),
    cases.Config("adamw", AdamW, dict(lr=0.01, betas=(0.8, 0.95), weight_decay=0.1, rho=0.3)),
]
each_base = pytest.mark.parametrize("config", **cases.ids(BASES))

# How a value of shape [6, 5] can lie in memory.
LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.t().contiguous().t(),
    "every second column": lambda t: torch.zeros(6, 10, dtype=t.dtype)[:, ::2].copy_(t),
    "a column block": lambda t: torch.zeros(6, 9, dtype=t.dtype)[:, 2:7].copy_(t),
    "off the start": lambda t: torch.zeros(31, dtype=t.dtype)[1:].view(6, 5).copy_(t),
    "expanded": lambda t: t[:1].expand(6, 5),
}
WRITABLE = [name for name in LAYOUTS if name != "expanded"]


def run_both(config, backend, device, ours, theirs, gradient_of, steps=4, compare=None):
    """Ours in a layout, theirs contiguous; the values must agree."""
    opt = cases.fused(ours, config, backend)
    hand = cases.by_hand(theirs, config, norm="float64")
    for step in range(steps):
        for pass_, climb in ((1, True), (2, False)):
            for params in (ours, theirs):
                for i, p in enumerate(params):
                    p.grad = gradient_of(p, 100 * step + 10 * pass_ + i, params is ours)
            (opt.first_step if climb else opt.second_step)()
            (hand.climb if climb else hand.descend)()
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a.detach().cpu(), b.detach())
    return opt, hand


@each_base
@pytest.mark.parametrize("gradient_layout", LAYOUTS)
@pytest.mark.parametrize("layout", WRITABLE)
def test_layouts_of_parameter_and_gradient(backend, device, config, layout, gradient_layout):
    value = torch.randn(6, 5)
    ours = [Parameter(LAYOUTS[layout](value).to(device)), Parameter(torch.randn(3).to(device))]
    ours[0].data = LAYOUTS[layout](value) if device == "cpu" else ours[0].data
    theirs = [Parameter(value.clone()), Parameter(ours[1].detach().cpu().clone())]
    assert device != "cpu" or ours[0].stride() == LAYOUTS[layout](value).stride()

    def gradient_of(p, seed, is_ours):
        g = cases.gradient(torch.zeros(p.shape), seed, 0.0)
        if p.dim() < 2:
            return g.to(p.device)
        return LAYOUTS[gradient_layout](g).to(p.device) if is_ours else LAYOUTS[gradient_layout](g).contiguous()

    opt, _ = run_both(config, backend, device, ours, theirs, gradient_of)
    for entry in opt.state.values():
        for t in entry.values():
            assert t.dim() == 0 or t.shape in {p.shape for p in ours}


@each_base
def test_neighbours_in_memory_are_left_alone(backend, device, config):
    whole = torch.full((64,), 7.0, device=device)
    p = Parameter(torch.empty(0, device=device))
    p.data = whole[3:40:2]
    opt = cases.fused([p], config, backend)
    for step in range(3):
        opt.step(cases.closure_of([p], step, ["one"]))
    untouched = torch.ones(64, dtype=torch.bool)
    untouched[3:40:2] = False
    assert_same(whole.cpu()[untouched], torch.full((int(untouched.sum()),), 7.0))
    assert not bool((p == 7.0).any())


@each_base
def test_channels_last(backend, device, config):
    value = torch.randn(2, 3, 4, 5)
    for layout in (torch.channels_last, torch.contiguous_format):
        ours = [Parameter(value.clone().contiguous(memory_format=layout).to(device))]
        theirs = [Parameter(value.clone())]
        for gradient_layout in (torch.channels_last, torch.contiguous_format):

            def gradient_of(p, seed, is_ours, gradient_layout=gradient_layout):
                g = cases.gradient(torch.zeros(p.shape), seed, 0.0)
                return g.contiguous(memory_format=gradient_layout).to(p.device) if is_ours else g

            run_both(config, backend, device, ours, theirs, gradient_of, steps=2)
            oracle.hand_over(ours, theirs)


@each_base
def test_state_has_the_parameter_s_strides(backend, device, config):
    p = Parameter(torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).to(device))
    opt = cases.fused([p], config, backend)
    opt.step(cases.closure_of([p], 0, ["one"]))
    for name, t in opt.state[p].items():
        assert name == "step" or (t.shape == p.shape and t.stride() == p.stride())


def test_a_tied_parameter_is_perturbed_once(backend, device):
    shared = Parameter(torch.randn(4, 4, device=device))
    opt = FusedSAM([shared], SGD, rho=0.5, lr=0.1, backend=backend)
    before = shared.detach().clone()
    (shared @ shared).sum().backward()
    opt.first_step()
    assert float((shared.detach() - before).norm()) == pytest.approx(0.5, rel=1e-5)
    opt.restore()
    assert bits(shared) == bits(before)


@each_base
def test_scalars_and_empty_parameters_only(backend, device, config):
    names = ["scalar", "empty", "one"]
    ours, theirs = cases.make_params(names=names, device=device), cases.make_params(names=names)
    opt, hand = cases.fused(ours, config, backend), cases.by_hand(theirs, config)
    for step in range(3):
        opt.step(cases.closure_of(ours, step, names)), hand.step(cases.closure_of(theirs, step, names))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach().cpu(), b.detach())
    assert set(oracle.saved_state(opt)) == set(oracle.saved_state(hand.base)), "an empty parameter counts, too"
    empty = FusedSAM([Parameter(torch.empty(0, device=device))], SGD, lr=0.1, momentum=0.9, backend=backend)
    empty.step(cases.closure_of(empty.param_groups[0]["params"], 0, ["empty"]))


@pytest.mark.filterwarnings(cases.NO_GRADIENTS)
def test_300_tensors(backend, device):
    config = BASES[0]
    values = [torch.randn(1 + i % 37) for i in range(300)]
    ours, theirs = [Parameter(v.clone().to(device)) for v in values], [Parameter(v.clone()) for v in values]
    opt, hand = cases.fused(ours, config, backend), cases.by_hand(theirs, config)
    names = ["one"] * 300
    for step in (0, 1):
        opt.step(cases.closure_of(ours, step, names)), hand.step(cases.closure_of(theirs, step, names))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach().cpu(), b.detach())


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float64, torch.float32, torch.float16)])
def test_one_norm_over_several_dtypes(backend, device, dtypes):
    params = [Parameter(torch.zeros(50, dtype=dtype, device=device)) for dtype in dtypes]
    opt = FusedSAM(params, SGD, rho=0.5, lr=0.1, backend=backend)
    for i, p in enumerate(params):
        p.grad = cases.gradient(p, i, 0.0)
    squares = sum(float(p.grad.double().square().sum()) for p in params)
    opt.first_step()
    for p in params:
        expected = (p.grad.double() * 0.5 / squares**0.5).to(p.dtype)
        torch.testing.assert_close(p.detach(), expected)
    opt.second_step()


# complex and sparse


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@each_base
def test_complex_parameters_are_pairs_of_reals(backend, device, config, dtype):
    value = torch.randn(6, 5, dtype=dtype)
    ours, theirs = [Parameter(value.clone().to(device))], [Parameter(torch.view_as_real(value).clone())]
    opt, hand = cases.fused(ours, config, backend), cases.by_hand(theirs, config)
    for step in range(3):
        for pass_ in (1, 2):
            g = cases.gradient(value, 10 * step + pass_, 0.0)
            ours[0].grad, theirs[0].grad = g.to(device), torch.view_as_real(g)
            (opt.first_step if pass_ == 1 else opt.second_step)()
            (hand.climb if pass_ == 1 else hand.descend)()
            torch.testing.assert_close(torch.view_as_real(ours[0].detach()).cpu(), theirs[0].detach())
    state = [t for name, t in opt.state[ours[0]].items() if name != "step"]
    assert {t.dtype for t in state} == {dtype} and {t.shape for t in state} == {value.shape}


def test_complex_parameters_in_an_adaptive_group_are_refused(backend, device):
    z = Parameter(torch.zeros(3, dtype=torch.complex64, device=device))
    message = r"(?s)param_groups\[0\]\['params'\]\[1\].*complex"
    with pytest.raises(ValueError, match=message):
        FusedSAM([Parameter(torch.ones(2, device=device)), z], SGD, lr=0.1, adaptive=True, backend=backend).prepare()
    with pytest.raises(ValueError, match="the_name"):
        FusedSAM([("the_name", z)], SGD, lr=0.1, adaptive=True, backend=backend).prepare()


@each_base
def test_sparse_gradients(backend, device, config):
    torch.manual_seed(1)
    sparse = torch.nn.Embedding(9, 4, sparse=True).to(device)
    dense = torch.nn.Embedding(9, 4)
    oracle.hand_over([sparse.weight], [dense.weight])
    opt = cases.fused(list(sparse.parameters()), config, backend)
    hand = cases.by_hand(list(dense.parameters()), config)
    rows = torch.tensor([1, 3, 3, 8])
    for _ in range(3):

        def closure():
            opt.zero_grad()
            sparse(rows.to(device)).pow(2).sum().backward()
            assert sparse.weight.grad.is_sparse

        def dense_closure():
            hand.base.zero_grad()
            dense(rows).pow(2).sum().backward()

        opt.step(closure), hand.step(dense_closure)
        torch.testing.assert_close(sparse.weight.detach().cpu(), dense.weight.detach())


@pytest.mark.skipif(not hasattr(Parameter, "grad_dtype"), reason="torch < 2.11 has no grad_dtype")
@pytest.mark.parametrize(
    ("dtype", "grad_dtypes", "casts"),
    [
        (torch.bfloat16, [torch.float32], False),  # one launch reads either
        (torch.float16, [torch.float32], False),
        (torch.float32, [torch.bfloat16], False),
        (torch.float32, [torch.float16], False),
        (torch.bfloat16, [torch.float32, torch.bfloat16], True),  # what is not of the widest is widened
        (torch.float32, [torch.bfloat16, torch.float16], True),
        (torch.float64, [torch.float32], True),
        (torch.bfloat16, [torch.float16], True),
    ],
    ids=str,
)
def test_gradients_of_another_dtype(backend, device, dtype, grad_dtypes, casts):
    """What a gradient holds counts, not its dtype, in every pass anew; nothing is rounded but at the store."""

    def run(kinds):
        torch.manual_seed(5)
        params = [Parameter(torch.randn(n).to(device, dtype)) for n in (70, 8200, 3)]
        opt = FusedSAM(params, SGD, rho=0.5, lr=0.1, momentum=0.7, adaptive=True, backend=backend)
        for step in range(3):
            for finish in (opt.first_step, opt.step):
                for p, kind in zip(params, kinds, strict=False):
                    p.grad, p.grad_dtype = None, kind
                    p.grad = torch.randint(-64, 64, p.shape).to(device, kind) / 64  # exact in every dtype
                finish()
            kinds = kinds if step == 0 else [dtype] * 3
        return [*(p.detach() for p in params), *(opt.state[p]["momentum_buffer"] for p in params)]

    expected = run([dtype] * 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = run((grad_dtypes * 3)[:3])
    assert any("cast in every pass" in str(w.message) for w in caught) == casts
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_overlapping_parameters_are_refused(backend, device):
    base = torch.randn(10, device=device)
    p, q = Parameter(torch.empty(0, device=device)), Parameter(torch.empty(0, device=device))
    p.data, q.data = base[:6], base[4:]
    with pytest.raises(ValueError, match=r"share memory.*param_groups\[0\]\['params'\]\[0\].*\['params'\]\[1\]"):
        opt = FusedSAM([p, q], SGD, lr=0.1, backend=backend)
        opt.step(cases.closure_of([p, q], 0, ["one", "one"]))


def test_an_overlap_within_the_extent_of_a_third_parameter_is_found(backend, device):
    base = torch.zeros(10, 10, device=device)
    params = [Parameter(torch.empty(0, device=device)) for _ in range(3)]
    for p, data in zip(params, (base[:, 0], base.view(-1)[11:13], base.view(-1)[12:14]), strict=True):
        p.data = data
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"share memory.*\['params'\]\[1\].*\['params'\]\[2\]"):
        FusedSAM(params, SGD, lr=0.1, backend=backend).first_step()
    FusedSAM(params[:2], SGD, lr=0.1, backend=backend).first_step()  # a column, and elements beside it


def test_neighbours_that_do_not_overlap_are_fine(backend, device):
    base = torch.randn(10, device=device)
    p, q = Parameter(torch.empty(0, device=device)), Parameter(torch.empty(0, device=device))
    p.data, q.data = base[:5], base[5:]
    FusedSAM([p, q], SGD, lr=0.1, backend=backend).step(cases.closure_of([p, q], 0, ["one", "one"]))


# moved by the user


MOVES = {
    "p.data = clone": lambda model: [setattr(p, "data", p.data.clone()) for p in model.parameters()],
    "contiguous to transposed": lambda m: [
        setattr(p, "data", p.data.t().clone().t()) for p in m.parameters() if p.dim() == 2
    ],
    "double": lambda model: model.double(),
    "bfloat16 and back": lambda model: model.bfloat16().float(),
    "to(dtype)": lambda model: model.to(torch.float64),
}


@each_base
@pytest.mark.parametrize("move", MOVES)
def test_parameters_moved_between_steps_are_followed(backend, device, config, move):
    model, other = cases.small_model().to(device), cases.small_model()
    opt = cases.fused(list(model.parameters()), config, backend)
    hand = cases.by_hand(list(other.parameters()), config, norm="float64")

    def closure_of(module, optimizer):
        dtype, where = next(module.parameters()).dtype, next(module.parameters()).device
        x, y = (t.to(where, dtype) for t in cases.batch())

        def closure():
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(module(x), y).backward()

        return closure

    for step in range(4):
        if step == 2:
            opt.zero_grad(), hand.base.zero_grad()
            MOVES[move](model), MOVES[move](other)
            if "double" in move or "dtype" in move:  # torch.optim itself would mix dtypes
                for entry in hand.base.state.values():
                    entry.update({k: t.double() for k, t in entry.items() if k != "step"})
            if "bfloat16" in move:
                continue
        opt.step(closure_of(model, opt)), hand.step(closure_of(other, hand.base))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert p.dtype == q.dtype
        torch.testing.assert_close(p.detach().cpu(), q.detach())
    for entry in opt.state.values():
        assert {t.dtype for name, t in entry.items() if name != "step"} == {next(model.parameters()).dtype}


@pytest.mark.filterwarnings(cases.NO_GRADIENTS)
@pytest.mark.parametrize("leave", ["second_step", "restore", "exception"])
@each_base
def test_parameters_moved_while_perturbed_still_come_back(backend, device, config, leave):
    params = cases.make_params(names=["matrix", "63"], device=device)
    opt = cases.fused(params, config, backend)

    def closure():
        raise KeyError

    before = [bits(p) for p in params]
    cases.set_gradients(params, 0, 1, ["matrix", "63"])
    opt.first_step(zero_grad=True)
    for p in params:
        p.data = p.data.clone()
    if leave == "exception":
        with pytest.raises(KeyError):
            opt.step(closure)
    else:
        getattr(opt, leave)()
    assert [bits(p) for p in params] == before


@each_base
def test_a_layer_frozen_from_the_start_and_thawed_later(backend, device, config):
    names = ["matrix", "63", "transposed"]
    ours, theirs = cases.make_params(names=names, device=device), cases.make_params(names=names)
    opt, hand = cases.fused(ours, config, backend), cases.by_hand(theirs, config)
    for step in range(4):
        for params in (ours, theirs):
            params[0].requires_grad_(step >= 2)
        for run, params in ((opt, ours), (hand, theirs)):
            inner = cases.closure_of(params, 0, names)

            def closure(inner=inner, params=params, step=step):
                inner()
                if step < 2:
                    params[0].grad = None

            run.step(closure)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach().cpu(), b.detach())
    assert set(oracle.saved_state(opt)) == {0, 1, 2}


def test_parameters_exchanged_in_the_groups(backend, device):
    # accelerate's FSDP2 replaces param_groups[i]["params"][j] in place.
    p, q = Parameter(torch.ones(4, device=device)), Parameter(torch.full((4,), 2.0, device=device))
    opt = FusedSAM([p], SGD, rho=0.3, lr=0.1, momentum=0.9, backend=backend)
    opt.step(cases.closure_of([p], 0, ["one"]))
    before = bits(p)
    opt.param_groups[0]["params"][0] = q
    hand_q = Parameter(q.detach().cpu().clone())
    hand = SamByHand([dict(params=[hand_q])], SGD, rho=0.3, lr=0.1, momentum=0.9)
    opt.step(cases.closure_of([q], 1, ["one"])), hand.step(cases.closure_of([hand_q], 1, ["one"]))
    assert bits(p) == before
    torch.testing.assert_close(q.detach().cpu(), hand_q.detach())
