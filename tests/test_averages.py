"""Averages of the weights: torch's AveragedModel is the oracle, and the weights always come back."""

from __future__ import annotations

import copy
import io

import cases
import pytest
import torch
from oracle import assert_same, bits
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fastsam
from fastsam import FusedSAM, methods, when

DECAY = 0.93
NAMES = ["matrix", "63", "transposed", "64", "never a gradient", "empty", "scalar", "1025", "channels_last"]
MOMENTUM = dict(lr=0.1, momentum=0.9, weight_decay=0.01)


class Holder(nn.Module):
    def __init__(self, params) -> None:
        super().__init__()
        self.params = nn.ParameterList(params)


def oracle_of(params, decay: float = DECAY) -> AveragedModel:
    return AveragedModel(Holder(params), multi_avg_fn=get_ema_multi_avg_fn(decay))


def averages_of(opt, params) -> list[torch.Tensor]:
    with opt.averaged_weights():
        return [param.detach().clone() for param in params]


def train(opt, params, first: int, last: int, names=NAMES, oracle=None) -> None:
    for step in range(first, last):
        opt.step(cases.closure_of(params, step, names))
        if oracle is not None:
            oracle.update_parameters(Holder(params))


EXACT = [
    ("sgd", torch.float32, MOMENTUM, NAMES),
    ("sgd", torch.complex64, MOMENTUM, NAMES),
    ("adamw", torch.float64, dict(lr=0.01, amsgrad=True), NAMES),
    ("adamax", torch.float32, dict(lr=0.01), NAMES),
    ("muon", torch.float32, dict(lr=0.02), cases.MATRICES),
]


@pytest.mark.filterwarnings(cases.NO_GRADIENTS)
@pytest.mark.parametrize("base, dtype, options, names", EXACT, ids=[f"{base} {dtype}" for base, dtype, *_ in EXACT])
def test_same_bits_as_torch(backend, device, base, dtype, options, names):
    params = cases.make_params(dtype, names, device=device)
    opt = FusedSAM([dict(params=params[::2], rho=0.3), dict(params=params[1::2], perturb=False)], base,
                   backend=backend, ema_decay=DECAY, **options)  # fmt: skip
    oracle = oracle_of(params)
    for step in range(cases.STEPS):
        opt.step(cases.closure_of(params, step, names))
        oracle.update_parameters(Holder(params))
        weights = [bits(param) for param in params]
        found = averages_of(opt, params)
        assert [bits(param) for param in params] == weights
        for average, expected, name in zip(found, oracle.module.params, names, strict=True):
            assert_same(average, expected, f"{name} in step {step}")
    for i, (param, name) in enumerate(zip(params, names, strict=True)):
        assert ("ema" in opt.state[param] if param in opt.state else False) == (name != "never a gradient")
        if name != "never a gradient":
            assert_same(opt.state[param]["ema"], oracle.module.params[i])
            assert opt.state[param]["ema"].stride() == param.stride()


def test_equal_weights_are_their_own_average(backend, device):
    params = cases.make_params(names=NAMES[:2], device=device)
    opt = FusedSAM(params, "sgd", lr=0.0, backend=backend, ema_decay=0.9999)
    for _ in range(50):
        opt.step(cases.closure_of(params, 0, NAMES[:2]))
    for average, param in zip(averages_of(opt, params), params, strict=True):
        assert_same(average, param)


PRECISE = {"plain": {}, "masters": dict(master_weights=True), "stochastic": dict(stochastic_rounding=True)}


@pytest.mark.parametrize("base, dtype", [("sgd", torch.bfloat16), ("adamax", torch.float16)])
@pytest.mark.parametrize("precision", PRECISE)
def test_16_bit_weights_are_averaged_in_float32(backend, device, precision, dtype, base):
    names = ["matrix", "63", "transposed"]
    params = cases.make_params(dtype, names, device=device)
    opt = FusedSAM(params, base, lr=0.1, backend=backend, ema_decay=0.999, **PRECISE[precision])
    expected = []
    for step in range(3):
        opt.step(cases.closure_of(params, step, names))
        source = [opt.state[p].get("master", p).detach().float() for p in params]
        expected = expected or [w.clone() for w in source]
        expected = [e.lerp(w, 1 - 0.999) for e, w in zip(expected, source, strict=True)]
    weights = [bits(param) for param in params]
    masters = [bits(opt.state[p]["master"]) for p in params] if precision == "masters" else []
    for param, average, rounded in zip(params, expected, averages_of(opt, params), strict=True):
        assert opt.state[param]["ema"].dtype == torch.float32
        assert_same(opt.state[param]["ema"], average)
        assert_same(rounded, average.to(dtype))
    assert [bits(param) for param in params] == weights
    again = FusedSAM(params, base, lr=0.1, backend=backend, ema_decay=0.999, **PRECISE[precision])
    again.load_state_dict(opt.state_dict())
    assert_same(again.state[params[0]]["ema"], expected[0])
    opt.step(cases.closure_of(params, 0, names))
    if masters:  # the exchange was no change of the weights
        again.step(cases.closure_of(params, 0, names))
        assert [bits(opt.state[p]["master"]) for p in params] != masters


def test_masters_survive_the_exchange():
    params, others = (cases.make_params(torch.bfloat16, NAMES[:2]) for _ in range(2))
    opts = [FusedSAM(p, "sgd", master_weights=True, ema_decay=0.9, **MOMENTUM) for p in (params, others)]
    for step in range(3):
        averages_of(opts[0], params)
        for opt, own in zip(opts, (params, others), strict=True):
            opt.step(cases.closure_of(own, 0, NAMES[:2]))
        for p, q in zip(params, others, strict=True):
            assert_same(opts[0].state[p]["master"], opts[1].state[q]["master"], f"step {step}")


def small(**options) -> tuple[nn.Module, FusedSAM]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    return model, FusedSAM(model.parameters(), "sgd", rho=0.1, **{**MOMENTUM, "ema_decay": DECAY, **options})


def backward(model: nn.Module, seed: int = 0, scaler=None) -> None:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
    loss = model(x).square().mean()
    (loss if scaler is None else scaler.scale(loss)).backward()


def take(model: nn.Module, opt, seed: int = 0) -> None:
    backward(model, seed)
    two = opt.first_step(zero_grad=True)
    if two:
        backward(model, seed)
    opt.second_step(zero_grad=True)


def state_of(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(p) for name, p in model.named_parameters()}


def test_the_weights_come_back_whatever_happens():
    model, opt = small()
    before = state_of(model)
    with opt.averaged_weights():  # there are none yet
        assert state_of(model) == before
    for seed in range(3):
        take(model, opt, seed)
    with torch.no_grad():
        model[0].weight[0, 0], model[0].weight[0, 1] = float("nan"), -0.0
    before = state_of(model)
    with pytest.raises(ArithmeticError), opt.averaged_weights():
        assert state_of(model) != before
        model[0].weight.data.zero_()
        raise ArithmeticError
    assert state_of(model) == before
    for enter in (torch.no_grad, torch.inference_mode):
        with enter(), opt.averaged_weights():
            averaged = state_of(model)
        assert state_of(model) == before
    saved, real = [], opt._write_weights

    def interrupted(pairs):
        real(list(pairs)[:1])
        if not saved:
            saved.append(1)
            raise KeyboardInterrupt

    opt._write_weights = lambda pairs: interrupted(pairs) if not saved else real(pairs)
    with pytest.raises(KeyboardInterrupt), opt.averaged_weights():
        pass
    assert state_of(model) == before and averaged != before
    del opt._write_weights
    take(model, opt)


REFUSED_WITHIN = {
    "first_step": lambda model, opt: opt.first_step(),
    "step(closure)": lambda model, opt: opt.step(lambda: backward(model)),
    "base_step": lambda model, opt: opt.base_step(),
    "state_dict": lambda model, opt: opt.state_dict(),
    "load_state_dict": lambda model, opt: opt.load_state_dict({}),
    "deepcopy": lambda model, opt: copy.deepcopy(opt),
    "add_param_group": lambda model, opt: opt.add_param_group(dict(params=[nn.Parameter(torch.ones(1))])),
    "copy_ema_to": lambda model, opt: opt.copy_ema_to(model, model),
    "averaged_weights": lambda model, opt: opt.averaged_weights().__enter__(),
}


@pytest.mark.parametrize("what", REFUSED_WITHIN)
def test_what_is_refused_within_the_block(what):
    model, opt = small()
    take(model, opt, 0)
    take(model, opt, 1)
    before = state_of(model)
    with opt.averaged_weights():
        within = state_of(model)
        with pytest.raises(RuntimeError, match=r"`with optimizer.averaged_weights\(\):`"):
            REFUSED_WITHIN[what](model, opt)
        assert state_of(model) == within != before
    assert state_of(model) == before
    opt.zero_grad()
    take(model, opt, 2)


def test_what_is_refused_elsewhere():
    model, opt = small()
    backward(model)
    opt.first_step()
    for refused in (lambda: opt.averaged_weights().__enter__(), lambda: opt.copy_ema_to(model, model)):
        with pytest.raises(RuntimeError, match="needs the unperturbed weights"):
            refused()
    with opt.unperturbed(), pytest.raises(RuntimeError, match=r"leave the `with optimizer.unperturbed\(\):`"):
        opt.averaged_weights().__enter__()
    opt.restore()
    model, opt = small(ema_decay=None)
    for refused in (lambda: opt.averaged_weights().__enter__(), lambda: opt.copy_ema_to(model, model)):
        with pytest.raises(RuntimeError, match="there are no averages .* ema_decay=0.999"):
            refused()
    for wrong in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"ema_decay must be in \[0, 1\)"):
            small(ema_decay=wrong)
    model, opt = small()
    opt.ema_decay = 1.5
    before = state_of(model)
    with pytest.raises(ValueError, match="ema_decay"):
        take(model, opt)
    assert state_of(model) == before and not opt.perturbed


@pytest.mark.parametrize("base", ["sgd", "adamax"])
def test_a_step_that_a_scaler_skips_counts_the_old_weights_again(base):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    opt = FusedSAM(model.parameters(), base, lr=0.05, rho=0.1, ema_decay=DECAY)
    oracle = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(5):
        backward(model, step, scaler)
        opt.first_step(zero_grad=True)
        backward(model, step, scaler)
        if step in (2, 3):
            model[0].weight.grad[0, 0] = float("inf")
        before = state_of(model[2])
        scaler.step(opt)
        scaler.update()
        assert (state_of(model[2]) == before) is False  # w + e is gone
        opt.zero_grad()
        oracle.update_parameters(model)
    for average, expected in zip(averages_of(opt, model.parameters()), oracle.module.parameters(), strict=True):
        assert_same(average, expected)


@pytest.mark.filterwarnings(cases.NO_GRADIENTS)
@pytest.mark.parametrize("base", ["adamw", "adamax"])
def test_resumed_half_way_bit_for_bit(backend, device, base):
    def build(own):
        return FusedSAM(own, base, rho=0.3, lr=0.01, backend=backend, ema_decay=DECAY)

    params = cases.make_params(names=NAMES, device=device)
    opt = build(params)
    train(opt, params, 0, 4)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    again = build(others)
    train(again, [nn.Parameter(p.detach().clone()) for p in params], 0, 0)
    again.load_state_dict(torch.load(file, weights_only=True))
    copied, copies = copy.deepcopy((opt, params))
    for each, own in ((opt, params), (again, others), (copied, copies)):
        train(each, own, 4, cases.STEPS)
    expected = averages_of(opt, params)
    for each, own in ((again, others), (copied, copies)):
        for average, other in zip(averages_of(each, own), expected, strict=True):
            assert_same(average, other)


def test_into_an_optimizer_that_took_steps_already():
    names = ["matrix", "64"]  # the second has no gradient before step 2
    params = cases.make_params(names=names)
    opt = FusedSAM(params, "sgd", ema_decay=DECAY, **MOMENTUM)
    train(opt, params, 0, 1, names)
    saved, weights = opt.state_dict(), [p.detach().clone() for p in params]
    live = cases.make_params(names=names, seed=1)
    other = FusedSAM(live, "sgd", ema_decay=DECAY, **MOMENTUM)
    train(other, live, 0, 3, names)
    with torch.no_grad():
        for p, w in zip(live, weights, strict=True):
            p.copy_(w)
    other.load_state_dict(saved)
    for each, own in ((opt, params), (other, live)):
        train(each, own, 1, 3, names)
    for a, b in zip(averages_of(opt, params), averages_of(other, live), strict=True):
        assert_same(a, b)


def test_checkpoints_of_others_and_for_others():
    model, opt = small()
    for seed in range(3):
        take(model, opt, seed)
    saved = opt.state_dict()
    torch.optim.SGD(model.parameters(), **MOMENTUM).load_state_dict(saved)
    _, plain = small(ema_decay=None)
    plain.load_state_dict(saved)
    assert all("ema" not in held for held in plain.state_dict()["state"].values())
    take(model, opt, 3)
    other, late = small()
    late.load_state_dict(plain.state_dict())
    take(other, late)
    assert [bits(a) for a in averages_of(late, other.parameters())] == list(state_of(other).values())


@pytest.mark.parametrize("flatten", [False, True])
def test_parameters_that_come_later_or_move(flatten):
    names = ["matrix", "63", "transposed"]
    params = cases.make_params(names=names)
    params[1].requires_grad_(False)
    opt = FusedSAM(params[:2], "sgd", ema_decay=DECAY, flatten=flatten, **MOMENTUM)
    oracle = oracle_of(params)

    def step(n: int) -> None:
        for i, p in enumerate(params):
            p.grad = cases.gradient(p, 10 * n + i) if p.requires_grad and (i < 2 or n > 2) else None
        opt.first_step()
        opt.step()
        oracle.update_parameters(Holder(params))

    for n in range(2):
        step(n)
    params[1].requires_grad_(True)
    step(2)
    opt.add_param_group(dict(params=params[2:], lr=0.3))
    step(3)
    if not flatten:
        params[0].data = params[0].data.clone()
    step(4)
    for average, expected in zip(averages_of(opt, params), oracle.module.params, strict=True):
        assert_same(average, expected)
    for p in params:
        p.data = p.data.double()
    oracle.double()
    step(5)
    for average, expected in zip(averages_of(opt, params), oracle.module.params, strict=True):
        assert_same(average, expected)


METHODS = {
    "WSAM": lambda p: methods.WSAM(p, "sgd", rho=0.2, ema_decay=DECAY, **MOMENTUM),
    "LookSAM": lambda p: methods.LookSAM(p, "sgd", rho=0.2, k=2, ema_decay=DECAY, **MOMENTUM),
    "every(2)": lambda p: FusedSAM(p, "sgd", rho=0.2, when=when.every(2), ema_decay=DECAY, **MOMENTUM),
    "MSAM": lambda p: methods.MSAM(p, "sgd", rho=0.2, ema_decay=DECAY, **MOMENTUM),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_averages_the_weights_it_steps_to(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    opt = METHODS[name](model.parameters())
    oracle = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    for seed in range(5):
        if name == "MSAM":
            backward(model, seed)
            opt.step()
            opt.zero_grad()
        else:
            take(model, opt, seed)
        with opt.unperturbed():
            oracle.update_parameters(model)
    before = state_of(model)
    for average, expected in zip(averages_of(opt, model.parameters()), oracle.module.parameters(), strict=True):
        assert_same(average, expected)
    assert state_of(model) == before
    if name == "MSAM":
        assert opt.training and opt.perturbed
        with opt.averaged_weights(), pytest.raises(RuntimeError, match="leave the"):
            opt.train()
        with opt.unperturbed(), pytest.raises(RuntimeError, match="leave the"):
            opt.averaged_weights().__enter__()
        assert opt.training and state_of(model) == before
        opt.eval()
        averages_of(opt, model.parameters())
        assert not opt.training and state_of(model) != before


def test_a_joint():
    model, _ = small()
    first, last = list(model[0].parameters()), list(model[1:].parameters())
    parts = [FusedSAM(half, "sgd", ema_decay=DECAY, **MOMENTUM) for half in (first, last)]
    opt = fastsam.joint(*parts)
    oracle = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    for seed in range(4):
        take(model, opt, seed)
        oracle.update_parameters(model)
    before, other = state_of(model), copy.deepcopy(model)
    opt.copy_ema_to(other, model)
    with opt.averaged_weights():
        assert state_of(model) == state_of(oracle.module) == state_of(other) != before
        with pytest.raises(RuntimeError, match="averaged_weights"):
            take(model, opt)
    assert state_of(model) == before
    opt.optimizers[1].ema_decay = None
    with pytest.raises(RuntimeError, match=r"optimizer 1 \(FusedSAM\) has no ema_decay"):
        opt.averaged_weights().__enter__()


def test_copies():
    model, opt = small()
    order = [*model[3].parameters(), *model[:3].parameters()]
    opt = FusedSAM(order, "sgd", ema_decay=DECAY, **MOMENTUM)
    other = copy.deepcopy(model).double()
    for seed in range(3):
        take(model, opt, seed)
    opt.copy_ema_to(other, model)
    with opt.averaged_weights():
        assert state_of(other.float()) == state_of(model)
    tensors = [torch.zeros_like(p) for p in order]
    opt.copy_ema_to(tensors)
    assert [bits(t) for t in tensors] == [bits(a) for a in averages_of(opt, order)]
    for args, message in [
        ((other,), "needs the model that is trained, too"),
        ((other[:3], model), "only one of them has 3.bias, 3.weight"),
        ((tensors[1:],), "a tensor for each of the 6 parameters, .* got 5"),
        ((tensors[::-1],), r"the parameters' shapes, got \[5\] for \[3, 5\] at place 0"),
    ]:
        with pytest.raises(ValueError, match=f"copy_ema_to.*{message}"):
            opt.copy_ema_to(*args)


def test_a_decay_that_warms_up_and_is_switched_on_late():
    model, opt = small(ema_decay=None)
    take(model, opt)
    expected = None
    for t in range(5):
        opt.ema_decay = min(0.999, (1 + t) / (10 + t))
        take(model, opt, t)
        weights = [p.detach().clone() for p in model.parameters()]
        if expected is None:
            expected = weights
        else:
            expected = [e.lerp(w, 1 - opt.ema_decay) for e, w in zip(expected, weights, strict=True)]
    assert [bits(a) for a in averages_of(opt, model.parameters())] == [bits(e) for e in expected]
    assert "ema" in opt.state_dict()["state"][0]


def test_a_graph_does_not_begin_them(monkeypatch):
    model, opt = small()
    opt.prepare()
    backward(model)
    opt.first_step()
    monkeypatch.setattr("fastsam.memory.averages.graphs.capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="begin with the first update.* take a step before the capture"):
        opt.step()
    assert not opt.perturbed


def test_what_it_costs():
    from benchmarks.traffic import Traffic

    moved = []
    for ema_decay in (None, DECAY):
        param = nn.Parameter(torch.ones(1000))
        with (counter := Traffic()).stand_in():
            opt = FusedSAM([param], "sgd", ema_decay=ema_decay, backend="reference", **MOMENTUM)
        for _ in range(3):
            param.grad = torch.ones(1000)
            counter.bytes = 0
            with counter:
                opt.first_step()
                opt.step()
        moved.append(counter.bytes / 1000)
    assert moved[1] - moved[0] == pytest.approx(12, abs=0.01)  # the weight, and the average read and written
