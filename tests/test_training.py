"""What needs the model: running statistics stay those of the first pass, and ASAM's groups are its authors'."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastsam import FusedSAM, asam_groups, freeze_running_stats


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
