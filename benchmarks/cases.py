"""What is stepped: the cases, their bytes, and their weights and gradients.

A case is one set of circumstances (base optimizer, dtype, groups, ...). The bytes that a fused step must move follow
from it, and so does the time that SGD's measured time predicts for it.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from shapes import shapes_of
from torch import Tensor

import fastsam

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
BASES: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "lion": fastsam.Lion,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4},
    "adamw": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
    "rmsprop": {"lr": 1e-3, "alpha": 0.99, "eps": 1e-8, "momentum": 0.9, "weight_decay": 1e-5},
    "adagrad": {"lr": 0.01, "lr_decay": 1e-3, "eps": 1e-10, "weight_decay": 5e-4},
    "nadam": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
    "radam": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
    "lion": {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.1},
}
# In float16 the second moment of a small gradient is 0: torch's optimizers, whose every intermediate result is float16,
# then divide by eps alone, which 1e-8 would not even be.
FLOAT16_EPS = 1e-2

# Tensors of the base optimizer that are as large as the weights.
STATES = {"sgd": 1, "adamw": 2, "rmsprop": 2, "adagrad": 1, "nadam": 2, "radam": 2, "lion": 1}
# How low precision is kept: FusedSAM's options.
PRECISIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "masters": {"master_weights": True},
    "drawn": {"stochastic_rounding": True},
    "bfloat16-states": {"state_dtype": torch.bfloat16},
}


SWITCHES = ("adaptive", "missing", "misaligned", "flattened")  # the fields of a case that are on or off


class Sizes(NamedTuple):
    """Bytes of an element of what a step reads and writes."""

    weight: int
    grad: int
    source: int  # what the formulas take the weights from: a master, or the weight
    state: int

    @property
    def masters(self) -> bool:
        """Whether there are masters, which are the backup, too."""
        return self.source != self.weight

    def step(self, base: str, adaptive: bool) -> int:
        """Bytes of a whole step, every operand read once and every result written once per operation.

        In fp32 40 for SGD with momentum and 48 for AdamW, with masters of bfloat16 weights 30 and 38.
        """
        norm = self.grad + adaptive * self.source
        climb = self.source + self.grad + self.weight + (0 if self.masters else self.weight)  # the last is the backup
        update = self.source + self.grad + self.weight + self.masters * self.source
        return norm + climb + update + 2 * STATES[base] * self.state

    def kept(self, base: str) -> int:
        """Bytes of an element's weight, master and states."""
        return self.weight + self.masters * self.source + STATES[base] * self.state


@dataclass(frozen=True)
class Case:
    """One set of circumstances.

    Attributes:
        base: key of `BASES`.
        dtype: key of `DTYPES`, of weights, gradients and state.
        adaptive: ASAM in every group.
        groups: parameter groups, the parameters dealt out in turn. 8 have all combinations of adaptive, nesterov and
            two momenta, and eight learning rates. All have weight decay: without it torch's foreach SGD adds nesterov's
            term to the gradients themselves, which the contenders share.
        missing: every tenth parameter has no gradient in either pass.
        misaligned: every gradient starts one element after a 64-byte boundary, as views of one buffer do.
        precision: key of `PRECISIONS`.
        flattened: FusedSAM's weights are in one buffer; the rivals' stay where they are.
    """

    base: str = "sgd"
    dtype: str = "float32"
    adaptive: bool = False
    groups: int = 1
    missing: bool = False
    misaligned: bool = False
    precision: str = "plain"
    flattened: bool = False

    def flags(self) -> list[str]:
        """The command-line options of step.py that mean this case."""
        flags = ["--base", self.base, "--dtype", self.dtype, "--groups", str(self.groups)]
        flags += ["--precision", self.precision]
        return flags + [f"--{name}" for name in SWITCHES if getattr(self, name)]

    def sizes(self) -> Sizes:
        """What its tensors are made of."""
        weight = DTYPES[self.dtype].itemsize
        source = 4 if self.precision == "masters" else weight
        return Sizes(weight, weight, source, 2 if self.precision == "bfloat16-states" else source)


CASES = {
    "SGD": Case(),
    "AdamW": Case(base="adamw"),
    **{BASES[base].__name__: Case(base=base) for base in ("rmsprop", "adagrad", "nadam", "radam", "lion")},
    "ASAM": Case(adaptive=True),
    "bfloat16": Case(dtype="bfloat16"),
    "bfloat16, AdamW": Case(base="adamw", dtype="bfloat16"),
    "masters": Case(dtype="bfloat16", precision="masters"),
    "masters, AdamW": Case(base="adamw", dtype="bfloat16", precision="masters"),
    "stochastic rounding": Case(dtype="bfloat16", precision="drawn"),
    "stochastic rounding, AdamW": Case(base="adamw", dtype="bfloat16", precision="drawn"),
    "bfloat16 states, AdamW": Case(base="adamw", precision="bfloat16-states"),
    "float64": Case(dtype="float64"),
    "8 groups": Case(groups=8),
    "10 % without gradient": Case(missing=True),
    "misaligned gradients": Case(misaligned=True),
    "flattened": Case(flattened=True),
}


class Problem:
    """Starting weights and the gradients of both passes of one case; every contender steps its own copy of the weights.

    Weights have magnitudes between 0.5 and 1.5 and gradients at most 1, so that no step brings a weight near zero,
    where a relative tolerance means nothing. `rho` makes the perturbation about 1 % of a weight: a wrong one must
    exceed the tolerance. No time depends on these values.
    """

    def __init__(self, model: str, case: Case, device: torch.device, seed: int = 0) -> None:
        """Draw weights and gradients of `model`."""
        self.model = model
        self.case = case
        self.device = device
        self.dtype = DTYPES[case.dtype]
        self.shapes = shapes_of(model)
        self.elements = sum(map(math.prod, self.shapes))
        self.rho = 0.01 * math.sqrt(self.elements)
        generator = torch.Generator(device).manual_seed(seed)
        self.start = [
            torch.copysign(0.5 + self._uniform(shape, generator).abs(), self._uniform(shape, generator)).to(self.dtype)
            for shape in self.shapes
        ]
        self.gradients = [self._gradients(generator) for _ in range(2)]  # of pass 1, of pass 2

    def _uniform(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.rand(shape, generator=generator, device=self.device) * 2 - 1

    def _gradients(self, generator: torch.Generator) -> list[Tensor | None]:
        gradients: list[Tensor | None] = []
        for index, shape in enumerate(self.shapes):
            if self.case.missing and index % 10 == 9:
                gradients.append(None)
                continue
            # A tensor of its own each, as autograd leaves them.
            buffer = torch.empty(math.prod(shape) + self.case.misaligned, dtype=self.dtype, device=self.device)
            gradient = buffer[int(self.case.misaligned) :].view(shape)
            gradients.append(gradient.copy_(self._uniform(shape, generator)))
        return gradients

    def groups(self, params: list[Tensor]) -> list[dict[str, Any]]:
        """Parameter groups for a base optimizer or FusedSAM: the base's options, `rho` and `adaptive`."""
        groups = []
        for index in range(self.case.groups):
            options = {**OPTIONS[self.case.base], "rho": self.rho, "adaptive": self.case.adaptive}
            if self.case.base == "adamw" and self.dtype == torch.float16:
                options["eps"] = FLOAT16_EPS
            if self.case.groups > 1:
                options["adaptive"] = bool(index & 1)
                options["lr"] *= 1 + index / 8
                if self.case.base == "sgd":
                    options |= {"nesterov": bool(index & 2), "momentum": 0.8 if index & 4 else 0.9}
            groups.append({**options, "params": params[index :: self.case.groups]})
        return groups

    def ideal_bytes(self) -> int:
        """Bytes that a step cannot do without: every operand read once and every result written once per operation."""
        total, sizes = 0, self.case.sizes()
        # One stand-in per parameter: its number of elements, 0 where no gradient comes.
        counts: list[Any] = [0 if g is None else g.numel() for g in self.gradients[0]]
        for group in self.groups(counts):
            total += sum(group["params"]) * sizes.step(self.case.base, group["adaptive"])
        return total
