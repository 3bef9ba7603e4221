"""What every method of the family costs and gives: time of a training step, bytes, test accuracy.

    python benchmarks/methods.py --quick                 # one process, few rounds, one seed
    python benchmarks/methods.py --json                  # what the documentation shows; needs a quiet machine
    python benchmarks/methods.py --of FILE               # the table again, of a result that was kept
    python benchmarks/methods.py --choose                # the radii below, again: on seeds that are not reported

Time: whole steps (forward, backward, optimizer) of a residual network of 14 layers, 16 channels wide, on batches of 16
of scikit-learn's digits, scaled up to 32 x 32 pixels. A round is five steps of every contender, so that what has a
second pass in every fifth step has one in each; contenders take turns in another order each round, and are compared
within a round. Base is torch's own optimizer, `fused=True`; the second pass of all leaves BatchNorm's running
statistics alone. Before any time is printed every method is checked against its formula (oracles.py).
The package pytorch_optimizer's SAM, GSAM and LookSAM take part where it is installed (packaged.py), over the same base.

Bytes: a step's average, of the optimizer's part, a parameter of that network, counted while it runs (traffic.py).

Accuracy: the demo's task (fastsam/commands/demo.py): 400 digits to learn, with and without 30 % wrong labels, the rest
to test. Learning rate and weight decay are the base optimizer's best, and taken over. The radius of each method is the
best of a grid by the mean of both conditions on seeds 100 and 101 (`--choose`); reported seeds begin at 0. Differences
are paired by seed; two standard errors are the bar. MSAM's BatchNorm statistics are taken anew at the weights that are
tested, as its documentation says.
"""

import argparse
import functools
import gc
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import packaged
import torch
from cases import Case
from devices import Cpu
from documents import begun, keep, path_of, was_quiet
from oracles import check
from ratios import across, paired_ratio
from step import rounded
from table import MISSING, environment_line, markdown
from timing import fresh_processes, others
from torch import Tensor, nn
from torch.nn import functional
from traffic import Traffic

from fastsam import asam_groups, freeze_running_stats, norm_layers_only, when
from fastsam.commands import demo_training
from fastsam.commands.methods import FAMILY, Method
from fastsam.methods import MSAM

BURST = 5  # steps in a round
WARMUP, ROUNDS, PROCESSES, SEEDS = 2, 12, 5, 10
BATCH, PIXELS, WIDTH = 16, 32, 16
LR = 0.01  # of the steps that are timed
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": LR, "momentum": 0.9, "weight_decay": 5e-4}),
    "adamw": (torch.optim.AdamW, {"lr": LR / 10, "weight_decay": 0.05}),
}
NOISE = (0.0, 0.3)
CHOSEN_ON = (100, 101)
# The radius of each method in the accuracy runs, found by `--choose`.
RHO = {
    "SAM": 0.35,
    "ASAM": 2.0,
    "GSAM": 0.35,
    "WSAM, decoupled": 0.35,
    "WSAM, coupled": 0.05,
    "LookSAM": 0.02,
    "Look-LayerSAM": 0.001,
    "Friendly SAM": 0.5,
    "VaSSO": 0.35,
    "MSAM": 3.0,
    "ESAM, its weight part": 0.35,
    "Sparse SAM": 1.0,
    "un-normalised SAM": 1.0,
    "lambda-mix": 0.5,
    "loss budget (LE-SAM)": 0.5,
    "StableSAM": 0.35,
    "SAM-ON": 2.0,
    "preconditioned, experimental": 0.01,
    "every k-th step": 1.0,
    "from a step on": 0.5,
    "random steps (SS-SAM)": 0.5,
    "while gradients are long (AE-SAM)": 0.5,
}
GRID = (0.1, 0.2, 0.35, 0.5)
GRIDS = {  # where others are better, or a radius means something else
    "ASAM": (0.5, 1.0, 1.5, 2.0, 3.0),
    "WSAM, coupled": (0.01, 0.02, 0.05, 0.1),
    "LookSAM": (0.02, 0.05, 0.1, 0.2),
    "Look-LayerSAM": (0.001, 0.003, 0.01, 0.03),
    "MSAM": (0.3, 1.0, 3.0, 5.0),
    "Sparse SAM": (0.35, 0.5, 0.7, 1.0),
    "un-normalised SAM": (0.1, 0.3, 1.0, 3.0),
    "lambda-mix": (0.2, 0.5, 1.0, 2.0),
    "SAM-ON": (0.5, 1.0, 2.0, 3.0),
    "preconditioned, experimental": (0.001, 0.01, 0.1, 0.5),
    "every k-th step": (0.35, 0.5, 0.7, 1.0),
}
PASS, TWO_PASSES = "one pass alone", "two passes alone"
GOALS = (  # what, relative to what, at most
    ("LookSAM", "base sgd", 1.25),
    ("every k-th step", "base sgd", 1.25),
    ("MSAM", "base sgd", 1.05),
    ("SAM", TWO_PASSES, 1.03),
)


def base_name(base: str) -> str:
    """What the base optimizer alone is called."""
    return f"base {base}"


def is_timed(method: Method) -> bool:
    """Whether a round of five steps has the passes that are told."""
    return method.passes in ("1", "2", "1 + 1/k")


def groups_of(method: Method, model: nn.Module, rho: float) -> list[dict[str, Any]]:
    """A method's parameter groups."""
    if method.params == "asam_groups(model)":
        return asam_groups(model, rho=rho)
    if method.params == "norm_layers_only(model)":
        return norm_layers_only(model, rho=rho)
    return [{"params": list(model.parameters()), "rho": rho, "adaptive": False, "eta": 0.0}]


# --- time ------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        """Convolutions of 3 x 3; the shortcut is one of 1 x 1 where shapes differ."""
        super().__init__()
        first, second = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.path = nn.Sequential(first, nn.BatchNorm2d(outputs), nn.ReLU(), second, nn.BatchNorm2d(outputs))
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h / stride, w / stride]."""
        return functional.relu(self.path(x) + self.shortcut(x))


def residual_network() -> nn.Sequential:
    """14 layers for images [n, 1, 32, 32], the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        widths = [WIDTH, WIDTH, WIDTH, 2 * WIDTH, 2 * WIDTH, 4 * WIDTH, 4 * WIDTH]
        layers: list[nn.Module] = [nn.Conv2d(1, WIDTH, 3, 1, 1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU()]
        layers += [Block(a, b, 1 if a == b else 2) for a, b in zip(widths, widths[1:], strict=False)]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def batches() -> list[tuple[Tensor, Tensor]]:
    """The five of a round."""
    images, labels = demo_training.digits()
    images = functional.interpolate(images[: BURST * BATCH], size=(PIXELS, PIXELS), mode="bilinear")
    return list(zip(images.split(BATCH), labels.split(BATCH), strict=False))


class Training:
    """A model with its training step."""

    def __init__(self, name: str, method: Method | None) -> None:
        """Build model and optimizer; without a method, one that `name` says: a base optimizer, or passes alone."""
        self.name, self.model, self.batches = name, residual_network(), batches()
        self.optimizer: Any = None
        self.packaged = None
        if name in packaged.names():
            kind, options = BASES["sgd"]
            self.packaged = packaged.trainer(name, self.model, functools.partial(kind, fused=True, **options))
        elif method is not None:
            kind, options = BASES[method.base]
            groups = groups_of(method, self.model, 0.05)
            self.optimizer = method.cls(groups, kind, **method.options, **options)
        elif name not in (PASS, TWO_PASSES):
            kind, options = BASES[name.removeprefix("base ")]
            self.optimizer = kind(self.model.parameters(), fused=True, **options)
        self.two_calls = method is not None and method.passes != "1"

    def run(self) -> None:
        """A round."""
        for images, labels in self.batches:
            if self.packaged is not None:
                self.packaged(images, labels)
                continue
            self._pass(images, labels)
            if self.name == TWO_PASSES or (self.two_calls and self.optimizer.first_step(zero_grad=True)):
                with freeze_running_stats(self.model):
                    self._pass(images, labels)
            if self.optimizer is not None:
                self.optimizer.step()

    def _pass(self, images: Tensor, labels: Tensor) -> None:
        self.model.zero_grad(set_to_none=True)
        functional.cross_entropy(self.model(images), labels).backward()


def contenders() -> list[Training]:
    """All that take turns."""
    alone = [PASS, TWO_PASSES, *map(base_name, BASES), *packaged.names()]
    return [Training(name, None) for name in alone] + [Training(m.name, m) for m in FAMILY if is_timed(m)]


def time_rounds(rounds: int) -> dict[str, Any]:
    """Seconds a step of every contender in every round, and the cores that others took meanwhile."""
    taking_part = contenders()
    times: dict[str, list[float]] = {contender.name: [] for contender in taking_part}
    gc.collect()
    gc.disable()
    start, before = time.perf_counter(), others()
    for turn in range(WARMUP + rounds):
        for contender in random.Random(turn).sample(taking_part, len(taking_part)):
            began = time.perf_counter()
            contender.run()
            if turn >= WARMUP:
                times[contender.name].append((time.perf_counter() - began) / BURST)
    taken = (others() - before) / (time.perf_counter() - start)
    gc.enable()
    for contender in taking_part:
        if not all(p.isfinite().all() for p in contender.model.parameters()):
            raise SystemExit(f"no times: {contender.name} ended with weights that are not finite")
    return {"times": rounded(times), "cores_taken": round(taken, 2)}


# --- bytes -----------------------------------------------------------------------------------------------------------


def bytes_a_parameter(method: Method) -> float:
    """Of a step, the average of a round."""
    model = residual_network()
    parameters = sum(p.numel() for p in model.parameters())
    kind, options = BASES[method.base]
    traffic = Traffic()
    with traffic.stand_in():
        groups = groups_of(method, model, 0.05)
        optimizer = method.cls(groups, kind, backend="reference", **method.options, **options)
        for step in range(2 * BURST):
            if step == BURST:
                traffic.bytes = 0  # memory is there by now
            set_gradients(model, 2 * step)
            with traffic:
                two = method.passes != "1" and optimizer.first_step(zero_grad=True)
            if two:
                set_gradients(model, 2 * step + 1)
            with traffic:
                optimizer.step()
    return round(traffic.bytes / BURST / parameters, 1)


def set_gradients(model: nn.Module, seed: int) -> None:
    """Random ones."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


# --- accuracy --------------------------------------------------------------------------------------------------------


def accuracy(method: Method | None, base: str, noise: float, seed: int, rho: float) -> tuple[float, float]:
    """Per cent of the test images that are right after training, and passes a step; without a method, the base's."""
    settings = demo_training.Settings()
    generator = torch.Generator().manual_seed(seed)
    data = demo_training.split(*demo_training.digits(), noise, generator)
    model, recipe = demo_training.network(seed), demo_training.RECIPES[base]
    n = demo_training.TRAIN_IMAGES
    steps = settings.epochs * (n // demo_training.BATCH_SIZE)
    optimizer: Any
    if method is None:
        optimizer = recipe.optimizer(model.parameters(), **recipe.kwargs)
    else:
        options = dict(method.options)
        if method.passes == "1, then 2":
            options["when"] = when.after(steps // 2)
        optimizer = method.cls(groups_of(method, model, rho), recipe.optimizer, **options, **recipe.kwargs)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    passes = 0
    for _ in range(settings.epochs):
        for batch in torch.randperm(n, generator=generator).view(-1, demo_training.BATCH_SIZE):
            images, labels = data.train_images[batch], data.train_labels[batch]

            def closure(images: Tensor = images, labels: Tensor = labels) -> Tensor:
                nonlocal passes
                passes += 1
                optimizer.zero_grad()
                second = method is not None and method.passes != "1" and optimizer.perturbed
                with freeze_running_stats(model) if second else nullcontext():
                    loss = functional.cross_entropy(model(images), labels)
                loss.backward()
                return loss

            optimizer.step(closure)
            schedule.step()
    if isinstance(optimizer, MSAM):
        optimizer.eval()
        recalibrate(model, data.train_images)
    return demo_training.accuracy(model, data.test_images, data.test_labels), passes / steps


@torch.no_grad()
def recalibrate(model: nn.Module, images: Tensor) -> None:
    """Take BatchNorm's statistics anew, over all images."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
    model(images)


def accuracies(seeds: int) -> dict[str, Any]:
    """By contender: accuracy by condition and seed, and passes a step."""
    found: dict[str, Any] = {}
    for name, method in [*((base_name(base), None) for base in BASES), *((m.name, m) for m in FAMILY)]:
        base = method.base if method is not None else name.removeprefix("base ")
        rho = RHO.get(name, 0.0)
        runs = {f"{noise:g}": [accuracy(method, base, noise, s, rho) for s in range(seeds)] for noise in NOISE}
        passes = statistics.fmean(p for condition in runs.values() for _, p in condition)
        by_condition = {noise: [round(a, 3) for a, _ in condition] for noise, condition in runs.items()}
        found[name] = {"rho": rho if method else None, "passes": round(passes, 2), "accuracy": by_condition}
        print(name, json.dumps(found[name]), file=sys.stderr, flush=True)
    return found


def choose(names: Sequence[str]) -> None:
    """Print the best radius of the grid of each method."""
    family = {method.name: method for method in FAMILY}
    for method in [family[name] for name in names or family]:
        means = {}
        for rho in GRIDS.get(method.name, GRID):
            runs = [accuracy(method, method.base, noise, seed, rho)[0] for noise in NOISE for seed in CHOSEN_ON]
            means[rho] = round(statistics.fmean(runs), 2)
        best = max(means, key=lambda rho: means[rho])
        print(f'    "{method.name}": {best:g},  # {means}', flush=True)


# --- the table -------------------------------------------------------------------------------------------------------


def gain(mine: Sequence[float], base: Sequence[float]) -> str:
    """Mean of the paired differences, its standard error, and whether two of these are passed."""
    differences = [a - b for a, b in zip(mine, base, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return f"{mean:+.2f}"
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    word = "no clear difference" if abs(mean) <= 2 * error else "better" if mean > 0 else "worse"
    return f"{mean:+.2f} ± {error:.2f}, {word}"


def ratio(processes: Sequence[Mapping[str, Any]], over: str, under: str) -> float:
    """The median of one's times over another's of the same round."""
    return paired_ratio([process["times"] for process in processes], over, under)["median"]


def table(document: Mapping[str, Any]) -> str:
    """A row for each base optimizer and method."""
    processes, learnt = document["processes"], document["accuracy"]
    times = [process["times"] for process in processes]
    rows = []
    for name in [*map(base_name, BASES), *(method.name for method in FAMILY)]:
        method = next((m for m in FAMILY if m.name == name), None)
        base = name if method is None else base_name(method.base)
        row = [name, f"{learnt[name]['passes']:g}"]
        if name in times[0]:
            row += [f"{1e3 * across(times, name)['median']:.1f}"]
            row += [MISSING if name == other else f"{ratio(processes, name, other):.3f}" for other in (base, "SAM")]
        else:
            row += [MISSING] * 3
        row.append(f"{document['bytes'][name]:g}" if name in document["bytes"] else MISSING)
        for noise, mine in learnt[name]["accuracy"].items():
            spread = f" ± {statistics.stdev(mine):.2f}" if len(mine) > 1 else ""
            row.append(f"{statistics.fmean(mine):.2f}{spread}")
            row.append(MISSING if method is None else gain(mine, learnt[base]["accuracy"][noise]))
        rows.append(row)
    for name in (name for name in times[0] if name not in {row[0] for row in rows} | {PASS, TWO_PASSES}):
        over = [f"{ratio(processes, name, other):.3f}" for other in (base_name("sgd"), "SAM")]
        rows.append([name, MISSING, f"{1e3 * across(times, name)['median']:.1f}", *over, *[MISSING] * 5])
    columns = ["method", "passes", "ms", "/ base", "/ SAM", "bytes", "% right", "minus base"]
    return markdown([*columns, "% right, 30 % wrong labels", "minus base"], rows)


def render(document: Mapping[str, Any]) -> str:
    """The table, and what belongs to it."""
    processes, learnt = document["processes"], document["accuracy"]
    seeds = len(next(iter(learnt["SAM"]["accuracy"].values())))
    notes = [
        f"SAM takes {ratio(processes, 'SAM', TWO_PASSES):.3f} times two passes alone, the base optimizer "
        f"{ratio(processes, base_name('sgd'), PASS):.3f} times one.",
        f"Milliseconds of a whole training step of a residual network ({document['parameters']} parameters), batch "
        f"{BATCH}, medians of {len(processes)} process{'es'[: 2 * (len(processes) > 1)]}, ratios within a round; every "
        "method is checked against its formula first. Bytes: fp32, a parameter, of the optimizer's part, counted while "
        f"it runs. Accuracy on scikit-learn's digits: mean and standard deviation over {seeds} seeds; minus base: mean "
        "and standard error of differences paired by seed, better or worse where the mean passes two of these. This "
        "small task says what a method costs and that it trains, not what it gives on yours.",
        environment_line(document),
    ]
    return "\n\n".join([table(document), " ".join(notes), f"To repeat: `{document['command']}`"])


def judge_goals(processes: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each goal."""
    lines = []
    for over, under, most in GOALS:
        found = ratio(processes, over, under)
        verdict = "reached " if found <= most else "MISSED  "
        lines.append(f"{verdict} {over} / {under}: {found:.3f}, goal at most {most}")
    return lines


def main() -> None:
    """Measure, print the table, keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processes", type=int, help=f"fresh processes that measure times [{PROCESSES}]")
    parser.add_argument("--rounds", type=int, help=f"rounds in a process [{ROUNDS}]")
    parser.add_argument("--seeds", type=int, help=f"of the accuracies [{SEEDS}]")
    parser.add_argument("--quick", action="store_true", help="one process, three rounds, one seed")
    parser.add_argument("--json", nargs="?", const="", metavar="FILE", help="keep the result [benchmarks/results/...]")
    parser.add_argument("--of", type=Path, metavar="FILE", help="measure nothing, show the result in this file")
    parser.add_argument("--choose", nargs="*", metavar="METHOD", help="look for radii [of all methods], and end")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.processes = args.processes or (1 if args.quick else PROCESSES)
    args.rounds = args.rounds or (3 if args.quick else ROUNDS)
    torch.set_num_threads(args.threads)
    if args.worker:
        args.worker.write_text(json.dumps(time_rounds(args.rounds)))
        return
    if args.choose is not None:
        choose(args.choose)
        return

    document = json.loads(args.of.read_text()) if args.of else measure(args)
    text, busiest = render(document), max(process["cores_taken"] for process in document["processes"])
    print(text)
    if was_quiet(busiest):
        print("\n" + "\n".join(judge_goals(document["processes"])), file=sys.stderr)
    if not args.of:
        keep(document, path_of(document, args.json, "methods"))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Check every method, then count bytes, take times and train."""
    for method in FAMILY:
        check(method, groups_of)
    if bytes_a_parameter(FAMILY[0]) != Case().sizes().step("sgd", False):
        raise SystemExit("no bytes: those of SAM that were counted are not those that its operations need")
    document = begun(Cpu(), args.threads) | {
        "parameters": sum(p.numel() for p in residual_network().parameters()),
        "bytes": {method.name: bytes_a_parameter(method) for method in FAMILY if is_timed(method)},
    }
    arguments = [str(Path(__file__)), "--rounds", str(args.rounds), "--threads", str(args.threads)]
    document["processes"] = fresh_processes(arguments, args.processes, args.threads)
    document["accuracy"] = accuracies(args.seeds or (1 if args.quick else SEEDS))
    return document


if __name__ == "__main__":
    main()
