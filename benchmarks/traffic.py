"""Bytes that the optimizer's part of a step moves, counted while it runs.

A stand-in for the operations of the reference backend adds up what each of them reads and writes: of every parameter
that takes part, its gradient or direction, weights, backup and states. What a method leaves to torch (masks, random
numbers, norms a layer) is counted operation by operation, all operands once. Numbers that belong to no parameter are
left out: they are float64 or integers here.
"""

from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastsam import ops
from fastsam.bases.rules import ADAPTIVE, DECAYS
from fastsam.ops import reference
from fastsam.ops.tables import Gradients, Tables

COUNTED = (torch.float32, torch.bool)
BLIND = ("zero_", "fill_", "bernoulli_", "copy_", "uniform_", "normal_")  # they write over what they do not read


class Traffic(TorchDispatchMode):
    """Within the block the reference backend's operations, and torch's outside of them, are counted.

    Attributes:
        bytes: so far.
    """

    def __init__(self) -> None:
        """Nothing yet."""
        super().__init__()
        self.bytes = 0
        self._within = False
        real = ops.backend_named
        other = real("reference")._replace(operations=self)
        self._patch = mock.patch.object(ops, "backend_named", lambda name: other if name == "reference" else real(name))

    def stand_in(self) -> Any:
        """A context in which optimizers that are built get the operations that count."""
        return self._patch

    # torch's own operations.

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count its operands."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._within or getattr(func, "is_view", False):
            return result
        written = {
            id(t)
            for value, argument in zip(args, func._schema.arguments, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
            for t in _tensors(value)
        }
        blind = func._schema.name.rpartition("::")[2] in BLIND
        read = [t for t in _tensors((args, kwargs)) if not (blind and id(t) in written)]
        fresh = [] if written else _tensors(result)
        self._count(*read, *(t for t in _tensors((args, kwargs)) if id(t) in written), *fresh)
        return result

    def _count(self, *tensors: Tensor | None) -> None:
        found = (t for t in tensors if t is not None and t.dtype in COUNTED)
        self.bytes += sum(t.numel() * t.element_size() for t in found)

    def _run(self, name: str, *args: Any, **kwargs: Any) -> None:
        before, self._within = self._within, True
        try:
            getattr(reference, name)(*args, **kwargs)
        finally:
            self._within = before

    # The operations: counted before they run, as running changes what is perturbed.

    def grad_norm(self, tables: Tables, grads: Sequence[Tensor | None], out: Tensor, **options: Any) -> None:
        """Reads the gradients; with ASAM, or the loss's weight decay in the perturbation, the weights, too."""
        for segment, grad in _present(tables, grads):
            weighed = options.get("clip") is None and tables.rows[segment.group].flags & (ADAPTIVE | DECAYS)
            self._count(grad, segment.source(False) if weighed else None)
        self._run("grad_norm", tables, grads, out, **options)

    def perturb_(self, tables: Tables, grads: Sequence[Tensor | None], sums: Tensor) -> None:
        """Reads gradients and weights, writes backup and weights."""
        for segment, grad in _present(tables, grads):
            weights = segment.source(False)
            self._count(grad, weights, segment.backup, weights)
        self._run("perturb_", tables, grads, sums)

    def update_(self, tables: Tables, grads: Sequence[Tensor | None], **options: Any) -> None:
        """Reads gradients, backup or weights, and states; writes weights and states. Without gradients it restores."""
        for i, segment in enumerate(tables.segments):
            weights, restores = segment.source(False), bool(tables.perturbed[i])
            if grads[i] is None:
                self._count(*([segment.backup, weights] if restores else []))
                continue
            states = segment.states if tables.rule is not None and any(tables.counts) else []
            self._count(grads[i], segment.backup if restores else weights, weights, *states, *states)
        self._run("update_", tables, grads, **options)

    def dot(self, tables: Tables, a: Gradients, b: Gradients | None, out: Tensor) -> None:
        """Reads both."""
        for parts in (a, b):
            self._count(*(part for _, part in _present(tables, parts or [])))
        self._run("dot", tables, a, b, out)

    def combine_(self, tables: Tables, out: Gradients, terms: Sequence[tuple[float | Tensor, Gradients]]) -> None:
        """Reads the terms whose coefficient is not 0, writes the direction."""
        for segment, target in _present(tables, out):
            index = tables.segments.index(segment)
            self._count(target, *(parts[index] for c, parts in terms if float(c) != 0))
        self._run("combine_", tables, out, terms)


def _present(tables: Tables, parts: Sequence[Tensor | None]) -> list[tuple[Any, Tensor]]:
    return [(s, part) for s, part in zip(tables.segments, parts, strict=False) if part is not None]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
