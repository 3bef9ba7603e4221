"""The demo's data, network, optimizers and training runs, and the time of their steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from fastsam import ops
from fastsam.commands.diagnosis import EagerSAM
from fastsam.optimizer import FusedSAM
from fastsam.training import asam_groups, freeze_running_stats

TRAIN_IMAGES = 400
BATCH_SIZE = 50
EXTRAS = ("matplotlib", "rich", "sklearn")
RADII = 9  # points on the path from w to w + 2 e
EVALUATE_EVERY = 2  # epochs


class Recipe(NamedTuple):
    """What a base optimizer is trained with, fixed before the reported seeds were run."""

    optimizer: type[Optimizer]
    label: str
    kwargs: dict[str, Any]


RECIPES = {
    "sgd": Recipe(torch.optim.SGD, "SGD", {"lr": 0.3, "momentum": 0.9, "weight_decay": 5e-3}),
    "adamw": Recipe(torch.optim.AdamW, "AdamW", {"lr": 0.03, "weight_decay": 0.5}),
}


@dataclass(frozen=True)
class Settings:
    """One run of the demo."""

    base: str = "sgd"
    seeds: int = 5
    first_seed: int = 0
    epochs: int = 20
    noise: tuple[float, ...] = (0.0, 0.3)
    rho: float = 0.5
    asam_rho: float = 2.0
    asam_eta: float = 0.01
    backend: str = "auto"
    threads: int = 1
    output: str = "demo-results"

    @property
    def recipe(self) -> Recipe:
        """The base optimizer's."""
        return RECIPES[self.base]

    @property
    def methods(self) -> tuple[str, str, str]:
        """The base optimizer alone, and with SAM and ASAM around it."""
        return (self.recipe.label, "SAM", "ASAM")


class Data(NamedTuple):
    """A split: images [n, 1, 8, 8] float32, standardised; labels [n] int64, some of the training ones wrong."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass
class Run:
    """One training."""

    method: str
    noise: float
    seed: int
    accuracy: float = math.nan  # on the test images, per cent, after the last epoch
    accuracies: list[float] = field(default_factory=list)  # after each of `evaluated(epochs)`
    loss: float = math.nan  # on the training images and labels, at w
    loss_perturbed: float = math.nan  # at w + e, |e| = rho
    losses: list[float] = field(default_factory=list)  # at RADII points from w to w + 2 e
    step_ms: float = math.nan  # median of a whole step: passes and optimizer


def digits() -> tuple[Tensor, Tensor]:
    """The 1,797 scans [n, 1, 8, 8] float32 in 0 to 1, and their labels [n] int64."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32, device="cpu").view(-1, 1, 8, 8) / 16, torch.tensor(
        labels, dtype=torch.int64, device="cpu"
    )


def split(images: Tensor, labels: Tensor, noise: float, generator: torch.Generator) -> Data:
    """Draw the training images, and a wrong label for a share `noise` of them."""
    order = torch.randperm(len(images), generator=generator, device="cpu")
    train, test = order[:TRAIN_IMAGES], order[TRAIN_IMAGES:]
    images = (images - images[train].mean()) / images[train].std()
    wrong = torch.randperm(TRAIN_IMAGES, generator=generator, device="cpu")[: round(noise * TRAIN_IMAGES)]
    train_labels = labels[train]
    train_labels[wrong] = (
        train_labels[wrong] + torch.randint(1, 10, wrong.shape, generator=generator, device="cpu")
    ) % 10
    return Data(images[train], train_labels, images[test], labels[test])


def network(seed: int, width: int = 16) -> nn.Sequential:
    """Three convolutions with BatchNorm, average pooling, one linear layer: 14,458 parameters in 11 tensors."""

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = block(1, width, 1) + block(width, 2 * width, 2) + block(2 * width, 2 * width, 1)
        return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


def optimizer_for(method: str, model: nn.Module, settings: Settings) -> Optimizer:
    """The base optimizer, or SAM or ASAM around it."""
    recipe = settings.recipe
    if method == recipe.label:
        return recipe.optimizer(model.parameters(), **recipe.kwargs)
    return FusedSAM(_groups(method, model, settings), recipe.optimizer, backend=settings.backend, **recipe.kwargs)


def backend_of(settings: Settings) -> str:
    """The backend that takes the steps.

    Raises:
        ValueError: the one asked for is not available, or does not serve the CPU.
    """
    taken = ops.choose(ops.resolve(settings.backend), torch.device("cpu"), torch.float32)
    if taken is None:
        raise ValueError(f"backend={settings.backend!r} does not serve CPU tensors; leave --backend out")
    return taken


def _groups(method: str, model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    if method == "ASAM":
        return asam_groups(model, rho=settings.asam_rho, eta=settings.asam_eta)
    return [{"params": list(model.parameters()), "rho": settings.rho}]


def train(method: str, noise: float, seed: int, settings: Settings, epoch_done: Callable[[], None]) -> Run:
    """Train one network and measure it."""
    generator = torch.Generator().manual_seed(seed)
    data = split(*digits(), noise, generator)
    model = network(seed)
    optimizer = optimizer_for(method, model, settings)
    steps = settings.epochs * (TRAIN_IMAGES // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    run = Run(method, noise, seed)
    times = []
    for epoch in range(1, settings.epochs + 1):
        for batch in torch.randperm(TRAIN_IMAGES, generator=generator, device="cpu").view(-1, BATCH_SIZE):
            images, labels = data.train_images[batch], data.train_labels[batch]

            def closure(images: Tensor = images, labels: Tensor = labels) -> Tensor:
                optimizer.zero_grad()
                second_pass = isinstance(optimizer, FusedSAM) and optimizer.perturbed
                with freeze_running_stats(model) if second_pass else nullcontext():
                    loss = F.cross_entropy(model(images), labels)
                loss.backward()  # type: ignore[no-untyped-call]
                return loss

            start = perf_counter()
            optimizer.step(closure)  # type: ignore[arg-type]
            times.append(perf_counter() - start)
            schedule.step()
        if epoch in evaluated(settings.epochs):
            run.accuracies.append(accuracy(model, data.test_images, data.test_labels))
        epoch_done()
    run.accuracy = run.accuracies[-1]
    run.losses = losses_along_gradient(model, data.train_images, data.train_labels, settings.rho)
    run.loss, run.loss_perturbed = run.losses[0], run.losses[RADII // 2]
    run.step_ms = 1e3 * median(times)
    return run


def evaluated(epochs: int) -> list[int]:
    """The epochs after which the test images are looked at; the last is one of them, and the one that is reported."""
    return [*range(EVALUATE_EVERY, epochs, EVALUATE_EVERY), epochs]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images that the model in evaluation mode gets right, per cent."""
    model.eval()
    right = (model(images).argmax(dim=1) == labels).sum()
    model.train()
    return 100 * int(right) / len(labels)


def losses_along_gradient(model: nn.Module, images: Tensor, labels: Tensor, rho: float) -> list[float]:
    """The loss at RADII points from w to w + 2 rho g / ||g||, g over all images, in evaluation mode.

    The path is plain SAM's for every optimizer, so that they can be compared. The weights end as they were.
    """
    model.eval()
    climber = FusedSAM(model.parameters(), torch.optim.SGD, lr=0.0)
    climber.zero_grad()
    F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
    losses = []
    for i in range(RADII):
        climber.param_groups[0]["rho"] = 2 * rho * i / (RADII - 1)
        climber.first_step()
        with torch.no_grad():
            losses.append(F.cross_entropy(model(images), labels).item())
        climber.restore()
    model.train()
    return losses


class Timing(NamedTuple):
    """Milliseconds a step takes outside the passes: medians."""

    ours: float  # FusedSAM; the base optimizer by itself in its own row
    eager: float


def time_optimizers(settings: Settings, rounds: int = 200) -> dict[str, Timing]:
    """The optimizer's part of a step, FusedSAM and the eager algorithm in turns on the same gradients.

    Raises:
        RuntimeError: the two disagree about the weights.
    """
    data = split(*digits(), 0.0, torch.Generator().manual_seed(settings.first_seed))
    images, labels = data.train_images[:BATCH_SIZE], data.train_labels[:BATCH_SIZE]
    recipe = settings.recipe
    kwargs = {**recipe.kwargs, "lr": 1e-4}  # the gradients are always the same: do not go far
    timings = {}
    for method in settings.methods:
        models = [network(settings.first_seed) for _ in range(2)]
        gradients = []
        for scale in (1.0, 0.5):  # stand in for those of the two passes
            loss = scale * F.cross_entropy(models[0](images), labels)
            gradients.append(torch.autograd.grad(loss, list(models[0].parameters())))
        rivals: list[tuple[Callable[[], Any], ...]]
        if method == recipe.label:
            base = recipe.optimizer(models[0].parameters(), **kwargs)
            rivals = [(base.step,)]
        else:
            fused = FusedSAM(_groups(method, models[0], settings), recipe.optimizer, backend=settings.backend, **kwargs)
            eager = EagerSAM(_groups(method, models[1], settings), recipe.optimizer, **kwargs)
            rivals = [(fused.first_step, fused.second_step), (eager.first_step, eager.second_step)]
        times: list[list[float]] = [[] for _ in rivals]
        for _ in range(rounds):
            for model, calls, spent in zip(models, rivals, times, strict=False):
                total = 0.0
                for call, grads in zip(calls, gradients, strict=False):
                    for p, grad in zip(model.parameters(), grads, strict=True):
                        p.grad = grad
                    start = perf_counter()
                    call()
                    total += perf_counter() - start
                spent.append(1e3 * total)
        timings[method] = Timing(median(times[0]), median(times[1]) if len(times) > 1 else math.nan)
        if len(rivals) > 1:
            _require_agreement(method, *models)
    return timings


def _require_agreement(method: str, fused: nn.Module, eager: nn.Module) -> None:
    for (name, p), q in zip(fused.named_parameters(), eager.parameters(), strict=True):
        if not torch.allclose(p, q, rtol=1e-4, atol=1e-6):
            raise RuntimeError(
                f"demo: FusedSAM and the eager {method} disagree about {name} by {(p - q).abs().max().item():.1e}; "
                "run python -m fastsam to see which backend is at fault"
            )


# --- results ---------------------------------------------------------------------------------------------------------
