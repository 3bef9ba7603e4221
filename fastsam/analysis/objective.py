"""The loss over all data as a function of the weights, with its gradient and products with its Hessian."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map_only

from fastsam.analysis.extras import RandomState, flat, unchanged, unflat
from fastsam.training import freeze_running_stats

Batch = Sequence[Any]


class Objective:
    """The mean of a model's loss over data: L(w).

    Every evaluation draws the same random numbers, so that dropout and a shuffling DataLoader make no noise, and no
    evaluation writes to running statistics.

    Args:
        model: a module; its parameters that require gradients are w.
        loss_fn: `loss_fn(model(*inputs), targets)`, the mean over the samples.
        data: one batch `(*inputs, targets)`, or an iterable of batches. Tensors are moved to the model's device.
        training: evaluate in training mode (dropout draws, batch normalisation takes the batch's statistics) instead of
            in evaluation mode.

    Raises:
        ValueError: the model has no parameter that requires gradients; there are no data.
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Tensor], data: Iterable[Any], training: bool) -> None:
        """See the class."""
        self.model, self.loss_fn, self.training = model, loss_fn, training
        self.params = [param for param in model.parameters() if param.requires_grad]
        if not self.params:
            raise ValueError("fastsam.analysis: the model has no parameter that requires gradients")
        if isinstance(data, tuple | list) and any(isinstance(part, Tensor) for part in data):
            data = [data]
        elif isinstance(data, Iterator):  # it can be gone through once only
            data = list(data)
        self.data = data
        samplers = (data, getattr(data, "sampler", None))
        found = [getattr(sampler, "generator", None) for sampler in samplers]
        self.generators = list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
        self.drawn = RandomState({param.device for param in self.params}, self.generators)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Within the block weights may be changed and losses taken; afterwards all is as it was."""
        with unchanged(self.model, self.generators):
            self.model.train(self.training)
            with freeze_running_stats(self.model):
                yield

    def batches(self) -> Iterator[Batch]:
        """The batches, on the model's device, each time with the same random numbers."""
        device, empty = self.params[0].device, True
        self.drawn.rewind()
        for batch in self.data:
            if not isinstance(batch, tuple | list) or len(batch) < 2:
                raise ValueError(
                    f"fastsam.analysis: data must give batches (*inputs, targets), got {type(batch).__name__}; give "
                    "a list of such tuples, or a generator that makes them"
                )
            empty = False
            yield tree_map_only(Tensor, lambda tensor: tensor.to(device), tuple(batch))
        if empty:
            raise ValueError("fastsam.analysis: there are no data: no batch came from them")

    def _given(self, batches: Iterable[Batch] | None) -> Iterable[Batch]:
        if batches is None:
            return self.batches()
        self.drawn.rewind()
        return batches

    def of(self, batch: Batch) -> Tensor:
        """The loss of one batch, 0-dim."""
        loss = self.loss_fn(self.model(*batch[:-1]), batch[-1])
        if loss.dim() > 0:
            raise ValueError(
                f"fastsam.analysis: loss_fn must return the mean over the samples, got shape {list(loss.shape)}"
            )
        return loss

    @torch.no_grad()
    def loss(self, batches: Iterable[Batch] | None = None) -> float:
        """The mean over the samples; of one batch its loss exactly."""
        found = [(self.of(batch), samples(batch)) for batch in self._given(batches)]
        sizes = [size for _, size in found]
        divisor = math.gcd(*sizes)  # equal weights are 1: no rounding for a single batch
        losses = torch.stack([loss for loss, _ in found]).double().tolist()
        weights = [size // divisor for size in sizes]
        weighted = [loss * weight for loss, weight in zip(losses, weights, strict=True)]
        total: float = math.fsum(weighted) if all(map(math.isfinite, losses)) else sum(weighted)
        return total / sum(weights)

    def gradient(self, batches: Iterable[Batch] | None = None) -> list[Tensor]:
        """Of the mean, one tensor a parameter. Hooks on the parameters' accumulation of gradients do not see it."""
        return self._mean(self._given(batches), self._gradient)

    def hessian_product(self, vector: Tensor) -> Tensor:
        """H v for v [n], by differentiating the gradient along v."""
        direction = unflat(vector, self.params)

        def product(batch: Batch) -> Sequence[Tensor]:
            pairs = list(zip(self._gradient(batch, graph=True), direction, strict=True))
            along = [(grad * v).sum() for grad, v in pairs if grad.requires_grad]
            if not along:  # the loss is linear in w
                return [torch.zeros_like(param) for param in self.params]
            total = torch.stack(along).sum()
            return torch.autograd.grad(total, self.params, allow_unused=True, materialize_grads=True)

        with torch.enable_grad(), _twice_differentiable(self.params[0].device):
            return flat(self._mean(self.batches(), product)).to(vector)

    def _gradient(self, batch: Batch, graph: bool = False) -> Sequence[Tensor]:
        with torch.enable_grad():
            return torch.autograd.grad(
                self.of(batch), self.params, create_graph=graph, allow_unused=True, materialize_grads=True
            )

    def _mean(self, batches: Iterable[Batch], of: Callable[[Batch], Sequence[Tensor]]) -> list[Tensor]:
        mean, count = [torch.zeros_like(param) for param in self.params], 0
        for batch in batches:
            size = samples(batch)
            count += size
            for so_far, value in zip(mean, of(batch), strict=True):
                so_far.add_(value.detach() - so_far, alpha=size / count)  # of one batch its own value exactly
        return mean

    @contextmanager
    def statistics_taken_anew(self) -> Iterator[None]:
        """Within the block batch normalisation has the statistics of all data at the weights of now."""
        layers = [m for m in self.model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        momenta = [layer.momentum for layer in layers]
        try:
            for layer in layers:
                layer.reset_running_stats()
                layer.train().momentum = None  # the average over all batches
            with torch.no_grad():
                for batch in self.batches():
                    self.model(*batch[:-1])
            for layer in layers:
                layer.eval()
            yield
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum


def samples(batch: Batch) -> int:
    """How many samples a batch has: the length of its first tensor."""
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return len(leaf)
    return 1


@contextmanager
def _twice_differentiable(device: torch.device) -> Iterator[None]:
    """Fused attention and cuDNN's recurrent networks have no second derivative; plainer forms of both have one."""
    cudnn: AbstractContextManager[Any] = nullcontext()
    if device.type == "cuda":
        cudnn = torch.backends.cudnn.flags(enabled=False)
    with sdpa_kernel(SDPBackend.MATH), cudnn:
        yield
