"""What the tables of a bucket point to: the memory that kernels may touch."""

from __future__ import annotations

from typing import Any

from fastsam.bases.rules import LR_FLOAT64
from ptx.grid import Memory

COLUMNS = ["weight", "backup", "state0", "state1", "state2", "master", "progress"]  # of the segment table


def spans_of(memory: Memory, tables: Any, writes: set[str]) -> None:
    """Add weights, backups, states, masters, counts, this pass's gradients and learning rates.

    Args:
        memory: where to.
        tables: a `Tables`, or what stands for one.
        writes: names of `COLUMNS`, all states as "state", that may be written.
    """
    format, lengths = tables.format, [0] * len(tables.perturbed)
    for segment, _, length, _ in tables.chunk_table.tolist():
        lengths[segment] += length
    sizes = [format.weight, format.source, format.state, format.state, format.state, format.source]
    rows = tables.segment_table.tolist()
    for i, (length, row) in enumerate(zip(lengths, rows, strict=False)):
        nbytes = [length * dtype.itemsize for dtype in sizes] + [8]
        for name, address, size in zip(COLUMNS, row, nbytes, strict=False):
            if address:
                memory.add(f"{name} {i}", address, size, name.rstrip("012") in writes)
    for i, (length, address) in enumerate(zip(lengths, tables.grad_table.tolist(), strict=True)):
        if address:
            memory.add(f"gradient {i}", address, length * format.grad.itemsize, False)
    lrs = {row.lr_address: 8 if row.flags & LR_FLOAT64 else 4 for row in tables.rows if row.lr_address}
    for address, size in lrs.items():
        memory.add("lr", address, size, False)
