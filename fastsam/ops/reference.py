"""The operations in plain PyTorch: the specification that the C++, CUDA and Triton twins are tested against.

Every line of a formula is one rounding, in the order of torch.optim's for-loop on a CPU; `fma` stands where ATen rounds
a product and a sum once. Low precision is widened to float32 and rounded once, at the store; float64 stays float64.
Where there are masters, the formulas take them for the weights, and the weights are the masters, rounded. Scalars are
float64 until one final cast. Nothing is read back to the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastsam.bases.rules import ADAPTIVE, DECAYS, MAXIMIZE, Row
from fastsam.ops.formats import LOW_DTYPES
from fastsam.ops.numbers import fma, philox, q_norm, raised, round_stochastically, sqrt, widen
from fastsam.ops.reference_rules import FORMULAS, columns_of
from fastsam.ops.tables import Gradients, Operand, Tables

CHUNK = 8192  # elements a partial sum covers
LANES = 2048  # a chunk is 4 rows of 2048 lanes
SLOTS = 1024  # lanes over which the partial sums of chunks are added
NORM_EPS = 1e-12  # added to the norm; the paper's code divides by the bare norm
CLIP_EPS = 1e-6  # added to the norm that gradients are clipped by, as torch does
# Streams of random numbers: of the weights in `perturb_`, of the weights and the states in `update_`.
CLIMB, STEP, STATES = 0, 1, 2


class Clip(NamedTuple):
    """How `grad_norm` is to clip the gradients that it sums, to the norm `max_norm`.

    Attributes:
        max_norm: > 0.
        factor: [] or [1] float64, where the factor goes that `update_` takes as `clip`.
        grad_scale: [] or [1] float32, the loss scale of the gradients, or None.
    """

    max_norm: float
    factor: Tensor
    grad_scale: Tensor | None = None


def grad_norm(tables: Tables, grads: Sequence[Tensor | None], out: Tensor, *, clip: Clip | None = None) -> None:
    """Write `sum((T g)^2)` over the bucket into its slot; T = 1 (SAM) or abs(w) + eta (ASAM).

    The sum of squares is one canonical tree: 2,048 lanes a chunk, folded in adjacent pairs, then float64 over 1,024
    lanes of chunks. The same bits come out of every backend, block size and thread count.

    For another p than 2 the slot gets the norm `sum(abs(T g)^q)^(1/q)` instead, as the norm of the chunks' norms: for
    p near 1 q is large, and a sum of powers would be 0 or infinite.

    Args:
        tables: the bucket.
        grads: one gradient or None a segment; None counts as zero.
        out: [n_buckets] float64, on the bucket's device.
        clip: T = 1 in all groups, and the clip factor for all slots of `out` as they are then.

    Equivalent to:
        out[tables.slot] = sum((T * g).double().square().sum() for g in grads)
    """
    powers = tables.q != 2 and clip is None
    tables.partials.zero_()
    for segment, grad in zip(tables.segments, grads, strict=True):
        if grad is not None and segment.numel > 0:
            w, g = widen(segment.source(False)), widen(segment.flat(grad))
            row = tables.rows[segment.group]
            if powers:
                tables.partials[segment.chunks] = _chunk_norms(_power_steepest(w, g, row), tables.q)
            else:
                x = g if clip is not None else _steepest(w, g, row)
                tables.partials[segment.chunks] = _chunk_sums(x, x).double()
    out[tables.slot] = q_norm(tables.partials, tables.q) if powers else _slot_sum(tables.partials)
    if clip is not None:
        clip.factor.copy_(clip_factor(clip, out))


def clip_factor(clip: Clip, sums: Tensor) -> Tensor:
    """[] float64: the factor, at most 1, that brings gradients of this squared norm [n_buckets] down to `max_norm`.

    That of torch.nn.utils.clip_grad_norm_; NaN where the norm is not finite, so that it shows.
    """
    norm = sqrt(_ordered_sum(sums))
    if clip.grad_scale is not None:
        norm = norm * (1.0 / clip.grad_scale.reshape(()).double().to(norm.device))
    factor = torch.full_like(norm, clip.max_norm) / (norm + CLIP_EPS)
    return torch.where(norm.isfinite(), factor.clamp(max=1.0), norm - norm)


def perturb_(tables: Tables, grads: Sequence[Tensor | None], sums: Tensor) -> None:
    """Back the weights up and climb: w <- w + e(w), e = rho T^2 g / (norm + NORM_EPS).

    Foret et al., arXiv 2010.01412, eq. 2; with T = abs(w) + eta Kwon et al., arXiv 2102.11600. The backup is written
    whatever the norm is; a master is the backup. If the norm is not finite there is no perturbation: this step becomes
    the base optimizer's.

    Args:
        tables: the bucket; `tables.perturbed` is set where the backup was written, a norm that is not finite is
            counted in `tables.overflows`.
        grads: one gradient or None a segment; None leaves weight and backup alone.
        sums: [n_buckets] float64, added in order: the squared norm over all buckets; for another p than 2 their norm is
            the norm over all buckets.

    Equivalent to:
        backup.copy_(w); w.add_(g * (rho / (norm + 1e-12)))
    """
    norm = sqrt(_ordered_sum(sums)) + NORM_EPS if tables.q == 2 else q_norm(sums, tables.q)
    if tables.overflows is not None:
        tables.overflows[0] += ~norm.isfinite()
    for i, (segment, grad) in enumerate(zip(tables.segments, grads, strict=True)):
        if grad is None:
            continue
        row = tables.rows[segment.group]
        source = segment.source(False)
        if segment.backup is not None:
            segment.backup.copy_(source)
        tables.perturbed[i] = True
        w, g = widen(source), widen(segment.flat(grad))
        if tables.q == 2:
            scale = torch.where(norm.isfinite(), torch.full_like(norm, row.rho) / norm, 0.0).to(w.dtype)
        else:
            scale = _power_scale(norm, tables.q, row)
        if row.flags & MAXIMIZE:
            scale = -scale
        # A zero scale is a branch, never a product: 0 * inf is NaN.
        e = _climb(w, g, scale, row) if tables.q == 2 else _power_climb(w, g, scale, norm, tables.q, row)
        _store_weights(tables, segment, torch.where(scale != 0, w + e, w), CLIMB)


def update_(
    tables: Tables,
    grads: Sequence[Tensor | None],
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    clip: Tensor | None = None,
) -> None:
    """Return to the old weights and take the base optimizer's step from there, in one pass; a master is the backup.

    | perturbed | gradient | found_inf | weights                | state, step count |
    | --------- | -------- | --------- | ---------------------- | ----------------- |
    | yes       | yes      | 0         | rule(backup)           | updated, + 1      |
    | yes       | yes      | 1         | backup                 | untouched         |
    | yes       | no       | any       | backup                 | untouched         |
    | no        | yes      | 0         | rule(w)                | updated, + 1      |
    | no        | yes      | 1         | untouched              | untouched         |

    With a rule, each call takes the random numbers of stochastic rounding one step further.

    Args:
        tables: the bucket; `tables.perturbed` says whose backup is to be used, and is cleared; a found_inf is
            counted in `tables.overflows`.
        grads: one gradient or None a segment.
        grad_scale: [] or [1] float32, the loss scale to divide the gradients by.
        found_inf: [] or [1] float32, not 0 where the gradients overflowed: restore, but do not update.
        clip: [] or [1] float64, a factor on the gradients.
    """
    skip = None if found_inf is None else found_inf.reshape(()) != 0
    if skip is not None and tables.overflows is not None:
        tables.overflows[1] += skip
    compute = torch.float64 if tables.dtype == torch.float64 else torch.float32
    inverse = None if grad_scale is None else (1.0 / grad_scale.reshape(()).double().to(tables.device)).to(compute)
    factor = None if clip is None else clip.reshape(()).to(tables.device, compute)
    scalars_of, formula = FORMULAS[tables.rule.name] if tables.rule is not None else (None, None)
    scalars = (
        torch.stack(scalars_of(columns_of(tables)))
        if scalars_of
        else tables.partials.new_zeros(0, len(tables.segments))
    )
    for i, (segment, grad, perturbed) in enumerate(zip(tables.segments, grads, tables.perturbed.tolist(), strict=True)):
        if grad is None or tables.rule is None or formula is None:
            if perturbed:
                segment.store(segment.saved_weights())
                tables.perturbed[i] = False
            continue
        row = tables.rows[segment.group]
        source = segment.source(perturbed)
        g = widen(segment.flat(grad))
        if inverse is not None:
            g = g * inverse
        if factor is not None:
            g = torch.where(factor != 0, g * factor, 0.0)
        old = [None if state is None else widen(state) for state in segment.states]
        if row.flags & MAXIMIZE:
            g = -g
        w, new = formula(widen(source), g, old, scalars[:, i].to(compute).unbind(), row)
        w = w if skip is None else torch.where(skip, source.to(w.dtype), w)
        if segment.master is not None:
            segment.master.copy_(w)
        _store_weights(tables, segment, w, STEP)
        tables.perturbed[i] = False
        for k, (state, before, after) in enumerate(zip(segment.states, old, new, strict=True)):
            if state is not None and before is not None and after is not None:
                after = after if skip is None else torch.where(skip, before, after)
                state.copy_(_rounded(tables, segment, after, state.dtype, STATES + k))
        if "mu_product" in tables.rule.counters:  # the new one is the last of the scalars
            product = scalars[-1, i].to(segment.mu_product.dtype)
            segment.mu_product.copy_(product if skip is None else torch.where(skip, segment.mu_product, product))
        if tables.counts[segment.group]:
            segment.step.add_(1.0 if skip is None else torch.where(skip, 0.0, 1.0))
    if tables.rounding is not None and tables.rule is not None:
        tables.rounding += 1


def dot(tables: Tables, a: Gradients, b: Gradients | None, out: Tensor) -> None:
    """Write `<a,a>`, `<a,b>` and `<b,b>` over the bucket into its slot, in one pass over both.

    Each of the three is added as `grad_norm` adds squares, so `<a,a>` has the bits of the norm without T.

    Args:
        tables: the bucket; `tables.dot_partials` is there.
        a: gradients or a direction; None counts as zero.
        b: the same; without it `<a,b>` and `<b,b>` are 0, and nothing is read for them.
        out: [n_buckets, 3] float64, on the bucket's device.

    Equivalent to:
        out[tables.slot] = torch.stack([(x.double() * y.double()).sum() for x, y in ((a, a), (a, b), (b, b))])
    """
    tables.dot_partials.zero_()
    seconds: Sequence[Tensor | None] = [None] * len(a) if b is None else b
    for segment, x, y in zip(tables.segments, a, seconds, strict=True):
        for row, (left, right) in enumerate(((x, x), (x, y), (y, y))):
            if left is not None and right is not None and segment.numel > 0:
                sums = _chunk_sums(widen(segment.flat(left)), widen(segment.flat(right)))
                tables.dot_partials[row, segment.chunks] = sums.double()
    for row in range(3):
        out[tables.slot, row] = _slot_sum(tables.dot_partials[row])


def combine_(tables: Tables, out: Gradients, terms: Sequence[tuple[float | Tensor, Gradients]]) -> None:
    """Write a linear combination: out = c0 x0 + c1 x1 + c2 x2, in every segment that `out` has.

    The first term is a product, the others are `fma`, in order; the coefficient is cast to the arithmetic's type once,
    and what comes out rounded to the dtype of `out`, to nearest. A term whose coefficient is 0, or whose segment is
    None, is left out, so that 0 * inf is 0; with no term left `out` is 0.

    Args:
        tables: the bucket.
        out: a direction, not gradients. It may be one of the terms.
        terms: one to three pairs of a coefficient (a number, or [] float64 on the bucket's device) and gradients or a
            direction.

    Equivalent to:
        for o, x0, x1 in zip(out, *terms): o.copy_(c0 * x0 + c1 * x1)
    """
    for i, segment in enumerate(tables.segments):
        target = out[i]
        if target is None or segment.numel == 0:
            continue
        total = torch.zeros_like(widen(segment.flat(target)))
        begun = torch.zeros((), dtype=torch.bool, device=tables.device)
        for coefficient, parts in terms:
            part = parts[i]
            if part is None:
                continue
            c = torch.as_tensor(coefficient, dtype=torch.float64).to(tables.device).to(total.dtype)
            x = widen(segment.flat(part))
            added = torch.where(begun, fma(c, x, total), c * x)
            total, begun = torch.where(c != 0, added, total), begun | (c != 0)
        segment.write(target, total)


def _loss_gradient(w: Tensor, g: Tensor, row: Row) -> Tensor:
    """The gradient of the loss with weight_decay/2 |w|^2 in it, where that is to be perturbed along."""
    if not row.flags & DECAYS:
        return g
    return fma(-row.weight_decay if row.flags & MAXIMIZE else row.weight_decay, w, g)


def _steepest(w: Tensor, g: Tensor, row: Row) -> Tensor:
    """T g, whose length is the norm."""
    g = _loss_gradient(w, g, row)
    if not row.flags & ADAPTIVE:
        return g
    return w * g if row.eta == 0 else (w.abs() + row.eta) * g


def _climb(w: Tensor, g: Tensor, scale: Tensor, row: Row) -> Tensor:
    """The perturbation e = T^2 g * scale."""
    g = _loss_gradient(w, g, row)
    if not row.flags & ADAPTIVE:
        return g * scale
    if row.eta == 0:
        return ((w * w) * g) * scale
    t = w.abs() + row.eta
    return (t * (t * g)) * scale


def _metric(w: Tensor, row: Row) -> Tensor | float:
    """T for general p, in float64."""
    return (w.abs() + row.eta).double() if row.flags & ADAPTIVE else 1.0


def _power_steepest(w: Tensor, g: Tensor, row: Row) -> Tensor:
    """T g for general p, in float64: rounded to less, it might be longer than the norm, and the power shows it."""
    return _loss_gradient(w, g, row).double() * _metric(w, row)


def _power_scale(norm: Tensor, q: float, row: Row) -> Tensor:
    """The length of the perturbation for general p: rho, shortened by NORM_EPS as for p = 2; 0 for none.

    NORM_EPS is not added to the norm itself, because the power q - 1 would enlarge its share a thousandfold.
    """
    rho = torch.full_like(norm, row.rho)
    return rho if q == 1 else torch.where(norm.isfinite(), rho * (norm / (norm + NORM_EPS)), 0.0)


def _power_climb(w: Tensor, g: Tensor, scale: Tensor, norm: Tensor, q: float, row: Row) -> Tensor:
    """The perturbation for general p: e = scale T sign(g) (|T g| / norm)^(q - 1), in float64; it maximises <e, g>.

    For p = inf, q = 1, it is scale T sign(g), and 0 for each element that is not finite.
    """
    t, x = _metric(w, row), _power_steepest(w, g, row)
    if q == 1:
        return torch.where(x.isfinite(), scale * t * x.sign(), 0.0).to(w.dtype)
    return (scale * t * (x.sign() * raised(x.abs() / norm, q - 1))).to(w.dtype)


def _store_weights(tables: Tables, segment: Operand, w: Tensor, stream: int) -> None:
    """Round weights to their precision, to nearest if there is a master, and write them."""
    segment.store(w if segment.master is not None else _rounded(tables, segment, w, tables.dtype, stream))


def _rounded(tables: Tables, segment: Operand, x: Tensor, dtype: torch.dtype, stream: int) -> Tensor:
    """Values as `dtype`: rounded to nearest, or stochastically if it is narrower and the bucket's format says so."""
    if not tables.format.stochastic or dtype not in LOW_DTYPES or tables.rounding is None:
        return x.to(dtype)
    return round_stochastically(x, _noise(tables, segment, stream), dtype)


def _noise(tables: Tables, segment: Operand, stream: int) -> Tensor:
    """[numel] int64 in [0, 2^16): a parameter's random numbers in this step and stream, eight from each counter."""
    assert tables.rounding is not None
    seed = tables.rows[segment.group].seed
    blocks = torch.arange(-(-segment.numel // 8), dtype=torch.int64, device=tables.device)
    counter = (blocks, *(torch.full_like(blocks, n) for n in (segment.index, 0, stream)))
    counter[2].add_(tables.rounding & 0xFFFFFFFF)
    words = torch.stack(philox(counter, (seed & 0xFFFFFFFF, seed >> 32)), dim=1)
    return torch.stack((words & 0xFFFF, words >> 16), dim=2).reshape(-1)[: segment.numel]


def _chunk_sums(x: Tensor, y: Tensor) -> Tensor:
    """[chunks]: the canonical sum of x y over each 8,192 elements of both [n]; zeros fill the last chunk."""
    n = x.numel()
    if n <= LANES:  # one row, and lanes beyond n only add zeros
        lanes = x.new_zeros(1, 1 << (n - 1).bit_length())
        lanes[0, :n] = x * y
        return _fold(lanes)
    padded = []
    for values in (x, y) if y is not x else (x,):
        rows = values.new_zeros((n + CHUNK - 1) // CHUNK, CHUNK // LANES, LANES)
        rows.view(-1)[:n] = values
        padded.append(rows)
    left, right = padded[0], padded[-1]
    acc = left[:, 0] * right[:, 0]
    for k in range(1, CHUNK // LANES):
        acc = fma(left[:, k], right[:, k], acc)
    return _fold(acc)


def _chunk_norms(x: Tensor, q: float) -> Tensor:
    """[chunks] float64: the q-norm of each 8,192 elements of `x` [n] float64."""
    return torch.stack([q_norm(part, q) for part in torch.split(x.abs(), CHUNK)])


def _slot_sum(partials: Tensor) -> Tensor:
    """[]: chunk i is added to lane i mod 1,024 in ascending order, then the lanes in adjacent pairs; float64."""
    lanes = partials.new_zeros(SLOTS)
    for part in torch.split(partials, SLOTS):
        lanes[: part.numel()] += part
    return _fold(lanes)


def _fold(x: Tensor) -> Tensor:
    """Sum the last dimension, a power of two, in adjacent pairs."""
    while x.shape[-1] > 1:
        x = x[..., 0::2] + x[..., 1::2]
    return x.squeeze(-1)


def _ordered_sum(sums: Tensor) -> Tensor:
    total = sums[0]
    for other in sums[1:]:
        total = total + other
    return total
