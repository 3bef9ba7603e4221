"""fastsam.analysis measures what it says, and leaves everything as it was."""

import importlib.util
import random
import warnings
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jacrev

np = pytest.importorskip("numpy")
has_curvlinops = importlib.util.find_spec("curvlinops") is not None
if has_curvlinops:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # what it imports uses torch.jit.script
        importlib.import_module("curvlinops")
pytest.importorskip("matplotlib")
from fastsam import analysis  # noqa: E402
from fastsam.optimizer import FusedSAM  # noqa: E402


def small_net():
    return nn.Sequential(OrderedDict(a=nn.Linear(4, 5), act=nn.Tanh(), b=nn.Linear(5, 3)))


def norm_net():
    """Batch normalisation and dropout: buffers, modes and random numbers to be kept."""
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(48, 4)
    )


def batch(n=12, inputs=(4,), classes=3):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(n, *inputs, generator=generator), torch.randint(classes, (n,), generator=generator)


def exact_hessian(model, x, y):
    """Over the flat weights, in float64, by torch.func."""
    params = {name: p.detach().double() for name, p in model.named_parameters()}
    shapes = [p.shape for p in params.values()]

    def loss(vector):
        parts = vector.split([s.numel() for s in shapes])
        named = {name: part.view(s) for name, part, s in zip(params, parts, shapes, strict=True)}
        return F.cross_entropy(functional_call(model, named, (x.double(),)), y)

    # torch.func.hessian is jacfwd of this; forward mode imports what warns of torch.jit.
    return jacrev(jacrev(loss))(torch.cat([p.flatten() for p in params.values()]))


def loss_at(model, vector, x, y):
    """The loss where the flat weights are moved by `vector`; by a copy of the model."""
    copy = small_net()
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        for p, part in zip(copy.parameters(), vector.split([q.numel() for q in copy.parameters()]), strict=True):
            p += part.view(p.shape)
        return F.cross_entropy(copy(x), y).item()


def flat_gradient(model, x, y):
    return torch.cat([g.flatten() for g in torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))])


def test_top_eigenvalues_are_those_of_the_full_hessian():
    model, (x, y) = small_net(), batch()
    with torch.no_grad():  # as in an evaluation
        analysis.top_eigenvalues(model, F.cross_entropy, (x, y), tolerance=0.5)
    values, vectors = torch.linalg.eigh(exact_hessian(model, x, y))
    order = values.abs().argsort(descending=True)
    found = analysis.top_eigenvalues(model, F.cross_entropy, (x, y), k=2, max_iterations=500)
    assert found.converged.all()
    np.testing.assert_allclose(found.values, values[order[:2]].numpy(), rtol=1e-3)
    for i in range(2):
        assert abs(float(vectors[:, order[i]] @ torch.tensor(found.vectors[i]).double())) > 0.999
    # Batches of different sizes are one mean over the samples.
    split = analysis.top_eigenvalues(model, F.cross_entropy, [(x[:5], y[:5]), (x[5:], y[5:])], tolerance=1e-4)
    np.testing.assert_allclose(split.values[0], values[order[0]].item(), rtol=1e-4)


def test_an_eigenvalue_that_does_not_converge_is_told():
    with pytest.warns(UserWarning, match="did not come below a residual"):
        found = analysis.top_eigenvalues(small_net(), F.cross_entropy, batch(), max_iterations=1)
    assert not found.converged[0] and found.iterations[0] == 1


@pytest.mark.skipif(not has_curvlinops, reason="curvlinops-for-pytorch is not installed")
def test_spectrum_and_trace_are_those_of_the_full_hessian():
    model, (x, y) = small_net(), batch()
    exact = exact_hessian(model, x, y)
    values = torch.linalg.eigvalsh(exact)
    found = analysis.spectrum(model, F.cross_entropy, (x, y), lanczos_vectors=20, repeats=8, points=400)
    step = found.grid[1] - found.grid[0]
    assert abs(found.density.sum() * step - 1) < 0.05  # the bumps at the ends are cut off
    assert found.grid[0] < values[0] and values[-1] < found.grid[-1]
    mean = (found.grid * found.density).sum() * step
    assert abs(mean - values.mean().item()) < 0.1 * values[-1].item()
    assert analysis.trace(model, F.cross_entropy, (x, y), products=43) == pytest.approx(exact.trace().item(), rel=1e-4)
    assert analysis.trace(model, F.cross_entropy, (x, y), products=30) == pytest.approx(exact.trace().item(), rel=0.15)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "curvlinops", None)
    with pytest.raises(ModuleNotFoundError, match=r"curvlinops-for-pytorch.*fastsam\[analysis\]"):
        analysis.trace(small_net(), F.cross_entropy, batch())


def test_attention_is_differentiated_twice():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.Linear(4, 12)

        def forward(self, x):
            return F.scaled_dot_product_attention(*self.weights(x).chunk(3, dim=-1)).mean(dim=1)

    x = torch.randn(2, 6, 4)
    found = analysis.top_eigenvalues(Attention(), F.mse_loss, (x, torch.randn(2, 4)), tolerance=0.05)
    assert found.values[0] > 0


@pytest.mark.parametrize("adaptive", [False, True])
def test_sharpness_along_the_gradient_is_that_written_by_hand(adaptive):
    model, (x, y), rho, eta = small_net(), batch(), 0.3, 0.02
    found = analysis.sharpness(model, F.cross_entropy, (x, y), rho, adaptive=adaptive, eta=eta if adaptive else 0.0)
    g = flat_gradient(model, x, y)
    t = torch.cat([p.detach().flatten().abs() + eta for p in model.parameters()]) if adaptive else torch.ones_like(g)
    after = loss_at(model, rho * t * t * g / (t * g).norm(), x, y)
    assert found.loss == F.cross_entropy(model(x), y).item()
    assert found.value == pytest.approx(after - found.loss, rel=1e-4)
    assert found.highest == pytest.approx(after)


def test_m_sharpness_is_the_mean_over_groups():
    model, (x, y), rho = small_net(), batch(11), 0.3
    found = analysis.sharpness(model, F.cross_entropy, (x, y), rho, m=4)
    rises = []
    for part in (slice(0, 4), slice(4, 8), slice(8, 11)):
        g = flat_gradient(model, x[part], y[part])
        before = F.cross_entropy(model(x[part]), y[part]).item()
        rises.append((loss_at(model, rho * g / g.norm(), x[part], y[part]) - before) * len(y[part]))
    assert len(found.after) == 3
    assert found.value == pytest.approx(sum(rises) / 11, rel=1e-4)
    # A ball for each sample is at least as sharp as one for all of them, as it is bound to be to first order.
    of_each, of_all = (analysis.sharpness(model, F.cross_entropy, (x, y), 1e-2, m=m).value for m in (1, 11))
    assert of_each > of_all


@pytest.mark.parametrize("adaptive", [False, True])
def test_average_sharpness_is_that_of_a_quadratic(adaptive):
    """On L = sum(c w^2) / 2 the mean over the sphere of radius rho is known: rho^2 / (2 n) sum(c T^2)."""
    c = torch.tensor([3.0, 1.0, 0.5, 2.0])
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.5, -2.0, 0.5, 1.0]]))

    class Loss(nn.Module):
        def forward(self, out, target):
            return (c * model.weight[0] ** 2).sum() / 2 + 0 * out.sum()

    data = (torch.zeros(3, 4), torch.zeros(3))
    found = analysis.sharpness(model, Loss(), data, rho=0.5, direction="random", draws=800, adaptive=adaptive, seed=3)
    t = model.weight[0].detach().abs() if adaptive else torch.ones(4)
    expected = 0.25 / 8 * (c * t * t).sum().item()
    error = (found.after - found.before).std() / 800**0.5
    assert abs(found.value - expected) < 4 * error
    again = analysis.sharpness(model, Loss(), data, rho=0.5, direction="random", draws=5, adaptive=adaptive, seed=3)
    assert (again.after == found.after[:5]).all()


def test_a_gradient_that_is_not_finite_gives_no_sharpness():
    model, (x, y) = small_net(), batch()
    assert np.isnan(analysis.sharpness(model, F.cross_entropy, (x * 1e38 * 10, y)).value)


@pytest.mark.parametrize("dimensions", [1, 2])
def test_the_middle_of_a_landscape_is_the_model(dimensions):
    model, (x, y) = norm_net(), batch(8, (1, 6, 6), 4)
    model(x)
    scan = analysis.landscape(model, F.cross_entropy, (x, y), dimensions=dimensions, points=5)
    model.eval()
    assert scan.losses[(2,) * dimensions] == scan.loss == F.cross_entropy(model(x), y).item()
    assert scan.losses.shape == (5,) * dimensions and scan.x[2] == 0
    assert len(np.unique(scan.losses)) > 4


def test_a_landscape_along_the_hessian_has_its_curvature():
    model, data = small_net(), batch()
    scan = analysis.landscape(model, F.cross_entropy, data, directions="hessian", distance=0.05, points=3)
    value = analysis.top_eigenvalues(model, F.cross_entropy, data).values[0]
    left, middle, right = scan.losses
    assert (left - 2 * middle + right) / 0.05**2 == pytest.approx(value, rel=0.05)


def test_a_landscape_follows_the_directions_that_are_given():
    model, (x, y) = small_net(), batch()
    d, e = torch.randn(43), torch.randn(43)
    scan = analysis.landscape(model, F.cross_entropy, (x, y), directions=[d, e], dimensions=2, distance=0.5, points=3)
    for i, a in enumerate((-0.5, 0, 0.5)):
        for j, b in enumerate((-0.5, 0, 0.5)):
            assert scan.losses[i, j] == pytest.approx(loss_at(model, a * d + b * e, x, y), rel=1e-5)


def test_random_directions_have_the_length_of_each_filter():
    params = list(norm_net().parameters())
    for d, w in zip(analysis.random_direction(params, seed=2), params, strict=True):
        if w.dim() < 2:
            assert not d.any()
        else:
            torch.testing.assert_close(d.flatten(1).norm(dim=1), w.detach().flatten(1).norm(dim=1))


def test_running_statistics_are_kept_or_taken_anew():
    model, (x, y) = norm_net(), batch(8, (1, 6, 6), 4)
    for _ in range(60):
        model(x * 3 + 1)
    kept, anew = (
        analysis.landscape(model, F.cross_entropy, (x, y), points=3, batch_norm=how) for how in ("keep", "reestimate")
    )
    model[1].train().reset_running_stats()
    model[1].momentum = None
    model(x)
    model.eval()
    assert anew.losses[1] == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-6)
    assert kept.losses[1] == kept.loss != anew.losses[1]


def test_an_interpolation_begins_and_ends_at_the_checkpoints():
    (x, y), models = batch(8, (1, 6, 6), 4), [norm_net() for _ in range(3)]
    for model in models:
        model(x * torch.rand(()))
    host, *ends = models
    states = [model.state_dict() for model in ends]
    scan = analysis.interpolation(host, F.cross_entropy, (x, y), *states, points=5, beyond=0.25)
    losses = [F.cross_entropy(model.eval()(x), y).item() for model in ends]
    np.testing.assert_array_equal(scan.x, [-0.25, 0.125, 0.5, 0.875, 1.25])
    scan = analysis.interpolation(host, F.cross_entropy, (x, y), *states, points=3)
    assert [scan.losses[0], scan.losses[2]] == losses and scan.loss == losses[0]
    host.load_state_dict({k: (v + states[1][k]) / 2 if v.is_floating_point() else v for k, v in states[0].items()})
    assert scan.losses[1] == pytest.approx(F.cross_entropy(host.eval()(x), y).item(), rel=1e-5)
    with pytest.raises(ValueError, match="end does not fit the model: .*5.bias"):
        analysis.interpolation(
            host, F.cross_entropy, (x, y), states[0], {k: states[1][k] for k in list(states[1])[:-1]}
        )


MEASURES = {
    "sharpness": lambda *a: analysis.sharpness(*a, m=3),
    "random sharpness": lambda *a: analysis.sharpness(*a, direction="random", draws=2),
    "eigenvalues": lambda *a: analysis.top_eigenvalues(*a, tolerance=0.5),
    "landscape": lambda *a: analysis.landscape(*a, points=3, batch_norm="reestimate"),
    "interpolation": lambda *a: analysis.interpolation(
        *a, a[0].state_dict(), {k: v * 2 for k, v in a[0].state_dict().items()}, points=3, batch_norm="reestimate"
    ),
}
if has_curvlinops:
    MEASURES["trace"] = lambda *a: analysis.trace(*a, products=3)
    MEASURES["spectrum"] = lambda *a: analysis.spectrum(*a, lanczos_vectors=3)


def everything(model, loader):
    """What a measurement must leave alone, and bits that can be compared."""
    return {
        **{name: tensor.clone() for name, tensor in model.state_dict().items()},
        **{f"grad of {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
        "gradients": [id(p.grad) for p in model.parameters()],
        "buffers": [id(b) for b in model.buffers()],
        "modes": [m.training for m in model.modules()],
        "momenta": [getattr(m, "momentum", 0) for m in model.modules()],
        "tracking": [getattr(m, "track_running_stats", 0) for m in model.modules()],
        "torch": torch.get_rng_state(),
        "loader": loader.generator.get_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
    }


@pytest.mark.parametrize("end", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("measure", MEASURES)
def test_everything_comes_back(measure, end):
    model = norm_net()
    x, y = batch(8, (1, 6, 6), 4)
    F.cross_entropy(model(x), y).backward()
    model[1].weight.grad = None
    model[4].eval()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = -0.0
    data = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(data, 5, shuffle=True, generator=torch.Generator().manual_seed(1))
    calls = 0

    def loss_fn(out, target):
        nonlocal calls
        calls += 1
        if end is not None and calls == 4:
            raise end("stop")
        random.random()
        return F.cross_entropy(out, target)

    before = everything(model, loader)
    if end is None:
        MEASURES[measure](model, loss_fn, loader)
    else:
        with pytest.raises(end):
            MEASURES[measure](model, loss_fn, loader)
    after = everything(model, loader)
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value.view(torch.uint8) if value.dim() else value, after[name].view(torch.uint8)
                               if value.dim() else after[name]), name  # fmt: skip
        else:
            assert value == after[name], name
    assert calls >= 4


def test_an_optimizer_in_training_goes_on_as_if_nothing_was_measured():
    runs = []
    for measured in (False, True):
        torch.manual_seed(1)
        model, (x, y) = norm_net(), batch(8, (1, 6, 6), 4)
        optimizer = FusedSAM(model.parameters(), "sgd", lr=0.1, momentum=0.9, rho=0.1)
        for step in range(4):
            F.cross_entropy(model(x), y).backward()
            optimizer.first_step(zero_grad=True)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            if measured and step == 1:
                analysis.sharpness(model, F.cross_entropy, (x, y), m=4, training=True)
        runs.append(model.state_dict())
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


def test_every_evaluation_draws_the_same_random_numbers():
    model, (x, y) = norm_net(), batch(8, (1, 6, 6), 4)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 4, shuffle=True)
    found = analysis.sharpness(model, F.cross_entropy, loader, rho=0.0, training=True)
    assert found.value == 0
    found = analysis.sharpness(model, F.cross_entropy, loader, rho=0.0, m=3, training=True)
    assert (found.before == found.after).all()  # other dropout masks, or batches of others, would show


@pytest.mark.parametrize("ending", ["json", "npz"])
def test_results_are_saved_and_loaded(tmp_path, ending):
    model, data = small_net(), batch()
    results = [
        analysis.sharpness(model, F.cross_entropy, data, m=5),
        analysis.top_eigenvalues(model, F.cross_entropy, data, tolerance=0.5),
        analysis.landscape(model, F.cross_entropy, data, points=3),
        analysis.landscape(model, F.cross_entropy, data, points=3, dimensions=2),
        analysis.Spectrum(np.array([0.0, 1.0]), np.array([np.nan, np.inf])),
    ]
    for result in results:
        loaded = type(result).load(result.save(tmp_path / f"x.{ending}"))
        for name, value in vars(result).items():
            np.testing.assert_array_equal(value, getattr(loaded, name))
            assert getattr(value, "dtype", type(value)) == getattr(getattr(loaded, name), "dtype", type(value))
    with pytest.raises(ValueError, match=r"\.json or \.npz"):
        results[0].save(tmp_path / "x.txt")


def test_a_progress_bar_is_shown_where_it_is_asked_for(capsys):
    pytest.importorskip("rich")
    model, data = small_net(), batch()
    silent, shown = (analysis.landscape(model, F.cross_entropy, data, points=3, progress=p) for p in (None, True))
    assert (silent.losses == shown.losses).all()
    out, err = capsys.readouterr()
    assert not out and err.count("landscape") == 1  # of the second call; None is silent but in a terminal


def test_plots_are_written(tmp_path):
    model, data = small_net(), batch()
    line, plane = (analysis.landscape(model, F.cross_entropy, data, points=3, dimensions=d) for d in (1, 2))
    measured = [analysis.sharpness(model, F.cross_entropy, data, rho) for rho in (0.2, 0.1)]
    figures = [
        analysis.plot_landscape({"SGD": line, "SAM": line}, log=True),
        analysis.plot_landscape({"SGD": plane, "SAM": plane}),
        analysis.plot_landscape(plane, surface=True),
        analysis.plot_spectrum(analysis.Spectrum(np.linspace(-1, 1, 9), np.ones(9) / 2)),
        analysis.plot_sharpness({"SGD": measured}),
    ]
    for figure in figures:
        figure.savefig(tmp_path / "x.png")
        assert (tmp_path / "x.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="not both"):
        analysis.plot_landscape({"a": line, "b": plane})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, f, d: analysis.sharpness(m, f, d, direction="up"), "'gradient' or 'random', got 'up'"),
        (lambda m, f, d: analysis.sharpness(m, f, d, m=0), "m must be >= 1"),
        (lambda m, f, d: analysis.top_eigenvalues(m, f, d, k=44), "number of weights, 43, got 44"),
        (lambda m, f, d: analysis.landscape(m, f, d, points=4), "points odd"),
        (lambda m, f, d: analysis.landscape(m, f, d, directions=[torch.ones(3)]), r"shape \[43\], got \[3\]"),
        (lambda m, f, d: analysis.landscape(m, f, d, batch_norm="reestimate", training=True), "use training=False"),
        (lambda m, f, d: analysis.sharpness(m, f, []), "no data"),
        (lambda m, f, d: analysis.sharpness(m, f, d[0]), "must give batches"),
        (lambda m, f, d: analysis.sharpness(m.requires_grad_(False), f, d), "no parameter that requires"),
        (lambda m, f, d: analysis.sharpness(m, nn.CrossEntropyLoss(reduction="none"), d), r"mean .* shape \[12\]"),
    ],
)
def test_what_cannot_be_measured_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(small_net(), F.cross_entropy, batch())
