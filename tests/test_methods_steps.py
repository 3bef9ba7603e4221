"""Methods of the family in a training loop: resumed half-way, under a GradScaler, in copies, with `when`."""

import copy
import io
import pickle
import random

import pytest
import torch
from test_methods import ADAMW, RHO, SGD, fused_step, gradient_at, groups_of, new_params
from torch.nn import Parameter

import fastsam
from fastsam import methods, radius, schedules, when

FAMILY = {
    "gsam": (methods.GSAM, dict(alpha=0.3)),
    "wsam": (methods.WSAM, dict(gamma=0.8)),
    "looksam": (methods.LookSAM, dict(k=3, alpha=0.6)),
    "friendly": (methods.FriendlySAM, dict(sigma=0.7, lmbda=0.8)),
    "vasso": (methods.VaSSO, dict(theta=0.35)),
    "esam": (methods.ESAM, dict(beta=0.4, seed=7)),
    "sparse": (methods.SparseSAM, dict(sparsity=0.4, seed=5)),
    "unnormalized": (fastsam.FusedSAM, dict(radius=radius.unnormalized())),
    "stable": (fastsam.FusedSAM, dict(renormalize=True)),
    "msam": (methods.MSAM, {}),
    "every": (fastsam.FusedSAM, dict(when=when.every(3))),
    "randomly": (methods.GSAM, dict(when=when.randomly(0.5, seed=3))),
    "by_grad_norm": (fastsam.FusedSAM, dict(when=when.by_grad_norm(c=0.1, decay=0.7))),
    "looksam late": (methods.LookSAM, dict(k=2, when=when.after(4))),
}
PRECISIONS = {
    "float32": (torch.float32, {}),
    "masters": (torch.bfloat16, dict(master_weights=True)),
    "drawn": (torch.bfloat16, dict(stochastic_rounding=True, rounding_seed=11)),
}
each_method = pytest.mark.parametrize("name", FAMILY)


def real_params(dtype, device):
    return [p for p in new_params(dtype, device) if not p.is_complex()]


def build(name, params, backend, base=SGD, **more):
    cls, options = FAMILY[name]
    kind, kwargs = base
    return cls(groups_of(params), kind, RHO, backend=backend, **copy.deepcopy(options), **kwargs, **more)


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    ("base", "precision"),
    [(ADAMW, "float32"), (SGD, "masters"), (ADAMW, "drawn")],
    ids=["adamw-float32", "sgd-masters", "adamw-drawn"],
)
@each_method
def test_a_resumed_run_goes_on_bit_for_bit(name, base, precision, backend, device):
    dtype, options = PRECISIONS[precision]
    params = real_params(dtype, device)
    optimizer = build(name, params, backend, base, **options)
    for t in range(5):
        fused_step(optimizer, params, t)
    if name == "msam":
        optimizer.eval()
    saved = through_a_file(optimizer.state_dict())
    twins = [Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in params]
    resumed = build(name, twins, backend, base, **options)
    resumed.load_state_dict(saved)
    if name == "msam":
        optimizer.train()
        resumed.train()
    for t in range(5, 10):
        fused_step(optimizer, params, t)
        fused_step(resumed, twins, t)
        for p, q in zip(params, twins, strict=True):
            assert torch.equal(p, q), t
    for p, q in zip(params, twins, strict=True):
        assert optimizer.state[p].keys() == resumed.state[q].keys()
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, resumed.state[q][key]), key


@each_method
def test_copies_go_on_alike(name, backend, device):
    params = real_params(torch.float32, device)
    optimizer = build(name, params, backend)
    for t in range(4):
        fused_step(optimizer, params, t)
    if name == "msam":
        optimizer.eval()
    twins, copied = pickle.loads(pickle.dumps((params, optimizer)))
    assert copied.options == optimizer.options
    if name == "msam":
        optimizer.train()
        copied.train()
    for t in range(4, 8):
        fused_step(optimizer, params, t)
        fused_step(copied, twins, t)
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


@each_method
def test_buffers_survive_another_precision(name, backend, device):
    """After `.double()` in the middle of training a method goes on from the buffers that it had."""
    params = real_params(torch.float32, device)
    optimizer = build(name, params, backend)
    for t in range(4):
        fused_step(optimizer, params, t)
    if name == "msam":
        optimizer.eval()
    state = optimizer.state[params[5]]
    before = {key: state[key].clone() for key in optimizer.buffers if key in state}
    for p in params:
        p.data = p.data.double()
        p.grad = None
    if name == "msam":
        optimizer.train()
    for t in range(4, 7):
        if t == 4:
            optimizer.prepare()
            for key, value in before.items():
                now = optimizer.state[params[5]][key]
                torch.testing.assert_close(now.to(value.dtype), value, rtol=0, atol=0)
        fused_step(optimizer, params, t)
    assert all(p.isfinite().all() for p in params)


@each_method
def test_loss_scale_cancels(name, backend, device):
    """With a GradScaler, one overflow in each pass: as without one where the skipped steps are undone by hand."""
    params = real_params(torch.float32, device)
    twins = copy.deepcopy(params)
    optimizer, plain = build(name, params, backend), build(name, twins, backend)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0, growth_interval=3)
    one_pass = isinstance(optimizer, methods.MSAM)

    def backward(of, t, k, scale, bad=False):
        for p, g in gradient_at(of, t, k).items():
            p.grad = g * scale
        if bad:
            of[3].grad[1, 1] = torch.inf

    for t in range(8):
        overflow = t in (2, 5)
        backward(params, t, 1, scaler.scale(torch.ones((), device=device)).item(), overflow and one_pass)
        if one_pass or optimizer.first_step(zero_grad=True, scaler=scaler):
            if not one_pass:
                backward(params, t, 2, scaler.get_scale(), overflow)
        elif overflow:
            params[3].grad[1, 1] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        before = [q.detach().clone() for q in twins]
        backward(twins, t, 1, 1.0)
        if one_pass:
            if not overflow:
                plain.step()
            continue
        if plain.first_step(zero_grad=True):
            backward(twins, t, 2, 1.0)
        if overflow:
            if isinstance(plain, methods.LookSAM):  # what it would keep is what the overflow spoiled
                pytest.skip("LookSAM's direction of a step that overflowed has no plain twin")
            plain.restore()
            assert all(torch.equal(q, w) for q, w in zip(twins, before, strict=True))
            given_up = plain.state_dict()  # the step that a scaler skips is counted, one that is undone is not
            for group in given_up["param_groups"]:
                group["sam_steps"] = group.get("sam_steps", 0) + 1
            plain.load_state_dict(given_up)
        else:
            plain.step()
    assert scaler.get_scale() != 1024.0
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=2e-6, atol=1e-7)


@each_method
def test_an_overflow_leaves_nothing_behind(name, backend, device):
    """After gradients that are not finite, in whichever pass, weights and saved buffers are finite, now and later."""
    for bad_pass in (1, 2):
        params = real_params(torch.float32, device)
        optimizer = build(name, params, backend)
        scaler = torch.amp.GradScaler(device, init_scale=64.0)
        for t in range(7):
            scale = scaler.scale(torch.ones((), device=device)).item()

            def backward(k, t=t, scale=scale, params=params, bad_pass=bad_pass):
                for p, g in gradient_at(params, t, k).items():
                    p.grad = g * scale
                if k == bad_pass and t in (1, 3):
                    params[3].grad[2, 2] = float("nan" if t == 1 else "inf")

            backward(1)
            if not isinstance(optimizer, methods.MSAM) and optimizer.first_step(zero_grad=True, scaler=scaler):
                backward(2)
            scaler.step(optimizer)
            scaler.update()
        assert all(p.isfinite().all() for p in params)
        for p in params:
            for key in optimizer.buffers:
                assert optimizer.state[p][key].isfinite().all(), key


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("options", [{}, dict(p=float("inf"))], ids=["p2", "pinf"])
def test_a_first_gradient_that_is_not_finite_is_not_stepped_with(options, decoupled, backend, device):
    """Also one that has no part in a norm: of a group that is not perturbed, or with p = inf."""
    params = real_params(torch.float32, device)
    groups = [dict(params=params[:5]), dict(params=params[5:], perturb=False)]
    optimizer = methods.WSAM(groups, "sgd", RHO, lr=0.1, decoupled=decoupled, backend=backend, **options)
    for bad in (4, 6):
        before = [p.detach().clone() for p in params]
        for p, g in gradient_at(params, 0, 1).items():
            p.grad = g
        params[bad].grad[0] = torch.inf
        optimizer.first_step(zero_grad=True)
        grads = gradient_at(before, 0, 2)
        for p, w in zip(params, before, strict=True):
            p.grad = grads[w]
        optimizer.step()
        for p, w in zip(params, before, strict=True):  # with g2 alone
            torch.testing.assert_close(p.detach(), w - 0.1 * grads[w])


@pytest.mark.parametrize("unscaled", [(), (1,), (2,), (1, 2)], ids=str)
@pytest.mark.parametrize("clipped", [None, 0.5])
@pytest.mark.parametrize("name", ["gsam", "wsam", "wsam coupled", "looksam", "friendly", "stable", "unnormalized"])
def test_gradients_may_be_unscaled_in_each_pass(name, clipped, unscaled, backend, device):
    """As loops do that clip or look at gradients."""
    kinds = {**FAMILY, "wsam coupled": (methods.WSAM, dict(gamma=0.8, decoupled=False))}
    cls, options = kinds[name]
    params = real_params(torch.float32, device)
    twins = copy.deepcopy(params)
    optimizer, plain = (
        cls(groups_of(of), "sgd", RHO, lr=0.05, max_grad_norm=clipped, backend=backend, **options)
        for of in (params, twins)
    )
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)

    def backward(of, t, k, scale):
        for p, g in gradient_at(of, t, k).items():
            p.grad = g * scale

    for t in range(4):
        backward(params, t, 1, scaler.scale(torch.ones((), device=device)).item())
        if 1 in unscaled:
            scaler.unscale_(optimizer)
        second = optimizer.first_step(zero_grad=True, scaler=scaler)
        if second:
            if 1 in unscaled:
                scaler.update()
            backward(params, t, 2, scaler.get_scale())
        if 2 in unscaled and (second or 1 not in unscaled):
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        backward(twins, t, 1, 1.0)
        if plain.first_step(zero_grad=True):
            backward(twins, t, 2, 1.0)
        plain.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["gsam", "wsam", "stable", "unnormalized"])
def test_unscaled_gradients_need_the_scale_of_the_first(name, backend, device):
    params = real_params(torch.float32, device)
    optimizer = build(name, params, backend)
    scaler = torch.amp.GradScaler(device, init_scale=64.0)
    before = [p.detach().clone() for p in params]
    for k in (1, 2):
        for p, g in gradient_at(params, 0, k).items():
            p.grad = g * scaler.scale(torch.ones((), device=device))
        if k == 1:
            optimizer.first_step(zero_grad=True)
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="needs to know the loss scale.*scaler=scaler"):
        scaler.step(optimizer)
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))


@pytest.mark.parametrize("cls", [methods.FriendlySAM, methods.VaSSO])
def test_averages_need_the_scaler(cls, backend, device):
    params = real_params(torch.float32, device)
    optimizer = cls(params, "sgd", RHO, lr=0.1, backend=backend)
    scaler = torch.amp.GradScaler(device, init_scale=64.0)
    before = [p.detach().clone() for p in params]
    for p, g in gradient_at(params, 0, 1).items():
        p.grad = g * scaler.scale(torch.ones((), device=device))
    optimizer.first_step()
    with pytest.raises(RuntimeError, match=f"{cls.__name__} needs to know the loss scale.*scaler=scaler"):
        scaler.step(optimizer)
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))
    with pytest.raises(ValueError, match="must be a torch.amp.GradScaler"):
        optimizer.first_step(scaler=1024.0)


def count_calls(optimizer, params, steps):
    calls = []

    def closure():
        calls.append(0)
        optimizer.zero_grad()
        loss = sum(((p - 0.3) ** 2).sum() for p in params)
        loss.backward()
        return loss

    counts = []
    for _ in range(steps):
        calls.clear()
        optimizer.step(closure)
        counts.append(len(calls))
    return counts


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (when.every(3), [2, 1, 1, 2, 1, 1, 2]),
        (when.after(4), [1, 1, 1, 1, 2, 2, 2]),
        (when.between(1, 3), [1, 2, 2, 1, 1, 1, 1]),
        (when.never(), [1] * 7),
        (when.always(), [2] * 7),
        (lambda step: step in (0, 6), [2, 1, 1, 1, 1, 1, 2]),
    ],
    ids=["every", "after", "between", "never", "always", "function"],
)
def test_when_decides_the_number_of_passes(name, expected, backend, device):
    params = real_params(torch.float32, device)[3:5]
    optimizer = fastsam.FusedSAM(params, "sgd", 0.1, lr=0.01, when=name, backend=backend)
    assert count_calls(optimizer, params, 7) == expected


def test_random_steps_are_the_seeds(backend, device):
    params = real_params(torch.float32, device)[3:5]
    build_one = lambda seed: fastsam.FusedSAM(  # noqa: E731
        params, "sgd", 0.1, lr=0.001, when=when.randomly(0.4, seed), backend=backend
    )
    random.seed(1)
    first, again, other = (count_calls(build_one(seed), params, 60) for seed in (5, 5, 6))
    assert first == again != other
    assert 12 <= first.count(2) <= 36


def test_long_gradients_ask_for_sam(backend, device):
    """By the norm of the step before: the moments are those of the paper's average, over steps of both kinds."""
    param = Parameter(torch.tensor([3.0, 4.0], device=device))
    optimizer = fastsam.FusedSAM([param], "sgd", 0.0, lr=0.0, when=when.by_grad_norm(c=1.0, decay=0.5), backend=backend)
    lengths = [1.0, 2.0, 9.0, 1.0, 1.0, 30.0, 2.0, 2.0]
    mean = variance = last = None
    for length in lengths:
        expected = last is None or last >= mean + variance**0.5
        param.grad = torch.tensor([0.6 * length, 0.8 * length], device=device)
        assert optimizer.first_step() == expected
        optimizer.step()
        last = length**2
        mean = last if mean is None else 0.5 * mean + 0.5 * last
        variance = 0.0 if variance is None else 0.5 * variance + 0.5 * (last - mean) ** 2


def test_all_gradients_are_measured_in_steps_of_either_kind(backend, device):
    """Those of a group that is not perturbed, too."""
    perturbed, left_out = (Parameter(torch.ones(3, device=device)) for _ in range(2))
    for rule in (when.by_grad_norm(c=-1e9), when.by_grad_norm(c=1e9)):
        groups = [dict(params=[perturbed]), dict(params=[left_out], perturb=False)]
        optimizer = fastsam.FusedSAM(groups, "sgd", lr=0.0, when=rule, backend=backend)
        for _ in range(3):
            perturbed.grad, left_out.grad = torch.ones_like(perturbed), torch.full_like(left_out, 2.0)
            optimizer.first_step()
            optimizer.step()
            assert optimizer.when.state()["last"] == 15


def test_what_one_training_measured_is_not_known_to_another(backend, device):
    rule = when.by_grad_norm(c=0.1, decay=0.7)
    taken = []
    for _ in range(2):
        param = Parameter(torch.ones(3, device=device))
        optimizer = fastsam.FusedSAM([param], "sgd", lr=0.0, when=rule, backend=backend)
        for length in (1.0, 5.0, 2.0, 1.0):
            param.grad = torch.full_like(param, length)
            taken.append(optimizer.first_step())
            optimizer.step()
    assert taken[:4] == taken[4:] and not all(taken)


def test_a_wasted_second_pass_is_right_and_an_added_one_refused(backend, device):
    def run(loop):
        param = Parameter(torch.tensor([1.0, -2.0], device=device))
        optimizer = fastsam.FusedSAM([param], "sgd", 0.1, lr=0.1, when=when.never(), backend=backend)

        def backward():
            (param**2).sum().backward()

        backward()
        second = optimizer.first_step(zero_grad=True)
        assert second is False and not optimizer.perturbed
        loop(optimizer, param, backward)
        optimizer.step()
        return param.detach()

    def nothing(optimizer, param, backward):
        pass

    def clears(optimizer, param, backward):
        optimizer.zero_grad()
        backward()

    def clears_in_place(optimizer, param, backward):
        param.grad.zero_()
        backward()

    def clips(optimizer, param, backward):
        torch.nn.utils.clip_grad_norm_([param], 100.0)

    def adds(optimizer, param, backward):
        backward()

    expected = run(nothing)
    for right in (clears, clears_in_place, clips):
        torch.testing.assert_close(run(right), expected)
    with pytest.raises(
        RuntimeError, match="added to the gradients of a step that has one pass.*if optimizer.first_step"
    ):
        run(adds)


def test_a_step_of_one_pass_can_be_given_up(backend, device):
    param = Parameter(torch.tensor([1.0, -2.0], device=device))
    optimizer = fastsam.FusedSAM([param], "sgd", 0.1, lr=0.1, when=when.every(2), backend=backend)
    for _ in range(3):  # the same step each time, as after an exception
        (param**2).sum().backward()
        assert optimizer.first_step() is True
        optimizer.restore()
        optimizer.zero_grad()
    assert torch.equal(param.detach().cpu(), torch.tensor([1.0, -2.0]))


def test_loading_ends_a_step_of_one_pass_that_was_begun(backend, device):
    param = Parameter(torch.ones(3, device=device))
    optimizer = methods.LookSAM([param], "sgd", lr=0.1, k=2, backend=backend)
    param.grad = torch.ones_like(param)
    saved = copy.deepcopy(optimizer.state_dict())
    assert optimizer.first_step()
    optimizer.step()
    assert not optimizer.first_step()
    optimizer.load_state_dict(saved)
    assert optimizer.first_step()  # the checkpoint's first step
    param.grad = None
    param.sum().backward()
    optimizer.step()


def test_what_is_counted_goes_on_where_a_checkpoint_does_not_say(backend, device):
    """One of the base optimizer."""
    param = Parameter(torch.ones(3, device=device))
    rule = when.by_grad_norm()
    optimizer = methods.LookSAM([param], "sgd", lr=0.1, k=2, when=rule, backend=backend)
    param.grad = torch.ones_like(param)
    for _ in range(3):
        optimizer.first_step()
        optimizer.step()
    known = optimizer.when.state()
    optimizer.load_state_dict(torch.optim.SGD([param], lr=0.1).state_dict())
    assert optimizer._sam.steps == 3
    assert optimizer.when.state() == known and known


def test_gradients_at_hand_and_one_call(backend, device):
    """With closure_calls=1 a step of one pass does not call the closure."""
    param = Parameter(torch.tensor([1.0, -2.0], device=device))
    optimizer = fastsam.FusedSAM([param], "sgd", 0.1, lr=0.1, when=when.every(2), closure_calls=1, backend=backend)
    calls = []

    def closure():
        calls.append(0)
        (param**2).sum().backward()

    for _ in range(4):
        optimizer.zero_grad()
        (param**2).sum().backward()
        optimizer.step(closure)
    assert len(calls) == 2


def test_a_radius_is_that_of_the_groups_that_climb(backend, device):
    """Where the first group has rho = 0, too."""
    for cls, options, expected in (
        (fastsam.FusedSAM, dict(radius=radius.unnormalized()), 0.5 * 5.0),
        (methods.ESAM, dict(beta=0.999), 0.5 / 0.999),
    ):
        still, climbing = (Parameter(torch.zeros(2, device=device)) for _ in range(2))
        groups = [dict(params=[still], rho=0.0), dict(params=[climbing], rho=0.5)]
        optimizer = cls(groups, "sgd", lr=0.1, backend=backend, **options)
        still.grad, climbing.grad = torch.zeros_like(still), torch.tensor([3.0, 4.0], device=device)
        optimizer.first_step()
        assert climbing.norm().item() == pytest.approx(expected)


@pytest.mark.parametrize("cls", [fastsam.FusedSAM, methods.VaSSO, methods.FriendlySAM, methods.SparseSAM])
def test_a_radius_knows_the_loss_scale(cls, backend, device):
    """Of averages, too, which have none."""
    lengths = []
    for enabled in (False, True):
        params = real_params(torch.float32, device)
        optimizer = cls(params, "sgd", 0.1, lr=0.0, radius=radius.unnormalized(), backend=backend)
        scaler = torch.amp.GradScaler(device, init_scale=1024.0, enabled=enabled)
        for t in range(3):
            before = [p.detach().clone() for p in params]
            for p, g in gradient_at(params, t, 1).items():
                p.grad = g * scaler.scale(torch.ones((), device=device))
            optimizer.first_step(scaler=scaler)
            lengths.append(sum((p - w).square().sum() for p, w in zip(params, before, strict=True)).item())
            scaler.step(optimizer)
            scaler.update()
    assert lengths[3:] == pytest.approx(lengths[:3], rel=1e-5)


def test_a_mask_does_not_grow_where_there_is_no_gradient(backend, device):
    """Though the weights there are large, and were looked at when the mask was renewed before."""
    params = [Parameter(torch.full((64,), value, device=device)) for value in (0.1, 100.0)]
    optimizer = methods.SparseSAM(params, "sgd", lr=0.1, drop="weight", drop_rate=0.2, backend=backend)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.first_step()
    optimizer.step()
    optimizer.dynamic_mask()
    before = int(optimizer.state[params[1]]["mask"].sum())
    params[1].grad = None
    optimizer.dynamic_mask()
    assert int(optimizer.state[params[1]]["mask"].sum()) <= before


def test_rho_follows_the_learning_rate(backend, device):
    param = Parameter(torch.ones(3, device=device))
    optimizer = methods.GSAM([param], "sgd", 0.1, lr=0.8, backend=backend)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10, eta_min=0.2)
    rho = schedules.RhoFollowsLR(optimizer, 0.5, 0.1, lr_min=0.2)
    for _ in range(10):
        lr = optimizer.param_groups[0]["lr"]
        assert optimizer.param_groups[0]["rho"] == pytest.approx(0.1 + 0.4 * (lr - 0.2) / 0.6)
        param.grad = torch.ones_like(param)
        optimizer.first_step()
        optimizer.step()
        scheduler.step()
        rho.step()
    assert optimizer.param_groups[0]["rho"] == pytest.approx(0.1)


@pytest.mark.parametrize("cls", [methods.FriendlySAM, methods.VaSSO, methods.LookSAM])
@pytest.mark.parametrize("later", ["thawed", "added"])
def test_parameters_that_come_later_have_what_a_method_keeps(cls, later, backend, device):
    found = []
    for frozen in (False, True):  # from the start, without a gradient; or not there yet
        params = real_params(torch.float32, device)
        *known, new = params
        new.requires_grad_(not (frozen and later == "thawed"))
        there = known if frozen and later == "added" else params
        optimizer = cls([dict(params=[p]) for p in there], "sgd", RHO, lr=0.1, momentum=0.9, backend=backend)
        for t in range(4):
            if t == 2:
                new.requires_grad_(True)
                if there is known:
                    optimizer.add_param_group(dict(params=[new]))
            for pass_ in (1, 2):
                for i, p in enumerate(params):
                    p.grad = None if p is new and t < 2 else torch.full_like(p, 0.1 * i + pass_ + t)
                if pass_ == 1 and not optimizer.first_step():
                    break
            optimizer.step()
        found.append([p.detach().cpu() for p in params])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)  # the norm adds the buckets' chunks in another order


class Half(fastsam.FusedSAM):
    """A user's own: the mean of both gradients."""

    def ascent(self, g1):
        self.keep(g1)
        return g1

    def descent(self, g2):
        return self.combine("half", (0.5, g2), (0.5, self.direction("kept")))


def test_a_users_own_method(backend, device):
    params = real_params(torch.float64, device)
    optimizer = Half(params, "sgd", RHO, lr=0.1, backend=backend)
    for t in range(3):
        g1, old = gradient_at(params, t, 1), [p.detach().clone() for p in params]
        n = torch.cat([g.flatten() for g in g1.values()]).norm()
        twins = [Parameter(p.detach() + RHO * g1[p] / n) for p in params]
        g2 = gradient_at(twins, t, 2)
        fused_step(optimizer, params, t + 10)  # no gradient is missing there
        for p, w, g, h in zip(params, old, gradient_at(params, t, 1).values(), g2.values(), strict=True):
            del p, w, g, h
        for p, w in zip(params, old, strict=True):
            p.data.copy_(w)
        for p in params:
            p.grad = g1[p]
        optimizer.first_step(zero_grad=True)
        for p, q in zip(params, twins, strict=True):
            p.grad = g2[q]
        optimizer.step()
        for p, q, w in zip(params, twins, old, strict=True):
            torch.testing.assert_close(p.detach(), w - 0.1 * (g1[p] + g2[q]) / 2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("build_one", "message"),
    [
        (lambda p: methods.GSAM(p, "sgd", lr=0.1, alpha=-1.0), "GSAM: alpha must be >= 0, got -1.0"),
        (lambda p: methods.WSAM(p, "sgd", lr=0.1, gamma=1.0), r"WSAM: gamma must be in \[0, 1\), got 1.0"),
        (lambda p: methods.LookSAM(p, "sgd", lr=0.1, k=0), "LookSAM: k must be an integer >= 1, got 0"),
        (lambda p: methods.FriendlySAM(p, "sgd", lr=0.1, lmbda=1.5), r"lmbda must be in \[0, 1\], got 1.5"),
        (lambda p: methods.VaSSO(p, "sgd", lr=0.1, theta=2.0), r"VaSSO: theta must be in \[0, 1\], got 2.0"),
        (lambda p: methods.ESAM(p, "sgd", lr=0.1, beta=0.0), r"ESAM: beta must be in \(0, 1\], got 0.0"),
        (lambda p: methods.SparseSAM(p, "sgd", lr=0.1, sparsity=1.0), r"sparsity must be in \[0, 1\), got 1.0"),
        (lambda p: methods.SparseSAM(p, "sgd", lr=0.1, drop="age"), "drop must be one of .*got 'age'"),
        (lambda p: methods.MSAM(p, "sgd", lr=0.1), "MSAM: the base optimizer must be a fused one with momentum"),
        (lambda p: methods.PreconditionedSAM(p, "sgd", lr=0.1), "must be Adam, AdamW, NAdam or RAdam, got SGD"),
        (
            lambda p: fastsam.FusedSAM(p, "sgd", lr=0.1, radius=0.1),
            "radius must be one of fastsam.radius.*a number is rho",
        ),
        (lambda p: fastsam.FusedSAM(p, "sgd", lr=0.1, p=3.0, radius=radius.mixed(0.5)), "radius= needs p=2, got p=3.0"),
        *(
            (
                lambda p, c=c, k=k: c(p, "adamw", lr=0.1, perturb_with_weight_decay=True, **k),
                "would add the weight decay",
            )
            for c, k in (
                (methods.ESAM, {}),
                (methods.SparseSAM, {}),
                (methods.MSAM, {}),
                (methods.PreconditionedSAM, {}),
                (methods.LookSAM, dict(layerwise=True)),
            )
        ),
        (lambda p: methods.PreconditionedSAM(p, "adam", lr=0.1, p=4.0), "p must be 2 and adaptive False, got p=4.0"),
        (lambda p: methods.PreconditionedSAM(p, "adam", lr=0.1, adaptive=True), "p must be 2 and adaptive False"),
        (lambda p: fastsam.FusedSAM(p, "sgd", lr=0.1, when=5), "when must be one of fastsam.when.*got 5"),
        (lambda p: when.every(0), "k must be an integer >= 1, got 0"),
        (lambda p: when.randomly(1.5), r"p must be in \[0, 1\], got 1.5"),
    ],
)
def test_options_out_of_range(build_one, message):
    with pytest.raises(ValueError, match=message):
        build_one([Parameter(torch.ones(2))])


@pytest.mark.parametrize("model_first", [True, False])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_msam_keeps_weights_that_were_loaded(precision, model_first, backend, device):
    """In the same process, too, where its weights are perturbed when the checkpoint is loaded."""
    dtype, options = PRECISIONS[precision]
    model = torch.nn.Linear(5, 3).to(device, dtype)
    optimizer = methods.MSAM(model.parameters(), "sgd", 0.5, lr=0.1, momentum=0.9, backend=backend, **options)

    def train(steps):
        for t in range(steps):
            for p, g in gradient_at(list(model.parameters()), t, 1).items():
                p.grad = g
            optimizer.step()

    train(2)
    optimizer.eval()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    optimizer.train()
    train(3)
    expected = [p.detach().clone() for p in model.parameters()]
    train(2)
    if model_first:
        model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    if not model_first:
        model.load_state_dict(saved[0])
    assert all(torch.equal(p, q) for p, q in zip(model.state_dict().values(), saved[0].values(), strict=True))
    optimizer.train()
    train(3)
    for p, q in zip(model.parameters(), expected, strict=True):
        assert torch.equal(p, q)
    model.load_state_dict(saved[0])  # alone: a step goes on from there
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    optimizer.eval()
    assert all(torch.equal(p, q) for p, q in zip(model.state_dict().values(), saved[0].values(), strict=True))


def test_msam_keeps_its_mode_in_an_unperturbed_block(backend, device):
    param = Parameter(torch.tensor([1.0, -2.0], device=device))
    optimizer = methods.MSAM([param], "sgd", 0.5, lr=0.1, momentum=0.9, backend=backend)
    param.grad = torch.ones_like(param)
    optimizer.step()
    with optimizer.unperturbed(), pytest.raises(RuntimeError, match="leave the `with"):
        optimizer.eval()
    optimizer.eval()
    torch.testing.assert_close(param.detach().cpu(), torch.tensor([0.9, -2.1]))


def test_msam_says_what_to_do(backend, device):
    param = Parameter(torch.tensor([1.0, -2.0], device=device))
    optimizer = methods.MSAM([param], "sgd", 0.5, lr=0.1, momentum=0.9, backend=backend)
    for _ in range(2):
        param.grad = torch.ones_like(param)
        optimizer.step()
    with pytest.raises(RuntimeError, match="call optimizer.eval.* before saving"):
        optimizer.state_dict()
    with pytest.raises(RuntimeError, match="a step has one pass: call step"):
        optimizer.first_step()
    perturbed = param.detach().clone()
    with optimizer.unperturbed():
        assert not torch.equal(param, perturbed)
    assert torch.equal(param, perturbed)
    optimizer.eval()
    with pytest.raises(RuntimeError, match="step.* in evaluation mode; call optimizer.train"):
        optimizer.step()
