"""The Hessian of the loss: its largest eigenvalues, its density of eigenvalues, its trace."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastsam.analysis.extras import RandomState, np, require, tracked
from fastsam.analysis.objective import Objective
from fastsam.analysis.results import Eigenvalues, Spectrum


def top_eigenvalues(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    data: Iterable[Any],
    k: int = 1,
    *,
    tolerance: float = 1e-3,
    max_iterations: int = 200,
    seed: int = 0,
    training: bool = False,
    progress: bool | None = None,
) -> Eigenvalues:
    """The k eigenvalues of the loss's Hessian that are largest in magnitude, with their eigenvectors.

    Power iteration from a random vector: v <- H v / ||H v||, value = `<v, H v>`. Those found before are projected out.
    It ends when ||H v - value v|| <= tolerance * abs(value). Then an eigenvalue is no further away than that; the error
    of the value itself goes with its square over the gap to the next one, that of the vector with tolerance over it.

    Args:
        model: its parameters that require gradients are w.
        loss_fn: `loss_fn(model(*inputs), targets)`, the mean over the samples.
        data: a batch `(*inputs, targets)` or an iterable of batches.
        k: how many, between 1 and the number of weights.
        tolerance: relative, of the residual; below 1e-5 float32 may not get.
        max_iterations: products with the Hessian for each; every one costs about two passes over the data.
        seed: of the vectors to begin with.
        training: evaluate in training mode instead of evaluation mode.
        progress: a progress bar; None: in a terminal only.

    Raises:
        ValueError: k out of range.

    Returns:
        Values, vectors and how exact they are. A warning says that an eigenvalue did not converge.
    """
    objective = Objective(model, loss_fn, data, training)
    size = sum(param.numel() for param in objective.params)
    if not 1 <= k <= size:
        raise ValueError(f"top_eigenvalues: k must be between 1 and the number of weights, {size}, got {k!r}")
    wide = torch.float64 if any(param.dtype == torch.float64 for param in objective.params) else torch.float32
    generator = torch.Generator().manual_seed(seed)
    values, residuals, iterations, found = [], [], [], torch.empty(0, size, dtype=wide).to(objective.params[0].device)
    with objective.measuring():
        for i in range(k):
            vector = torch.randn(size, generator=generator, dtype=wide).to(found)
            vector = _unit(_without(vector, found))
            value, residual, steps = 0.0, float("inf"), 0
            for _ in tracked(range(max_iterations), f"eigenvalue {i + 1} of {k}", max_iterations, progress):
                steps += 1
                product = _without(objective.hessian_product(vector), found)
                value = float(vector.double() @ product.double())
                residual = float((product - value * vector).norm())
                if residual <= tolerance * abs(value) or not product.isfinite().all() or not product.any():
                    break
                vector = _unit(product)
            found = torch.cat([found, vector[None]])
            values.append(value)
            residuals.append(residual)
            iterations.append(steps)
    exact = np.array(residuals) <= tolerance * np.abs(values)
    if not exact.all():
        warnings.warn(
            f"top_eigenvalues: {(~exact).sum()} of {k} did not come below a residual of {tolerance} within "
            f"{max_iterations} iterations; their relative residuals are in `residuals`. Raise max_iterations",
            stacklevel=2,
        )
    return Eigenvalues(
        np.array(values), found.cpu().numpy(), np.array(residuals), np.array(iterations, dtype=np.int64), exact
    )


def _without(vector: Tensor, found: Tensor) -> Tensor:
    """A vector [n] without its parts along unit vectors [k, n]."""
    return vector - found.T @ (found @ vector)


def _unit(vector: Tensor) -> Tensor:
    length: Tensor = vector.norm()
    return vector / length


def spectrum(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    data: Iterable[Any],
    *,
    lanczos_vectors: int = 64,
    repeats: int = 1,
    points: int = 512,
    seed: int = 0,
    training: bool = False,
) -> Spectrum:
    """The density of the Hessian's eigenvalues, by stochastic Lanczos quadrature (curvlinops; Papyan, JMLR 21, 2020).

    Args:
        model: its parameters that require gradients are w.
        loss_fn: `loss_fn(model(*inputs), targets)`, the mean over the samples.
        data: a batch `(*inputs, targets)` or an iterable of batches.
        lanczos_vectors: products with the Hessian in each quadrature; peaks get narrower with more.
        repeats: quadratures, from different random vectors, to average.
        points: of the grid.
        seed: of the random vectors.
        training: evaluate in training mode instead of evaluation mode.

    Raises:
        ModuleNotFoundError: curvlinops is not installed.
    """
    curvlinops = require("curvlinops", "curvlinops-for-pytorch")
    objective = Objective(model, loss_fn, data, training)
    operator = _operator(objective)
    with objective.measuring():
        _seed(seed)
        grid, density = curvlinops.lanczos_approximate_spectrum(
            operator, min(lanczos_vectors, operator.shape[0]), num_points=points, num_repeats=repeats
        )
    return Spectrum(grid.double().cpu().numpy(), density.double().cpu().numpy())


def trace(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    data: Iterable[Any],
    *,
    products: int = 90,
    seed: int = 0,
    training: bool = False,
) -> float:
    """An estimate of the Hessian's trace, by Hutch++ (curvlinops; Meyer et al., arXiv 2010.09649).

    Args:
        model: its parameters that require gradients are w.
        loss_fn: `loss_fn(model(*inputs), targets)`, the mean over the samples.
        data: a batch `(*inputs, targets)` or an iterable of batches.
        products: with the Hessian, at least 3, rounded down to a multiple of 3; as many as there are weights, or more:
            the trace is taken exactly, one product a weight.
        seed: of the random vectors.
        training: evaluate in training mode instead of evaluation mode.

    Raises:
        ModuleNotFoundError: curvlinops is not installed.
        ValueError: too few products.
    """
    if products < 3:
        raise ValueError(f"trace: products must be >= 3, got {products!r}")
    curvlinops = require("curvlinops", "curvlinops-for-pytorch")
    objective = Objective(model, loss_fn, data, training)
    operator = _operator(objective)
    with objective.measuring():
        _seed(seed)
        size = operator.shape[0]
        if products >= size:
            unit = torch.eye(size, dtype=operator.dtype, device=operator.device)
            return sum(float(objective.hessian_product(row) @ row) for row in unit)
        return float(curvlinops.hutchpp_trace(operator, products // 3 * 3))


def _seed(seed: int) -> None:
    """Seed what curvlinops and scipy draw from; `measuring` sets it back."""
    np.random.seed(seed)
    torch.manual_seed(seed)


def _operator(objective: Objective) -> Any:
    """Our products with the Hessian as an operator of curvlinops."""
    base = require("curvlinops._torch_base", "curvlinops-for-pytorch").PyTorchLinearOperator

    class Hessian(base):  # type: ignore[misc, valid-type]
        SELF_ADJOINT = True
        device = objective.params[0].device
        dtype = torch.float64 if objective.params[0].dtype == torch.float64 else torch.float32

        def __init__(self) -> None:
            shape = [(sum(param.numel() for param in objective.params),)]
            super().__init__(shape, shape)

        def _matmat(self, columns: list[Tensor]) -> list[Tensor]:
            drawn = RandomState([self.device], objective.generators)  # which a product sets to where all of them begin
            try:
                products = [objective.hessian_product(column) for column in columns[0].T]
            finally:
                drawn.rewind()
            return [torch.stack(products, dim=1)]

    return Hessian()
