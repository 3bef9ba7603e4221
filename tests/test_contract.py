"""The public API: phases, closures, hooks, groups, backends, messages (CONTRACT.md section 1)."""

from __future__ import annotations

import inspect

import cases
import oracle
import pytest
import torch
from oracle import assert_same, bits
from torch.nn import Parameter
from torch.optim import SGD, AdamW

import fastsam
from fastsam import FusedSAM, ops

NAMES = ["matrix", "scalar", "63", "transposed"]
CONFIG = cases.Config("momentum", SGD, dict(lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.01, rho=0.3))


class Pair:
    """FusedSAM and SAM by hand side by side, on gradients that depend on the weights."""

    def __init__(self, backend: str, config: cases.Config = CONFIG, **kwargs):
        device = cases.device_of(backend)
        self.ours, self.theirs = cases.make_params(names=NAMES, device=device), cases.make_params(names=NAMES)
        self.opt, self.hand = cases.fused(self.ours, config, backend, **kwargs), cases.by_hand(self.theirs, config)

    def gradients(self, seed: int) -> None:
        for params in (self.ours, self.theirs):
            for i, p in enumerate(params):
                p.grad = cases.gradient(p, 100 * seed + i)

    def closure(self, seed: int):
        calls = iter(range(9))

        def closure() -> float:
            call = next(calls)
            for i, p in enumerate(self.ours):
                p.grad = cases.gradient(p, 100 * (seed + call) + i)
            return seed + call

        return closure

    def step_by_hand(self, first: int = 1, second: int = 2) -> None:
        for i, p in enumerate(self.theirs):
            p.grad = cases.gradient(p, 100 * first + i)
        self.hand.climb()
        for i, p in enumerate(self.theirs):
            p.grad = cases.gradient(p, 100 * second + i)
        self.hand.descend()

    def check(self) -> None:
        for name, a, b in zip(NAMES, self.ours, self.theirs, strict=True):
            torch.testing.assert_close(a.detach().cpu(), b.detach().cpu(), msg=lambda m, name=name: f"{name}: {m}")
        oracle.assert_same_state(self.opt, self.hand.base, lambda a, b, what: torch.testing.assert_close(a.cpu(), b))


@pytest.fixture
def pair(backend: str) -> Pair:
    return Pair(backend)


# the phase table: clean


def test_signature_is_drop_in():
    names = list(inspect.signature(FusedSAM.__init__).parameters)
    assert names[:5] == ["self", "params", "base_optimizer", "rho", "adaptive"]
    keyword_only = [p.name for p in inspect.signature(FusedSAM).parameters.values() if p.kind is p.KEYWORD_ONLY]
    steps = ["p", "perturb_with_weight_decay", "max_grad_norm"]
    precision = ["master_weights", "stochastic_rounding", "rounding_seed", "state_dtype"]
    late = ["flatten", "when", "radius", "renormalize", "ema_decay", "closure_calls", "norm_group", "backend"]
    assert keyword_only == ["eta", "perturb", *steps, *precision, *late]
    assert isinstance(FusedSAM([Parameter(torch.ones(2))], lr=0.1).base_optimizer, SGD)


def test_public_names(backend, device):
    opt = FusedSAM([Parameter(torch.ones(2, device=device))], SGD, lr=0.1, backend=backend)
    for name in (
        "first_step",
        "second_step",
        "step",
        "attach_second_pass",
        "restore",
        "base_step",
        "unperturbed",
        "refresh",
        "prepare",
        "stats",
        "check_capture",
        "flat_weights",
        "unflatten",
    ):
        assert callable(getattr(opt, name)) and getattr(FusedSAM, name).__doc__
    assert opt.perturbed is False
    opt.prepare(), opt.refresh()
    assert opt.backend == {torch.device(device): backend} or list(opt.backend.values()) == [backend]
    assert isinstance(fastsam.__version__, str)


def test_first_step_climbs_by_rho(pair):
    pair.gradients(1)
    before = [p.detach().clone() for p in pair.ours]
    assert pair.opt.first_step() is True  # there is a second pass
    assert pair.opt.perturbed is True
    moved = sum(float((p.detach() - w).double().square().sum()) for p, w in zip(pair.ours, before, strict=True))
    assert moved**0.5 == pytest.approx(0.3, rel=1e-5)
    assert all(p.grad is not None for p in pair.ours)


@pytest.mark.parametrize("finish", ["step", "second_step"])
def test_two_calls(pair, finish):
    for _ in range(3):
        pair.gradients(1)
        pair.opt.first_step(zero_grad=True)
        assert all(p.grad is None for p in pair.ours)
        for i, p in enumerate(pair.ours):
            p.grad = cases.gradient(p, 200 + i)
        if finish == "step":
            pair.opt.step()
        else:
            pair.opt.second_step(zero_grad=True)
            assert all(p.grad is None for p in pair.ours)
        assert pair.opt.perturbed is False
        pair.step_by_hand()
    pair.check()


def test_step_with_a_closure_calls_it_twice_and_returns_the_first_loss(pair):
    closure = pair.closure(1)
    assert pair.opt.step(closure) == 1
    assert closure() == 3, "two calls went before"
    pair.step_by_hand()
    for p in pair.ours:
        p.grad = None
    pair.check()


@pytest.mark.filterwarnings(cases.NO_GRADIENTS)
def test_closure_runs_with_gradients_enabled(pair):
    seen = []
    with torch.no_grad():
        pair.opt.step(lambda: seen.append(torch.is_grad_enabled()))
    assert seen == [True, True]


def test_closure_calls_1_takes_the_gradients_that_are_there(backend):
    pair = Pair(backend, closure_calls=1)
    pair.gradients(1)
    assert pair.opt.step(pair.closure(2)) == 2
    assert not pair.opt.perturbed
    pair.step_by_hand()
    pair.check()


@pytest.mark.filterwarnings(cases.NO_GRADIENTS)
def test_first_step_without_any_gradient_is_perturbed_too(pair):
    before = [bits(p) for p in pair.ours]
    pair.opt.first_step()
    assert pair.opt.perturbed
    pair.opt.second_step()
    assert [bits(p) for p in pair.ours] == before


def test_clean_step_without_gradients_does_nothing(pair):
    before = [bits(p) for p in pair.ours]
    pair.opt.step(), pair.opt.second_step()
    assert [bits(p) for p in pair.ours] == before


@pytest.mark.parametrize("base, keys", [(SGD, {"momentum_buffer"}), (AdamW, {"step", "exp_avg", "exp_avg_sq"})])
def test_clean_step_with_all_lr_0_makes_the_state(backend, device, base, keys):
    options = dict(momentum=0.9) if base is SGD else {}
    params = cases.make_params(names=NAMES, device=device)
    opt = FusedSAM(params, base, lr=0.0, backend=backend, **options)
    before = [bits(p) for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    opt.step()
    assert [bits(p) for p in params] == before
    assert [set(entry) for entry in oracle.saved_state(opt).values()] == [keys] * len(params)


def test_clean_step_with_gradients_raises_with_the_recipe(pair):
    pair.gradients(1)
    before = [bits(p) for p in pair.ours]
    for step in (pair.opt.step, pair.opt.second_step):
        with pytest.raises(RuntimeError, match="(?s)first_step.*closure|closure.*first_step"):
            step()
    assert [bits(p) for p in pair.ours] == before


def test_restore_and_base_step_when_clean(pair):
    pair.opt.restore()
    pair.gradients(1)
    pair.opt.base_step()
    pair.hand.base.step()
    pair.check()


# the phase table: perturbed


def test_first_step_twice_warns_and_starts_again(pair):
    pair.gradients(5)
    pair.opt.first_step()
    for i, p in enumerate(pair.theirs):
        p.grad = cases.gradient(p, 100 + i)
    for p, q in zip(pair.ours, pair.theirs, strict=True):
        p.grad = q.grad.to(p.device)
    with pytest.warns(UserWarning, match="first_step"):
        pair.opt.first_step()
    pair.hand.climb()
    for p, q in zip(pair.ours, pair.theirs, strict=True):
        torch.testing.assert_close(p.detach().cpu(), q.detach())
    pair.gradients(2)
    pair.opt.second_step(), pair.hand.descend()
    pair.check()


def test_perturbed_step_with_a_closure_calls_it_once(pair):
    pair.gradients(1)
    pair.opt.first_step()
    assert pair.opt.step(pair.closure(2)) == 2
    pair.step_by_hand()
    pair.check()


def test_restore_brings_the_weights_back_and_leaves_the_state(pair):
    pair.opt.step(pair.closure(1))
    before, state = (
        [bits(p) for p in pair.ours],
        [bits(e["momentum_buffer"]) for e in oracle.saved_state(pair.opt).values()],
    )
    pair.gradients(4)
    pair.opt.first_step()
    assert [bits(p) for p in pair.ours] != before
    pair.opt.restore()
    assert not pair.opt.perturbed and [bits(p) for p in pair.ours] == before
    assert [bits(e["momentum_buffer"]) for e in oracle.saved_state(pair.opt).values()] == state


def test_base_step_while_perturbed_raises(pair):
    pair.gradients(1)
    pair.opt.first_step()
    with pytest.raises(RuntimeError, match="base_step"):
        pair.opt.base_step()


def test_unperturbed_shows_the_old_weights_and_puts_the_perturbation_back(pair):
    before = [bits(p) for p in pair.ours]
    with pair.opt.unperturbed():
        assert [bits(p) for p in pair.ours] == before
    pair.gradients(1)
    pair.opt.first_step()
    perturbed = [bits(p) for p in pair.ours]
    with pair.opt.unperturbed():
        assert [bits(p) for p in pair.ours] == before
        pair.opt.state_dict()
    assert pair.opt.perturbed and [bits(p) for p in pair.ours] == perturbed
    pair.gradients(2)
    pair.opt.second_step()
    pair.step_by_hand()
    pair.check()


def test_unperturbed_survives_an_exception_inside(pair):
    pair.gradients(1)
    pair.opt.first_step()
    perturbed = [bits(p) for p in pair.ours]
    with pytest.raises(KeyError), pair.opt.unperturbed():
        raise KeyError
    assert pair.opt.perturbed and [bits(p) for p in pair.ours] == perturbed


# weights that the user writes between the passes are the user's


@pytest.mark.parametrize("door", ["first_step", "exception"])
def test_weights_written_between_the_passes_are_kept(pair, door):
    def write():
        with torch.no_grad():
            for p in pair.ours:
                p.fill_(0.25)

    pair.gradients(1)
    pair.opt.first_step()
    with pytest.warns(UserWarning) as caught:
        if door == "first_step":
            write()
            for p in pair.ours:
                p.grad = None
            pair.opt.first_step()
        else:

            def closure():
                write()
                raise KeyError("mine")

            with pytest.raises(KeyError, match="mine"):
                pair.opt.step(closure)
    assert sum("they are kept" in str(w.message) for w in caught) == 1
    for p in pair.ours:
        assert_same(p, torch.full_like(p, 0.25))


# closures that do not zero


def test_a_closure_that_does_not_zero_is_found_out(backend, device):
    model = cases.small_model().to(device)
    x, y = (t.to(device) for t in cases.batch())
    opt = FusedSAM(model.parameters(), SGD, lr=0.1, backend=backend)
    before = [bits(p) for p in model.parameters()]
    with pytest.raises(RuntimeError, match="(?s)clear.*closure_calls=1"):
        opt.step(lambda: (model(x) - y).pow(2).mean().backward())
    assert not opt.perturbed and [bits(p) for p in model.parameters()] == before


def test_a_closure_that_stops_clearing_is_found_out(pair):
    opt = pair.opt

    def closure():
        opt.zero_grad(set_to_none=False)
        for p in pair.ours:
            p.grad = torch.ones_like(p) if p.grad is None else p.grad.add_(1.0)

    def adds():
        for p in pair.ours:
            p.grad.add_(1.0)

    for _ in range(5):
        opt.step(closure)
    before = [bits(p) for p in pair.ours]
    with pytest.raises(RuntimeError, match="does not clear"):
        for _ in range(2):  # noticed by another number of writes in the first, and found out in the second
            before = [bits(p) for p in pair.ours]
            opt.step(adds)
    assert not opt.perturbed and [bits(p) for p in pair.ours] == before


@pytest.mark.parametrize("set_to_none", [True, False])
def test_closures_that_zero_are_not(backend, device, set_to_none):
    model = cases.small_model().to(device)
    x, y = (t.to(device) for t in cases.batch())
    opt = FusedSAM(model.parameters(), SGD, lr=0.1, backend=backend)

    def closure():
        opt.zero_grad(set_to_none=set_to_none)
        (model(x) - y).pow(2).mean().backward()

    for _ in range(3):
        opt.step(closure)


# hooks, groups, adoption


@pytest.mark.parametrize("way", ["closure", "first_step/step", "first_step/second_step", "base_step"])
def test_hooks_run_once_a_sam_step(pair, way):
    calls = []
    pair.opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    pair.opt.register_step_post_hook(lambda *_: calls.append("post") or calls.append(pair.opt.perturbed))
    if way == "closure":
        pair.opt.step(pair.closure(1))
    else:
        pair.gradients(1)
        if way == "base_step":
            pair.opt.base_step()
        else:
            pair.opt.first_step()
            (pair.opt.step if way.endswith("/step") else pair.opt.second_step)()
    assert calls == ["pre", "post", False]


@pytest.mark.parametrize("base", [SGD, AdamW, torch.optim.RMSprop])
def test_groups_hold_the_base_s_keys_and_four_of_ours(base):
    p = Parameter(torch.ones(2))
    opt, plain = FusedSAM([p], base, lr=0.1), base([p], lr=0.1)
    ours = {"rho", "adaptive", "eta", "perturb"}
    assert set(opt.param_groups[0]) == set(plain.param_groups[0]) | ours
    assert ours | set(plain.defaults) <= set(opt.defaults)
    assert opt.param_groups[0]["rho"] == 0.05 and opt.param_groups[0]["eta"] == 0.0
    assert opt.base_optimizer.param_groups[0] is opt.param_groups[0]


@pytest.mark.parametrize(
    "base, options", [(SGD, dict(foreach=True)), (AdamW, dict(capturable=True)), (SGD, dict(fused=True))]
)
def test_flags_of_the_base_reach_its_groups(base, options):
    opt = FusedSAM([Parameter(torch.ones(2))], base, lr=0.1, **options)
    key, value = next(iter(options.items()))
    assert opt.param_groups[0][key] is value and opt.defaults[key] is value


def test_a_wrapper_that_copies_the_attributes_shares_the_phase(pair):
    # Fabric does so: reads fall through to the copy, writes land on the wrapper.
    class Wrapper:
        def __init__(self, optimizer):
            self.__dict__ = dict(optimizer.__dict__)
            self.__class__ = type("Wrapped", (Wrapper, type(optimizer)), {})

    wrapper = Wrapper(pair.opt)
    for first, second in ((wrapper, pair.opt), (pair.opt, wrapper)):
        pair.gradients(1)
        first.first_step()
        assert second.perturbed
        pair.gradients(2)
        second.step()
        assert not first.perturbed
        pair.step_by_hand()
    pair.check()


def test_a_base_instance_is_adopted(backend):
    pair = Pair(backend)
    base = SGD(pair.ours, lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.01)
    group, state = base.param_groups[0], base.state
    pair.gradients(1)
    base.step(), pair.hand.base.step()
    pair.opt = FusedSAM(None, base, rho=0.3, backend=backend)
    assert pair.opt.base_optimizer is base and pair.opt.param_groups[0] is group and pair.opt.state is state
    for _ in range(2):
        pair.opt.step(pair.closure(1))
        pair.step_by_hand()
    pair.check()


def test_a_base_instance_with_its_own_parameters_named(backend):
    p = Parameter(torch.ones(3))
    base = SGD([p], lr=0.1)
    assert FusedSAM([p], base).base_optimizer is base
    with pytest.raises(ValueError, match="param"):
        FusedSAM([Parameter(torch.ones(3))], base)
    with pytest.raises((TypeError, ValueError), match="momentum"):
        FusedSAM(None, base, momentum=0.9)


def test_asam_groups_split_by_name():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    opt = FusedSAM(fastsam.asam_groups(model, rho=0.7, eta=0.02), SGD, lr=0.1)
    group_of = {p: group for group in opt.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert group_of[p]["adaptive"] is ("weight" in name), name
        assert group_of[p]["rho"] == 0.7
    assert all(group["eta"] == 0.02 for group in opt.param_groups if group["adaptive"])
    assert {g["rho"] for g in fastsam.asam_groups(model)} == {0.5}


# backends


@pytest.mark.parametrize("name", ops.NAMES)
def test_backend_is_available(name):
    reason = ops.backends()[name]
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    assert name in {param.values[0] for param in cases.BACKENDS}


def test_backend_by_environment(monkeypatch):
    p = Parameter(torch.ones(3))
    monkeypatch.setenv("FASTSAM_BACKEND", "reference")
    opt = FusedSAM([p], SGD, lr=0.1)
    opt.prepare()
    assert set(opt.backend.values()) == {"reference"}
    monkeypatch.setenv("FASTSAM_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        FusedSAM([p], SGD, lr=0.1)
    assert FusedSAM([p], SGD, lr=0.1, backend="reference"), "an explicit backend is not replaced"


def test_backend_that_cannot_serve():
    with pytest.raises(ValueError, match="'abc'"):
        FusedSAM([Parameter(torch.ones(3))], SGD, lr=0.1, backend="abc")
    with pytest.raises(ValueError, match="cuda"):
        FusedSAM([Parameter(torch.ones(3))], SGD, lr=0.1, backend="cuda").prepare()


ERRORS = [
    (dict(rho=-0.1), ValueError, r"rho must be >= 0, got -0\.1"),
    (dict(rho=float("nan")), ValueError, "rho"),
    (dict(eta=-1.0), ValueError, r"eta must be >= 0, got -1\.0"),
    (dict(closure_calls=3), ValueError, "closure_calls"),
    (dict(differentiable=True), (TypeError, ValueError), "differentiable"),
    (dict(lr=-1.0), ValueError, "learning rate"),
    (dict(momentums=0.9), TypeError, "momentums"),
]


@pytest.mark.parametrize(
    "options, error, message", ERRORS, ids=[next(iter(e[0])) + str(i) for i, e in enumerate(ERRORS)]
)
def test_errors_say_who_what_and_which(options, error, message):
    with pytest.raises(error, match=message):
        FusedSAM([Parameter(torch.ones(3))], SGD, **{"lr": 0.1, **options})


def test_errors_of_groups():
    with pytest.raises(ValueError, match="rho must be >= 0, got -2"):
        FusedSAM([dict(params=[Parameter(torch.ones(3))], rho=-2)], SGD, lr=0.1)
    opt = FusedSAM([Parameter(torch.ones(3))], SGD, lr=0.1)
    with pytest.raises(ValueError, match="rho must be >= 0, got -3"):
        opt.add_param_group(dict(params=[Parameter(torch.ones(3))], rho=-3))


def test_a_first_step_while_a_graph_is_captured_is_refused_and_prepare_makes_up_for_it(backend, device, monkeypatch):
    p = Parameter(torch.ones(70, device=device))
    p.grad = torch.ones_like(p)
    opt = FusedSAM([p], torch.optim.SGD, rho=0.1, lr=0.5, momentum=0.9, backend=backend)
    with monkeypatch.context() as patch:
        patch.setattr("fastsam.ops.graphs.capturing", lambda device: True)
        with pytest.raises(RuntimeError, match=r"optimizer\.prepare\(\)"):
            opt.first_step()
    assert (p == 1).all()
    opt.prepare()
    opt.first_step()
    opt.step()
    assert (p == 0.5).all()


def test_a_graph_whose_kernels_know_no_momentum_is_outdated_when_it_comes(monkeypatch):
    """The captured kernel has no code for such a group, which would stay where the first pass brought it."""
    p = Parameter(torch.ones(70))
    p.grad = torch.ones_like(p)
    opt = FusedSAM([p], torch.optim.SGD, rho=0.1, lr=0.5, momentum=0.9)
    opt.first_step()
    opt.step()
    opt.param_groups[0]["momentum"] = 0.0
    with monkeypatch.context() as patch:
        patch.setattr("fastsam.ops.graphs.capturing", lambda device: True)
        with pytest.raises(RuntimeError, match="capture with backend="):  # on a CPU; but the attempt counts
            opt.first_step()
    opt.param_groups[0]["lr"] = 0.25
    opt.refresh()
    opt.param_groups[0]["momentum"] = 0.9
    with pytest.raises(RuntimeError, match="momentum, amsgrad or perturb switched.*capture it again"):
        opt.refresh()
    with pytest.raises(RuntimeError, match="capture it again"):
        opt.check_capture()
