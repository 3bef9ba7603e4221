"""Libraries whose CUDA kernels were compiled with other choices (csrc/cuda/choices.h): built, compared, timed.

    TORCH_CUDA_ARCH_LIST=9.0 python benchmarks/variants.py build          # all of `VARIANTS`, for an H200
    python benchmarks/variants.py measure --device cuda --json FILE       # those that are there

`build` needs no GPU. Each library goes to build/carried/NAME, with its record beside it; "default" is what an
installation builds. `measure` has a process for each, since torch knows one library at a time: FASTSAM_LIBRARY in its
environment says which. All of them take a case together, compare weights and states after two steps, which must have
the same bits, and then take turns, in another order each round: compared are times of the same round.
"""

import argparse
import contextlib
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = ROOT / "build" / "carried"
FILE = "_C.abi3.so"
VARIANTS: dict[str, dict[str, int]] = {
    "default": {},
    "prefetch": {"FASTSAM_PREFETCH": 1},
    "part32": {"FASTSAM_LEAST_PART": 32},
    "whole": {"FASTSAM_LEAST_PART": 8192},  # no chunk is divided
    "resident": {"FASTSAM_RESIDENT_NORM": 1},
    "plain": {"FASTSAM_PLAIN_ACCESS": 1},
    "descending": {"FASTSAM_DESCENDING_UPDATE": 1},
}
CASES = ["resnet50-sgd-float32", "resnet50-adamw-float32", "resnet50-sgd-bfloat16", "resnet18-sgd-float32"]
CASES += ["resnet18-adamw-bfloat16", "vit_l16-adamw-float32"]
PARTS = ("first", "second")  # of a step: norm and perturbation, update
STEPS = 5  # of a turn, after one that warms up


def build(names: list[str]) -> None:
    """Build these libraries, and say how long each took and how large it is."""
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "9.0")
    os.environ |= {"FASTSAM_NATIVE": "1", "FASTSAM_CUDA": "1"}
    sys.path.insert(0, str(ROOT))
    setup = importlib.import_module("setup")
    rows = []
    for name in names:
        begun, library = time.monotonic(), LIBRARIES / name / FILE
        setup.build_and_record(library, VARIANTS[name])
        rows.append(f"{name:12s} {time.monotonic() - begun:6.0f} s {library.stat().st_size / 2**20:6.2f} MiB")
    print("\n".join(rows))


class Process:
    """A process with one of the libraries, which does one thing at a time."""

    def __init__(self, library: Path, device: str) -> None:
        """Start it; what it says first is whether its library can be used."""
        command = [sys.executable, __file__, "work", "--device", device]
        env = {**os.environ, "FASTSAM_LIBRARY": str(library)}
        self.pipe = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def tell(self, *request: Any) -> None:
        """Ask for something, without waiting: a method of `Worker` and its arguments."""
        assert self.pipe.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `answer` says that it ended
            print(json.dumps(request), file=self.pipe.stdin, flush=True)

    def answer(self) -> dict[str, Any]:
        """Wait for what was asked for; RuntimeError if it failed."""
        assert self.pipe.stdout is not None
        line = self.pipe.stdout.readline()
        found: dict[str, Any] = json.loads(line) if line else {"error": f"ended with status {self.pipe.wait()}"}
        if "error" in found:
            raise RuntimeError(found["error"])
        return found

    def end(self) -> None:
        """Let it go, without waiting."""
        assert self.pipe.stdin is not None
        self.pipe.stdin.close()


class Worker:
    """What such a process does."""

    def __init__(self, device: str) -> None:
        """Import what takes long."""
        from devices import device_named

        self.device = device_named(device)
        self.clock = self.device.clock()
        self.stepper: Any = None

    def begin(self) -> dict[str, Any]:
        """Whether the library can be used, and what it is."""
        from fastsam import ops
        from fastsam.commands.diagnosis import build_record

        backend = self.device.backend
        if (why := ops.backends()[backend]) is not None:
            raise RuntimeError(f"backend={backend!r}: {why}")
        return {"record": (build_record() or "").splitlines()}

    def take(self, case: str) -> dict[str, Any]:
        """Two steps of a case; a checksum of all weights and states."""
        from cases import Problem
        from launches import whole_step
        from rivals import Fastsam
        from step import case_of

        self.stepper = None
        self.device.free()
        model, what = case_of(case)
        problem = Problem(model, what, self.device.torch)
        self.stepper = Fastsam("fastsam", problem, self.device.backend)
        problem.start.clear()
        for _ in range(2):
            whole_step(self.stepper)
        states = [value for state in self.stepper.optimizer.state.values() for value in state.values()]
        return {"checksum": checksum([*self.stepper.params, *states]), "bytes": problem.ideal_bytes()}

    def time(self) -> dict[str, Any]:
        """Seconds of both parts of a step: a turn's."""
        self.clock.settle()
        found: list[tuple[float, float]] = []
        for _ in range(1 + STEPS):
            self.stepper.prepare_first()
            first = self.clock(self.stepper.first)
            self.stepper.prepare_second()
            found.append((first, self.clock(self.stepper.second)))
        return {"first": [first for first, _ in found[1:]], "second": [second for _, second in found[1:]]}

    def kernels(self) -> dict[str, Any]:
        """Microseconds of each kernel of a step, by its name: medians of some steps without a pause."""
        from launches import whole_step

        def steps() -> None:
            for _ in range(STEPS):
                whole_step(self.stepper)

        times: dict[str, list[float]] = {}
        for event in self.device.kernels(self.device.profile(steps)):
            times.setdefault(event.name[:100], []).append(event.time_range.elapsed_us())
        return {name: round(statistics.median(each), 2) for name, each in times.items()}


def checksum(tensors: list[Any]) -> int:
    """A number that tells other bits, and bits in other places, by all odds."""
    import torch

    total = 0
    for tensor in tensors:
        kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        bits = tensor.detach().contiguous().view(-1).view(kinds[tensor.element_size()]).to(torch.int64)
        place = torch.arange(1, bits.numel() + 1, device=bits.device)
        total = (total * 1_000_003 + int((bits * (place % 65_521)).sum())) % 2**61
    return total


def work(device: str) -> None:
    """Answer each line of the input by a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed goes there
    worker = Worker(device)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            found = getattr(worker, name)(*arguments)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        print(json.dumps(found), file=answers, flush=True)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All libraries that are there, on all cases that the budget has room for."""
    end = time.monotonic() + args.budget
    document: dict[str, Any] = {"variants": {}, "failures": {}, "libraries": {}}
    if args.json and args.json.is_file():  # an earlier run's, of which only what failed is run again
        known = json.loads(args.json.read_text())["variants"]
        document["variants"] = {case: found for case, found in known.items() if found}
    cases = [case for case in args.cases if case not in document["variants"]]
    found = [name for name in VARIANTS if (args.libraries / name / FILE).is_file()]
    processes = {name: Process(args.libraries / name / FILE, args.device) for name in found}
    started = together(processes, document["failures"], "start", "begin")
    document["libraries"] = {name: answer["record"] for name, answer in started.items()}
    for case in cases:
        if time.monotonic() > end:
            document["failures"][f"variants of {case}"] = f"left out, the {args.budget} s are over"
        else:
            alive = {name: processes[name] for name in started if processes[name].pipe.poll() is None}
            document["variants"][case] = compare(alive, case, args.rounds, document["failures"])
            print(case, json.dumps(document["variants"][case]), flush=True)
        if args.json:
            args.json.write_text(json.dumps(document) + "\n")
    for process in processes.values():
        process.end()
    for process in processes.values():
        process.pipe.wait(timeout=30)
    if "default" not in started:
        document["failures"]["variants"] = "the library with the default choices is not there, or cannot be used"
    return document


def together(
    processes: dict[str, Process], failures: dict[str, str], what: str, *request: Any
) -> dict[str, dict[str, Any]]:
    """Ask all for the same, at the same time; the answers of those that have one."""
    answers = {}
    for process in processes.values():
        process.tell(*request)
    for name, process in processes.items():
        try:
            answers[name] = process.answer()
        except RuntimeError as error:
            failures[f"{name}: {what}"] = str(error)
    return answers


def compare(processes: dict[str, Process], case: str, rounds: int, failures: dict[str, str]) -> dict[str, Any]:
    """Microseconds of both parts of a step, and their ratios to the default's of the same round."""
    taken = together(processes, failures, case, "take", case)
    if "default" not in taken:
        return {}
    right = taken["default"]["checksum"]
    for name, answer in taken.items():
        if answer["checksum"] != right:
            failures[f"{name}: {case}"] = "no times: other bits than the default's"
    ready = {name: processes[name] for name in taken if taken[name]["checksum"] == right}
    rows: list[dict[str, dict[str, float]]] = []
    for turn in range(rounds):
        row = {}
        for name in random.Random(turn).sample(list(ready), len(ready)):
            answer = together({name: ready[name]}, failures, case, "time").get(name)
            if answer is None:
                return {}
            row[name] = {part: statistics.median(answer[part]) for part in PARTS}
        rows.append(row)
    kernels = {}
    for name, process in ready.items():  # one after the other: they have the GPU to themselves
        kernels |= together({name: process}, failures, case, "kernels")
    return {
        name: {
            "bytes": taken[name]["bytes"],
            **{f"{part}_us": round(1e6 * statistics.median(row[name][part] for row in rows), 2) for part in PARTS},
            "over_default": {
                part: round(statistics.median(row[name][part] / row["default"][part] for row in rows), 4)
                for part in PARTS
            },
            "kernels_us": kernels.get(name, {}),
        }
        for name in ready
    }


def main() -> None:
    """Build, or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    building = commands.add_parser("build")
    building.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(VARIANTS)} [all]")
    measuring = commands.add_parser("measure")
    measuring.add_argument("--libraries", type=Path, default=LIBRARIES, help="folder with one folder for each")
    measuring.add_argument("--cases", nargs="+", default=CASES, metavar="MODEL-BASE-DTYPE")
    measuring.add_argument("--rounds", type=int, default=5)
    measuring.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no case is started")
    measuring.add_argument("--json", type=Path)
    for command in (measuring, commands.add_parser("work")):
        command.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.command == "build":
        build(args.names or list(VARIANTS))
    elif args.command == "work":
        work(args.device)
    else:
        document = measure(args)
        if args.json:
            args.json.write_text(json.dumps(document) + "\n")
        sys.exit(bool(document["failures"] or not document["variants"]))


if __name__ == "__main__":
    main()
