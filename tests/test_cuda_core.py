"""The CUDA kernels' own bodies, compiled for this CPU and run over a grid: what they compute needs no GPU."""

import ctypes
import hashlib
import math
import shutil
import subprocess
from pathlib import Path

import cases
import pytest
import torch
from rounding import (
    DTYPES,
    MIXED,
    OPTIONS,
    SIZES,
    STEPS,
    bucket_of,
    copied,
    expected,
    fresh_bucket,
    gradients,
    guarded,
    point,
    shifted,
    slots_of,
    values,
)

from fastsam import ops
from fastsam.rules import LR_FLOAT64, SGD

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "tests" / "cuda_core.cpp"
FLAGS = ["-std=c++17", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-pthread"]
CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
GRAD_NORM, PERTURB, UPDATE = range(3)
POINTERS = "chunks segments rows grads perturbed ticket partials sums grad_scale found_inf clip overflows".split()
NUMBERS = "n_chunks n_segments n_groups n_sums slot split_bits by_value seed threads rule".split()
OFFSETS = [(0, 0), (8, 0), (0, 8), (4, 12), (12, 8), (8, 8), (2, 6), (14, 10)]  # of weights and gradients, in bytes


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
    headers = sorted([*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.h"), SOURCE])
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


@pytest.fixture(scope="session")
def library(objects):
    return ctypes.CDLL(str(compiled(objects, "core", "-O2", "-shared", "-fPIC")))


class Emulated:
    """A backend: the three operations with the signatures of `ops/reference.py`, run by the kernels' bodies."""

    def __init__(self, library, split_bits=0, seed=0, threads=1, by_value=3):
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
        self.library.fastsam_run(operation, CODES[bucket.dtype], CODES[bucket.grad_dtype], ctypes.byref(launch))
        assert self.tickets.tolist() == [0, 0]

    def grad_norm(self, bucket, grads, out, *, clip=None):
        more = {} if clip is None else dict(max_norm=clip.max_norm, clip=clip.factor, grad_scale=clip.grad_scale)
        self.run(GRAD_NORM, bucket, grads, 0, bucket.slot, partials=bucket.partials, sums=out, **more)

    def perturb_(self, bucket, grads, sums):
        bucket.perturbed |= torch.tensor([g is not None for g in grads], dtype=torch.bool)
        self.run(PERTURB, bucket, grads, 0, sums=sums, overflows=bucket.overflows)

    def update_(self, bucket, grads, *, grad_scale=None, found_inf=None, clip=None):
        factors = dict(grad_scale=grad_scale, found_inf=found_inf, clip=clip, overflows=bucket.overflows)
        self.run(UPDATE, bucket, grads, 1, perturbed=bucket.perturbed, **factors)
        bucket.perturbed.zero_()


def run(backend, bucket, grads1, grads2, **options):
    sums = torch.full((3,), float("nan"), dtype=torch.float64)
    sums[0], sums[2] = 0.25, 0.5  # other buckets
    backend.grad_norm(bucket, grads1, sums)
    backend.perturb_(bucket, grads1, sums)
    perturbed = [p.clone() for p in bucket.params]
    backend.update_(bucket, grads2, **options)
    return sums[1].clone(), perturbed


def assert_same(actual, plan, what):
    """Bit-equal; float64 to its last places, because the plan's fma rounds twice there."""
    if plan.dtype == torch.float64:
        torch.testing.assert_close(actual, plan, rtol=1e-14, atol=1e-16, msg=lambda text: f"{what}: {text}")
    else:
        assert torch.equal(actual, plan), f"{what}: {(actual != plan).sum()} of {plan.numel()} differ"


def check_steps(backend, bucket, option, dtype, place=lambda grad: grad):
    sums, climbs, weights, states, counts, products = expected(option, dtype, bucket.grad_dtype)
    for step in range(STEPS):
        grads = [[g if g is None else place(g) for g in gradients(bucket.grad_dtype, step, which)] for which in (1, 2)]
        total, perturbed = run(backend, bucket, *grads)
        assert total == (pytest.approx(sums[step], rel=1e-14) if dtype == torch.float64 else sums[step])
        for i, (p, plan) in enumerate(zip(perturbed, climbs[step], strict=True)):
            assert_same(p, plan, f"perturbed weights of segment {i} in step {step}")
    used = slots_of(option)
    for i, plan in enumerate(weights):
        assert_same(bucket.params[i], plan, f"weights of segment {i}")
        for k in range(3):
            if k not in used:
                assert bucket.states[k][i].isnan().all(), f"unused state {k} of segment {i} was written"
            elif counts[i]:
                assert_same(bucket.states[k][i], states[k][i], f"state {k} of segment {i}")
    assert bucket.steps.tolist() == counts.tolist() and bucket.products.tolist() == products


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_three_sam_steps_follow_the_plan_in_any_order_of_blocks(library, dtype, option):
    for split_bits, seed in ((0, 0), (1, 11), (2, 12)):
        check_steps(Emulated(library, split_bits, seed), fresh_bucket(option, dtype), option, dtype)


@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_alignment(library, dtype, offsets):
    at_p, at_g = (offset // dtype.itemsize * dtype.itemsize for offset in offsets)
    for option in ("sgd-dampening", "adam", "rmsprop-centered"):
        bucket = fresh_bucket(option, dtype, lambda n, dtype: shifted(n, dtype, at_p))
        check_steps(Emulated(library, 1), bucket, option, dtype, lambda g: copied(shifted(len(g), dtype, at_g), g))


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
    check_steps(Emulated(library), bucket, option, dtype, lambda g: copied(make(len(g), dtype), g))


@pytest.mark.parametrize("offsets", [(0, 0), (8, 8), (12, 4), (6, 2)], ids=str)
@pytest.mark.parametrize(("dtype", "grad_dtype"), MIXED, ids=str)
def test_gradients_of_another_dtype(library, dtype, grad_dtype, offsets):
    at_p, at_g = (at // kind.itemsize * kind.itemsize for at, kind in zip(offsets, (dtype, grad_dtype), strict=True))
    for option in ("sgd-dampening", "adamw-amsgrad-maximize"):
        bucket = fresh_bucket(option, dtype, lambda n, dtype: shifted(n, dtype, at_p))
        bucket.grad_dtype = grad_dtype
        check_steps(Emulated(library, 1), bucket, option, dtype, lambda g: copied(shifted(len(g), g.dtype, at_g), g))


@pytest.mark.parametrize(("dtype", "grad_dtype"), MIXED, ids=str)
def test_no_access_beyond_gradients_of_another_dtype(library, dtype, grad_dtype):
    for at_end in (True, False):
        bucket = fresh_bucket("sgd-dampening", dtype)
        bucket.grad_dtype = grad_dtype
        place = lambda g, at_end=at_end: copied(guarded(len(g), g.dtype, at_end), g) if len(g) else g  # noqa: E731
        check_steps(Emulated(library), bucket, "sgd-dampening", dtype, place)


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
        check_steps(backend, fresh_bucket(option, torch.float32), option, torch.float32)


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
    check_steps(backend, bucket, option, dtype)
    before = [t.clone() for t in [*bucket.params, *(s for state in bucket.states for s in state), bucket.progress]]
    infinite = [torch.full((n,), float("inf")) for n in SIZES]
    options = dict(found_inf=torch.ones(1), grad_scale=torch.tensor([8.0]))
    run(backend, bucket, gradients(dtype, 7, 1), infinite, **options)
    after = [*bucket.params, *(s for state in bucket.states for s in state), bucket.progress]
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)


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


def check_whole_steps(library, monkeypatch, config, dtype, **options):
    if ops.backends()["cpu"] is not None:
        pytest.skip(f"no native library, whose tables this needs: {ops.backends()['cpu']}")
    monkeypatch.setitem(ops._OPERATIONS, "cpu", Emulated(library, 2, 7))
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
    program = compiled(objects, name, "-O1", "-g", "-fsanitize=thread", "-DFASTSAM_MAIN", *flags)
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
