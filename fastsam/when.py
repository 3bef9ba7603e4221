"""When a step is a SAM step: `FusedSAM(..., when=after(9000))`. The others are the base optimizer's own, with one pass.

A radius of 0 is no substitute: it still costs both passes.

What is known of the effect: SAM in the last epochs alone finds minima about as flat as SAM throughout (Zhou et al.,
arXiv 2410.10373), where these epochs have their own fall of the learning rate; every k-th step and random steps keep
part of the gain (LookSAM, arXiv 2203.02714; SS-SAM, arXiv 2203.09962).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor


class When:
    """Decides which steps are SAM steps; a user's function of the step's number does as well.

    Attributes:
        measures: whether `observe` wants the norm of every step's gradients.
    """

    measures = False

    def __init__(self, decide: Callable[[int], bool], text: str) -> None:
        """`decide` is told the number of the step, from 0."""
        self._decide, self._text = decide, text

    def __repr__(self) -> str:
        """How it was asked for."""
        return self._text

    def decide(self, step: int) -> bool:
        """Whether step `step` (from 0) is a SAM step. Replicas must decide alike."""
        return bool(self._decide(step))

    def observe(self, squared_norm: Tensor) -> None:
        """Take note of the squared norm of the step's gradients at w, [] float64 on their device."""

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps, beside the number of the step."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint kept."""


def as_when(when: When | Callable[[int], bool] | None) -> When | None:
    """What `when=` was given, as an object; one that measures is copied, as what it knows is of one training.

    Raises:
        ValueError: it is neither one of this module's nor a function.
    """
    if when is None or isinstance(when, When):
        return copy.deepcopy(when) if when is not None and when.measures else when
    if not callable(when):
        raise ValueError(
            "FusedSAM: when must be one of fastsam.when (every(5), after(1000), ...) or a function of the step's "
            f"number, got {when!r}"
        )
    return When(when, getattr(when, "__name__", repr(when)))


def _whole(name: str, value: int, least: int) -> int:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"fastsam.when: {name} must be an integer >= {least}, got {value!r}")
    return value


class _Rule(When):
    """One of this module's, which can be pickled: its parameters say all."""

    name: ClassVar[str]

    def __init__(self, **parameters: Any) -> None:
        self.parameters = parameters

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.parameters.items())})"


class _Between(_Rule):
    def __repr__(self) -> str:
        first, end = self.parameters["first"], self.parameters["end"]
        if end is not None:
            return f"between({first}, {end})" if end else "never()"
        return f"after({first})" if first else "always()"

    def decide(self, step: int) -> bool:
        first, end = self.parameters["first"], self.parameters["end"]
        return bool(first <= step and (end is None or step < end))


class _Every(_Rule):
    name = "every"

    def decide(self, step: int) -> bool:
        return bool(step % self.parameters["k"] == 0)


class _Randomly(_Rule):
    name = "randomly"

    def decide(self, step: int) -> bool:
        return bool(random.Random(f"{self.parameters['seed']}:{step}").random() < self.parameters["p"])


def always() -> When:
    """Every step is a SAM step; the same as `when=None`."""
    return _Between(first=0, end=None)


def never() -> When:
    """No step is a SAM step: the base optimizer alone, to compare with."""
    return _Between(first=0, end=0)


def every(k: int) -> When:
    """Steps 0, k, 2k, ... are SAM steps; 1 + 1/k passes a step.

    Args:
        k: a whole number, >= 1; 1 is `always()`.

    Raises:
        ValueError: `k` is none.
    """
    return _Every(k=_whole("k", k, 1))


def after(step: int) -> When:
    """SAM from a step on.

    Args:
        step: its number, counted from 0.

    Raises:
        ValueError: it is no whole number >= 0.
    """
    return _Between(first=_whole("step", step, 0), end=None)


def between(first: int, end: int) -> When:
    """SAM in steps first, first + 1, ..., end - 1.

    Args:
        first: the number of the first one, counted from 0.
        end: that of the first step after them, >= `first`.

    Raises:
        ValueError: they are no such numbers.
    """
    return _Between(first=_whole("first", first, 0), end=_whole("end", end, first))


def randomly(p: float, seed: int = 0) -> When:
    """SAM with probability p in each step; 1 + p passes a step. SS-SAM, arXiv 2203.09962.

    Seed and number of the step decide, so that replicas and resumed runs agree.

    Args:
        p: the probability, in [0, 1].
        seed: of the random numbers.

    Raises:
        ValueError: `p` is out of range.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"fastsam.when: p must be in [0, 1], got {p!r}")
    return _Randomly(p=p, seed=seed)


def by_grad_norm(c: float = 0.0, decay: float = 0.9) -> When:
    """SAM while the gradient is long: where |g|^2 of the step before exceeds mean + c * deviation of those so far.

    AE-SAM (Jiang et al., arXiv 2304.14647, ICLR 2023): mean <- decay mean + (1 - decay) |g|^2,
    variance <- decay variance + (1 - decay) (|g|^2 - mean)^2, from a mean of the first and a variance of 0. The paper
    decides by this step's own norm; here it is the step before's, so that nothing waits for the device. The first step
    is a SAM step. Where a step's norm is not measured anyway it is read once more.

    Args:
        c: how many deviations above the mean; below 0 there are more SAM steps.
        decay: of mean and variance, in [0, 1).

    Raises:
        ValueError: `decay` is out of range.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"fastsam.when: decay must be in [0, 1), got {decay!r}")
    return _ByGradNorm(c=float(c), decay=float(decay))


_MOMENTS = ("mean", "variance", "last")


class _ByGradNorm(_Rule):
    name = "by_grad_norm"
    measures = True

    def __init__(self, **parameters: Any) -> None:
        super().__init__(**parameters)
        self.moments: Tensor | None = None  # [3] float64 on the device: see _MOMENTS
        self.host: Tensor | None = None  # the same, on its way to the host
        self.arrived: Any = None

    def decide(self, step: int) -> bool:
        mean, variance, last = self._read()
        return last is None or bool(last >= mean + self.parameters["c"] * variance**0.5)

    def observe(self, squared_norm: Tensor) -> None:
        decay = self.parameters["decay"]
        if self.moments is None or self.moments.device != squared_norm.device:
            known = None if self.moments is None else self.moments.to(squared_norm.device)
            self.moments = torch.stack([squared_norm, torch.zeros_like(squared_norm), squared_norm])
            self.moments = self.moments if known is None else known
        mean, variance, _ = self.moments.unbind()
        new_mean = decay * mean + (1 - decay) * squared_norm
        new_variance = decay * variance + (1 - decay) * (squared_norm - new_mean) ** 2
        new = torch.stack([new_mean, new_variance, squared_norm])
        self.moments = torch.where(new.isfinite().all(), new, self.moments)  # an overflow tells nothing
        if self.moments.device.type == "cuda":
            self.host = torch.empty(3, dtype=torch.float64, device="cpu", pin_memory=True)
            self.host.copy_(self.moments, non_blocking=True)
            self.arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.arrived.record()
        else:
            self.host = self.moments

    def _read(self) -> tuple[float, float, float | None]:
        if self.host is None:
            return 0.0, 0.0, None
        if self.arrived is not None:
            self.arrived.synchronize()  # of the step before: it has long arrived
        mean, variance, last = self.host.tolist()
        return mean, variance, last

    def state(self) -> dict[str, float]:
        mean, variance, last = self._read()
        return {} if last is None else dict(zip(_MOMENTS, (mean, variance, last), strict=True))

    def load(self, state: Mapping[str, Any]) -> None:
        self.arrived = None
        self.moments = self.host = None
        if all(name in state for name in _MOMENTS):
            self.moments = torch.tensor([float(state[name]) for name in _MOMENTS], dtype=torch.float64, device="cpu")
            self.host = self.moments

    def __getstate__(self) -> dict[str, Any]:
        return {"parameters": self.parameters, "kept": self.state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state["parameters"])  # type: ignore[misc]
        self.load(state["kept"])
