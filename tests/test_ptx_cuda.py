"""The CUDA half without a GPU: csrc/cuda on a stub of CUDA's runtime, and nvcc's PTX of its kernels interpreted.

The bits are compared with those of the C++ library on the CPU, which test_native.py compares with the rounding plan.

`FASTSAM_PTX_ARCHS="75 90 120"` names the targets; without it 90 is the only one. With `-s` the file says at its end how
much it executed and compared. What this does not see is in ptx/__init__.py.
"""

import os

import pytest
import torch
from ptx import cuda
from ptx.buckets import UPDATES, Comparer, any_bucket, any_gradients, climb, deal, sums_for, with_own_rows
from ptx.tally import Tally
from rounding import MASTERS, MIXED, PLAIN, STOCHASTIC, label, mixed

from fastsam.ops import native, reference

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
        made.append(cuda.Library(arch, folder, **options))
        return made[-1]

    yield make
    for library in made:
        for launch in library.launches:
            tally.note(launch.kernel, launch.grid, request.node.name)


# ---- Every kernel.

# 45 groups are more than the small arguments take; of other formats there are kernels with large ones only.
SIZED = [(format, n) for format in FORMATS for n in (9, 45) if n == 9 or format in PLAIN]
EVERY = [(kernel, *sized) for kernel in UPDATES for sized in SIZED]
LRS = [torch.tensor(0.03, dtype=dtype) for dtype in (torch.float32, torch.float64)]


def pair(options, format, seed, n_groups):
    """The same bucket twice, for the kernels and for the CPU library, and its groups' lr."""
    lr = LRS[seed % 2]
    ours, theirs = (any_bucket(options, format, seed, n_groups, lr, there) for there in (True, False))
    return with_own_rows(ours), theirs


def turn(buckets, turn):
    for bucket in buckets:
        deal(bucket, turn)
        climb(bucket, turn)


@pytest.mark.parametrize(("kernel", "format", "n_groups"), EVERY, ids=lambda x: label(x) if isinstance(x, tuple) else x)
def test_every_update_has_the_bits_of_the_cpu_library(make, check, kernel, format, n_groups):
    """Any size and alignment, groups of all options, lr on the device, in each division of chunks among blocks."""
    seed, scale, clips = (
        EVERY.index((kernel, format, n_groups)),
        torch.tensor([4.0]),
        torch.tensor([0.37, 0.0]).double(),
    )
    situations = [
        (dict(split_bits=2), {}),
        (dict(split_bits=0, in_tables=n_groups == 9), dict(grad_scale=scale, clip=clips[0])),
        (dict(split_bits=1), dict(clip=clips[1])),
        (dict(split_bits=2), dict(grad_scale=scale, found_inf=torch.ones(1))),
    ]
    ours, theirs = buckets = pair(UPDATES[kernel], format, seed, n_groups)
    for i, (options, factors) in enumerate(situations):
        turn(buckets, seed + i)
        grads = any_gradients(ours, seed + i)
        if kernel == "restore":  # its step is the base optimizer's, on gradients that are not given here
            grads, factors = [None] * len(grads), {}
        make(**options).update_(ours, grads, **factors)
        native.update_(theirs, grads, **factors)
        check.same_buckets(ours, theirs, f"in situation {i}")


@pytest.mark.parametrize(("format", "n_groups"), SIZED, ids=lambda x: label(x) if isinstance(x, tuple) else x)
def test_every_norm_and_perturbation_has_the_bits_of_the_cpu_library(make, check, format, n_groups):
    """As above, for every way to perturb; with norms to clip by, and one that is not finite."""
    ours, theirs = buckets = pair(["sgd-nesterov-maximize", "sgd"], format, SIZED.index((format, n_groups)), n_groups)
    for i in range(6):
        for bucket in buckets:
            deal(bucket, i)
        grads = any_gradients(ours, i)
        if i == 5:
            next(g for g in reversed(grads) if g is not None and len(g))[-1] = float("nan")
        library = make(split_bits=i % 3, in_tables=i % 3 == 1 and n_groups == 9)
        sums, factors = [], []
        for backend, bucket in ((library, ours), (native, theirs)):
            sums.append(sums_for(bucket))
            factors.append(torch.zeros((), dtype=torch.float64))
            if i % 3 == 2:
                clip = reference.Clip(3.0, factors[-1], torch.tensor([4.0]))
                backend.grad_norm(bucket, grads, sums[-1], clip=clip)
            backend.grad_norm(bucket, grads, sums[-1])
            backend.perturb_(bucket, grads, sums[-1])
        check.same(*sums, "norms")
        check.same(*factors, "factor to clip by")
        check.same_buckets(ours, theirs, f"in situation {i}")
