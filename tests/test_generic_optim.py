"""What PyTorch asks of every optimizer, over its OptimizerInfo tables: SGD as control, FusedSAM on every backend."""

from __future__ import annotations

import importlib.util
import io
import math
import pickle
import sys
import types
import unittest
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import cases
import pytest
import torch
from oracle import assert_same, saved_state
from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fastsam import FusedSAM

if importlib.util.find_spec("expecttest") is None:  # torch's tables import it for a class that nothing here needs
    sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase)  # type: ignore[assignment]
from torch.testing._internal.common_optimizers import OptimizerInfo, OptimizerInput, optim_db  # noqa: E402

pytestmark = pytest.mark.filterwarnings(cases.NO_GRADIENTS)
TORCH = {info.optim_cls: info for info in optim_db}


def sam_info(base: type[torch.optim.Optimizer], backend: str) -> OptimizerInfo:
    """An OptimizerInfo of FusedSAM made from its base's."""
    sam = dict(base_optimizer=base, backend=backend, rho=0.03)

    def inputs(device: str, dtype: Any = None) -> list[OptimizerInput]:
        plain = TORCH[base].optim_inputs_func(device)
        # `capturable` is for accelerators, where the base is the one that refuses the CPU.
        plain = [i for i in plain if not i.kwargs.get("capturable")]
        plain.append(OptimizerInput(params=None, kwargs=dict(lr=0.01, rho=0.5, adaptive=True, eta=0.01), desc="asam"))
        return [OptimizerInput(params=None, kwargs={**sam, **i.kwargs}, desc=i.desc) for i in plain]

    return OptimizerInfo(FusedSAM, optim_inputs_func=inputs, step_requires_closure=True, supported_impls=())


INFOS = [pytest.param(TORCH[SGD], id="control")]
for _param in cases.BACKENDS:
    for _base in (SGD, Adam, AdamW):
        _info = sam_info(_base, _param.values[0])
        INFOS.append(pytest.param(_info, id=f"{_base.__name__}-{_param.values[0]}", marks=_param.marks))
INPUTS = [
    pytest.param(info.values[0], entry.kwargs, id=f"{info.id}-{entry.desc}", marks=info.marks)
    for info in INFOS
    for entry in info.values[0].optim_inputs_func("cpu")
]
each_optimizer = pytest.mark.parametrize("info", INFOS)
each_input = pytest.mark.parametrize("info, kwargs", INPUTS)


def inputs(keep: Callable[[dict[str, Any]], Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("info, kwargs", [entry for entry in INPUTS if keep(entry.values[1])])


def decays(kwargs: dict[str, Any]) -> bool:
    return kwargs.get("weight_decay", 0.01 if kwargs.get("base_optimizer") is AdamW else 0) != 0


is_sam = lambda info: info.optim_cls is FusedSAM  # noqa: E731


def device_of(kwargs: dict[str, Any]) -> str:
    return cases.device_of(kwargs.get("backend", "reference"))


def build(info: OptimizerInfo, params: Any, kwargs: dict[str, Any] | None = None, **more: Any) -> torch.optim.Optimizer:
    kwargs = info.optim_inputs_func("cpu")[1].kwargs if kwargs is None else kwargs
    return info.optim_cls(params, **deepcopy({**kwargs, **more}))


def regression(device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Parameter, Parameter, torch.Tensor]:
    torch.manual_seed(3)
    weight, bias = torch.randn(10, 5, dtype=dtype), torch.randn(10, dtype=dtype)
    return Parameter(weight.to(device)), Parameter(bias.to(device)), torch.randn(5, dtype=dtype).to(device)


def closure_for(opt: torch.optim.Optimizer, weight: Parameter, bias: Parameter, x: torch.Tensor, sign: int = 1):
    def closure() -> torch.Tensor:
        opt.zero_grad()
        y = weight.mv(x)
        (sign * (y + bias).abs().pow(2).sum()).backward()
        return (y + bias).detach().abs().pow(2).sum()

    return closure


@each_input
def test_learning_goes_in_the_right_direction(info, kwargs):
    learns(info, kwargs, schedulers=0)


@each_optimizer
def test_learning_goes_in_the_right_direction_with_two_schedulers(info):
    learns(info, info.optim_inputs_func("cpu")[1].kwargs, schedulers=2)


def learns(info, kwargs, schedulers):
    weight, bias, x = regression(device_of(kwargs))
    opt = build(info, [weight, bias], kwargs)
    made = [ExponentialLR(opt, 0.9), ReduceLROnPlateau(opt)][:schedulers]
    maximize = bool(kwargs.get("maximize"))
    closure = closure_for(opt, weight, bias, x, -1 if maximize else 1)
    losses = []
    for _ in range(10):
        losses.append(opt.step(closure))
        for scheduler in made:
            scheduler.step(*([losses[-1]] if isinstance(scheduler, ReduceLROnPlateau) else []))
    assert losses[-1] < losses[0]


@each_optimizer
def test_step_returns_the_closure_s_value(info):
    weight, bias, x = regression()
    opt = build(info, [weight, bias])
    expected = (weight.mv(x) + bias).pow(2).sum()
    assert opt.step(closure_for(opt, weight, bias, x)) == pytest.approx(expected.item())


@each_input
def test_a_closure_without_backward_changes_nothing(info, kwargs):
    params = cases.make_params(names=["one", "matrix", "empty"])
    before = [p.detach().clone() for p in params]
    opt = build(info, params, kwargs)
    assert opt.step(lambda: 4.5) == 4.5
    for p, w in zip(params, before, strict=True):
        assert_same(p, w)


@each_input
def test_empty_gradients_change_nothing(info, kwargs):
    p = Parameter(torch.empty(5, 0))
    opt = build(info, [p], kwargs)

    def closure():
        p.grad = torch.empty(5, 0)

    opt.step(closure)
    assert p.shape == (5, 0)


@inputs(lambda kwargs: not decays(kwargs))
def test_zero_gradients_are_an_exact_no_op(info, kwargs):
    params = cases.make_params(names=["one", "matrix", "transposed"])
    before = [p.detach().clone() for p in params]
    opt = build(info, params, kwargs)

    def closure():
        for p in params:
            p.grad = torch.zeros_like(p)

    for _ in range(2):
        opt.step(closure)
    for p, w in zip(params, before, strict=True):
        assert_same(p, w)


@each_input
def test_gradients_are_neither_modified_nor_dropped(info, kwargs):
    weight, bias, x = regression()
    opt = build(info, [weight, bias], kwargs)
    closure, made = closure_for(opt, weight, bias, x), []

    def recording():
        loss = closure()
        made.append([(p.grad, p.grad.clone(), p.grad._version) for p in (weight, bias)])
        return loss

    for _ in range(2):
        opt.step(recording)
        for p, (grad, value, version) in zip((weight, bias), made[-1], strict=True):
            assert p.grad is grad
            assert_same(grad, value)
            assert grad._version == version


@each_optimizer
def test_hooks_run_once_a_step_and_in_order(info):
    weight, bias, x = regression()
    opt, calls = build(info, [weight, bias]), []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("global pre")),
        opt.register_step_pre_hook(lambda *_: calls.append("pre")),
        opt.register_step_post_hook(lambda *_: calls.append("post")),
        register_optimizer_step_post_hook(lambda *_: calls.append("global post")),
    ]
    try:
        for _ in range(2):
            opt.step(closure_for(opt, weight, bias, x))
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["global pre", "pre", "post", "global post"] * 2


@each_optimizer
def test_state_dict_hooks(info):
    weight, bias, x = regression()
    opt, calls = build(info, [weight, bias]), []
    opt.register_state_dict_pre_hook(lambda o: calls.append("save pre"))
    opt.register_state_dict_post_hook(lambda o, s: calls.append("save post") or {**s, "mine": 1})
    opt.register_load_state_dict_pre_hook(lambda o, s: calls.append("load pre"))
    opt.register_load_state_dict_post_hook(lambda o: calls.append("load post"))
    saved = opt.state_dict()
    assert saved["mine"] == 1
    opt.load_state_dict(saved)
    assert calls == ["save pre", "save post", "load pre", "load post"]


@each_input
def test_state_dict_is_deterministic(info, kwargs):
    weight, bias, x = regression()
    opt = build(info, [weight, bias], kwargs)
    for _ in range(2):
        opt.step(closure_for(opt, weight, bias, x))
    other_weight, other_bias = (Parameter(p.detach().clone()) for p in (weight, bias))
    other = build(info, [other_weight, other_bias], kwargs)
    other.load_state_dict(deepcopy(opt.state_dict()))  # torch itself would share the tensors
    for _ in range(3):
        opt.step(closure_for(opt, weight, bias, x))
        other.step(closure_for(other, other_weight, other_bias, x))
        assert_same(weight, other_weight)
        assert_same(bias, other_bias)


@each_input
def test_state_dict_through_weights_only(info, kwargs):
    weight, bias, x = regression()
    opt = build(info, [weight, bias], kwargs)
    opt.step(closure_for(opt, weight, bias, x))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded["param_groups"] == opt.state_dict()["param_groups"]
    for k, entry in saved_state(opt).items():
        for key, value in entry.items():
            assert_same(torch.as_tensor(loaded["state"][k][key]), torch.as_tensor(value))


@pytest.mark.parametrize("named_first", [True, False])
@each_optimizer
def test_named_parameters_load_both_ways(info, named_first):
    def make(named):
        weight, bias, x = regression()
        return build(info, [("w", weight), ("b", bias)] if named else [weight, bias]), weight, bias, x

    (opt, *problem), (other, *_) = make(named_first), make(not named_first)
    opt.step(closure_for(opt, *problem))
    other.load_state_dict(opt.state_dict())
    assert [g.get("param_names") for g in opt.param_groups] == [["w", "b"] if named_first else None]
    assert other.param_groups[0]["param_names"] == ["w", "b"]


@each_optimizer
def test_an_older_state_dict_without_newer_keys(info):
    weight, bias, x = regression()
    opt = build(info, [weight, bias])
    opt.step(closure_for(opt, weight, bias, x))
    saved = opt.state_dict()
    for group in saved["param_groups"]:
        for key in ("foreach", "differentiable", "maximize", "fused", "eta", "perturb"):
            group.pop(key, None)
    other = build(info, [weight, bias])
    other.load_state_dict(saved)
    other.step(closure_for(other, weight, bias, x))


@each_input
def test_deepcopy_keeps_public_attributes(info, kwargs):
    weight, bias, x = regression()
    opt = build(info, [weight, bias], kwargs)
    opt.step(closure_for(opt, weight, bias, x))
    copy = deepcopy(opt)
    public = lambda o: {name for name in vars(o) if not name.startswith("_")}  # noqa: E731
    assert public(copy) == public(opt)
    assert {k: v for k, v in copy.state_dict()["param_groups"][0].items()} == opt.state_dict()["param_groups"][0]


@each_input
def test_pickle(info, kwargs):
    weight, bias, x = regression()
    opt = build(info, [weight, bias], kwargs)
    opt.step(closure_for(opt, weight, bias, x))
    copy = pickle.loads(pickle.dumps(opt))
    other_weight, other_bias = copy.param_groups[0]["params"]
    for _ in range(2):
        opt.step(closure_for(opt, weight, bias, x))
        copy.step(closure_for(copy, other_weight, other_bias, x))
    assert_same(other_weight, weight)
    assert repr(copy) == repr(opt)


@pytest.mark.parametrize("dims", [0, 1, 2])
@each_optimizer
def test_tensor_learning_rates(info, dims):
    def run(lr, gamma):
        weight, bias, x = regression()
        opt = build(info, [weight, bias], lr=lr)
        scheduler = ExponentialLR(opt, gamma)
        for _ in range(4):
            opt.step(closure_for(opt, weight, bias, x))
            scheduler.step()
        return opt, weight

    lr = torch.full((1,) * dims, 0.01)
    plain, expected = run(0.01, 0.7)
    opt, weight = run(lr, 0.7)
    # The schedule multiplies in float32 where lr is a float32 tensor and in float64 where it is a number.
    torch.testing.assert_close(weight, expected)
    assert isinstance(opt.param_groups[0]["lr"], torch.Tensor) and opt.param_groups[0]["lr"].shape == lr.shape


@inputs(lambda kwargs: not kwargs.get("maximize"))
def test_weight_decay_by_group(info, kwargs):
    weight, bias, _ = regression()
    opt = build(info, [dict(params=[weight], weight_decay=0.9), dict(params=[bias], weight_decay=0.0)], kwargs, lr=0.1)
    before = weight.norm(), bias.detach().clone()

    def closure():
        weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)

    for _ in range(3):
        opt.step(closure)
    assert weight.norm() < before[0]
    assert_same(bias, before[1])


@each_input
def test_learning_rate_by_group(info, kwargs):
    weight, bias, x = regression()
    opt = build(info, [dict(params=[weight]), dict(params=[bias], lr=0.0)], kwargs)
    before = weight.detach().clone(), bias.detach().clone()
    for _ in range(3):
        opt.step(closure_for(opt, weight, bias, x))
    assert not torch.equal(weight, before[0])
    assert_same(bias, before[1])


@inputs(lambda kwargs: not kwargs.get("adaptive"))  # which is refused: see test_layouts
def test_complex_is_two_reals(info, kwargs):
    torch.manual_seed(5)
    value, slopes = torch.randn(6, dtype=torch.complex64), torch.randn(4, 6, dtype=torch.complex64)
    z, pair = Parameter(value.clone()), Parameter(torch.view_as_real(value).clone())
    opt, other = build(info, [z], kwargs), build(info, [pair], kwargs)
    for slope in slopes:

        def closure(slope=slope):
            z.grad = slope + 0.3 * z.detach()

        def pair_closure(slope=slope):
            pair.grad = torch.view_as_real(slope) + 0.3 * pair.detach()

        opt.step(closure), other.step(pair_closure)
        assert_same(torch.view_as_real(z.detach()), pair)


@each_optimizer
def test_add_param_group(info):
    weight, bias, x = regression()
    opt = build(info, [weight])
    opt.step(closure_for(opt, weight, bias, x))
    opt.add_param_group(dict(params=[bias], lr=0.3))
    assert opt.param_groups[1].keys() == opt.param_groups[0].keys()
    before = bias.detach().clone()
    opt.step(closure_for(opt, weight, bias, x))
    assert not torch.equal(bias, before)
    assert set(saved_state(opt)) <= {0, 1}


ERRORS = [
    pytest.param(info.values[0], error, id=f"{info.id}-{error.optimizer_error_input.desc}", marks=info.marks)
    for info in INFOS
    for error in TORCH[SGD].optim_error_inputs_func("cpu", torch.float32)
    if "momentum" not in error.optimizer_error_input.desc or info.id == "control" or info.id.startswith("SGD")
]


@pytest.mark.parametrize("info, error", ERRORS)
def test_errors_of_the_constructor(info, error):
    entry = error.optimizer_error_input
    params = [Parameter(torch.randn(2, 2))] if entry.params is None else entry.params
    expects = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
    twice = is_sam(info) and issubclass(error.error_type, Warning)  # a parameter twice in a group: torch only warns
    refused = pytest.raises(ValueError, match="must be listed once") if twice else nullcontext()
    with expects(error.error_type, match=error.error_regex), refused:
        build(info, params, **entry.kwargs)


@pytest.mark.filterwarnings(cases.PROFILER)
@each_optimizer
def test_profiler_sees_one_range_a_step(info):
    weight, bias, x = regression()
    opt = build(info, [weight, bias])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step(closure_for(opt, weight, bias, x))
    name = f"Optimizer.step#{info.optim_cls.__name__}.step"
    assert [event.count for event in profile.key_averages() if event.key == name] == [1]


@each_optimizer
def test_non_tensor_steps_load(info):
    weight, bias, x = regression()
    opt = build(info, [weight, bias])
    opt.step(closure_for(opt, weight, bias, x))
    saved = opt.state_dict()
    for entry in saved["state"].values():
        if "step" in entry:
            entry["step"] = float(entry["step"])
    opt.load_state_dict(saved)
    opt.step(closure_for(opt, weight, bias, x))
    for entry in saved_state(opt).values():
        assert math.isclose(entry.get("step", 2.0), 2.0)


@each_optimizer
def test_printing(info):
    weight, bias, x = regression()
    opt = build(info, [weight, bias])
    opt.step(closure_for(opt, weight, bias, x))
    assert info.optim_cls.__name__ in repr(opt) and "lr: " in repr(opt)


def test_what_torch_says_once_a_process_on_a_gpu_fails_no_test():
    """Whichever test multiplies matrices first in a backward pass gets it."""
    warnings.warn("Attempting to run cuBLAS, but there was no current CUDA context! Attempting to set it", stacklevel=1)
