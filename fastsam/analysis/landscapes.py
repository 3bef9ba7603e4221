"""Scans of the loss: along random or the Hessian's directions, and between two models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastsam.analysis.extras import np, tracked, unflat
from fastsam.analysis.hessian import top_eigenvalues
from fastsam.analysis.objective import Objective
from fastsam.analysis.results import Landscape


def landscape(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    data: Iterable[Any],
    *,
    dimensions: int = 1,
    directions: str | Sequence[Any] = "random",
    distance: float = 1.0,
    points: int = 21,
    batch_norm: str = "keep",
    seed: int = 0,
    training: bool = False,
    progress: bool | None = None,
) -> Landscape:
    """The loss at w + x d1, or w + x d1 + y d2, for x and y from -distance to distance; the middle is w exactly.

    Args:
        model: its parameters that require gradients are w.
        loss_fn: `loss_fn(model(*inputs), targets)`, the mean over the samples.
        data: a batch `(*inputs, targets)` or an iterable of batches.
        dimensions: 1 or 2.
        directions: "random": normal ones with the length of each filter of the weights (Li et al., arXiv 1712.09913;
            see `random_direction`); "hessian": the unit eigenvectors of the eigenvalues of largest magnitude; or a
            sequence of vectors [n] (such as `Eigenvalues.vectors`) or of lists with a tensor a parameter, of those that
            require gradients.
        distance: to each side, in lengths of the directions.
        points: along each direction, odd.
        batch_norm: running statistics: "keep" the model's, or "reestimate" them over all data at every point (also in
            the middle, whose loss then is not exactly the model's).
        seed: of random directions.
        training: evaluate in training mode instead of evaluation mode.
        progress: a progress bar; None: in a terminal only.

    Raises:
        ValueError: an argument out of range, or directions that do not fit.
    """
    if dimensions not in (1, 2) or points < 3 or points % 2 == 0:
        raise ValueError(
            f"landscape: dimensions must be 1 or 2 and points odd and >= 3, got {dimensions!r} and {points!r}"
        )
    _check_batch_norm("landscape", batch_norm, training)
    objective = Objective(model, loss_fn, data, training)
    axes, kind = _directions(objective, directions, dimensions, seed, progress)
    half = points // 2
    places = [distance * (i - half) / half for i in range(points)]
    grid = [(x, y) for x in places for y in (places if dimensions == 2 else [0.0])]

    def values() -> Iterator[float]:
        old = [param.detach().clone() for param in objective.params]
        for x, y in grid:
            with torch.no_grad():
                for i, param in enumerate(objective.params):
                    param.copy_(old[i])
                    for place, axis in zip((x, y), axes, strict=False):
                        if place:
                            param.add_(axis[i], alpha=place)
            yield _loss(objective, batch_norm)

    with objective.measuring():
        loss = objective.loss()
        losses = np.array(list(tracked(values(), "landscape", len(grid), progress)))
    shape = (points,) * dimensions
    x = np.array(places)
    return Landscape(kind, x, losses.reshape(shape), loss, x.copy() if dimensions == 2 else None)


def interpolation(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    data: Iterable[Any],
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    *,
    points: int = 21,
    beyond: float = 0.0,
    batch_norm: str = "keep",
    training: bool = False,
    progress: bool | None = None,
) -> Landscape:
    """The loss on the straight line between two checkpoints: at (1 - x) start + x end, at the ends exactly theirs.

    Args:
        model: gives the architecture; it keeps its own weights.
        loss_fn: `loss_fn(model(*inputs), targets)`, the mean over the samples.
        data: a batch `(*inputs, targets)` or an iterable of batches.
        start: a `state_dict` of it. Floating-point buffers (running statistics) are interpolated, others are start's.
        end: another one.
        points: on the line, >= 2.
        beyond: how far to go on behind both ends, in lengths of the line.
        batch_norm: "keep" interpolated running statistics, or "reestimate" them over all data at every point, which is
            how the models on the line would be used.
        training: evaluate in training mode instead of evaluation mode.
        progress: a progress bar; None: in a terminal only.

    Raises:
        ValueError: a checkpoint does not fit the model, or an argument is out of range.
    """
    if points < 2:
        raise ValueError(f"interpolation: points must be >= 2, got {points!r}")
    _check_batch_norm("interpolation", batch_norm, training)
    targets = {key: value for key, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    for name, state in (("start", start), ("end", end)):
        wrong = {key for key, tensor in targets.items() if key not in state or state[key].shape != tensor.shape}
        if wrong := wrong | {key for key in set(state) - set(targets) if isinstance(state[key], Tensor)}:
            raise ValueError(f"interpolation: {name} does not fit the model: {', '.join(sorted(wrong))}")
    objective = Objective(model, loss_fn, data, training)
    places = [-beyond + (1 + 2 * beyond) * i / (points - 1) for i in range(points)]

    def loss_at(x: float) -> float:
        with torch.no_grad():
            for key, target in targets.items():
                a, b = start[key].to(target.device), end[key].to(target.device)
                if x == 0 or not target.is_floating_point():
                    target.copy_(a)
                else:
                    target.copy_(b if x == 1 else (1 - x) * a + x * b)
        return _loss(objective, batch_norm)

    with objective.measuring():
        at_start = loss_at(0.0)
        losses = list(tracked(map(loss_at, places), "interpolation", points, progress))
    return Landscape("interpolation", np.array(places), np.array(losses), at_start)


def random_direction(
    params: Iterable[Tensor], seed: int = 0, *, filter_normalised: bool = True, biases: bool = False
) -> list[Tensor]:
    """A random direction, one tensor a parameter.

    Filter-normalised (Li et al., arXiv 1712.09913): d_f <- d_f ||w_f|| / ||d_f|| for every filter f, the slices along
    the first dimension, so that layers whose scale does not matter cannot hide sharpness.

    Args:
        params: the weights.
        seed: of the normal numbers.
        filter_normalised: do that; if not, the numbers stay as drawn.
        biases: move parameters of fewer than two dimensions (biases, normalisation layers), too; the paper does not.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = []
    for param in params:
        drawn = torch.randn(param.shape, generator=generator).to(param)
        if param.dim() < 2:
            drawn = drawn * (param.detach().norm() / drawn.norm() if filter_normalised else 1) if biases else drawn * 0
        elif filter_normalised:
            rows, old = drawn.flatten(1), param.detach().flatten(1)
            drawn = (rows * (old.norm(dim=1) / rows.norm(dim=1))[:, None]).view_as(drawn)
        direction.append(drawn)
    return direction


def _directions(
    objective: Objective, wanted: str | Sequence[Any], count: int, seed: int, progress: bool | None
) -> tuple[list[list[Tensor]], str]:
    """A list of tensors for each dimension, and the kind."""
    params = objective.params
    if isinstance(wanted, str):
        if wanted == "random":
            return [random_direction(params, 2 * seed + i) for i in range(count)], wanted
        if wanted == "hessian":
            found = top_eigenvalues(
                objective.model,
                objective.loss_fn,
                objective.data,
                count,
                tolerance=1e-2,
                seed=seed,
                training=objective.training,
                progress=progress,
            )
            return [unflat(torch.from_numpy(vector), params) for vector in found.vectors], wanted
        raise ValueError(f"landscape: directions must be 'random', 'hessian' or vectors, got {wanted!r}")
    if len(wanted) < count:
        raise ValueError(f"landscape: {count} dimensions need as many directions, got {len(wanted)}")
    axes = []
    for direction in wanted[:count]:
        if not isinstance(direction, list | tuple):
            vector, size = torch.as_tensor(direction), sum(param.numel() for param in params)
            if vector.shape != (size,):
                raise ValueError(f"landscape: a direction must have shape [{size}], got {list(vector.shape)}")
            direction = unflat(vector, params)
        elif [part.shape for part in direction] != [param.shape for param in params]:
            raise ValueError("landscape: a direction must have a tensor of its shape for each parameter with gradients")
        axes.append([part.to(param) for part, param in zip(direction, params, strict=True)])
    return axes, "given"


def _loss(objective: Objective, batch_norm: str) -> float:
    with objective.statistics_taken_anew() if batch_norm == "reestimate" else nullcontext():
        return objective.loss()


def _check_batch_norm(who: str, batch_norm: str, training: bool) -> None:
    if batch_norm not in ("keep", "reestimate"):
        raise ValueError(f"{who}: batch_norm must be 'keep' or 'reestimate', got {batch_norm!r}")
    if batch_norm == "reestimate" and training:
        raise ValueError(f"{who}: in training mode there are no running statistics to reestimate; use training=False")
