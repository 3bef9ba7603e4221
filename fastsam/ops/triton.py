"""The Triton backend, twin of `reference.py`: one launch an operation over tables of addresses, no compiler at install.

The kernels stand in `triton_kernels.py`, the formulas of the base optimizers in `triton_rules.py`.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from ctypes import string_at
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from fastsam import rules
from fastsam.ops import graphs, native, reference
from fastsam.ops.formats import LOW_DTYPES
from fastsam.ops.triton_kernels import NO_RULE, _grad_norm_kernel, _perturb_kernel, _update_kernel
from fastsam.ops.triton_rules import ADAGRAD, ADAM, LION, NADAM, RMSPROP

if TYPE_CHECKING:
    from fastsam.bucket import Bucket

_STORAGE = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.uint16, torch.float16: tl.float16}
_TYPES = {  # of the kernels' arguments: tables, and otherwise int32
    **dict.fromkeys(("segments", "grads", "overflows", "rounding"), torch.int64),
    **dict.fromkeys(("chunks", "ticket"), torch.int32),
    **dict.fromkeys(("rows", "partials", "out", "sums", "numbers", "clip"), torch.float64),
    **dict.fromkeys(("grad_scale", "found_inf"), torch.float32),
    "perturbed": torch.uint8,
}
_PROGRAMS = 2048  # with fewer chunks than this, several programs share a chunk; not measured yet

INTERPRETED = not isinstance(_update_kernel, triton.JITFunction)


@cache
def reason() -> str | None:
    """Why the kernels cannot be used here and what to do, or None if they can."""
    if _version() < (3, 6):
        return f"it needs triton >= 3.6, this is {triton.__version__}"
    if INTERPRETED:
        late = isinstance(tl.sum, triton.JITFunction)  # Triton's own functions were decorated before
        return "TRITON_INTERPRET=1 must be set before triton is imported" if late else None
    try:
        _ = triton.runtime.driver.active.utils  # compiles Triton's own helper library, once for each user
    except Exception as error:  # RuntimeError, CalledProcessError, OSError, whatever the compiler raises
        return f"Triton does not start (it needs a C compiler and Python's headers): {type(error).__name__}: {error}"
    return None


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def grad_norm(
    bucket: "Bucket", grads: Sequence[Tensor | None], out: Tensor, *, clip: reference.Clip | None = None
) -> None:
    """Write `sum(abs(T g)^q)` over the bucket into its slot; out: [n_buckets] float64. With `clip` T = 1 and q = 2."""
    own = _own(bucket)
    kind = (False, False) if clip is not None else _kind(bucket)
    launch = own.launcher(bucket, _grad_norm_kernel, *kind)
    mirror = own.ascent if clip is None else own.descent
    tables = own.tables(bucket, mirror, native._addresses(bucket, grads))
    max_norm, factor, grad_scale = clip or (None, own.unclipped, None)
    scalars = _scalar(bucket, "clip", factor, own.unclipped), _scalar(bucket, "grad_scale", grad_scale, own.one)
    numbers = own.numbers(bucket.q, max_norm)
    counts = bucket.slot, out.shape[0], int(clip is not None), own.n_chunks
    launch(*tables, own.partials, own.norm_ticket, _place(out), numbers, *map(_place, scalars), *counts)


def perturb_(bucket: "Bucket", grads: Sequence[Tensor | None], sums: Tensor) -> None:
    """Back the weights up and climb: w <- w + e(w); sums: [n_buckets] float64, the squared norm."""
    own = _own(bucket)
    launch = own.launcher(bucket, _perturb_kernel, *_kind(bucket))
    addresses = native._addresses(bucket, grads)
    tables = own.tables(bucket, own.ascent, addresses)
    bucket.perturbed.logical_or_(addresses)
    counts = sums.shape[0], own.n_chunks, own.split
    launch(*tables, _place(sums), own.numbers(bucket.q), *own.counters(bucket), *counts)


def update_(
    bucket: "Bucket",
    grads: Sequence[Tensor | None],
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    clip: Tensor | None = None,
) -> None:
    """Return to the old weights and take the base optimizer's step.

    grad_scale, found_inf: [] or [1] float32; clip: [] or [1] float64.
    """
    own = _own(bucket)
    launch = own.launcher(bucket, _update_kernel, *own.rule(bucket))
    tables = own.tables(bucket, own.descent, native._addresses(bucket, grads))
    perturbed = own.perturbed(bucket.perturbed, own.capturing)
    scalars = (  # tensors, so that none is freed before the launch
        _scalar(bucket, "grad_scale", grad_scale, own.one),
        _scalar(bucket, "found_inf", found_inf, own.zero),
        _scalar(bucket, "clip", clip, own.unclipped),
    )
    counts = own.n_segments, own.n_chunks, own.split
    launch(*tables, perturbed, own.update_ticket, *map(_place, scalars), *own.counters(bucket), *counts)
    bucket.perturbed.zero_()


def _place(tensor: Tensor) -> Any:
    """How a kernel is given a tensor: the launcher takes an address as it is, the interpreter wants the tensor."""
    return tensor if INTERPRETED else tensor.data_ptr()


class _Mirror:
    """A host table's copy on the device, written only when a value changed.

    Every upload has a staging buffer of its own: a buffer kept for the next upload might be overwritten while the copy
    is still to come. What a captured graph reads is never written again, but for a `live` table: replays shall see its
    new values.
    """

    def __init__(self, table: Tensor, device: torch.device, live: bool = False) -> None:
        self.live = live
        self.seen = b""  # what `copy` holds
        self.copy = torch.empty_like(table, device=device)
        self.place = _place(self.copy)
        self.shared = False  # whether a captured graph reads `copy`, too
        self.baked: list[Tensor] = []  # what else captured graphs read

    def __call__(self, table: Tensor, capturing: bool = False) -> Any:
        """Where the table's values are on the device."""
        values = string_at(table.data_ptr(), table.nbytes)
        if capturing:
            return self._captured(table, values)
        if values != self.seen:
            self.seen = b""
            self._upload(table)
            self.seen = values
        return self.place

    def _upload(self, table: Tensor) -> None:
        staging = table
        if self.copy.is_cuda:
            staging = torch.empty(table.shape, dtype=self.copy.dtype, pin_memory=True).copy_(table)
        if self.shared:
            self.baked.append(self.copy)
            self.copy, self.shared = torch.empty_like(self.copy), False
            self.place = _place(self.copy)
        self.copy.copy_(staging, non_blocking=True)

    def _captured(self, table: Tensor, values: bytes) -> Any:
        """Where a graph finds the values: it writes them itself unless they are on the device already.

        That takes nothing but kernels on the capturing stream, which have the values in their arguments: a replay reads
        no memory of the host, and no call is made that a capture may forbid (to wait, to query an event, to allocate
        pinned memory, to copy).
        """
        if values == self.seen:
            self.shared = not self.live
            return self.place
        if self.live:
            raise RuntimeError(
                "FusedSAM: a captured step reads lr, rho and the other values of the groups from the device: call "
                "optimizer.refresh() after changing them, before the capture and before each replay"
            )
        copy = torch.zeros_like(self.copy)
        torch._foreach_add_(copy.unbind(), table.to(copy.dtype).tolist())
        self.baked.append(copy)
        return _place(copy)


class _Own:
    """What the kernels need of one bucket beside its tables, and what of a launch is the same in every step."""

    def __init__(self, bucket: "Bucket") -> None:
        device = bucket.device
        self.known = bucket.segment_table, bucket.chunk_table, bucket.row_table
        self.places = _place(bucket.segment_table), _place(bucket.chunk_table)
        self.n_segments, self.n_chunks, self.split = len(bucket.perturbed), len(bucket.chunk_table), _split(bucket)
        # Apart for the two passes: each may have addresses of its own, step after step.
        self.ascent, self.descent = _Mirror(bucket.grad_table, device), _Mirror(bucket.grad_table, device)
        self.perturbed = _Mirror(bucket.perturbed.view(torch.uint8), device)
        self.rows = _Mirror(bucket.row_table, device, live=True)
        self.tickets = torch.zeros(2, dtype=torch.int32, device=device)
        self.norm_ticket, self.update_ticket = _place(self.tickets[:1]), _place(self.tickets[1:])
        self.partials = _place(bucket.partials)
        self.one, self.zero = torch.ones(1, device=device), torch.zeros(1, device=device)
        self.unclipped = torch.ones(1, dtype=torch.float64, device=device)
        self.uncounted = torch.zeros(2, dtype=torch.int64, device=device)
        self.q_and_max_norm = torch.zeros(2, dtype=torch.float64)
        self.numbers_there = _Mirror(self.q_and_max_norm, device)
        self.launchers: dict[tuple[Any, ...], Callable[..., None]] = {}
        self.rows_seen: Any = None  # the groups' values that `rule` was asked for, and that `settle` saw
        self.settled: Any = None
        self.capturing = False  # asked at the start of every operation

    def serves(self, bucket: "Bucket") -> bool:
        """Whether the bucket's tables are still the ones this was made for."""
        segments, chunks, rows = self.known
        return segments is bucket.segment_table and chunks is bucket.chunk_table and rows is bucket.row_table

    def tables(self, bucket: "Bucket", mirror: "_Mirror", addresses: Tensor) -> tuple[Any, ...]:
        """What every kernel is given first: segments, chunks, the gradients' addresses, the groups' rows."""
        return *self.places, mirror(addresses, self.capturing), self.rows(bucket.row_table, self.capturing)

    def numbers(self, q: float, max_norm: float | None = None) -> Any:
        """Where kernels find q and, where they are given one, the norm to clip to."""
        self.q_and_max_norm[0] = q
        if max_norm is not None:
            self.q_and_max_norm[1] = max_norm
        return self.numbers_there(self.q_and_max_norm, self.capturing)

    def counters(self, bucket: "Bucket") -> tuple[Any, Any]:
        """Where overflows are counted, and the steps of the random numbers."""
        overflows, rounding = bucket.overflows, bucket.rounding
        return tuple(_place(self.uncounted if counter is None else counter) for counter in (overflows, rounding))

    def rule(self, bucket: "Bucket") -> tuple[int, int]:
        """The rule's code, and the states of its groups, as bits; the groups' values decide, seldom anew."""
        if bucket.rows is not self.rows_seen:
            self.rows_seen, self.rule_and_states = bucket.rows, _rule(bucket)
        return self.rule_and_states

    def launcher(self, bucket: "Bucket", kernel: Any, *kind: int) -> Callable[..., None]:
        """What launches a kernel for this bucket, given its arguments; looked up, compiled and loaded once."""
        key = id(kernel), bucket.format.grad, kind
        launch = self.launchers.get(key)
        if launch is None:
            if self.capturing:  # no time to load a kernel
                raise RuntimeError(_TOO_LATE)
            programs = self.n_chunks * (1 if kernel is _grad_norm_kernel else self.split)
            launch = _launcher(kernel, bucket.device, programs, _constants(bucket, kernel, kind))
            self.launchers[key] = launch
        return launch


_TOO_LATE = (
    "FusedSAM: take a step like it before a CUDA graph is captured, so that all tables exist and all kernels are loaded"
)


def _own(bucket: "Bucket") -> _Own:
    own, capturing = bucket.kept, graphs.capturing(bucket.device)
    if not isinstance(own, _Own) or not own.serves(bucket):
        if capturing:  # the tables would lie in the graph's memory
            raise RuntimeError(_TOO_LATE)
        own = bucket.kept = _Own(bucket)
    own.capturing = capturing
    return own


def _scalar(bucket: "Bucket", name: str, value: Tensor | None, neutral: Tensor) -> Tensor:
    if value is None:
        return neutral
    if value.numel() != 1 or value.dtype != neutral.dtype:
        raise RuntimeError(
            f"update_: {name} must be one element of {neutral.dtype}, got {list(value.shape)} of {value.dtype}"
        )
    return value if value.device == bucket.device else value.to(bucket.device, non_blocking=True)


def _constants(bucket: "Bucket", kernel: Any, kind: tuple[int, ...]) -> tuple[Any, ...]:
    """What the kernel is compiled for: its kind, the bucket's format, what is computed in, the tile."""
    format, double = bucket.format, bucket.dtype == torch.float64
    types = tuple(_STORAGE[dtype] for dtype in (format.weight, format.grad, format.source))
    wide, tile = tl.float64 if double else tl.float32, 512 if double else 1024
    if kernel is _grad_norm_kernel:
        return *types, wide, *kind
    if kernel is _perturb_kernel:  # it has nothing to do with states
        return *types, wide, format.stochastic and format.source in LOW_DTYPES, tile, *kind
    return *kind, *types, _STORAGE[format.state], wide, format.stochastic, tile


def _kind(bucket: "Bucket") -> tuple[bool, bool]:
    """Of perturbation: whether with the weight decay in the loss, whether in another norm than the second."""
    return any(row.flags & rules.DECAYS for row in bucket.rows), bucket.q != 2


def _rule(bucket: "Bucket") -> tuple[int, int]:
    """The rule's code, and the set of states that its groups have, as bits."""
    if bucket.rule is None:
        return NO_RULE.value, 0
    union = 0
    for row in bucket.rows:
        if bucket.rule is rules.SGD:
            union |= row.beta1 != 0
        elif bucket.rule is rules.ADAM:
            union |= 3 | 4 * bool(row.flags & rules.AMSGRAD)
        elif bucket.rule is rules.RMSPROP:
            union |= 1 | 2 * (row.beta1 > 0) | 4 * bool(row.flags & rules.CENTERED)
        else:
            union |= 2 ** len(bucket.rule.states) - 1
    return bucket.rule.code, int(union)


def _split(bucket: "Bucket") -> int:
    """How many programs share a chunk: enough to fill a GPU. No result depends on it."""
    n = len(bucket.chunk_table)
    return 4 if 2 * n < _PROGRAMS else 2 if n < _PROGRAMS else 1


def _launcher(kernel: Any, device: torch.device, programs: int, constants: tuple[Any, ...]) -> Callable[..., None]:
    grid = max(programs, 1), 1, 1
    if INTERPRETED:
        import numpy

        def interpret(*args: Any) -> None:
            with numpy.errstate(all="ignore"):  # a GPU does not warn of infinities either
                kernel[grid](*args, *constants)

        return interpret
    with _on(device):
        run = _compiled(kernel, device, constants)[grid]

    def launch(*args: Any) -> None:
        if device.type != "cuda" or torch.cuda.current_device() == device.index:
            run(*args, *constants)
        else:
            with torch.cuda.device(device):
                run(*args, *constants)

    return launch


@cache
def _compiled(kernel: Any, device: torch.device, constants: tuple[Any, ...]) -> Any:
    """A kernel for the current device, compiled from types alone: no tensor is touched."""
    types = [_TYPES.get(name, 0) for name in kernel.arg_names[: -len(constants)]]
    return kernel.warmup(*types, *constants, grid=(1,), **_options(kernel, constants))


def _options(kernel: Any, constants: tuple[Any, ...]) -> dict[str, Any]:
    """How to compile: a thread holds 8 elements (4 of float64) of a tile, so 16 bytes or more of each operand."""
    options = {"num_warps": 8 if kernel is _grad_norm_kernel else 4, "enable_fp_fusion": False}
    named = dict(zip(kernel.arg_names[-len(constants) :], constants, strict=True))
    rule, states = named.get("RULE", NO_RULE.value), named.get("STATES", 0).bit_count()
    wide, masters, drawn = named["WIDE"] == tl.float64, named["SOURCE"] != named["STORAGE"], named.get("DRAWN", False)
    if torch.version.hip is None:  # left alone, ptxas spills a value to get by with 96 registers, 80 or 64
        if drawn and (rule != ADAM.value or states == 2):  # it takes what the random numbers need, but for one
            if rule == RMSPROP.value and states == 2 and named["SOURCE"] == tl.float32:
                options["maxnreg"] = 96
        elif rule in (ADAGRAD.value, LION.value):
            options["maxnreg"] = 128 if wide else 96 if masters else 80
        elif rule == NADAM.value and wide:
            options["maxnreg"] = 160
        elif (states > 2 and not wide) or rule in (RMSPROP.value, NADAM.value):
            options["maxnreg"] = 128
        elif states > 1 and not wide and _version() < (3, 7):
            options["maxnreg"] = 96
    return options


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# ---- CUDA graphs; see `graphs.py`.


def own_rows(n_segments: int, n_groups: int) -> int:
    """No rows of the segment table are these kernels' own."""
    return 0


def settle(bucket: "Bucket") -> None:
    """Before a pass: make all tables and load all kernels of a step, unless it is being captured already."""
    own = _own(bucket)
    if not own.capturing and bucket.rows is not own.settled:
        own.rows(bucket.row_table)
        for kernel in (_grad_norm_kernel, _perturb_kernel):
            own.launcher(bucket, kernel, *_kind(bucket))
        own.launcher(bucket, _update_kernel, *own.rule(bucket))
        own.settled = bucket.rows


def upload(bucket: "Bucket") -> None:
    """Bring the groups' values to the device, outside of graphs."""
    _own(bucket).rows(bucket.row_table)
