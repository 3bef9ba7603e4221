"""`dot` and `combine_`: the reference against a plan in NumPy that shares no code with it, and every backend."""

import itertools
import math

import cases
import numpy as np
import pytest
import torch
from oracle import assert_same, bits
from rounding import DTYPES, copied, fma, fold, guarded, narrowed, shifted, values, widened
from torch.nn import Parameter
from torch.optim import SGD

import fastsam
from fastsam import ops
from fastsam.ops import native, reference
from fastsam.ops.tables import Gradients

F32, F64, BF16, F16 = DTYPES
# Dtypes of the parameters and of the operands a and b.
MIXES = [*itertools.product((F32, BF16, F16), repeat=3), (F64, F64, F64)]
SIZES = [0, 1, 3, 63, 64, 65, 1025, 2047, 2048, 2049, 8191, 8192, 8193, 2 * 8192 + 2049]
OFFSETS = [(0, 0, 0), (8, 0, 8), (0, 4, 2), (2, 2, 2), (12, 8, 4)]  # of a, b and c from a multiple of 64 bytes
SOME = [(F32, F32, F32), (BF16, F32, BF16), (F16, F16, F32), (F32, BF16, F16), (F64, F64, F64)]
SLOT, SLOTS = 1, 3
SEEDS = dict(a=0, b=100, c=200, out=300)
# Linear combinations of a, b, c and what stood in `out`; of two letters that are the same an operand is there twice.
COMBINATIONS = {
    "product": [(0.3, "a")],
    "one": [(1.0, "b")],
    "two": [(-1.7, "a"), (0.1, "b")],
    "three": [(0.1, "c"), (0.7, "b"), (-0.2, "a")],
    "square": [(0.7, "a"), (0.7, "a")],
    "first is 0": [(0.0, "a"), (0.3, "b"), (-2.0, "c")],
    "last is -0": [(0.3, "b"), (-2.0, "c"), (-0.0, "a")],
    "none is left": [(0.0, "a"), (0.0, "b")],
    "0 in float32": [(1e-60, "a"), (3.0, "b")],
    "in place": [(0.9, "out"), (0.1, "a")],
    "in place, last": [(0.9, "a"), (0.1, "b"), (-1.1, "out")],
    "cleared": [(0.0, "out"), (0.0, "a")],
}


def together(values):
    """A name for several dtypes or numbers."""
    return "-".join(str(value).removeprefix("torch.") for value in values)


class Bucket:
    """Parameters, their tables as an optimizer makes them, and operands over them."""

    def __init__(self, params, backend):
        self.params = params
        self.optimizer = fastsam.FusedSAM(params, SGD, 0.1, lr=0.1, backend=backend)  # owns what the tables point to
        self.optimizer.prepare()
        (bucket,) = self.optimizer._sam.buckets.items
        self.tables = tables = bucket.tables
        tables.slot = SLOT
        tables.dot_partials = torch.full((3, len(tables.chunk_table)), math.nan, dtype=F64, device=tables.device)

    def operand(self, name, dtype, missing=True, offset=0, place=None):
        """Normal numbers in the layout of the parameters; with `missing` every fifth segment has none."""
        place = place or (lambda n, dtype: shifted(n, dtype, offset // dtype.itemsize * dtype.itemsize))
        tensors = []
        for i, p in enumerate(self.params):
            parts = 2 if p.is_complex() else 1
            flat = values(parts * p.numel(), dtype, SEEDS[name] + i)
            if missing and i % 5 == SEEDS[name] // 100 + 1:
                tensors.append(None)
            elif p.is_complex():
                tensors.append(copied(torch.empty_like(p.detach()), torch.view_as_complex(flat.view(*p.shape, 2))))
            elif p.device.type == "cpu":
                flat = copied((place if len(flat) else shifted)(len(flat), dtype), flat)
                tensors.append(flat.as_strided(p.shape, p.stride()))
            else:  # memory there begins at a multiple of 256 bytes
                at = offset // dtype.itemsize
                there = torch.empty(len(flat) + at, dtype=dtype, device=p.device)[at:]
                tensors.append(there.copy_(flat).as_strided(p.shape, p.stride()))
        return operand_of(tensors, dtype)


def operand_of(tensors, dtype=None):
    parts = Gradients(tensors)
    parts.dtype = dtype
    return parts


def vectors(dtype, backend="cpu", sizes=SIZES):
    device = cases.device_of(backend)
    return Bucket([Parameter(torch.zeros(n, dtype=dtype, device=device)) for n in sizes], backend)


def layouts(backend):
    """Every layout of cases.py, and complex numbers."""
    device = cases.device_of(backend)
    extra = Parameter(torch.zeros(5, 7, dtype=torch.complex64, device=device))
    return Bucket([*cases.make_params(device=device), extra], backend)


def operations_of(backend):
    return ops.backend_named(backend).operations


def products(operations, bucket, a, b):
    """[3]: what `dot` writes; other buckets' rows stay as they are."""
    out = torch.full((SLOTS, 3), -7.0, dtype=F64, device=bucket.tables.device)
    operations.dot(bucket.tables, a, b, out)
    found = out[SLOT].clone()
    out[SLOT] = -7.0
    assert (out == -7.0).all()
    return found.cpu()


def combined(operations, bucket, terms, operands, there=False):
    """What `combine_` writes over operand "out". `there`: coefficients are on the device."""
    out = operand_of([None if t is None else copied(torch.empty_like(t), t) for t in operands["out"]])
    out.dtype = operands["out"].dtype
    now = {**operands, "out": out}
    with_parts = [(c, now[name]) for c, name in terms]
    if there:  # of no dimension or of one
        full = lambda i, c: torch.full((1,) * (i % 2), c, dtype=F64, device=bucket.tables.device)  # noqa: E731
        with_parts = [(full(i, c), parts) for i, (c, parts) in enumerate(with_parts)]
    operations.combine_(bucket.tables, out, with_parts)
    return out


# ---- The plan, in storage order.


def flat(tensor):
    """[n] in NumPy, in float32 or float64."""
    real = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    return widened(real.cpu().as_strided((real.numel(),), (1,)))


def planned_products(bucket, a, b):
    sums = []
    for left, right in ((a, a), (a, b), (b, b)):
        slots, index = np.zeros(1024), 0
        for p, x, y in zip(bucket.params, left, right, strict=True):
            for start in range(0, flat(p).size, 8192):
                if x is not None and y is not None:
                    rows = np.zeros((2, 8192), flat(x).dtype)
                    for row, t in zip(rows, (x, y), strict=True):
                        piece = flat(t)[start : start + 8192]
                        row[: len(piece)] = piece
                    lanes = np.zeros(2048, rows.dtype)
                    for u, v in zip(rows[0].reshape(4, -1), rows[1].reshape(4, -1), strict=True):
                        lanes = fma(u, v, lanes)
                    slots[index % 1024] += np.float64(fold(lanes))
                index += 1
        sums.append(float(fold(slots)))
    return torch.tensor(sums, dtype=F64)


def planned_combination(terms, operands):
    """[n] each, or None where `out` has no segment."""
    planned = []
    for i, target in enumerate(operands["out"]):
        if target is None:
            planned.append(None)
            continue
        total, begun = np.zeros_like(flat(target)), False
        for c, name in terms:
            c, part = total.dtype.type(c), operands[name][i]
            if c != 0 and part is not None:
                total = fma(c, flat(part), total) if begun else c * flat(part)
                begun = True
        planned.append(narrowed(total, target.dtype.to_real() if target.is_complex() else target.dtype))
    return planned


def none_of(bucket):
    return operand_of([None] * len(bucket.params))


# ---- What holds for any backend; test_cuda_core.py has its kernels' bodies checked by the same.


def check_dot(operations, backend, dtypes, offsets=(0, 0, 0)):
    param_dtype, *own = dtypes
    bucket = vectors(param_dtype, backend)
    a, b = (bucket.operand(name, *each) for name, *each in zip("ab", own, (True, True), offsets, strict=False))
    for x, y in ((a, b), (b, a), (a, a), (a, none_of(bucket)), (none_of(bucket), b)):
        assert_same(products(operations, bucket, x, y), products(reference, bucket, x, y), "of both")
    found = products(operations, bucket, a, None)
    assert_same(found, products(reference, bucket, a, None), "of a")
    assert found[0] > 0 and (found[1:] == 0).all()
    if param_dtype == own[0]:  # an operand of the gradients' dtype need not say so
        assert_same(products(operations, bucket, operand_of(a), b), products(reference, bucket, a, b), "of gradients")


def check_combine(operations, backend, dtypes, offsets=(0, 0, 0)):
    param_dtype, *own = dtypes
    bucket = vectors(param_dtype, backend)
    own += [param_dtype] * 2
    operands = {
        name: bucket.operand(name, *each)
        for name, *each in zip(("a", "b", "c", "out"), own, [True] * 4, (*offsets, offsets[-1]), strict=True)
    }
    for (title, terms), there in zip(COMBINATIONS.items(), itertools.cycle([False, True]), strict=False):
        expected = combined(reference, bucket, terms, operands)
        for i, (p, q) in enumerate(zip(combined(operations, bucket, terms, operands, there), expected, strict=True)):
            assert (p is None) == (q is None)
            if p is not None:
                assert bits(p) == bits(q), f"{title}, segment {i}"


def check_layouts(operations, backend):
    bucket = layouts(backend)
    operands = {name: bucket.operand(name, F32) for name in SEEDS}
    a, b = operands["a"], operands["b"]
    assert_same(products(operations, bucket, a, b), products(reference, bucket, a, b))
    for terms in COMBINATIONS.values():
        expected = combined(reference, bucket, terms, operands)
        for p, q in zip(combined(operations, bucket, terms, operands), expected, strict=True):
            assert p is q or torch.equal(p, q)


def check_not_finite(operations, backend, dtype):
    """Infinities and NaN: what has the coefficient 0 is not looked at, all else shows."""
    bucket = vectors(dtype, backend, [8193, 5])
    operands = {name: bucket.operand(name, dtype, missing=False) for name in SEEDS}
    for bad in (math.inf, -math.inf, math.nan):
        for at in (0, 8190, 8192):
            operands["a"][0][at] = bad
        out = torch.zeros(SLOTS, 3, dtype=F64, device=bucket.tables.device)
        operations.dot(bucket.tables, operands["b"], operands["c"], out)
        assert out[SLOT].isfinite().all()
        operations.dot(bucket.tables, operands["a"], operands["b"], out)
        assert not out[SLOT, :2].isfinite().any() and out[SLOT, 2].isfinite()
        for zero in (0.0, -0.0, *([] if dtype == F64 else [1e-60])):  # the last is 0 in float32
            found = combined(operations, bucket, [(0.3, "b"), (zero, "a"), (0.2, "c")], operands, there=zero == 0.0)
            assert all(part.isfinite().all() for part in found)
            assert (combined(operations, bucket, [(zero, "a")], operands)[0] == 0).all()
        found = combined(operations, bucket, [(0.3, "b"), (0.2, "a")], operands)
        assert (~found[0].isfinite()).nonzero().ravel().tolist() == [0, 8190, 8192] and found[1].isfinite().all()
    for c in (math.nan, math.inf):  # a coefficient that is not 0 either
        found = combined(operations, bucket, [(c, "b"), (0.5, "c")], operands, there=True)
        assert not any(part.isfinite().any() for part in found)


def check_many(operations, backend, n):
    """More tensors than the arguments of one launch have addresses for."""
    bucket = vectors(F32, backend, [1 + i % 67 for i in range(n - 1)] + [20000])
    operands = {name: bucket.operand(name, F32) for name in SEEDS}
    a, b = operands["a"], operands["b"]
    for y in (b, None):
        assert_same(products(operations, bucket, a, y), products(reference, bucket, a, y))
    for title in ("product", "three", "in place, last"):
        expected = combined(reference, bucket, COMBINATIONS[title], operands)
        for p, q in zip(combined(operations, bucket, COMBINATIONS[title], operands), expected, strict=True):
            assert p is q or torch.equal(p, q)


def check_nothing(operations, backend):
    """Empty tensors have no address that may be read, and without any chunk the sums are 0."""
    bucket = vectors(F32, backend, [0, 0])
    a = bucket.operand("a", F32, missing=False)
    assert products(operations, bucket, a, a).tolist() == [0, 0, 0]
    operations.combine_(bucket.tables, a, [(0.5, a)])


# ---- The reference.


@pytest.mark.parametrize("dtypes", MIXES, ids=together)
def test_the_reference_follows_the_plan(dtypes):
    bucket = vectors(dtypes[0], "reference")
    operands = dict(
        a=bucket.operand("a", dtypes[1]), b=bucket.operand("b", dtypes[2]), c=bucket.operand("c", dtypes[0])
    )
    operands["out"] = bucket.operand("out", dtypes[0])
    a, b = operands["a"], operands["b"]
    found = products(reference, bucket, a, b)
    if F64 in dtypes:  # torch's fused product and sum may be rounded twice
        torch.testing.assert_close(found, planned_products(bucket, a, b), rtol=1e-13, atol=1e-13)
    else:
        assert_same(found, planned_products(bucket, a, b))
    for title, terms in COMBINATIONS.items():
        plan = planned_combination(terms, operands)
        for p, planned, old in zip(combined(reference, bucket, terms, operands), plan, operands["out"], strict=True):
            assert (p is None) == (planned is None) == (old is None)
            if p is not None:
                tolerance = dict(rtol=1e-15, atol=1e-15) if F64 in dtypes else dict(rtol=0, atol=0)
                torch.testing.assert_close(p.ravel(), planned, msg=lambda m, t=title: f"{t}: {m}", **tolerance)


@pytest.mark.parametrize("dtypes", MIXES[::4] + MIXES[-1:], ids=together)
def test_the_reference_is_close_to_float64(dtypes):
    """No further from it than the canonical tree's few roundings, whose errors add up at random."""
    bucket = vectors(dtypes[0], "reference")
    a, b = bucket.operand("a", dtypes[1]), bucket.operand("b", dtypes[2])
    found = products(reference, bucket, a, b)
    pairs = [(x.double(), y.double()) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    squares = [sum(float((x.double() ** 2).sum()) for x in part if x is not None) for part in (a, b)]
    exact = torch.tensor([squares[0], sum(float((x * y).sum()) for x, y in pairs), squares[1]], dtype=F64)
    scale = torch.tensor([squares[0], math.sqrt(squares[0] * squares[1]), squares[1]], dtype=F64)
    assert ((found - exact).abs() <= 1e-6 * scale).all()


def test_the_product_with_itself_has_the_bits_of_the_norm():
    bucket = layouts("reference")
    a = bucket.operand("a", F32)
    norms = torch.zeros(SLOTS, dtype=F64)
    reference.grad_norm(bucket.tables, a, norms)
    assert (products(reference, bucket, a, a) == norms[SLOT]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_parameters_with_gaps_and_lazy_ones(dtype):
    """What kernels cannot walk, the reference reads and writes in the order of its elements."""
    spare = torch.randn(3, 6, 8, dtype=dtype)
    views = [spare[0, :, :5], spare[1, :, :5].t(), *([spare[2].conj()] if dtype.is_complex else [])]
    bucket = Bucket([Parameter(view) for view in views], "reference")
    a, b, out = (
        operand_of(
            [copied(torch.empty_strided(p.size(), p.stride(), dtype=dtype), torch.randn_like(p)) for p in bucket.params]
        )
        for _ in "abo"
    )
    real = lambda t: torch.view_as_real(t.resolve_conj()).double() if t.is_complex() else t.double()  # noqa: E731
    expected = [
        sum(float((real(x) * real(y)).sum()) for x, y in zip(*pair, strict=True)) for pair in ((a, a), (a, b), (b, b))
    ]
    torch.testing.assert_close(
        products(reference, bucket, a, b), torch.tensor(expected, dtype=F64), rtol=1e-5, atol=1e-4
    )
    plan = [0.5 * x - 2.0 * y for x, y in zip(a, b, strict=True)]
    reference.combine_(bucket.tables, out, [(0.5, a), (-2.0, b)])
    for found, planned in zip(out, plan, strict=True):
        torch.testing.assert_close(found, planned)


# ---- Every backend.


@pytest.mark.parametrize("dtypes", MIXES, ids=together)
def test_dot_has_the_references_bits(backend, dtypes):
    check_dot(operations_of(backend), backend, dtypes)


@pytest.mark.parametrize("dtypes", MIXES, ids=together)
def test_combine_has_the_references_bits(backend, dtypes):
    check_combine(operations_of(backend), backend, dtypes)


@pytest.mark.parametrize("offsets", OFFSETS, ids=together)
@pytest.mark.parametrize("dtypes", SOME, ids=together)
def test_any_alignment(backend, dtypes, offsets):
    check_dot(operations_of(backend), backend, dtypes, offsets)
    check_combine(operations_of(backend), backend, dtypes, offsets)


def test_any_layout(backend):
    check_layouts(operations_of(backend), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_shows_unless_it_is_left_out(backend, dtype):
    check_not_finite(operations_of(backend), backend, dtype)


@pytest.mark.parametrize("n", [300, pytest.param(3000, marks=pytest.mark.slow)])
def test_many_tensors(backend, n):
    check_many(operations_of(backend), backend, n)


def test_nothing_to_add(backend):
    check_nothing(operations_of(backend), backend)


# ---- The native library.

needs_library = pytest.mark.skipif(native.reason() is not None, reason=f"no native library: {native.reason()}")


@needs_library
@pytest.mark.parametrize("isa", native.reader.cpu_isas() if native.reader else [])
@pytest.mark.parametrize("threads", [1, 3])
def test_every_instruction_set_and_thread_count(isa, threads):
    before = native.reader.use_cpu_isa(isa), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dtypes in SOME:
            check_dot(native, "cpu", dtypes)
            check_combine(native, "cpu", dtypes)
    finally:
        native.reader.use_cpu_isa(before[0])
        torch.set_num_threads(before[1])


@needs_library
@pytest.mark.parametrize("at_end", [True, False], ids=["ends", "starts"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_access_beyond_operands(dtype, at_end):
    check_guarded(native, dtype, at_end)


def check_guarded(operations, dtype, at_end):
    bucket = vectors(dtype)
    place = lambda n, dtype: guarded(n, dtype, at_end)  # noqa: E731
    operands = {name: bucket.operand(name, dtype, place=place) for name in SEEDS}
    a, b = operands["a"], operands["b"]
    assert_same(products(operations, bucket, a, b), products(reference, bucket, a, b))
    for terms in COMBINATIONS.values():
        out = bucket.operand("out", dtype, place=place)
        now = {**operands, "out": out}
        operations.combine_(bucket.tables, out, [(c, now[name]) for c, name in terms])
        for p, q in zip(out, combined(reference, bucket, terms, operands), strict=True):
            assert p is q or torch.equal(p, q)


@needs_library
@pytest.mark.parametrize("isa", native.reader.cpu_isas() if native.reader else [])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 8, 24])
def test_stores_around_the_caches(isa, dtype, offset):
    """Positions as of more elements than any cache holds."""
    before = native.reader.use_cpu_isa(isa)
    try:
        bucket = vectors(dtype)
        bucket.tables.chunk_table[:, 3] *= 2**15
        operands = {name: bucket.operand(name, dtype, offset=offset) for name in SEEDS}
        for terms in COMBINATIONS.values():
            expected = combined(reference, bucket, terms, operands)
            for p, q in zip(combined(native, bucket, terms, operands), expected, strict=True):
                assert p is q or torch.equal(p, q)
    finally:
        native.reader.use_cpu_isa(before)


@needs_library
def test_addresses_that_are_written_down_are_not_read_anew():
    bucket = vectors(F32)
    a, b = bucket.operand("a", F32), bucket.operand("b", F32)
    expected = products(native, bucket, a, b)
    written = operand_of([None] * len(a), F32)
    written.table = torch.tensor([0 if t is None else t.data_ptr() or 64 for t in a])
    assert_same(products(native, bucket, written, b), expected)
    tables = bucket.tables.grad_table.clone()
    products(native, bucket, a, b)
    assert torch.equal(bucket.tables.grad_table, tables)  # that is the gradients' of the pass
