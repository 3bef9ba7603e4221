"""All buckets of an optimizer: the parameters by device, dtype and backend, and what is done to all of them in turn."""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastsam import ops, rules
from fastsam.bucket import Bucket, Gradients, Member, State
from fastsam.checks import check_param
from fastsam.flat import FlatWeights
from fastsam.ops import graphs
from fastsam.ops.formats import Precision
from fastsam.ops.native import reader
from fastsam.ops.reference import Clip, clip_factor
from fastsam.rules import Group, Row, Rule
from fastsam.segments import is_dense, layout, overlapping, place_of, real_dtype


class Buckets:
    """All buckets of an optimizer, kept in step with its `param_groups` and `state`.

    Attributes:
        rows: what the kernels know of each parameter group.
        sums: [n_buckets] float64 on each device: `grad_norm` writes it, `perturb_` reads it.
        second_sums: the same for the gradients of the second pass, where they are clipped.
        factors: [] float64 on each device, by which they are clipped.
        partial: whether a group has `perturb=False`.
        q: the exponent of the gradient's norm, 1 for none.
        decays: whether the perturbation is that of the loss with the weight decay in it.
        flat: the buffers that the weights live in with `flatten=True`.
    """

    def __init__(
        self,
        rule: Rule | None,
        backend: str,
        precision: Precision,
        defaults: Group,
        groups: Sequence[Group],
        state: State,
    ) -> None:
        """No buckets yet: `follow` builds them. `defaults` are the base optimizer's."""
        self.rule, self.backend, self.precision = rule, backend, precision
        self.defaults, self.groups, self.state = defaults, groups, state
        self.items: list[Bucket] = []
        self.params: list[Tensor] = []  # of all groups, in order
        self.frozen: list[Member] = []  # never had a gradient: no memory is spent on them
        self.rows: list[Row] = []
        self.counts: list[bool] = []
        self.perturbs: list[bool] = []
        self.partial = False
        self.sums: dict[torch.device, Tensor] = {}
        self.second_sums: dict[torch.device, Tensor] = {}
        self.factors: dict[torch.device, Tensor] = {}
        self.warned: set[str] = set()
        self.captures = graphs.Captures()
        self.flat = FlatWeights()
        self.q, self.decays = 2.0, False
        self.drawn = 0  # the step of the random numbers when buckets were last built anew

    def follow(self, groups: Sequence[Group], state: State) -> None:
        """Catch up with what happened since the last pass: other groups, values or state, thawed parameters."""
        self.groups = groups
        if not self._same_params():
            self.state = state
            self._regroup()
        elif self.state is not state:
            self.state = state
            for bucket in self.items:
                bucket.absorb(state, bucket.segments)
        thawed = [member for member in self.frozen if member[0].grad is not None]
        if thawed:
            self._append(thawed)
        self._read_values()
        for bucket in self.items:
            bucket.settle()

    def meet_writes(self) -> None:
        """Before a step, bring masters up to date with weights that somebody else wrote since the last one."""
        for bucket in self.items:
            bucket.meet_writes()

    def rounding_step(self) -> int:
        """The step of the random numbers of stochastic rounding; reading it waits for the device."""
        counters = [bucket.rounding for bucket in self.items if bucket.rounding is not None]
        if counters:
            return int(counters[0])
        return max((self.drawn, *(int(group.get("rounding_step", 0)) for group in self.groups)))

    def set_rounding_step(self, step: int) -> None:
        """Go on with the random numbers of a checkpoint."""
        self.drawn = 0
        for bucket in self.items:
            if bucket.rounding is not None:
                bucket.rounding.fill_(step)

    def refresh(self) -> None:
        """Read the groups' values, and bring them to where captured graphs find them."""
        self._read_values()
        self.captures.check(self.states_in_use())
        for bucket in self.items:
            if bucket.graphs is not None:
                bucket.graphs.upload(bucket)

    def _kernels_device(self) -> torch.device | None:
        """The GPU whose kernels serve all parameters and can read a tensor lr there; None if there is none such."""
        devices = {None if bucket.backend == "reference" else bucket.device for bucket in self.items}
        device = devices.pop() if len(devices) == 1 else None
        return device if device is not None and device.type == "cuda" else None

    def _read_values(self) -> None:
        """Read the groups' values: schedulers change them, momentum and betas too."""
        rows = [rules.row(group, self.rule, self._kernels_device(), self.decays) for group in self.groups]
        if rows != self.rows:
            if len(rows) != len(self.rows):
                for bucket in self.items:
                    bucket.uploaded = None
                self._values = array("d", bytes(8 * len(Row._fields) * len(rows)))
                self.row_table = torch.frombuffer(self._values, dtype=torch.float64).view(len(rows), -1)
            self.counts = [self.rule is not None and self.rule.counts(group) for group in self.groups]
            for bucket in self.items:
                bucket.require_states(self.state)
            self._values[:] = array("d", [value for row in rows for value in row])
            self.rows = rows  # last: if memory runs out, the next step asks for the states again
        perturbs = [bool(group["perturb"]) for group in self.groups]
        if perturbs != self.perturbs:
            self.perturbs, self.partial = perturbs, not all(perturbs)
            for bucket in self.items:
                bucket.mask()

    def states_in_use(self) -> frozenset[str]:
        """The rule's states that any group uses now."""
        return frozenset(name for group in self.groups for name in (self.rule.used(group) if self.rule else ()))

    @property
    def overflows(self) -> Tensor | None:
        """[2] int64: the steps that an overflow changed, which one bucket counts for all; None without buckets."""
        return self.items[0].overflows if self.items else None

    def gather(self, *, ascent: bool) -> list[Gradients]:
        """The gradients of every bucket; the tables follow parameters that were moved (`.to()`, `p.data = ...`).

        Args:
            ascent: leave out the groups with `perturb=False`.
        """
        read = [bucket.gather(ascent=ascent) for bucket in self.items]
        if any(moved for _, moved in read):
            self._follow_moves([moved for _, moved in read])
            read = [bucket.gather(ascent=ascent) for bucket in self.items]
            for bucket, (_, moved) in zip(self.items, read, strict=True):
                if moved:
                    raise RuntimeError(
                        f"FusedSAM: {place_of(bucket.params[moved[0]], self.groups)} cannot be read where it lies: "
                        f"{layout(bucket.params[moved[0]])}"
                    )
        return [grads for grads, _ in read]

    def _follow_moves(self, moved: Sequence[Sequence[int]]) -> None:
        """Bring the tables up to date; build all buckets anew where a dtype, device or shape changed."""
        for bucket, indices in zip(self.items, moved, strict=True):
            if not all(layout(bucket.params[i]).moved_only(bucket.segments[i].layout) for i in indices):
                self._rebuild()
                return
            bucket.point()
        self._notice_leavers()

    def _notice_leavers(self) -> None:
        """Say that weights are no longer in the flat buffer; they stay where their owner put them."""
        moved_in = [segment for bucket in self.items for segment in bucket.segments if segment.moved_in]
        left = [segment for segment in moved_in if self.flat.home(segment.param) is None]
        if not left:
            return
        for segment in left:
            segment.moved_in = False
        self._prune_flat()
        if self.flat.wanted:
            self.warn_once(
                f"FusedSAM: {place_of(left[0].param, self.groups)} is no longer in the flat buffer of flatten=True, "
                "because something gave it another storage (p.data = ..., .to(), .cpu()). The step follows it there. "
                "Write weights in place to keep them in the buffer; to have them in one again, build a new FusedSAM "
                "and load this one's state_dict()",
                topic="left the flat buffer",
            )

    def flat_weights(self) -> list[Tensor]:
        """The buffers that parameters of the buckets live in."""
        homes = (self.flat.home(p) for bucket in self.items for p in bucket.params)
        return list({id(page): page for page in homes if page is not None}.values())

    def _prune_flat(self) -> None:
        self.flat.prune(param for group in self.groups for param in group["params"])

    def perturb(self, grads: Sequence[Gradients]) -> None:
        """Norm over all buckets, then backup and climb; for p = inf there is no norm."""
        if self.q != 1:
            for bucket, g in zip(self.items, grads, strict=True):
                bucket.ops.grad_norm(bucket, g, self.sums[bucket.device])
            self._share(self.sums)
        for bucket, g in zip(self.items, grads, strict=True):
            bucket.climb(g, self.sums[bucket.device])

    def clip(
        self, grads: Sequence[Gradients], max_norm: float, grad_scale: Tensor | None
    ) -> dict[torch.device, Tensor]:
        """[] float64 on each device: the factor that brings the norm of all gradients down to `max_norm`."""
        for bucket, g in zip(self.items, grads, strict=True):
            how = Clip(max_norm, self.factors[bucket.device], bucket.here(grad_scale))
            bucket.ops.grad_norm(bucket, g, self.second_sums[bucket.device], clip=how)
        if len(self.factors) > 1:  # each launch knew the sums of its own device
            self._share(self.second_sums)
            for device, factor in self.factors.items():
                scale = None if grad_scale is None else grad_scale.to(device, non_blocking=True)
                factor.copy_(clip_factor(Clip(max_norm, factor, scale), self.second_sums[device]))
        return self.factors

    def update(
        self,
        grads: Sequence[Gradients],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        max_norm: float | None = None,
    ) -> None:
        """Restore and take the base optimizer's step, with the gradients clipped to `max_norm` if it is given."""
        factors = {} if max_norm is None else self.clip(grads, max_norm, grad_scale)
        for bucket, g in zip(self.items, grads, strict=True):
            bucket.step(g, grad_scale, found_inf, factors.get(bucket.device))
            bucket.publish(g, self.state)

    def finish_step(self, overflow: bool) -> None:
        """Note that a step without an update of ours is over, and whether it had none at all."""
        if self.overflows is not None:
            self.overflows[1] += overflow
        for bucket in self.items:
            if bucket.rounding is not None:
                bucket.rounding += 1

    def restore(self) -> None:
        """Bring the old weights back."""
        for bucket in self.items:
            bucket.restore()

    def forget(self) -> None:
        """Let go of the perturbation without touching the weights."""
        for bucket in self.items:
            bucket.perturbed.zero_()

    def undisturbed(self) -> bool:
        """Whether nobody else wrote to the perturbed weights since `perturb`."""
        return all(param._version == version for bucket in self.items for param, version in bucket.watched)

    def swap(self) -> None:
        """Exchange perturbed and old weights."""
        for bucket in self.items:
            bucket.swap()

    def warn_once(self, message: str, topic: str = "") -> None:
        """Warn, the first time only: of this topic, or with this message."""
        if (topic or message) not in self.warned:
            self.warned.add(topic or message)
            warnings.warn(message, stacklevel=2)

    def _same_params(self) -> bool:
        if reader is not None:
            return bool(reader.same_params(self.groups, self.params))
        ids = [id(param) for group in self.groups for param in group["params"]]
        return ids == [id(param) for param in self.params]

    def _regroup(self) -> None:
        """Parameters were added or exchanged: add pages for new ones; anything else builds all buckets anew."""
        params = [param for group in self.groups for param in group["params"]]
        group_of = {id(param): i for i, group in enumerate(self.groups) for param in group["params"]}
        segments = [segment for bucket in self.items for segment in bucket.segments]
        if any(group_of.get(id(segment.param)) != segment.group for segment in segments):
            self._rebuild()
        else:
            known = {id(segment.param) for segment in segments}
            self._admit([(param, group_of[id(param)]) for param in params if id(param) not in known])
        self.params = params  # last: if memory runs out, the next step begins here again

    def _rebuild(self) -> None:
        """Build all buckets anew, with the state they hold; perturbed weights are restored first."""
        self.drawn = self.rounding_step()
        for bucket in self.items:
            bucket.release(self.state)
        self.items, self.params = [], []  # if memory runs out, the next step begins with `_regroup`
        members = [(param, i) for i, group in enumerate(self.groups) for param in group["params"]]
        self._admit(members)
        self.params = [param for param, _ in members]

    def _admit(self, members: Sequence[Member]) -> None:
        self.frozen = [m for m in members if not m[0].requires_grad and m[0].grad is None]
        self._append([m for m in members if m[0].requires_grad or m[0].grad is not None])

    def _append(self, members: Sequence[Member]) -> None:
        """Give parameters a place in the buckets of their device, dtype and backend."""
        both = overlapping([*(p for bucket in self.items for p in bucket.params), *(p for p, _ in members)])
        if both is not None:
            raise ValueError(
                f"FusedSAM: parameters must not share memory, got {place_of(both[0], self.groups)} and "
                f"{place_of(both[1], self.groups)}; tie weights by using one Parameter in both places"
            )
        self._warn_of_stayers(members)
        placed: dict[tuple[torch.device, torch.dtype, str], list[Member]] = {}
        for param, group in members:
            check_param(param, group, self.groups, self.backend)
            placed.setdefault((param.device, *serve(param, self.backend)), []).append((param, group))
        for (device, dtype, backend), group_members in placed.items():
            same = [b for b in self.items if (b.device, b.dtype, b.backend) == (device, dtype, backend)]
            bucket = same[0] if same else Bucket(self, device, dtype, backend, slot=len(self.items))
            bucket.append(group_members, self.state)
            self.items += [] if same else [bucket]
            placed_now = {id(param) for param, _ in group_members}
            self.frozen = [member for member in self.frozen if id(member[0]) not in placed_now]
        devices = {bucket.device for bucket in self.items}
        self.captures.retire(*self.sums.values(), *self.second_sums.values(), *self.factors.values())
        self.sums, self.second_sums = (
            {d: torch.zeros(len(self.items), dtype=torch.float64, device=d) for d in devices} for _ in range(2)
        )
        self.factors = {d: torch.ones((), dtype=torch.float64, device=d) for d in devices}
        self._prune_flat()

    def _warn_of_stayers(self, members: Sequence[Member]) -> None:
        if not self.flat.wanted:
            return
        reasons = [(p, why) for p, _ in members if p.numel() > 0 and (why := self.flat.reason_to_stay(p)) is not None]
        if reasons:
            self.warn_once(
                f"FusedSAM: flatten=True leaves {len(reasons)} of {len(members)} parameters where they are, the first "
                f"is {place_of(reasons[0][0], self.groups)}: {reasons[0][1]}"
            )

    def _share(self, sums: Mapping[torch.device, Tensor]) -> None:
        """Bring the sums of all devices together; copies between devices do not wait for the host."""
        for bucket in self.items if len(sums) > 1 else ():
            for device, there in sums.items():
                if device != bucket.device:
                    own = sums[bucket.device][bucket.slot]
                    there[bucket.slot].copy_(own, non_blocking=device.type == "cuda")  # the host waits for its copy


def serve(param: Tensor, backend: str) -> tuple[torch.dtype, str]:
    """The real dtype of a parameter and the backend that serves it; kernels walk dense storage only."""
    dtype = real_dtype(param)
    chosen = ops.choose(backend, param.device, dtype)
    return dtype, "reference" if chosen is None or not is_dense(param) else chosen
