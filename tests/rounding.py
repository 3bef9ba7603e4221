"""The rounding plan in NumPy, stated independently of fastsam, and buckets made by hand to run operations on."""

import ctypes
import mmap
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch

from fastsam.bases.rules import (
    ADAGRAD,
    ADAM,
    ADAPTIVE,
    AMSGRAD,
    CENTERED,
    DECOUPLED,
    LION,
    MAXIMIZE,
    NADAM,
    NESTEROV,
    RADAM,
    RMSPROP,
    SGD,
    Row,
)
from fastsam.ops import native
from fastsam.ops.formats import MIXED_DTYPES, Format

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = DTYPES
MIXED = sorted(MIXED_DTYPES, key=str)
PLAIN = [Format(dtype, dtype, dtype, dtype) for dtype in DTYPES]
MASTERS = [Format(low, grad, FLOAT32, FLOAT32) for low in (BFLOAT16, FLOAT16) for grad in (low, FLOAT32)]
STOCHASTIC = [  # without masters, and with states narrower than what they are computed in
    *(Format(low, low, low, low, True) for low in (BFLOAT16, FLOAT16)),
    *(Format(dtype, dtype, FLOAT32, BFLOAT16, True) for dtype in (FLOAT32, BFLOAT16, FLOAT16)),
]
SIZES = [0, 1, 3, 63, 64, 65, 2047, 2048, 8191, 8192, 8193, 3 * 8192 + 5]
CHUNK = 8192
STEPS = 3

# (rule, lr, weight_decay, beta1 or momentum, beta2 or dampening or alpha, eps, flags, extra)
OPTIONS = {
    "sgd": (SGD, 0.07, 0.013, 0.0, 0.3, 0.0, 0, 0.0),
    "sgd-dampening": (SGD, 0.07, 0.0, 0.83, 0.3, 0.0, 0, 0.0),
    "sgd-nesterov-maximize": (SGD, 0.07, 0.013, 0.83, 0.0, 0.0, NESTEROV | MAXIMIZE, 0.0),
    "adam": (ADAM, 0.02, 0.013, 0.83, 0.97, 1e-5, 0, 0.0),
    "adam-far-lerp": (ADAM, 0.02, 0.0, 0.41, 0.97, 1e-5, 0, 0.0),
    "adamw": (ADAM, 0.02, 0.13, 0.83, 0.97, 1e-5, DECOUPLED, 0.0),
    "adamw-amsgrad-maximize": (ADAM, 0.02, 0.13, 0.83, 0.97, 1e-5, DECOUPLED | AMSGRAD | MAXIMIZE, 0.0),
    "rmsprop": (RMSPROP, 0.02, 0.013, 0.0, 0.93, 1e-4, 0, 0.0),
    "rmsprop-momentum-maximize": (RMSPROP, 0.02, 0.013, 0.83, 0.93, 1e-4, MAXIMIZE, 0.0),
    "rmsprop-centered": (RMSPROP, 0.02, 0.0, 0.0, 0.93, 1e-2, CENTERED, 0.0),
    "rmsprop-centered-momentum-far-lerp": (RMSPROP, 0.02, 0.013, 0.83, 0.41, 1e-2, CENTERED, 0.0),
    "nadam": (NADAM, 0.02, 0.013, 0.83, 0.97, 1e-5, 0, 0.96**0.2),
    "nadam-decoupled-maximize": (NADAM, 0.02, 0.13, 0.41, 0.97, 1e-5, DECOUPLED | MAXIMIZE, 0.96**0.3),
    "radam": (RADAM, 0.02, 0.013, 0.83, 0.97, 1e-5, 0, 0.0),
    "radam-rectified": (RADAM, 0.02, 0.0, 0.83, 0.999, 1e-5, 0, 0.0),
    "radam-decoupled-maximize": (RADAM, 0.02, 0.13, 0.41, 0.97, 1e-5, DECOUPLED | MAXIMIZE, 0.0),
    "lion": (LION, 0.02, 0.0, 0.83, 0.97, 0.0, 0, 0.0),
    "lion-decay-maximize-far-lerp": (LION, 0.02, 0.13, 0.41, 0.37, 0.0, MAXIMIZE, 0.0),
    "adagrad": (ADAGRAD, 0.07, 0.0, 0.0, 0.0, 1e-4, 0, 0.11),
    "adagrad-decay-maximize": (ADAGRAD, 0.07, 0.013, 0.0, 0.0, 1e-4, MAXIMIZE, 0.11),
}
STARTS = {"radam-rectified": 7.0}  # the count before the first step: RAdam has a denominator from step 6 on
INITIAL = {ADAGRAD: 0.375}  # of the states; the others begin with 0
PERTURBATIONS = [(0.11, 0.0, 0), (0.7, 0.0, ADAPTIVE), (0.5, 0.03, ADAPTIVE)]  # (rho, eta, flags), a group each


SEED, FIRST_DRAW = 3 * 2**33 + 12345, 2**32 + 5  # of group 0; the step of the random numbers, of which 32 bits count


def rows_of(option):
    _, lr, weight_decay, beta1, beta2, eps, flags, extra = OPTIONS[option]
    return [
        Row(lr, weight_decay, beta1, beta2, eps, rho, eta, flags | more, extra, seed=SEED + group)
        for group, (rho, eta, more) in enumerate(PERTURBATIONS)
    ]


def mixed(dtype, grad_dtype):
    """The format of weights with gradients of another dtype."""
    return Format(dtype, grad_dtype, dtype, dtype)


def label(format):
    """A short name for a test's parameter."""
    names = [str(dtype).removeprefix("torch.").replace("float", "f") for dtype in format[:4]]
    return "-".join(names) + "-drawn" * format.stochastic


def slots_of(option):
    """Which of the three states the option reads and writes; the others must not be touched."""
    rule, _, _, beta1, _, _, flags, _ = OPTIONS[option]
    if rule is SGD:
        return {0} if beta1 else set()
    if rule is ADAM:
        return {0, 1, 2} if flags & AMSGRAD else {0, 1}
    if rule is RMSPROP:
        return {0} | ({1} if beta1 else set()) | ({2} if flags & CENTERED else set())
    return {0} if rule in (ADAGRAD, LION) else {0, 1}


# ---- The plan: one rounding a line, in float32 (float64 for float64).


def fma(a, b, c):
    """One rounding, whatever the size of the terms: the exact terms are added to odd, and the sum is rounded."""
    a, b, c = np.broadcast_arrays(a, b, c)
    if c.dtype != np.float64:
        return odd_sum(a.astype(np.float64) * b, c.astype(np.float64)).astype(np.float32)
    # Boldo and Melquiond, Emulation of a FMA and correctly rounded sums (2008).
    with np.errstate(all="ignore"):
        plain = a * b + c
        product, low = two_product(a, b)
        total, error = two_sum(c, low)
        total, more = two_sum(product, total)
        exact = total + odd_sum(error, more)
    return np.where(np.isfinite(exact) & (exact != plain), exact, plain)  # a zero has its sign


def two_sum(a, b):
    """a + b rounded, and what is missing."""
    with np.errstate(invalid="ignore"):
        total = a + b
        virtual = total - a
        return total, (a - (total - virtual)) + (b - virtual)


def two_product(a, b):
    """a * b rounded, and what is missing: Dekker's, of halves of 26 bits."""
    product = a * b
    (a1, a2), (b1, b2) = ((x * 134217729.0 - (x * 134217729.0 - x), x) for x in (a, b))
    a2, b2 = a2 - a1, b2 - b1
    return product, ((a1 * b1 - product) + a1 * b2 + a2 * b1) + a2 * b2


def odd_sum(a, b):
    """a + b, rounded to odd where it is not exact: one more rounding, to less, then is the only one."""
    total, error = two_sum(a, b)
    bits = np.asarray(total).view(np.int64)
    inexact = np.isfinite(error) & (error != 0) & (bits & 1 == 0)
    return np.where(inexact, bits + np.where((error > 0) == (total > 0), 1, -1), bits).view(np.float64)


def power(base, n):
    result = 1.0
    while n:
        if n & 1:
            result *= base
        base, n = base * base, n >> 1
    return result


def fold(x):
    while x.shape[-1] > 1:
        x = x[..., 0::2] + x[..., 1::2]
    return x[..., 0]


def canonical_sum(tensors):
    """The sum of squares of 1-D arrays, each in chunks of 4 rows of 2,048 lanes, then 1,024 float64 lanes of chunks."""
    slots, index = np.zeros(1024), 0
    for x in tensors:
        for start in range(0, len(x), CHUNK):
            rows = np.zeros(CHUNK, x.dtype)
            rows[: len(x[start : start + CHUNK])] = x[start : start + CHUNK]
            acc = np.zeros(2048, x.dtype)
            for row in rows.reshape(4, 2048):
                acc = fma(row, row, acc)
            slots[index % 1024] += np.float64(fold(acc))
            index += 1
    return fold(slots)


def steepest(w, g, row):
    if not row.flags & ADAPTIVE:
        return g
    return np.abs(w) * g if row.eta == 0 else (np.abs(w) + w.dtype.type(row.eta)) * g


def climb(w, g, row, total):
    cast, norm = w.dtype.type, np.sqrt(total) + 1e-12
    scale = cast(row.rho / norm if np.isfinite(norm) else 0.0) * (-1 if row.flags & MAXIMIZE else 1)
    if scale == 0:
        return w
    t = np.abs(w) + cast(row.eta)
    t2g = ((w * w) * g if row.eta == 0 else t * (t * g)) if row.flags & ADAPTIVE else g
    return w + t2g * scale


def sgd(w, g, state, t, row):
    cast = w.dtype.type
    g = -g if row.flags & MAXIMIZE else g
    g = fma(cast(row.weight_decay), w, g) if row.weight_decay else g
    if row.beta1:
        buf = g if t == 1 else fma(cast(1 - row.beta2), g, state[0] * cast(row.beta1))
        state = [buf, *state[1:]]
        g = fma(cast(row.beta1), buf, g) if row.flags & NESTEROV else buf
    return fma(cast(-row.lr), g, w), state


def adam(w, g, state, t, row):
    cast = w.dtype.type
    m, v, largest = state[:3]
    g = -g if row.flags & MAXIMIZE else g
    if row.flags & DECOUPLED:
        w = w * cast(1 - row.lr * row.weight_decay)
    elif row.weight_decay:
        g = fma(cast(row.weight_decay), w, g)
    weight = cast(1 - row.beta1)
    m = fma(weight, g - m, m) if weight < 0.5 else fma(weight - cast(1), g - m, g)
    v = fma(cast(1 - row.beta2) * g, g, v * cast(row.beta2))
    largest = np.maximum(largest, v) if row.flags & AMSGRAD else largest
    denom = np.sqrt(largest if row.flags & AMSGRAD else v) / cast(np.sqrt(1 - power(row.beta2, t))) + cast(row.eps)
    return w + (cast(-(row.lr / (1 - power(row.beta1, t)))) * m) / denom, [m, v, largest]


def lerp(a, b, weight):
    return fma(weight, b - a, a) if weight < 0.5 else fma(weight - a.dtype.type(1), b - a, b)


def rmsprop(w, g, state, t, row):
    cast = w.dtype.type
    v, buf, mean = state[:3]
    g = -g if row.flags & MAXIMIZE else g
    g = fma(cast(row.weight_decay), w, g) if row.weight_decay else g
    v = fma(cast(1 - row.beta2) * g, g, v * cast(row.beta2))
    second = v
    if row.flags & CENTERED:
        mean = lerp(mean, g, cast(1 - row.beta2))
        second = fma(-mean, mean, v)
    denom = np.sqrt(second) + cast(row.eps)
    if row.beta1:
        buf = buf * cast(row.beta1) + g / denom
        return fma(cast(-row.lr), buf, w), [v, buf, mean]
    return w + (cast(-row.lr) * g) / denom, [v, buf, mean]


def adagrad(w, g, state, t, row):
    cast = w.dtype.type
    g = -g if row.flags & MAXIMIZE else g
    g = fma(cast(row.weight_decay), w, g) if row.weight_decay else g
    total = fma(g, g, state[0])
    denom = np.sqrt(total) + cast(row.eps)
    return w + (cast(-(row.lr / (1 + (t - 1) * row.extra))) * g) / denom, [total, *state[1:]]


def moments(w, g, state, row):
    """Weight decay and the two moments of Adam's family."""
    cast = w.dtype.type
    g = -g if row.flags & MAXIMIZE else g
    if row.flags & DECOUPLED:
        w = w * cast(1 - row.lr * row.weight_decay)
    elif row.weight_decay:
        g = fma(cast(row.weight_decay), w, g)
    m = lerp(state[0], g, cast(1 - row.beta1))
    v = fma(cast(1 - row.beta2) * g, g, state[1] * cast(row.beta2))
    return w, g, m, v


def nadam(w, g, state, t, row):
    cast = w.dtype.type
    w, g, m, v = moments(w, g, state, row)
    mu, after = (row.beta1 * (1 - 0.5 * power(row.extra, n)) for n in (t, t + 1))
    product = state[3] * np.float32(mu)
    denom = np.sqrt(v / cast(1 - power(row.beta2, t))) + cast(row.eps)
    w = w + (cast(-row.lr * (1 - mu) / (1 - float(product))) * g) / denom
    return w + (cast(-row.lr * after / (1 - float(product) * after)) * m) / denom, [m, v, state[2], product]


def radam(w, g, state, t, row):
    cast = w.dtype.type
    w, g, m, v = moments(w, g, state, row)
    u = (m / cast(1 - power(row.beta1, t))) * cast(row.lr)
    left, longest = 1 - power(row.beta2, t), 2 / (1 - row.beta2) - 1
    rho = longest - 2 * t * power(row.beta2, t) / left
    if rho > 5:
        rect = np.sqrt((rho - 4) * (rho - 2) * longest / ((longest - 4) * (longest - 2) * rho))
        u = (u * ((cast(1) / (np.sqrt(v) + cast(row.eps))) * cast(np.sqrt(left)))) * cast(rect)
    return w - u, [m, v, state[2]]


def lion(w, g, state, t, row):
    cast, m = w.dtype.type, state[0]
    g = -g if row.flags & MAXIMIZE else g
    update = np.sign(lerp(m, g, cast(1 - row.beta1)))
    w = w * cast(1 - row.lr * row.weight_decay) if row.weight_decay else w
    return fma(cast(-row.lr), update, w), [lerp(m, g, cast(1 - row.beta2)), *state[1:3]]


FORMULAS = {SGD: sgd, ADAM: adam, RMSPROP: rmsprop, ADAGRAD: adagrad, NADAM: nadam, RADAM: radam, LION: lion}

# ---- Stochastic rounding.


def philox(counter, key, rounds=7):
    """Philox4x32 of Salmon et al., SC 2011, figure and constants: four uint32 arrays from four."""
    low = np.uint64(0xFFFFFFFF)
    x = [np.asarray(word, np.uint64) for word in np.broadcast_arrays(*counter)]
    k = [np.uint64(word) for word in key]
    for _ in range(rounds):
        product0, product1 = np.uint64(0xD2511F53) * x[0], np.uint64(0xCD9E8D57) * x[2]
        x = [
            (product1 >> np.uint64(32)) ^ x[1] ^ k[0],
            product1 & low,
            (product0 >> np.uint64(32)) ^ x[3] ^ k[1],
            product0 & low,
        ]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return [word.astype(np.uint32) for word in x]


def draw(n, seed, index, step, stream):
    """[n] numbers below 2^16: eight from each counter, each word's lower half first."""
    blocks = np.arange(-(-n // 8))
    words = philox((blocks, index, step % 2**32, stream), (seed % 2**32, seed // 2**32))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return np.stack(halves, axis=1).reshape(-1)[:n] if n else np.zeros(0, np.uint32)


def drawn(x, dtype, noise):
    """float32 values between two neighbours of `dtype`: the upper one if the noise exceeds what is left to it."""
    bits, least = {BFLOAT16: (16, -126), FLOAT16: (13, -14)}[dtype]
    finite = np.isfinite(x)
    size = np.abs(np.where(finite, x, 0)).astype(np.float64)
    step = np.exp2(np.maximum(np.frexp(size)[1] - 1, least) - 23.0 + bits)
    at, r = size / step, noise >> (16 - bits)
    sums = at + r / 2**bits  # exact, but for what float16 cannot hold at all: there in float32
    sums = np.where((dtype == FLOAT16) & (size < 2.0**-14), sums.astype(np.float32), sums)
    with np.errstate(invalid="ignore"):  # of NaN that are to be quieted
        result = np.where(finite, np.copysign(np.floor(sums) * step, x), x)
    return torch.from_numpy(result).to(dtype)


def at_every_magnitude(dtype):
    """float32 values between all neighbours of `dtype` and some beyond; the lower and upper neighbours of the first."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    low = every[every.isfinite()]
    up = torch.nextafter(low, torch.tensor(float("inf"), dtype=dtype))
    top = 2.0**128 if dtype == BFLOAT16 else 2.0**16  # where infinity stands for a number
    ends = [torch.where(t.isinf(), top, t.double()) for t in (low, up)]
    part = torch.rand(len(low), generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 0.999
    between = (ends[0] + part * (ends[1] - ends[0])).float()
    beyond = torch.tensor([65519.9, 65520.0, 65535.9, 65536.0, 1e5, 3.4e38, 1e-45, 2.0**-25, 2.0**-24.5, 1e-40])
    odd = torch.tensor([0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    return torch.cat([between, beyond, -beyond, odd, -odd]), low, up


# ---- Buckets by hand.


def widened(t):
    return t.numpy().copy() if t.dtype in (torch.float32, torch.float64) else t.float().numpy()


def narrowed(x, dtype):
    return torch.from_numpy(np.ascontiguousarray(x)).to(dtype)


def shifted(n, dtype, offset=0):
    """[n] uninitialised, its address `offset` bytes beyond a multiple of 64."""
    size = dtype.itemsize
    storage = torch.empty(n + 128 // size, dtype=dtype)
    start = (-storage.data_ptr() % 64 + offset) // size
    return storage[start : start + n]


def guarded(n, dtype, at_end):
    """[n] uninitialised with an inaccessible page right behind (or right before) it."""
    page, size = mmap.PAGESIZE, n * dtype.itemsize
    inner = -(-max(size, 1) // page) * page
    memory = mmap.mmap(-1, inner + 2 * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for fence in (base, base + page + inner):
        assert libc.mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(page), 0) == 0
    offset = page + (inner - size if at_end else 0)
    return torch.frombuffer(memory, dtype=dtype, count=n, offset=offset)


def values(n, dtype, seed):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def copied(like, source):
    like.copy_(source)
    return like


def bucket_of(params, option, states=0.0, spread=1, format=None):
    """A bucket over 1-D parameters; group i % 3. `spread` stretches the positions, as of so many more elements."""
    n, rule = len(params), OPTIONS[option][0]
    format = format or PLAIN[DTYPES.index(params[0].dtype)]
    bucket = SimpleNamespace(params=params, format=format, dtype=format.weight, rule=rule, slot=1, rows=rows_of(option))
    bucket.backups = [torch.full_like(p, float("nan")) for p in params]
    bucket.masters = [p.to(format.source, copy=True) for p in params]
    bucket.states = [[torch.full_like(p, states, dtype=format.state) for p in params] for _ in range(3)]
    bucket.progress = torch.tensor([[0.0, 1.0]]).repeat(n, 1)
    bucket.steps, bucket.products = bucket.progress.unbind(1)
    bucket.q = 2.0
    bucket.overflows = torch.zeros(2, dtype=torch.int64)
    bucket.rounding = torch.tensor([FIRST_DRAW]) if format.stochastic else None
    bucket.row_table = torch.tensor(bucket.rows, dtype=torch.float64)
    bucket.grad_table = torch.zeros(n, dtype=torch.int64)
    bucket.perturbed = torch.zeros(n, dtype=torch.bool)
    chunks = [(i, s, min(CHUNK, len(p) - s)) for i, p in enumerate(params) for s in range(0, len(p), CHUNK)]
    starts = np.cumsum([0] + [-(-length // 64) for _, _, length in chunks])
    table = [(i, s // 64, length, spread * at) for (i, s, length), at in zip(chunks, starts.tolist(), strict=False)]
    bucket.chunk_table = torch.tensor(table, dtype=torch.int32).reshape(-1, 4)
    bucket.partials = torch.full((len(chunks),), float("nan"), dtype=torch.float64)
    point(bucket)
    return bucket


def index_of(i):
    """What segment i says its parameter's place is."""
    return 2 * i + 1


def point(bucket):
    table = []
    for i, weights in enumerate(bucket.params):
        kept = [0, bucket.masters[i].data_ptr()] if bucket.format.masters else [bucket.backups[i].data_ptr(), 0]
        states = [state[i].data_ptr() for state in bucket.states]
        place = i % 3 | index_of(i) << 32
        table.append([weights.data_ptr(), kept[0], *states, kept[1], bucket.progress[i].data_ptr(), place])
    bucket.segment_table = torch.tensor(table, dtype=torch.int64)


def fresh_bucket(option, format, make=shifted, spread=1):
    """Weights as `expected` has them; states that are not to be read are NaN. `format` may be a dtype."""
    format = PLAIN[DTYPES.index(format)] if isinstance(format, torch.dtype) else format
    params = [copied(make(n, format.weight), values(n, format.weight, i)) for i, n in enumerate(SIZES)]
    bucket = bucket_of(params, option, float("nan"), spread, format)
    for k in slots_of(option) if bucket.rule is not SGD else ():
        for s in bucket.states[k]:
            s.fill_(INITIAL.get(bucket.rule, 0.0))
    bucket.steps.fill_(STARTS.get(option, 0.0))
    return bucket


def gradients(dtype, step, which):
    """Pass 1 lacks every fifth gradient, pass 2 every seventh."""
    missing = (5, 1) if which == 1 else (7, 2)
    seed = 1000 * step + 100 * which
    return [None if i % missing[0] == missing[1] else values(n, dtype, seed + i) for i, n in enumerate(SIZES)]


def run(bucket, grads1, grads2, **options):
    sums = torch.full((3,), float("nan"), dtype=torch.float64)
    sums[0], sums[2] = 0.25, 0.5  # other buckets
    native.grad_norm(bucket, grads1, sums)
    native.perturb_(bucket, grads1, sums)
    perturbed = [p.clone() for p in bucket.params]
    native.update_(bucket, grads2, **options)
    return sums[1].clone(), perturbed


class Plan(NamedTuple):
    """What the plan makes of `STEPS` steps: each one's sum and perturbed weights; then what there is in the end."""

    sums: list
    climbs: list
    weights: list
    masters: list  # the weights before they are rounded
    states: list
    counts: np.ndarray
    products: list


@cache
def expected(option, format):
    """The plan's result for a `fresh_bucket`."""
    rule, rows = OPTIONS[option][0], rows_of(option)
    formula, counting = FORMULAS[rule], rows[0].beta1 != 0 or rule is not SGD
    weights = [widened(values(n, format.weight, i)) for i, n in enumerate(SIZES)]
    states = [[np.full_like(w, INITIAL.get(rule, 0.0))] * 3 for w in weights]
    products = [np.float32(1)] * len(SIZES)
    counts, sums, climbs = np.full(len(SIZES), STARTS.get(option, 0.0), np.float32), [], []

    def rounded(x, dtype, i, step, stream):
        if format.stochastic and dtype in (BFLOAT16, FLOAT16):
            return drawn(x, dtype, draw(len(x), rows[i % 3].seed, index_of(i), FIRST_DRAW + step, stream))
        return narrowed(x, dtype)

    def stored(w, i, step, stream):  # the weights that the model sees
        return narrowed(w, format.weight) if format.masters else rounded(w, format.weight, i, step, stream)

    for step in range(STEPS):
        g1, g2 = ([None if g is None else widened(g) for g in gradients(format.grad, step, which)] for which in (1, 2))
        pass1 = [(w, g, rows[i % 3]) for i, (w, g) in enumerate(zip(weights, g1, strict=True))]
        sums.append(canonical_sum(np.zeros_like(w) if g is None else steepest(w, g, row) for w, g, row in pass1))
        total = 0.25 + sums[-1] + 0.5
        climbed = [w if g is None else climb(w, g, row, total) for w, g, row in pass1]
        climbs.append([stored(w, i, step, 0) for i, w in enumerate(climbed)])
        for i, g in enumerate(g2):
            if g is not None:
                counts[i] += counting
                w, new = formula(weights[i], g, [*states[i], products[i]], int(counts[i]), rows[i % 3])
                weights[i] = w if format.masters else widened(stored(w, i, step, 1))
                states[i] = [widened(rounded(s, format.state, i, step, 2 + k)) for k, s in enumerate(new[:3])]
                products[i] = new[3] if rule is NADAM else products[i]
    masters, seen = ([narrowed(w, dtype) for w in weights] for dtype in (format.source, format.weight))
    states = [[narrowed(s, format.state) for s in slot] for slot in zip(*states, strict=True)]
    return Plan(sums, climbs, seen, masters, states, counts, products)
