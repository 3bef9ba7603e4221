"""Averages of the weights, in `optimizer.state[p]["ema"]`: averaged <- decay * averaged + (1 - decay) * w."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastsam.memory.directions import Directions
from fastsam.memory.placements import distributed_as
from fastsam.memory.segments import Segment
from fastsam.memory.shared import AVERAGES
from fastsam.memory.vectors import FlatVector
from fastsam.ops import graphs


class Averages:
    """The averages of all buckets, one flat vector each.

    They begin with the weights after the first update. A parameter that was not updated yet has its weight as average,
    and no memory in `optimizer.state`.
    """

    def __init__(self, directions: Directions) -> None:
        """None yet."""
        self.directions, self.buckets = directions, directions.buckets

    def allocate(self) -> list[FlatVector]:
        """By bucket, the vectors; they begin with what `optimizer.state` holds."""
        shared = self.buckets.shared
        if AVERAGES not in shared.buffers:  # switched on late
            shared.buffers = {**shared.buffers, AVERAGES: None}
        return list(self.directions.named(AVERAGES).flats)

    @property
    def begun(self) -> bool:
        """Whether there was an update."""
        return any(AVERAGES in segment.views for segment in self.buckets.segments())

    def begin(self) -> None:
        """Before an update, while the old weights are known: parameters that have none yet begin with their weight.

        Raises:
            RuntimeError: a CUDA graph is being captured, each replay of which would begin again.
        """
        flats, begun = self.allocate(), self.begun
        for bucket, flat in zip(self.buckets.items, flats, strict=True):
            if not begun and graphs.capturing(bucket.tables.device):
                raise RuntimeError(
                    "FusedSAM: the averages of ema_decay begin with the first update, and a CUDA graph would begin "
                    "them in each replay: take a step before the capture"
                )
            for i, segment in enumerate(bucket.segments if begun else ()):
                if AVERAGES not in segment.views:
                    flat.pieces[i].copy_(segment.source(bool(bucket.tables.perturbed[i])))
                    flat.written[i] = True

    def update(self, decay: float) -> None:
        """After an update, with the weights that came of it: one pass over them and their averages."""
        begun = self.begun
        for bucket, flat in zip(self.buckets.items, self.allocate(), strict=True):
            averages, weights = [], []
            for i, (segment, moves) in enumerate(zip(bucket.segments, flat.written.tolist(), strict=True)):
                if begun and moves:
                    average, weight = _pair(segment, flat, i)
                    averages.append(average)
                    weights.append(weight)
                else:
                    flat.pieces[i].copy_(segment.source(False))
            if averages:
                # Not as a sum of two products: equal weights would not keep their average where it is.
                torch._foreach_lerp_(averages, weights, 1 - decay)
            flat.note_written(torch.ones_like(flat.written), keeps=True)

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each parameter that was updated, and its average: of the parameter's shape, float32 if that is narrower."""
        for bucket, flat in zip(self.buckets.items, self.allocate(), strict=True):
            for segment, average in zip(bucket.segments, flat.tensors, strict=True):
                if AVERAGES in segment.views:
                    yield segment.param, distributed_as(segment.param, average)


def _pair(segment: Segment, flat: FlatVector, i: int) -> tuple[Tensor, Tensor]:
    """Average i and the weight that goes into it, of one dtype; the master, where there is one."""
    if segment.master is not None:
        return flat.pieces[i], segment.master
    average, weight = flat.tensors[i], segment.weight.detach()
    return average, weight if weight.dtype == average.dtype else weight.to(average.dtype)
