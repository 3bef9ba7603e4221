"""Paired timing, fresh processes and the environment that a number belongs to.

Machines are noisy, so nothing is compared across runs: every round times every contender once, in another order each
round (so that nobody has the same predecessor), and contenders are compared by the ratio of their times *within* a
round (ratios.py).
"""

import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from devices import Cpu, output

CPU_SYSFS = Path("/sys/devices/system/cpu")


class Contender(Protocol):
    """Something to time: what `prepare_*` does is not timed, what `first` and `second` do is."""

    name: str

    def prepare_first(self) -> None:
        """Hand over the gradients of the first pass."""

    def first(self) -> None:
        """The part of the step between the two passes."""

    def prepare_second(self) -> None:
        """Hand over the gradients of the second pass."""

    def second(self) -> None:
        """The part of the step after the second pass."""


class Clock(Protocol):
    """Seconds of a call."""

    def __call__(self, work: Callable[[], None]) -> float:
        """Seconds that `work` takes."""

    def settle(self) -> None:
        """Wait for what somebody else has left to be done."""


def interleave(
    contenders: Sequence[Contender],
    clock: Clock,
    rounds: int,
    warmup: int,
    burst: int = 1,
) -> dict[str, list[float]]:
    """Seconds of every contender in every round; all lists have length `rounds` and pair up by index.

    The garbage collector is off meanwhile: its pauses would land on whoever happens to run.

    Args:
        contenders: what takes part.
        clock: seconds of a call.
        rounds: how many count.
        warmup: how many run before these.
        burst: steps that a contender takes at a time; the median of their times counts. Host time is measured in
            bursts, as the first step after somebody else's pays for the caches that the other one has filled.
    """
    times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(warmup + rounds):
            for contender in random.Random(turn).sample(contenders, len(contenders)):
                clock.settle()
                steps = []
                for _ in range(burst):
                    contender.prepare_first()
                    seconds = clock(contender.first)
                    contender.prepare_second()
                    steps.append(seconds + clock(contender.second))
                if turn >= warmup:
                    times[contender.name].append(statistics.median(steps))
    finally:
        if collecting:
            gc.enable()
    return times


def others() -> float:
    """Core seconds that everything but this process has used so far, 0 where the system does not say.

    A core lost to another process stalls the other threads at the end of their parallel region, a time slice long: on a
    busy machine it is the number of parallel regions that is measured. (Preemptions do not tell: a machine's own
    housekeeping makes dozens a second.)
    """
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system, _idle, _wait, irq, softirq, steal = (int(field) for field in fields[:8])
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    own = os.times()
    return busy - own.user - own.system


def fresh_processes(arguments: Sequence[str], count: int, threads: int) -> list[dict[str, Any]]:
    """Run `python <arguments> --worker FILE` `count` times, one after the other; what each wrote as JSON.

    A worker that refuses (a parity failure) ends everything with its own message and exit status.
    """
    # One thread count for every pool; sets what torch and OpenMP code started from here agree on.
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "KINETO_LOG_LEVEL": "99"}
    results = []
    for _ in range(count):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "result.json"
            done = subprocess.run([sys.executable, *arguments, "--worker", str(file)], env=env, check=False)
            if done.returncode:
                raise SystemExit(done.returncode)
            results.append(json.loads(file.read_text()))
    return results


def environment(device: Cpu, threads: int) -> dict[str, Any]:
    """What a number on this machine depends on. No host name, user or path: the result is committed."""
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "caches": _caches(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": threads,
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        **_commit(),
    }
    return found | device.facts()


def last_level_cache() -> int:
    """Bytes of the largest cache of the first core; 32 MiB where the system does not say."""
    return max((cache["bytes"] for cache in _caches()), default=32 * 2**20)


def available_memory() -> int | None:
    """Bytes that can be allocated on the host without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    fields = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)  # the last core's
    name = fields.get("model name", platform.processor() or "unknown")
    numbers = [f"{key} {fields[key]}" for key in ("cpu family", "model", "stepping") if key in fields]
    return f"{name} ({', '.join(numbers)})" if numbers else name  # virtual machines shorten the name


def _caches() -> list[dict[str, Any]]:
    caches = []
    for index in sorted(CPU_SYSFS.glob("cpu0/cache/index*")):
        try:
            level, kind, size, shared = (
                (index / name).read_text().strip() for name in ("level", "type", "size", "shared_cpu_list")
            )
        except OSError:
            continue
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(size[-1], 1)
        caches.append({"level": int(level), "type": kind, "bytes": int(size.rstrip("KMG")) * unit, "cores": shared})
    return caches


def _commit() -> dict[str, Any]:
    commit = output("git", "rev-parse", "HEAD")
    # Result files are written by the run itself and say nothing about what was measured.
    dirty = output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md")
    return {"commit": commit, "dirty": dirty != "" if commit else None}
