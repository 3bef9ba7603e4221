"""The operations in C++ (and CUDA), twins of `reference.py`: one library over tables of addresses.

`torch.ops.fastsam.*` write through the addresses in a bucket's tables, which no schema shows: only this module
calls them, and no trace takes them in. The library lies in the package; FASTSAM_LIBRARY in the environment names
another file, built from the same sources.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastsam.ops import reference
from fastsam.ops.formats import Format
from fastsam.ops.tables import ALIGN, Gradients, Tables

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_NO_RULE = -1
MOST_TERMS = 3
LIBRARY = "fastsam._C"
OPERATIONS = ("grad_norm", "perturb_", "update_", "dot", "combine_", "bind_")  # on tables, by their names in torch.ops
BOUND_BYTES = 416  # of csrc/bound.h


def folder() -> Path:
    """Where the library lies, or would."""
    elsewhere = os.environ.get("FASTSAM_LIBRARY")
    return Path(__file__).parents[1] if elsewhere is None else Path(elsewhere).parent


def reason() -> str | None:
    """Why the library cannot be used here and what to do, or None if it can."""
    return _REASON


@cache
def cuda_reason() -> str | None:
    """Why the library's CUDA kernels cannot be used here and what to do, or None if they can."""
    if (why := reason()) is not None:
        return why
    if not torch._C._dispatch_has_kernel_for_dispatch_key("fastsam::grad_norm", "CUDA"):
        return "the library was built without them; install a CUDA toolkit (nvcc) and rebuild: pip install -e ."
    if reader is None:
        return "torch does not tell the current stream by its DLPack exchange table; they need torch >= 2.11"
    if torch.version.hip is not None:
        return "torch is built for AMD GPUs here, the library for NVIDIA's; install triton"
    if not torch.cuda.is_available():
        return "they are compiled, but torch.cuda.is_available() is False"
    return None


@cache
def device_reason(index: int) -> str | None:
    """Why this GPU's driver takes none of the library's kernels and what to do, or None; asked of it once."""
    try:
        torch.ops.fastsam.probe(index)
    except RuntimeError as error:
        major, minor = torch.cuda.get_device_capability(index)
        return (
            f"cuda:{index} does not load the library's kernels ({str(error).splitlines()[0]}): they were built for "
            "other GPUs, or by an nvcc that is newer than the driver (python -m fastsam says more); update the driver, "
            f'or rebuild: TORCH_CUDA_ARCH_LIST="{major}.{minor}" pip install -e .'
        )
    return None


def grad_norm(
    tables: Tables, grads: Sequence[Tensor | None], out: Tensor, *, clip: reference.Clip | None = None
) -> None:
    """Write `sum((T g)^2)` over the bucket into its slot; out: [n_buckets] float64. With `clip` T = 1."""
    max_norm, factor, grad_scale = (0.0, None, None) if clip is None else clip
    _operations().grad_norm(
        _format_code(tables.format),
        tables.segment_table,
        tables.chunk_table,
        addresses_of(tables, grads),
        tables.row_table,
        tables.partials,
        out,
        tables.slot,
        tables.q if clip is None else 2.0,
        max_norm,
        factor,
        grad_scale,
    )


def perturb_(tables: Tables, grads: Sequence[Tensor | None], sums: Tensor) -> None:
    """Back the weights up and climb: w <- w + e(w); sums: [n_buckets] float64, the squared norm."""
    _operations().perturb_(
        _format_code(tables.format),
        tables.segment_table,
        tables.chunk_table,
        addresses_of(tables, grads),
        tables.row_table,
        tables.perturbed,
        sums,
        tables.q,
        tables.overflows,
        tables.rounding,
    )


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
    _operations().update_(
        _format_code(tables.format),
        _rule_code(tables),
        tables.segment_table,
        tables.chunk_table,
        addresses_of(tables, grads),
        tables.row_table,
        tables.perturbed,
        grad_scale,
        found_inf,
        clip,
        tables.overflows,
        tables.rounding,
    )


def dot(tables: Tables, a: Gradients, b: Gradients | None, out: Tensor) -> None:
    """Write `<a,a>`, `<a,b>` and `<b,b>` over the bucket into its slot; out: [n_buckets, 3] float64."""
    _operations().dot(
        tables.segment_table,
        tables.chunk_table,
        *_operand(tables, a),
        *_operand(tables, b),
        tables.dot_partials,
        out,
        tables.slot,
    )


def combine_(tables: Tables, out: Gradients, terms: Sequence[tuple[float | Tensor, Gradients]]) -> None:
    """Write a linear combination: out = c0 x0 + c1 x1 + c2 x2, in every segment that `out` has.

    A coefficient may be [] or [1] float64 on the bucket's device, which is read there, also by replays of a graph.
    """
    if not 1 <= len(terms) <= MOST_TERMS:
        raise ValueError(f"combine_: there must be one to {MOST_TERMS} terms, got {len(terms)}")
    coefficients: list[float | Tensor] = [0.0] * MOST_TERMS
    operands: list[Gradients | None] = [None] * MOST_TERMS
    for i, (coefficient, parts) in enumerate(terms):
        coefficients[i], operands[i] = coefficient, parts
    _operations().combine_(
        tables.segment_table,
        tables.chunk_table,
        *_operand(tables, out),
        *(each for parts in operands for each in _operand(tables, parts)),
        *(0.0 if isinstance(c, Tensor) else c for c in coefficients),
        *(c if isinstance(c, Tensor) else None for c in coefficients),
    )


def bind(tables: Tables, sums: Tensor) -> Tensor:
    """What `reader.run_pass` needs to run the operations over a bucket: its operands, checked once.

    It is valid as long as the tensors of `tables`, and `sums`, are the same.
    """
    bound = torch.empty(BOUND_BYTES, dtype=torch.uint8, device="cpu")
    torch.ops.fastsam.bind_(
        _format_code(tables.format),
        _rule_code(tables),
        tables.segment_table,
        tables.chunk_table,
        tables.grad_table,
        tables.row_table,
        tables.partials,
        tables.perturbed,
        sums,
        tables.slot,
        tables.q,
        tables.overflows,
        tables.rounding,
        bound,
    )
    return bound


def upload_rows(tables: Tables) -> None:
    """Write the groups' values to the device, where captured graphs read them, and load the bucket's CUDA kernels."""
    torch.ops.fastsam.upload_rows(
        _format_code(tables.format),
        _rule_code(tables),
        tables.segment_table,
        tables.row_table,
        len(tables.grad_table),
        tables.q,
    )


@cache
def _format_code(format: Format) -> int:
    """A format as one number, which csrc/checks.h takes apart."""
    *dtypes, stochastic = format
    return sum(_DTYPES[dtype] << 4 * i for i, dtype in enumerate(dtypes)) | stochastic << 16


def _rule_code(tables: Tables) -> int:
    return _NO_RULE if tables.rule is None else tables.rule.code


def addresses_of(tables: Tables, grads: Sequence[Tensor | None]) -> Tensor:
    """[n_segments] int64: the gradients' addresses, written now unless whoever gathered the gradients has."""
    table: Tensor | None = getattr(grads, "table", None)
    if table is not None:
        return table
    return _write_addresses(tables.grad_table, grads)


def _operand(tables: Tables, parts: Gradients | None) -> tuple[Tensor | None, int]:
    """[n_segments] int64, addresses as above but in a table of their own, and the dtype's code; none is (None, 0)."""
    if parts is None:
        return None, 0
    table = parts.table
    if table is None:
        table = _write_addresses(torch.empty(len(parts), dtype=torch.int64, device="cpu"), parts)
    return table, _DTYPES[parts.dtype or tables.format.grad]


def _write_addresses(table: Tensor, tensors: Sequence[Tensor | None]) -> Tensor:
    if reader is not None:
        reader.fill(list(tensors), table.data_ptr())
    else:
        table.copy_(torch.tensor([_address(tensor) for tensor in tensors], dtype=torch.int64, device="cpu"))
    return table


def _address(grad: Tensor | None) -> int:
    return 0 if grad is None else grad.data_ptr() if grad.numel() else ALIGN


class _Operations:
    """The overloads themselves: looking them up by name costs a microsecond a call."""

    grad_norm: Callable[..., None]
    perturb_: Callable[..., None]
    update_: Callable[..., None]
    dot: Callable[..., None]
    combine_: Callable[..., None]

    def __init__(self, namespace: Any) -> None:
        self.grad_norm = namespace.grad_norm.default
        self.perturb_ = namespace.perturb_.default
        self.update_ = namespace.update_.default
        self.dot = namespace.dot.default
        self.combine_ = namespace.combine_.default


@cache
def _operations() -> _Operations:
    if (why := reason()) is not None:
        raise ImportError(f"fastsam: the native library is not available: {why}")
    return _Operations(torch.ops.fastsam)


def _source_hash() -> str | None:
    """Hash of csrc/ where it lies beside the package (a source tree), as setup.py takes it."""
    root = Path(__file__).resolve().parents[2] / "csrc"
    if not (root / "ops.cpp").is_file():
        return None
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.suffix in (".h", ".cpp", ".cu"):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _import_from(file: str) -> ModuleType:
    """The library in another file, under the name that it has in the package."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"FASTSAM_LIBRARY={file} is no file")
    spec = importlib.util.spec_from_file_location(LIBRARY, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[LIBRARY] = module
    return module


def _load() -> tuple[ModuleType | None, str | None]:
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < (2, 10):
        return None, f"it needs torch >= 2.10, this is {torch.__version__}"
    elsewhere = os.environ.get("FASTSAM_LIBRARY")
    try:
        module = importlib.import_module(LIBRARY) if elsewhere is None else _import_from(elsewhere)
    except ModuleNotFoundError:
        return None, "it was not built (python -m fastsam says why); build it with: pip install -e ."
    except FileNotFoundError as error:
        return None, str(error)
    except ImportError as error:
        return None, f"it does not load ({error}); rebuild: pip install -e ."
    expected = _source_hash()
    if expected is not None and module.source_hash != expected:
        return None, "it was built from other sources; rebuild: pip install -e ."
    try:
        if (capsule := getattr(Tensor, "__dlpack_c_exchange_api__", None)) is not None:
            module.init(capsule)
        if (isa := os.environ.get("FASTSAM_CPU")) is not None:
            module.use_cpu_isa(isa)
    except (RuntimeError, ValueError) as error:
        return None, str(error)
    return module, None


def _give_fake_kernel(name: str) -> None:
    """Let an operation run on fake tensors, where it does nothing, but end each graph that torch.compile traces.

    A compiler that had it in a graph would read weights before or after it as it likes, since the schema tells of the
    tables alone. So the operation is called between two graphs.
    """

    def fake(*operands: Any) -> None:
        if torch.compiler.is_compiling():
            from torch._subclasses.fake_tensor import UnsupportedOperatorException

            raise UnsupportedOperatorException(getattr(torch.ops.fastsam, name).default)

    torch.library.register_fake(f"fastsam::{name}", fake)


_LIBRARY, _REASON = _load()
if _REASON is None:
    for _name in OPERATIONS:
        _give_fake_kernel(_name)
# The module `fastsam._C`, which reads addresses and layouts of tensors; None without it or torch's exchange table.
reader = _LIBRARY if _REASON is None and hasattr(Tensor, "__dlpack_c_exchange_api__") else None
