"""Time of the optimizer part of a SAM step: FusedSAM on every backend, its rivals and the machine's bandwidth.

    python benchmarks/step.py                                     # ResNet-50 shapes, SGD, fp32, CPU, 5 processes
    python benchmarks/step.py --model vit_b16 --base adamw --threads 8
    python benchmarks/step.py --model tiny161                     # host time: next to no data in 161 tensors
    python benchmarks/step.py --all --json                        # every case and host time, kept under results/
    python benchmarks/step.py --quick --model resnet18            # one process, few rounds: does it work?
    python benchmarks/step.py --device cuda --sweep vit_l16-{sgd,adamw}-float32 --budget 60 --json FILE

Gradients are random and given, there is no backward. Before any time is taken, the weights of all contenders, perturbed
and stepped, are compared over two steps; a mismatch ends the run and no time is printed. Times are paired (timing.py)
and come from fresh processes; but for `--sweep`, which takes cases one after the other in this process, as long as the
budget lasts, keeps its result after each, and goes on after a failure. `--all` compares every case with what its bytes
predict from SGD's time. On a GPU launches and peak memory are counted, too.
"""

import argparse
import functools
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import documents
import torch
from cases import BASES, CASES, DTYPES, PRECISIONS, SWITCHES, Case, Problem
from devices import Cpu, HostClock, device_named
from launches import Closure, operations, whole_step
from ratios import across, paired_ratio
from rivals import (
    NEED_FUSED_BASE,
    PACKAGE,
    RIVALS,
    SLOW_TO_START,
    DeviceCopy,
    Fastsam,
    Stepper,
    Triad,
    backends_for,
    fused_base_works,
    kernel_backends,
    package_version,
)
from shapes import MODELS, SHRUNK
from table import ANCHOR, over_prediction, render, share_of_yardstick
from timing import available_memory, fresh_processes, interleave, others

HOST_MODEL = "tiny161"
PROCESSES, ROUNDS, WARMUP = 5, 15, 1 if SHRUNK else 3
HOST_ROUNDS, HOST_WARMUP, HOST_BURST = 30, WARMUP, 1 if SHRUNK else 20
CASE_RIVALS = ("eager", "foreach_alpha", "foreach_masters")  # beside every case of --all; SGD's has them all
# assert_close's defaults but for float16, whose 1e-3 is one step of the format: rivals round after every operation.
TOLERANCE = {torch.float16: {"rtol": 4e-3, "atol": 1e-5}}
# A bfloat16 momentum is off by one place, 2^-7 of 2 at most, and the learning rate is 0.01.
STATES_TOLERANCE = {"rtol": 1e-5, "atol": 2e-4}
OVER_PREDICTION = 1.15  # no case may take longer than this times what its bytes predict


def contenders_of(args: argparse.Namespace, problem: Problem) -> dict[str, Callable[[], Stepper]]:
    """What makes FusedSAM on the backends asked for, then the rivals asked for."""
    wanted = args.contenders or ["fastsam", *(name for name in RIVALS if name not in SLOW_TO_START)]
    masters = problem.case.precision == "masters"  # the others have none, or are the only ones with them
    wanted = [name for name in wanted if name not in RIVALS or (name == "foreach_masters") == masters]
    if not fused_base_works(problem):
        print("this torch's fused=True base does not step such weights: foreach=True instead", file=sys.stderr)
        wanted = [name for name in wanted if name not in NEED_FUSED_BASE]
    if PACKAGE in wanted and package_version() is None:
        print(f"{PACKAGE} is not installed: its SAM is left out", file=sys.stderr)
        wanted.remove(PACKAGE)
    backends = []
    if "fastsam" in wanted:
        available = kernel_backends if args.sweep else backends_for
        backends = args.backend or available(problem.device, problem.dtype)
    made: dict[str, Callable[[], Stepper]] = {
        f"fastsam_{backend}": functools.partial(Fastsam, f"fastsam_{backend}", problem, backend) for backend in backends
    }
    return made | {name: functools.partial(RIVALS[name], problem) for name in wanted if name in RIVALS}


def check_memory(problem: Problem, count: int) -> None:
    """Refuse what this machine's memory cannot hold; a GPU says so itself."""
    # Weights, state, backup and a temporary each; the problem's start and gradients.
    sizes = problem.case.sizes()
    each = sizes.kept(problem.case.base) + 2 * sizes.source
    needed, available = (count * each + 3 * sizes.weight) * problem.elements, available_memory()
    if problem.device.type == "cpu" and available is not None and needed > available:
        raise SystemExit(
            f"{count} contenders on {problem.model} need {needed / 2**30:.1f} GiB, {available / 2**30:.1f} are there: "
            f"choose fewer with --contenders (of fastsam {' '.join(RIVALS)}) and --backend"
        )


def peak_bytes(make: Callable[[], Stepper], problem: Problem, device: Cpu) -> int:
    """GPU memory that a contender takes at its peak, beyond gradients, weights, their masters and the base's state."""

    def two_steps() -> Stepper:
        stepper = make()
        for _ in range(2):  # the second has what the first left behind
            whole_step(stepper)
        return stepper

    return device.peak_bytes(two_steps) - problem.elements * problem.case.sizes().kept(problem.case.base)


def check_parity(steppers: Sequence[Stepper], steps: int = 2) -> None:
    """Two steps of everybody, compared after either part with the first of `steppers`."""
    for step in range(1, steps + 1):
        for stepper in steppers:
            versions = _gradient_versions(stepper)
            stepper.prepare_first()
            stepper.first()
            _expect_untouched(stepper, versions)
        _compare([stepper for stepper in steppers if stepper.perturbs], f"perturbed weights of step {step}")
        for stepper in steppers:
            versions = _gradient_versions(stepper)
            stepper.prepare_second()
            stepper.second()
            _expect_untouched(stepper, versions)
        _compare(steppers, f"weights after step {step}")


def _gradient_versions(stepper: Stepper) -> list[int]:
    return [grad._version for grads in stepper.problem.gradients for grad in grads if grad is not None]


def _expect_untouched(stepper: Stepper, versions: list[int]) -> None:
    if _gradient_versions(stepper) != versions:
        raise SystemExit(f"no times: {stepper.name} writes into the gradients, which all contenders share")


def _compare(steppers: Sequence[Stepper], what: str) -> None:
    judge, *others = steppers
    narrow = judge.problem.case.precision == "bfloat16-states"
    tolerance = STATES_TOLERANCE if narrow else TOLERANCE.get(judge.problem.dtype, {})
    for other in others:
        for index, (found, expected) in enumerate(zip(other.params, judge.params, strict=True)):
            try:
                torch.testing.assert_close(found.data, expected.data, **tolerance)
            except AssertionError as error:
                raise SystemExit(
                    f"no times: {what} of {other.name} differ from those of {judge.name}, "
                    f"parameter {index} of {len(judge.params)}\n{error}"
                ) from None


def rounded(times: dict[str, list[float]]) -> dict[str, list[float]]:
    """Four digits are more than a timing holds, and the result is committed."""
    return {name: [float(f"{value:.4g}") for value in values] for name, values in times.items()}


def work(args: argparse.Namespace, model: str, case: Case) -> dict[str, Any]:
    """What one process measures."""
    torch.set_num_threads(args.threads)
    device = device_named(args.device)
    problem = Problem(model, case, device.torch)
    made = contenders_of(args, problem)
    check_memory(problem, len(made))
    peaks = {name: peak_bytes(make, problem, device) for name, make in made.items()} if device.gpu else None
    gc.collect()
    steppers = [make() for make in made.values()]
    problem.start.clear()
    check_parity(steppers)
    events = {stepper.name: device.profile(functools.partial(whole_step, stepper)) for stepper in steppers}
    result: dict[str, Any] = {
        "elements": problem.elements,
        "bytes": {stepper.name: problem.ideal_bytes() for stepper in steppers if stepper.perturbs},
        "fused_base": fused_base_works(problem),
        "fastsam": [stepper.name for stepper in steppers if isinstance(stepper, Fastsam)],
        "operations": {name: len(operations(found)) for name, found in events.items()},
        "launches": {name: len(device.kernels(found)) for name, found in events.items()} if device.gpu else None,
        "peak_bytes": peaks,
    }
    if model == HOST_MODEL:
        clock, rounds = HostClock(device), args.rounds or HOST_ROUNDS
        start, before = time.perf_counter(), others()
        calls = interleave(steppers, clock, rounds, HOST_WARMUP, HOST_BURST)
        closures = [Closure(stepper) for stepper in steppers]
        closure = interleave(closures, clock, rounds, HOST_WARMUP, HOST_BURST)
        taken = (others() - before) / (time.perf_counter() - start)
        both = {"calls": rounded(calls), "closure": rounded(closure)}
        return {**result, "times": both, "cores_taken": round(taken, 2)}

    contenders: list[Any] = list(steppers)
    if args.against_sgd:
        plain = Problem(model, Case(), device.torch)
        contenders.append(Fastsam(ANCHOR, plain, (args.backend or backends_for(device.torch, torch.float32))[0]))
        result["bytes"][ANCHOR] = plain.ideal_bytes()
    if not args.contenders or "bandwidth" in args.contenders:
        try:
            yardstick = DeviceCopy(device.torch) if device.gpu else Triad(args.threads)
        except RuntimeError as error:
            print(f"no streaming triad: {error}", file=sys.stderr)
        else:
            if not yardstick.streams:
                print("the triad's stores are plain ones on this processor", file=sys.stderr)
            contenders.append(yardstick)
            result["bytes"][yardstick.name] = yardstick.bytes
    start, before = time.perf_counter(), others()
    times = interleave(contenders, device.clock(), args.rounds or ROUNDS, WARMUP)
    taken = (others() - before) / (time.perf_counter() - start)
    return {**result, "times": rounded(times), "cores_taken": round(taken, 2)}


def measure(args: argparse.Namespace, case: Case, model: str, extra: Sequence[str], name: str = "") -> dict[str, Any]:
    """One result: a case in fresh processes."""
    arguments = [str(Path(__file__)), "--model", model, *case.flags(), "--device", args.device, *extra]
    arguments += ["--threads", str(args.threads)]
    arguments += ["--rounds", str(args.rounds)] if args.rounds else []
    found = fresh_processes(arguments, args.processes, args.threads)
    return summed_up(found, case, model, name)


def summed_up(found: Sequence[dict[str, Any]], case: Case, model: str, name: str = "") -> dict[str, Any]:
    """One result: what every process found."""
    common = {key: value for key, value in found[0].items() if key not in ("times", "cores_taken")}
    return {
        "kind": "host" if model == HOST_MODEL else "step",
        "name": name,
        "model": model,
        "case": asdict(case),
        **common,
        "cores_taken": [process["cores_taken"] for process in found],
        "processes": [process["times"] for process in found],
    }


def sweep(args: argparse.Namespace, document: dict[str, Any]) -> None:
    """Measure cases one after the other, in this process, into `document`, which is kept after each.

    Those that the file of `--json` holds are not measured again.
    """
    document |= {"results": [], "failures": {}}
    known = json.loads(Path(args.json).read_text())["results"] if args.json and Path(args.json).is_file() else []
    device = device_named(args.device)
    end = time.monotonic() + args.budget
    for model, case in args.sweep:
        name = "-".join([model, case.base, case.dtype, *([case.precision] if case.precision != "plain" else [])])
        there = [one for one in known if (one["model"], Case(**one["case"])) == (model, case)]
        document["results"] += there
        if there:
            continue
        try:
            if time.monotonic() > end:
                raise TimeoutError(f"left out, the {args.budget} s are over")
            document["results"].append(summed_up([work(args, model, case)], case, model))
        except (Exception, SystemExit) as error:  # the other cases are still to come
            document["failures"][name] = f"{type(error).__name__}: {error}"[:500]
        device.free()
        print(name, document["failures"].get(name, "measured"), flush=True)
        keep(args, document)


def measure_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every case on FusedSAM's best backend for it, SGD's with all rivals, and host time."""
    device = device_named(args.device).torch
    results = []
    for name, case in CASES.items():
        backend = ["--backend", *(args.backend or backends_for(device, DTYPES[case.dtype])[:1])]
        few = [] if name == "SGD" else ["--against-sgd", "--contenders", "fastsam", *CASE_RIVALS, "bandwidth"]
        print(f"{name} ...", file=sys.stderr, flush=True)
        results.append(measure(args, case, args.model, [*backend, *few], name))
    print("host time ...", file=sys.stderr, flush=True)
    backend = ["--backend", *(args.backend or backends_for(device, torch.float32)[:1])]
    return [*results, measure(args, Case(), HOST_MODEL, backend)]


def judge_goals(results: Sequence[dict[str, Any]], device: str) -> list[str]:
    """The goals that these results decide, a line each."""
    lines = []
    for result in results:
        if not result["fastsam"]:
            continue
        name, processes = result["fastsam"][0], result["processes"]
        if result["kind"] == "step" and ANCHOR in processes[0]:
            over = over_prediction(result)["median"]
            lines.append(_goal(f"{result['name']}: time / predicted by bytes", over, "at most", OVER_PREDICTION))
        if result["kind"] == "host":
            micros = 1e6 * across([process["calls"] for process in processes], name)["median"]
            lines.append(_goal("host time of first_step and step, us", micros, "at most", 120))
        if (result["kind"], result["model"], Case(**result["case"]), device) != ("step", "resnet50", Case(), "cpu"):
            continue
        for rival, goal in (("eager", 2.5), ("foreach_mul", 1.8), ("foreach_alpha", 1.4)):
            if rival in processes[0]:
                ratio = paired_ratio(processes, rival, name)["median"]
                lines.append(_goal(f"{rival} / {name}", ratio, "at least", goal))
        if "base_fused" in processes[0]:
            ratio = paired_ratio(processes, name, "base_fused")["median"]
            lines.append(_goal(f"{name} / base_fused", ratio, "at most", 2.25))
        if "triad" in result["bytes"]:
            lines.append(_goal("share of triad", share_of_yardstick(result, name)["median"], "at least", 0.85))
    return lines


def _goal(what: str, found: float, bound: str, goal: float) -> str:
    reached = found >= goal if bound == "at least" else found <= goal
    return f"{'reached ' if reached else 'MISSED  '} {what}: {found:.2f}, goal {bound} {goal}"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="resnet50")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...; stub: see devices.py")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--all", action="store_true", help="every case of cases.py on --model's shapes, and host time")
    parser.add_argument("--backend", nargs="+", help="FusedSAM's backends [all available]; the first is compared")
    names = ["fastsam", *RIVALS, "bandwidth"]
    known = f"some of {', '.join(names)} [all but {', '.join(SLOW_TO_START)}]"
    parser.add_argument("--contenders", nargs="+", choices=names, metavar="NAME", help=known)
    parser.add_argument("--processes", type=int, help=f"fresh processes [{PROCESSES}]")
    parser.add_argument("--rounds", type=int, help=f"rounds in a process [{ROUNDS}; host time {HOST_ROUNDS}]")
    parser.add_argument("--quick", action="store_true", help="one process and three rounds")
    parser.add_argument("--sweep", nargs="+", type=case_of, metavar="CASE", help="MODEL-BASE-DTYPE[-PRECISION]")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no case is started")
    parser.add_argument("--json", nargs="?", const="", metavar="FILE", help="keep the result [benchmarks/results/...]")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # one process's result goes to this file
    parser.add_argument("--against-sgd", action="store_true", help=argparse.SUPPRESS)  # time plain SGD beside the case
    case = parser.add_argument_group("case")
    case.add_argument("--base", choices=BASES, default="sgd")
    case.add_argument("--dtype", choices=DTYPES, default="float32")
    case.add_argument("--adaptive", action="store_true", help="ASAM")
    case.add_argument("--groups", type=int, default=1, help="parameter groups; more than 1: with different options")
    case.add_argument("--precision", choices=PRECISIONS, default="plain", help="masters, or rounding at random")
    case.add_argument("--missing", action="store_true", help="a tenth of the parameters has no gradient")
    case.add_argument("--misaligned", action="store_true", help="gradients off the 16-byte grid by one element")
    case.add_argument("--flattened", action="store_true", help="FusedSAM(flatten=True)")
    args = parser.parse_args()
    args.processes = args.processes or (1 if args.quick else PROCESSES)
    args.rounds = args.rounds or (3 if args.quick else None)
    return args


def case_of(text: str) -> tuple[str, Case]:
    """What MODEL-BASE-DTYPE or MODEL-BASE-DTYPE-PRECISION means."""
    model, base, dtype, *precision = text.split("-", 3)
    case = Case(base, dtype, precision=precision[0] if precision else "plain")
    if model not in MODELS or base not in BASES or dtype not in DTYPES or case.precision not in PRECISIONS:
        raise ValueError(text)
    return model, case


def keep(args: argparse.Namespace, document: dict[str, Any]) -> None:
    """Write the document where `--json` says."""
    name = "all" if args.all else "sweep" if args.sweep else "-".join([args.model, args.base, args.dtype])
    documents.keep(document, documents.path_of(document, args.json, name))


def main() -> None:
    """Measure, print the tables, keep the result."""
    args = arguments()
    switches = {name: getattr(args, name) for name in SWITCHES}
    case = Case(args.base, args.dtype, groups=args.groups, precision=args.precision, **switches)
    if args.worker:
        args.worker.write_text(json.dumps(work(args, args.model, case)))
        return

    device = device_named(args.device)
    document = documents.begun(device, args.threads, **{PACKAGE: package_version()})
    if args.sweep:
        sweep(args, document)
        if not document["results"]:
            raise SystemExit("no case was measured")
    elif args.all:
        document["results"] = measure_all(args)
    else:
        extra = ["--backend", *args.backend] if args.backend else []
        extra += ["--contenders", *args.contenders] if args.contenders else []
        document["results"] = [measure(args, case, args.model, extra)]
    keep(args, document)
    print(render(document))
    if documents.was_quiet(documents.busiest_of(document)):
        print("\n" + "\n".join(judge_goals(document["results"], device.name)), file=sys.stderr)
    if document.get("failures"):
        raise SystemExit(f"not measured: {document['failures']}")


if __name__ == "__main__":
    main()
