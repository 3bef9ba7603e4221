"""The one place where sums over a rank's parameters become sums over all ranks'.

Buckets know over which ranks the elements of their parameters are shared out (the mesh dimensions that split a DTensor)
and hold either whole parameters or equally split ones. What one rank has added up of each kind is added up over these
ranks, in one number a kind and one collective a process group, on the device; then, with `norm_group=`, over that.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, Protocol, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from fastsam.ops.numbers import q_norm
from fastsam.ops.tables import Tables

Group: TypeAlias = Any  # a torch.distributed.ProcessGroup


class NormGroup:
    """The ranks over which `norm_group=` adds the sums; copies of an optimizer have the same."""

    def __init__(self, given: Any) -> None:
        """A process group, or a device mesh of one dimension.

        Raises:
            ValueError: anything else.
        """
        if hasattr(given, "get_group") and hasattr(given, "ndim"):
            if given.ndim != 1:
                raise ValueError(
                    f"FusedSAM: norm_group must be a mesh of one dimension, as mesh['pp'] is, got {given}; of several "
                    "dimensions mesh['dp', 'pp']._flatten() is one"
                )
            given = given.get_group()
        if not dist.is_available() or not isinstance(given, dist.ProcessGroup):
            raise ValueError(
                "FusedSAM: norm_group must be a process group of this rank or a DeviceMesh of one dimension, got "
                f"{given!r}"
            )
        self.group: Group = given

    def __deepcopy__(self, memo: object) -> NormGroup:
        """The same: a group is of running processes."""
        return self

    def __reduce__(self) -> Any:
        """Refuse to be pickled.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "FusedSAM: an optimizer with norm_group= cannot be pickled, as the group is of processes that run now; "
            "save state_dict() instead"
        )


class Part(Protocol):
    """What is to be known of a bucket."""

    tables: Tables
    ranks: tuple[Group, ...]


class Ranks:
    """Which of an optimizer's sums are added up over which ranks.

    Attributes:
        norm_group: over which all of them are, after everything else.
        kinds: the slots of the buckets that are split over the same ranks, with these.
    """

    def __init__(self) -> None:
        """No bucket yet."""
        self.norm_group: Group | None = None
        self.kinds: list[tuple[tuple[Group, ...], list[int]]] = []

    def arrange(self, buckets: Sequence[Part]) -> None:
        """Take over which buckets there are."""
        found: dict[tuple[str, ...], tuple[tuple[Group, ...], list[int]]] = {}
        for bucket in buckets:
            key = tuple(group.group_name for group in bucket.ranks)
            found.setdefault(key, (bucket.ranks, []))[1].append(bucket.tables.slot)
        self.kinds = list(found.values())

    @property
    def several(self) -> bool:
        """Whether there is anything to add."""
        return self.norm_group is not None or any(groups for groups, _ in self.kinds)

    def add(self, sums: MutableMapping[torch.device, Tensor], q: float = 2.0) -> None:
        """Let slots hold sums over all ranks, which are the same on each.

        Those of one kind become one sum, in the first of their slots, the others 0.

        Args:
            sums: [n_buckets, ...] float64 on each device, equal on all of them. A rank without parameters, among others
                that have some, gets the others' in one slot on the host.
            q: of the slots of `grad_norm`: 2 for sums of squares, else they are q-norms.
        """
        if not self.several:
            return
        if not sums:
            sums[torch.device("cpu")] = torch.zeros(1, dtype=torch.float64, device="cpu")
        local = next(iter(sums.values()))
        if not self.kinds:  # no bucket has written there, only this method
            local = torch.zeros_like(local)
        if len(local) == 1:
            totals = local
        else:
            totals = torch.stack([_total(local, slots, q) for _, slots in self.kinds])
        for group, members in self._collectives():
            _add_over(group, totals, members, q)
        first = [slots[0] for _, slots in self.kinds]
        if self.norm_group is not None:
            totals = _total(totals, range(len(totals)), q)[None]
            _add_over(self.norm_group, totals, [0], q)
            first = [0]
        for there in sums.values():
            if there is totals:
                continue
            there.zero_()
            for slot, total in zip(first, totals, strict=True):
                there[slot].copy_(total, non_blocking=there.device.type == "cuda")

    def add_for(self, bucket: Part, values: Tensor) -> Tensor:
        """Add up something else over the ranks that share out a bucket's parameters: [n] float64, one a parameter."""
        for group in bucket.ranks:
            _add_over(group, values, range(len(values)), 2.0)
        return values

    def _collectives(self) -> list[tuple[Group, list[int]]]:
        """Each process group with the kinds whose sums are added over it, in the same order on all ranks."""
        found: dict[str, tuple[Group, list[int]]] = {}
        for i, (groups, _) in enumerate(self.kinds):
            for group in groups:
                found.setdefault(group.group_name, (group, []))[1].append(i)
        return list(found.values())


def _total(values: Tensor, places: Sequence[int], q: float) -> Tensor:
    """[...]: the sum of these rows, in order; the q-norm of norms."""
    if q != 2:
        return q_norm(torch.stack([values[i] for i in places]), q)
    total = values[places[0]].clone()
    for i in places[1:]:
        total += values[i]
    return total


def _add_over(group: Group, values: Tensor, members: Sequence[int], q: float) -> None:
    """Add these rows of `values` over the ranks of a group, in place."""
    mine = values if len(members) == len(values) else torch.stack([values[i] for i in members])
    served = [device.type for device in group._device_types]
    # The sums of offloaded parameters may be on a device that the group does not serve.
    there = mine.to(mine.device if mine.device.type in served else served[0])
    if q == 2:
        dist.all_reduce(there, group=group)
    else:  # the norm of all ranks' norms, each of which adds its own to zeros
        parts = there.new_zeros(group.size(), *there.shape)
        parts[group.rank()] = there
        dist.all_reduce(parts, group=group)
        there = torch.stack([q_norm(column, q) for column in parts.unbind(1)])
    if there is values:
        return
    for i, value in zip(members, there, strict=True):
        values[i].copy_(value)
