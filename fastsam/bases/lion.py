"""Lion, which torch.optim lacks, in plain PyTorch: what the fused rule is compared with, and usable by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Lion(Optimizer):
    r"""Lion, the sign of an interpolated momentum (Chen et al., arXiv 2302.06675, algorithm 2).

    c = beta1 m + (1 - beta1) g; w <- w (1 - lr weight_decay) - lr sign(c); m <- beta2 m + (1 - beta2) g. As in the
    paper `weight_decay` is decoupled. The sign of 0 and of NaN is 0. The update has the length of lr in every element:
    the paper takes an lr 3 to 10 times smaller than AdamW's and a weight_decay as much larger.

    Args:
        params: parameters or groups, as for any torch optimizer.
        lr: the step in each element, >= 0.
        betas: of the update and of the momentum, in [0, 1).
        weight_decay: >= 0.
        maximize: go uphill.

    Equivalent to:
        c = exp_avg.lerp(grad, 1 - betas[0]); exp_avg.lerp_(grad, 1 - betas[1])
        param.mul_(1 - lr * weight_decay).add_(c.sign(), alpha=-lr)
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        """See the class."""
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"Lion: a tensor lr must have 1 element, got {lr.numel()}")
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"Lion: {name} must be >= 0, got {value}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"Lion: betas must be in [0, 1), got {betas}")
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay, maximize=maximize))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; `closure` may evaluate the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, (beta1, beta2), weight_decay = float(group["lr"]), group["betas"], group["weight_decay"]
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
                w, g, exp_avg = (_real(tensor) for tensor in (param, param.grad, state["exp_avg"]))
                if group["maximize"]:
                    g = -g
                if weight_decay != 0:
                    w.mul_(1 - lr * weight_decay)
                w.add_(exp_avg.lerp(g, 1 - beta1).sign_(), alpha=-lr)
                exp_avg.lerp_(g, 1 - beta2)
        return loss


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
