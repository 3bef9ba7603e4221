"""How a bucket reads its gradients: where they are, and copies of those that the kernels cannot take as they are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from fastsam.memory.placements import gradient_part, same_placements
from fastsam.memory.segments import Segment, layout
from fastsam.memory.shared import Shared
from fastsam.ops.local import local_of
from fastsam.ops.native import reader
from fastsam.ops.tables import ALIGN, Gradients, Tables

DLPACK_CODES = {torch.float32: 0x220, torch.bfloat16: 0x410, torch.float16: 0x210}  # type code and bits


class GradientReader:
    """Reads the gradients of one bucket and notices parameters that are no longer where its tables say.

    Attributes:
        params: the bucket's parameters, in the order of its segments.
        host_segment_table: [n_segments, 8] int64 on the host: the bucket's segment table.
        signatures: [n_segments] int64: hashes of the parameters' dtypes, devices, shapes and strides.
        skipped: [n_segments] bool: whether the first pass leaves a segment out, as its group has `perturb=False`.
    """

    def __init__(self, tables: Tables, segments: Sequence[Segment], shared: Shared, by_address: bool) -> None:
        """Nothing is known of the parameters yet: `set_places` and `set_skipped` tell."""
        self.tables, self.segments, self.shared = tables, segments, shared
        self.reader = reader if by_address else None
        self.params: list[Tensor] = []
        self.host_segment_table = self.signatures = torch.zeros(0, dtype=torch.int64, device="cpu")
        self.skipped = torch.zeros(0, dtype=torch.bool, device="cpu")
        self.skips_any = False

    def set_places(self, host_segment_table: Tensor, changed: Sequence[int]) -> None:
        """Take over where the parameters are now, of which these changed."""
        self.host_segment_table = host_segment_table
        if self.reader is not None:
            known = len(self.signatures) == len(self.segments)
            signatures = self.signatures.tolist() if known else [0] * len(self.segments)
            for i in changed:
                signatures[i] = self.reader.describe(self.segments[i].param)[1]
            self.signatures = torch.tensor(signatures, dtype=torch.int64, device="cpu")

    def set_skipped(self) -> None:
        """Take over which groups have `perturb=False`."""
        skipped = [not self.shared.groups[segment.group]["perturb"] for segment in self.segments]
        self.skipped, self.skips_any = torch.tensor(skipped, dtype=torch.bool, device="cpu"), any(skipped)

    def addresses(self, *, ascent: bool) -> tuple[Any, ...]:
        """What the native reader is told of the bucket."""
        tables = self.tables
        return (
            self.params,
            self.host_segment_table.data_ptr(),
            self.signatures.data_ptr(),
            self.skipped.data_ptr() if ascent and self.skips_any else 0,
            tables.grad_table.data_ptr(),
            0 if tables.format.grad == tables.dtype else DLPACK_CODES[tables.format.grad],
        )

    def found(self, grads: list[Tensor | None]) -> Gradients:
        """Gradients whose addresses the native reader wrote down."""
        result = Gradients(grads)
        result.table = self.tables.grad_table
        return result

    def gather(self, *, ascent: bool) -> tuple[Gradients, list[int]]:
        """Read every `.grad`; also the indices of parameters that are no longer where the tables say.

        Args:
            ascent: leave out the groups with `perturb=False`.
        """
        tables = self.tables
        if self.reader is not None:
            found, moved, foreign = self.reader.gather(*self.addresses(ascent=ascent))
            grads = self.found(found)
        else:
            skipped = self.skipped.tolist() if ascent else [False] * len(self.params)
            whole = [None if skip else p.grad for p, skip in zip(self.params, skipped, strict=True)]
            grads = Gradients([None if grad is None else local_of(grad) for grad in whole])
            moved = [i for i, segment in enumerate(self.segments) if layout(segment.weight) != segment.layout]
            dtypes = [self._dtype_for(segment.layout.dtype) for segment in self.segments]
            foreign = [
                i
                for i, (g, grad, segment) in enumerate(zip(grads, whole, self.segments, strict=True))
                if g is not None
                and not (grad is not None and same_placements(segment.param, grad) and segment.accepts(g, dtypes[i]))
            ]
        if foreign and not moved:
            if (common := self._common_dtype(grads)) != tables.format.grad:
                tables.format = tables.format._replace(grad=common)
                return self.gather(ascent=ascent)
            for i in foreign:
                grads[i] = grad = self._converted(self.segments[i])
                if grads.table is not None:
                    grads.table[i] = grad.data_ptr() or ALIGN  # an empty gradient is a gradient
        return grads, moved or []

    def none(self) -> Gradients:
        """No gradient for any parameter, with the table that says so."""
        nothing = Gradients([None] * len(self.segments))
        nothing.table = self.tables.grad_table.zero_()
        return nothing

    def _dtype_for(self, param_dtype: torch.dtype) -> torch.dtype:
        """What one launch reads a gradient of such a parameter as."""
        format = self.tables.format
        return param_dtype if format.grad == format.weight else format.grad

    def _common_dtype(self, grads: Gradients) -> torch.dtype:
        """What one launch reads all these gradients as: the least dtype that holds them all, or the weights' own."""
        format = self.tables.format
        dtypes = {grad.dtype for grad in grads if grad is not None}
        common = reduce(torch.promote_types, dtypes) if dtypes else format.weight
        return common if format.takes(common) else format.weight

    def _converted(self, segment: Segment) -> Tensor:
        """A copy of a gradient that is sparse, of other strides or dtype or on other ranks, as the kernels want it."""
        param, weight = segment.param, segment.weight
        grad = gradient_part(param, self.shared.name_of(param))
        dtype = self._dtype_for(param.dtype)
        if grad.dtype != dtype:
            self.shared.warn_once(
                f"FusedSAM: {self.shared.name_of(param)} is {param.dtype}, its gradient {grad.dtype}: it is cast in "
                "every pass. Let the parameter's grad_dtype be its dtype to avoid that."
            )
        dense = grad if grad.layout == torch.strided else grad.to_dense()
        return torch.empty_strided(weight.size(), weight.stride(), dtype=dtype, device=weight.device).copy_(dense)
