"""Optimizers by name: every method has one, groups are right, and what nobody knows is refused with what is known."""

from __future__ import annotations

import functools

import cases
import pytest
import torch
from torch import nn

import fastsam
from fastsam import FusedSAM, methods
from fastsam.commands.methods import FAMILY
from fastsam.registry import METHODS


class OwnRMSNorm(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(n))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale / x.square().mean(-1, keepdim=True).add(1e-6).sqrt()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pos_embed = nn.Parameter(torch.zeros(1, 7))
        self.temperature = nn.Parameter(torch.ones(()))
        self.stem = nn.Linear(5, 7)
        self.first = nn.LayerNorm(7)
        self.second = OwnRMSNorm(7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(self.stem(x) + self.pos_embed))) * self.temperature


def groups_of(opt: torch.optim.Optimizer, model: nn.Module, *keys: str) -> list[tuple]:
    """Of each group the values of these keys and the parameters' names."""
    names = {param: name for name, param in model.named_parameters()}
    return [(*(g[key] for key in keys), [names[p] for p in g["params"]]) for g in opt.param_groups]


@pytest.mark.parametrize("name", fastsam.list())
def test_every_method_learns(name):
    model = Net()
    opt = fastsam.create(name, "adamw", model, lr=0.02, weight_decay=0.05)
    assert type(opt) is METHODS[name].cls
    for key, value in METHODS[name].options.items():
        if key not in opt.param_groups[0]:
            assert getattr(opt, key) == value
    assert {group["weight_decay"] for group in opt.param_groups} == {0.05, 0.0}
    x, y = cases.batch(1)

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    losses = [opt.step(closure).item() for _ in range(15)]
    assert losses[-1] < losses[0]


def test_every_method_and_every_row_of_the_table_has_a_name():
    classes = {item.cls for item in METHODS.values()}
    assert classes == {FusedSAM, *(getattr(methods, name) for name in methods.__all__)}
    assert {method.cls for method in FAMILY} <= classes
    assert fastsam.list() == list(METHODS) and all(name.isalnum() and name.islower() for name in METHODS)


@pytest.mark.parametrize("base", fastsam.list("base_optimizers"))
def test_every_base_optimizer_has_a_name(base):
    model = nn.Linear(3, 3, bias=False)
    opt = fastsam.create("sam", base, model)
    assert type(opt.base_optimizer).__name__.lower() == base


def test_bases_that_cannot_be_wrapped_are_not_listed():
    listed = fastsam.list("base_optimizers")
    assert {"sgd", "adamw", "lion"} <= set(listed) and not {"lbfgs", "sparseadam", "adadelta"} & set(listed)
    with pytest.raises(ValueError, match='of must be "methods" or "base_optimizers"'):
        fastsam.list("optimizers")


DECAYS = ["stem.weight", "head.weight"]
KEPT = ["stem.bias", "first.weight", "first.bias", "second.scale", "head.bias"]
NO_DECAY = [
    (("bias", "norm"), ["pos_embed", "temperature", *DECAYS]),
    (("1d",), ["pos_embed", *DECAYS]),
    (("1d", "pos_embed"), DECAYS),
    (("norm",), ["pos_embed", "temperature", "stem.weight", "stem.bias", "head.weight", "head.bias"]),
    (("head.weight", "stem"), ["pos_embed", "temperature", *KEPT[1:]]),
    ((), None),
    (None, None),
]


@pytest.mark.parametrize("no_decay, expected", NO_DECAY, ids=[" ".join(names or ["none"]) for names, _ in NO_DECAY])
def test_what_decays(no_decay, expected):
    model = Net()
    opt = fastsam.create("sam", "adamw", model, lr=0.1, weight_decay=0.3, no_decay=no_decay)
    every = [name for name, _ in model.named_parameters()]
    rest = [name for name in every if name not in (expected or every)]
    both = [(0.3, expected or every), (0.0, rest)]
    assert groups_of(opt, model, "weight_decay") == [group for group in both if group[1]]


@pytest.mark.parametrize(
    "base, weight_decay, expected",
    [
        ("adamw", None, [0.01, 0.0]),
        ("sgd", None, [0]),
        ("adamw", 0.0, [0.0]),
        (functools.partial(torch.optim.SGD, weight_decay=0.2), None, [0.2, 0.0]),
        (functools.partial(torch.optim.SGD, weight_decay=0.2), 0.1, [0.1, 0.0]),
        (torch.optim.SGD, 0.1, [0.1, 0.0]),
    ],
)
def test_where_the_decay_comes_from(base, weight_decay, expected):
    opt = fastsam.create("sam", base, Net(), lr=0.1, weight_decay=weight_decay)
    assert [group["weight_decay"] for group in opt.param_groups] == expected


def test_a_tied_parameter_is_kept_by_any_of_its_names():
    model = Net()
    model.again = nn.Linear(7, 3)
    model.again.weight = model.head.weight
    opt = fastsam.create("sam", "adamw", model, no_decay=("again.weight",))
    assert opt.param_groups[1]["params"] == [model.head.weight]


def test_asam_and_sam_on_have_their_groups():
    model = Net()
    weights, others = [DECAYS[0], DECAYS[1]], ["pos_embed", "temperature"]
    opt = fastsam.create("ASAM", "sgd", model, lr=0.1, weight_decay=0.1, rho=0.7)
    assert groups_of(opt, model, "adaptive", "eta", "rho", "weight_decay") == [
        (True, 0.01, 0.7, 0.1, weights),
        (True, 0.01, 0.7, 0.0, ["first.weight"]),
        (False, 0.0, 0.7, 0.1, others),
        (False, 0.0, 0.7, 0.0, ["stem.bias", "first.bias", "second.scale", "head.bias"]),
    ]
    assert fastsam.create("asam", "sgd", model, lr=0.1).param_groups[0]["rho"] == 0.5
    opt = fastsam.create("SAM-ON", "sgd", model, lr=0.1)
    perturbed, rest = groups_of(opt, model, "perturb")
    assert perturbed == (True, ["first.weight", "first.bias"]) and rest[0] is False


def test_it_is_the_class_with_these_groups():
    ours, theirs = Net(), Net()
    opt = fastsam.create("gsam", "sgd", ours, lr=0.1, momentum=0.9, rho=0.1, alpha=0.3, no_decay=())
    same = methods.GSAM(theirs.parameters(), "sgd", rho=0.1, alpha=0.3, lr=0.1, momentum=0.9)
    x, y = cases.batch(1)
    for _ in range(3):
        for model, optimizer in ((ours, opt), (theirs, same)):
            for _ in range(2):
                nn.functional.mse_loss(model(x), y).backward()
                if not optimizer.perturbed:
                    optimizer.first_step(zero_grad=True)
            optimizer.second_step(zero_grad=True)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


REFUSED = [
    (("gsma", "sgd"), {}, "no method 'gsma'; known are sam, asam, gsam, .*; did you mean 'gsam'"),
    ((None, "sgd"), {}, "no method None; known are"),
    (("sam", "adam-w"), {}, "no base_optimizer 'adam-w'; known are .*adamw.*; did you mean 'adamw'"),
    (("sam", "lbfgs"), {}, "LBFGS cannot be the base optimizer"),
    (("sam", 3), {}, "base_optimizer must be a name .* got 3"),
    (("gsam", "sgd"), dict(alhpa=0.4), "no option 'alhpa': GSAM has rho, alpha; FusedSAM has .*; SGD has lr, momentum"),
    (
        ("gsam", "sgd"),
        dict(alhpa=0.4, weightdecay=0.1),
        "'weightdecay': .*; did you mean 'alpha', 'weight_decay'",
    ),
    (("asam", "sgd"), dict(adaptive=False), "asam decides adaptive itself"),
    (("sam", "adamw"), dict(no_decay="bias"), r"no_decay must be several names, got 'bias'; write \('bias',\)"),
    (
        ("sam", "adamw"),
        dict(no_decay=("posembed",)),
        "none has the part 'posembed'; their names' parts are bias.*; did you mean 'pos_embed'",
    ),
]


@pytest.mark.parametrize("names, options, message", REFUSED, ids=[message[:24] for *_, message in REFUSED])
def test_what_nobody_knows(names, options, message):
    with pytest.raises(ValueError, match=message):
        fastsam.create(*names, Net(), **options)


def test_parameters_do_not_say_which_are_those_of_norm_layers():
    with pytest.raises(ValueError, match=r"model must be a torch.nn.Module, got list; .* build GSAM\(params"):
        fastsam.create("gsam", "sgd", list(Net().named_parameters()))
