"""MESA (Du et al., arXiv 2205.14083): stay near the outputs of an average of the weights."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fastsam.losses.trajectory import TrajectoryLoss


class MESA(TrajectoryLoss):
    """Memory-efficient sharpness-aware training (Du et al., arXiv 2205.14083, eq. 12): stay near an average's outputs.

        v <- beta v + (1 - beta) w                                                 after each step, by `update()`
        loss = base_loss + lmbda T^2 mean_i KL(softmax(f_v(x_i) / T) || softmax(f_w(x_i) / T))       if e > start

    v is the weights of the teacher, a copy of the model without gradients that begins as v = w. Its buffers
    (BatchNorm's statistics) are copies of the model's, as in `torch.optim.swa_utils.AveragedModel`. It stays in
    evaluation mode, whatever mode the loss is in. The authors' code takes timm's averaged model instead, which is in
    evaluation mode, too, but averages the statistics like weights. The factor T^2 is that of their code, the paper has
    none. Epochs count from 0. Defaults are the authors'; in the paper beta is in (0.9, 1).

    It costs the base loss's one forward and backward pass and, once it has started, the teacher's forward pass without
    a graph; no perturbation. Memory: one copy of the model. It is a loss for the plain base optimizer, and may be
    combined with anything: with SAM, call `update()` after the whole step, when the weights are not perturbed.

    `teacher` is a submodule, so `.to()` and `state_dict()` include it; the model is only followed. Under
    DistributedDataParallel the model inside is copied and followed; its weights are equal on all ranks, and so are the
    teachers', but BatchNorm's statistics are each rank's own after a step, and the teacher has them from there.
    Weights must not have less than 32 bits: an average moves in steps that bfloat16 and float16 round away; use
    autocast. In evaluation mode (`mesa.eval()`) it is the base loss.

    Args:
        model: what is trained; on its device.
        base_loss: `base_loss(outputs, targets)` gives one number; cross entropy if None.
        lmbda: weight of the divergence.
        temperature: T.
        beta: how much of the average stays in each step.
        start: the divergence counts from epoch start + 1 on, the authors' E_start.

    Example:
        >>> mesa = MESA(model)
        >>> for epoch in range(epochs):
        ...     mesa.set_epoch(epoch)
        ...     for x, y in loader:
        ...         optimizer.zero_grad()
        ...         mesa(model(x), y, x).backward()
        ...         optimizer.step()
        ...         mesa.update()
    """

    def __init__(
        self,
        model: nn.Module,
        base_loss: Callable[[Tensor, Any], Tensor] | None = None,
        *,
        lmbda: float = 0.8,
        temperature: float = 5.0,
        beta: float = 0.9998,
        start: int = 5,
    ) -> None:
        """Copy the model."""
        super().__init__(base_loss, lmbda, temperature, start)
        if not 0 <= beta < 1:
            raise ValueError(f"MESA: beta must be in [0, 1), got {beta!r}")
        self.beta = float(beta)
        if isinstance(model, DistributedDataParallel):
            model = model.module
        for name, param in model.named_parameters():
            if _averaged(param) and param.dtype.itemsize < 4:
                raise ValueError(
                    f"MESA: weights must have 32 bits or more, as their average would be lost in rounding, got "
                    f"{param.dtype} for {name!r}; keep them in float32 and use autocast"
                )
        self._model = weakref.ref(model)  # no submodule: it is not ours to save, to move or to keep alive
        self.teacher = copy.deepcopy(model).eval().requires_grad_(False)
        self._used = self._updated = False  # in this epoch

    def extra_repr(self) -> str:
        """The options."""
        return f"{super().extra_repr()}, beta={self.beta:g}"

    def train(self, mode: bool = True) -> MESA:
        """Training mode counts the divergence; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, outputs: Tensor, targets: Any, inputs: Any) -> Tensor:
        """[]: the loss of a batch.

        Args:
            outputs: [batch, n_classes], the model's.
            targets: what the base loss takes.
            inputs: what the model took: a tensor, a tuple of arguments or a dict of keywords.
        """
        loss = self._base(outputs, targets)
        if not self.training:
            return loss
        started = self._started()
        self._used = True
        if not started:
            return loss
        with torch.no_grad():
            if isinstance(inputs, tuple):
                reference = self.teacher(*inputs)
            elif isinstance(inputs, Mapping):
                reference = self.teacher(**inputs)
            else:
                reference = self.teacher(inputs)
        if outputs.dim() != 2 or reference.shape != outputs.shape:
            raise ValueError(
                "MESA: outputs must be [batch, classes] and the teacher's of the same shape, got "
                f"{list(outputs.shape)} and {list(reference.shape)}"
            )
        return loss + self._divergence(outputs, reference)

    @torch.no_grad()
    def update(self) -> None:
        """Move the teacher, v <- beta v + (1 - beta) w, and copy buffers; call it after each step of the optimizer."""
        model = self._model()
        if model is None:
            raise RuntimeError("MESA: the model is gone; make a new MESA for another one")
        ours, theirs = list(self.teacher.parameters()), list(model.parameters())
        copies, originals = list(self.teacher.buffers()), list(model.buffers())
        if len(ours) != len(theirs) or len(copies) != len(originals):
            raise ValueError("MESA: the model has other parameters or buffers than when it was copied; make a new MESA")
        averaged = [(v, w.to(v.device, v.dtype)) for v, w in zip(ours, theirs, strict=True) if _averaged(v)]
        if averaged:
            teacher, weights = zip(*averaged, strict=True)
            move = get_ema_multi_avg_fn(self.beta)  # type: ignore[no-untyped-call]  # torch._foreach_lerp_
            move(list(teacher), list(weights), None)
        copies += [v for v in ours if not _averaged(v)]
        originals += [w for w in theirs if not _averaged(w)]
        for old, new in zip(copies, originals, strict=True):
            old.copy_(new)
        self._updated = True

    def _leave_epoch(self) -> None:
        if self._used and not self._updated:
            raise RuntimeError(f"MESA: no update() in epoch {self.epoch}; call it after each step of the optimizer")

    def _enter_epoch(self) -> None:
        self._used = self._updated = False


def _averaged(weight: Tensor) -> bool:
    """Whether a weight is averaged; whole numbers are copied."""
    return weight.is_floating_point() or weight.is_complex()
