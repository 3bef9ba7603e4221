"""The Triton kernels where no GPU is: interpreted in a process of its own, and compiled for three GPUs and read.

Parity on a GPU is what `backend` brings to every other file: its `triton` there is marked `cuda`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import types
from collections import Counter
from pathlib import Path

import cases
import pytest
import rounding
import torch
from rounding import MASTERS, MIXED, PLAIN, STOCHASTIC, label, mixed

import fastsam
from fastsam import ops
from fastsam.memory import placing
from fastsam.ops import native
from fastsam.ops.tables import Gradients

HERE = Path(__file__).parent
if importlib.util.find_spec("triton") is None:
    pytest.skip("the triton package is not installed", allow_module_level=True)
compiled_only = pytest.mark.skipif(cases.interpreted(), reason="TRITON_INTERPRET=1: kernels are not compiled here")


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """The interpreter at work, on one core, while the tests below compile on another."""
    log = tmp_path_factory.mktemp("interpreted") / "log"
    env = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "triton_interpreted.py")]
    with log.open("w") as out:
        process = subprocess.Popen(command, env=env, cwd=HERE.parent, stdout=out, stderr=subprocess.STDOUT)
    yield process, log
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def kernels(interpreted, tmp_path_factory):
    """The module, with a cache of compiled kernels that starts empty."""
    before = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    yield ops.backend_named("triton").operations
    del os.environ["TRITON_CACHE_DIR"]
    if before is not None:
        os.environ["TRITON_CACHE_DIR"] = before


# ---- Compiled without a GPU: what the assembly says.

TARGETS = [80, 90, 100]
ONE_TARGET = 90  # enough to see how tensors of other dtypes are accessed
NO_RULE, SGD, ADAM, RMSPROP, ADAGRAD, NADAM, RADAM, LION = range(-1, 7)
# kernel, its constants, and of each element: fused products and sums, IEEE divisions and roots. The last: the loops
# over full, aligned tiles, as how many tensors they read; they and nothing else do the work on large tensors.
VARIANTS = {
    "grad_norm": ("_grad_norm_kernel", (), (1, 0, 0), []),
    "grad_norm-adaptive": ("_grad_norm_kernel", (), (1, 0, 0), []),
    "perturb_": ("_perturb_kernel", (), (0, 0, 0), [1, 2]),
    "restore": ("_update_kernel", (NO_RULE, 0), (0, 0, 0), [1]),
    "sgd": ("_update_kernel", (SGD, 0), (2, 0, 0), [1, 2]),
    "sgd-momentum": ("_update_kernel", (SGD, 1), (2 + 4, 0, 0), [1, 2, 3]),
    "adam": ("_update_kernel", (ADAM, 3), (3, 2, 1), [1, 4]),
    "adam-amsgrad": ("_update_kernel", (ADAM, 7), (2 * 3, 2 * 2, 2 * 1), [1, 4, 5]),
    "rmsprop": ("_update_kernel", (RMSPROP, 3), (2 + 3, 2, 2), [1, 3, 4]),
    "rmsprop-centered": ("_update_kernel", (RMSPROP, 7), (2 + 3 + 4 + 5, 4, 4), [1, 3, 5]),
    "adagrad": ("_update_kernel", (ADAGRAD, 1), (2, 1, 1), [1, 3]),
    "nadam": ("_update_kernel", (NADAM, 3), (3, 3, 1), [1, 4]),
    "radam": ("_update_kernel", (RADAM, 3), (3, 2, 1), [1, 4]),
    "lion": ("_update_kernel", (LION, 1), (3, 0, 0), [1, 3]),
}


def constants_of(kernels, name, format, kind):
    bucket = rounding.bucket_of([torch.zeros(1, dtype=format.weight)], "sgd", format=format)
    if name.startswith("grad_norm"):
        kind = *kind, name.endswith("adaptive")
    elif name != "perturb_":
        kind = VARIANTS[name][1]
    return kernels._constants(bucket, getattr(kernels, VARIANTS[name][0]), kind)


@pytest.fixture(scope="module")
def compile_for(kernels):
    from triton.backends.compiler import GPUTarget

    def run(name, format, target, kind=(False, False)):
        return compile_with(kernels, name, format, kind, GPUTarget("cuda", target, 32))

    return run


def compile_with(kernels, name, format, kind, target):
    """Compile a kernel for any GPU."""
    kernel = getattr(kernels, VARIANTS[name][0])
    return compile_kernel(kernels, kernel, constants_of(kernels, name, format, kind), target)


def compile_kernel(kernels, kernel, constants, target):
    from triton import compile
    from triton.compiler import ASTSource

    names = {torch.float64: "*fp64", torch.float32: "*fp32", torch.int64: "*i64", torch.int32: "*i32"}
    names[kernels._INT64] = "i64"
    n = len(kernel.arg_names) - len(constants)
    signature = {arg: names.get(kernels._TYPES.get(arg), "*u8") for arg in kernel.arg_names[:n]}
    signature.update({arg: "i32" for arg in signature if arg not in kernels._TYPES})
    signature.update(dict.fromkeys(kernel.arg_names[n:], "constexpr"))
    baked = {(n + i,): value for i, value in enumerate(constants)}
    source = ASTSource(fn=kernel, signature=signature, constexprs=baked, attrs={})
    return compile(source, target=target, options=kernels._options(kernel, constants, target.warp_size))


def loops(ptx):
    """The text of each loop without a loop inside."""
    lines, labels, spans = ptx.splitlines(), {}, []
    for i, line in enumerate(lines):
        if label := re.match(r"(\$\w+):", line):
            labels[label[1]] = i
        elif (jump := re.search(r"\bbra(?:\.uni)?\s+(\$\w+);", line)) and jump[1] in labels:
            spans.append((labels[jump[1]], i))
    inner = [a for a in spans if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return ["\n".join(lines[first : last + 1]) for first, last in inner]


def accesses(ptx):
    """The accesses to global memory: "ld" or "st", and bytes."""
    for what, vector, bits in re.findall(r"\b(ld|st)\.global[.\w:]*?(?:\.v(\d))?\.b(\d+)\b", ptx):
        yield what, int(vector or 1) * int(bits) // 8


def resources(compiled):
    """What the assembled kernel takes: registers, stack, local memory."""
    tool = Path(importlib.util.find_spec("triton").origin).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", done.stdout + done.stderr)}


def tiles(name, format, reads, elements):
    """The accesses of a loop over full, aligned tiles that reads so many tensors, in one thread.

    They are of 16 bytes, of 8 where a tensor is narrower than what weights are taken from: then all have as many
    elements, and nothing is exchanged between threads.
    """
    states = [format.state] * max(reads - 2, 0)
    read, written = [format.source, format.grad, *states], [format.weight, *states]
    if reads == 1:  # a copy
        read = [format.source]
    elif (name == "perturb_") != format.masters:  # the backup, the master
        written.append(format.source)
    counts = Counter()
    for what, dtypes in (("ld", read), ("st", written)):
        for dtype in dtypes:
            width = 8 if dtype.itemsize < format.source.itemsize else 16
            counts[what, width] += elements * dtype.itemsize // width
    return counts


# In the other formats, and of the kernels that are like another one, one GPU says what all would.
FEW_TARGETS = ("grad_norm-adaptive", "rmsprop", "rmsprop-centered", "adagrad", "nadam", "radam", "lion")
COMPILED = [
    *((name, format, ONE_TARGET) for format in PLAIN for name in VARIANTS),
    *((name, PLAIN[0], target) for name in VARIANTS for target in TARGETS if target != ONE_TARGET),
    # 16 bits are converted by other instructions on each GPU.
    *((name, PLAIN[2], target) for name in ("perturb_", "adam") for target in TARGETS if target != ONE_TARGET),
    *((name, mixed(*pair), ONE_TARGET) for pair in MIXED for name in VARIANTS if name not in (*FEW_TARGETS, "restore")),
    *(("adam", format, ONE_TARGET) for format in MASTERS + STOCHASTIC),
    *((name, format, ONE_TARGET) for name in ("perturb_", "sgd-momentum") for format in (MASTERS[2], STOCHASTIC[1])),
    *((name, MASTERS[0], ONE_TARGET) for name in ("grad_norm", "restore", "lion")),
    ("adagrad", STOCHASTIC[1], ONE_TARGET),
    *((name, STOCHASTIC[3], ONE_TARGET) for name in ("rmsprop", "nadam")),
]


@compiled_only
@pytest.mark.parametrize("name, format, target", COMPILED, ids=lambda x: label(x) if isinstance(x, tuple) else str(x))
def test_compiled_kernels(kernels, compile_for, name, format, target):
    compiled = compile_for(name, format, target)
    ptx, wide = compiled.asm["ptx"], format.source == torch.float64
    taken = resources(compiled)
    assert taken["STACK"] == taken["LOCAL"] == 0, f"spills: {taken}"
    norm = name.startswith("grad_norm")
    program = 32 * compiled.metadata.num_warps
    threads = 2**16 // (taken["REG"] * program) * program
    if name == "grad_norm" and not wide:  # a chunk is read at once: what counts is how many there are
        assert threads >= 6 * program, f"{taken}, {threads} threads"
    elif format == PLAIN[0] and name != "restore":
        # 64 KiB in flight on an SM of 64 Ki registers hide the memory's latency.
        reads = 2 * 4 if norm else max(VARIANTS[name][3])
        assert threads * reads * 32 >= 2**16, f"{taken}, {threads} threads"

    # Every rounding is written out: nothing approximate, nothing flushed to zero, nothing contracted.
    assert not re.search(r"\.approx|\.full|\.ftz", ptx)
    elements = 4 if wide and not norm else 8  # of a thread
    kind = "f64" if wide else "f32"
    bodies = 3  # tiles at 16 and at 8 bytes, and tails
    if norm:  # 4 rows, aligned or not, with and without the weights
        bodies = 4 * 2 * (1 + name.endswith("adaptive"))
    fmas, divisions, roots = (n * bodies * elements for n in VARIANTS[name][2])
    assert instructions(ptx, f"fma.rn.{kind}") == fmas
    scalar = instructions(ptx, "fma.rn.f64") - fmas * wide
    assert scalar == 0, "the float64 scalars are contracted"
    assert instructions(ptx, f"div.rn.{kind}") >= divisions and instructions(ptx, f"sqrt.rn.{kind}") >= roots
    if not wide:
        assert (instructions(ptx, "div.rn.f32"), instructions(ptx, "sqrt.rn.f32")) == (divisions, roots)

    # Full tiles of aligned tensors are read and written at once, and nothing is exchanged between threads.
    main = [loop for loop in loops(ptx) if not re.search(r"\.shared|bar\.sync", loop)]
    for reads in VARIANTS[name][3]:
        if (name, reads) == ("perturb_", 1) and format.masters:
            continue  # without a perturbation the weight is its master, rounded, already
        expected = tiles(name, format, reads, elements)
        found = [loop for loop in main if Counter(accesses(loop)) == expected]
        assert len(found) == 1, f"{expected} of {[Counter(accesses(loop)) for loop in main]}"
        # Eight random numbers take Philox once, twice where a thread holds two halves of eight.
        draws = format.stochastic * ((reads > 1) * (format.source.itemsize == 2) + max(reads - 2, 0))
        calls = draws * (1 if format.source.itemsize == 2 else 2)
        multiplications = len(re.findall(r"\bmul\.(?:hi|wide)\.u32\b", found[0]))
        assert 8 * calls <= multiplications <= 12 * calls, f"{multiplications} for {calls} of Philox"
    if norm:  # no loop: a chunk's 4 rows at once, the gradient alone or with the weights
        grads, weights = (4 * elements * dtype.itemsize // 16 for dtype in (format.grad, format.source))
        assert Counter(accesses(ptx))["ld", 16] == grads + (grads + weights) * name.endswith("adaptive")
        assert "ld.global.cg" in ptx
    # A program arrives after all that it read and wrote before, in all its threads.
    arrival = re.search(r"\batom[.\w]*\.acq_rel[.\w]*\.add\.", ptx)
    assert (arrival is not None) == (name not in ("perturb_", "restore"))
    if arrival is not None:
        before = ptx[: arrival.start()]
        assert before.rfind("bar.sync") > max(before.rfind("ld.global"), before.rfind("st.global"))
        if format.stochastic:  # the step of the random numbers, which the last program will have advanced
            place = kernels._update_kernel.arg_names.index("rounding")
            register = re.search(rf"ld\.param\.b64\s+(%rd\d+), \[_update_kernel_param_{place}\]", before)[1]
            assert re.search(rf"ld\.global\.b\d+ [^\n]*\[ {register} \+ 0 \]", before)
    if name == "perturb_":
        assert "0d3D719799812DEA11" in ptx, "NORM_EPS is not the float64 nearest to 1e-12"


@compiled_only
@pytest.mark.parametrize("kind", [(True, False), (False, True)], ids=["decay in the loss", "general p"])
@pytest.mark.parametrize(
    "name, format",
    [
        *((name, PLAIN[i]) for name in ("grad_norm", "perturb_") for i in range(3)),
        ("perturb_", MASTERS[0]),
        ("perturb_", STOCHASTIC[0]),
    ],
    ids=lambda x: label(x) if isinstance(x, tuple) else x,
)
def test_compiled_kernels_of_other_perturbations(compile_for, name, format, kind):
    compiled = compile_for(name, format, ONE_TARGET, kind)
    taken = resources(compiled)
    assert taken["STACK"] == taken["LOCAL"] == 0, f"spills: {taken}"
    if kind[0]:  # the others take powers, which start from approximations
        assert not re.search(r"\.approx|\.full|\.ftz", compiled.asm["ptx"])


# What is computed in, whether an operand may have 16 bits, the target.
DIRECTIONS = [
    (torch.float32, False, ONE_TARGET),
    *((torch.float32, True, target) for target in TARGETS),
    (torch.float64, False, ONE_TARGET),
]


def compile_for_directions(kernels, name, wide, narrow, target):
    bucket = rounding.bucket_of([torch.zeros(1, dtype=wide)], "sgd")
    kernel = getattr(kernels, {"dot": "_dot_kernel", "combine_": "_combine_kernel"}[name])
    return compile_kernel(kernels, kernel, kernels._constants(bucket, kernel, (narrow,)), target)


@compiled_only
@pytest.mark.parametrize("dtype, narrow, target", DIRECTIONS, ids=str)
@pytest.mark.parametrize("name", ["dot", "combine_"])
def test_compiled_kernels_of_directions(kernels, name, dtype, narrow, target):
    from triton.backends.compiler import GPUTarget

    norm, wide = name == "dot", dtype == torch.float64
    compiled = compile_for_directions(kernels, name, dtype, narrow, GPUTarget("cuda", target, 32))
    ptx, taken, program = compiled.asm["ptx"], resources(compiled), 32 * compiled.metadata.num_warps
    assert taken["STACK"] == taken["LOCAL"] == 0, f"spills: {taken}"
    threads = 2**16 // (taken["REG"] * program) * program
    assert threads * (8 if norm else 3) * 32 >= 2**16, f"{taken}, {threads} threads"

    # A product and then fused products and sums, nothing else; and no load may miss what another thread wrote.
    assert not re.search(r"\.approx|\.full|\.ftz|ld\.global\.nc", ptx)
    kind, elements = "f64" if wide else "f32", 8 if norm or not wide else 4
    rows = 3 + (1 if narrow else 3)  # after the first: aligned, and not
    assert instructions(ptx, f"fma.rn.{kind}") == elements * (rows * 3 if norm else 3 * 2)
    assert wide or instructions(ptx, "fma.rn.f64") == 0
    assert instructions(ptx, f"mul.rn.{kind}") + instructions(ptx, f"mul.{kind}") == elements * (
        2 * 3 if norm else 3 * 3
    )

    size = elements * dtype.itemsize // 16  # accesses that an operand takes
    if norm:
        found = Counter(accesses(ptx))
        assert found["ld", 16] == 4 * 2 * size and "ld.global.cg" in ptx
        before = ptx[: re.search(r"\batom[.\w]*\.acq_rel[.\w]*\.add\.", ptx).start()]
        assert before.rfind("bar.sync") > max(before.rfind("ld.global"), before.rfind("st.global"))
    else:
        expected = Counter({("ld", 16): 3 * size, ("st", 16): size})
        if narrow:
            expected |= Counter({("ld", 8): 3 * size, ("st", 8): size})
        main = [loop for loop in loops(ptx) if not re.search(r"\.shared|bar\.sync", loop)]
        assert [Counter(accesses(loop)) for loop in main].count(expected) == 1


@compiled_only
@pytest.mark.parametrize("name", ["dot", "combine_"])
def test_directions_on_amd_gpus_spill_nothing(kernels, monkeypatch, name):
    from triton.backends.compiler import GPUTarget

    monkeypatch.setattr(torch.version, "hip", "6.4")
    assembly = compile_for_directions(kernels, name, torch.float32, True, GPUTarget("hip", "gfx942", 64)).asm["amdgcn"]
    assert re.search(r"vgpr_spill_count:\s+0\b", assembly) and re.search(r"private_segment_fixed_size:\s+0\b", assembly)


def instructions(ptx, name):
    """How often; a packed one counts twice."""
    found = re.findall(rf"\b{re.escape(name)}(x2)?\b", ptx)
    return len(found) + found.count("x2")


# ---- The host's side, with a driver that only takes notes.


KERNELS = "_grad_norm_kernel", "_perturb_kernel", "_update_kernel", "_dot_kernel", "_combine_kernel"


class Notes:
    """Triton's driver as far as launches need one; kernels are compiled, not run."""

    def __init__(self):
        self.launches, self.hooks, self.utils, self.fails = [], [], self, ""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return {"max_shared_mem": 2**16}

    def load_binary(self, *args):
        return None, "function", 40, 0, 1024

    def launcher_cls(self, source, metadata):
        def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *args):
            if source.fn.__name__ == self.fails:
                raise RuntimeError("the driver says no")
            types = list(source.signature.values())
            self.hooks.append((launch_metadata, enter, leave))
            self.launches.append((source.fn.__name__, (x, y, z), args[: types.index("constexpr")], source))

        return launch


@pytest.fixture
def notes(kernels, monkeypatch):
    from triton.runtime import driver

    kernels._compiled.cache_clear()
    notes = Notes()
    monkeypatch.setattr(driver, "_active", notes)
    yield notes
    kernels._compiled.cache_clear()
    for name in KERNELS:
        getattr(kernels, name).device_caches.clear()


def step(kernels, bucket, grads=None):
    grads = grads or [torch.ones_like(p) for p in bucket.params]
    sums = torch.zeros(2, dtype=torch.float64)
    kernels.grad_norm(bucket, grads, sums)
    kernels.perturb_(bucket, grads, sums)
    kernels.update_(bucket, grads)


def bucket_of(sizes, option="adamw", format=PLAIN[0]):
    bucket = rounding.bucket_of([torch.zeros(n, dtype=format.weight) for n in sizes], option, format=format)
    bucket.device, bucket.cache = torch.device("cpu"), None
    return bucket


@compiled_only
@pytest.mark.parametrize("format", [PLAIN[0], STOCHASTIC[3]], ids=label)
def test_new_values_and_numbers_of_tensors_compile_nothing(kernels, notes, monkeypatch, format):
    compilations = []
    bucket = bucket_of([5, 8192, 70000], format=format)
    step(kernels, bucket)
    before = kernels._compiled.cache_info().misses
    assert before == 3
    for kernel in (kernels._grad_norm_kernel, kernels._perturb_kernel, kernels._update_kernel):
        monkeypatch.setattr(kernel, "_do_compile", lambda *a, **k: compilations.append(a))
    step(kernels, bucket)
    bucket.row_table[:, :7] *= 0.123  # lr, weight decay, betas, eps, rho, eta
    bucket.row_table[:, 10] += 12345.0  # seed
    bucket.rows = [row._replace(lr=7.0) for row in bucket.rows]
    bucket.steps += 1000.0
    if format.stochastic:
        bucket.rounding += 2**33
    step(kernels, bucket)
    for sizes in ([1], [16] * 16, [1] * 300, [3 * 8192] * 700):
        step(kernels, bucket_of(sizes, format=format))
    scalar = torch.ones(3)[1:2]  # not at a multiple of 16 bytes
    kernels.update_(
        bucket, [None] * 3, grad_scale=scalar, found_inf=scalar, clip=torch.ones(2, dtype=torch.float64)[1:]
    )
    assert kernels._compiled.cache_info().misses == before and not compilations
    # What a launch through `kernel[grid]` would make of these arguments: no value and no alignment of theirs.
    for name, _, args, source in notes.launches:
        kinds = list(source.signature.values())[: len(args)]
        assert not any(source.attrs.values()) and "constexpr" not in kinds, name
        assert all(kind == "i32" or kind.startswith("*") for kind in kinds), name


@compiled_only
def test_three_launches_a_step_for_all_tensors_and_groups(kernels, notes):
    bucket = bucket_of([65, 0, 8193] * 40)
    step(kernels, bucket)
    chunks = len(bucket.chunk_table)
    assert chunks == 120 and len(bucket.rows) == 3
    assert [(name, grid) for name, grid, *_ in notes.launches] == [
        ("_grad_norm_kernel", (chunks, 1, 1)),
        ("_perturb_kernel", (4 * chunks, 1, 1)),
        ("_update_kernel", (4 * chunks, 1, 1)),
    ]
    addresses = notes.launches[2][2]
    own = bucket.cache
    assert addresses[:5] == tuple(
        t.data_ptr()
        for t in (bucket.segment_table, bucket.chunk_table, own.descent.copy, own.rows.copy, own.perturbed.copy)
    )
    assert addresses[-3:] == (120, chunks, 4)


def direction(bucket, dtype=None):
    parts = Gradients(torch.ones_like(p, dtype=dtype) for p in bucket.params)
    parts.dtype = dtype
    return parts


def combine(kernels, bucket, *dtypes):
    """A scalar product and a linear combination of directions of these dtypes."""
    bucket.dot_partials = torch.zeros(3, len(bucket.chunk_table), dtype=torch.float64)
    parts, scalar = [direction(bucket, dtype) for dtype in dtypes], torch.ones(3, dtype=torch.float64)[1]
    kernels.dot(bucket, parts[0], parts[-1] if len(parts) > 1 else None, torch.zeros(2, 3, dtype=torch.float64))
    terms = [(c, part) for c, part in zip((0.3, scalar, 1e300), parts, strict=False)]
    kernels.combine_(bucket, direction(bucket), terms)


@compiled_only
def test_one_kernel_serves_all_directions_of_a_bucket(kernels, notes, monkeypatch):
    compilations, bucket = [], bucket_of([5, 8192, 70000], format=PLAIN[2])
    bucket.dot_partials = torch.zeros(3, 0, dtype=torch.float64)
    kernels.prepare_capture(bucket)
    before = kernels._compiled.cache_info().misses
    bucket.dot_partials = torch.zeros(3, len(bucket.chunk_table), dtype=torch.float64)
    kernels.prepare_capture(bucket)  # now a direction was asked for
    assert kernels._compiled.cache_info().misses == before + 2
    for name in KERNELS:
        monkeypatch.setattr(getattr(kernels, name), "_do_compile", lambda *a, **k: compilations.append(a))
    monkeypatch.setattr("fastsam.ops.graphs.capturing", lambda device: True)
    combine(kernels, bucket, torch.bfloat16)
    combine(kernels, bucket, torch.bfloat16, torch.float32)
    combine(kernels, bucket, torch.float32, torch.float16, None)
    assert kernels._compiled.cache_info().misses == before + 2 and not compilations
    chunks = len(bucket.chunk_table)
    names = [("_dot_kernel", (chunks, 1, 1)), ("_combine_kernel", (4 * chunks, 1, 1))] * 3
    assert [(name, grid) for name, grid, *_ in notes.launches] == names
    for name, _, args, source in notes.launches:
        kinds = list(source.signature.values())[: len(args)]
        assert not any(source.attrs.values()) and "constexpr" not in kinds, name
        numbers = [arg for arg, kind in source.signature.items() if kind == "i64"]
        assert numbers == (["at0", "at1", "at2", "number0", "number1", "number2"] if name == "_combine_kernel" else [])


@compiled_only
def test_hooks_of_a_profiler_are_called_and_missing_ones_cost_nothing(kernels, notes, monkeypatch):
    import triton

    bucket = bucket_of([5, 8192])
    step(kernels, bucket)
    assert notes.hooks == [(None, None, None)] * 3
    hook = lambda metadata: None  # noqa: E731
    monkeypatch.setattr(triton.knobs.runtime, "launch_enter_hook", hook)  # of 3.6 and later a chain, or a function
    step(kernels, bucket)
    assert len(notes.hooks) == 6
    assert all(metadata.get()["name"] and enter is hook for metadata, enter, _ in notes.hooks[3:])
    assert [args[:2] for *_, args, _ in notes.launches[:3]] == [args[:2] for *_, args, _ in notes.launches[3:]]


@compiled_only
def test_a_capture_before_the_first_step_is_refused(kernels, notes, monkeypatch):
    bucket = bucket_of([5, 8192])
    bucket.device = torch.device("cuda", 0)
    monkeypatch.setattr("fastsam.ops.graphs.capturing", lambda device: True)
    grads, sums = [torch.ones_like(p) for p in bucket.params], torch.zeros(2, dtype=torch.float64)
    for operation, args in ((kernels.grad_norm, [sums]), (kernels.perturb_, [sums]), (kernels.update_, [])):
        with pytest.raises(RuntimeError, match="FusedSAM: take a step like it before a CUDA graph is captured"):
            operation(bucket, grads, *args)
    assert not notes.launches and not bucket.perturbed.any()


@compiled_only
def test_arguments_have_the_dtypes_that_kernels_are_compiled_for(kernels, notes, monkeypatch):
    plain, dtypes = kernels.argument_of, {}
    for module in (kernels, importlib.import_module("fastsam.ops.triton_tables")):
        monkeypatch.setattr(module, "argument_of", lambda t: (dtypes.update({t.data_ptr(): t.dtype}), plain(t))[1])
    torch.set_default_dtype(torch.float64)  # which no tensor of ours may follow
    try:
        step(kernels, bucket_of([5, 8192]))
        combine(kernels, bucket_of([5, 8192]), None, None, None)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, _, args, source in notes.launches:
        for arg, value in zip(source.fn.arg_names, args, strict=False):
            if isinstance(kernels._TYPES.get(arg), torch.dtype):
                assert dtypes[value] == kernels._TYPES[arg], f"{arg} of {name}"


@compiled_only
def test_a_perturbation_that_is_not_launched_leaves_no_mark(kernels, notes):
    """`restore` would copy backups over the weights that nobody wrote."""
    bucket = bucket_of([5, 8192, 70])
    step(kernels, bucket)
    notes.fails = "_perturb_kernel"
    grads, sums = [torch.ones(5), None, torch.ones(70)], torch.zeros(2, dtype=torch.float64)
    bucket.perturbed[1] = True  # from an earlier call
    with pytest.raises(RuntimeError, match="the driver says no"):
        kernels.perturb_(bucket, grads, sums)
    assert bucket.perturbed.tolist() == [False, True, False]
    bucket.row_table = bucket.row_table.clone()
    bucket.cache.rows._upload = lambda table: pytest.fail("no memory")  # before the launch
    bucket.row_table[0] = 7.0
    with pytest.raises(pytest.fail.Exception):
        bucket.cache.known = bucket.segment_table, bucket.chunk_table, bucket.row_table
        kernels.perturb_(bucket, grads, sums)
    assert bucket.perturbed.tolist() == [False, True, False]


@compiled_only
def test_kernels_that_are_compiled_in_the_background_or_not_at_all(kernels, notes, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    from triton import knobs
    from triton.runtime._async_compile import AsyncCompileMode

    with ThreadPoolExecutor(1) as pool, AsyncCompileMode(pool):
        step(kernels, bucket_of([5, 8192]))
    assert len(notes.launches) == 3
    kernels._compiled.cache_clear()
    kernels._update_kernel.device_caches.clear()
    with monkeypatch.context() as patch:
        patch.setattr(knobs.runtime, "jit_cache_hook", lambda **_: True)
        with pytest.raises(RuntimeError, match="FusedSAM: a kernel is not compiled because a hook"):
            kernels.update_(bucket_of([5, 8192], "sgd"), [torch.ones(5), None])
    kernels.update_(bucket_of([5, 8192], "sgd"), [torch.ones(5), None])


@compiled_only
@pytest.mark.parametrize("name", ["adam", "rmsprop-centered", "grad_norm", "perturb_"])
def test_roots_on_amd_gpus_start_from_nothing_that_flushes(kernels, monkeypatch, name):
    """Triton 3.6 begins with an approximation that takes subnormal numbers for 0, so that their roots are NaN."""
    from triton.backends.compiler import GPUTarget

    monkeypatch.setattr(torch.version, "hip", "6.4")
    compiled = compile_with(kernels, name, PLAIN[0], (False, False), GPUTarget("hip", "gfx942", 64))
    assert "amdgcn.rsq" not in compiled.asm["llir"]
    kernels.reason.cache_clear()
    monkeypatch.setattr(kernels, "_version", lambda: (3, 6))
    assert re.match("on AMD GPUs it needs triton >= 3.7", kernels.reason())
    kernels.reason.cache_clear()


@compiled_only
@pytest.mark.parametrize("name", ["perturb_", "sgd-momentum"])
def test_low_precision_on_amd_gpus_is_accessed_in_16_bytes(kernels, monkeypatch, name):
    from triton.backends.compiler import GPUTarget

    monkeypatch.setattr(torch.version, "hip", "6.4")
    code = compile_with(kernels, name, PLAIN[2], (False, False), GPUTarget("hip", "gfx942", 64)).asm["amdgcn"]
    assert len(re.findall("_load_dwordx4", code)) >= 8 and "_store_dwordx4" in code
    assert re.search(r"\.vgpr_spill_count:\s+0", code)


@compiled_only
def test_large_buckets_take_a_program_a_chunk(kernels, notes):
    for chunks, split in ((1023, 4), (1024, 2), (2047, 2), (2048, 1)):
        bucket = bucket_of([8192])
        bucket.chunk_table = bucket.chunk_table.repeat(chunks, 1)
        assert kernels._split(bucket) == split


# ---- The choice.


@pytest.fixture
def reasons(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in ops.NAMES:
        monkeypatch.setitem(ops._REASONS, name, lambda: None)
    monkeypatch.setitem(ops._DEVICE_REASONS, "cuda", lambda index: None)
    return ops._REASONS


def test_cuda_tensors_get_the_library_then_triton_then_the_reference(reasons, monkeypatch):
    gpu, cpu, no = torch.device("cuda", 0), torch.device("cpu"), lambda: "no"
    assert ops.choose("auto", gpu, torch.float32) == "cuda" and ops.choose("triton", gpu, torch.bfloat16) == "triton"
    monkeypatch.setitem(reasons, "cuda", no)
    assert ops.choose("auto", gpu, torch.float32) == "triton"
    assert ops.choose("auto", gpu, torch.float8_e4m3fn) == "reference"
    monkeypatch.setitem(reasons, "triton", no)
    assert ops.choose("auto", gpu, torch.float32) == "reference"
    assert ops.choose("triton", cpu, torch.float32) is None and ops.choose("auto", cpu, torch.float32) == "cpu"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ops.choose("triton", cpu, torch.float32) == "triton" and ops.choose("triton", gpu, torch.float32) is None


def test_a_gpu_that_loads_no_kernel_of_the_library_gets_triton_and_the_reason(reasons, monkeypatch):
    """One of two GPUs: an older driver, or a library that was built for the other."""
    others, mine = torch.device("cuda", 0), torch.device("cuda", 1)
    probe, asked = native.device_reason, []

    def refuse(index):
        asked.append(index)
        if index == 1:
            raise RuntimeError("no kernel image is available for execution on the device\nException raised from ...")

    monkeypatch.setattr(torch.ops.fastsam, "probe", refuse, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=0: (8, 0))
    monkeypatch.setitem(ops._DEVICE_REASONS, "cuda", probe)
    probe.cache_clear(), ops._warn_once.cache_clear()
    assert ops.choose("auto", others, torch.float32) == "cuda" == ops.choose("cuda", others, torch.float32)
    with pytest.warns(
        UserWarning, match="cuda:1 does not load .*no kernel image.*device\\): .*'triton' serves this GPU"
    ):
        assert ops.choose("auto", mine, torch.float32) == "triton"
    assert ops.choose("auto", mine, torch.bfloat16) == "triton" and ops.choose("cuda", mine, torch.float32) is None
    assert ops.choose("triton", mine, torch.float32) == "triton" and ops.choose("reference", mine, torch.float32)
    monkeypatch.setitem(reasons, "triton", lambda: "no")
    with pytest.warns(UserWarning, match='TORCH_CUDA_ARCH_LIST="8.0".*reference'):
        assert ops.choose("auto", mine, torch.float32) == "reference"
    assert ops.device_reason("triton", mine) is None and "no kernel image" in ops.device_reason("cuda", mine)
    assert asked == [0, 1]
    with monkeypatch.context() as patch:
        patch.setattr(placing, "real_dtype", lambda param: torch.float32)
        stand_in = types.SimpleNamespace(
            device=mine, dtype=torch.float32, layout=torch.strided, is_meta=False, is_complex=lambda: False
        )
        with pytest.raises(ValueError, match="float32 on cuda:1, and cuda:1 does not load.*use backend='auto'"):
            placing.check_param(stand_in, 0, [dict(params=[stand_in], adaptive=False)], "cuda")
    probe.cache_clear(), ops._warn_once.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_reasons_say_what_to_do(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert re.search("no GPU here; TRITON_INTERPRET=1", ops.backends()["triton"])
    with pytest.raises(ValueError, match="backend='triton' is not available here: torch can use no GPU"):
        fastsam.FusedSAM([torch.nn.Parameter(torch.ones(2))], torch.optim.SGD, backend="triton")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert re.search("not installed; there is one for Linux: pip install", ops.backends()["triton"])


@compiled_only
def test_the_module_says_why_it_cannot_serve(kernels, monkeypatch):
    import triton

    if not torch.cuda.is_available():
        kernels.reason.cache_clear()
        assert re.match("Triton does not start .*C compiler", kernels.reason())
    kernels.reason.cache_clear()
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    assert kernels.reason() == "it needs triton >= 3.6, this is 3.5.1"
    kernels.reason.cache_clear()
    monkeypatch.undo()
    monkeypatch.setattr(kernels, "INTERPRETED", True)  # the environment was changed after triton's import
    assert "before triton is imported" in kernels.reason()
    kernels.reason.cache_clear()


def test_fastsam_imports_the_kernels_only_when_asked():
    code = "import sys, fastsam, torch; fastsam.FusedSAM([torch.nn.Parameter(torch.ones(2))]); print(*sys.modules)"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, cwd=HERE.parent, capture_output=True, text=True, check=True)
    assert "fastsam.ops.reference" in done.stdout and "fastsam.ops.triton" not in done.stdout


# ---- On a GPU.


@pytest.mark.cuda
@compiled_only
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_reads_its_own_addresses_and_new_values():
    params = [torch.nn.Parameter(torch.randn(n, device="cuda")) for n in (3, 8192, 20000)]
    opt = fastsam.FusedSAM(params, torch.optim.SGD, rho=0.1, lr=0.5, momentum=0.9, backend="triton")
    grads = [[torch.randn_like(p) for p in params] for _ in range(4)]

    def take(first, second):
        for p, g in zip(params, first, strict=True):
            p.grad = g
        opt.first_step()
        for p, g in zip(params, second, strict=True):
            p.grad = g
        opt.second_step()

    take(*grads[:2])
    torch.cuda.synchronize()
    graph, same = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # addresses that are nowhere on the device yet
        take(*grads[2:])
    with torch.cuda.graph(same):  # those of the eager step: its tables are shared
        take(*grads[:2])
    others = [torch.nn.Parameter(p.detach().cpu()) for p in params]
    twin = fastsam.FusedSAM(others, torch.optim.SGD, rho=0.1, lr=0.5, momentum=0.9, backend="reference")
    twin.load_state_dict(opt.state_dict())
    take(*grads[2:])  # eagerly: the tables of both graphs must stay
    graph.replay()
    opt.param_groups[0]["lr"] = 0.25
    opt.refresh()
    same.replay()
    graph.replay()
    for lr, first, second in ((0.5, *grads[2:]), (0.5, *grads[2:]), (0.25, *grads[:2]), (0.25, *grads[2:])):
        twin.param_groups[0]["lr"] = lr
        for p, g in zip(others, first, strict=True):
            p.grad = g.cpu()
        twin.first_step()
        for p, g in zip(others, second, strict=True):
            p.grad = g.cpu()
        twin.second_step()
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p.detach().cpu(), q.detach())


# ---- Last, so that it has had the time: the interpreter.


@compiled_only
def test_the_interpreted_kernels_pass(interpreted):
    process, log = interpreted
    process.wait(timeout=900)
    assert process.returncode == 0, log.read_text()[-8000:]
    assert re.search(r"\b\d+ passed", log.read_text())
