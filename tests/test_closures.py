"""Closures: a right one is never refused and nothing of the check shows, a wrong one is refused within two steps."""

from __future__ import annotations

import os

import cases
import oracle
import pytest
import torch
from oracle import assert_same, bits
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import fastsam
from fastsam import FusedSAM

STEPS = 9  # looks at 1, 2, 4, 8, and one step after


@pytest.fixture(params=["cpu"] if "cpu" in cases.BACKENDS else ["reference"])
def backend(request):
    """One will do: what is told of a closure is told by its gradients alone, before any backend reads them."""
    return request.param


class Problem:
    """A model, its data of each step, and what a closure may be made of; `opt` is FusedSAM or None beside an oracle."""

    def __init__(self, kind="mlp", dtype=torch.float32, device="cpu"):
        torch.manual_seed(0)
        self.model = KINDS[kind]().to(device, dtype)
        self.params = list(self.model.parameters())
        self.x = torch.randn(STEPS, 8, 5, device=device, dtype=dtype)
        self.number, self.calls = 0, 0

    def loss(self, part=slice(None)):
        return self.model(self.x[self.number][part]).pow(2).mean()

    def clear(self, set_to_none=True):
        for p in self.params:
            if set_to_none:
                p.grad = None
            elif p.grad is not None:
                p.grad.requires_grad_(False).zero_()


class Scalars(nn.Module):
    def __init__(self, count=5):
        super().__init__()
        self.w = nn.ParameterList([nn.Parameter(torch.full((1,), 0.5 + i)) for i in range(count)])

    def forward(self, x):
        return sum(w * x[:, i] for i, w in enumerate(self.w))


class HalfUsed(nn.Module):
    """Its second layer, and a small parameter, are left out of every other forward pass."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.shift = nn.Linear(5, 7), nn.Linear(7, 7), nn.Parameter(torch.zeros(1))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        y = self.first(x)
        return self.second(y) + self.shift if self.calls % 2 else y


class Words(nn.Module):
    def __init__(self, sparse=False):
        super().__init__()
        self.rows, self.last = nn.Embedding(30, 4, sparse=sparse), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.rows((x * 100).long() % 30).sum(1))


KINDS = {
    "mlp": lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)),
    "tiny": lambda: nn.Linear(5, 1, bias=False),
    "scalars": Scalars,
    "one scalar": lambda: Scalars(1),
    "half used": HalfUsed,
    "words": Words,
    "sparse words": lambda: Words(sparse=True),
    "one row": lambda: nn.Linear(5, 7, bias=False),
}

# Right closures: each call ends with the gradients of its own forward pass, whatever was there before.


def zero_grad(problem, set_to_none=True):
    problem.clear(set_to_none)
    loss = problem.loss()
    loss.backward()
    return loss


def zero_in_place(problem):
    return zero_grad(problem, set_to_none=False)


def zero_through_data(problem):
    for p in problem.params:
        if p.grad is not None:
            p.grad.data.zero_()
    loss = problem.loss()
    loss.backward()
    return loss


def zero_foreach(problem):
    grads = [p.grad for p in problem.params if p.grad is not None]
    if grads:
        torch._foreach_zero_(grads)
    loss = problem.loss()
    loss.backward()
    return loss


def zero_by_product(problem):
    for p in problem.params:
        if p.grad is not None:
            p.grad.mul_(0)
    loss = problem.loss()
    loss.backward()
    return loss


def zero_by_difference(problem):
    for p in problem.params:
        if p.grad is not None:
            p.grad.sub_(p.grad.clone())
    loss = problem.loss()
    loss.backward()
    return loss


def late_zero(problem):
    loss = problem.loss()
    problem.clear(set_to_none=False)
    loss.backward()
    return loss


def assign(problem):
    loss = problem.loss()
    for p, g in zip(problem.params, torch.autograd.grad(loss, problem.params), strict=True):
        p.grad = g
    return loss


def copy(problem, through_data=False):
    loss = problem.loss()
    for p, g in zip(problem.params, torch.autograd.grad(loss, problem.params), strict=True):
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        (p.grad.data if through_data else p.grad).copy_(g)
    return loss


def copy_through_data(problem):
    return copy(problem, through_data=True)


def expanded(problem):
    """Gradients whose elements share memory."""
    loss = problem.loss()
    for p in problem.params:
        p.grad = loss.detach().tanh().mul(0.01).expand(p.shape)
    return loss


def one_buffer(problem):
    if problem.params[0].grad is None:
        problem.buffer = torch.zeros(sum(p.numel() for p in problem.params), device=problem.x.device)
        for p, piece in zip(problem.params, problem.buffer.split([p.numel() for p in problem.params]), strict=True):
            p.grad = piece.view_as(p)
    problem.buffer.zero_()
    loss = problem.loss()
    loss.backward()
    return loss


def two_buffers(problem):
    """The gradients of the call before stay readable; theirs are not ours to change."""
    kept = [p.grad for p in problem.params]
    problem.clear()
    loss = problem.loss()
    loss.backward()
    problem.kept = kept
    return loss


def clipped(problem, set_to_none=True):
    loss = zero_grad(problem, set_to_none)
    clip_grad_norm_(problem.params, 0.01)
    return loss


def clipped_in_place(problem):
    return clipped(problem, set_to_none=False)


def clipped_by_value(problem):
    loss = zero_in_place(problem)
    clip_grad_value_(problem.params, 1e-5)  # all of them
    return loss


def signs(problem):
    loss = zero_in_place(problem)
    for p in problem.params:
        p.grad.sign_()
    return loss


def micro_batches(problem):
    problem.clear(set_to_none=False)
    losses = [problem.loss(slice(4 * i, 4 * i + 4)) / 2 for i in range(2)]
    for loss in losses:
        loss.backward()
    return sum(losses)


def two_losses(problem):
    problem.clear(set_to_none=False)
    loss = problem.loss()
    loss.backward(retain_graph=True)
    loss.backward()
    return loss


def second_order(problem):
    problem.clear()
    loss = problem.loss()
    loss.backward(create_graph=True)
    for p in problem.params:
        p.grad.detach_()
    return loss


def alternating(problem):
    """Another way of clearing in each call."""
    problem.calls += 1
    return (zero_grad, zero_in_place, zero_through_data)[problem.calls % 3](problem)


RIGHT = [
    *(zero_grad, zero_in_place, zero_through_data, zero_foreach, zero_by_product, zero_by_difference, late_zero),
    *(assign, copy, copy_through_data, expanded, one_buffer, two_buffers, clipped, clipped_in_place, clipped_by_value),
    *(signs, micro_batches, two_losses, second_order, alternating),
]
ignore_cycles = pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
pytestmark = [ignore_cycles, pytest.mark.filterwarnings("ignore:FusedSAM. .* its gradient:UserWarning")]


def by_hand(problem):
    return oracle.SamByHand([dict(params=problem.params)], torch.optim.SGD, rho=0.3, lr=0.1)


def fused(problem, backend):
    return FusedSAM(problem.params, torch.optim.SGD, rho=0.3, lr=0.1, backend=backend)


def spoiled(closure, how):
    """The closure with gradients that are not finite now and then, of themselves."""

    def spoils(problem):
        loss = closure(problem)
        problem.calls += 1
        for i, p in enumerate(problem.params):
            if p.grad is not None and problem.calls % 3 != 2:
                with torch.no_grad():
                    how(p.grad, i)
        return loss

    return spoils


def densified(closure, problem):
    """For the oracle, which knows no sparse gradients."""
    loss = closure(problem)
    for p in problem.params:
        if p.grad is not None and p.grad.layout != torch.strided:
            p.grad = p.grad.to_dense()
    return loss


def check_right(backend, device, closure, kind="mlp", dtype=torch.float32):
    # The oracle's norm has no canonical order in float64, and torch does not fuse over elements that share memory.
    compare = torch.testing.assert_close if dtype == torch.float64 or closure is expanded else assert_same
    ours, theirs = Problem(kind, dtype, device), Problem(kind, dtype, device)
    opt, hand = fused(ours, backend), by_hand(theirs)
    for number in range(STEPS):
        ours.number = theirs.number = number
        opt.step(lambda: closure(ours))
        hand.step(lambda: densified(closure, theirs))
        for a, b in zip(ours.params, theirs.params, strict=True):
            compare(a, b)
            assert (a.grad is None) == (b.grad is None)
            if a.grad is not None:
                compare(a.grad.to_dense(), b.grad.to_dense())
    return ours, theirs


@pytest.mark.parametrize("closure", RIGHT, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ["mlp", "tiny", "scalars", "one scalar", "words"])
def test_right_closures(backend, device, closure, kind):
    ours, theirs = check_right(backend, device, closure, kind)
    if closure is two_buffers:
        for a, b in zip(ours.kept, theirs.kept, strict=True):
            assert_same(a, b, "the first pass's gradient")


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("kind", ["half used", "sparse words"])
def test_passes_that_miss_parameters_and_sparse_gradients(backend, device, kind, set_to_none):
    check_right(backend, device, lambda problem: zero_grad(problem, set_to_none), kind)


SPOILS = {
    "all nan": lambda g, i: g.fill_(float("nan")),
    "all inf": lambda g, i: g.fill_(float("inf")),
    "one of all": lambda g, i: g.view(-1)[-1:].fill_(float("inf")),
    "half": lambda g, i: g.view(-1)[::2].fill_(float("-inf")),
    "one parameter": lambda g, i: g.fill_(float("inf")) if i == 0 else None,
    "all but one": lambda g, i: g.fill_(float("nan")) if i else None,
    "large": lambda g, i: g.mul_(1e15),
}


@pytest.mark.parametrize("kind", ["mlp", "scalars", "one scalar"])
@pytest.mark.parametrize("closure", [zero_grad, zero_in_place, clipped_in_place, zero_through_data])
@pytest.mark.parametrize("how", SPOILS.values(), ids=SPOILS)
def test_gradients_that_are_not_finite_of_themselves(backend, device, closure, how, kind):
    ours = Problem(kind, device=device)
    opt, spoils = fused(ours, backend), spoiled(closure, how)
    for number in range(STEPS):
        ours.number = number
        opt.step(lambda: spoils(ours))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("closure", [zero_grad, zero_in_place, zero_through_data, clipped_in_place, clipped_by_value])
def test_other_dtypes(backend, device, closure, dtype):
    if dtype == torch.float64:
        check_right(backend, device, closure, dtype=dtype)
        return
    ours = Problem("mlp", dtype, device)
    opt = fused(ours, backend)
    for number in range(STEPS):
        ours.number = number
        opt.step(lambda: closure(ours))
        assert all(bool((p.grad.abs() < 100).all()) for p in ours.params)


# Wrong closures: they add to what was there.


def adds(problem):
    loss = problem.loss()
    loss.backward()
    return loss


def adds_two_losses(problem):
    loss = problem.loss()
    loss.backward(retain_graph=True)
    loss.backward()
    return loss


def adds_micro_batches(problem):
    for i in range(2):
        loss = problem.loss(slice(4 * i, 4 * i + 4)) / 2
        loss.backward()
    return loss


def adds_with_graph(problem):
    loss = problem.loss()
    loss.backward(create_graph=True)
    return loss


def adds_then_clips(problem):
    loss = adds(problem)
    clip_grad_norm_(problem.params, 1.0)
    return loss


def adds_then_clips_values(problem):
    loss = adds(problem)
    clip_grad_value_(problem.params, 0.5)
    return loss


def adds_by_assignment(problem):
    loss = problem.loss()
    for p, g in zip(problem.params, torch.autograd.grad(loss, problem.params), strict=True):
        p.grad = g if p.grad is None else p.grad + g
    return loss


def adds_through_data(problem):
    loss = problem.loss()
    for p, g in zip(problem.params, torch.autograd.grad(loss, problem.params), strict=True):
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        p.grad.data.add_(g)
    return loss


def clears_a_part(problem):
    for p in problem.params[2:]:
        p.grad = None
    return adds(problem)


WRONG = [
    *(adds, adds_two_losses, adds_micro_batches, adds_with_graph, adds_then_clips, adds_then_clips_values),
    *(adds_by_assignment, adds_through_data, clears_a_part),
]


def check_found_out(opt, problem, closure, steps=2):
    """Refused in one of so many steps, with the weights of before it."""
    before = []
    with pytest.raises(RuntimeError, match="does not clear the gradients.*micro-batches, do so within the closure"):
        for _ in range(steps):
            before = [bits(p) for p in problem.params]
            opt.step(closure)
    assert not opt.perturbed and [bits(p) for p in problem.params] == before


# Without those that a model does not allow: torch.autograd.grad wants every parameter used, one row has one part.
NOT_FOR = {"half used": (adds_by_assignment, adds_through_data), "one row": (clears_a_part,)}


@pytest.mark.parametrize(
    "closure, kind",
    [
        pytest.param(closure, kind, id=f"{closure.__name__}-{kind}")
        for closure in WRONG
        for kind in ("mlp", "half used", "words", "one row")
        if closure not in NOT_FOR.get(kind, ())
    ],
)
def test_wrong_closures(backend, device, closure, kind):
    problem = Problem(kind, device=device)
    check_found_out(fused(problem, backend), problem, lambda: closure(problem))
    left = [p.grad.detach() for p in problem.params if p.grad is not None]
    assert all(bool((grad.abs() < 1e3).all()) for grad in left), "a mark is left"


@pytest.mark.parametrize("kind", ["tiny", "scalars", "one scalar"])
@pytest.mark.parametrize("closure", [adds, adds_two_losses, adds_micro_batches, adds_with_graph, adds_by_assignment])
def test_wrong_closures_of_the_smallest_models(backend, device, closure, kind):
    problem = Problem(kind, device=device)
    check_found_out(fused(problem, backend), problem, lambda: closure(problem))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("closure", [adds, adds_micro_batches, adds_then_clips])
def test_wrong_closures_in_other_dtypes(backend, device, closure, dtype):
    problem = Problem("mlp", dtype, device)
    check_found_out(fused(problem, backend), problem, lambda: closure(problem))


@pytest.mark.parametrize("wrong", [adds, adds_micro_batches, adds_then_clips, adds_by_assignment])
@pytest.mark.parametrize("right", [zero_grad, zero_in_place, zero_through_data, copy, clipped_in_place, micro_batches])
@pytest.mark.parametrize("at", [1, 6])
def test_closures_that_stop_clearing(backend, device, right, wrong, at):
    problem = Problem(device=device)
    opt = fused(problem, backend)
    for _ in range(at):
        opt.step(lambda: right(problem))
    # With as many writes as the right closure, or new tensors as it had, they wait for the next look.
    check_found_out(opt, problem, lambda: wrong(problem), steps=8)


def test_a_closure_that_clears_every_other_time(backend, device):
    """As of Lightning with accumulate_grad_batches=2, which clears before the first of two batches only."""
    problem = Problem(device=device)
    opt = fused(problem, backend)

    def closure():
        problem.calls += 1
        return zero_grad(problem) if problem.calls in (1, 3, 5, 7) else adds(problem)

    check_found_out(opt, problem, closure)


@pytest.mark.parametrize("raises", ["before clearing", "after clearing", "after adding"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_an_exception_leaves_no_mark(backend, device, raises, set_to_none):
    problem, twin = Problem(device=device), Problem(device=device)

    def closure(problem, second=True):
        problem.calls += 1
        if raises != "after adding" and not (raises == "before clearing" and problem.calls == 2):
            problem.clear(set_to_none)
        if raises != "after adding" and problem.calls == 2:
            raise KeyError("mine")
        loss = adds(problem)
        if problem.calls == 2:
            raise KeyError("mine")
        return loss

    opt = fused(problem, backend)
    before = [bits(p) for p in problem.params]
    with pytest.raises(KeyError, match="mine"):
        opt.step(lambda: closure(problem))
    assert [bits(p) for p in problem.params] == before
    if raises == "before clearing":
        closure(twin)
        for a, b in zip(problem.params, twin.params, strict=True):
            assert_same(a.grad, b.grad)
    assert all(p.grad is None or bool((p.grad.abs() < 1e3).all()) for p in problem.params)


def test_the_second_call_after_first_step_may_add(backend, device):
    """The gradients may be zeros that the user put there: nothing is looked at."""
    problem = Problem(device=device)
    opt = fused(problem, backend)
    for _ in range(3):
        problem.clear(set_to_none=False)
        adds(problem)
        opt.first_step()
        problem.clear(set_to_none=False)
        opt.step(lambda: adds(problem))


# Under DistributedDataParallel, whose gradients may be views of its buckets.


@pytest.fixture
def process_group(tmp_path, monkeypatch):
    if os.name != "posix":
        pytest.skip("gloo over lo")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("views", [True, False], ids=["views", "copies"])
@pytest.mark.parametrize("closure", [zero_grad, zero_in_place, zero_through_data, micro_batches, clipped_in_place])
def test_right_closures_under_ddp(process_group, closure, views):
    ours, theirs = Problem(), Problem()
    ours.model = nn.parallel.DistributedDataParallel(ours.model, gradient_as_bucket_view=views)
    opt, hand = fused(ours, "auto"), by_hand(theirs)
    for number in range(STEPS):
        ours.number = theirs.number = number
        opt.step(lambda: closure(ours))
        hand.step(lambda: closure(theirs))
        for a, b in zip(ours.params, theirs.params, strict=True):
            assert_same(a, b)


@pytest.mark.parametrize("views", [True, False], ids=["views", "copies"])
@pytest.mark.parametrize("wrong", [adds, adds_micro_batches, adds_then_clips])
@pytest.mark.parametrize("right", [None, zero_grad, zero_in_place])
def test_wrong_closures_under_ddp(process_group, wrong, right, views):
    problem = Problem()
    problem.model = nn.parallel.DistributedDataParallel(problem.model, gradient_as_bucket_view=views)
    opt = fused(problem, "auto")
    for _ in range(5 if right else 0):
        opt.step(lambda: right(problem))
    check_found_out(opt, problem, lambda: wrong(problem), steps=4)


def test_the_recipe_for_micro_batches_is_in_the_message():
    assert "micro-batches" in fastsam.closures.CLOSURE_RECIPE


def test_every_256th_step_is_looked_at(backend, device):
    """A closure that writes as often as the right one did is found out late in training, too."""
    problem = Problem("one row", device=device)
    opt = fused(problem, backend)
    for _ in range(300):
        opt.step(lambda: zero_in_place(problem))
    check_found_out(opt, problem, lambda: adds_micro_batches(problem), steps=256)
