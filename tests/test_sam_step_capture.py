"""SAMStep with CUDA graphs: on a GPU, and against stand-ins of graph and generator where there is none."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from graph_tape import Dropout, on_gpu
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fastsam import FusedSAM, SAMStep, methods, ops, when
from fastsam.step_graphs import WARM_UP, CapturedStep

OPTIONS = dict(lr=0.05, momentum=0.8, weight_decay=0.01)
PER_SAMPLE = nn.CrossEntropyLoss(reduction="none")


def network(dropout=Dropout):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Tanh(), dropout(0.4), nn.Linear(9, 4))


def batch(step, n=12):
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(n, 6, generator=generator), torch.randint(0, 4, (n,), generator=generator)


def optimizer_of(model, cls=FusedSAM, backend="auto", **more):
    return cls(model.parameters(), torch.optim.SGD, 0.2, backend=backend, **OPTIONS, **more)


KINDS = {  # class, its options, those of SAMStep, passes that draw in a step of two passes
    "plain": (FusedSAM, {}, {}, 2),
    "when": (FusedSAM, dict(when=when.every(2)), {}, 2),
    "looksam": (methods.LookSAM, dict(k=3), {}, 2),
    "gsam": (methods.GSAM, {}, {}, 2),
    "part": (FusedSAM, {}, dict(ascent_fraction=0.5), 2),
    "select": (FusedSAM, {}, dict(select=0.5, loss_fn=PER_SAMPLE), 3),
    "m-SAM": (FusedSAM, {}, dict(micro_batches=2, sharpness="micro"), 4),
}


def run(monkeypatch, kind, capture, steps):
    """Each step's loss, the generator's offset, the numbers drawn, weights and statistics."""
    cls, more, options, _ = KINDS[kind]
    model = network()
    optimizer = optimizer_of(model, cls, "reference", **more)
    gpu = on_gpu(monkeypatch, model, optimizer)
    step = SAMStep(model, optimizer, capture=capture, **{"loss_fn": F.cross_entropy, **options})
    seen = []
    for t in range(steps):
        if t == 4:
            gpu.generator.manual_seed(5)
        gpu.masks.clear()
        loss = step(*batch(t)).clone()
        kept = [value.clone() for value in model.state_dict().values()]
        seen.append((loss, gpu.generator.state.offset, list(gpu.masks), kept))
    return seen, gpu


@pytest.mark.parametrize("kind", ["plain", "when", "gsam", "part", "select", "m-SAM"])
def test_all_passes_of_a_replay_draw_the_same_numbers(kind, monkeypatch):
    """Those that the same step draws without a graph; each replay others, and all anew after a new seed."""
    steps, passes = (WARM_UP + 4 if kind == "when" else WARM_UP + 3), KINDS[kind][3]
    captured, gpu = run(monkeypatch, kind, True, steps)
    plain, _ = run(monkeypatch, kind, False, steps)
    for t, (ours, theirs) in enumerate(zip(captured, plain, strict=True)):
        assert ours[1] == theirs[1] and len(ours[2]) == len(theirs[2]), t
        for a, b in zip([ours[0], *ours[2], *ours[3]], [theirs[0], *theirs[2], *theirs[3]], strict=True):
            assert torch.equal(a, b), t
        drawn = ours[2]
        if len(drawn) == passes:
            n = min(map(len, drawn))
            pairs = [(0, 1), (2, 3)] if kind == "m-SAM" else [(0, 1), (0, passes - 1)]
            assert all(torch.equal(drawn[i][:n], drawn[j][:n]) for i, j in pairs)
        if t > 0:
            assert not torch.equal(drawn[0][:3], captured[t - 1][2][0][:3])
    assert gpu.log.count("capture") == (2 if kind == "when" else 1)


def test_a_capture_that_fails_leaves_the_generator_as_it_was(monkeypatch):
    model, broken = network(), []

    def loss_fn(outputs, targets):
        if broken and len(broken) == 2:
            raise KeyError("no such label")
        broken.extend([0] if broken else [])
        return F.cross_entropy(outputs, targets)

    optimizer = optimizer_of(model, backend="reference")
    gpu = on_gpu(monkeypatch, model, optimizer)
    step = SAMStep(model, optimizer, loss_fn, capture=True)
    for t in range(WARM_UP):
        step(*batch(t))
    state, before = gpu.generator.state, copy.deepcopy(model.state_dict())
    broken.append(0)
    with pytest.raises(KeyError):
        step(*batch(3))  # in its second pass
    assert gpu.generator.state is state and not optimizer.perturbed
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    broken.clear()
    for t in (3, 4):
        step(*batch(t))  # captured now
    assert gpu.log.count("capture") == 2


class RunAgain:
    """A stand-in for a graph, whose replay runs the step again, so that it reads today's lr as a graph does."""

    recorded = 0

    def __init__(self, monkeypatch):
        def capture(step, run):
            self.recorded += 1
            step.graph = SimpleNamespace(replay=lambda: setattr(step, "result", run(step.batch)))

        monkeypatch.setattr(CapturedStep, "capture", capture)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
        monkeypatch.setattr("fastsam.sam_step.warm_up", lambda run, device: run())
        monkeypatch.setattr("fastsam.sam_step._devices_of", lambda optimizer: iter([torch.device("cuda:0")]))


@pytest.mark.parametrize("kind", ["plain", "when", "looksam", "msam"])
def test_captured_steps_are_ordinary_ones(kind, monkeypatch):
    """With a new lr in each."""
    graphs = RunAgain(monkeypatch)
    cls, more, *_ = KINDS.get(kind, (methods.MSAM, {}))
    model = network(lambda p: nn.Identity())
    twin = copy.deepcopy(model)
    captured = SAMStep(model, optimizer_of(model, cls, **more), F.cross_entropy, same_rng=False, capture=True)
    plain = SAMStep(twin, optimizer_of(twin, cls, **more), F.cross_entropy, same_rng=False)
    losses = []
    for t in range(10):
        for step in (captured, plain):
            step.optimizer.param_groups[0]["lr"] = 0.05 / (1 + t)
        losses.append(captured(*batch(t)))
        assert torch.equal(losses[-1], plain(*batch(t))), t
        for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
            assert torch.equal(a, b), t
    assert len(set(map(float, losses))) == 10  # none was overwritten by a later replay
    assert graphs.recorded == (2 if kind in ("when", "looksam") else 1)
    x, y = batch(0)
    for other, message in [
        (batch(0, n=5), r"\[5, 6\] in the place of \[12, 6\]"),
        ((x.double(), y), r"takes batches of one kind"),
        ((x,), "takes batches of one kind"),
        ((x, 3), r"got 3 in the place of \[12\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            captured(*other)


def test_what_a_step_of_ones_own_returns_is_not_overwritten_by_the_next(monkeypatch):
    RunAgain(monkeypatch)
    model = network(lambda p: nn.Identity())
    held = torch.zeros(())

    def passes(backward, x, y):
        loss = F.cross_entropy(model(x), y)
        backward(loss)
        with torch.no_grad():
            return {"loss": held.copy_(loss)}

    step = SAMStep(model, optimizer_of(model), forward_backward=passes, same_rng=False, capture=True)
    losses = [step(*batch(t))["loss"] for t in range(WARM_UP + 3)][WARM_UP:]
    assert len(set(map(float, losses))) == 3


@pytest.mark.parametrize(
    ("cls", "more", "options", "message"),
    [
        (FusedSAM, {}, {}, "parameters on cpu; they must be on one GPU"),
        (methods.ESAM, {}, {}, "ESAM, which draws on the host"),
        (methods.WSAM, {}, {}, "WSAM's term beside the base optimizer's step"),
        (FusedSAM, dict(when=when.by_grad_norm()), {}, "when=by_grad_norm.*measures on the host"),
        (
            FusedSAM,
            {},
            dict(micro_batches=2, sharpness="micro", ascent_fraction=0.5),
            "same_rng=True and sharpness='micro' with select or ascent_fraction below 1",
        ),
    ],
)
def test_what_cannot_be_captured_is_named(cls, more, options, message):
    model = network()
    with pytest.raises(ValueError, match=f"capture=True cannot be with .*{message}"):
        SAMStep(model, optimizer_of(model, cls, **more), F.cross_entropy, capture=True, **options)


def test_dropout_of_recurrent_layers_is_not_captured_with_the_same_numbers(monkeypatch):
    RunAgain(monkeypatch)
    model = nn.LSTM(3, 3, num_layers=2, dropout=0.5)
    with pytest.raises(ValueError, match="same_rng=True and dropout between recurrent layers, which cuDNN draws"):
        SAMStep(model, optimizer_of(model), F.mse_loss, capture=True)
    SAMStep(model, optimizer_of(model), F.mse_loss, capture=True, same_rng=False)


# What is allocated.


def allocated(run):
    """The sizes of what torch's allocator gave out meanwhile, and how much more is in use afterwards."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    sizes = [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [size for size in sizes if size > 0], sum(sizes)


NATIVE = pytest.mark.skipif(ops.backends()["cpu"] is not None, reason="the C++ kernels are not built")


@NATIVE
@pytest.mark.parametrize("kind", ["plain", "when", "gsam", "looksam"])
def test_our_side_of_a_step_allocates_nothing(kind):
    """What is captured, run here by the C++ kernels: no memory for plain SAM, numbers alone for other methods."""
    cls, more, *_ = KINDS[kind]
    model = nn.Sequential(nn.Linear(6, 300), nn.Tanh(), nn.Linear(300, 4))
    optimizer, seen = optimizer_of(model, cls, "cpu", **more), []
    two_passes = []

    def backward(t):
        optimizer.zero_grad()
        x, y = batch(t)
        F.cross_entropy(model(x), y).backward()

    for t in range(8):
        backward(t)
        seen.append(allocated(lambda: two_passes.append(optimizer.first_step())))
        if two_passes[-1]:
            backward(t)
        seen.append(allocated(optimizer.step))
    assert set(two_passes) == ({True, False} if kind in ("when", "looksam") else {True})
    later = seen[2 * WARM_UP :]
    sizes = [size for sizes, _ in later for size in sizes]
    assert max(sizes, default=0) <= 32 and abs(sum(kept for _, kept in later)) <= 8  # one may outlive its call
    assert not sizes or cls is not FusedSAM


@pytest.mark.parametrize("kind", ["plain", "when", "gsam"])
def test_a_replay_allocates_the_loss_alone(kind, monkeypatch):
    """Beside the 16 bytes in which generators pass their state on the host."""
    RunAgain(monkeypatch)
    generator = SimpleNamespace(
        graphsafe_get_state=lambda: generator,
        clone_state=lambda: generator,
        get_state=lambda: torch.zeros(16, dtype=torch.uint8),
        set_state=lambda state: None,
    )
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda i: torch.zeros(16, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, i: None)
    cls, more, *_ = KINDS[kind]
    model = network(nn.Dropout)
    step = SAMStep(model, optimizer_of(model, cls, **more), F.cross_entropy, capture=True)
    for t in range(WARM_UP + 4):
        step(*batch(t))
    for captured in step._graphs.values():
        captured.graph.replay = lambda: None  # what a graph does it does in memory of its own
    x, y = batch(0)
    for _ in range(3):
        loss = []
        sizes, kept = allocated(lambda loss=loss: loss.append(step(x, y)))
        assert kept == loss[0].nbytes and sorted(sizes) in ([4], [4, 16])


# On a GPU.


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("kind", ["plain", "when", "looksam", "gsam", "select", "m-SAM"])
def test_replays_on_a_gpu_are_the_steps_without_a_graph(kind):
    """Dropout's masks, weights, statistics and the generator, bit for bit."""
    torch.use_deterministic_algorithms(False)  # filling new memory with NaN is not for captures
    cls, more, options, _ = KINDS[kind]
    results = []
    for capture in (True, False):
        model = network(nn.Dropout).cuda()
        step = SAMStep(
            model,
            optimizer_of(model, cls, **more),
            capture=capture,
            **{"loss_fn": F.cross_entropy, **options},
        )
        torch.cuda.manual_seed(3)
        losses = []
        for t in range(10):
            if t == 7:
                torch.cuda.manual_seed(5)
            losses.append(step(*(part.cuda() for part in batch(t))))
        results.append([*losses, *model.state_dict().values(), torch.cuda.get_rng_state()])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_masks_on_a_gpu_are_the_same_in_both_passes_and_new_in_each_replay():
    torch.use_deterministic_algorithms(False)
    model, masks = network(nn.Dropout).cuda(), []
    x, y = (part.cuda() for part in batch(0, n=512))
    held = [torch.zeros(512, 9, dtype=torch.bool, device="cuda") for _ in range(2)]
    model[3].register_forward_hook(lambda module, inputs, out: held[step.optimizer.perturbed].copy_(out != 0))
    step = SAMStep(model, optimizer_of(model), F.cross_entropy, capture=True)
    for _ in range(WARM_UP + 4):
        step(x, y)
        assert torch.equal(*held)
        masks.append(held[0].clone())
    assert all(not torch.equal(a, b) for a, b in zip(masks, masks[1:], strict=False))
