"""The operations in plain PyTorch: the specification that the C++, CUDA and Triton twins are tested against.

Every line of a formula is one rounding, in the order of torch.optim's for-loop on a CPU; `fma` stands where ATen rounds
a product and a sum once. Low precision is widened to float32 and rounded once, at the store; float64 stays float64.
Where there are masters, the formulas take them for the weights, and the weights are the masters, rounded. Scalars are
float64 until one final cast. Nothing is read back to the host.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastsam.ops.formats import LOW_DTYPES
from fastsam.rules import ADAPTIVE, AMSGRAD, CENTERED, DECAYS, DECOUPLED, MAXIMIZE, NESTEROV, Row

if TYPE_CHECKING:
    from fastsam.bucket import Bucket
    from fastsam.segments import Segment

CHUNK = 8192  # elements a partial sum covers
LANES = 2048  # a chunk is 4 rows of 2048 lanes
SLOTS = 1024  # lanes over which the partial sums of chunks are added
NORM_EPS = 1e-12  # added to the norm; the paper's code divides by the bare norm
CLIP_EPS = 1e-6  # added to the norm that gradients are clipped by, as torch does
STEP_BITS = 24  # a float32 step count is exact up to 2^24
# Streams of random numbers: of the weights in `perturb_`, of the weights and the states in `update_`.
CLIMB, STEP, STATES = 0, 1, 2
PHILOX_ROUNDS = 7  # the fewest that pass the tests of its authors


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


def grad_norm(bucket: Bucket, grads: Sequence[Tensor | None], out: Tensor, *, clip: Clip | None = None) -> None:
    """Write `sum((T g)^2)` over the bucket into its slot; T = 1 (SAM) or abs(w) + eta (ASAM).

    The sum of squares is one canonical tree: 2,048 lanes a chunk, folded in adjacent pairs, then float64 over 1,024
    lanes of chunks. The same bits come out of every backend, block size and thread count.

    For another p than 2 the slot gets the norm `sum(abs(T g)^q)^(1/q)` instead, as the norm of the chunks' norms: for
    p near 1 q is large, and a sum of powers would be 0 or infinite.

    Args:
        bucket: the parameters.
        grads: one gradient or None a segment; None counts as zero.
        out: [n_buckets] float64, on the bucket's device.
        clip: T = 1 in all groups, and the clip factor for all slots of `out` as they are then.

    Equivalent to:
        out[bucket.slot] = sum((T * g).double().square().sum() for g in grads)
    """
    powers = bucket.q != 2 and clip is None
    bucket.partials.zero_()
    for segment, grad in zip(bucket.segments, grads, strict=True):
        if grad is not None and segment.numel > 0:
            w, g = _widen(segment.source(False)), _widen(segment.flat(grad))
            row = bucket.rows[segment.group]
            if powers:
                bucket.partials[segment.chunks] = _chunk_norms(_power_steepest(w, g, row), bucket.q)
            else:
                bucket.partials[segment.chunks] = _chunk_sums(g if clip is not None else _steepest(w, g, row)).double()
    out[bucket.slot] = q_norm(bucket.partials, bucket.q) if powers else _slot_sum(bucket.partials)
    if clip is not None:
        clip.factor.copy_(clip_factor(clip, out))


def clip_factor(clip: Clip, sums: Tensor) -> Tensor:
    """[] float64: the factor, at most 1, that brings gradients of this squared norm [n_buckets] down to `max_norm`.

    That of torch.nn.utils.clip_grad_norm_; NaN where the norm is not finite, so that it shows.
    """
    norm = _sqrt(_ordered_sum(sums))
    if clip.grad_scale is not None:
        norm = norm * (1.0 / clip.grad_scale.reshape(()).double().to(norm.device))
    factor = torch.full_like(norm, clip.max_norm) / (norm + CLIP_EPS)
    return torch.where(norm.isfinite(), factor.clamp(max=1.0), norm - norm)


def perturb_(bucket: Bucket, grads: Sequence[Tensor | None], sums: Tensor) -> None:
    """Back the weights up and climb: w <- w + e(w), e = rho T^2 g / (norm + NORM_EPS).

    Foret et al., arXiv 2010.01412, eq. 2; with T = abs(w) + eta Kwon et al., arXiv 2102.11600. The backup is written
    whatever the norm is; a master is the backup. If the norm is not finite there is no perturbation: this step becomes
    the base optimizer's.

    Args:
        bucket: the parameters; `bucket.perturbed` is set where the backup was written, a norm that is not finite is
            counted in `bucket.overflows`.
        grads: one gradient or None a segment; None leaves weight and backup alone.
        sums: [n_buckets] float64, added in order: the squared norm over all buckets; for another p than 2 their norm is
            the norm over all buckets.

    Equivalent to:
        backup.copy_(w); w.add_(g * (rho / (norm + 1e-12)))
    """
    norm = _sqrt(_ordered_sum(sums)) + NORM_EPS if bucket.q == 2 else q_norm(sums, bucket.q)
    if bucket.overflows is not None:
        bucket.overflows[0] += ~norm.isfinite()
    for i, (segment, grad) in enumerate(zip(bucket.segments, grads, strict=True)):
        if grad is None:
            continue
        row = bucket.rows[segment.group]
        source = segment.source(False)
        if segment.backup is not None:
            segment.backup.copy_(source)
        bucket.perturbed[i] = True
        w, g = _widen(source), _widen(segment.flat(grad))
        if bucket.q == 2:
            scale = torch.where(norm.isfinite(), torch.full_like(norm, row.rho) / norm, 0.0).to(w.dtype)
        else:
            scale = _power_scale(norm, bucket.q, row)
        if row.flags & MAXIMIZE:
            scale = -scale
        # A zero scale is a branch, never a product: 0 * inf is NaN.
        e = _climb(w, g, scale, row) if bucket.q == 2 else _power_climb(w, g, scale, norm, bucket.q, row)
        _store_weights(bucket, segment, torch.where(scale != 0, w + e, w), CLIMB)


def update_(
    bucket: Bucket,
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
        bucket: the parameters; `bucket.perturbed` says whose backup is to be used, and is cleared; a found_inf is
            counted in `bucket.overflows`.
        grads: one gradient or None a segment.
        grad_scale: [] or [1] float32, the loss scale to divide the gradients by.
        found_inf: [] or [1] float32, not 0 where the gradients overflowed: restore, but do not update.
        clip: [] or [1] float64, a factor on the gradients.
    """
    skip = None if found_inf is None else found_inf.reshape(()) != 0
    if skip is not None and bucket.overflows is not None:
        bucket.overflows[1] += skip
    compute = torch.float64 if bucket.dtype == torch.float64 else torch.float32
    inverse = None if grad_scale is None else (1.0 / grad_scale.reshape(()).double().to(bucket.device)).to(compute)
    factor = None if clip is None else clip.reshape(()).to(bucket.device, compute)
    scalars_of, formula = _FORMULAS[bucket.rule.name] if bucket.rule is not None else (None, None)
    scalars = torch.stack(scalars_of(_columns(bucket))) if scalars_of else torch.zeros(0, len(bucket.segments))
    for i, (segment, grad, perturbed) in enumerate(zip(bucket.segments, grads, bucket.perturbed.tolist(), strict=True)):
        if grad is None or bucket.rule is None or formula is None:
            if perturbed:
                segment.store(segment.kept())
                bucket.perturbed[i] = False
            continue
        row = bucket.rows[segment.group]
        source = segment.source(perturbed)
        g = _widen(segment.flat(grad))
        if inverse is not None:
            g = g * inverse
        if factor is not None:
            g = torch.where(factor != 0, g * factor, 0.0)
        old = [None if state is None else _widen(state) for state in segment.states]
        if row.flags & MAXIMIZE:
            g = -g
        w, new = formula(_widen(source), g, old, scalars[:, i].to(compute).unbind(), row)
        w = w if skip is None else torch.where(skip, source.to(w.dtype), w)
        if segment.master is not None:
            segment.master.copy_(w)
        _store_weights(bucket, segment, w, STEP)
        bucket.perturbed[i] = False
        for k, (state, before, after) in enumerate(zip(segment.states, old, new, strict=True)):
            if state is not None and before is not None and after is not None:
                after = after if skip is None else torch.where(skip, before, after)
                state.copy_(_rounded(bucket, segment, after, state.dtype, STATES + k))
        if "mu_product" in bucket.rule.counters:  # the new one is the last of the scalars
            product = scalars[-1, i].to(segment.mu_product.dtype)
            segment.mu_product.copy_(product if skip is None else torch.where(skip, segment.mu_product, product))
        if bucket.counts[segment.group]:
            segment.step.add_(1.0 if skip is None else torch.where(skip, 0.0, 1.0))
    if bucket.rounding is not None and bucket.rule is not None:
        bucket.rounding += 1


def _loss_gradient(w: Tensor, g: Tensor, row: Row) -> Tensor:
    """The gradient of the loss with weight_decay/2 |w|^2 in it, where that is to be perturbed along."""
    if not row.flags & DECAYS:
        return g
    return _fma(-row.weight_decay if row.flags & MAXIMIZE else row.weight_decay, w, g)


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
    return (scale * t * (x.sign() * _raise(x.abs() / norm, q - 1))).to(w.dtype)


class _Columns(NamedTuple):
    """What scalars are computed from, float64 [n_segments] each; `t` is the count of the step being made."""

    lr: Tensor
    beta1: Tensor
    beta2: Tensor
    extra: Tensor
    t: Tensor  # int64
    mu_product: Tensor


def _columns(bucket: Bucket) -> _Columns:
    rows = [bucket.rows[segment.group] for segment in bucket.segments]
    values = torch.tensor([(row.lr, row.beta1, row.beta2, row.extra) for row in rows], dtype=torch.float64)
    lr, beta1, beta2, extra = values.reshape(-1, 4).to(bucket.device).unbind(1)
    numbers = [segment.progress for segment in bucket.segments]
    progress = torch.stack(numbers) if numbers else values.new_zeros(0, 2).to(bucket.device)
    return _Columns(lr, beta1, beta2, extra, progress[:, 0].to(torch.int64) + 1, progress[:, 1].double())


# The rules: scalars of all segments at once, and the formula, which is given those of one segment in the compute type.
# It takes the weights, the gradient (uphill if maximized), the states by slot, and gives back weights and states.

_States = list["Tensor | None"]
_Scalars = Callable[[_Columns], list[Tensor]]
_Formula = Callable[[Tensor, Tensor, _States, Sequence[Tensor], Row], tuple[Tensor, _States]]


def _sgd_scalars(c: _Columns) -> list[Tensor]:
    return [(c.t == 1).double()]  # whether there is no momentum yet (dampening does not apply there)


def _sgd(w: Tensor, g: Tensor, states: _States, scalars: Sequence[Tensor], row: Row) -> tuple[Tensor, _States]:
    """torch.optim.SGD."""
    lr, momentum, dampening = row.lr, row.beta1, row.beta2
    (first,) = scalars
    buf = states[0]
    if row.weight_decay != 0:
        g = _fma(row.weight_decay, w, g)
    if momentum != 0 and buf is not None:
        buf = torch.where(first != 0, g, _fma(1 - dampening, g, buf * momentum))
        g = _fma(momentum, buf, g) if row.flags & NESTEROV else buf
    return _fma(-lr, g, w), [buf, None, None]


def _decay(w: Tensor, g: Tensor, row: Row) -> tuple[Tensor, Tensor]:
    """Weight decay of Adam's family: of the weights themselves (decoupled), or through the gradient."""
    if row.weight_decay == 0:
        return w, g
    if row.flags & DECOUPLED:
        return w * (1 - row.lr * row.weight_decay), g
    return w, _fma(row.weight_decay, w, g)


def _adam_scalars(c: _Columns) -> list[Tensor]:
    correction1, correction2 = 1 - _power(c.beta1, c.t), 1 - _power(c.beta2, c.t)
    return [-(c.lr / correction1), _sqrt(correction2)]


def _adam(w: Tensor, g: Tensor, states: _States, scalars: Sequence[Tensor], row: Row) -> tuple[Tensor, _States]:
    """torch.optim.Adam and AdamW (arXiv 1412.6980, 1711.05101); states: exp_avg, exp_avg_sq, max_exp_avg_sq."""
    step_size, correction2_sqrt = scalars  # -lr / (1 - beta1^t), sqrt(1 - beta2^t)
    exp_avg, exp_avg_sq, max_exp_avg_sq = states
    assert exp_avg is not None and exp_avg_sq is not None
    w, g = _decay(w, g, row)
    exp_avg = _lerp(exp_avg, g, 1 - row.beta1)
    exp_avg_sq = _fma((1 - row.beta2) * g, g, exp_avg_sq * row.beta2)
    second = exp_avg_sq
    if row.flags & AMSGRAD and max_exp_avg_sq is not None:
        second = max_exp_avg_sq = torch.maximum(max_exp_avg_sq, exp_avg_sq)
    denom = _sqrt32(second) / correction2_sqrt + row.eps
    return w + (step_size * exp_avg) / denom, [exp_avg, exp_avg_sq, max_exp_avg_sq]


def _rmsprop(w: Tensor, g: Tensor, states: _States, scalars: Sequence[Tensor], row: Row) -> tuple[Tensor, _States]:
    """torch.optim.RMSprop (centered: Graves, arXiv 1308.0850); states: square_avg, momentum_buffer, grad_avg."""
    lr, momentum, alpha = row.lr, row.beta1, row.beta2
    square_avg, buf, grad_avg = states
    assert square_avg is not None
    if row.weight_decay != 0:
        g = _fma(row.weight_decay, w, g)
    second = square_avg = _fma((1 - alpha) * g, g, square_avg * alpha)
    if row.flags & CENTERED and grad_avg is not None:
        grad_avg = _lerp(grad_avg, g, 1 - alpha)
        second = _fma(-grad_avg, grad_avg, second)
    denom = _sqrt32(second) + row.eps
    if momentum > 0 and buf is not None:
        buf = buf * momentum + g / denom
        return _fma(-lr, buf, w), [square_avg, buf, grad_avg]
    return w + (-lr * g) / denom, [square_avg, buf, grad_avg]


def _adagrad_scalars(c: _Columns) -> list[Tensor]:
    return [-(c.lr / (1 + (c.t - 1) * c.extra))]


def _adagrad(w: Tensor, g: Tensor, states: _States, scalars: Sequence[Tensor], row: Row) -> tuple[Tensor, _States]:
    """torch.optim.Adagrad (Duchi et al., JMLR 12, 2011); state: sum."""
    (neg_clr,) = scalars  # -lr / (1 + (t - 1) lr_decay)
    total = states[0]
    assert total is not None
    if row.weight_decay != 0:
        g = _fma(row.weight_decay, w, g)
    total = _fma(g, g, total)
    denom = _sqrt32(total) + row.eps
    return w + (neg_clr * g) / denom, [total, None, None]


def _nadam_scalars(c: _Columns) -> list[Tensor]:
    mu, next_mu = (c.beta1 * (1 - 0.5 * _power(c.extra, t)) for t in (c.t, c.t + 1))
    product = (c.mu_product.float() * mu.float()).double()
    grad_size = (-c.lr * (1 - mu)) / (1 - product)
    avg_size = (-c.lr * next_mu) / (1 - product * next_mu)
    return [grad_size, avg_size, 1 - _power(c.beta2, c.t), product]


def _nadam(w: Tensor, g: Tensor, states: _States, scalars: Sequence[Tensor], row: Row) -> tuple[Tensor, _States]:
    """torch.optim.NAdam (Dozat, ICLR workshop 2016); states: exp_avg, exp_avg_sq."""
    grad_size, avg_size, correction2, _ = scalars
    exp_avg, exp_avg_sq, _ = states
    assert exp_avg is not None and exp_avg_sq is not None
    w, g = _decay(w, g, row)
    exp_avg = _lerp(exp_avg, g, 1 - row.beta1)
    exp_avg_sq = _fma((1 - row.beta2) * g, g, exp_avg_sq * row.beta2)
    denom = _sqrt32(exp_avg_sq / correction2) + row.eps
    w = w + (grad_size * g) / denom
    return w + (avg_size * exp_avg) / denom, [exp_avg, exp_avg_sq, None]


def _radam_scalars(c: _Columns) -> list[Tensor]:
    power2 = _power(c.beta2, c.t)
    bias2 = 1 - power2
    rho_inf = 2 / (1 - c.beta2) - 1
    rho_t = rho_inf - 2.0 * c.t * power2 / bias2
    ratio = (rho_t - 4) * (rho_t - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho_t)
    rectified = rho_t > 5
    rect = torch.where(rectified, _sqrt(ratio), 0.0)
    return [1 - _power(c.beta1, c.t), _sqrt(bias2), rect, rectified.double()]


def _radam(w: Tensor, g: Tensor, states: _States, scalars: Sequence[Tensor], row: Row) -> tuple[Tensor, _States]:
    """torch.optim.RAdam (Liu et al., arXiv 1908.03265), without denominator while rho_t <= 5; states as NAdam's."""
    correction1, correction2_sqrt, rect, rectified = scalars
    exp_avg, exp_avg_sq, _ = states
    assert exp_avg is not None and exp_avg_sq is not None
    w, g = _decay(w, g, row)
    exp_avg = _lerp(exp_avg, g, 1 - row.beta1)
    exp_avg_sq = _fma((1 - row.beta2) * g, g, exp_avg_sq * row.beta2)
    step = (exp_avg / correction1) * row.lr
    adaptive = (1 / (_sqrt32(exp_avg_sq) + row.eps)) * correction2_sqrt
    return w - torch.where(rectified != 0, (step * adaptive) * rect, step), [exp_avg, exp_avg_sq, None]


def _lion(w: Tensor, g: Tensor, states: _States, scalars: Sequence[Tensor], row: Row) -> tuple[Tensor, _States]:
    """Lion (Chen et al., arXiv 2302.06675); state: exp_avg."""
    exp_avg = states[0]
    assert exp_avg is not None
    c = _lerp(exp_avg, g, 1 - row.beta1)
    exp_avg = _lerp(exp_avg, g, 1 - row.beta2)
    w = w * (1 - row.lr * row.weight_decay)  # a factor of 1 rounds nothing
    return _fma(-row.lr, c.sign(), w), [exp_avg, None, None]


# By the name of the rule.
_FORMULAS: dict[str, tuple[_Scalars | None, _Formula]] = {
    "sgd": (_sgd_scalars, _sgd),
    "adam": (_adam_scalars, _adam),
    "rmsprop": (None, _rmsprop),
    "adagrad": (_adagrad_scalars, _adagrad),
    "nadam": (_nadam_scalars, _nadam),
    "radam": (_radam_scalars, _radam),
    "lion": (None, _lion),
}


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _store_weights(bucket: Bucket, segment: Segment, w: Tensor, stream: int) -> None:
    """Round weights to their precision, to nearest if there is a master, and write them."""
    segment.store(w if segment.master is not None else _rounded(bucket, segment, w, bucket.dtype, stream))


def _rounded(bucket: Bucket, segment: Segment, x: Tensor, dtype: torch.dtype, stream: int) -> Tensor:
    """Values as `dtype`: rounded to nearest, or stochastically if it is narrower and the bucket's format says so."""
    if not bucket.format.stochastic or dtype not in LOW_DTYPES or bucket.rounding is None:
        return x.to(dtype)
    return round_stochastically(x, _noise(bucket, segment, stream), dtype)


def round_stochastically(x: Tensor, noise: Tensor, dtype: torch.dtype) -> Tensor:
    """Round x (float32) to bfloat16 or float16, up or down with the odds that make the result right on average.

    A value that the dtype holds stays, and so do infinities and NaN.

    Args:
        x: [n] float32.
        noise: [n] int64 in [0, 2^16).
        dtype: bfloat16 or float16.
    """
    bits = x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    if dtype == torch.bfloat16:  # what is cut off carries into what stays
        rounded = torch.where(x.isnan(), 0x7FC0, (bits + noise) >> 16)
    else:
        noise = noise >> 3  # float16 has 13 bits less than float32
        magnitude = bits & 0x7FFFFFFF
        clamped = magnitude.clamp(max=0x47800000)  # 2^16 and beyond are infinity
        normal = ((clamped + noise) >> 13) - (112 << 10)
        subnormal = (x.abs() * 2.0**24 + noise.float() * 2.0**-13).clamp(max=2048.0).to(torch.int64)
        finite = torch.where(magnitude < 0x38800000, subnormal, normal)  # 2^-14, the smallest normal number
        rounded = (bits >> 16 & 0x8000) | torch.where(x.isnan(), 0x7E00, finite)
    return torch.where(rounded >= 0x8000, rounded - 0x10000, rounded).to(torch.int16).view(dtype)


def _noise(bucket: Bucket, segment: Segment, stream: int) -> Tensor:
    """[numel] int64 in [0, 2^16): a parameter's random numbers in this step and stream, eight from each counter."""
    assert bucket.rounding is not None
    seed = bucket.rows[segment.group].seed
    blocks = torch.arange(-(-segment.numel // 8), device=bucket.device)
    counter = (blocks, *(torch.full_like(blocks, n) for n in (segment.index, 0, stream)))
    counter[2].add_(bucket.rounding & 0xFFFFFFFF)
    words = torch.stack(philox(counter, (seed & 0xFFFFFFFF, seed >> 32)), dim=1)
    return torch.stack((words & 0xFFFF, words >> 16), dim=2).reshape(-1)[: segment.numel]


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-7 (Salmon et al., SC 2011): four words of random bits for each counter of four words, in int64."""
    a, b, c, d = counter
    for i in range(PHILOX_ROUNDS):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57  # the bits of unsigned products
        k0, k1 = (key[0] + i * 0x9E3779B9) & 0xFFFFFFFF, (key[1] + i * 0xBB67AE85) & 0xFFFFFFFF
        a, b = (second >> 32 & 0xFFFFFFFF) ^ b ^ k0, second & 0xFFFFFFFF
        c, d = (first >> 32 & 0xFFFFFFFF) ^ d ^ k1, first & 0xFFFFFFFF
    return a, b, c, d


def _chunk_sums(x: Tensor) -> Tensor:
    """[chunks]: the canonical sum of squares of each 8,192 elements of `x` [n]; zeros fill the last chunk."""
    n = x.numel()
    if n <= LANES:  # one row, and lanes beyond n only add zeros
        lanes = x.new_zeros(1, 1 << (n - 1).bit_length())
        lanes[0, :n] = x
        return _fold(lanes * lanes)
    rows = x.new_zeros((n + CHUNK - 1) // CHUNK, CHUNK // LANES, LANES)
    rows.view(-1)[:n] = x
    acc = rows[:, 0] * rows[:, 0]
    for k in range(1, CHUNK // LANES):
        acc = _fma(rows[:, k], rows[:, k], acc)
    return _fold(acc)


def _chunk_norms(x: Tensor, q: float) -> Tensor:
    """[chunks] float64: the q-norm of each 8,192 elements of `x` [n] float64."""
    return torch.stack([q_norm(part, q) for part in torch.split(x.abs(), CHUNK)])


def q_norm(x: Tensor, q: float) -> Tensor:
    """[]: the norm `sum(x^q)^(1/q)` of `x` [n] float64, >= 0, as m sum((x / m)^q)^(1/q) where m is the largest.

    It is m where that is 0, infinite or NaN.
    """
    if x.numel() == 0:
        return x.new_zeros(())
    largest = x.amax()
    norm = largest * _raise(_raise(x / largest, q).sum(), 1 / q)
    return torch.where((largest > 0) & largest.isfinite(), norm, largest)


def _raise(x: Tensor, exponent: float) -> Tensor:
    """x^exponent for x >= 0, in float64, as the kernels take it."""
    return torch.where(x == 0, 0.0, torch.exp2(exponent * torch.log2(x)))


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


def _fma(a: Tensor | float, b: Tensor, c: Tensor) -> Tensor:
    """The sum a * b + c, rounded once."""
    if not isinstance(a, Tensor):
        a = torch.full((), a, dtype=c.dtype, device=c.device)
    if c.dtype == torch.float64 or _addcmul_fuses(c.device):
        return torch.addcmul(c, a, b)
    return _exact_fma(a, b, c)


@cache
def _addcmul_fuses(device: torch.device) -> bool:
    """Whether `addcmul` rounds once there, asked with values that decide: it does on x86 with AVX2, not before."""
    x = torch.linspace(1.0, 2.0, 1027, device=device)
    return torch.equal(torch.addcmul(-x, x, x.flip(0)), _exact_fma(x, x.flip(0), -x))


def _exact_fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """float32 fma by way of float64 with round-to-odd: an inexact, even sum moves one ulp towards its error."""
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    bits = total.view(torch.int64)
    inexact = (error != 0) & error.isfinite() & (bits & 1 == 0)
    towards = torch.where((error > 0) == (total > 0), 1, -1)
    return torch.where(inexact, bits + towards, bits).view(torch.float64).float()


def _lerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Interpolate: a + weight (b - a), from whichever end is nearer."""
    cast = float if a.dtype == torch.float64 else _float32
    weight = cast(weight)  # the choice is made in the compute type, as in ATen
    return _fma(weight, b - a, a) if weight < 0.5 else _fma(cast(weight - 1), b - a, b)


def _float32(x: float) -> float:
    return ctypes.c_float(x).value


def _power(base: Tensor, n: Tensor) -> Tensor:
    """base^n in float64 by repeated squaring: the same bits on every machine, which `pow` is not."""
    result = torch.ones_like(base)
    for bit in range(STEP_BITS):
        result = torch.where((n >> bit) & 1 == 1, result * base, result)
        base = base * base
    return result


def _sqrt(x: Tensor) -> Tensor:
    """Correctly rounded float64 root: torch's may be one ulp off, so one Newton correction with the exact residual."""
    root = x.sqrt()
    high = root * 134217729.0  # 2^27 + 1 splits a float64 into two halves whose products are exact (Dekker)
    high = high - (high - root)
    low = root - high
    residual = ((x - high * high) - 2 * high * low) - low * low
    return torch.where((root > 0) & root.isfinite(), root + residual / (2 * root), root)


def _sqrt32(x: Tensor) -> Tensor:
    """Root in x's dtype, by way of float64: torch's float32 root is one ulp off in 17 % of values on x86."""
    return x.sqrt() if x.dtype == torch.float64 else x.double().sqrt().float()
