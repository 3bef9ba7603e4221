"""Flat buffers for `FusedSAM(flatten=True)`: which weights can live in one, their way in, and their way out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar
from weakref import WeakSet

import torch
from torch import Tensor

from fastsam.memory.pages import page
from fastsam.memory.segments import Segment, is_dense, own_storage
from fastsam.ops.local import is_distributed


class FlatWeights:
    """The flat buffers that the weights of an optimizer live in.

    Each weight has a storage of its own over its part of a buffer, and so has each tensor in `buffers`: nobody can
    save, resize or share the memory of all by one of them. The memory itself lives as long as any of these does.

    Attributes:
        wanted: whether weights of new segments are moved into one.
        buffers: they outlive the buckets that made them, as long as a parameter lives in them.
        living: those of all optimizers, by which one does not take weights out of another's buffer.
    """

    living: ClassVar[WeakSet[FlatWeights]] = WeakSet()

    def __init__(self) -> None:
        """No buffer yet, and none asked for."""
        self.wanted = False
        self.buffers: list[Tensor] = []
        self.living.add(self)

    def buffer_of(self, param: Tensor) -> Tensor | None:
        """The buffer that a parameter lives in: that all of the parameter's storage lies in."""
        if not self.buffers or param.numel() == 0 or is_distributed(param):
            return None
        storage = param.untyped_storage()
        start, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        for buffer in self.buffers:
            if buffer.data_ptr() <= start and end <= buffer.data_ptr() + buffer.nbytes:
                return buffer
        return None

    def reason_not_flattened(self, param: Tensor) -> str | None:
        """Why a parameter must not be moved, None if it may be."""
        if is_distributed(param):
            return "it is a DTensor, and FSDP2 keeps views of the memory of its part"
        if param.is_complex():
            return f"it is complex ({param.dtype})"
        if not is_dense(param):
            return f"its storage has gaps (strides {list(param.stride())})"
        if param.device.type == "cpu" and param.is_shared():  # type: ignore[no-untyped-call]
            return "it is in memory shared between processes"
        if self.buffer_of(param) is not None:
            return None
        if param.untyped_storage().nbytes() > param.numel() * param.element_size():
            return (
                "it is a part of a larger storage, which others may use: the flat buffer of cuDNN's RNNs or a library"
            )
        if any(other.buffer_of(param) is not None for other in self.living):
            return "it is in the flat buffer of another FusedSAM, whose unflatten() would let it go"
        return None

    @contextmanager
    def moving_in(self, dtype: torch.dtype, device: torch.device, segments: Sequence[Segment]) -> Iterator[None]:
        """Move weights into one new buffer; if the block fails they are back where they were.

        Autograd, versions and `.grad` stay with the parameter, whose values do not change.
        """
        movable = [s for s in segments if self.wanted and s.numel > 0 and self.reason_not_flattened(s.param) is None]
        if not movable:
            yield
            return
        buffer, pieces = page([segment.numel for segment in movable], dtype, device)
        buffer.zero_()  # the gaps between weights must not change a norm or an average over the whole buffer
        before = [segment.param.data for segment in movable]
        try:
            for segment, piece in zip(movable, pieces, strict=True):
                piece.copy_(segment.flat(segment.param))
                segment.param.data = segment.shown(piece)
                segment.flattened = True
            yield
        except BaseException:
            for segment, data in zip(movable, before, strict=True):
                segment.param.data = data
            raise
        self.buffers.append(own_storage(buffer))

    def prune(self, params: Iterable[Tensor]) -> None:
        """Let go of buffers that none of these parameters lives in."""
        used = {id(self.buffer_of(param)) for param in params}
        self.buffers = [buffer for buffer in self.buffers if id(buffer) in used]

    def move_out(self, params: Iterable[Tensor]) -> None:
        """Give parameters memory of their own, with the same strides; if memory runs out none has moved."""
        members = [param for param in params if self.buffer_of(param) is not None]
        own = [torch.empty_strided(p.size(), p.stride(), dtype=p.dtype, device=p.device).copy_(p) for p in members]
        for param, data in zip(members, own, strict=True):
            param.data = data
        self.buffers = []
