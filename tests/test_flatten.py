"""flatten=True: the same bits from one buffer, what leaves it or must stay outside, and the way back."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref

import cases
import oracle
import pytest
import torch
from cases import NAMES
from oracle import bits
from safetensors.torch import load_file, load_model, save_file, save_model
from test_lost_nothing import NoMemory, closure_of_ones
from torch.nn import Parameter
from torch.optim import SGD, AdamW

from fastsam import FusedSAM
from fastsam.memory import flat
from fastsam.ops.tables import ALIGN

pytestmark = pytest.mark.filterwarnings(cases.NO_GRADIENTS)
TRIED = "groups asam_eta adamw_groups rmsprop_groups adagrad_groups nadam_groups radam_groups lion_groups".split()
CONFIGS = [c for c in cases.CONFIGS if c.name in TRIED]
MOMENTUM = next(c for c in cases.CONFIGS if c.name == "momentum")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
PRECISIONS = [dict(master_weights=True), dict(stochastic_rounding=True, rounding_seed=7)]
STAYS = "flatten=True leaves"
LEFT = "no longer in the flat buffer"
MADE: list[weakref.ref[torch.Tensor]] = []  # filled by `memory`


def picture(opt, params) -> list[bytes]:
    """Every bit of weights and state."""
    state = [torch.as_tensor(value) for entry in oracle.saved_state(opt).values() for value in entry.values()]
    return [bits(t) for t in [*params, *state]]


def pages_of(opt, param) -> list[int]:
    """Where the optimizer's buffers that hold a parameter begin."""
    start, end = param.data_ptr(), param.data_ptr() + param.nbytes
    return [b.data_ptr() for b in opt.flat_weights() if b.data_ptr() <= start and end <= b.data_ptr() + b.nbytes]


def own_storages(params) -> bool:
    """Whether each storage holds its parameter alone."""
    storages = [p.untyped_storage() for p in params if p.numel()]
    alone = all(s.nbytes() == p.nbytes for s, p in zip(storages, (p for p in params if p.numel()), strict=True))
    return alone and len({s.data_ptr() for s in storages}) == len(storages)


def is_flat(opt, params) -> bool:
    """Whether the optimizer's buffers hold these parameters, none is without any, and each has a storage of its own."""
    pages = [pages_of(opt, p) for p in params if p.numel()]
    used, all_pages = {page for found in pages for page in found}, [b.data_ptr() for b in opt.flat_weights()]
    return all(len(found) == 1 for found in pages) and bool(used) and used == {*all_pages} and own_storages(params)


def stands_alone(params) -> bool:
    """Whether each parameter has memory of its own: a storage that holds it alone, and not over any buffer."""
    params, buffers = list(params), [buffer for ref in MADE if (buffer := ref()) is not None]
    starts = [(buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes) for buffer in buffers]
    return own_storages(params) and not any(a <= p.data_ptr() < b for p in params if p.numel() for a, b in starts)


def fused(params, backend, flatten=True, **options):
    options = dict(dict(rho=0.3, lr=0.1, momentum=0.9), **options)
    return FusedSAM(params, options.pop("base", SGD), backend=backend, flatten=flatten, **options)


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    """Weak references to the tensors whose memory the buffers are; torch keeps these as long as the memory."""
    page = flat.page

    def noting(*args):
        whole, pieces = page(*args)
        MADE.append(weakref.ref(whole))
        return whole, pieces

    monkeypatch.setattr(flat, "page", noting)
    MADE.clear()
    return MADE


@pytest.fixture
def trained(backend, device):
    """A flat model that took a step, its optimizer, and a step function that leaves gradients behind."""
    model = cases.small_model().to(device)
    opt = fused(model.parameters(), backend)

    def step(opt=opt, model=model):
        opt.step(model_closure(model, opt))

    step()
    return model, opt, step


def model_closure(model, opt):
    x, y = (t.to(next(model.parameters())) for t in cases.batch())

    def closure():
        opt.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    return closure


# the same numbers


def check_same_bits(backend, device, config, dtype, names=NAMES, **options):
    flat, plain = (cases.make_params(dtype, names, device=device) for _ in range(2))
    opt, other = (
        cases.fused(flat, config, backend, flatten=True, **options),
        cases.fused(plain, config, backend, **options),
    )
    opt.prepare()
    places = [(p.data_ptr(), p.stride(), p.shape) for p in flat]
    for step in range(cases.STEPS):
        opt.step(cases.closure_of(flat, step, names)), other.step(cases.closure_of(plain, step, names))
        assert picture(opt, flat) == picture(other, plain)
        assert [p._version for p in flat] == [p._version for p in plain]
    assert [(p.data_ptr(), p.stride(), p.shape) for p in flat] == places and is_flat(opt, flat)
    assert [p.stride() for p in flat] == [p.stride() for p in plain]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", **cases.ids(CONFIGS))
def test_the_same_bits_as_without_it(backend, device, config, dtype):
    check_same_bits(backend, device, config, dtype)


@pytest.mark.parametrize("options", PRECISIONS, ids=lambda options: next(iter(options)))
@pytest.mark.parametrize("config", **cases.ids([MOMENTUM, *(c for c in CONFIGS if c.name == "adamw_groups")]))
def test_with_masters_and_stochastic_rounding(backend, device, config, options):
    check_same_bits(backend, device, config, torch.bfloat16, **options)


@pytest.mark.parametrize("foreach", [None, False, True])
def test_the_base_s_own_options(backend, device, foreach):
    options = dict(MOMENTUM.options, foreach=foreach)
    check_same_bits(backend, device, MOMENTUM._replace(options=options), torch.float32)


@pytest.mark.parametrize("options", [{}, PRECISIONS[0]], ids=["plain", "masters"])
@pytest.mark.parametrize("config", **cases.ids(cases.UNFUSED))
def test_bases_that_step_by_themselves(backend, device, config, options):
    dtype = torch.bfloat16 if options else torch.float32
    check_same_bits(backend, device, config, dtype, cases.MATRICES, **options)


def test_under_a_grad_scaler(backend, device):
    def run(flatten):
        params = cases.make_params(names=["matrix", "63"], device=device)
        opt = fused(params, backend, flatten)
        scaler = torch.amp.GradScaler(device, init_scale=8.0, growth_interval=2)
        for step in range(4):
            for pass_ in (1, 2):
                for i, p in enumerate(params):
                    p.grad = scaler.scale(cases.gradient(p, 10 * step + 2 * pass_ + i))
                if step == 2:
                    params[0].grad[0, 0] = torch.inf
                opt.first_step() if pass_ == 1 else scaler.step(opt)
            scaler.update()
        return picture(opt, params)

    assert run(True) == run(False)


# one buffer


@pytest.mark.parametrize("options", [{}, *PRECISIONS], ids=["plain", "masters", "stochastic"])
def test_one_buffer_for_each_dtype(backend, device, options):
    params = [*cases.make_params(device=device), *cases.make_params(torch.bfloat16, device=device, seed=1)]
    values, strides, versions = [bits(p) for p in params], [p.stride() for p in params], [p._version for p in params]
    ids = [id(p) for p in params]
    opt = fused(params, backend, **options)
    assert opt.flat_weights() == [] and stands_alone(params), "nothing is moved before it is needed"
    opt.prepare()
    pages = opt.flat_weights()
    assert [page.dtype for page in pages] == [torch.float32, torch.bfloat16] and is_flat(opt, params)
    for page in pages:
        members = [p for p in params if p.dtype == page.dtype and p.numel()]
        starts = [-(-p.numel() // ALIGN) * ALIGN for p in members]
        assert page.is_contiguous() and page.dim() == 1 and page.numel() == sum(starts)
        offsets = [(p.data_ptr() - page.data_ptr()) // p.element_size() for p in members]
        assert offsets == [sum(starts[:i]) for i in range(len(starts))]
        assert [(p.storage_offset(), p._base) for p in members] == [(0, None)] * len(members)
        assert int(page.count_nonzero()) == sum(int(p.count_nonzero()) for p in members), "zeros between"
    assert [bits(p) for p in params] == values and [p.stride() for p in params] == strides
    assert [p._version for p in params] == versions and not any(p._is_view() for p in params)
    held = opt.param_groups[0]["params"]
    assert all(type(p) is Parameter and p.is_leaf and p.requires_grad for p in params)
    assert [id(p) for p in held] == ids and [p.grad for p in params] == [None] * len(params)


def test_a_write_to_the_buffer_is_one_to_the_weights_and_back(trained):
    model, opt, _ = trained
    with torch.no_grad():
        opt.flat_weights()[0].mul_(0.5)
    before = [p.detach().clone() for p in model.parameters()]
    opt.flat_weights()[0].mul_(2.0)
    for p, half in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, 2 * half)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(3.0)
    (page,) = opt.flat_weights()
    assert page.unique().tolist() == [0.0, 3.0] and int(page.count_nonzero()) == sum(
        p.numel() for p in model.parameters()
    )


def test_the_memory_lives_as_long_as_a_weight_in_it(memory, backend, device):
    model = cases.small_model().to(device)
    opt = fused(model.parameters(), backend)
    opt.prepare()
    before = [bits(p) for p in model.parameters()]
    del opt
    gc.collect()
    (page,) = memory
    assert page() is not None and [bits(p) for p in model.parameters()] == before
    opt = fused(model.parameters(), backend)  # nobody else needs that buffer any more
    opt.prepare()
    gc.collect()
    assert page() is None and is_flat(opt, list(model.parameters()))
    assert [bits(p) for p in model.parameters()] == before
    last = model[2].bias
    del model, opt
    gc.collect()
    assert memory[1]() is not None and bits(last) == before[-1]
    del last
    gc.collect()
    assert memory[1]() is None


def test_nobody_can_resize_the_memory_of_all(trained):
    model, opt, step = trained
    for t in (next(model.parameters()), opt.flat_weights()[0]):
        with pytest.raises(RuntimeError, match="not resizable"):
            t.untyped_storage().resize_(0)
    step()
    assert is_flat(opt, list(model.parameters()))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")  # torch's own deprecations while it traces
def test_a_compiled_model_follows_its_weights_into_the_buffer(backend, device, compiler):
    def run(flatten):
        torch._dynamo.reset()
        model = cases.small_model().to(device)
        compiled = torch.compile(model, backend=compiler)
        opt = fused(model.parameters(), backend, flatten)
        losses = [opt.step(model_closure(compiled, opt)).item() for _ in range(3)]
        opt.zero_grad()
        before = model_closure(compiled, opt)().item()
        for page in opt.flat_weights() if flatten else model.parameters():
            page.data.mul_(0.5)
        return [*losses, before, model_closure(compiled, opt)().item()], picture(opt, list(model.parameters()))

    assert run(True) == run(False)


def test_gradients_and_graphs_of_before_stay(backend, device):
    def run(flatten):
        torch.manual_seed(3)
        model = torch.nn.Linear(5, 7).to(device)
        opt = fused(model.parameters(), backend, flatten)
        x = torch.ones(2, 5, device=device, requires_grad=True)
        loss = model(x).pow(2).sum()
        loss.backward(retain_graph=True)
        grads = [p.grad for p in model.parameters()]
        opt.prepare()
        assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
        (again,) = torch.autograd.grad(loss, x, retain_graph=True)
        assert torch.equal(again, x.grad)
        opt.first_step()
        assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        opt.second_step()
        return [bits(p) for p in model.parameters()]

    assert run(True) == run(False)


def test_exact_restore(backend, device):
    params = cases.make_params(device=device)
    opt = fused(params, backend, lr=0.0)
    before = [bits(p) for p in params]
    for step in range(cases.STEPS):
        opt.step(cases.closure_of(params, step))
        assert [bits(p) for p in params] == before
    cases.set_gradients(params, 0, 1)
    opt.first_step()
    perturbed = [bits(p) for p in params]
    assert perturbed != before
    with opt.unperturbed():
        assert [bits(p) for p in params] == before
    assert [bits(p) for p in params] == perturbed
    opt.restore()
    assert [bits(p) for p in params] == before and is_flat(opt, params)


def test_a_second_optimizer_leaves_the_buffer_to_the_first(trained, backend):
    model, opt, step = trained
    places = [p.data_ptr() for p in model.parameters()]
    second = fused(model.parameters(), backend)
    with pytest.warns(UserWarning, match=rf"{STAYS} 4 of 4 .*another FusedSAM, whose unflatten\(\)"):
        second.step(model_closure(model, second))
    assert [p.data_ptr() for p in model.parameters()] == places and second.flat_weights() == []
    assert is_flat(opt, list(model.parameters()))
    opt.unflatten()
    third = fused(model.parameters(), backend)
    third.step(model_closure(model, third))
    assert is_flat(third, list(model.parameters()))


# saved, loaded, copied


@pytest.mark.parametrize("saver", [True, False], ids=["from flat", "from plain"])
@pytest.mark.parametrize("config", **cases.ids([MOMENTUM, *(c for c in CONFIGS if c.name == "adamw_groups")]))
def test_checkpoints_go_both_ways(backend, device, config, saver):
    a, b = cases.make_params(device=device), cases.make_params(device=device, seed=9)
    one, other = (cases.fused(p, config, backend, flatten=f) for p, f in ((a, saver), (b, not saver)))
    for step in range(4):
        one.step(cases.closure_of(a, step))
    other.step(cases.closure_of(b, 0))
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    oracle.hand_over(a, b)
    other.load_state_dict(torch.load(file, weights_only=True))
    for step in range(4, 8):
        one.step(cases.closure_of(a, step)), other.step(cases.closure_of(b, step))
    assert picture(one, a) == picture(other, b)
    assert is_flat(*((one, a) if saver else (other, b))) and stands_alone(b if saver else a)
    assert set(one.state_dict()["param_groups"][0]) == set(other.state_dict()["param_groups"][0])


@pytest.mark.parametrize("options", [{}, PRECISIONS[0]], ids=["plain", "masters"])
def test_the_model_s_load_state_dict_writes_into_the_buffer(backend, device, options):
    def run(flatten):
        model, source = (cases.small_model(seed).to(device, torch.bfloat16) for seed in (0, 1))
        opt = fused(model.parameters(), backend, flatten, **options)
        opt.step(model_closure(model, opt))
        places = [p.data_ptr() for p in model.parameters()]
        model.load_state_dict(source.state_dict())
        for _ in range(2):
            opt.step(model_closure(model, opt))
        assert [p.data_ptr() for p in model.parameters()] == places
        return picture(opt, list(model.parameters()))

    assert run(True) == run(False)


def test_safetensors_writes_and_loads_every_weight(trained, tmp_path):
    model, opt, step = trained
    plain = copy.deepcopy(model)
    expected = {name: bits(t) for name, t in plain.state_dict().items()}
    for name, source in (("flat", model), ("plain", plain)):
        save_model(source, tmp_path / f"{name} model")
        save_file(source.state_dict(), tmp_path / f"{name} dict")
    for kind in ("model", "dict"):
        assert (tmp_path / f"flat {kind}").read_bytes() == (tmp_path / f"plain {kind}").read_bytes()
        assert {name: bits(t) for name, t in load_file(tmp_path / f"flat {kind}").items()} == expected
    places = [p.data_ptr() for p in model.parameters()]
    step()
    assert {name: bits(t) for name, t in model.state_dict().items()} != expected
    load_model(model, tmp_path / "flat model")
    assert {name: bits(t) for name, t in model.state_dict().items()} == expected
    assert [p.data_ptr() for p in model.parameters()] == places and is_flat(opt, list(model.parameters()))


def test_nothing_takes_two_weights_for_one(trained):
    """Accelerate and transformers leave out all but one of the tensors that are alike in this."""
    model, opt, _ = trained
    storages = [t.untyped_storage() for t in model.state_dict().values()]
    assert is_flat(opt, list(model.parameters()))
    assert len({(s.device, s.data_ptr(), s.nbytes()) for s in storages}) == len(storages) == 4


@pytest.mark.parametrize("dump", [pickle.dumps, lambda value: written(value).getbuffer()], ids=["pickle", "torch.save"])
def test_what_is_saved_takes_no_other_weight_along(trained, dump):
    model, _, _ = trained
    plain = copy.deepcopy(model)
    for ours, theirs in ((model[2].bias, plain[2].bias), (model[2], plain[2]), (model, plain)):
        assert len(dump(ours)) <= 1.1 * len(dump(theirs))


def through_pickle(both):
    return pickle.loads(pickle.dumps(both))


def written(value) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def through_torch_save(both):
    return torch.load(written(both), weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, through_pickle, through_torch_save])
def test_copies_flatten_again(trained, way):
    model, opt, step = trained
    model[2].bias.requires_grad_(False)
    model[2].bias.grad = None  # a copy gives it no memory before it is thawed
    places = [p.data_ptr() for p in model.parameters()]
    model2, opt2 = way((model, opt))
    params = list(model2.parameters())
    assert stands_alone(params) and opt2.flat_weights() == []
    assert {id(p) for p in params} == {id(p) for g in opt2.param_groups for p in g["params"]}
    for frozen in (True, False):
        for m in (model, model2):
            m[2].bias.requires_grad_(not frozen)
        step(), step(opt2, model2)
        assert picture(opt, list(model.parameters())) == picture(opt2, params)
        assert is_flat(opt2, params[:-1] if frozen else params) and stands_alone(params[-1:]) == frozen
    assert len(opt2.flat_weights()) == 2
    assert [p.data_ptr() for p in model.parameters()] == places
    opt2.unflatten()
    assert stands_alone(params)


def test_unflattening_a_copy_before_its_first_step(trained):
    _, opt, _ = trained
    opt2 = through_torch_save(opt)
    params = [p for g in opt2.param_groups for p in g["params"]]
    opt2.unflatten()
    assert stands_alone(params) and opt2.flat_weights() == []


def test_a_copied_model_is_not_flat(trained):
    model, opt, step = trained
    other = copy.deepcopy(model)
    assert stands_alone(other.parameters())
    before = [bits(p) for p in other.parameters()]
    step()
    assert [bits(p) for p in other.parameters()] == before and is_flat(opt, list(model.parameters()))


def test_assigned_parameters_are_said_to_have_no_gradient(trained):
    model, opt, step = trained
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    opt.zero_grad()
    with pytest.warns(UserWarning, match=r"no parameter had a gradient.*assign=True"):
        step()


# weights that leave


MOVES = {
    "p.data = clone": lambda model: [setattr(p, "data", p.data.clone()) for p in model.parameters()],
    "to and back": lambda model: model.bfloat16().float(),
}


@pytest.mark.parametrize("move", MOVES)
def test_weights_that_leave_are_followed_and_told_of_once(backend, device, move):
    def run(flatten):
        model = cases.small_model().to(device)
        opt = fused(model.parameters(), backend, flatten)
        messages = []
        for step in range(4):
            page = weakref.ref(opt.flat_weights()[0]) if flatten and step == 1 else None
            if step in (1, 2):
                opt.zero_grad()
                MOVES[move](model)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                opt.step(model_closure(model, opt))
            messages += [(step, str(w.message)) for w in caught]
            if page is not None:
                gc.collect()
                assert page() is None, "nobody lives there"
        assert stands_alone(model.parameters()) and opt.flat_weights() == []
        return [bits(p) for p in model.parameters()], messages

    found, messages = run(True)
    assert (found, []) == run(False)
    ((step, message),) = messages
    assert step == 1 and LEFT in message and "param_groups[0]['params'][0]" in message and "in place" in message


def test_one_that_leaves_alone(trained):
    model, opt, step = trained
    model[2].bias.data = model[2].bias.data.clone()
    with pytest.warns(UserWarning, match=rf"params'\]\[3\] is {LEFT}"):
        step()
    *inside, left = model.parameters()
    assert is_flat(opt, inside) and stands_alone([left])
    left.data = left.data.clone()
    step()
    opt.unflatten()
    step()


@pytest.mark.parametrize("phase", ["clean", "perturbed"])
def test_one_that_is_shared_leaves_alone(backend, phase):
    if cases.device_of(backend) != "cpu":
        pytest.skip("only memory of the CPU is shared between processes this way")

    def run(flatten):
        model = cases.small_model()
        opt = fused(model.parameters(), backend, flatten)
        closure = model_closure(model, opt)
        opt.step(closure)
        closure()
        if phase == "perturbed":
            opt.first_step()
        if flatten:
            model[0].weight.share_memory_()
            assert [p.is_shared() for p in model.parameters()] == [True, False, False, False]
            with pytest.warns(UserWarning, match=rf"params'\]\[0\] is {LEFT}"):
                opt.second_step() if phase == "perturbed" else opt.step(closure)
            shared, *inside = model.parameters()
            assert is_flat(opt, inside) and pages_of(opt, shared) == [] and shared.is_shared()
        else:
            opt.second_step() if phase == "perturbed" else opt.step(closure)
        opt.step(closure)
        return picture(opt, list(model.parameters()))

    assert run(True) == run(False)


def test_a_buffer_that_is_shared_leaves_the_weights_behind(memory, trained):
    model, opt, step = trained
    if next(model.parameters()).device.type != "cpu":
        pytest.skip("only memory of the CPU is shared between processes this way")
    before = [bits(p) for p in model.parameters()]
    opt.flat_weights()[0].share_memory_()
    gc.collect()
    assert [bits(p) for p in model.parameters()] == before and not any(p.is_shared() for p in model.parameters())
    assert opt.flat_weights() == []
    step()
    assert [bits(p) for p in model.parameters()] != before


@pytest.mark.parametrize("leave", ["second_step", "restore"])
def test_weights_that_leave_while_perturbed_come_back(backend, device, leave):
    params = cases.make_params(names=["matrix", "63"], device=device)
    opt = fused(params, backend)
    opt.prepare()
    before = [bits(p) for p in params]
    cases.set_gradients(params, 0, 1, ["matrix", "63"])
    opt.first_step(zero_grad=True)
    for p in params:
        p.data = p.data.clone()
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        getattr(opt, leave)()
    assert [bits(p) for p in params] == before


def test_another_dtype_flattens_again(trained):
    """Without a warning: all moved, because they were told to."""
    model, opt, step = trained
    old = weakref.ref(opt.flat_weights()[0])
    model.double()
    opt.zero_grad(), step()
    params = list(model.parameters())
    assert is_flat(opt, params) and [page.dtype for page in opt.flat_weights()] == [torch.float64]
    gc.collect()
    assert old() is None
    model[0].bfloat16()
    with torch.no_grad():
        for p in params:
            p.grad = torch.ones_like(p)
    opt.base_step()
    assert is_flat(opt, params) and [page.dtype for page in opt.flat_weights()] == [torch.bfloat16, torch.float64]


def test_another_device_flattens_again(backend, device):
    if device == "cpu":
        pytest.skip("there is no other device")
    model = cases.small_model()
    opt = fused(model.parameters(), "auto")
    opt.step(model_closure(model, opt))
    model.to(device)
    opt.zero_grad()
    opt.step(model_closure(model, opt))
    assert is_flat(opt, list(model.parameters())) and opt.flat_weights()[0].device.type == device


def test_exchanged_parameters_are_moved_in(trained):
    model, opt, step = trained
    model[2].bias = Parameter(torch.ones_like(model[2].bias))
    opt.param_groups[0]["params"][3] = model[2].bias
    step()
    assert is_flat(opt, list(model.parameters()))


# weights that stay


def part_of_more(device):
    return torch.ones(20, device=device)[3:9].view(2, 3)


STAYERS = {
    "part of a larger storage": (part_of_more, "larger storage"),
    "gaps": (lambda device: torch.ones(4, 6, device=device)[:, ::2], "gaps"),
    "complex": (lambda device: torch.ones(3, dtype=torch.complex64, device=device), "complex"),
    "shared memory": (lambda device: torch.ones(3).share_memory_(), "between processes"),
}


@pytest.mark.parametrize("kind", STAYERS)
def test_weights_that_must_stay_are_named(backend, device, kind):
    if kind == "shared memory" and device != "cpu":
        pytest.skip("only memory of the CPU is shared between processes this way")
    make, reason = STAYERS[kind]

    def run(flatten):
        first, stays, also = Parameter(torch.ones(3, device=device)), Parameter(make(device)), Parameter(make(device))
        params = [("first", first), ("stays", stays), ("also", also)]
        opt = fused(params, backend, flatten)
        place = stays.data_ptr(), stays.stride()
        for step in range(3):
            opt.step(cases.closure_of([first, stays, also], step, ["one"] * 3))
        assert (stays.data_ptr(), stays.stride()) == place
        if flatten:
            assert is_flat(opt, [first])
            opt.unflatten()
            assert (stays.data_ptr(), stays.stride()) == place
        return [bits(torch.view_as_real(p) if p.is_complex() else p) for p in (first, stays, also)]

    with pytest.warns(UserWarning, match=rf"{STAYS} 2 of 3 .*\('stays'\): .*{reason}") as caught:
        found = run(True)
    assert len(caught) == 1
    assert found == run(False)


def test_an_rnn_that_cudnn_flattened_stays(backend, device):
    rnn = torch.nn.LSTM(3, 5).to(device)
    flattened = not stands_alone(rnn.parameters())
    opt = fused(rnn.parameters(), backend)
    x = torch.ones(4, 2, 3, device=device)

    def closure():
        opt.zero_grad()
        rnn(x)[0].sum().backward()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.step(closure), opt.step(closure)
    assert [STAYS in str(w.message) for w in caught] == [True] * flattened
    assert len(opt.flat_weights()) == (not flattened)


def test_empty_weights_stay_without_a_word(backend, device):
    empty = Parameter(torch.empty(0, 3, device=device))
    opt = fused([empty], backend)
    opt.step(cases.closure_of([empty], 0, ["empty"]))
    assert opt.flat_weights() == []
    opt.unflatten()


# later


@pytest.mark.parametrize("options", [{}, *PRECISIONS], ids=["plain", "masters", "stochastic"])
@pytest.mark.parametrize("thawed_in", [1, 2])
def test_a_thawed_parameter_gets_a_buffer_of_its_own(backend, device, thawed_in, options):
    names = ["matrix", "63", "transposed"]

    def run(flatten):
        params = cases.make_params(torch.bfloat16, names, device=device)
        params[0].requires_grad_(False)
        opt = fused(params, backend, flatten, **options)
        for step in range(4):
            for pass_ in (1, 2):
                thawed = (step, pass_) >= (2, thawed_in)
                params[0].requires_grad_(thawed)
                cases.set_gradients(params, 0, pass_, names)
                params[0].grad = params[0].grad if thawed else None
                (opt.first_step if pass_ == 1 else opt.step)()
            if flatten:
                assert is_flat(opt, params if step >= 2 else params[1:])
                assert len(opt.flat_weights()) == 1 + (step >= 2)
        return picture(opt, params)

    assert run(True) == run(False)


def test_a_group_that_is_added(trained):
    model, opt, step = trained
    places = [p.data_ptr() for p in model.parameters()]
    late = Parameter(torch.ones(3, device=next(model.parameters()).device))
    opt.add_param_group(dict(params=[late]))
    step()
    assert len(opt.flat_weights()) == 2 and is_flat(opt, [*model.parameters(), late])
    assert [p.data_ptr() for p in model.parameters()] == places


def test_a_frozen_parameter_keeps_its_right_to_the_buffer(trained):
    """It is no longer in a bucket after they were built anew, but still in the old buffer."""
    model, opt, step = trained
    bias = model[2].bias
    bias.requires_grad_(False)
    opt.zero_grad()
    model[0].weight.data = model[0].weight.data.t().contiguous().t()
    step()
    assert pages_of(opt, bias) == [] and not stands_alone([bias])
    bias.requires_grad_()
    step()
    assert is_flat(opt, list(model.parameters()))


# the way back


@pytest.mark.parametrize("options", [{}, *PRECISIONS], ids=["plain", "masters", "stochastic"])
def test_unflatten(memory, backend, device, options):
    params, plain = (cases.make_params(torch.bfloat16, device=device) for _ in range(2))
    opt, other = (
        FusedSAM(p, AdamW, 0.3, lr=0.01, backend=backend, flatten=flatten, **options)
        for p, flatten in ((params, True), (plain, False))
    )
    strides = [p.stride() for p in params]
    for step in range(cases.STEPS):
        if step == 4:
            before, versions = [bits(p) for p in params], [p._version for p in params]
            (page,), grads = memory, [p.grad for p in params]
            assert page() is not None
            opt.unflatten()
            assert stands_alone(params) and opt.flat_weights() == [] and [bits(p) for p in params] == before
            assert [p.stride() for p in params] == strides and [p._version for p in params] == versions
            assert all(p.grad is grad for p, grad in zip(params, grads, strict=True))
            assert page() is None, "its memory is free"
            opt.unflatten()
        opt.step(cases.closure_of(params, step)), other.step(cases.closure_of(plain, step))
        assert picture(opt, params) == picture(other, plain)
    late = Parameter(torch.ones(3, device=device))
    opt.add_param_group(dict(params=[late]))
    opt.step(cases.closure_of([*params, late], 0, [*NAMES, "one"]))
    assert stands_alone([*params, late]), "it does not flatten again"
    assert copy.deepcopy(opt).flatten is False


def test_unflatten_before_the_first_step(backend, device):
    params = cases.make_params(names=["matrix"], device=device)
    opt = fused(params, backend)
    opt.unflatten()
    opt.step(cases.closure_of(params, 0, ["matrix"]))
    assert stands_alone(params)


def test_unflatten_between_the_passes(backend, device):
    def run(unflatten):
        params = cases.make_params(device=device)
        opt = fused(params, backend)
        cases.set_gradients(params, 0, 1)
        opt.first_step()
        with pytest.raises(RuntimeError, match=r"unflatten\(\) needs the unperturbed weights.*restore\(\)"):
            opt.unflatten()
        assert is_flat(opt, [p for p, name in zip(params, NAMES, strict=True) if p.numel()])
        with opt.unperturbed():
            if unflatten:
                opt.unflatten()
        cases.set_gradients(params, 0, 2)
        opt.step()
        assert stands_alone(params) == unflatten
        return picture(opt, params)

    assert run(True) == run(False)


# memory that runs out


@pytest.mark.parametrize("late", [dict(), dict(thaw=True), dict(double=True)], ids=["at first", "thawed", "double"])
def test_running_out_of_memory_leaves_weights_where_they_are(monkeypatch, backend, device, late):
    def run(fails_at, flatten=True):
        params = [Parameter(torch.full((n,), 0.5, device=device)) for n in (5, 8200, 7)]
        params[1].requires_grad_("thaw" not in late)
        opt, failed = fused(params, backend, flatten), False
        for step in range(3):
            if late and step == 1:
                params[1].requires_grad_()
                for p in params if "double" in late else ():
                    p.grad, p.data = None, p.data.double()
            before, places = [bits(p) for p in params], [p.data_ptr() for p in params]
            for attempt in range(2):
                with monkeypatch.context() as patch:
                    NoMemory(patch, fails_at if step == bool(late) and attempt == 0 else 0)
                    try:
                        opt.step(closure_of_ones(params, opt))
                        break
                    except torch.OutOfMemoryError:
                        failed = True
                assert [bits(p) for p in params] == before and not opt.perturbed
                alone = [p for p, place in zip(params, places, strict=True) if p.data_ptr() == place]
                assert len(alone) == 3 or opt.flat_weights(), "moved only into a buffer that a bucket knows"
        assert not flatten or is_flat(opt, params)
        return picture(opt, params), failed

    expected, _ = run(0, flatten=False)
    fails_at, failed = 0, True
    while failed:
        fails_at += 1
        found, failed = run(fails_at)
        assert found == expected
    assert fails_at > 3


def test_unflatten_without_memory(monkeypatch, trained):
    model, opt, step = trained
    places = [p.data_ptr() for p in model.parameters()]
    made = torch.empty_strided

    def empty_strided(*args, **kwargs):
        if len(calls := getattr(empty_strided, "calls", [])) == 2:
            raise torch.OutOfMemoryError("no memory")
        empty_strided.calls = [*calls, args]
        return made(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch, "empty_strided", empty_strided)
        opt.unflatten()
    assert (
        [p.data_ptr() for p in model.parameters()] == places and opt.flatten and is_flat(opt, list(model.parameters()))
    )
    step()
    opt.unflatten()
    assert stands_alone(model.parameters())
