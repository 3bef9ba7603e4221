"""The methods of the SAM family: what each costs a step, what it keeps and saves, and how it is written.

Passes are forward and backward passes a step. Memory is in copies of the weights, beside the backup that SAM itself
needs, for float32 weights. What is saved beside the base optimizer's state stands under its name in `optimizer.state`
or, as `sam_steps` and `when_...`, in the parameter groups. Every class takes the arguments of FusedSAM as well, so
methods, `when=`, `radius=`, `adaptive=True`, base optimizers and precision go together; `help(fastsam.methods.GSAM)`
has the formula and the options.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from fastsam import methods, radius, when
from fastsam.commands.diagnosis import aligned
from fastsam.optimizer import FusedSAM


class Method(NamedTuple):
    """A method, or an option of FusedSAM that makes one.

    Attributes:
        name: of the method, as its paper has it.
        cls: the class.
        options: of the class, beside rho.
        passes: a step, in terms of the options.
        memory: copies of the weights beside SAM's backup.
        saved: names in `optimizer.state` and keys of the parameter groups.
        papers: arXiv ids.
        params: what stands for the parameters.
        base: a base optimizer that it works with.
    """

    name: str
    cls: type[FusedSAM] = FusedSAM
    options: Mapping[str, Any] = MappingProxyType({})
    passes: str = "2"
    memory: float = 0.0
    saved: tuple[str, ...] = ()
    papers: tuple[str, ...] = ()
    params: str = "params"
    base: str = "sgd"

    @property
    def written(self) -> str:
        """The call; names are those of `fastsam`."""
        own = [f"{key}={_prefix(key)}{value!r}" for key, value in self.options.items()]
        base = [] if self.base == "sgd" else [f'"{self.base}"']
        name = self.cls.__name__ if self.cls is FusedSAM else f"methods.{self.cls.__name__}"
        return f"{name}({', '.join([self.params, *base, *own])})"


def _prefix(key: str) -> str:
    return f"{key}." if key in ("radius", "when") else ""


FAMILY = (
    Method("SAM", papers=("2010.01412",)),
    Method("ASAM", papers=("2102.11600",), params="asam_groups(model)"),
    Method("GSAM", methods.GSAM, dict(alpha=0.4), memory=1, papers=("2203.08065",)),
    Method("WSAM, decoupled", methods.WSAM, dict(gamma=0.9), memory=2, papers=("2305.15817",)),
    Method("WSAM, coupled", methods.WSAM, dict(gamma=0.9, decoupled=False), memory=1, papers=("2305.15817",)),
    Method(
        "LookSAM",
        methods.LookSAM,
        dict(k=5, alpha=0.7),
        passes="1 + 1/k",
        memory=2,
        saved=("orthogonal_grad", "sam_steps"),
        papers=("2203.02714",),
    ),
    Method(
        "Look-LayerSAM",
        methods.LookSAM,
        dict(k=5, layerwise=True),
        passes="1 + 1/k",
        memory=3,
        saved=("orthogonal_grad", "sam_steps"),
        papers=("2203.02714",),
    ),
    Method(
        "Friendly SAM",
        methods.FriendlySAM,
        dict(sigma=1.0, lmbda=0.9),
        memory=2,
        saved=("grad_ema",),
        papers=("2403.12350",),
    ),
    Method("VaSSO", methods.VaSSO, dict(theta=0.4), memory=1, saved=("grad_ema",), papers=("2309.15639",)),
    Method("MSAM", methods.MSAM, passes="1", memory=1, papers=("2401.12033",)),
    Method(
        "ESAM, its weight part",
        methods.ESAM,
        dict(beta=0.5),
        memory=2,
        saved=("sam_steps",),
        papers=("2110.03141",),
    ),
    Method(
        "Sparse SAM",
        methods.SparseSAM,
        dict(sparsity=0.5),
        memory=1.25,
        saved=("mask", "sam_steps"),
        papers=("2210.05177",),
    ),
    Method("un-normalised SAM", options=dict(radius=radius.unnormalized()), papers=("2206.06232",)),
    Method("lambda-mix", options=dict(radius=radius.mixed(0.5)), papers=("2503.02225",)),
    Method("loss budget (LE-SAM)", options=dict(radius=radius.loss_budget(0.3)), papers=("2605.10183",)),
    Method("StableSAM", options=dict(renormalize=True), papers=("2401.07250",)),
    Method("SAM-ON", papers=("2306.04226",), params="norm_layers_only(model)"),
    Method(
        "preconditioned, experimental",
        methods.PreconditionedSAM,
        memory=1,
        papers=("2502.02407", "2501.06603"),
        base="adamw",
    ),
    Method(
        "every k-th step",
        options=dict(when=when.every(5)),
        passes="1 + 1/k",
        saved=("sam_steps",),
        papers=("2203.02714",),
    ),
    Method(
        "from a step on",
        options=dict(when=when.after(9000)),
        passes="1, then 2",
        saved=("sam_steps",),
        papers=("2410.10373",),
    ),
    Method(
        "random steps (SS-SAM)",
        options=dict(when=when.randomly(0.2)),
        passes="1 + p",
        saved=("sam_steps",),
        papers=("2203.09962",),
    ),
    Method(
        "while gradients are long (AE-SAM)",
        options=dict(when=when.by_grad_norm()),
        passes="1 to 2",
        saved=("sam_steps", "when_mean", "when_variance", "when_last"),
        papers=("2304.14647",),
    ),
)
TITLES = ("method", "how it is written", "passes", "memory", "saved", "paper")


def rows(code: str = "", link: str = "{}") -> list[list[str]]:
    """A row of `TITLES` for each of the family; `code` stands around what is code, `link` is made of arXiv ids."""
    return [
        [
            method.name,
            f"{code}{method.written}{code}",
            method.passes,
            f"{method.memory:g}",
            ", ".join(f"{code}{name}{code}" for name in method.saved) or "-",
            ", ".join(link.format(paper) for paper in method.papers),
        ]
        for method in FAMILY
    ]


def markdown() -> str:
    """The table of docs/methods/index.md."""
    lines = [TITLES, ("---",) * len(TITLES), *rows("`", "[{0}](https://arxiv.org/abs/{0})")]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser the command's options."""
    parser.add_argument("--markdown", action="store_true", help="as docs/methods/index.md has it")


def main(options: argparse.Namespace) -> int:
    """Print the table; returns the exit status."""
    if options.markdown:
        print(markdown())
        return 0
    print("\n".join(aligned([TITLES, *rows()])))
    for paragraph in (__doc__ or "").strip().split("\n\n")[1:]:
        print("\n" + textwrap.fill(" ".join(paragraph.split()), 110))
    return 0
