"""Random numbers of a step: later passes draw those of the first one, also within a CUDA graph."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeAlias

import torch
from torch import Tensor

_States: TypeAlias = tuple[Tensor, list[Tensor]]  # of the CPU, and of each GPU


class Generators:
    """The random generators of the CPU and of some GPUs: set back for a later pass, and forward after the last one."""

    def __init__(self, wanted: bool, gpus: Collection[int], in_graph: GraphGenerator | None = None) -> None:
        """Remember where they are.

        Args:
            wanted: False leaves all of them alone.
            gpus: indices of the GPUs.
            in_graph: while a CUDA graph is captured, its generator, in place of those of the GPUs.
        """
        self.wanted = wanted
        self.gpus = sorted(gpus) if in_graph is None else []
        self.in_graph = in_graph
        self.begun = self._states() if wanted else None
        self.ended: _States | None = None

    def _states(self) -> _States:
        return torch.get_rng_state(), [torch.cuda.get_rng_state(i) for i in self.gpus]

    def _set(self, states: _States | None) -> None:
        if states is None:
            return
        torch.set_rng_state(states[0])
        for i, state in zip(self.gpus, states[1], strict=True):
            torch.cuda.set_rng_state(state, i)

    def rewind(self) -> None:
        """After a pass: to where they were before the first; where the first left them is remembered."""
        if self.wanted and self.ended is None:
            self.ended = self._states()
        self._set(self.begun)
        if self.wanted and self.in_graph is not None:
            self.in_graph.rewind()

    def forward(self) -> None:
        """To where the first pass left them."""
        self._set(self.ended)
        if self.wanted and self.in_graph is not None:
            self.in_graph.forward()


class GraphGenerator:
    """The default generator of a GPU within a CUDA graph, in which later passes draw the numbers of the first one.

    A generator cannot be set back while a graph is captured: its kernels read seed and offset on the device, where each
    replay writes those of every state that is registered with the graph, and then advances the state by what the graph
    draws from it. So the first passes of a captured step draw from the default generator's state, the later ones each
    from a copy. Before a replay the copies are set to where the default generator is. Then all passes draw the same
    numbers, other ones in each replay, and the default generator moves on by one pass, as in a step that is not
    captured. With several perturbations in a step (m-SAM) the states stay side by side, as long as all passes over a
    part draw equally many numbers.
    """

    def __init__(self, gpu: int, copies: int) -> None:
        """Copy the state, before the capture.

        Args:
            gpu: the index of the GPU that captures.
            copies: in how many later passes the numbers of the first one are drawn again.
        """
        self.default = torch.cuda.default_generators[gpu]
        self.own = self.default.graphsafe_get_state()
        self.copies = [self.default.clone_state() for _ in range(copies)]
        self.rewound = 0

    def register(self, graph: torch.cuda.CUDAGraph) -> None:
        """Let a graph, before its capture, look after the states."""
        for state in (self.own, *self.copies):
            graph.register_generator_state(state)

    def rewind(self) -> None:
        """While capturing, before a later pass: draw the first one's numbers."""
        self.default.graphsafe_set_state(self.copies[self.rewound])
        self.rewound += 1

    def forward(self) -> None:
        """While capturing, after the last pass: go on where the first one ended."""
        self.default.graphsafe_set_state(self.own)
        self.rewound = 0

    def follow(self) -> None:
        """Before a replay: set the copies to where the default generator is."""
        now = self.own.get_state()
        for copy in self.copies:
            copy.set_state(now)
