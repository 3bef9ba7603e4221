"""Builds fastsam/_C.abi3.so. It is optional: without a compiler or torch the package runs on its PyTorch reference.

What was built, or why not, is written to fastsam/_build.txt, which `python -m fastsam` prints. Environment:

    FASTSAM_NATIVE=1     a library that cannot be built is an error; 0: do not build it
    FASTSAM_CUDA=0/1     never / necessarily compile csrc/cuda (default: if there is an nvcc)
    TORCH_CUDA_ARCH_LIST="9.0"  only for these compute capabilities, which is faster (default: all that are served)
    FASTSAM_SANITIZE=1   AddressSanitizer and UndefinedBehaviorSanitizer. To run the tests with such a library:
                         LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" \
                         ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 pytest tests/test_native.py
"""

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
RECORD = "_build.txt"  # beside the package: what was built, or why nothing
OBJECTS = ROOT / "build" / "native"  # stays between builds: only what changed is compiled again

CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall"]
# The arithmetic is specified rounding by rounding: no contraction, and never -ffast-math.
MATH_FLAGS = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off"]
NVCC_FLAGS += ["-DUSE_CUDA"]  # torch's stable headers declare their CUDA part only then
# A kernel's file holds its 32 KB of arguments as zeros.
NVCC_FLAGS += ["-Xfatbin=-compress-all"]
SANITIZE_FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"]
X86_ISAS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}
CUDA_ARCHS = [75, 80, 86, 89, 90, 100, 120]
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the stable ABI of torch 2.10


class Job(NamedTuple):
    """One compilation; `command` lacks its output and dependency options."""

    source: Path
    target: Path
    command: list[str]


def source_hash() -> str:
    """Hash csrc/ as fastsam/ops/native.py does, which refuses a library built from other sources."""
    digest = hashlib.sha256()
    for path in sorted(CSRC.rglob("*")):
        if path.suffix in (".h", ".cpp", ".cu"):
            digest.update(path.relative_to(CSRC).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def run(command: list[str]) -> str:
    """Run a command and return its output. If it fails that goes to stderr, its first errors into the exception."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        print(done.stdout, file=sys.stderr)
        lines = [line for line in dict.fromkeys(done.stdout.splitlines()) if line and not line.startswith("ninja:")]
        errors = [line for line in lines if "error" in line.lower()][:3] or lines[-1:]
        raise RuntimeError(f"{Path(command[0]).name} failed: {'; '.join(errors)}")
    return done.stdout


def find_compiler() -> list[str]:
    """The C++ compiler's command."""
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    for name in names:
        command = shlex.split(name)
        if shutil.which(command[0]):
            return command
    raise RuntimeError(f"no C++ compiler found, looked for {', '.join(names)}")


def sanitizers() -> list[str]:
    """Flags to compile and link with."""
    return SANITIZE_FLAGS if os.environ.get("FASTSAM_SANITIZE") == "1" else []


def find_nvcc() -> str | None:
    """The nvcc to use, or None; torch's CUDA_HOME is not asked, because it hides CUDA from a CPU build of torch."""
    wanted = os.environ.get("FASTSAM_CUDA")
    nvcc = None if wanted == "0" or sanitizers() else shutil.which("nvcc")
    if wanted == "1" and nvcc is None:
        raise RuntimeError("FASTSAM_CUDA=1 needs nvcc on the PATH")
    return nvcc if nvcc and list(CSRC.glob("cuda/*.cu")) else None


def cuda_targets(nvcc: str) -> list[str]:
    """Machine code for every architecture that is wanted and this nvcc knows, and PTX of the last for later ones."""
    known = {int(arch) for arch in re.findall(r"compute_(\d+)", run([nvcc, "--list-gpu-arch"]))}
    wanted = [int(a + b) for a, b in re.findall(r"(\d+)\.(\d)", os.environ.get("TORCH_CUDA_ARCH_LIST", ""))]
    archs = sorted(known.intersection(wanted or CUDA_ARCHS))
    if not archs:
        raise RuntimeError(
            f"TORCH_CUDA_ARCH_LIST={os.environ.get('TORCH_CUDA_ARCH_LIST')}: {nvcc} compiles for none of these"
        )
    code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*code, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def jobs(cxx: list[str], nvcc: str | None, torch_include: Path) -> list[Job]:
    """All compilations: the loops once for each instruction set, everything else once."""
    command = [*cxx, *CXX_FLAGS, *MATH_FLAGS, *sanitizers(), f"-isystem{torch_include}", "-c"]
    result = []
    for source in sorted(CSRC.rglob("*.cpp")):
        if source.parent.name == "cuda" and nvcc is None:
            continue
        extra = [TORCH_TARGET]
        if source.name == "reader.cpp":  # dlpack.h refuses to stand beside the stable ABI, which this file does not use
            extra = [f"-I{sysconfig.get_path('include')}", f"-DFASTSAM_SOURCE_HASH={source_hash()}"]
        name = "_".join(source.relative_to(CSRC).with_suffix("").parts)
        result.append(Job(source, OBJECTS / f"{name}.o", [*command, *extra, str(source)]))
        if source.name == "kernels.cpp" and platform.machine() in ("x86_64", "AMD64"):
            for isa, flags in X86_ISAS.items():
                flags = [*extra, *flags, f"-DFASTSAM_ISA={isa}", str(source)]
                result.append(Job(source, OBJECTS / f"{name}_{isa}.o", [*command, *flags]))
    if nvcc:
        command = [nvcc, *NVCC_FLAGS, *cuda_targets(nvcc), "-ccbin", cxx[0], TORCH_TARGET, f"-isystem={torch_include}"]
        for source in sorted(CSRC.glob("cuda/*.cu")):
            result.append(Job(source, OBJECTS / f"cuda_{source.stem}.o", [*command, "-c", str(source)]))
    return result


def compile_all(jobs: list[Job]) -> None:
    """Compile what changed if there is a ninja, else everything, in parallel."""
    OBJECTS.mkdir(parents=True, exist_ok=True)
    commands = [[*job.command, "-MD", "-MF", f"{job.target}.d", "-o", str(job.target)] for job in jobs]
    ninja = shutil.which("ninja")
    if ninja is None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, commands))
        return

    def escape(text: object) -> str:
        return re.sub(r"([$: ])", r"$\1", str(text))

    lines = []
    for i, (job, command) in enumerate(zip(jobs, commands, strict=True)):
        lines += [f"rule compile{i}", f"  command = {shlex.join(command).replace('$', '$$')}"]
        lines += [f"  depfile = {escape(job.target)}.d", "  deps = gcc"]
        lines += [f"build {escape(job.target)}: compile{i} {escape(job.source)}"]
    (OBJECTS / "build.ninja").write_text("\n".join(lines) + "\n")
    run([ninja, "--quiet", "-C", str(OBJECTS)])


def build(library: Path) -> str:
    """Build the library, without CUDA if only nvcc fails, and return one line that says of what."""
    nvcc = find_nvcc()
    try:
        return build_with(nvcc, library)
    except RuntimeError as error:
        if nvcc is None or os.environ.get("FASTSAM_CUDA") == "1":
            raise
        return f"{build_with(None, library)} ({error})"


def build_with(nvcc: str | None, library: Path) -> str:
    """Compile and link."""
    try:
        import torch
    except ImportError as error:
        raise RuntimeError(f"torch is not importable in the build environment ({error})") from error
    torch_dir = Path(torch.__file__).parent
    cxx = find_compiler()
    steps = jobs(cxx, nvcc, torch_dir / "include")
    compile_all(steps)
    linker, libraries = [*cxx, "-shared", *sanitizers()], [f"-L{torch_dir / 'lib'}", "-ltorch_cpu"]
    if nvcc:
        # nvcc knows where its runtime library lies; libtorch leads to the CUDA part of a CUDA build of torch.
        linker = [nvcc, "-ccbin", cxx[0], "-cudart", "static", "-shared"]
        libraries += ["-Xlinker", "--no-as-needed", "-ltorch"]
    library.parent.mkdir(parents=True, exist_ok=True)
    run([*linker, *(str(step.target) for step in steps), "-o", str(library), *libraries])
    cuda = run([nvcc, "--version"]).strip().splitlines()[-1] if nvcc else "none"
    version = run([*cxx, "--version"]).splitlines()[0]
    return f"built with {version}, torch {torch.__version__}, Python {platform.python_version()}; CUDA kernels: {cuda}"


class BuildNative(build_ext):
    """Builds the library without setuptools' compiler objects, which know neither instruction sets nor nvcc."""

    def build_extension(self, ext: Extension) -> None:
        """Build, record the outcome beside the package, and go on without the library where that is allowed."""
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.unlink(missing_ok=True)  # an earlier build's must not be taken for this one's
        try:
            if os.environ.get("FASTSAM_NATIVE") == "0":
                raise RuntimeError("FASTSAM_NATIVE=0")
            record = build(library)
        except Exception as error:
            record = f"not built: {error}"
            print(f"fastsam: the native library was {record}", file=sys.stderr)
            if os.environ.get("FASTSAM_NATIVE") == "1" or os.environ.get("FASTSAM_CUDA") == "1":
                raise
        library.parent.mkdir(parents=True, exist_ok=True)
        (library.parent / RECORD).write_text(record + "\n")

    def copy_extensions_to_source(self) -> None:
        """For an editable install: the library and the record go into the source tree."""
        super().copy_extensions_to_source()
        shutil.copy(Path(self.build_lib) / "fastsam" / RECORD, ROOT / "fastsam" / RECORD)


setup(
    ext_modules=[Extension("fastsam._C", sources=[], py_limited_api=True, optional=True)],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
