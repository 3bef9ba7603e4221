"""What SAMStep is given for a step: a batch, its samples, its parts, and the mean of what they gave."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

Batch: TypeAlias = tuple[Any, ...]  # tensors and other values, nested in any way; the targets, if there are any, last


def count_samples(batch: Batch) -> int:
    """How many samples a batch has: the length of its first tensor's first dimension; 1 without tensors."""
    first = next((leaf for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor) and leaf.dim() > 0), None)
    return 1 if first is None else len(first)


def split(batch: Batch, n: int) -> list[Batch]:
    """A batch in n parts along the first dimension of all its tensors; fewer where there are not so many samples."""
    if n == 1:
        return [batch]
    total = count_samples(batch)
    sizes = [total // n + (i < total % n) for i in range(n)]
    ends = [sum(sizes[: i + 1]) for i in range(n)]
    return [samples_at(batch, slice(end - size, end), total) for end, size in zip(ends, sizes, strict=True) if size > 0]


def first_samples(batch: Batch, share: float) -> Batch:
    """The first samples of a batch, at least one."""
    if share == 1:
        return batch
    total = count_samples(batch)
    count = max(math.ceil(share * total), 1)
    return batch if count >= total else samples_at(batch, slice(count), total)


def samples_at(batch: Batch, places: slice | Tensor, total: int) -> Batch:
    """The samples at some places of a batch of `total`; whole tensors where the first dimension is another."""
    found: Batch = tree_map_only(Tensor, functools.partial(_rows, places=places, total=total), batch)
    return found


def _rows(tensor: Tensor, places: slice | Tensor, total: int) -> Tensor:
    if tensor.dim() == 0 or len(tensor) != total:
        return tensor
    return tensor[places if isinstance(places, slice) else places.to(tensor.device)]


def mean_loss(losses: Sequence[Any], parts: Sequence[Batch]) -> Any:
    """The mean of the parts' losses by their samples; the last one where they are no single numbers."""
    if len(losses) == 1 or not all(isinstance(loss, Tensor) and loss.numel() == 1 for loss in losses):
        last = losses[-1]
        return last.detach() if isinstance(last, Tensor) else last
    sizes = [count_samples(part) for part in parts]
    return sum(loss.detach() * (n / sum(sizes)) for loss, n in zip(losses, sizes, strict=True))
