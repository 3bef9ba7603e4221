"""One torch.autocast block around both passes, and torch.compile around what calls the optimizer."""

from __future__ import annotations

import cases
import pytest
import torch
from oracle import SamByHand, assert_same

from fastsam import FusedSAM


def loss_of(model: torch.nn.Module, device: str) -> torch.Tensor:
    x, y = (t.to(device) for t in cases.batch())
    return torch.nn.functional.mse_loss(model(x), y)


def test_one_autocast_block_around_both_passes(backend, device):
    # Autocast keeps bf16 copies of the weights: without clearing that cache pass 2 would see the old weights.
    model, other = cases.small_model().to(device), cases.small_model().to(device)
    opt = FusedSAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=2.0, backend=backend)
    hand = SamByHand([dict(params=list(other.parameters()))], torch.optim.SGD, lr=0.1, rho=2.0)
    for _ in range(3):
        with torch.autocast(device, torch.bfloat16):
            first = loss_of(model, device)
            first.backward()
            opt.first_step(zero_grad=True)
            second = loss_of(model, device)
            second.backward()
            opt.second_step(zero_grad=True)
            third = loss_of(model, device)
        assert first.item() != second.item() != third.item() != first.item()
        for finish in (hand.climb, hand.descend):
            with torch.autocast(device, torch.bfloat16):
                loss_of(other, device).backward()
            finish()
            hand.base.zero_grad()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("leave", ["restore", "unperturbed"])
def test_restored_weights_are_seen_within_the_block(backend, device, leave):
    model = cases.small_model().to(device)
    opt = FusedSAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=2.0, backend=backend)
    with torch.autocast(device, torch.bfloat16):
        before = loss_of(model, device)
        before.backward()
        opt.first_step()
        climbed = loss_of(model, device)
        if leave == "restore":
            opt.restore()
            assert loss_of(model, device).item() == before.item()
        else:
            with opt.unperturbed():
                assert loss_of(model, device).item() == before.item()
            assert loss_of(model, device).item() == climbed.item()


def test_closure_under_autocast(backend, device):
    model = cases.small_model().to(device)
    opt = FusedSAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=2.0, backend=backend)
    seen = []

    def closure():
        opt.zero_grad()
        loss = loss_of(model, device)
        loss.backward()
        seen.append(loss.item())
        return loss

    with torch.autocast(device, torch.bfloat16):
        assert opt.step(closure).item() == seen[0]
    assert seen[0] != seen[1]


def train(model: torch.nn.Module, device: str, backend: str, wrap) -> list[torch.Tensor]:
    opt = FusedSAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.3, backend=backend)
    x, y = (t.to(device) for t in cases.batch())

    def two_calls(x, y):
        torch.nn.functional.mse_loss(model(x), y).backward()
        opt.first_step(zero_grad=True)
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        opt.second_step(zero_grad=True)
        return loss * 1.0

    step = wrap(two_calls)
    for _ in range(3):
        step(x, y)
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")  # torch's own deprecations while it traces
def test_a_compiled_function_around_the_step(backend, device, compiler):
    torch._dynamo.reset()
    expected = train(cases.small_model().to(device), device, backend, lambda f: f)
    actual = train(cases.small_model().to(device), device, backend, lambda f: torch.compile(f, backend=compiler))
    for a, b in zip(actual, expected, strict=True):
        (torch.testing.assert_close if compiler == "inductor" else assert_same)(a, b)


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_sees_both_weights(backend, device):
    torch._dynamo.reset()
    model, eager = cases.small_model().to(device), cases.small_model().to(device)
    compiled = torch.compile(model, backend="eager")
    opt = FusedSAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.3, backend=backend)
    other = FusedSAM(eager.parameters(), torch.optim.SGD, lr=0.1, rho=0.3, backend=backend)
    for seed in range(3):
        if device == "cpu":
            opt.step(cases.model_closure(compiled, opt, seed))
            other.step(cases.model_closure(eager, other, seed))
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        assert_same(p, q)
