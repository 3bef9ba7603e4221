"""The native CPU library, table by table, against the rounding plan; and its reader of tensors."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from rounding import (
    DTYPES,
    FIRST_DRAW,
    MASTERS,
    MIXED,
    OPTIONS,
    PLAIN,
    SEED,
    SIZES,
    STEPS,
    STOCHASTIC,
    at_every_magnitude,
    bucket_of,
    copied,
    draw,
    drawn,
    expected,
    fma,
    fresh_bucket,
    gradients,
    guarded,
    index_of,
    label,
    mixed,
    narrowed,
    philox,
    point,
    run,
    shifted,
    slots_of,
    values,
    widened,
)

from fastsam.ops import native
from fastsam.ops.formats import Format
from fastsam.ops.tables import Gradients

pytestmark = pytest.mark.skipif(native.reason() is not None, reason=f"no native library: {native.reason()}")
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
ISAS = native.reader.cpu_isas() if native.reader else []


def assert_same(actual, plan, what):
    assert torch.equal(actual, plan), f"{what}: {(actual != plan).sum()} of {plan.numel()} differ"


@pytest.fixture(params=ISAS)
def isa(request):
    previous = native.reader.use_cpu_isa(request.param)
    yield request.param
    native.reader.use_cpu_isa(previous)


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    previous = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(previous)


def check_steps(bucket, option, place=lambda grad: grad):
    format, plan = bucket.format, expected(option, bucket.format)
    for step in range(STEPS):
        grads = [[g if g is None else place(g) for g in gradients(format.grad, step, which)] for which in (1, 2)]
        total, perturbed = run(bucket, *grads)
        if format.source == torch.float64:
            assert total == pytest.approx(plan.sums[step], rel=1e-14)
        else:
            assert total == plan.sums[step]
        for i, (p, planned) in enumerate(zip(perturbed, plan.climbs[step], strict=True)):
            assert_same(p, planned, f"perturbed weights of segment {i} in step {step}")
        assert not bucket.perturbed.any()
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
    if format.stochastic:
        assert bucket.rounding.tolist() == [FIRST_DRAW + STEPS]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_three_sam_steps_follow_the_plan(isa, dtype, option):
    check_steps(fresh_bucket(option, dtype), option)


@pytest.mark.parametrize("spread", [1, 2000], ids=["cached", "streamed"])
@pytest.mark.parametrize("offsets", [(2, 6), (4, 8), (8, 4), (12, 12), (60, 32)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_alignment_and_kind_of_store(isa, dtype, offsets, spread):
    at_p, at_g = (max(dtype.itemsize, offset // dtype.itemsize * dtype.itemsize) for offset in offsets)
    bucket = fresh_bucket("sgd-dampening", dtype, lambda n, dtype: shifted(n, dtype, at_p), spread)
    check_steps(bucket, "sgd-dampening", lambda g: copied(shifted(len(g), dtype, at_g), g))


def everything_made(option, format, make, spread):
    """A fresh bucket whose tensors all come from `make`, and what does the same for gradients."""

    def like(t):
        return copied(make(len(t), t.dtype), t)

    bucket = fresh_bucket(option, format, make, spread)
    bucket.backups, bucket.masters = ([like(t) for t in tensors] for tensors in (bucket.backups, bucket.masters))
    bucket.states = [[like(s) for s in state] for state in bucket.states]
    point(bucket)
    return bucket, like


@pytest.mark.parametrize("spread", [1, 2000], ids=["cached", "streamed"])
@pytest.mark.parametrize("at_end", [True, False], ids=["ends", "starts"])
@pytest.mark.parametrize("format", [*PLAIN, MASTERS[0], MASTERS[3], STOCHASTIC[0], *STOCHASTIC[2:4]], ids=label)
def test_no_access_beyond_any_tensor(isa, format, at_end, spread):
    def make(n, dtype):
        return guarded(n, dtype, at_end) if n else shifted(n, dtype)

    option = "adamw-amsgrad-maximize"
    bucket, like = everything_made(option, format, make, spread)
    check_steps(bucket, option, like)


@pytest.mark.parametrize("spread", [1, 2000], ids=["cached", "streamed"])
@pytest.mark.parametrize("offset", [4, 60])
@pytest.mark.parametrize("format", [MASTERS[1], MASTERS[2], STOCHASTIC[1], STOCHASTIC[3]], ids=label)
def test_any_alignment_of_masters_and_states(isa, format, offset, spread):
    option = "rmsprop-centered-momentum-far-lerp"
    bucket, like = everything_made(option, format, lambda n, dtype: shifted(n, dtype, offset), spread)
    check_steps(bucket, option, like)


ALSO_BY_OTHERS = ["sgd-nesterov-maximize", "adamw-amsgrad-maximize", "lion"]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("format", MASTERS[::2] + STOCHASTIC, ids=label)
def test_masters_and_stochastic_rounding_follow_the_plan(format, option):
    check_steps(fresh_bucket(option, format), option)  # by the best instruction set


@pytest.mark.parametrize("option", ALSO_BY_OTHERS)
@pytest.mark.parametrize("format", MASTERS + STOCHASTIC, ids=label)
def test_they_do_by_every_instruction_set(isa, format, option):
    check_steps(fresh_bucket(option, format), option)


@pytest.mark.parametrize("option", ALSO_BY_OTHERS)
@pytest.mark.parametrize("format", PLAIN + MASTERS[:1] + STOCHASTIC[:1] + STOCHASTIC[3:4], ids=label)
def test_they_do_by_any_number_of_threads(threads, format, option):
    check_steps(fresh_bucket(option, format), option)


@pytest.mark.parametrize("option", ["sgd", "adamw-amsgrad-maximize"])
@pytest.mark.parametrize(("dtype", "grad_dtype"), MIXED, ids=str)
def test_gradients_of_another_dtype(isa, dtype, grad_dtype, option):
    bucket = fresh_bucket(option, mixed(dtype, grad_dtype))
    check_steps(bucket, option, lambda g: copied(guarded(len(g), g.dtype, True), g) if len(g) else g)


@pytest.mark.parametrize(
    "format",
    [
        Format(F64, F32, F64, F64),
        Format(F32, F64, F32, F32),
        Format(F64, F64, F32, F32),
        Format(F32, F32, F64, F64),
        Format(F64, F64, F64, F32),
        Format(F32, F32, BF16, F32),
        Format(BF16, BF16, torch.float16, BF16),
        Format(BF16, BF16, BF16, F32),
        Format(BF16, BF16, F32, F64),
    ],
    ids=label,
)
def test_there_are_no_kernels_for_other_formats(format):
    bucket = fresh_bucket("sgd", format)
    nothing, sums = [None] * len(SIZES), torch.zeros(3, dtype=torch.float64)
    weight, grad, source, state = (str(dtype).removeprefix("torch.") for dtype in format[:4])
    dtypes = f"{weight} computed in {source}, gradients of dtype {grad} and states of dtype {state}"
    for name, call in [
        ("grad_norm", lambda: native.grad_norm(bucket, nothing, sums)),
        ("perturb_", lambda: native.perturb_(bucket, nothing, sums)),
        ("update_", lambda: native.update_(bucket, nothing)),
    ]:
        with pytest.raises(RuntimeError, match=f"{name}: there is no kernel for weights of dtype {dtypes}"):
            call()


@pytest.mark.parametrize("code", [4, 4 << 4, 15 << 8, 7 << 12, 1 << 17, -1])
def test_there_are_no_other_codes_of_formats(monkeypatch, code):
    monkeypatch.setattr(native, "_format_code", lambda format: code)
    with pytest.raises(RuntimeError, match=f"update_: there is no format {code}"):
        native.update_(fresh_bucket("sgd", torch.float32), [None] * len(SIZES))


def test_stochastic_rounding_needs_its_step():
    bucket = fresh_bucket("sgd", STOCHASTIC[0])
    bucket.rounding = None
    nothing, sums = [None] * len(SIZES), torch.zeros(3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="perturb_: stochastic rounding needs `rounding`, got None"):
        native.perturb_(bucket, nothing, sums)
    with pytest.raises(RuntimeError, match="update_: stochastic rounding needs `rounding`, got None"):
        native.update_(bucket, nothing)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_that_is_not_finite_perturbs_nothing(isa, dtype, bad):
    bucket = fresh_bucket("sgd-dampening", dtype)
    before = [p.clone() for p in bucket.params]
    grads = [values(n, dtype, i) for i, n in enumerate(SIZES)]
    grads[-1][-1] = bad
    total, perturbed = run(bucket, grads, [None] * len(SIZES))
    assert not total.isfinite()
    for p, b, q, old in zip(perturbed, bucket.backups, bucket.params, before, strict=True):
        assert torch.equal(p, old) and torch.equal(b, old) and torch.equal(q, old)


@pytest.mark.parametrize("format", PLAIN + MASTERS[:2] + STOCHASTIC[:4], ids=label)
def test_rho_0_writes_the_backup_and_keeps_the_weights(isa, format):
    bucket = fresh_bucket("adamw", format)
    bucket.row_table[:, 5] = 0.0
    grads = [torch.full((n,), float("inf"), dtype=format.grad) for n in SIZES]  # 0 * inf would show
    native.perturb_(bucket, grads, torch.ones(1, dtype=torch.float64))
    for p, b, n, i in zip(bucket.params, bucket.backups, SIZES, range(len(SIZES)), strict=True):
        assert torch.equal(p, values(n, format.weight, i))
        assert b.isnan().all() if format.masters else torch.equal(b, p)
    assert bucket.perturbed.all()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("format", [MASTERS[0], MASTERS[2], *STOCHASTIC], ids=label)
def test_overflows_keep_masters_and_what_was_drawn(isa, format, bad):
    """Of the first pass: no perturbation; of the second: weights, masters and states keep their bits."""
    option = "adamw-amsgrad-maximize"
    bucket = fresh_bucket(option, format)
    check_steps(bucket, option)
    grads = [values(n, format.grad, i) for i, n in enumerate(SIZES)]
    grads[-1][-1] = bad
    kept = [*bucket.params, *bucket.masters, *(s for state in bucket.states for s in state), bucket.progress]
    before = [t.clone() for t in kept]
    total, perturbed = run(bucket, grads, grads, found_inf=torch.ones(1))
    assert not total.isfinite() and bucket.overflows.tolist() == [1, 1]
    for old, seen in zip(before, perturbed, strict=False):
        assert torch.equal(seen, old)
    for old, new in zip(before, kept, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)
    run(bucket, gradients(format.grad, 7, 1), grads, found_inf=torch.ones(1))
    assert bucket.overflows.tolist() == [1, 2]
    for old, new in zip(before, kept, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("spread", [1, 2000], ids=["cached", "streamed"])
@pytest.mark.parametrize("format", MASTERS, ids=label)
def test_a_restore_rounds_the_masters(isa, format, spread):
    bucket = fresh_bucket("sgd", format, spread=spread)
    for master, n in zip(bucket.masters, SIZES, strict=True):
        master.add_(values(n, torch.float32, 99) * 0.01)
    masters = [master.clone() for master in bucket.masters]
    run(bucket, gradients(format.grad, 0, 1), [None] * len(SIZES))
    for i, (p, master, old) in enumerate(zip(bucket.params, bucket.masters, masters, strict=True)):
        touched = gradients(format.grad, 0, 1)[i] is not None
        assert torch.equal(p, master.to(p.dtype) if touched else values(len(p), p.dtype, i))
        assert torch.equal(master, old)


# ---- Stochastic rounding.


def test_known_answers_of_philox():
    """Of Random123's kat_vectors."""
    answers = {7: "5f6fb709 0d893f64 4f121f81 4f730a48", 10: "6627e8d5 e169c58d bc57ac4c 9b00dbd8"}
    for rounds, answer in answers.items():
        assert " ".join(f"{int(word):08x}" for word in philox((0, 0, 0, 0), (0, 0), rounds)) == answer
    ones, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    for counter, key, answer in [
        ((ones,) * 4, (ones,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (pi, (0xA4093822, 0x299F31D0), "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ]:
        assert " ".join(f"{int(word):08x}" for word in philox(counter, key, 10)) == answer


def drawn_states(x, dtype, draws=1):
    """float32 values as states of SGD with momentum, whose first step keeps the gradient: rounded `draws` times."""
    bucket = bucket_of([torch.zeros_like(x)], "sgd-dampening", format=Format(F32, F32, F32, dtype, True))
    for i in range(draws):
        bucket.progress.copy_(torch.tensor([[0.0, 1.0]]))
        native.update_(bucket, [x])
        assert bucket.rounding.tolist() == [FIRST_DRAW + i + 1]
        yield bucket.states[0][0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_at_every_magnitude(isa, dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for state in drawn_states(every.float(), dtype, 6):
        torch.testing.assert_close(state, every, rtol=0, atol=0, equal_nan=True)
    x, low, up = at_every_magnitude(dtype)
    (state,) = drawn_states(x, dtype)
    plan = drawn(widened(x), dtype, draw(len(x), SEED, index_of(0), FIRST_DRAW, 2))
    torch.testing.assert_close(state, plan, rtol=0, atol=0, equal_nan=True)
    inside = state[: len(low)]
    assert ((inside == low) | (inside == up)).all()


@pytest.mark.parametrize(
    ("dtype", "x", "step"),
    [
        (torch.bfloat16, 1 + 0.3 * 2.0**-7, 2.0**-7),
        (torch.bfloat16, -(3 + 0.9 * 2.0**-6), 2.0**-6),
        (torch.float16, 1 + 0.3 * 2.0**-10, 2.0**-10),
        (torch.float16, -5.7 * 2.0**-24, 2.0**-24),
        (torch.float16, 0.2 * 2.0**-24, 2.0**-24),
    ],
)
def test_stochastic_rounding_is_right_on_average(isa, dtype, x, step):
    n, draws = 2 * 8192 + 5, 40
    total = sum(state.double().mean() for state in drawn_states(torch.full((n,), x), dtype, draws))
    assert abs(total / draws - x) < 5 * 0.5 * step / (n * draws) ** 0.5  # five standard deviations, or more


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_steps_add_up_where_the_nearest_would_lose_them(isa, dtype):
    """200 steps of a twentieth of a weight's last place."""
    format = Format(dtype, dtype, dtype, dtype, True)
    n, place, steps = 8192, 2.0 * torch.finfo(dtype).eps / 2, 200
    bucket = bucket_of([torch.full((n,), 1.5, dtype=dtype)], "sgd", format=format)
    bucket.row_table[:, 1] = 0.0
    grad = torch.full((n,), place / 20 / 0.07, dtype=dtype)
    for _ in range(steps):
        run(bucket, [None], [grad])
    moved = (1.5 - bucket.params[0].double().mean()) / (0.07 * grad[0].double())
    assert abs(moved / steps - 1) < 5 * (20 / steps / n) ** 0.5


def test_only_updates_with_a_rule_take_random_numbers():
    bucket = fresh_bucket("sgd", STOCHASTIC[0])
    grads = gradients(torch.bfloat16, 0, 1)
    native.perturb_(bucket, grads, torch.ones(1, dtype=torch.float64))
    assert bucket.rounding.tolist() == [FIRST_DRAW]
    native.update_(bucket, [None] * len(SIZES))
    assert bucket.rounding.tolist() == [FIRST_DRAW + 1]
    bucket.rule = None
    native.update_(bucket, grads)
    assert bucket.rounding.tolist() == [FIRST_DRAW + 1]


@pytest.mark.parametrize(
    "option", ["sgd", "sgd-dampening", "adamw-amsgrad-maximize", "rmsprop-momentum-maximize", "nadam"]
)
def test_found_inf_restores_and_updates_nothing(isa, option):
    bucket, dtype = fresh_bucket(option, torch.float32), torch.float32
    check_steps(bucket, option)
    before = [t.clone() for t in [*bucket.params, *(s for state in bucket.states for s in state), bucket.progress]]
    g1 = gradients(dtype, 7, 1)
    infinite = [torch.full((n,), float("inf")) for n in SIZES]
    run(bucket, g1, infinite, found_inf=torch.ones(1), grad_scale=torch.tensor([8.0]))
    after = [*bucket.params, *(s for state in bucket.states for s in state), bucket.progress]
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("option", ["sgd-nesterov-maximize", "adam", "rmsprop-centered"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_scale_and_clip_factor(isa, dtype, option):
    plain, scaled = fresh_bucket(option, dtype), fresh_bucket(option, dtype)
    cast = torch.float64 if dtype == torch.float64 else torch.float32
    for step in range(STEPS):
        g1, g2 = (gradients(dtype, step, which) for which in (1, 2))
        inverse, clip = (torch.tensor(x, dtype=torch.float64).to(cast) for x in (1 / 3.0, 0.37))
        exact = [None if g is None else (g.to(cast) * inverse) * clip for g in g2]
        if dtype == cast:  # the product would be rounded to low precision on its way to the other bucket
            run(plain, g1, exact)
            run(scaled, g1, g2, grad_scale=torch.tensor([3.0]), clip=torch.tensor(0.37, dtype=torch.float64))
        else:
            halves = [None if g is None else g * 0.5 for g in g2]
            run(plain, g1, halves)
            run(scaled, g1, g2, grad_scale=torch.tensor(4.0), clip=torch.tensor([2.0], dtype=torch.float64))
    for a, b in zip(plain.params, scaled.params, strict=True):
        assert torch.equal(a, b)


def test_a_clip_factor_of_0_clears_infinite_gradients(isa):
    bucket = fresh_bucket("sgd", torch.float32)
    infinite = [torch.full((n,), float("inf")) for n in SIZES]
    bucket.row_table[:, 1] = 0.0  # no weight decay: nothing is left to move the weights
    run(bucket, [None] * len(SIZES), infinite, clip=torch.zeros(1, dtype=torch.float64))
    for i, (p, n) in enumerate(zip(bucket.params, SIZES, strict=True)):
        assert torch.equal(p, values(n, torch.float32, i))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_rounds_to_nearest_even_at_every_magnitude(isa, dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = every[every.isfinite()]
    w = torch.cat([finite, finite])
    g = torch.cat([finite.flip(0), torch.full_like(finite, 0.75)])
    bucket = bucket_of([w.clone()], "sgd")
    bucket.row_table[:, 1] = 0.0
    run(bucket, [None], [g])
    plan = narrowed(fma(np.float32(-0.07), widened(g), widened(w)), dtype)
    assert torch.equal(bucket.params[0], plan)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_plan_fuses_with_one_rounding(dtype):
    generator, n = np.random.default_rng(0), 3000
    a, b, c = (generator.standard_normal(n).astype(dtype) for _ in range(3))
    c[:1000] *= dtype(10) ** generator.integers(-9, 4, 1000).astype(dtype)
    c[1000:1500] = -(a * b)[1000:1500]  # all but the error of the product cancels
    found = fma(a, b, c)
    for x, y, z, w in zip(a, b, c, found, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        below, above = (Fraction(float(np.nextafter(w, dtype(end)))) for end in (-np.inf, np.inf))
        assert abs(exact - Fraction(float(w))) <= min(abs(exact - below), abs(exact - above))
    special = np.array([np.inf, np.nan, -0.0, 1.0], dtype)
    found = fma(special, dtype(1), -abs(special))
    np.testing.assert_array_equal(found, [np.nan, np.nan, 0.0, 0.0])
    assert np.signbit(found).tolist()[2:] == [True, False]


def test_a_bucket_without_a_rule_only_restores(isa):
    bucket = fresh_bucket("sgd", torch.float32)
    bucket.rule = None
    g1, g2 = (gradients(torch.float32, 0, which) for which in (1, 2))
    run(bucket, g1, g2)
    for i, (p, n) in enumerate(zip(bucket.params, SIZES, strict=True)):
        assert torch.equal(p, values(n, torch.float32, i))


def test_tables_are_checked():
    bucket = fresh_bucket("sgd", torch.float32)
    grads, sums = [None] * len(SIZES), torch.zeros(2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"perturb_: sums must have dtype Double, got Float"):
        native.perturb_(bucket, grads, sums.float())
    with pytest.raises(RuntimeError, match=r"update_: clip must be one element of dtype Double"):
        native.update_(bucket, grads, clip=torch.ones(1))
    bucket.slot = 2
    with pytest.raises(RuntimeError, match=r"grad_norm: slot must be in \[0, 2\), got 2"):
        native.grad_norm(bucket, grads, sums)
    bucket.chunk_table = bucket.chunk_table[:, :3]
    with pytest.raises(RuntimeError, match=r"grad_norm: chunks must be contiguous, on the CPU"):
        native.grad_norm(bucket, grads, sums)


def test_operands_are_checked():
    bucket = fresh_bucket("sgd", torch.float32)
    bucket.dot_partials = torch.zeros(3, len(bucket.chunk_table), dtype=F64)
    out = torch.zeros(2, 3, dtype=F64)

    def operand(dtype, n=12, table=torch.int64):
        parts = Gradients([None] * n)
        parts.table, parts.dtype = torch.zeros(n, dtype=table), dtype
        return parts

    a = operand(F32)
    native.dot(bucket, a, None, out)
    native.combine_(bucket, a, [(1, a), (torch.ones((), dtype=F64), operand(BF16)), (torch.ones(1, dtype=F64), a)])
    with pytest.raises(RuntimeError, match="dot: float64 stands beside float64 only, got b of dtype float64"):
        native.dot(bucket, a, operand(F64), out)
    with pytest.raises(RuntimeError, match="combine_: float64 stands beside float64 only, got c of dtype bfloat16"):
        native.combine_(bucket, operand(F64), [(1.0, operand(F64)), (1.0, operand(F64)), (1.0, operand(BF16))])
    with pytest.raises(RuntimeError, match=f"dot: b must have {len(SIZES)} rows, got 3"):
        native.dot(bucket, a, operand(F32, 3), out)
    with pytest.raises(RuntimeError, match=f"combine_: out must have {len(SIZES)} rows, got 3"):
        native.combine_(bucket, operand(F32, 3), [(1.0, a)])
    with pytest.raises(RuntimeError, match="combine_: a must have dtype Long, got Int"):
        native.combine_(bucket, a, [(1.0, operand(F32, table=torch.int32))])
    with pytest.raises(RuntimeError, match="dot: out must have 3 columns, got 2"):
        native.dot(bucket, a, a, out[:, :2].contiguous())
    with pytest.raises(RuntimeError, match="combine_: b_coefficient must be one element of dtype Double"):
        native.combine_(bucket, a, [(1.0, a), (torch.ones(()), a)])
    for terms in ([], [(1.0, a)] * 4):
        with pytest.raises(ValueError, match=f"combine_: there must be one to 3 terms, got {len(terms)}"):
            native.combine_(bucket, a, terms)
    bucket.dot_partials = bucket.dot_partials[:, 1:].contiguous()
    with pytest.raises(RuntimeError, match=f"dot: partials must have {len(bucket.chunk_table)} columns, got"):
        native.dot(bucket, a, a, out)
    bucket.dot_partials, bucket.slot = torch.zeros(3, len(bucket.chunk_table), dtype=F64), 2
    with pytest.raises(RuntimeError, match=r"dot: slot must be in \[0, 2\), got 2"):
        native.dot(bucket, a, a, out)
    code = torch.ops.fastsam.dot
    with pytest.raises(RuntimeError, match=r"dot: a must have a dtype with a code in \[0, 4\), got 4"):
        code(bucket.segment_table, bucket.chunk_table, a.table, 4, None, 0, bucket.dot_partials, out, 1)


# ---- The reader.


def recorded(params):
    """The segment table and the signatures that `gather` compares with."""
    described = [native.reader.describe(p) for p in params]
    segments = torch.zeros(len(params), 8, dtype=torch.int64)
    segments[:, 0] = torch.tensor([address for address, _ in described])
    return segments, torch.tensor([signature for _, signature in described])


def gather(params, segments, signatures, skip=None):
    grads = torch.full((len(params),), -1)
    where = (0 if skip is None else skip.data_ptr(), grads.data_ptr(), 0)
    found, moved, foreign = native.reader.gather(params, segments.data_ptr(), signatures.data_ptr(), *where)
    return found, grads.tolist(), moved, foreign


def parameter(*shape, grad=None, dtype=None):
    param = torch.nn.Parameter(torch.ones(shape, dtype=dtype))
    param.grad = grad
    return param


def test_gather_reads_addresses_and_leaves_out_what_is_skipped():
    params = [parameter(3, 2, grad=torch.ones(3, 2)), parameter(5), parameter(0, 4, grad=torch.ones(0, 4)), parameter()]
    params[3].grad = torch.ones(())
    tables = recorded(params)
    found, grads, moved, foreign = gather(params, *tables)
    assert [a is p.grad for a, p in zip(found, params, strict=True)] == [True] * 4
    assert (grads[0], grads[1], grads[3]) == (params[0].grad.data_ptr(), 0, params[3].grad.data_ptr())
    assert grads[2] != 0  # an empty gradient is a gradient
    assert (moved, foreign) == (None, None)
    found, grads, *_ = gather(params, *tables, skip=torch.tensor([1, 0, 1, 0], dtype=torch.uint8))
    assert found[0] is None and found[2] is None and grads[0] == grads[2] == 0 != grads[3]


def test_gather_names_parameters_that_moved():
    params = [parameter(4, 3) for _ in range(5)]
    tables = recorded(params)
    params[1].data = torch.ones(4, 3)
    params[2].data = params[2].data.t()
    params[4].data = params[4].data.to(torch.float64)
    assert gather(params, *tables)[2] == [1, 2, 4]


def test_gather_names_gradients_of_another_layout():
    params = [parameter(4, 3), parameter(4, 3), parameter(1, 6), parameter(4, 3), parameter(4, 3)]
    params[0].grad = torch.ones(3, 4).t()
    params[1].grad = torch.ones(4, 3).to_sparse()
    params[2].grad = torch.ones(6, 1).t()  # strides of dimensions of size 1 mean nothing
    params[3].grad = torch.ones(4, 3)
    params[4].grad = torch.ones(1, 1).expand(4, 3)
    found, grads, moved, foreign = gather(params, *recorded(params))
    assert (moved, foreign) == (None, [0, 1, 4])
    assert found[1] is params[1].grad and grads[1] == 0 and grads[0] == params[0].grad.data_ptr()


def test_gather_accepts_no_parameters():
    assert gather([], *recorded([parameter(1)])) == ([], [], None, None)


@pytest.mark.parametrize("wrong", [("name", torch.ones(2)), None, 3.0, [torch.ones(2)]], ids=str)
def test_gather_rejects_what_is_no_tensor(wrong):
    params = [parameter(2), parameter(2)]
    tables = recorded(params)
    with pytest.raises(TypeError, match="gather: expected a torch.Tensor, got <class"):
        gather([params[0], wrong], *tables)
    with pytest.raises(TypeError, match="gather: params must be a list, got <class 'tuple'>"):
        native.reader.gather(tuple(params), 0, 0, 0, 0, 0)


def test_same_params_compares_objects_in_order():
    a, b, c = parameter(2), parameter(2), parameter(2)
    same = native.reader.same_params
    assert same([{"params": [a, b]}, {"params": []}, {"params": [c]}], [a, b, c])
    for other in ([a, c, b], [a, b], [a, b, c, c], [a, b, torch.ones(2)]):
        assert not same([{"params": [a, b]}, {"params": [c]}], other)
    assert not same([{"params": [("a", a)]}], [a])
    with pytest.raises(TypeError, match=r"same_params: param_groups\[1\] must be a dict"):
        same([{"params": [a]}, (b,)], [a, b])
    with pytest.raises(KeyError, match=r"param_groups\[0\] has no 'params'"):
        same([{}], [])
    with pytest.raises(TypeError, match="a group's 'params' must be a list"):
        same([{"params": (a,)}], [a])


def test_a_signature_tells_layouts_apart():
    describe = native.reader.describe
    x = torch.ones(4, 6)
    assert describe(x) == (x.data_ptr(), describe(torch.zeros(4, 6))[1])
    assert describe(x[1:])[0] == x.data_ptr() + 24
    others = [
        x.t(),
        x.double(),
        x.half(),
        x.bfloat16(),
        x.int(),
        x[:, :5],
        x[None],
        x.flatten(),
        x[::2],
        torch.ones(6, 4),
    ]
    assert len({describe(other)[1] for other in [x, *others]}) == 1 + len(others)
    assert describe(torch.ones(1, 6))[1] == describe(torch.ones(6, 1).t())[1]
    for wrong in (x.to_sparse(), "x", None):
        with pytest.raises((TypeError, RuntimeError, BufferError)):
            describe(wrong)


def test_fill_writes_addresses():
    grads = [torch.ones(3), None, torch.ones(0), torch.ones(4)[1:]]
    table = torch.full((4,), -1)
    native.reader.fill(grads, table.data_ptr())
    assert table.tolist() == [grads[0].data_ptr(), 0, 64, grads[3].data_ptr()]
    for wrong in (3, "g", ("g", grads[0])):
        with pytest.raises(TypeError, match="fill: expected a torch.Tensor"):
            native.reader.fill([wrong], table.data_ptr())


def test_instruction_sets():
    assert native.reader.cpu_isas()[0] == "baseline" and native.reader.cpu_isa() in native.reader.cpu_isas()
    with pytest.raises(ValueError, match="use_cpu_isa: this processor has .*'baseline'.*, not 'mmx'"):
        native.reader.use_cpu_isa("mmx")
    assert native.reader.current_work_stream(1, 0) == 0  # a CPU has no streams
