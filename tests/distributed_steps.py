"""Every option and method over DTensors of all kinds of placements, against one process without them."""

from __future__ import annotations

import math
from unittest import mock

import oracle
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastsam
from fastsam import FusedSAM, methods, radius

S0, S1, R = Shard(0), Shard(1), Replicate()
# Shapes and placements, on a mesh of one dimension and of two; None is no DTensor. Uneven parts, and empty ones: (3,)
# on the last of four ranks, (1, 5) on all but the first.
LINE = [
    ((17, 9), (S0,)),
    ((6, 10), (S1,)),
    ((3,), (S0,)),
    ((20_000,), (S0,)),
    ((1, 5), (S0,)),
    ((5, 4), (R,)),
    ((7,), None),
]
SQUARE = [
    ((17, 9), (S0, S1)),
    ((6, 10), (R, S1)),
    ((13, 3), (S0, R)),
    ((20_000,), (S0, S0)),
    ((5,), (S0, S0)),
    ((5, 4), (R, R)),
    ((7,), None),
]
SGD, ADAMW = dict(lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.02), dict(lr=0.01, betas=(0.8, 0.95), eps=1e-6)


def distributed(value, mesh, placements):
    """A DTensor of a tensor that all ranks have; a copy of it where it is to be none."""
    if placements is None or mesh is None:
        return value.clone()
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def noise(shape, seed, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Pair:
    """The same parameters as DTensors and whole, and gradients that tell where they were taken."""

    def __init__(self, mesh, layout, dtype=torch.float64):
        self.mesh, self.layout, self.dtype = mesh, layout, dtype
        values = [noise(shape, i, dtype) for i, (shape, _) in enumerate(layout)]
        self.split = [nn.Parameter(distributed(v, mesh, pl)) for v, (_, pl) in zip(values, layout, strict=True)]
        self.alone = [nn.Parameter(v.clone()) for v in values]

    def gradients(self, seed):
        for i, (p, q, (shape, placements)) in enumerate(zip(self.split, self.alone, self.layout, strict=True)):
            n = noise(shape, 100 * seed + i, self.dtype)
            p.grad = distributed(n, self.mesh, placements) + 0.3 * p.detach()
            q.grad = n + 0.3 * q.detach()

    def groups(self, params, overrides):
        return [dict(own, params=params[k :: len(overrides)]) for k, own in enumerate(overrides)]

    def close(self, one, other, what, tolerance=1e-11):
        for i, (p, q) in enumerate(zip(self.split, self.alone, strict=True)):
            same(p, q, f"{what}: parameter {i}", tolerance)
            mine, theirs = one.state.get(p, {}), other.state.get(q, {})
            assert list(mine) == list(theirs), (what, i, list(mine), list(theirs))
            for name, value in mine.items():
                if isinstance(value, torch.Tensor):
                    if isinstance(p, DTensor) and value.dim() > 0:
                        assert isinstance(value, DTensor) and value.placements == p.placements, (what, name)
                    same(value, theirs[name], f"{what}: {name} of parameter {i}", tolerance)


def same(mine, theirs, what, tolerance):
    """Compare this rank's part, with that of a tensor that lies alike or is whole; nothing is communicated."""
    mine, theirs = mine.detach(), theirs.detach()
    if isinstance(mine, DTensor):
        if not isinstance(theirs, DTensor):
            theirs = distributed(theirs, mine.device_mesh, mine.placements)
        assert mine.placements == theirs.placements and mine.stride() == theirs.stride(), what
        mine, theirs = mine.to_local(), theirs.to_local()
    if theirs.dtype == torch.bfloat16 and tolerance > 0:
        tolerance = 2**-7  # one bit of what is rounded from float32
    torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}")


def two_passes(optimizer, gradients, seed):
    gradients(2 * seed)
    if optimizer.first_step():
        gradients(2 * seed + 1)
    optimizer.step()


def one_pass(optimizer, gradients, seed):
    gradients(seed)
    optimizer.step()


MASKED = (dict(), dict(perturb=False, lr=0.03))
BF16 = torch.bfloat16
CONFIGS = {
    "sgd": (FusedSAM, torch.optim.SGD, dict(SGD, rho=0.3)),
    "float32": (FusedSAM, torch.optim.SGD, dict(SGD, rho=0.3, dtype=torch.float32)),
    "asam": (FusedSAM, torch.optim.AdamW, dict(ADAMW, rho=0.5, adaptive=True, eta=0.02, groups=MASKED)),
    "p=3": (FusedSAM, torch.optim.SGD, dict(SGD, rho=0.3, p=3.0)),
    "p=1.2": (FusedSAM, torch.optim.SGD, dict(SGD, rho=0.3, p=1.2, adaptive=True)),
    "p=inf": (FusedSAM, torch.optim.SGD, dict(SGD, rho=0.3, p=math.inf)),
    "clipped": (FusedSAM, torch.optim.AdamW, dict(ADAMW, rho=0.3, max_grad_norm=0.7, amsgrad=True)),
    "renormalized": (FusedSAM, torch.optim.SGD, dict(SGD, rho=0.3, renormalize=True, max_grad_norm=3.0)),
    "radius": (FusedSAM, torch.optim.SGD, dict(SGD, rho=0.3, radius=radius.mixed(0.4))),
    "averaged": (FusedSAM, torch.optim.SGD, dict(SGD, rho=0.3, ema_decay=0.7)),
    "when": (FusedSAM, torch.optim.SGD, dict(SGD, rho=0.3, when=fastsam.when.every(2))),
    "masters": (FusedSAM, torch.optim.AdamW, dict(ADAMW, rho=0.3, master_weights=True, dtype=BF16, tolerance=1e-5)),
    "bfloat16": (FusedSAM, torch.optim.SGD, dict(SGD, rho=0.3, dtype=BF16)),
    "adamax": (FusedSAM, torch.optim.Adamax, dict(lr=0.01, rho=0.3, max_grad_norm=0.7)),
    "adamax masters": (
        FusedSAM,
        torch.optim.Adamax,
        dict(lr=0.01, rho=0.3, master_weights=True, dtype=BF16, tolerance=1e-5),
    ),
    "gsam adamax": (methods.GSAM, torch.optim.Adamax, dict(lr=0.01, rho=0.3, alpha=0.7)),
    "friendly": (methods.FriendlySAM, torch.optim.SGD, dict(SGD, rho=0.3, sigma=0.7)),
    "gsam": (methods.GSAM, torch.optim.AdamW, dict(ADAMW, rho=0.3, alpha=0.7, groups=MASKED)),
    "looksam": (methods.LookSAM, torch.optim.SGD, dict(SGD, rho=0.3, k=2, alpha=0.4)),
    "layerwise": (methods.LookSAM, torch.optim.SGD, dict(SGD, rho=0.03, k=2, alpha=0.4, layerwise=True)),
    "wsam": (methods.WSAM, torch.optim.SGD, dict(SGD, rho=0.3, gamma=0.8)),
    "vasso": (methods.VaSSO, torch.optim.SGD, dict(SGD, rho=0.3, theta=0.3)),
    "preconditioned": (methods.PreconditionedSAM, torch.optim.AdamW, dict(ADAMW, rho=0.3)),
    "esam": (methods.ESAM, torch.optim.SGD, dict(SGD, rho=0.3, beta=1.0)),
    "msam": (methods.MSAM, torch.optim.SGD, dict(SGD, rho=0.3)),
}


def check_steps(mesh, layout, names):
    """Every option and method: norms and products are those of all elements, states lie as their parameters do."""
    for name in names:
        cls, base, given = CONFIGS[name]
        options = dict(given)
        dtype, overrides = options.pop("dtype", torch.float64), options.pop("groups", (dict(),))
        # The order of summation is all that differs: some roundings of the norm, that of float32 within chunks.
        tolerance = options.pop("tolerance", 2e-6 if dtype == torch.float32 else 1e-11)
        pair = Pair(mesh, layout, dtype)
        one, other = (cls(pair.groups(params, overrides), base, **options) for params in (pair.split, pair.alone))
        for seed in range(2):
            for optimizer in (one, other):
                (one_pass if cls is methods.MSAM else two_passes)(optimizer, pair.gradients, seed)
        if cls is methods.MSAM:
            one.eval(), other.eval()
        pair.close(one, other, name, tolerance)
        if one.ema_decay is not None:
            with one.averaged_weights(), other.averaged_weights():
                pair.close(one, other, "averages")
        for mine, theirs in zip(one.stats(), other.stats(), strict=True):
            if mine is not None and not (name == "when" or mine.isnan()):
                torch.testing.assert_close(mine, theirs, rtol=max(tolerance, 1e-7), atol=0.0, msg=f"stats of {name}")


def check_by_hand(mesh, layout):
    """The reference and the hand-written SAM, from the same start."""
    for backend in ("reference", "auto"):
        pair = Pair(mesh, layout)
        one = FusedSAM(pair.split, torch.optim.SGD, rho=0.3, adaptive=True, eta=0.02, backend=backend, **SGD)
        groups = [dict(params=pair.alone, **SGD)]
        other = oracle.SamByHand(groups, torch.optim.SGD, norm="float64", rho=0.3, adaptive=True, eta=0.02)
        for seed in range(3):
            pair.gradients(2 * seed)
            one.first_step(), other.climb()
            pair.gradients(2 * seed + 1)
            one.step(), other.descend()
        pair.close(one, other.base, f"by hand, {backend}")


def check_replicas(mesh, layout):
    """Where numbers are drawn, the replicas of a part draw the same, and other parts others."""
    for cls, dtype, options in (
        (FusedSAM, BF16, dict(stochastic_rounding=True)),
        (methods.ESAM, torch.float32, dict(beta=0.5)),
    ):
        pair = Pair(mesh, layout, dtype)
        optimizer = cls(pair.split, torch.optim.SGD, rho=0.3, **options, **SGD)
        for seed in range(3):
            two_passes(optimizer, pair.gradients, seed)
        for p in pair.split:
            for dim, placement in enumerate(p.placements if isinstance(p, DTensor) else (R, R)):
                if placement.is_replicate():
                    assert equal_over(mesh.get_group(dim), p), (cls, placement)
    equal = nn.Parameter(distributed(torch.ones(2048, dtype=BF16), mesh, (S0, R)))
    equal.grad = 0.01 * torch.ones_like(equal)
    FusedSAM([equal], "sgd", lr=0.1, stochastic_rounding=True).base_step()
    assert equal_over(mesh.get_group(1), equal) and not equal_over(mesh.get_group(0), equal)


def equal_over(group, tensor):
    """Whether all ranks of a group have the same part here."""
    part = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().float()
    largest, least = part.clone(), part.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    dist.all_reduce(least, dist.ReduceOp.MIN, group=group)
    return torch.equal(largest, least)


class _NoWaiting(TorchDispatchMode):
    """Nothing is read back to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def check_communication(mesh, layout, expected):
    """One all-reduce a step and process group, and none in the second pass; the host waits for no number."""
    for cls, more in ((FusedSAM, 0), (methods.GSAM, 1)):
        pair = Pair(mesh, layout)
        optimizer = cls(pair.split, torch.optim.SGD, rho=0.3, **SGD)
        two_passes(optimizer, pair.gradients, 0)
        for seed, step, count in ((2, optimizer.first_step, expected), (3, optimizer.step, more * expected)):
            pair.gradients(seed)
            with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced, _NoWaiting():
                step()
            assert reduced.call_count == count, (cls, step)


def check_all(world_size):
    line = init_device_mesh("cpu", (world_size,))
    if world_size == 2:
        check_steps(line, LINE, CONFIGS)
    else:
        few = ("asam", "p=1.2", "clipped", "masters", "gsam adamax", "gsam", "layerwise", "msam")
        check_steps(init_device_mesh("cpu", (2, 2)), SQUARE, few)
        check_steps(line, LINE, ("asam", "p=3"))
        check_communication(init_device_mesh("cpu", (2, 2)), SQUARE, 2)
        check_replicas(init_device_mesh("cpu", (2, 2)), SQUARE)
    check_by_hand(line, LINE)
    check_communication(line, LINE, 1)
    return ["check_steps", "check_by_hand", "check_communication"]
