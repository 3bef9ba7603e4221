"""Segments: one parameter's place in a bucket, and what there is to know about a tensor's layout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastsam.rules import Group

STATE_SLOTS = 3


class Layout(NamedTuple):
    """Where a tensor is and how it lies there: what tables of addresses are built from."""

    address: int
    dtype: torch.dtype
    device: torch.device
    shape: torch.Size
    stride: tuple[int, ...]

    def moved_only(self, other: Layout) -> bool:
        """Whether nothing but the address differs."""
        return self[1:] == other[1:]


def layout(tensor: Tensor) -> Layout:
    """Describe a strided tensor."""
    return Layout(tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride())


@dataclass(eq=False)
class Segment:
    """One parameter in a bucket.

    Attributes:
        param: the parameter itself.
        layout: how it lay when the tables were built.
        group: index of its parameter group.
        numel: elements, a complex one counted as two.
        dense: whether its storage has no gaps, so that a kernel can walk it.
        index: its place among all parameters of the optimizer, which picks its stream of random numbers.
        chunks: its rows of the bucket's chunk table.
        backup: [numel], the weights before the perturbation, in storage order; None where there is a master.
        master: [numel] float32 or None, what the weights are rounded from.
        progress: [2] float32, the two numbers below.
        step: [] float32, the steps that the rule counted.
        mu_product: [] float32, NAdam's product of momenta.
        states: [numel] each or None, in the rule's slot order.
        views: what `optimizer.state[param]` shows: torch's names, the parameter's shape and strides.
        shown: whether it shows them already.
        moved_in: whether the parameter was moved into a flat buffer.
    """

    param: Tensor
    layout: Layout
    group: int
    numel: int
    dense: bool
    index: int
    chunks: slice
    backup: Tensor | None
    master: Tensor | None
    progress: Tensor
    step: Tensor = field(init=False)
    mu_product: Tensor = field(init=False)
    states: list[Tensor | None] = field(default_factory=lambda: [None] * STATE_SLOTS)
    views: dict[str, Tensor] = field(default_factory=dict)
    shown: bool = False
    moved_in: bool = False

    def __post_init__(self) -> None:
        """Make the views of single numbers."""
        self.step, self.mu_product = self.progress.unbind()

    def flat(self, tensor: Tensor) -> Tensor:
        """[numel]: a tensor of the parameter's layout in storage order; a view of it where the parameter is dense."""
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        return real.as_strided((self.numel,), (1,)) if self.dense else real.reshape(-1)

    def kept(self) -> Tensor:
        """[numel]: the weights before the perturbation."""
        kept = self.backup if self.master is None else self.master
        assert kept is not None
        return kept

    def source(self, perturbed: bool) -> Tensor:
        """[numel]: what the formulas take the weights from."""
        return self.kept() if perturbed or self.master is not None else self.flat(self.param)

    def renew_master(self) -> None:
        """Read the master anew where somebody else wrote the weight: where it does not round to these bits."""
        if self.master is not None:
            w = self.flat(self.param)
            same = self.master.to(w.dtype).view(torch.int16) == w.view(torch.int16)
            self.master.copy_(torch.where(same, self.master, w.to(self.master.dtype)))

    def store(self, values: Tensor) -> None:
        """Write [numel] values into the parameter, rounding once if it is of lower precision."""
        if self.dense:
            self.flat(self.param).copy_(values)
        else:
            real = torch.view_as_real(self.param) if self.param.is_complex() else self.param
            real.copy_(values.view(real.shape))

    def shaped(self, flat: Tensor) -> Tensor:
        """A flat tensor of ours with the parameter's shape and strides."""
        if self.layout.dtype.is_complex:
            flat = torch.view_as_complex(flat.view(-1, 2))
        return flat.as_strided(self.layout.shape, self.layout.stride) if self.dense else flat.view(self.layout.shape)

    def accepts(self, grad: Tensor, dtype: torch.dtype) -> bool:
        """Whether a gradient has this dtype and the strides of the parameter (of dimensions of size 1 any)."""
        if grad.layout != torch.strided or grad.dtype != dtype or grad.is_conj() or grad.is_neg():
            return False
        strides = zip(grad.shape, grad.stride(), self.layout.stride, strict=True)
        return not self.dense or grad.numel() == 0 or all(n == 1 or a == b for n, a, b in strides)


def real_numel(tensor: Tensor) -> int:
    """Elements, a complex one counted as two."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def real_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of the elements, a complex one's parts."""
    return tensor.dtype.to_real() if tensor.is_complex() else tensor.dtype


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their storage without gaps or overlap, in any order of dimensions."""
    expected = 1
    for stride, size in sorted((s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n != 1):
        if stride != expected and tensor.numel() > 0:
            return False
        expected *= size
    return True


def overlapping(params: Iterable[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Two parameters that share memory (the same one twice if it overlaps itself), or None."""
    extents = []
    for param in params:
        if param.numel() > 0:
            reach = sum((n - 1) * s for n, s in zip(param.shape, param.stride(), strict=True))
            start = param.data_ptr()
            extents.append((start, start + (reach + 1) * param.element_size(), param))
            if reach + 1 < param.numel():
                return param, param
    extents.sort(key=lambda extent: extent[:2])
    end, last = 0, None
    for start, stop, param in extents:
        if last is not None and start < end and _share(last, param):
            return last, param
        if stop > end:
            end, last = stop, param
    return None


def _share(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors whose extents meet have an address in common (columns of one matrix need not)."""

    def addresses(t: Tensor) -> Tensor:
        offsets = torch.zeros((), dtype=torch.int64)
        for n, s in zip(t.shape, t.stride(), strict=True):
            offsets = offsets[..., None] + torch.arange(n) * s
        return t.data_ptr() + offsets.reshape(-1) * t.element_size()

    return bool(torch.isin(addresses(a), addresses(b)).any())


def place_of(param: Tensor, groups: Sequence[Group]) -> str:
    """How messages name a parameter: its place in `param_groups`, and its name if the optimizer was given names."""
    for i, group in enumerate(groups):
        for j, other in enumerate(group["params"]):
            if other is param:
                names = group.get("param_names")
                return f"param_groups[{i}]['params'][{j}]" + (f" ({names[j]!r})" if names else "")
    return "a parameter"
