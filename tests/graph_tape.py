"""A stand-in for CUDA graphs and the generator of a GPU, on the CPU: what is captured is written on a tape, not run.

A replay runs the operations of the tape again on the same tensors, and no line of Python of the step. The generator
follows the rules of torch's: numbers are a function of seed and offset; within a capture a state counts from 0 and must
be registered with the graph before; a replay begins where each state is and advances it by what the graph draws.
"""

from __future__ import annotations

import random
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves


class State:
    """Where a generator is."""

    def __init__(self, seed=1, offset=0):
        self.seed, self.offset = seed, offset
        self.begun = 0  # the offset at which the running replay began


class Generator:
    """The methods of torch.Generator on a GPU that are used here."""

    def __init__(self, gpu, state):
        self.gpu, self.state = gpu, state

    def _outside(self):
        assert self.gpu.capturing is None, "not while a graph is captured"

    def graphsafe_get_state(self):
        return Generator(self.gpu, self.state)

    def graphsafe_set_state(self, other):
        self.state = other.state
        self.gpu.log.append("set")

    def clone_state(self):
        self._outside()
        return Generator(self.gpu, State(self.state.seed, self.state.offset))

    def get_state(self):
        self._outside()
        return torch.tensor([self.state.seed, self.state.offset])

    def set_state(self, numbers):
        self._outside()
        self.state.seed, self.state.offset = numbers.tolist()

    def manual_seed(self, seed):
        self.state.seed, self.state.offset = seed, 0


class Graph(TorchDispatchMode):
    """torch.cuda.CUDAGraph, and the tape of what is captured."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu, self.tape, self.drawn = gpu, [], {}

    def register_generator_state(self, generator):
        self.gpu.log.append("register")
        generator._outside()
        self.drawn[generator.state] = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), "reads back"
        out = func(*args, **(kwargs or {}))
        read = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        made = [(i, t) for i, t in enumerate(made) if t.untyped_storage().data_ptr() not in read]

        def again():
            new = [t for t in tree_leaves(func(*args, **(kwargs or {}))) if isinstance(t, torch.Tensor)]
            for i, tensor in made:
                tensor.copy_(new[i])

        self.tape.append(again)
        return out

    def replay(self):
        for state, increment in self.drawn.items():
            state.begun = state.offset
            state.offset += increment
        with torch.no_grad():
            for operation in self.tape:
                operation()


class Gpu:
    """Puts itself in the place of torch.cuda, and rolls back what a capture computed."""

    def __init__(self, monkeypatch, model, optimizer):
        self.capturing, self.log, self.masks = None, [], []
        self.generator = Generator(self, State())
        self.kept = lambda: [
            *model.state_dict().values(),
            *(t for held in optimizer.state.values() for t in held.values() if torch.is_tensor(t)),
        ]
        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, value in dict(
            is_initialized=lambda: True,
            default_generators=(self.generator,),
            get_rng_state=lambda i: self.generator.get_state(),
            set_rng_state=lambda state, i: self.generator.set_state(state),
            Stream=lambda device: stream,
            current_stream=lambda device: stream,
            stream=lambda stream: nullcontext(),
            CUDAGraph=lambda: Graph(self),
            graph=self.capture,
        ).items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr("fastsam.sam_step._devices_of", lambda optimizer: iter([torch.device("cuda:0")]))

    @contextmanager
    def capture(self, graph, stream):
        """The context torch.cuda.graph."""
        self.log.append("capture")
        graph.drawn.setdefault(self.generator.state, 0)  # as torch does
        before = [t.clone() for t in self.kept()]
        self.capturing = graph
        try:
            with graph:
                yield
        finally:
            self.capturing = None
            with torch.no_grad():
                for tensor, old in zip(self.kept(), before, strict=True):
                    tensor.copy_(old)

    def rand(self, shape):
        """Numbers in [0, 1) from the default generator; how many there are decides how far it moves on."""
        state, graph = self.generator.state, self.capturing
        count = shape.numel()
        increment = 4 * -(-count // 16)

        def numbers(offset):
            source = random.Random(f"{state.seed}:{offset}")
            return torch.tensor([source.random() for _ in range(count)]).reshape(shape)

        if graph is None:
            state.offset += increment
            out = numbers(state.offset - increment)
            self.masks.append(out)
            return out
        assert state in graph.drawn, "a state that draws in a graph must be registered with it"
        place = graph.drawn[state]
        graph.drawn[state] += increment
        with _disable_current_modes():
            out = numbers(place)

        def draw():
            out.copy_(numbers(state.begun + place))
            self.masks.append(out.clone())

        graph.tape.append(draw)
        return out


class Dropout(nn.Module):
    """Dropout with the numbers of that generator."""

    def __init__(self, p):
        super().__init__()
        self.p, self.gpu = p, None

    def forward(self, x):
        return x * (self.gpu.rand(x.shape) >= self.p) / (1 - self.p) if self.training else x


def on_gpu(monkeypatch, model, optimizer):
    """A GPU on which this model is said to be, and its Dropout draws."""
    gpu = Gpu(monkeypatch, model, optimizer)
    for module in model.modules():
        if isinstance(module, Dropout):
            module.gpu = gpu
    return gpu
