"""What SAF and MESA are: a loss, and how far the outputs have moved along the training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TrajectoryLoss(nn.Module):
    """base_loss + lmbda T^2 mean_i KL(softmax(z'_i / T) || softmax(z_i / T)), and the epoch, which says when."""

    def __init__(
        self, base_loss: Callable[[Tensor, Any], Tensor] | None, lmbda: float, temperature: float, start: int
    ) -> None:
        """Check the options."""
        super().__init__()
        self._who = type(self).__name__
        if not 0 <= lmbda < float("inf"):
            raise ValueError(f"{self._who}: lmbda must be >= 0, got {lmbda!r}")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"{self._who}: temperature must be > 0, got {temperature!r}")
        self.base_loss = nn.CrossEntropyLoss() if base_loss is None else base_loss
        self.lmbda, self.temperature = float(lmbda), float(temperature)
        self.start = self._whole("start", start, -1)
        self.epoch: int | None = None

    def extra_repr(self) -> str:
        """The options."""
        return f"lmbda={self.lmbda:g}, temperature={self.temperature:g}, start={self.start}"

    def new_epoch(self) -> None:
        """Begin the next epoch; the first one is 0."""
        self.set_epoch(0 if self.epoch is None else self.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, beside `sampler.set_epoch(epoch)`; the same number again goes on with it.

        Raises:
            ValueError: it is no whole number >= 0, or an earlier epoch than the present one.
        """
        self._whole("epoch", epoch, 0)
        if self.epoch is not None and epoch < self.epoch:
            raise ValueError(
                f"{self._who}: epochs only go on, got {epoch} after {self.epoch}; to go back, load a state_dict() of "
                "that time, and to train anew, make a new loss"
            )
        if epoch != self.epoch:
            self._leave_epoch()
            self.epoch = epoch
            self._enter_epoch()

    def get_extra_state(self) -> dict[str, Any]:
        """What `state_dict()` holds beside the tensors."""
        return {"epoch": self.epoch}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take up what `get_extra_state` gave."""
        self.epoch = state["epoch"]

    def _leave_epoch(self) -> None:
        pass

    def _enter_epoch(self) -> None:
        pass

    def _whole(self, name: str, value: int, least: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{self._who}: {name} must be a whole number >= {least}, got {value!r}")
        return value

    def _started(self) -> bool:
        if self.epoch is None:
            raise RuntimeError(f"{self._who}: call new_epoch() or set_epoch(epoch) before an epoch's first batch")
        return self.epoch > self.start

    def _base(self, outputs: Tensor, targets: Any) -> Tensor:
        loss = self.base_loss(outputs, targets)
        if loss.dim() != 0:
            raise ValueError(f"{self._who}: base_loss must give one number, got shape {list(loss.shape)}")
        return loss

    def _divergence(self, outputs: Tensor, reference: Tensor, known: Tensor | None = None) -> Tensor:
        """[]: lmbda T^2 times the mean over the samples that are known.

        Args:
            outputs: [batch, classes], z.
            reference: [batch, classes], z', without gradient.
            known: [batch] bool; where it is false, nothing of `reference` is used.
        """
        if outputs.dtype.itemsize < 4:
            outputs = outputs.float()
        reference = reference.to(outputs.dtype)
        if known is not None:  # before the softmax: 0 * NaN in the backward pass is NaN
            reference = torch.where(known[:, None], reference, 0)
        now = F.log_softmax(outputs / self.temperature, 1)
        then = F.log_softmax(reference / self.temperature, 1)
        divergences = F.kl_div(now, then, reduction="none", log_target=True).sum(1)
        mean = divergences.mean() if known is None else (divergences * known).sum() / known.sum().clamp(min=1)
        return self.lmbda * self.temperature**2 * mean
