"""What an operation is told of one bucket: tensors, tables of addresses and values. Nothing here acts by itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastsam.bases.rules import Row, Rule
from fastsam.ops.formats import Format
from fastsam.ops.local import local_of

STATE_SLOTS = 3
ALIGN = 64  # flat tensors begin at a multiple of this many elements; also what stands for the address of no memory


@dataclass(eq=False)
class Operand:
    """One parameter of a bucket, as the reference reads and writes it; kernels find the same by its addresses.

    Attributes:
        param: the parameter itself, of which `weight` is what lies here.
        group: index of its parameter group.
        numel: number of elements, a complex one counted as two.
        dense: whether its storage has no gaps and holds the very values, so that a kernel can walk it.
        index: its place among all parameters of the optimizer, and which part of it lies here; these select its stream
            of random numbers.
        chunks: its rows of the bucket's chunk table.
        backup: [numel], the weights before the perturbation, in storage order; None where there is a master, and before
            the first perturbation.
        master: [numel] float32, what the weights are rounded from, or None.
        progress: [2] float32, the two numbers below.
        step: [] float32, how many steps the rule has counted.
        mu_product: [] float32, NAdam's product of momenta.
        states: [numel] each or None, in the order of the rule's state names.
    """

    param: Tensor
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

    def __post_init__(self) -> None:
        """Make the views of the two numbers."""
        self.step, self.mu_product = self.progress.unbind()

    @property
    def weight(self) -> Tensor:
        """The parameter; of a DTensor the part that lies on this rank."""
        return local_of(self.param)

    def flat(self, tensor: Tensor) -> Tensor:
        """[numel]: a tensor of the parameter's layout in storage order; a view of it where the parameter is dense."""
        if not self.dense:
            tensor = tensor.resolve_conj().resolve_neg()
        real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        return real.as_strided((self.numel,), (1,)) if self.dense else real.reshape(-1)

    def saved_weights(self) -> Tensor:
        """[numel]: the weights before the perturbation."""
        saved = self.backup if self.master is None else self.master
        assert saved is not None
        return saved

    def source(self, perturbed: bool) -> Tensor:
        """[numel]: what the formulas take the weights from."""
        return self.saved_weights() if perturbed or self.master is not None else self.flat(self.weight)

    def store(self, values: Tensor) -> None:
        """Write [numel] values into the parameter, rounded once if it is of lower precision."""
        self.write(self.weight, values)

    def write(self, tensor: Tensor, values: Tensor) -> None:
        """The same into a tensor of the parameter's layout."""
        if self.dense:
            self.flat(tensor).copy_(values)
        elif tensor.is_complex():
            tensor.copy_(torch.view_as_complex(values.view(*tensor.shape, 2)))
        else:
            tensor.copy_(values.view(tensor.shape))


class Gradients(list["Tensor | None"]):
    """One tensor or None for each segment of a bucket, of the parameter's shape and strides: gradients, or a direction.

    Attributes:
        table: [n_segments] int64 on the host: their addresses, where these are written down already.
        dtype: of all of them; None where that is `format.grad` of the bucket.
    """

    table: Tensor | None = None
    dtype: torch.dtype | None = None


@dataclass(eq=False)
class Tables:
    """One bucket: the parameters of one device and dtype as one flat index space.

    Attributes:
        device: where the parameters and everything that belongs to them lies.
        format: what everything is stored as; its `grad` is the dtype of this pass's gradients.
        slot: the bucket's place in `sums`.
        rule: the fused base optimizer; None if the base steps by itself and `update_` only restores.
        rows: what the kernels know of the parameter groups, by group index.
        row_table: [n_groups, 11] float64 on the host: `rows`.
        counts: whether an update advances the step counts, by group index.
        q: exponent of the gradient's norm: 2, or p / (p - 1) for another norm of the perturbation.
        segments: the parameters, for the reference.
        segment_table: [n_segments, 8] int64: addresses of weights, backup, three states, master and progress (step
            count, NAdam's product of momenta); the group, and 2^32 times the parameter's index. A backend's own rows
            may follow.
        chunk_table: [n_chunks, 4] int32: segment, start / 64, length, and the padded lengths of all chunks before / 64.
        grad_table: [n_segments] int64 on the host: addresses of this pass's gradients, 0 for none.
        perturbed: [n_segments] bool on the host: the backup holds the weights; `perturb_` sets it, `update_` clears it.
        partials: [n_chunks] float64, scratch of `grad_norm`.
        dot_partials: [3, n_chunks] float64, scratch of `dot`; empty where no direction was asked for yet.
        overflows: [2] int64, how many steps an overflow in the first and in the second pass changed; None but in
            slot 0.
        rounding: [1] int64, the step of the random numbers, which `update_` advances; None without stochastic rounding.
        cache: what the backend keeps for this bucket; dropped when a table is replaced.
    """

    device: torch.device
    format: Format
    slot: int = 0
    rule: Rule | None = None
    rows: list[Row] = field(default_factory=list)
    row_table: Tensor = field(default_factory=lambda: _empty(torch.float64))
    counts: list[bool] = field(default_factory=list)
    q: float = 2.0
    segments: list[Operand] = field(default_factory=list)
    segment_table: Tensor = field(default_factory=lambda: _empty(torch.int64))
    chunk_table: Tensor = field(default_factory=lambda: _empty(torch.int32))
    grad_table: Tensor = field(default_factory=lambda: _empty(torch.int64))
    perturbed: Tensor = field(default_factory=lambda: _empty(torch.bool))
    partials: Tensor = field(default_factory=lambda: _empty(torch.float64))
    dot_partials: Tensor = field(default_factory=lambda: _empty(torch.float64).view(3, 0))
    overflows: Tensor | None = None
    rounding: Tensor | None = None
    cache: Any = None

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights."""
        return self.format.weight


def _empty(dtype: torch.dtype) -> Tensor:
    return torch.zeros(0, dtype=dtype, device="cpu")
