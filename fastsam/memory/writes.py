"""Who wrote to the perturbed weights: the model's own forward, or somebody who loaded others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from fastsam.memory.segments import is_uninitialized

MOST = 6  # parameters that are watched


class WeightWatch:
    """Tells weights that were loaded between the two passes from those that a forward pass writes.

    `Embedding(max_norm)`, masks and forced normalisation write some weights in each forward pass; what they leave is
    made of perturbed weights and of no use. `load_state_dict` writes all of them. A few parameters are watched by
    their version counters, which costs a step a microsecond: those that were written in the second pass of the last
    completed step are known to be the forward's (before there is one: since the optimizer was made). If all others were
    written, and there are others, the weights were loaded.

    `.data` is not counted, so what is written through it is not kept.

    Attributes:
        params: those that are watched: first, last, largest, smallest, and some in between.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        """Note how often the optimizer's parameters were written before there were any passes."""
        self.params: list[Tensor] = []
        self._versions: list[int] = []  # of `params`, when they were last looked at
        self._by_forward: list[bool] | None = None  # whether they are known to be written by forward passes
        self._closed: list[bool] | None = None  # what was written up to the update, whose own writes followed
        told = [param for param in params if not is_uninitialized(param) and not param.is_inference()]
        self._first = {id(param): param._version for param in told}

    def choose(self, params: Sequence[Tensor]) -> None:
        """Choose which of these to watch."""
        self._closed = None
        params = [param for param in params if param.numel() > 0]
        last = len(params) - 1
        places = {0, last, *(last * i // (MOST - 3) for i in range(1, MOST - 3))}
        extremes = [pick(params, key=Tensor.numel) for pick in (min, max)] if params else []
        chosen = {id(p): p for p in [*extremes, *(params[i] for i in sorted(places) if params)]}
        known = zip(self.params, self._versions, self._by_forward or [False] * len(self.params), strict=True)
        before = {id(param): (version, by_forward) for param, version, by_forward in known}
        self.params = list(chosen.values())
        first = [before.get(id(p), (self._first.get(id(p), p._version), False)) for p in self.params]
        self._versions = [version for version, _ in first]
        if self._by_forward is not None:
            self._by_forward = [by_forward for _, by_forward in first]

    def begin(self) -> None:
        """Before the first perturbation: what was written since the optimizer was made is the forward's."""
        if self._by_forward is None:
            self._by_forward = self.written()
            self._first = {}

    def remember(self) -> None:
        """After our own write: nobody else's is to be seen in the versions of now."""
        self._closed = None
        self._versions = [param._version for param in self.params]

    def written(self) -> list[bool]:
        """Whether each of `params` was written by others since the last of our own writes."""
        return [param._version != version for param, version in zip(self.params, self._versions, strict=True)]

    def mark(self, written: Sequence[bool]) -> None:
        """After our own write, which may be between others': keep in mind which were written before it."""
        self._versions = [param._version - hit for param, hit in zip(self.params, written, strict=True)]

    def close(self) -> None:
        """Before an update, whose writes are our own: what others wrote up to now is all."""
        self._closed = self.written()

    def learn(self) -> None:
        """After a completed step: what was written in its second pass is the forward's."""
        if self._closed is not None:
            self._by_forward, self._closed = self._closed, None

    def loaded(self) -> bool:
        """Whether somebody loaded other weights since the perturbation."""
        known = self._by_forward or [False] * len(self.params)
        written = self.written() if self._closed is None else self._closed
        telling = [hit for hit, by_forward in zip(written, known, strict=True) if not by_forward]
        return bool(telling) and all(telling)
