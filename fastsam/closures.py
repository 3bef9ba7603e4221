"""Closures: how the step calls them, and how it notices one that adds the second gradient to the first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastsam.ops import graphs

CLOSURE_RECIPE = (
    "either let the closure clear the gradients, run forward and backward and return the loss (FusedSAM calls it "
    "twice), or pass closure_calls=1, run the first forward and backward before step(closure) yourself. To accumulate "
    "gradients over micro-batches, do so within the closure: clear, then forward and backward of each of them"
)

F = TypeVar("F", bound=Callable[..., Any])


def entry(method: F) -> F:
    """A method that begins a pass: no gradients are recorded in it, and torch.compile is kept out.

    Kernels write through addresses, which a trace cannot see.
    """
    disabled: Callable[..., Any] | None = None

    def without_gradients(*args: Any, **kwargs: Any) -> Any:
        if torch.is_inference_mode_enabled():  # tensors made in it could not be written outside of it
            with torch.inference_mode(False):
                return without_gradients(*args, **kwargs)
        recorded = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            return method(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(recorded)

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if disabled is None:  # made on first use: importing torch._dynamo takes seconds
            disabled = torch.compiler.disable(without_gradients)  # type: ignore[no-untyped-call]
        return disabled(*args, **kwargs)

    return run  # type: ignore[return-value]


def call(closure: Callable[[], Any]) -> Any:
    """Call a closure with gradients enabled."""
    with torch.enable_grad():
        return closure()


def detached(loss: Any) -> Any:
    """A loss without the graph that it was computed by."""
    return loss.detach() if isinstance(loss, Tensor) else loss


class _Marked(NamedTuple):
    """A gradient before the second call."""

    param: Tensor
    grad: Tensor
    version: int
    place: Tensor | None  # the element that was overwritten, as a 0-dim view; None if none was
    value: Tensor | None  # what it was


class ClearingCheck:
    """Whether the closure clears the gradients, so that the second call does not add to the first one's.

    One element of the smallest gradient is set to infinity before the second call. Adding to it, clipping or reducing
    it afterwards leaves an infinity or NaN there; clearing or overwriting it does not. That waits for the device, so it
    is done in steps 1, 2, 4, 8, ..., and in the step after one in which the gradient changed in another way than in the
    last step looked at (another tensor, another number of writes, both known to the host).
    """

    def __init__(self) -> None:
        """No step was looked at yet."""
        self.steps = 0
        self.way: tuple[bool, int] | None = None  # in which it changed: whether it stayed the same tensor, its writes
        self.suspicious = True

    def mark(self, params: Iterable[Tensor]) -> _Marked | None:
        """Before the second call: choose a gradient, and overwrite one of its elements if this step is to be looked at.

        Of several elements one is chosen, so that the others can tell an overflow of the user's own from ours.
        """
        self.steps += 1
        found = ((p, p.grad) for p in params)
        usable = [(p, g) for p, g in found if g is not None and _is_plain(g)]
        if not usable:
            return None
        param, grad = min(usable, key=lambda pair: (pair[1].numel() == 1, pair[1].numel()))
        place = value = None
        looks = self.suspicious or self.steps & (self.steps - 1) == 0
        if looks and not graphs.capturing(grad.device):
            place = grad.detach()[(-1,) * grad.dim()]
            value = place.clone()
            place.fill_(float("inf"))
        return _Marked(param, grad, grad._version, place, value)

    def adds(self, marked: _Marked | None) -> bool:
        """After the second call: whether the closure added to the gradient."""
        if marked is None:
            return False
        now = marked.param.grad
        same = now is marked.grad
        way = same, marked.grad._version - marked.version if same else 0
        if marked.place is None:
            self.suspicious = self.suspicious or way != self.way
            return False
        self.way, self.suspicious = way, False
        if self.put_back(marked) or now is None or not _is_plain(now) or now.shape != marked.grad.shape:
            return False
        if not same and not now.requires_grad:  # autograd adds out of place only with create_graph=True
            return False
        finite = now.detach().isfinite()
        return not finite[(-1,) * now.dim()] and int(finite.sum()) == now.numel() - 1

    def put_back(self, marked: _Marked | None) -> bool:
        """Undo the mark where nobody wrote to the gradient since: the second pass had none for its parameter."""
        if marked is None or marked.place is None or marked.value is None:
            return False
        if marked.param.grad is not marked.grad or marked.grad._version != marked.version or not marked.place.isinf():
            return False
        marked.place.copy_(marked.value)
        return True


def _is_plain(grad: Tensor) -> bool:
    return type(grad) is Tensor and grad.layout == torch.strided and grad.numel() > 0 and grad.is_floating_point()
