"""The Triton backend, twin of `reference.py`: one launch an operation over tables of addresses, no compiler at install.

The kernels stand in `triton_kernels.py`, the formulas of the base optimizers in `triton_rules.py`.
"""

import struct
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from fastsam.bases import rules
from fastsam.ops import graphs, native, reference
from fastsam.ops.formats import LOW_DTYPES
from fastsam.ops.tables import Gradients, Tables
from fastsam.ops.triton_kernels import (
    BFLOAT16,
    FLOAT16,
    NO_RULE,
    _combine_kernel,
    _dot_kernel,
    _grad_norm_kernel,
    _perturb_kernel,
    _update_kernel,
)
from fastsam.ops.triton_rules import ADAGRAD, ADAM, LION, NADAM, RMSPROP
from fastsam.ops.triton_tables import INTERPRETED, AddressCopies, DeviceCopy, argument_of

_STORAGE = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.uint16, torch.float16: tl.float16}
_KINDS = {torch.bfloat16: BFLOAT16.value, torch.float16: FLOAT16.value}  # of operands; 0 is what is computed in
_INT64 = 1 << 32  # a number that is no int32
_TYPES = {  # of the kernels' arguments: tables, and otherwise int32
    **dict.fromkeys(("segments", "grads", "overflows", "rounding"), torch.int64),
    **dict.fromkeys(("a_grads", "b_grads", "outs", "grads0", "grads1", "grads2"), torch.int64),
    **dict.fromkeys(("at0", "at1", "at2", "number0", "number1", "number2"), _INT64),
    **dict.fromkeys(("chunks", "ticket"), torch.int32),
    **dict.fromkeys(("rows", "partials", "out", "sums", "numbers", "clip"), torch.float64),
    **dict.fromkeys(("grad_scale", "found_inf"), torch.float32),
    "perturbed": torch.uint8,
}
_PROGRAMS = 2048  # with fewer chunks than this, several programs share a chunk; not measured yet

_NOT_STARTING = "Triton does not start (it needs a C compiler and Python's headers)"


@cache
def reason() -> str | None:
    """Why the kernels cannot be used here and what to do, or None if they can."""
    if _version() < (3, 6):
        return f"it needs triton >= 3.6, this is {triton.__version__}"
    if INTERPRETED:
        late = isinstance(tl.sum, triton.JITFunction)  # Triton's own functions were decorated before
        return "TRITON_INTERPRET=1 must be set before triton is imported" if late else None
    if torch.version.hip is not None and _version() < (3, 7):
        # A root begins there with an approximation that flushes subnormal numbers to 0, and is NaN.
        return f"on AMD GPUs it needs triton >= 3.7, whose square roots are right; this is {triton.__version__}"
    try:
        _ = triton.runtime.driver.active.utils  # compiles Triton's own helper library, once for each user
    except RuntimeError as error:
        if "active drivers" in str(error) and not str(error).startswith("0"):
            return f"Triton cannot choose a GPU ({error}); TRITON_DEFAULT_BACKEND=nvidia or amd in the environment does"
        return f"{_NOT_STARTING}: {type(error).__name__}: {error}"
    except Exception as error:  # RuntimeError, CalledProcessError, OSError, whatever the compiler raises
        return f"{_NOT_STARTING}: {type(error).__name__}: {error}"
    return None


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def grad_norm(
    tables: Tables, grads: Sequence[Tensor | None], out: Tensor, *, clip: reference.Clip | None = None
) -> None:
    """Write `sum(abs(T g)^q)` over the bucket into its slot; out: [n_buckets] float64. With `clip` T = 1 and q = 2."""
    cache = _cache_of(tables)
    launch = cache.launcher(tables, _grad_norm_kernel, *(_PLAIN if clip is not None else cache.norm_kind(tables)))
    gradients = cache.ascent if clip is None else cache.descent
    arguments = cache.arguments(tables, gradients, native.addresses_of(tables, grads))
    max_norm, factor, grad_scale = clip or (None, cache.unclipped, None)
    scalars = (
        _scalar(tables, "grad_norm: clip", factor, cache.unclipped),
        _scalar(tables, "grad_norm: grad_scale", grad_scale, cache.one),
    )
    numbers = cache.numbers(tables.q, max_norm)
    counts = tables.slot, out.shape[0], int(clip is not None), cache.n_chunks
    launch(
        *arguments, cache.partials, cache.norm_ticket, argument_of(out), numbers, *map(argument_of, scalars), *counts
    )


def perturb_(tables: Tables, grads: Sequence[Tensor | None], sums: Tensor) -> None:
    """Back the weights up and climb: w <- w + e(w); sums: [n_buckets] float64, the squared norm."""
    cache = _cache_of(tables)
    launch = cache.launcher(tables, _perturb_kernel, *cache.norm_kind(tables)[:2])
    addresses = native.addresses_of(tables, grads)
    arguments = cache.arguments(tables, cache.ascent, addresses)
    numbers, counters = cache.numbers(tables.q), cache.counters(tables)
    counts = sums.shape[0], cache.n_chunks, cache.split
    before = tables.perturbed.clone()
    tables.perturbed.logical_or_(addresses)  # ahead of the launch, after which an interrupt may come
    try:
        launch(*arguments, argument_of(sums), numbers, *counters, *counts)
    except Exception:  # nothing was launched: no backup of this pass holds anything
        tables.perturbed.copy_(before)
        raise


def update_(
    tables: Tables,
    grads: Sequence[Tensor | None],
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    clip: Tensor | None = None,
) -> None:
    """Return to the old weights and take the base optimizer's step.

    grad_scale, found_inf: [] or [1] float32; clip: [] or [1] float64.
    """
    cache = _cache_of(tables)
    launch = cache.launcher(tables, _update_kernel, *cache.rule(tables))
    arguments = cache.arguments(tables, cache.descent, native.addresses_of(tables, grads))
    perturbed = cache.perturbed(tables.perturbed, cache.capturing)
    scalars = (  # tensors, so that none is freed before the launch
        _scalar(tables, "update_: grad_scale", grad_scale, cache.one),
        _scalar(tables, "update_: found_inf", found_inf, cache.zero),
        _scalar(tables, "update_: clip", clip, cache.unclipped),
    )
    counts = cache.n_segments, cache.n_chunks, cache.split
    launch(*arguments, perturbed, cache.update_ticket, *map(argument_of, scalars), *cache.counters(tables), *counts)
    tables.perturbed.zero_()


def dot(tables: Tables, a: Gradients, b: Gradients | None, out: Tensor) -> None:
    """Write `<a,a>`, `<a,b>` and `<b,b>` over the bucket into its slot; out: [n_buckets, 3] float64."""
    cache = _cache_of(tables)
    if tables.dot_partials.shape != (3, cache.n_chunks):
        raise RuntimeError(
            f"dot: tables.dot_partials must be [3, {cache.n_chunks}], got {list(tables.dot_partials.shape)}"
        )
    operands = (a,) if b is None else (a, b)
    kinds = _kinds(tables, "dot", operands)
    launch = cache.launcher(tables, _dot_kernel, _narrow(tables, kinds))
    grads = [cache.operands(_addresses(operand), cache.capturing) for operand in operands]
    arguments = cache.addresses[1], grads[0], grads[-1], argument_of(tables.dot_partials), cache.dot_ticket
    launch(*arguments, argument_of(out), kinds, len(operands) - 1, tables.slot, cache.n_chunks)


def combine_(tables: Tables, out: Gradients, terms: Sequence[tuple[float | Tensor, Gradients]]) -> None:
    """Write out = c0 x0 + c1 x1 + c2 x2; a coefficient is a number, or [] or [1] float64."""
    if not 1 <= len(terms) <= 3:
        raise RuntimeError(f"combine_: a linear combination has one to three terms, got {len(terms)}")
    cache = _cache_of(tables)
    operands = out, *(part for _, part in terms)
    kinds = _kinds(tables, "combine_", operands)
    launch = cache.launcher(tables, _combine_kernel, _narrow(tables, kinds))
    grads = [cache.operands(_addresses(operand), cache.capturing) for operand in operands]
    grads += [grads[0]] * (4 - len(grads))  # of terms that are not there, whose coefficient is 0
    values = [coefficient for coefficient, _ in terms] + [0.0] * (3 - len(terms))
    name, alike = "combine_: a coefficient", cache.unclipped
    scalars = [_scalar(tables, name, c, alike) if isinstance(c, Tensor) else None for c in values]
    if cache.capturing:
        cache.held += [scalar for scalar in scalars if scalar is not None]
    at = [0 if scalar is None else scalar.data_ptr() for scalar in scalars]
    numbers = struct.pack("3d", *(c if scalar is None else 0.0 for c, scalar in zip(values, scalars, strict=True)))
    launch(cache.addresses[1], *grads, *at, *struct.unpack("3q", numbers), kinds, cache.n_chunks, cache.split)


class BucketCache:
    """What the kernels need of one bucket beside its tables, and what of a launch is the same in every step."""

    def __init__(self, tables: Tables) -> None:
        """Allocate on the bucket's device."""
        device = tables.device
        self.known = tables.segment_table, tables.chunk_table, tables.row_table
        self.addresses = argument_of(tables.segment_table), argument_of(tables.chunk_table)
        self.n_segments, self.n_chunks, self.split = len(tables.perturbed), len(tables.chunk_table), _split(tables)
        # Apart for the two passes: each may have addresses of its own, step after step.
        self.ascent, self.descent = DeviceCopy(tables.grad_table, device), DeviceCopy(tables.grad_table, device)
        self.perturbed = DeviceCopy(tables.perturbed.view(torch.uint8), device)
        self.rows = DeviceCopy(tables.row_table, device, live=True)
        self.operands = AddressCopies(tables.grad_table, device, self.ascent, self.descent)
        self.tickets = torch.zeros(3, dtype=torch.int32, device=device)
        self.norm_ticket, self.update_ticket, self.dot_ticket = (argument_of(self.tickets[i:]) for i in range(3))
        self.partials = argument_of(tables.partials)
        self.one, self.zero = (torch.full((1,), x, dtype=torch.float32, device=device) for x in (1.0, 0.0))
        self.unclipped = torch.ones(1, dtype=torch.float64, device=device)
        self.uncounted = torch.zeros(2, dtype=torch.int64, device=device)
        self.q_and_max_norm = torch.zeros(2, dtype=torch.float64, device="cpu")
        self.told = -1.0, 0.0  # the same as the numbers on the device
        self.numbers_there = DeviceCopy(self.q_and_max_norm, device)
        self.launchers: dict[tuple[Any, ...], Callable[..., None]] = {}
        self.rule_told: tuple[Any, Any] = (None, None)  # the groups' values and the rule that `rule` was asked for
        self.kind_told: tuple[Any, float] = (None, 0.0)  # the groups' values and q that `norm_kind` was asked for
        self.prepared: tuple[Any, float] = (None, 0.0)  # the groups' values and q that `prepare_capture` saw
        self.captured_kind: tuple[bool, bool, bool] | None = None  # what the last captured norm has code for
        self.held: list[Tensor] = []  # coefficients that captured graphs read
        self.capturing = False  # asked at the start of every operation

    def refill(self) -> None:
        """Outside of captures and of a step's end: have the memory that uploads will need."""
        for copy in (self.ascent, self.descent, self.perturbed, self.numbers_there, self.operands):
            copy.refill()

    def serves(self, tables: Tables) -> bool:
        """Whether the bucket's tables are still the ones this was made for."""
        segments, chunks, rows = self.known
        return segments is tables.segment_table and chunks is tables.chunk_table and rows is tables.row_table

    def arguments(self, tables: Tables, gradients: "DeviceCopy", addresses: Tensor) -> tuple[Any, ...]:
        """What every kernel is given first: segments, chunks, the gradients' addresses, the groups' rows."""
        return *self.addresses, gradients(addresses, self.capturing), self.rows(tables.row_table, self.capturing)

    def numbers(self, q: float, max_norm: float | None = None) -> Any:
        """Where kernels find q and, where they are given one, the norm to clip to."""
        told = q, self.told[1] if max_norm is None else max_norm
        if told == self.told and not self.capturing:  # the usual case, and ten times as fast
            return self.numbers_there.address
        self.q_and_max_norm[0], self.q_and_max_norm[1] = told
        there = self.numbers_there(self.q_and_max_norm, self.capturing)
        if not self.capturing:  # what a graph wrote for itself is not what the next launch finds
            self.told = told
        return there

    def counters(self, tables: Tables) -> tuple[Any, Any]:
        """Where overflows are counted, and the steps of the random numbers."""
        overflows, rounding = tables.overflows, tables.rounding
        return tuple(argument_of(self.uncounted if counter is None else counter) for counter in (overflows, rounding))

    def rule(self, tables: Tables) -> tuple[int, int]:
        """The rule's code, and the states of its groups, as bits; the groups' values decide, seldom anew."""
        told = tables.rows, tables.rule  # compared as objects: this is asked in every step
        if self.rule_told[0] is not told[0] or self.rule_told[1] is not told[1]:
            self.rule_told, self.rule_and_states = told, _rule(tables)
        return self.rule_and_states

    def norm_kind(self, tables: Tables) -> tuple[bool, bool, bool]:
        """What kind of norm and perturbation the groups' values ask for, seldom anew."""
        if tables.rows is not self.kind_told[0] or tables.q != self.kind_told[1]:
            self.kind_told, self.kind = (tables.rows, tables.q), _norm_kind(tables)
        return self.kind

    def launcher(self, tables: Tables, kernel: Any, *kind: int) -> Callable[..., None]:
        """What launches a kernel for this bucket, given its arguments; looked up, compiled and loaded once."""
        key = id(kernel), tables.format.grad, kind
        launch = self.launchers.get(key)
        if launch is None:
            if self.capturing:  # no time to load a kernel
                raise RuntimeError(_TOO_LATE)
            programs = self.n_chunks * (1 if kernel in (_grad_norm_kernel, _dot_kernel) else self.split)
            launch = _launcher(kernel, tables.device, programs, _constants(tables, kernel, kind))
            self.launchers[key] = launch
        return launch


_PLAIN = False, False, False  # the kind of the norm of the gradients as they are
_TOO_LATE = (
    "FusedSAM: take a step like it before a CUDA graph is captured, so that all tables exist and all kernels are loaded"
)


def _cache_of(tables: Tables) -> BucketCache:
    cache, capturing = tables.cache, graphs.capturing(tables.device)
    if not isinstance(cache, BucketCache) or not cache.serves(tables):
        if capturing:  # the tables would lie in the graph's memory
            raise RuntimeError(_TOO_LATE)
        cache = tables.cache = BucketCache(tables)
    cache.capturing = capturing
    return cache


def _scalar(tables: Tables, name: str, value: Tensor | None, neutral: Tensor) -> Tensor:
    if value is None:
        return neutral
    if value.numel() != 1 or value.dtype != neutral.dtype:
        raise RuntimeError(f"{name} must be one element of {neutral.dtype}, got {list(value.shape)} of {value.dtype}")
    return value if value.device == tables.device else value.to(tables.device, non_blocking=True)


def _addresses(operand: Gradients) -> Tensor:
    """[n_segments] int64: an operand's addresses; not written into the bucket's table, where another's may be."""
    if operand.table is not None:
        return operand.table
    return torch.tensor([native._address(part) for part in operand], dtype=torch.int64, device="cpu")


def _kinds(tables: Tables, name: str, operands: Sequence[Gradients]) -> int:
    """What the operands are stored as, two bits each."""
    wide, kinds = torch.float64 if tables.dtype == torch.float64 else torch.float32, 0
    for i, operand in enumerate(operands):
        dtype = tables.format.grad if operand.dtype is None else operand.dtype
        if dtype != wide and (dtype not in _KINDS or wide == torch.float64):
            raise RuntimeError(f"{name}: gradients and directions of {tables.dtype} weights cannot be {dtype}")
        kinds |= _KINDS.get(dtype, 0) << 2 * i
    return kinds


def _narrow(tables: Tables, kinds: int = 0) -> bool:
    """Whether operands may have 16 bits: in a bucket with such dtypes always, so that it needs one kernel."""
    return kinds != 0 or tables.dtype in LOW_DTYPES or tables.format.grad in LOW_DTYPES


def _constants(tables: Tables, kernel: Any, kind: tuple[int, ...]) -> tuple[Any, ...]:
    """What the kernel is compiled for: its kind, the bucket's format, what is computed in, the tile."""
    format, double = tables.format, tables.dtype == torch.float64
    types = tuple(_STORAGE[dtype] for dtype in (format.weight, format.grad, format.source))
    wide, tile = tl.float64 if double else tl.float32, 512 if double else 1024
    if kernel is _dot_kernel:
        return wide, *kind
    if kernel is _combine_kernel:
        return wide, *kind, tile
    if kernel is _grad_norm_kernel:
        return *types, wide, *kind
    if kernel is _perturb_kernel:  # it has nothing to do with states
        return *types, wide, format.stochastic and format.source in LOW_DTYPES, tile, *kind
    return *kind, *types, _STORAGE[format.state], wide, format.stochastic, tile


def _norm_kind(tables: Tables) -> tuple[bool, bool, bool]:
    """Whether with the weight decay in the loss, whether in another norm than the second: of the perturbation, too.

    Of the norm alone: whether any group is adaptive; the code for general norms is in any case.
    """
    power = tables.q != 2
    adapts = not power and any(row.flags & rules.ADAPTIVE for row in tables.rows)
    return any(row.flags & rules.DECAYS for row in tables.rows), power, adapts


def _rule(tables: Tables) -> tuple[int, int]:
    """The rule's code, and the set of states that its groups have, as bits."""
    if tables.rule is None:
        return NO_RULE.value, 0
    union = 0
    for row in tables.rows:
        if tables.rule is rules.SGD:
            union |= row.beta1 != 0
        elif tables.rule is rules.ADAM:
            union |= 3 | 4 * bool(row.flags & rules.AMSGRAD)
        elif tables.rule is rules.RMSPROP:
            union |= 1 | 2 * (row.beta1 > 0) | 4 * bool(row.flags & rules.CENTERED)
        else:
            union |= 2 ** len(tables.rule.states) - 1
    return tables.rule.code, int(union)


def _split(tables: Tables) -> int:
    """How many programs share a chunk: enough to fill a GPU. No result depends on it."""
    n = len(tables.chunk_table)
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
        compiled = _compiled(kernel, device, constants)
        compiled = compiled.result() if hasattr(compiled, "result") else compiled  # of AsyncCompileMode
        if compiled is None:
            _compiled.cache_clear()  # so that it is asked again
            raise RuntimeError(
                "FusedSAM: a kernel is not compiled because a hook (triton.knobs.runtime.jit_cache_hook) said so; "
                "remove the hook, or choose another backend"
            )
        as_triton_does = compiled[grid]  # loads it, too

    def run(*args: Any) -> None:
        hooks = triton.knobs.runtime
        if _has_calls(hooks.launch_enter_hook) or _has_calls(hooks.launch_exit_hook):  # a profiler's
            as_triton_does(*args)
            return
        stream = triton.runtime.driver.active.get_current_stream(device.index or 0)
        # What Triton's own launch comes to without them, which it asks for by way of Python each time.
        compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *args)

    def launch(*args: Any) -> None:
        if device.type != "cuda" or torch.cuda.current_device() == device.index:
            run(*args, *constants)
        else:
            with torch.cuda.device(device):
                run(*args, *constants)

    return launch


def _has_calls(hook: Any) -> bool:
    """Whether a hook of Triton's, None or a chain of functions, does anything."""
    return bool(getattr(hook, "calls", hook))


@cache
def _compiled(kernel: Any, device: torch.device, constants: tuple[Any, ...]) -> Any:
    """A kernel for the current device, compiled from types alone: no tensor is touched."""
    types = [_TYPES.get(name, 0) for name in kernel.arg_names[: -len(constants)]]
    wave = triton.runtime.driver.active.get_current_target().warp_size
    return kernel.warmup(*types, *constants, grid=(1,), **_options(kernel, constants, wave))


def _options(kernel: Any, constants: tuple[Any, ...], wave: int) -> dict[str, Any]:
    """How to compile: a thread holds 8 elements (4 of float64) of a tile, so 16 bytes or more of each operand.

    In waves of 64 threads, which AMD's larger GPUs have, it holds half as many unless there are half as many waves.

    Args:
        kernel: the function.
        constants: what it is compiled for.
        wave: threads that run together: 32 or 64.
    """
    options = {"num_warps": 8 if kernel in (_grad_norm_kernel, _dot_kernel) else 4, "enable_fp_fusion": False}
    named = dict(zip(kernel.arg_names[-len(constants) :], constants, strict=True))
    rule, states = named.get("RULE", NO_RULE.value), named.get("STATES", 0).bit_count()
    source, wide, drawn = named.get("SOURCE"), named["WIDE"] == tl.float64, named.get("DRAWN", False)
    masters = source != named.get("STORAGE")
    if wave == 64 and source in (tl.uint16, tl.float16) and kernel is not _grad_norm_kernel:
        options["num_warps"] = 2
    if torch.version.hip is None:  # left alone, ptxas spills a value to get by with 96 registers, 80 or 64
        if kernel is _combine_kernel and named["NARROW"]:
            options["maxnreg"] = 72
        elif drawn and (rule != ADAM.value or states == 2):  # it takes what the random numbers need, but for one
            if rule == RMSPROP.value and states == 2 and named["SOURCE"] == tl.float32:
                options["maxnreg"] = 96
        elif rule in (ADAGRAD.value, LION.value):
            options["maxnreg"] = 128 if wide else 96 if masters else 80
        elif rule == NADAM.value and wide:
            options["maxnreg"] = 160
        elif (states > 2 and not wide) or rule in (RMSPROP.value, NADAM.value):
            options["maxnreg"] = 128
        elif rule == ADAM.value and states == 2 and masters and (3, 7) <= _version() < (3, 9):
            options["maxnreg"] = 104
        elif states > 1 and not wide and _version() < (3, 7):
            options["maxnreg"] = 96
    return options


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# ---- CUDA graphs; see `graphs.py`.


def own_rows(n_segments: int, n_groups: int) -> int:
    """No rows of the segment table are these kernels' own."""
    return 0


def prepare_capture(tables: Tables) -> None:
    """Before a pass: make all tables and load all kernels of a step, unless it is being captured already."""
    cache = _cache_of(tables)
    if cache.capturing:
        cache.captured_kind = cache.norm_kind(tables)
        return
    if cache.captured_kind is not None:
        cache.refill()
    if tables.rows is not cache.prepared[0] or tables.q != cache.prepared[1]:
        cache.rows(tables.row_table)
        norm = cache.norm_kind(tables)
        if tables.q != 1:
            cache.launcher(tables, _grad_norm_kernel, *norm)
        if norm != _PLAIN:  # which gradients are clipped by
            cache.launcher(tables, _grad_norm_kernel, *_PLAIN)
        cache.launcher(tables, _perturb_kernel, *norm[:2])
        cache.launcher(tables, _update_kernel, *cache.rule(tables))
        cache.prepared = tables.rows, tables.q
    if tables.dot_partials.numel() > 0:  # a direction was asked for
        for kernel in (_dot_kernel, _combine_kernel):
            cache.launcher(tables, kernel, _narrow(tables))


def upload_values(tables: Tables) -> None:
    """Bring the groups' values to the device, outside of graphs.

    Raises:
        RuntimeError: the captured kernels have no code for what a group asks for now.
    """
    cache = _cache_of(tables)
    captured = cache.captured_kind
    kind = cache.norm_kind(tables)
    if captured is not None and any(now and not then for now, then in zip(kind, captured, strict=True)):
        raise RuntimeError(
            "FusedSAM: adaptive, another norm or perturb_with_weight_decay was switched on since the CUDA graph was "
            "captured, whose kernels have no code for it: capture it again"
        )
    cache.rows(tables.row_table)
