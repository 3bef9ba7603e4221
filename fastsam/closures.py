"""Closures: how the step calls them, and how it notices one that adds the second gradient to the first."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from fastsam.memory.segments import is_dense
from fastsam.ops import graphs
from fastsam.ops.local import local_of

CLOSURE_RECIPE = (
    "either let the closure clear the gradients, run forward and backward and return the loss (FusedSAM calls it "
    "twice), or pass closure_calls=1, run the first forward and backward before step(closure) yourself. To accumulate "
    "gradients over micro-batches, do so within the closure: clear, then forward and backward of each of them"
)

NO_FIRST_GRADIENTS = (
    f"FusedSAM: closure_calls=1 needs the gradients at w before step(closure), found none; {CLOSURE_RECIPE}"
)

F = TypeVar("F", bound=Callable[..., Any])


def entry(method: F) -> F:
    """A method that begins a pass: no gradients are recorded in it, and torch.compile is kept out.

    Kernels write through addresses, which a trace cannot see.
    """

    @functools.wraps(method)
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

    # That of torch.optim itself: torch._dynamo, whose import takes seconds, is first imported by a call.
    return torch._disable_dynamo(without_gradients)  # type: ignore[attr-defined, return-value]


def call(closure: Callable[[], Any]) -> Any:
    """Call a closure with gradients enabled."""
    with torch.enable_grad():
        return closure()


def detached(loss: Any) -> Any:
    """A loss without the graph that it was computed by."""
    return loss.detach() if isinstance(loss, Tensor) else loss


class _Marks(NamedTuple):
    """What is written into a gradient, and where."""

    positions: Tensor  # [n] int64: of the k marks, and of as many other elements if there are so many
    signed: Tensor  # [k]: the marks


class _Marked(NamedTuple):
    """A gradient before the second call, and what was written into it; no positions if nothing was."""

    param: Tensor
    grad: Tensor
    version: int
    marks: _Marks | None = None
    values: Tensor | None = None  # [n]: what was at the positions


Way: TypeAlias = tuple[bool, int]  # whether a gradient stayed the same tensor, and how often that was written


class ClearingCheck:
    """Whether the closure clears the gradients, so that the second call does not add to the first one's.

    Before the second call some elements of a few gradients are overwritten by large numbers of random signs, the marks.
    Clearing or overwriting the gradients removes them, in whatever way; adding leaves them as they are, and clipping or
    scaling afterwards leaves elements of one size, with the marks' signs, that no other exceeds. Few such elements may
    be chance: then the next steps are looked at, too, until it cannot be. Gradients that the second call did not touch
    are given back their elements and tell nothing, and neither do those that are not finite.

    Looking waits for the device, so it is done in steps 1, 2, 4, ... 128 and every 256th, and in the step after one in
    which a gradient changed in another way than in the last step looked at (another tensor, another number of writes;
    the host knows both).
    """

    def __init__(self) -> None:
        """No step was looked at yet."""
        self.steps = 0
        self.suspicious = True
        self.evidence = 0  # marks found again, in the looks without a gap up to now
        self.watched: list[Tensor] = []  # the parameters whose gradients were marked last, the smallest first
        self.ways: dict[int, Way] = {}  # in which these changed, by id

    def call_again(self, closure: Callable[[], Any], params: Callable[[], Iterable[Tensor]]) -> Any:
        """The second call; what the closure returns.

        Args:
            closure: the user's.
            params: gives all parameters.

        Raises:
            RuntimeError: it adds the second gradient to the first.
        """
        marked = self.mark(params)
        try:
            loss = call(closure)
        except BaseException:
            self.put_back(marked)
            raise
        if self.adds(marked):
            raise RuntimeError(
                "FusedSAM: the closure does not clear the gradients, so the second pass would add to the first: "
                f"{CLOSURE_RECIPE}"
            )
        return loss

    def mark(self, params: Callable[[], Iterable[Tensor]]) -> list[_Marked]:
        """Before the second call: note how gradients are, and mark them if this step is to be looked at.

        Args:
            params: gives all parameters.
        """
        self.steps += 1
        due = self.steps % LOOKS_EVERY == 0 or (self.steps < LOOKS_EVERY and self.steps & (self.steps - 1) == 0)
        looks = self.suspicious or due or not self.watched
        if looks:
            self.watched, self.ways = _chosen(params()), {}
        grads = [(param, _grad(param)) for param in (self.watched if looks else self.watched[:FEW])]
        marked = [_Marked(p, g, g._version) for p, g in grads if g is not None and not g.is_inference()]
        for i, (param, grad, version, *_) in enumerate(marked if looks else ()):
            if not _is_plain(grad) or graphs.capturing(grad.device):
                continue
            flat = _flat(grad)
            marks = _new_marks(flat, self.steps + i)
            values = flat[marks.positions]
            flat.index_copy_(0, marks.positions[: len(marks.signed)], marks.signed)
            marked[i] = _Marked(param, grad, version, marks, values)
        return marked

    def adds(self, marked: Sequence[_Marked]) -> bool:
        """After the second call: whether the closure added to the gradients."""
        ways = {id(item.param): _way(item) for item in marked}
        changed = any(self.ways.get(key, way) != way for key, way in ways.items())
        if all(item.marks is None for item in marked):
            self.suspicious = self.suspicious or changed
            return False
        found = [_marks_found(item) for item in marked if item.marks is not None]
        if any(left for _, left in found):
            self.put_back(marked)
        known = [count for count, _ in found if count is not None]
        if any(count >= ENOUGH for count in known):
            self.suspicious = True
            return True
        self.evidence = 0 if 0 in known else self.evidence + sum(known)
        self.suspicious = changed or (bool(known) and 0 not in known)
        self.ways = {**self.ways, **ways}
        return self.evidence >= ENOUGH

    def put_back(self, marked: Sequence[_Marked]) -> None:
        """Give marked elements that nobody wrote to since their values back."""
        for item in reversed(marked):
            if item.marks is None or item.values is None:
                continue
            (positions, signed), now = item.marks, _grad(item.param)
            for grad in (item.grad,) if now is None or now is item.grad else (item.grad, now):
                if _is_plain(grad) and _order(grad) == _order(item.grad) and grad.dtype == item.grad.dtype:
                    flat, k = _flat(grad), len(signed)
                    current = flat[positions[:k]]
                    intact = (current - signed).abs() < _mark_size(flat.dtype) / 32
                    flat.index_copy_(0, positions[:k], torch.where(intact, item.values[:k], current))


class OnePass:
    """The gradients of a step of one pass, watched between `first_step` and `step`: nothing is to be added to them.

    A second backward pass over them would add. Clearing them first is right, though wasted, and clipping is right, too;
    so what is watched is autograd's own accumulation into the same tensor.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        """Watch the gradients of a few parameters."""
        self.added_to = False
        watched = [(p, p.grad) for p in params if p.grad is not None and p.is_leaf and p.requires_grad][:FEW]
        self._handles = [
            p.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                functools.partial(self._accumulated, grad=g, version=g._version)
            )
            for p, g in watched
        ]

    def _accumulated(self, param: Tensor, grad: Tensor, version: int) -> None:
        self.added_to |= param.grad is grad and grad._version == version + 1

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


LOOKS_EVERY = 256  # steps
FEW = 3  # of the gradients that are marked; how these change is noted in every step
MOST_GRADIENTS, MOST_MARKS = 8, 16  # that are marked; elements of each of them
ENOUGH = 24  # marks found again: one in 2^24 for chance
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)


def _chosen(params: Iterable[Tensor]) -> list[Tensor]:
    """A few parameters whose gradients can be marked: the smallest, and some from first to last."""
    having = [(param, grad) for param in params if (grad := _grad(param)) is not None and grad.numel() > 0]
    last = len(having) - 1
    places = sorted({last * i // (MOST_GRADIENTS - 2) for i in range(MOST_GRADIENTS - 1)}) if having else []
    some = [min(having, key=lambda pair: pair[1].numel()), *(having[i] for i in places)] if having else []
    chosen = {id(param): param for param, grad in some if _is_plain(grad)}
    if not chosen:  # others may do
        chosen = {id(param): param for param, grad in having if _is_plain(grad)}
    return list(chosen.values())[:MOST_GRADIENTS]


def _grad(param: Tensor) -> Tensor | None:
    """A parameter's gradient; of a DTensor's the part that lies here."""
    grad = param.grad
    return None if grad is None else local_of(grad)


def _is_plain(grad: Tensor) -> bool:
    if type(grad) is not Tensor or grad.layout != torch.strided or grad.dtype not in DTYPES or grad.is_inference():
        return False
    return grad.numel() > 0 and not grad.is_conj() and not grad.is_neg() and is_dense(grad)


def _flat(grad: Tensor) -> Tensor:
    """[n]: a gradient's elements in storage order; writes are not counted."""
    real = torch.view_as_real(grad.data) if grad.is_complex() else grad.data
    return real.as_strided((real.numel(),), (1,))


def _mark_size(dtype: torch.dtype) -> float:
    """Larger than gradients are, and small enough for a norm to be finite."""
    return 1.375 * (2.0**11 if dtype == torch.float16 else 2.0**50)


def _new_marks(flat: Tensor, seed: int) -> _Marks:
    """Choose what to write into a gradient, the same on every rank."""
    numbers, n, size = random.Random(seed), flat.numel(), _mark_size(flat.dtype)
    count = min(MOST_MARKS, max(n // 2, 1))
    places = numbers.sample(range(n), min(2 * count, n))
    signed = [size if numbers.random() < 0.5 else -size for _ in range(count)]
    positions = torch.tensor(places, device=flat.device)
    return _Marks(positions, torch.tensor(signed, dtype=flat.dtype, device=flat.device))


def _order(grad: Tensor) -> list[tuple[int, int]]:
    """How the elements lie; strides of dimensions of size 1 do not matter."""
    return [(n, stride) for n, stride in zip(grad.shape, grad.stride(), strict=True) if n != 1]


def _way(item: _Marked) -> Way:
    same = _grad(item.param) is item.grad
    return same, item.grad._version - item.version if same else 0


def _marks_found(item: _Marked) -> tuple[int | None, bool]:
    """How many marks there are in the gradient now, and whether any may still be anywhere as they were.

    ENOUGH if chance is ruled out; None if it tells nothing.
    """
    now, grad, marks, values = _grad(item.param), item.grad, item.marks, item.values
    assert marks is not None and values is not None
    if now is None or not _is_plain(now) or _order(now) != _order(grad):
        return 0, True
    written, read = marks.signed.tolist(), _flat(now)[marks.positions].tolist()
    count, size = len(written), abs(written[0])
    if now is grad and now._version == item.version and read == written + values[count:].tolist():
        return None, True  # the second call did nothing to it
    found = [a if b > 0 else -a for a, b in zip(read, written, strict=False)]
    intact = [abs(value - size) < size / 32 for value in found]
    left = any(intact) or now is not grad
    if all(intact):
        return (count if now.dtype == torch.float16 else ENOUGH), left  # there such a number may be anybody's
    if not all(math.isfinite(value) for value in read):
        return None, left
    least, others = min(found), max((abs(value) for value in read[count:]), default=0.0)
    one_size = max(found) <= least * 1.0625
    return (count if least > 0 and least >= others and one_size else 0), left
