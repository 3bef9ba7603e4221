"""One torch.autocast block around both passes: its copies of the weights are of today's."""

from __future__ import annotations

import cases
import pytest
import torch
from oracle import SamByHand

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
