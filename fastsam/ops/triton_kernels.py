"""The kernels in Triton, one for each operation of `reference.py`; `triton.py` launches them.

What tensors are stored as: STORAGE the weights, GRAD the gradients, SOURCE what the formulas take the weights from (the
masters, where it is not STORAGE), STATE the states. DRAWN: what is stored in less than it is computed in is rounded
stochastically, but for weights with masters. bfloat16 is taken as its 16 bits (uint16) and rounded by integer
arithmetic, because Triton's interpreter truncates where a GPU rounds.

No value is baked into a kernel: hyper-parameters stand in a table, and arguments are not specialised on their values or
alignment. So a kernel is compiled once for its dtype and rule, whatever the numbers and the number of tensors.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from fastsam.ops.triton_rules import (
    ADAM,
    ADAPTIVE,
    BETA1,
    DECAYS,
    ETA,
    EXTRA,
    MAXIMIZE,
    NADAM,
    RHO,
    RMSPROP,
    ROW_COLUMNS,
    SEED,
    SGD,
    WEIGHT_DECAY,
    _apply,
    _flag,
    _fma,
    _scalars,
    _states,
)

CHUNK = tl.constexpr(8192)  # elements a partial sum covers
LANES = tl.constexpr(2048)  # a chunk is 4 rows of 2048 lanes
SLOTS = tl.constexpr(1024)  # lanes over which the partial sums of chunks are added
UNIT = tl.constexpr(64)  # chunk starts are counted in units of 64 elements
NORM_EPS = tl.constexpr(1e-12)  # added to the norm; the paper's code divides by the bare norm
CLIP_EPS = tl.constexpr(1e-6)  # added to the norm that gradients are clipped by, as torch does
COUNTED = tl.constexpr(256)  # segments whose step counts are advanced at once
# Streams of random numbers: of the weights in `perturb_`, of the weights and the states in `update_`.
CLIMB, STEP, STATES0 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
PHILOX_ROUNDS = tl.constexpr(7)  # the fewest that pass the tests of its authors

# Columns of the segment table: `Bucket` says what they hold.
WEIGHT, BACKUP, STATE0, STATE1, STATE2, MASTER, PROGRESS, PLACE = (tl.constexpr(i) for i in range(8))
SEGMENT_COLUMNS = tl.constexpr(8)

NO_RULE = tl.constexpr(-1)

# Kinds of gradients and directions that are not of the type of the arithmetic, which is 0.
BFLOAT16, FLOAT16 = tl.constexpr(1), tl.constexpr(2)


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
def _operand(address, start, STORAGE: tl.constexpr, SOURCE: tl.constexpr, ALIGN: tl.constexpr):
    # Where an operand is. Narrower than SOURCE, it is accessed in as many elements at once as SOURCE is, not in as many
    # bytes: all operands then lie in the same threads, and nothing is exchanged between these.
    if STORAGE.primitive_bitwidth < SOURCE.primitive_bitwidth:
        return _pointer(address, start, STORAGE, ALIGN // 2)
    else:
        return _pointer(address, start, STORAGE, ALIGN)


@triton.jit
def _low_bits(address, STORAGE: tl.constexpr, SOURCE: tl.constexpr):
    # Zero modulo ALIGN where `_operand` may be told ALIGN.
    if STORAGE.primitive_bitwidth < SOURCE.primitive_bitwidth:
        return address * 2
    else:
        return address


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


# Stochastic rounding.


@triton.jit
def _draws(rounding, row, place):
    # What a segment's random numbers in this step come from: the group's seed, the parameter's index, the step.
    return tl.load(row + SEED).to(tl.int64), (place >> 32).to(tl.int32), tl.load(rounding).to(tl.int32)


@triton.jit
def _noise(draws, at, STREAM: tl.constexpr, TILE: tl.constexpr):
    # [TILE] uint32 below 2^16, for the elements from `at` (a multiple of 8) on: eight numbers from each counter.
    # Philox4x32-7 (Salmon et al., SC 2011). It is written once an element, but elements of the same eight have the same
    # counter, and the compiler computes it once for all of these that a thread holds. That they are the same it sees
    # only in an index that has no other use, hence a range of its own.
    seed, index, step = draws
    lane = tl.arange(0, TILE)
    block = (at >> 3).to(tl.int32) - TILE // 8 + (tl.arange(TILE, 2 * TILE) >> 3)
    a, b, c, d = tl.philox(seed, block, index, step, STREAM, PHILOX_ROUNDS)
    word = tl.where(lane & 4 == 0, tl.where(lane & 2 == 0, a, b), tl.where(lane & 2 == 0, c, d))
    return tl.where(lane & 1 == 0, word & 0xFFFF, word >> 16)


@triton.jit
def _round_stochastically(x, noise, STORAGE: tl.constexpr):
    # A value that the type holds stays, and so do infinities and NaN.
    bits = x.to(tl.uint32, bitcast=True)
    if STORAGE == tl.uint16:  # what is cut off carries into what stays
        return tl.where(x != x, 0x7FC0, (bits + noise) >> 16).to(tl.uint16)
    else:
        noise = noise >> 3  # float16 has 13 bits less than float32
        magnitude = bits & 0x7FFFFFFF
        clamped = tl.minimum(magnitude, 0x47800000)  # 2^16 and beyond are infinity
        normal = ((clamped + noise) >> 13) - (112 << 10)
        units = tl.abs(x) * 16777216.0 + noise.to(tl.float32) * 0.0001220703125  # 2^24, 2^-13
        subnormal = tl.minimum(units, 2048.0).to(tl.uint32)
        finite = tl.where(magnitude < 0x38800000, subnormal, normal)  # 2^-14, the smallest normal number
        rounded = ((bits >> 16) & 0x8000) | tl.where(x != x, 0x7E00, finite)
        return rounded.to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def _rounded(x, draws, at, STREAM: tl.constexpr, STORAGE: tl.constexpr, DRAWN: tl.constexpr):
    # A tile's values as they are stored: to nearest, or stochastically.
    if DRAWN and STORAGE.primitive_bitwidth == 16:
        return _round_stochastically(x, _noise(draws, at, STREAM, x.shape[0]), STORAGE)
    else:
        return _narrow(x, STORAGE)


# Tables.


@triton.jit
def _row(rows, place):
    # That of the segment's group: the lower half of its place; the upper one is the parameter's index.
    return rows + ROW_COLUMNS * (place & 0xFFFFFFFF)


@triton.jit
def _kept(segment, STORAGE: tl.constexpr, SOURCE: tl.constexpr):
    # Where the weights are while they are perturbed: the master, or else the backup.
    if SOURCE != STORAGE:
        return tl.load(segment + MASTER)
    else:
        return tl.load(segment + BACKUP)


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
def _fold(x, LEVELS: tl.constexpr):
    # Sum 2^LEVELS lanes in adjacent pairs.
    for _ in tl.static_range(0, LEVELS):
        x = tl.sum(tl.reshape(x, [x.shape[0] // 2, 2]), axis=1)
    return tl.sum(x)


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
def _larger(a, b):
    # torch.maximum: a NaN on either side stays.
    return tl.where((b > a) | (b != b), b, a)


@triton.jit
def _largest(lanes):
    # The largest of numbers >= 0; a NaN or an infinity stays, also where `tl.max` passes over a NaN.
    finite = lanes - lanes == 0
    return tl.max(tl.where(finite, lanes, 0.0)) + tl.sum(tl.where(finite, 0.0, lanes))


@triton.jit
def _term(x, largest, q):
    # What a number adds to the sum in a norm, (x / m)^q.
    return _raise(x / largest, q)


@triton.jit
def _norm_of(largest, total, q):
    # The q-norm m sum((x / m)^q)^(1/q), where m is the largest; m where that is 0, infinite or NaN.
    return tl.where((largest > 0) & (largest < float("inf")), largest * _raise(total, 1.0 / q), largest)


@triton.jit
def _power_steepest(w, g, metric):
    # T and T g for general p, in float64: rounded to less, T g might exceed the norm, and the power would show it.
    eta, adaptive, _ = metric
    t = tl.where(adaptive, (tl.abs(w) + eta).to(tl.float64), 1.0)
    return t, _loss_gradient(w, g, metric, True).to(tl.float64) * t


@triton.jit
def _sizes(w, g, o, length, metric, WIDE: tl.constexpr):
    # [COUNTED]: |T g| from element `o` on; beyond the chunk's end the gradient is 0, and so is T g.
    at = o + tl.arange(0, COUNTED)
    wide, direction = _widen(_load(w, at, length, 0)), _widen(_load(g, at, length, 0)).to(WIDE)
    return tl.abs(_power_steepest(wide, direction, metric)[1])


@triton.jit
def _chunk_norm(
    source, grad, start, length, row, q,
    SOURCE: tl.constexpr, GRAD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    # The q-norm of a chunk's T g.
    w, g = _pointer(source, start, SOURCE, 0), _pointer(grad, start, GRAD, 0)
    metric = _metric(row, WIDE)
    lanes = tl.zeros([COUNTED], tl.float64)
    o = 0
    while o < length:
        lanes = _larger(lanes, _sizes(w, g, o, length, metric, WIDE))
        o += COUNTED
    largest = _largest(lanes)
    total = tl.zeros([COUNTED], tl.float64)
    o = 0
    while o < length:
        total += _term(_sizes(w, g, o, length, metric, WIDE), largest, q)
        o += COUNTED
    return _norm_of(largest, tl.sum(total), q)


@triton.jit
def _partials_norm(partials, n_chunks, q):
    # The q-norm of the chunks' norms.
    lanes = tl.zeros([COUNTED], tl.float64)
    i = 0
    while i < n_chunks:
        at = i + tl.arange(0, COUNTED)
        lanes = _larger(lanes, tl.load(partials + at, mask=at < n_chunks, other=0.0, cache_modifier=".cg"))
        i += COUNTED
    largest = _largest(lanes)
    total = tl.zeros([COUNTED], tl.float64)
    i = 0
    while i < n_chunks:
        at = i + tl.arange(0, COUNTED)
        total += _term(tl.load(partials + at, mask=at < n_chunks, other=0.0, cache_modifier=".cg"), largest, q)
        i += COUNTED
    return _norm_of(largest, tl.sum(total), q)


@triton.jit
def _total_norm(sums, n_sums, q):
    # The q-norm over all buckets.
    largest = tl.load(sums)
    i = 1
    while i < n_sums:
        largest = _larger(largest, tl.load(sums + i))
        i += 1
    total = tl.full([], 0.0, tl.float64)
    i = 0
    while i < n_sums:
        total += _term(tl.load(sums + i), largest, q)
        i += 1
    return _norm_of(largest, total, q)


@triton.jit
def _chunk_sum(
    source, grad, start, length, row,
    SOURCE: tl.constexpr, GRAD: tl.constexpr, WIDE: tl.constexpr, IN_LOSS: tl.constexpr, ADAPTS: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    # The canonical sum of squares of a chunk's T g.
    w, g = _pointer(source, start, SOURCE, ALIGN), _pointer(grad, start, GRAD, ALIGN)
    lanes = tl.arange(0, LANES)
    acc = tl.zeros([LANES], WIDE)
    if ADAPTS or IN_LOSS:
        if _flag(row, ADAPTIVE) | (IN_LOSS & _flag(row, DECAYS)):
            metric = _metric(row, WIDE)
            for k in tl.static_range(0, CHUNK // LANES):
                o = k * LANES + lanes
                x = _steepest(_widen(_load(w, o, length, ALIGN)), _widen(_load(g, o, length, ALIGN)), metric, IN_LOSS)
                acc = _fma(x, x, acc)
        else:
            acc = _squares(g, lanes, length, acc, ALIGN)
    else:
        acc = _squares(g, lanes, length, acc, ALIGN)
    return _fold(acc, 11)


@triton.jit
def _squares(g, lanes, length, acc, ALIGN: tl.constexpr):
    # The squares of a chunk's gradients, row by row.
    for k in tl.static_range(0, CHUNK // LANES):
        x = _widen(_load(g, k * LANES + lanes, length, ALIGN))
        acc = _fma(x, x, acc)
    return acc


@triton.jit
def _slot_sum(partials, n_chunks):
    # Of the chunks' partial sums: chunk i is added to lane i mod 1,024, then the lanes in adjacent pairs.
    lanes = tl.arange(0, SLOTS)
    acc = tl.zeros([SLOTS], tl.float64)
    i = 0
    while i < n_chunks:
        acc += tl.load(partials + i + lanes, mask=i + lanes < n_chunks, other=0.0, cache_modifier=".cg")
        i += SLOTS
    return _fold(acc, 10)


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
    STORAGE: tl.constexpr, GRAD: tl.constexpr, SOURCE: tl.constexpr, WIDE: tl.constexpr, IN_LOSS: tl.constexpr,
    POWER: tl.constexpr, ADAPTS: tl.constexpr,
):  # fmt: skip
    """Write `sum((T g)^2)` into `out[slot]`; T = 1 (SAM) or abs(w) + eta (ASAM). One program a chunk.

    Reads n (2n adaptive) elements, writes one partial sum a chunk; the last program adds these up, and with `clips`
    writes the clip factor. ADAPTS: whether T may be another than 1 in a group; the code for it takes twice the
    registers. POWER: norms instead of sums, for the exponent q = numbers[0].
    """
    chunk = tl.program_id(0)
    segment, start, length = _chunk(chunks, chunk, n_chunks)
    grad = tl.load(grads + segment)
    total = tl.full([], 0.0, tl.float64)
    if (grad != 0) & (length > 0):
        source = tl.load(segments + SEGMENT_COLUMNS * segment + (MASTER if SOURCE != STORAGE else WEIGHT))
        row = _row(rows, tl.load(segments + SEGMENT_COLUMNS * segment + PLACE))
        if POWER:
            total = _chunk_norm(source, grad, start, length, row, tl.load(numbers), SOURCE, GRAD, WIDE)
        elif ((source | grad) % 16 == 0) & (length == CHUNK):
            total = _chunk_sum(source, grad, start, length, row, SOURCE, GRAD, WIDE, IN_LOSS, ADAPTS, 16).to(tl.float64)
        else:
            total = _chunk_sum(source, grad, start, length, row, SOURCE, GRAD, WIDE, IN_LOSS, ADAPTS, 0).to(tl.float64)
    tl.store(partials + chunk, total, mask=chunk < n_chunks)
    if _arrive(ticket):
        if POWER:
            tl.store(out + slot, _partials_norm(partials, n_chunks, tl.load(numbers)))
        else:
            tl.store(out + slot, _slot_sum(partials, n_chunks))
        if clips != 0:
            tl.debug_barrier()  # what one warp stored is read by all
            scale = tl.load(grad_scale).to(tl.float64)
            tl.store(clip, _clip_factor(tl.load(numbers + 1), _ordered_sum(out, n_sums), scale))


# Copies: the backup without a perturbation, the restore without an update. All bits stay, but for a master's.


@triton.jit
def _copy_tiles(
    to, source, start, tile, end, length,
    STORAGE: tl.constexpr, SOURCE: tl.constexpr, TILE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    to, source = _operand(to, start, STORAGE, SOURCE, ALIGN), _pointer(source, start, SOURCE, ALIGN)
    while tile < end:
        o = tile * TILE + tl.arange(0, TILE)
        x = _load_once(source, o, length, ALIGN)
        if SOURCE != STORAGE:
            x = _narrow(x, STORAGE)
        _store(to, o, x, length, ALIGN)
        tile += 1


@triton.jit
def _copy(to, source, span, STORAGE: tl.constexpr, SOURCE: tl.constexpr, TILE: tl.constexpr):
    start, tile, full, end, length = span
    if (_low_bits(to, STORAGE, SOURCE) | source) % 16 == 0:
        _copy_tiles(to, source, start, tile, full, length, STORAGE, SOURCE, TILE, 16)
        tile = full
    _copy_tiles(to, source, start, tile, end, length, STORAGE, SOURCE, TILE, 0)


# Perturbation.


@triton.jit
def _perturbation_scale(row, sums, n_sums, WIDE: tl.constexpr):
    # 0 (no perturbation) where the norm is not finite: such a step is the base optimizer's.
    norm = tl.sqrt(_ordered_sum(sums, n_sums)) + NORM_EPS
    scale = tl.where(norm < float("inf"), tl.load(row + RHO) / norm, 0.0).to(WIDE)
    return tl.where(_flag(row, MAXIMIZE), -scale, scale)


@triton.jit
def _power_scale(row, sums, n_sums, q):
    # The length of the perturbation, and the norm; for p = inf, q = 1, there is none. The length is rho, shortened by
    # NORM_EPS as for p = 2, and 0 (no perturbation) where the norm is 0 or not finite. NORM_EPS is not added to the
    # norm itself, because the power q - 1 would enlarge its share a thousandfold.
    rho = tl.load(row + RHO)
    norm = tl.full([], 1.0, tl.float64)
    if q != 1:
        norm = _total_norm(sums, n_sums, q)
        rho = tl.where(norm < float("inf"), rho * (norm / (norm + NORM_EPS)), 0.0)
    return tl.where(_flag(row, MAXIMIZE), -rho, rho), norm


@triton.jit
def _power_climb(w, g, climb, metric, q):
    # The perturbation for general p: e = scale T sign(g) (|T g| / norm)^(q - 1); 0 for an element that is not finite.
    scale, norm = climb
    t, x = _power_steepest(w, g, metric)
    length = tl.where(q == 1, tl.where(x != 0, 1.0, 0.0), _raise(tl.abs(x) / norm, q - 1))
    return tl.where(x - x == 0, scale * t * tl.where(x < 0, -length, length), 0.0).to(w.dtype)


@triton.jit
def _power_perturb(
    weight, kept, grad, span, climb, row, draws, q,
    STORAGE: tl.constexpr, GRAD: tl.constexpr, SOURCE: tl.constexpr, WIDE: tl.constexpr, DRAWN: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    start, tile, full, end, length = span
    w, g = _pointer(weight, start, STORAGE, 0), _pointer(grad, start, GRAD, 0)
    kept, metric = _pointer(kept, start, SOURCE, 0), _metric(row, WIDE)
    while tile < end:
        o = tile * TILE + tl.arange(0, TILE)
        direction = _widen(_load(g, o, length, 0)).to(WIDE)
        if SOURCE != STORAGE:
            old = _load(kept, o, length, 0)
        else:
            old = _load(w, o, length, 0)
            _store(kept, o, old, length, 0)
        e = _power_climb(_widen(old), direction, climb, metric, q)
        x = _rounded(_widen(old) + e, draws, start + tile * TILE, CLIMB, STORAGE, DRAWN)
        _store(w, o, x, length, 0)
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
    weight, kept, grad, start, tile, end, length, climb, draws,
    STORAGE: tl.constexpr, GRAD: tl.constexpr, SOURCE: tl.constexpr, DRAWN: tl.constexpr, TILE: tl.constexpr,
    IN_LOSS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    w, g = _operand(weight, start, STORAGE, SOURCE, ALIGN), _operand(grad, start, GRAD, SOURCE, ALIGN)
    kept = _pointer(kept, start, SOURCE, 16)
    while tile < end:
        o = tile * TILE + tl.arange(0, TILE)
        if SOURCE != STORAGE:
            old, direction = _load_once(kept, o, length, ALIGN), _load_once(g, o, length, ALIGN)
        else:
            old, direction = _load_once(w, o, length, ALIGN), _load_once(g, o, length, ALIGN)
            _store_once(kept, o, old, length, ALIGN)
        e = _climb(_widen(old), _widen(direction), climb, IN_LOSS)
        x = _rounded(_widen(old) + e, draws, start + tile * TILE, CLIMB, STORAGE, DRAWN)
        _store(w, o, x, length, ALIGN)
        tile += 1


@triton.jit(do_not_specialize=list(range(11)))
def _perturb_kernel(
    segments, chunks, grads, rows, sums, numbers, overflows, rounding, n_sums, n_chunks, split,
    STORAGE: tl.constexpr, GRAD: tl.constexpr, SOURCE: tl.constexpr, WIDE: tl.constexpr, DRAWN: tl.constexpr,
    TILE: tl.constexpr, IN_LOSS: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    """Back the weights up and climb: w <- w + e(w), e = rho T^2 g / (norm + NORM_EPS). `split` programs a chunk.

    Foret et al., arXiv 2010.01412, eq. 2; with T = abs(w) + eta Kwon et al., arXiv 2102.11600.

    Reads 2n elements, writes 2n elements, n where a master is the backup.
    """
    part = tl.num_programs(0) - 1 - tl.program_id(0)  # backwards: the gradients read last are still in the cache
    index, span = _part(chunks, part, split, n_chunks, TILE)
    start, tile, full, end, length = span
    grad = tl.load(grads + index)
    if tl.program_id(0) == 0:
        total = _total_norm(sums, n_sums, tl.load(numbers)) if POWER else _ordered_sum(sums, n_sums)
        tl.store(overflows, tl.load(overflows) + 1, mask=total - total != 0)
    if (grad != 0) & (tile < end):
        segment = segments + SEGMENT_COLUMNS * index
        weight, kept, place = tl.load(segment + WEIGHT), _kept(segment, STORAGE, SOURCE), tl.load(segment + PLACE)
        row = _row(rows, place)
        draws = _draws(rounding, row, place)
        if POWER:
            q = tl.load(numbers)
            power_climb = _power_scale(row, sums, n_sums, q)
            if power_climb[0] == 0:
                if SOURCE == STORAGE:  # else the weight is its master, rounded, already
                    _copy(kept, weight, span, STORAGE, STORAGE, TILE)
            else:
                _power_perturb(
                    weight, kept, grad, span, power_climb, row, draws, q, STORAGE, GRAD, SOURCE, WIDE, DRAWN, TILE
                )
        else:
            scale = _perturbation_scale(row, sums, n_sums, WIDE)
            if scale == 0:  # a branch, never a product: 0 * inf is NaN
                if SOURCE == STORAGE:
                    _copy(kept, weight, span, STORAGE, STORAGE, TILE)
            else:
                climb = scale, _metric(row, WIDE)
                bits = _low_bits(weight, STORAGE, SOURCE) | _low_bits(grad, GRAD, SOURCE)
                if bits % 16 == 0:
                    _perturb_tiles(
                        weight, kept, grad, start, tile, full, length, climb, draws,
                        STORAGE, GRAD, SOURCE, DRAWN, TILE, IN_LOSS, 16,
                    )  # fmt: skip
                    tile = full
                elif bits % 8 == 0:
                    _perturb_tiles(
                        weight, kept, grad, start, tile, full, length, climb, draws,
                        STORAGE, GRAD, SOURCE, DRAWN, TILE, IN_LOSS, 8,
                    )  # fmt: skip
                    tile = full
                _perturb_tiles(
                    weight, kept, grad, start, tile, end, length, climb, draws,
                    STORAGE, GRAD, SOURCE, DRAWN, TILE, IN_LOSS, 0,
                )  # fmt: skip


# Update.


@triton.jit
def _gradient(g, factors):
    # Without its loss scale, times the clip factor, uphill if maximized. Factors of 1 and -1 change no bits; a clip
    # factor of 0 clears the gradient, whatever it was.
    inverse, clip = factors
    return tl.where(clip == 0, 0.0, (g * inverse) * clip)


@triton.jit
def _update_tiles(
    segment, source, grad, start, tile, end, length, factors, scalars, draws,
    RULE: tl.constexpr, STATES: tl.constexpr, STORAGE: tl.constexpr, GRAD: tl.constexpr, SOURCE: tl.constexpr,
    STATE: tl.constexpr, DRAWN: tl.constexpr, TILE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    to = _operand(tl.load(segment + WEIGHT), start, STORAGE, SOURCE, ALIGN)
    source, grad = _pointer(source, start, SOURCE, ALIGN), _operand(grad, start, GRAD, SOURCE, ALIGN)
    if STATES & 1:
        state0 = _operand(tl.load(segment + STATE0), start, STATE, SOURCE, 16)
    if STATES & 2:
        state1 = _operand(tl.load(segment + STATE1), start, STATE, SOURCE, 16)
    if STATES & 4:
        state2 = _operand(tl.load(segment + STATE2), start, STATE, SOURCE, 16)
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
        at = start + tile * TILE
        if SOURCE != STORAGE:
            _store(source, o, w, length, ALIGN)
            _store(to, o, _narrow(w, STORAGE), length, ALIGN)
        else:
            _store(to, o, _rounded(w, draws, at, STEP, STORAGE, DRAWN), length, ALIGN)
        if STATES & 1:
            _store(state0, o, _rounded(s0, draws, at, STATES0, STATE, DRAWN), length, ALIGN)
        if STATES & 2:
            _store(state1, o, _rounded(s1, draws, at, STATES0 + 1, STATE, DRAWN), length, ALIGN)
        if STATES & 4:
            _store(state2, o, _rounded(s2, draws, at, STATES0 + 2, STATE, DRAWN), length, ALIGN)
        tile += 1


@triton.jit
def _update_part(
    segment, source, grad, span, factors, scalars, draws,
    RULE: tl.constexpr, STATES: tl.constexpr, STORAGE: tl.constexpr, GRAD: tl.constexpr, SOURCE: tl.constexpr,
    STATE: tl.constexpr, DRAWN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    start, tile, full, end, length = span
    bits = source | _low_bits(tl.load(segment + WEIGHT), STORAGE, SOURCE) | _low_bits(grad, GRAD, SOURCE)
    if bits % 16 == 0:
        _update_tiles(
            segment, source, grad, start, tile, full, length, factors, scalars, draws,
            RULE, STATES, STORAGE, GRAD, SOURCE, STATE, DRAWN, TILE, 16,
        )  # fmt: skip
        tile = full
    elif bits % 8 == 0:
        _update_tiles(
            segment, source, grad, start, tile, full, length, factors, scalars, draws,
            RULE, STATES, STORAGE, GRAD, SOURCE, STATE, DRAWN, TILE, 8,
        )  # fmt: skip
        tile = full
    _update_tiles(
        segment, source, grad, start, tile, end, length, factors, scalars, draws,
        RULE, STATES, STORAGE, GRAD, SOURCE, STATE, DRAWN, TILE, 0,
    )  # fmt: skip


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
def _count(segments, grads, rows, n_segments, RULE: tl.constexpr):
    # Advance the step counts of segments with a gradient, empty ones too; SGD counts the steps with momentum only,
    # NAdam also multiplies its momenta.
    i = 0
    while i < n_segments:
        segment = (i + tl.arange(0, COUNTED)).to(tl.int64)
        there = segment < n_segments
        counts = tl.load(grads + segment, mask=there, other=0) != 0
        row = _row(rows, tl.load(segments + SEGMENT_COLUMNS * segment + PLACE, mask=there, other=0))
        if RULE == SGD:
            counts = counts & (tl.load(row + BETA1, mask=there, other=0.0) != 0)
        place = tl.load(segments + SEGMENT_COLUMNS * segment + PROGRESS, mask=there, other=0)
        progress = place.to(tl.pointer_type(tl.float32))
        step = tl.load(progress, mask=counts, other=0.0) + 1.0
        tl.store(progress, step, mask=counts)
        if RULE == NADAM:
            beta1, q = tl.load(row + BETA1, mask=there, other=0.0), tl.load(row + EXTRA, mask=there, other=0.0)
            mu = beta1 * (1.0 - 0.5 * _powers(q, step.to(tl.int32)))
            product = tl.load(progress + 1, mask=counts, other=0.0)
            tl.store(progress + 1, product * mu.to(tl.float32), mask=counts)
        i += COUNTED


@triton.jit(do_not_specialize=list(range(14)))
def _update_kernel(
    segments, chunks, grads, rows, perturbed, ticket, grad_scale, found_inf, clip, overflows, rounding, n_segments,
    n_chunks, split, RULE: tl.constexpr, STATES: tl.constexpr, STORAGE: tl.constexpr, GRAD: tl.constexpr,
    SOURCE: tl.constexpr, STATE: tl.constexpr, WIDE: tl.constexpr, DRAWN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Return to the old weights and take the base optimizer's step from there. `split` programs a chunk.

    | perturbed | gradient | found_inf | weights                | state, step count |
    | --------- | -------- | --------- | ---------------------- | ----------------- |
    | yes       | yes      | 0         | rule(backup)           | updated, + 1      |
    | yes       | yes      | 1         | backup                 | untouched         |
    | yes       | no       | any       | backup                 | untouched         |
    | no        | yes      | 0         | rule(w)                | updated, + 1      |
    | no        | yes      | 1         | untouched              | untouched         |

    Reads 2n elements and the states, writes n elements (masters, too) and the states; STATES is the set that the groups
    here have. A master is the backup. The last program takes the random numbers one step further.
    """
    LEAST: tl.constexpr = 0 if RULE == SGD else 3 if RULE == ADAM else 1 if RULE == RMSPROP else STATES  # of any group
    SEVERAL: tl.constexpr = RULE == RMSPROP and STATES == 7  # sets between
    part = tl.program_id(0)
    index, span = _part(chunks, part, split, n_chunks, TILE)
    segment = segments + SEGMENT_COLUMNS * index
    grad = tl.load(grads + index)
    restores = tl.load(perturbed + index) != 0
    kept = _kept(segment, STORAGE, SOURCE)
    if RULE == NO_RULE:
        if restores:
            _copy(tl.load(segment + WEIGHT), kept, span, STORAGE, SOURCE, TILE)
    else:
        # All programs read their segment's count, and the step of the random numbers, before they arrive: the last one
        # may advance both.
        counts = tl.load(segment + PROGRESS).to(tl.pointer_type(tl.float32))
        progress = tl.load(counts), tl.load(counts + 1)
        place = tl.load(segment + PLACE)
        row = _row(rows, place)
        draws = _draws(rounding, row, place)
        overflow = tl.load(found_inf) != 0
        if _arrive(ticket):
            if overflow == 0:
                _count(segments, grads, rows, n_segments, RULE)
            else:
                tl.store(overflows + 1, tl.load(overflows + 1) + 1)
            if DRAWN:
                tl.store(rounding, tl.load(rounding) + 1)
        if (grad != 0) & (overflow == 0):
            source = kept
            if SOURCE == STORAGE:
                source = tl.where(restores, kept, tl.load(segment + WEIGHT))
            inverse = (1.0 / tl.load(grad_scale).to(tl.float64)).to(WIDE)
            factors = tl.where(_flag(row, MAXIMIZE), -inverse, inverse), tl.load(clip).to(WIDE)
            scalars, states = _scalars(row, progress, RULE, WIDE), _states(row, RULE)
            if STATES == LEAST:
                _update_part(
                    segment, source, grad, span, factors, scalars, draws,
                    RULE, LEAST, STORAGE, GRAD, SOURCE, STATE, DRAWN, TILE,
                )  # fmt: skip
            elif states == LEAST:
                _update_part(
                    segment, source, grad, span, factors, scalars, draws,
                    RULE, LEAST, STORAGE, GRAD, SOURCE, STATE, DRAWN, TILE,
                )  # fmt: skip
            elif SEVERAL:
                if states == 3:
                    _update_part(
                        segment, source, grad, span, factors, scalars, draws,
                        RULE, 3, STORAGE, GRAD, SOURCE, STATE, DRAWN, TILE,
                    )  # fmt: skip
                elif states == 5:
                    _update_part(
                        segment, source, grad, span, factors, scalars, draws,
                        RULE, 5, STORAGE, GRAD, SOURCE, STATE, DRAWN, TILE,
                    )  # fmt: skip
                else:
                    _update_part(
                        segment, source, grad, span, factors, scalars, draws,
                        RULE, 7, STORAGE, GRAD, SOURCE, STATE, DRAWN, TILE,
                    )  # fmt: skip
            else:
                _update_part(
                    segment, source, grad, span, factors, scalars, draws,
                    RULE, STATES, STORAGE, GRAD, SOURCE, STATE, DRAWN, TILE,
                )  # fmt: skip
        elif restores:
            _copy(tl.load(segment + WEIGHT), kept, span, STORAGE, SOURCE, TILE)


# Gradients and directions: operands of any dtype. What each one is stored as, its kind, is told when the kernel runs:
# WIDE, which is also what is computed in, or one of the two types of 16 bits where NARROW says that there may be any.
# One kernel so serves all dtypes, and what is not there (address 0) is not read.


@triton.jit
def _kind(kinds, INDEX: tl.constexpr):
    return (kinds >> 2 * INDEX) & 3


@triton.jit
def _low_bits_of(address, kind, NARROW: tl.constexpr):
    # Zero modulo ALIGN where `_places` may be told ALIGN: accesses have as many elements, whatever these are stored as.
    if NARROW:
        return tl.where(kind == 0, address, address * 2)
    else:
        return address


@triton.jit
def _places(address, kind, start, WIDE: tl.constexpr, NARROW: tl.constexpr, ALIGN: tl.constexpr):
    # Where an operand is, as WIDE and as 16 bits: the addresses, one of which is 0, and the pointers.
    wide, narrow = address, address
    if NARROW:
        wide, narrow = tl.where(kind == 0, address, 0), tl.where(kind == 0, 0, address)
    return wide, _pointer(wide, start, WIDE, ALIGN), narrow, _pointer(narrow, start, tl.uint16, ALIGN // 2)


@triton.jit
def _mask(address, o, length, ALIGN: tl.constexpr):
    # Where they are aligned, the same for all elements: wide accesses stay whole.
    there = tl.broadcast_to(address, o.shape) != 0
    if ALIGN > 0:
        return there
    else:
        return (o < length) & there


@triton.jit
def _load_of(places, kind, o, length, NARROW: tl.constexpr, ALIGN: tl.constexpr):
    # An operand's values, widened; 0 where it is not there.
    at_wide, wide, at_narrow, narrow = places
    x = tl.load(wide + o, mask=_mask(at_wide, o, length, ALIGN), other=0.0)
    if NARROW:
        bits = tl.load(narrow + o, mask=_mask(at_narrow, o, length, ALIGN), other=0)
        half = tl.where(kind == BFLOAT16, _widen(bits), _widen(bits.to(tl.float16, bitcast=True)))
        x = tl.where(at_narrow != 0, half, x)
    return x


@triton.jit
def _store_of(places, kind, o, x, length, NARROW: tl.constexpr, ALIGN: tl.constexpr):
    # Values, rounded to nearest.
    at_wide, wide, at_narrow, narrow = places
    tl.store(wide + o, x, mask=_mask(at_wide, o, length, ALIGN))
    if NARROW:
        half = _narrow(x, tl.float16).to(tl.uint16, bitcast=True)
        bits = tl.where(kind == BFLOAT16, _narrow(x, tl.uint16), half)
        tl.store(narrow + o, bits, mask=_mask(at_narrow, o, length, ALIGN))


# The scalar products.


@triton.jit
def _row_of(lefts, rights, kinds, k, length, NARROW: tl.constexpr, ALIGN: tl.constexpr):
    # The k-th row of lanes of both operands.
    o = k * LANES + tl.arange(0, LANES)
    x = _load_of(lefts, _kind(kinds, 0), o, length, NARROW, ALIGN)
    return x, _load_of(rights, _kind(kinds, 1), o, length, NARROW, ALIGN)


@triton.jit
def _chunk_dots(a, b, kinds, start, length, WIDE: tl.constexpr, NARROW: tl.constexpr, ALIGN: tl.constexpr):
    # The canonical sums of a a, a b and b b over a chunk; a sum of what is not there is 0.
    lefts = _places(a, _kind(kinds, 0), start, WIDE, NARROW, ALIGN)
    rights = _places(b, _kind(kinds, 1), start, WIDE, NARROW, ALIGN)
    x, y = _row_of(lefts, rights, kinds, 0, length, NARROW, ALIGN)
    aa, ab, bb = x * x, x * y, y * y
    if NARROW and ALIGN == 0:  # not unrolled, which would take half as many registers again
        k = 1
        while k * LANES < length:
            x, y = _row_of(lefts, rights, kinds, k, length, NARROW, ALIGN)
            aa, ab, bb = _fma(x, x, aa), _fma(x, y, ab), _fma(y, y, bb)
            k += 1
    else:
        for k in tl.static_range(1, CHUNK // LANES):
            x, y = _row_of(lefts, rights, kinds, k, length, NARROW, ALIGN)
            aa, ab, bb = _fma(x, x, aa), _fma(x, y, ab), _fma(y, y, bb)
    both = (a != 0) & (b != 0)  # x y is NaN where one is infinite and the other not there
    return _fold(aa, 11), tl.where(both, _fold(ab, 11), 0.0), _fold(bb, 11)


@triton.jit(do_not_specialize=list(range(10)))
def _dot_kernel(
    chunks, a_grads, b_grads, partials, ticket, out, kinds, pairs, slot, n_chunks,
    WIDE: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Write `sum(a a)`, `sum(a b)` and `sum(b b)` into `out[slot]`. One program a chunk.

    Reads 2n elements, n where `pairs` is 0 (there is no b, and its sums are 0), writes three partial sums a chunk; the
    last program adds these up.
    """
    chunk = tl.program_id(0)
    segment, start, length = _chunk(chunks, chunk, n_chunks)
    a = tl.load(a_grads + segment)
    b = tl.load(b_grads + segment, mask=pairs != 0, other=0)
    aa = tl.full([], 0.0, tl.float64)
    ab, bb = aa, aa
    if ((a | b) != 0) & (length > 0):
        bits = _low_bits_of(a, _kind(kinds, 0), NARROW) | _low_bits_of(b, _kind(kinds, 1), NARROW)
        if (bits % 16 == 0) & (length == CHUNK):
            sums = _chunk_dots(a, b, kinds, start, length, WIDE, NARROW, 16)
        else:
            sums = _chunk_dots(a, b, kinds, start, length, WIDE, NARROW, 0)
        aa, ab, bb = sums[0].to(tl.float64), sums[1].to(tl.float64), sums[2].to(tl.float64)
    there = chunk < n_chunks
    tl.store(partials + chunk, aa, mask=there)
    tl.store(partials + n_chunks + chunk, ab, mask=there)
    tl.store(partials + 2 * n_chunks + chunk, bb, mask=there)
    if _arrive(ticket):
        for k in tl.static_range(0, 3):
            tl.store(out + 3 * slot + k, _slot_sum(partials + k * n_chunks, n_chunks))


# Linear combinations.


@triton.jit
def _term_of(grads, segment, at, number, WIDE: tl.constexpr):
    # A coefficient, which stands at an address or is a number, told by its 64 bits; and where its operand is: 0 if the
    # term is left out, also because of its coefficient, as 0 * inf is NaN.
    c = number.to(tl.int64).to(tl.float64, bitcast=True)
    if at != 0:
        c = tl.load(at.to(tl.int64).to(tl.pointer_type(tl.float64)))
    c = c.to(WIDE)
    return c, tl.where(c != 0, tl.load(grads + segment), 0)


@triton.jit
def _with_term(total, begun, c, x, there):
    # The first term is a product; what is left out changes nothing.
    return tl.where(there, tl.where(begun, _fma(c, x, total), c * x), total)


@triton.jit
def _combine_tiles(
    to, terms, factors, kinds, start, tile, end, length,
    WIDE: tl.constexpr, NARROW: tl.constexpr, TILE: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    t0, t1, t2 = terms
    c0, c1, c2 = factors
    kind, kind0, kind1, kind2 = _kind(kinds, 0), _kind(kinds, 1), _kind(kinds, 2), _kind(kinds, 3)
    to = _places(to, kind, start, WIDE, NARROW, ALIGN)
    places0 = _places(t0, kind0, start, WIDE, NARROW, ALIGN)
    places1 = _places(t1, kind1, start, WIDE, NARROW, ALIGN)
    places2 = _places(t2, kind2, start, WIDE, NARROW, ALIGN)
    while tile < end:
        o = tile * TILE + tl.arange(0, TILE)
        x0 = _load_of(places0, kind0, o, length, NARROW, ALIGN)
        x1 = _load_of(places1, kind1, o, length, NARROW, ALIGN)
        x2 = _load_of(places2, kind2, o, length, NARROW, ALIGN)
        total = tl.where(t0 != 0, c0 * x0, 0.0)
        total = _with_term(total, t0 != 0, c1, x1, t1 != 0)
        total = _with_term(total, (t0 | t1) != 0, c2, x2, t2 != 0)
        _store_of(to, kind, o, total, length, NARROW, ALIGN)
        tile += 1


@triton.jit(do_not_specialize=list(range(14)))
def _combine_kernel(
    chunks, outs, grads0, grads1, grads2, at0, at1, at2, number0, number1, number2, kinds, n_chunks, split,
    WIDE: tl.constexpr, NARROW: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write c0 x0 + c1 x1 + c2 x2, term by term, where `outs` has an address. `split` programs a chunk.

    Reads n elements for each term whose coefficient is not 0, writes n elements. A coefficient is float64 at the
    address `at`, or where that is 0 the number with the bits `number`: a number itself would come as float32.
    """
    part = tl.program_id(0)
    segment, span = _part(chunks, part, split, n_chunks, TILE)
    start, tile, full, end, length = span
    to = tl.load(outs + segment)
    if (to != 0) & (tile < end):
        c0, t0 = _term_of(grads0, segment, at0, number0, WIDE)
        c1, t1 = _term_of(grads1, segment, at1, number1, WIDE)
        c2, t2 = _term_of(grads2, segment, at2, number2, WIDE)
        factors, terms = (c0, c1, c2), (t0, t1, t2)
        bits = _low_bits_of(to, _kind(kinds, 0), NARROW) | _low_bits_of(t0, _kind(kinds, 1), NARROW)
        bits = bits | _low_bits_of(t1, _kind(kinds, 2), NARROW) | _low_bits_of(t2, _kind(kinds, 3), NARROW)
        if bits % 16 == 0:
            _combine_tiles(to, terms, factors, kinds, start, tile, full, length, WIDE, NARROW, TILE, 16)
            tile = full
        elif bits % 8 == 0:
            _combine_tiles(to, terms, factors, kinds, start, tile, full, length, WIDE, NARROW, TILE, 8)
            tile = full
        _combine_tiles(to, terms, factors, kinds, start, tile, end, length, WIDE, NARROW, TILE, 0)
