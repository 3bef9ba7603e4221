"""Whatever somebody does to `optimizer.state` is used as torch.optim would use it in its next step."""

from __future__ import annotations

import copy

import cases
import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, NAdam, RMSprop

BASES = [
    cases.Config("sgd", SGD, dict(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.01, rho=0.2)),
    cases.Config("adam", Adam, dict(cases.ADAM_OPTIONS, amsgrad=True)),
    cases.Config("rmsprop", RMSprop, dict(cases.RMSPROP_OPTIONS, centered=True, momentum=0.7)),
    cases.Config("nadam", NAdam, cases.ADAM_OPTIONS),
    cases.Config("adagrad", Adagrad, dict(lr=0.05, lr_decay=0.02, initial_accumulator_value=0.3, rho=0.2)),
]
NAMES = ["matrix", "scalar", "63", "transposed", "channels_last"]
KEYS = {
    "sgd": ["momentum_buffer"],
    "adam": ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"],
    "rmsprop": ["step", "square_avg", "momentum_buffer", "grad_avg"],
    "nadam": ["step", "exp_avg", "exp_avg_sq", "mu_product"],
    "adagrad": ["step", "sum"],
}
each_base = pytest.mark.parametrize("config", **cases.ids(BASES))


class Twins:
    """FusedSAM and SAM by hand, to which the same is done; `both` are the optimizers that own the states."""

    def __init__(self, config, backend):
        device = cases.device_of(backend)
        self.ours, self.theirs = cases.make_params(names=NAMES, device=device), cases.make_params(names=NAMES)
        self.opt, self.hand = cases.fused(self.ours, config, backend), cases.by_hand(self.theirs, config)
        self.both = (self.opt, self.ours), (self.hand.base, self.theirs)
        self.number = 0

    def set_gradients(self, pass_):
        for params in (self.ours, self.theirs):
            for i, p in enumerate(params):
                p.grad = cases.gradient(p, 1000 * self.number + 500 * pass_ + i)

    def step(self, times=1):
        for _ in range(times):
            self.number += 1
            self.set_gradients(1)
            self.opt.first_step(), self.hand.climb()
            self.set_gradients(2)
            self.opt.second_step(), self.hand.descend()

    def whole_step(self):
        """Both passes of FusedSAM; which of them notices a fault does not matter."""
        self.opt.first_step()
        self.set_gradients(2)
        self.opt.second_step()

    def base_step(self):
        """The base optimizers' own step, past FusedSAM."""
        self.number += 1
        self.set_gradients(1)
        self.opt.base_optimizer.step(), self.hand.base.step()

    def edit(self, change):
        for opt, params in self.both:
            change(opt, params)
        for p in self.theirs:  # torch's own refuses states of other dtypes, or rounds elsewhere
            held = self.hand.base.state[p] if p in self.hand.base.state else {}
            held.update({k: v.to(p.dtype) for k, v in held.items() if k in tensors(self.hand.base, p)})

    def check(self):
        for name, a, b in zip(NAMES, self.ours, self.theirs, strict=True):
            message = lambda m, name=name: f"{name}: {m}"  # noqa: E731
            torch.testing.assert_close(a.detach().cpu(), b.detach(), equal_nan=True, msg=message)
        self.check_state()

    def check_state(self):
        """What is saved has torch's keys and values."""
        a, b = (opt.state_dict()["state"] for opt, _ in self.both)
        assert {k: set(held) for k, held in a.items()} == {k: set(held) for k, held in b.items()}
        for k, held in b.items():
            for key, value in held.items():
                found, wanted = torch.as_tensor(a[k][key]).cpu(), torch.as_tensor(value)
                message = lambda m, key=key: f"{key}: {m}"  # noqa: E731
                torch.testing.assert_close(found, wanted, check_dtype=False, equal_nan=True, msg=message)


def tensors(opt, param):
    """The states of a parameter that have its shape: not the numbers."""
    return {k: v for k, v in opt.state[param].items() if k not in ("step", "mu_product")}


def clear(opt, params):
    opt.state.clear()


def pop_one(opt, params):
    opt.state.pop(params[2])


def replace(opt, params):
    for key, value in tensors(opt, params[0]).items():
        opt.state[params[0]][key] = value.detach().abs() * 0.5 + 0.25


def replace_by_double(opt, params):
    for key, value in tensors(opt, params[2]).items():
        opt.state[params[2]][key] = value.detach().cpu().double().abs().mul(0.5).to(value.device)


def replace_by_other_strides(opt, params):
    for p in (params[0], params[3], params[4]):
        for key, value in tensors(opt, p).items():
            turned = value.detach().abs().mul(0.5).transpose(0, 1).contiguous().transpose(0, 1)
            opt.state[p][key] = turned


def write_in_place(opt, params):
    for p in params:
        for value in tensors(opt, p).values():
            value.abs_().mul_(0.5)


def assign_data(opt, params):
    for p in params:
        for value in tensors(opt, p).values():
            value.data = value.detach().abs() * 0.5


def share_memory(opt, params):
    for p in params:
        for value in opt.state[p].values():
            if isinstance(value, Tensor) and value.device.type == "cpu":
                value.share_memory_()


def grow_storage(opt, params):
    for value in tensors(opt, params[0]).values():
        value.data = value.detach().clone()  # a storage of ours cannot be resized
        value.untyped_storage().resize_(4 * value.untyped_storage().nbytes() + 4096)


def set_elsewhere(opt, params):
    for p in params:
        for value in tensors(opt, p).values():
            value.set_(value.detach().abs() * 0.5)


def move_step(opt, params):
    for p in params:
        if "step" in opt.state[p]:
            opt.state[p]["step"] += 3


def replace_step(opt, params):
    for p in params:
        if "step" in opt.state[p]:
            opt.state[p]["step"] = torch.tensor(7.0)


def replace_all(opt, params):
    old = opt.state
    new = type(old)(dict)
    for p in params:
        new[p] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in old[p].items()}
    opt.state = new


def replace_one(opt, params):
    opt.state[params[0]] = copy.deepcopy(opt.state[params[0]])


def reorder(opt, params):
    held = dict(opt.state[params[0]])
    opt.state[params[0]].clear()
    opt.state[params[0]].update({k: held[k] for k in reversed(held)})


def swap_two(opt, params):
    """The states of a parameter change places."""
    held = tensors(opt, params[2])
    if len(held) > 1:
        names = list(held)
        first, second = held[names[0]].clone().abs(), held[names[1]].clone().abs()
        opt.state[params[2]][names[0]], opt.state[params[2]][names[1]] = second, first


EDITS = [
    *(replace, replace_by_double, replace_by_other_strides, write_in_place, assign_data, share_memory, grow_storage),
    *(set_elsewhere, move_step, replace_step, replace_all, replace_one, reorder, swap_two),
]
each_edit = pytest.mark.parametrize("edit", EDITS, ids=lambda f: f.__name__)


@each_base
@each_edit
def test_an_edit_is_in_the_next_checkpoint_and_in_the_next_step(backend, config, edit):
    twins = Twins(config, backend)
    twins.step(2)
    twins.edit(edit)
    twins.check_state()
    for _ in range(2):
        twins.step()
        twins.check()


@each_base
@each_edit
def test_an_edit_between_the_passes(backend, config, edit):
    twins = Twins(config, backend)
    twins.step(2)
    twins.number += 1
    twins.set_gradients(1)
    twins.opt.first_step(), twins.hand.climb()
    twins.edit(edit)
    twins.set_gradients(2)
    twins.opt.second_step(), twins.hand.descend()
    twins.check()
    twins.step()
    twins.check()


@each_base
@pytest.mark.parametrize("edit", [clear, pop_one], ids=lambda f: f.__name__)
def test_state_that_is_removed_begins_anew(backend, config, edit):
    """As torch.optim's does; Adagrad, which makes its state in the constructor only, would raise KeyError."""
    twins = Twins(config, backend)
    twins.step(2)
    twins.edit(edit)
    if config.base is Adagrad:
        for p in twins.theirs:
            if p not in twins.hand.base.state:
                held = dict(step=torch.tensor(0.0), sum=torch.full_like(p, 0.3))
                twins.hand.base.state[p] = held
    else:
        twins.check_state()
    for _ in range(2):
        twins.step()
        twins.check()


@each_base
@pytest.mark.parametrize("how", ["pop", "del"])
def test_one_key_that_is_removed_begins_anew(backend, config, how):
    """torch.optim raises KeyError then, but for SGD, whose momentum begins anew."""
    for key in KEYS[config.name]:
        twins = Twins(config, backend)
        twins.step(2)
        for opt, params in twins.both:
            if how == "pop":
                opt.state[params[0]].pop(key)
            else:
                del opt.state[params[0]][key]
        if config.name != "sgd":
            initial = dict(step=torch.tensor(0.0), mu_product=torch.ones(()))
            fresh = torch.full_like(twins.theirs[0], 0.3 if key == "sum" else 0.0)
            twins.hand.base.state[twins.theirs[0]][key] = initial.get(key, fresh)
        for _ in range(2):
            twins.step()
            twins.check()


@each_base
def test_a_storage_without_memory_is_refused_by_name(backend, config):
    twins = Twins(config, backend)
    twins.step()
    name, value = next(iter(tensors(twins.opt, twins.ours[2]).items()))
    with pytest.raises(RuntimeError, match="not resizable"):  # one of ours
        value.untyped_storage().resize_(0)
    twins.edit(assign_data)
    twins.step()
    name, value = next(iter(tensors(twins.opt, twins.ours[2]).items()))
    value.untyped_storage().resize_(0)
    before = [p.detach().clone() for p in twins.ours]
    twins.set_gradients(1)
    with pytest.raises(RuntimeError, match=rf"state\['{name}'\] of param_groups\[0\]\['params'\]\[2\] has no memory"):
        twins.whole_step()
    assert not twins.opt.perturbed
    for a, b in zip(twins.ours, before, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="has no memory"):
        twins.opt.state_dict()
    shape = twins.ours[2].shape
    twins.opt.state[twins.ours[2]][name] = torch.full(shape, 0.5, device=twins.ours[2].device)
    twins.hand.base.state[twins.theirs[2]][name] = torch.full(shape, 0.5)
    twins.step()
    twins.check()
    twins.edit(assign_data)
    for value in tensors(twins.opt, twins.ours[0]).values():
        value.untyped_storage().resize_(0)
    twins.opt.state.clear()
    twins.step()
    assert all(bool(p.isfinite().all()) for p in twins.ours)


@each_base
def test_a_state_of_another_shape_is_refused_by_name(backend, config):
    twins = Twins(config, backend)
    twins.step()
    name = next(iter(tensors(twins.opt, twins.ours[2])))
    twins.opt.state[twins.ours[2]][name] = torch.zeros(5, device=twins.ours[2].device)
    twins.set_gradients(1)
    with pytest.raises(ValueError, match=rf"state\['{name}'\] of .*\[2\] must have its parameter's shape \[63\]"):
        twins.whole_step()
    assert not twins.opt.perturbed


@each_base
@pytest.mark.parametrize("prepared", [False, True])
def test_steps_of_the_base_before_between_and_after(backend, config, prepared):
    twins = Twins(config, backend)
    if prepared:
        twins.opt.prepare()
    twins.base_step()
    twins.check_state()
    twins.step(2)
    twins.check()
    twins.base_step()
    twins.check()
    twins.base_step()
    twins.step()
    twins.check()
    twins.base_step()
    twins.check()


@each_base
def test_state_that_is_put_there_between_prepare_and_the_first_step(backend, config):
    twins, donor = Twins(config, backend), Twins(config, backend)
    donor.step(2)
    twins.opt.prepare()
    for (opt, params), (_, from_) in zip(twins.both, reversed(donor.both), strict=True):
        source = donor.hand.base.state
        for p, q in zip(params, donor.theirs, strict=True):
            opt.state[p] = {k: v.clone().to(p.device) if v.dim() else v.clone() for k, v in source[q].items()}
        assert len(from_) == len(params)
    twins.check_state()
    twins.step(2)
    twins.check()


@each_base
def test_reading_the_state_of_an_unseen_parameter_leaves_it_unseen(backend, config):
    """`state` is a defaultdict: reading makes an empty entry."""
    twins = Twins(config, backend)
    for opt, params in twins.both:
        assert isinstance(opt.state[params[1]], dict)
    twins.step(2)
    twins.check()


@each_base
def test_edits_of_a_loaded_and_of_a_copied_optimizer(backend, config):
    twins = Twins(config, backend)
    twins.step(2)
    for opt, _ in twins.both:
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    twins.edit(replace)
    twins.check_state()
    twins.edit(write_in_place)
    twins.step()
    twins.check()


@each_base
def test_two_edits_in_a_row_and_one_undone(backend, config):
    twins = Twins(config, backend)
    twins.step()
    kept = {key: value for key, value in twins.opt.state[twins.ours[0]].items()}
    twins.opt.state[twins.ours[0]] = {}
    twins.opt.state[twins.ours[0]].update(kept)
    twins.step()
    twins.check()
    twins.edit(assign_data), twins.edit(share_memory), twins.edit(write_in_place)
    twins.step()
    twins.check()
