"""The operations of a SAM step, one name each, and the choice of the backend that runs them.

`grad_norm(bucket, grads, out)`, `perturb_(bucket, grads, sums)` and `update_(bucket, grads, *, grad_scale, found_inf,
clip)` stand in `reference.py` with their formulas; every other backend is a twin of it with the same signatures.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from fastsam.ops import native, reference

if TYPE_CHECKING:
    from fastsam.buckets import Bucket

NAMES = ("reference", "cpu", "cuda", "triton")
KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Operations(Protocol):
    """What a backend provides."""

    def grad_norm(self, bucket: Bucket, grads: Sequence[Tensor | None], out: Tensor) -> None:
        """Write the sum of squares of the (adaptive) gradients into the bucket's slot of `out`."""

    def perturb_(self, bucket: Bucket, grads: Sequence[Tensor | None], sums: Tensor) -> None:
        """Back the weights up and climb to w + e(w)."""

    def update_(
        self,
        bucket: Bucket,
        grads: Sequence[Tensor | None],
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        clip: Tensor | None = None,
    ) -> None:
        """Restore the weights and take the base optimizer's step."""


_OPERATIONS: dict[str, Operations] = {"reference": reference, "cpu": native}


def backends() -> dict[str, str | None]:
    """Every backend's name, with None where it can be used and else the reason why not and what to do."""
    return {
        "reference": None,
        "cpu": native.reason(),
        "cuda": "the CUDA kernels are not part of this version; use backend='reference' for CUDA tensors",
        "triton": "the Triton kernels are not part of this version; use backend='reference' for CUDA tensors",
    }


def resolve(backend: str) -> str:
    """Check a user's `backend=`: a name of `NAMES`, or "auto", which the environment variable FASTSAM_BACKEND replaces.

    Raises:
        ValueError: the name is unknown, or that backend is not available here.
    """
    source = f"backend={backend!r}"
    if backend == "auto":
        backend = os.environ.get("FASTSAM_BACKEND", "auto")
        source = f"FASTSAM_BACKEND={backend}"
    if backend not in ("auto", *NAMES):
        raise ValueError(f"FusedSAM: backend must be one of {('auto', *NAMES)}, got {source}")
    if backend != "auto" and (reason := backends()[backend]) is not None:
        raise ValueError(f"FusedSAM: {source} is not available here: {reason}")
    return backend


def choose(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The backend that serves such parameters; None where the one asked for by name cannot."""
    kernels = {"cpu": "cpu", "cuda": "cuda"}.get(device.type)
    if backend == "auto":
        return kernels if kernels and dtype in KERNEL_DTYPES and backends()[kernels] is None else "reference"
    return backend if backend == "reference" or (backend == kernels and dtype in KERNEL_DTYPES) else None


def operations(backend: str) -> Operations:
    """The three operations of a backend."""
    return _OPERATIONS[backend]
