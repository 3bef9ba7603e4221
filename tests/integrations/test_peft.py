"""PEFT: adapters are perturbed and stepped, frozen weights are left alone; saved and loaded."""

from __future__ import annotations

import copy
import math
import runpy
from pathlib import Path

import pytest
import torch
from plain import LOSS, OPTIONS, loader, network, same, state

import fastsam

peft = pytest.importorskip("peft")


def adapted(**config):
    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules=["0", "2"], r=2, lora_alpha=4, init_lora_weights=False, **config)
    return peft.get_peft_model(network(), config)


def optimizer_of(model, frozen=True):
    params = [p for p in model.parameters() if frozen or p.requires_grad]
    return fastsam.FusedSAM(params, torch.optim.SGD, **OPTIONS)


def train(model, optimizer, batches=None):
    step = fastsam.SAMStep(model, optimizer, LOSS)
    for x, y in loader() if batches is None else batches:
        step(x, y)
    return state(model)


def test_only_adapters_move_and_they_move_as_alone():
    model, alone = adapted(), adapted()
    before = state(model)
    after = train(model, optimizer_of(model))
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }
    same(after, train(alone, optimizer_of(alone, frozen=False)))


def test_the_perturbation_is_of_the_adapters_alone():
    model = adapted()
    optimizer = optimizer_of(model)
    before = state(model)
    x, y = next(iter(loader()))
    LOSS(model(x), y).backward()
    optimizer.first_step()
    moved = {name: value - before[name] for name, value in state(model).items()}
    assert all("lora_" in name for name, change in moved.items() if change.any())
    assert sum(float(change.square().sum()) for change in moved.values()) ** 0.5 == pytest.approx(0.3, rel=1e-5)
    optimizer.restore()
    same(state(model), before)


def test_frozen_weights_have_no_state():
    model = adapted()
    optimizer = optimizer_of(model)
    train(model, optimizer)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in optimizer.state} == trained


def test_training_resumes_half_way(tmp_path):
    batches = list(loader())
    model = adapted()
    whole = train(model, optimizer_of(model), batches)
    model = adapted()
    optimizer = optimizer_of(model)
    train(model, optimizer, batches[:2])
    model.save_pretrained(tmp_path)
    saved = copy.deepcopy(optimizer.state_dict())
    loaded = peft.PeftModel.from_pretrained(network(), tmp_path, is_trainable=True)
    again = optimizer_of(loaded)
    again.load_state_dict(saved)
    same(train(loaded, again, batches[2:]), whole)


def test_merged_adapters_are_the_unperturbed_ones():
    model = adapted()
    optimizer = optimizer_of(model)
    x, y = next(iter(loader()))
    with torch.no_grad():
        before = model(x)
    LOSS(model(x), y).backward()
    optimizer.first_step()
    with optimizer.unperturbed():
        merged = copy.deepcopy(model).merge_and_unload()
    optimizer.restore()
    torch.testing.assert_close(merged(x), before)


def test_the_example():
    path = Path(__file__).parents[2] / "examples" / "lora.py"
    assert 0 < runpy.run_path(str(path))["main"]() < math.log(3)
