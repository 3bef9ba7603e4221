"""What interpreted backends share: launches that run, or that a captured graph keeps and replays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

from fastsam import ops
from fastsam.ops import graphs
from ptx.grid import Access, Grid, Memory
from ptx.parse import Kernel


class Launch(NamedTuple):
    """What a host asked for.

    Attributes:
        kernel: what runs.
        operation: the function in its source.
        blocks, threads, shared: the configuration.
        params: the bytes of the arguments.
        filled: how many of these somebody wrote.
        memory: what it may touch.
        tickets: a tensor that must be all zero afterwards, as before.
        words: of rows and gradients, that it was told by value.
    """

    kernel: Kernel
    operation: str
    blocks: int
    threads: int
    shared: int
    params: bytes
    filled: int
    memory: Memory
    tickets: Any
    words: int = 0


class Ran(NamedTuple):
    """A launch that ran, for tests to look at."""

    launch: Launch
    grid: Grid


class Interpreted:
    """A backend whose kernels run here; only one may serve at a time.

    Attributes:
        ran: all launches that ran, in order.
        capturing: whether launches go into `graph` instead, as those of a stream that is being captured.
        graph: what `replay` runs.
    """

    same_stores = False  # see `Grid`

    def __init__(self, seed: int | None = None, log: bool = False) -> None:
        """Nothing ran yet.

        Args:
            seed: the order of blocks and warps, see `Grid`.
            log: whether each grid keeps its accesses to global memory, for `races`.
        """
        self.seed, self.log = seed, log
        self.ran: list[Ran] = []
        self.capturing = False
        self.graph: list[Launch] = []

    def bind_of(self) -> Any:
        """What lets a whole pass be one native call, if anything does."""
        return None

    @contextmanager
    def serving(self, name: str) -> Iterator[None]:
        """Let a backend's name mean this one, in a whole FusedSAM."""
        backend = ops.Backend(name, self, self, by_address=True, bind=self.bind_of())  # type: ignore[arg-type]
        real = ops.backend_named
        with (
            patch.object(ops, "backend_named", lambda asked: backend if asked == name else real(asked)),
            patch.object(graphs, "capturing", lambda device: self.capturing),
            self.launching(),
        ):
            yield

    @contextmanager
    def launching(self) -> Iterator[None]:
        """Let the host's launches come here."""
        yield

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Collect launches in `graph` instead of running them."""
        self.graph, self.capturing = [], True
        try:
            with patch.object(graphs, "capturing", lambda device: True):
                yield
        finally:
            self.capturing = False

    def replay(self) -> None:
        """Run the captured launches with the arguments of then and the memory of now."""
        for launch in self.graph:
            self.execute(launch)

    def take(self, launch: Launch) -> None:
        """What a host launches."""
        if self.capturing:
            self.graph.append(launch)
        else:
            self.execute(launch)

    def execute(self, launch: Launch) -> None:
        """Run it, and look at its tickets."""
        log: list[Access] | None = [] if self.log else None
        seed = None if self.seed is None else self.seed + len(self.ran)
        kernel, _, blocks, threads, shared, params, filled, memory, tickets, _ = launch
        grid = Grid(
            kernel,
            blocks,
            threads,
            params,
            memory,
            shared=shared,
            seed=seed,
            log=log,
            filled=filled,
            same_stores=self.same_stores,
        )
        self.ran.append(Ran(launch, grid))
        grid.run()
        if tickets is not None:
            assert not tickets.any(), f"tickets are left at {tickets.tolist()} by {kernel.name}"
