"""Time of the optimizer's part of a SAM step over the number of parameters, and over the number of tensors.

    python benchmarks/scaling.py --json                 # 10,000 parameters to 1e9, as memory allows; 3 to 9,000 tensors
    python benchmarks/scaling.py --quick --json FILE    # one process, few rounds, up to 1e7 parameters

SGD with momentum in float32. Contenders: FusedSAM, the formula one tensor at a time, the best that lists of tensors
give (rivals.py), and the fused base optimizer alone, which is no SAM. Parity is checked before a time is taken; they
take turns within a round, in bursts where a step is short; medians over fresh processes.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from cases import Case, Problem
from devices import device_named
from documents import begun, busiest_of, keep, path_of, was_quiet
from ratios import across, paired_ratio
from rivals import RIVALS, Fastsam, backends_for
from shapes import ELEMENTS, TENSORS, shapes_of
from step import check_parity, rounded
from table import LABELS, MISSING, environment_line, markdown
from timing import available_memory, fresh_processes, interleave, others

OWN = "fastsam"
AGAINST = ("eager", "foreach_alpha", "base_fused")
# An element's weight and two gradients; weight, backup, momentum and a temporary of each contender.
BYTES = 12 + 16 * (1 + len(AGAINST))
BURST_ELEMENTS = 2_000_000  # a burst steps about so many
PROCESSES, ROUNDS, WARMUP = 3, 9, 2
QUICK_ELEMENTS, QUICK_TENSORS = ELEMENTS[:4], TENSORS[::2]


def work(model: str, rounds: int, device_name: str, threads: int) -> dict[str, Any]:
    """Times of one size, in this process."""
    torch.set_num_threads(threads)
    device = device_named(device_name)
    needed, available = BYTES * sum(map(math.prod, shapes_of(model))), available_memory()
    if not device.gpu and available is not None and needed > available:
        raise SystemExit(f"it needs {needed / 2**30:.0f} GiB, {available / 2**30:.0f} are there")
    problem = Problem(model, Case(), device.torch)
    backend = backends_for(device.torch, torch.float32)[0]
    steppers = [Fastsam(OWN, problem, backend), *(RIVALS[name](problem) for name in AGAINST)]
    problem.start.clear()
    check_parity(steppers)
    burst = max(1, min(20, BURST_ELEMENTS // problem.elements))
    start, before = time.perf_counter(), others()
    times = interleave(steppers, device.clock(), rounds, WARMUP, burst)
    taken = (others() - before) / (time.perf_counter() - start)
    return {
        "tensors": len(problem.shapes),
        "elements": problem.elements,
        "times": rounded(times),
        "cores_taken": round(taken, 2),
    }


def measure(args: argparse.Namespace, model: str) -> dict[str, Any] | None:
    """One size in fresh processes; None where memory cannot hold it."""
    arguments = [str(Path(__file__)), "--model", model, "--device", args.device, "--threads", str(args.threads)]
    try:
        found = fresh_processes([*arguments, "--rounds", str(args.rounds)], args.processes, args.threads)
    except SystemExit as error:
        print(f"{model} is left out: {error}", file=sys.stderr)
        return None
    return {
        "model": model,
        "tensors": found[0]["tensors"],
        "elements": found[0]["elements"],
        "cores_taken": [process["cores_taken"] for process in found],
        "processes": [process["times"] for process in found],
    }


def series(document: Mapping[str, Any], kind: str) -> list[Mapping[str, Any]]:
    """The results of one series, "elements" or "tensors"."""
    return [result for result in document["results"] if result["model"].startswith(kind)]


def render(document: Mapping[str, Any]) -> str:
    """Two tables, and what belongs to them."""
    parts = []
    for kind, title in (("elements", "parameters, in 16 tensors"), ("tensors", "tensors of 1,000 elements")):
        rows = []
        for result in series(document, kind):
            row = [f"{result[kind]:,}", f"{1e3 * across(result['processes'], OWN)['median']:.3g}"]
            for rival in AGAINST:
                there = rival in result["processes"][0]
                ratio = paired_ratio(result["processes"], rival, OWN)["median"] if there else None
                row.append(MISSING if ratio is None else f"{ratio:.2f}")
            rows.append(row)
        titles = [f"{LABELS[name]} / FusedSAM" for name in AGAINST]
        parts.append(markdown([title, "FusedSAM, ms", *titles], rows))
    count = len(document["results"][0]["processes"])
    processes = "one process" if count == 1 else f"{count} fresh processes"
    parts.append(
        "Optimizer's part of a step, SGD with momentum, float32; parity checked first, medians of "
        f"{processes}, ratios are of times in the same round. {environment_line(document)}"
    )
    return "\n\n".join([*parts, f"To repeat: `{document['command']}`"])


def main() -> None:
    """Measure every size, print the tables, keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--processes", type=int, help=f"fresh processes a size [{PROCESSES}]")
    parser.add_argument("--rounds", type=int, help=f"rounds in a process [{ROUNDS}]")
    parser.add_argument("--quick", action="store_true", help="one process, three rounds, fewer sizes")
    parser.add_argument("--json", nargs="?", const="", metavar="FILE", help="keep the result [benchmarks/results/...]")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.processes = args.processes or (1 if args.quick else PROCESSES)
    args.rounds = args.rounds or (3 if args.quick else ROUNDS)
    if args.worker:
        args.worker.write_text(json.dumps(work(args.model, args.rounds, args.device, args.threads)))
        return

    device = device_named(args.device)
    document = begun(device, args.threads) | {"results": []}
    elements, tensors = (QUICK_ELEMENTS, QUICK_TENSORS) if args.quick else (ELEMENTS, TENSORS)
    for model in [*(f"elements{count}" for count in elements), *(f"tensors{count}" for count in tensors)]:
        result = measure(args, model)
        document["results"] += [] if result is None else [result]
    keep(document, path_of(document, args.json, "scaling"))
    print(render(document))
    was_quiet(busiest_of(document))


if __name__ == "__main__":
    main()
