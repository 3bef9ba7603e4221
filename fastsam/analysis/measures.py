"""Sharpness: the rise of the loss within a ball around the weights, by FusedSAM's own perturbation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastsam.analysis.extras import np, tracked
from fastsam.analysis.objective import Batch, Objective, samples
from fastsam.analysis.results import Sharpness
from fastsam.optimizer import FusedSAM


def sharpness(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    data: Iterable[Any],
    rho: float = 0.05,
    *,
    m: int | None = None,
    direction: str = "gradient",
    adaptive: bool = False,
    eta: float = 0.0,
    draws: int = 16,
    seed: int = 0,
    training: bool = False,
    progress: bool | None = None,
    backend: str = "auto",
) -> Sharpness:
    r"""By how much the loss rises at a distance rho of the weights: the mean of L(w + e) - L(w).

    "gradient": e = rho g / ||g||, SAM's own step (Foret et al., arXiv 2010.01412): to first order the highest loss in
    the ball, so a lower bound of it. With `m` each group of m samples has its own e and its own loss (m-sharpness,
    section 4.1 there). "random": e is uniform on the sphere, `draws` times.

    Adaptive, the ball is ASAM's (arXiv 2102.11600), ||e / T|| <= rho with T = abs(w) + eta, so that sharpness does not
    change when layers are rescaled: e = rho T^2 g / ||T g||, or T times a random direction.

    Args:
        model: its parameters that require gradients are w.
        loss_fn: `loss_fn(model(*inputs), targets)`, the mean over the samples.
        data: a batch `(*inputs, targets)` or an iterable of batches.
        rho: the distance, >= 0.
        m: samples a group, of consecutive samples in a batch; the last group of a batch may be smaller and counts by
            its size. None: all data together.
        direction: "gradient" or "random".
        adaptive: measure distances in units of the weights.
        eta: added to abs(w), >= 0.
        draws: how many random directions.
        seed: of these.
        training: evaluate in training mode (batch statistics, dropout) instead of evaluation mode.
        progress: a progress bar; None: in a terminal only.
        backend: FusedSAM's.

    Raises:
        ValueError: an argument out of range.

    Returns:
        The losses before and after; `value` is the sharpness. NaN where a gradient is not finite.
    """
    if direction not in ("gradient", "random"):
        raise ValueError(f"sharpness: direction must be 'gradient' or 'random', got {direction!r}")
    if m is not None and (m < 1 or direction == "random"):
        raise ValueError(f"sharpness: m must be >= 1 and goes with direction='gradient', got {m!r} with {direction!r}")
    if draws < 1:
        raise ValueError(f"sharpness: draws must be >= 1, got {draws!r}")
    objective = Objective(model, loss_fn, data, training)
    before, after, weights = [], [], []
    with objective.measuring():
        climber = FusedSAM(
            objective.params, torch.optim.SGD, rho=rho, adaptive=adaptive, eta=eta, lr=0.0, backend=backend
        )
        loss = objective.loss()
        if direction == "random":
            generator = torch.Generator().manual_seed(seed)
            for _ in tracked(range(draws), "random directions", draws, progress):
                gradient = [_drawn(param, adaptive, eta, generator) for param in objective.params]
                after.append(_climbed(climber, objective, gradient, None))
                before.append(loss)
                weights.append(1.0)
        else:
            groups = [None] if m is None else _groups(objective, m)
            total = 1 if m is None else sum(-(-samples(batch) // m) for batch in objective.batches())
            for group in tracked(groups, "gradient ascent", total, progress):
                before.append(loss if group is None else objective.loss([group]))
                after.append(_climbed(climber, objective, objective.gradient(group and [group]), group))
                weights.append(1.0 if group is None else samples(group))
    shares = np.array(weights) / np.sum(weights)
    return Sharpness(rho, direction, adaptive, loss, np.array(before), np.array(after), shares)


def _climbed(climber: FusedSAM, objective: Objective, gradient: Iterable[Tensor], group: Batch | None) -> float:
    """The loss at w + e."""
    for param, grad in zip(objective.params, gradient, strict=True):
        param.grad = grad
    climber.first_step(zero_grad=True)
    try:
        norm = climber.stats().first_norm
        if norm is not None and not norm.isfinite():
            return float("nan")  # nothing was perturbed
        return objective.loss(group and [group])
    finally:
        climber.restore()


def _drawn(param: Tensor, adaptive: bool, eta: float, generator: torch.Generator) -> Tensor:
    """What a perturbation follows to be uniform on the sphere: normal numbers n, or n / T, as e is along T^2 g."""
    normal = torch.randn(param.shape, generator=generator).to(param)
    if not adaptive:
        return normal
    scale = param.detach().abs() + eta
    return torch.where(scale > 0, normal / scale, 0.0)


def _groups(objective: Objective, m: int) -> Iterator[Batch]:
    for batch in list(objective.batches()):
        for i in range(0, samples(batch), m):
            yield tree_map_only(Tensor, functools.partial(_rows, first=i, last=i + m), batch)


def _rows(tensor: Tensor, first: int, last: int) -> Tensor:
    return tensor[first:last] if tensor.dim() > 0 else tensor
