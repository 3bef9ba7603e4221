"""SAMStep against loops written by hand: buffers, random numbers, micro-batches, selection, mixed precision."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsam
from fastsam import SAMStep, methods, when
from fastsam.commands.methods import FAMILY

OPTIONS = dict(lr=0.05, momentum=0.8, weight_decay=0.01)
RHO = 0.2


def network(dropout=0.3, norm=True, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 9), *([nn.BatchNorm1d(9, momentum=None)] if norm else []), nn.Tanh(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(9, 4))


def batch(step, n=12):
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(n, 6, generator=generator), torch.randint(0, 4, (n,), generator=generator)


def optimizer_of(model, cls=fastsam.FusedSAM, backend="auto", **more):
    return cls(model.parameters(), torch.optim.SGD, RHO, backend=backend, **OPTIONS, **more)


def assert_same(model, twin):
    for (name, a), (_, b) in zip(model.state_dict().items(), twin.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def sam_by_hand(model, optimizer, x, y, same_rng=True):
    """The loop that the user would have to write."""
    begun = torch.get_rng_state()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    ended = torch.get_rng_state()
    if not isinstance(optimizer, methods.MSAM) and optimizer.first_step(zero_grad=True):
        if same_rng:
            torch.set_rng_state(begun)
        with fastsam.freeze_running_stats(model):
            F.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    if same_rng:
        torch.set_rng_state(ended)
    return loss.detach()


@pytest.mark.parametrize("same_rng", [True, False])
def test_a_step_is_that_of_a_loop_by_hand(same_rng, backend, device):
    model = network().to(device)
    twin = copy.deepcopy(model)
    optimizer, hand = optimizer_of(model, backend=backend), optimizer_of(twin, backend=backend)
    step = SAMStep(model, optimizer, F.cross_entropy, same_rng=same_rng)
    for t in range(4):
        x, y = (part.to(device) for part in batch(t))
        torch.manual_seed(t)
        loss = step(x, y)
        after = torch.get_rng_state()
        torch.manual_seed(t)
        assert torch.equal(loss, sam_by_hand(twin, hand, x, y, same_rng))
        assert torch.equal(after, torch.get_rng_state())
        assert_same(model, twin)
    assert not model[1].num_batches_tracked.is_floating_point() and int(model[1].num_batches_tracked) == 4


def of_family(method, model):
    """A row of the table of methods: an optimizer of this model."""
    groups = {"params": lambda m: m.parameters(), "asam_groups(model)": fastsam.asam_groups}
    groups["norm_layers_only(model)"] = fastsam.norm_layers_only
    momentum = {"momentum": 0.8} if method.base == "sgd" else {}
    return method.cls(
        groups[method.params](model), method.base, lr=0.05, **momentum, **copy.deepcopy(dict(method.options))
    )


@pytest.mark.parametrize("method", FAMILY, ids=lambda method: method.name)
def test_every_method_and_when_is_that_of_a_loop_by_hand(method):
    model = network()
    twin = copy.deepcopy(model)
    optimizer, hand = of_family(method, model), of_family(method, twin)
    step = SAMStep(model, optimizer, F.cross_entropy)
    for t in range(4):
        torch.manual_seed(t)
        loss = step(*batch(t))
        torch.manual_seed(t)
        assert torch.equal(loss, sam_by_hand(twin, hand, *batch(t)))
        assert_same(model, twin)


@pytest.mark.parametrize("parts", [1, 3])
def test_dropout_draws_the_same_masks(parts):
    masks = []
    model = network(dropout=0.5)
    model[3].register_forward_hook(lambda module, inputs, output: masks.append(output.detach() != 0))
    step = SAMStep(model, optimizer_of(model), F.cross_entropy, micro_batches=parts)
    for t in range(3):
        step(*batch(t))
        first, second = masks[-2 * parts : -parts], masks[-parts:]
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(masks[0], masks[2 * parts])


@pytest.mark.parametrize("cls", [fastsam.FusedSAM, methods.GSAM, methods.LookSAM, methods.MSAM])
def test_micro_batches_are_the_whole_batch(cls):
    """With one perturbation, n micro-batches (of unequal size) are the whole batch, to rounding."""
    model = network(dropout=0.0, norm=False).double()
    twin = copy.deepcopy(model)
    one, many = optimizer_of(twin, cls), optimizer_of(model, cls)
    whole, parts = SAMStep(twin, one, F.cross_entropy), SAMStep(model, many, F.cross_entropy, micro_batches=5)
    for t in range(7):
        x, y = batch(t)
        losses = whole(x.double(), y), parts(x.double(), y)
        torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def sam_gradient(model, x, y, rho=RHO):
    """The SAM gradient of a batch by autograd alone."""
    params = list(model.parameters())
    g1 = torch.autograd.grad(F.cross_entropy(model(x), y), params)
    n = torch.cat([g.flatten() for g in g1]).norm()
    with torch.no_grad():
        for p, g in zip(params, g1, strict=True):
            p.add_(g * (rho / n))
    g2 = torch.autograd.grad(F.cross_entropy(model(x), y), params)
    with torch.no_grad():
        for p, g in zip(params, g1, strict=True):
            p.sub_(g * (rho / n))
    return g2


def test_m_sam_is_the_mean_of_separate_sam_gradients():
    model = network(dropout=0.0, norm=False).double()
    twin = copy.deepcopy(model)
    optimizer = optimizer_of(model)
    step = SAMStep(model, optimizer, F.cross_entropy, micro_batches=3, sharpness="micro")
    base = torch.optim.SGD(twin.parameters(), foreach=False, **OPTIONS)
    for t in range(5):
        x, y = batch(t, n=13)
        x = x.double()
        step(x, y)
        sizes = [5, 4, 4]
        total = [torch.zeros_like(p) for p in twin.parameters()]
        for i, n in enumerate(sizes):
            place = slice(sum(sizes[:i]), sum(sizes[: i + 1]))
            for acc, g in zip(total, sam_gradient(twin, x[place], y[place]), strict=True):
                acc += g * (n / 13)
        for p, g in zip(twin.parameters(), total, strict=True):
            p.grad = g
        base.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_one_micro_batch_is_the_plain_step():
    model = network()
    twin = copy.deepcopy(model)
    micro = SAMStep(model, optimizer_of(model), F.cross_entropy, micro_batches=1, sharpness="micro")
    plain = SAMStep(twin, optimizer_of(twin), F.cross_entropy)
    for t in range(3):
        for step in (micro, plain):
            torch.manual_seed(t)
            step(*batch(t))
    assert_same(model, twin)


@pytest.mark.parametrize("cls", [methods.GSAM, methods.FriendlySAM, methods.ESAM])
def test_methods_take_micro_batches_of_their_own(cls):
    """m-SAM with a method: equal parts give the step of one part."""
    model = network(dropout=0.0, norm=False).double()
    twin = copy.deepcopy(model)
    more = dict(beta=1.0) if cls is methods.ESAM else dict(sigma=0.0) if cls is methods.FriendlySAM else {}
    many = SAMStep(model, optimizer_of(model, cls, **more), F.cross_entropy, micro_batches=2, sharpness="micro")
    one = SAMStep(twin, optimizer_of(twin, cls, **more), F.cross_entropy)
    for t in range(6):
        x, y = batch(t, n=6)
        x = x.double()
        many(torch.cat([x, x]), torch.cat([y, y]))
        one(x, y)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_the_first_pass_sees_a_part():
    model = network(dropout=0.0, norm=False).double()
    twin = copy.deepcopy(model)
    step = SAMStep(model, optimizer_of(model), F.cross_entropy, ascent_fraction=0.25)
    hand = optimizer_of(twin)
    for t in range(3):
        x, y = batch(t)
        x = x.double()
        loss = step(x, y)
        expected = F.cross_entropy(twin(x[:3]), y[:3])
        assert torch.equal(loss, expected.detach())
        expected.backward()
        hand.first_step(zero_grad=True)
        F.cross_entropy(twin(x), y).backward()
        hand.step()
        hand.zero_grad()
    assert_same(model, twin)


def test_esam_selects_what_the_perturbation_raises_most():
    model = network(dropout=0.0, norm=True).double()
    twin = copy.deepcopy(model)
    per_sample = nn.CrossEntropyLoss(reduction="none")
    step = SAMStep(model, optimizer_of(model), per_sample, select=0.4)
    hand = optimizer_of(twin)
    for t in range(4):
        x, y = batch(t)
        x = x.double()
        step(x, y)
        losses = per_sample(twin(x), y)
        losses.mean().backward()
        hand.first_step(zero_grad=True)
        with fastsam.freeze_running_stats(twin):
            with torch.no_grad():
                raised = per_sample(twin(x), y) - losses
            chosen = raised.argsort(descending=True)[: math.ceil(0.4 * 12)].sort().values
            per_sample(twin(x[chosen]), y[chosen]).mean().backward()
        hand.step()
        hand.zero_grad()
    assert_same(model, twin)


def test_samples_are_selected_among_those_of_the_first_pass():
    """Only their losses at w are known."""
    model, seen = network(dropout=0.0, norm=False), []
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    per_sample = nn.CrossEntropyLoss(reduction="none")
    step = SAMStep(model, optimizer_of(model), per_sample, select=0.5, ascent_fraction=0.5, micro_batches=2)
    step(*batch(0))
    assert [len(x) for x in seen] == [3, 3, 3, 3, 2, 2]
    for k in (0, 1):
        assert torch.isin(seen[4 + k], seen[k]).all()


def test_selecting_all_is_the_plain_step():
    model = network()
    twin = copy.deepcopy(model)
    all_of_them = SAMStep(model, optimizer_of(model, methods.ESAM, beta=1.0), F.cross_entropy, select=1.0)
    plain = SAMStep(twin, optimizer_of(twin), F.cross_entropy)
    for t in range(3):
        for step in (all_of_them, plain):
            torch.manual_seed(t)
            step(*batch(t))
    assert_same(model, twin)


def test_functional_sam_keeps_the_gradient_of_the_output():
    model = network(dropout=0.0, norm=False).double()
    twin = copy.deepcopy(model)
    step = SAMStep(model, optimizer_of(model), F.cross_entropy, functional=True)
    hand = optimizer_of(twin)
    for t in range(3):
        x, y = batch(t)
        x = x.double()
        step(x, y)
        out = twin(x)
        slope = (out.softmax(1) - F.one_hot(y, 4)) / len(y)  # of the mean cross-entropy
        out.backward(slope.detach())
        hand.first_step(zero_grad=True)
        twin(x).backward(slope.detach())
        hand.step()
        hand.zero_grad()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_the_second_order_gradient_is_that_of_finite_differences():
    model = network(dropout=0.0, norm=False).double()
    x, y = batch(0)
    x = x.double()
    step = SAMStep(model, optimizer_of(model), F.cross_entropy, second_order=True)
    params, old = list(model.parameters()), [p.detach().clone() for p in model.parameters()]

    def sam_loss():
        g = torch.autograd.grad(F.cross_entropy(model(x), y), params)
        n = torch.cat([part.flatten() for part in g]).norm() + 1e-12
        moved = [p.detach().clone() for p in params]
        with torch.no_grad():
            for p, part in zip(params, g, strict=True):
                p.add_(part * (RHO / n))
            value = float(F.cross_entropy(model(x), y))
            for p, w in zip(params, moved, strict=True):
                p.copy_(w)
        return value

    step(x, y)
    exact = [p.grad.clone() for p in params]
    with torch.no_grad():
        for p, w in zip(params, old, strict=True):
            p.copy_(w)
    h, first_order = 1e-6, sam_gradient(model, x, y)
    for p, grad, plain in zip(params, exact, first_order, strict=True):
        for place in range(0, p.numel(), 7):
            flat = p.data.view(-1)
            flat[place] += h
            up = sam_loss()
            flat[place] -= 2 * h
            down = sam_loss()
            flat[place] += h
            assert float(grad.view(-1)[place]) == pytest.approx((up - down) / (2 * h), rel=1e-5, abs=1e-8)
        assert not torch.allclose(grad, plain, rtol=1e-3)  # the term is there


@pytest.mark.parametrize("kind", ["when", "looksam", "msam"])
def test_steps_of_one_pass_see_the_whole_batch_once(kind):
    model = network(dropout=0.0)
    calls = []
    model.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    cls, more = {
        "when": (fastsam.FusedSAM, dict(when=when.every(3))),
        "looksam": (methods.LookSAM, dict(k=3)),
        "msam": (methods.MSAM, {}),
    }[kind]
    fraction = 1.0 if kind == "msam" else 0.5
    step = SAMStep(model, optimizer_of(model, cls, **more), F.cross_entropy, ascent_fraction=fraction)
    for t in range(4):
        step(*batch(t))
    two_passes = [6, 12]
    assert calls == ([12] * 4 if kind == "msam" else two_passes + [12, 12] + two_passes)


def test_autocast_and_scaler_are_those_of_a_loop_by_hand(backend, device):
    model = network(norm=False).to(device)
    twin = copy.deepcopy(model)
    step = SAMStep(
        model,
        optimizer_of(model, backend=backend, max_grad_norm=0.5),
        F.cross_entropy,
        scaler=torch.amp.GradScaler(device, init_scale=256.0),
        autocast=torch.bfloat16,
    )
    hand, scaler = (
        optimizer_of(twin, backend=backend, max_grad_norm=0.5),
        torch.amp.GradScaler(device, init_scale=256.0),
    )
    for t in range(4):
        x, y = (part.to(device) for part in batch(t))
        torch.manual_seed(t)
        step(x, y)
        torch.manual_seed(t)
        for k in (1, 2):
            if k == 2:
                torch.manual_seed(t)
            with torch.autocast(device, torch.bfloat16):
                loss = F.cross_entropy(twin(x), y)
            scaler.scale(loss).backward()
            if k == 1:
                hand.first_step(zero_grad=True)
        scaler.step(hand)
        scaler.update()
        hand.zero_grad()
    assert_same(model, twin)


@pytest.mark.parametrize("cls", [fastsam.FusedSAM, methods.VaSSO])
def test_a_disabled_scaler_is_none(cls):
    """Loops keep one for precisions that need no scaling."""
    model = network(norm=False)
    twin = copy.deepcopy(model)
    steps = [
        SAMStep(m, cls(m.parameters(), "sgd", 0.1, lr=0.1), F.cross_entropy, scaler=scaler, same_rng=False)
        for m, scaler in ((model, torch.amp.GradScaler("cpu", enabled=False)), (twin, None))
    ]
    for t in range(2):
        for step in steps:
            torch.manual_seed(t)
            step(*batch(t))
    assert_same(model, twin)


def test_forward_and_backward_of_the_users_own():
    """Two losses with a backward pass each, over micro-batches."""
    model, twin = network(dropout=0.0, norm=False).double(), None
    twin = copy.deepcopy(model)

    def passes(backward, x, y):
        out = model(x)
        loss, other = F.cross_entropy(out, y), out.square().mean()
        backward(loss, retain_graph=True)
        backward(0.1 * other)
        return dict(loss=loss.detach())

    step = SAMStep(model, optimizer_of(model), forward_backward=passes, micro_batches=2)
    plain = SAMStep(twin, optimizer_of(twin), lambda out, y: F.cross_entropy(out, y) + 0.1 * out.square().mean())
    for t in range(3):
        x, y = batch(t)
        assert set(step(x.double(), y)) == {"loss"}
        plain(x.double(), y)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("failing_pass", [1, 2])
@pytest.mark.parametrize("sharpness", ["batch", "micro"])
def test_an_exception_brings_the_weights_back(failing_pass, sharpness):
    model = network(dropout=0.0)
    passes = []

    def loss_fn(outputs, targets):
        passes.append(0)
        if len(passes) == 2 * failing_pass:
            raise KeyError("no such label")
        return F.cross_entropy(outputs, targets)

    before = [p.detach().clone() for p in model.parameters()]
    optimizer = optimizer_of(model)
    step = SAMStep(model, optimizer, loss_fn, micro_batches=2, sharpness=sharpness)
    with pytest.raises(KeyError):
        step(*batch(0))
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
    assert not optimizer.perturbed and model[1].track_running_stats
    step(*batch(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(loss_fn=None), "give either loss_fn or forward_backward"),
        (dict(micro_batches=0), "micro_batches must be an integer >= 1, got 0"),
        (dict(sharpness="mini"), "sharpness must be one of .*got 'mini'"),
        (dict(perturb="local"), "perturb='local' is for a model inside DistributedDataParallel"),
        (dict(ascent_fraction=0.0), r"ascent_fraction must be in \(0, 1\], got 0.0"),
        (dict(select=1.5), r"select must be in \(0, 1\], got 1.5"),
        (dict(functional=True, select=0.5), "functional and select exclude each other"),
        (dict(second_order=True, micro_batches=2), "second_order is for plain SAM"),
    ],
)
def test_options_out_of_range(options, message):
    model = network()
    with pytest.raises(ValueError, match=message):
        SAMStep(model, optimizer_of(model), **{"loss_fn": F.cross_entropy, **options})


@pytest.mark.parametrize(("options", "known"), [({}, True), (dict(micro_batches=3), True), (dict(select=0.5), False)])
def test_stats_have_the_loss_increase_of_the_same_samples(options, known):
    model = network(dropout=0.0, norm=False)
    optimizer, twin = optimizer_of(model), copy.deepcopy(model)
    x, y = batch(0)
    loss_fn = nn.CrossEntropyLoss(reduction="none" if "select" in options else "mean")
    loss = SAMStep(model, optimizer, loss_fn, **options)(x, y)
    if not known:
        assert optimizer.stats().loss_increase is None
        return
    by_hand = optimizer_of(twin)
    F.cross_entropy(twin(x), y).backward()
    by_hand.first_step()
    torch.testing.assert_close(optimizer.stats().loss_increase, F.cross_entropy(twin(x), y).detach() - loss)


def test_functional_needs_one_output():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    model = Pair(6, 4)
    before = copy.deepcopy(model)
    step = SAMStep(model, optimizer_of(model), lambda out, y: F.cross_entropy(out[0], y), functional=True)
    with pytest.raises(ValueError, match="functional needs a model whose output is one tensor, got tuple"):
        step(*batch(0))
    assert_same(model, before)


@pytest.mark.parametrize("kind", ["no radius", "no gradient"])
def test_the_second_order_gradient_without_a_perturbation_is_the_first(kind):
    """rho of 0, as schedules have it, or a gradient of 0: the step is the base optimizer's."""
    model = network(dropout=0.0, norm=False).double()
    twin = copy.deepcopy(model)
    rho, factor = (0.0, 1.0) if kind == "no radius" else (RHO, 0.0)
    loss_fn = lambda out, y: factor * F.cross_entropy(out, y)  # noqa: E731
    optimizer = fastsam.FusedSAM(model.parameters(), torch.optim.SGD, rho, **OPTIONS)
    base = torch.optim.SGD(twin.parameters(), **OPTIONS)
    x, y = batch(0)
    SAMStep(model, optimizer, loss_fn, second_order=True)(x.double(), y)
    loss_fn(twin(x.double()), y).backward()
    base.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_what_does_not_fit_is_said():
    model = network()
    with pytest.raises(ValueError, match="optimizer must be a FusedSAM or .*, got SGD"):
        SAMStep(model, torch.optim.SGD(model.parameters(), lr=0.1), F.cross_entropy)
    step = SAMStep(model, optimizer_of(model), F.cross_entropy, select=0.5)
    with pytest.raises(ValueError, match=r"select needs a loss_fn that gives the loss of each sample.*got shape \[\]"):
        step(*batch(0))
    wsam = optimizer_of(model, methods.WSAM)
    with pytest.raises(ValueError, match="WSAM has a term beside the base optimizer's step"):
        SAMStep(model, wsam, F.cross_entropy, micro_batches=2, sharpness="micro")
    with pytest.raises(ValueError, match="LookSAM keeps one direction a step"):
        SAMStep(model, optimizer_of(model, methods.LookSAM), F.cross_entropy, micro_batches=2, sharpness="micro")
    for nothing in (dict(select=0.5), dict(ascent_fraction=0.5), dict(micro_batches=2, sharpness="micro")):
        with pytest.raises(ValueError, match="a step of MSAM has one pass"):
            SAMStep(model, optimizer_of(model, methods.MSAM), F.cross_entropy, **nothing)
    coupled = optimizer_of(model, methods.WSAM, decoupled=False)
    SAMStep(model, coupled, F.cross_entropy, micro_batches=2, sharpness="micro")


class Sights(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what reads a number back to the host."""

    def __init__(self):
        super().__init__()
        self.read_back = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.read_back += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


MICRO = dict(micro_batches=2, sharpness="micro")
ALL_PASSES = [fastsam.FusedSAM, methods.GSAM, methods.FriendlySAM, methods.VaSSO, methods.ESAM]


@pytest.mark.parametrize(
    ("cls", "options"),
    [(cls, options) for cls in ALL_PASSES for options in ({}, dict(ascent_fraction=0.5), MICRO)]
    + [(methods.LookSAM, dict(ascent_fraction=0.5)), (methods.MSAM, {})],
    ids=str,
)
def test_nothing_waits_for_the_device(cls, options):
    """After the first steps no number is read back, and what the step reads and writes stays where it is."""
    model = network(dropout=0.2, norm=False)  # a BatchNorm without momentum reads its own count
    optimizer = optimizer_of(model, cls)
    step = SAMStep(model, optimizer, F.cross_entropy, **options)
    for t in range(6):
        step(*batch(t))

    def addresses():
        state = [t.data_ptr() for held in optimizer.state.values() for t in held.values() if torch.is_tensor(t)]
        return [p.data_ptr() for p in model.parameters()], state

    before = addresses()
    with Sights() as sights:
        for t in range(6, 12):
            step(*batch(t))
    assert sights.read_back == 0
    assert addresses() == before
