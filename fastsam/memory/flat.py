"""Flat buffers for `FusedSAM(flatten=True)`: which weights can live in one, their way in, and their way out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fastsam.memory.pages import page
from fastsam.memory.segments import Segment, is_dense


class FlatWeights:
    """The flat buffers that the weights of an optimizer live in.

    Attributes:
        wanted: whether weights of new segments are moved into one.
        buffers: they outlive the buckets that made them, as long as a parameter lives in them: that tells
            our own buffers from somebody else's when buckets are built anew.
    """

    def __init__(self) -> None:
        """No buffer yet, and none asked for."""
        self.wanted = False
        self.buffers: list[Tensor] = []

    def buffer_of(self, param: Tensor) -> Tensor | None:
        """The buffer that a parameter lives in."""
        if not self.buffers or param.numel() == 0:
            return None
        start = param.untyped_storage().data_ptr()
        return next((buffer for buffer in self.buffers if buffer.untyped_storage().data_ptr() == start), None)

    def reason_not_flattened(self, param: Tensor) -> str | None:
        """Why a parameter must not be moved, None if it may be."""
        if param.is_complex():
            return f"it is complex ({param.dtype})"
        if not is_dense(param):
            return f"its storage has gaps (strides {list(param.stride())})"
        if param.device.type == "cpu" and param.is_shared():  # type: ignore[no-untyped-call]
            return "it is in memory shared between processes"
        if self.buffer_of(param) is None and not _fills_storage(param):
            return (
                "it is a part of a larger storage, which others may use: the flat buffer of cuDNN's RNNs, of a library "
                "or of another FusedSAM, whose unflatten() would let it go"
            )
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
                segment.param.data = segment.shaped(piece)
                segment.flattened = True
            yield
        except BaseException:
            for segment, data in zip(movable, before, strict=True):
                segment.param.data = data
            raise
        self.buffers.append(buffer)

    def prune(self, params: Iterable[Tensor]) -> None:
        """Let go of buffers that none of these parameters lives in."""
        used = {id(self.buffer_of(param)) for param in params}
        self.buffers = [buffer for buffer in self.buffers if id(buffer) in used]

    def recognise_copies(self, params: Iterable[Tensor]) -> None:
        """Take over the storages of parameters that are copies of ones in our buffers."""
        for param in params:
            if self.buffer_of(param) is None and not _fills_storage(param):
                whole = torch.empty(0, dtype=param.dtype, device=param.device)
                self.buffers.append(whole.set_(param.untyped_storage()))

    def move_out(self, params: Iterable[Tensor]) -> None:
        """Give parameters storage of their own, with the same strides; if memory runs out none has moved."""
        members = [param for param in params if self.buffer_of(param) is not None]
        own = [torch.empty_strided(p.size(), p.stride(), dtype=p.dtype, device=p.device).copy_(p) for p in members]
        for param, data in zip(members, own, strict=True):
            param.data = data
        self.buffers = []


def _fills_storage(param: Tensor) -> bool:
    return param.untyped_storage().nbytes() <= param.numel() * param.element_size()
