"""All buckets of an optimizer: what is caught up with before a pass, and the passes over all of them."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastsam.bases.rules import Group, Row, descent_row, row
from fastsam.memory.bucket import Bucket
from fastsam.memory.grouping import Grouping
from fastsam.memory.segments import layout
from fastsam.memory.shared import State
from fastsam.ops import graphs
from fastsam.ops.native import reader
from fastsam.ops.reference import CLIP_EPS, Clip, clip_factor
from fastsam.ops.tables import Gradients

GRAD_NORM, PERTURB, UPDATE = 1, 2, 4  # operations, as the native library numbers them
Steer: TypeAlias = Callable[[Sequence[Gradients]], Sequence[Gradients]]
SteerAscent: TypeAlias = Callable[
    [Sequence[Gradients]], tuple[Sequence[Gradients], Tensor | Sequence[Gradients] | None]
]
Measured: TypeAlias = tuple[Sequence[Gradients], Sequence[Gradients]]  # as read, and what is climbed along
MapSums: TypeAlias = Callable[[Mapping[torch.device, Tensor]], Mapping[torch.device, Tensor]]
MaxNorm: TypeAlias = float | Mapping[torch.device, Tensor]  # what gradients are clipped to, or the factors themselves


class Buckets(Grouping):
    """All buckets of an optimizer, kept in step with its `param_groups` and `state`, and the passes over them."""

    # Before a pass.

    def same_groups(self, groups: Sequence[Group], state: State) -> bool:
        """Whether parameters, groups and their values are those of the last pass, so that nothing need be caught up."""
        known = self.known_entries
        if known is None or reader is None or state is not self.state or groups is not self.shared.groups:
            return False
        if self.frozen and any(param.grad is not None for param, _ in self.frozen):
            return False
        return bool(reader.same_groups(groups, self.params, known))

    def _remember_groups(self) -> None:
        """Keep keys and values of all groups, unless there is one that can change without being another object."""
        pairs = [pair for group in self.shared.groups for pair in group.items()]
        fixed = all(key in ("params", "param_names") or _is_fixed(value) for key, value in pairs)
        self.known_entries = [item for pair in pairs for item in pair] if fixed else None

    def sync_with_groups(self, groups: Sequence[Group], state: State) -> None:
        """Catch up with other parameters or groups, and with thawed parameters."""
        self.known_entries = None
        self.shared.groups = groups
        if not self._same_params():
            self.state = state
            self._regroup()
        self.state = state
        thawed = [member for member in self.frozen if member[0].grad is not None]
        if thawed:
            self._append(thawed)
        perturbs = self.shared.perturbs()
        if perturbs != self.perturbs:
            self.perturbs = perturbs
            for bucket in self.items:
                bucket.sync_skipped()

    def sync_values(self) -> None:
        """Catch up with the groups' values, which schedulers change, and with what somebody wrote to the state."""
        self._read_values()
        self.sync_state()
        for bucket in self.items:
            bucket.prepare_capture()
        self._remember_groups()

    def _read_values(self) -> None:
        shared, device = self.shared, self._kernels_device()
        rows = [row(group, shared.rule, device, shared.decays) for group in shared.groups]
        if rows != shared.rows:
            shared.counts = [shared.rule is not None and shared.rule.counts(group) for group in shared.groups]
            for bucket in self.items:
                bucket.require_states(self.state)
            if len(rows) != len(shared.rows):
                self._row_values = array("d", bytes(8 * len(Row._fields) * len(rows)))
                shared.row_table = torch.frombuffer(self._row_values, dtype=torch.float64).view(len(rows), -1)
            self._row_values[:] = array("d", [value for values in rows for value in values])
            shared.rows = rows  # last: if memory runs out, the next step asks for the states again
        for bucket in self.items:
            bucket.sync_values()

    def _kernels_device(self) -> torch.device | None:
        """The GPU whose kernels serve all parameters and can read a tensor lr there; None if there is none such."""
        devices = {bucket.tables.device if bucket.backend.by_address else None for bucket in self.items}
        device = devices.pop() if len(devices) == 1 else None
        return device if device is not None and device.type == "cuda" else None

    def refresh_masters(self) -> None:
        """Before a step, bring masters up to date with weights that somebody else wrote since the last one."""
        for bucket in self.items if self._has_masters() else ():
            bucket.refresh_masters()

    def refuse_refresh(self) -> None:
        """Refuse to record what is to happen outside of a graph.

        Raises:
            RuntimeError: a graph is being captured.
        """
        if any(graphs.capturing(bucket.tables.device) for bucket in self.items):
            raise RuntimeError(
                "FusedSAM: refresh() was called while a CUDA graph is captured, whose replays would write today's lr "
                "and rho back each time: call it before the capture, and before a replay that is to read new values"
            )

    def refresh(self) -> None:
        """Read the groups' values, and bring them to where captured graphs find them."""
        self._read_values()
        self.shared.captures.require_current(self.shared.states_in_use(), self.shared.perturbs())
        for bucket in self.items:
            bucket.upload_values()

    # Gradients, and parameters that were moved.

    def gather(self, *, ascent: bool) -> list[Gradients]:
        """The gradients of every bucket; the tables follow parameters that were moved (`.to()`, `p.data = ...`).

        Args:
            ascent: leave out the groups with `perturb=False`.
        """
        self.known_entries = None  # until `sync_values` has read them, whatever fails before
        read = [bucket.gradients.gather(ascent=ascent) for bucket in self.items]
        if any(moved for _, moved in read):
            self._follow_moves([moved for _, moved in read])
            read = [bucket.gradients.gather(ascent=ascent) for bucket in self.items]
            for bucket, (_, moved) in zip(self.items, read, strict=True):
                if moved:
                    raise RuntimeError(
                        f"FusedSAM: {self.shared.name_of(bucket.params[moved[0]])} cannot be read where it lies: "
                        f"{layout(bucket.segments[moved[0]].weight)}"
                    )
        return [grads for grads, _ in read]

    def skips_any(self) -> bool:
        """Whether there are parameters in groups with `perturb=False`."""
        return any(bucket.gradients.skips_any for bucket in self.items)

    def gather_all(self) -> list[Gradients]:
        """In a first pass, whose gradients were gathered: those of the groups with `perturb=False`, too.

        The tables of what was gathered before hold their addresses from now on.
        """
        known = self.known_entries
        read = self.gather(ascent=False)
        self.known_entries = known
        return read

    def require_memory(self, grads: Sequence[Gradients] | None, *, ascent: bool) -> None:
        """Before a pass: have what it needs of memory for these gradients, or for one of every parameter."""
        for i, bucket in enumerate(self.items):
            bucket.require_memory(None if grads is None else grads[i], self.state, ascent=ascent)

    # The passes.

    def run_pass(self, *, ascent: bool) -> list[tuple[Bucket, Gradients, list[Tensor]]] | None:
        """Read all gradients and run the operations of all buckets in one native call, where nothing is in its way.

        Returns:
            Each bucket with its gradients and the parameters that were written; None if nothing was run.
        """
        if reader is None or self.known_entries is None or len(self.sums) != 1:
            return None
        (sums,) = self.sums.values()
        calls = []
        for bucket in self.items:
            call = bucket.native_call(sums, ascent=ascent)
            if call is None:
                return None
            calls.append(call)
            bucket.prepare_capture()
        measures, adds = ascent and self.shared.q != 1, ascent and self.ranks.several
        found = reader.run_pass(calls, GRAD_NORM * measures + (0 if adds else PERTURB if ascent else UPDATE))
        if found is None:
            return None
        if adds:
            if measures:
                self.share_sums(self.sums, self.shared.q)
            reader.run_on(calls, PERTURB)
        return [
            (bucket, bucket.gradients.found(grads), written)
            for bucket, (grads, written) in zip(self.items, found, strict=True)
        ]

    def begin_ascent(self) -> None:
        """Before the first pass: what is done whichever way it takes."""
        if self.known_entries is not None and self._has_masters():
            self.sync_state()
        self.refresh_masters()
        self.weight_watch.begin()

    def perturb(
        self,
        steer: SteerAscent | None = None,
        map_sums: MapSums | None = None,
        instead: Callable[[], list[Gradients]] | None = None,
    ) -> None:
        """Norm over all buckets, then backup and perturbation; for p = inf there is no norm.

        Args:
            steer: gives the direction to climb along, in each bucket, for the gradients there; and what it is divided
                by, if not its own norm: that of other vectors, or the root of a number, [] float64.
            map_sums: gives what `perturb_` is to take for the sums of squares.
            instead: gives what is taken for the gradients.
        """
        self.begin_ascent()
        plain = steer is None and map_sums is None and instead is None
        if plain and (ran := self.run_pass(ascent=True)) is not None:
            for bucket, grads, written in ran:
                bucket.note_perturbation(grads, written)
            self.weight_watch.remember()
            return
        read, along = self.measure(steer, instead)
        self.climb(read, along, self.sums if map_sums is None else map_sums(self.sums))

    def measure(
        self, steer: SteerAscent | None = None, instead: Callable[[], list[Gradients]] | None = None
    ) -> Measured:
        """The first half of `perturb`, up to the sums of squares in `sums`; the weights are as they were."""
        read = self.gather(ascent=True)
        if instead is not None:
            read = instead()
        self.require_memory(read, ascent=True)
        self.sync_values()
        along, divisor = (read, None) if steer is None else steer(read)
        if isinstance(divisor, Tensor):
            for device, own in self.sums.items():
                own.zero_()[0].copy_(divisor, non_blocking=device.type == "cuda")
        elif self.shared.q != 1:
            for bucket, measured in zip(self.items, along if divisor is None else divisor, strict=True):
                with bucket.reading(measured):
                    bucket.backend.operations.grad_norm(bucket.tables, measured, self.sums[bucket.tables.device])
            self.share_sums(self.sums, self.shared.q)
        return read, along

    def climb(self, read: Sequence[Gradients], along: Sequence[Gradients], sums: Mapping[torch.device, Tensor]) -> None:
        """The second half of `perturb`: backup and perturbation.

        Args:
            read: the gradients that `measure` found.
            along: the directions that it gave.
            sums: [n] float64 on each device, the sums of squares; those of other optimizers may be among them.
        """
        try:
            for bucket, grads, direction in zip(self.items, read, along, strict=True):
                bucket.perturb(grads, sums[bucket.tables.device], direction)
        finally:  # if one fails, the others' writes are still ours
            self.weight_watch.remember()

    def update(
        self,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        max_norm: MaxNorm | None = None,
        steer: Steer | None = None,
        first_squares: Tensor | None = None,
    ) -> list[Gradients]:
        """Restore and take the base optimizer's step; the gradients of this pass.

        Args:
            grad_scale: [] or [1] float32, the loss scale of the gradients.
            found_inf: [] or [1] float32, not 0 where they overflowed.
            max_norm: what the gradients are clipped to, or [] float64 on each device: the factors that do so.
            steer: gives what the base optimizer steps with, in each bucket, for the gradients there.
            first_squares: [] float64, the squared length to which that is scaled.
        """
        self.sync_state()
        plain = grad_scale is None and found_inf is None and max_norm is None and first_squares is None
        if plain and steer is None and (ran := self.run_pass(ascent=False)) is not None:
            for bucket, grads, written in ran:
                bucket.note_update(grads, written)
            read = [grads for _, grads, _ in ran]
        else:
            read = self.gather(ascent=False)
            self.require_memory(read, ascent=False)
            self.sync_values()
            along = read if steer is None else steer(read)
            factors = self.factors_for(along, max_norm, grad_scale, first_squares)
            for bucket, grads, direction in zip(self.items, read, along, strict=True):
                bucket.update(grads, grad_scale, found_inf, factors.get(bucket.tables.device), direction)
        published = False
        for bucket, grads in zip(self.items, read, strict=True):
            if bucket.published.unpublished:
                published |= bucket.published.publish(grads, self.state)
        if published:
            self.watch.remember(self.state, self.segments())
        return read

    def factors_for(
        self,
        grads: Sequence[Gradients],
        max_norm: MaxNorm | None,
        grad_scale: Tensor | None,
        first_squares: Tensor | None = None,
    ) -> Mapping[torch.device, Tensor]:
        """[] float64 on each device: what these gradients are multiplied by in the update; none if by nothing.

        Args:
            grads: what the base optimizer steps with.
            max_norm: what their norm is clipped to, after the other factor; or the factors, instead of another.
            grad_scale: their loss scale.
            first_squares: [] float64, the squared length to which they are scaled, with the same loss scale.
        """
        if isinstance(max_norm, Mapping):
            return max_norm
        if first_squares is None:
            return {} if max_norm is None else self.clip(grads, max_norm, grad_scale)
        self.clip(grads, float("inf"), None)  # for the norm
        factors = {}
        for device, squares in self.second_sums.items():
            first, length = first_squares.to(device, non_blocking=True).sqrt(), squares.sum().sqrt()
            factor = torch.where((first / length).isfinite(), first / length, 1.0)
            if max_norm is not None:
                scale = 1.0 if grad_scale is None else grad_scale.to(device, non_blocking=True).double().reshape(())
                factor = factor * (max_norm / (factor * length / scale + CLIP_EPS)).clamp(max=1.0)
            factors[device] = factor
        return factors

    def clip(
        self, grads: Sequence[Gradients], max_norm: float, grad_scale: Tensor | None
    ) -> dict[torch.device, Tensor]:
        """[] float64 on each device: the factor that brings the norm of all gradients down to `max_norm`."""
        for bucket, g in zip(self.items, grads, strict=True):
            device = bucket.tables.device
            clip = Clip(max_norm, self.factors[device], bucket.on_device(grad_scale))
            with bucket.reading(g):
                bucket.backend.operations.grad_norm(bucket.tables, g, self.second_sums[device], clip=clip)
        if len(self.factors) > 1 or self.ranks.several:  # each launch knew the sums of its own device
            self.share_sums(self.second_sums)
            for device, factor in self.factors.items():
                scale = None if grad_scale is None else grad_scale.to(device, non_blocking=True)
                factor.copy_(clip_factor(Clip(max_norm, factor, scale), self.second_sums[device]))
        return self.factors

    def growth(self, grads: Sequence[Gradients]) -> float:
        """How many times as long these gradients are as those that `perturb` measured; waits for the device.

        NaN where that cannot be said: without the 2-norm, and in a capture, which must not wait.
        """
        if self.shared.q != 2 or any(graphs.capturing(bucket.tables.device) for bucket in self.items):
            return float("nan")
        for bucket, g in zip(self.items, grads, strict=True):
            bucket.backend.operations.grad_norm(bucket.tables, g, self.second_sums[bucket.tables.device])
        self.share_sums(self.second_sums)  # also on a rank without parameters, for which the others would wait
        device = next(iter(self.sums), None)
        return (
            float("nan") if device is None else float((self.second_sums[device].sum() / self.sums[device].sum()).sqrt())
        )

    def descend(self, along: Sequence[Gradients], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Take a plain step of gradient descent, w <- w - lr along, beside the base optimizer and its state.

        Raises:
            RuntimeError: a CUDA graph is being captured, in which the values of the groups are the base optimizer's.
        """
        groups, device = self.shared.groups, self._kernels_device()
        rows = [descent_row(group, device) for group in groups]
        row_table = torch.tensor(rows, dtype=torch.float64, device="cpu").reshape(len(rows), -1)
        for bucket, direction in zip(self.items, along, strict=True):
            bucket.descend(direction, rows, row_table, grad_scale, found_inf)

    def masters(self) -> dict[Tensor, Tensor]:
        """The float32 master of each parameter that has one, as `optimizer.state` shows it."""
        return {s.param: s.views["master"] for s in self.segments() if s.master is not None}

    def finish_base_step(self, overflow: bool) -> None:
        """Note that a step that the base optimizer took itself is over, and whether an overflow kept it away."""
        if self.overflows is not None:
            self.overflows[1] += overflow
        for bucket in self.items:
            if bucket.tables.rounding is not None:
                bucket.tables.rounding += 1
            for segment in bucket.segments:
                if segment.master is not None and segment.param.grad is not None and not overflow:
                    segment.store(segment.saved_weights())
        if self.shared.rule is not None:  # it is fused, but this step was not: it may have written other tensors
            for bucket in self.items:
                bucket.load_state(self.state)
        if self._watches_state():
            self.watch.remember(self.state, self.segments())

    def share_sums(self, sums: MutableMapping[torch.device, Tensor], q: float = 2.0) -> None:
        """Bring the sums of all devices and ranks together; copies between devices do not wait for the host.

        Args:
            sums: [n_buckets, ...] float64 on each device: what each bucket has written into its slot there.
            q: whether they are sums (2) or the q-norms of `grad_norm`.
        """
        for bucket in self.items if len(sums) > 1 else ():
            own, slot = sums[bucket.tables.device], bucket.tables.slot
            for device, there in sums.items():
                if device != bucket.tables.device:
                    there[slot].copy_(own[slot], non_blocking=device.type == "cuda")  # the host waits for its copy
        self.ranks.add(sums, q)

    def restore(self) -> None:
        """Bring the old weights back."""
        for bucket in self.items:
            bucket.restore()

    def drop_perturbation(self) -> None:
        """Let go of the perturbation without touching the weights."""
        for bucket in self.items:
            bucket.drop_perturbation()

    def weights_loaded(self) -> bool:
        """Whether weights were perturbed and somebody loaded others since."""
        return any(bool(bucket.tables.perturbed.any()) for bucket in self.items) and self.weight_watch.loaded()

    def swap(self) -> None:
        """Exchange perturbed and old weights."""
        written = self.weight_watch.written()
        for bucket in self.items:
            bucket.swap()
        self.weight_watch.mark(written)

    # What is counted on the devices.

    @property
    def overflows(self) -> Tensor | None:
        """[2] int64: the steps that an overflow changed, which one bucket counts for all; None without buckets."""
        return self.items[0].tables.overflows if self.items else None

    def set_rounding_step(self, step: int) -> None:
        """Go on with the random numbers of a checkpoint."""
        self.last_rounding_step = 0
        for bucket in self.items:
            if bucket.tables.rounding is not None:
                bucket.tables.rounding.fill_(step)


def _is_fixed(value: Any) -> bool:
    """Whether a value cannot change without being another object."""
    return (
        value is None
        or isinstance(value, (bool, int, float, str))
        or (isinstance(value, tuple) and all(map(_is_fixed, value)))
    )
