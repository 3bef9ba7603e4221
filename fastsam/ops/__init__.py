"""The operations of a SAM step, one name each, and the choice of the backend that runs them.

`grad_norm(tables, grads, out, *, clip)`, `perturb_(tables, grads, sums)` and `update_(tables, grads, *, grad_scale,
found_inf, clip)` are a step of SAM; `dot(tables, a, b, out)` and `combine_(tables, out, terms)` are what the other
methods of the family need beside them. They stand in `reference.py` with their formulas; every other backend is a twin
with the same signatures.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor

from fastsam.ops import graphs, native, reference
from fastsam.ops.tables import Gradients, Tables

NAMES = ("reference", "cpu", "cuda", "triton")
KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LEAST_CAPABILITY = (7, 5)  # of an NVIDIA GPU; older ones get the reference


class Operations(Protocol):
    """What a backend provides."""

    def grad_norm(
        self, tables: Tables, grads: Sequence[Tensor | None], out: Tensor, *, clip: reference.Clip | None = None
    ) -> None:
        """Write the sum of squares of the (adaptive) gradients into the slot of `out`."""

    def perturb_(self, tables: Tables, grads: Sequence[Tensor | None], sums: Tensor) -> None:
        """Back the weights up and climb to w + e(w)."""

    def update_(
        self,
        tables: Tables,
        grads: Sequence[Tensor | None],
        *,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        clip: Tensor | None = None,
    ) -> None:
        """Restore the weights and take the base optimizer's step."""

    def dot(self, tables: Tables, a: Gradients, b: Gradients | None, out: Tensor) -> None:
        """Write <a,a>, <a,b> and <b,b> into the slot of `out`."""

    def combine_(self, tables: Tables, out: Gradients, terms: Sequence[tuple[float | Tensor, Gradients]]) -> None:
        """Write a linear combination of one to three gradients or directions into the direction `out`."""


def _triton_reason() -> str | None:
    """Why the Triton kernels cannot be used here and what to do, or None; Triton is imported only if it may serve."""
    if importlib.util.find_spec("triton") is None:
        return "the triton package is not installed; there is one for Linux: pip install 'fastsam[triton]'"
    if not _interpreted() and not torch.cuda.is_available():
        return "torch can use no GPU here; TRITON_INTERPRET=1 in the environment runs the kernels on the CPU, for tests"
    try:
        reason: str | None = importlib.import_module("fastsam.ops.triton").reason()
    except Exception as error:  # whatever a broken installation raises
        reason = f"triton does not load: {type(error).__name__}: {error}"
    return reason


def _interpreted() -> bool:
    """Whether Triton interprets its kernels, on CPU tensors, instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


_REASONS: dict[str, Callable[[], str | None]] = {
    "reference": lambda: None,
    "cpu": native.reason,
    "cuda": native.cuda_reason,
    "triton": _triton_reason,
}


# Of a GPU, where not all that a machine has may be served.
_DEVICE_REASONS: dict[str, Callable[[int], str | None]] = {"cuda": native.device_reason}


def device_reason(backend: str, device: torch.device) -> str | None:
    """Why a backend that is available does not work on this very device and what to do, or None."""
    asks = _DEVICE_REASONS.get(backend)
    if asks is None or device.type != "cuda" or _REASONS[backend]() is not None:
        return None
    return asks(torch.cuda.current_device() if device.index is None else device.index)


def _usable(backend: str, device: torch.device) -> bool:
    return _REASONS[backend]() is None and device_reason(backend, device) is None


def backends() -> dict[str, str | None]:
    """Every backend's name, with None where it can be used and else the reason why not and what to do."""
    return {name: _REASONS[name]() for name in NAMES}


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
    if backend != "auto" and (reason := _REASONS[backend]()) is not None:
        raise ValueError(f"FusedSAM: {source} is not available here: {reason}")
    return backend


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else LEAST_CAPABILITY


def choose(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The backend that serves such parameters; None where the one asked for by name cannot."""
    kernels = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}.get(device.type, ())  # the first that is available
    if _interpreted():
        kernels = {"cpu": ("cpu", "triton"), "cuda": ("cuda",)}.get(device.type, ())
    if dtype not in KERNEL_DTYPES or (device.type == "cuda" and _capability(device) < LEAST_CAPABILITY):
        kernels = ()
    if backend == "auto":
        chosen = next((name for name in kernels if _usable(name, device)), "reference")
        if "cuda" in kernels and chosen != "cuda" and (why := device_reason("cuda", device)) is not None:
            _warn_once(f"FusedSAM: {why}. Until then backend={chosen!r} serves this GPU")
        return chosen
    return backend if backend in ("reference", *kernels) and device_reason(backend, device) is None else None


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


class GraphSupport(Protocol):
    """What a backend that CUDA graphs can capture provides beside its operations; see `graphs.py`."""

    def own_rows(self, n_segments: int, n_groups: int) -> int:
        """How many rows behind the segments in a bucket's table are the backend's own."""

    def prepare_capture(self, tables: Tables) -> None:
        """Before a pass: make sure that a graph finds the groups' values on the device."""

    def upload_values(self, tables: Tables) -> None:
        """Bring the groups' values to the device, outside of graphs."""


class Backend(NamedTuple):
    """What serves a bucket.

    Attributes:
        name: one of `NAMES`.
        operations: what it runs over a bucket.
        graphs: how CUDA graphs find the groups' values; None for a backend that cannot be captured.
        by_address: whether it reaches tensors by their addresses.
        bind: what lets a whole pass be one native call; None where it cannot.
    """

    name: str
    operations: Operations
    graphs: GraphSupport | None
    by_address: bool
    bind: Callable[[Tables, Tensor], Tensor] | None = None


@cache
def backend_named(name: str) -> Backend:
    """A backend, loaded when it is first used: Triton takes as long to load as all of fastsam."""
    if name == "triton":
        kernels = importlib.import_module("fastsam.ops.triton")
        return Backend(name, cast(Operations, kernels), cast(GraphSupport, kernels), by_address=True)
    return {
        "reference": Backend("reference", reference, None, by_address=False),
        "cpu": Backend("cpu", native, None, by_address=True, bind=native.bind),
        "cuda": Backend("cuda", native, graphs, by_address=True, bind=native.bind),
    }[name]
