"""What the tables of a bucket point to: the memory that kernels may touch."""

from __future__ import annotations

from typing import Any

from fastsam.bases.rules import LR_FLOAT64
from ptx.grid import Memory

COLUMNS = ["weight", "backup", "state0", "state1", "state2", "master"]  # of the segment table


def spans_of(memory: Memory, tables: Any, writes: set[str]) -> None:
    """Add weights, backups, states, masters, counts, this pass's gradients and learning rates.

    Args:
        memory: where to.
        tables: a `Tables`, or what stands for one.
        writes: names of `COLUMNS`, all states as "state", that may be written.
    """
    format, parts = tables.format, [(0, 0)] * len(tables.perturbed)  # in elements: where the chunks begin, how many
    for segment, start, length, _ in reversed(tables.chunk_table.tolist()):
        parts[segment] = 64 * start, parts[segment][1] + length
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
