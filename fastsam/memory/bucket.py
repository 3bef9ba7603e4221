"""A bucket: the parameters of one (device, dtype) as one flat index space, and the flat tensors that belong to it.

Parameters and gradients stay where they are and are reached through tables of addresses. What the optimizer owns (the
backup of the weights or their masters, the base optimizer's state, the step counts) is flat, in pages that never move.
A parameter gets a backup before it is perturbed for the first time, and states before its first update; those that show
up later share a page of their own. With `flatten=True` the weights have such pages, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastsam import ops
from fastsam.bases.rules import SGD, Row
from fastsam.memory.flat import FlatWeights
from fastsam.memory.gradients import GradientReader
from fastsam.memory.pages import page
from fastsam.memory.placements import distributed_as, place_among
from fastsam.memory.segments import Segment, address_of, is_dense, layout, real_numel
from fastsam.memory.shared import Shared, State
from fastsam.memory.state import PublishedState
from fastsam.memory.vectors import Vectors
from fastsam.ops import graphs
from fastsam.ops.local import local_of
from fastsam.ops.reference import CHUNK
from fastsam.ops.tables import ALIGN, Gradients, Tables

Member: TypeAlias = tuple[Tensor, int]  # a parameter and the index of its group
STREAMS = 65_537  # of random numbers, between those of two parts of a parameter


class Bucket:
    """The parameters of one device and dtype that one backend serves: segments, pages and tables.

    Attributes:
        ranks: the process groups over which all of these parameters are split; none where they are whole.
        shared: what all buckets of the optimizer have in common.
        first_stream: that of random numbers for these parts of the parameters, another one on each rank.
        tables: what an operation is told.
        gradients: where the gradients are read.
        vectors: directions, and what a method keeps from step to step.
        published: what `optimizer.state` shows.
        segments: the parameters in the order of the tables.
        params: the same, the parameters alone.
    """

    def __init__(
        self,
        shared: Shared,
        device: torch.device,
        dtype: torch.dtype,
        backend: str,
        ranks: tuple[Any, ...],
        slot: int,
        rounding_step: int,
    ) -> None:
        """An empty bucket; `append` gives it parameters."""
        self.ranks = ranks
        self.first_stream = 0
        self.shared, self.backend = shared, ops.backend_named(backend)
        self.tables = tables = Tables(device, shared.precision.format_of(dtype), slot, shared.rule)
        if slot == 0:
            tables.overflows = torch.zeros(2, dtype=torch.int64, device=device)
        if tables.format.stochastic:
            tables.rounding = torch.full((1,), rounding_step, dtype=torch.int64, device=device)
        self.segments: list[Segment] = []
        self.params: list[Tensor] = []
        tables.segments = self.segments  # type: ignore[assignment]  # a list of a subclass, which nobody adds to
        self._told: tuple[Any, ...] = (None,) * 9  # what `_calls` were made of
        self._bound: Tensor | None = None  # keeps alive what `_calls` hold the address of
        self._calls: tuple[tuple[Any, ...], ...] = ()
        self.gradients = GradientReader(tables, self.segments, shared, self.backend.by_address)
        self.vectors = Vectors(tables, self.segments, shared)
        self.published = PublishedState(tables, self.segments, shared, self.vectors)
        self.segment_table_current = False  # whether it knows all states
        self.versions: list[int] = []  # of all parameters when their masters were last what they are rounded from
        self.without_backup: list[int] = []  # segments that a first pass may perturb, but has not yet
        self.without_states: list[int] = []  # segments that had no update yet
        self.has_backup = self.has_states = torch.zeros(0, dtype=torch.bool, device="cpu")  # the others
        self.swapped_out: dict[int, Tensor] = {}  # perturbed weights with masters while the old ones are in their place
        # What the last captured passes read, the first and the second, kept for their replays.
        self.captured_gradients: list[Gradients | None] = [None, None]

    # Pages and tables.

    def append(self, members: Sequence[Member], index: dict[int, int], flat: FlatWeights, state: State) -> None:
        """Give the bucket more parameters; existing pages stay where they are.

        Args:
            members: the parameters and their groups.
            index: by id, each parameter's place among all of the optimizer.
            flat: where weights live with `flatten=True`.
            state: `optimizer.state`.
        """
        self._refuse_capture()
        tables = self.tables
        parts = [local_of(param) for param, _ in members]
        sizes = [real_numel(part) for part in parts]
        masters: list[Tensor | None] = [None] * len(sizes)
        if tables.format.masters:
            masters = list(page(sizes, tables.format.source, tables.device)[1])
        progress = torch.zeros(len(members), 2, dtype=torch.float32, device=tables.device)
        before = len(self.segments)
        chunk = self.segments[-1].chunks.stop if self.segments else 0
        for i, (param, group) in enumerate(members):
            chunks = slice(chunk, chunk := chunk - (-sizes[i] // CHUNK))
            self.first_stream = place_among(param) * STREAMS % 2**31
            stream = (index[id(param)] + self.first_stream) % 2**31
            place = group, sizes[i], is_dense(parts[i]), stream, chunks
            self.segments.append(Segment(param, *place, None, masters[i], progress[i]))
        self.published.note_published(state, self.segments[before:])
        try:
            with flat.moving_in(tables.dtype, tables.device, self.segments[before:]):
                self._allocate_states()
                self._build_tables()
        except BaseException:  # out of memory, say: as if nothing had been asked, so that restore() works
            del self.segments[before:]
            raise
        self.params = self.gradients.params = [segment.param for segment in self.segments]
        self.published.load_state(state, self.segments[before:])
        self.versions = []

    def require_memory(self, grads: Gradients | None, state: State, *, ascent: bool) -> None:
        """Before a pass: have a backup of what the first one perturbs, or the states of what the second one updates.

        Args:
            grads: this pass's gradients; None stands for one of every parameter.
            state: `optimizer.state`.
            ascent: whether it is the first pass.
        """
        lacking = self.without_backup if ascent else self.without_states
        found = [i for i in lacking if grads is None or grads[i] is not None] if lacking else lacking
        if found and ascent:
            self._allocate_backups(found)
        elif found:
            for i in found:
                self.segments[i].updated = True
        if found or not self.segment_table_current:
            self.require_states(state)
            self._note_lacking()

    def require_states(self, state: State) -> None:
        """Have the states that the groups' values ask for; momentum or amsgrad may be switched on late."""
        self._allocate_states()
        if not self.segment_table_current:
            self.write_segment_table()
            self.load_state(state)

    def load_state(self, state: State) -> None:
        """Take over what `state` holds, and where it lies."""
        self.published.note_published(state, self.segments)
        self._allocate_states()
        self.published.load_state(state, self.segments)
        self._note_lacking()
        self.versions = []  # the model's weights may be loaded after these
        if not self._host_segment_table().equal(self.gradients.host_segment_table):
            self.write_segment_table()

    def _allocate_states(self) -> None:
        rule = self.tables.rule
        if rule is None:
            return
        used = [rule.used(group) for group in self.shared.groups]
        for slot, name in enumerate(rule.states):
            bare = [s for s in self.segments if s.updated and name in used[s.group] and s.states[slot] is None]
            if not bare:
                continue
            self._refuse_capture()
            self.segment_table_current = False
            _, pieces = page([s.numel for s in bare], self.tables.format.state, self.tables.device)
            for segment, piece in zip(bare, pieces, strict=True):
                segment.states[slot] = piece.fill_(rule.initial(self.shared.defaults))

    def _allocate_backups(self, indices: Sequence[int]) -> None:
        self._refuse_capture()
        self.segment_table_current = False
        bare = [self.segments[i] for i in indices]
        _, pieces = page([segment.numel for segment in bare], self.tables.format.source, self.tables.device)
        for segment, piece in zip(bare, pieces, strict=True):
            segment.backup = piece

    def sync_skipped(self) -> None:
        """Take over which groups have `perturb=False`."""
        self.gradients.set_skipped()
        self._note_lacking()

    def _note_lacking(self) -> None:
        """Note which segments have no backup and no states yet; usually none."""
        bare = [] if self.tables.format.masters else [i for i, s in enumerate(self.segments) if s.backup is None]
        skipped = self.gradients.skipped.tolist()
        self.without_backup = [i for i in bare if not skipped[i]]
        self.without_states = [i for i, segment in enumerate(self.segments) if not segment.updated]
        self.has_backup, self.has_states = (torch.ones(len(skipped), dtype=torch.bool, device="cpu") for _ in range(2))
        self.has_backup[self.without_backup] = False
        self.has_states[self.without_states] = False

    def _build_tables(self) -> None:
        tables = self.tables
        chunks: list[tuple[int, int, int, int]] = []
        position = 0
        for i, segment in enumerate(self.segments):
            for start in range(0, segment.numel, CHUNK):
                length = min(CHUNK, segment.numel - start)
                chunks.append((i, start // ALIGN, length, position))
                position -= -length // ALIGN
        chunk_table = torch.tensor(chunks, dtype=torch.int32, device="cpu").reshape(-1, 4).to(tables.device)
        partials = torch.zeros(len(chunks), dtype=torch.float64, device=tables.device)
        self.write_segment_table()  # from here on nothing can fail for want of the device's memory
        self.shared.captures.hold(tables.chunk_table, tables.partials)
        tables.chunk_table, tables.partials = chunk_table, partials
        tables.grad_table = torch.zeros(len(self.segments), dtype=torch.int64, device="cpu")
        perturbed = torch.zeros(len(self.segments), dtype=torch.bool, device="cpu")
        perturbed[: len(tables.perturbed)] = tables.perturbed
        tables.perturbed = perturbed
        self.sync_skipped()

    def _host_segment_table(self) -> Tensor:
        rows = []
        for segment in self.segments:
            owned = (segment.backup, *segment.states, segment.master, segment.progress)
            addresses = (0 if t is None else t.data_ptr() for t in owned)
            rows.append([address_of(segment.weight), *addresses, segment.group | segment.index << 32])
        return torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, 8)

    def write_segment_table(self, moved: Sequence[int] | None = None) -> None:
        """Write down where everything is.

        Args:
            moved: the segments whose parameters lie elsewhere, in the same layout, where that is all that may have
                changed.
        """
        self._refuse_capture()
        tables = self.tables
        changed: Sequence[int] = range(len(self.segments))
        if moved is None or not self.segment_table_current:
            host_table = self._host_segment_table()
        else:
            host_table, changed = self.gradients.host_segment_table.clone(), moved
            for i in moved:
                host_table[i, 0] = address_of(self.segments[i].weight)
        own_rows = host_table.new_zeros(self._own_rows(len(host_table)), 8)
        segment_table = torch.cat([host_table, own_rows]).to(tables.device)
        self.shared.captures.hold(tables.segment_table, tables.cache)
        tables.segment_table, tables.cache = segment_table, None
        for i in changed:
            self.segments[i].layout = layout(self.segments[i].weight)
        self.gradients.set_places(host_table, changed)
        self.segment_table_current = True
        self.versions = []  # a parameter may have been given other weights

    def _own_rows(self, n_segments: int) -> int:
        """How many rows of the segment table are the backend's own."""
        support = self.backend.graphs
        return 0 if support is None else support.own_rows(n_segments, len(self.shared.groups))

    def sync_values(self) -> None:
        """Take over the groups' values."""
        tables, shared = self.tables, self.shared
        if tables.row_table is not shared.row_table:
            self.shared.captures.hold(tables.cache)
            tables.cache = None
        tables.rows, tables.row_table, tables.counts = shared.rows, shared.row_table, shared.counts
        tables.q = shared.q

    def native_call(self, sums: Tensor, *, ascent: bool) -> tuple[Any, ...] | None:
        """What `reader.run_pass` is told of the bucket; None where its backend has no such call."""
        bind, tables, gradients = self.backend.bind, self.tables, self.gradients
        if bind is None or gradients.reader is None:
            return None
        told = self._told
        if (
            tables.segment_table is not told[0]
            or tables.chunk_table is not told[1]
            or tables.row_table is not told[2]
            or tables.format is not told[3]
            or tables.q is not told[4]
            or gradients.params is not told[5]
            or gradients.skipped is not told[6]
            or self.has_states is not told[7]
            or sums is not told[8]
        ):
            bound = bind(tables, sums)
            self._calls = tuple(
                (*gradients.addresses(ascent=ascent), tables.perturbed.data_ptr(), ready.data_ptr(), bound.data_ptr())
                for ascent, ready in ((False, self.has_states), (True, self.has_backup))
            )
            places = tables.segment_table, tables.chunk_table, tables.row_table
            self._told = (
                *places,
                *(tables.format, tables.q, gradients.params, gradients.skipped, self.has_states, sums),
            )
            self._bound = bound
        return self._calls[ascent]

    # CUDA graphs.

    def prepare_capture(self) -> None:
        """Before a pass: make sure that a CUDA graph finds what changes from step to step on the device."""
        capturing, shared = graphs.capturing(self.tables.device), self.shared
        if capturing:
            shared.captures.begin(shared.states_in_use(), shared.perturbs())
        if self.backend.graphs is not None:
            self._fit_segment_table()
            self.backend.graphs.prepare_capture(self.tables)
            if capturing:
                shared.captures.keep(self._captured())
        elif capturing:
            raise RuntimeError(
                f"FusedSAM: {shared.name_of(self.params[0])} is served by backend={self.backend.name!r}, and a CUDA "
                "graph would repeat today's lr and rho for good; capture with backend='cuda' or 'triton'"
            )

    def _captured(self) -> Iterator[Any]:
        """What a graph that is captured now reads and writes, apart from gradients."""
        tables = self.tables
        yield from (tables.segment_table, tables.chunk_table, tables.partials, tables.overflows, tables.rounding)
        yield tables.cache
        yield from self.vectors.pages()
        for segment in self.segments:
            yield from (segment.backup, *segment.states, segment.master, segment.progress, segment.weight.detach())

    def upload_values(self) -> None:
        """Bring the groups' values to where captured graphs find them."""
        if self.backend.graphs is not None:
            self._fit_segment_table()
            self.backend.graphs.upload_values(self.tables)

    def _fit_segment_table(self) -> None:
        """Give the segment table room for the rows of groups that were added."""
        if len(self.tables.segment_table) != len(self.segments) + self._own_rows(len(self.segments)):
            self.write_segment_table()

    def _refuse_capture(self) -> None:
        if graphs.capturing(self.tables.device):
            raise RuntimeError(
                "FusedSAM: memory for the step must be allocated before a CUDA graph is captured: call "
                "optimizer.prepare(), or take a step, first"
            )

    def check_capture(self) -> None:
        """Refuse gradients that are elsewhere than those which the last captured update reads."""
        captured = self.captured_gradients[1]
        if captured is None:
            return
        for param, grad in zip(self.params, captured, strict=True):
            if _address(None if param.grad is None else local_of(param.grad)) != _address(grad):
                raise RuntimeError(
                    f"FusedSAM: {self.shared.name_of(param)} has its gradient elsewhere than when the CUDA graph was "
                    "captured, so a replay would read an old one. Keep gradients where they are: "
                    "zero_grad(set_to_none=False), or capture forward and backward, too"
                )

    # The perturbation, seen from the host. The operations themselves keep `perturbed`, so that no interrupt falls
    # between a write to the weights and the note of it.

    @contextmanager
    def reading(self, vector: Gradients) -> Iterator[None]:
        """Within the block operations read a direction in the gradients' place, which may be of another dtype."""
        tables, format = self.tables, self.tables.format
        if vector.dtype is None or vector.dtype == format.grad:
            yield
            return
        tables.format = format._replace(grad=vector.dtype)
        try:
            yield
        finally:
            tables.format = format

    def perturb(self, grads: Gradients, sums: Tensor, along: Gradients | None = None) -> None:
        """Back up and climb, along another direction than the gradients if one is given for the same segments."""
        direction = grads if along is None else along
        with self.reading(direction):
            self.backend.operations.perturb_(self.tables, direction, sums)
        self.note_perturbation(grads, self._written(grads))

    def note_perturbation(self, grads: Gradients, written: list[Tensor]) -> None:
        """Let autograd notice stale graphs, and keep what the replays of a captured graph read."""
        self._note_captured(grads, 0)
        torch.autograd.graph.increment_version(written)

    def update(
        self,
        grads: Gradients,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        clip: Tensor | None = None,
        along: Gradients | None = None,
    ) -> None:
        """Restore and take the base step, with another direction than the gradients if one is given."""
        written, direction = self._written(grads), grads if along is None else along
        scale, overflow = self.on_device(grad_scale), self.on_device(found_inf)
        with self.reading(direction):
            self.backend.operations.update_(self.tables, direction, grad_scale=scale, found_inf=overflow, clip=clip)
        self.note_update(grads, written)

    def descend(
        self,
        direction: Gradients,
        rows: list[Row],
        row_table: Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Take a step of gradient descent with these values of the groups; the base optimizer's state stays."""
        tables = self.tables
        if graphs.capturing(tables.device):
            raise RuntimeError(
                "FusedSAM: a step with a term beside the base optimizer's cannot be captured in a CUDA graph"
            )
        plain = replace(
            tables,
            rule=SGD,
            rows=rows,
            row_table=row_table,
            counts=[False] * len(rows),
            perturbed=torch.zeros_like(tables.perturbed),
            overflows=None,
            cache=None,
        )
        plain.format = tables.format._replace(grad=direction.dtype or tables.format.grad)
        written = self._written(direction)
        scale, overflow = self.on_device(grad_scale), self.on_device(found_inf)
        self.backend.operations.update_(plain, direction, grad_scale=scale, found_inf=overflow)
        self.note_update(direction, written)

    def note_update(self, grads: Gradients, written: list[Tensor]) -> None:
        """Let autograd notice stale graphs, and keep what the replays of a captured graph read."""
        self._note_captured(grads, 1)
        torch.autograd.graph.increment_version(written)
        if self.tables.format.masters:
            self.remember_versions()

    def as_distributed(self, vector: Gradients) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The parameters, each with what a vector has for it, lying on the ranks as the parameter does."""
        for param, part in zip(self.params, vector, strict=True):
            yield param, None if part is None else distributed_as(param, part)

    def _note_captured(self, grads: Gradients, which: int) -> None:
        if graphs.capturing(self.tables.device):
            self.captured_gradients[which] = grads

    def on_device(self, scalar: Tensor | None) -> Tensor | None:
        """A number for this device; a GradScaler keeps its own on one of them."""
        device = self.tables.device
        return None if scalar is None else scalar.to(device, non_blocking=device.type == "cuda")

    def _written(self, grads: Gradients) -> list[Tensor]:
        """The parameters that an operation given these gradients writes to."""
        perturbed = self.tables.perturbed.tolist()
        if all(perturbed):  # the usual case, without a look at every gradient
            return self.params
        hits = zip(self.params, grads, perturbed, strict=True)
        return [param for param, grad, hit in hits if hit or grad is not None]

    def restore(self) -> None:
        """Bring the old weights back, bit for bit. Allocates no tensor: it runs after an out-of-memory error, too."""
        hits = [s for s, perturbed in zip(self.segments, self.tables.perturbed.tolist(), strict=True) if perturbed]
        if any(layout(segment.weight) != segment.layout for segment in hits):
            self.copy_back()  # the tables know the old places only
        elif hits:
            self.update(self.gradients.none(), None, None)

    def copy_back(self) -> None:
        """Restore parameters that were moved, cast or laid out otherwise since `perturb_`."""
        for i, segment in enumerate(self.segments):
            if self.tables.perturbed[i] and (weight := segment.weight).numel() == segment.layout.shape.numel():
                weight.copy_(segment.shaped(segment.saved_weights()).reshape(weight.shape))
        self.tables.perturbed.zero_()

    def drop_perturbation(self) -> None:
        """Let go of the perturbation without touching the weights."""
        self.tables.perturbed.zero_()

    def swap(self) -> None:
        """Exchange perturbed and old weights, one parameter at a time."""
        for i, (segment, perturbed) in enumerate(zip(self.segments, self.tables.perturbed.tolist(), strict=True)):
            if not perturbed:
                continue
            if segment.backup is not None:
                saved, weights = segment.shaped(segment.backup), segment.weight.clone()
                segment.weight.copy_(saved)
                saved.copy_(weights)
            elif i in self.swapped_out:
                segment.refresh_master()  # what was written meanwhile is the weight from now on
                segment.weight.copy_(self.swapped_out.pop(i))
            else:
                self.swapped_out[i] = segment.weight.clone()
                segment.store(segment.saved_weights())

    # Masters.

    def refresh_masters(self) -> None:
        """Before a step, bring masters up to date where somebody else wrote the weights since the last one.

        A write through `.data` leaves no trace and is not seen.
        """
        if not self.tables.format.masters:
            return
        versions = [param._version for param in self.params]
        if self.versions == versions:
            return
        if not self.versions and graphs.capturing(self.tables.device):
            raise RuntimeError(
                "FusedSAM: the masters were not compared with their weights yet, and a CUDA graph would do so in each "
                "replay: call optimizer.refresh(), or take a step, before the capture"
            )
        before = self.versions or [-1] * len(versions)
        for segment, known, now in zip(self.segments, before, versions, strict=False):
            if known != now and layout(segment.weight).moved_only(segment.layout):
                segment.refresh_master()
        self.versions = versions

    def remember_versions(self) -> None:
        """Take the weights of now for those that the masters round to."""
        self.versions = [param._version for param in self.params]


def _address(tensor: Tensor | None) -> int | None:
    """Where a tensor's elements are; None for None."""
    return None if tensor is None else tensor.data_ptr()
