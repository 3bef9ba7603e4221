"""What a bucket's tensors are stored as, and which of these combinations one launch can take."""

from __future__ import annotations

from typing import NamedTuple

import torch

LOW_DTYPES = (torch.bfloat16, torch.float16)  # narrower than the arithmetic, which is float32
# Weights and gradients of different dtypes that one launch can take (`grad_dtype` of a parameter allows them).
MIXED_DTYPES = {
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
}


class Format(NamedTuple):
    """The dtypes of a bucket.

    Attributes:
        weight: of the parameters.
        grad: of this pass's gradients.
        source: of what the formulas take the weights from: float32 where there are masters, else `weight`.
        state: of the base optimizer's state.
        stochastic: what is stored in less than the arithmetic's precision is rounded stochastically: states, and
            weights without masters. Weights with masters are the masters, rounded to nearest.
    """

    weight: torch.dtype
    grad: torch.dtype
    source: torch.dtype
    state: torch.dtype
    stochastic: bool = False

    @property
    def masters(self) -> bool:
        """Whether there are masters."""
        return self.source != self.weight

    def takes(self, grad: torch.dtype) -> bool:
        """Whether one launch can read gradients of that dtype."""
        return grad == self.weight or (not self.stochastic and (self.weight, grad) in MIXED_DTYPES)


class Precision(NamedTuple):
    """How parameters, states and their rounding are kept; `FusedSAM` says what each means."""

    master_weights: bool = False
    stochastic_rounding: bool = False
    state_dtype: torch.dtype | None = None

    @property
    def draws(self) -> bool:
        """Whether anything is rounded stochastically."""
        return self.stochastic_rounding or self.state_dtype is not None

    def format_of(self, dtype: torch.dtype) -> Format:
        """The format of parameters of a real dtype, with gradients of the same."""
        low = dtype in LOW_DTYPES
        source = torch.float32 if low and self.master_weights else dtype
        state = self.state_dtype if self.state_dtype is not None and source == torch.float32 else source
        stochastic = state != source or (low and source == dtype and self.stochastic_rounding)
        return Format(dtype, dtype, source, state, stochastic)
