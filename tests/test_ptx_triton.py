"""The Triton half without a GPU: Triton's own launcher on a stub driver, and the PTX of the kernels interpreted.

The bits are compared with those of the C++ library on the CPU, as in test_ptx_cuda.py, where the same environment names
targets. `FASTSAM_PTX_ALL=1`: every rule in every format; without it every rule, and every format. `FASTSAM_PTX_TRITON`:
folders of other Triton releases, separated as in PATH, with which this file is run again.
"""

import importlib.util
import os
import shutil
import subprocess
import sys

import cases
import pytest
import torch
from ptx.buckets import UPDATES, Comparer, any_gradients, many, pair_of, sums_for
from ptx.directions import COMBINATIONS, MIXES, SMALL, Directions, many_sizes
from ptx.races import is_idiom, races
from ptx.tally import Tally
from rounding import DTYPES, FIRST_DRAW, MASTERS, MIXED, PLAIN, STOCHASTIC, bucket_of, label, mixed, values

from fastsam.bases.rules import ADAM
from fastsam.ops import native

if importlib.util.find_spec("triton") is None:
    pytest.skip("the triton package is not installed", allow_module_level=True)
if cases.interpreted():
    pytest.skip("TRITON_INTERPRET=1: kernels are not compiled here", allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("there is a GPU, whose driver is loaded: test_triton.py runs there", allow_module_level=True)

ARCHS = [int(arch) for arch in os.environ.get("FASTSAM_PTX_ARCHS", "90").split()]
FORMATS = [*PLAIN, *MASTERS, *STOCHASTIC, *(mixed(*pair) for pair in MIXED)]

pytestmark = [
    pytest.mark.skipif(native.reason() is not None, reason="there is no library to compare with"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler for the stub driver"),
]


@pytest.fixture(scope="module", params=ARCHS, ids="sm_{}".format)
def driver(request):
    from ptx.triton_driver import StubDriver

    with StubDriver(request.param, request.config.cache.mkdir("ptx")) as driver:
        yield driver


@pytest.fixture(scope="module")
def tally(driver):
    import triton

    counts = Tally(f"Triton {triton.__version__}, sm_{driver.arch}")
    yield counts
    print(f"\n{counts}")


@pytest.fixture
def check(tally):
    return Comparer(tally)


@pytest.fixture
def make(request, driver, tally):
    """Makes backends; what they run is counted."""
    from ptx.triton_driver import TritonLibrary

    made = []

    def make(**options):
        made.append(TritonLibrary(driver, **options))
        return made[-1]

    yield make
    for library in made:
        for ran in library.ran:
            tally.note(ran.grid, request.node.name, f" of {id(ran.launch.kernel)}")


def pair(options, format, seed):
    return pair_of(options, format, seed, own_rows=False)


# ---- Every kernel.

EVERY = [(kernel, format) for kernel in UPDATES for format in FORMATS]
# Triton compiles each as long as ten kernels of CUDA's, and all from one source: every rule without and with masters,
# and every format.
QUICK = [("adam", format) for format in FORMATS]
QUICK += [(kernel, format) for format in (PLAIN[0], MASTERS[0]) for kernel in UPDATES if kernel != "adam"]
UPDATED, NORMED, POWERS = QUICK, [*PLAIN, MASTERS[0], STOCHASTIC[0], FORMATS[-1]], PLAIN[:1]
if os.environ.get("FASTSAM_PTX_ALL") == "1":
    UPDATED, NORMED, POWERS = EVERY, FORMATS, FORMATS


@pytest.mark.parametrize(("kernel", "format"), UPDATED, ids=lambda x: label(x) if isinstance(x, tuple) else x)
def test_every_update_has_the_bits_of_the_cpu_library(make, check, kernel, format):
    """Any size and alignment, groups of all options, lr on the device, in each division of chunks among programs."""
    seed, clips = EVERY.index((kernel, format)), torch.tensor([0.37, 0.0]).double()
    situations = [  # options of the backend and of update_
        (dict(programs=2048), dict(clip=clips[1])),
        (dict(programs=1), dict(grad_scale=torch.tensor([4.0]), clip=clips[0])),
        (dict(programs=40), dict(found_inf=torch.ones(1))),
    ]
    check.same_updates(make, lambda i: pair(UPDATES[kernel], format, seed + i), kernel, situations, seed)


@pytest.mark.parametrize("format", NORMED, ids=label)
def test_every_norm_and_perturbation_has_the_bits_of_the_cpu_library(make, check, format):
    """As above, for every way to perturb; with norms to clip by, and one that is not finite."""
    situations = [dict(programs=programs) for programs in (2048, 40, 1)]
    check.same_perturbations(make, lambda i: pair(["sgd-nesterov-maximize", "sgd"], format, i), situations)


@pytest.mark.parametrize("q", [1.0, 1.5])
@pytest.mark.parametrize("format", POWERS, ids=label)
def test_other_norms_are_near_those_of_the_cpu_library(make, check, format, q):
    """Their powers are not the same bits on any two backends."""
    check.near_norms((make(), native), pair(["sgd-nesterov-maximize", "sgd"], format, 3), q)


@pytest.mark.parametrize(("n_segments", "option"), [(300, "nadam"), (1100, "sgd-dampening")])
def test_more_segments_than_are_counted_at_once_and_more_chunks_than_lanes(make, check, n_segments, option):
    ours, theirs = many(n_segments, 3, option=option), many(n_segments, 3, option=option)
    library = make(programs=1)
    for step in range(2):
        grads = [[None if (i + step) % 5 == which else values(len(p), p.dtype, 100 * which + i + step)
                  for i, p in enumerate(ours.params)] for which in (1, 2)]  # fmt: skip
        check.same_steps((library, native), (ours, theirs), grads)


def test_nothing_to_do(make):
    bucket, library = bucket_of([torch.zeros(0)] * 3, "adam"), make()
    bucket.device, bucket.cache = torch.device("cpu"), None
    out, grads = sums_for(bucket), [torch.zeros(0), None, torch.zeros(0)]
    library.grad_norm(bucket, grads, out)
    library.perturb_(bucket, grads, torch.full_like(out, float("nan")))
    library.update_(bucket, grads)
    assert out[bucket.slot] == 0 and bucket.steps.tolist() == [1, 0, 1] and bucket.overflows.tolist() == [1, 0]


def test_the_step_of_the_random_numbers_goes_on_with_a_rule_and_without_a_gradient(make):
    """And not without a rule, whoever asks first: the base optimizer's step comes after it."""
    for rules in ((ADAM, None, ADAM), (None, ADAM, None)):
        buckets, library = pair(["adam"], STOCHASTIC[0], 1), make()
        steps = buckets[0].steps.tolist()
        for count, rule in enumerate(rules):
            for bucket, backend in zip(buckets, (library, native), strict=True):
                bucket.rule = rule
                backend.update_(bucket, [None] * len(bucket.params))
                passed = sum(rule is not None for rule in rules[: count + 1])
                assert bucket.rounding.tolist() == [FIRST_DRAW + passed]
                assert bucket.steps.tolist() == steps


@pytest.mark.parametrize(
    ("format", "option"),
    [(PLAIN[0], "nadam"), (STOCHASTIC[2], "sgd-dampening")],
    ids=lambda x: label(x) if isinstance(x, tuple) else x,
)
def test_programs_and_warps_in_any_order_without_a_race(make, check, format, option):
    ours, theirs = pair([option], format, 1)
    library = make(seed=1000, log=True, programs=1)
    check.same_steps((library, native), (ours, theirs), [any_gradients(ours, 9 + which) for which in range(2)])
    for ran in library.ran:
        assert not [lines for lines in races(ran.grid) if not is_idiom(ran.grid, lines)], ran.launch.kernel.name


@pytest.mark.filterwarnings(cases.NO_GRADIENTS)
@pytest.mark.parametrize("options", [{}, dict(stochastic_rounding=True, max_grad_norm=3.0)], ids=str)
def test_whole_steps_have_the_references_bits(make, check, options):
    config, dtype = cases.ADAM_CONFIGS[-1], torch.bfloat16 if options else torch.float32
    check.same_whole_steps(
        make(programs=50), config, dtype, options, {"_grad_norm_kernel", "_perturb_kernel", "_update_kernel"}
    )


@pytest.mark.parametrize("options", [{}, dict(master_weights=True)], ids=str)
def test_replays_follow_the_groups_values(make, check, options):
    """A captured FusedSAM step, replayed with another lr, rho and weight decay, has the bits of steps not captured."""
    check.same_replays(make(programs=50), cases.ADAM_CONFIGS[-1], torch.bfloat16 if options else torch.float32, options)


# ---- Gradients and directions.

WIDES = [[dtype] * 5 for dtype in DTYPES[:2]]  # each what is computed in, too


def named(dtypes):
    return "-".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def directions_of(dtypes, seed=0, **options):
    return Directions(dtypes, seed, own_rows=False, **options)


@pytest.mark.parametrize("dtypes", MIXES, ids=named)
def test_products_and_combinations_have_the_bits_of_the_cpu_library(make, check, dtypes):
    """Any size, alignment and dtype, segments that an operand lacks, in each division of chunks among programs."""
    which = MIXES.index(dtypes)
    directions_of(dtypes, which).same_everything(check, [make(programs=(2048, 17, 1)[which % 3])])


@pytest.mark.parametrize("dtypes", [MIXES[1], *WIDES], ids=named)
def test_what_has_the_coefficient_0_is_not_read(make, check, dtypes):
    """Its memory is none that the kernel may touch; and 0 times what is there would not be 0."""
    directions, library = directions_of(dtypes), make()
    directions.fill("a", [float("inf"), float("nan")])
    directions.fill("c")
    for zero in (0.0, -0.0, *([] if dtypes[1] == torch.float64 else [1e-60])):  # 0 in float32
        for terms in ([(zero, "a"), (0.3, "b")], [(0.3, "b"), (zero, "a"), (0.2, "c")], [(zero, "a")]):
            for there in (False, True):
                directions.same_combination(check, library, terms, there)
    for c in (float("nan"), float("inf")):
        directions.same_combination(check, library, [(c, "b"), (0.5, "c")], True)


def test_products_and_combinations_of_thousands_of_tensors(make, check):
    directions, library = directions_of(MIXES[1], sizes=many_sizes(3000, 3000, 50), every=5), make()
    directions.same_products(check, library)
    directions.same_combination(check, library, COMBINATIONS[2])


def test_products_over_more_chunks_than_lanes(make, check):
    directions = directions_of(WIDES[0], sizes=[1 + i % 3 for i in range(1050)])
    directions.same_products(check, make())


@pytest.mark.parametrize("dtypes", [MIXES[1], MIXES[2], WIDES[1]], ids=named)
def test_operands_of_more_than_4_gi_elements(make, check, dtypes):
    directions, library = directions_of(dtypes, 3, far=True), make(programs=17)
    directions.same_products(check, library)
    for terms in COMBINATIONS[2:4]:
        directions.same_combination(check, library, terms, True)


def test_nothing_to_add(make, check):
    directions, library = directions_of(WIDES[0], sizes=[0, 0, 0]), make()
    directions.same_products(check, library)
    directions.same_products(check, library, "a", None)
    directions.same_combination(check, library, COMBINATIONS[0])


@pytest.mark.parametrize("dtypes", [MIXES[1], WIDES[1]], ids=named)
def test_products_and_combinations_in_any_order_without_a_race(make, check, dtypes):
    directions = directions_of(dtypes, 1, sizes=SMALL)
    library = make(seed=3000, log=True, programs=8)
    directions.same_products(check, library)
    for terms in (COMBINATIONS[3], COMBINATIONS[6]):
        directions.same_combination(check, library, terms, True)
    for ran in library.ran:
        assert not [lines for lines in races(ran.grid) if not is_idiom(ran.grid, lines)], ran.launch.kernel.name


@pytest.mark.parametrize("dtypes", [MIXES[2], *WIDES], ids=named)
def test_replays_read_coefficients_and_operands_anew(make, check, dtypes):
    directions, library = directions_of(dtypes, 2), make()
    directions.same_products(check, library)  # what is not loaded cannot be captured
    directions.same_combination(check, library, COMBINATIONS[2])
    directions.same_replays(check, library)


# ---- Other releases.

RELEASES = [each for each in os.environ.get("FASTSAM_PTX_TRITON", "").split(os.pathsep) if each]


@pytest.mark.skipif(not RELEASES, reason="FASTSAM_PTX_TRITON names no folders of other Triton releases")
@pytest.mark.parametrize("folder", RELEASES)
def test_another_release(folder):
    paths = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(paths), FASTSAM_PTX_TRITON="")
    command = [sys.executable, "-m", "pytest", "-q", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
