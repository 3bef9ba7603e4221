"""The CUDA half without a GPU: csrc/cuda on a stub of CUDA's runtime, and nvcc's PTX of its kernels interpreted.

The bits are compared with those of the C++ library on the CPU, which test_native.py compares with the rounding plan.

`FASTSAM_PTX_ARCHS="75 90 120"` names the targets; without it 90 is the only one. With `-s` the file says at its end how
much it executed and compared. What this does not see is in ptx/__init__.py.
"""

import os

import cases
import pytest
import torch
from ptx import cuda, mutants
from ptx.buckets import (
    LRS,
    UPDATES,
    Comparer,
    any_bucket,
    any_gradients,
    far,
    far_gradients,
    many,
    pair_of,
    sums_for,
    with_own_rows,
)
from ptx.directions import COMBINATIONS, MIXES, SMALL, Directions, many_sizes
from ptx.grid import Fault
from ptx.races import races
from ptx.tally import Tally
from rounding import DTYPES, FIRST_DRAW, MASTERS, MIXED, PLAIN, STOCHASTIC, bucket_of, label, mixed, values

from fastsam.bases.rules import ADAM, ADAPTIVE
from fastsam.ops import native

ARCHS = [int(arch) for arch in os.environ.get("FASTSAM_PTX_ARCHS", "90").split()]
FORMATS = [*PLAIN, *MASTERS, *STOCHASTIC, *(mixed(*pair) for pair in MIXED)]

pytestmark = [
    pytest.mark.skipif(cuda.nvcc() is None, reason="there is no nvcc"),
    pytest.mark.skipif(native.reason() is not None, reason="there is no library to compare with"),
    pytest.mark.skipif(not (cuda.ROOT / "csrc" / "cuda").is_dir(), reason="the tests are not run from a source tree"),
]


@pytest.fixture(scope="module", params=ARCHS, ids="compute_{}".format)
def arch(request):
    return request.param


@pytest.fixture(scope="module")
def tally(arch):
    counts = Tally(f"compute_{arch}")
    yield counts
    print(f"\n{counts}")


@pytest.fixture
def check(tally):
    return Comparer(tally)


@pytest.fixture
def make(request, arch, tally):
    """Makes backends; what they run is counted."""
    made, folder = [], request.config.cache.mkdir("ptx")

    def make(**options):
        library = cuda.Library(arch, folder, **options)
        made.extend([library] if "ptx" not in options else [])
        return library

    yield make
    for library in made:
        for ran in library.ran:
            tally.note(ran.grid, request.node.name)


# ---- Every kernel.

# 45 groups are more than the small arguments take; of other formats there are kernels with large ones only.
SIZED = [(format, n) for format in FORMATS for n in (9, 45) if n == 9 or format in PLAIN]
EVERY = [(kernel, *sized) for kernel in UPDATES for sized in SIZED]
UNSCALED, SCALED = {}, dict(grad_scale=torch.tensor([4.0]))
CLIPPED, CLEARED = (dict(clip=torch.tensor(factor, dtype=torch.float64)) for factor in (0.37, 0.0))
# Options of the backend and of update_; the last but one is that of any bits, which a factor of 0 clears.
UPDATED = [
    [
        (dict(split_bits=2), UNSCALED),
        (dict(split_bits=0, in_tables=True), SCALED | CLIPPED),
        (dict(split_bits=1), factors),
        (dict(split_bits=2), SCALED | dict(found_inf=torch.ones(1))),
    ]
    for factors in (UNSCALED, CLEARED)
]
PERTURBED = [dict(split_bits=i % 3, in_tables=i % 3 == 1) for i in range(6)]


@pytest.mark.parametrize(("kernel", "format", "n_groups"), EVERY, ids=lambda x: label(x) if isinstance(x, tuple) else x)
def test_every_update_has_the_bits_of_the_cpu_library(make, check, kernel, format, n_groups):
    """Any size and alignment, groups of all options, lr on the device, in each division of chunks among blocks."""
    seed = EVERY.index((kernel, format, n_groups))
    buckets = pair_of(UPDATES[kernel], format, seed, n_groups)
    check.same_updates(make, lambda i: buckets, kernel, UPDATED[seed % 2], seed)


@pytest.mark.parametrize(("format", "n_groups"), SIZED, ids=lambda x: label(x) if isinstance(x, tuple) else x)
def test_every_norm_and_perturbation_has_the_bits_of_the_cpu_library(make, check, format, n_groups):
    """As above, for every way to perturb; with norms to clip by, and one that is not finite."""
    buckets = pair_of(["sgd-nesterov-maximize", "sgd"], format, SIZED.index((format, n_groups)), n_groups)
    check.same_perturbations(make, lambda i: buckets, PERTURBED)


@pytest.mark.parametrize("q", [1.0, 1.5, 7.0])
@pytest.mark.parametrize("format", FORMATS, ids=label)
def test_other_norms_are_near_those_of_the_cpu_library(make, check, format, q):
    """Their powers are not the same bits on any two backends."""
    buckets = pair_of(["sgd-nesterov-maximize", "sgd"], format, FORMATS.index(format))
    check.near_norms((make(split_bits=int(q) % 3), native), buckets, q)


# ---- How values reach the kernels.


@pytest.mark.parametrize(
    ("n_segments", "n_groups", "words", "fills", "small"),
    [
        (494 - 33, 3, 494, 0, True),
        (494 - 32, 3, 495, 0, False),
        (4077 - 33, 3, 4077, 0, False),
        (4077 - 32, 3, 4077 - 32, 1, False),  # the rows in a table
        (20, 371, 20, 2, True),  # of two launches
        (4100, 3, 33, 2, True),  # the gradients in a table, by two launches
        (4100, 371, 0, 2 + 2, True),
    ],
)
def test_rows_and_gradients_by_value_or_in_tables(make, check, n_segments, n_groups, words, fills, small):
    ours, theirs = with_own_rows(many(n_segments, n_groups, 16)), many(n_segments, n_groups, 16)
    grads = [[None if i % 5 == which else values(len(p), p.dtype, 100 * which + i) for i, p in enumerate(ours.params)]
             for which in (1, 2)]  # fmt: skip
    library = make()
    check.same_steps((library, native), (ours, theirs), grads)
    work = [ran.launch for ran in library.ran if ran.launch.operation != "fill"]
    assert [launch.operation for launch in work] == ["grad_norm", "perturb", "update"]
    assert {launch.words for launch in work} == {words} and len(library.ran) - len(work) == 3 * fills
    assert {len(launch.params) == 4096 for launch in work} == {small}


@pytest.mark.parametrize(("processors", "blocks"), [(132, 4), (9, 2), (5, 1)])
def test_small_models_have_several_blocks_a_chunk(make, check, processors, blocks):
    ours, theirs = with_own_rows(many(400, 3)), many(400, 3)
    grads = [values(len(p), p.dtype, i) for i, p in enumerate(ours.params)]
    library = make(processors=processors)
    check.same_steps((library, native), (ours, theirs), (grads, grads))
    assert [ran.launch.blocks for ran in library.ran] == [400, 400 * blocks, 400 * blocks]


def test_more_chunks_than_lanes(make, check):
    """The last block's sum over 1,024 lanes wraps."""
    ours, theirs = with_own_rows(many(1100, 3)), many(1100, 3)
    grads, sums = [values(len(p), p.dtype, i) for i, p in enumerate(ours.params)], [sums_for(ours), sums_for(theirs)]
    make().grad_norm(ours, grads, sums[0])
    native.grad_norm(theirs, grads, sums[1])
    check.same(*sums, "norms")


@pytest.mark.parametrize("format", [*PLAIN, *MASTERS], ids=label)
def test_parameters_of_more_than_4_gi_elements(make, check, format):
    for options in (["sgd-dampening"], ["adamw-amsgrad-maximize"]):
        ours, theirs = pair_of(options, format, 5)
        far(ours)
        for _ in range(2):
            grads = [any_gradients(theirs, which) for which in range(2)]
            shifted = [far_gradients(ours, each) for each in grads]
            library = make(split_bits=1)
            for backend, bucket, (first, second) in ((library, ours, shifted), (native, theirs, grads)):
                sums = sums_for(bucket)
                bucket.grad_table = getattr(first, "table", bucket.grad_table)  # where the addresses are
                backend.grad_norm(bucket, first, sums)
                backend.perturb_(bucket, first, sums)
                bucket.grad_table = getattr(second, "table", bucket.grad_table)
                backend.update_(bucket, second)
            check.same_buckets(ours, theirs, "after a step")


def test_nothing_to_do(make):
    bucket, library = with_own_rows(bucket_of([torch.zeros(0)] * 3, "adam")), make()
    out, grads = sums_for(bucket), [torch.zeros(0), None, torch.zeros(0)]
    library.grad_norm(bucket, grads, out)
    library.perturb_(bucket, grads, torch.full_like(out, float("nan")))
    library.update_(bucket, grads)
    assert out[bucket.slot] == 0 and bucket.steps.tolist() == [1, 0, 1] and bucket.overflows.tolist() == [1, 0]


def test_the_step_of_the_random_numbers_goes_on_with_a_rule_and_without_a_gradient(make):
    """And not without a rule, whoever asks first: the base optimizer's step comes after it."""
    for rules in ((ADAM, None, ADAM), (None, ADAM, None)):
        buckets = pair_of(["adam"], STOCHASTIC[0], 1)
        steps = buckets[0].steps.tolist()
        for count, rule in enumerate(rules):
            for bucket, backend in zip(buckets, (make(), native), strict=True):
                bucket.rule = rule
                backend.update_(bucket, [None] * len(bucket.params))
                passed = sum(rule is not None for rule in rules[: count + 1])
                assert bucket.rounding.tolist() == [FIRST_DRAW + passed]
                assert bucket.steps.tolist() == steps


# ---- Gradients and directions.

WIDES = [[dtype] * 5 for dtype in DTYPES[:2]]  # each what is computed in, too


def named(dtypes):
    return "-".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


@pytest.mark.parametrize("dtypes", MIXES, ids=named)
def test_products_and_combinations_have_the_bits_of_the_cpu_library(make, check, dtypes):
    """Any size, alignment and dtype, segments that an operand lacks, in each division of chunks among blocks."""
    Directions(dtypes, MIXES.index(dtypes)).same_everything(check, [make(split_bits=i) for i in range(3)])


@pytest.mark.parametrize("dtypes", [MIXES[1], *WIDES], ids=named)
def test_what_has_the_coefficient_0_is_not_read(make, check, dtypes):
    """Its memory is none that the kernel may touch; and 0 times what is there would not be 0."""
    directions = Directions(dtypes)
    directions.fill("a", [float("inf"), float("nan")])
    directions.fill("c")
    for i, zero in enumerate([0.0, -0.0, *([] if dtypes[1] == torch.float64 else [1e-60])]):  # 0 in float32
        for terms in ([(zero, "a"), (0.3, "b")], [(0.3, "b"), (zero, "a"), (0.2, "c")], [(zero, "a")]):
            for there in (False, True):
                directions.same_combination(check, make(split_bits=i), terms, there)
    for c in (float("nan"), float("inf")):
        directions.same_combination(check, make(), [(c, "b"), (0.5, "c")], True)


RANGES = [  # segments, operands, of how many segments the arguments take the addresses: small ones of 500 and so
    (251, 2, 251),
    (252, 2, 2043),
    (2043, 2, 2043),
    (2044, 2, 2043),
    (4100, 2, 2043),
    (503, 1, 503),
    (504, 1, 4086),
    (125, 4, 125),  # combinations
    (126, 4, 1020),
    (1020, 4, 1020),
    (1021, 4, 1020),
    (2100, 4, 1020),
    (166, 3, 166),
    (167, 3, 1361),
]
RANGED = [(*row, wide) for row in RANGES for wide in DTYPES[:2] if wide == DTYPES[0] or row[0] in (2044, 1021)]


@pytest.mark.parametrize(("n_segments", "n_operands", "most", "wide"), RANGED)
def test_addresses_are_told_by_value_in_ranges_of_segments(make, check, n_segments, n_operands, most, wide):
    directions, library = Directions([wide] * 5, sizes=many_sizes(n_segments, most), every=5), make()
    if n_operands < 3:
        directions.same_products(check, library, "a", "b" if n_operands == 2 else None)
    else:
        directions.same_combination(check, library, COMBINATIONS[n_operands - 2])
    launches = [ran.launch for ran in library.ran]
    headers = [cuda.OPERAND_HEADERS[launch.operation].from_buffer_copy(launch.params) for launch in launches]
    ranges = [(first, min(most, n_segments - first)) for first in range(0, n_segments, most)]
    assert [(header.first_segment, header.n_segments) for header in headers] == ranges
    assert {len(launch.params) == 4096 for launch in launches} == {n_operands * most <= 503}


@pytest.mark.parametrize("n_chunks", [1100, 3077])  # from an odd number on, rows of partial sums are off 16 bytes
def test_products_over_more_chunks_than_lanes(make, check, n_chunks):
    directions = Directions(WIDES[0], sizes=[1 + i % 3 for i in range(n_chunks)])
    directions.same_products(check, make())


@pytest.mark.parametrize("dtypes", [MIXES[1], MIXES[2], WIDES[1]], ids=named)
def test_operands_of_more_than_4_gi_elements(make, check, dtypes):
    directions, library = Directions(dtypes, 3, far=True), make(split_bits=1)
    directions.same_products(check, library)
    for terms in COMBINATIONS[2:4]:
        directions.same_combination(check, library, terms, True)


def test_nothing_to_add(make, check):
    """One block sums nothing; nothing writes nothing."""
    directions, library = Directions(WIDES[0], sizes=[0, 0, 0]), make()
    directions.same_products(check, library)
    directions.same_combination(check, library, COMBINATIONS[0])
    assert [(ran.launch.operation, ran.launch.blocks) for ran in library.ran] == [("dot", 1)]
    out = torch.full((3, 3), -7.0, dtype=torch.float64)
    library.dot(directions.buckets[0], directions.operands["a"], None, out)
    assert out[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtypes", [MIXES[1], WIDES[1]], ids=named)
def test_products_and_combinations_in_any_order_without_a_race(make, check, dtypes):
    """Of dot the last block adds what others wrote; of combine_ the written operand may be read, too."""
    directions, library = Directions(dtypes, 1, sizes=SMALL), make(seed=3000, log=True, split_bits=1)
    directions.same_products(check, library)
    for terms in (COMBINATIONS[3], COMBINATIONS[6]):
        directions.same_combination(check, library, terms, True)
    for ran in library.ran:
        assert not races(ran.grid), ran.launch.kernel.name


def test_the_last_launch_of_several_adds_what_all_wrote(make, check):
    directions, library = Directions(MIXES[1], sizes=many_sizes(2044, 2043)), make(seed=4000, log=True)
    directions.same_products(check, library)
    assert len(library.ran) == 2 and not any(races(ran.grid) for ran in library.ran)


@pytest.mark.parametrize("dtypes", [MIXES[2], *WIDES], ids=named)
def test_replays_read_coefficients_and_operands_anew(make, check, dtypes):
    Directions(dtypes, 2).same_replays(check, make())


# ---- In any order.


ORDERS = [(PLAIN[0], "nadam", 1), (MASTERS[0], "sgd-dampening", 0), (STOCHASTIC[2], "adam", 2)]


@pytest.mark.parametrize(
    ("format", "option", "split_bits"), ORDERS, ids=lambda x: label(x) if isinstance(x, tuple) else x
)
def test_blocks_and_warps_in_any_order_without_a_race(make, check, format, option, split_bits):
    """Blocks and warps take turns at random, between any two places where they meet, part or take a ticket."""
    ours, theirs = pair_of([option], format, 1)
    library = make(seed=1000, log=True, split_bits=split_bits)
    check.same_steps((library, native), (ours, theirs), [any_gradients(ours, 9 + which) for which in range(2)])
    for ran in library.ran:
        assert not races(ran.grid), ran.launch.kernel.name


@pytest.mark.parametrize("kernel", UPDATES)
def test_updates_in_any_order_without_a_race(make, check, kernel):
    made = []

    def noted(**options):
        made.append(make(seed=2000, log=True, **options))
        return made[-1]

    buckets = pair_of(UPDATES[kernel], STOCHASTIC[0], 4)
    check.same_updates(noted, lambda i: buckets, kernel, UPDATED[0][::3], 4)
    for library in made:
        for ran in library.ran:
            assert not races(ran.grid), ran.launch.kernel.name


# ---- Captured.


@pytest.mark.parametrize("format", [PLAIN[0], MASTERS[0], STOCHASTIC[0]], ids=label)
def test_a_captured_launch_reads_rows_from_the_device(make, check, format):
    """Each replay takes the values that were uploaded since, an adaptive group among them, and new gradients."""
    ours, theirs = buckets = [any_bucket(["sgd-nesterov-maximize"], format, 3, 9, LRS[0], False) for _ in range(2)]
    with_own_rows(ours)
    library, sums = make(), [sums_for(bucket) for bucket in buckets]
    grads = [any_gradients(ours, which) for which in range(2)]
    before = [p.clone() for p in ours.params]
    library.upload_values(ours)
    with library.capture():
        library.grad_norm(ours, grads[0], sums[0])
        library.perturb_(ours, grads[0], sums[0])
        library.update_(ours, grads[1])
    assert len(library.graph) == 3 and [ran.launch.operation for ran in library.ran] == ["fill"]
    for i, (p, old) in enumerate(zip(ours.params, before, strict=True)):
        check.same(p, old, f"weights of segment {i} before a replay")
    for step in range(3):
        library.replay()
        native.grad_norm(theirs, grads[0], sums[1])
        native.perturb_(theirs, grads[0], sums[1])
        native.update_(theirs, grads[1])
        check.same(*sums, "norms")
        check.same_buckets(ours, theirs, f"after replay {step}")
        for bucket in buckets:
            bucket.rows = [
                row._replace(lr=0.5 * row.lr, rho=2 * row.rho, weight_decay=0.3, flags=row.flags ^ ADAPTIVE)
                for row in bucket.rows
            ]
            bucket.row_table.copy_(torch.tensor(bucket.rows, dtype=torch.float64))
        for grad in (g for each in grads for g in each if g is not None):
            grad.mul_(-0.5)
        library.upload_values(ours)


# ---- Whole steps.

WHOLE = [(config, torch.float32, {}) for config in cases.CONFIGS if config.name.endswith("groups")]
WHOLE += [
    (cases.ADAM_CONFIGS[-1], dtype, options)
    for dtype, options in (
        (torch.float32, dict(max_grad_norm=3.0)),
        (torch.float32, dict(perturb_with_weight_decay=True)),
        (torch.bfloat16, dict(master_weights=True)),
        (torch.float16, dict(stochastic_rounding=True, rounding_seed=2**40 + 7)),
        (torch.float16, dict(master_weights=True, state_dtype=torch.bfloat16, max_grad_norm=2.0)),
    )
]


@pytest.mark.filterwarnings(cases.NO_GRADIENTS)
@pytest.mark.parametrize(("config", "dtype", "options"), WHOLE, ids=lambda x: getattr(x, "name", str(x)))
def test_whole_steps_have_the_references_bits(make, check, config, dtype, options):
    """As users take them: a pass is one native call where that is possible."""
    check.same_whole_steps(make(), config, dtype, options, {"grad_norm", "perturb", "update"})


@pytest.mark.filterwarnings(cases.NO_GRADIENTS)
@pytest.mark.parametrize("options", [{}, dict(master_weights=True), dict(stochastic_rounding=True)], ids=str)
def test_replays_follow_the_groups_values(make, check, options):
    """A captured FusedSAM step, replayed with another lr, rho and weight decay, has the bits of steps not captured."""
    check.same_replays(make(), cases.ADAM_CONFIGS[-1], torch.bfloat16 if options else torch.float32, options)


# ---- The host's half.


def test_host_and_ptx_have_the_same_kernels(make):
    library = make()
    assert sorted(library.host.names()) == sorted(library.ptx.places)


def test_an_error_of_a_launch_is_an_exception(make, check, monkeypatch):
    ours, theirs = pair_of(["sgd"], PLAIN[0], 0)
    library, grads = make(), any_gradients(ours, 0)
    monkeypatch.setattr(library, "execute", lambda launch: 1 / 0)
    for operation in (library.grad_norm, library.perturb_):
        with pytest.raises(ZeroDivisionError):
            operation(ours, grads, sums_for(ours))
    assert not ours.perturbed.any()  # no backup holds anything
    monkeypatch.undo()
    check.same_steps((library, native), (ours, theirs), (grads, grads))  # the next launch starts without it


# ---- Whether the tests would notice.

DOT, COMBINE = "3dotILi503Ef", "7combineILi500Ef"
NORM, CLIMB = "grad_normILi494ENS0_5TypesIffff", "perturbILi494ENS0_5TypesIffff"
SGD, DRAWN = "KernelE2ELi494ENS0_5TypesIffff", "KernelE3ELi494ENS0_5TypesINS0_8bfloat16ES4_S4_S4_Lb1"
MUTANTS = {  # kernel, pattern, what it becomes, which of those that match
    "a barrier of the sum is missing": (NORM, r"bar\.sync\s+0;", "", 1),
    "the barrier after the scalars is missing": (CLIMB, r"bar\.sync\s+0;", "", 0),
    "a lane takes another's number": (NORM, r"(shfl\.sync)\.bfly(\.b32.*)", r"\1.up\2", 0),
    "a ticket goes on": (NORM, r"\.inc\.u32", ".add.u32", 0),
    "a ticket orders nothing": (SGD, r"atom\.release\.gpu", "atom.relaxed.gpu", 2),
    "a sum is rounded twice": (SGD, r"fma\.rn\.f32(\s+\S+, \S+, \S+), \S+;", r"mul.rn.f32\1;", 2),
    "a store lies beside its place": (CLIMB, r"(st\.global\.\w+\.v4\.u32\s+\[%rd\d+)\]", r"\1+16]", 0),
    "a store lies across its place": (CLIMB, r"(st\.global\.\w+\.v4\.u32\s+\[%rd\d+)\]", r"\1+8]", 0),
    "a store is missing": (SGD, r"st\.global\.wb\.v4\.u32.*", "", 0),
    "a load is of another place": (SGD, r"(ld\.global\.cs\.v4\.u32.*\[%rd\d+)\]", r"\1+16]", 1),
    "an argument is another": (SGD, r"(ld\.param\.u64\s+.*\+)24\]", r"\g<1>16]", 0),
    "the other of two": (SGD, r"selp\.f32(\s+\S+), (\S+), (\S+),", r"selp.f32\1, \3, \2,", 0),
    "another multiplier of the random numbers": (DRAWN, r"-766435501", "-766435503", 0),
    "a product is added that is rounded already": (DOT, r"fma\.rn\.f32(\s+\S+, \S+, \S+), \S+;", r"mul.rn.f32\1;", 5),
    "the last block does not wait": (DOT, r"bar\.sync\s+0;", "", 1),
    "the ticket of products orders nothing": (DOT, r"atom\.release\.gpu", "atom.relaxed.gpu", 0),
    "a term of coefficient 0 is read": (COMBINE, r"(setp\.eq\.f32\s+\S+, \S+, )0f00000000;", r"\g<1>0fFF800000;", 0),
    "a coefficient is another's": (COMBINE, r"(ld\.param\.f64\s+.*\+)56\]", r"\g<1>64]", 0),
    "random numbers are rounded away": (DRAWN, r"shr\.u32(\s+\S+, \S+), 16;", r"shr.u32\1, 15;", 3),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_noticed(make, arch, check, mutant):
    part, pattern, new, nth = MUTANTS[mutant]
    library = make()
    kernel = next(name for name in library.ptx.places if part in name)
    text = mutants.text_of(library.ptx.places[kernel], kernel)
    changed = mutants.applied(text, mutants.matching(kernel, text, pattern, new, nth))
    ptx = library.ptx.replaced(kernel, changed)
    with pytest.raises((Fault, AssertionError)):
        mutants.check_kernel(check, lambda **options: make(ptx=ptx, log=True, **options), kernel, UPDATED[0], PERTURBED)
