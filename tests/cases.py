"""Tables that the tests share: base optimizers and their options, shapes, gradients, backends."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import oracle
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, RAdam, RMSprop

import fastsam
from fastsam import ops


class Config(NamedTuple):
    """A base optimizer with options; `groups` override them, and parameters are dealt to the groups in turn."""

    name: str
    base: type[torch.optim.Optimizer]
    options: dict[str, Any]
    groups: tuple[dict[str, Any], ...] = ({},)


ADAM_OPTIONS = dict(lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, rho=0.3)

SGD_CONFIGS = [
    Config("plain", SGD, dict(lr=0.1, weight_decay=0.02, rho=0.2)),
    Config("momentum", SGD, dict(lr=0.1, momentum=0.9, weight_decay=0.01, rho=0.2)),
    Config("dampening", SGD, dict(lr=0.07, momentum=0.8, dampening=0.4, weight_decay=0.02, rho=0.3)),
    Config("nesterov", SGD, dict(lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01, rho=0.1)),
    Config("maximize", SGD, dict(lr=0.05, momentum=0.7, maximize=True, weight_decay=0.03, rho=0.2)),
    Config("asam", SGD, dict(lr=0.1, momentum=0.9, weight_decay=0.01, rho=0.5, adaptive=True)),
    Config("asam_eta", SGD, dict(lr=0.1, momentum=0.6, weight_decay=0.01, rho=0.5, adaptive=True, eta=0.03)),
    Config(
        "groups",
        SGD,
        dict(lr=0.1, momentum=0.9, weight_decay=0.01, rho=0.2),
        (
            dict(lr=0.03, rho=0.7),
            dict(adaptive=True, eta=0.02, nesterov=True),
            dict(momentum=0.0, rho=0.0),
            dict(perturb=False, dampening=0.3),
            dict(adaptive=True, maximize=True, weight_decay=0.0),
        ),
    ),
]
ADAM_CONFIGS = [
    Config("adam", Adam, ADAM_OPTIONS),
    Config("adam_amsgrad_maximize", Adam, dict(ADAM_OPTIONS, amsgrad=True, maximize=True)),
    Config("adam_decoupled", Adam, dict(ADAM_OPTIONS, decoupled_weight_decay=True)),
    Config("adamw", AdamW, ADAM_OPTIONS),
    Config("adamw_amsgrad", AdamW, dict(ADAM_OPTIONS, amsgrad=True)),
    Config("adamw_asam_eta", AdamW, dict(ADAM_OPTIONS, adaptive=True, eta=0.01)),
    Config(
        "adamw_groups",
        AdamW,
        ADAM_OPTIONS,
        (
            dict(lr=0.003, rho=0.9, betas=(0.4, 0.7)),
            dict(amsgrad=True, adaptive=True, eta=0.02),
            dict(weight_decay=0.0, perturb=False),
            dict(maximize=True, eps=1e-3, rho=0.0),
        ),
    ),
]
RMSPROP_OPTIONS = dict(lr=0.01, alpha=0.9, eps=1e-4, weight_decay=0.05, rho=0.3)
RMSPROP_CONFIGS = [
    Config("rmsprop", RMSprop, RMSPROP_OPTIONS),
    Config("rmsprop_momentum_maximize", RMSprop, dict(RMSPROP_OPTIONS, momentum=0.8, maximize=True)),
    Config("rmsprop_centered", RMSprop, dict(RMSPROP_OPTIONS, centered=True, weight_decay=0.0)),
    Config("rmsprop_centered_asam", RMSprop, dict(RMSPROP_OPTIONS, centered=True, momentum=0.7, adaptive=True)),
    Config(
        "rmsprop_groups",
        RMSprop,
        dict(RMSPROP_OPTIONS, momentum=0.6),
        (
            dict(lr=0.003, alpha=0.4, rho=0.9),
            dict(momentum=0.0, adaptive=True, eta=0.02),
            dict(centered=True, perturb=False),
            dict(momentum=0.0, centered=True, eps=1e-2, maximize=True, rho=0.0),
        ),
    ),
]
ADAGRAD_OPTIONS = dict(lr=0.05, lr_decay=0.1, eps=1e-6, weight_decay=0.05, initial_accumulator_value=0.2, rho=0.3)
ADAGRAD_CONFIGS = [
    Config("adagrad", Adagrad, ADAGRAD_OPTIONS),
    Config("adagrad_maximize", Adagrad, dict(ADAGRAD_OPTIONS, maximize=True, weight_decay=0.0)),
    Config(
        "adagrad_groups",
        Adagrad,
        ADAGRAD_OPTIONS,
        (dict(lr=0.02, lr_decay=0.3, rho=0.7), dict(eps=1e-3, adaptive=True, eta=0.02), dict(perturb=False)),
    ),
]
NADAM_OPTIONS = dict(ADAM_OPTIONS, momentum_decay=0.02)
NADAM_CONFIGS = [
    Config("nadam", NAdam, NADAM_OPTIONS),
    Config("nadam_decoupled_maximize", NAdam, dict(NADAM_OPTIONS, decoupled_weight_decay=True, maximize=True)),
    Config(
        "nadam_groups",
        NAdam,
        NADAM_OPTIONS,
        (
            dict(lr=0.003, rho=0.9, betas=(0.4, 0.7), momentum_decay=0.1),
            dict(decoupled_weight_decay=True, adaptive=True, eta=0.02),
            dict(weight_decay=0.0, perturb=False, eps=1e-3),
        ),
    ),
]
RADAM_CONFIGS = [  # with beta2 = 0.95 rectified from step 6 on, with 0.7 never
    Config("radam", RAdam, ADAM_OPTIONS),
    Config("radam_decoupled_maximize", RAdam, dict(ADAM_OPTIONS, decoupled_weight_decay=True, maximize=True)),
    Config(
        "radam_groups",
        RAdam,
        ADAM_OPTIONS,
        (
            dict(lr=0.003, rho=0.9, betas=(0.4, 0.7)),
            dict(decoupled_weight_decay=True, adaptive=True, eta=0.02),
            dict(weight_decay=0.0, perturb=False, betas=(0.7, 0.98)),
        ),
    ),
]
# The rules that take a square root.
ROOT_CONFIGS = ADAM_CONFIGS + RMSPROP_CONFIGS + ADAGRAD_CONFIGS + NADAM_CONFIGS + RADAM_CONFIGS
# With beta1 = 0.8, m = -g / 4 would make c 0 but for the rounding of beta1, and its sign another in each precision.
LION_OPTIONS = dict(lr=0.003, betas=(0.8123, 0.95), weight_decay=0.3, rho=0.3)
LION_CONFIGS = [
    Config("lion", fastsam.Lion, LION_OPTIONS),
    Config("lion_maximize", fastsam.Lion, dict(LION_OPTIONS, maximize=True, weight_decay=0.0)),
    Config(
        "lion_groups",
        fastsam.Lion,
        LION_OPTIONS,
        (dict(lr=0.001, rho=0.9, betas=(0.4123, 0.3)), dict(adaptive=True, eta=0.02), dict(perturb=False)),
    ),
]
EXACT_CONFIGS = SGD_CONFIGS + LION_CONFIGS  # products and sums alone
CONFIGS = SGD_CONFIGS + ROOT_CONFIGS + LION_CONFIGS

# Every other class of torch.optim, on matrices, which Muon wants.
UNFUSED = [
    Config("adafactor", torch.optim.Adafactor, dict(lr=0.02, rho=0.2, weight_decay=0.01)),
    Config("adamax", torch.optim.Adamax, dict(lr=0.01, rho=0.2, weight_decay=0.01)),
    Config("asgd", torch.optim.ASGD, dict(lr=0.02, rho=0.2, t0=3, weight_decay=0.01)),
    Config("muon", torch.optim.Muon, dict(lr=0.02, rho=0.2, weight_decay=0.05)),
    Config("rprop", torch.optim.Rprop, dict(lr=0.01, rho=0.2, etas=(0.4, 1.3))),
]

SHAPES: dict[str, Callable[[], Tensor]] = {
    "matrix": lambda: torch.randn(17, 9, dtype=torch.float64),
    "scalar": lambda: torch.randn((), dtype=torch.float64),
    "empty": lambda: torch.randn(0, dtype=torch.float64),
    "one": lambda: torch.randn(1, dtype=torch.float64),
    "63": lambda: torch.randn(63, dtype=torch.float64),
    "1025": lambda: torch.randn(1025, dtype=torch.float64),
    "above a chunk": lambda: torch.randn(8193, dtype=torch.float64),
    "transposed": lambda: torch.randn(6, 5, dtype=torch.float64).t(),
    "channels_last": lambda: torch.randn(2, 3, 4, 5, dtype=torch.float64).to(memory_format=torch.channels_last),
    "never a gradient": lambda: torch.randn(7, dtype=torch.float64),
    "two chunks and a row": lambda: torch.randn(2 * 8192 + 2049, dtype=torch.float64),
    "64": lambda: torch.randn(8, 8, dtype=torch.float64),
    **{f"small {n}": lambda n=n: torch.randn(n, dtype=torch.float64) for n in range(2, 8)},
}
NAMES = list(SHAPES)
# Steps without any gradient are part of many tests; that they warn is tested in test_lost_nothing.py.
NO_GRADIENTS = "ignore:FusedSAM. no parameter had a gradient:UserWarning"
PROFILER = "ignore:Profiler clears events at the end of each cycle:UserWarning"  # torch 2.11 says so of any use
MATRICES = ["matrix", "transposed", "64"]
STEPS = 8  # every event of `missing` and one step after


def missing(step: int, pass_: int, name: str) -> bool:
    """Whether a parameter is without gradient: frozen at 3 and thawed at 5, one pass only, nobody at all."""
    return (
        name == "never a gradient"
        or (name == "matrix" and step in (3, 4))
        or (name == "63" and (step, pass_) == (2, 1))
        or (name == "1025" and (step, pass_) == (4, 2))
        or (name == "64" and step < 2)
        or step == 6
    )


def ids(configs: Iterable[Config]) -> dict[str, Any]:
    configs = list(configs)
    return dict(argvalues=configs, ids=[config.name for config in configs])


def make_params(
    dtype: torch.dtype = torch.float32, names: Sequence[str] = NAMES, seed: int = 0, device: str = "cpu"
) -> list[Parameter]:
    """Parameters in the layouts of SHAPES; the same values for each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        values = {name: SHAPES[name]() for name in NAMES}
    return [Parameter(torch.empty_like(values[n], dtype=dtype, device=device).copy_(values[n])) for n in names]


def gradient(p: Tensor, seed: int, coupling: float = 0.3) -> Tensor:
    """A gradient in p's layout: noise, and `coupling` times p, so that it tells where it was taken."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(p.shape, generator=generator, dtype=torch.complex128 if p.is_complex() else torch.float64)
    value = noise.to(p.dtype)
    if coupling:
        value = value + coupling * p.detach().cpu()
    return torch.empty_like(p.detach()).copy_(value)


def set_gradients(
    params: Sequence[Parameter], step: int, pass_: int, names: Sequence[str] = NAMES, **kwargs: Any
) -> None:
    """What a backward pass does, with the gaps of `missing`."""
    for i, (p, name) in enumerate(zip(params, names, strict=True)):
        p.grad = None if missing(step, pass_, name) else gradient(p, 1000 * step + 500 * pass_ + i)


def closure_of(params: Sequence[Parameter], step: int, names: Sequence[str] = NAMES) -> Callable[[], Tensor]:
    """A closure whose first call makes the gradients of pass 1 and whose second makes those of pass 2."""
    calls = iter((1, 2))

    def closure() -> Tensor:
        pass_ = next(calls)
        set_gradients(params, step, pass_, names)
        return torch.tensor(10.0 * step + pass_)

    return closure


def param_groups(params: Sequence[Parameter], config: Config) -> list[dict[str, Any]]:
    n = len(config.groups)
    return [dict(override, params=list(params[k::n])) for k, override in enumerate(config.groups)]


def fused(params: Sequence[Parameter], config: Config, backend: str = "reference", **kwargs: Any) -> fastsam.FusedSAM:
    options = dict(config.options, **kwargs)
    rho, base_options = options.pop("rho"), options
    return fastsam.FusedSAM(param_groups(params, config), config.base, rho, backend=backend, **base_options)


def for_loop(config: Config) -> dict[str, Any]:
    """What keeps a base that steps by itself from another order of roundings, which it takes on a GPU by default."""
    fuses = config not in UNFUSED or "foreach" not in inspect.signature(config.base).parameters
    return {} if fuses else {"foreach": False}


def by_hand(params: Sequence[Parameter], config: Config, **kwargs: Any) -> oracle.SamByHand:
    return oracle.SamByHand(param_groups(params, config), config.base, **config.options, **kwargs)


def small_model(seed: int = 0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))


def batch(seed: int = 1, rows: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 5, generator=generator), torch.randn(rows, 3, generator=generator)


def model_closure(model: torch.nn.Module, opt: torch.optim.Optimizer, seed: int = 1) -> Callable[[], Tensor]:
    """The closure of the README: zero, forward, backward, loss."""
    x, y = batch(seed)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    return closure


def available_backends() -> list[Any]:
    """Those of this machine; test_contract.py::test_backend_is_available says why others are not."""
    marks = {"cuda": [pytest.mark.cuda], "triton": [] if interpreted() else [pytest.mark.cuda]}
    return [pytest.param(name, marks=marks.get(name, [])) for name, why in ops.backends().items() if why is None]


def device_of(backend: str) -> str:
    """Where tests of a backend put their tensors."""
    return "cuda" if backend == "cuda" or (backend == "triton" and not interpreted()) else "cpu"


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, operations: Any) -> None:
    """Let other operations stand for a backend's own, called one by one."""
    real = ops.backend_named
    other = real(name)._replace(operations=operations, bind=None)
    monkeypatch.setattr(ops, "backend_named", lambda asked: other if asked == name else real(asked))


def interpreted() -> bool:
    """Whether Triton's kernels run on the CPU: decided before Triton is imported, for the whole process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


BACKENDS = available_backends()
