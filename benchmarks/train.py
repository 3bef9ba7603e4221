"""Time of whole training steps with SAM, and the launches and host time of its optimizer part.

    python benchmarks/train.py --device cuda --json FILE          # ResNet-18 at 32x32; ResNet-50, ViT-B/16 at 224
    python benchmarks/train.py --device cpu --quick --json FILE   # one small model: the same keys

Contenders: two forward and backward passes alone, what no SAM can go below; FusedSAM, eager and as one CUDA graph; the
formula written one tensor and one operation at a time. Models come from torchvision or timm; those of a package that is
not installed are left out, and "small" needs neither. They are timed in turns, medians of the rounds.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import Case, Problem
from rivals import Fastsam
from timing import clock_for, environment
from torch import Tensor, nn

import fastsam
from fastsam import ops

MODELS = {  # name: (batch, pixels, classes)
    "small": (128, 32, 10),
    "resnet18": (128, 32, 10),
    "resnet50": (64, 224, 1000),
    "vit_b16": (64, 224, 1000),
}
LR, MOMENTUM, RHO = 0.01, 0.9, 0.05
WARMUP = 3


def make_model(name: str, pixels: int, classes: int) -> nn.Module:
    """One of `MODELS`; ImportError if no package has it."""
    if name == "small":
        layers = [nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2 * pixels * pixels, classes))
    try:
        import torchvision

        build = {"vit_b16": "vit_b_16"}.get(name, name)
        model: nn.Module = torchvision.models.get_model(build, num_classes=classes)
    except ImportError:
        import timm

        model = timm.create_model({"vit_b16": "vit_base_patch16_224"}.get(name, name), num_classes=classes)
    return model


class Contender:
    """A model with a training step; `name` decides how."""

    def __init__(self, name: str, model: str, device: torch.device) -> None:
        """Build model, data and optimizer."""
        batch, pixels, classes = MODELS[model]
        torch.manual_seed(0)
        self.name, self.device = name, device
        self.model = make_model(model, pixels, classes).to(device)
        self.x = torch.randn(batch, 3, pixels, pixels, device=device)
        self.y = torch.randint(classes, (batch,), device=device)
        params = list(self.model.parameters())
        self.base = torch.optim.SGD(params, LR, MOMENTUM)
        self.old = [torch.empty_like(p) for p in params]
        if name.startswith("fastsam"):
            self.fused = fastsam.FusedSAM(params, torch.optim.SGD, rho=RHO, lr=LR, momentum=MOMENTUM)
        self.step: Callable[[], None] = {"passes": self.passes, "eager": self.eager}.get(name, self.fastsam)
        if name == "fastsam_captured":
            self.capture()

    def backward(self) -> None:
        """One forward and backward pass, in bfloat16 autocast on a GPU."""
        self.model.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False):
            loss: Tensor = nn.functional.cross_entropy(self.model(self.x), self.y)
        loss.backward()

    def passes(self) -> None:
        """Two passes and no optimizer."""
        self.backward()
        self.backward()

    def fastsam(self) -> None:
        """A step of FusedSAM."""
        self.backward()
        self.fused.first_step()
        self.backward()
        self.fused.step()

    def eager(self) -> None:
        """The formula, one tensor and one operation at a time."""
        self.backward()
        params = self.base.param_groups[0]["params"]
        with torch.no_grad():
            scale = RHO / (torch.stack([p.grad.norm() for p in params]).norm() + 1e-12)
            self.old = [p.clone() for p in params]
            for p in params:
                p.add_(p.grad * scale)
        self.backward()
        with torch.no_grad():
            for p, old in zip(params, self.old, strict=True):
                p.data = old
        self.base.step()

    def capture(self) -> None:
        """Make `step` the replay of one CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                self.fastsam()
        torch.cuda.current_stream().wait_stream(stream)
        self.model.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.fastsam()
        self.step = graph.replay


def train(model: str, device: torch.device, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step of every contender, and ratios to the two passes."""
    names = ["passes", "fastsam", "eager", *(["fastsam_captured"] if device.type == "cuda" else [])]
    contenders = [Contender(name, model, device) for name in names]
    clock = clock_for(device)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(WARMUP + rounds):
        for contender in contenders:
            seconds = clock(contender.step)
            if turn >= WARMUP:
                times[contender.name].append(1e3 * seconds)
    ms = {name: round(statistics.median(values), 4) for name, values in times.items()}
    return {"ms": ms, "over_passes": {name: round(value / ms["passes"], 4) for name, value in ms.items()}}


def launches(device: torch.device) -> dict[str, Any]:
    """Kernels and host microseconds of the optimizer part, for 161 small tensors."""
    problem = Problem("tiny161", Case(), device)
    stepper = Fastsam("fastsam", problem, ops.choose("auto", device, torch.float32) or "reference")

    def step() -> float:
        stepper.prepare_first()
        start = time.perf_counter()
        stepper.first()
        middle = time.perf_counter()
        stepper.prepare_second()
        again = time.perf_counter()
        stepper.second()
        return middle - start + time.perf_counter() - again

    for _ in range(20):
        step()
    host = statistics.median(step() for _ in range(200))
    kind = torch.profiler.ProfilerActivity.CUDA if device.type == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profile:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    wanted = "fastsam" if device.type == "cuda" else "fastsam::"
    names = [event.name for event in profile.events() if wanted in event.name]
    return {"kernels": len(names), "names": sorted({name[:60] for name in names}), "host_us": round(1e6 * host, 1)}


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="the small model alone, three rounds")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    found: dict[str, Any] = {"environment": environment(device, torch.get_num_threads()), "train": {}}
    parts: dict[str, Callable[[], Any]] = {"launches": lambda: launches(device)}
    for name in args.models or (["small"] if args.quick else list(MODELS)):
        parts[name] = lambda name=name: train(name, device, 3 if args.quick else args.rounds)
    for name, part in parts.items():
        try:
            result = part()
        except (ImportError, RuntimeError) as error:  # a missing package, too little memory: the others go on
            result = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        found.update({name: result}) if name == "launches" else found["train"].update({name: result})
        print(name, json.dumps(result), flush=True)
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
