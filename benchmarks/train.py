"""Time of whole training steps with SAM.

    python benchmarks/train.py --device cuda --json FILE          # ResNet-18 at 32x32; ResNet-50, ViT-B/16 at 224
    python benchmarks/train.py --device cpu --quick --json FILE   # one small model: the same keys
    python benchmarks/train.py --models small residual transformer perceptron --processes 3 --json

Contenders: two forward and backward passes alone, what no SAM can go below; FusedSAM; the formula written one tensor
and one operation at a time (rivals.py) with torch's default base. Passes and FusedSAM also as one CUDA graph; the
written-out formula cannot be one, as it moves every weight to other memory. The second pass of all of them leaves
BatchNorm's running statistics alone. ResNets and ViT come from torchvision or timm; the others need neither. The
contenders take turns; medians of the rounds.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from devices import WARMUP, Cpu, device_named
from documents import begun, keep, path_of, was_quiet
from rivals import eager_climb, eager_return
from shapes import SHRUNK
from table import environment_line, markdown
from timing import fresh_processes, others
from torch import Tensor, nn

import fastsam
from fastsam.training import freeze_running_stats

MODELS = {  # name: (batch, pixels, classes)
    "small": (128, 32, 10),
    "residual": (64, 32, 10),
    "transformer": (64, 32, 10),
    "perceptron": (128, 32, 10),
    "resnet18": (128, 32, 10),
    "resnet50": (64, 224, 1000),
    "vit_b16": (64, 224, 1000),
}
ON_A_CPU = ("small", "residual", "transformer", "perceptron")  # those that need no other package
LR, MOMENTUM, RHO = 0.01, 0.9, 0.05
EVERYWHERE = ("passes", "fastsam", "eager")
CONTENDERS = (*EVERYWHERE, "passes_captured", "fastsam_captured")


class Swap(nn.Module):
    """[n, channels, patches] to [n, patches, channels]."""

    def forward(self, x: Tensor) -> Tensor:
        """Swap the last two."""
        return x.transpose(1, 2)


def make_model(name: str, pixels: int, classes: int) -> nn.Module:
    """One of `MODELS`; ImportError if no package has it."""
    if name == "small" or SHRUNK:
        layers = [nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2 * pixels * pixels, classes))
    if name == "residual":
        from methods import residual_network

        return nn.Sequential(nn.Conv2d(3, 1, 1), residual_network())
    if name == "transformer":
        patches = nn.Sequential(nn.Conv2d(3, 128, 4, 4), nn.Flatten(2), Swap())
        layer = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        return nn.Sequential(patches, encoder, nn.Flatten(), nn.Linear(2 * pixels * pixels * 4, classes))
    if name == "perceptron":
        widths = [3 * pixels * pixels, 1024, 1024]
        layers = [layer for a, b in zip(widths, widths[1:], strict=False) for layer in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(nn.Flatten(), *layers, nn.Linear(1024, classes))
    try:
        import torchvision

        build = {"vit_b16": "vit_b_16"}.get(name, name)
        model: nn.Module = torchvision.models.get_model(build, num_classes=classes)
    except (ImportError, RuntimeError):  # RuntimeError: it was built for another torch
        import timm

        model = timm.create_model({"vit_b16": "vit_base_patch16_224"}.get(name, name), num_classes=classes)
    if name == "resnet18":  # as usual at 32x32: the first layers do not shrink the image
        model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        model.maxpool = nn.Identity()
    return model


class Contender:
    """A model with a training step; `name` decides how."""

    def __init__(self, name: str, model: str, where: Cpu) -> None:
        """Build model, data and optimizer."""
        batch, pixels, classes = MODELS["small" if SHRUNK else model]
        torch.manual_seed(0)
        device = where.torch
        self.name, self.device = name, device
        self.model = make_model(model, pixels, classes).to(device)
        self.x = torch.randn(batch, 3, pixels, pixels, device=device)
        self.y = torch.randint(classes, (batch,), device=device)
        kind = name.removesuffix("_captured")
        groups = [{"params": list(self.model.parameters()), "rho": RHO, "adaptive": False}]
        if kind == "fastsam":
            self.fused = fastsam.FusedSAM(groups, torch.optim.SGD, lr=LR, momentum=MOMENTUM)
        if kind == "eager":
            self.base = torch.optim.SGD(groups, LR, MOMENTUM)
            self.old: dict[Tensor, Tensor] = {}
        steps: dict[str, Callable[[], None]] = {"passes": self.passes, "fastsam": self.fastsam, "eager": self.eager}
        self.step = steps[kind]
        if name.endswith("_captured"):
            self.step = where.capture(self.step, lambda: self.model.zero_grad(set_to_none=True))

    def first_pass(self) -> None:
        """One forward and backward pass, in bfloat16 autocast on a GPU."""
        self.model.zero_grad(set_to_none=True)
        # Each weight is cast once a pass: a cache would be of no use, and must not outlive a captured graph's memory.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False):
            loss: Tensor = nn.functional.cross_entropy(self.model(self.x), self.y)
        loss.backward()

    def second_pass(self) -> None:
        """The same, but running statistics stay."""
        with freeze_running_stats(self.model):
            self.first_pass()

    def passes(self) -> None:
        """Two passes and no optimizer."""
        self.first_pass()
        self.second_pass()

    def fastsam(self) -> None:
        """A step of FusedSAM."""
        self.first_pass()
        self.fused.first_step()
        self.second_pass()
        self.fused.step()

    def eager(self) -> None:
        """The formula, one tensor and one operation at a time."""
        self.first_pass()
        eager_climb(self.base.param_groups, self.old)
        self.second_pass()
        eager_return(self.base.param_groups, self.old)
        self.base.step()


def check_parity(contenders: Sequence[Contender]) -> None:
    """One step of FusedSAM and of the formula must give the same weights, or nobody is timed.

    On a GPU the passes are in bfloat16 and their sums in no fixed order, so that gradients differ by some per cent.
    """
    ours, theirs = (one for one in contenders if one.name in ("fastsam", "eager"))
    for one in (ours, theirs):
        one.step()
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if ours.device.type == "cpu" else {"rtol": 1e-2, "atol": 1e-3}
    for found, expected in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(
            found, expected, **tolerance, msg="no times: FusedSAM's weights are not the formula's"
        )


def train(model: str, device: Cpu, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step of every contender, and ratios to the two passes; None for what a CPU has not."""
    contenders = [Contender(name, model, device) for name in CONTENDERS if device.gpu or name in EVERYWHERE]
    check_parity(contenders)
    clock = device.clock()
    rows: list[dict[str, float]] = []
    start, before = time.perf_counter(), others()
    for turn in range(WARMUP + rounds):
        order = random.Random(turn).sample(contenders, len(contenders))
        seconds = {contender.name: clock(contender.step) for contender in order}
        rows += [seconds] if turn >= WARMUP else []
    names = [contender.name for contender in contenders]
    ms = {name: round(1e3 * statistics.median(row[name] for row in rows), 4) for name in names}
    over = {name: round(statistics.median(row[name] / row["passes"] for row in rows), 4) for name in names}
    return {
        "ms": {name: ms.get(name) for name in CONTENDERS},
        "over_passes": {name: over.get(name) for name in CONTENDERS},
        "parameters": sum(p.numel() for p in contenders[0].model.parameters()),
        "cores_taken": round((others() - before) / (time.perf_counter() - start), 2),
    }


def across_processes(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The medians of what several processes found."""

    def middle(key: str) -> dict[str, float | None]:
        columns = {name: [one[key][name] for one in found] for name in CONTENDERS}
        return {name: None if None in column else statistics.median(column) for name, column in columns.items()}

    return {
        "ms": middle("ms"),
        "over_passes": middle("over_passes"),
        "parameters": found[0]["parameters"],
        "cores_taken": max(one["cores_taken"] for one in found),
        "processes": list(found),
    }


def over_passes(found: Mapping[str, Any], name: str) -> str:
    """One's ratio to the two passes, and the least and most that a process found."""
    ratio = f"{found['over_passes'][name]:.3f}"
    if "processes" not in found:
        return ratio
    each = [process["over_passes"][name] for process in found["processes"]]
    return f"{ratio} ({min(each):.3f} to {max(each):.3f})"


def render(document: Mapping[str, Any]) -> str:
    """A row for each model that was trained, and what belongs to the table."""
    rows = [
        [
            name,
            f"{found['parameters']:,}",
            f"{found['ms']['passes']:.4g}",
            *(over_passes(found, one) for one in ("fastsam", "eager")),
        ]
        for name, found in document["train"].items()
        if "ms" in found
    ]
    columns = ["whole step", "parameters", "two passes alone, ms", "FusedSAM / passes", "eager SAM / passes"]
    count = document["processes"]
    processes = "one process" if count == 1 else f"{count} fresh processes, their least and most in brackets"
    text = (
        "Forward, backward and optimizer, SGD with momentum; medians of "
        f"{processes}; ratios are of times in the same round. "
        f"{environment_line(document)}"
    )
    return "\n\n".join([markdown(columns, rows), text, f"To repeat: `{document['command']}`"])


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--processes", type=int, default=1, help="fresh ones for each model; 1: this one")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no model is started")
    parser.add_argument("--quick", action="store_true", help="the small model alone, three rounds")
    parser.add_argument("--json", nargs="?", const="", metavar="FILE", help="keep the result [benchmarks/results/...]")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = device_named(args.device)
    torch.backends.cudnn.benchmark = True
    torch.set_num_threads(args.threads)
    if args.worker:
        args.worker.write_text(json.dumps(train(args.models[0], device, args.rounds)))
        return
    rounds = 3 if args.quick else args.rounds
    arguments = [__file__, "--device", args.device, "--rounds", str(rounds), "--threads", str(args.threads)]
    document = begun(device, args.threads) | {"processes": args.processes, "train": {}}
    file = path_of(document, args.json, "train")
    found = document["train"]
    if args.json and Path(args.json).is_file():  # an earlier run's, of which only what failed is run again
        found |= {name: one for name, one in json.loads(Path(args.json).read_text())["train"].items() if "ms" in one}
    end = time.monotonic() + args.budget
    wanted = args.models or (["small"] if args.quick else [name for name in MODELS if name not in ON_A_CPU])
    for name in [name for name in wanted if name not in found]:
        try:
            if time.monotonic() > end:
                raise TimeoutError(f"left out, the {args.budget} s are over")
            if args.processes == 1:
                result = train(name, device, rounds)
            else:
                result = across_processes(fresh_processes([*arguments, "--models", name], args.processes, args.threads))
        except (Exception, SystemExit) as error:  # a missing package, too little memory: the others go on
            result = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        device.free()
        found[name] = result
        print(name, json.dumps(result), flush=True)
        keep(document, file)
    print(render(document))
    was_quiet(max((one["cores_taken"] for one in found.values() if "cores_taken" in one), default=0))
    sys.exit(any("error" in one for one in found.values()))


if __name__ == "__main__":
    main()
