"""The Triton kernels on the CPU: what test_triton.py runs in a process with TRITON_INTERPRET=1.

The interpreter takes about 20 ms for each program of a kernel, so tensors are few here. What the C++ library's tests
ask of a table of addresses is asked of these kernels by the same functions, imported below.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import weakref

import cases
import numpy as np
import pytest
import rounding
import test_captures
import test_layouts
import test_native
import torch
from cases import ADAM_CONFIGS, CONFIGS, Config
from oracle import assert_same, assert_same_state, bits
from rounding import MASTERS, OPTIONS, PLAIN, SIZES, STOCHASTIC, copied, fma, fresh_bucket, guarded, point, shifted
from test_captures import (  # noqa: F401
    make,
    take,
    test_a_capture_right_after_prepare,
    test_a_group_whose_perturb_was_switched_is_not_in_the_graph,
    test_a_refresh_in_a_capture_is_refused,
    test_masters_are_compared_before_a_capture_not_in_every_replay,
    test_nothing_that_a_replay_reads_or_writes_is_freed,
    test_the_gradients_of_both_passes_are_kept,
)
from test_clipping import (  # noqa: F401
    test_a_norm_that_is_not_finite_shows,
    test_clipping_may_be_switched_on_and_off,
    test_norms_and_loss_increase,
    test_overflows_are_counted_where_the_first_bucket_has_nothing_but_empty_tensors,
    test_overflows_of_either_pass_are_counted,
)
from test_general_p import (  # noqa: F401
    test_every_p_and_every_size_of_gradients,
    test_every_p_with_the_weights_metric,
    test_gradients_that_are_not_finite,
    test_no_gradient_at_all_has_a_norm_of_0,
    test_one_element_that_is_not_finite_is_noticed,
    test_zero_gradients_perturb_nothing,
)
from test_native import (  # noqa: F401
    check_steps,
    test_a_bucket_without_a_rule_only_restores,
    test_a_clip_factor_of_0_clears_infinite_gradients,
    test_low_precision_rounds_to_nearest_even_at_every_magnitude,
    test_rho_0_writes_the_backup_and_keeps_the_weights,
)
from torch.nn import Parameter

from fastsam import methods, ops
from fastsam.bases.rules import LR_FLOAT64, Row
from fastsam.ops import reference
from fastsam.ops.formats import Format
from fastsam.ops.tables import Gradients, Operand, Tables

kernels = ops.backend_named("triton").operations
capture = test_captures.capture  # a fixture
triton_kernels = importlib.import_module("fastsam.ops.triton_kernels")
FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = rounding.DTYPES
pytestmark = pytest.mark.filterwarnings(cases.NO_GRADIENTS)


def test_these_tests_interpret_the_kernels():
    assert cases.interpreted() and kernels.INTERPRETED and ops.backends()["triton"] is None


def name_of(value):
    """The name of a test's parameter."""
    return rounding.label(value) if isinstance(value, Format) else str(value)


def one_rounding() -> bool:
    """Whether the interpreter's `tl.fma` rounds once: from Triton 3.7 on, asked with values that decide."""
    bucket = rounding.bucket_of([torch.linspace(1, 2, 1027)], "sgd")
    bucket.device, bucket.cache = torch.device("cpu"), None
    bucket.row_table[:, 1] = 0.0
    w, g = bucket.params[0].numpy().copy(), torch.linspace(2, 3, 1027)
    kernels.update_(bucket, [g])
    return bool((fma(g.numpy() * 0 - 0.07, g.numpy(), w).astype("float32") == bucket.params[0].numpy()).all())


FUSES = one_rounding()


def two_roundings(a, b, c):
    """What `tl.fma` is in the interpreter of Triton 3.6: the plan has to round as often to get the same bits."""
    return a * b + c


@pytest.fixture
def hints(monkeypatch):
    """The interpreter reads at any address; on a GPU an alignment that does not hold is an error."""
    plain, given = triton_kernels._pointer, set()

    def pointer(address, start, STORAGE, ALIGN):
        align, at = int(getattr(ALIGN, "value", ALIGN)), address.handle.data.item()
        given.add((str(getattr(STORAGE, "value", STORAGE)), align))
        assert align == 0 or at % align == 0, f"{at:#x} is not a multiple of {align}"
        return plain(address, start, STORAGE, ALIGN)

    monkeypatch.setattr(triton_kernels, "_pointer", pointer)
    return given


@pytest.fixture(autouse=True)
def isa(monkeypatch):
    """The imported tests, and rounding.run, call `native`; their buckets lack what only this backend reads."""
    plain = rounding.bucket_of

    def bucket_of(*args, **kwargs):
        bucket = plain(*args, **kwargs)
        bucket.device, bucket.cache = torch.device("cpu"), None
        return bucket

    same = test_native.assert_same

    def assert_same_but_for_float64(actual, plan, what):
        if plan.dtype == torch.float64:  # whose fma the interpreter rounds twice
            torch.testing.assert_close(actual, plan, rtol=1e-14, atol=1e-16, msg=lambda text: f"{what}: {text}")
        else:
            same(actual, plan, what)

    monkeypatch.setattr(test_native, "assert_same", assert_same_but_for_float64)
    monkeypatch.setattr(kernels, "_PROGRAMS", 0)  # one program a chunk: the fewer, the sooner this is done
    for module in (rounding, test_native):
        monkeypatch.setattr(module, "native", kernels)
        monkeypatch.setattr(module, "bucket_of", bucket_of)
    for module in () if FUSES else (rounding, test_native, reference):
        monkeypatch.setattr(module, "fma", two_roundings)


# ---- Tables of addresses, against the rounding plan.


@pytest.fixture
def few(monkeypatch):
    """Fewer elements: what takes the interpreter long is their number. A gradient is missing in either pass."""
    monkeypatch.setattr(rounding, "SIZES", [65, 63, 3, 8193, 2055, 1031, 0])
    rounding.expected.cache_clear()
    yield
    rounding.expected.cache_clear()


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("option", OPTIONS)
def test_three_sam_steps_follow_the_plan(option):
    check_steps(fresh_bucket(option, FLOAT32), option)


@pytest.mark.parametrize("option", ["sgd-nesterov-maximize", "adamw-amsgrad-maximize"])
def test_three_sam_steps_of_all_sizes_follow_the_plan(option):
    check_steps(fresh_bucket(option, FLOAT32), option)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    "dtype, option",
    [(FLOAT64, "adamw"), (BFLOAT16, "adamw-amsgrad-maximize"), (BFLOAT16, "sgd"), (FLOAT16, "sgd-nesterov-maximize")],
    ids=str,
)
def test_three_sam_steps_in_other_precisions(dtype, option):
    check_steps(fresh_bucket(option, dtype), option)


# Each format with another rule; of one the third state is drawn, too.
IN_FORMATS = [
    *zip(MASTERS, ("adamw-amsgrad-maximize", "sgd-nesterov-maximize", "rmsprop", "adagrad"), strict=True),
    *zip(
        STOCHASTIC,
        ("adamw", "sgd-dampening", "rmsprop-centered-momentum-far-lerp", "nadam", "lion-decay-maximize-far-lerp"),
        strict=True,
    ),
    (STOCHASTIC[1], "radam-rectified"),
]


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("format, option", IN_FORMATS, ids=name_of)
def test_three_sam_steps_in_other_formats(format, option):
    check_steps(fresh_bucket(option, format), option)


@pytest.mark.usefixtures("hints")
@pytest.mark.parametrize(
    "format, at_p, at_g",
    [
        (PLAIN[0], 16, 8),
        (PLAIN[0], 12, 12),
        (PLAIN[2], 8, 24),
        (PLAIN[2], 2, 6),
    ],
    ids=name_of,
)
def test_any_alignment(format, at_p, at_g):
    check_alignment(format, at_p, at_g)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    "format, at_p, at_g, align",
    [
        (MASTERS[0], 8, 24, 16),
        (MASTERS[0], 4, 8, 8),
        (MASTERS[1], 8, 8, 8),
        (MASTERS[3], 2, 4, 0),
        (STOCHASTIC[0], 8, 16, 8),
        (STOCHASTIC[2], 12, 12, 0),
    ],
    ids=name_of,
)
def test_any_alignment_in_other_formats(hints, format, at_p, at_g, align):
    """`align` is what the full tiles' weights are said to be multiples of, were they as wide as their source."""
    check_alignment(format, at_p, at_g)
    said = align * format.weight.itemsize // format.source.itemsize
    assert (str(kernels._STORAGE[format.weight]), said) in hints


def check_alignment(format, at_p, at_g):
    bucket = fresh_bucket("sgd-dampening", format, lambda n, dtype: shifted(n, dtype, at_p))
    check_steps(bucket, "sgd-dampening", lambda g: copied(shifted(len(g), g.dtype, at_g), g))


FEW = [0, 65, 8193]


def few_bucket(option, dtype, make=shifted):
    params = [copied(make(n, dtype), rounding.values(n, dtype, i)) for i, n in enumerate(FEW)]
    return rounding.bucket_of(params, option)


# Where weights and gradients lie, in bytes, and what the gradients' full tiles are then said to be multiples of.
MIXED = [
    (FLOAT32, BFLOAT16, 16, 8, 8),
    (FLOAT32, BFLOAT16, 8, 16, 4),
    (FLOAT32, BFLOAT16, 16, 2, 0),
    (FLOAT32, FLOAT16, 16, 4, 4),
    (BFLOAT16, FLOAT32, 16, 16, 16),
    (BFLOAT16, FLOAT32, 16, 8, 8),
    (FLOAT16, FLOAT32, 2, 4, 0),
]


@pytest.mark.parametrize("dtype, grad_dtype, at_p, at_g, align", MIXED, ids=str)
def test_gradients_of_another_dtype_at_any_alignment(hints, dtype, grad_dtype, at_p, at_g, align):
    """The bits that gradients of the weights' dtype give, for values that both dtypes have."""
    mixed, plain = few_bucket("adamw", dtype, lambda n, dtype: shifted(n, dtype, at_p)), few_bucket("adamw", dtype)
    mixed.format = rounding.mixed(dtype, grad_dtype)
    half = min(dtype, grad_dtype, key=lambda dtype: dtype.itemsize)
    exact = [[rounding.values(n, half, seed + n) for n in FEW] for seed in (1, 2)]
    given = [[copied(shifted(len(g), grad_dtype, at_g), g) for g in grads] for grads in exact]
    sums = rounding.run(mixed, *given)[0]
    assert max(multiple for storage, multiple in hints if storage == str(kernels._STORAGE[grad_dtype])) == align
    assert sums == rounding.run(plain, *([g.to(dtype) for g in grads] for grads in exact))[0]
    for a, b in zip(mixed.params + mixed.states[1], plain.params + plain.states[1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype, grad_dtype", [(FLOAT32, BFLOAT16), (FLOAT16, FLOAT32)], ids=str)
def test_no_access_beyond_a_gradient_of_another_dtype(dtype, grad_dtype):
    bucket = few_bucket("sgd", dtype)
    bucket.format = rounding.mixed(dtype, grad_dtype)
    for at_end in (True, False):
        grads = [
            copied(guarded(n, grad_dtype, at_end) if n else shifted(n, grad_dtype), rounding.values(n, FLOAT32, n))
            for n in FEW
        ]
        rounding.run(bucket, grads, grads)


test_gradients_of_another_dtype = pytest.mark.parametrize("backend", ["triton"])(
    test_layouts.test_gradients_of_another_dtype
)


@pytest.mark.parametrize("lr_dtype", [FLOAT32, FLOAT64], ids=str)
@pytest.mark.parametrize("option", ["sgd-nesterov-maximize", "adamw"])
def test_a_tensor_lr_is_read_where_it_is(option, lr_dtype):
    lr, plain, told = torch.empty(1, dtype=lr_dtype), few_bucket(option, FLOAT32), few_bucket(option, FLOAT32)
    for bucket, column in ((told, Row._fields.index("lr_address")), (plain, Row._fields.index("lr"))):
        bucket.row_table[:, Row._fields.index("lr")] = 0.0
        bucket.row_table[:, column] = float(lr.data_ptr())
    told.row_table[:, Row._fields.index("flags")] += LR_FLOAT64 * (lr_dtype == FLOAT64)
    for value in (0.07, 0.013):  # the table stays as it is
        lr.fill_(value)
        plain.row_table[:, Row._fields.index("lr")] = lr.double()
        for bucket in (told, plain):
            rounding.run(bucket, grads_of(1, FEW), grads_of(2, FEW))
    for a, b in zip(told.params + told.states[0], plain.params + plain.states[0], strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(plain.params[-1], rounding.values(FEW[-1], FLOAT32, len(FEW) - 1))


@pytest.mark.parametrize("at_end", [True, False], ids=["ends", "starts"])
def test_no_access_beyond_any_tensor(at_end):
    def make(n, dtype):
        return guarded(n, dtype, at_end) if n else shifted(n, dtype)

    option = "adamw-amsgrad-maximize"
    bucket = fresh_bucket(option, FLOAT32, make)
    bucket.backups = [torch.full_like(make(len(p), FLOAT32), float("nan")) for p in bucket.params]
    bucket.states = [[copied(make(len(s), FLOAT32), s) for s in state] for state in bucket.states]
    point(bucket)
    check_steps(bucket, option, lambda g: copied(make(len(g), FLOAT32), g))


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    "format, at_end", [(MASTERS[2], True), (STOCHASTIC[3], True), (STOCHASTIC[3], False)], ids=name_of
)
def test_no_access_beyond_any_tensor_of_another_dtype(format, at_end):
    def make(n, dtype):
        return guarded(n, dtype, at_end) if n else shifted(n, dtype)

    bucket = fresh_bucket("adamw", format, make)
    bucket.masters = [copied(make(len(m), m.dtype), m) for m in bucket.masters]
    bucket.states = [[copied(make(len(s), s.dtype), s) for s in state] for state in bucket.states]
    point(bucket)
    check_steps(bucket, "adamw", lambda g: copied(make(len(g), g.dtype), g))


# The masters' kernels; the weights' numbers in both passes; the states' with masters.
KEPT = pytest.mark.parametrize("format", [MASTERS[0], STOCHASTIC[1], STOCHASTIC[3]], ids=name_of)


def kept_bucket(format):
    """Weights that are their masters, rounded, and what `contents` are then."""
    bucket = fresh_bucket("adamw", format)
    for i, (w, master) in enumerate(zip(bucket.params, bucket.masters, strict=True)):
        w.copy_(master.copy_(rounding.values(len(w), format.source, i)))
    return bucket, contents(bucket)


def contents(bucket):
    states = [s for state in bucket.states for s in state]
    return [bits(t) for t in [*bucket.params, *bucket.masters, *states, bucket.progress]]


def filled(bucket, value):
    return [torch.full_like(p, value, dtype=bucket.format.grad) for p in bucket.params]


@KEPT
@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("found_inf", [True, False], ids=["found_inf", "no gradients"])
def test_a_skipped_update_only_restores_in_other_formats(format, found_inf):
    bucket, before = kept_bucket(format)
    second = filled(bucket, math.inf) if found_inf else [None] * len(bucket.params)
    _, perturbed = rounding.run(
        bucket, rounding.gradients(format.grad, 7, 1), second, found_inf=torch.ones(1) if found_inf else None
    )
    assert [bits(p) for p in perturbed] != before[: len(perturbed)] and contents(bucket) == before
    assert not bucket.perturbed.any() and bucket.overflows.tolist() == [0, int(found_inf)]
    if format.stochastic:
        assert bucket.rounding.tolist() == [rounding.FIRST_DRAW + 1]


@KEPT
@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("rho", [0.0, 0.5])
@pytest.mark.parametrize("q", [2.0, 1.5])
def test_no_perturbation_in_other_formats(format, rho, q):
    """With rho 0, and with a norm that is not finite: 0 * inf would show."""
    bucket, before = kept_bucket(format)
    bucket.row_table[:, Row._fields.index("rho")], bucket.q = rho, q
    kernels.perturb_(bucket, filled(bucket, math.inf), torch.full((1,), 1.0 if rho == 0 else math.inf).double())
    assert contents(bucket) == before and bucket.perturbed.all() and bucket.overflows.tolist() == [int(rho != 0), 0]
    for w, backup in zip(bucket.params, bucket.backups, strict=True):
        assert backup.isnan().all() if format.masters else bits(backup) == bits(w)
    if format.stochastic:
        assert bucket.rounding.tolist() == [rounding.FIRST_DRAW]


@KEPT
@pytest.mark.usefixtures("few")
def test_random_numbers_take_a_step_in_updates_with_a_rule_alone(format):
    """What backends count must not differ: with a rule or none, without gradients, after an overflow."""
    steps = []
    for operations in (kernels, ops.backend_named("cpu").operations):
        bucket, steps_of = fresh_bucket("adamw", format), []
        some, none = filled(bucket, 0.5), [None] * len(bucket.params)
        adam = bucket.rule
        situations = [(adam, some, None), (adam, none, None), (adam, some, torch.ones(1)), (None, none, None)]
        for bucket.rule, grads, found_inf in [*situations, situations[0]]:
            operations.update_(bucket, grads, found_inf=found_inf)
            steps_of.append((bucket.rounding.tolist() if format.stochastic else None, bucket.overflows.tolist()))
        steps.append(steps_of)
    assert steps[0] == steps[1]
    if format.stochastic:
        assert [taken[0] - rounding.FIRST_DRAW for taken, _ in steps[0]] == [1, 2, 3, 3, 4]


def test_a_graph_whose_norm_knows_no_metric_is_outdated_when_a_group_becomes_adaptive(capture):
    params, opt = make("triton", "cpu")
    take(opt)
    with capture:
        take(opt)
    opt.refresh()
    opt.param_groups[0]["adaptive"] = True
    with pytest.raises(RuntimeError, match="adaptive, another norm.*capture it again"):
        opt.refresh()
    take(opt)
    with capture:
        take(opt)
    opt.param_groups[0]["adaptive"] = False
    opt.refresh()


def test_a_restore_after_a_capture_allocates_nothing(capture, monkeypatch):
    """It may come after the device's memory ran out, and what a graph reads is not to be written again."""
    params, opt = make("triton", "cpu")
    take(opt)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.first_step()
    with capture:  # shares the tables of the eager steps
        opt.second_step()
    before = [bits(p) for p in params]
    opt.first_step()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda *_, **__: pytest.fail("allocates"))
        opt.restore()
    assert [bits(p) for p in params] == before


@pytest.mark.parametrize("format", STOCHASTIC[:2], ids=name_of)
def test_low_precision_is_rounded_stochastically_at_every_magnitude(format):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(format.weight)
    w, g = torch.cat([every, every]), torch.cat([every.flip(0), torch.full_like(every, 0.75)])
    bucket = rounding.bucket_of([w.clone()], "sgd", format=format)
    bucket.row_table[:, Row._fields.index("weight_decay")] = 0.0
    rounding.run(bucket, [None], [g])
    noise = rounding.draw(len(w), rounding.SEED, rounding.index_of(0), rounding.FIRST_DRAW, 1)
    with np.errstate(all="ignore"):
        sums = rounding.fma(np.float32(-0.07), rounding.widened(g), rounding.widened(w))
    plan = rounding.drawn(sums, format.weight, noise)
    torch.testing.assert_close(bucket.params[0], plan, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("split", [2, 4])
def test_any_number_of_programs_a_chunk(monkeypatch, split):
    bucket = fresh_bucket("adamw", FLOAT32)
    monkeypatch.setattr(kernels, "_PROGRAMS", split * len(bucket.chunk_table) - 1)
    assert kernels._split(bucket) == split
    check_steps(bucket, "adamw")
    assert bucket.cache.tickets.tolist() == [0, 0, 0]


@pytest.mark.parametrize("bad", [float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_a_norm_that_is_not_finite_perturbs_nothing(dtype, bad):
    test_native.test_a_norm_that_is_not_finite_perturbs_nothing(None, dtype, bad)


@pytest.mark.parametrize("option", ["sgd-dampening", "adamw-amsgrad-maximize"])
def test_found_inf_restores_and_updates_nothing(option):
    bucket = fresh_bucket(option, FLOAT32)
    g1, infinite = rounding.gradients(FLOAT32, 7, 1), [torch.full((n,), float("inf")) for n in SIZES]
    before = [bits(t) for t in [*bucket.params, *(s for state in bucket.states for s in state), bucket.progress]]
    rounding.run(bucket, g1, infinite, found_inf=torch.ones(1), grad_scale=torch.tensor([8.0]))
    after = [bits(t) for t in [*bucket.params, *(s for state in bucket.states for s in state), bucket.progress]]
    assert before == after and not bucket.perturbed.any()


def test_loss_scale_and_clip_factor():
    test_native.test_loss_scale_and_clip_factor(None, FLOAT32, "sgd-nesterov-maximize")


def test_scalars_are_checked():
    bucket = fresh_bucket("sgd", FLOAT32)
    with pytest.raises(RuntimeError, match=r"update_: clip must be one element of torch.float64, got \[1\]"):
        kernels.update_(bucket, [None] * len(SIZES), clip=torch.ones(1))
    with pytest.raises(RuntimeError, match=r"update_: found_inf must be one element of torch.float32, got \[2\]"):
        kernels.update_(bucket, [None] * len(SIZES), found_inf=torch.ones(2))
    clip = reference.Clip(1.0, torch.ones((), dtype=FLOAT64), torch.ones(2))
    with pytest.raises(RuntimeError, match=r"grad_norm: grad_scale must be one element of torch.float32, got \[2\]"):
        kernels.grad_norm(bucket, [None] * len(SIZES), torch.zeros(1, dtype=FLOAT64), clip=clip)


@pytest.mark.parametrize("n_chunks", [1, 1023, 1024, 1025, 2600])
def test_partial_sums_are_added_in_the_canonical_order(n_chunks):
    partials = torch.randn(n_chunks, dtype=torch.float64).exp()
    partials[0] = 0.0  # what the only program here writes: its segment has no gradient
    bucket, out = fresh_bucket("sgd", FLOAT32), torch.zeros(3, dtype=torch.float64)
    bucket.chunk_table = bucket.chunk_table[:1].repeat(n_chunks, 1)
    tables = bucket.segment_table, bucket.chunk_table, torch.zeros_like(bucket.grad_table), bucket.row_table
    ticket = torch.zeros(1, dtype=torch.int32)
    constants = kernels._constants(bucket, kernels._grad_norm_kernel, (False, False, False))
    numbers, one = torch.zeros(2, dtype=torch.float64), torch.ones(1)
    launch = kernels._launcher(kernels._grad_norm_kernel, bucket.device, 1, constants)
    launch(*tables, partials, ticket, out, numbers, numbers, one, 1, len(out), 0, n_chunks)
    assert out.tolist() == [0.0, reference._slot_sum(partials).item(), 0.0]


def test_tables_are_uploaded_only_when_a_value_changed(monkeypatch):
    uploads = []
    upload = kernels.DeviceCopy._upload
    monkeypatch.setattr(kernels.DeviceCopy, "_upload", lambda self, *a: (uploads.append(self), upload(self, *a)))
    bucket = fresh_bucket("adamw", FLOAT32)
    one, two = grads_of(1), grads_of(2)
    rounding.run(bucket, one, two)
    own = bucket.cache
    mirrors = own.ascent, own.rows, own.perturbed, own.descent, own.numbers_there
    assert {id(u) for u in uploads} == {id(m) for m in mirrors}
    uploads.clear()
    rounding.run(bucket, one, two)
    assert uploads == []
    bucket.row_table[:, 0] *= 0.5
    two[3] = two[3].clone()
    rounding.run(bucket, one, two)
    assert uploads == [own.rows, own.descent]
    assert own.rows.copy.tolist() == bucket.row_table.tolist()


def test_what_a_captured_graph_reads_is_never_written_again(monkeypatch):
    """A capture as the host sees it: the kernels run at once here, a GPU's at each replay."""
    capturing, launches, plain = False, [], kernels._launcher

    def launcher(*args):
        launch = plain(*args)

        def note(*args):
            if capturing:
                launches.append(args)
            launch(*args)

        return note

    def upload(self, table):
        assert not capturing, "a graph must not copy from the host's memory"
        uploads(self, table)

    uploads = kernels.DeviceCopy._upload
    monkeypatch.setattr(kernels, "_launcher", launcher)
    monkeypatch.setattr(kernels.graphs, "capturing", lambda device: capturing)
    monkeypatch.setattr(kernels.DeviceCopy, "_upload", upload)
    bucket, twin = few_bucket("adamw", FLOAT32), few_bucket("adamw", FLOAT32)
    eager, captured = [grads_of(1, FEW), grads_of(2, FEW)], [grads_of(3, FEW), grads_of(4, FEW)]
    captured[0][1] = None
    capturing = True
    with pytest.raises(RuntimeError, match="take a step like it before a CUDA graph is captured"):
        kernels.grad_norm(bucket, eager[0], torch.zeros(2, dtype=torch.float64))
    steps = [(False, eager), (True, captured), (True, eager), (False, captured), (False, eager)]
    read = []
    for capturing, (first, second) in steps:
        rounding.run(bucket, first, second)
        if capturing:
            (_, _, ascent, rows, *_), (_, _, same, _, *_), (_, _, descent, _, perturbed, *_) = launches[-3:]
            for table, grads in ((ascent, first), (same, first), (descent, second)):
                assert table.tolist() == [0 if g is None else g.data_ptr() or 64 for g in grads]
            assert perturbed.tolist() == [g is not None for g in first] and rows is bucket.cache.rows.copy
            read += [(table, table.clone()) for table in (ascent, same, descent, perturbed)]
        assert all(table.equal(values) for table, values in read)
    assert len(read) == 8 and not capturing
    for _, grads in steps:
        rounding.run(twin, *grads)
    for a, b in zip(bucket.params + bucket.states[1], twin.params + twin.states[1], strict=True):
        assert torch.equal(a, b)


def test_numbers_that_a_graph_wrote_for_itself_are_not_taken_for_those_on_the_device():
    bucket = few_bucket("sgd", FLOAT32)
    rounding.run(bucket, grads_of(1, FEW), grads_of(2, FEW))
    own = bucket.cache
    for own.capturing, q, max_norm in ((False, 2.0, None), (True, 2.0, 3.0), (False, 2.0, 3.0), (True, 3.0, None),
                                       (False, 3.0, None), (False, 2.0, 3.0), (False, 2.0, None)):  # fmt: skip
        found = own.numbers(q, max_norm).tolist()
        assert found[0] == q and max_norm in (None, found[1])


def test_a_captured_step_reads_changed_values_only_after_a_refresh(monkeypatch):
    bucket = few_bucket("sgd-dampening", FLOAT32)
    rounding.run(bucket, grads_of(1, FEW), grads_of(2, FEW))
    monkeypatch.setattr(kernels.graphs, "capturing", lambda device: True)
    bucket.row_table[:, 0] *= 0.5
    with pytest.raises(RuntimeError, match=r"call optimizer.refresh\(\) after changing them"):
        rounding.run(bucket, grads_of(3, FEW), grads_of(4, FEW))
    assert not bucket.perturbed.any()
    bucket.cache.rows(bucket.row_table)  # as Bucket.upload does
    rounding.run(bucket, grads_of(3, FEW), grads_of(4, FEW))
    bucket.rule, bucket.rows = None, []
    with pytest.raises(RuntimeError, match="all kernels are loaded"):
        kernels.update_(bucket, [None] * len(FEW))


# ---- Gradients and directions, against the reference.

LENGTHS = [0, 1, 63, 65, 2049, 8192, 8193]  # the last two begin with full tiles


def tables_of(dtype, grad=None):
    """What the operations of directions are told of a bucket, the reference's included."""
    made = rounding.bucket_of([torch.zeros(n, dtype=dtype) for n in LENGTHS], "sgd")
    ends = np.searchsorted(made.chunk_table[:, 0].numpy(), range(len(LENGTHS) + 1)).tolist()
    segments = [
        Operand(w, 0, len(w), True, i, slice(ends[i], ends[i + 1]), None, None, made.progress[i])
        for i, w in enumerate(made.params)
    ]
    names = "rows", "row_table", "segment_table", "chunk_table", "grad_table", "perturbed", "partials"
    tables = Tables(torch.device("cpu"), made.format._replace(grad=grad or dtype), slot=1, segments=segments)
    for name in names:
        setattr(tables, name, getattr(made, name))
    tables.dot_partials = torch.full((3, len(made.chunk_table)), float("nan"), dtype=FLOAT64)
    return tables


def direction(dtype, seed, missing=(), at=0, make=shifted):
    """Random numbers in all segments but the missing ones, `at` bytes off; without a table of addresses."""
    args = (at,) if make is shifted else ()
    parts = Gradients(
        None if i in missing else copied(make(n, dtype, *args), rounding.values(n, dtype, seed + i))
        for i, n in enumerate(LENGTHS)
    )
    parts.dtype = dtype
    return parts


def same(dtype):
    """How results of the kernels and of the reference are compared: by all bits but for float64 (see `isa`)."""

    def compare(a, b):
        if dtype != FLOAT64:
            nan = a.isnan() & b.isnan()
            assert bits(torch.where(nan, 0, a)) == bits(torch.where(nan, 0, b))
        else:
            torch.testing.assert_close(a, b, equal_nan=True)

    return compare


def check_dot(tables, a, b):
    found = []
    for operations in (reference, kernels):
        out = torch.full((3, 3), 7.0, dtype=FLOAT64)
        operations.dot(tables, a, b, out)
        found.append((out, tables.dot_partials + 0.0))  # a sum of nothing but zeros has no sign
    for expected, actual in zip(*found, strict=True):
        same(tables.dtype)(actual, expected)
    assert tables.cache.tickets.tolist() == [0, 0, 0]
    return found[1][0]


@pytest.mark.usefixtures("hints")
@pytest.mark.parametrize(
    "weight, dtypes, at",
    [
        (FLOAT32, (FLOAT32, FLOAT32), (0, 16)),
        (FLOAT32, (FLOAT32, FLOAT32), (12, 8)),
        (FLOAT64, (FLOAT64, FLOAT64), (8, 16)),
        (BFLOAT16, (FLOAT32, BFLOAT16), (16, 8)),
        (FLOAT16, (FLOAT16, FLOAT32), (2, 4)),
        (BFLOAT16, (BFLOAT16, FLOAT16), (8, 24)),
        (FLOAT32, (FLOAT32, None), (0, 0)),
        (BFLOAT16, (BFLOAT16, None), (8, 0)),
    ],
    ids=str,
)
def test_scalar_products(weight, dtypes, at):
    tables = tables_of(weight)
    a = direction(dtypes[0], 1, (1, 4), at[0])
    b = None if dtypes[1] is None else direction(dtypes[1], 50, (3, 4), at[1])
    assert check_dot(tables, a, b)[1].isfinite().all()
    a[3][7], a[6][0] = math.inf, math.nan  # the first has no partner
    out = check_dot(tables, a, b)[1]
    assert out.isnan().tolist() == [True, b is not None, False]


@pytest.mark.parametrize("missing", [((), range(7)), (range(7), ()), (range(7), range(7))], ids=str)
def test_scalar_products_with_what_is_not_there(missing):
    a, b = (direction(FLOAT32, 1, lost) for lost in missing)
    found = check_dot(tables_of(FLOAT32), a, b)[1].tolist()
    assert [x > 0 for x in found] == [not missing[0], False, not missing[1]]


def test_the_scalar_product_with_itself_is_the_norm():
    tables, sums, g = tables_of(BFLOAT16), torch.zeros(2, dtype=FLOAT64), direction(BFLOAT16, 3, (4,))
    kernels.grad_norm(tables, g, sums, clip=reference.Clip(1.0, torch.ones((), dtype=FLOAT64), None))  # without T
    assert check_dot(tables, g, None)[1, 0] == sums[1]


def test_scalar_products_in_a_bucket_without_elements(monkeypatch):
    monkeypatch.setitem(globals(), "LENGTHS", [0, 0])
    assert check_dot(tables_of(FLOAT32), direction(FLOAT32, 1), direction(FLOAT32, 2))[1].tolist() == [0.0] * 3
    check_combine(tables_of(FLOAT32), FLOAT32, [(1.0, FLOAT32, ())])


def check_combine(tables, dtype, terms, at=0, alias=None, make=shifted):
    """terms: coefficient, dtype, missing segments, and perhaps a value of all elements; `alias`: which one is `out`."""
    found = []
    for operations in (reference, kernels):
        parts = [
            direction(of, 20 * k + 1, lost, at * of.itemsize // 4, make) for k, (_, of, lost, *_) in enumerate(terms)
        ]
        for part, (*_, value) in ((p, t) for p, t in zip(parts, terms, strict=True) if len(t) > 3):
            for x in part:
                x is None or x.fill_(value)
        out = direction(dtype, 900, (2,), 0, make) if alias is None else parts[alias]
        before = [[None if x is None else bits(x) for x in part] for part in parts if part is not out]
        operations.combine_(tables, out, [(c, part) for (c, *_), part in zip(terms, parts, strict=True)])
        assert before == [[None if x is None else bits(x) for x in part] for part in parts if part is not out]
        found.append(out)
    for expected, actual in zip(*found, strict=True):
        assert (expected is None) == (actual is None)
        if actual is not None:
            same(tables.dtype)(actual, expected)
    return found[1]


@pytest.mark.usefixtures("hints")
@pytest.mark.parametrize("at", [16, 8, 4], ids="at {}".format)
@pytest.mark.parametrize(
    "weight, dtypes",
    [
        (FLOAT32, (FLOAT32, FLOAT32, FLOAT32, FLOAT32)),
        (FLOAT64, (FLOAT64, FLOAT64, FLOAT64)),
        (BFLOAT16, (FLOAT32, BFLOAT16, FLOAT32)),
        (BFLOAT16, (BFLOAT16, FLOAT16, BFLOAT16, FLOAT32)),
        (FLOAT16, (FLOAT16, FLOAT16)),
    ],
    ids=str,
)
def test_linear_combinations(weight, dtypes, at):
    """The last term is written over, at its own place, where it has the dtype."""
    scalars = 1.7, torch.tensor(-0.3, dtype=FLOAT64), torch.tensor([0.6], dtype=FLOAT64)
    terms = [(c, of, lost) for c, of, lost in zip(scalars, dtypes[1:], ((3,), (5,), (1, 3)), strict=False)]
    alias = len(terms) - 1 if dtypes[-1] == dtypes[0] else None
    check_combine(tables_of(weight), dtypes[0], terms, at, alias)


def number(x):
    return torch.tensor(x, dtype=FLOAT64)


@pytest.mark.parametrize(
    "terms",
    [
        [(0.0, FLOAT32, (), math.inf), (1.5, FLOAT32, ())],
        [(number(0.0), BFLOAT16, (), math.nan), (number(-1.5), FLOAT32, ()), (1e-60, FLOAT32, (), math.inf)],
        [(0.5, FLOAT32, ()), (number(-0.0), BFLOAT16, (), math.inf), (2.0, FLOAT32, (1,))],
        [(0.0, FLOAT32, (), math.inf), (number(1e-60), FLOAT16, (), math.nan)],
        [(number(math.inf), FLOAT32, range(7)), (1.0, FLOAT32, (3,))],
        [(-1.0, FLOAT32, (), 0.0), (0.0, FLOAT32, (), 1.0)],  # -0.0, to which nothing is added
        [(number(math.nan), FLOAT32, ()), (math.inf, FLOAT32, (), 0.0)],
        [(1.0, FLOAT32, (), -0.0)],
        [(1e300, FLOAT32, ())],
    ],
    ids=lambda terms: "-".join(str(float(c)) for c, *_ in terms),
)
def test_terms_that_are_left_out(terms):
    check_combine(tables_of(FLOAT32), FLOAT32, terms)


def test_one_term_with_the_coefficient_1_is_a_copy():
    tables, every = tables_of(BFLOAT16), torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (BFLOAT16, FLOAT16):
        source, out = direction(dtype, 1), direction(dtype, 50)
        for i, part in ((5, every[:8192]), (6, every[-8193:])):
            source[i].copy_(part.view(dtype))
        kernels.combine_(tables, out, [(1.0, source)])
        for a, b in zip(out, source, strict=True):
            same(BFLOAT16)(a, b)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
def test_linear_combinations_are_rounded_to_nearest_even_at_every_magnitude(dtype, monkeypatch):
    values = rounding.at_every_magnitude(dtype)[0]
    monkeypatch.setitem(globals(), "LENGTHS", [len(values)])
    source, out = Gradients([values]), Gradients([torch.zeros(len(values), dtype=dtype)])
    source.dtype = FLOAT32
    kernels.combine_(tables_of(dtype), out, [(1.0, source)])
    same(dtype)(out[0], values.to(dtype))


@pytest.mark.parametrize("at_end", [True, False], ids=["ends", "starts"])
def test_no_access_beyond_any_direction(at_end):
    def make(n, dtype):
        return guarded(n, dtype, at_end) if n else shifted(n, dtype)

    tables = tables_of(BFLOAT16)
    check_dot(tables, direction(BFLOAT16, 1, (2,), make=make), direction(FLOAT32, 50, make=make))
    terms = [(0.3, FLOAT16, (3,)), (0.7, BFLOAT16, (4,)), (number(1.3), FLOAT32, ())]
    check_combine(tables, FLOAT32, terms, make=make)
    check_combine(tables, BFLOAT16, terms[1:], make=make)


@pytest.mark.parametrize("split", [2, 4])
def test_any_number_of_programs_a_chunk_of_a_linear_combination(monkeypatch, split):
    tables = tables_of(FLOAT32)
    monkeypatch.setattr(kernels, "_PROGRAMS", split * len(tables.chunk_table) - 1)
    check_combine(tables, FLOAT32, [(0.3, FLOAT32, (3,)), (1.3, FLOAT32, ())])
    assert tables.cache.split == split


def test_operands_and_coefficients_are_checked():
    tables, g, double = tables_of(FLOAT32), direction(FLOAT32, 1), direction(FLOAT64, 2)
    with pytest.raises(RuntimeError, match="combine_: a coefficient must be one element of torch.float64, got .*32"):
        kernels.combine_(tables, g, [(torch.ones(1), g)])
    with pytest.raises(RuntimeError, match=r"coefficient must be one element of torch.float64, got \[2\]"):
        kernels.combine_(tables, g, [(torch.ones(2, dtype=FLOAT64), g)])
    with pytest.raises(RuntimeError, match="combine_: a linear combination has one to three terms, got 4"):
        kernels.combine_(tables, g, [(1.0, g)] * 4)
    with pytest.raises(RuntimeError, match=r"dot_partials must be \[3, 7\], got \[3, 0\]"):
        kernels.dot(dataclasses.replace(tables, dot_partials=torch.zeros(3, 0)), g, None, torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="dot: .* of torch.float32 weights cannot be torch.float64"):
        kernels.dot(tables, g, double, torch.zeros(2, 3, dtype=FLOAT64))
    with pytest.raises(RuntimeError, match="dot: .* of torch.float64 weights cannot be torch.float32"):
        kernels.dot(tables_of(FLOAT64), g, None, torch.zeros(2, 3, dtype=FLOAT64))


def test_addresses_of_directions_are_uploaded_once(monkeypatch):
    uploads, upload = [], kernels.DeviceCopy._upload
    monkeypatch.setattr(kernels.DeviceCopy, "_upload", lambda self, *a: (uploads.append(self), upload(self, *a)))
    monkeypatch.setitem(globals(), "LENGTHS", [3, 5])
    tables, sums, out = tables_of(FLOAT32), torch.zeros(2, dtype=FLOAT64), torch.zeros(2, 3, dtype=FLOAT64)
    kept, mean = direction(FLOAT32, 1), direction(FLOAT32, 2)
    tables.grad_table.fill_(7)  # another's
    grads = [direction(FLOAT32, 10 * step) for step in range(3)]
    for g in grads:
        g.table = torch.tensor([x.data_ptr() for x in g])
        kernels.grad_norm(tables, g, sums)
        kernels.combine_(tables, mean, [(0.9, mean), (0.1, g)])
        kernels.combine_(tables, kept, [(1.0, g)])
        kernels.dot(tables, kept, mean, out)
    assert tables.grad_table.tolist() == [7, 7]
    ascent, operands = tables.cache.ascent, tables.cache.operands
    assert uploads.count(ascent) == 3 and len(operands.copies) == 2
    assert [uploads.count(copy) for copy in operands.copies] == [1, 1]
    many, before = [direction(FLOAT32, i) for i in range(2 * operands.MOST)], len(uploads)
    for other in many:  # their number is bounded, and what was used last stays
        kernels.combine_(tables, kept, [(1.0, other)])
    assert len(operands.copies) == operands.MOST and len(uploads) == before + len(many)
    for a, b in zip(kept, many[-1], strict=True):
        assert_same(a, b)


def test_what_a_captured_graph_reads_of_directions_is_never_written_again(monkeypatch):
    launches, capturing, plain = [], False, kernels._launcher

    def launcher(*args):
        launch = plain(*args)
        return lambda *args: (launches.append(args), launch(*args))

    monkeypatch.setattr(kernels, "_launcher", launcher)
    monkeypatch.setattr(kernels.graphs, "capturing", lambda device: capturing)
    monkeypatch.setitem(globals(), "LENGTHS", [3, 5])
    tables, kept, new = tables_of(FLOAT32), direction(FLOAT32, 1), direction(FLOAT32, 2)
    capturing = True
    with pytest.raises(RuntimeError, match="take a step like it before a CUDA graph is captured"):
        kernels.combine_(tables, kept, [(1.0, new)])
    capturing = False
    kernels.prepare_capture(tables)  # loads all kernels, as a direction was asked for
    kernels.combine_(tables, kept, [(1.0, direction(FLOAT32, 3))])
    uploads = kernels.DeviceCopy._upload
    monkeypatch.setattr(kernels.DeviceCopy, "_upload", lambda *a: pytest.fail("copies") if capturing else uploads(*a))
    capturing = True
    scalar = number(1.5)
    coefficient = weakref.ref(scalar)
    kernels.combine_(tables, kept, [(0.5, kept), (scalar, new)])
    del scalar
    kernels.dot(tables, new, kept, torch.zeros(2, 3, dtype=FLOAT64))
    read = [table for table in (*launches[-2][1:4], *launches[-1][1:3])]
    expected = [[x.data_ptr() for x in part] for part in (kept, kept, new, new, kept)]
    assert [table.tolist() for table in read] == expected and coefficient() is not None
    capturing, others = False, [direction(FLOAT32, i) for i in range(20)]
    for other in others:
        kernels.combine_(tables, other, [(1.0, new)])
    assert [table.tolist() for table in read] == expected


def grads_of(seed, sizes=SIZES):
    return [rounding.values(n, FLOAT32, seed) for n in sizes]


# ---- Whole steps.

NAMES = ["matrix", "empty", "63", "1025", "above a chunk", "transposed", "64"]
STEPS_TAKEN = 6  # thaws "64" and freezes "matrix"
GROUPS = [c for c in CONFIGS if c.name.endswith("groups")]  # of every base optimizer, each group with other options


@pytest.mark.usefixtures("hints")
@pytest.mark.parametrize("config, dtype", [
    *((config, FLOAT32) for config in GROUPS),
    *((c, dtype) for c in GROUPS if c.name in ("groups", "adamw_groups") for dtype in (BFLOAT16, FLOAT16, FLOAT64)),
], ids=lambda value: getattr(value, "name", str(value)))  # fmt: skip
def test_whole_steps_against_the_reference(config: Config, dtype):
    ours, others = cases.make_params(dtype, NAMES), cases.make_params(dtype, NAMES)
    opt, other = cases.fused(ours, config, "triton"), cases.fused(others, config, "reference")
    assert set(opt.backend.values()) == {"triton"}
    for step in range(STEPS_TAKEN):
        opt.step(cases.closure_of(ours, step, NAMES))
        other.step(cases.closure_of(others, step, NAMES))
    # An interpreter that rounds tl.fma twice is an ulp off in every sum; so is float64, whose fma it rounds twice, too.
    compare = assert_same if FUSES and dtype != FLOAT64 else torch.testing.assert_close
    for name, a, b in zip(NAMES, ours, others, strict=True):
        compare(a, b, **(dict(what=name) if compare is assert_same else {}))
    assert_same_state(opt, other, lambda a, b, what: compare(a, b))


@pytest.mark.usefixtures("hints")
@pytest.mark.parametrize("name, dtype, options", [
    ("groups", BFLOAT16, dict(master_weights=True)),
    ("adamw_groups", BFLOAT16, dict(master_weights=True, state_dtype=BFLOAT16, rounding_seed=7)),
    ("adamw_groups", FLOAT16, dict(stochastic_rounding=True, rounding_seed=2**40 + 7)),
    ("rmsprop", FLOAT32, dict(state_dtype=BFLOAT16)),
    ("plain", FLOAT16, dict(master_weights=True, p=math.inf)),
    ("momentum", BFLOAT16, dict(stochastic_rounding=True, p=math.inf)),
    ("momentum", BFLOAT16, dict(master_weights=True, p=3.0)),
    ("plain", BFLOAT16, dict(stochastic_rounding=True, perturb_with_weight_decay=True, max_grad_norm=3.0)),
], ids=str)  # fmt: skip
def test_whole_steps_in_other_formats_against_the_reference(name, dtype, options):
    names, config = ["matrix", "63", "1025", "transposed", "64"], next(c for c in CONFIGS if c.name == name)
    ours, others = cases.make_params(dtype, names), cases.make_params(dtype, names)
    opt, other = (cases.fused(p, config, b, **options) for p, b in ((ours, "triton"), (others, "reference")))
    assert set(opt.backend.values()) == {"triton"}
    for step in range(4):
        opt.step(cases.closure_of(ours, step, names))
        other.step(cases.closure_of(others, step, names))
    exact = FUSES and options.get("p") != 3.0  # powers are not rounded alike
    compare = assert_same if exact else torch.testing.assert_close
    for a, b in zip(ours, others, strict=True):
        compare(a, b)
    assert_same_state(opt, other, lambda a, b, what: compare(a, b))


@pytest.mark.usefixtures("hints")
@pytest.mark.parametrize("cls, dtype, options", [
    (methods.GSAM, FLOAT32, dict(alpha=0.3)),
    (methods.WSAM, BFLOAT16, dict(gamma=0.8, master_weights=True)),
    (methods.LookSAM, FLOAT32, dict(k=2, alpha=0.6)),
    (methods.FriendlySAM, BFLOAT16, dict(sigma=0.7, lmbda=0.8)),
    (methods.MSAM, FLOAT32, dict(momentum=0.9)),
], ids=str)  # fmt: skip
def test_methods_against_the_reference(cls, dtype, options):
    """Steps of methods, which combine gradients and directions, are those of the reference."""
    names = ["63", "1025", "transposed"]
    ours, others = cases.make_params(dtype, names), cases.make_params(dtype, names)
    both = [cls(p, "sgd", 0.2, lr=0.1, backend=b, **options) for p, b in ((ours, "triton"), (others, "reference"))]
    assert set(both[0].backend.values()) == {"triton"}
    for step in range(4):
        for opt, params in zip(both, (ours, others), strict=True):
            opt.step(cases.closure_of(params, step, names))
    compare = assert_same if FUSES else torch.testing.assert_close
    for a, b in zip(ours, others, strict=True):
        compare(a, b)
    if cls is methods.MSAM:
        for opt in both:
            opt.eval()
    assert_same_state(*both, lambda a, b, what: compare(a, b))


@pytest.mark.parametrize("config", **cases.ids([CONFIGS[2], ADAM_CONFIGS[3]]))
def test_restore_brings_every_bit_back(config):
    ours = cases.make_params(names=NAMES)
    with torch.no_grad():
        ours[0].view(-1)[0], ours[0].view(-1)[1] = -0.0, float("nan")
    before = [bits(p) for p in ours]
    opt = cases.fused(ours, config, "triton")
    cases.set_gradients(ours, 2, 1, NAMES)
    ours[0].grad = torch.zeros_like(ours[0])
    opt.first_step()
    assert [bits(p) for p in ours] != before
    opt.restore()
    assert [bits(p) for p in ours] == before and not opt.state_dict()["state"]


def test_a_group_may_get_momentum_and_amsgrad_late():
    for config, late in ((CONFIGS[0], dict(momentum=0.9)), (ADAM_CONFIGS[3], dict(amsgrad=True))):
        ours, others = cases.make_params(names=NAMES[:4]), cases.make_params(names=NAMES[:4])
        opts = cases.fused(ours, config, "triton"), cases.fused(others, config, "reference")
        for step in range(3):
            for opt, params in zip(opts, (ours, others), strict=True):
                opt.step(cases.closure_of(params, step, NAMES[:4]))
                opt.param_groups[0].update(late)
        for a, b in zip(ours, others, strict=True):
            (assert_same if FUSES else torch.testing.assert_close)(a, b)


def test_a_bucket_of_empty_parameters_counts_its_steps():
    p = Parameter(torch.zeros(0, 3))
    opt = cases.fused([p], ADAM_CONFIGS[3], "triton")
    for _ in range(2):
        p.grad = torch.zeros(0, 3)
        opt.first_step()
        opt.second_step()
    assert opt.state[p]["step"] == 2


def test_an_unfused_base_and_triton_restore_together():
    config = next(c for c in cases.UNFUSED if c.name == "adamax")
    ours, others = cases.make_params(names=["matrix"]), cases.make_params(names=["matrix"])
    opt, other = cases.fused(ours, config, "triton"), cases.fused(others, config, "reference")
    for step in range(2):
        opt.step(cases.closure_of(ours, step, ["matrix"]))
        other.step(cases.closure_of(others, step, ["matrix"]))
    (assert_same if FUSES else torch.testing.assert_close)(ours[0], others[0])


def test_step_counts_beyond_one_block_of_segments():
    bucket = rounding.bucket_of([torch.zeros(0) for _ in range(600)], "adam")
    missing = {0, 255, 256, 599}
    kernels.update_(bucket, [None if i in missing else torch.zeros(0) for i in range(600)])
    assert bucket.steps.tolist() == [float(i not in missing) for i in range(600)]


# ---- Clipping, other norms, the decay in the loss.


@pytest.fixture
def backend():  # of the tests that are imported above
    return "triton"


@pytest.fixture
def device():
    return "cpu"


@pytest.mark.parametrize(
    "options", [dict(max_grad_norm=3.0), dict(p=3.0), dict(p=math.inf), dict(perturb_with_weight_decay=True)], ids=str
)
def test_options_of_a_step_against_the_reference(options):
    names, config = NAMES[:4], CONFIGS[7]
    ours, others = cases.make_params(names=names), cases.make_params(names=names)
    opt, other = (cases.fused(p, config, b, **options) for p, b in ((ours, "triton"), (others, "reference")))
    for step in range(2):
        opt.step(cases.closure_of(ours, step, names))
        other.step(cases.closure_of(others, step, names))
    exact = FUSES and options.get("p", 2.0) in (2.0, math.inf)  # powers are not rounded alike
    for a, b in zip(ours, others, strict=True):
        (assert_same if exact else torch.testing.assert_close)(a, b)
