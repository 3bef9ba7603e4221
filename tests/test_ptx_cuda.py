"""The CUDA half without a GPU: csrc/cuda on a stub of CUDA's runtime, and nvcc's PTX of its kernels interpreted.

The bits are compared with those of the C++ library on the CPU, which test_native.py compares with the rounding plan.

`FASTSAM_PTX_ARCHS="75 90 120"` names the targets; without it 90 is the only one. With `-s` the file says at its end how
much it executed and compared. What this does not see is in ptx/__init__.py.
"""

import os

import pytest
import torch
from ptx import cuda
from ptx.buckets import UPDATES, Comparer, any_bucket, any_gradients, with_own_rows
from ptx.tally import Tally
from rounding import MASTERS, MIXED, PLAIN, STOCHASTIC, label, mixed

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
        made.append(cuda.Library(arch, folder, **options))
        return made[-1]

    yield make
    for library in made:
        for launch in library.launches:
            tally.note(launch.kernel, launch.grid, request.node.name)


# ---- Every kernel.

EVERY = [(kernel, format) for kernel in UPDATES for format in FORMATS]


@pytest.mark.parametrize(("kernel", "format"), EVERY, ids=lambda x: label(x) if isinstance(x, tuple) else x)
def test_every_kernel_has_the_bits_of_the_cpu_library(make, check, kernel, format):
    """Any size and alignment, groups of all options and perturbations, a learning rate on the device."""
    seed = EVERY.index((kernel, format))
    library = make(processors=(132, 2, 1)[seed % 3])  # for 4, 2 and 1 blocks a chunk
    lr = torch.tensor(0.03, dtype=(torch.float32, torch.float64)[seed % 2])
    n_groups = (9, 45)[seed % 2]  # more than the small arguments take
    ours, theirs = (any_bucket(UPDATES[kernel], format, seed, n_groups, lr, there) for there in (True, False))
    pairs = (library, with_own_rows(ours)), (native, theirs)
    clip = torch.tensor(0.37, dtype=torch.float64)
    scale, found_inf = torch.tensor([4.0]), torch.ones(1)
    for i, factors in enumerate(({}, dict(grad_scale=scale, clip=clip), dict(grad_scale=scale, found_inf=found_inf))):
        grads = [any_gradients(ours, 100 * seed + 10 * i + which) for which in range(2)]
        check.same_steps(*zip(*pairs, strict=True), grads, **factors)
