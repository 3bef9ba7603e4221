"""A launch: memory with its bounds, and a scheduler of the grid's threads."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ptx.arithmetic import Array, packed
from ptx.parse import Kernel
from ptx.translate import END, PARAMS, function_of, storage

WARP = 32
MOST_TURNS = 200_000  # of basic blocks: no launch of the tests takes a tenth of it


class Fault(Exception):
    """What a kernel must not do."""


class Access(NamedTuple):
    """One instruction's accesses to global memory; arrays have an element a thread."""

    line: int
    kind: str  # "load", "store", "atomic" and its memory order, or "fence", which has no addresses
    addresses: Array
    size: int
    threads: Array  # numbered through the grid
    intervals: Array  # how many barriers the thread's block had passed


class Memory:
    """The spans of this process's memory that kernels may access, each for itself: none may reach into the next."""

    def __init__(self) -> None:
        self.spans: list[tuple[int, int, bool, str]] = []  # (start, end, writable, name)

    def add(self, name: str, address: int, size: int, writable: bool = True) -> None:
        """Allow accesses to `size` bytes."""
        if size > 0:
            self.spans.append((address, address + size, writable, name))

    def seal(self) -> None:
        """Make ready for accesses."""
        self.spans.sort()
        for before, after in zip(self.spans, self.spans[1:], strict=False):
            if before[1] > after[0]:
                raise ValueError(f"{before[3]} and {after[3]} overlap")
        starts, ends, writable, _ = zip(*(self.spans or [(64, 64, False, "")]), strict=True)
        self.starts, self.ends = np.array(starts, np.uint64), np.array(ends, np.uint64)
        self.writable = np.array(writable)
        self.low = starts[0] // 64 * 64
        self.size = -(-(max(ends) - self.low) // 64) * 64
        self.view = cache(self._view)

    def _view(self, dtype: np.dtype[Any], count: int) -> Array:
        """All memory from the first span to the last as one array, most of which nobody may touch."""
        everything = np.frombuffer((ctypes.c_char * self.size).from_address(self.low), np.uint8)
        return in_rows(everything, dtype, count)

    def places(self, addresses: Array, size: int) -> Array:
        """Indices into such a view."""
        return ((addresses - np.uint64(self.low)) // np.uint64(size)).view(np.int64)

    def check(self, addresses: Array, size: int, write: bool) -> tuple[int, str] | None:
        """None, or the place of an access that is not allowed, and why."""
        odd = addresses & np.uint64(size - 1)
        if odd.any():
            return int(odd.argmax()), f"not a multiple of {size}"
        if len(addresses) > 1024:  # many are neighbours: where the ends of a part are in one span, all of it is
            parts = addresses[: len(addresses) // 64 * 64].reshape(64, -1)
            low, high = parts.min(1), parts.max(1)
            ends = np.concatenate([low, high, addresses[parts.size :]])
            if self._outside(ends, size, write) is None and np.array_equal(self._span(low), self._span(high)):
                return None
        return self._outside(addresses, size, write)

    def _span(self, addresses: Array) -> Array:
        return np.searchsorted(self.starts, addresses, "right") - 1

    def _outside(self, addresses: Array, size: int, write: bool) -> tuple[int, str] | None:
        span = self._span(addresses)
        bad = (span < 0) | (addresses + np.uint64(size) > self.ends[span])
        if bad.any():
            return int(bad.argmax()), "outside of all known memory"
        if write and not self.writable[span].all():
            return int((~self.writable[span]).argmax()), "not to be written"
        return None

    def describe(self, address: int) -> str:
        """The nearest span, in words."""
        nearest = min(self.spans, key=lambda span: max(span[0] - address, address - span[1] + 1, 0), default=None)
        if nearest is None:
            return "nothing"
        start, end, _, name = nearest
        return f"{name} + {address - start} of {end - start} bytes"


class Grid:
    """One launch of a kernel."""

    def __init__(
        self,
        kernel: Kernel,
        blocks: int,
        threads: int,
        params: bytes,
        memory: Memory,
        *,
        shared: int = 0,
        resident: int = 128,
        seed: int | None = None,
        log: list[Access] | None = None,
        filled: int | None = None,
        same_stores: bool = False,
    ) -> None:
        """In one dimension.

        Args:
            kernel: a `parse.Kernel`.
            blocks: how many.
            threads: of a block.
            params: the bytes of all parameters.
            memory: what it may access.
            shared: bytes of shared memory that the launch adds to the kernel's own.
            resident: blocks that run at once; others start when all of these have ended.
            seed: None runs all threads together, instruction by instruction; else blocks come in any order, and warps
                take turns at random between two places where threads meet or part.
            log: a list that takes every `Access` to global memory.
            filled: how many bytes of the parameters somebody wrote, if not all.
            same_stores: whether threads may store the same value over each other in shared memory, without a barrier,
                as in Triton's reductions all do that have the result.
        """
        if (threads > WARP and threads % WARP) or (kernel.threads is not None and threads > kernel.threads):
            raise Fault(f"{threads} threads a block, in {kernel.name}")
        if len(params) != kernel.params_size:
            raise Fault(f"{len(params)} bytes of parameters instead of {kernel.params_size}, in {kernel.name}")
        self.kernel, self.memory, self.log = kernel, memory, log
        self.blocks, self.threads, self.resident = blocks, threads, resident
        self.random = None if seed is None else random.Random(seed)
        self.params = np.frombuffer(bytes(params) + bytes(-len(params) % 16), np.uint8)
        self.params_end = len(params) if filled is None else filled
        self.shared_size = kernel.shared_size + shared
        self.executed: set[int] = set()  # basic blocks
        self.same_stores = same_stores

    def run(self) -> Grid:
        """Run it to its end."""
        order = np.arange(self.blocks)
        if self.random:
            order = np.array(self.random.sample(range(self.blocks), self.blocks))
        with np.errstate(all="ignore"):
            for start in range(0, self.blocks, self.resident):
                self._start(order[start : start + self.resident])
                self._run()
        self.registers.clear()
        return self

    def _start(self, blocks: Array) -> None:
        """Bring blocks onto the GPU."""
        n, width = len(blocks), -(-self.shared_size // 16) * 16
        self.ids, self.total = blocks, n * self.threads
        self.all = np.arange(self.total)
        self.numbers = (blocks[:, None] * self.threads + np.arange(self.threads)).reshape(-1)
        self.block_of = np.repeat(np.arange(n), self.threads)
        self.interval = np.zeros(n, np.int64)
        self.registers = Registers(self)
        self.shared = np.full((n, width), 0xAA, np.uint8)
        self.written, self.read = (np.full((n, width), -1, np.int32) for _ in range(2))  # last by; -2: by several
        self.written_in, self.read_in = (np.full((n, width), -1, np.int64) for _ in range(2))  # last in that interval

    def _run(self) -> None:
        waiting = {0: [self.all]}  # threads, by the basic block that they are to execute
        turns = 0
        while waiting:
            turns += 1
            if turns > MOST_TURNS:
                raise Fault(f"no end is in sight, in {self.kernel.name}")
            rank, threads = self._next(waiting)
            self.executed.add(rank)
            whole = len(threads) == self.total
            going = block_function(self.kernel, rank)(self, None if whole else threads, len(threads))
            if not isinstance(going, tuple):
                if going is not END:
                    waiting.setdefault(going, []).append(threads)
                continue
            choice, *targets = going
            for i, target in enumerate(targets):
                part = threads[choice == i]
                if target is not END and len(part):
                    waiting.setdefault(target, []).append(part)

    def _next(self, waiting: dict[int, list[Array]]) -> tuple[int, Array]:
        """Take threads that can go on: those furthest behind, so that all meet again, or any."""
        ranks = sorted(waiting)
        if self.random:
            self.random.shuffle(ranks)
        for rank in ranks:
            parts = waiting.pop(rank)
            threads = parts[0] if len(parts) == 1 else np.sort(np.concatenate(parts))
            meeting = self.kernel.blocks[rank].meeting
            members = self.threads if meeting == "block" else WARP
            if meeting or self.random:
                group = threads // members
                ready = np.bincount(group)[group] == members if meeting else np.ones(len(threads), np.bool_)
                if self.random and ready.any():
                    groups = np.unique(group[ready])
                    ready &= np.isin(group, groups[np.array([self.random.random() for _ in groups]) < 0.5])
                if not ready.all():
                    waiting[rank] = [threads[~ready]]
                    threads = threads[ready]
            if len(threads):
                if meeting == "block":
                    self.interval[self.block_of[threads[:: self.threads]]] += 1
                return rank, threads
        if self.random and not self._stuck(waiting):
            return self._next(waiting)
        lines = [self.kernel.blocks[rank].instructions[0] for rank in waiting]
        where = ", ".join(f"line {each.line}: {each.text}" for each in lines)
        raise Fault(f"threads wait for others that have ended or wait elsewhere: {where}, in {self.kernel.name}")

    def _stuck(self, waiting: dict[int, list[Array]]) -> bool:
        for rank, parts in waiting.items():
            meeting = self.kernel.blocks[rank].meeting
            members = self.threads if meeting == "block" else WARP
            if not meeting or (np.bincount(np.concatenate(parts) // members) == members).any():
                return False
        return True

    def these(self, at: Array | None) -> Array:
        """Indices of the threads that run a block."""
        return self.all if at is None else at

    def fault(self, line: int, what: str, thread: np.integer[Any]) -> Fault:
        """The exception for a thread, given by its index."""
        text = next(i.text for block in self.kernel.blocks for i in block.instructions if i.line == line)
        block, own = divmod(int(self.numbers[thread]), self.threads)
        return Fault(f"{what}: block {block}, thread {own}, line {line}: {text}, in {self.kernel.name}")

    # Parameters.

    def parameter(self, at: int, dtype: np.dtype[Any]) -> Any:
        """The one at a place that is known beforehand."""
        if at + dtype.itemsize > self.params_end or at % dtype.itemsize:
            raise Fault(f"no parameter of {dtype} at {at}, in {self.kernel.name}")
        return self.params[at : at + dtype.itemsize].view(dtype)[0]

    def load_param(self, line: int, addresses: Array, threads: Array, dtype: np.dtype[Any], count: int) -> Array:
        """ld.param."""
        size = dtype.itemsize * count
        at = addresses - np.uint64(PARAMS)
        bad = (at > np.uint64(self.params_end - size)) | (at % np.uint64(size) != 0)
        if bad.any():
            raise self.fault(line, f"no parameter at {int(at[bad.argmax()])}", threads[bad.argmax()])
        return in_rows(self.params, dtype, count)[at // np.uint64(size)]

    # Global memory.

    def load_global(self, line: int, addresses: Array, threads: Array, dtype: np.dtype[Any], count: int) -> Array:
        """ld.global; [n] or [n, count]."""
        size = dtype.itemsize * count
        self._check(line, addresses, threads, size, "load")
        return self.memory.view(dtype, count)[self.memory.places(addresses, size)]

    def store_global(self, line: int, addresses: Array, threads: Array, dtype: np.dtype[Any], *values: Array) -> None:
        """st.global."""
        size = dtype.itemsize * len(values)
        self._check(line, addresses, threads, size, "store")
        place = self.memory.places(addresses, size)
        self.memory.view(dtype, len(values))[place] = side_by_side(values, len(addresses))

    load_generic, store_generic = load_global, store_global

    def _check(self, line: int, addresses: Array, threads: Array, size: int, kind: str) -> None:
        if len(addresses) == 0:
            return
        if found := self.memory.check(addresses, size, kind != "load"):
            at, why = found
            address = int(addresses[at])
            what = f"{kind} of {size} bytes at {address:#x}, {why} (next to it: {self.memory.describe(address)})"
            raise self.fault(line, what, threads[at])
        if self.log is not None:
            intervals = self.interval[self.block_of[threads]]
            self.log.append(Access(line, kind, addresses, size, self.numbers[threads], intervals))

    def fence(self, line: int, threads: Array) -> None:
        """A fence between blocks: blocks run in some order here, so that only the log has to know."""
        if self.log is not None:
            intervals = self.interval[self.block_of[threads]]
            self.log.append(Access(line, "fence", np.zeros(0, np.uint64), 0, self.numbers[threads], intervals))

    def atomic(
        self, line: int, addresses: Array, threads: Array, dtype: np.dtype[Any], what: str, order: str, *values: Array
    ) -> Array:
        """atom: one thread after the other."""
        self._check(line, addresses, threads, dtype.itemsize, f"atomic {order}")
        view, old = self.memory.view(dtype, 1), np.zeros(len(threads), dtype)
        for turn, place in enumerate(self.memory.places(addresses, dtype.itemsize).tolist()):
            before, value = view[place], values[0][turn]
            if what == "inc":
                after = dtype.type(0) if before >= value else before + dtype.type(1)
            elif what == "cas":
                after = values[1][turn] if before == value else before
            else:
                after = {"add": before + value, "exch": value}[what]
            old[turn], view[place] = before, after
        return old

    # Shared memory. Between two barriers a byte that a thread writes is that thread's alone.

    def load_shared(self, line: int, addresses: Array, threads: Array, dtype: np.dtype[Any], count: int) -> Array:
        """ld.shared; [n] or [n, count]."""
        size = dtype.itemsize * count
        blocks, places = self._shared(line, addresses, threads, size)
        place = blocks * self.shared.shape[1] + places
        if len(place) == 0:
            return np.zeros((0, count) if count > 1 else 0, dtype)
        # Of neighbours that read the same the first stands for all.
        first = np.flatnonzero(np.concatenate([[True], place[1:] != place[:-1]]))
        owner = (threads[first] % self.threads).astype(np.int32)
        reader = np.where(np.diff(np.append(first, len(place))) > 1, np.int32(-2), owner)
        now = self.interval[blocks[first]]
        unknown = np.ones(len(first), np.bool_)
        for byte in range(size):
            where = blocks[first], places[first] + byte
            writer = self.written[where]
            unknown &= writer == -1
            race = (self.written_in[where] == now) & (writer != reader)
            if race.any():
                what = "shared memory read without a barrier after its write"
                raise self.fault(line, what, threads[first[race.argmax()]])
            again = (self.read_in[where] == now) & (self.read[where] != reader)
            self.read[where] = np.where(again, np.int32(-2), reader)
            twice = self.read[where] != reader  # in one instruction, by others than neighbours
            self.read[where[0][twice], where[1][twice]] = -2
            self.read_in[where] = now
        if unknown.any():  # of all its bytes: compilers read padding beside what they want
            raise self.fault(line, "shared memory that nobody has written", threads[first[unknown.argmax()]])
        return in_rows(self.shared.reshape(-1), dtype, count)[place // size]

    def store_shared(self, line: int, addresses: Array, threads: Array, dtype: np.dtype[Any], *values: Array) -> None:
        """st.shared."""
        size = dtype.itemsize * len(values)
        blocks, places = self._shared(line, addresses, threads, size)
        owner, now = (threads % self.threads).astype(np.int32), self.interval[blocks]
        place, stored = (blocks * self.shared.shape[1] + places) // size, side_by_side(values, len(places))
        rows = in_rows(self.shared.reshape(-1), dtype, len(values))
        changes = np.ones(len(places), np.bool_)  # what another thread stored since the last barrier
        if self.same_stores:
            changes = differ(rows[place], stored)
            rows[place] = stored
            differs = differ(rows[place], stored)
            changes |= differs
        else:
            rows[place], differs = stored, changes
        for byte in range(size):
            where = blocks, places + byte
            race = (self.written_in[where] == now) & (self.written[where] != owner) & changes
            race |= (self.read_in[where] == now) & (self.read[where] != owner)
            self.written[where], self.written_in[where] = owner, now
            race |= (self.written[where] != owner) & differs  # two in one instruction
            if race.any():
                what = "shared memory written without a barrier after another access"
                raise self.fault(line, what, threads[race.argmax()])

    def _shared(self, line: int, addresses: Array, threads: Array, size: int) -> tuple[Array, Array]:
        places = addresses.astype(np.int64)
        bad = (places < 0) | (places + size > self.shared_size) | (places % size != 0)
        if bad.any():
            what = f"{size} bytes of shared memory at {int(places[bad.argmax()])} of {self.shared_size}"
            raise self.fault(line, what, threads[bad.argmax()])
        return self.block_of[threads], places

    # Matrices of 8 rows of 8 times 2 bytes: eight threads say where the rows begin.

    def load_matrix(self, line: int, addresses: Array, threads: Array, count: int, transposed: bool) -> Array:
        """ldmatrix: a thread gets two neighbours of each matrix, those of a row or, transposed, of a column."""
        rows, lane, loaded = self._rows(line, addresses, threads, count), np.arange(WARP), []
        for k in range(count):
            if transposed:
                low, high = (rows[:, k, 2 * (lane % 4) + i] + (2 * (lane // 4)).astype(rows.dtype) for i in range(2))
                halves = [self.load_shared(line, x.reshape(-1), threads, np.dtype(np.uint16), 1) for x in (low, high)]
                loaded.append(packed(*halves))
            else:
                where = rows[:, k, lane // 4] + (4 * (lane % 4)).astype(rows.dtype)
                loaded.append(self.load_shared(line, where.reshape(-1), threads, np.dtype(np.uint32), 1))
        return np.stack(loaded, 1)

    def store_matrix(self, line: int, addresses: Array, threads: Array, *values: Array) -> None:
        """stmatrix."""
        rows, lane = self._rows(line, addresses, threads, len(values)), np.arange(WARP)
        for k, value in enumerate(values):
            where = rows[:, k, lane // 4] + (4 * (lane % 4)).astype(rows.dtype)
            self.store_shared(line, where.reshape(-1), threads, np.dtype(np.uint32), value)

    def _rows(self, line: int, addresses: Array, threads: Array, count: int) -> Array:
        """[warps, matrices, 8] addresses."""
        rows = addresses.reshape(-1, WARP)[:, : 8 * count].reshape(-1, count, 8)
        if (rows % 16 != 0).any():
            raise self.fault(line, "a row that is not aligned to 16 bytes", threads[0])
        return rows


class Registers(dict[str, Array]):
    """Arrays by name; what nobody has written yet holds anything."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def __missing__(self, name: str) -> Array:
        grid = self.grid
        if name in ("%tid.x", "%ctaid.x"):
            thread, block = grid.numbers % grid.threads, grid.numbers // grid.threads
            self[name] = (thread if name == "%tid.x" else block).astype(np.uint32)
        elif name == "%laneid":
            self[name] = (grid.numbers % WARP).astype(np.uint32)
        elif name in ("%ntid.x", "%nctaid.x"):
            self[name] = np.full(grid.total, grid.threads if name == "%ntid.x" else grid.blocks, np.uint32)
        else:
            dtype = storage(grid.kernel.registers[name])
            anything = garbage(1 << (grid.total * 8).bit_length())[: grid.total * dtype.itemsize]
            self[name] = anything & 1 == 0 if dtype == np.bool_ else anything.view(dtype).copy()
        return self[name]


@cache
def garbage(n: int) -> Array:
    return np.random.default_rng(n).integers(0, 256, n, np.uint8)


def in_rows(array: Array, dtype: np.dtype[Any], count: int) -> Array:
    """Bytes as [n] or [n, count] of a type."""
    array = array[: len(array) // (dtype.itemsize * count) * dtype.itemsize * count].view(dtype)
    return array.reshape(-1, count) if count > 1 else array


def differ(ours: Array, theirs: Array) -> Array:
    """Where [n] or [n, count] bits are not the same number; a GPU knows one NaN only."""
    differs = ours != theirs
    if differs.any() and ours.dtype.itemsize in (4, 8):
        floats = f"f{ours.dtype.itemsize}"
        differs &= ~(np.isnan(ours.view(floats)) & np.isnan(np.ascontiguousarray(theirs).view(floats)))
    return differs.any(1) if differs.ndim > 1 else differs


def side_by_side(values: Sequence[Array], n: int) -> Array:
    """[n] or [n, count] of arrays and numbers."""
    return values[0] if len(values) == 1 else np.stack([np.broadcast_to(value, n) for value in values], 1)


def block_function(kernel: Kernel, rank: int) -> Callable[..., Any]:
    """What runs a basic block, made when it is first executed."""
    functions = kernel.__dict__.setdefault("functions", {})
    if rank not in functions:
        functions[rank] = function_of(kernel, rank)
    return functions[rank]
