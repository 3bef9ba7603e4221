"""The Triton half without a GPU: Triton's own launcher on a stub driver, and the PTX of the kernels interpreted."""

import importlib.util
import os
import shutil
import subprocess
import sys

import cases
import pytest
import torch
from ptx.buckets import UPDATES, Comparer, any_gradients, many, pair_of, sums_for
from ptx.races import is_idiom, races
from ptx.tally import Tally
from rounding import FIRST_DRAW, MASTERS, MIXED, PLAIN, STOCHASTIC, bucket_of, label, mixed, values

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
# Triton compiles each as long as ten kernels of CUDA's, and all from one source: a rule, or a format, at a time.
QUICK = [(kernel, PLAIN[0]) for kernel in UPDATES] + [("adam", format) for format in FORMATS]
UPDATED = [pytest.param(*each, marks=[] if each in QUICK else pytest.mark.slow) for each in EVERY]


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


SEVERAL = [*PLAIN, MASTERS[0], STOCHASTIC[0], FORMATS[-1]]
NORMED = [pytest.param(each, marks=[] if each in SEVERAL else pytest.mark.slow) for each in FORMATS]


@pytest.mark.parametrize("format", NORMED, ids=label)
def test_every_norm_and_perturbation_has_the_bits_of_the_cpu_library(make, check, format):
    """As above, for every way to perturb; with norms to clip by, and one that is not finite."""
    situations = [dict(programs=programs) for programs in (2048, 40, 1)]
    check.same_perturbations(make, lambda i: pair(["sgd-nesterov-maximize", "sgd"], format, i), situations)


@pytest.mark.parametrize("q", [1.0, 1.5])
@pytest.mark.parametrize(
    "format", [PLAIN[0], *(pytest.param(f, marks=pytest.mark.slow) for f in FORMATS[1:])], ids=label
)
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


# ---- Other releases.

RELEASES = [each for each in os.environ.get("FASTSAM_PTX_TRITON", "").split(os.pathsep) if each]


@pytest.mark.skipif(not RELEASES, reason="FASTSAM_PTX_TRITON names no folders of other Triton releases")
@pytest.mark.parametrize("folder", RELEASES)
def test_another_release(folder):
    paths = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(paths), FASTSAM_PTX_TRITON="")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
