"""The machine code of the CUDA kernels in the built library: wide accesses, no spills, enough loads under way.

Read is what the library was built for: `TORCH_CUDA_ARCH_LIST=all pip install -e .`, as `.ci/run` does, for everything;
and, with FASTSAM_LIBRARY in the environment, another one, as `benchmarks/variants.py build` makes them.
`python tests/test_machine_code.py > benchmarks/registers.md` writes the table of registers.
"""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from rounding import MASTERS, MIXED, PLAIN, STOCHASTIC, mixed

from fastsam.commands.diagnosis import build_record
from fastsam.ops import native
from fastsam.ops.formats import LOW_DTYPES, Format

ARCHS = {75: 1024, 80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}  # and their threads a processor
READ = [90, pytest.param(80, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.slow)]
CUDA = Path(__file__).parents[1] / "csrc" / "cuda"
THREADS, REGISTERS = 256, 65536  # of a block, of a processor
TYPES = {"float": torch.float32, "double": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORMATS = [*PLAIN, *(mixed(*pair) for pair in MIXED), *MASTERS, *STOCHASTIC]
# In the order of csrc/cuda/update.h.
KERNELS = ["grad_norm", "perturb", "power_norm", "power_perturb", "dot", "combine"]
UPDATES = "restore plain sgd adam amsgrad rmsprop centered adagrad nadam radam lion".split()
UNDER_WAY = 64 * 1024  # bytes a processor has to wait for to keep the memory busy


class Kernel(NamedTuple):
    name: str
    format: Format  # with what its formats share
    words: int
    arch: int


class Resources(NamedTuple):
    symbol: str
    registers: int
    stack: int
    local: int

    def threads(self, arch):
        blocks = REGISTERS // (-(-self.registers // 8) * 8 * THREADS)
        return min(blocks * THREADS, ARCHS[arch])


def tool():
    """Path of cuobjdump, which the triton package brings along."""
    spec = importlib.util.find_spec("triton")
    found = spec and Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return found if found and found.is_file() else None


def library():
    """Path of the library that is loaded."""
    return str(Path(native.reader.__file__).resolve())


def output(*options):
    return subprocess.run([tool(), *options, library()], check=True, capture_output=True, text=True).stdout


@cache
def resources():
    found, arch = {}, 0
    for line in output("-res-usage").splitlines():
        if line.startswith("arch ="):
            arch = int(line.split("sm_")[1])
        elif match := re.match(r"\s*Function (\w+):", line):
            symbol = match[1]
        elif "REG:" in line and (key := kernel_of(symbol, arch)):
            counts = {name: int(n) for name, n in re.findall(r"(\w+):(\d+)", line)}
            found[key] = Resources(symbol, counts["REG"], counts["STACK"], counts["LOCAL"])
    return found


@cache
def ptx():
    """Its text by target."""
    texts = re.split(r"^Fatbin ptx code:", output("-ptx"), flags=re.MULTILINE)[1:]
    found = {}
    for text in texts:
        target = int(re.search(r"\.target sm_(\d+)", text)[1])
        found[target] = found.get(target, "") + text
    return found


def skip_without(arch):
    if all(kernel.arch != arch for kernel in resources()):
        pytest.skip(f"the library has no machine code for sm_{arch}")


def kernel_of(symbol, arch):
    pattern = r"(\w+)<(?:\(\S+Kernel\)(\d+), )?(\d+), \S*Types<(.*?)> ?>\("
    match = re.search(pattern, demangled(symbol))
    if match is None:
        match = re.search(r"(\w+)<(\d+), (float|double)>\(", demangled(symbol))  # whatever the operands are stored as
        return match and Kernel(match[1], PLAIN[match[3] == "double"], int(match[2]), arch)
    *types, draws = match[4].replace("fastsam::cuda::", "").split(", ")
    source, grad, weight, state = (TYPES[each] for each in types)
    name = UPDATES[int(match[2])] if match[2] else match[1]
    return Kernel(name, Format(weight, grad, source, state, draws == "true"), int(match[3]), arch)


def demangled(symbol):
    """The name in C++, by the C++ library that torch has loaded."""
    demangle = ctypes.CDLL("libstdc++.so.6")["__cxa_demangle"]
    demangle.restype = ctypes.c_char_p
    return (demangle(symbol.encode(), None, None, None) or b"").decode()


def shared(name, format):
    """The format whose kernel serves this one: what an operation has no use for makes no difference."""
    weight, grad, source, _, stochastic = format
    if name in ("dot", "combine"):  # what is computed in
        return PLAIN[weight == torch.float64]
    if name in ("grad_norm", "power_norm"):
        return Format(source, grad, source, source)
    if name in ("perturb", "power_perturb"):
        return Format(weight, grad, source, source, stochastic and source in LOW_DTYPES)
    return Format(weight, source, source, source) if name == "restore" else format


def title(format):
    """What it is, in words."""
    weight, grad, source, state, stochastic = (str(each).removeprefix("torch.") for each in format)
    extra = [f"{grad} gradients"] * (grad != weight) + ["masters"] * (source != weight)
    extra += [f"{state} states"] * (state != source) + ["drawn"] * (stochastic == "True" and state == weight == source)
    return ", ".join([weight, *extra])


@cache
def small():
    """The variants with the smallest arguments of each; the others differ in the size of these only."""
    found = sorted(resources().items(), key=lambda item: -item[0].words)
    return {kernel._replace(words=0): resources for kernel, resources in found}


@cache
def code(arch):
    """Addresses and instructions of the kernels that are read."""
    wanted = {small()[kernel._replace(arch=arch)].symbol: kernel._replace(arch=arch) for kernel in READ_KERNELS}
    text = output("-sass", "-arch", f"sm_{arch}", "-fun", ",".join(wanted))
    pieces = re.split(r"Function : (\w+)", text)[1:]
    pattern = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);")
    return {wanted[s]: pattern.findall(body) for s, body in zip(pieces[::2], pieces[1::2], strict=True) if s in wanted}


# Independent loads of 16 bytes, at least.
FIGURES = {
    "grad_norm": 3,
    "perturb": 4,
    "sgd": 6,
    "adam": 4,
    "rmsprop": 4,
    "adagrad": 6,
    "nadam": 4,
    "radam": 4,
    "lion": 6,
}
# The same with masters and random numbers, in bytes: perturb_, SGD, Adam.
BYTES = {
    MASTERS[0]: (48, 80, 112),  # two vectors of 4 masters, 4 gradients and the states
    MASTERS[1]: (64, 96, 128),
    STOCHASTIC[0]: (64, 96, 64),
    STOCHASTIC[2]: (64, 80, 96),  # a vector of 8
    STOCHASTIC[3]: (48, 64, 80),
}
READ_KERNELS = {Kernel(name, PLAIN[i], 0, 0): 16 * loads for name, loads in FIGURES.items() for i in (0, 2)}
READ_KERNELS |= {Kernel("dot", PLAIN[0], 0, 0): 128, Kernel("combine", PLAIN[0], 0, 0): 96}
READ_KERNELS |= {
    Kernel(name, shared(name, format), 0, 0): least
    for format, figures in BYTES.items()
    for name, least in zip(("perturb", "sgd", "adam"), figures, strict=True)
}


def bytes_under_way(kernel, instructions):
    """The most bytes that are on order before anything needs one of them, in loads of 16 bytes.

    Where four gradients lie beside four masters, these take 8.
    """
    four = kernel.format.source == torch.float32 and kernel.format.grad in LOW_DTYPES and not kernel.format.stochastic
    wide = r"LDG\S*\.128|LDG\S*\.EF\S*\.64" if four else r"LDG\S*\.128"
    most, waiting, arriving = 0, [], {}  # the last: what jumps bring along, by where they lead
    for address, text in instructions:
        waiting = max(waiting, arriving.pop(address, []), key=len)
        body = re.sub(r"^@!?U?P\w+\s+", "", text)
        name, _, operands = body.partition(" ")
        registers = {int(n) for n in re.findall(r"\bR(\d+)\b", operands)}
        if match := re.match(wide, name):
            target = int(re.search(r"\bR(\d+)", operands)[1])
            load = set(range(target, target + (4 if match[0].endswith("128") else 2)))
            if any(load & other for other in waiting):  # what is overwritten is another path's
                waiting = []
            waiting.append(load)
            most = max(most, sum(4 * len(load) for load in waiting))
        elif name in ("BRA", "EXIT", "RET.REL.NODEC"):
            if name == "BRA" and (target := re.search(r"0x([0-9a-f]+)\s*$", operands)):
                there = f"{int(target[1], 16):04x}"
                arriving[there] = max(arriving.get(there, []), list(waiting), key=len)
            if not text.startswith("@"):
                waiting = []
        elif any(registers & load for load in waiting):
            waiting = []
    return most


def built():
    return native.reason() is None and torch._C._dispatch_has_kernel_for_dispatch_key("fastsam::grad_norm", "CUDA")


needs_kernels = pytest.mark.skipif(
    not built() or tool() is None,
    reason="the library was built without CUDA kernels, or there is no triton package with cuobjdump",
)


@pytest.mark.skipif(native.reason() is not None, reason="there is no library")
@pytest.mark.skipif(shutil.which("readelf") is None, reason="there is no readelf")
def test_the_library_needs_torch_and_the_system_only():
    """So that it loads beside any torch >= 2.10, with and without CUDA, whatever toolkit built it."""
    dynamic = subprocess.run(["readelf", "-dW", library()], check=True, capture_output=True, text=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
    system = {
        name
        for name in needed
        if re.match(r"(libstdc\+\+|libm|libgcc_s|libc|libpthread|librt|libdl|ld-linux.*)\.so", name)
    }
    # libtorch leads to the CUDA part of a CUDA build of torch, and exists in every build.
    assert needed - system == {"libtorch_cpu.so"} | ({"libtorch.so"} if built() else set())
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic
    symbols = subprocess.run(
        ["readelf", "--dyn-syms", "-W", library()], check=True, capture_output=True, text=True
    ).stdout
    assert not re.findall(r"UND (_ZNK?(?:2at|3c10|5torch)\S*)", symbols)  # nothing beyond the stable ABI


@needs_kernels
@pytest.mark.skipif(os.environ.get("TORCH_CUDA_ARCH_LIST") != "all", reason="only TORCH_CUDA_ARCH_LIST=all is for all")
def test_all_architectures_are_built():
    assert {kernel.arch for kernel in resources()} == set(ARCHS)
    kernels = {(kernel.name, kernel.format) for kernel in resources()}
    assert kernels == {(name, shared(name, format)) for name in [*KERNELS, *UPDATES] for format in FORMATS}


@needs_kernels
def test_no_kernel_spills_or_uses_local_memory():
    guilty = {k: found for k, found in resources().items() if found.stack > 0 or found.local > 0}
    assert not guilty


@pytest.mark.slow
@needs_kernels
@pytest.mark.skipif(shutil.which("ptxas") is None, reason="there is no ptxas on the PATH")
def test_no_kernel_that_a_driver_compiles_spills(tmp_path):
    """PTX of the oldest target, which is all that a library built without a GPU has, on a newer card."""
    if not ptx():
        pytest.skip("the library has machine code alone")
    oldest = min(ptx())
    subprocess.run([tool(), "-xptx", "all", library()], cwd=tmp_path, check=True)
    files = [file for file in tmp_path.glob("*.ptx") if f".target sm_{oldest}\n" in file.read_text()]
    assert len(files) == len(list(CUDA.glob("*.cu")))
    for file in files:
        command = ["ptxas", "-v", "-arch=sm_90", str(file), "-o", str(tmp_path / "code")]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        counts = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", printed)
        assert counts and set(counts) == {("0", "0")}, file.name


@needs_kernels
def test_ptx_rounds_as_the_formulas_say():
    if not ptx():
        pytest.skip("the library has machine code alone")
    for target, text in ptx().items():
        kernels = re.split(r"(?=\.entry )", text)
        # log2 and exp2 of float64 start from an approximation that they refine; they are promised to no bit.
        promised = "".join(kernel for kernel in kernels if "power_" not in kernel.partition("(")[0])
        assert "sqrt.rn.f32" in promised and "div.rn.f32" in promised, target
        assert not re.findall(r"\S*(?:\.ftz|\.approx|div\.full)\S*", promised), target


@needs_kernels
@pytest.mark.parametrize(
    ("name", "format", "fused"),
    [
        # Of each element in the loop over aligned vectors (of 4, two at a time but for Adam), in that over others, and
        # in the tail. perturb_'s only one is the decay in the loss; its loops are there with and without ASAM.
        ("perturb", PLAIN[0], 1 * (2 * (2 * 4 + 4) + 1)),
        ("plain", PLAIN[0], 2 * (2 * 4 + 4 + 1)),
        ("dot", PLAIN[0], 3 * (4 * 4 + 2 * 4)),  # four runs of 4 at a time; elsewhere 8 lanes one by one
        ("combine", PLAIN[0], (1 + 2) * (2 * 4 + 1)),  # of two and of three terms, and one by one
        ("sgd", PLAIN[0], 4 * (2 * 4 + 4 + 1) + 2 * 1),  # and one element at a time without momentum
        ("adam", PLAIN[0], 4 * (4 + 4 + 1)),
        ("adam", MASTERS[0], 4 * (2 * 4 + 4 + 1)),  # two vectors at a time
        ("adam", STOCHASTIC[3], 4 * (8 + 8 + 1)),  # vectors of 8
    ],
    ids=str,
)
def test_ptx_fuses_only_what_the_formulas_write(name, format, fused):
    if 120 not in ptx() or not resources():
        pytest.skip("for other targets the compiler copies loops, and with them their instructions")
    symbol = next(f.symbol for k, f in small().items() if k[:2] == (name, format))
    body = ptx()[120].split(f".visible .entry {symbol}(")[1].split(".entry ")[0]
    found = len(re.findall(r"fma\.rn\.f32\s", body)) + 2 * len(re.findall(r"fma\.rn\.f32x2\s", body))
    assert found == fused


@needs_kernels
@pytest.mark.parametrize("arch", READ)
def test_accesses_are_16_bytes_wide_and_enough_are_under_way(arch):
    skip_without(arch)
    if "FASTSAM_PREFETCH" in (build_record() or ""):
        pytest.skip("loads that are spread over the loop are not counted right")
    kernels = code(arch)
    assert len(kernels) == len(READ_KERNELS)
    for kernel, instructions in kernels.items():
        loads = bytes_under_way(kernel, instructions)
        assert loads >= READ_KERNELS[kernel._replace(arch=0)], kernel
        # RAdam's scalars take the registers of a fourth block; 48 KiB is about what an H200 wants.
        enough = 48 * 1024 if kernel.name == "radam" else UNDER_WAY
        assert small()[kernel].threads(arch) * loads >= enough, kernel
        copies = kernel.name == "perturb" and kernel.format.masters  # 4 elements of 2 bytes are all that it writes
        if kernel.name not in ("grad_norm", "dot"):
            assert any(re.search(r"STG\S*\.64" if copies else r"STG\S*\.128", text) for _, text in instructions), kernel


def table():
    """The table of registers, in Markdown."""
    archs = sorted(ARCHS)
    lines = [
        "# Registers",
        "",
        "Registers a thread of the CUDA kernels, by architecture; none uses stack or local memory. Shown is the",
        "variant with the smallest arguments. Masters are float32. What is drawn is rounded with random numbers, and",
        "so are bfloat16 states. Written by `python tests/test_machine_code.py > benchmarks/registers.md`.",
        "",
        "| kernel | type | " + " | ".join(f"sm_{arch}" for arch in archs) + " |",
        "| --- | --- |" + " --- |" * len(archs),
    ]
    kernels = [Kernel(name, shared(name, plain), 0, 0) for name in [*KERNELS, *UPDATES] for plain in PLAIN]
    kernels += [
        Kernel(name, shared(name, f), 0, 0) for name in ("perturb", "sgd", "adam") for f in MASTERS + STOCHASTIC
    ]
    for kernel in dict.fromkeys(kernels):
        row = [small()[kernel._replace(arch=arch)].registers for arch in archs]
        lines.append(f"| {kernel.name} | {title(kernel.format)} | " + " | ".join(map(str, row)) + " |")
    lines += [
        "",
        "Bytes under way on one processor: resident threads times the bytes of a thread's independent loads.",
        "",
        "| kernel | type | bytes | " + " | ".join(f"sm_{a}" for a in (80, 90, 100)) + " |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kernel, instructions in sorted(code(90).items(), key=lambda item: (item[0].name, title(item[0].format))):
        loads = bytes_under_way(kernel, instructions)
        kib = [small()[kernel._replace(arch=a)].threads(a) * loads // 1024 for a in (80, 90, 100)]
        lines.append(
            f"| {kernel.name} | {title(kernel.format)} | {loads} | " + " | ".join(f"{k} KiB" for k in kib) + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
