"""What every test gets: a fixed seed, new memory full of NaN, and `backend` for each backend of this machine."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Iterator

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it under deterministic algorithms
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo asks for this machine's name, which may not resolve
if "PYTEST_XDIST_WORKER" in os.environ:  # a process a core: more threads would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import cases
import pytest
import torch


def _hide(package: str) -> None:
    """Let a package that is installed count as missing: for imports, for `find_spec`, and for who reads its version."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]
    sys.modules[package] = None  # type: ignore[assignment]
    find = importlib.metadata.Distribution.from_name

    def from_name(name: str) -> importlib.metadata.Distribution:
        if name == package:
            raise importlib.metadata.PackageNotFoundError(name)
        return find(name)

    importlib.metadata.Distribution.from_name = staticmethod(from_name)  # type: ignore[method-assign,assignment]


try:  # it comes with timm, built for another torch than a CPU's: then Lightning, PEFT and Transformers do without it
    import torchvision  # noqa: F401
except ModuleNotFoundError:
    pass
except Exception:
    _hide("torchvision")


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """`torch.empty` and its like return NaN, so that reading scratch before writing it shows."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=cases.BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def device(backend: str) -> str:
    return cases.device_of(backend)
