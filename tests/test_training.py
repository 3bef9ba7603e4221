"""What needs the model: running statistics stay those of the first pass, groups of ASAM and SAM-ON are right."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastsam import FusedSAM, asam_groups, freeze_running_stats, norm_layers_only, preserve_buffers


class OwnBatchNorm(nn.modules.batchnorm._BatchNorm):
    """As timm's: a subclass with a forward of its own that calls torch's."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        return F.relu(super().forward(x))


NORMS = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(3), (8, 3)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(3), (4, 3, 5, 5)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(3), (2, 3, 3, 3, 3)),
    "cumulative": (lambda: nn.BatchNorm2d(3, momentum=None), (4, 3, 5, 5)),
    "not affine": (lambda: nn.BatchNorm2d(3, affine=False), (4, 3, 5, 5)),
    "no statistics": (lambda: nn.BatchNorm2d(3, track_running_stats=False), (4, 3, 5, 5)),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(3), (4, 3, 5, 5)),
    "subclass": (lambda: OwnBatchNorm(3), (4, 3, 5, 5)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(3, track_running_stats=True), (4, 3, 7)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), (4, 3, 5, 5)),
    "InstanceNorm, cumulative": (lambda: nn.InstanceNorm2d(3, momentum=None, track_running_stats=True), (4, 3, 5, 5)),
    "InstanceNorm, no statistics": (lambda: nn.InstanceNorm2d(3), (4, 3, 5, 5)),
    "GroupNorm": (lambda: nn.GroupNorm(1, 3), (4, 3, 5, 5)),
}
TRACKING = [name for name in NORMS if "no statistics" not in name and name != "GroupNorm"]
MOVING = [name for name in TRACKING if name != "InstanceNorm, cumulative"]  # torch takes momentum=None as 0 there


def build(name):
    """A model with the layer twice, one nested, after one batch; and the shape of a batch."""
    make, shape = NORMS[name]
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.Sequential(make()))
    model(torch.randn(shape))
    return model, shape


def buffers(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def flags(model):
    return [getattr(module, "track_running_stats", None) for module in model.modules()]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, buffer in found.items():
        torch.testing.assert_close(buffer, expected[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("name", NORMS)
def test_statistics_stay_and_the_output_is_the_same(name):
    model, shape = build(name)
    before, x = buffers(model), torch.randn(shape) * 3 + 5
    addresses, as_built = [b.data_ptr() for b in model.buffers()], flags(model)
    with freeze_running_stats(model):
        frozen = model(x)
    assert_same(buffers(model), before)
    assert flags(model) == as_built
    assert [b.data_ptr() for b in model.buffers()] == addresses
    assert torch.equal(frozen, model(x))


@pytest.mark.parametrize("name", MOVING)
def test_without_it_statistics_move(name):
    model, shape = build(name)
    before = buffers(model)
    model(torch.randn(shape) * 3 + 5)
    moved = [key for key, buffer in model.named_buffers() if not torch.equal(buffer, before[key])]
    assert any("running_mean" in key for key in moved)


@pytest.mark.parametrize("name", TRACKING)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_non_finite_activation_leaves_no_trace(name, value):
    model, shape = build(name)
    before = buffers(model)
    x = torch.randn(shape)
    x.view(-1)[0] = value
    with freeze_running_stats(model):
        model(x)
    assert_same(buffers(model), before)


@pytest.mark.parametrize("name", TRACKING)
def test_layers_in_evaluation_mode_are_not_touched(name):
    model, shape = build(name)
    model.eval()
    before, x = buffers(model), torch.randn(shape)
    expected, as_built = model(x), flags(model)
    with freeze_running_stats(model):
        assert flags(model) == as_built
        assert torch.equal(model(x), expected)  # with the running statistics
    assert_same(buffers(model), before)


@pytest.mark.parametrize("name", TRACKING)
def test_an_exception_and_nested_blocks_restore(name):
    model, shape = build(name)
    before, as_built = buffers(model), flags(model)
    with pytest.raises(ZeroDivisionError), freeze_running_stats(model):
        model(torch.randn(shape))
        raise ZeroDivisionError
    assert_same(buffers(model), before)
    assert flags(model) == as_built
    with freeze_running_stats(model):
        with freeze_running_stats(model[1]), freeze_running_stats(model):
            model(torch.randn(shape))
        model(torch.randn(shape))  # the inner blocks do not end the outer one
    assert_same(buffers(model), before)
    assert flags(model) == as_built
    if name in MOVING:
        model(torch.randn(shape))
        assert any(not torch.equal(buffer, before[key]) for key, buffer in model.named_buffers())


@pytest.mark.parametrize("name", NORMS)
def test_backward_may_come_after_the_block(name):
    model, shape = build(name)
    x = torch.randn(shape)
    grads = []
    for context in (freeze_running_stats(model), nullcontext()):
        leaf = x.clone().requires_grad_()
        with context:
            loss = model(leaf).pow(3).sum()
        loss.backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_a_layer_without_statistics_stays_without():
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3))
    with freeze_running_stats(model):
        pass
    assert [module.track_running_stats for module in model] == [False, True]


class OwnStatistics(nn.Module):
    """Not derived from torch's, with buffers that it writes to, replaces, counts with, and leaves alone."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("last", torch.zeros(3), persistent=False)
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("table", torch.ones(3))
        self.register_buffer("expanded", torch.ones(1).expand(3))
        self.register_buffer("absent", None)

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
            self.last = x.detach().mean(0)
            self.count += 1
        return x * self.table * self.expanded - self.mean


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_buffers_of_any_layer_are_preserved(value):
    model = nn.Sequential(OwnStatistics(), nn.Sequential(nn.Linear(3, 3), OwnStatistics(), nn.BatchNorm1d(3)))
    model(torch.randn(4, 3))
    before, objects, table = buffers(model), list(model.buffers()), model[0].table._version
    x = torch.randn(4, 3) * value
    with preserve_buffers(model):
        model(x).sum().backward()
        model[0].absent = torch.ones(3)
        assert model[1][1].count == 2
    with pytest.raises(ZeroDivisionError), preserve_buffers(model):
        model(x)
        raise ZeroDivisionError
    assert_same(buffers(model), before)
    assert all(a is b for a, b in zip(model.buffers(), objects, strict=True))
    assert model[0].absent is None
    assert model[0].table._version == table  # autograd may have saved what had not changed
    model(x)
    assert model[0].count == 2


def network():
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(4), nn.BatchNorm2d(4, momentum=None), nn.InstanceNorm2d(4, track_running_stats=True)]
    layers = [layer for norm in norms for layer in (nn.Conv2d(4, 4, 3, padding=1), norm)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 25, 3))


@pytest.mark.parametrize("style", ["closure", "two calls"])
def test_training_keeps_the_statistics_of_the_first_passes(style):
    batches = [torch.randn(6, 4, 5, 5) for _ in range(4)]
    model = network()
    opt = FusedSAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.5)
    twin = network()  # sees the weights of the first passes only
    for x in batches:
        with torch.no_grad():
            for p, q in zip(twin.parameters(), model.parameters(), strict=True):
                p.copy_(q)
        twin(x)
        seen = []

        def closure(x=x, seen=seen):
            opt.zero_grad()
            seen.append(opt.perturbed)
            with freeze_running_stats(model) if opt.perturbed else nullcontext():
                loss = model(x).square().mean()
            loss.backward()
            return loss

        if style == "closure":
            opt.step(closure)
            assert seen == [False, True]
        else:
            model(x).square().mean().backward()
            opt.first_step(zero_grad=True)
            with freeze_running_stats(model):
                model(x).square().mean().backward()
            opt.step()
        opt.zero_grad()
    assert_same(buffers(model), buffers(twin))
    assert model[1].num_batches_tracked == len(batches)


# --- asam_groups -----------------------------------------------------------------------------------------------------


def names_of(model, groups):
    names = {id(p): name for name, p in model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in groups]


def test_parameters_with_weight_in_their_name_are_adaptive():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LSTM(4, 2))
    groups = asam_groups(model)
    adaptive, others = names_of(model, groups)
    assert adaptive == ["0.weight", "1.weight", "2.weight_ih_l0", "2.weight_hh_l0"]
    assert others == ["0.bias", "1.bias", "2.bias_ih_l0", "2.bias_hh_l0"]
    values = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    assert values == [{"rho": 0.5, "adaptive": True, "eta": 0.01}, {"rho": 0.5, "adaptive": False, "eta": 0.0}]
    assert [group["rho"] for group in asam_groups(model, rho=2.0)] == [2.0, 2.0]
    assert asam_groups(model, eta=0.3)[0]["eta"] == 0.3


def test_frozen_parameters_are_kept_and_tied_ones_listed_once():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "out": nn.Linear(3, 5)})
    model["out"].weight = model["embed"].weight
    model["out"].bias.requires_grad_(False)
    assert names_of(model, asam_groups(model)) == [["embed.weight"], ["out.bias"]]


def test_an_empty_group_is_left_out():
    assert [group["adaptive"] for group in asam_groups(nn.Linear(3, 4, bias=False))] == [True]

    class Offset(nn.Module):
        def __init__(self):
            super().__init__()
            self.offset = nn.Parameter(torch.zeros(3))

    assert [group["adaptive"] for group in asam_groups(Offset())] == [False]


def test_a_step_is_the_paper_s():
    """e = rho T^2 g / ||T g||, T = abs(w) + eta for weights and 1 for biases, one norm over both (arXiv 2102.11600)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    rho, eta = 0.7, 0.05
    opt = FusedSAM(asam_groups(model, rho, eta), torch.optim.SGD, lr=0.1, backend="reference")
    model(torch.randn(9, 5, dtype=torch.float64)).square().mean().backward()
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    scale = {name: w.abs() + eta if name.endswith("weight") else torch.ones_like(w) for name, w in old.items()}
    norm = sum((scale[name] * p.grad).square().sum() for name, p in model.named_parameters()).sqrt()
    opt.first_step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach() - old[name], rho * scale[name].square() * p.grad / norm)


# --- SAM-ON ----------------------------------------------------------------------------------------------------------


class OwnNorm(nn.Module):
    """A normalisation layer that derives from none of torch's."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.scale * x / x.std()


SCALED = {  # layers with parameters of their own, and an input
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (8, 4)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), (2, 4, 3, 3)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(4), (2, 4, 3, 3, 3)),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(4), None),
    "lazy": (lambda: nn.LazyBatchNorm1d(), (8, 4)),
    "subclass": (lambda: OwnBatchNorm(4), (8, 4)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, affine=True), (2, 4, 3, 3)),
    "LayerNorm": (lambda: nn.LayerNorm(4), (8, 4)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (8, 4)),
    "RMSNorm": (lambda: nn.RMSNorm(4), (8, 4)),
}


@pytest.mark.parametrize("name", SCALED)
def test_every_normalisation_layer_is_perturbed_and_nothing_else(name):
    make, shape = SCALED[name]
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "nested": nn.Sequential(make(), nn.Conv2d(4, 4, 1))})
    if shape is not None:
        model["nested"][0](torch.randn(shape))  # a lazy one gets its parameters
    perturbed, others = norm_layers_only(model)
    named = {name for name, _ in model.named_parameters() if name.startswith("nested.0")}
    assert len(named) == (1 if name == "RMSNorm" else 2)
    assert perturbed["perturb"] is True and others["perturb"] is False
    assert set(names_of(model, [perturbed])[0]) == named
    assert set(names_of(model, [others])[0]) == {name for name, _ in model.named_parameters()} - named


def transformer():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(5, 8), block, OwnNorm(8), nn.Linear(8, 3)).double()


@pytest.mark.parametrize("layers", [(), (OwnNorm,)])
def test_the_norm_is_over_normalisation_layers_and_others_do_not_move(layers):
    model = transformer()
    opt = FusedSAM(norm_layers_only(model, layers=layers, rho=0.7), "sgd", lr=0.1, momentum=0.9)
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    norms = {name for name in old if "norm" in name} | ({"2.scale"} if layers else set())
    model(torch.randn(4, 6, 5, dtype=torch.float64)).square().mean().backward()
    norm = sum(p.grad.square().sum() for name, p in model.named_parameters() if name in norms).sqrt()
    opt.first_step()
    for name, p in model.named_parameters():
        if name in norms:
            torch.testing.assert_close(p.detach() - old[name], 0.7 * p.grad / norm)
        else:
            assert torch.equal(p, old[name])
    opt.step()
    assert all(not torch.equal(p, old[name]) for name, p in model.named_parameters())  # all of them step


def test_every_parameter_is_in_one_group_with_the_options():
    model = transformer()
    model[0].weight.requires_grad_(False)
    model[1].norm2.weight = model[1].norm1.weight  # shared by two normalisation layers
    model[1].linear2.bias = model[1].norm2.bias  # and by one and another layer
    groups = norm_layers_only(model, rho=0.3, lr=0.01)
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed)) and set(listed) == {id(p) for p in model.parameters()}
    assert any(p is model[1].linear2.bias for p in groups[0]["params"])
    assert [(group["rho"], group["lr"]) for group in groups] == [(0.3, 0.01)] * 2
    assert len(norm_layers_only(nn.LayerNorm(3))) == 1  # a group without parameters is left out


@pytest.mark.parametrize("model", [nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False), OwnNorm(3)])
def test_a_model_without_normalisation_is_refused(model):
    with pytest.raises(ValueError, match="no normalisation layer with parameters"):
        norm_layers_only(model)


def test_perturb_is_no_option_of_norm_layers_only():
    with pytest.raises(ValueError, match="perturb"):
        norm_layers_only(nn.BatchNorm1d(3), perturb=False)
