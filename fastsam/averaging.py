"""An exponential moving average of the weights that the optimizer keeps: `FusedSAM(..., ema_decay=0.999)`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastsam.checks import check_ema_decay
from fastsam.closures import entry
from fastsam.memory.averages import Averages
from fastsam.progress import AVERAGED, CLEAN
from fastsam.steering import Steering

NO_AVERAGES = "FusedSAM: there are no averages of the weights; build the optimizer with ema_decay=0.999, say"


class Averaging(Steering):
    """The part of `FusedSAM` that averages the weights.

    Attributes:
        ema_decay: of the averages; None for none. It may be changed between the steps, as a warm-up does:
            `optimizer.ema_decay = min(0.9999, (1 + t) / (10 + t))`.
    """

    ema_decay: float | None

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within the block the model has the averages of `ema_decay` as its weights, to evaluate or to save them.

        The weights come back bit for bit, exceptions included; meanwhile there is one copy more of them. What the block
        writes to the weights is lost. Running statistics of BatchNorm are the model's own: they were taken with the
        weights, and `torch.optim.swa_utils.update_bn` takes them anew. Before the first update the averages are the
        weights. Under FSDP a forward pass in the block leaves them gathered: `model.reshard()` (docs/distributed.md).

        Raises:
            RuntimeError: there are no averages, or a step is between its two passes. A step, `state_dict()` and copies
                of the optimizer within the block raise one, too.
        """
        sam = self._sam
        if self.ema_decay is None:
            raise RuntimeError(NO_AVERAGES)
        sam.require_running()
        sam.require_clean("averaged_weights()")
        pairs = self._averages()
        saved = [param.detach().clone() for param, _ in pairs]
        try:
            sam.phase = AVERAGED
            self._write_weights((param, average) for param, average in pairs)
            yield
        finally:
            self._write_weights((param, old) for (param, _), old in zip(pairs, saved, strict=True))
            sam.phase = CLEAN

    @entry
    def copy_ema_to(self, target: nn.Module | Iterable[Tensor], model: nn.Module | None = None) -> None:
        """Copy the averages of `ema_decay` into other parameters; a parameter without an average gives its weight.

        Buffers, such as BatchNorm's statistics, are not copied. To copy all of a model, or to save it, use
        `with optimizer.averaged_weights(): other.load_state_dict(model.state_dict())`.

        Args:
            target: a copy of the model, whose parameters are found by name; or tensors in the order of
                `param_groups`.
            model: the model that is trained, where `target` is one.

        Raises:
            RuntimeError: there are no averages, or the weights are perturbed.
            ValueError: `target` has other parameters.
        """
        if self.ema_decay is None:
            raise RuntimeError(NO_AVERAGES)
        self._sam.require_clean("copy_ema_to()")
        copy_averages(self._averages(), paired(target, model, self._params()))

    @entry
    def _averages(self) -> list[tuple[Tensor, Tensor]]:
        self._sync()
        self._sam.buckets.sync_state()
        return list(Averages(self._sam.directions).pairs())

    @entry
    def _write_weights(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        for param, value in pairs:
            param.copy_(value)
        torch.clear_autocast_cache()

    def _allocate_averages(self) -> None:
        if self.ema_decay is not None:
            Averages(self._sam.directions).allocate()

    def _begin_average(self) -> None:
        """Before an update."""
        if self.ema_decay is not None:
            check_ema_decay(self.ema_decay)
            Averages(self._sam.directions).begin()

    def _average(self) -> None:
        """After an update, also after one that an overflow kept from changing the weights."""
        if self.ema_decay is not None:
            Averages(self._sam.directions).update(self.ema_decay)


def copy_averages(averages: Iterable[tuple[Tensor, Tensor]], pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Write each parameter's average, or its weight if it has none, into what it is paired with."""
    known = {id(param): average for param, average in averages}
    for param, other in pairs:
        other.detach().copy_(known.get(id(param), param))


def paired(
    target: nn.Module | Iterable[Tensor], model: nn.Module | None, params: list[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Each parameter, and the one of `target` that stands for it; see `copy_ema_to`."""
    pairs: list[tuple[Tensor, Tensor]]
    if isinstance(target, nn.Module):
        if model is None:
            raise ValueError(
                "FusedSAM: copy_ema_to(other_model) needs the model that is trained, too, as an optimizer knows no "
                "names: copy_ema_to(other_model, model)"
            )
        own, other = dict(model.named_parameters()), dict(target.named_parameters())
        if own.keys() != other.keys():
            raise ValueError(
                f"FusedSAM: copy_ema_to() needs two models with the same parameters, but only one of them has "
                f"{', '.join(sorted(own.keys() ^ other.keys()))}"
            )
        pairs = [(own[name], other[name]) for name in own]
    else:
        others = list(target)
        if len(others) != len(params):
            raise ValueError(
                f"FusedSAM: copy_ema_to() needs a tensor for each of the {len(params)} parameters, in the order of "
                f"param_groups, got {len(others)}"
            )
        pairs = list(zip(params, others, strict=True))
    for i, (param, copy) in enumerate(pairs):
        if param.shape != copy.shape:
            raise ValueError(
                f"FusedSAM: copy_ema_to() needs the parameters' shapes, got {list(copy.shape)} for "
                f"{list(param.shape)} at place {i}"
            )
    return pairs
