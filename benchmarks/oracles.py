"""Whether every method does what its formula says, before its time is printed.

The formulas are those of tests/methods_by_hand.py, which shares no code with fastsam: some steps of a small
convolutional network in float64, with options as in the table of methods. ESAM and Sparse SAM draw random masks, so
their perturbation is looked at instead.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastsam.commands.demo_training import BATCH_SIZE, digits, network
from fastsam.commands.methods import Method

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import methods_by_hand as by_hand  # noqa: E402

STEPS, LR, RHO = 7, 0.05, 0.2
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": LR, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"lr": LR, "eps": 1e-4}),
}


class ASAM(by_hand.ByHand):
    """T = abs(w) + eta in groups that are adaptive, else 1."""

    def _scaled(self, g1: by_hand.Vector, power: int) -> by_hand.Vector:
        units = {}
        for group in self.base.param_groups:
            for p in group["params"]:
                units[p] = (p.abs() + group["eta"]) ** power if group["adaptive"] else torch.ones_like(p)
        return {p: units[p] * g for p, g in g1.items()}

    def ascent(self, g1: by_hand.Vector) -> by_hand.Vector:
        """T^2 g1."""
        return self._scaled(g1, 2)

    def divisor(self, d: by_hand.Vector, g1: by_hand.Vector) -> float:
        """|T g1|."""
        return by_hand.norm(self._scaled(g1, 1))


class OnlyIn(by_hand.ByHand):
    """SAM in the steps of a rule, the base optimizer in the others."""

    rule: Any = None

    def one_pass(self) -> bool:
        """Whether the rule says no."""
        return not self.rule.decide(self.t)


FORMULAS: dict[str, type[by_hand.ByHand]] = {
    "SAM": by_hand.ByHand,
    "ASAM": ASAM,
    "GSAM": by_hand.GSAM,
    "WSAM, decoupled": by_hand.WSAM,
    "WSAM, coupled": by_hand.CoupledWSAM,
    "LookSAM": by_hand.LookSAM,
    "Look-LayerSAM": by_hand.LookLayerSAM,
    "Friendly SAM": by_hand.FriendlySAM,
    "VaSSO": by_hand.VaSSO,
    "MSAM": by_hand.MSAM,
    "un-normalised SAM": by_hand.Unnormalized,
    "lambda-mix": by_hand.Mixed,
    "loss budget (LE-SAM)": by_hand.LossBudget,
    "StableSAM": by_hand.StableSAM,
    "SAM-ON": by_hand.ByHand,
    "preconditioned, experimental": by_hand.Preconditioned,
    "every k-th step": OnlyIn,
    "from a step on": OnlyIn,
    "random steps (SS-SAM)": OnlyIn,
}
BY_NORM = "while gradients are long (AE-SAM)"  # decides by what it measures: its steps are asked of the optimizer


def check(method: Method, groups_of: Any) -> None:
    """End the program where a method's weights are not those of its formula.

    Args:
        method: which.
        groups_of: gives the parameter groups of a method for a model and a radius.
    """
    model, twin = network(0).double(), network(0).double()
    images, labels = digits()
    images = images.double()
    kind, options = BASES[method.base]
    optimizer = method.cls(groups_of(method, model, RHO), kind, **method.options, **options)

    def loss(which: nn.Module, step: int) -> Tensor:
        batch = slice(step * BATCH_SIZE, (step + 1) * BATCH_SIZE)
        return cross_entropy(which(images[batch]), labels[batch])

    def backward(step: int) -> None:
        optimizer.zero_grad()
        loss(model, step).backward()

    if method.name not in FORMULAS and method.name != BY_NORM:
        backward(0)
        _check_mask(method, model, optimizer)
        return
    groups = [dict(group) for group in groups_of(method, twin, RHO)]
    if method.name == BY_NORM:
        hand: by_hand.ByHand = OnlyIn(groups, kind, RHO, foreach=False, **options)
    else:
        hand = FORMULAS[method.name](groups, kind, RHO, foreach=False, **options)
    _set_options(hand, method, optimizer)
    for step in range(STEPS):

        @torch.enable_grad()
        def gradient(k: int, step: int = step) -> by_hand.Vector:
            params = list(twin.parameters())
            return dict(zip(params, torch.autograd.grad(loss(twin, step), params), strict=True))

        backward(step)
        two = method.passes != "1" and optimizer.first_step(zero_grad=True)
        if two:
            backward(step)
        optimizer.step()
        if method.name == BY_NORM:
            hand.rule = Answer(two)
        hand.step(gradient)
    if method.passes == "1":
        optimizer.eval()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        gap = (p - q).abs().max().item()
        if not gap <= 1e-8 + 1e-7 * q.abs().max().item():
            raise SystemExit(f"no times: {method.name} is not its formula: {name} differs by {gap:.1e}")


class Answer:
    """A rule that was asked before."""

    def __init__(self, answer: bool) -> None:
        """What was said."""
        self.answer = answer

    def decide(self, step: int) -> bool:
        """That."""
        return self.answer


def _set_options(hand: by_hand.ByHand, method: Method, optimizer: Any) -> None:
    """Give a method by hand the options that the optimizer has."""
    values: dict[str, Any] = {**method.options, **{name: getattr(optimizer, name) for name in method.cls.options}}
    if "when" in values:
        values["rule"] = values.pop("when")
    if "radius" in values:
        values |= vars(values.pop("radius"))
    for name, value in values.items():
        if hasattr(type(hand), name) and not callable(getattr(type(hand), name)):
            setattr(hand, name, value)
    if isinstance(hand, by_hand.MSAM):
        hand.momentum = "momentum_buffer" if method.base == "sgd" else "exp_avg"


def _check_mask(method: Method, model: nn.Module, optimizer: Any) -> None:
    """The share of weights that climbs, and that it does so along the gradient by the right length."""
    old = {p: p.detach().clone() for p in model.parameters()}
    grads = torch.cat([p.grad.flatten() for p in old if p.grad is not None])
    optimizer.first_step()
    e = torch.cat([(p.detach() - w).flatten() for p, w in old.items()])
    optimizer.restore()
    moved = e != 0
    share = method.options.get("beta", 1 - method.options.get("sparsity", 0.0))
    scale = RHO / share / grads[moved].norm() if "beta" in method.options else RHO / grads.norm()
    right = torch.allclose(e[moved], scale * grads[moved], rtol=1e-6, atol=1e-12)
    if abs(float(moved.double().mean()) - share) > 0.03 or not right:
        raise SystemExit(f"no times: {method.name} does not climb as its formula says")
