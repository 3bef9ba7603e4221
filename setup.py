"""Builds fastsam/_C.abi3.so. It is optional: without a compiler or torch the package runs on its PyTorch reference.

What was built and for which GPUs, or why not, is written to fastsam/_build.txt, which `python -m fastsam` prints.
`pip install -v` shows every file that is compiled. Environment:

    FASTSAM_NATIVE=1     a library that cannot be built is an error; 0: do not build it
    FASTSAM_CUDA=0/1     never / necessarily compile csrc/cuda (default: if there is an nvcc)
    TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX"  machine code for these compute capabilities, PTX where it says so, for it and
                         later ones; "all": what a wheel needs. Without it: machine code for the GPUs of this machine
                         and PTX for later ones; where no GPU is visible, PTX that serves all, compiled by the driver
    FASTSAM_SANITIZE=1   AddressSanitizer and UndefinedBehaviorSanitizer. To run the tests with such a library:
                         LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" \
                         ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 pytest tests/test_native.py
"""

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
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
    # GCC 12 finds fault with its own header, in 5,000 lines.
    "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -Wno-maybe-uninitialized".split(),
}
CUDA_ARCHS = [75, 80, 86, 89, 90, 100, 120]  # of a wheel
# One front end, which takes most of the time, serves all from its own number to the next: the sources ask for 8.0 and
# 12.0, and between the others nvcc makes the same PTX (benchmarks/NOTES.md).
FRONT_ENDS = [75, 80, 100, 120]
SLOWEST = ["sgd", "adam", "amsgrad", "centered", "kernels"]  # to be started first
# The kernels' files that the choices of csrc/cuda/choices.h are for:
# all others' objects serve libraries with any choice.
RULES = "adagrad adam amsgrad centered lion nadam radam rmsprop sgd".split()
CHOICES = {
    "FASTSAM_PREFETCH": ["perturb", *RULES],
    "FASTSAM_LEAST_PART": ["launch"],
    "FASTSAM_RESIDENT_NORM": ["launch", "norm"],
    "FASTSAM_PLAIN_ACCESS": ["norm", "perturb", "power", *RULES],
    "FASTSAM_DESCENDING_UPDATE": RULES,
}
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the stable ABI of torch 2.10


class Job(NamedTuple):
    """One compilation; `command` lacks its output and dependency options."""

    source: Path
    target: Path
    command: list[str]

    @property
    def title(self) -> str:
        """For the progress: `cuda/adam.cu`, with the instruction set where there are several."""
        isa = re.search(r"_(avx\w+)\.o$", self.target.name)
        return self.source.relative_to(CSRC).as_posix() + (f" ({isa[1]})" if isa else "")


class Targets(NamedTuple):
    """What the CUDA kernels are compiled for: numbers of nvcc's, as "90" and "90a", and where the wish came from."""

    machine_code: list[str]
    ptx: list[str]
    why: str

    def __str__(self) -> str:
        """As in the record, where the diagnosis finds it: `sm_90 compute_80 (the GPUs of this machine)`."""
        names = [*(f"sm_{arch}" for arch in self.machine_code), *(f"compute_{arch}" for arch in self.ptx)]
        return f"{' '.join(names)} ({self.why})"

    def flags(self, known: list[int]) -> list[str]:
        """Options for nvcc."""
        code = [f"-gencode=arch=compute_{front_end(arch, known)},code=sm_{arch}" for arch in self.machine_code]
        return [*code, *(f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in self.ptx)]


def source_hash() -> str:
    """Hash csrc/ as fastsam/ops/native.py does, which refuses a library built from other sources."""
    digest = hashlib.sha256()
    for path in sorted(CSRC.rglob("*")):
        if path.suffix in (".h", ".cpp", ".cu"):
            digest.update(path.relative_to(CSRC).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def run(command: list[str], show: bool = False) -> str:
    """Run a command and return its output. If it fails that goes to stderr, its first errors into the exception.

    Args:
        command: the words.
        show: print the lines as they come, but for ninja's own.
    """
    output = ""
    env = os.environ | {"NINJA_STATUS": "[%f/%t, %e s] "}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as process:
        assert process.stdout is not None
        for line in process.stdout:
            output += line
            if show and not line.startswith("ninja:"):
                print(line, end="", flush=True)
    if process.returncode != 0:
        if not show:
            print(output, file=sys.stderr)
        lines = [line for line in dict.fromkeys(output.splitlines()) if line and not line.startswith(("ninja:", "["))]
        errors = [line for line in lines if "error" in line.lower()][:3] or lines[-1:]
        raise RuntimeError(f"{Path(command[0]).name} failed: {'; '.join(errors)}")
    return output


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
    places = [Path(os.environ.get(name) or "/usr/local/cuda") / "bin" for name in ("CUDA_HOME", "CUDA_PATH")]
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(map(str, places)))
    nvcc = None if wanted == "0" or sanitizers() else nvcc
    if wanted == "1" and nvcc is None:
        raise RuntimeError("FASTSAM_CUDA=1 needs nvcc on the PATH, in $CUDA_HOME/bin or in /usr/local/cuda/bin")
    return nvcc if nvcc and list(CSRC.glob("cuda/*.cu")) else None


def known_archs(nvcc: str) -> list[int]:
    """What this nvcc compiles for."""
    return sorted({int(arch) for arch in re.findall(r"compute_(\d+)", run([nvcc, "--list-gpu-arch"]))})


def gpus_of_this_machine(libcuda: str = "libcuda.so.1") -> list[int]:
    """Compute capabilities, as 90: of the driver, because torch may be a build without CUDA, else of nvidia-smi."""
    try:
        driver = ctypes.CDLL(libcuda)
    except OSError:
        driver = None
    count, device, found = ctypes.c_int(0), ctypes.c_int(0), []
    if driver is not None and driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0:
        for i in range(count.value):
            major, minor = ctypes.c_int(0), ctypes.c_int(0)
            failed = driver.cuDeviceGet(ctypes.byref(device), i)
            failed |= driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # COMPUTE_CAPABILITY_MAJOR
            failed |= driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)  # COMPUTE_CAPABILITY_MINOR
            found += [] if failed else [10 * major.value + minor.value]
    if not found and (tool := shutil.which("nvidia-smi")):
        command = [tool, "--query-gpu=compute_cap", "--format=csv,noheader"]
        printed = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
        found = [int(major + minor) for major, minor in re.findall(r"^\s*(\d+)\.(\d)\s*$", printed, re.MULTILINE)]
    return found


def number(arch: str) -> int:
    """90 of "90a"."""
    return int(arch.rstrip("af"))


def front_end(arch: str, known: list[int]) -> str:
    """The PTX that `arch`'s machine code is made of; an architecture's own features, as 9.0a's, need its own."""
    below = [each for each in FRONT_ENDS if each in known and each <= number(arch)]
    return str(below[-1]) if below and arch.isdigit() else arch


def targets_for(wish: str, gpus: list[int], known: list[int]) -> Targets:
    """What to compile for.

    Args:
        wish: TORCH_CUDA_ARCH_LIST.
        gpus: compute capabilities of this machine, as 90.
        known: what nvcc compiles for, ascending.
    """
    served = [arch for arch in known if arch >= CUDA_ARCHS[0]]
    if not served:
        raise RuntimeError("this nvcc compiles for no GPU of compute capability 7.5 or newer")
    if wish.strip().lower() == "all":
        return Targets(
            [str(arch) for arch in CUDA_ARCHS if arch in served],
            [str(arch) for arch in FRONT_ENDS if arch in served],
            "TORCH_CUDA_ARCH_LIST=all",
        )
    if wish.strip():
        return targets_of_list(wish.strip(), served)
    gpus = sorted({gpu for gpu in gpus if gpu >= served[0]})
    if not gpus:
        # The least that serves every GPU: its driver compiles the kernels of a step in about six seconds.
        return Targets([], [str(served[0])], "no GPU that it serves was visible")
    machine_code = [str(gpu) for gpu in gpus if gpu in served]
    # PTX of the oldest, for later ones; and of the newest that nvcc knows, if there is a GPU that it does not know.
    ptx = {front_end(str(max(arch for arch in served if arch <= gpus[0])), served)}
    ptx |= {front_end(str(max(arch for arch in served if arch <= gpu)), served) for gpu in gpus if gpu not in served}
    return Targets(machine_code, sorted(ptx, key=int), "the GPUs of this machine")


def targets_of_list(wish: str, served: list[int]) -> Targets:
    """What a list as torch's own extensions take it names, without GPUs older than those that are served."""
    machine_code, ptx = set(), set()
    for word in re.split(r"[;,\s]+", wish.strip(";, ")):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
        if match is None:
            raise ValueError(
                f'TORCH_CUDA_ARCH_LIST={wish}: "{word}" is neither "all" nor a compute capability, as 9.0 or 9.0+PTX'
            )
        arch = match[1] + match[2] + match[3]
        if number(arch) < CUDA_ARCHS[0]:
            print(f"fastsam: TORCH_CUDA_ARCH_LIST={wish}: {word} is left out, the kernels need 7.5 or newer")
            continue
        if number(arch) not in served:
            names = ", ".join(f"{each // 10}.{each % 10}" for each in served)
            raise ValueError(f"TORCH_CUDA_ARCH_LIST={wish}: this nvcc does not know {word}; it compiles for {names}")
        machine_code.add(arch)
        if match[4]:
            ptx.add(front_end(arch, served))
    if not machine_code:
        raise ValueError(f"TORCH_CUDA_ARCH_LIST={wish}: no GPU of these is served; FASTSAM_CUDA=0 builds without CUDA")

    def order(arch: str) -> tuple[int, str]:
        return number(arch), arch

    return Targets(sorted(machine_code, key=order), sorted(ptx, key=order), f"TORCH_CUDA_ARCH_LIST={wish}")


def jobs(
    cxx: list[str], nvcc: str | None, cuda_flags: list[str], torch_include: Path, choices: dict[str, int]
) -> list[Job]:
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
        command = [nvcc, *NVCC_FLAGS, *cuda_flags, "-ccbin", cxx[0], TORCH_TARGET, f"-isystem={torch_include}"]
        for source in sorted(CSRC.glob("cuda/*.cu")):
            chosen = [f"-D{name}={value}" for name, value in choices.items() if source.stem in CHOICES[name]]
            name = "".join([f"cuda_{source.stem}", *chosen])
            result.append(Job(source, OBJECTS / f"{name}.o", [*command, *chosen, "-c", str(source)]))
    place = {name: i for i, name in enumerate(SLOWEST)}
    return sorted(result, key=lambda job: place.get(job.source.stem, len(SLOWEST)))


def compile_all(jobs: list[Job]) -> None:
    """Compile what changed if there is a ninja, else everything, in parallel."""
    OBJECTS.mkdir(parents=True, exist_ok=True)
    commands = [[*job.command, "-MD", "-MF", f"{job.target}.d", "-o", str(job.target)] for job in jobs]
    ninja = shutil.which("ninja")
    if ninja is None:
        begun, done = time.monotonic(), iter(range(1, len(jobs) + 1))

        def compile_one(job: Job, command: list[str]) -> None:
            run(command)
            print(f"[{next(done)}/{len(jobs)}, {time.monotonic() - begun:.1f} s] {job.title}", flush=True)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, jobs, commands))
        return

    def escape(text: object) -> str:
        return re.sub(r"([$: ])", r"$\1", str(text))

    lines = []
    for i, (job, command) in enumerate(zip(jobs, commands, strict=True)):
        lines += [f"rule compile{i}", f"  command = {shlex.join(command).replace('$', '$$')}"]
        lines += [f"  description = {job.title}", f"  depfile = {escape(job.target)}.d", "  deps = gcc"]
        lines += [f"build {escape(job.target)}: compile{i} {escape(job.source)}"]
    (OBJECTS / "build.ninja").write_text("\n".join(lines) + "\n")
    run([ninja, "-C", str(OBJECTS)], show=True)


def build(library: Path, choices: dict[str, int] | None = None) -> str:
    """Build the library, without CUDA if only nvcc fails, and return what the record says of it.

    Args:
        library: where it goes.
        choices: values of `CHOICES` other than those of csrc/cuda/choices.h.
    """
    nvcc = find_nvcc()
    try:
        return build_with(nvcc, library, choices or {})
    except RuntimeError as error:
        if nvcc is None or os.environ.get("FASTSAM_CUDA") == "1":
            raise
        return f"{build_with(None, library, {})} ({error})"


def build_with(nvcc: str | None, library: Path, choices: dict[str, int]) -> str:
    """Compile and link."""
    try:
        import torch
    except ImportError as error:
        raise RuntimeError(f"torch is not importable in the build environment ({error})") from error
    torch_dir = Path(torch.__file__).parent
    cxx = find_compiler()
    cuda, flags = "none", []
    if nvcc:
        known = known_archs(nvcc)
        wish = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
        targets = targets_for(wish, [] if wish.strip() else gpus_of_this_machine(), known)
        flags = targets.flags(known)
        release = re.search(r"release ([\d.]+)", run([nvcc, "--version"]))
        chosen = "".join(f", {name}={value}" for name, value in choices.items())
        cuda = f"nvcc {release[1] if release else '(version unknown)'}, {targets}{chosen}"
    steps = jobs(cxx, nvcc, flags, torch_dir / "include", choices)
    print(f"fastsam: compiling {len(steps)} files; CUDA kernels: {cuda}", flush=True)
    compile_all(steps)
    linker, libraries = [*cxx, "-shared", *sanitizers()], [f"-L{torch_dir / 'lib'}", "-ltorch_cpu"]
    if nvcc:
        # nvcc knows where its runtime library lies; libtorch leads to the CUDA part of a CUDA build of torch.
        linker = [nvcc, "-ccbin", cxx[0], "-cudart", "static", "-shared"]
        libraries += ["-Xlinker", "--no-as-needed", "-ltorch"]
    library.parent.mkdir(parents=True, exist_ok=True)
    run([*linker, *(str(step.target) for step in steps), "-o", str(library), *libraries])
    version = run([*cxx, "--version"]).splitlines()[0]
    return f"built with {version}, torch {torch.__version__}, Python {platform.python_version()}\nCUDA kernels: {cuda}"


def free_threaded() -> bool:
    """Whether this Python has no global interpreter lock."""
    return bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


def build_and_record(library: Path, choices: dict[str, int] | None = None) -> None:
    """Build, write the outcome beside the library, and go on without it where that is allowed."""
    library.unlink(missing_ok=True)  # an earlier build's must not be taken for this one's
    record = library.parent / RECORD
    record.parent.mkdir(parents=True, exist_ok=True)
    try:
        if os.environ.get("FASTSAM_NATIVE") == "0":
            raise RuntimeError("FASTSAM_NATIVE=0")
        if free_threaded():
            raise RuntimeError("a free-threaded Python has no limited API, in which the library is written")
        record.write_text(build(library, choices) + "\n")
    except Exception as error:
        record.write_text(f"not built: {error}\n")
        print(f"fastsam: the native library was not built: {error}", file=sys.stderr)
        # A list of architectures that cannot be met is a mistake, never a reason to build less.
        if isinstance(error, ValueError) or "1" in (os.environ.get("FASTSAM_NATIVE"), os.environ.get("FASTSAM_CUDA")):
            raise


class BuildNative(build_ext):
    """Builds the library without setuptools' compiler objects, which know neither instruction sets nor nvcc."""

    def build_extension(self, ext: Extension) -> None:
        """Build, and record the outcome beside the package."""
        build_and_record(Path(self.get_ext_fullpath(ext.name)).resolve())

    def copy_extensions_to_source(self) -> None:
        """For an editable install: the library and the record go into the source tree."""
        super().copy_extensions_to_source()
        shutil.copy(Path(self.build_lib) / "fastsam" / RECORD, ROOT / "fastsam" / RECORD)


if __name__ == "__main__":  # tests import the rules
    setup(
        ext_modules=[Extension("fastsam._C", sources=[], py_limited_api=True, optional=True)],
        cmdclass={"build_ext": BuildNative},
        options={} if free_threaded() else {"bdist_wheel": {"py_limited_api": "cp310"}},
    )
