"""What is taken although it is odd, and what is refused by name with what to do instead."""

from __future__ import annotations

import copy

import cases
import oracle
import pytest
import torch
from oracle import assert_same, bits
from torch import Tensor
from torch.nn import Parameter
from torch.optim import SGD, AdamW

from fastsam import FusedSAM

NAMES = ["matrix", "scalar", "63", "transposed", "above a chunk"]


# A base whose groups hold other things than numbers.


class Plain(torch.optim.Optimizer):
    """A base that reads nothing of its groups."""

    def __init__(self, params, **defaults):
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=0.1)


NO_NUMBERS = {
    "lr=None": dict(lr=None),
    "no lr": dict(),
    "lr a tuple": dict(lr=(0.1, 0.2)),
    "lr a string": dict(lr="auto"),
    "lr a function": dict(lr=lambda step: 0.1),
    "lr two numbers in a tensor": dict(lr=torch.tensor([0.1, 0.2])),
    "weight_decay=None": dict(lr=0.1, weight_decay=None),
    "weight_decay a tuple": dict(lr=0.1, weight_decay=(0.1, 0.2)),
    "weight_decay a dict": dict(lr=0.1, weight_decay={"kernel": 0.1}),
}
each_odd_group = pytest.mark.parametrize("options", NO_NUMBERS.values(), ids=list(NO_NUMBERS))


@pytest.mark.parametrize("kwargs", [{}, dict(max_grad_norm=100.0), dict(p=3.0)], ids=["plain", "clipped", "p=3"])
@pytest.mark.parametrize("way", ["closure", "two calls", "base_step"])
@each_odd_group
def test_a_base_without_numbers_for_lr_and_weight_decay(backend, device, options, way, kwargs):
    p = Parameter(torch.ones(2, device=device))
    opt = FusedSAM([p], Plain, rho=0.05, backend=backend, **options, **kwargs)

    def closure():
        p.grad = torch.ones_like(p)

    if way == "closure":
        opt.step(closure)
    elif way == "two calls":
        closure(), opt.first_step(), closure(), opt.step()
    else:
        closure(), opt.base_step()
    torch.testing.assert_close(p.detach().cpu(), torch.full((2,), 0.9))
    opt.load_state_dict(opt.state_dict()), opt.refresh(), opt.prepare(), opt.stats(), copy.deepcopy(opt)


@each_odd_group
def test_a_step_without_first_step_is_refused_there_too(options):
    p = Parameter(torch.ones(2))
    opt = FusedSAM([p], Plain, **options)
    p.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="first_step"):
        opt.step()


@pytest.mark.parametrize("lr", [0, 0.0, torch.tensor(0.0), torch.zeros(1)])
def test_an_lr_of_0_in_any_form_lets_the_base_step_alone(lr):
    p = Parameter(torch.ones(2))
    opt = FusedSAM([p], Plain, lr=lr)
    p.grad = torch.ones(2)
    opt.step()
    torch.testing.assert_close(p.detach(), torch.full((2,), 0.9))


def test_a_relative_adafactor():
    class Adafactor(Plain):
        def __init__(self, params, lr=None, relative_step=True):
            super().__init__(params, lr=lr, relative_step=relative_step)

    p = Parameter(torch.ones(2))
    opt = FusedSAM([p], Adafactor, rho=0.3)
    p.grad = torch.ones(2)
    opt.first_step()
    torch.testing.assert_close(p.detach(), 1 + 0.3 * torch.full((2,), 0.5**0.5))
    opt.step()


@pytest.mark.parametrize("decay", [(0.1, 0.2), "auto", torch.tensor([0.1, 0.2])], ids=["tuple", "string", "tensor"])
def test_climbing_along_a_decay_that_is_no_number_is_refused(decay):
    p = Parameter(torch.ones(2))
    opt = FusedSAM([p], Plain, weight_decay=decay, perturb_with_weight_decay=True)
    with pytest.raises(ValueError, match=r"perturb_with_weight_decay=True needs a number.*use perturb_with"):
        opt.step(lambda: setattr(p, "grad", torch.ones(2)))


@pytest.mark.parametrize("decay", [0.5, None, torch.tensor(0.5)], ids=["number", "None", "tensor"])
def test_climbing_along_a_decay_of_a_base_that_is_not_fused(decay):
    p = Parameter(torch.tensor([1.0, 0.0]))
    opt = FusedSAM([p], Plain, rho=0.05, weight_decay=decay, perturb_with_weight_decay=True)
    p.grad = torch.tensor([0.0, 0.5])
    opt.first_step()
    climbed = [0.0, 0.05] if decay is None else [0.05 * 0.5**0.5] * 2
    torch.testing.assert_close(p.detach(), torch.tensor([1.0, 0.0]) + torch.tensor(climbed))


# Another default device or dtype.


def set_default(kind):
    if kind == "meta":
        torch.set_default_device("meta")
    elif kind is not None:
        torch.set_default_dtype(kind)


@pytest.fixture
def defaults():
    """`set_default`, undone after the test."""
    dtype = torch.get_default_dtype()
    yield set_default
    torch.set_default_device(None)
    torch.set_default_dtype(dtype)


DEFAULTS = pytest.mark.parametrize("kind", ["meta", torch.float64, torch.bfloat16], ids=str)
OPTIONS = [
    cases.Config("sgd", SGD, dict(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.01, rho=0.2)),
    cases.Config("adamw", AdamW, dict(lr=0.01, weight_decay=0.1, amsgrad=True, rho=0.2, adaptive=True, eta=0.01)),
    cases.Config("nadam", torch.optim.NAdam, dict(lr=0.01, momentum_decay=0.02, rho=0.2, max_grad_norm=1.0)),
    cases.Config("radam", torch.optim.RAdam, dict(lr=0.01, betas=(0.8, 0.95), rho=0.2, p=3.0)),
    cases.Config("rprop", torch.optim.Rprop, dict(lr=0.01, rho=0.2)),
    cases.Config("rmsprop", torch.optim.RMSprop, dict(lr=0.01, momentum=0.5, centered=True, rho=0.2, flatten=True)),
    cases.Config("masters", AdamW, dict(lr=0.01, rho=0.2, master_weights=True)),
    cases.Config("stochastic", AdamW, dict(lr=0.01, rho=0.2, stochastic_rounding=True, rounding_seed=5)),
    cases.Config("states", SGD, dict(lr=0.1, momentum=0.9, rho=0.2, state_dtype=torch.bfloat16)),
]


def trained(config, backend, device, kind, when):
    """Weights and states after a few steps, with a default set before the optimizer, before its second step or not."""
    dtype = torch.bfloat16 if config.name in ("masters", "stochastic") else torch.float32
    params = cases.make_params(dtype, NAMES, device=device)
    grads = [[cases.gradient(p, 10 * i + k, coupling=0) for k, p in enumerate(params)] for i in range(10)]
    found = torch.ones(()), torch.full((), 1024.0)

    def step(opt, i):
        for pass_ in range(2):
            for p, g in zip(params, grads[2 * i + pass_], strict=True):
                p.grad = g
            opt.step() if pass_ else opt.first_step()

    set_default(kind if when == "before" else None)
    opt = cases.fused(params, config, backend)
    step(opt, 0)
    set_default(kind)
    step(opt, 1)
    params[0].data = params[0].data.clone()  # tables are made anew
    step(opt, 2)
    if config.name != "rprop":  # torch's own Rprop makes tensors on the default device
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    step(opt, 3)
    opt.found_inf, opt.grad_scale = (scalar.to(device) for scalar in found)
    step(opt, 4)
    opt.stats(), opt.refresh(), opt.prepare()
    return params, opt.state_dict()["state"]


@pytest.mark.parametrize("when", ["before", "later"])
@DEFAULTS
@pytest.mark.parametrize("config", **cases.ids(OPTIONS))
@pytest.mark.filterwarnings("ignore:FusedSAM. param_groups.* is no longer in the flat buffer")
def test_another_default_device_or_dtype_changes_nothing(backend, device, defaults, config, kind, when):
    expected, state = trained(config, backend, device, None, when)
    found, other = trained(config, backend, device, kind, when)
    torch.set_default_device(None)
    for p, q in zip(found, expected, strict=True):
        assert_same(p, q)
    assert {k: set(v) for k, v in other.items()} == {k: set(v) for k, v in state.items()}
    for k, entry in state.items():
        for name, value in entry.items():
            if isinstance(value, Tensor) and config.name != "rprop":
                assert other[k][name].device == value.device
                assert_same(other[k][name], value, what=name)


# Parameters without memory, or with a part of it.


def named(group, param, why):
    """A pattern for the message about this parameter."""
    return rf"(?s)FusedSAM: param_groups\[{group}\]\['params'\]\[{param}\].* is {why}"


def each_way_in(bad, good, why, **kwargs):
    """`bad` is refused by name at construction, in add_param_group, and where it is written into a group."""
    with pytest.raises(ValueError, match=named(0, 1, why)):
        FusedSAM([good, bad], SGD, lr=0.1, **kwargs)
    with pytest.raises(ValueError, match=r"\('b'\)"):
        FusedSAM([("a", good), ("b", bad)], SGD, lr=0.1, **kwargs)
    with pytest.raises(ValueError, match=named(0, 0, why)):
        FusedSAM(None, SGD([bad, good], lr=0.1), **kwargs)
    opt = FusedSAM([good], SGD, lr=0.1, **kwargs)
    good.grad = torch.ones_like(good)
    opt.base_step()
    before = bits(good)
    with pytest.raises(ValueError, match=named(1, 0, why)):
        opt.add_param_group({"params": [bad]})
    assert len(opt.param_groups) == 1
    opt.base_step()
    opt.param_groups[0]["params"].append(bad)
    for use in (opt.prepare, opt.first_step):
        with pytest.raises(ValueError, match=named(0, 1, why)):
            use()
    opt.param_groups[0]["params"].pop()
    opt.first_step(), opt.restore()
    assert bits(good) != before


@pytest.fixture
def good(device):
    return Parameter(torch.ones(3, device=device))


def test_meta_parameters_with_a_gradient(backend, good):
    bad = Parameter(torch.ones(3, device="meta"))
    bad.grad = torch.ones(3, device="meta")
    each_way_in(bad, good, "on the meta device.*to_empty", backend="auto")


def test_unused_meta_parameters_are_like_frozen_ones(backend, device):
    unused = [Parameter(torch.ones(3, device="meta"), requires_grad=grad) for grad in (True, False)]
    used = Parameter(torch.ones(3, device=device))
    opt = FusedSAM([unused[0], used, unused[1]], AdamW, lr=0.1, backend=backend)
    opt.prepare()
    for _ in range(2):
        opt.step(lambda: setattr(used, "grad", torch.ones_like(used)))
    opt.add_param_group({"params": [Parameter(torch.ones(2, device="meta"))]})
    opt.step(lambda: setattr(used, "grad", torch.ones_like(used)))
    opt.load_state_dict(opt.state_dict())
    assert set(opt.state_dict()["state"]) == {1}
    before = bits(used)
    unused[0].grad = torch.ones(3, device="meta")
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['params'\]\[0\] is on the meta device"):
        opt.first_step()
    assert bits(used) == before and not opt.perturbed


def test_fake_tensors(backend, good):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        params = list(torch.nn.Linear(3, 2).parameters())
        with pytest.raises(ValueError, match=r"param_groups\[0\]\['params'\]\[0\] is a FakeTensor.*dry run"):
            FusedSAM(params, AdamW, lr=0.1, backend=backend)
    each_way_in(params[0], good, "a FakeTensor.*base optimizer step")


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
def test_sparse_parameters(layout, good):
    bad = Parameter(torch.eye(3).to_sparse(layout=layout))
    with pytest.raises(ValueError, match=named(0, 0, "sparse.*dense parameter")):
        FusedSAM([bad, good], SGD, lr=0.1)
    frozen = Parameter(torch.eye(3).to_sparse(layout=layout), requires_grad=False)
    opt = FusedSAM([frozen, good], SGD, lr=0.1, flatten=True)
    for _ in range(2):
        opt.step(lambda: setattr(good, "grad", torch.ones_like(good)))
    opt.unflatten()


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate:UserWarning")
def test_duplicated_parameters(backend, device, good):
    other = Parameter(torch.ones(2, device=device))
    listed = r"once, but param_groups\[0\]\['params'\]\[2\] is the same .* as param_groups\[0\]\['params'\]\[0\]"
    for given in ([good, other, good], [{"params": (good, other, good)}]):
        with pytest.raises(ValueError, match=listed):
            FusedSAM(given, SGD, lr=0.1, backend=backend)
    with pytest.raises(ValueError, match=listed):
        FusedSAM(None, SGD([good, other, good], lr=0.1), backend=backend)
    with pytest.raises(ValueError, match=r"\('decoder'\) is the same Parameter as .*\('encoder'\)"):
        FusedSAM([("encoder", good), ("decoder", good)], SGD, lr=0.1, backend=backend)
    frozen = Parameter(torch.ones(2), requires_grad=False)
    with pytest.raises(ValueError, match="listed once"):
        FusedSAM([frozen, frozen, good], SGD, lr=0.1)
    opt = FusedSAM([good], SGD, lr=0.1, backend=backend)
    with pytest.raises(ValueError, match=r"param_groups\[1\]\['params'\]\[1\] is the same"):
        opt.add_param_group({"params": [other, other]})
    assert len(opt.param_groups) == 1
    good.grad = torch.ones_like(good)
    opt.base_step()
    for written in ([good, good], (good, other, good)):
        opt.param_groups[0]["params"] = written
        with pytest.raises(ValueError, match="listed once"):
            opt.first_step()
    opt.param_groups[0]["params"] = [good]
    opt.param_groups.append(dict(opt.param_groups[0]))
    with pytest.raises(ValueError, match=r"param_groups\[1\]\['params'\]\[0\] is the same"):
        opt.first_step()
    opt.param_groups.pop()
    opt.first_step(), opt.step()


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("original", [True, False], ids=["original parameters", "flat parameters"])
def test_parameters_of_fsdp1(process_group, original):
    from torch.distributed.fsdp import FullyShardedDataParallel

    device, match = torch.device("cpu"), r"param_groups\[0\]\['params'\]\[0\] is part of a FlatParameter.*FSDP1"
    model = torch.nn.Linear(4, 4)
    early = FusedSAM(model.parameters(), SGD, lr=0.1)
    early.prepare()
    wrapped = FullyShardedDataParallel(model, use_orig_params=original, device_id=device)
    for make in (
        lambda: FusedSAM(wrapped.parameters(), SGD, lr=0.1),
        lambda: FusedSAM(None, AdamW(wrapped.parameters())),
        lambda: FusedSAM([Parameter(torch.ones(2))], SGD).add_param_group({"params": list(wrapped.parameters())}),
    ):
        with pytest.raises(ValueError, match=match.replace("0", ".")):
            make()
    early.param_groups[0]["params"] = list(wrapped.parameters())
    wrapped(torch.ones(2, 4)).sum().backward()
    if not original:
        with pytest.raises(ValueError, match=match):
            early.first_step()


@pytest.mark.filterwarnings("ignore")
def test_dtensors_of_summands_or_of_one_memory(process_group, backend):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh, part = init_device_mesh("cpu", (1,)), torch.ones(2)
    summands = [Parameter(DTensor.from_local(part, mesh, [Partial()]))]
    with pytest.raises(
        ValueError, match=r"param_groups\[0\]\['params'\]\[0\] is a DTensor of which each rank has a summ"
    ):
        FusedSAM(summands, SGD, lr=0.1, backend=backend)
    own = Parameter(torch.ones(2))
    opt = FusedSAM([own], SGD, lr=0.1)
    with pytest.raises(
        ValueError, match=r"param_groups\[1\]\['params'\]\[0\] is a DTensor of which each rank has a summ"
    ):
        opt.add_param_group({"params": summands})
    twice = [Parameter(DTensor.from_local(part, mesh, [Replicate()])) for _ in range(2)]
    opt = FusedSAM(twice, SGD, lr=0.1, backend=backend)
    twice[0].grad = torch.ones_like(twice[0])
    with pytest.raises(ValueError, match=r"share memory, got param_groups\[0\].*0\] and param_groups\[0\].*1\]"):
        opt.first_step()


@pytest.mark.filterwarnings("ignore")
def test_zero_redundancy_optimizers(process_group):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    params = [Parameter(torch.ones(2)), Parameter(torch.ones(3))]
    zero = ZeroRedundancyOptimizer(params, AdamW, lr=0.1)
    with pytest.raises(ValueError, match=r"ZeroRedundancyOptimizer cannot be the base.*sam.restore\(\), zero.step\(\)"):
        FusedSAM(None, zero)
    with pytest.raises(ValueError, match="Mine cannot be the base optimizer: it steps a part"):
        FusedSAM(params, type("Mine", (ZeroRedundancyOptimizer,), {"__name__": "Mine"}), optimizer_class=AdamW)
    for options in (dict(base_optimizer=SGD, lr=0.1), dict(base_optimizer="adamw")):
        with pytest.raises(ValueError, match=r"given all parameters, but ZeroRedundancyOptimizer builds it"):
            ZeroRedundancyOptimizer(params, FusedSAM, **options)
    FusedSAM(params, AdamW)  # beside one it is fine


# Frozen parameters are nobody's business.


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(
    "kwargs", [{}, dict(flatten=True), dict(master_weights=True)], ids=["plain", "flat", "masters"]
)
def test_frozen_parameters_are_not_checked_against_the_backend(backend, device, dtype, kwargs):
    frozen = Parameter(torch.zeros(4, 2, device=device).to(dtype), requires_grad=False)
    adapter = Parameter(torch.ones(3, device=device, dtype=torch.bfloat16))
    opt = FusedSAM([frozen, adapter], AdamW, lr=0.1, backend=backend, **kwargs)
    opt.add_param_group({"params": [Parameter(torch.zeros(2, device=device).to(dtype), requires_grad=False)]})
    for _ in range(2):
        opt.step(lambda: setattr(adapter, "grad", torch.ones_like(adapter)))
    opt.load_state_dict(opt.state_dict()), copy.deepcopy(opt)
    assert set(opt.state_dict()["state"]) == {1}


def test_a_frozen_complex_parameter_may_be_in_an_adaptive_group(backend, device):
    frozen = Parameter(torch.ones(2, dtype=torch.complex64, device=device), requires_grad=False)
    w = Parameter(torch.ones(2, device=device))
    opt = FusedSAM([frozen, w], SGD, adaptive=True, lr=0.1, backend=backend)
    opt.step(lambda: setattr(w, "grad", torch.ones_like(w)))
    frozen.requires_grad_(True).grad = torch.ones_like(frozen)
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['params'\]\[0\] is complex"):
        opt.first_step()


# Bases that differentiate the gradients once more.


class Hutchinson(torch.optim.Optimizer):
    """The step of AdaHessian and Sophia, with ones instead of signs."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        with torch.enable_grad():
            diagonal = torch.autograd.grad([p.grad for p in params], params, [torch.ones_like(p) for p in params])
        for p, h in zip(params, diagonal, strict=True):
            p.add_(p.grad / (h.abs() + 1e-3), alpha=-self.param_groups[0]["lr"])


class WellKnown:
    """What the well-known SAM file does around it."""

    def __init__(self, params, rho):
        self.params, self.rho, self.base = params, rho, Hutchinson(params)

    @torch.no_grad()
    def first(self):
        norm = torch.stack([p.grad.norm() for p in self.params]).norm()
        self.old = [p.data.clone() for p in self.params]
        for p in self.params:
            p.add_(p.grad * (self.rho / (norm + 1e-12)))
            p.grad = None

    def second(self, factor=1.0):
        for p, old in zip(self.params, self.old, strict=True):
            p.data = old
            p.grad = p.grad * factor
        self.base.step()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph:UserWarning")
@pytest.mark.parametrize("where", ["plain", "hooked", "patched", "scaled", "clipped"])
def test_second_order_bases(backend, device, where):
    def made():
        return [Parameter(torch.tensor(v, device=device)) for v in ([1.0, 2.0], [[0.5, -1.0], [2.0, 1.0]])]

    def loss(params, scale=1.0):
        return scale * (params[0].prod() * (params[1] ** 3).sum() + (params[0] ** 4).sum())

    theirs, ours = made(), made()
    hand = WellKnown(theirs, 0.05)
    opt = FusedSAM(ours, Hutchinson, rho=0.05, backend=backend, max_grad_norm=1e6 if where == "clipped" else None)
    if where == "hooked":
        opt.base_optimizer.register_step_pre_hook(lambda *_: None)
    if where == "patched":
        original = opt.base_optimizer.step
        opt.base_optimizer.step = lambda: original()
    scale = 64.0 if where == "scaled" else 1.0
    for _ in range(3):
        loss(theirs).backward(), hand.first(), loss(theirs).backward(create_graph=True), hand.second()
        loss(ours).backward(), opt.first_step(zero_grad=True), loss(ours, scale).backward(create_graph=True)
        if where == "scaled":
            opt.grad_scale, opt.found_inf = torch.tensor(scale, device=device), torch.zeros((), device=device)
        opt.step()
        opt.zero_grad()
        for p in theirs:
            p.grad = None
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q)


def test_a_stale_graph_is_noticed_as_ever(backend, device):
    p = Parameter(torch.ones(2, device=device))
    opt = FusedSAM([p], torch.optim.Rprop, lr=0.1, backend=backend)
    (p**2).sum().backward()
    opt.first_step()
    stale = (p**3).sum()
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


# How parameters and bases may be given.


def test_a_partial_is_a_class_with_keywords(backend, device):
    from functools import partial

    runs = []
    for base, kwargs in (
        (SGD, dict(lr=0.2, momentum=0.9)),
        (partial(SGD, lr=0.2, momentum=0.9), {}),
        (partial(SGD, lr=0.3, momentum=0.9), dict(lr=0.2)),
        (partial(partial(SGD, lr=0.2), momentum=0.9), {}),
    ):
        p = Parameter(torch.ones(3, device=device))
        opt = FusedSAM([p], base, rho=0.1, backend=backend, **kwargs)
        assert type(opt.base_optimizer) is SGD
        for _ in range(3):
            opt.step(lambda p=p: setattr(p, "grad", p.detach() + 1))
        runs.append(p.detach())
    for other in runs[1:]:
        assert_same(other, runs[0])
    with pytest.raises(ValueError, match=r"partial as base_optimizer must hold keywords only, got 2 positional"):
        FusedSAM([p], partial(SGD, [p], 0.1))
    with pytest.raises(ValueError, match="base_optimizer must be a torch.optim class"):
        FusedSAM([p], partial(print, lr=0.1))
    with pytest.raises(ValueError, match="LBFGS cannot be the base"):
        FusedSAM([p], partial(torch.optim.LBFGS, lr=0.1))


@pytest.mark.parametrize("where", ["params", "group", "instance", "added", "written", "groups written"])
@pytest.mark.parametrize("kind", ["tuple", "ParameterList", "dict values"])
def test_containers_of_parameters(backend, device, kind, where):
    def contained(params):
        if kind == "dict values":
            return {i: p for i, p in enumerate(params)}.values()
        return tuple(params) if kind == "tuple" else torch.nn.ParameterList(params)

    runs = []
    for make in (list, contained):
        params = [Parameter(torch.full((3,), float(i), device=device)) for i in range(4)]
        if where == "params":
            opt = FusedSAM(make(params), AdamW, lr=0.1, backend=backend)
        elif where == "group":
            opt = FusedSAM(({"params": make(params[:2])}, {"params": make(params[2:])}), AdamW, lr=0.1, backend=backend)
        elif where == "instance":
            opt = FusedSAM(make(params), AdamW(params, lr=0.1), backend=backend)
        else:
            opt = FusedSAM(make(params[:2]), AdamW, lr=0.1, backend=backend)
            opt.add_param_group({"params": make(params[2:])})
        for i in range(4):
            if i == 2 and where == "written":
                opt.param_groups[0]["params"] = make(opt.param_groups[0]["params"])
            if i == 2 and where == "groups written":
                opt.param_groups = tuple(opt.param_groups)
            if i == 3 and where == "groups written":
                opt.base_optimizer.param_groups = tuple(opt.base_optimizer.param_groups)
            opt.step(lambda params=params: [setattr(p, "grad", p.detach() + 1) for p in params])
        opt.load_state_dict(opt.state_dict())
        runs.append(params)
    for p, q in zip(*runs, strict=True):
        assert_same(p, q)


class Lamb(SGD):
    """A base with keywords of FusedSAM's names."""

    def __init__(self, params, lr=0.1, max_grad_norm=1.0, p=1, backend="own", flatten=False):
        super().__init__(params, lr=lr)
        self.given = max_grad_norm, p, backend, flatten


@pytest.mark.parametrize(
    "name, value", [("max_grad_norm", 2.0), ("p", 3.0), ("backend", "reference"), ("flatten", True)]
)
def test_keywords_that_are_the_bases_too(name, value):
    from functools import partial

    params = [Parameter(torch.ones(2))]
    with pytest.raises(ValueError, match=rf"\['{name}'\] are both FusedSAM's and Lamb's.*partial\(Lamb, {name}=.*inst"):
        FusedSAM(params, Lamb, **{name: value})
    assert FusedSAM(params, Lamb).base_optimizer.given == (1.0, 1, "own", False)
    theirs = FusedSAM(params, partial(Lamb, **{name: value}))
    assert value in theirs.base_optimizer.given
    assert value in FusedSAM(None, Lamb(params, **{name: value})).base_optimizer.given
    ours = FusedSAM(params, partial(Lamb), **{name: value})
    assert ours.base_optimizer.given == (1.0, 1, "own", False)
    if name in ("max_grad_norm", "p", "flatten"):
        assert getattr(ours, name) == value and getattr(theirs, name) != value
    FusedSAM(params, SGD, **{name: value})  # no keyword of SGD's


# Inference mode.


@pytest.mark.parametrize("what", ["prepare", "closure", "two calls", "base_step", "refresh", "all"])
@pytest.mark.parametrize("base", [SGD, AdamW, torch.optim.Rprop])
@pytest.mark.parametrize("kwargs", [{}, dict(flatten=True), dict(max_grad_norm=1.0)], ids=["plain", "flat", "clipped"])
def test_inference_mode(backend, device, base, what, kwargs):
    runs = []
    for inference in (False, True):
        p = Parameter(torch.ones(4, device=device))
        opt = FusedSAM([p], base, lr=0.1, rho=0.3, backend=backend, **kwargs)

        def closure(p=p):
            assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
            p.grad = None
            (p**3).sum().backward()

        if what in ("prepare", "all"):
            with torch.inference_mode(inference):
                opt.prepare()
        if what in ("closure", "all"):
            with torch.inference_mode(inference):
                opt.step(closure)
        if what in ("two calls", "all"):
            closure()
            with torch.inference_mode(inference):
                opt.first_step()
            closure()
            with torch.inference_mode(inference):
                opt.step()
        if what in ("base_step", "refresh"):
            closure()
            with torch.inference_mode(inference):
                opt.base_step(), opt.refresh()
        for _ in range(2):
            opt.step(closure)
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        opt.step(closure)
        if not runs:
            runs.append((opt, p))
        else:
            assert_same(p, runs[0][1])
            oracle.assert_same_state(opt, runs[0][0])


# Bases that exchange the weights themselves.


class ScheduleFree(SGD):
    """train() and eval() as of schedule-free optimizers."""

    def train(self): ...

    def eval(self): ...


def test_masters_of_weights_that_the_base_exchanges(backend, device):
    low, full = Parameter(torch.ones(2, device=device).bfloat16()), Parameter(torch.ones(2, device=device))
    for given in ([low], [full, low], [{"params": [full]}, {"params": [low]}]):
        with pytest.raises(ValueError, match=r"master_weights=True .* train\(\) and eval\(\) of ScheduleFree"):
            FusedSAM(given, ScheduleFree, lr=0.1, master_weights=True, backend=backend)
    opt = FusedSAM([full], ScheduleFree, lr=0.1, master_weights=True, backend=backend)  # no master then
    with pytest.raises(ValueError, match="train"):
        opt.add_param_group({"params": [low]})
    for kwargs in ({}, dict(stochastic_rounding=True)):
        opt = FusedSAM([low, full], ScheduleFree, lr=0.1, backend=backend, **kwargs)
        opt.step(lambda: [setattr(p, "grad", torch.ones_like(p)) for p in (low, full)])
    FusedSAM([low], SGD, lr=0.1, master_weights=True, backend=backend)
