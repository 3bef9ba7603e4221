"""fastsam's Triton half on this CPU: its own host code and Triton's own launcher on a stub driver, the PTX interpreted.

    with StubDriver(90, folder) as driver:
        library = TritonLibrary(driver)
        library.grad_norm(tables, grads, out)          # and so on, as `cuda.Library`

Triton compiles the kernels as ever, but for its last step: its ptxas is a script that hands the PTX through, which
`libcuda.cpp` takes where a driver may be given PTX.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor
from triton.backends.nvidia import driver as nvidia  # type: ignore[import-untyped]
from triton.compiler import CompiledKernel  # type: ignore[import-untyped]

from fastsam import ops
from fastsam.ops import reference
from fastsam.ops.tables import Gradients
from ptx.backend import Interpreted, Launch
from ptx.build import made, run
from ptx.grid import Memory
from ptx.memory import Given, given_to_combine, given_to_dot, spans_of
from ptx.parse import Kernel, Module

HERE = Path(__file__).parent
# What each kernel may write of a bucket and of the tensors that its operation is given, beside its tickets.
WRITES = {
    "_grad_norm_kernel": {"partials", "out", "clip"},
    "_perturb_kernel": {"weight", "backup", "overflows", "uncounted"},
    "_update_kernel": {"weight", "master", "state", "progress", "overflows", "rounding", "uncounted"},
    "_dot_kernel": {"partials", "out"},
    "_combine_kernel": {"out"},
}
OVER_OPERANDS = "_dot_kernel", "_combine_kernel"  # which know no table but the chunks' and those of addresses
PTXAS = """#!/bin/sh
# Triton's ptxas: tells the version of the real one, and hands the PTX through.
[ "$1" = --version ] && exec "{ptxas}" --version
while [ $# -gt 3 ]; do shift; done
exec cp "$1" "$3"
"""
LAUNCHED = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint,
    ctypes.POINTER(ctypes.c_void_p),
)


@cache
def module_of(text: bytes) -> Module:
    """A module's kernels, taken apart once."""
    return Module(text.decode())


class StubDriver:
    """A GPU of Triton's for as long as it is entered; one at a time, and none where a real driver is loaded."""

    def __init__(self, arch: int, folder: Path) -> None:
        """Compile the stub.

        Args:
            arch: compute capability, as 90.
            folder: where compiled files are kept, Triton's own among them.
        """
        self.arch, self.folder = arch, folder / f"triton-{triton.__version__}"
        self.launched: Callable[..., None] | None = None
        self.error: BaseException | None = None
        self.callback = LAUNCHED(self._launched)
        source, include = HERE / "libcuda.cpp", Path(nvidia.__file__).parent / "include"

        def make(target: Path) -> None:
            command = ["c++", "-std=c++17", "-O1", "-fPIC", "-shared", "-Wl,-soname,libcuda.so.1", f"-I{include}"]
            run([*command, source, "-o", target])

        library = made(
            self.folder / f"driver-{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}" / "libcuda.so.1", make
        )
        self.libcuda = ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)  # found by its soname from now on
        self.environment = {"TRITON_LIBCUDA_PATH": str(library.parent), "TRITON_CACHE_DIR": str(self.folder / "cache")}
        tools = Path(nvidia.__file__).parent / "bin"
        for name in ("ptxas", "ptxas-blackwell"):
            script = self.folder / name
            script.write_text(PTXAS.format(ptxas=tools / name if (tools / name).is_file() else tools / "ptxas"))
            script.chmod(0o755)
            self.environment[f"TRITON_{name.upper().replace('-', '_')}_PATH"] = str(script)
        self.patches: list[Any] = []

    def __enter__(self) -> StubDriver:
        """Become Triton's driver."""
        self.patches = [patch.dict(os.environ, self.environment)]
        self.patches[0].start()
        self.libcuda.stub_capability(self.arch)
        self.libcuda.stub_on_launch(self.callback)
        with patch.object(torch.cuda, "current_device", lambda: 0):
            active = nvidia.CudaDriver()
        active.get_current_device = lambda: 0
        active.get_device_capability = lambda device: divmod(self.arch, 10)
        active.get_current_stream = lambda device: 0x57
        self.before = dict(vars(triton.runtime.driver))
        triton.runtime.driver.set_active(active)
        self._forget()
        return self

    def __exit__(self, *error: object) -> None:
        """Leave Triton as it was."""
        self._forget()
        self.launched = self.error = None
        for kernel in gc.get_objects():  # whoever holds one still, it shall not unload itself by another driver
            if type(kernel) is CompiledKernel:
                kernel.module = None
        vars(triton.runtime.driver).update(self.before)
        for each in self.patches:
            each.stop()

    def _forget(self) -> None:
        """Drop kernels that were compiled for another driver."""
        kernels: Any = ops.backend_named("triton").operations
        kernels._compiled.cache_clear()
        for name in WRITES:
            getattr(kernels, name).device_caches.clear()

    def _launched(self, ptx: bytes, name: bytes, grid: Any, block: Any, shared: int, args: Any) -> int:
        try:
            assert self.launched is not None and tuple(grid[1:3]) == tuple(block[1:3]) == (1, 1)
            kernel = module_of(ptx)[name.decode()]
            params = bytearray(kernel.params_size)
            for i, (at, size) in enumerate(kernel.params.values()):
                params[at : at + size] = ctypes.string_at(args[i], size)
            self.launched(kernel, grid[0], block[0], shared, bytes(params))
        except BaseException as error:  # nothing may pass through C
            self.error = error
            return 719  # CUDA_ERROR_LAUNCH_FAILED
        return 0


class TritonLibrary(Interpreted):
    """A backend: the operations of fastsam/ops/triton.py on a stub driver."""

    same_stores = True

    def __init__(
        self, driver: StubDriver, *, programs: int | None = None, seed: int | None = None, log: bool = False
    ) -> None:
        """Nothing runs yet.

        Args:
            driver: the entered driver.
            programs: with fewer chunks than this several programs share a chunk.
            seed: see `Interpreted`.
            log: see `Interpreted`.
        """
        super().__init__(seed, log)
        self.driver, self.programs = driver, programs
        self.kernels: Any = ops.backend_named("triton").operations
        self._tables: Any = None
        self._given = Given({})

    def grad_norm(
        self, tables: Any, grads: Sequence[Tensor | None], out: Tensor, *, clip: reference.Clip | None = None
    ) -> None:
        """As triton.grad_norm."""
        tensors = {"out": out} | ({} if clip is None else {"clip": clip.factor, "grad_scale": clip.grad_scale})
        self._call(self.kernels.grad_norm, tables, Given(tensors), grads, out, clip=clip)

    def perturb_(self, tables: Any, grads: Sequence[Tensor | None], sums: Tensor) -> None:
        """As triton.perturb_."""
        self._call(self.kernels.perturb_, tables, Given({"sums": sums}), grads, sums)

    def update_(self, tables: Any, grads: Sequence[Tensor | None], **factors: Tensor | None) -> None:
        """As triton.update_."""
        self._call(self.kernels.update_, tables, Given(factors), grads, **factors)

    def dot(self, tables: Any, a: Gradients, b: Gradients | None, out: Tensor) -> None:
        """As triton.dot."""
        self._call(self.kernels.dot, tables, given_to_dot(tables, a, b, out), a, b, out)

    def combine_(self, tables: Any, out: Gradients, terms: Sequence[tuple[float | Tensor, Gradients]]) -> None:
        """As triton.combine_."""
        given = given_to_combine(tables, out, terms, self.capturing)
        self._call(self.kernels.combine_, tables, given, out, terms)

    # As fastsam/ops/graphs.py.

    def own_rows(self, n_segments: int, n_groups: int) -> int:
        """As triton.own_rows."""
        rows: int = self.kernels.own_rows(n_segments, n_groups)
        return rows

    def prepare_capture(self, tables: Any) -> None:
        """As triton.prepare_capture."""
        self._call(self.kernels.prepare_capture, tables, Given({}))

    def upload_values(self, tables: Any) -> None:
        """As triton.upload_values."""
        self._call(self.kernels.upload_values, tables, Given({}))

    def _call(self, function: Any, tables: Any, given: Given, *args: Any, **options: Any) -> None:
        driver = self.driver
        self._tables, self._given, driver.error, driver.launched = tables, given, None, self._launched
        driver.libcuda.stub_capturing(self.capturing)
        programs = self.kernels._PROGRAMS if self.programs is None else self.programs
        try:
            with patch.object(self.kernels, "_PROGRAMS", programs):
                function(tables, *args, **options)
        except RuntimeError:
            if driver.error is not None:
                raise driver.error from None
            raise

    def _launched(self, kernel: Kernel, blocks: int, threads: int, shared: int, params: bytes) -> None:
        tables, cache, memory, writes = self._tables, self._tables.cache, Memory(), WRITES[kernel.name]
        if kernel.name in OVER_OPERANDS:
            addresses = cache.operands
            copies = [copy for each in (*addresses.copies, *addresses.known) for copy in (each.copy, *each.held)]
            for i, tensor in enumerate((tables.chunk_table, *copies)):
                memory.add(f"table {i}", tensor.data_ptr(), tensor.nbytes, False)
            if kernel.name == "_dot_kernel":
                memory.add("ticket", cache.dot_ticket, 4)
            self._given.add_to(memory, tables, writes)
            memory.seal()
            self.take(Launch(kernel, kernel.name, blocks, threads, shared, params, len(params), memory, cache.tickets))
            return
        tensors = {
            **{"segments": tables.segment_table, "chunks": tables.chunk_table, "partials": tables.partials},
            **{"overflows": tables.overflows, "rounding": tables.rounding},
            **{name: getattr(cache, name) for name in ("one", "zero", "unclipped", "uncounted")},
            **self._given.tensors,
        }
        for name in ("ascent", "descent", "perturbed", "rows", "numbers_there"):
            copies = getattr(cache, name)
            tensors |= {f"{name} {i}": copy for i, copy in enumerate((copies.copy, *copies.held))}
        memory.add("tickets", cache.tickets.data_ptr(), cache.tickets.nbytes)
        for name, tensor in tensors.items():
            if tensor is not None:
                memory.add(name, tensor.data_ptr(), tensor.nbytes, name in writes)
        spans_of(memory, tables, writes)
        memory.seal()
        self.take(Launch(kernel, kernel.name, blocks, threads, shared, params, len(params), memory, cache.tickets))
