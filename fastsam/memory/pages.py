"""Pages: the flat tensors that parameters' backups, masters, states and flattened weights are pieces of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsam.ops.native import reader
from fastsam.ops.tables import ALIGN


def page(sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """One new flat tensor, not initialised, cut into pieces of these sizes that start at multiples of ALIGN."""
    rooms = [-(-n // ALIGN) * ALIGN for n in sizes]
    flat = torch.empty(sum(rooms), dtype=dtype, device=device)
    if reader is not None and device.type == "cpu":
        reader.use_huge_pages(flat.data_ptr(), flat.nbytes)
    return flat, [piece[:n] for piece, n in zip(torch.split(flat, rooms), sizes, strict=True)] if sizes else []
