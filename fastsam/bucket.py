"""A bucket: the parameters of one (device, dtype) as one flat index space, and the flat tensors that belong to it.

Parameters and gradients stay where they are and are reached through tables of addresses. What the optimizer owns (the
backup of the weights or their masters, the base optimizer's state, the step counts) is flat, in pages that never move:
a parameter that is thawed later gets a page of its own. With `flatten=True` the weights have such pages, too.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from fastsam import ops
from fastsam.ops import graphs
from fastsam.ops.formats import Format
from fastsam.ops.native import reader
from fastsam.rules import Row, Rule
from fastsam.segments import Segment, is_dense, layout, place_of, real_numel

if TYPE_CHECKING:
    from fastsam.buckets import Buckets

CHUNK = 8192  # elements a row of the chunk table covers, the unit of the canonical sum
ALIGN = 64  # a segment starts at a multiple of this many elements
DLPACK_CODES = {torch.float32: 0x220, torch.bfloat16: 0x410, torch.float16: 0x210}  # type code and bits

State: TypeAlias = MutableMapping[Tensor, dict[str, Any]]
Member: TypeAlias = tuple[Tensor, int]  # a parameter and the index of its group


class Gradients(list["Tensor | None"]):
    """The gradients of a bucket in segment order; `table` holds their addresses if somebody wrote them down already."""

    table: Tensor | None = None


class Bucket:
    """The parameters of one device and dtype that one backend serves: segments, pages and tables.

    Attributes:
        slot: the bucket's place in `sums`.
        format: what everything is stored as; its `grad` is of this pass's gradients.
        segment_table: [n_segments, 8] int64: addresses of weights, backup, three states, master and progress (step
            count, NAdam's product of momenta); the group, and 2^32 times the parameter's index. A backend's own rows
            may follow.
        chunk_table: [n_chunks, 4] int32: segment, start / 64, length, and the padded lengths of all chunks before / 64.
        grad_table: [n_segments] int64 on the host: addresses of this pass's gradients, 0 for none.
        perturbed: [n_segments] bool on the host: the backup holds the weights; `perturb_` sets it, `update_` clears it.
        partials: [n_chunks] float64, scratch of `grad_norm`.
        overflows: [2] int64, steps that an overflow in the first and in the second pass changed; None but in slot 0.
        rounding: [1] int64, the step of the random numbers, which `update_` advances; None without stochastic rounding.
    """

    def __init__(self, owner: Buckets, device: torch.device, dtype: torch.dtype, backend: str, slot: int) -> None:
        """An empty bucket; `append` gives it parameters."""
        self.owner, self.device, self.backend, self.slot = owner, device, backend, slot
        self.format: Format = owner.precision.format_of(dtype)
        self.ops, self.graphs = ops.operations(backend), ops.graph_support(backend)
        self.segments: list[Segment] = []
        self.params: list[Tensor] = []
        self.segment_table = self.chunk_table = self.partials = torch.zeros(0)  # `append` makes them
        self.pointed = False  # whether segment_table knows all states
        self.silent: list[int] = []  # segments whose state is not in optimizer.state yet
        self.perturbed = torch.zeros(0, dtype=torch.bool)
        self.overflows = torch.zeros(2, dtype=torch.int64, device=device) if slot == 0 else None
        self.rounding: Tensor | None = None
        if self.format.stochastic:
            self.rounding = torch.full((1,), owner.rounding_step(), dtype=torch.int64, device=device)
        self.watched: list[tuple[Tensor, int]] = []  # a few perturbed parameters and their versions
        self.versions: list[int] = []  # of all parameters when their masters were last what they are rounded from
        self.aside: dict[int, Tensor] = {}  # weights with masters that `swap` took out of the way
        self.uploaded: list[Row] | None = None  # the groups' values that the device holds for captured graphs
        self.captured: Gradients | None = None  # what the last captured update reads; kept alive for its replays
        self.kept: Any = None  # what the backend keeps beside the tables

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights."""
        return self.format.weight

    @property
    def rule(self) -> Rule | None:
        """The fused base optimizer; None if the base steps by itself and `update_` only restores."""
        return self.owner.rule

    @property
    def rows(self) -> list[Row]:
        """What the kernels know of the parameter groups, by group index."""
        return self.owner.rows

    @property
    def q(self) -> float:
        """The exponent of the gradient's norm: 2, or p / (p - 1) for another norm of the perturbation."""
        return self.owner.q

    @property
    def row_table(self) -> Tensor:
        """[n_groups, 11] float64 on the host: `rows`."""
        return self.owner.row_table

    @property
    def counts(self) -> list[bool]:
        """Whether an update advances the step counts, by group index."""
        return self.owner.counts

    # Pages and tables.

    def append(self, members: Sequence[Member], state: State) -> None:
        """Give the bucket a page for more parameters; existing pages stay where they are."""
        self._refuse_capture()
        sizes = [real_numel(param) for param, _ in members]
        _, kept = self.page(sizes, self.format.source)
        nothing: list[Tensor | None] = [None] * len(sizes)
        backups, masters = (nothing, kept) if self.format.masters else (kept, nothing)
        index = {id(p): i for i, p in enumerate(p for group in self.owner.groups for p in group["params"])}
        progress = torch.zeros(len(members), 2, dtype=torch.float32, device=self.device)
        before = len(self.segments)
        chunk = self.segments[-1].chunks.stop if self.segments else 0
        for i, (param, group) in enumerate(members):
            chunks = slice(chunk, chunk := chunk - (-sizes[i] // CHUNK))
            place = layout(param), group, sizes[i], is_dense(param), index[id(param)], chunks
            self.segments.append(Segment(param, *place, backups[i], masters[i], progress[i]))
        try:
            with self.owner.flat.moving_in(self, self.segments[before:]):
                self._allocate()
                self._build_tables()
        except BaseException:  # out of memory, say: as if nothing had been asked, so that restore() works
            del self.segments[before:]
            raise
        self.params = [segment.param for segment in self.segments]
        self.largest = max(range(len(self.segments)), key=lambda i: self.segments[i].numel)
        self.absorb(state, self.segments[before:])

    def require_states(self, state: State) -> None:
        """Have the states that the groups' values ask for; momentum or amsgrad may be switched on late."""
        self._allocate()
        if not self.pointed:
            self.point()
            self.absorb(state, self.segments)

    def _allocate(self) -> None:
        if self.rule is None:
            return
        used = [self.rule.used(group) for group in self.owner.groups]
        for slot, name in enumerate(self.rule.states):
            bare = [s for s in self.segments if name in used[s.group] and s.states[slot] is None]
            if bare:
                self._refuse_capture()
                self.pointed = False
            _, pieces = self.page([s.numel for s in bare], self.format.state)
            for segment, flat in zip(bare, pieces, strict=True):
                segment.states[slot] = flat.fill_(self.rule.initial(self.owner.defaults))

    def page(self, sizes: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """One new flat tensor, not initialised, cut into pieces of these sizes that start at multiples of ALIGN."""
        rooms = [-(-n // ALIGN) * ALIGN for n in sizes]
        flat = torch.empty(sum(rooms), dtype=dtype, device=self.device)
        if reader is not None and self.device.type == "cpu":
            reader.use_huge_pages(flat.data_ptr(), flat.nbytes)
        return flat, [piece[:n] for piece, n in zip(torch.split(flat, rooms), sizes, strict=True)] if sizes else []

    def _build_tables(self) -> None:
        chunks: list[tuple[int, int, int, int]] = []
        position = 0
        for i, segment in enumerate(self.segments):
            for start in range(0, segment.numel, CHUNK):
                length = min(CHUNK, segment.numel - start)
                chunks.append((i, start // ALIGN, length, position))
                position -= -length // ALIGN
        chunk_table = torch.tensor(chunks, dtype=torch.int32).reshape(-1, 4).to(self.device)
        partials = torch.zeros(len(chunks), dtype=torch.float64, device=self.device)
        self.point()  # from here on nothing can fail for want of the device's memory
        self.owner.captures.retire(self.chunk_table, self.partials)
        self.chunk_table, self.partials = chunk_table, partials
        self.grad_table = torch.zeros(len(self.segments), dtype=torch.int64)
        before, self.perturbed = self.perturbed, torch.zeros(len(self.segments), dtype=torch.bool)
        self.perturbed[: len(before)] = before
        self.skip = torch.zeros(len(self.segments), dtype=torch.bool)
        self.mask()

    def mask(self) -> None:
        """Write down which segments the first pass leaves out: those of groups with `perturb=False`."""
        left_out = [not self.owner.groups[segment.group]["perturb"] for segment in self.segments]
        self.skip.copy_(torch.tensor(left_out, dtype=torch.bool))

    def point(self) -> None:
        """Write down where everything is."""
        rows = []
        for segment in self.segments:
            segment.layout = layout(segment.param)
            owned = (segment.backup, *segment.states, segment.master, segment.progress)
            addresses = (0 if t is None else t.data_ptr() for t in owned)
            rows.append([segment.layout.address, *addresses, segment.group | segment.index << 32])
        places = torch.tensor(rows, dtype=torch.int64).reshape(-1, 8)
        own = 0 if self.graphs is None else self.graphs.own_rows(len(rows), len(self.owner.groups))
        table = torch.cat([places, places.new_zeros(own, 8)]).to(self.device)
        self.owner.captures.retire(self.segment_table)
        self.places, self.segment_table = places, table  # the former on the host, for the reader
        self.uploaded, self.pointed = None, True
        self.versions = []  # a parameter may have been given other weights
        if reader is not None:
            signatures = [reader.describe(segment.param)[1] for segment in self.segments]
            self.signatures = torch.tensor(signatures, dtype=torch.int64)

    def settle(self) -> None:
        """Before a pass: see to it that a CUDA graph finds what changes from step to step on the device."""
        if graphs.capturing(self.device):
            self.owner.captures.begin(self.owner.states_in_use())
        if self.graphs is not None:
            self.graphs.settle(self)
        elif graphs.capturing(self.device):
            raise RuntimeError(
                f"FusedSAM: {place_of(self.params[0], self.owner.groups)} is served by the reference, and a CUDA graph "
                "would repeat today's lr and rho for good; capture with backend='cuda' or 'triton'"
            )

    def _refuse_capture(self) -> None:
        if graphs.capturing(self.device):
            raise RuntimeError(
                "FusedSAM: memory for the step must be allocated before a CUDA graph is captured: call "
                "optimizer.prepare(), or take a step, first"
            )

    # Gradients.

    def gather(self, *, ascent: bool) -> tuple[Gradients, list[int]]:
        """Read every `.grad`; also the indices of parameters that are no longer where the tables say.

        Args:
            ascent: leave out the groups with `perturb=False`.
        """
        if reader is not None and self.backend != "reference":
            found, moved, foreign = reader.gather(
                self.params,
                self.places.data_ptr(),
                self.signatures.data_ptr(),
                self.skip.data_ptr() if ascent and self.owner.partial else 0,
                self.grad_table.data_ptr(),
                0 if self.format.grad == self.dtype else DLPACK_CODES[self.format.grad],
            )
            grads = Gradients(found)
            grads.table = self.grad_table
        else:
            skip = self.skip.tolist() if ascent else [False] * len(self.params)
            grads = Gradients([None if left_out else p.grad for p, left_out in zip(self.params, skip, strict=True)])
            moved = [i for i, segment in enumerate(self.segments) if layout(segment.param) != segment.layout]
            dtypes = [s.layout.dtype if self.format.grad == self.dtype else self.format.grad for s in self.segments]
            foreign = [i for i, g in enumerate(grads) if g is not None and not self.segments[i].accepts(g, dtypes[i])]
        if foreign and not moved:
            if (common := self._common_dtype(grads)) != self.format.grad:
                self.format = self.format._replace(grad=common)
                return self.gather(ascent=ascent)
            for i in foreign:
                grads[i] = grad = self._converted(self.segments[i].param)
                if grads.table is not None:
                    grads.table[i] = grad.data_ptr() or ALIGN  # an empty gradient is a gradient
        return grads, moved or []

    def _common_dtype(self, grads: Gradients) -> torch.dtype:
        """What one launch reads all these gradients as: the least dtype that holds them all, or the weights' own."""
        dtypes = {grad.dtype for grad in grads if grad is not None}
        common = reduce(torch.promote_types, dtypes) if dtypes else self.dtype
        return common if self.format.takes(common) else self.dtype

    def _converted(self, param: Tensor) -> Tensor:
        """A copy of a gradient that is sparse, or of other strides or dtype, as the kernels want it."""
        grad = param.grad
        assert grad is not None
        dtype = param.dtype if self.format.grad == self.dtype else self.format.grad
        if grad.dtype != dtype:
            self.owner.warn_once(
                f"FusedSAM: {place_of(param, self.owner.groups)} is {param.dtype}, its gradient {grad.dtype}: it is "
                "cast in every pass. Let the parameter's grad_dtype be its dtype to avoid that."
            )
        dense = grad if grad.layout == torch.strided else grad.to_dense()
        return torch.empty_strided(param.size(), param.stride(), dtype=dtype, device=param.device).copy_(dense)

    # The perturbation, seen from the host. The operations themselves keep `perturbed`, so that no interrupt falls
    # between a write to the weights and the note of it.

    def climb(self, grads: Gradients, sums: Tensor) -> None:
        """Back up and climb, and remember a few parameters' versions to notice when somebody else writes weights."""
        self.ops.perturb_(self, grads, sums)
        torch.autograd.graph.increment_version(self._written(grads))
        few = dict.fromkeys((0, self.largest, len(self.params) - 1))
        self.watched = [(self.params[i], self.params[i]._version) for i in few if grads[i] is not None]

    def step(
        self, grads: Gradients, grad_scale: Tensor | None, found_inf: Tensor | None, clip: Tensor | None = None
    ) -> None:
        """Restore and take the base step. Bumped version counters let autograd notice stale graphs."""
        written = self._written(grads)
        self.watched = []
        self.ops.update_(self, grads, grad_scale=self.here(grad_scale), found_inf=self.here(found_inf), clip=clip)
        if graphs.capturing(self.device):
            self.captured = grads
        torch.autograd.graph.increment_version(written)
        self._note_versions()

    def here(self, scalar: Tensor | None) -> Tensor | None:
        """A number for this device; a GradScaler keeps its own on one of them."""
        return None if scalar is None else scalar.to(self.device, non_blocking=self.device.type == "cuda")

    def check_capture(self) -> None:
        """Refuse gradients that are elsewhere than those which the last captured update reads."""
        if self.captured is None:
            return
        for param, grad in zip(self.params, self.captured, strict=True):
            if address(param.grad) != address(grad):
                raise RuntimeError(
                    f"FusedSAM: {place_of(param, self.owner.groups)} has its gradient elsewhere than when the CUDA "
                    "graph was captured, so a replay would read an old one. Keep gradients where they are: "
                    "zero_grad(set_to_none=False), or capture forward and backward, too"
                )

    def _written(self, grads: Gradients) -> list[Tensor]:
        """The parameters that an operation given these gradients writes to."""
        perturbed = self.perturbed.tolist()
        if all(perturbed):  # the usual case, without a look at every gradient
            return self.params
        hits = zip(self.params, grads, perturbed, strict=True)
        return [param for param, grad, hit in hits if hit or grad is not None]

    def restore(self) -> None:
        """Bring the old weights back, bit for bit. Allocates no tensor: it runs after an out-of-memory error, too."""
        hits = [segment for segment, hit in zip(self.segments, self.perturbed.tolist(), strict=True) if hit]
        if any(layout(segment.param) != segment.layout for segment in hits):
            self._copy_back()  # the tables know the old places only
        elif hits:
            self.grad_table.zero_()
            nothing = Gradients([None] * len(self.segments))
            nothing.table = self.grad_table
            self.step(nothing, None, None)

    def _copy_back(self) -> None:
        """Restore parameters that were moved, cast or laid out otherwise since `perturb_`."""
        for i, segment in enumerate(self.segments):
            if self.perturbed[i] and segment.param.numel() == segment.layout.shape.numel():
                segment.param.copy_(segment.shaped(segment.kept()).reshape(segment.param.shape))
        self.perturbed.zero_()

    def swap(self) -> None:
        """Exchange perturbed and old weights, one parameter at a time."""
        for i, (segment, perturbed) in enumerate(zip(self.segments, self.perturbed.tolist(), strict=True)):
            if not perturbed:
                continue
            if segment.backup is not None:
                kept, aside = segment.shaped(segment.backup), segment.param.clone()
                segment.param.copy_(kept)
                kept.copy_(aside)
            elif i in self.aside:
                segment.renew_master()  # what was written meanwhile is the weight from now on
                segment.param.copy_(self.aside.pop(i))
            else:
                self.aside[i] = segment.param.clone()
                segment.store(segment.kept())
        self.watched = [(param, param._version) for param, _ in self.watched]

    # Masters.

    def meet_writes(self) -> None:
        """Before a step, bring masters up to date where somebody else wrote the weights since the last one.

        A write through `.data` leaves no trace and is not seen.
        """
        if not self.format.masters or self.versions == (versions := [param._version for param in self.params]):
            return
        before = self.versions or [-1] * len(versions)
        for segment, seen, now in zip(self.segments, before, versions, strict=False):
            if seen != now and layout(segment.param).moved_only(segment.layout):
                segment.renew_master()
        self.versions = versions

    def _note_versions(self) -> None:
        if self.format.masters:
            self.versions = [param._version for param in self.params]

    # optimizer.state.

    def absorb(self, state: State, segments: Iterable[Segment]) -> None:
        """Copy what `state` holds into the flat tensors and show these there; where it holds nothing, reset."""
        rule, names = self.rule, self.rule.states if self.rule is not None else ()
        perturbed = {id(s) for s, hit in zip(self.segments, self.perturbed.tolist(), strict=True) if hit}
        for segment in segments:
            held = state[segment.param] if segment.param in state else {}
            values = {name: held.get(name) for name in names}
            mastered = segment.master is not None and "master" in held
            segment.shown = any(value is not None for value in values.values()) or "step" in held or mastered
            segment.views = {}
            if rule is not None:
                began = held.get("step", 0.0) if rule.counters else values[rule.states[0]] is not None
                segment.step.fill_(float(began))
                segment.mu_product.fill_(float(held.get("mu_product", 1.0)))
                segment.views = {name: getattr(segment, name) for name in rule.counters}
            for (name, value), flat in zip(values.items(), segment.states, strict=False):
                if flat is None or rule is None:
                    continue
                if rule.eager and self.format.masters and segment.step == 0:
                    value = None  # torch made it in the weights' precision
                if not self._take(segment, name, value, flat):
                    flat.fill_(rule.initial(self.owner.defaults))
            if segment.master is not None:
                given = self._take(segment, "master", held.get("master"), segment.master)
                if not given and id(segment) not in perturbed:
                    segment.master.copy_(segment.flat(segment.param))
                self.versions = []  # the model's weights may be loaded after these
            if segment.shown:
                self._show(segment, state)
        self.silent = [i for i, segment in enumerate(self.segments) if self._names(segment) and not segment.shown]

    def _take(self, segment: Segment, name: str, value: Tensor | None, flat: Tensor) -> bool:
        """Have a view of a flat tensor, and a value that `state` holds copied there; False if it holds none."""
        view = segment.views[name] = segment.shaped(flat)
        if value is None:
            return False
        if value.shape != view.shape:
            raise ValueError(
                f"FusedSAM: state[{name!r}] of {place_of(segment.param, self.owner.groups)} must have its parameter's "
                f"shape {list(view.shape)}, got {list(value.shape)}; load a checkpoint of this model, or clear "
                "optimizer.state"
            )
        if value.data_ptr() != view.data_ptr():
            view.copy_(value)
        return True

    def publish(self, grads: Sequence[Tensor | None], state: State) -> None:
        """Show the state of parameters that had their first update, as torch would create it."""
        if not self.silent:
            return
        for i in self.silent:
            if grads[i] is not None:
                self._show(self.segments[i], state)
        self.silent = [i for i in self.silent if not self.segments[i].shown]

    def _names(self, segment: Segment) -> tuple[str, ...]:
        """What `state` shows of a segment once it was updated."""
        rule, master = self.rule, ("master",) if segment.master is not None else ()
        return master if rule is None else (*rule.counters, *rule.used(self.owner.groups[segment.group]), *master)

    def _show(self, segment: Segment, state: State) -> None:
        segment.shown = True
        if names := self._names(segment):
            state[segment.param].update({name: segment.views[name] for name in names})

    def replaced(self, state: State) -> bool:
        """Whether somebody put other tensors into `state[param]` than the ones shown there."""
        return any(
            name in state[segment.param] and state[segment.param][name] is not view
            for segment in self.segments
            if segment.shown and segment.param in state
            for name, view in segment.views.items()
        )

    def release(self, state: State) -> None:
        """Before the buckets are built anew: restore the weights, leave plain tensors in `state`."""
        self._copy_back()
        for segment in self.segments:
            held = state[segment.param] if segment.param in state else {}
            for name, view in segment.views.items():
                if held.get(name) is not view:
                    continue
                wide = name in ("step", "mu_product") or self.format.masters
                dtype = view.dtype if wide else segment.param.dtype
                held[name] = view.to(segment.param.device, dtype, copy=True)
            if "master" in segment.views and segment.param.dtype != segment.layout.dtype:
                held.pop("master", None)  # of another precision now


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's elements are; None for None."""
    return None if tensor is None else tensor.data_ptr()
