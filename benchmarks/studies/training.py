"""One training, step by step, with everything that the studies tell of it."""

import time
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from benchmarks.studies.data import Task, load, network
from fastsam import FusedSAM, SAMStep
from fastsam.commands.demo_training import BATCH_SIZE, RECIPES

RECIPE = RECIPES["sgd"]  # learning rate and weight decay are the base optimizer's best: see python -m fastsam demo
SGD, SAM = RECIPE.label, "SAM"
TRAINING = {"seeds": 5, "first_seed": 0, "epochs": 20, "rho": 0.5, "width": 16}
DATA_OPTIONS = {"data": "digits", "folder": "", "train_images": 0, "pixels": 64}


def base(model: nn.Module, **options: Any) -> Optimizer:
    """SGD with momentum."""
    return RECIPE.optimizer(model.parameters(), **{**RECIPE.kwargs, **options})


def sam(model: nn.Module, rho: float, **options: Any) -> FusedSAM:
    """SAM around it, with FusedSAM's other options."""
    return FusedSAM(model.parameters(), RECIPE.optimizer, rho=rho, **{**RECIPE.kwargs, **options})


class Training:
    """A model with its optimizer, a cosine schedule, and batches in an order that the generator draws.

    Args:
        task: what is learned.
        model: the network.
        optimizer: of its parameters; a FusedSAM steps by SAMStep.
        epochs: how long.
        generator: draws the order of the batches.
        **step: options of SAMStep.
    """

    def __init__(
        self, task: Task, model: nn.Module, optimizer: Optimizer, epochs: int, generator: torch.Generator, **step: Any
    ) -> None:
        """See the class."""
        self.task, self.model, self.optimizer, self.times = task, model, optimizer, []
        images, labels = task.train
        size, count = min(BATCH_SIZE, len(images)), len(images)
        orders = [torch.randperm(count, generator=generator)[: count // size * size] for _ in range(epochs)]
        self.batches = [batch for order in orders for batch in order.view(-1, size)]
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(self.batches))
        self._step = (
            SAMStep(model, optimizer, functional.cross_entropy, **step)
            if isinstance(optimizer, FusedSAM)
            else self._plain_step
        )

    def _plain_step(self, images: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad()
        functional.cross_entropy(self.model(images), labels).backward()
        self.optimizer.step()

    def step(self, index: int) -> None:
        """Take one of the steps."""
        batch = self.batches[index]
        images, labels = self.task.train[0][batch], self.task.train[1][batch]
        start = time.perf_counter()
        self._step(images, labels)
        self.times.append(time.perf_counter() - start)
        self.schedule.step()

    def run(self) -> "Training":
        """Take all of them."""
        for index in range(len(self.batches)):
            self.step(index)
        return self

    def found(self) -> dict[str, float]:
        """Accuracy, per cent, on test and training images (with the labels that were learned), and time of a step."""
        return {
            "test": accuracy(self.model, *self.task.test),
            "train": accuracy(self.model, *self.task.train),
            "step_ms": 1e3 * median(self.times),
        }


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Per cent of the images that the model in evaluation mode gets right."""
    model.eval()
    right = sum(
        int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(1000), labels.split(1000), strict=True)
    )
    model.train()
    return 100 * right / len(labels)


def seeds(settings: dict[str, Any]) -> range:
    """The settings' seeds."""
    return range(settings["first_seed"], settings["first_seed"] + settings["seeds"])


def training(settings: dict[str, Any], seed: int, method: str, noise: float = 0.0, **options: Any) -> Training:
    """A training that a seed decides: the split, wrong labels, first weights, and the order of the batches.

    Args:
        settings: of the study.
        seed: the same for all methods that are compared.
        method: SGD, or SAM in any of its forms.
        noise: share of the training images whose label is wrong.
        **options: of FusedSAM, and in `step` those of SAMStep.
    """
    generator = torch.Generator().manual_seed(seed)
    task = load(settings, noise, generator)
    model = network(task, seed, settings["width"])
    step = options.pop("step", {})
    optimizer = base(model) if method == SGD else sam(model, **{"rho": settings.get("rho"), **options})
    return Training(task, model, optimizer, settings["epochs"], generator, **step)
