"""Which parameter is in which bucket: by device, dtype and backend, through moves, additions and rebuilds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsam.bases.rules import Group, Rule
from fastsam.memory.bucket import Bucket, Member
from fastsam.memory.flat import FlatWeights
from fastsam.memory.placements import ranks_of
from fastsam.memory.placing import backend_of, check_duplicates, check_overlaps, check_param, is_unused
from fastsam.memory.ranks import Ranks
from fastsam.memory.segments import Segment, has_storage, layout, real_dtype
from fastsam.memory.shared import Shared, State
from fastsam.memory.state import StateWatch
from fastsam.memory.writes import WeightWatch
from fastsam.ops.formats import Precision
from fastsam.ops.native import reader


class Grouping:
    """The buckets that an optimizer's parameters are in, and what all of these share.

    Attributes:
        shared: what all buckets have in common.
        backend: the one that was asked for.
        state: `optimizer.state`.
        items: the buckets.
        params: the parameters of all groups, in order.
        frozen: parameters that never had a gradient: no memory is spent on them.
        sums: [n_buckets] float64 on each device: `grad_norm` writes it, `perturb_` reads it.
        second_sums: the same for the gradients of the second pass, where they are measured.
        factors: [] float64 on each device, by which gradients are clipped.
        ranks: what sums are added up over other processes.
        flat: the buffers that the weights live in with `flatten=True`.
        watch: what was last put into `state`.
        weight_watch: who writes to the perturbed weights.
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
        """No buckets yet: `sync_with_groups` builds them. `defaults` are the base optimizer's."""
        self.shared = Shared(rule, precision, defaults, groups)
        self.backend, self.state = backend, state
        self.items: list[Bucket] = []
        self.params: list[Tensor] = []
        self.frozen: list[Member] = []
        self.perturbs: tuple[bool, ...] = ()
        self.sums: dict[torch.device, Tensor] = {}
        self.second_sums: dict[torch.device, Tensor] = {}
        self.factors: dict[torch.device, Tensor] = {}
        self.ranks = Ranks()
        self.flat = FlatWeights()
        self.watch = StateWatch()
        self.known_entries: list[Any] | None = None  # keys and values of all groups in turn, if they are what was read
        self.weight_watch = WeightWatch(param for group in groups for param in group["params"])
        self.last_rounding_step = 0  # that of the random numbers when buckets were last built anew

    def segments(self) -> Iterator[Segment]:
        """Those of all buckets."""
        return (segment for bucket in self.items for segment in bucket.segments)

    def sync_state(self) -> None:
        """Take over what somebody else wrote to `optimizer.state`; torch.optim would use it in its next step."""
        if self._watches_state() and self.watch.edited(self.state):
            for bucket in self.items:
                bucket.load_state(self.state)
            self.watch.remember(self.state, self.segments())

    def _watches_state(self) -> bool:
        """Whether anything of `optimizer.state` is ours; otherwise all of it is the base's."""
        return self.shared.rule is not None or self._has_masters() or bool(self.shared.buffers)

    def _has_masters(self) -> bool:
        return self.shared.precision.master_weights

    def rounding_step(self) -> int:
        """The step of the random numbers of stochastic rounding; reading it waits for the device."""
        counters = [bucket.tables.rounding for bucket in self.items if bucket.tables.rounding is not None]
        if counters:
            return int(counters[0])
        return max((self.last_rounding_step, *(int(group.get("rounding_step", 0)) for group in self.shared.groups)))

    def _same_params(self) -> bool:
        if reader is not None:
            return bool(reader.same_params(self.shared.groups, self.params))
        ids = [id(param) for group in self.shared.groups for param in group["params"]]
        return ids == [id(param) for param in self.params]

    def _regroup(self) -> None:
        """Parameters were added or exchanged: add pages for new ones; anything else builds all buckets anew."""
        groups = self.shared.groups
        params = [param for group in groups for param in group["params"]]
        group_of = {id(param): i for i, group in enumerate(groups) for param in group["params"]}
        if any(group_of.get(id(segment.param)) != segment.group for segment in self.segments()):
            self._rebuild()
        else:
            known = {id(segment.param) for segment in self.segments()}
            self._admit([(param, group_of[id(param)]) for param in params if id(param) not in known])
        self.params = params  # last: if memory runs out, the next step begins here again

    def _rebuild(self) -> None:
        """Build all buckets anew, with the state they hold; perturbed weights are restored first."""
        self.last_rounding_step = self.rounding_step()
        for bucket in self.items:
            bucket.copy_back()
            bucket.vectors.publish(None, self.state)
            bucket.published.detach_state(self.state)
            self.shared.captures.hold(*bucket.captured_gradients)
        self.items, self.params = [], []  # if memory runs out, the next step begins with `_regroup`
        members = [(param, i) for i, group in enumerate(self.shared.groups) for param in group["params"]]
        self._admit(members)
        self.params = [param for param, _ in members]

    def _admit(self, members: Sequence[Member]) -> None:
        check_duplicates(self.shared.groups)
        self.frozen = [member for member in members if is_unused(member[0])]
        self._append([member for member in members if not is_unused(member[0])])

    def _append(self, members: Sequence[Member]) -> None:
        """Give parameters a place in the buckets of their device, dtype and backend."""
        groups, captures = self.shared.groups, self.shared.captures
        self.sync_state()
        for param, group in members:
            check_param(param, group, groups, self.backend, sharded=self.ranks.norm_group is not None)
        check_overlaps([*(p for bucket in self.items for p in bucket.params), *(p for p, _ in members)], groups)
        self._warn_of_weights_not_flattened(members)
        index = {id(p): i for i, p in enumerate(p for group in groups for p in group["params"])}
        placed: dict[tuple[torch.device, torch.dtype, str, tuple[Any, ...]], list[Member]] = {}
        for param, group in members:
            key = param.device, real_dtype(param), backend_of(param, self.backend), ranks_of(param)
            placed.setdefault(key, []).append((param, group))
        for key, group_members in placed.items():
            found = [b for b in self.items if (b.tables.device, b.tables.dtype, b.backend.name, b.ranks) == key]
            bucket = found[0] if found else Bucket(self.shared, *key, len(self.items), self.rounding_step())
            bucket.append(group_members, index, self.flat, self.state)
            self.items += [] if found else [bucket]
            placed_now = {id(param) for param, _ in group_members}
            self.frozen = [member for member in self.frozen if id(member[0]) not in placed_now]
        devices = {bucket.tables.device for bucket in self.items}
        captures.hold(*self.sums.values(), *self.second_sums.values(), *self.factors.values())
        self.sums, self.second_sums = (
            {d: torch.zeros(len(self.items), dtype=torch.float64, device=d) for d in devices} for _ in range(2)
        )
        self.factors = {d: torch.ones((), dtype=torch.float64, device=d) for d in devices}
        self.ranks.arrange(self.items)
        self._prune_flat()
        self.weight_watch.choose([segment.param for segment in self.segments()])
        self.watch.remember(self.state, self.segments())

    def _warn_of_weights_not_flattened(self, members: Sequence[Member]) -> None:
        if not self.flat.wanted:
            return
        tried = [(p, self.flat.reason_not_flattened(p)) for p, _ in members if p.numel() > 0]
        reasons = [(p, why) for p, why in tried if why is not None]
        if reasons:
            self.shared.warn_once(
                f"FusedSAM: flatten=True leaves {len(reasons)} of {len(members)} parameters where they are, the first "
                f"is {self.shared.name_of(reasons[0][0])}: {reasons[0][1]}"
            )

    def _follow_moves(self, moved: Sequence[Sequence[int]]) -> None:
        """Bring the tables up to date; build all buckets anew where a dtype, device or shape changed."""
        for bucket, indices in zip(self.items, moved, strict=True):
            if not all(layout(bucket.segments[i].weight).moved_only(bucket.segments[i].layout) for i in indices):
                self._rebuild()
                return
            bucket.write_segment_table(indices)
        self._warn_of_weights_that_left()

    def _warn_of_weights_that_left(self) -> None:
        """Say that weights are no longer in the flat buffer; they stay where their owner put them."""
        left = [s for s in self.segments() if s.flattened and self.flat.buffer_of(s.param) is None]
        if not left:
            return
        for segment in left:
            segment.flattened = False
        self._prune_flat()
        if self.flat.wanted:
            self.shared.warn_once(
                f"FusedSAM: {self.shared.name_of(left[0].param)} is no longer in the flat buffer of flatten=True, "
                "because something gave it other memory (p.data = ..., .to(), share_memory_()). The step follows it "
                "there. Write weights in place to keep them in the buffer; to have them in one again, unflatten() this "
                "optimizer and load its state_dict() into a new FusedSAM",
                topic="left the flat buffer",
            )

    def flat_weights(self) -> list[Tensor]:
        """The buffers that parameters of the buckets live in."""
        buffers = (self.flat.buffer_of(p) for bucket in self.items for p in bucket.params)
        return list({id(buffer): buffer for buffer in buffers if buffer is not None}.values())

    def _prune_flat(self) -> None:
        self.flat.prune(p for group in self.shared.groups for p in group["params"] if has_storage(p))
