"""The operations in Triton, twins of `reference.py`: one launch each over tables of addresses, no compiler at install.

Every line is one rounding, as in `csrc/math.h`: `tl.fma` stands where a product and a sum are rounded once, and nothing
else is fused (`enable_fp_fusion=False`). Scalars are float64 until one final cast to the type the kernel computes in
(WIDE: float64 for float64, else float32). bfloat16 is taken as its 16 bits (STORAGE uint16) and rounded by integer
arithmetic, because Triton's interpreter truncates where a GPU rounds.

No value is baked into a kernel: hyper-parameters stand in a table, and arguments are not specialised on their values or
alignment. So a kernel is compiled once for its dtype and rule, whatever the numbers and the number of tensors.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from ctypes import string_at
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from fastsam import rules
from fastsam.ops import graphs, native, reference

if TYPE_CHECKING:
    from fastsam.bucket import Bucket

CHUNK = tl.constexpr(8192)  # elements a partial sum covers
LANES = tl.constexpr(2048)  # a chunk is 4 rows of 2048 lanes
SLOTS = tl.constexpr(1024)  # lanes over which the partial sums of chunks are added
UNIT = tl.constexpr(64)  # chunk starts are counted in units of 64 elements
NORM_EPS = tl.constexpr(1e-12)  # added to the norm; the paper's code divides by the bare norm
CLIP_EPS = tl.constexpr(1e-6)  # added to the norm that gradients are clipped by, as torch does
COUNTED = tl.constexpr(256)  # segments whose step counts are advanced at once

# Columns of the tables: `Bucket` says what they hold, `rules.Row` what a row has.
WEIGHT, BACKUP, STATE0, STATE1, STATE2, PROGRESS, GROUP = (tl.constexpr(i) for i in (0, 1, 2, 3, 4, 6, 7))
SEGMENT_COLUMNS = tl.constexpr(8)
LR, WEIGHT_DECAY, BETA1, BETA2, EPS, RHO, ETA, FLAGS = (tl.constexpr(i) for i in range(8))
EXTRA, LR_ADDRESS = (tl.constexpr(rules.Row._fields.index(name)) for name in ("extra", "lr_address"))
ROW_COLUMNS = tl.constexpr(len(rules.Row._fields))

ADAPTIVE = tl.constexpr(rules.ADAPTIVE)
NESTEROV = tl.constexpr(rules.NESTEROV)
MAXIMIZE = tl.constexpr(rules.MAXIMIZE)
DECOUPLED = tl.constexpr(rules.DECOUPLED)
DECAYS = tl.constexpr(rules.DECAYS)
AMSGRAD = tl.constexpr(rules.AMSGRAD)
CENTERED = tl.constexpr(rules.CENTERED)
LR_FLOAT64 = tl.constexpr(rules.LR_FLOAT64)
NO_RULE = tl.constexpr(-1)
SGD, ADAM, RMSPROP = (tl.constexpr(rule.code) for rule in (rules.SGD, rules.ADAM, rules.RMSPROP))
ADAGRAD, NADAM, RADAM = (tl.constexpr(rule.code) for rule in (rules.ADAGRAD, rules.NADAM, rules.RADAM))
LION = tl.constexpr(rules.LION.code)


# Loads and stores. Low precision is widened exactly and rounded once, to nearest even. NaN payloads are not kept.
# ALIGN is what the addresses are multiples of, in bytes; 0 where nothing is known, and then accesses are masked, too.


@triton.jit
def _pointer(address, start, STORAGE: tl.constexpr, ALIGN: tl.constexpr):
    # The hint must follow the cast: on an integer it is lost, and with it the wide accesses.
    pointer = address.to(tl.pointer_type(STORAGE))
    if ALIGN > 0:
        pointer = tl.multiple_of(pointer, ALIGN)
    return pointer + start


@triton.jit
def _direction(address, start, STORAGE: tl.constexpr, GRAD: tl.constexpr, ALIGN: tl.constexpr):
    # Where the gradient is. Narrower than the weights (GRAD below STORAGE), it is read in as many elements at once as
    # they are, not in as many bytes: all operands then lie in the same threads, and nothing is exchanged between these.
    if GRAD.primitive_bitwidth < STORAGE.primitive_bitwidth:
        return _pointer(address, start, GRAD, ALIGN // 2)
    else:
        return _pointer(address, start, GRAD, ALIGN)


@triton.jit
def _low_bits(weight, grad, STORAGE: tl.constexpr, GRAD: tl.constexpr):
    # Zero modulo ALIGN where `_pointer` and `_direction` may be told ALIGN.
    if GRAD.primitive_bitwidth < STORAGE.primitive_bitwidth:
        return weight | (grad * 2)
    else:
        return weight | grad


@triton.jit
def _widen(x):
    if x.dtype == tl.uint16:
        return (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif x.dtype == tl.float16:
        return x.to(tl.float32)
    else:
        return x


@triton.jit
def _narrow(x, STORAGE: tl.constexpr):
    if STORAGE == tl.uint16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        return tl.where(x != x, 0x7FC0, rounded).to(tl.uint16)
    else:
        return x.to(STORAGE)


@triton.jit
def _load(pointer, o, length, ALIGN: tl.constexpr):
    if ALIGN > 0:
        return tl.load(pointer + o)
    else:
        return tl.load(pointer + o, mask=o < length, other=0)


@triton.jit
def _load_once(pointer, o, length, ALIGN: tl.constexpr):  # it leaves the caches first
    if ALIGN > 0:
        return tl.load(pointer + o, eviction_policy="evict_first")
    else:
        return tl.load(pointer + o, mask=o < length, other=0, eviction_policy="evict_first")


@triton.jit
def _store(pointer, o, x, length, ALIGN: tl.constexpr):
    if ALIGN > 0:
        tl.store(pointer + o, x)
    else:
        tl.store(pointer + o, x, mask=o < length)


@triton.jit
def _store_once(pointer, o, x, length, ALIGN: tl.constexpr):
    if ALIGN > 0:
        tl.store(pointer + o, x, cache_modifier=".cs")
    else:
        tl.store(pointer + o, x, mask=o < length, cache_modifier=".cs")


# Arithmetic that Triton spells differently for float32 and float64.


@triton.jit
def _fma(a, b, c):
    # a b + c, rounded once; a may be a scalar.
    return tl.fma(tl.broadcast_to(a, c.shape), b, c)


@triton.jit
def _sqrt(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def _div(a, b):
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, tl.broadcast_to(b, a.shape))


@triton.jit
def _maximum(a, b):
    # torch.maximum: a NaN on either side stays.
    return tl.where((b > a) | (b != b), b, a)


@triton.jit
def _lerp(a, b, weight):
    # a + weight (b - a), from whichever end is nearer.
    near = weight < 0.5
    return _fma(tl.where(near, weight, weight - 1.0), b - a, tl.where(near, a, b))


@triton.jit
def _power(base, n):
    # base^n by repeated squaring: the same bits on every machine, which `pow` is not.
    result = tl.full([], 1.0, tl.float64)
    while n > 0:
        if n & 1 == 1:
            result = result * base
        base = base * base
        n = n >> 1
    return result


@triton.jit
def _powers(base, n):
    # The same for tensors: base [k] float64, n [k].
    result = tl.full(n.shape, 1.0, tl.float64)
    while tl.max(n) > 0:
        result = tl.where(n & 1 == 1, result * base, result)
        base = base * base
        n = n >> 1
    return result


@triton.jit
def _fold(x, LEVELS: tl.constexpr):
    # Sum 2^LEVELS lanes in adjacent pairs.
    for _ in tl.static_range(0, LEVELS):
        x = tl.sum(tl.reshape(x, [x.shape[0] // 2, 2]), axis=1)
    return tl.sum(x)


# Tables.


@triton.jit
def _flag(row, FLAG: tl.constexpr):
    return tl.load(row + FLAGS).to(tl.int32) & FLAG != 0


@triton.jit
def _lr(row):
    # A tensor lr is read where it is: whoever changes it need not tell a captured graph.
    lr = tl.load(row + LR)
    address = tl.load(row + LR_ADDRESS).to(tl.int64)
    if address != 0:
        if _flag(row, LR_FLOAT64):
            lr = tl.load(address.to(tl.pointer_type(tl.float64)))
        else:
            lr = tl.load(address.to(tl.pointer_type(tl.float32))).to(tl.float64)
    return lr


@triton.jit
def _chunk(chunks, chunk, n_chunks):
    # Segment, first element and length; no elements where there is no such chunk (a bucket of empty tensors).
    there = chunk < n_chunks
    segment = tl.load(chunks + 4 * chunk.to(tl.int64), mask=there, other=0).to(tl.int64)
    start = tl.load(chunks + 4 * chunk.to(tl.int64) + 1, mask=there, other=0).to(tl.int64) * UNIT
    length = tl.load(chunks + 4 * chunk.to(tl.int64) + 2, mask=there, other=0)
    return segment, start, length


@triton.jit
def _part(chunks, part, split, n_chunks, TILE: tl.constexpr):
    # The segment, and the span of one part of a chunk: the chunk's first element, the part's first tile, the end of its
    # full tiles, the end of all (at most one is not full), the chunk's length.
    segment, start, length = _chunk(chunks, part // split, n_chunks)
    size = CHUNK // TILE // split
    first = part % split * size
    full = tl.maximum(first, tl.minimum(first + size, length // TILE))
    return segment, (start, first, full, tl.minimum(first + size, (length + TILE - 1) // TILE), length)


@triton.jit
def _arrive(ticket):
    # True in the program that arrives last; what all others read and wrote before they arrived has happened then. Every
    # warp executes a scalar load: the barrier keeps all of them before the one thread that arrives.
    tl.debug_barrier()
    last = tl.atomic_add(ticket, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if last:
        tl.atomic_xchg(ticket, 0)
    return last


# The norm.


@triton.jit
def _metric(row, WIDE: tl.constexpr):
    # What T and the decay of the loss are made of: eta, whether T = abs(w) + eta, the decay (0 for none).
    decay = tl.where(_flag(row, DECAYS), tl.load(row + WEIGHT_DECAY), 0.0)
    decay = tl.where(_flag(row, MAXIMIZE), -decay, decay)
    return tl.load(row + ETA).to(WIDE), _flag(row, ADAPTIVE), decay.to(WIDE)


@triton.jit
def _loss_gradient(w, g, metric, IN_LOSS: tl.constexpr):
    # The gradient of the loss with weight_decay/2 |w|^2 in it, where that is to be perturbed along.
    if IN_LOSS:
        g = tl.where(metric[2] != 0, _fma(metric[2], w, g), g)
    return g


@triton.jit
def _steepest(w, g, metric, IN_LOSS: tl.constexpr):
    # T g, whose length is the norm.
    eta, adaptive, _ = metric
    g = _loss_gradient(w, g, metric, IN_LOSS)
    x = tl.where(eta == 0, w * g, (tl.abs(w) + eta) * g)
    if IN_LOSS:
        return tl.where(adaptive, x, g)
    else:
        return x  # not called without need


@triton.jit
def _raise(x, exponent):
    # x^exponent for x >= 0, in float64.
    return tl.where(x == 0, 0.0, tl.exp2(exponent * tl.log2(x)))


@triton.jit
def _chunk_power_sum(
    weight, grad, start, length, row, q,
    STORAGE: tl.constexpr, GRAD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # The sum of |T g|^q, in no order that is promised.
    w, g = _pointer(weight, start, STORAGE, 0), _pointer(grad, start, GRAD, 0)
    metric = _metric(row, WIDE)
    total = tl.zeros([COUNTED], tl.float64)
    o = 0
    while o < length:
        at = o + tl.arange(0, COUNTED)
        wide, direction = _widen(_load(w, at, length, 0)), _widen(_load(g, at, length, 0)).to(WIDE)
        x = _steepest(wide, direction, metric, True)
        total += _raise(tl.abs(x).to(tl.float64), q)
        o += COUNTED
    return tl.sum(total)


@triton.jit
def _chunk_sum(
    weight, grad, start, length, row, plain,
    STORAGE: tl.constexpr, GRAD: tl.constexpr, WIDE: tl.constexpr, IN_LOSS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    # The canonical sum of squares of a chunk; `plain` not 0: of the gradients as they are.
    w, g = _pointer(weight, start, STORAGE, ALIGN), _pointer(grad, start, GRAD, ALIGN)
    lanes = tl.arange(0, LANES)
    acc = tl.zeros([LANES], WIDE)
    if (_flag(row, ADAPTIVE) | (IN_LOSS & _flag(row, DECAYS))) & (plain == 0):
        metric = _metric(row, WIDE)
        for k in tl.static_range(0, CHUNK // LANES):
            o = k * LANES + lanes
            x = _steepest(_widen(_load(w, o, length, ALIGN)), _widen(_load(g, o, length, ALIGN)), metric, IN_LOSS)
            acc = _fma(x, x, acc)
    else:
        for k in tl.static_range(0, CHUNK // LANES):
            x = _widen(_load(g, k * LANES + lanes, length, ALIGN))
            acc = _fma(x, x, acc)
    return _fold(acc, 11)


@triton.jit
def _clip_factor(max_norm, total, grad_scale):
    # torch.nn.utils.clip_grad_norm_: the factor, at most 1, that brings gradients of this squared norm down to
    # max_norm. NaN where the norm is not finite, so that it shows.
    norm = tl.sqrt(total) * (1.0 / grad_scale)
    factor = max_norm / (norm + CLIP_EPS)
    return tl.where(norm - norm == 0, tl.where(factor < 1.0, factor, 1.0), norm - norm)


@triton.jit
def _ordered_sum(sums, n_sums):
    # Of all buckets: this launch's own is there, or was written by an earlier one.
    total = tl.load(sums)
    i = 1
    while i < n_sums:
        total += tl.load(sums + i)
        i += 1
    return total


@triton.jit(do_not_specialize=list(range(14)))
def _grad_norm_kernel(
    segments, chunks, grads, rows, partials, ticket, out, numbers, clip, grad_scale, slot, n_sums, clips, n_chunks,
    STORAGE: tl.constexpr, GRAD: tl.constexpr, WIDE: tl.constexpr, IN_LOSS: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    """Write `sum(abs(T g)^q)` into `out[slot]`; T = 1 (SAM) or abs(w) + eta (ASAM), q = 2. One program a chunk.

    Reads n (2n adaptive) elements, writes one partial sum a chunk; the last program adds these up. With `clips` T = 1,
    and the last program writes the clip factor. POWER: q is numbers[0].
    """
    chunk = tl.program_id(0)
    segment, start, length = _chunk(chunks, chunk, n_chunks)
    grad = tl.load(grads + segment)
    total = tl.full([], 0.0, tl.float64)
    if (grad != 0) & (length > 0):
        weight = tl.load(segments + SEGMENT_COLUMNS * segment + WEIGHT)
        row = rows + ROW_COLUMNS * tl.load(segments + SEGMENT_COLUMNS * segment + GROUP)
        if POWER:
            total = _chunk_power_sum(weight, grad, start, length, row, tl.load(numbers), STORAGE, GRAD, WIDE)
        elif ((weight | grad) % 16 == 0) & (length == CHUNK):
            total = _chunk_sum(weight, grad, start, length, row, clips, STORAGE, GRAD, WIDE, IN_LOSS, 16).to(tl.float64)
        else:
            total = _chunk_sum(weight, grad, start, length, row, clips, STORAGE, GRAD, WIDE, IN_LOSS, 0).to(tl.float64)
    tl.store(partials + chunk, total, mask=chunk < n_chunks)
    if _arrive(ticket):
        lanes = tl.arange(0, SLOTS)
        acc = tl.zeros([SLOTS], tl.float64)
        i = 0
        while i < n_chunks:
            acc += tl.load(partials + i + lanes, mask=i + lanes < n_chunks, other=0.0, cache_modifier=".cg")
            i += SLOTS
        tl.store(out + slot, _fold(acc, 10))
        if clips != 0:
            tl.debug_barrier()  # what one warp stored is read by all
            scale = tl.load(grad_scale).to(tl.float64)
            tl.store(clip, _clip_factor(tl.load(numbers + 1), _ordered_sum(out, n_sums), scale))


# Copies: the backup without a perturbation, the restore without an update. All bits stay.


@triton.jit
def _copy_tiles(to, source, start, tile, end, length, STORAGE: tl.constexpr, TILE: tl.constexpr, ALIGN: tl.constexpr):
    to, source = _pointer(to, start, STORAGE, ALIGN), _pointer(source, start, STORAGE, ALIGN)
    while tile < end:
        o = tile * TILE + tl.arange(0, TILE)
        _store(to, o, _load_once(source, o, length, ALIGN), length, ALIGN)
        tile += 1


@triton.jit
def _copy(to, source, span, STORAGE: tl.constexpr, TILE: tl.constexpr):
    start, tile, full, end, length = span
    if (to | source) % 16 == 0:
        _copy_tiles(to, source, start, tile, full, length, STORAGE, TILE, 16)
        tile = full
    _copy_tiles(to, source, start, tile, end, length, STORAGE, TILE, 0)


# Perturbation.


@triton.jit
def _perturbation_scale(row, sums, n_sums, WIDE: tl.constexpr):
    # 0 (no perturbation) where the norm is not finite: such a step is the base optimizer's.
    norm = tl.sqrt(_ordered_sum(sums, n_sums)) + NORM_EPS
    scale = tl.where(norm < float("inf"), tl.load(row + RHO) / norm, 0.0).to(WIDE)
    return tl.where(_flag(row, MAXIMIZE), -scale, scale)


@triton.jit
def _power_scale(row, sums, n_sums, q):
    # rho, 0 where the norm is not finite, and the norm; for p = inf, q = 1, there is none.
    norm = _ordered_sum(sums, n_sums) * 0.0 + 1.0
    if q != 1:
        norm = _raise(_ordered_sum(sums, n_sums), 1.0 / q) + NORM_EPS
    rho = tl.where(norm < float("inf"), tl.load(row + RHO), 0.0)
    return tl.where(_flag(row, MAXIMIZE), -rho, rho), norm


@triton.jit
def _power_climb(w, g, climb, metric, q):
    # The perturbation for general p: e = rho T sign(g) (|T g| / norm)^(q - 1); 0 for an element that is not finite.
    rho, norm = climb
    eta, adaptive, _ = metric
    t = tl.where(adaptive, (tl.abs(w) + eta).to(tl.float64), 1.0)
    x = _loss_gradient(w, g, metric, True).to(tl.float64) * t
    length = tl.where(q == 1, tl.where(x != 0, 1.0, 0.0), _raise(tl.abs(x) / norm, q - 1))
    return tl.where(x - x == 0, rho * t * tl.where(x < 0, -length, length), 0.0).to(w.dtype)


@triton.jit
def _power_perturb(
    weight, backup, grad, span, climb, row, q,
    STORAGE: tl.constexpr, GRAD: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    start, tile, full, end, length = span
    w, g = _pointer(weight, start, STORAGE, 0), _pointer(grad, start, GRAD, 0)
    kept, metric = _pointer(backup, start, STORAGE, 0), _metric(row, WIDE)
    while tile < end:
        o = tile * TILE + tl.arange(0, TILE)
        old, direction = _load(w, o, length, 0), _widen(_load(g, o, length, 0)).to(WIDE)
        _store(kept, o, old, length, 0)
        e = _power_climb(_widen(old), direction, climb, metric, q)
        _store(w, o, _narrow(_widen(old) + e, STORAGE), length, 0)
        tile += 1


@triton.jit
def _climb(w, g, climb, IN_LOSS: tl.constexpr):
    # The perturbation e = T^2 g * scale.
    scale, metric = climb
    eta, adaptive, _ = metric
    g = _loss_gradient(w, g, metric, IN_LOSS)
    t = tl.abs(w) + eta
    g = tl.where(adaptive, tl.where(eta == 0, (w * w) * g, t * (t * g)), g)
    return g * scale


@triton.jit
def _perturb_tiles(
    weight, backup, grad, start, tile, end, length, climb,
    STORAGE: tl.constexpr, GRAD: tl.constexpr, TILE: tl.constexpr, IN_LOSS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    w, g = _pointer(weight, start, STORAGE, ALIGN), _direction(grad, start, STORAGE, GRAD, ALIGN)
    kept = _pointer(backup, start, STORAGE, 16)
    while tile < end:
        o = tile * TILE + tl.arange(0, TILE)
        old, direction = _load_once(w, o, length, ALIGN), _load_once(g, o, length, ALIGN)
        _store_once(kept, o, old, length, ALIGN)
        e = _climb(_widen(old), _widen(direction), climb, IN_LOSS)
        _store(w, o, _narrow(_widen(old) + e, STORAGE), length, ALIGN)
        tile += 1


@triton.jit(do_not_specialize=list(range(10)))
def _perturb_kernel(
    segments, chunks, grads, rows, sums, numbers, overflows, n_sums, n_chunks, split,
    STORAGE: tl.constexpr, GRAD: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr, IN_LOSS: tl.constexpr,
    POWER: tl.constexpr,
):  # fmt: skip
    """Back the weights up and climb: w <- w + e(w), e = rho T^2 g / (norm + NORM_EPS). `split` programs a chunk.

    Foret et al., arXiv 2010.01412, eq. 2; with T = abs(w) + eta Kwon et al., arXiv 2102.11600.

    Reads 2n elements, writes 2n elements.
    """
    part = tl.num_programs(0) - 1 - tl.program_id(0)  # backwards: the gradients read last are still in the cache
    index, span = _part(chunks, part, split, n_chunks, TILE)
    start, tile, full, end, length = span
    grad = tl.load(grads + index)
    if tl.program_id(0) == 0:
        total = _ordered_sum(sums, n_sums)
        tl.store(overflows, tl.load(overflows) + 1, mask=total - total != 0)
    if (grad != 0) & (tile < end):
        weight = tl.load(segments + SEGMENT_COLUMNS * index + WEIGHT)
        backup = tl.load(segments + SEGMENT_COLUMNS * index + BACKUP)
        row = rows + ROW_COLUMNS * tl.load(segments + SEGMENT_COLUMNS * index + GROUP)
        if POWER:
            q = tl.load(numbers)
            power_climb = _power_scale(row, sums, n_sums, q)
            if power_climb[0] == 0:
                _copy(backup, weight, span, STORAGE, TILE)
            else:
                _power_perturb(weight, backup, grad, span, power_climb, row, q, STORAGE, GRAD, WIDE, TILE)
        else:
            scale = _perturbation_scale(row, sums, n_sums, WIDE)
            if scale == 0:  # a branch, never a product: 0 * inf is NaN
                _copy(backup, weight, span, STORAGE, TILE)
            else:
                climb = scale, _metric(row, WIDE)
                bits = _low_bits(weight, grad, STORAGE, GRAD)
                if bits % 16 == 0:
                    _perturb_tiles(
                        weight, backup, grad, start, tile, full, length, climb, STORAGE, GRAD, TILE, IN_LOSS, 16
                    )
                    tile = full
                elif bits % 8 == 0:
                    _perturb_tiles(
                        weight, backup, grad, start, tile, full, length, climb, STORAGE, GRAD, TILE, IN_LOSS, 8
                    )
                    tile = full
                _perturb_tiles(weight, backup, grad, start, tile, end, length, climb, STORAGE, GRAD, TILE, IN_LOSS, 0)


# Update.


@triton.jit
def _gradient(g, factors):
    # Without its loss scale, times the clip factor, uphill if maximized. Factors of 1 and -1 change no bits; a clip
    # factor of 0 clears the gradient, whatever it was.
    inverse, clip = factors
    return tl.where(clip == 0, 0.0, (g * inverse) * clip)


# The rules. STATES is the set of state slots that a group reads and writes, as bits. Of each rule: the scalars, from
# the group's row and the segment's progress (step count, NAdam's product of momenta), and the formula.


@triton.jit
def _sgd_scalars(row, progress, WIDE: tl.constexpr):
    lr, weight_decay = _lr(row), tl.load(row + WEIGHT_DECAY)
    momentum, dampening = tl.load(row + BETA1), tl.load(row + BETA2)
    return (
        (-lr).to(WIDE),
        weight_decay.to(WIDE),
        momentum.to(WIDE),
        (1.0 - dampening).to(WIDE),
        weight_decay != 0,
        progress[0] == 0,
        _flag(row, NESTEROV),
    )


@triton.jit
def _sgd(w, g, buf, scalars, STATES: tl.constexpr):
    # torch.optim.SGD; `first` is true where there is no momentum yet (dampening does not apply there).
    neg_lr, weight_decay, momentum, one_minus_dampening, decay, first, nesterov = scalars
    g = tl.where(decay, _fma(weight_decay, w, g), g)
    if STATES & 1:
        buf = tl.where(first, g, _fma(one_minus_dampening, g, buf * momentum))
        g = tl.where(nesterov, _fma(momentum, buf, g), buf)
    return _fma(neg_lr, g, w), buf


@triton.jit
def _decay_scalars(row, WIDE: tl.constexpr):
    lr, weight_decay = _lr(row), tl.load(row + WEIGHT_DECAY)
    return (
        (1.0 - lr * weight_decay).to(WIDE),
        weight_decay.to(WIDE),
        (weight_decay != 0) & _flag(row, DECOUPLED),
        (weight_decay != 0) & (_flag(row, DECOUPLED) == 0),
    )


@triton.jit
def _decay(w, g, scalars):
    # Weight decay of Adam's family: of the weights themselves (decoupled), or through the gradient.
    factor, weight_decay, decoupled, coupled = scalars
    return tl.where(decoupled, w * factor, w), tl.where(coupled, _fma(weight_decay, w, g), g)


@triton.jit
def _moment_scalars(row, WIDE: tl.constexpr):
    beta1, beta2 = tl.load(row + BETA1), tl.load(row + BETA2)
    return (1.0 - beta1).to(WIDE), beta2.to(WIDE), (1.0 - beta2).to(WIDE), tl.load(row + EPS).to(WIDE)


@triton.jit
def _adam_scalars(row, progress, WIDE: tl.constexpr):
    t = progress[0].to(tl.int32) + 1  # the count of the step being made
    correction1, correction2 = 1.0 - _power(tl.load(row + BETA1), t), 1.0 - _power(tl.load(row + BETA2), t)
    own = (-(_lr(row) / correction1)).to(WIDE), tl.sqrt(correction2).to(WIDE)
    return own, _moment_scalars(row, WIDE), _decay_scalars(row, WIDE)


@triton.jit
def _adam(w, g, exp_avg, exp_avg_sq, max_exp_avg_sq, scalars, STATES: tl.constexpr):
    # torch.optim.Adam and AdamW (arXiv 1412.6980, 1711.05101); the third state is amsgrad's.
    own, moments, decay = scalars
    step_size, correction2_sqrt = own
    one_minus_beta1, beta2, one_minus_beta2, eps = moments
    w, g = _decay(w, g, decay)
    exp_avg = _lerp(exp_avg, g, one_minus_beta1)
    exp_avg_sq = _fma(one_minus_beta2 * g, g, exp_avg_sq * beta2)
    second = exp_avg_sq
    if STATES & 4:
        max_exp_avg_sq = _maximum(max_exp_avg_sq, exp_avg_sq)
        second = max_exp_avg_sq
    denom = _div(_sqrt(second), correction2_sqrt) + eps
    return w + _div(step_size * exp_avg, denom), exp_avg, exp_avg_sq, max_exp_avg_sq


@triton.jit
def _rmsprop_scalars(row, progress, WIDE: tl.constexpr):
    weight_decay, alpha = tl.load(row + WEIGHT_DECAY), tl.load(row + BETA2)
    return (
        (-_lr(row)).to(WIDE),
        weight_decay.to(WIDE),
        tl.load(row + BETA1).to(WIDE),
        alpha.to(WIDE),
        (1.0 - alpha).to(WIDE),
        tl.load(row + EPS).to(WIDE),
        weight_decay != 0,
    )


@triton.jit
def _rmsprop(w, g, square_avg, buf, grad_avg, scalars, STATES: tl.constexpr):
    # torch.optim.RMSprop (centered: Graves, arXiv 1308.0850).
    neg_lr, weight_decay, momentum, alpha, one_minus_alpha, eps, decay = scalars
    g = tl.where(decay, _fma(weight_decay, w, g), g)
    square_avg = _fma(one_minus_alpha * g, g, square_avg * alpha)
    second = square_avg
    if STATES & 4:
        grad_avg = _lerp(grad_avg, g, one_minus_alpha)
        second = _fma(-grad_avg, grad_avg, second)
    denom = _sqrt(second) + eps
    if STATES & 2:
        buf = buf * momentum + _div(g, denom)
        w = _fma(neg_lr, buf, w)
    else:
        w = w + _div(neg_lr * g, denom)
    return w, square_avg, buf, grad_avg


@triton.jit
def _adagrad_scalars(row, progress, WIDE: tl.constexpr):
    weight_decay = tl.load(row + WEIGHT_DECAY)
    clr = _lr(row) / (1.0 + progress[0].to(tl.float64) * tl.load(row + EXTRA))
    return (-clr).to(WIDE), weight_decay.to(WIDE), tl.load(row + EPS).to(WIDE), weight_decay != 0


@triton.jit
def _adagrad(w, g, total, scalars):
    # torch.optim.Adagrad (Duchi et al., JMLR 12, 2011).
    neg_clr, weight_decay, eps, decay = scalars
    g = tl.where(decay, _fma(weight_decay, w, g), g)
    total = _fma(g, g, total)
    denom = _sqrt(total) + eps
    return w + _div(neg_clr * g, denom), total


@triton.jit
def _nadam_scalars(row, progress, WIDE: tl.constexpr):
    step, product = progress
    t, lr = step.to(tl.int32) + 1, _lr(row)
    beta1, q = tl.load(row + BETA1), tl.load(row + EXTRA)
    mu, next_mu = beta1 * (1.0 - 0.5 * _power(q, t)), beta1 * (1.0 - 0.5 * _power(q, t + 1))
    product = (product * mu.to(tl.float32)).to(tl.float64)
    grad_size = ((-lr * (1.0 - mu)) / (1.0 - product)).to(WIDE)
    avg_size = ((-lr * next_mu) / (1.0 - product * next_mu)).to(WIDE)
    own = grad_size, avg_size, (1.0 - _power(tl.load(row + BETA2), t)).to(WIDE)
    return own, _moment_scalars(row, WIDE), _decay_scalars(row, WIDE)


@triton.jit
def _nadam(w, g, exp_avg, exp_avg_sq, scalars):
    # torch.optim.NAdam (Dozat, ICLR workshop 2016).
    own, moments, decay = scalars
    grad_size, avg_size, correction2 = own
    one_minus_beta1, beta2, one_minus_beta2, eps = moments
    w, g = _decay(w, g, decay)
    exp_avg = _lerp(exp_avg, g, one_minus_beta1)
    exp_avg_sq = _fma(one_minus_beta2 * g, g, exp_avg_sq * beta2)
    denom = _sqrt(_div(exp_avg_sq, correction2)) + eps
    w = w + _div(grad_size * g, denom)
    return w + _div(avg_size * exp_avg, denom), exp_avg, exp_avg_sq


@triton.jit
def _radam_scalars(row, progress, WIDE: tl.constexpr):
    t, beta2 = progress[0].to(tl.int32) + 1, tl.load(row + BETA2)
    power2 = _power(beta2, t)
    bias2, rho_inf = 1.0 - power2, 2.0 / (1.0 - beta2) - 1.0
    rho_t = rho_inf - 2.0 * t.to(tl.float64) * power2 / bias2
    ratio = (rho_t - 4.0) * (rho_t - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho_t)
    rectified = rho_t > 5.0
    own = (
        _lr(row).to(WIDE),
        (1.0 - _power(tl.load(row + BETA1), t)).to(WIDE),
        tl.sqrt(bias2).to(WIDE),
        tl.sqrt(tl.where(rectified, ratio, 0.0)).to(WIDE),
        rectified,
    )
    return own, _moment_scalars(row, WIDE), _decay_scalars(row, WIDE)


@triton.jit
def _radam(w, g, exp_avg, exp_avg_sq, scalars):
    # torch.optim.RAdam (Liu et al., arXiv 1908.03265), without denominator while rho_t <= 5.
    own, moments, decay = scalars
    lr, correction1, correction2_sqrt, rect, rectified = own
    one_minus_beta1, beta2, one_minus_beta2, eps = moments
    w, g = _decay(w, g, decay)
    exp_avg = _lerp(exp_avg, g, one_minus_beta1)
    exp_avg_sq = _fma(one_minus_beta2 * g, g, exp_avg_sq * beta2)
    step = _div(exp_avg, correction1) * lr
    adaptive = _div(tl.full(w.shape, 1.0, w.dtype), _sqrt(exp_avg_sq) + eps) * correction2_sqrt
    return w - tl.where(rectified, (step * adaptive) * rect, step), exp_avg, exp_avg_sq


@triton.jit
def _lion_scalars(row, progress, WIDE: tl.constexpr):
    lr = _lr(row)
    decay_factor = 1.0 - lr * tl.load(row + WEIGHT_DECAY)
    one_minus_beta1, one_minus_beta2 = 1.0 - tl.load(row + BETA1), 1.0 - tl.load(row + BETA2)
    return (-lr).to(WIDE), decay_factor.to(WIDE), one_minus_beta1.to(WIDE), one_minus_beta2.to(WIDE)


@triton.jit
def _lion(w, g, exp_avg, scalars):
    # Lion (Chen et al., arXiv 2302.06675).
    neg_lr, decay_factor, one_minus_beta1, one_minus_beta2 = scalars
    c = _lerp(exp_avg, g, one_minus_beta1)
    exp_avg = _lerp(exp_avg, g, one_minus_beta2)
    w = w * decay_factor  # a factor of 1 rounds nothing
    return _fma(neg_lr, (c > 0).to(w.dtype) - (c < 0).to(w.dtype), w), exp_avg


# The rules by code: scalars, formula, states of a group.


@triton.jit
def _scalars(row, progress, RULE: tl.constexpr, WIDE: tl.constexpr):
    if RULE == SGD:
        return _sgd_scalars(row, progress, WIDE)
    elif RULE == ADAM:
        return _adam_scalars(row, progress, WIDE)
    elif RULE == RMSPROP:
        return _rmsprop_scalars(row, progress, WIDE)
    elif RULE == ADAGRAD:
        return _adagrad_scalars(row, progress, WIDE)
    elif RULE == NADAM:
        return _nadam_scalars(row, progress, WIDE)
    elif RULE == RADAM:
        return _radam_scalars(row, progress, WIDE)
    else:
        return _lion_scalars(row, progress, WIDE)


@triton.jit
def _apply(w, g, s0, s1, s2, scalars, RULE: tl.constexpr, STATES: tl.constexpr):
    if RULE == SGD:
        w, s0 = _sgd(w, g, s0, scalars, STATES)
    elif RULE == ADAM:
        w, s0, s1, s2 = _adam(w, g, s0, s1, s2, scalars, STATES)
    elif RULE == RMSPROP:
        w, s0, s1, s2 = _rmsprop(w, g, s0, s1, s2, scalars, STATES)
    elif RULE == ADAGRAD:
        w, s0 = _adagrad(w, g, s0, scalars)
    elif RULE == NADAM:
        w, s0, s1 = _nadam(w, g, s0, s1, scalars)
    elif RULE == RADAM:
        w, s0, s1 = _radam(w, g, s0, s1, scalars)
    else:
        w, s0 = _lion(w, g, s0, scalars)
    return w, s0, s1, s2


@triton.jit
def _states(row, RULE: tl.constexpr):
    if RULE == SGD:
        return (tl.load(row + BETA1) != 0).to(tl.int32)
    elif RULE == ADAM:
        return 3 + 4 * _flag(row, AMSGRAD).to(tl.int32)
    elif RULE == RMSPROP:
        return 1 + 2 * (tl.load(row + BETA1) > 0).to(tl.int32) + 4 * _flag(row, CENTERED).to(tl.int32)
    else:  # always the same
        return 0


@triton.jit
def _update_tiles(
    segment, source, grad, start, tile, end, length, factors, scalars,
    RULE: tl.constexpr, STATES: tl.constexpr, STORAGE: tl.constexpr, GRAD: tl.constexpr, TILE: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    to, source = _pointer(tl.load(segment + WEIGHT), start, STORAGE, ALIGN), _pointer(source, start, STORAGE, ALIGN)
    grad = _direction(grad, start, STORAGE, GRAD, ALIGN)
    if STATES & 1:
        state0 = _pointer(tl.load(segment + STATE0), start, STORAGE, 16)
    if STATES & 2:
        state1 = _pointer(tl.load(segment + STATE1), start, STORAGE, 16)
    if STATES & 4:
        state2 = _pointer(tl.load(segment + STATE2), start, STORAGE, 16)
    while tile < end:
        o = tile * TILE + tl.arange(0, TILE)
        w = _widen(_load_once(source, o, length, ALIGN))
        g = _gradient(_widen(_load_once(grad, o, length, ALIGN)), factors)
        s0, s1, s2 = g, g, g
        if STATES & 1:
            s0 = _widen(_load(state0, o, length, ALIGN))
        if STATES & 2:
            s1 = _widen(_load(state1, o, length, ALIGN))
        if STATES & 4:
            s2 = _widen(_load(state2, o, length, ALIGN))
        w, s0, s1, s2 = _apply(w, g, s0, s1, s2, scalars, RULE, STATES)
        _store(to, o, _narrow(w, STORAGE), length, ALIGN)
        if STATES & 1:
            _store(state0, o, _narrow(s0, STORAGE), length, ALIGN)
        if STATES & 2:
            _store(state1, o, _narrow(s1, STORAGE), length, ALIGN)
        if STATES & 4:
            _store(state2, o, _narrow(s2, STORAGE), length, ALIGN)
        tile += 1


@triton.jit
def _update_part(
    segment, source, grad, span, factors, scalars,
    RULE: tl.constexpr, STATES: tl.constexpr, STORAGE: tl.constexpr, GRAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    start, tile, full, end, length = span
    bits = _low_bits(tl.load(segment + WEIGHT) | source, grad, STORAGE, GRAD)
    if bits % 16 == 0:
        _update_tiles(
            segment, source, grad, start, tile, full, length, factors, scalars, RULE, STATES, STORAGE, GRAD, TILE, 16
        )
        tile = full
    elif bits % 8 == 0:
        _update_tiles(
            segment, source, grad, start, tile, full, length, factors, scalars, RULE, STATES, STORAGE, GRAD, TILE, 8
        )
        tile = full
    _update_tiles(
        segment, source, grad, start, tile, end, length, factors, scalars, RULE, STATES, STORAGE, GRAD, TILE, 0
    )


@triton.jit
def _count(segments, grads, rows, n_segments, RULE: tl.constexpr):
    # Advance the step counts of segments with a gradient, empty ones too; SGD counts the steps with momentum only,
    # NAdam also multiplies its momenta.
    i = 0
    while i < n_segments:
        segment = (i + tl.arange(0, COUNTED)).to(tl.int64)
        there = segment < n_segments
        counts = tl.load(grads + segment, mask=there, other=0) != 0
        if RULE == SGD:
            group = tl.load(segments + SEGMENT_COLUMNS * segment + GROUP, mask=there, other=0)
            counts = counts & (tl.load(rows + ROW_COLUMNS * group + BETA1, mask=there, other=0.0) != 0)
        place = tl.load(segments + SEGMENT_COLUMNS * segment + PROGRESS, mask=there, other=0)
        progress = place.to(tl.pointer_type(tl.float32))
        step = tl.load(progress, mask=counts, other=0.0) + 1.0
        tl.store(progress, step, mask=counts)
        if RULE == NADAM:
            row = rows + ROW_COLUMNS * tl.load(segments + SEGMENT_COLUMNS * segment + GROUP, mask=there, other=0)
            beta1, q = tl.load(row + BETA1, mask=there, other=0.0), tl.load(row + EXTRA, mask=there, other=0.0)
            mu = beta1 * (1.0 - 0.5 * _powers(q, step.to(tl.int32)))
            product = tl.load(progress + 1, mask=counts, other=0.0)
            tl.store(progress + 1, product * mu.to(tl.float32), mask=counts)
        i += COUNTED


@triton.jit(do_not_specialize=list(range(13)))
def _update_kernel(
    segments, chunks, grads, rows, perturbed, ticket, grad_scale, found_inf, clip, overflows, n_segments, n_chunks,
    split, RULE: tl.constexpr, STATES: tl.constexpr, STORAGE: tl.constexpr, GRAD: tl.constexpr, WIDE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Return to the old weights and take the base optimizer's step from there. `split` programs a chunk.

    | perturbed | gradient | found_inf | weights                | state, step count |
    | --------- | -------- | --------- | ---------------------- | ----------------- |
    | yes       | yes      | 0         | rule(backup)           | updated, + 1      |
    | yes       | yes      | 1         | backup                 | untouched         |
    | yes       | no       | any       | backup                 | untouched         |
    | no        | yes      | 0         | rule(w)                | updated, + 1      |
    | no        | yes      | 1         | untouched              | untouched         |

    Reads 2n elements and the states, writes n elements and the states; STATES is the set that the groups here have.
    """
    LEAST: tl.constexpr = 0 if RULE == SGD else 3 if RULE == ADAM else 1 if RULE == RMSPROP else STATES  # of any group
    SEVERAL: tl.constexpr = RULE == RMSPROP and STATES == 7  # sets between
    part = tl.program_id(0)
    index, span = _part(chunks, part, split, n_chunks, TILE)
    segment = segments + SEGMENT_COLUMNS * index
    grad = tl.load(grads + index)
    restores = tl.load(perturbed + index) != 0
    backup = tl.load(segment + BACKUP)
    if RULE == NO_RULE:
        if restores:
            _copy(tl.load(segment + WEIGHT), backup, span, STORAGE, TILE)
    else:
        # All programs read their segment's count before they arrive: the last one may advance the counts.
        place = tl.load(segment + PROGRESS).to(tl.pointer_type(tl.float32))
        progress = tl.load(place), tl.load(place + 1)
        overflow = tl.load(found_inf) != 0
        if _arrive(ticket):
            if overflow == 0:
                _count(segments, grads, rows, n_segments, RULE)
            else:
                tl.store(overflows + 1, tl.load(overflows + 1) + 1)
        if (grad != 0) & (overflow == 0):
            row = rows + ROW_COLUMNS * tl.load(segment + GROUP)
            source = tl.where(restores, backup, tl.load(segment + WEIGHT))
            inverse = (1.0 / tl.load(grad_scale).to(tl.float64)).to(WIDE)
            factors = tl.where(_flag(row, MAXIMIZE), -inverse, inverse), tl.load(clip).to(WIDE)
            scalars, states = _scalars(row, progress, RULE, WIDE), _states(row, RULE)
            if STATES == LEAST:
                _update_part(segment, source, grad, span, factors, scalars, RULE, LEAST, STORAGE, GRAD, TILE)
            elif states == LEAST:
                _update_part(segment, source, grad, span, factors, scalars, RULE, LEAST, STORAGE, GRAD, TILE)
            elif SEVERAL:
                if states == 3:
                    _update_part(segment, source, grad, span, factors, scalars, RULE, 3, STORAGE, GRAD, TILE)
                elif states == 5:
                    _update_part(segment, source, grad, span, factors, scalars, RULE, 5, STORAGE, GRAD, TILE)
                else:
                    _update_part(segment, source, grad, span, factors, scalars, RULE, 7, STORAGE, GRAD, TILE)
            else:
                _update_part(segment, source, grad, span, factors, scalars, RULE, STATES, STORAGE, GRAD, TILE)
        elif restores:
            _copy(tl.load(segment + WEIGHT), backup, span, STORAGE, TILE)


# ---- The host's side.

_STORAGE = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.uint16, torch.float16: tl.float16}
_TYPES = {  # of the kernels' arguments: tables, and otherwise int32
    **dict.fromkeys(("segments", "grads", "overflows"), torch.int64),
    **dict.fromkeys(("chunks", "ticket"), torch.int32),
    **dict.fromkeys(("rows", "partials", "out", "sums", "numbers", "clip"), torch.float64),
    **dict.fromkeys(("grad_scale", "found_inf"), torch.float32),
    "perturbed": torch.uint8,
}
_PROGRAMS = 2048  # with fewer chunks than this, several programs share a chunk; not measured yet

INTERPRETED = not isinstance(_update_kernel, triton.JITFunction)


@cache
def reason() -> str | None:
    """Why the kernels cannot be used here and what to do, or None if they can."""
    if _version() < (3, 6):
        return f"it needs triton >= 3.6, this is {triton.__version__}"
    if INTERPRETED:
        late = isinstance(tl.sum, triton.JITFunction)  # Triton's own functions were decorated before
        return "TRITON_INTERPRET=1 must be set before triton is imported" if late else None
    try:
        _ = triton.runtime.driver.active.utils  # compiles Triton's own helper library, once for each user
    except Exception as error:  # RuntimeError, CalledProcessError, OSError, whatever the compiler raises
        return f"Triton does not start (it needs a C compiler and Python's headers): {type(error).__name__}: {error}"
    return None


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def grad_norm(
    bucket: "Bucket", grads: Sequence[Tensor | None], out: Tensor, *, clip: reference.Clip | None = None
) -> None:
    """Write `sum(abs(T g)^q)` over the bucket into its slot; out: [n_buckets] float64. With `clip` T = 1 and q = 2."""
    own = _own(bucket)
    kind = (False, False) if clip is not None else _kind(bucket)
    launch = own.launcher(bucket, _grad_norm_kernel, *kind)
    mirror = own.ascent if clip is None else own.descent
    tables = own.tables(bucket, mirror, native._addresses(bucket, grads))
    max_norm, factor, grad_scale = clip or (None, own.unclipped, None)
    scalars = _scalar(bucket, "clip", factor, own.unclipped), _scalar(bucket, "grad_scale", grad_scale, own.one)
    numbers = own.numbers(bucket.q, max_norm)
    counts = bucket.slot, out.shape[0], int(clip is not None), own.n_chunks
    launch(*tables, own.partials, own.norm_ticket, _place(out), numbers, *map(_place, scalars), *counts)


def perturb_(bucket: "Bucket", grads: Sequence[Tensor | None], sums: Tensor) -> None:
    """Back the weights up and climb: w <- w + e(w); sums: [n_buckets] float64, the squared norm."""
    own = _own(bucket)
    launch = own.launcher(bucket, _perturb_kernel, *_kind(bucket))
    addresses = native._addresses(bucket, grads)
    tables = own.tables(bucket, own.ascent, addresses)
    bucket.perturbed.logical_or_(addresses)
    numbers, overflows = own.numbers(bucket.q), own.overflows(bucket)
    launch(*tables, _place(sums), numbers, overflows, sums.shape[0], own.n_chunks, own.split)


def update_(
    bucket: "Bucket",
    grads: Sequence[Tensor | None],
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    clip: Tensor | None = None,
) -> None:
    """Return to the old weights and take the base optimizer's step.

    grad_scale, found_inf: [] or [1] float32; clip: [] or [1] float64.
    """
    own = _own(bucket)
    launch = own.launcher(bucket, _update_kernel, *own.rule(bucket))
    tables = own.tables(bucket, own.descent, native._addresses(bucket, grads))
    perturbed = own.perturbed(bucket.perturbed, own.capturing)
    scalars = (  # tensors, so that none is freed before the launch
        _scalar(bucket, "grad_scale", grad_scale, own.one),
        _scalar(bucket, "found_inf", found_inf, own.zero),
        _scalar(bucket, "clip", clip, own.unclipped),
    )
    numbers = own.n_segments, own.n_chunks, own.split
    launch(*tables, perturbed, own.update_ticket, *map(_place, scalars), own.overflows(bucket), *numbers)
    bucket.perturbed.zero_()


def _place(tensor: Tensor) -> Any:
    """How a kernel is given a tensor: the launcher takes an address as it is, the interpreter wants the tensor."""
    return tensor if INTERPRETED else tensor.data_ptr()


class _Mirror:
    """A host table's copy on the device, written only when a value changed.

    Every upload has a staging buffer of its own: a buffer kept for the next upload might be overwritten while the copy
    is still to come. What a captured graph reads is never written again, but for a `live` table: replays shall see its
    new values.
    """

    def __init__(self, table: Tensor, device: torch.device, live: bool = False) -> None:
        self.live = live
        self.seen = b""  # what `copy` holds
        self.copy = torch.empty_like(table, device=device)
        self.place = _place(self.copy)
        self.shared = False  # whether a captured graph reads `copy`, too
        self.baked: list[Tensor] = []  # what else captured graphs read

    def __call__(self, table: Tensor, capturing: bool = False) -> Any:
        """Where the table's values are on the device."""
        values = string_at(table.data_ptr(), table.nbytes)
        if capturing:
            return self._captured(table, values)
        if values != self.seen:
            self.seen = b""
            self._upload(table)
            self.seen = values
        return self.place

    def _upload(self, table: Tensor) -> None:
        staging = table
        if self.copy.is_cuda:
            staging = torch.empty(table.shape, dtype=self.copy.dtype, pin_memory=True).copy_(table)
        if self.shared:
            self.baked.append(self.copy)
            self.copy, self.shared = torch.empty_like(self.copy), False
            self.place = _place(self.copy)
        self.copy.copy_(staging, non_blocking=True)

    def _captured(self, table: Tensor, values: bytes) -> Any:
        """Where a graph finds the values: it writes them itself unless they are on the device already.

        That takes nothing but kernels on the capturing stream, which have the values in their arguments: a replay reads
        no memory of the host, and no call is made that a capture may forbid (to wait, to query an event, to allocate
        pinned memory, to copy).
        """
        if values == self.seen:
            self.shared = not self.live
            return self.place
        if self.live:
            raise RuntimeError(
                "FusedSAM: a captured step reads lr, rho and the other values of the groups from the device: call "
                "optimizer.refresh() after changing them, before the capture and before each replay"
            )
        copy = torch.zeros_like(self.copy)
        torch._foreach_add_(copy.unbind(), table.to(copy.dtype).tolist())
        self.baked.append(copy)
        return _place(copy)


class _Own:
    """What the kernels need of one bucket beside its tables, and what of a launch is the same in every step."""

    def __init__(self, bucket: "Bucket") -> None:
        device = bucket.device
        self.known = bucket.segment_table, bucket.chunk_table, bucket.row_table
        self.places = _place(bucket.segment_table), _place(bucket.chunk_table)
        self.n_segments, self.n_chunks, self.split = len(bucket.perturbed), len(bucket.chunk_table), _split(bucket)
        # Apart for the two passes: each may have addresses of its own, step after step.
        self.ascent, self.descent = _Mirror(bucket.grad_table, device), _Mirror(bucket.grad_table, device)
        self.perturbed = _Mirror(bucket.perturbed.view(torch.uint8), device)
        self.rows = _Mirror(bucket.row_table, device, live=True)
        self.tickets = torch.zeros(2, dtype=torch.int32, device=device)
        self.norm_ticket, self.update_ticket = _place(self.tickets[:1]), _place(self.tickets[1:])
        self.partials = _place(bucket.partials)
        self.one, self.zero = torch.ones(1, device=device), torch.zeros(1, device=device)
        self.unclipped = torch.ones(1, dtype=torch.float64, device=device)
        self.uncounted = torch.zeros(2, dtype=torch.int64, device=device)
        self.q_and_max_norm = torch.zeros(2, dtype=torch.float64)
        self.numbers_there = _Mirror(self.q_and_max_norm, device)
        self.launchers: dict[tuple[Any, ...], Callable[..., None]] = {}
        self.rows_seen: Any = None  # the groups' values that `rule` was asked for, and that `settle` saw
        self.settled: Any = None
        self.capturing = False  # asked at the start of every operation

    def serves(self, bucket: "Bucket") -> bool:
        """Whether the bucket's tables are still the ones this was made for."""
        segments, chunks, rows = self.known
        return segments is bucket.segment_table and chunks is bucket.chunk_table and rows is bucket.row_table

    def tables(self, bucket: "Bucket", mirror: "_Mirror", addresses: Tensor) -> tuple[Any, ...]:
        """What every kernel is given first: segments, chunks, the gradients' addresses, the groups' rows."""
        return *self.places, mirror(addresses, self.capturing), self.rows(bucket.row_table, self.capturing)

    def numbers(self, q: float, max_norm: float | None = None) -> Any:
        """Where kernels find q and, where they are given one, the norm to clip to."""
        self.q_and_max_norm[0] = q
        if max_norm is not None:
            self.q_and_max_norm[1] = max_norm
        return self.numbers_there(self.q_and_max_norm, self.capturing)

    def overflows(self, bucket: "Bucket") -> Any:
        """Where overflows are counted."""
        return _place(self.uncounted if bucket.overflows is None else bucket.overflows)

    def rule(self, bucket: "Bucket") -> tuple[int, int]:
        """The rule's code, and the states of its groups, as bits; the groups' values decide, seldom anew."""
        if bucket.rows is not self.rows_seen:
            self.rows_seen, self.rule_and_states = bucket.rows, _rule(bucket)
        return self.rule_and_states

    def launcher(self, bucket: "Bucket", kernel: Any, *kind: int) -> Callable[..., None]:
        """What launches a kernel for this bucket, given its arguments; looked up, compiled and loaded once."""
        key = id(kernel), bucket.format.grad, kind
        launch = self.launchers.get(key)
        if launch is None:
            if self.capturing:  # no time to load a kernel
                raise RuntimeError(_TOO_LATE)
            programs = self.n_chunks * (1 if kernel is _grad_norm_kernel else self.split)
            launch = _launcher(kernel, bucket.device, programs, _constants(bucket, kernel, kind))
            self.launchers[key] = launch
        return launch


_TOO_LATE = (
    "FusedSAM: take a step like it before a CUDA graph is captured, so that all tables exist and all kernels are loaded"
)


def _own(bucket: "Bucket") -> _Own:
    own, capturing = bucket.kept, graphs.capturing(bucket.device)
    if not isinstance(own, _Own) or not own.serves(bucket):
        if capturing:  # the tables would lie in the graph's memory
            raise RuntimeError(_TOO_LATE)
        own = bucket.kept = _Own(bucket)
    own.capturing = capturing
    return own


def _scalar(bucket: "Bucket", name: str, value: Tensor | None, neutral: Tensor) -> Tensor:
    if value is None:
        return neutral
    if value.numel() != 1 or value.dtype != neutral.dtype:
        raise RuntimeError(
            f"update_: {name} must be one element of {neutral.dtype}, got {list(value.shape)} of {value.dtype}"
        )
    return value if value.device == bucket.device else value.to(bucket.device, non_blocking=True)


def _constants(bucket: "Bucket", kernel: Any, kind: tuple[int, ...]) -> tuple[Any, ...]:
    """What the kernel is compiled for: its kind, what weights and gradients are stored as and computed in, the tile."""
    double = bucket.dtype == torch.float64
    types = _STORAGE[bucket.dtype], _STORAGE[bucket.format.grad], tl.float64 if double else tl.float32
    tile = () if kernel is _grad_norm_kernel else (512 if double else 1024,)
    return (*kind, *types, *tile) if kernel is _update_kernel else (*types, *tile, *kind)


def _kind(bucket: "Bucket") -> tuple[bool, bool]:
    """Of perturbation: whether with the weight decay in the loss, whether in another norm than the second."""
    return any(row.flags & rules.DECAYS for row in bucket.rows), bucket.q != 2


def _rule(bucket: "Bucket") -> tuple[int, int]:
    """The rule's code, and the set of states that its groups have, as bits."""
    if bucket.rule is None:
        return NO_RULE.value, 0
    union = 0
    for row in bucket.rows:
        if bucket.rule is rules.SGD:
            union |= row.beta1 != 0
        elif bucket.rule is rules.ADAM:
            union |= 3 | 4 * bool(row.flags & rules.AMSGRAD)
        elif bucket.rule is rules.RMSPROP:
            union |= 1 | 2 * (row.beta1 > 0) | 4 * bool(row.flags & rules.CENTERED)
        else:
            union |= 2 ** len(bucket.rule.states) - 1
    return bucket.rule.code, int(union)


def _split(bucket: "Bucket") -> int:
    """How many programs share a chunk: enough to fill a GPU. No result depends on it."""
    n = len(bucket.chunk_table)
    return 4 if 2 * n < _PROGRAMS else 2 if n < _PROGRAMS else 1


def _launcher(kernel: Any, device: torch.device, programs: int, constants: tuple[Any, ...]) -> Callable[..., None]:
    grid = max(programs, 1), 1, 1
    if INTERPRETED:
        import numpy

        def interpret(*args: Any) -> None:
            with numpy.errstate(all="ignore"):  # a GPU does not warn of infinities either
                kernel[grid](*args, *constants)

        return interpret
    with _on(device):
        run = _compiled(kernel, device, constants)[grid]

    def launch(*args: Any) -> None:
        if device.type != "cuda" or torch.cuda.current_device() == device.index:
            run(*args, *constants)
        else:
            with torch.cuda.device(device):
                run(*args, *constants)

    return launch


@cache
def _compiled(kernel: Any, device: torch.device, constants: tuple[Any, ...]) -> Any:
    """A kernel for the current device, compiled from types alone: no tensor is touched."""
    types = [_TYPES.get(name, 0) for name in kernel.arg_names[: -len(constants)]]
    return kernel.warmup(*types, *constants, grid=(1,), **_options(kernel, constants))


def _options(kernel: Any, constants: tuple[Any, ...]) -> dict[str, Any]:
    """How to compile: a thread holds 8 elements (4 of float64) of a tile, so 16 bytes or more of each operand."""
    options = {"num_warps": 8 if kernel is _grad_norm_kernel else 4, "enable_fp_fusion": False}
    rule, states = constants[:2] if kernel is _update_kernel else (NO_RULE.value, 0)
    wide, states = tl.float64 in constants, states.bit_count()
    if torch.version.hip is None:  # left alone, ptxas spills a value to get by with 96 registers, 80 or 64
        if rule in (ADAGRAD.value, LION.value):
            options["maxnreg"] = 128 if wide else 80
        elif rule == NADAM.value and wide:
            options["maxnreg"] = 160
        elif (states > 2 and not wide) or rule in (RMSPROP.value, NADAM.value):
            options["maxnreg"] = 128
        elif states > 1 and not wide and _version() < (3, 7):
            options["maxnreg"] = 96
    return options


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# ---- CUDA graphs; see `graphs.py`.


def own_rows(n_segments: int, n_groups: int) -> int:
    """No rows of the segment table are these kernels' own."""
    return 0


def settle(bucket: "Bucket") -> None:
    """Before a pass: make all tables and load all kernels of a step, unless it is being captured already."""
    own = _own(bucket)
    if not own.capturing and bucket.rows is not own.settled:
        own.rows(bucket.row_table)
        for kernel in (_grad_norm_kernel, _perturb_kernel):
            own.launcher(bucket, kernel, *_kind(bucket))
        own.launcher(bucket, _update_kernel, *own.rule(bucket))
        own.settled = bucket.rows


def upload(bucket: "Bucket") -> None:
    """Bring the groups' values to the device, outside of graphs."""
    _own(bucket).rows(bucket.row_table)
