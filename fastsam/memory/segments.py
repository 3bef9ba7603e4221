"""Segments: one parameter's place in a bucket, and what is to be known of a tensor's layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import UninitializedParameter
from torch.utils import dlpack

from fastsam.bases.rules import Group
from fastsam.memory.placements import distributed_as
from fastsam.ops.tables import Operand


class Layout(NamedTuple):
    """Where a tensor is and how it lies there: what tables of addresses are built from."""

    address: int
    dtype: torch.dtype
    device: torch.device
    shape: torch.Size
    stride: tuple[int, ...]
    lazy: bool

    def moved_only(self, other: Layout) -> bool:
        """Whether nothing but the address differs."""
        return self[1:] == other[1:]


def layout(tensor: Tensor) -> Layout:
    """Describe a strided tensor."""
    return Layout(address_of(tensor), tensor.dtype, tensor.device, tensor.shape, tensor.stride(), is_lazy(tensor))


def address_of(tensor: Tensor) -> int:
    """Where the first element lies; 0 for a tensor whose memory cannot be read by address (some subclasses)."""
    try:
        return tensor.data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def is_uninitialized(tensor: Tensor) -> bool:
    """Whether it is the parameter of a lazy module that had no forward pass yet, and has no shape."""
    return isinstance(tensor, UninitializedParameter)


def is_lazy(tensor: Tensor) -> bool:
    """Whether a tensor is conjugated or negated only when it is read: its memory holds other values."""
    return tensor.is_conj() or tensor.is_neg()


@dataclass(eq=False)
class Segment(Operand):
    """One parameter in a bucket, and what `optimizer.state` shows of it.

    Attributes:
        layout: how the parameter lay in memory when the tables were written; set by `Bucket.write_segment_table`.
        views: what `optimizer.state[param]` shows: torch's names, the parameter's shape and strides.
        updated: whether it has its states, as an update is to have them, or had one.
        published: whether it shows them already.
        flattened: whether the parameter was moved into a flat buffer.
    """

    layout: Layout = field(init=False)
    views: dict[str, Tensor] = field(default_factory=dict)
    updated: bool = False
    published: bool = False
    flattened: bool = False

    def __post_init__(self) -> None:
        """Note how the parameter lies now."""
        super().__post_init__()
        self.layout = layout(self.weight)

    def refresh_master(self) -> None:
        """Read the weight into the master where somebody else wrote it: where the master does not round to it."""
        if self.master is not None:
            w = self.flat(self.weight)
            same = self.master.to(w.dtype).view(torch.int16) == w.view(torch.int16)
            self.master.copy_(torch.where(same, self.master, w.to(self.master.dtype)))

    def shaped(self, flat: Tensor) -> Tensor:
        """A flat tensor of ours with the parameter's shape and strides."""
        if self.layout.dtype.is_complex:
            flat = torch.view_as_complex(flat.view(-1, 2))
        return flat.as_strided(self.layout.shape, self.layout.stride) if self.dense else flat.view(self.layout.shape)

    def shown(self, flat: Tensor) -> Tensor:
        """The same for others: with a storage of its own, so that saving or moving it takes no other tensor along.

        Of a DTensor it is one that lies on the ranks alike.
        """
        return distributed_as(self.param, self.shaped(own_storage(flat)))

    def accepts(self, grad: Tensor, dtype: torch.dtype) -> bool:
        """Whether a gradient has this dtype and the strides of the parameter (dimensions of size 1 may have any)."""
        if grad.layout != torch.strided or grad.dtype != dtype or is_lazy(grad):
            return False
        strides = zip(grad.shape, grad.stride(), self.layout.stride, strict=True)
        return not self.dense or grad.numel() == 0 or all(n == 1 or a == b for n, a, b in strides)


def own_storage(tensor: Tensor) -> Tensor:
    """A contiguous tensor over the same memory whose storage holds nothing else; it keeps the memory alive."""
    own: Tensor = dlpack.from_dlpack(dlpack.to_dlpack(tensor))  # type: ignore[attr-defined]
    return own


def real_numel(tensor: Tensor) -> int:
    """Elements, a complex one counted as two."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def real_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of the elements, a complex one's parts."""
    return tensor.dtype.to_real() if tensor.is_complex() else tensor.dtype


def is_dense(tensor: Tensor) -> bool:
    """Whether the values fill their storage without gaps or overlap, in any order of dimensions."""
    if is_lazy(tensor):
        return False
    expected = 1
    for stride, size in sorted((s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n != 1):
        if stride != expected and tensor.numel() > 0:
            return False
        expected *= size
    return True


def has_storage(tensor: Tensor) -> bool:
    """Whether a tensor has a storage of its own; sparse, lazy and wrapped ones have none."""
    if is_uninitialized(tensor):
        return False
    try:
        tensor.untyped_storage().data_ptr()
    except RuntimeError:  # NotImplementedError is one, too
        return False
    return True


def name_of(param: Tensor, groups: Sequence[Group]) -> str:
    """How messages name a parameter: its place in `param_groups`, and its name if the optimizer was given names."""
    for i, group in enumerate(groups):
        for j, other in enumerate(group["params"]):
            if other is param:
                return name_at(i, j, group)
    return "a parameter"


def name_at(i: int, j: int, group: Group) -> str:
    """How messages name parameter j of group i."""
    names = group.get("param_names")
    return f"param_groups[{i}]['params'][{j}]" + (f" ({names[j]!r})" if names and j < len(names) else "")
