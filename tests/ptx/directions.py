"""Gradients and directions of any dtype and alignment, and what `dot` and `combine_` make of them bit for bit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rounding import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, PLAIN, bucket_of, copied, shifted, values
from torch import Tensor

from fastsam.ops import native
from fastsam.ops.tables import Gradients
from ptx.buckets import Comparer, odd, with_own_rows

# Dtypes of the weights, and of the operands a, b, c and out.
MIXES = [
    (FLOAT32, FLOAT32, FLOAT32, FLOAT32, FLOAT32),
    (FLOAT32, FLOAT32, BFLOAT16, FLOAT16, FLOAT32),
    (BFLOAT16, BFLOAT16, BFLOAT16, FLOAT32, BFLOAT16),
    (FLOAT16, FLOAT16, FLOAT32, BFLOAT16, FLOAT16),
    (FLOAT32, BFLOAT16, FLOAT16, FLOAT16, BFLOAT16),
    (FLOAT64, FLOAT64, FLOAT64, FLOAT64, FLOAT64),
]
# (elements, bytes that a, b, c and out lie beyond a multiple of 16): whole chunks and their ends, at once where all
# addresses allow it, alone where one does not.
PLACES = [
    (8192, (0, 0, 0, 0)),
    (8192, (8, 8, 8, 8)),
    (4101, (0, 0, 0, 0)),
    (2051, (8, 0, 0, 8)),
    (2051, (0, 0, 0, 0)),
    (1027, (0, 8, 0, 0)),
    (515, (0, 0, 4, 0)),
    (300, (0, 0, 0, 8)),
    (65, (2, 4, 6, 8)),
    (63, (8, 0, 8, 0)),
    (7, (0, 0, 0, 0)),
    (3, (14, 6, 2, 12)),
    (1, (0, 0, 0, 0)),
    (0, (0, 0, 0, 0)),
]
OPERANDS = ["a", "b", "c", "out"]
PRODUCTS = [("a", "b"), ("b", "c"), ("c", "c"), ("a", None), ("a", "none"), ("none", "b")]
Terms = Sequence[tuple[float, str]]
# Linear combinations of these; of two letters that are the same an operand is there twice.
COMBINATIONS: list[Terms] = [
    [(0.3, "a")],
    [(-1.7, "a"), (0.1, "b")],
    [(0.1, "c"), (0.7, "b"), (-0.2, "a")],
    [(0.9, "out"), (0.1, "a")],
    [(0.7, "b"), (0.7, "b")],
    [(0.0, "a"), (0.3, "b"), (-2.0, "c")],
    [(0.9, "c"), (0.1, "b"), (-1.1, "out")],
    [(0.3, "c"), (-0.0, "a"), (-2.0, "none")],
    [(0.0, "a"), (-0.0, "b")],
]
SMALL = [4101, 3, 600, 1, 0, 65, 8]  # segments of few blocks, to look for races
FAR = 2**26 + 5  # units of 64 elements


class Directions:
    """The same bucket for two backends, and operands over its segments; of each of these some are missing."""

    def __init__(
        self,
        dtypes: Sequence[torch.dtype],
        seed: int = 0,
        *,
        sizes: Sequence[int] | None = None,
        every: int = 7,
        own_rows: bool = True,
        far: bool = False,
    ) -> None:
        """Make them.

        Args:
            dtypes: of the weights, and of the operands.
            seed: of the values.
            sizes: of the segments, instead of `PLACES`.
            every: of so many segments an operand lacks one.
            own_rows: whether there is the CUDA kernels' own memory.
            far: whether kernels see the ends of larger tensors: the beginnings lie `FAR` before.
        """
        weight, *own = dtypes
        self.places = PLACES if sizes is None else [(n, (0, 0, 0, 0)) for n in sizes]
        self.buckets = [self._bucket(weight) for _ in range(2)]
        if own_rows:
            with_own_rows(self.buckets[0])
        self.far = FAR if far else 0
        if self.far:
            self.buckets[0].chunk_table[:, 1] += self.far
        self.operands = {"none": self._operand([None] * len(self.places), own[0])}
        for k, (name, dtype) in enumerate(zip(OPERANDS, own, strict=True)):
            tensors: list[Tensor | None] = []
            for i, (n, at) in enumerate(self.places):
                place = shifted(n, dtype, at[k] // dtype.itemsize * dtype.itemsize)
                tensors.append(copied(place, values(n, dtype, 100 * k + i + seed)))
                if (i + 2 * k + seed) % every == 4:
                    tensors[-1] = None
            self.operands[name] = self._operand(tensors, dtype)

    def _bucket(self, weight: torch.dtype) -> Any:
        params = [torch.zeros(n, dtype=weight) for n, _ in self.places]
        bucket = bucket_of(params, "sgd", format=next(each for each in PLAIN if each.weight == weight))
        bucket.device, bucket.cache = torch.device("cpu"), None
        bucket.dot_partials = torch.full((3, len(bucket.chunk_table)), math.nan, dtype=torch.float64)
        return bucket

    def _operand(self, tensors: Sequence[Tensor | None], dtype: torch.dtype) -> Gradients:
        operand = Gradients(tensors)
        operand.dtype = dtype
        return operand

    def seen(self, operand: Gradients) -> Gradients:
        """The same for the first bucket."""
        if not self.far:
            return operand
        found = self._operand(operand, operand.dtype or torch.float32)
        found.table = native._operand(self.buckets[0], operand)[0]
        assert found.table is not None and operand.dtype is not None
        found.table -= 64 * self.far * operand.dtype.itemsize * (found.table > 64)
        return found

    def fill(self, name: str, anything: Sequence[float] = ()) -> None:
        """Give an operand other values: these in turn, or half of them any bits."""
        for i, tensor in enumerate(self.operands[name]):
            if tensor is not None:
                if anything:
                    tensor.copy_(torch.tensor(anything).repeat(len(tensor) // len(anything) + 1)[: len(tensor)])
                else:
                    tensor.copy_(odd(tensor, i))

    def outs(self) -> list[Gradients]:
        """The operand `out` for each backend, each time anew."""
        out = self.operands["out"]
        assert out.dtype is not None
        made = []
        for _ in range(2):
            tensors: list[Tensor | None] = []
            for tensor in out:
                at = None if tensor is None else shifted(len(tensor), out.dtype, tensor.data_ptr() % 64)
                tensors.append(None if at is None else copied(at, tensor))
            made.append(self._operand(tensors, out.dtype))
        return made

    def same_products(self, check: Comparer, backend: Any, left: str = "a", right: str | None = "b") -> None:
        """Run `dot` with a backend and with the C++ library, and compare."""
        found = []
        for which, (each, bucket) in enumerate(zip((backend, native), self.buckets, strict=True)):
            a, b = self.operands[left], None if right is None else self.operands[right]
            if which == 0:
                a, b = self.seen(a), None if b is None else self.seen(b)
            found.append(torch.full((3, 3), -7.0, dtype=torch.float64))
            each.dot(bucket, a, b, found[-1])
        check.same(*found, f"products of {left} and {right}")
        assert (found[0][[0, 2]] == -7.0).all()

    def same_combination(self, check: Comparer, backend: Any, terms: Terms, there: bool = False) -> None:
        """Run `combine_` so; with `there` coefficients are on the device."""
        outs = self.outs()
        for which, (each, bucket, out) in enumerate(zip((backend, native), self.buckets, outs, strict=True)):
            now = self.operands | {"out": out}
            if which == 0:
                now = {name: self.seen(operand) for name, operand in now.items()}
            each.combine_(bucket, now["out"], list(self.given(terms, now, there)))
        for i, (ours, theirs) in enumerate(zip(*outs, strict=True)):
            assert (ours is None) == (theirs is None)
            if ours is not None and theirs is not None:
                check.same(ours, theirs, f"segment {i} of {terms}")

    def given(self, terms: Terms, now: dict[str, Gradients], there: bool) -> Iterator[tuple[float | Tensor, Gradients]]:
        """The terms as an operation takes them: with tensors of no dimension or of one."""
        for i, (coefficient, name) in enumerate(terms):
            c = torch.full((1,) * (i % 2), coefficient, dtype=torch.float64) if there else coefficient
            yield c, now[name]

    def same_everything(self, check: Comparer, backends: Sequence[Any]) -> None:
        """All of `PRODUCTS` and `COMBINATIONS`, with the backends in turn."""
        for i, pair in enumerate(PRODUCTS):
            self.same_products(check, backends[i % len(backends)], *pair)
        for i, terms in enumerate(COMBINATIONS):
            self.same_combination(check, backends[i % len(backends)], terms, i % 2 == 1)

    def same_replays(self, check: Comparer, backend: Any) -> None:
        """Capture both operations once; replay them with other values of coefficients and operands."""
        ours, theirs = self.outs()
        sums = [torch.full((3, 3), -7.0, dtype=torch.float64) for _ in range(2)]
        coefficients = [torch.full((1,) * (i % 2), math.nan, dtype=torch.float64) for i in range(2)]

        def run(each: Any, bucket: Any, out: Gradients, into: Tensor) -> None:
            now = self.operands
            each.dot(bucket, now["a"], now["b"], into)
            each.combine_(bucket, out, [(coefficients[0], now["a"]), (0.3, now["b"]), (coefficients[1], out)])

        with backend.capture():
            run(backend, self.buckets[0], ours, sums[0])
        assert len(backend.graph) == 2 and (sums[0] == -7.0).all()
        for step, numbers in enumerate(((0.7, -1.1), (0.0, 0.4), (-0.0, 0.0), (1.3, 1e-60))):
            for coefficient, number in zip(coefficients, numbers, strict=True):
                coefficient.fill_(number)
            for name in "ab":
                self.fill(name, [math.inf, 1.0, math.nan] if name == "a" and numbers[0] == 0 else [0.5 + step, -0.7])
            backend.replay()
            run(native, self.buckets[1], theirs, sums[1])
            check.same(*sums, f"products after replay {step}")
            for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
                if p is not None and q is not None:
                    check.same(p, q, f"segment {i} after replay {step}")


def many_sizes(n: int, most: int, every: int = 200) -> list[int]:
    """Of many segments, all empty but one of `every`, the last one, and the first and last of `most` together."""
    return [1 + i % 5 if i % every == 0 or i % most in (0, most - 1) or i == n - 1 else 0 for i in range(n)]
