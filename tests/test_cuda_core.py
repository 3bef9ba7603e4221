"""The CUDA kernels' own bodies, compiled for this CPU and run over a grid: what they compute needs no GPU."""

import ctypes
import hashlib
import itertools
import math
import re
import shutil
import subprocess
from pathlib import Path

import cases
import pytest
import test_dot_combine
import test_general_p
import torch
from rounding import (
    DTYPES,
    FIRST_DRAW,
    MASTERS,
    MIXED,
    OPTIONS,
    PLAIN,
    SIZES,
    STEPS,
    STOCHASTIC,
    bucket_of,
    copied,
    expected,
    fresh_bucket,
    gradients,
    guarded,
    index_of,
    label,
    mixed,
    point,
    shifted,
    slots_of,
    values,
)

from fastsam import ops
from fastsam.bases.rules import LR_FLOAT64, SGD
from fastsam.ops import reference
from fastsam.ops.formats import Format, Precision
from fastsam.ops.tables import Operand

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "tests" / "cuda_core.cpp"
FLAGS = ["-std=c++17", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-pthread"]
CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
GRAD_NORM, PERTURB, UPDATE = range(3)
POINTERS = "chunks segments rows grads perturbed ticket partials sums grad_scale found_inf clip overflows".split()
POINTERS += ["rounding"]
NUMBERS = "n_chunks n_segments n_groups n_sums slot split_bits by_value seed threads rule".split()
OFFSETS = [(0, 0), (8, 0), (0, 8), (4, 12), (12, 8), (8, 8), (2, 6), (14, 10)]  # of weights and gradients, in bytes


class OperandLaunch(ctypes.Structure):
    _fields_ = [
        ("chunks", ctypes.c_void_p),
        ("addresses", ctypes.c_void_p * 4),
        ("coefficient_addresses", ctypes.c_void_p * 3),
        *((name, ctypes.c_void_p) for name in ("ticket", "partials", "out")),
        ("coefficients", ctypes.c_double * 3),
        ("dtypes", ctypes.c_int64 * 4),
        *((n, ctypes.c_int64) for n in "n_operands n_chunks n_segments most split_bits seed threads".split()),
    ]


class Launch(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        ("q", ctypes.c_double),
        ("max_norm", ctypes.c_double),
        *((name, ctypes.c_int64) for name in NUMBERS),
    ]


def compiled(folder, name, *flags):
    """Compile the driver; what was compiled from the same sources in an earlier run is taken again."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    if not SOURCE.is_file() or not (ROOT / "csrc").is_dir():
        pytest.skip("the tests are not run from a source tree")
    headers = sorted([*(ROOT / "csrc").rglob("*.h"), SOURCE])
    digest = hashlib.sha256(repr([compiler, flags, *(h.read_bytes() for h in headers)]).encode()).hexdigest()[:16]
    target = folder / f"{name}-{digest}"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = [compiler, *FLAGS, *flags, str(SOURCE), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="session")
def objects(request):
    return request.config.cache.mkdir("cuda_core")


def loaded(file):
    library = ctypes.CDLL(str(file))
    library.fastsam_run.restype = ctypes.c_bool
    return library


@pytest.fixture(scope="session")
def library(objects):
    return loaded(compiled(objects, "core", "-O1", "-shared", "-fPIC"))


@pytest.fixture(scope="session")
def other_choices(objects):
    """The same with the other choice wherever csrc/cuda/choices.h leaves one."""
    names = re.findall(r"#ifndef (FASTSAM_\w+)", (ROOT / "csrc" / "cuda" / "choices.h").read_text())
    assert len(names) == 5
    flags = ["-DFASTSAM_FEW_RULES", *(f"-D{name}=1" for name in names)]
    return loaded(compiled(objects, "choices", "-O0", "-shared", "-fPIC", *flags))


class Emulated:
    """A backend: the operations with the signatures of `ops/reference.py`, run by the kernels' bodies."""

    def __init__(self, library, split_bits=0, seed=0, threads=1, by_value=3, most=1 << 20):
        self.most = most  # segments that one launch of dot or combine_ serves
        self.library, self.split_bits, self.seed, self.threads = library, split_bits, seed, threads
        self.by_value = by_value  # bits: rows, gradients
        self.tickets = torch.zeros(2, dtype=torch.int32)

    def run(self, operation, bucket, grads, ticket, slot=0, max_norm=0.0, **pointers):
        table = torch.tensor([0 if g is None else g.data_ptr() or 64 for g in grads], dtype=torch.int64)
        tables = dict(chunks=bucket.chunk_table, segments=bucket.segment_table, rows=bucket.row_table, grads=table)
        held = {name: t for name, t in {**tables, **pointers}.items() if t is not None}
        launch = Launch(
            ticket=self.tickets[ticket:].data_ptr(),
            n_chunks=len(bucket.chunk_table),
            n_segments=len(bucket.segment_table),
            n_groups=len(bucket.row_table),
            n_sums=len(pointers["sums"]) if "sums" in pointers else 0,
            split_bits=0 if operation == GRAD_NORM else self.split_bits,
            slot=slot,
            q=bucket.q if max_norm == 0 else 2.0,
            max_norm=max_norm,
            by_value=self.by_value,
            seed=self.seed,
            threads=self.threads,
            rule=-1 if bucket.rule is None else bucket.rule.code,
            **{name: t.data_ptr() for name, t in held.items()},
        )
        *dtypes, stochastic = bucket.format
        format = (ctypes.c_int * 5)(*(CODES[dtype] for dtype in dtypes), stochastic)
        assert self.library.fastsam_run(operation, format, ctypes.byref(launch)), bucket.format
        assert self.tickets.tolist() == [0, 0]

    def grad_norm(self, bucket, grads, out, *, clip=None):
        more = {} if clip is None else dict(max_norm=clip.max_norm, clip=clip.factor, grad_scale=clip.grad_scale)
        self.run(GRAD_NORM, bucket, grads, 0, bucket.slot, partials=bucket.partials, sums=out, **more)

    def perturb_(self, bucket, grads, sums):
        bucket.perturbed |= torch.tensor([g is not None for g in grads], dtype=torch.bool)
        self.run(PERTURB, bucket, grads, 0, sums=sums, overflows=bucket.overflows, rounding=bucket.rounding)

    def update_(self, bucket, grads, *, grad_scale=None, found_inf=None, clip=None):
        factors = dict(grad_scale=grad_scale, found_inf=found_inf, clip=clip)
        counters = dict(overflows=bucket.overflows, rounding=bucket.rounding)
        self.run(UPDATE, bucket, grads, 1, perturbed=bucket.perturbed, **factors, **counters)
        bucket.perturbed.zero_()

    def run_operands(self, operation, tables, operands, **fields):
        held = [torch.tensor([0 if t is None else t.data_ptr() or 64 for t in parts]) for parts in operands]
        launch = OperandLaunch(
            chunks=tables.chunk_table.data_ptr(),
            addresses=(ctypes.c_void_p * 4)(*(table.data_ptr() for table in held)),
            dtypes=(ctypes.c_int64 * 4)(*(CODES[parts.dtype or tables.format.grad] for parts in operands)),
            n_operands=len(operands),
            n_chunks=len(tables.chunk_table),
            n_segments=len(held[0]),
            most=self.most,
            seed=self.seed,
            threads=self.threads,
            **fields,
        )
        operation(ctypes.byref(launch))

    def dot(self, tables, a, b, out):
        ticket = self.tickets.data_ptr()
        where = dict(ticket=ticket, partials=tables.dot_partials.data_ptr(), out=out[tables.slot].data_ptr())
        self.run_operands(self.library.fastsam_dot, tables, [a] if b is None else [a, b], **where)
        assert self.tickets.tolist() == [0, 0]

    def combine_(self, tables, out, terms):
        values = [0.0 if isinstance(c, torch.Tensor) else c for c, _ in terms]
        there = [c.data_ptr() if isinstance(c, torch.Tensor) else None for c, _ in terms]
        self.run_operands(
            self.library.fastsam_combine,
            tables,
            [out, *(parts for _, parts in terms)],
            coefficients=(ctypes.c_double * 3)(*values),
            coefficient_addresses=(ctypes.c_void_p * 3)(*there),
            split_bits=self.split_bits,
        )


def run(backend, bucket, grads1, grads2, **options):
    sums = torch.full((3,), float("nan"), dtype=torch.float64)
    sums[0], sums[2] = 0.25, 0.5  # other buckets
    backend.grad_norm(bucket, grads1, sums)
    backend.perturb_(bucket, grads1, sums)
    perturbed = [p.clone() for p in bucket.params]
    backend.update_(bucket, grads2, **options)
    return sums[1].clone(), perturbed


def assert_same(actual, plan, what):
    assert torch.equal(actual, plan), f"{what}: {(actual != plan).sum()} of {plan.numel()} differ"


def check_steps(backend, bucket, option, place=lambda grad: grad):
    format, plan = bucket.format, expected(option, bucket.format)
    for step in range(STEPS):
        grads = [[g if g is None else place(g) for g in gradients(format.grad, step, which)] for which in (1, 2)]
        total, perturbed = run(backend, bucket, *grads)
        exact = format.source != torch.float64
        assert total == (plan.sums[step] if exact else pytest.approx(plan.sums[step], rel=1e-14))
        for i, (p, planned) in enumerate(zip(perturbed, plan.climbs[step], strict=True)):
            assert_same(p, planned, f"perturbed weights of segment {i} in step {step}")
        if format.stochastic:
            assert bucket.rounding.tolist() == [FIRST_DRAW + step + 1]
    used = slots_of(option)
    for i, planned in enumerate(plan.weights):
        assert_same(bucket.params[i], planned, f"weights of segment {i}")
        if format.masters:
            assert_same(bucket.masters[i], plan.masters[i], f"master of segment {i}")
            assert bucket.backups[i].isnan().all(), f"backup of segment {i} was written"
        for k in range(3):
            if k not in used:
                assert bucket.states[k][i].isnan().all(), f"unused state {k} of segment {i} was written"
            elif plan.counts[i]:
                assert_same(bucket.states[k][i], plan.states[k][i], f"state {k} of segment {i}")
    assert bucket.steps.tolist() == plan.counts.tolist() and bucket.products.tolist() == plan.products


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_three_sam_steps_follow_the_plan_in_any_order_of_blocks(library, dtype, option):
    for split_bits, seed in ((0, 0), (1, 11), (2, 12)):
        check_steps(Emulated(library, split_bits, seed), fresh_bucket(option, dtype), option)


@pytest.mark.slow
@pytest.mark.parametrize("format", [*PLAIN, *MASTERS, *STOCHASTIC], ids=label)
def test_other_choices_follow_the_plan_too(other_choices, format):
    for split_bits, option in enumerate(("sgd-dampening", "adam", "lion")):
        check_steps(Emulated(other_choices, split_bits, 17), fresh_bucket(option, format), option)
        bucket = fresh_bucket(option, format, lambda n, dtype: guarded(n, dtype, True) if n else shifted(n, dtype))
        place = lambda g: copied(guarded(len(g), g.dtype, True), g) if len(g) else g  # noqa: E731
        check_steps(Emulated(other_choices, split_bits), bucket, option, place)


@pytest.mark.parametrize("n_chunks", [1, 1023, 3073, 5 * 1024 + 3])
def test_thousands_of_partial_sums_are_added_in_the_order_of_the_plan(library, n_chunks):
    """The last block takes several of a thread's partial sums at once."""
    bucket = bucket_of([torch.zeros(64 * n_chunks)], "sgd")
    start = torch.arange(n_chunks, dtype=torch.int32)
    bucket.chunk_table = torch.stack([0 * start, start, 0 * start + 64, start], dim=1).contiguous()
    bucket.partials = torch.full((n_chunks,), float("nan"), dtype=torch.float64)
    grad = torch.linspace(-1, 3, 64 * n_chunks)
    out = torch.zeros(1, dtype=torch.float64)
    bucket.slot = 0
    Emulated(library, seed=3).grad_norm(bucket, [grad], out)
    lanes = torch.zeros(1024, dtype=torch.float64)
    for part in bucket.partials.split(1024):
        lanes[: len(part)] += part
    while len(lanes) > 1:
        lanes = lanes[0::2] + lanes[1::2]
    assert out.tolist() == lanes.tolist()
    assert out.item() == pytest.approx(grad.double().square().sum().item(), rel=1e-6)


@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_alignment(library, dtype, offsets):
    at_p, at_g = (offset // dtype.itemsize * dtype.itemsize for offset in offsets)
    for option in ("sgd-dampening", "adam", "rmsprop-centered"):
        bucket = fresh_bucket(option, dtype, lambda n, dtype: shifted(n, dtype, at_p))
        check_steps(Emulated(library, 1), bucket, option, lambda g: copied(shifted(len(g), dtype, at_g), g))


@pytest.mark.parametrize("at_end", [True, False], ids=["ends", "starts"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_access_beyond_weights_gradients_and_states(library, dtype, at_end):
    def make(n, dtype):
        return guarded(n, dtype, at_end) if n else shifted(n, dtype)

    option = "adamw-amsgrad-maximize"
    bucket = fresh_bucket(option, dtype, make)
    if not at_end:  # what the optimizer owns starts at 16 bytes, as a page does
        bucket.backups = [torch.full_like(make(len(p), dtype), float("nan")) for p in bucket.params]
        bucket.states = [[copied(make(len(s), dtype), s) for s in state] for state in bucket.states]
        point(bucket)
    check_steps(Emulated(library), bucket, option, lambda g: copied(make(len(g), dtype), g))


@pytest.mark.parametrize("offsets", [(0, 0), (8, 8), (12, 4), (6, 2)], ids=str)
@pytest.mark.parametrize(("dtype", "grad_dtype"), MIXED, ids=str)
def test_gradients_of_another_dtype(library, dtype, grad_dtype, offsets):
    at_p, at_g = (at // kind.itemsize * kind.itemsize for at, kind in zip(offsets, (dtype, grad_dtype), strict=True))
    for option in ("sgd-dampening", "adamw-amsgrad-maximize"):
        bucket = fresh_bucket(option, mixed(dtype, grad_dtype), lambda n, dtype: shifted(n, dtype, at_p))
        check_steps(Emulated(library, 1), bucket, option, lambda g: copied(shifted(len(g), g.dtype, at_g), g))


@pytest.mark.parametrize(("dtype", "grad_dtype"), MIXED, ids=str)
def test_no_access_beyond_gradients_of_another_dtype(library, dtype, grad_dtype):
    for at_end in (True, False):
        bucket = fresh_bucket("sgd-dampening", mixed(dtype, grad_dtype))
        place = lambda g, at_end=at_end: copied(guarded(len(g), g.dtype, at_end), g) if len(g) else g  # noqa: E731
        check_steps(Emulated(library), bucket, "sgd-dampening", place)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("format", MASTERS + STOCHASTIC, ids=label)
def test_masters_and_random_numbers_follow_the_plan_in_any_order_of_blocks(library, format, option):
    check_steps(Emulated(library, 1, 13), fresh_bucket(option, format), option)


@pytest.mark.parametrize("offsets", [(8, 8), (12, 4), (6, 2), (0, 8), (8, 0)], ids=str)
@pytest.mark.parametrize("format", MASTERS + STOCHASTIC, ids=label)
def test_any_alignment_with_masters_and_random_numbers(library, format, offsets):
    at_p, at_g = (at // kind.itemsize * kind.itemsize for at, kind in zip(offsets, format[:2], strict=True))
    for split_bits, option in enumerate(("sgd-dampening", "adam", "lion")):
        bucket = fresh_bucket(option, format, lambda n, dtype: shifted(n, dtype, at_p))
        place = lambda g: copied(shifted(len(g), g.dtype, at_g), g)  # noqa: E731
        check_steps(Emulated(library, split_bits, 17), bucket, option, place)


@pytest.mark.parametrize("at_end", [True, False], ids=["ends", "starts"])
@pytest.mark.parametrize("format", MASTERS + STOCHASTIC, ids=label)
def test_no_access_beyond_masters_and_states_of_another_dtype(library, format, at_end):
    def make(n, dtype):
        return guarded(n, dtype, at_end) if n else shifted(n, dtype)

    option = "adamw"
    bucket = fresh_bucket(option, format, make)
    if not at_end:  # what the optimizer owns starts at 16 bytes, as a page does
        bucket.masters = [copied(make(len(m), m.dtype), m) for m in bucket.masters]
        bucket.backups = [torch.full_like(make(len(b), b.dtype), float("nan")) for b in bucket.backups]
        bucket.states = [[copied(make(len(s), s.dtype), s) for s in state] for state in bucket.states]
        point(bucket)
    check_steps(Emulated(library), bucket, option, lambda g: copied(make(len(g), g.dtype), g))


def test_there_are_kernels_for_every_format_and_no_other(library):
    options = [(), (True,), (False, True), (False, False, torch.bfloat16), (True, False, torch.bfloat16)]
    made = {Precision(*each).format_of(dtype) for each in options for dtype in DTYPES}
    known = {format._replace(grad=dtype) for format in made for dtype in DTYPES if format.takes(dtype)}
    assert known >= {*PLAIN, *MASTERS, *STOCHASTIC}
    for dtypes in itertools.product(DTYPES, repeat=4):
        for stochastic in (False, True):
            format = Format(*dtypes, stochastic)
            codes = (ctypes.c_int * 5)(*(CODES[dtype] for dtype in dtypes), stochastic)
            launch = Launch(q=2.0, threads=1, rule=-1)  # no parameters, so that perturb_ does nothing
            assert library.fastsam_run(PERTURB, codes, ctypes.byref(launch)) == (format in known), format


@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("option", ["sgd", "adamw"])
def test_a_learning_rate_on_the_device(library, option, lr_dtype):
    lr = torch.tensor(0.25, dtype=lr_dtype)  # exact in both
    buckets = [fresh_bucket(option, torch.float32) for _ in range(2)]
    rows = [row._replace(lr=0.25) for row in buckets[0].rows]
    there = dict(lr=float("nan"), lr_address=lr.data_ptr())
    both = rows, [r._replace(flags=r.flags | (LR_FLOAT64 if lr_dtype == torch.float64 else 0), **there) for r in rows]
    for bucket, rows in zip(buckets, both, strict=True):
        bucket.row_table = torch.tensor(rows, dtype=torch.float64)
        for step in range(STEPS):
            run(Emulated(library), bucket, *(gradients(torch.float32, step, which) for which in (1, 2)))
    for a, b in zip(*(bucket.params for bucket in buckets), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("by_value", [0, 1, 2])
def test_rows_and_gradients_by_value_or_in_tables(library, by_value):
    for option in ("sgd-nesterov-maximize", "adamw-amsgrad-maximize"):
        backend = Emulated(library, by_value=by_value)
        check_steps(backend, fresh_bucket(option, torch.float32), option)


@pytest.mark.parametrize("split_bits", [0, 1, 2])
def test_parts_cover_every_element_exactly_once(library, split_bits):
    begin = ctypes.c_int()
    for length in [n for n in SIZES if 0 < n <= 8192]:
        seen = torch.zeros(length, dtype=torch.int32)
        for block in range(5 << split_bits, 6 << split_bits):
            n = library.fastsam_part(ctypes.c_int64(block), split_bits, length, ctypes.byref(begin))
            seen[begin.value : begin.value + n] += 1
        assert (seen == 1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("split_bits", [0, 1, 2])
def test_every_element_is_visited_exactly_once(library, dtype, split_bits):
    for at_g in (0, 8):
        bucket = bucket_of([torch.zeros(n, dtype=dtype) for n in SIZES], "sgd-dampening")
        bucket.rule, bucket.rows = SGD, [bucket.rows[0]._replace(beta1=1.0, beta2=0.0, rho=1 + 1e-12, lr=0.0)] * 3
        bucket.row_table = torch.tensor(bucket.rows, dtype=torch.float64)
        bucket.steps.fill_(1.0)  # not the first step: each visit adds the gradient to the buffer
        ones = [copied(shifted(n, dtype, at_g), torch.ones(n)) for n in SIZES]
        backend = Emulated(library, split_bits, 5)
        backend.perturb_(bucket, ones, torch.ones(1, dtype=torch.float64))
        for p, b in zip(bucket.params, bucket.backups, strict=True):
            assert (p == 1).all() and (b == 0).all()  # a second visit would climb again, from the wrong place
        backend.update_(bucket, ones)
        assert all((s == 1).all() for s in bucket.states[0])


@pytest.mark.parametrize("format", MASTERS + STOCHASTIC, ids=label)
@pytest.mark.parametrize("split_bits", [0, 1, 2])
def test_every_element_is_visited_exactly_once_whatever_the_format(library, format, split_bits):
    for at_g in (0, 8):
        bucket = bucket_of([torch.zeros(n, dtype=format.weight) for n in SIZES], "sgd-dampening", format=format)
        bucket.rows = [bucket.rows[0]._replace(beta1=1.0, beta2=0.0, rho=1 + 1e-12, lr=-1.0, weight_decay=0.0)] * 3
        bucket.row_table = torch.tensor(bucket.rows, dtype=torch.float64)
        bucket.steps.fill_(1.0)  # not the first step: each visit adds to the buffer, and that to the weight
        ones = [copied(shifted(n, format.grad, at_g), torch.ones(n)) for n in SIZES]
        backend = Emulated(library, split_bits, 5)
        backend.perturb_(bucket, ones, torch.ones(1, dtype=torch.float64))
        for i, p in enumerate(bucket.params):
            assert (p == 1).all()  # all numbers here are exact, whatever the random ones
            assert (bucket.masters[i] == 0).all() and (format.masters or (bucket.backups[i] == 0).all())
        backend.update_(bucket, ones)
        for i, p in enumerate(bucket.params):
            assert (p == 1).all() and (bucket.states[0][i] == 1).all()
            assert not format.masters or (bucket.masters[i] == 1).all()


@pytest.mark.parametrize("address", range(0, 64, 2))
def test_the_widest_access_an_address_allows(library, address):
    width = library.fastsam_width(ctypes.c_int64(4096 + address), 2)
    assert width == max(w for w in (2, 4, 8, 16) if address % w == 0)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_that_is_not_finite_perturbs_nothing(library, dtype, bad):
    bucket, backend = fresh_bucket("sgd-dampening", dtype), Emulated(library)
    before = [p.clone() for p in bucket.params]
    grads = [values(n, dtype, i) for i, n in enumerate(SIZES)]
    grads[-1][-1] = bad
    total, perturbed = run(backend, bucket, grads, [None] * len(SIZES))
    assert not total.isfinite()
    for p, b, q, old in zip(perturbed, bucket.backups, bucket.params, before, strict=True):
        assert torch.equal(p, old) and torch.equal(b, old) and torch.equal(q, old)


@pytest.mark.parametrize("option", ["sgd", "sgd-dampening", "adamw-amsgrad-maximize", "nadam"])
def test_found_inf_restores_and_updates_nothing(library, option):
    bucket, dtype, backend = fresh_bucket(option, torch.float32), torch.float32, Emulated(library, 1, 3)
    check_steps(backend, bucket, option)
    before = [t.clone() for t in [*bucket.params, *(s for state in bucket.states for s in state), bucket.progress]]
    infinite = [torch.full((n,), float("inf")) for n in SIZES]
    options = dict(found_inf=torch.ones(1), grad_scale=torch.tensor([8.0]))
    run(backend, bucket, gradients(dtype, 7, 1), infinite, **options)
    after = [*bucket.params, *(s for state in bucket.states for s in state), bucket.progress]
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("format", MASTERS + STOCHASTIC, ids=label)
def test_overflows_leave_masters_and_weights_as_they_were(library, format, bad):
    option = "adamw-amsgrad-maximize"
    bucket, backend = fresh_bucket(option, format), Emulated(library, 1, 3)
    for m in bucket.masters if format.masters else []:
        m.mul_(1 + 2**-20)  # not what the weights say, but rounded to them
    check = [*bucket.params, *bucket.masters, *itertools.chain(*bucket.states), bucket.progress]
    before = [t.clone() for t in check]
    grads = [values(n, format.grad, i) for i, n in enumerate(SIZES)]
    infinite = [torch.full((n,), bad, dtype=format.grad) for n in SIZES]
    # The norm is not finite; then the second gradient is not, with and without a perturbation before it.
    for first, second in ((infinite, grads), (grads, infinite), (None, infinite)):
        if first is not None:
            sums = torch.zeros(3, dtype=torch.float64)
            backend.grad_norm(bucket, first, sums)
            backend.perturb_(bucket, first, sums)
            same = [torch.equal(p, old) for p, old in zip(bucket.params, before, strict=False)]
            assert all(same) if first is infinite else not same[-1]  # few elements may all round to what they were
        backend.update_(bucket, second, found_inf=torch.ones(1), grad_scale=torch.tensor([8.0]))
        for old, new in zip(before, check, strict=True):
            torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)
    assert not format.stochastic or bucket.rounding.tolist() == [FIRST_DRAW + 3]


@pytest.mark.parametrize("format", MASTERS + STOCHASTIC, ids=label)
def test_without_a_rule_weights_are_restored_and_nothing_is_drawn(library, format):
    for q in (2.0, 1.5):
        bucket, backend = fresh_bucket("sgd", format, lambda n, dtype: shifted(n, dtype, 6)), Emulated(library, 2, 9)
        bucket.rule, bucket.q = None, q
        before = [p.clone() for p in bucket.params]
        grads = [values(n, format.grad, i) for i, n in enumerate(SIZES)]
        _, perturbed = run(backend, bucket, grads, [None] * len(SIZES))
        assert not torch.equal(perturbed[-1], before[-1])
        for p, old in zip(bucket.params, before, strict=True):
            assert torch.equal(p, old)
        assert not format.stochastic or bucket.rounding.tolist() == [FIRST_DRAW]


@pytest.mark.parametrize("format", MASTERS + STOCHASTIC, ids=label)
def test_a_radius_of_0_writes_no_weights(library, format):
    for q in (2.0, 1.5):
        bucket, backend = fresh_bucket("sgd", format), Emulated(library)
        bucket.q, bucket.rows = q, [row._replace(rho=0.0) for row in bucket.rows]
        bucket.row_table = torch.tensor(bucket.rows, dtype=torch.float64)
        before = [p.clone() for p in bucket.params]
        run(backend, bucket, [values(n, format.grad, i) for i, n in enumerate(SIZES)], [None] * len(SIZES))
        for p, b, old in zip(bucket.params, bucket.backups, before, strict=True):
            assert torch.equal(p, old) and (format.masters or torch.equal(b, old))


@pytest.mark.parametrize("format", MASTERS + STOCHASTIC, ids=label)
def test_another_norm_has_the_same_climb_as_the_reference(library, format):
    """But for the few that the last bits of exp2 and log2 take across a boundary."""
    ours, plan = fresh_bucket("sgd", format), fresh_bucket("sgd", format)
    grads = [values(n, format.grad, i) for i, n in enumerate(SIZES)]
    for bucket in (ours, plan):
        bucket.q, bucket.slot = 1.5, 0
    before, backend, totals = ours.params[-1].clone(), Emulated(library, 1, 3), torch.zeros(2, 1, dtype=torch.float64)
    backend.grad_norm(ours, grads, totals[0])
    backend.perturb_(ours, grads, totals[0])
    plan.device, plan.segments, chunk = torch.device("cpu"), [], 0
    for i, param in enumerate(plan.params):
        kept = (None, plan.masters[i]) if format.masters else (plan.backups[i], None)
        chunks = slice(chunk, chunk := chunk - (-len(param) // 8192))
        plan.segments.append(Operand(param, i % 3, len(param), True, index_of(i), chunks, *kept, plan.progress[i]))
    reference.grad_norm(plan, grads, totals[1])
    reference.perturb_(plan, grads, totals[1])
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-12, atol=0)
    for p, q in zip(ours.params, plan.params, strict=True):
        assert (p != q).sum() <= 1e-3 * len(p)
    assert not torch.equal(ours.params[-1], before)


@pytest.mark.parametrize("format", STOCHASTIC, ids=label)
def test_without_chunks_the_random_numbers_go_on(library, format):
    bucket = bucket_of([torch.zeros(0, dtype=format.weight)] * 3, "adam", format=format)
    Emulated(library).update_(bucket, [None] * 3)
    assert bucket.rounding.tolist() == [FIRST_DRAW + 1]


def test_overflows_are_counted_once_a_launch(library):
    bucket, backend, n = fresh_bucket("sgd", torch.float32), Emulated(library, 2, 5), len(SIZES)
    grads = gradients(torch.float32, 0, 1)
    for total, found_inf in ((math.inf, 0.0), (1.0, 1.0), (math.nan, 1.0), (4.0, 0.0), (0.0, 0.0)):
        backend.perturb_(bucket, grads if found_inf else [None] * n, torch.tensor([total], dtype=torch.float64))
        backend.update_(bucket, grads, found_inf=torch.tensor([found_inf]))
    assert bucket.overflows.tolist() == [2, 2]


def test_without_chunks_the_sum_is_0_and_empty_parameters_count(library):
    bucket, backend = bucket_of([torch.zeros(0)] * 3, "adam"), Emulated(library)
    out = torch.full((2,), float("nan"), dtype=torch.float64)
    grads = [torch.zeros(0), None, torch.zeros(0)]
    backend.grad_norm(bucket, grads, out)
    backend.perturb_(bucket, grads, out)
    backend.update_(bucket, grads)
    assert out[1] == 0 and bucket.steps.tolist() == [1, 0, 1]


@pytest.mark.filterwarnings(cases.NO_GRADIENTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", **cases.ids(cases.CONFIGS))
def test_whole_optimizer_has_the_references_bits(library, monkeypatch, config, dtype):
    check_whole_steps(library, monkeypatch, config, dtype)


@pytest.mark.filterwarnings(cases.NO_GRADIENTS)
@pytest.mark.parametrize("config", **cases.ids([cases.SGD_CONFIGS[-1], cases.ADAM_CONFIGS[-1]]))
def test_clipping_has_the_references_bits(library, monkeypatch, config):
    check_whole_steps(library, monkeypatch, config, torch.float32, max_grad_norm=3.0)


@pytest.mark.filterwarnings(cases.NO_GRADIENTS)
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, dict(master_weights=True)),
        (torch.float16, dict(stochastic_rounding=True, rounding_seed=2**40 + 7)),
        (torch.bfloat16, dict(master_weights=True, state_dtype=torch.bfloat16)),
    ],
    ids=str,
)
@pytest.mark.parametrize("config", **cases.ids([cases.SGD_CONFIGS[-1], cases.ADAM_CONFIGS[-1]]))
def test_masters_and_random_numbers_have_the_references_bits(library, monkeypatch, config, dtype, options):
    check_whole_steps(library, monkeypatch, config, dtype, **options)


@pytest.mark.parametrize("scale", test_general_p.SCALES)
@pytest.mark.parametrize("p", test_general_p.PS)
def test_every_p_and_every_size_of_gradients(library, monkeypatch, p, scale):
    emulate(library, monkeypatch)
    test_general_p.test_every_p_and_every_size_of_gradients("cpu", "cpu", p, scale)
    test_general_p.test_every_p_with_the_weights_metric("cpu", "cpu", p, scale)


@pytest.mark.parametrize("p", test_general_p.PS)
def test_norms_for_other_p_that_are_0_or_not_finite(library, monkeypatch, p):
    emulate(library, monkeypatch)
    test_general_p.test_no_gradient_at_all_has_a_norm_of_0("cpu", "cpu", p)
    for bad in (math.inf, -math.inf, math.nan):
        test_general_p.test_one_element_that_is_not_finite_is_noticed("cpu", "cpu", p, bad)


# ---- dot and combine_.

needs_tables = pytest.mark.skipif(
    ops.backends()["cpu"] is not None, reason="no native library, whose tables this needs"
)
OPERANDS = [dict(), dict(split_bits=1, seed=11), dict(split_bits=2, seed=12, threads=3, most=4)]


@needs_tables
@pytest.mark.parametrize("dtypes", test_dot_combine.MIXES, ids=test_dot_combine.together)
def test_dot_and_combine_have_the_references_bits_in_any_order_of_blocks(library, dtypes):
    for options in OPERANDS:
        backend = Emulated(library, **options)
        test_dot_combine.check_dot(backend, "cpu", dtypes)
        test_dot_combine.check_combine(backend, "cpu", dtypes)


@needs_tables
@pytest.mark.parametrize("offsets", test_dot_combine.OFFSETS, ids=test_dot_combine.together)
@pytest.mark.parametrize("dtypes", test_dot_combine.SOME, ids=test_dot_combine.together)
def test_any_alignment_of_operands(library, dtypes, offsets):
    backend = Emulated(library, **OPERANDS[1])
    test_dot_combine.check_dot(backend, "cpu", dtypes, offsets)
    test_dot_combine.check_combine(backend, "cpu", dtypes, offsets)


@needs_tables
@pytest.mark.parametrize("at_end", [True, False], ids=["ends", "starts"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_access_beyond_operands(library, dtype, at_end):
    for options in OPERANDS:
        test_dot_combine.check_guarded(Emulated(library, **options), dtype, at_end)


@needs_tables
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operands_that_are_not_finite(library, dtype):
    test_dot_combine.check_not_finite(Emulated(library, **OPERANDS[1]), "cpu", dtype)


@needs_tables
@pytest.mark.parametrize("most", [1, 7, 299, 300])
def test_addresses_that_take_several_launches(library, most):
    backend = Emulated(library, split_bits=2, seed=5, most=most)
    test_dot_combine.check_many(backend, "cpu", 300)
    test_dot_combine.check_layouts(backend, "cpu")
    test_dot_combine.check_nothing(backend, "cpu")


def emulate(library, monkeypatch):
    """Let the kernels' bodies stand for the backend `cpu`."""
    if ops.backends()["cpu"] is not None:
        pytest.skip(f"no native library, whose tables this needs: {ops.backends()['cpu']}")
    cases.stand_in(monkeypatch, "cpu", Emulated(library, 2, 7))


def check_whole_steps(library, monkeypatch, config, dtype, **options):
    emulate(library, monkeypatch)
    ours, theirs = cases.make_params(dtype), cases.make_params(dtype)
    opt, reference = cases.fused(ours, config, "cpu", **options), cases.fused(theirs, config, **options)
    for step in range(cases.STEPS):
        for o, params in ((opt, ours), (reference, theirs)):
            cases.set_gradients(params, step, 1)
            o.first_step()
        assert_equal(ours, theirs, dtype, f"perturbed weights of step {step}")
        for o, params in ((opt, ours), (reference, theirs)):
            cases.set_gradients(params, step, 2)
            o.step()
        assert_equal(ours, theirs, dtype, f"weights after step {step}")
    for p, q in zip(ours, theirs, strict=True):
        assert opt.state.get(p, {}).keys() == reference.state.get(q, {}).keys()
        for name, value in opt.state.get(p, {}).items():
            assert_equal([value], [reference.state[q][name]], dtype, name)


def assert_equal(ours, theirs, dtype, what):
    # The gradients depend on the weights, and float64 sums on the reference's addcmul, which may round twice.
    tolerance = dict(rtol=1e-13, atol=1e-15) if dtype == torch.float64 else dict(rtol=0, atol=0)
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(p, q, equal_nan=True, msg=lambda text, i=i: f"{what}, {i}: {text}", **tolerance)


def run_with_thread_sanitizer(objects, name, *flags):
    program = compiled(objects, name, "-O1", "-g", "-fsanitize=thread", "-DFASTSAM_MAIN", "-DFASTSAM_FEW_RULES", *flags)
    # The sanitizer's memory layout needs addresses that randomisation may take away.
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    for prefix in (fixed, []):
        done = subprocess.run([*prefix, str(program)], capture_output=True, text=True)
        if done.returncode == 0 or "WARNING: ThreadSanitizer" in done.stderr or not done.stderr:
            return done
    pytest.skip(f"ThreadSanitizer does not run here: {done.stderr.strip().splitlines()[0]}")


@pytest.mark.slow
def test_blocks_on_several_threads_without_a_race(objects):
    done = run_with_thread_sanitizer(objects, "races")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_ticket_without_its_memory_order_is_noticed(objects):
    done = run_with_thread_sanitizer(objects, "relaxed", "-DFASTSAM_TICKET_ORDER=__ATOMIC_RELAXED")
    assert "WARNING: ThreadSanitizer: data race" in done.stderr
