"""torch.compile on models, closures, loops and steps: both passes take one graph, and none holds the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import cases
import pytest
import torch
from oracle import assert_same
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import fastsam
from fastsam import FusedSAM, SAMStep, freeze_running_stats, methods
from fastsam.ops import native

# What torch warns of in its own tracing of a function that goes on after backward().
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _no_recompiles() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


@pytest.fixture
def graphs() -> CompileCounterWithBackend:
    return CompileCounterWithBackend("eager")


def network(device: str, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(5, 7), nn.BatchNorm1d(7) if norm else nn.Tanh(), nn.Linear(7, 3)]
    return nn.Sequential(*layers).to(device)


def sam(model: nn.Module, backend: str = "auto", cls: type[FusedSAM] = FusedSAM, **options: Any) -> FusedSAM:
    return cls(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.8, rho=0.3, backend=backend, **options)


def loss_of(model: Callable[..., Any], device: str, seed: int = 1) -> torch.Tensor:
    x, y = (t.to(device) for t in cases.batch(seed))
    return nn.functional.mse_loss(model(x), y)


def closure_of(model: nn.Module, opt: FusedSAM, device: str) -> Callable[[], torch.Tensor]:
    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = loss_of(model, device)
        loss.backward()
        return loss

    return closure


def same(model: nn.Module, eager: nn.Module, compare: Callable[..., None] = assert_same) -> None:
    for a, b in zip(model.state_dict().values(), eager.state_dict().values(), strict=True):
        compare(a, b)


def test_a_compiled_model_takes_one_graph_for_both_passes(backend, device, graphs):
    model, eager = network(device), network(device)
    compiled = torch.compile(model, backend=graphs)
    opt, other = sam(model, backend), sam(eager, backend)
    for _ in range(3):
        opt.step(closure_of(compiled, opt, device))
        other.step(closure_of(eager, other, device))
    step = SAMStep(compiled, opt, nn.functional.mse_loss)
    for _ in range(2):
        x, y = (t.to(device) for t in cases.batch(2))
        step(x, y)
        SAMStep(eager, other, nn.functional.mse_loss)(x, y)
    same(model, eager)
    assert graphs.frame_count == 1


def test_protecting_batch_norm_costs_one_more_graph(graphs):
    model, eager = network(DEVICE, norm=True), network(DEVICE, norm=True)
    compiled = torch.compile(model, backend=graphs)
    counts = []
    with torch._dynamo.config.patch(error_on_recompile=False):
        for net, params, opt in ((compiled, model, sam(model)), (eager, eager, sam(eager))):
            for _ in range(4):
                loss_of(net, DEVICE).backward()
                opt.first_step(zero_grad=True)
                counts.append(graphs.frame_count)
                with freeze_running_stats(params):
                    loss_of(net, DEVICE).backward()
                opt.step()
                opt.zero_grad()
    same(model, eager)
    assert model[1].num_batches_tracked == 4
    assert counts[:4] == [1, 2, 2, 2]


@pytest.mark.parametrize("backward_too", [False, True], ids=["", "compiled_autograd"])
def test_a_compiled_closure_is_called_twice_without_another_graph(graphs, backward_too):
    model, eager = network(DEVICE), network(DEVICE)
    opt, other = sam(model), sam(eager)
    context = torch._dynamo.config.patch(compiled_autograd=True) if backward_too else nullcontext()
    counts = []
    with context:
        closure = torch.compile(closure_of(model, opt, DEVICE), backend=graphs)
        for _ in range(3):
            loss, expected = opt.step(closure), other.step(closure_of(eager, other, DEVICE))
            counts.append(graphs.frame_count)
            torch.testing.assert_close(loss, expected)
    same(model, eager, torch.testing.assert_close if backward_too else assert_same)
    assert counts == [1 + backward_too] * 3


def test_a_compiled_step_is_the_step_itself(graphs):
    """`torch.compile(optimizer.step)`, as is done with torch's optimizers: the step runs, and nothing is traced."""
    model, eager = network(DEVICE), network(DEVICE)
    opt, other = sam(model), sam(eager)
    calls: list[str] = []
    opt.register_step_post_hook(lambda *_: calls.append("after"))
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in (opt, other)]
    step = torch.compile(opt.step, backend=graphs)
    for _ in range(3):
        step(closure_of(model, opt, DEVICE))
        other.step(closure_of(eager, other, DEVICE))
        for scheduler in schedulers:
            scheduler.step()
    same(model, eager)
    assert calls == ["after"] * 3 and graphs.frame_count == 0


def two_calls(model: nn.Module, opt: FusedSAM, device: str) -> torch.Tensor:
    loss_of(model, device).backward()
    opt.first_step(zero_grad=True)
    loss_of(model, device).backward()
    opt.second_step(zero_grad=True)
    return loss_of(model, device) * 1.0


def closure_inside(model: nn.Module, opt: FusedSAM, device: str) -> torch.Tensor:
    return opt.step(closure_of(model, opt, device)) * loss_of(model, device)


def everything_else(model: nn.Module, opt: FusedSAM, device: str) -> torch.Tensor:
    loss_of(model, device).backward()
    opt.first_step(zero_grad=True)
    with opt.unperturbed():
        old = loss_of(model, device)
    perturbed = loss_of(model, device)
    opt.restore()
    loss_of(model, device).backward()
    opt.base_step()
    opt.prepare()
    opt.refresh()
    opt.zero_grad()
    return torch.stack([old, perturbed, loss_of(model, device)])


def one_pass(model: nn.Module, opt: FusedSAM, device: str) -> torch.Tensor:
    loss_of(model, device).backward()
    opt.step()
    opt.zero_grad()
    opt.eval()
    old = loss_of(model, device)
    opt.train()
    return old + loss_of(model, device)


@pytest.mark.parametrize("loop", [two_calls, closure_inside, everything_else, "GSAM", "MSAM", "joint"])
def test_a_compiled_loop_reads_today_s_weights_and_traces_no_operation(loop):
    """A trace that held one would read weights from before it, as their addresses tell the compiler nothing."""
    recorded: list[str] = []

    def record(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        recorded.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    def run(wrap: Callable[..., Any]) -> tuple[nn.Module, list[torch.Tensor]]:
        model = network(DEVICE)
        opt: Any
        function = {"GSAM": two_calls, "MSAM": one_pass, "joint": two_calls}.get(loop, loop)
        if loop == "GSAM":
            opt = sam(model, cls=methods.GSAM, alpha=0.3, max_grad_norm=0.1)
        elif loop == "MSAM":
            opt = sam(model, cls=methods.MSAM)
        elif loop == "joint":
            opt = fastsam.joint(sam(model[0]), sam(model[2]))
        else:
            opt = sam(model)
        step = wrap(function)
        return model, [step(model, opt, DEVICE).detach().clone() for _ in range(4)]

    model, losses = run(lambda f: torch.compile(f, backend=record))
    eager, expected = run(lambda f: f)
    same(model, eager)
    for a, b in zip(losses, expected, strict=True):
        assert_same(a, b)
    assert recorded and not [target for target in recorded if "fastsam" in target]


@pytest.mark.slow  # it compiles C++, or Triton's kernels
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch imports for it
def test_inductor_with_cuda_graphs_where_there_are_gpus():
    """Without one, "reduce-overhead" is inductor's ordinary code."""
    model, eager = network(DEVICE), network(DEVICE)
    opt, other = sam(model), sam(eager)
    step = torch.compile(two_calls, mode="reduce-overhead")
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(step(model, opt, DEVICE).clone(), two_calls(eager, other, DEVICE))
    same(model, eager, torch.testing.assert_close)


# The operations themselves.

needs_library = pytest.mark.skipif(native.reason() is not None, reason=f"the native library: {native.reason()}")


class Recorded(TorchDispatchMode):
    """The arguments of the first call of every operation of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastsam":
            self.calls.setdefault(func._schema.name.removeprefix("fastsam::"), args)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def operands() -> Iterator[dict[str, tuple[Any, ...]]]:
    """Of every operation, over tables whose parameters and gradients are there for the module's tests."""
    models = [network("cpu"), network("cpu")]
    optimizers = [sam(models[0], "cpu"), sam(models[1], "cpu", methods.GSAM, alpha=0.3, max_grad_norm=0.1)]
    with Recorded() as recorded:
        for model, opt in zip(models, optimizers, strict=True):
            loss_of(model, "cpu").backward()
            opt.first_step()
            opt.step()
    assert sorted(recorded.calls) == sorted(native.OPERATIONS)
    yield recorded.calls
    del models, optimizers


@needs_library
@pytest.mark.parametrize("name", native.OPERATIONS)
def test_opcheck(name, operands):
    """Schemas tell what is written to the tables; to weights and states, which no schema shows, it is blind."""
    torch.library.opcheck(getattr(torch.ops.fastsam, name).default, operands[name])


@needs_library
@pytest.mark.parametrize("name", native.OPERATIONS)
def test_a_trace_stops_before_an_operation(name, operands, graphs):
    operation = getattr(torch.ops.fastsam, name).default

    def around(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        operation(*operands[name])
        return y * 3

    x = torch.arange(3.0)
    assert_same(torch.compile(around, backend=graphs)(x), x * 6)
    assert graphs.frame_count == 2
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=f"fastsam.{name}"):
        torch.compile(around, backend=graphs, fullgraph=True)(x)
