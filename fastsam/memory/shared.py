"""What all buckets of an optimizer have in common: one object, made with the optimizer and handed to each of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastsam.bases.rules import Group, Row, Rule
from fastsam.memory.segments import name_of
from fastsam.ops.formats import Precision
from fastsam.ops.graphs import Captures

AVERAGES = "ema"  # the name of the averages of the weights in `optimizer.state`

State: TypeAlias = MutableMapping[Tensor, dict[str, Any]]


@dataclass(eq=False)
class Shared:
    """What all buckets of an optimizer have in common.

    Attributes:
        rule: the fused base optimizer; None if the base steps by itself.
        precision: how parameters, states and their rounding are kept.
        defaults: the base optimizer's.
        groups: the optimizer's `param_groups`.
        rows: what the kernels know of the parameter groups, by group index.
        row_table: [n_groups, 11] float64 on the host: `rows`.
        counts: whether an update advances the step counts, by group index.
        q: exponent of the gradient's norm: 2, p / (p - 1) for another norm of the perturbation, 1 for no norm.
        decays: whether the perturbation is that of the loss with the weight decay in it.
        captures: what captured CUDA graphs read.
        buffers: the vectors that a method keeps in `optimizer.state` beside the rule's states, by name, with their
            dtype; None for that of directions.
    """

    rule: Rule | None
    precision: Precision
    defaults: Group
    groups: Sequence[Group]
    rows: list[Row] = field(default_factory=list)
    row_table: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64, device="cpu"))
    counts: list[bool] = field(default_factory=list)
    q: float = 2.0
    decays: bool = False
    captures: Captures = field(default_factory=Captures)
    buffers: Mapping[str, torch.dtype | None] = field(default_factory=dict)
    _warned: set[str] = field(default_factory=set)

    def name_of(self, param: Tensor) -> str:
        """How messages name a parameter."""
        return name_of(param, self.groups)

    def states_in_use(self) -> frozenset[str]:
        """The rule's states that any group uses now."""
        return frozenset(name for group in self.groups for name in (self.rule.used(group) if self.rule else ()))

    def perturbs(self) -> tuple[bool, ...]:
        """Which groups the first pass perturbs."""
        return tuple(bool(group["perturb"]) for group in self.groups)

    def warn_once(self, message: str, topic: str = "") -> None:
        """Warn, the first time only: of this topic, or with this message."""
        if (topic or message) not in self._warned:
            self._warned.add(topic or message)
            warnings.warn(message, stacklevel=2)
