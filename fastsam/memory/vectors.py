"""Flat vectors over a bucket's parameters: directions to climb or step along, and what a method keeps between steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastsam.memory.pages import page
from fastsam.memory.placements import distributed_as, part_of
from fastsam.memory.segments import Segment, own_storage
from fastsam.memory.shared import AVERAGES, Shared, State
from fastsam.ops import graphs
from fastsam.ops.formats import LOW_DTYPES, Format
from fastsam.ops.local import local_of
from fastsam.ops.tables import ALIGN, Gradients, Tables

MOST_MASKS = 16  # sets of segments that are remembered: which parameters have gradients seldom changes


def direction_dtype(format: Format) -> torch.dtype:
    """What directions of a bucket are stored in: the arithmetic's float32 where a launch can read it, else as weights.

    It cannot where 16-bit weights are rounded stochastically.
    """
    return torch.float32 if format.takes(torch.float32) else format.weight


def present(grads: Gradients) -> Tensor:
    """[n_segments] bool on the host: which segments have a gradient."""
    if grads.table is not None:
        return grads.table != 0
    return torch.tensor([grad is not None for grad in grads], dtype=torch.bool, device="cpu")


class FlatVector:
    """A vector over one bucket's parameters, in one page in which they follow each other in the optimizer's order.

    That order does not depend on when a parameter was thawed, so numbers drawn for a whole page are the same after a
    resume; and two vectors of a bucket can be combined page by page.

    Attributes:
        page: [padded], 0 between the parameters.
        tensors: views of it by segment, of the parameters' shapes and strides.
        written: [n_segments] bool on the host: which segments hold something.
    """

    def __init__(self, segments: Sequence[Segment], dtype: torch.dtype, device: torch.device) -> None:
        """A vector that holds nothing yet, and is 0."""
        order = sorted(range(len(segments)), key=lambda i: segments[i].index)
        self.page, sorted_pieces = page([segments[i].numel for i in order], dtype, device)
        self.page.zero_()
        pieces = dict(zip(order, sorted_pieces, strict=True))
        self.pieces = [pieces[i] for i in range(len(segments))]
        self.tensors: list[Tensor] = [_shaped(s, piece) for s, piece in zip(segments, self.pieces, strict=True)]
        addresses = [piece.data_ptr() if piece.numel() else ALIGN for piece in self.pieces]
        self.table = torch.tensor(addresses, dtype=torch.int64, device="cpu")
        self.written = torch.zeros(len(segments), dtype=torch.bool, device="cpu")
        self._complete = False
        self._masked: dict[tuple[bool, ...], Gradients] = {}

    def where(self, mask: Tensor) -> Gradients:
        """The vector in the segments of a mask [n_segments] bool, as an operation takes it; the same object again."""
        hits = tuple(mask.tolist())
        found = self._masked.get(hits)
        if found is None:
            if len(self._masked) >= MOST_MASKS:
                self._masked.clear()
            found = Gradients([tensor if hit else None for tensor, hit in zip(self.tensors, hits, strict=True)])
            found.table, found.dtype = self.table * mask, self.page.dtype
            self._masked[hits] = found
        return found

    def note_written(self, mask: Tensor, keeps: bool) -> None:
        """Note what was written, beside what it held before if that is kept."""
        self.written = self.written | mask if keeps else mask
        self._complete = self._complete and keeps

    def complete(self) -> bool:
        """Whether all segments hold something, which a saved vector's soon do for good."""
        if not self._complete:
            self._complete = bool(self.written.all())
        return self._complete

    def shown(self, i: int, segment: Segment) -> Tensor:
        """Segment i as `optimizer.state` shows it: with a storage of its own."""
        return distributed_as(segment.param, _shaped(segment, own_storage(self.pieces[i])))

    def copy_from(self, other: FlatVector) -> None:
        """Take over what another vector holds, over the first of these segments."""
        for mine, theirs in zip(self.pieces, other.pieces, strict=False):
            mine.copy_(theirs)
        self.written[: len(other.written)] = other.written


def _shaped(segment: Segment, piece: Tensor) -> Tensor:
    """A piece as the parameter is; what is no number has a complex one's two parts as a last dimension."""
    param = segment.weight
    if param.is_complex() and not piece.is_floating_point():
        shape, stride = (*param.shape, 2), (*(2 * n for n in param.stride()), 1)
        return piece.as_strided(shape, stride) if segment.dense else piece.view(shape)
    return segment.shaped(piece)


class Vectors:
    """The flat vectors of one bucket, by name. Those that the optimizer saves are in `optimizer.state`, too."""

    def __init__(self, tables: Tables, segments: Sequence[Segment], shared: Shared) -> None:
        """None yet: they are made when they are first asked for."""
        self.tables, self.segments, self.shared = tables, segments, shared
        self.items: dict[str, FlatVector] = {}
        self._news = False

    def named(self, name: str, state: State) -> FlatVector:
        """The vector of that name over all segments of now; what is saved begins with what `state` holds."""
        known = self.items.get(name)
        if known is not None and len(known.pieces) == len(self.segments):
            return known
        self._refuse_capture()
        vector = FlatVector(self.segments, self._dtype_of(name), self.tables.device)
        if known is not None:
            vector.copy_from(known)
            self.shared.captures.hold(known.page)
        self.items[name] = vector
        if name in self.shared.buffers:
            for i, segment in enumerate(self.segments):
                if known is not None and name in segment.views:  # shown from its new place
                    self._show(name, vector, i, state)
            self.load(name, state)
        return vector

    def _dtype_of(self, name: str) -> torch.dtype:
        format = self.tables.format
        if name == AVERAGES:  # no kernel reads them; in 16 bits they would stand still
            return torch.float32 if format.weight in LOW_DTYPES else format.weight
        return self.shared.buffers.get(name) or direction_dtype(format)

    def require_partials(self) -> None:
        """Have the scratch memory that `dot` needs."""
        tables, n_chunks = self.tables, len(self.tables.chunk_table)
        if tables.dot_partials.shape[1] != n_chunks or tables.dot_partials.device != tables.device:
            self._refuse_capture()
            self.shared.captures.hold(tables.dot_partials)
            tables.dot_partials = torch.zeros(3, n_chunks, dtype=torch.float64, device=tables.device)

    def _refuse_capture(self) -> None:
        if graphs.capturing(self.tables.device):
            raise RuntimeError(
                "FusedSAM: memory for the step must be allocated before a CUDA graph is captured: take a step first"
            )

    def load(self, name: str, state: State) -> None:
        """Take over what `state` holds of a saved vector; where it holds nothing any more, begin afresh.

        Segments that were added since come when the vector is next asked for.

        Raises:
            ValueError: its shape is not the parameter's.
        """
        vector = self.items[name]
        for i, (segment, mine) in enumerate(zip(self.segments, vector.tensors, strict=False)):
            view = segment.views.get(name)
            value: Tensor | None = state[segment.param].get(name) if segment.param in state else None
            if value is None:
                if view is not None:
                    vector.pieces[i].zero_()
                    vector.written[i] = vector._complete = False
                    del segment.views[name]
            elif value is not view or local_of(value).data_ptr() != mine.data_ptr():
                value = part_of(value, segment.param)
                if value.shape != mine.shape:
                    raise ValueError(
                        f"FusedSAM: state[{name!r}] of {self.shared.name_of(segment.param)} must have its parameter's "
                        f"shape {list(mine.shape)}, got {list(value.shape)}; load a checkpoint of this model, or clear "
                        "optimizer.state"
                    )
                mine.copy_(value)
                vector.written[i] = True
                self._show(name, vector, i, state)

    def take_news(self) -> bool:
        """Whether anything was put into `optimizer.state` since this was last asked."""
        news, self._news = self._news, False
        return news

    def publish(self, grads: Sequence[Tensor | None] | None, state: State, *, stepped: bool = True) -> None:
        """Show what saved vectors hold, of all parameters or of those that have a gradient.

        A base optimizer that is not fused may take an entry for its own, so its state must be there before. Averages
        are shown beside none, too, if it has `stepped`: then it keeps none.
        """
        for name in self.shared.buffers:
            vector = self.items.get(name)
            for i, segment in enumerate(self.segments if vector is not None else ()):
                assert vector is not None
                if name in segment.views or not vector.written[i] or not (grads is None or grads[i] is not None):
                    continue
                own = name == AVERAGES and stepped and grads is not None
                if own or self.shared.rule is not None or state.get(segment.param):
                    self._show(name, vector, i, state)

    def _show(self, name: str, vector: FlatVector, i: int, state: State) -> None:
        segment = self.segments[i]
        segment.views[name] = state[segment.param][name] = vector.shown(i, segment)
        self._news = True

    def pages(self) -> Iterator[Tensor]:
        """What a captured graph reads and writes of them."""
        yield self.tables.dot_partials
        yield from (vector.page for vector in self.items.values())
