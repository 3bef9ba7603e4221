"""Whole steps as CUDA graphs: warmed up, captured, and replayed with other batches of the same kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from fastsam.batches import Batch
from fastsam.generators import GraphGenerator

WARM_UP = 3  # steps, in which everything is allocated and libraries choose their algorithms


def warm_up(run: Callable[[], Any], device: torch.device) -> Any:
    """Run a step on a stream of its own, as capturing wants it before."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        result = run()
    torch.cuda.current_stream(device).wait_stream(stream)
    return result


class CapturedStep:
    """A step as a CUDA graph, the batch that it reads, and the generator that it draws from.

    Attributes:
        generator: None where later passes need not draw the numbers of the first one.
    """

    def __init__(self, batch: Batch, device: torch.device, copies: int) -> None:
        """Memory for batches of this shape.

        Args:
            batch: the first one.
            device: the GPU.
            copies: see GraphGenerator; 0 for none.
        """
        self.device = device
        self.batch: Batch = tree_map_only(Tensor, torch.clone, batch)
        self.generator = GraphGenerator(index_of(device), copies) if copies else None
        self.graph = torch.cuda.CUDAGraph()
        self.result: Any = None

    def capture(self, run: Callable[[Batch], Any]) -> None:
        """Record what a step queues; nothing is computed yet."""
        if self.generator is not None:
            self.generator.register(self.graph)
        try:
            stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            with torch.cuda.graph(self.graph, stream=stream):
                self.result = run(self.batch)
        finally:
            if self.generator is not None:
                self.generator.forward()

    def load(self, batch: Batch) -> None:
        """Copy a batch to where the graph reads it.

        Raises:
            ValueError: it has other shapes or dtypes, or other values beside tensors.
        """
        (new, kind), (old, expected) = tree_flatten(batch), tree_flatten(self.batch)
        different = None if kind == expected else (batch, self.batch)
        for now, then in zip(new, old, strict=False):
            if different is None and not _same_kind(now, then):
                different = now, then
        if different is not None:
            got, taken = (list(value.shape) if isinstance(value, Tensor) else value for value in different)
            raise ValueError(
                f"SAMStep: a captured step takes batches of one kind, got {got!r} in the place of {taken!r}; drop the "
                "last partial batch (drop_last=True), or take it with a SAMStep without capture"
            )
        for now, then in zip(new, old, strict=True):
            if isinstance(now, Tensor):
                then.copy_(now, non_blocking=True)

    def replay(self) -> Any:
        """Take the step; gives what it returned, in memory of its own."""
        if self.generator is not None:
            self.generator.follow()
        self.graph.replay()
        return tree_map_only(Tensor, torch.clone, self.result)


def _same_kind(new: Any, old: Any) -> bool:
    """Whether a value may take another one's place in a graph."""
    if not isinstance(new, Tensor) or not isinstance(old, Tensor):
        return type(new) is type(old) and bool(new == old)
    return (new.shape, new.dtype) == (old.shape, old.dtype)


def index_of(device: torch.device) -> int:
    """The index of a GPU."""
    return torch.cuda.current_device() if device.index is None else device.index
