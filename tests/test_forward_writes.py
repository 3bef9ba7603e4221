"""What a forward pass writes to perturbed weights goes with the perturbation; what was loaded in between is kept."""

from __future__ import annotations

import warnings

import pytest
import torch
from oracle import assert_same, bits
from torch import nn

from fastsam import FusedSAM

RESTORED = "ignore:FusedSAM. first_step.. was called twice"
pytestmark = pytest.mark.filterwarnings(RESTORED)


class Masked(nn.Linear):
    """A pruned layer: its mask is multiplied into the weights in each forward pass."""

    def __init__(self, *sizes: int, **kwargs: bool) -> None:
        super().__init__(*sizes, **kwargs)
        self.register_buffer("mask", (torch.arange(self.weight.numel()) % 3 > 0).float().view_as(self.weight))

    def forward(self, x):
        with torch.no_grad():
            self.weight.mul_(self.mask)
        return super().forward(x)


class MaskedThroughData(Masked):
    def forward(self, x):
        self.weight.data.mul_(self.mask)
        return nn.Linear.forward(self, x)


class Normalised(nn.Linear):
    """Forced weight normalisation (as in EDM2, arXiv 2312.02696)."""

    def forward(self, x):
        with torch.no_grad():
            self.weight.copy_(nn.functional.normalize(self.weight, dim=1))
        return super().forward(x)


class NormalisedThroughData(nn.Linear):
    def forward(self, x):
        self.weight.data = nn.functional.normalize(self.weight.data, dim=1)
        return super().forward(x)


class Embedded(nn.Module):
    """Rows of an embedding whose norm is kept at most 1, in place of a layer's inputs."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.rows = nn.Embedding(inputs, outputs, max_norm=1.0)
        if bias:
            self.last = nn.Linear(outputs, outputs)

    def forward(self, x):
        rows = self.rows(x.abs().argmax(dim=1))
        return self.last(rows) if hasattr(self, "last") else rows


MODELS = [Embedded, Masked, MaskedThroughData, Normalised, NormalisedThroughData]
each_model = pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
each_way_out = pytest.mark.parametrize("way_out", ["exception", "first_step", "restore"])
WRITTEN_EVERYWHERE = [Embedded, Masked, Normalised]


class Problem:
    def __init__(self, kind, backend, device, bias=True, **options):
        self.model = kind(5, 4, bias=bias).to(device)
        self.x, self.y = torch.randn(6, 5, device=device), torch.randn(6, 4, device=device)
        self.opt = FusedSAM(self.model.parameters(), "sgd", rho=0.5, lr=0.1, backend=backend, **options)

    def loss(self):
        return nn.functional.mse_loss(self.model(self.x), self.y)

    def closure(self):
        self.opt.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss

    def weights(self):
        return [bits(p) for p in self.model.parameters()]

    def leave(self, way_out, before_leaving=lambda: None):
        """First pass, second forward, and out."""
        if way_out == "exception":
            calls = []

            def closure():
                calls.append(self.closure())
                if len(calls) == 2:
                    before_leaving()
                    raise MemoryError("mine")

            with pytest.raises(MemoryError, match="mine"):
                self.opt.step(closure)
            return
        self.loss().backward()
        self.opt.first_step(zero_grad=True)
        self.loss()
        before_leaving()
        if way_out == "restore":
            self.opt.restore()
        else:
            self.opt.zero_grad()
            self.opt.first_step()  # the next batch; without gradients nothing is perturbed
            self.opt.restore()


@each_model
@each_way_out
@pytest.mark.parametrize("steps", [0, 2])
def test_what_a_forward_pass_wrote_does_not_stay(backend, device, kind, way_out, steps):
    problem = Problem(kind, backend, device)
    for _ in range(steps):
        problem.opt.step(problem.closure)
    problem.loss()  # from here on the forward pass finds the weights as it leaves them, within rounding
    before = [p.detach().clone() for p in problem.model.parameters()]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*they are kept")
        problem.leave(way_out)
    assert not problem.opt.perturbed
    for p, old in zip(problem.model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old)


@pytest.mark.parametrize("kind", WRITTEN_EVERYWHERE, ids=lambda kind: kind.__name__)
@each_way_out
@pytest.mark.parametrize("steps", [0, 2])
def test_not_even_where_it_writes_every_parameter(backend, device, kind, way_out, steps):
    problem = Problem(kind, backend, device, bias=False)
    assert len(list(problem.model.parameters())) == 1
    for _ in range(steps):
        problem.opt.step(problem.closure)
    problem.loss()
    before = [p.detach().clone() for p in problem.model.parameters()]
    problem.leave(way_out)
    for p, old in zip(problem.model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old)


@each_model
@each_way_out
@pytest.mark.parametrize("options", [dict(), dict(master_weights=True)], ids=["plain", "masters"])
@pytest.mark.parametrize("steps", [0, 2])
def test_what_was_loaded_is_kept(backend, device, kind, way_out, options, steps):
    problem = Problem(kind, backend, device, **options)
    if options:
        problem.model.to(torch.bfloat16)
        problem.x, problem.y = problem.x.bfloat16(), problem.y.bfloat16()
    loaded = {name: value.clone() * 0.5 for name, value in problem.model.state_dict().items()}
    for _ in range(steps):
        problem.opt.step(problem.closure)
    before = problem.weights()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        problem.leave(way_out, lambda: problem.model.load_state_dict(loaded))
    if way_out == "restore":  # says what it does, whatever happened
        assert not any("they are kept" in str(w.message) for w in caught)
        return
    assert sum("they are kept" in str(w.message) for w in caught) == 1
    assert problem.weights() != before
    for name, value in problem.model.state_dict().items():
        assert_same(value, loaded[name], name)
    problem.opt.zero_grad()
    problem.opt.prepare(), problem.opt.base_step()
    for name, value in problem.model.state_dict().items():
        assert_same(value, loaded[name], name)


def test_a_part_that_was_loaded_does_not_keep_the_rest_perturbed(backend, device):
    problem = Problem(nn.Linear, backend, device)
    before = problem.weights()
    loaded = {"bias": torch.ones(4)}
    problem.leave("exception", lambda: problem.model.load_state_dict(loaded, strict=False))
    assert problem.weights() == before


def test_what_was_loaded_within_unperturbed_is_the_old_weight_from_then_on(backend, device):
    problem = Problem(nn.Linear, backend, device)
    loaded = {name: value.clone() * 0.5 for name, value in problem.model.state_dict().items()}
    problem.loss().backward()
    problem.opt.first_step(zero_grad=True)
    with problem.opt.unperturbed():
        problem.model.load_state_dict(loaded)
    problem.opt.restore()
    for name, value in problem.model.state_dict().items():
        assert_same(value, loaded[name], name)


def test_a_load_before_unperturbed_is_remembered(backend, device):
    problem = Problem(nn.Linear, backend, device)
    loaded = {name: value.clone() * 0.5 for name, value in problem.model.state_dict().items()}

    def load_and_look():
        problem.model.load_state_dict(loaded)
        with problem.opt.unperturbed():
            pass

    with pytest.warns(UserWarning, match="they are kept"):
        problem.leave("exception", load_and_look)
    for name, value in problem.model.state_dict().items():
        assert_same(value, loaded[name], name)


def test_an_update_that_fails_is_not_taken_for_a_load(backend, device):
    """A base optimizer that is not fused may refuse after its weights were restored."""

    class Refuses(torch.optim.SGD):
        def step(self, closure=None):
            raise NotImplementedError("not today")

    problem = Problem(nn.Linear, backend, device)
    problem.opt = FusedSAM(problem.model.parameters(), Refuses, rho=0.5, lr=0.1, backend=backend)
    before = problem.weights()
    for _ in range(2):
        with pytest.raises(NotImplementedError):
            problem.opt.step(problem.closure)
        assert problem.weights() == before


def test_a_step_that_loads_and_goes_on_teaches_nothing_for_long(backend, device):
    """The update goes back to the old weights, as documented; the next way out still knows a load from a forward."""
    problem = Problem(nn.Linear, backend, device)
    loaded = {name: value.clone() * 0.5 for name, value in problem.model.state_dict().items()}
    problem.loss().backward()
    problem.opt.first_step(zero_grad=True)
    problem.model.load_state_dict(loaded)
    problem.closure(), problem.opt.step()
    problem.opt.step(problem.closure)
    with pytest.warns(UserWarning, match="they are kept"):
        problem.leave("exception", lambda: problem.model.load_state_dict(loaded))
