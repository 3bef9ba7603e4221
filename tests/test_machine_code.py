"""The machine code of the CUDA kernels in the built library: wide accesses, no spills, enough loads under way.

`python tests/test_machine_code.py > benchmarks/registers.md` writes the table of registers.
"""

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

from fastsam.ops import native
from fastsam.ops.formats import MIXED_DTYPES

ARCHS = {75: 1024, 80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}  # and their threads a processor
READ = [90, pytest.param(80, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.slow)]
THREADS, REGISTERS = 256, 65536  # of a block, of a processor
TYPES = {"f": "float32", "d": "float64", "NS0_8bfloat16E": "bfloat16", "NS0_7float16E": "float16"}
# In the order of csrc/cuda/kernels.h.
KERNELS = ["grad_norm", "perturb", "power_norm", "power_perturb"]
UPDATES = "restore plain sgd adam amsgrad rmsprop centered adagrad nadam radam lion".split()
UNDER_WAY = 64 * 1024  # bytes a processor has to wait for to keep the memory busy


class Kernel(NamedTuple):
    name: str
    dtype: str
    grad_dtype: str
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


def output(*options):
    library = importlib.util.find_spec("fastsam._C").origin
    return subprocess.run([tool(), *options, library], check=True, capture_output=True, text=True).stdout


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


def kernel_of(symbol, arch):
    dtypes = "|".join([*TYPES, r"S\d_"])  # a type that was named before is abbreviated
    match = re.search(rf"\d({'|'.join(KERNELS)}|update)I(?:LNS0_6KernelE(\d+)E)?({dtypes})({dtypes})Li(\d+)E", symbol)
    if match is None:
        return None
    name = UPDATES[int(match[2])] if match[2] else match[1]
    return Kernel(name, TYPES[match[3]], TYPES.get(match[4], TYPES[match[3]]), int(match[5]), arch)


@cache
def small():
    """The variants with the smallest arguments of each; the others differ in the size of these only."""
    found = sorted(resources().items(), key=lambda item: -item[0].words)
    return {kernel._replace(words=0): resources for kernel, resources in found}


@cache
def code(arch):
    """Instructions of the kernels that are read, without their addresses."""
    wanted = {
        found.symbol: kernel
        for kernel, found in small().items()
        if kernel.arch == arch
        and kernel.dtype in ("float32", "bfloat16")
        and kernel.name in FIGURES
        and kernel.dtype == kernel.grad_dtype
    }
    text = output("-sass", "-arch", f"sm_{arch}", "-fun", ",".join(wanted))
    pieces = re.split(r"Function : (\w+)", text)[1:]
    pattern = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(.*?);")
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


def loads_under_way(instructions):
    """The most 16-byte loads that are issued before anything needs one of them."""
    most, waiting = 0, []
    for text in instructions:
        body = re.sub(r"^@!?U?P\w+\s+", "", text)
        name, _, operands = body.partition(" ")
        registers = {int(n) for n in re.findall(r"\bR(\d+)\b", operands)}
        if re.match(r"LDG\S*\.128", name):
            target = int(re.search(r"\bR(\d+)", operands)[1])
            waiting.append(set(range(target, target + 4)))
            most = max(most, len(waiting))
        elif name in ("BRA", "EXIT", "RET.REL.NODEC") and not text.startswith("@"):
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
    library = importlib.util.find_spec("fastsam._C").origin
    dynamic = subprocess.run(["readelf", "-dW", library], check=True, capture_output=True, text=True).stdout
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
        ["readelf", "--dyn-syms", "-W", library], check=True, capture_output=True, text=True
    ).stdout
    assert not re.findall(r"UND (_ZNK?(?:2at|3c10|5torch)\S*)", symbols)  # nothing beyond the stable ABI


@needs_kernels
@pytest.mark.skipif("TORCH_CUDA_ARCH_LIST" in os.environ, reason="TORCH_CUDA_ARCH_LIST asks for fewer")
def test_all_architectures_are_built():
    assert {kernel.arch for kernel in resources()} == set(ARCHS)
    kernels = {(kernel.name, kernel.dtype, kernel.grad_dtype) for kernel in resources()}
    mixed = {(str(d)[6:], str(g)[6:]) for d, g in MIXED_DTYPES}
    pairs = {(d, d) for d in TYPES.values()} | mixed
    restores = {("restore", d, g) for d, g in mixed}  # reads no gradients
    assert kernels == {(name, *pair) for name in [*KERNELS, *UPDATES] for pair in pairs} - restores


@needs_kernels
def test_no_kernel_spills_or_uses_local_memory():
    guilty = {k: found for k, found in resources().items() if found.stack > 0 or found.local > 0}
    assert not guilty


@needs_kernels
def test_ptx_rounds_as_the_formulas_say():
    kernels = re.split(r"(?=\.visible \.entry )", output("-ptx"))
    # log2 and exp2 of float64 start from an approximation that they refine; they are promised to no bit.
    ptx = "".join(kernel for kernel in kernels if "power_" not in kernel.partition("(")[0])
    assert "sqrt.rn.f32" in ptx and "div.rn.f32" in ptx
    assert not re.findall(r"\S*(?:\.ftz|\.approx|div\.full)\S*", ptx)


@needs_kernels
@pytest.mark.parametrize(
    ("name", "fused"),
    [
        # Of each element in the loop over aligned vectors (of 4, two at a time but for Adam), in that over others, and
        # in the tail. perturb_'s only one is the decay in the loss; its loops are there with and without ASAM.
        ("perturb", 1 * (2 * (2 * 4 + 4) + 1)),
        ("plain", 2 * (2 * 4 + 4 + 1)),
        ("sgd", 4 * (2 * 4 + 4 + 1) + 2 * 1),  # and one element at a time without momentum
        ("adam", 4 * (4 + 4 + 1)),
    ],
)
def test_ptx_fuses_only_what_the_formulas_write(name, fused):
    ptx = output("-ptx")
    if ".target sm_120" not in ptx:
        pytest.skip("for other targets the compiler copies loops, and with them their instructions")
    symbol = next(f.symbol for k, f in small().items() if k[:3] == (name, "float32", "float32"))
    body = ptx.split(f".visible .entry {symbol}(")[1].split(".entry ")[0]
    found = len(re.findall(r"fma\.rn\.f32\s", body)) + 2 * len(re.findall(r"fma\.rn\.f32x2\s", body))
    assert found == fused


@needs_kernels
@pytest.mark.parametrize("arch", READ)
def test_accesses_are_16_bytes_wide_and_enough_are_under_way(arch):
    kernels = code(arch)
    assert len(kernels) == 2 * len(FIGURES)
    for kernel, instructions in kernels.items():
        loads = loads_under_way(instructions)
        assert loads >= FIGURES[kernel.name], kernel
        # RAdam's scalars take the registers of a fourth block; 48 KiB is about what an H200 wants.
        enough = 48 * 1024 if kernel.name == "radam" else UNDER_WAY
        assert small()[kernel].threads(arch) * loads * 16 >= enough, kernel
        if kernel.name != "grad_norm":
            assert any(re.search(r"STG\S*\.128", text) for text in instructions), kernel


def table():
    """The table of registers, in Markdown."""
    archs = sorted(ARCHS)
    lines = [
        "# Registers",
        "",
        "Registers a thread of the CUDA kernels, by architecture; none uses stack or local memory. Shown is the",
        "variant with small arguments. Written by `python tests/test_machine_code.py > benchmarks/registers.md`.",
        "",
        "| kernel | type | " + " | ".join(f"sm_{arch}" for arch in archs) + " |",
        "| --- | --- |" + " --- |" * len(archs),
    ]
    for name in [*KERNELS, *UPDATES]:
        for dtype in TYPES.values():
            row = [small()[Kernel(name, dtype, dtype, 0, arch)].registers for arch in archs]
            lines.append(f"| {name} | {dtype} | " + " | ".join(map(str, row)) + " |")
    lines += [
        "",
        "Bytes under way on one processor: resident threads times independent 16-byte loads of a thread.",
        "",
        "| kernel | type | loads | " + " | ".join(f"sm_{a}" for a in (80, 90, 100)) + " |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for kernel, instructions in sorted(code(90).items()):
        loads = loads_under_way(instructions)
        kib = [small()[kernel._replace(arch=a)].threads(a) * loads * 16 // 1024 for a in (80, 90, 100)]
        lines.append(f"| {kernel.name} | {kernel.dtype} | {loads} | " + " | ".join(f"{k} KiB" for k in kib) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
