"""SAMStep with several optimizers under one norm, against one loop by hand around torch.optim."""

import copy

import pytest
import torch
import torch.nn.functional as F
from graph_tape import Dropout, on_gpu
from torch import nn

import fastsam
from fastsam import FusedSAM, SAMStep, methods, when
from fastsam.step_graphs import WARM_UP

SGD, ADAMW = dict(lr=0.05, momentum=0.8, weight_decay=0.01), dict(lr=0.01, weight_decay=0.1)
RHOS = 0.2, 0.4  # of SGD's and of AdamW's parameters


def network(dropout=lambda: nn.Identity()):
    torch.manual_seed(0)
    layers = nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Tanh(), dropout(), nn.Linear(9, 4)
    return nn.Sequential(*layers).double()


def halves(model):
    return [*model[0].parameters(), *model[1].parameters()], list(model[4].parameters())


def joint_of(model, max_grad_norm=None, classes=(FusedSAM, FusedSAM), **more):
    first, last = halves(model)
    return fastsam.joint(
        classes[0](first, "sgd", RHOS[0], **SGD, **more),
        classes[1](last, "adamw", RHOS[1], **ADAMW, **more),
        max_grad_norm=max_grad_norm,
    )


def batch(t, n=12):
    generator = torch.Generator().manual_seed(100 + t)
    return torch.randn(n, 6, generator=generator).double(), torch.randint(0, 4, (n,), generator=generator)


class ByHand:
    """The loop that the user would have to write: both bases, one norm, micro-batches, clipping, every k-th step."""

    def __init__(self, model, micro=None, parts=1, max_norm=None, every=1, fraction=1.0, select=1.0):
        self.model, self.micro, self.parts, self.max_norm, self.every = model, micro, parts, max_norm, every
        self.fraction, self.select = fraction, select
        self.first, self.last = halves(model)
        self.bases = torch.optim.SGD(self.first, foreach=False, **SGD), torch.optim.AdamW(self.last, **ADAMW)
        self.steps = 0

    def gradient(self, batches):
        """[per parameter]: of the mean over all samples."""
        total = sum(len(x) for x, _ in batches)
        grads = [torch.zeros_like(p) for p in self.model.parameters()]
        for x, y in batches:
            loss = F.cross_entropy(self.model(x), y) * (len(x) / total)
            for acc, g in zip(grads, torch.autograd.grad(loss, list(self.model.parameters())), strict=True):
                acc += g
        return grads

    def sam_gradient(self, batches):
        ascent = [(x[: round(self.fraction * len(x))], y[: round(self.fraction * len(y))]) for x, y in batches]
        losses = (
            [F.cross_entropy(self.model(x), y, reduction="none").detach() for x, y in ascent] if self.select < 1 else []
        )
        statistics = None
        g1 = self.gradient(ascent)
        statistics = {k: v.clone() for k, v in self.model.state_dict().items() if "running" in k or "num" in k}
        norm = torch.cat([g.flatten() for g in g1]).norm() + 1e-12
        old = [p.detach().clone() for p in self.model.parameters()]
        with torch.no_grad():
            for p, g in zip(self.model.parameters(), g1, strict=True):
                p += g * ((RHOS[0] if any(p is q for q in self.first) else RHOS[1]) / norm)
        if self.select < 1:
            chosen = []
            for (x, y), before in zip(ascent, losses, strict=True):
                raised = F.cross_entropy(self.model(x), y, reduction="none") - before
                places = raised.argsort(descending=True)[: -(-len(x) // 2)].sort().values
                chosen.append((x[places], y[places]))
            batches = chosen
        g2 = self.gradient(batches)
        with torch.no_grad():
            for p, w in zip(self.model.parameters(), old, strict=True):
                p.copy_(w)
        self.model.load_state_dict(statistics, strict=False)
        return g2

    def __call__(self, x, y):
        batches = list(zip(x.tensor_split(self.parts), y.tensor_split(self.parts), strict=True))
        if self.steps % self.every:
            grads = self.gradient(batches)
        elif self.micro == "micro":
            each = [self.sam_gradient([part]) for part in batches]
            weights = [len(part[0]) / len(x) for part in batches]
            grads = [sum(w * g for w, g in zip(weights, same, strict=True)) for same in zip(*each, strict=True)]
        else:
            grads = self.sam_gradient(batches)
        self.steps += 1
        for p, g in zip(self.model.parameters(), grads, strict=True):
            p.grad = g
        if self.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        for base in self.bases:
            base.step()


CASES = {  # SAMStep's options, joint's, those of the loop by hand
    "plain": ({}, {}, {}),
    "clipped": ({}, dict(max_grad_norm=0.1), dict(max_norm=0.1)),
    "micro-batches": (dict(micro_batches=3), dict(max_grad_norm=0.1), dict(parts=3, max_norm=0.1)),
    "m-SAM": (
        dict(micro_batches=3, sharpness="micro"),
        dict(max_grad_norm=0.1),
        dict(parts=3, micro="micro", max_norm=0.1),
    ),
    "when": ({}, dict(when=when.every(3), max_grad_norm=0.1), dict(every=3, max_norm=0.1)),
    "part": (dict(ascent_fraction=0.5), {}, dict(fraction=0.5)),
}


def assert_close(model, twin):
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", CASES)
def test_a_step_is_that_of_a_loop_by_hand(kind, scaled):
    options, more, by_hand = CASES[kind]
    model, twin = network(), network()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0) if scaled else None
    step = SAMStep(model, joint_of(model, **more), F.cross_entropy, scaler=scaler, **options)
    hand = ByHand(twin, **by_hand)
    for t in range(5):
        step(*batch(t, n=12 if kind == "part" else 13))
        hand(*batch(t, n=12 if kind == "part" else 13))
    assert_close(model, twin)


def test_samples_are_selected_and_outputs_kept():
    per_sample = nn.CrossEntropyLoss(reduction="none")
    model, twin, other = network(), network(), network()
    step, hand = SAMStep(model, joint_of(model), per_sample, select=0.5), ByHand(twin, select=0.5)
    for layers in (model, twin):
        layers[1].eval()  # its statistics would depend on the samples
    functional = SAMStep(other, joint_of(other), F.cross_entropy, functional=True)
    losses = []
    for t in range(4):
        step(*batch(t))
        hand(*batch(t))
        losses.append(functional(*batch(0)))
    assert_close(model, twin)
    assert losses[-1] < losses[0]


def test_overflow_costs_one_step():
    model = network()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    step = SAMStep(model, joint_of(model, max_grad_norm=0.1), F.cross_entropy, scaler=scaler)
    step(*batch(0))
    before = copy.deepcopy(model.state_dict())
    x, y = batch(1)
    handle = model[4].register_full_backward_hook(
        lambda module, got, out: tuple(g * float("inf") if g is not None else None for g in got)
    )
    step(x, y)  # in both passes
    handle.remove()
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name])
    assert scaler.get_scale() == 128.0 and not step.optimizer.perturbed
    step(*batch(2))
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_the_second_order_gradient_is_that_of_one_optimizer():
    model, twin = network(), network()
    pairs = []
    for layers in (model, twin):
        layers[1].eval()
        params = halves(layers)
        pairs.append([dict(params=p, rho=rho) for p, rho in zip(params, RHOS, strict=True)])
    several = fastsam.joint(*(FusedSAM([group], "sgd", **SGD) for group in pairs[0]))
    one = FusedSAM(pairs[1], "sgd", **SGD)
    for t in range(3):
        SAMStep(model, several, F.cross_entropy, second_order=True)(*batch(t))
        SAMStep(twin, one, F.cross_entropy, second_order=True)(*batch(t))
    assert_close(model, twin)


@pytest.mark.parametrize("failing_pass", [1, 2])
def test_an_exception_brings_all_weights_back(failing_pass):
    model, calls = network(), []

    def loss_fn(outputs, targets):
        calls.append(0)
        if len(calls) == failing_pass:
            raise KeyError("no such label")
        return F.cross_entropy(outputs, targets)

    before = [p.detach().clone() for p in model.parameters()]
    step = SAMStep(model, joint_of(model, max_grad_norm=0.1), loss_fn)
    with pytest.raises(KeyError):
        step(*batch(0))
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
    step(*batch(0))
    assert all(part._sam.common_clip is None for part in step.optimizer.optimizers)


@pytest.mark.parametrize("more", [{}, dict(when=when.every(2))], ids=str)
def test_captured(more, monkeypatch):
    """On the tape that stands for a graph: the steps without one, both parts with the same masks in both passes."""
    results = []
    for capture in (True, False):
        model = network(lambda: Dropout(0.4))
        optimizer = joint_of(model, 0.1, backend="reference", **more)
        gpu = on_gpu(monkeypatch, model, optimizer)
        step = SAMStep(model, optimizer, F.cross_entropy, capture=capture)
        losses = [step(*batch(t)).clone() for t in range(WARM_UP + 4)]
        results.append([*losses, *model.state_dict().values(), torch.tensor(gpu.generator.state.offset)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("classes", "options", "message"),
    [
        ((FusedSAM, methods.LookSAM), dict(micro_batches=2, sharpness="micro"), "LookSAM keeps one direction"),
        ((methods.WSAM, FusedSAM), dict(micro_batches=2, sharpness="micro"), "WSAM has a term beside"),
        ((FusedSAM, methods.GSAM), dict(second_order=True), "second_order is for plain SAM"),
        ((FusedSAM, methods.ESAM), dict(capture=True), "ESAM, which draws on the host"),
        ((methods.WSAM, FusedSAM), dict(capture=True), "WSAM's term beside the base optimizer's step"),
    ],
)
def test_what_does_not_fit_is_said_of_any_part(classes, options, message):
    model = network()
    with pytest.raises(ValueError, match=message):
        SAMStep(model, joint_of(model, classes=classes), F.cross_entropy, **options)


@pytest.mark.parametrize("cls", [methods.GSAM, methods.WSAM, methods.LookSAM])
def test_clipping_of_what_is_made_of_several_gradients_is_refused(cls):
    with pytest.raises(
        ValueError, match=rf"with max_grad_norm all base optimizers .* that of optimizer 1 \({cls.__name__}\)"
    ):
        joint_of(network(), 0.1, classes=(FusedSAM, cls))
    with pytest.raises(ValueError, match="max_grad_norm must be > 0"):
        joint_of(network(), 0.0)


def test_a_plain_step_and_a_base_that_is_not_fused_are_clipped_alike():
    model, twin = network(), network()
    first, last = halves(model)
    several = fastsam.joint(
        FusedSAM(first, "sgd", **SGD), FusedSAM(last, torch.optim.Adamax, lr=0.1), max_grad_norm=0.1
    )
    several = copy.deepcopy((model, several))
    model, several = several
    bases = torch.optim.SGD(halves(twin)[0], **SGD), torch.optim.Adamax(halves(twin)[1], lr=0.1)
    for t in range(3):
        for layers in (model, twin):
            layers.zero_grad()
            x, y = batch(t)
            F.cross_entropy(layers(x), y).backward()
        several.base_step()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        for base in bases:
            base.step()
    assert_close(model, twin)
