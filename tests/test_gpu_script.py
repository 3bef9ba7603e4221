"""`benchmarks/gpu.sh`, which runs once on a machine that is lent for minutes: nothing of it fails for a silly reason.

Its python is a stand-in that writes down what it is asked to run. `benchmarks/gpu.sh OUT --device stub` runs it all.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT, GATHER = ROOT / "benchmarks" / "gpu.sh", ROOT / "benchmarks" / "gather.py"
STAND_INS = ROOT / "benchmarks" / "standins"  # for nvidia-smi and compute-sanitizer
pytestmark = [
    pytest.mark.skipif(not SCRIPT.is_file(), reason="the tests are not run from a source tree"),
    pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash"),
]
# Gives the GPU that it is asked for, and fails at what $FAILS names. Where $GATHERS says so it runs gather.py indeed.
PYTHON = """#!{python} -IS
import json, os, sys
arguments = sys.argv[1:]
if arguments[0] == "benchmarks/gather.py" and os.environ["GATHERS"]:
    os.execv({python!r}, [{python!r}, *arguments])
with open({log!r}, "a") as file:
    print(json.dumps(arguments), file=file)
if "get_device_capability" in arguments[-1]:
    print("9.0")
if os.environ["FAILS"] in arguments:
    sys.exit("it fails")
if "FusedSAM" in arguments[1] and "stale" in os.environ.get("FASTSAM_LIBRARY", ""):
    sys.exit("it was built from other sources")
"""
# Lets every program of the benchmarks parse its command line, and ends it there.
PARSE = """
import argparse, json, runpy, sys
def parse_args(parser, parse=argparse.ArgumentParser.parse_args):
    parse(parser)
    sys.exit()
argparse.ArgumentParser.parse_args = parse_args
sys.path.insert(0, "benchmarks")
for line in sys.stdin:
    sys.argv = json.loads(line)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        assert not end.code, sys.argv
"""


def run(folder, device, *options, fails="", gathers=False, library="carried"):
    """Output of the script, and what it asked its python to run."""
    log, programs = folder / "log", folder / "bin"
    programs.mkdir(exist_ok=True)
    log.write_text("")
    (programs / "python3").write_text(PYTHON.format(python=sys.executable, log=str(log)))
    (programs / "python3").chmod(0o755)
    built = folder / library
    built.mkdir(exist_ok=True)
    (built / "_C.abi3.so").touch()
    (built / "_build.txt").write_text("CUDA kernels: nvcc 13.0, sm_90 (TORCH_CUDA_ARCH_LIST=9.0)")
    env = {**os.environ, "FASTSAM_LIBRARY": str(built / "_C.abi3.so")}
    env["PATH"] = f"{programs}:{STAND_INS}:{os.environ['PATH']}"
    command = ["bash", str(SCRIPT), str(folder / "out"), "--device", device, *options]
    env |= {"FAILS": fails, "GATHERS": "yes" * gathers}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    return done, [json.loads(line) for line in log.read_text().splitlines()]


def sections(output):
    return re.findall(r"^== ([\w-]+): (?!in the results)", output, flags=re.MULTILINE)


def known_sections():
    return re.search(r'^SECTIONS = """(.*?)"""', GATHER.read_text(), flags=re.MULTILINE | re.DOTALL)[1].split()


def test_every_device_has_every_section_and_all_that_they_run_is_there(tmp_path):
    benchmarks = []
    for device in ("cuda", "cpu", "stub"):
        (tmp_path / device).mkdir()
        done, commands = run(tmp_path / device, device)
        assert sections(done.stdout) == known_sections(), done.stderr
        assert re.findall(r"status (\d+)", done.stdout) == ["0"] * len(known_sections())
        benchmarks += [command for command in commands if command[0].startswith("benchmarks/")]
        tests = [command[2:] for command in commands if command[:2] == ["-m", "pytest"]]
        assert len(tests) == (6 if device == "cpu" else 3)  # there also in the place of the sanitizers
        for words in tests:
            names = [word for word in words if word.startswith("tests/")]
            assert all((ROOT / name).is_file() for name in names)
            if device == "cpu" and "-k" in words:
                chosen = words[words.index("-k") + 1].removeprefix("test_").split(" or ")
                assert all(re.search(rf"def test_\w*{word}", (ROOT / names[0]).read_text()) for word in chosen), chosen
    for name, least in {"step": 15, "launches": 3, "train": 3, "variants": 3, "sanitize": 6, "gather": 48}.items():
        assert sum(command[0] == f"benchmarks/{name}.py" for command in benchmarks) >= least
    lines = dict.fromkeys(json.dumps(command) for command in benchmarks)
    command = [sys.executable, "-c", PARSE]
    done = subprocess.run(command, input="\n".join(lines), cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_a_second_run_does_what_the_first_did_not(tmp_path):
    done, _ = run(tmp_path, "stub", fails="benchmarks/train.py", gathers=True)
    assert done.returncode == 1
    found = json.loads((tmp_path / "out" / "results.json").read_text())["sections"]
    assert {name: one["status"] for name, one in found.items()} == {name: name == "train" for name in known_sections()}
    shutil.copytree(tmp_path / "out", tmp_path / "before")
    done, commands = run(tmp_path, "stub", "--rest", str(tmp_path / "before"), gathers=True)
    assert sections(done.stdout) == ["library", "train"]
    assert [command[0] for command in commands if command[0].startswith("benchmarks/")] == ["benchmarks/train.py"]
    found = json.loads((tmp_path / "out" / "results.json").read_text())["sections"]
    assert {name: one["status"] for name, one in found.items()} == dict.fromkeys(known_sections(), 0)


def test_what_ends_a_run_says_why(tmp_path):
    done, _ = run(tmp_path, "stub", fails="tests/test_cuda.py", gathers=True)
    assert done.returncode == 1 and "STOPPED: tests fail; the end of tests.log:\n" in done.stderr
    assert sections(done.stdout) == ["library", "diagnosis", "tests"]
    assert "STOPPED: tests fail" in (tmp_path / "out" / "summary.txt").read_text()
    done, _ = run(tmp_path, "stub", "--go-on", fails="tests/test_cuda.py")
    assert sections(done.stdout) == known_sections()


def test_a_library_that_is_not_used_is_named_with_the_reason(tmp_path):
    done, _ = run(tmp_path, "stub", library="stale")
    file = tmp_path / "stale" / "_C.abi3.so"
    assert f"not used: {file}: it was built from other sources\n" in done.stdout


@pytest.mark.parametrize("wrong", [["--device", "gpu"], ["--quick"]], ids=str)
def test_a_wrong_command_line_runs_nothing(tmp_path, wrong):
    done, commands = run(tmp_path, "stub", *wrong)
    assert done.returncode == 2 and done.stderr.startswith("usage: ") and not commands
