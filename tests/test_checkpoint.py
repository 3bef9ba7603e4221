"""Promise 7: exact resume, torch.optim's own layout, checkpoints of the 63-line file."""

from __future__ import annotations

import copy
import io
import pickle
from collections import defaultdict

import cases
import oracle
import pytest
import torch
from cases import NAMES
from oracle import assert_same
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW

import fastsam
from fastsam import FusedSAM

pytestmark = pytest.mark.filterwarnings(cases.NO_GRADIENTS)
TRIED = "plain dampening groups adamw adamw_amsgrad adamw_groups rmsprop_groups adagrad_groups nadam_groups".split()
TRIED += ["radam_groups", "lion_groups"]
CONFIGS = [c for c in cases.CONFIGS if c.name in TRIED]
each_config = pytest.mark.parametrize("config", **cases.ids(CONFIGS))
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)


def through_a_file(saved: dict) -> dict:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def file_size(value) -> int:
    file = io.BytesIO()
    torch.save(value, file)
    return file.tell()


def train(opt, params, steps) -> None:
    for step in steps:
        opt.step(cases.closure_of(params, step))


def twin(params: list[Parameter]) -> list[Parameter]:
    """Other Parameter objects with the same values in the same layout."""
    return [Parameter(torch.empty_like(p).copy_(p.detach())) for p in params]


def check_same(a_params, b_params) -> None:
    for name, a, b in zip(NAMES, a_params, b_params, strict=True):
        assert_same(a, b, what=name)


@each_dtype
@each_config
def test_save_and_resume_half_way(backend, device, config, dtype):
    params = cases.make_params(dtype, device=device)
    opt = cases.fused(params, config, backend)
    train(opt, params, range(4))
    resumed_params = twin(params)
    resumed = cases.fused(resumed_params, config, backend)
    resumed.load_state_dict(through_a_file(opt.state_dict()))
    train(opt, params, range(4, 8))
    train(resumed, resumed_params, range(4, 8))
    check_same(params, resumed_params)
    oracle.assert_same_state(opt, resumed)


@each_config
def test_load_into_an_optimizer_that_has_run(backend, device, config):
    params, others = cases.make_params(device=device), cases.make_params(device=device, seed=9)
    opt, other = cases.fused(params, config, backend), cases.fused(others, config, backend)
    train(opt, params, range(4))
    train(other, others, range(2))
    addresses = [t.data_ptr() for entry in other.state.values() for t in entry.values()]
    oracle.hand_over(params, others)
    other.load_state_dict(opt.state_dict())
    now = [t.data_ptr() for entry in other.state.values() for t in entry.values()]
    assert set(addresses) <= set(now), "state moved, captured graphs would go stale"
    train(opt, params, range(4, 8))
    train(other, others, range(4, 8))
    check_same(params, others)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@each_config
def test_copies_continue_alike(backend, device, config, way):
    params = cases.make_params(device=device)
    opt = cases.fused(params, config, backend)
    train(opt, params, range(3))
    other = copy.deepcopy(opt) if way == "deepcopy" else pickle.loads(pickle.dumps(opt))
    in_groups = [p for group in other.param_groups for p in group["params"]]
    place = {id(p): i for i, p in enumerate(p for group in opt.param_groups for p in group["params"])}
    others = [in_groups[place[id(p)]] for p in params]
    assert not {id(p) for p in params} & {id(p) for p in others}
    train(opt, params, range(3, 6))
    train(other, others, range(3, 6))
    check_same(params, others)
    assert all(p.data_ptr() != q.data_ptr() for p, q in zip(params, others, strict=True) if p.numel())


@each_config
def test_the_layout_is_torch_s(backend, device, config):
    ours, theirs = cases.make_params(device=device), cases.make_params()
    opt, hand = cases.fused(ours, config, backend), cases.by_hand(theirs, config)
    train(opt, ours, range(3)), train(hand, theirs, range(3))
    saved, expected = opt.state_dict(), hand.base.state_dict()
    assert set(saved) == set(expected)
    shapes = lambda s: {  # noqa: E731
        k: {n: (t.shape, t.dtype, t.device.type) if n == "step" else (t.shape, t.dtype) for n, t in e.items()}
        for k, e in s["state"].items()
    }
    assert shapes(saved) == shapes(expected)
    for a, b in zip(saved["param_groups"], expected["param_groups"], strict=True):
        assert set(a) - set(b) == {"rho", "adaptive", "eta", "perturb"} and a["params"] == b["params"]


@each_config
def test_into_torch_and_back(backend, device, config):
    """FusedSAM, then SAM by hand around torch.optim with its checkpoint, then FusedSAM again."""
    ours, theirs = cases.make_params(device=device), cases.make_params()
    opt = cases.fused(ours, config, backend)
    train(opt, ours, range(3))
    hand = cases.by_hand(theirs, config)
    oracle.hand_over(ours, theirs)
    hand.base.load_state_dict(through_a_file(opt.state_dict()))  # torch itself would share the tensors
    train(opt, ours, range(3, 5)), train(hand, theirs, range(3, 5))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach().cpu(), b.detach())
    others = cases.make_params(device=device)
    oracle.hand_over(theirs, others)
    other = cases.fused(others, config, backend)
    plain = through_a_file(hand.base.state_dict())
    for group in plain["param_groups"]:  # a checkpoint of torch.optim does not know them
        for key in ("rho", "adaptive", "eta", "perturb"):
            group.pop(key, None)
    other.load_state_dict(plain)
    assert [g["rho"] for g in other.param_groups] == [g["rho"] for g in opt.param_groups]
    train(other, others, range(5, 7)), train(hand, theirs, range(5, 7))
    for a, b in zip(others, theirs, strict=True):
        torch.testing.assert_close(a.detach().cpu(), b.detach())


class SixtyThreeLines(torch.optim.Optimizer):
    """A stand-in for the file that everybody uses: old weights in `state`, a base whose state is elsewhere."""

    def __init__(self, params, base, rho=0.05, adaptive=False, **kwargs):
        super().__init__(params, dict(rho=rho, adaptive=adaptive, **kwargs))
        self.base_optimizer = base(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old_p"] = p.clone()
        self.base_optimizer.step()


@pytest.mark.parametrize("base", [SGD, AdamW])
def test_checkpoints_of_the_63_line_file(backend, device, base):
    options = dict(momentum=0.9) if base is SGD else {}
    params = cases.make_params(names=["matrix", "63"], device=device)
    file = SixtyThreeLines(params, base, rho=0.7, adaptive=True, lr=0.02, **options)
    for i, p in enumerate(params):
        p.grad = cases.gradient(p, i)
    file.step()
    checkpoint = through_a_file(file.state_dict())
    opt = FusedSAM(params, base, rho=0.1, lr=0.5, backend=backend, **options)
    with pytest.warns(UserWarning, match="old_p") as caught:
        opt.load_state_dict(checkpoint)
    assert len(caught) == 1
    group = opt.param_groups[0]
    assert (group["rho"], group["adaptive"], group["lr"]) == (0.7, True, 0.02)
    assert (group["eta"], group["perturb"]) == (0.0, True)
    assert oracle.saved_state(opt) == {}
    opt.step(cases.closure_of(params, 0, ["matrix", "63"]))
    assert all("old_p" not in entry for entry in opt.state.values())


@pytest.mark.parametrize("base", [SGD, Adam, AdamW, torch.optim.RMSprop])
@pytest.mark.parametrize("fresh", [True, False])
def test_distributed_checkpoint_state_dict(backend, device, base, fresh):
    options = dict(momentum=0.9) if base is SGD else {}
    model, other = cases.small_model(0).to(device), cases.small_model(1).to(device)
    make = lambda m: FusedSAM(m.parameters(), base, rho=0.2, lr=0.05, backend=backend, **options)  # noqa: E731
    opt, loaded = make(model), make(other)
    if not fresh:
        for seed in range(3):
            opt.step(cases.model_closure(model, opt, seed)) if device == "cpu" else None
    weights = [p.detach().clone() for p in model.parameters()]
    saved = copy.deepcopy(get_optimizer_state_dict(model, opt))
    for p, w in zip(model.parameters(), weights, strict=True):
        assert_same(p, w, what="saving changes no weight")
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, loaded, saved)
    if device == "cpu":
        for seed in range(3, 6):
            opt.step(cases.model_closure(model, opt, seed))
            loaded.step(cases.model_closure(other, loaded, seed))
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert_same(p, q)


@each_config
def test_a_reset_state_is_followed(backend, device, config):
    params, others = cases.make_params(device=device), cases.make_params(device=device)
    opt, fresh = cases.fused(params, config, backend), cases.fused(others, config, backend)
    train(opt, params, range(3))
    opt.state, fresh.state = defaultdict(dict), defaultdict(dict)  # Adagrad's is there from the start
    oracle.hand_over(params, others)
    train(opt, params, range(3, 6))
    train(fresh, others, range(3, 6))
    check_same(params, others)
    oracle.assert_same_state(opt, fresh)


@each_config
def test_a_checkpoint_loaded_into_the_base_optimizer_counts(backend, device, config):
    params, others = cases.make_params(device=device), cases.make_params(device=device, seed=9)
    opt, other = cases.fused(params, config, backend), cases.fused(others, config, backend)
    train(opt, params, range(3))
    train(other, others, range(1))
    oracle.hand_over(params, others)
    other.base_optimizer.load_state_dict(copy.deepcopy(opt.base_optimizer.state_dict()))
    train(opt, params, range(3, 6))
    train(other, others, range(3, 6))
    check_same(params, others)
    oracle.assert_same_state(opt, other)


@pytest.mark.parametrize("base, key", [(SGD, "momentum_buffer"), (AdamW, "exp_avg"), (AdamW, "exp_avg_sq")])
def test_a_replaced_state_tensor_is_absorbed_when_saving(backend, device, base, key):
    options = dict(momentum=0.9) if base is SGD else {}
    p = Parameter(torch.ones(5, device=device))
    opt = FusedSAM([p], base, lr=0.1, backend=backend, **options)

    def closure():
        p.grad = torch.full_like(p, 2.0)

    opt.step(closure)
    opt.state[p][key] = torch.full((5,), 7.0, device=device)
    assert_same(oracle.saved_state(opt)[0][key], torch.full((5,), 7.0))
    opt.step(closure)
    assert not torch.equal(oracle.saved_state(opt)[0][key].cpu(), torch.full((5,), 7.0))
    buffer = oracle.saved_state(opt)[0][key].cpu()
    expected = {"momentum_buffer": 0.9 * 7 + 2, "exp_avg": 0.9 * 7 + 0.1 * 2, "exp_avg_sq": 0.999 * 7 + 0.001 * 4}[key]
    torch.testing.assert_close(buffer, torch.full((5,), expected))


@each_config
def test_the_file_is_not_larger_than_torch_s(backend, device, config):
    ours, theirs = cases.make_params(device=device), cases.make_params()
    opt, hand = cases.fused(ours, config, backend), cases.by_hand(theirs, config)
    train(opt, ours, range(2)), train(hand, theirs, range(2))
    # Four keys a group, and neither backup nor padding.
    assert file_size(opt.state_dict()) <= file_size(hand.base.state_dict()) + 4096


def test_state_of_wrong_shape_is_refused(backend, device):
    def make(n):
        p = Parameter(torch.ones(n, device=device))
        opt = FusedSAM([p], SGD, lr=0.1, momentum=0.9, backend=backend)

        def closure():
            p.grad = torch.ones_like(p)

        return opt, closure

    opt, closure = make(5)
    opt.step(closure)
    other, other_closure = make(6)
    with pytest.raises(ValueError, match="shape"):
        other.load_state_dict(opt.state_dict())
        other.step(other_closure)


def test_hooks_may_change_what_is_loaded_in_any_way(backend, device):
    """As converting old checkpoints does; what no weight's dtype could hold is taken from what they leave, too."""
    config = cases.Config("adamw", AdamW, dict(lr=0.01, betas=(0.8, 0.95), rho=0.3))
    options = dict(master_weights=True, ema_decay=0.7)
    params = cases.make_params(device=device, dtype=torch.bfloat16)
    opt = cases.fused(params, config, backend, **options)
    train(opt, params, range(2))
    saved, names = copy.deepcopy(opt.state_dict()), ("exp_avg", "exp_avg_sq", "master", "ema")
    for held in saved["state"].values():
        held.update({name: held[name].flatten() for name in names})

    def reshape(opt, given):
        shaped = {
            i: held | {name: held[name].reshape(params[i].shape) for name in names}
            for i, held in given["state"].items()
        }
        return {**given, "state": shaped}

    others = twin(params)
    other = cases.fused(others, config, backend, **options)
    handle = other.register_load_state_dict_pre_hook(reshape)
    other.load_state_dict(saved)
    for step in range(2, 4):
        train(opt, params, [step]), train(other, others, [step])
    check_same(params, others)
    for i in saved["state"]:
        assert_same(opt.state[params[i]]["ema"], other.state[others[i]]["ema"])
    handle.remove()
    with pytest.raises(ValueError, match="must have its parameter's shape"):
        other.load_state_dict(saved)


@pytest.mark.parametrize("dry_run", ["before", "after"])
def test_lazy_modules_may_get_their_parameters_later(dry_run):
    """As with torch.optim, before or after a checkpoint is loaded."""

    def make(*layers):
        torch.manual_seed(0)
        model = torch.nn.Sequential(*layers)
        return model, FusedSAM(model.parameters(), AdamW, lr=0.01, rho=0.3, ema_decay=0.7, flatten=True)

    def step(model, opt):
        def closure():
            opt.zero_grad()
            model(x).square().sum().backward()

        opt.step(closure)

    x = torch.randn(4, 3)
    model, opt = make(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
    lazy, other = make(torch.nn.LazyLinear(5), torch.nn.Tanh(), torch.nn.LazyLinear(2))
    assert other.backend == {} and other.state_dict()["state"] == {}
    other.prepare()
    step(model, opt)
    if dry_run == "before":
        lazy(x)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    if dry_run == "after":
        lazy(x)
    lazy.load_state_dict(model.state_dict())
    for m, o in ((model, opt), (lazy, other)):
        step(m, o)
    for p, q in zip(model.parameters(), lazy.parameters(), strict=True):
        assert_same(p, q)
        assert_same(opt.state[p]["ema"], other.state[q]["ema"])


def test_version_is_public():
    assert fastsam.__version__.count(".") == 2


def saved_sizes(opt) -> list[int]:
    """Bytes of all that is saved of an optimizer, as a whole and of one parameter."""
    saved = opt.state_dict()
    values = [opt, saved, copy.deepcopy(saved), saved["state"][0], opt.state[opt.param_groups[0]["params"][7]]]
    return [len(pickle.dumps(value)) for value in values] + [file_size(value) for value in values]


@pytest.mark.parametrize("flatten", [False, True], ids=["", "flat"])
@pytest.mark.parametrize("masters", [False, True], ids=["plain", "masters"])
@pytest.mark.parametrize("base, options", [(SGD, dict(momentum=0.9)), (Adam, {})], ids=["sgd", "adam"])
def test_what_is_saved_takes_nothing_else_along(backend, device, base, options, masters, flatten):
    ours, theirs = ([Parameter(torch.ones(32, 32, device=device)) for _ in range(100)] for _ in range(2))
    for p in ours:
        p.data = p.data.to(torch.bfloat16 if masters else torch.float32)
    flags = dict(backend=backend, master_weights=masters, flatten=flatten)
    opt, other = FusedSAM(ours, base, lr=0.1, **flags, **options), base(theirs, lr=0.1, **options)
    for p in (*ours, *theirs):
        p.grad = torch.ones_like(p)
    opt.first_step(), opt.second_step(zero_grad=True), other.step(), other.zero_grad()
    for q in theirs if masters else ():
        other.state[q]["master"] = torch.ones_like(q)  # torch has none
    for size, expected in zip(saved_sizes(opt), saved_sizes(other), strict=True):
        assert size <= 1.1 * expected


@pytest.mark.parametrize("when", ["clean", "perturbed"])
@pytest.mark.parametrize("options", [{}, dict(master_weights=True)], ids=["plain", "masters"])
@pytest.mark.parametrize("config", **cases.ids(c for c in CONFIGS if c.name in ("groups", "adamw_groups")))
def test_a_state_that_is_shared_between_processes_trains_on(backend, device, config, options, when):
    if device != "cpu":
        pytest.skip("only memory of the CPU is shared between processes this way")

    def run(share):
        params = cases.make_params(torch.bfloat16)
        opt = cases.fused(params, config, backend, **options)
        train(opt, params, range(2))
        cases.set_gradients(params, 2, 1)
        if when == "perturbed":
            opt.first_step()
        shared = [t for held in opt.state.values() for t in held.values() if isinstance(t, torch.Tensor) and t.numel()]
        for t in shared[: 1 + len(shared) // 2] if share else ():
            t.share_memory_()
            assert t.is_shared()
        assert not share or not shared[-1].is_shared()
        if when == "perturbed":
            cases.set_gradients(params, 2, 2)
            opt.second_step()
        train(opt, params, range(3, 5))
        assert not share or shared[0].is_shared()
        return [oracle.bits(p) for p in params], oracle.saved_state(opt)

    (weights, state), (expected, expected_state) = run(True), run(False)
    assert weights == expected
    for held, other in zip(state.values(), expected_state.values(), strict=True):
        assert {k: oracle.bits(torch.as_tensor(v)) for k, v in held.items()} == {
            k: oracle.bits(torch.as_tensor(v)) for k, v in other.items()
        }
