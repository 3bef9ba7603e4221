"""What methods compute with over all buckets: this pass's gradients and directions, their sums and combinations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastsam.memory.buckets import Buckets
from fastsam.memory.vectors import FlatVector, present
from fastsam.ops.local import local_of
from fastsam.ops.tables import ALIGN, Gradients


class Vector:
    """One number for each element of the parameters that have a gradient: this pass's gradients, or a direction.

    Gradients are gone when the pass is over; `FusedSAM.keep` copies them.

    Attributes:
        name: of a direction; "" of the gradients.
        parts: by bucket, the tensors of the parameters' shapes and strides; None where there is nothing.
    """

    def __init__(
        self,
        name: str,
        params: Sequence[Sequence[Tensor]],
        parts: Sequence[Gradients],
        flats: Sequence[FlatVector] = (),
    ) -> None:
        """Gradients, or what flat vectors hold; of these parameters, by bucket."""
        self.name, self.params, self.flats, self._parts = name, params, flats, parts

    @property
    def parts(self) -> Sequence[Gradients]:
        """See the class; of a direction, what was written of it."""
        return [flat.where(flat.written) for flat in self.flats] if self.flats else self._parts

    def pages(self) -> Iterator[Tensor]:
        """[padded] each: a direction as flat tensors, one a bucket, 0 between the parameters, to be written in place.

        Two directions lie alike. Complex numbers are two elements.

        Raises:
            ValueError: gradients have none.
        """
        if not self.flats and self._parts:
            raise ValueError("FusedSAM: gradients lie apart and are not written to; keep() them first")
        return (flat.page for flat in self.flats)

    def pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters of which there is something, and the tensors; one a parameter, of its shape and strides.

        Of DTensors they are the parts that lie here.
        """
        found = [
            (local_of(param), tensor)
            for params, part in zip(self.params, self.parts, strict=True)
            for param, tensor in zip(params, part, strict=True)
            if tensor is not None
        ]
        return [param for param, _ in found], [tensor for _, tensor in found]

    @property
    def written(self) -> bool:
        """Whether it holds anything."""
        return any(tensor is not None for part in self.parts for tensor in part)


class Products(NamedTuple):
    """What `FusedSAM.dot(a, b)` gives: [] float64 each, on the device of the first bucket.

    Attributes:
        aa: the squared length of a.
        ab: the product of a and b.
        bb: the squared length of b.
    """

    aa: Tensor
    ab: Tensor
    bb: Tensor

    @property
    def finite(self) -> Tensor:
        """[] bool: whether all three are finite, so neither pass overflowed."""
        return torch.stack(self).isfinite().all()


Term = tuple["float | Tensor", Vector]


class Directions:
    """The vectors of all buckets, and what is computed with them in the pass that is being made."""

    def __init__(self, buckets: Buckets) -> None:
        """No pass is being made."""
        self.buckets = buckets
        self.masks: list[Tensor] = []  # by bucket, which segments have a gradient in this pass
        # What a method said that the perturbation is divided by: the root of it, [] float64, or its norm.
        self.divisor: Tensor | Vector | None = None

    def begin(self, grads: Sequence[Gradients]) -> Vector:
        """A pass with these gradients; they as a vector."""
        for bucket, part in zip(self.buckets.items, grads, strict=True):
            part.dtype = part.dtype or bucket.tables.format.grad
        self.masks = [present(part) for part in grads]
        return Vector("", self._params(), grads)

    def _params(self) -> list[list[Tensor]]:
        return [bucket.params for bucket in self.buckets.items]

    def named(self, name: str) -> Vector:
        """The direction of that name."""
        buckets = self.buckets
        flats = [bucket.vectors.named(name, buckets.state) for bucket in buckets.items]
        self._remember_news()
        return Vector(name, self._params(), (), flats)

    def _remember_news(self) -> None:
        """Take what vectors have put into `optimizer.state` for known."""
        buckets = self.buckets
        if any([bucket.vectors.take_news() for bucket in buckets.items]):
            buckets.watch.remember(buckets.state, buckets.segments())

    def base_state(self, name: str) -> Vector:
        """The base optimizer's state of that name, where it has any."""
        rule = self.buckets.shared.rule
        if rule is None or name not in rule.states:
            known = "it is not fused" if rule is None else f"its state is {', '.join(rule.states)}"
            raise ValueError(f"FusedSAM: the base optimizer has no state {name!r}: {known}")
        slot, parts = rule.states.index(name), []
        for bucket in self.buckets.items:
            flats = [segment.states[slot] for segment in bucket.segments]
            part = Gradients(
                [None if flat is None else s.shaped(flat) for s, flat in zip(bucket.segments, flats, strict=True)]
            )
            addresses = [0 if flat is None else flat.data_ptr() or ALIGN for flat in flats]
            part.table = torch.tensor(addresses, dtype=torch.int64, device="cpu")
            part.dtype = bucket.tables.format.state
            parts.append(part)
        return Vector(name, self._params(), parts)

    def here(self, vector: Vector) -> list[Gradients]:
        """A vector in the segments that have a gradient in this pass: what is climbed or stepped along."""
        if not vector.flats:
            return list(vector.parts)
        return [flat.where(mask) for flat, mask in zip(vector.flats, self.masks, strict=True)]

    def in_perturbed_groups(self, vector: Vector) -> Vector:
        """A vector of this pass, without the groups that have `perturb=False`."""
        kept = []
        for bucket, part in zip(self.buckets.items, self.here(vector), strict=True):
            skipped = bucket.gradients.skipped
            less = Gradients([None if skip else t for t, skip in zip(part, skipped.tolist(), strict=True)])
            less.table, less.dtype = None if part.table is None else part.table * ~skipped, part.dtype
            kept.append(less)
        return Vector(vector.name, vector.params, kept)

    def combine(self, out: Vector, terms: Sequence[Term], first: Term | None = None) -> Vector:
        """Write a linear combination into `out`, where there are gradients in this pass; see `FusedSAM.combine`."""
        if not 1 <= len(terms) <= 3:
            raise ValueError(f"FusedSAM: combine() takes one to three terms, got {len(terms)}")
        if len(out.flats) != len(self.masks):
            raise ValueError("FusedSAM: combine() writes to a direction, got gradients")
        sources = [(coefficient, vector.parts) for coefficient, vector in terms]
        beginning = None if first is None else (first[0], first[1].parts)
        for i, (bucket, flat, mask) in enumerate(zip(self.buckets.items, out.flats, self.masks, strict=True)):
            device, fresh = bucket.tables.device, mask & ~flat.written
            begins = beginning is not None and not flat.complete() and bool(fresh.any())
            parts = [(_on(device, coefficient), part[i]) for coefficient, part in sources]
            into = flat.where(mask & flat.written if begins else mask)
            if not begins or bool((mask & flat.written).any()):
                bucket.backend.operations.combine_(bucket.tables, into, parts)
            if begins and beginning is not None:
                term = _on(device, beginning[0]), beginning[1][i]
                bucket.backend.operations.combine_(bucket.tables, flat.where(fresh), [term])
            flat.note_written(mask, keeps=out.name in self.buckets.shared.buffers)
        return out

    def dot(self, a: Vector, b: Vector | None) -> Products:
        """The three products of two vectors, over all buckets; see `FusedSAM.dot`."""
        buckets, n = self.buckets.items, len(self.buckets.items)
        devices = {bucket.tables.device for bucket in buckets} or {torch.device("cpu")}
        out = {device: torch.zeros(n or 1, 3, dtype=torch.float64, device=device) for device in devices}
        seconds = [None] * n if b is None else b.parts
        for bucket, left, right in zip(buckets, a.parts, seconds, strict=True):
            bucket.vectors.require_partials()
            bucket.backend.operations.dot(bucket.tables, left, right, out[bucket.tables.device])
        self.buckets.share_sums(out)
        place = buckets[0].tables.device if buckets else torch.device("cpu")
        total = out[place][0]
        for row in out[place][1:]:
            total = total + row
        return Products(*total.unbind())

    def fill(self, vector: Vector) -> None:
        """Let a direction hold what it is, zeros, in parameters that have a gradient."""
        for bucket, flat in zip(self.buckets.items, vector.flats, strict=True):
            having = torch.tensor([param.grad is not None for param in bucket.params], dtype=torch.bool, device="cpu")
            flat.note_written(having, keeps=True)

    def publish_created(self) -> None:
        """Show in `optimizer.state` what saved vectors hold of parameters that have a gradient."""
        self.publish([Gradients([param.grad for param in bucket.params]) for bucket in self.buckets.items])

    def publish(self, grads: Sequence[Gradients], *, stepped: bool = True) -> None:
        """After an update with these gradients: show in `optimizer.state` what saved vectors hold."""
        buckets = self.buckets
        for bucket, part in zip(buckets.items, grads, strict=True):
            bucket.vectors.publish(part, buckets.state, stepped=stepped)
        self._remember_news()

    def squared_lengths(self, a: Vector, of_params: bool = False) -> list[Tensor]:
        """By bucket, [n_segments] float64: each parameter's own <a,a>, over all ranks; 0 where there is nothing.

        Args:
            a: the vector.
            of_params: those of the parameters instead, where `a` has something.
        """
        found = []
        for bucket, part in zip(self.buckets.items, a.parts, strict=True):
            squares = torch.zeros(len(part), dtype=torch.float64, device=bucket.tables.device)
            hits = [(i, tensor) for i, tensor in enumerate(part) if tensor is not None]
            sources = [bucket.segments[i].weight if of_params else tensor for i, tensor in hits]
            for (i, _), length in zip(hits, torch._foreach_norm(sources) if sources else (), strict=True):
                squares[i].copy_(length.double().square())
            found.append(self.buckets.ranks.add_for(bucket, squares))
        return found

    # All elements at once, for what is rare.

    def elements(self, vector: Vector, fresh_only: bool = False) -> Tensor:
        """[n]: a copy of a direction in the groups that are perturbed, on the first bucket's device.

        Args:
            vector: the direction.
            fresh_only: only where it holds nothing yet.
        """
        pieces = self._pieces(vector, fresh_only)
        place = pieces[0].device if pieces else torch.device("cpu")
        return torch.cat([piece.to(place) for piece in pieces]) if pieces else torch.zeros(0, device=place)

    def write(self, vector: Vector, elements: Tensor, fresh_only: bool = False) -> None:
        """Write all elements back, in the same order."""
        pieces = self._pieces(vector, fresh_only)
        parts = torch.split(elements, [piece.numel() for piece in pieces]) if pieces else ()
        for piece, part in zip(pieces, parts, strict=True):
            piece.copy_(part)
        for bucket, flat in zip(self.buckets.items, vector.flats, strict=True):
            flat.note_written(~bucket.gradients.skipped, keeps=True)

    def _pieces(self, vector: Vector, fresh_only: bool) -> list[Tensor]:
        """[numel] each, in the order of the optimizer within a bucket."""
        found = []
        for bucket, flat in zip(self.buckets.items, vector.flats, strict=True):
            skipped = bucket.gradients.skipped | (flat.written if fresh_only else False)
            order = sorted(range(len(flat.pieces)), key=lambda i: bucket.segments[i].index)  # noqa: B023
            found += [flat.pieces[i] for i in order if not skipped[i]]
        return found


def _on(device: torch.device, value: float | Tensor) -> float | Tensor:
    """A number where a kernel of that device can read it."""
    if not isinstance(value, Tensor) or value.device == device:
        return value
    return value.to(device, non_blocking=device.type == "cuda")
