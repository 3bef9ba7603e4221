"""What FusedSAM launches in a step, and what that costs the host, by the number of tensors.

    python benchmarks/launches.py --device cuda --json FILE
    python benchmarks/launches.py --device cpu --json FILE        # operations instead of kernels: the same keys

A kernel's arguments grow with the number of tensors: 100 fit the small ones, 1,000 and 4,000 the large ones, of 9,000
the addresses go through a table that further launches write. Every backend reports, for tensors of 8 elements:

    kernels      launches on the GPU (on a CPU: operations dispatched) of one step
    names        which, and how often
    host_us      wall time of first_step() and step() together; nothing is waited for
    closure_us   wall time of step(closure) with a closure that does nothing
    profiler_us  CPU time of the profiler's range around that step, which measuring prolongs
    gap_us       from one kernel's end to the next one's begin, all queued before the first begins; null on a CPU
"""

import argparse
import collections
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import Case, Problem
from devices import Cpu, HostClock, device_named
from rivals import Fastsam, Stepper, kernel_backends
from shapes import SHRUNK, TINY
from timing import environment
from torch import Tensor

MODELS = [f"tiny{count}" for count in TINY]
RANGE = "Optimizer.step#FusedSAM.step"  # torch puts it around every optimizer's step
WARMUP, STEPS = (1, 2) if SHRUNK else (10, 50)


class Closure:
    """A contender whose whole step, through `step(closure)` with a closure that does nothing, is timed."""

    def __init__(self, stepper: Stepper) -> None:
        """Hand over gradients once: the closure leaves them as they are."""
        self.name = stepper.name
        self.stepper = stepper
        stepper.prepare_first()
        self.loss = torch.zeros(())

    def prepare_first(self) -> None:
        """Nothing: the gradients stay."""

    def first(self) -> None:
        """The whole step."""
        self.stepper.step(self._closure)

    def _closure(self) -> Tensor:
        return self.loss

    def prepare_second(self) -> None:
        """Nothing: the gradients stay."""

    def second(self) -> None:
        """Nothing: the step is done."""


def operations(events: list[Any]) -> list[str]:
    """Operations that Python dispatched; what an operation calls itself is left out."""
    found = []
    for event in events:
        ancestor = event.cpu_parent
        while ancestor is not None and not _is_operation(ancestor.name):
            ancestor = ancestor.cpu_parent
        if _is_operation(event.name) and ancestor is None:
            found.append(event.name)
    return found


def _is_operation(name: str) -> bool:
    return name.startswith(("aten::", "fastsam::"))


def whole_step(stepper: Stepper) -> None:
    """Both parts, gradients included."""
    stepper.prepare_first()
    stepper.first()
    stepper.prepare_second()
    stepper.second()


def measure(model: str, backend: str, device: Cpu) -> dict[str, Any]:
    """The keys above, of one backend."""
    stepper = Fastsam(backend, Problem(model, Case(), device.torch), backend)
    # The same gradients in both passes from now on: handing over thousands would take time between the two, and a table
    # of other addresses would be sent to the GPU once more.
    closure = Closure(stepper)
    for _ in range(WARMUP):
        stepper.first()
        stepper.second()
        closure.first()

    events = device.profile(lambda: _queued(stepper, device))
    if device.gpu:
        own = device.kernels(events)[1:]  # without the sleep
        names = [event.name[:80] for event in own]
        gaps = [after.time_range.start - before.time_range.end for before, after in zip(own, own[1:], strict=False)]
    else:
        names, gaps = [name for name in operations(events) if name.startswith("fastsam::")], []
    ranges = [event.cpu_time_total for event in device.profile(closure.first) if event.name == RANGE]
    return {
        "kernels": len(names),
        "names": dict(collections.Counter(names)),
        "host_us": _micros(lambda: (stepper.first(), stepper.second()), device),
        "closure_us": _micros(closure.first, device),
        "profiler_us": round(max(ranges), 1),
        "gap_us": round(statistics.median(gaps), 2) if gaps else None,
    }


def _queued(stepper: Stepper, device: Cpu) -> None:
    """A step whose kernels all wait behind something that takes a while, so that no gap between them is the host's."""
    device.hold()
    stepper.first()
    stepper.second()


def _micros(work: Callable[[], Any], device: Cpu) -> float:
    """Median wall time of `work`."""
    clock = HostClock(device)
    times = []
    for turn in range(STEPS):
        if turn % 10 == 0:
            clock.settle()
        times.append(clock(work))
    return round(1e6 * statistics.median(times), 1)


def main() -> None:
    """Measure every number of tensors on every backend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = device_named(args.device)
    document: dict[str, Any] = {"environment": environment(device, torch.get_num_threads()), "launches": {}}
    for model in args.models:
        document["launches"][model] = found = {}
        for backend in kernel_backends(device.torch, torch.float32):
            try:
                found[backend] = measure(model, backend, device)
            except Exception as error:  # the other backend is still to come
                found[backend] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
            print(model, backend, json.dumps(found[backend]), flush=True)
            if args.json:
                args.json.write_text(json.dumps(document) + "\n")
    sys.exit(any("error" in one for backends in document["launches"].values() for one in backends.values()))


if __name__ == "__main__":
    main()
