"""Buckets with everything in them, and comparisons bit for bit: what the tests of both kernel languages share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cases
import rounding
import torch
from rounding import INITIAL, OPTIONS, SEED, bucket_of, copied, shifted, values
from torch import Tensor

from fastsam import FusedSAM
from fastsam.bases.rules import ADAPTIVE, DECAYS, LR_FLOAT64
from fastsam.ops import graphs, native, reference
from fastsam.ops.formats import Format
from fastsam.ops.tables import Gradients
from ptx.backend import Interpreted
from ptx.tally import Tally

# The kernels of update_, by csrc/cuda/update.h's names: the options of its groups. Another rule or kernel is a row.
UPDATES: dict[str, list[str]] = {
    "restore": [],
    "plain": ["sgd"],
    "sgd": ["sgd", "sgd-dampening", "sgd-nesterov-maximize"],
    "adam": ["adam", "adam-far-lerp", "adamw"],
    "amsgrad": ["adam", "adam-far-lerp", "adamw", "adamw-amsgrad-maximize"],
    "rmsprop": ["rmsprop", "rmsprop-momentum-maximize"],
    "centered": [option for option in OPTIONS if option.startswith("rmsprop")],
    **{
        rule: [option for option in OPTIONS if option.startswith(rule)]
        for rule in ("adagrad", "nadam", "radam", "lion")
    },
}
# (rho, eta, flags) of a group.
CLIMBS = [
    (0.11, 0.0, 0),
    (0.7, 0.0, ADAPTIVE),
    (0.5, 0.03, ADAPTIVE),
    (0.2, 0.0, DECAYS),
    (0.3, 0.01, ADAPTIVE | DECAYS),
    (0.0, 0.0, 0),
]
# (elements, bytes that the weights and the gradients lie beyond a multiple of 16): every width of access, alone and
# beside another, in whole chunks, in their ends and in both.
SEGMENTS = [
    (8192, 0, 0),
    (8197, 8, 8),
    (4101, 0, 0),
    (2051, 0, 0),
    (1030, 8, 0),
    (1027, 0, 8),
    (515, 8, 4),
    (300, 4, 8),
    (300, 2, 6),
    (65, 12, 4),
    (63, 6, 2),
    (7, 0, 0),
    (3, 6, 14),
    (1, 0, 0),
    (0, 0, 0),
]


def any_bucket(options: Sequence[str], format: Format, seed: int, n_groups: int, lr: Tensor, there: bool) -> Any:
    """A bucket whose parameters have any size and alignment, and groups of all options; the same one for a seed.

    Args:
        options: of its rule; none to restore only.
        format: what it is stored as.
        seed: of its values.
        n_groups: `deal` chooses each parameter's.
        lr: of every fourth group: a tensor that kernels read, or, unless it is to be `there`, its value.
        there: see `lr`.
    """

    def placed(n: int, dtype: torch.dtype, at: int) -> Tensor:
        return shifted(n, dtype, at // dtype.itemsize * dtype.itemsize)

    params = [
        copied(placed(n, format.weight, at), values(n, format.weight, seed + i))
        for i, (n, at, _) in enumerate(SEGMENTS)
    ]
    bucket = bucket_of(params, (options or ["sgd"])[0], 0.0, format=format)
    bucket.rows = []
    for group in range(n_groups):
        rho, eta, more = CLIMBS[(group + seed) % len(CLIMBS)]
        row = rounding.rows_of((options or ["sgd"])[group % max(len(options), 1)])[0]
        row = row._replace(rho=rho, eta=eta, flags=row.flags & ~ADAPTIVE | more, seed=SEED + group)
        if group % 4 == 1 and there:
            flags = row.flags | (LR_FLOAT64 if lr.dtype == torch.float64 else 0)
            row = row._replace(lr=float("nan"), lr_address=lr.data_ptr(), flags=flags)
        elif group % 4 == 1:
            row = row._replace(lr=lr.item())
        bucket.rows.append(row)
    bucket.row_table = torch.tensor(bucket.rows, dtype=torch.float64)
    bucket.steps.copy_(torch.tensor([(4 * i + seed) % 10 for i in range(len(params))]))  # RAdam rectifies from 6 on
    for k in range(3):  # of any step, as every group may use them
        for i, state in enumerate(bucket.states[k]):
            state.copy_(values(len(state), torch.float64, 7 * i + k).abs() + INITIAL.get(bucket.rule, 0.0))
    bucket.rule = bucket.rule if options else None
    bucket.device, bucket.cache = torch.device("cpu"), None
    return bucket


def deal(bucket: Any, turn: int) -> None:
    """Put every parameter into another group."""
    n, n_groups = len(bucket.params), len(bucket.rows)
    groups = [(7 * i + turn) % n_groups for i in range(n)]
    bucket.segment_table[:n, 7] = torch.tensor([group | rounding.index_of(i) << 32 for i, group in enumerate(groups)])


def climb(bucket: Any, seed: int) -> None:
    """As after perturb_, but for some parameters: other weights, and the old ones in the backup."""
    for i, p in enumerate(bucket.params):
        bucket.perturbed[i] = (i + seed) % 4 != 3
        if bucket.perturbed[i]:
            if not bucket.format.masters:
                bucket.backups[i].copy_(p)
            p.copy_(values(len(p), p.dtype, seed + i))


def any_gradients(bucket: Any, seed: int) -> list[Tensor | None]:
    """Gradients at the bucket's places; about every seventh is missing."""
    dtype = bucket.format.grad
    grads: list[Tensor | None] = []
    for i, (p, (_, _, at)) in enumerate(zip(bucket.params, SEGMENTS, strict=True)):
        grad = copied(shifted(len(p), dtype, at // dtype.itemsize * dtype.itemsize), values(len(p), dtype, seed + i))
        grads.append(None if (i + seed) % 7 == 2 else grad)
    return grads


def odd(like: Tensor, seed: int) -> Tensor:
    """Half of it any bits: subnormal, largest and smallest numbers, zeros of both signs, infinities, NaN."""
    generator = torch.Generator().manual_seed(seed)
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[like.dtype.itemsize]
    ends = torch.iinfo(whole)
    anything = torch.randint(ends.min, ends.max, like.shape, generator=generator, dtype=whole).view(like.dtype)
    return torch.where(torch.rand(like.shape, generator=generator) < 0.5, anything, like)


def make_odd(bucket: Any, grads: Sequence[Tensor | None], seed: int) -> None:
    """Give weights, masters and gradients such values."""
    for i, (p, master, grad) in enumerate(zip(bucket.params, bucket.masters, grads, strict=True)):
        p.copy_(odd(p, seed + i))
        master.copy_(odd(master, seed + i))
        if grad is not None:
            grad.copy_(odd(grad, 50 + seed + i))


def far(bucket: Any, units: int = 2**26 + 5) -> Any:
    """The same, seen as the end of larger tensors: all chunks lie `units` times 64 elements behind the beginnings."""
    format = bucket.format
    dtypes = [format.weight, format.source, format.state, format.state, format.state, format.source]
    for column, dtype in zip(bucket.segment_table[: len(bucket.params), :6].unbind(1), dtypes, strict=True):
        column -= 64 * units * dtype.itemsize * (column != 0)
    bucket.chunk_table[:, 1] += units
    return bucket


def far_gradients(bucket: Any, grads: Sequence[Tensor | None], units: int = 2**26 + 5) -> Gradients:
    """Gradients of such a bucket."""
    result = Gradients(grads)
    result.table = native.addresses_of(bucket, grads).clone()
    result.table -= 64 * units * bucket.format.grad.itemsize * (result.table > 64)
    return result


def many(n_segments: int, n_groups: int, every: int = 1, option: str = "adam") -> Any:
    """A bucket of many small float32 parameters, all but one of `every` of them empty."""
    sizes = [1 + i % 3 if i % every == 0 else 0 for i in range(n_segments)]
    bucket = bucket_of([values(n, torch.float32, i) for i, n in enumerate(sizes)], option)
    bucket.rows = [bucket.rows[i % 3]._replace(lr=0.001 * (i + 1)) for i in range(n_groups)]
    bucket.row_table = torch.tensor(bucket.rows, dtype=torch.float64)
    bucket.segment_table[:, 7] = torch.tensor([i % n_groups | i << 32 for i in range(n_segments)])
    bucket.device, bucket.cache = torch.device("cpu"), None
    return bucket


def with_own_rows(bucket: Any) -> Any:
    """The same, the CUDA kernels' own memory behind its segments: tickets at 0, and nothing else that was written."""
    own = torch.full((graphs.own_rows(len(bucket.params), len(bucket.rows)), 8), -1, dtype=torch.int64)
    own[0] = 0
    bucket.segment_table = torch.cat([bucket.segment_table, own])
    bucket.cache = None
    return bucket


def sums_for(bucket: Any) -> Tensor:
    """Where a norm goes, between those of other buckets."""
    sums = torch.full((bucket.slot + 2,), 0.25, dtype=torch.float64)
    sums[bucket.slot] = float("nan")
    return sums


def run_step(
    backend: Any,
    bucket: Any,
    first: Sequence[Tensor | None],
    second: Sequence[Tensor | None],
    **factors: Any,
) -> tuple[Tensor, list[Tensor]]:
    """One SAM step: the norms, and the perturbed weights."""
    sums = sums_for(bucket)
    backend.grad_norm(bucket, first, sums)
    backend.perturb_(bucket, first, sums)
    perturbed = [p.clone() for p in bucket.params]
    backend.update_(bucket, second, **factors)
    return sums, perturbed


def everything(bucket: Any) -> Iterator[tuple[str, Tensor]]:
    """All that operations may write, by name."""
    yield from ((f"weights of segment {i}", t) for i, t in enumerate(bucket.params))
    yield from ((f"backup of segment {i}", t) for i, t in enumerate(bucket.backups))
    yield from ((f"master of segment {i}", t) for i, t in enumerate(bucket.masters))
    for k in range(3):
        yield from ((f"state {k} of segment {i}", t) for i, t in enumerate(bucket.states[k]))
    yield "progress", bucket.progress
    yield "overflows", bucket.overflows
    yield "perturbed", bucket.perturbed
    if bucket.rounding is not None:
        yield "step of the random numbers", bucket.rounding


def bits(tensor: Tensor) -> Tensor:
    """As integers of the same size."""
    dtypes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(dtypes[tensor.element_size()])


Make = Callable[..., Any]  # of a backend, with its options
Pair = Callable[[int], Sequence[Any]]  # of the same bucket twice, for a situation
LRS = [torch.tensor(0.03, dtype=dtype) for dtype in (torch.float32, torch.float64)]


def pair_of(options: Sequence[str], format: Format, seed: int, n_groups: int = 9, own_rows: bool = True) -> list[Any]:
    """The same bucket twice, for kernels and for the CPU library, which is told by value what is a tensor there."""
    ours, theirs = (any_bucket(options, format, seed, n_groups, LRS[seed % 2], there) for there in (True, False))
    return [with_own_rows(ours) if own_rows else ours, theirs]


class Comparer:
    """Compares bit for bit and counts it; NaN may have other payloads, as they do between CPUs and GPUs."""

    def __init__(self, tally: Tally) -> None:
        """Count into a tally."""
        self.tally = tally

    def same(self, ours: Tensor, theirs: Tensor, what: str) -> None:
        """Assert it of two tensors."""
        self.tally.compared += ours.numel()
        if not torch.equal(bits(ours), bits(theirs)):
            differ = (bits(ours) != bits(theirs)) & ~(ours.isnan() & theirs.isnan())
            assert not differ.any(), f"{what}: {int(differ.sum())} of {ours.numel()} differ"

    def same_buckets(self, ours: Any, theirs: Any, when: str) -> None:
        """Assert it of all that operations may write."""
        for (what, t), (_, u) in zip(everything(ours), everything(theirs), strict=True):
            self.same(t, u, f"{what} {when}")

    def same_steps(self, backends: Sequence[Any], buckets: Sequence[Any], grads: Sequence[Any], **factors: Any) -> None:
        """Take one step with two backends, and assert it of all that this writes."""
        both = [run_step(*pair, *grads, **factors) for pair in zip(backends, buckets, strict=True)]
        self.same(both[0][0], both[1][0], "norms")
        for i, (p, q) in enumerate(zip(both[0][1], both[1][1], strict=True)):
            self.same(p, q, f"perturbed weights of segment {i}")
        self.same_buckets(buckets[0], buckets[1], "after update_")

    def same_updates(
        self,
        make: Make,
        pair: Pair,
        kernel: str,
        situations: Sequence[tuple[dict[str, Any], dict[str, Any]]],
        seed: int,
    ) -> None:
        """Take updates in situations, each an interpreted backend's options and update_'s, the last but one with any
        bits as values, and assert that all is the same.
        """  # fmt: skip
        for i, (options, factors) in enumerate(situations):
            ours, theirs = buckets = pair(i)
            grads = any_gradients(ours, seed + i)
            for bucket in buckets:
                deal(bucket, seed + i)
                climb(bucket, seed + i)
                if i == len(situations) - 2:
                    make_odd(bucket, grads if bucket is ours else [None] * len(grads), seed)
            if kernel == "restore":  # its step is the base optimizer's, on gradients that are not given here
                grads, factors = [None] * len(grads), {}
            make(**options).update_(ours, grads, **factors)
            native.update_(theirs, grads, **factors)
            self.same_buckets(ours, theirs, f"in situation {i}")

    def same_perturbations(self, make: Make, pair: Pair, situations: Sequence[dict[str, Any]]) -> None:
        """Perturb in situations, the first with a norm to clip by, the last but one with any bits as values, the last
        with a norm that is not finite, and assert that all is the same.
        """  # fmt: skip
        for i, options in enumerate(situations):
            ours, theirs = buckets = pair(i)
            grads = any_gradients(ours, i)
            for bucket in buckets:
                deal(bucket, i)
                if i == len(situations) - 2:
                    make_odd(bucket, grads if bucket is ours else [None] * len(grads), i)
            if i == len(situations) - 1:
                next(g for g in reversed(grads) if g is not None and len(g))[-1] = float("nan")
            sums = [sums_for(bucket) for bucket in buckets]
            factors = [torch.zeros((), dtype=torch.float64) for _ in buckets]
            for backend, bucket, out, factor in zip((make(**options), native), buckets, sums, factors, strict=True):
                if i == 0:
                    clip = reference.Clip(3.0, factor, torch.tensor([4.0]))
                    backend.grad_norm(bucket, grads, out, clip=clip)
                backend.grad_norm(bucket, grads, out)
                if i == len(situations) - 2:  # whatever it is: so short that what is added to the norm counts
                    out.fill_(3e-25)
                backend.perturb_(bucket, grads, out)
            self.same(sums[0], sums[1], "norms")
            self.same(factors[0], factors[1], "factor to clip by")
            self.same_buckets(ours, theirs, f"in situation {i}")

    def near_norms(self, backends: Sequence[Any], buckets: Sequence[Any], q: float) -> None:
        """Perturb by another norm than the second, and assert that weights are near and all else is the same."""
        grads, sums = any_gradients(buckets[0], 3), [sums_for(bucket) for bucket in buckets]
        for bucket, out, backend in zip(buckets, sums, backends, strict=True):
            bucket.q = q
            backend.grad_norm(bucket, grads, out)
            backend.perturb_(bucket, grads, out)
        torch.testing.assert_close(*sums, rtol=1e-12, atol=0)
        for ours, theirs in zip(*(bucket.params for bucket in buckets), strict=True):
            if ours.dtype != torch.float64:
                assert (ours != theirs).sum() <= 1 + 2e-3 * len(ours)
            torch.testing.assert_close(ours, theirs, rtol={8: 1e-12, 4: 1e-6, 2: 1e-2}[ours.element_size()], atol=0)
            theirs.copy_(ours)
        self.same_buckets(buckets[0], buckets[1], "after perturb_")

    def same_whole_steps(
        self, library: Interpreted, config: cases.Config, dtype: torch.dtype, options: dict[str, Any], kernels: set[str]
    ) -> None:
        """Take FusedSAM's steps with the library and with the reference, and assert that it launches these kernels."""
        ours, theirs = cases.make_params(dtype), cases.make_params(dtype)
        with library.serving("cpu"):
            opts = cases.fused(ours, config, "cpu", **options), cases.fused(theirs, config, **options)
            for step in range(cases.STEPS):
                for which, finish in ((1, "first_step"), (2, "step")):
                    for opt, params in zip(opts, (ours, theirs), strict=True):
                        cases.set_gradients(params, step, which)
                        getattr(opt, finish)()
                    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
                        self.same(p.detach(), q.detach(), f"weights {i} after pass {which} of step {step}")
        for p, q in zip(ours, theirs, strict=True):
            state, expected = opts[0].state.get(p, {}), opts[1].state.get(q, {})
            assert state.keys() == expected.keys()
            for name, value in state.items():
                self.same(value, expected[name], name)
        assert {ran.launch.operation for ran in library.ran} >= kernels

    def same_replays(
        self, library: Interpreted, config: cases.Config, dtype: torch.dtype, options: dict[str, Any]
    ) -> None:
        """Capture a step of FusedSAM, and replay it with other values of the groups and other gradients."""
        names = ["matrix", "scalar", "1025", "above a chunk"]
        ours, theirs = cases.make_params(dtype, names), cases.make_params(dtype, names)
        grads = [[torch.empty_like(p) for p in ours] for _ in range(2)]

        def take(opt: FusedSAM, params: Sequence[Tensor], step: int) -> None:
            for which, finish in enumerate((opt.first_step, opt.second_step)):
                for i, (p, grad) in enumerate(zip(params, grads[which], strict=True)):
                    grad.copy_(cases.gradient(p, 100 * step + 10 * which + i, coupling=0))
                    p.grad = grad
                finish()

        with library.serving("cpu"):
            opts = cases.fused(ours, config, "cpu", **options), cases.fused(theirs, config, **options)
            for opt, params in zip(opts, (ours, theirs), strict=True):
                take(opt, params, 0)
            opts[0].refresh()
            with library.capture():
                take(opts[0], ours, 0)
            assert len(library.graph) == 3
            for step in range(1, 4):
                for opt in opts:
                    for group in opt.param_groups:
                        group.update(lr=0.7 * group["lr"], rho=group["rho"] + 0.1, weight_decay=0.3 * step)
                take(opts[1], theirs, step)
                opts[0].refresh()
                library.replay()
                for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
                    self.same(p.detach(), q.detach(), f"weights {i} after replay {step}")
