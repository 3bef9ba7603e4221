"""What each option of FusedSAM adds to the time of its step: every option against plain FusedSAM, in the same rounds.

    python benchmarks/extras.py --json                 # ResNet-50's parameters, SGD: float32, and bfloat16 below it
    python benchmarks/extras.py --quick --json FILE    # ResNet-18's, one process, few rounds

Optimizer's part, gradients given. Before a time is taken, two steps of every option are compared with the reference's,
bit for bit: perturbed weights and stepped ones. Bytes are counted while the reference runs (traffic.py; float32 only).
Contenders take turns in another order each round; medians over fresh processes.
"""

import argparse
import gc
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from cases import Case, Problem
from devices import device_named
from documents import begun, busiest_of, keep, path_of, was_quiet
from ratios import across, paired_ratio
from rivals import Fastsam, backends_for
from step import rounded
from table import MISSING, environment_line, markdown, spread
from timing import fresh_processes, interleave, others
from traffic import Traffic

PLAIN = "plain"
PROCESSES, ROUNDS, WARMUP = 3, 9, 2
EXTRAS: dict[str, dict[str, dict[str, Any]]] = {
    "float32": {
        PLAIN: {},
        "adaptive=True": {"adaptive": True},
        "perturb_with_weight_decay=True": {"perturb_with_weight_decay": True},
        "max_grad_norm=1.0": {"max_grad_norm": 1.0},
        "renormalize=True": {"renormalize": True},
        "ema_decay=0.999": {"ema_decay": 0.999},
        "flatten=True": {"flatten": True},
        "state_dtype=torch.bfloat16": {"state_dtype": torch.bfloat16},
        "p=inf": {"p": math.inf},
        "p=1.5": {"p": 1.5},
    },
    "bfloat16": {
        PLAIN: {},
        "master_weights=True": {"master_weights": True},
        "stochastic_rounding=True": {"stochastic_rounding": True},
        "master_weights=True, ema_decay=0.999": {"master_weights": True, "ema_decay": 0.999},
    },
}


def check(problem: Problem, backend: str, name: str, options: Mapping[str, Any]) -> None:
    """End the run where two steps do not give the reference's bits."""
    found, expected = (Fastsam(name, problem, b, **options) for b in (backend, "reference"))
    for step in (1, 2):
        for part in ("first", "second"):
            for each in (found, expected):
                getattr(each, f"prepare_{part}")()
                getattr(each, part)()
            for index, (a, b) in enumerate(zip(found.params, expected.params, strict=True)):
                if not torch.equal(a, b):
                    what = f"parameter {index} after the {part} part of step {step}"
                    raise SystemExit(f"no times: {name}: {what} differs from the reference's")


def bytes_a_parameter(problem: Problem, options: Mapping[str, Any]) -> float:
    """Of a step, counted while the reference runs."""
    traffic = Traffic()
    with traffic.stand_in():
        stepper = Fastsam(PLAIN, problem, "reference", **options)
        for _ in range(2):
            traffic.bytes = 0  # memory is there by the second
            for part in ("first", "second"):
                getattr(stepper, f"prepare_{part}")()
                with traffic:
                    getattr(stepper, part)()
    return round(traffic.bytes / problem.elements, 1)


def work(model: str, dtype: str, rounds: int, device_name: str, threads: int) -> dict[str, Any]:
    """Times of all options in one dtype, in this process."""
    torch.set_num_threads(threads)
    device = device_named(device_name)
    problem = Problem(model, Case(dtype=dtype), device.torch)
    backend = backends_for(device.torch, problem.dtype)[0]
    for name, options in EXTRAS[dtype].items():
        check(problem, backend, name, options)
    counted = EXTRAS[dtype] if dtype == "float32" else {}
    moved = {name: bytes_a_parameter(problem, options) for name, options in counted.items()}
    gc.collect()
    steppers = [Fastsam(name, problem, backend, **options) for name, options in EXTRAS[dtype].items()]
    start, before = time.perf_counter(), others()
    times = interleave(steppers, device.clock(), rounds, WARMUP)
    taken = (others() - before) / (time.perf_counter() - start)
    return {
        "backend": backend,
        "bytes": moved,
        "times": rounded(times),
        "cores_taken": round(taken, 2),
    }


def render(document: Mapping[str, Any]) -> str:
    """A table for each dtype, and what belongs to them."""
    parts = []
    for result in document["results"]:
        processes, rows = result["processes"], []
        for name in processes[0]:
            over = MISSING if name == PLAIN else spread(paired_ratio(processes, name, PLAIN))
            row = [f"`{name}`" if name != PLAIN else name, f"{1e3 * across(processes, name)['median']:.1f}", over]
            rows.append(row + ([f"{result['bytes'][name]:g}"] if result["bytes"] else []))
        columns = [f"FusedSAM, {result['dtype']}, `{result['backend']}`", "ms", "/ plain"]
        parts.append(markdown(columns + (["bytes a parameter"] if result["bytes"] else []), rows))
    count = len(document["results"][0]["processes"])
    processes = "one process" if count == 1 else f"{count} fresh processes, quartiles in brackets"
    parts.append(
        f"Optimizer's part of a step, shapes of {document['model']}, SGD with momentum and weight decay; the same bits "
        f"as the reference's, checked first; medians of {processes}, ratios are of times in the same round. "
        f"{environment_line(document)}"
    )
    return "\n\n".join([*parts, f"To repeat: `{document['command']}`"])


def measure(args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """All options in one dtype, in fresh processes."""
    arguments = [str(Path(__file__)), "--model", args.model, "--dtype", dtype, "--device", args.device]
    arguments += ["--threads", str(args.threads), "--rounds", str(args.rounds)]
    found = fresh_processes(arguments, args.processes, args.threads)
    return {
        "dtype": dtype,
        "backend": found[0]["backend"],
        "bytes": found[0]["bytes"],
        "cores_taken": [process["cores_taken"] for process in found],
        "processes": [process["times"] for process in found],
    }


def main() -> None:
    """Measure, print the tables, keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="shapes of shapes.py [resnet50; with --quick resnet18]")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--processes", type=int, help=f"fresh processes a dtype [{PROCESSES}]")
    parser.add_argument("--rounds", type=int, help=f"rounds in a process [{ROUNDS}]")
    parser.add_argument("--quick", action="store_true", help="ResNet-18's shapes, one process, three rounds")
    parser.add_argument("--json", nargs="?", const="", metavar="FILE", help="keep the result [benchmarks/results/...]")
    parser.add_argument("--dtype", choices=EXTRAS, help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.model = args.model or ("resnet18" if args.quick else "resnet50")
    args.processes = args.processes or (1 if args.quick else PROCESSES)
    args.rounds = args.rounds or (3 if args.quick else ROUNDS)
    if args.worker:
        args.worker.write_text(json.dumps(work(args.model, args.dtype, args.rounds, args.device, args.threads)))
        return

    device = device_named(args.device)
    document = begun(device, args.threads) | {"model": args.model}
    document["results"] = [measure(args, dtype) for dtype in EXTRAS]
    keep(document, path_of(document, args.json, "extras"))
    print(render(document))
    was_quiet(busiest_of(document))


if __name__ == "__main__":
    main()
