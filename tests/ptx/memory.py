"""What the tables of a bucket point to: the memory that kernels may touch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsam.bases.rules import LR_FLOAT64
from fastsam.ops import native
from fastsam.ops.tables import Gradients
from ptx.grid import Memory

COLUMNS = ["weight", "backup", "state0", "state1", "state2", "master"]  # of the segment table


def parts_of(tables: Any) -> list[tuple[int, int]]:
    """Of each segment in elements: where its chunks begin, and how many there are."""
    parts = [(0, 0)] * len(tables.perturbed)
    for segment, start, length, _ in reversed(tables.chunk_table.tolist()):
        parts[segment] = 64 * start, parts[segment][1] + length
    return parts


def spans_of(memory: Memory, tables: Any, writes: set[str]) -> None:
    """Add weights, backups, states, masters, counts, this pass's gradients and learning rates.

    Args:
        memory: where to.
        tables: a `Tables`, or what stands for one.
        writes: names of `COLUMNS`, all states as "state", that may be written.
    """
    format, parts = tables.format, parts_of(tables)
    dtypes = [format.weight, format.source, format.state, format.state, format.state, format.source]
    rows = tables.segment_table.tolist()
    for i, ((start, length), row) in enumerate(zip(parts, rows, strict=False)):
        for name, address, dtype in zip(COLUMNS, row, dtypes, strict=False):
            if address and length:
                begin, size = address + start * dtype.itemsize, length * dtype.itemsize
                memory.add(f"{name} {i}", begin, size, name.rstrip("012") in writes)
        memory.add(f"progress {i}", row[6], 8, "progress" in writes)
    for i, ((start, length), address) in enumerate(zip(parts, tables.grad_table.tolist(), strict=True)):
        if address and length:
            size = format.grad.itemsize
            memory.add(f"gradient {i}", address + start * size, length * size, False)
    lrs = {row.lr_address: 8 if row.flags & LR_FLOAT64 else 4 for row in tables.rows if row.lr_address}
    for address, size in lrs.items():
        memory.add("lr", address, size, False)


class Given(NamedTuple):
    """What an operation is given beside a bucket's tables, by name: tensors, and gradients and directions."""

    tensors: dict[str, Tensor | None]
    operands: dict[str, Gradients] = {}

    def add_to(self, memory: Memory, tables: Any, writes: set[str]) -> None:
        """Add it all, each tensor once; of other operands only what the written one has, too."""
        spans = {}
        for name, tensor in self.tensors.items():
            if tensor is not None:
                spans[tensor.data_ptr()] = name, tensor.nbytes, name in writes
        parts, there = parts_of(tables), [True] * len(tables.perturbed)
        for name, operand in self.operands.items():  # the written one is the first
            size, written = (operand.dtype or tables.format.grad).itemsize, name in writes
            addresses = native._operand(tables, operand)[0].tolist()  # type: ignore[union-attr]
            for i, ((start, length), address) in enumerate(zip(parts, addresses, strict=True)):
                if address and length and there[i]:
                    spans.setdefault(address + start * size, (f"{name} {i}", length * size, written))
            if written:
                there = [address != 0 for address in addresses]
        for address, (name, size, written) in spans.items():
            memory.add(name, address, size, written)


def given_to_dot(tables: Any, a: Gradients, b: Gradients | None, out: Tensor) -> Given:
    """What `dot` may read and write."""
    return Given({"partials": tables.dot_partials, "out": out}, {"a": a} | ({} if b is None else {"b": b}))


def given_to_combine(
    tables: Any, out: Gradients, terms: Sequence[tuple[float | Tensor, Gradients]], capturing: bool
) -> Given:
    """What `combine_` may read and write: nothing of a term of coefficient 0, unless a replay may find another one."""
    wide = torch.float64 if (out.dtype or tables.format.grad) == torch.float64 else torch.float32
    operands = {"out": out}
    for i, (coefficient, parts) in enumerate(terms):
        if capturing or torch.as_tensor(coefficient, dtype=torch.float64).to(wide) != 0:
            operands[f"term {i}"] = parts
    there = {f"coefficient {i}": c for i, (c, _) in enumerate(terms) if isinstance(c, Tensor)}
    return Given(there, operands)
