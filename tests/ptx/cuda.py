"""fastsam's CUDA half on this CPU: its host code linked to a stub of CUDA's runtime, its kernels' PTX interpreted.

    library = Library(90, folder)                      # compute_90; `folder` keeps what nvcc makes
    with library.serving("cpu"):                       # FusedSAM(..., backend="cpu") runs its operations there
        optimizer.step(closure)

or, of one bucket at a time, `library.grad_norm(tables, grads, out)`, `library.perturb_(...)`, `library.update_(...)`,
`library.dot(...)`, `library.combine_(...)`.
Tensors stay on the CPU; the host code is told that those which a launch may touch are on device 0.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from fastsam.ops import graphs, native, reference
from fastsam.ops.tables import Gradients
from ptx.backend import Interpreted, Launch
from ptx.build import made, run
from ptx.grid import Memory
from ptx.memory import Given, given_to_combine, given_to_dot, spans_of
from ptx.parse import Kernel, Module

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NAMESPACE = "fastsam_on_stub"
# The linker gives these of torch's functions to the stub.
WRAPPED = [
    *("get_device_type", "get_device_index", "create_device_guard", "delete_device_guard"),
    *("library_init_impl", "library_init_fragment"),
]
# What each kernel may write of a bucket and of the tensors that its operation is given. A new kernel is a row here, a
# new operation a method of `Library`.
WRITES = {
    "grad_norm": {"partials", "sums", "clip"},
    "power_norm": {"partials", "sums", "clip"},
    "perturb": {"weight", "backup", "overflows"},
    "power_perturb": {"weight", "backup", "overflows"},
    "power_count": {"overflows"},
    "update": {"weight", "master", "state", "progress", "overflows", "rounding"},
    "dot": {"partials", "out"},
    "combine": {"out"},
    "fill": set(),
}
WHOLE_CHUNKS = ("grad_norm", "power_norm", "power_count", "dot")  # a block each
CONTROL = "control"  # the kernels' own memory behind the segments, which every kernel may write


class Header(ctypes.Structure):
    """What a launch is told by value, before the rows and gradients: as in csrc/cuda/kernels.h."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("chunks", "segments", "rows", "grads", "ticket")),
        *((name, ctypes.c_int32) for name in ("n_chunks", "n_segments", "n_groups", "split_bits")),
        *((name, ctypes.c_int32) for name in ("adaptive", "masters", "n_sums", "slot")),
        *((name, ctypes.c_uint64) for name in ("partials", "sums")),
        *((name, ctypes.c_double) for name in ("q", "max_norm")),
        *((name, ctypes.c_uint64) for name in ("clip", "grad_scale", "found_inf", "overflows", "rounding")),
    ]


class OperandsHeader(ctypes.Structure):
    """The same of operations over gradients and directions, before the addresses: as in csrc/cuda/operands.h."""

    _fields_ = [
        ("chunks", ctypes.c_uint64),
        *((name, ctypes.c_int32) for name in ("n_chunks", "split_bits", "first_segment", "n_segments", "n_operands")),
        ("dtypes", ctypes.c_int32 * 4),
    ]


class DotHeader(OperandsHeader):
    """As in csrc/cuda/dot.h."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("ticket", "partials", "out")]


class CombineHeader(OperandsHeader):
    """As in csrc/cuda/combine.h."""

    _fields_ = [("coefficients", ctypes.c_double * 3), ("addresses", ctypes.c_uint64 * 3)]


OPERAND_HEADERS: dict[str, type[OperandsHeader]] = {"dot": DotHeader, "combine": CombineHeader}
DOT_TICKET = 8  # its place in the kernels' own memory


class Words(ctypes.Structure):
    """What `fill` is told before the words: as in csrc/cuda/launch.cu."""

    _fields_ = [("to", ctypes.c_uint64), ("n", ctypes.c_int32)]


# ---- Compiled.


def nvcc() -> str | None:
    """The path of nvcc."""
    places = [Path(os.environ.get(name) or "/usr/local/cuda") / "bin" for name in ("CUDA_HOME", "CUDA_PATH")]
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(map(str, places)))


@cache
def setup() -> ModuleType:
    """The setup.py of the source tree, for its flags."""
    spec = importlib.util.spec_from_file_location("setup_of_fastsam", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Compiled(NamedTuple):
    """What nvcc makes of one file of csrc/cuda, for one target: in one run, so that both know the same names."""

    ptx: Path
    host: Path


def compile_kernels(folder: Path, arch: int) -> list[Compiled]:
    """Compile csrc/cuda with setup.py's own flags; what was made of the same sources before is taken again."""
    rules, include = setup(), Path(torch.__file__).parent / "include"
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    sources.sort(key=lambda source: -source.stat().st_size)
    headers = b"".join(header.read_bytes() for header in sorted((ROOT / "csrc").rglob("*.h")))
    command = [nvcc(), *rules.NVCC_FLAGS, rules.TORCH_TARGET, f"-isystem={include}"]
    command += [f"-gencode=arch=compute_{arch},code=compute_{arch}", "-c", "--keep"]

    def compiled(source: Path) -> Compiled:
        digest = hashlib.sha256(repr(command).encode() + headers + source.read_bytes()).hexdigest()[:16]
        target = folder / f"{source.stem}-{arch}-{digest}"

        def make(unfinished: Path) -> None:
            unfinished.mkdir()
            run([*command, "--keep-dir", unfinished, source, "-o", unfinished / "host.o"])
            (unfinished / f"{source.stem}.ptx").rename(unfinished / "ptx")
            for file in unfinished.iterdir():
                if file.name not in ("ptx", "host.o"):
                    file.unlink()

        made(target, make)
        return Compiled(target / "ptx", target / "host.o")

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compiled, sources))


def link_host(folder: Path, objects: Sequence[Path]) -> Path:
    """The library's host code with the stub instead of CUDA's runtime."""
    torch_dir = Path(torch.__file__).parent
    operations = ROOT / "csrc" / "cuda" / "ops.cpp"
    parts = [*objects, operations, HERE / "cudart.cpp", *sorted((ROOT / "csrc").rglob("*.h"))]
    digest = hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()[:16]

    def make(unfinished: Path) -> None:
        command = [nvcc(), "-std=c++17", "-O1", "-Xcompiler=-fPIC", "-shared", "-cudart", "none"]
        command += [setup().TORCH_TARGET, f"-isystem={torch_dir / 'include'}"]
        wraps = [option for name in WRAPPED for option in ("-Xlinker", f"--wrap=aoti_torch_{name}")]
        libraries = [f"-L{torch_dir / 'lib'}", "-ltorch_cpu", "-lc10", *wraps, "-Xlinker", "--no-undefined"]
        libraries += ["-Xlinker", "-Bsymbolic"]  # whatever runtime this process has loaded
        run([*command, operations, HERE / "cudart.cpp", *objects, *libraries, "-o", unfinished])

    return made(folder / f"libfastsam_stub-{digest}.so", make)


class Ptx:
    """Kernels by the names that the host knows them by; each is taken apart when it is asked for."""

    def __init__(self, texts: Iterable[str]) -> None:
        """Find the kernels in PTX files."""
        self.places = {name: module for module in map(Module, texts) for name in module.entries}

    def __getitem__(self, name: str) -> Kernel:
        return self.places[name][name]

    def replaced(self, name: str, text: str) -> Ptx:
        """The same kernels but for one, whose text is another."""
        other = Ptx([])
        other.places = {**self.places, name: Module(text)}
        return other


# ---- The host's half.


def implemented() -> list[str]:
    """The operations of csrc/cuda/ops.cpp whose schemas are those of torch.ops.fastsam."""
    text = (ROOT / "csrc" / "cuda" / "ops.cpp").read_text()
    own = re.findall(r"""m\.def\("(\w+)""", text)
    return [name for name in dict.fromkeys(re.findall(r"""m\.impl\("(\w+)""", text)) if name not in own]


LAUNCHED = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_void_p),
)


class Host:
    """The linked library: torch operations whose launches go to `self.launched`. One a process."""

    def __init__(self, library: Path) -> None:
        """Load it, which registers its operations."""
        self.schemas = torch.library.Library(NAMESPACE, "FRAGMENT")
        for name in implemented():
            self.schemas.define(str(getattr(torch.ops.fastsam, name).default._schema).split("::", 1)[1])
        self.library = ctypes.CDLL(str(library))
        self.operations = getattr(torch.ops, NAMESPACE)
        self.overloads = native._Operations(self.operations)
        self.launched: Callable[..., None] | None = None
        self.error: BaseException | None = None
        self.callback = LAUNCHED(self._launched)  # kept: the library holds its address
        self.library.stub_on_launch(self.callback)

    def _launched(self, name: bytes, grid: Any, block: Any, shared: int, args: Any) -> int:
        try:
            assert self.launched is not None and tuple(grid[1:3]) == tuple(block[1:3]) == (1, 1)
            self.launched(name.decode(), grid[0], block[0], shared, args)
        except BaseException as error:  # nothing may pass through C++
            self.error = error
            return 719  # cudaErrorLaunchFailure
        return 0

    def names(self) -> list[str]:
        """The kernels that the host code knows."""
        names = (ctypes.c_char_p * 4096)()
        return [(names[i] or b"").decode() for i in range(self.library.stub_kernels(names, 4096))]

    def set_device_memory(self, spans: Iterable[tuple[int, int]]) -> None:
        """Say which memory is device 0's."""
        starts, ends = zip(*spans, strict=True)
        n = len(starts)
        self.library.stub_device_memory((ctypes.c_uint64 * n)(*starts), (ctypes.c_uint64 * n)(*ends), n)


@cache
def host_of(folder: Path, arch: int) -> Host:
    """The process's host library, whose code is the same for every target."""
    return Host(link_host(folder, [each.host for each in compile_kernels(folder, arch)]))


@cache
def ptx_of(folder: Path, arch: int) -> Ptx:
    """All kernels for one target."""
    return Ptx(each.ptx.read_text() for each in compile_kernels(folder, arch))


class Library(Interpreted):
    """A backend: the operations of fastsam/ops/native.py with the launches of csrc/cuda/launch.cu."""

    first_arch = 0
    devices: dict[int, int] = {}  # by their number of processors, which the host code asks each once

    def __init__(
        self,
        arch: int,
        folder: Path,
        *,
        ptx: Ptx | None = None,
        processors: int = 132,
        seed: int | None = None,
        log: bool = False,
        in_tables: bool = False,
        split_bits: int | None = None,
    ) -> None:
        """Compile what is not compiled yet.

        Args:
            arch: compute capability of the PTX, as 90.
            folder: where compiled files are kept.
            ptx: other kernels than the compiled ones.
            processors: of the GPU, which the number of blocks follows.
            seed: the order of blocks and warps, see `Grid`.
            log: whether each launch's grid keeps its accesses to global memory.
            in_tables: whether kernels find in tables what the host told them by value, as of thousands of tensors.
            split_bits: 2^split_bits blocks share a chunk, whatever the host code would choose.
        """
        super().__init__(seed, log)
        if not Library.first_arch:
            Library.first_arch = arch  # whose host code, the same for all, was linked
        self.host = host_of(folder, Library.first_arch)
        self.arch, self.ptx, self.processors = arch, ptx or ptx_of(folder, arch), processors
        self.in_tables, self.split_bits = in_tables, split_bits
        self._tables: dict[int, Any] = {}  # by the address of their segments
        self._now: Any = None  # whose operation it is
        self._given = Given({})
        self._bound: dict[int, dict[str, Tensor | None]] = {}

    # The operations.

    def grad_norm(
        self, tables: Any, grads: Sequence[Tensor | None], out: Tensor, *, clip: reference.Clip | None = None
    ) -> None:
        """As native.grad_norm."""
        tensors = {"partials": tables.partials, "sums": out}
        if clip is not None:
            tensors |= {"clip": clip.factor, "grad_scale": clip.grad_scale}
        with self._ready(tables, Given(tensors)):
            native.grad_norm(tables, grads, out, clip=clip)

    def perturb_(self, tables: Any, grads: Sequence[Tensor | None], sums: Tensor) -> None:
        """As native.perturb_."""
        with self._ready(tables, Given({"sums": sums})):
            native.perturb_(tables, grads, sums)

    def update_(self, tables: Any, grads: Sequence[Tensor | None], **factors: Tensor | None) -> None:
        """As native.update_."""
        with self._ready(tables, Given(factors)):
            native.update_(tables, grads, **factors)

    def dot(self, tables: Any, a: Gradients, b: Gradients | None, out: Tensor) -> None:
        """As native.dot."""
        with self._ready(tables, given_to_dot(tables, a, b, out)):
            native.dot(tables, a, b, out)

    def combine_(self, tables: Any, out: Gradients, terms: Sequence[tuple[float | Tensor, Gradients]]) -> None:
        """As native.combine_."""
        with self._ready(tables, given_to_combine(tables, out, terms, self.capturing)):
            native.combine_(tables, out, terms)

    def bind(self, tables: Any, sums: Tensor) -> Tensor:
        """As native.bind."""
        tensors = {"partials": tables.partials, "sums": sums}
        self._bound[tables.segment_table.data_ptr()] = tensors
        with self._ready(tables, Given(tensors)):
            return native.bind(tables, sums)

    # As fastsam/ops/graphs.py.

    own_rows = staticmethod(graphs.own_rows)

    def prepare_capture(self, tables: Any) -> None:
        """As graphs.prepare_capture."""
        with self._ready(tables, Given({})):
            graphs.prepare_capture(tables)

    def upload_values(self, tables: Any) -> None:
        """As graphs.upload_values."""
        with self._ready(tables, Given({})):
            graphs.upload_values(tables)

    def bind_of(self) -> Any:
        """`bind`."""
        return self.bind

    @contextmanager
    def capture(self) -> Iterator[None]:
        """As `Interpreted.capture`; the host code is told so, too."""
        self.host.library.stub_capturing(True)
        try:
            with super().capture():
                yield
        finally:
            self.host.library.stub_capturing(False)

    @contextmanager
    def launching(self) -> Iterator[None]:
        """Let the host's launches come here."""
        host, before = self.host, self.host.launched
        host.launched = self._launched
        device = self.devices.setdefault(self.processors, len(self.devices))
        host.library.stub_device(device, self.processors)
        try:
            yield
        except RuntimeError:
            if (error := host.error) is not None:
                host.error = None
                raise error from None
            raise
        finally:
            host.launched = before

    @contextmanager
    def _ready(self, tables: Any, given: Given) -> Iterator[None]:
        """Let native.py call the stub's operations."""
        self._tables[tables.segment_table.data_ptr()] = tables
        self._now, self._given, self.host.error = tables, given, None
        self.host.set_device_memory(
            (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)
            for tensor in (*_device_tables(tables).values(), *given.tensors.values())
            if tensor is not None and tensor.nbytes
        )
        with (
            self.launching(),
            patch.object(native, "_operations", lambda: self.host.overloads),
            patch.object(torch.ops, "fastsam", self.host.operations),
        ):
            try:
                yield
            finally:
                self._now, self._given = None, Given({})

    # Launches.

    def _launched(self, name: str, blocks: int, threads: int, shared: int, args: Any) -> None:
        """Take a launch with the arguments that the host packed, as many of them as it wrote."""
        kernel, operation = self.ptx[name], operation_of(name)
        size = kernel.params_size
        params = bytearray(ctypes.string_at(args[0], size))
        if operation in OPERAND_HEADERS:
            self._launched_over_operands(kernel, operation, blocks, threads, shared, params)
            return
        tables, tensors, words = None, self._given.tensors, 0
        if operation == "fill":
            filled = 16 + 8 * Words.from_buffer_copy(params).n
            tables = self._owner(Words.from_buffer_copy(params).to)
        else:
            header = Header.from_buffer_copy(params)
            if self.split_bits is not None and operation not in WHOLE_CHUNKS:
                header.split_bits = self.split_bits
                blocks = max(header.n_chunks << self.split_bits, 1)
                params[: ctypes.sizeof(Header)] = bytes(header)
            if header.segments:
                tables = self._tables[header.segments]
                tensors = self._bound.get(header.segments, {}) | tensors
                words += 0 if header.rows else 11 * header.n_groups
                words += 0 if header.grads else header.n_segments
            elif header.overflows:  # of a bucket without elements
                counters = (each.overflows for each in self._tables.values() if each.overflows is not None)
                tensors = tensors | {"overflows": next(c for c in counters if c.data_ptr() == header.overflows)}
            filled = ctypes.sizeof(Header) + 8 * words
            if words and self.in_tables and not self.capturing:
                filled = _move(params, header, tables)
        assert filled <= size, f"{filled} bytes of arguments for {size} of {name}"
        params[filled:] = b"\xff" * (size - filled)
        memory = self._memory(tables, tensors, WRITES[operation])
        tickets = None if tables is None else _tickets(tables)
        launch = Launch(kernel, operation, blocks, threads, shared, bytes(params), filled, memory, tickets, words)
        self.take(launch)

    def _launched_over_operands(
        self, kernel: Kernel, operation: str, blocks: int, threads: int, shared: int, params: bytearray
    ) -> None:
        """The same of a launch that knows no table but the chunks'."""
        tables, header = self._now, OPERAND_HEADERS[operation].from_buffer(params)
        if self.split_bits is not None and operation not in WHOLE_CHUNKS:
            header.split_bits = self.split_bits
            blocks = header.n_chunks << self.split_bits
        words = header.n_operands * header.n_segments
        filled = ctypes.sizeof(header) + 8 * words
        assert filled <= len(params), f"{filled} bytes of arguments for {len(params)} of {kernel.name}"
        params[filled:] = b"\xff" * (len(params) - filled)
        memory = Memory()
        if operation == "dot":
            memory.add("ticket", tables.segment_table[len(tables.perturbed) :].data_ptr() + DOT_TICKET, 4)
        memory.add("chunks", tables.chunk_table.data_ptr(), tables.chunk_table.nbytes, False)
        self._given.add_to(memory, tables, WRITES[operation])
        memory.seal()
        tickets = _tickets(tables)
        self.take(Launch(kernel, operation, blocks, threads, shared, bytes(params), filled, memory, tickets, words))

    def _owner(self, address: int) -> Any:
        """The tables in whose own memory an address lies."""
        return next(
            tables
            for start, tables in self._tables.items()
            if start <= address < start + tables.segment_table.nbytes and tables.segment_table.data_ptr() == start
        )

    def _memory(self, tables: Any, tensors: dict[str, Tensor | None], writes: set[str]) -> Memory:
        """What a launch may touch."""
        memory = Memory()
        named = dict(tensors)
        if tables is not None:
            own = tables.segment_table[len(tables.perturbed) :]
            memory.add(CONTROL, own.data_ptr(), own.nbytes)
            named |= _device_tables(tables) | {"segments": tables.segment_table[: len(tables.perturbed)]}
            spans_of(memory, tables, writes)
        for name, tensor in named.items():
            if tensor is not None:
                memory.add(name, tensor.data_ptr(), tensor.nbytes, name in writes)
        memory.seal()
        return memory


def _move(params: bytearray, header: Header, tables: Any) -> int:
    """Write what came by value where csrc/cuda/launch.cu writes what is too much; what is left of the arguments."""
    row_bytes, grad_bytes = 88 * header.n_groups, 8 * header.n_segments
    control = tables.segment_table[len(tables.perturbed) :].data_ptr()
    at, table = ctypes.sizeof(Header), control + 64 + row_bytes
    for field, size in (("rows", row_bytes), ("grads", grad_bytes)):
        if not getattr(header, field):
            ctypes.memmove(table, bytes(params[at : at + size]), size)
            setattr(header, field, table)
            at += size
        table += row_bytes
    params[: ctypes.sizeof(Header)] = bytes(header)
    return ctypes.sizeof(Header)


def _tickets(tables: Any) -> Tensor:
    """[3]: where blocks count, behind the segments."""
    control: Tensor = tables.segment_table[len(tables.perturbed), :2]
    return control.view(torch.int32)[:3]


def _device_tables(tables: Any) -> dict[str, Tensor | None]:
    names = {"segments": "segment_table", "chunks": "chunk_table", "overflows": "overflows", "rounding": "rounding"}
    return {name: getattr(tables, attribute) for name, attribute in names.items()}


def operation_of(name: str) -> str:
    """The kernel's function, from its mangled name."""
    found = [each for each in WRITES if f"{len(each)}{each}" in name]
    if not found:
        raise KeyError(f"WRITES has no row for {name}")
    return max(found, key=len)
