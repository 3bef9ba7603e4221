"""Promise 9: one install builds what the machine can, from the source distribution too; no compiler, no problem."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
BUILD = "import sys, setuptools.build_meta as backend; print(getattr(backend, sys.argv[1])(sys.argv[2]))"
PARTS = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md")


def build(what: str, tree: Path, out: Path, **env: str) -> Path:
    out.mkdir(exist_ok=True)
    command = [sys.executable, "-c", BUILD, what, str(out)]
    subprocess.run(command, cwd=tree, env=os.environ | env, check=True, capture_output=True, text=True)
    (built,) = out.iterdir()
    return built


def run_installed(wheel: Path, site: Path, code: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # -S leaves out .pth files, by which an editable install of this tree would lend its library.
    command = [sys.executable, "-S", "-c", code]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), str(Path(torch.__file__).parents[1])])}
    return subprocess.run(command, cwd=site, env=env, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, built from a copy of the tree without anything compiled."""
    if not (ROOT / "setup.py").is_file():
        pytest.skip("the tests are not run from a source tree")
    tree = tmp_path_factory.mktemp("tree")
    for name in PARTS:
        shutil.copy(ROOT / name, tree)
    for name in ("fastsam", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build.txt"))
    (tree / "tests").mkdir()
    return build("build_sdist", tree, tmp_path_factory.mktemp("sdist"))


@pytest.fixture
def unpacked(sdist: Path, tmp_path: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (root,) = (tmp_path / "unpacked").iterdir()
    return root


def test_sdist_holds_the_sources(unpacked):
    wanted = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    wanted |= {"fastsam/py.typed", "LICENSE", "setup.py"}
    missing = {name for name in wanted if not (unpacked / name).is_file()}
    assert not missing


@pytest.mark.slow
def test_wheel_from_the_sdist_has_the_library_for_every_python(unpacked, tmp_path):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    quick = tmp_path / "c++"  # what is asked is whether it is built, not how well
    quick.write_text(f'#!/bin/sh\nexec "{compiler}" "$@" -O0\n')
    quick.chmod(0o755)
    wheel = build("build_wheel", unpacked, tmp_path / "wheel", FASTSAM_NATIVE="1", FASTSAM_CUDA="0", CXX=str(quick))
    assert "-cp310-abi3-" in wheel.name
    code = "import fastsam, torch; from fastsam.ops import native; print(native.reason(), fastsam.__file__)"
    printed = run_installed(wheel, tmp_path / "site", code)
    assert printed.split() == ["None", str(tmp_path / "site" / "fastsam" / "__init__.py")]


def test_without_a_compiler_the_reference_works_and_says_why(unpacked, tmp_path):
    wheel = build(
        "build_wheel", unpacked, tmp_path / "wheel", FASTSAM_NATIVE="", FASTSAM_CUDA="0", CXX="no-such-compiler"
    )
    code = """if True:
        import fastsam, torch
        w = torch.nn.Parameter(torch.ones(3))
        optimizer = fastsam.FusedSAM([w], lr=0.5)
        w.square().sum().backward()
        optimizer.first_step(zero_grad=True)
        w.square().sum().backward()
        optimizer.step()
        print(*optimizer.backend.values(), bool((w < 0.5).all()), fastsam.ops.backends()["cpu"])
    """
    printed = run_installed(wheel, tmp_path / "site", code)
    assert printed.startswith("reference True")
    assert "pip install" in printed
    assert "no-such-compiler" in (tmp_path / "site" / "fastsam" / "_build.txt").read_text()


def test_a_free_threaded_python_gets_the_reference(unpacked, tmp_path):
    """It has no limited API, which setuptools refuses, too: the wheel is its own and says why it has no library."""
    pretend = "import sysconfig; sysconfig.get_config_vars()['Py_GIL_DISABLED'] = 1; "
    command = [sys.executable, "-c", pretend + BUILD, "build_wheel", str(tmp_path / "wheel")]
    (tmp_path / "wheel").mkdir()
    subprocess.run(command, cwd=unpacked, env=os.environ | {"FASTSAM_NATIVE": ""}, check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheel").iterdir()
    assert "abi3" not in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        assert "free-threaded" in archive.read("fastsam/_build.txt").decode()


def test_a_build_that_must_succeed_fails_with_the_reason(unpacked, tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as failed:
        build("build_wheel", unpacked, tmp_path / "wheel", FASTSAM_NATIVE="1", CXX="no-such-compiler")
    assert "no-such-compiler" in failed.value.stderr


# --- what the CUDA kernels are built for -----------------------------------------------------------------------------

KNOWN = [75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121]  # of nvcc 13
OLD = [50, 52, 60, 70, 75, 80, 86, 87, 89, 90]  # of nvcc 12
GPUS, NONE = "the GPUs of this machine", "no GPU that it serves was visible"


@pytest.fixture
def setup():
    """setup.py as a module."""
    if not (ROOT / "setup.py").is_file():
        pytest.skip("the tests are not run from a source tree")
    spec = importlib.util.spec_from_file_location("setup_of_fastsam", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "wish, gpus, known, code, ptx",
    [
        ("", [90], KNOWN, "90", "80"),
        ("", [90, 90, 86], KNOWN, "86 90", "80"),
        ("", [75, 120], KNOWN, "75 120", "75"),
        ("", [103], KNOWN, "103", "100"),
        ("", [120], OLD, "", "80"),  # newer than nvcc: the newest PTX that it makes
        ("", [86, 130], KNOWN, "86", "80 120"),
        ("", [61, 89], KNOWN, "89", "80"),
        ("", [61], KNOWN, "", "75"),
        ("", [], KNOWN, "", "75"),
        ("", [], [80, 90, 100], "", "80"),
        (" ", [], OLD, "", "75"),
        ("9.0", [75], KNOWN, "90", ""),
        ("8.0;9.0+PTX", [], KNOWN, "80 90", "80"),
        ("10.0+PTX 7.5", [], KNOWN, "75 100", "100"),
        ("9.0a, 8.6", [], KNOWN, "86 90a", ""),
        ("9.0a+PTX", [], KNOWN, "90a", "90a"),
        ("6.1;7.5;12.0+PTX;", [], KNOWN, "75 120", "120"),
        ("all", [90], KNOWN, "75 80 86 89 90 100 120", "75 80 100 120"),
        ("All", [], OLD, "75 80 86 89 90", "75 80"),
    ],
)
def test_what_is_compiled_for(setup, wish, gpus, known, code, ptx):
    targets = setup.targets_for(wish, gpus, known)
    assert (" ".join(targets.machine_code), " ".join(targets.ptx)) == (code, ptx)
    why = f"TORCH_CUDA_ARCH_LIST={wish.strip().replace('All', 'all')}" if wish.strip() else None
    assert targets.why == (why or (GPUS if any(gpu >= 75 for gpu in gpus) else NONE))
    assert str(targets).startswith(" ".join([f"sm_{a}" for a in code.split()] + [f"compute_{a}" for a in ptx.split()]))


def test_the_options_of_nvcc(setup):
    targets = setup.targets_for("8.6;9.0a;10.3+PTX", [], KNOWN)
    assert targets.flags(KNOWN) == [
        "-gencode=arch=compute_80,code=sm_86",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_103",
        "-gencode=arch=compute_100,code=compute_100",
    ]


@pytest.mark.parametrize(
    "wish, message",
    [
        ("Hopper", '"Hopper" is neither "all" nor a compute capability'),
        ("9.0;90", '"90" is neither'),
        ("9.0;14.2", "this nvcc does not know 14.2; it compiles for 7.5, 8.0, 8.6"),
        ("6.1 7.0", "no GPU of these is served"),
    ],
)
def test_a_list_that_cannot_be_met_is_an_error(setup, wish, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        setup.targets_for(wish, [], KNOWN)


def test_an_nvcc_that_is_too_old_leaves_cuda_out(setup):
    with pytest.raises(RuntimeError, match="7.5 or newer"):
        setup.targets_for("", [], [50, 70])


def test_one_front_end_serves_where_the_sources_ask_for_no_other(setup):
    asked = set()
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".h", ".cu"):
            asked |= set(re.findall(r"(?:kArch|__CUDA_ARCH__)\s*[<>=!]+\s*([1-9]\d*)", path.read_text()))
    assert asked <= {str(10 * arch) for arch in setup.FRONT_ENDS}


LIBCUDA = """
int cuInit(unsigned flags) { return FAILS; }
int cuDeviceGetCount(int* count) { *count = 2; return 0; }
int cuDeviceGet(int* device, int i) { *device = 40 + i; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? (device == 40 ? 9 : 12) : attribute == 76 ? (device == 40 ? 0 : 1) : -1;
  return 0;
}
"""


@pytest.mark.parametrize("fails", [0, 100])
def test_gpus_are_those_of_the_driver_else_of_nvidia_smi(setup, tmp_path, monkeypatch, fails):
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("there is no C compiler")
    (tmp_path / "cuda.c").write_text(LIBCUDA.replace("FAILS", str(fails)))
    library = tmp_path / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", str(tmp_path / "cuda.c"), "-o", str(library)], check=True)
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\n[ $1 = --query-gpu=compute_cap ] && printf '8.6\\n10.3\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert setup.gpus_of_this_machine(str(library)) == ([86, 103] if fails else [90, 121])
    assert setup.gpus_of_this_machine("no-such-library.so") == [86, 103]
    tool.write_text("#!/bin/sh\necho NVIDIA-SMI has failed because it could not communicate; exit 9\n")
    assert setup.gpus_of_this_machine("no-such-library.so") == []


@pytest.mark.parametrize("ninja", [True, False])
def test_progress_is_a_line_a_file_as_it_is_compiled(setup, tmp_path, monkeypatch, capsys, ninja):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or (ninja and shutil.which("ninja") is None):
        pytest.skip("there is no C++ compiler, or no ninja")
    monkeypatch.setattr(setup, "CSRC", tmp_path)
    monkeypatch.setattr(setup, "OBJECTS", tmp_path / "objects")
    if not ninja:
        monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    jobs = []
    for name, target in [("one.cpp", "one.o"), ("two.cpp", "two_avx2.o")]:
        (tmp_path / name).write_text("int f();")
        jobs.append(setup.Job(tmp_path / name, tmp_path / target, [compiler, "-c", str(tmp_path / name)]))
    setup.compile_all(jobs)
    lines = capsys.readouterr().out.splitlines()
    assert [re.sub(r"[\d.]+ s\]", "", line)[:6] for line in lines] == ["[1/2, ", "[2/2, "]
    assert {line.split("] ")[1] for line in lines} == {"one.cpp", "two.cpp (avx2)"}
    (tmp_path / "one.cpp").write_text("int f() { return missing; }")
    with pytest.raises(RuntimeError, match="missing"):
        setup.compile_all(jobs)


def test_the_record_says_what_was_built_for_and_a_wrong_list_is_never_skipped(setup, tmp_path, monkeypatch):
    (tmp_path / "nvcc").write_text(
        "#!/bin/sh\n"
        '[ "$1" = --list-gpu-arch ] && printf "compute_75\\ncompute_80\\ncompute_90\\n"\n'
        '[ "$1" = --version ] && echo "Cuda compilation tools, release 13.9, V13.9.1"\nexit 0\n'
    )
    (tmp_path / "nvcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name in ("FASTSAM_NATIVE", "FASTSAM_CUDA", "FASTSAM_SANITIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(setup, "compile_all", lambda jobs: None)  # and that nvcc links nothing
    monkeypatch.setattr(setup, "find_compiler", lambda: ["/bin/echo"])
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    setup.build_and_record(tmp_path / "package" / "_C.abi3.so")
    record = (tmp_path / "package" / "_build.txt").read_text()
    assert record.endswith("\nCUDA kernels: nvcc 13.9, sm_80 sm_90 compute_80 (TORCH_CUDA_ARCH_LIST=8.0;9.0+PTX)\n")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.9.0")
    with pytest.raises(ValueError, match="8.9.0"):
        setup.build_and_record(tmp_path / "package" / "_C.abi3.so")
    assert "not built: TORCH_CUDA_ARCH_LIST=8.9.0" in (tmp_path / "package" / "_build.txt").read_text()
    monkeypatch.setenv("FASTSAM_CUDA", "0")
    setup.build_and_record(tmp_path / "package" / "_C.abi3.so")
    assert "CUDA kernels: none" in (tmp_path / "package" / "_build.txt").read_text()
