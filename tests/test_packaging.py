"""Promise 9: one install builds what the machine can, from the source distribution too; no compiler, no problem."""

from __future__ import annotations

import os
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
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("there is no C++ compiler")
    wheel = build("build_wheel", unpacked, tmp_path / "wheel", FASTSAM_NATIVE="1", FASTSAM_CUDA="0")
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


def test_a_build_that_must_succeed_fails_with_the_reason(unpacked, tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as failed:
        build("build_wheel", unpacked, tmp_path / "wheel", FASTSAM_NATIVE="1", CXX="no-such-compiler")
    assert "no-such-compiler" in failed.value.stderr
