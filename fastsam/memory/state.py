"""What `optimizer.state` shows of the flat tensors, what is loaded from there, and who else wrote to it."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsam.memory.placements import part_of
from fastsam.memory.segments import Segment, layout, own_storage
from fastsam.memory.shared import Shared, State
from fastsam.memory.vectors import Vectors
from fastsam.ops.local import local_of
from fastsam.ops.native import reader
from fastsam.ops.tables import Tables

COUNTERS = ("step", "mu_product")


class PublishedState:
    """What `optimizer.state` shows of one bucket: views of its flat tensors, from a parameter's first update on.

    Attributes:
        unpublished: indices of the segments whose state is not in `optimizer.state` yet.
    """

    def __init__(self, tables: Tables, segments: Sequence[Segment], shared: Shared, vectors: Vectors) -> None:
        """Nothing is shown yet."""
        self.tables, self.segments, self.shared, self.vectors = tables, segments, shared, vectors
        self.unpublished: list[int] = []

    def note_published(self, state: State, segments: Iterable[Segment]) -> None:
        """Note which segments have state in `state`; they need memory for it."""
        for segment in segments:
            held = state[segment.param] if segment.param in state else {}
            segment.published = any(held.get(name) is not None for name in self._all_names(segment))
            segment.updated |= segment.published

    def load_state(self, state: State, segments: Iterable[Segment]) -> None:
        """Take over what `state` holds, as torch.optim would use it; where it holds nothing, begin afresh.

        `note_published` comes first, and memory for what it finds.

        Values are copied into the flat tensors, and views of these put back. A view of ours that somebody gave other
        memory (`share_memory_()`, `.data = ...`) is followed there instead: the segment table must be written anew.

        Raises:
            ValueError: a state's shape is not its parameter's.
            RuntimeError: a state has no memory any more.
        """
        perturbed = {id(s) for s, hit in zip(self.segments, self.tables.perturbed.tolist(), strict=True) if hit}
        for segment in segments:
            held = state[segment.param] if segment.param in state else {}
            if self.tables.rule is not None:
                self._load_counters(segment, held)
                self._load_states(segment, held)
            if segment.master is not None:
                self._load_master(segment, held, id(segment) in perturbed)
            if segment.published:
                self._publish(segment, state)
        for name in self.shared.buffers:
            if name in self.vectors.items:
                self.vectors.load(name, state)
        named = [i for i, segment in enumerate(self.segments) if self._names(segment)]
        self.unpublished = [i for i in named if not self.segments[i].published]

    def _load_counters(self, segment: Segment, held: dict[str, Any]) -> None:
        rule = self.tables.rule
        assert rule is not None
        if not rule.counters and ((first := held.get(rule.states[0])) is None or not self._shows(segment, first)):
            segment.step.fill_(float(first is not None))
        for name, initial in (("step", 0.0), ("mu_product", 1.0)):
            own: Tensor = getattr(segment, name)
            value: Any = held.get(name)
            if name not in rule.counters or (self._shows(segment, value) and value.data_ptr() == own.data_ptr()):
                continue
            own.fill_(initial if value is None else float(value))
            segment.views[name] = own_storage(own)

    def _shows(self, segment: Segment, value: Any) -> bool:
        """Whether a value is one of the views that were put into `optimizer.state`."""
        return any(value is view for view in segment.views.values())

    def _load_states(self, segment: Segment, held: dict[str, Any]) -> None:
        rule = self.tables.rule
        assert rule is not None
        for slot, name in enumerate(rule.states):
            flat, value = segment.states[slot], held.get(name)
            if flat is None:
                continue
            flat = segment.states[slot] = self._with_memory(segment, name, value, flat)
            if rule.eager and self.tables.format.masters and segment.step == 0:
                value = None  # torch made it in the weights' precision
            if value is None:
                flat.fill_(rule.initial(self.shared.defaults))
                segment.views[name] = segment.shown(flat)
            else:
                segment.states[slot] = self._taken_over(segment, name, value, flat)

    def _load_master(self, segment: Segment, held: dict[str, Any], perturbed: bool) -> None:
        flat, value = segment.master, held.get("master")
        assert flat is not None
        flat = segment.master = self._with_memory(segment, "master", value, flat)
        if value is not None:
            segment.master = self._taken_over(segment, "master", value, flat)
            return
        segment.views["master"] = segment.shown(flat)
        if not perturbed:
            flat.copy_(segment.flat(segment.weight))

    def _with_memory(self, segment: Segment, name: str, value: Any, flat: Tensor) -> Tensor:
        """[numel]: a flat tensor of ours, a new one if somebody took the memory of the old away."""
        if isinstance(value, Tensor) and not _has_memory(value):
            raise RuntimeError(
                f"FusedSAM: state[{name!r}] of {self.shared.name_of(segment.param)} has no memory any more "
                "(untyped_storage().resize_()?), so the step cannot go on; load a checkpoint, or clear "
                "optimizer.state to begin afresh"
            )
        return flat if _has_memory(flat) else torch.empty(segment.numel, dtype=flat.dtype, device=flat.device)

    def _taken_over(self, segment: Segment, name: str, value: Tensor, flat: Tensor) -> Tensor:
        """[numel]: the flat tensor that holds `value` from now on: ours, or where our view was moved to."""
        expected = segment.shaped(flat)
        known, value = value is segment.views.get(name), part_of(value, segment.param)
        if known:
            if layout(value) == layout(expected):
                return flat
            if layout(value).moved_only(layout(expected)):
                return segment.flat(value)
        if value.shape != expected.shape:
            raise ValueError(
                f"FusedSAM: state[{name!r}] of {self.shared.name_of(segment.param)} must have its parameter's "
                f"shape {list(expected.shape)}, got {list(value.shape)}; load a checkpoint of this model, or clear "
                "optimizer.state"
            )
        expected.copy_(value)
        segment.views[name] = segment.shown(flat)
        return flat

    def publish(self, grads: Sequence[Tensor | None], state: State) -> bool:
        """Show the state of parameters that had their first update, as torch would create it; whether there was one."""
        if not self.unpublished:
            return False
        first = [i for i in self.unpublished if grads[i] is not None]
        for i in first:
            self.segments[i].published = True
            self._publish(self.segments[i], state)
        self.unpublished = [i for i in self.unpublished if not self.segments[i].published]
        return bool(first)

    def _publish(self, segment: Segment, state: State) -> None:
        if names := self._names(segment):
            state[segment.param].update({name: segment.views[name] for name in names})

    def _names(self, segment: Segment) -> tuple[str, ...]:
        """What `state` shows of a segment once it was updated."""
        rule, master = self.tables.rule, ("master",) if segment.master is not None else ()
        return master if rule is None else (*rule.counters, *rule.used(self.shared.groups[segment.group]), *master)

    def _all_names(self, segment: Segment) -> tuple[str, ...]:
        """What of `state` means that a segment was updated."""
        rule, master = self.tables.rule, ("master",) if segment.master is not None else ()
        return master if rule is None else ("step", *rule.states, *master)

    def detach_state(self, state: State) -> None:
        """Before the buckets are built anew: leave plain tensors in `state`."""
        for segment in self.segments:
            held = state[segment.param] if segment.param in state else {}
            for name, view in segment.views.items():
                if held.get(name) is not view:
                    continue
                wide = name in COUNTERS or name in self.shared.buffers or self.tables.format.masters
                dtype = view.dtype if wide else segment.param.dtype
                held[name] = view.to(segment.param.device, dtype, copy=True)
            if "master" in segment.views and segment.param.dtype != segment.layout.dtype:
                held.pop("master", None)  # of another precision now


def _has_memory(tensor: Tensor) -> bool:
    """Whether a dense tensor's storage has room for all of it."""
    tensor = local_of(tensor)
    if tensor.layout != torch.strided:
        return True
    needed = (tensor.storage_offset() + tensor.numel()) * tensor.element_size()
    return tensor.numel() == 0 or tensor.untyped_storage().nbytes() >= needed


class StateWatch:
    """Notices that somebody else wrote to `optimizer.state`: other tensors, other memory, entries that came or went.

    It remembers every entry and where our tensors lie; `edited` compares. What a tensor holds is not looked at: our
    kernels read it from there anyway.
    """

    def __init__(self) -> None:
        """Nothing is known yet, so everything counts as written by somebody else."""
        self.state: State | None = None
        self.held: list[dict[str, Any]] = []  # the inner dicts, in the order of the outer one
        self.entries: list[tuple[str, Any, int]] = []  # theirs: key, value, and the address of a tensor of ours, else 0
        self.table = array("q")  # the ids of all these, for the native reader

    def remember(self, state: State, segments: Iterable[Segment]) -> None:
        """Take what is in `state` now for right."""
        views = {id(view) for segment in segments for view in segment.views.values()}
        self.state, self.held = state, list(state.values())
        self.entries = [
            (key, value, local_of(value).data_ptr() if id(value) in views else 0)
            for held in self.held
            for key, value in held.items()
        ]
        dicts = [number for held in self.held for number in (id(held), len(held))]
        entries = [number for key, value, address in self.entries for number in (id(key), id(value), address)]
        self.table = array("q", dicts + entries)

    def edited(self, state: State) -> bool:
        """Whether `state` holds anything else than when it was remembered."""
        if state is not self.state or len(state) != len(self.held):
            return True
        if reader is not None and isinstance(state, dict):
            address, n, n_entries = self.table.buffer_info()[0], len(self.held), len(self.entries)
            return not reader.same_state(state, address, n, n_entries)
        found = [pair for held in state.values() for pair in held.items()]
        if len(found) != len(self.entries) or any(a is not b for a, b in zip(state.values(), self.held, strict=True)):
            return True
        return any(
            key is not known or value is not before or (address and local_of(value).data_ptr() != address)
            for (key, value), (known, before, address) in zip(found, self.entries, strict=True)
        )
