"""Flat buffers for `FusedSAM(flatten=True)`: which weights can live in one, their way in, and their way out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastsam.segments import Segment, is_dense

if TYPE_CHECKING:
    from fastsam.bucket import Bucket


class FlatWeights:
    """The flat buffers that the weights of an optimizer live in.

    Attributes:
        wanted: whether weights that come are moved into one.
        pages: the buffers. They outlive the buckets that made them, as long as a parameter lives in them: that tells
            our own buffers from somebody else's when buckets are built anew.
    """

    def __init__(self) -> None:
        """No buffer yet, and none asked for."""
        self.wanted = False
        self.pages: list[Tensor] = []

    def home(self, param: Tensor) -> Tensor | None:
        """The buffer that a parameter lives in."""
        if not self.pages or param.numel() == 0:
            return None
        start = param.untyped_storage().data_ptr()
        return next((page for page in self.pages if page.untyped_storage().data_ptr() == start), None)

    def reason_to_stay(self, param: Tensor) -> str | None:
        """Why a parameter must not be moved, None if it may be."""
        if param.is_complex():
            return f"it is complex ({param.dtype})"
        if not is_dense(param):
            return f"its storage has gaps (strides {list(param.stride())})"
        if param.device.type == "cpu" and param.is_shared():  # type: ignore[no-untyped-call]
            return "it is in memory shared between processes"
        if self.home(param) is None and not _fills_storage(param):
            return (
                "it is a part of a larger storage, which others may use: the flat buffer of cuDNN's RNNs, of a library "
                "or of another FusedSAM, whose unflatten() would let it go"
            )
        return None

    @contextmanager
    def moving_in(self, bucket: Bucket, segments: Sequence[Segment]) -> Iterator[None]:
        """Move weights into one new buffer; if the block fails they are back where they were.

        Autograd, versions and `.grad` stay with the parameter, whose values do not change.
        """
        movers = [s for s in segments if self.wanted and s.numel > 0 and self.reason_to_stay(s.param) is None]
        if not movers:
            yield
            return
        page, pieces = bucket.page([segment.numel for segment in movers], bucket.dtype)
        page.zero_()  # nothing strange between the weights, for who takes norms or averages of all
        before = [segment.param.data for segment in movers]
        try:
            for segment, piece in zip(movers, pieces, strict=True):
                piece.copy_(segment.flat(segment.param))
                segment.param.data = segment.shaped(piece)
                segment.moved_in = True
            yield
        except BaseException:
            for segment, data in zip(movers, before, strict=True):
                segment.param.data = data
            raise
        self.pages.append(page)

    def prune(self, params: Iterable[Tensor]) -> None:
        """Let go of buffers that none of these parameters lives in."""
        used = {id(self.home(param)) for param in params}
        self.pages = [page for page in self.pages if id(page) in used]

    def adopt(self, params: Iterable[Tensor]) -> None:
        """Take over the storages of parameters that are copies of ones in our buffers."""
        for param in params:
            if self.home(param) is None and not _fills_storage(param):
                whole = torch.empty(0, dtype=param.dtype, device=param.device)
                self.pages.append(whole.set_(param.untyped_storage()))

    def move_out(self, params: Iterable[Tensor]) -> None:
        """Give parameters storage of their own, with the same strides; if memory runs out none has moved."""
        movers = [param for param in params if self.home(param) is not None]
        own = [torch.empty_strided(p.size(), p.stride(), dtype=p.dtype, device=p.device).copy_(p) for p in movers]
        for param, data in zip(movers, own, strict=True):
            param.data = data
        self.pages = []


def _fills_storage(param: Tensor) -> bool:
    return param.untyped_storage().nbytes() <= param.numel() * param.element_size()
