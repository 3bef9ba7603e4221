"""What all measurements share: optional packages, a progress bar, and leaving everything as it was."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


def require(module: str, package: str | None = None) -> Any:
    """Import an optional package.

    Args:
        module: what is imported.
        package: what is installed, where that has another name.

    Raises:
        ModuleNotFoundError: it is not here; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"fastsam.analysis: this needs {package or module}, which is not here: pip install 'fastsam[analysis]'"
        ) from error


np = require("numpy")


def tracked(items: Iterable[T], what: str, total: int, progress: bool | None) -> Iterator[T]:
    """The items, under a progress bar on the error output.

    Args:
        items: what is gone through.
        what: stands before the bar.
        total: how many they are, at most.
        progress: True and False say it; None: if the error output is a terminal and rich is installed.
    """
    if progress is None:
        progress = sys.stderr.isatty() and importlib.util.find_spec("rich") is not None
    if not progress:
        yield from items
        return
    require("rich")
    from rich.console import Console
    from rich.progress import track

    yield from track(items, what, total, console=Console(stderr=True), transient=sys.stderr.isatty())


@contextmanager
def unchanged(model: nn.Module, generators: Iterable[torch.Generator] = ()) -> Iterator[None]:
    """Within the block anything may be done to a model; afterwards it is what it was, bit for bit.

    That is: weights, buffers (replaced ones too), gradients (the same tensors; None within the block), the training
    mode of each module, and the random generators of torch, numpy and Python. Exceptions and KeyboardInterrupt change
    nothing of that. It takes one copy of weights and buffers.

    Args:
        model: a module.
        generators: further random generators to be set back.
    """
    params = [(param, param.detach().clone(), param.grad) for param in model.parameters()]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    modes = [(module, module.training) for module in model.modules()]
    drawn = RandomState({param.device for param, *_ in params}, generators)
    try:
        for param, *_ in params:
            param.grad = None
        yield
    finally:
        with torch.no_grad():
            for param, old, grad in params:
                param.copy_(old)
                param.grad = grad
            for module, name, buffer, old in buffers:
                module._buffers[name] = buffer
                buffer.copy_(old)
        for module, training in modes:
            module.training = training
        drawn.rewind()


class RandomState:
    """Where the random generators of torch, numpy and Python are now.

    Args:
        devices: whose generators of torch count beside the host's.
        generators: further ones.
    """

    def __init__(self, devices: Iterable[torch.device], generators: Iterable[torch.Generator] = ()) -> None:
        """See the class."""
        self.host, self.python, self.numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
        self.gpus = [(d, torch.cuda.get_rng_state(d)) for d in devices if d.type == "cuda"]
        self.more = [(generator, generator.get_state()) for generator in generators]

    def rewind(self) -> None:
        """Set all of them back."""
        torch.set_rng_state(self.host)
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        for device, state in self.gpus:
            torch.cuda.set_rng_state(state, device)
        for generator, state in self.more:
            generator.set_state(state)


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """Tensors one after the other, [n] float32 (float64 if one is)."""
    pieces = [tensor.detach().reshape(-1) for tensor in tensors]
    dtype = torch.float64 if any(piece.dtype == torch.float64 for piece in pieces) else torch.float32
    return torch.cat([piece.to(pieces[0].device, dtype) for piece in pieces])


def unflat(vector: Tensor, like: Iterable[Tensor]) -> list[Tensor]:
    """The parts of a vector [n], shaped and typed as the tensors of `like`."""
    like = list(like)
    pieces = torch.split(vector, [tensor.numel() for tensor in like])
    return [piece.view(tensor.shape).to(tensor) for piece, tensor in zip(pieces, like, strict=True)]
