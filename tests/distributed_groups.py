"""`norm_group=` (FSDP1, parts of a pipeline), ZeRO beside it, gradients that lie otherwise, replaced parameters."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from distributed_models import Net, backward, batch, close, layouts
from distributed_steps import LINE, Pair, two_passes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

from fastsam import FusedSAM, SAMStep, joint, methods

SGD = dict(lr=0.1, momentum=0.8, weight_decay=0.02)


def run(optimizer, model, x, y):
    def closure():
        optimizer.zero_grad()
        return backward(model, x, y)

    return optimizer.step(closure)


def check_fsdp1(world_size):
    """FullyShardedDataParallel, whose parameters are plain views of one flat one, under the norm of its group."""
    rank = dist.get_rank()
    for original in (True, False):
        twin = Net()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = FullyShardedDataParallel(
                copy.deepcopy(twin), use_orig_params=original, device_id=torch.device("cpu")
            )
        with pytest.raises(ValueError, match=r"FSDP1.*norm_group=model\.process_group"):
            FusedSAM(model.parameters(), torch.optim.SGD, rho=0.3, **SGD)
        with pytest.raises(ValueError, match=r"LookSAM: layerwise=True takes the norm of each parameter"):
            methods.LookSAM(model.parameters(), "sgd", layerwise=True, norm_group=model.process_group, **SGD)
        one = FusedSAM(model.parameters(), torch.optim.SGD, rho=0.3, norm_group=model.process_group, **SGD)
        other = FusedSAM(twin.parameters(), torch.optim.SGD, rho=0.3, **SGD)
        for t in range(4):
            x, y = batch(t)
            run(one, model, x[rank::world_size], y[rank::world_size])
            run(other, twin, x, y)
            torch.testing.assert_close(one.stats().first_norm, other.stats().first_norm, rtol=1e-10, atol=0)
        with FullyShardedDataParallel.summon_full_params(model), torch.no_grad():
            if original:
                found = [(n.removeprefix("_fsdp_wrapped_module."), p) for n, p in model.named_parameters()]
                close(found, [dict(twin.named_parameters())[n] for n, _ in found], "fsdp1")
            else:
                x, y = batch(9)
                torch.testing.assert_close(model.module(x), twin(x), rtol=1e-10, atol=1e-10)


def check_zero(world_size):
    """ZeroRedundancyOptimizer steps, FusedSAM climbs: the recipe of the message that refuses the one as base."""
    rank = dist.get_rank()
    twin = Net()
    model = DistributedDataParallel(copy.deepcopy(twin))
    sam = FusedSAM(model.parameters(), "sgd", lr=0.0, rho=0.3)
    zero = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01)
    other = FusedSAM(twin.parameters(), torch.optim.AdamW, lr=0.01, rho=0.3)
    for t in range(3):
        x, y = batch(t)
        mine = x[rank::world_size], y[rank::world_size]
        zero.zero_grad()
        backward(model, *mine)
        sam.first_step(zero_grad=True)
        backward(model, *mine)
        sam.restore()
        zero.step()
        run(other, twin, x, y)
    close(model.module.named_parameters(), twin.parameters(), "zero")


def check_parts(world_size):
    """Each rank with parameters of its own, as the stages of a pipeline, of several dtypes; one rank without any."""
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (world_size,))
    torch.manual_seed(0)
    kinds = {
        "sgd": (FusedSAM, dict(rho=0.3)),
        "p=3": (FusedSAM, dict(rho=0.3, p=3.0)),
        "clipped": (FusedSAM, dict(rho=0.3, max_grad_norm=0.5)),
        "gsam": (methods.GSAM, dict(rho=0.3, alpha=0.6)),
    }
    for group in (dist.group.WORLD, mesh):
        for kind, (cls, options) in kinds.items():
            torch.manual_seed(1)
            values = [[torch.randn(r + 3, dtype=torch.float64) for _ in range(r + 1)] for r in range(world_size - 1)]
            owned = [[nn.Parameter(v.clone()) for v in part] for part in values]
            everything = [nn.Parameter(v.clone()) for part in values for v in part]
            mine = owned[rank] if rank < world_size - 1 else [nn.Parameter(torch.ones(2), requires_grad=False)]
            if rank == 0:  # two buckets
                mine = [*mine, nn.Parameter(torch.tensor([0.5, -1.0]))]
            everything.append(nn.Parameter(torch.tensor([0.5, -1.0])))
            one = cls(mine, torch.optim.SGD, norm_group=group, **options, **SGD)
            other = cls(everything, torch.optim.SGD, **options, **SGD)
            for t in range(4):
                for optimizer, params in ((one, mine), (other, everything)):
                    for p in params:
                        p.grad = (0.3 * p + (t + 1) / p.numel()).detach() if p.requires_grad else None
                    optimizer.first_step() if t % 2 == 0 else optimizer.step()
            offset = sum(r + 1 for r in range(rank))
            theirs = everything[offset : offset + len(owned[rank])] if rank < world_size - 1 else []
            for p, q in zip(mine, theirs, strict=False):
                torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6, msg=lambda m, kind=kind: f"{kind}: {m}")
    copied = copy.deepcopy(one)
    assert copied.norm_group is not None and copied._sam.buckets.ranks.norm_group is one.norm_group.group
    for wrong, match in (
        ("world", "must be a process group of this rank or a DeviceMesh of one dimension, got 'world'"),
        (init_device_mesh("cpu", (world_size, 1)), "a mesh of one dimension, as mesh"),
    ):
        with pytest.raises(ValueError, match=match):
            FusedSAM(mine, "sgd", norm_group=wrong)


def check_joint(world_size):
    """Several optimizers over DTensors under one norm."""
    wrap, parts, part = layouts(world_size)["fsdp"]
    twin = Net()
    model = wrap(copy.deepcopy(twin))
    optimizers = []
    for net in (model, twin):
        params = list(net.parameters())
        two = (
            FusedSAM(params[:3], torch.optim.SGD, rho=0.3, **SGD),
            FusedSAM(params[3:], torch.optim.AdamW, lr=0.01, rho=0.2),
        )
        optimizers.append(joint(*two, max_grad_norm=0.2))
    for t in range(3):
        x, y = batch(t)
        run(optimizers[0], model, x[part::parts], y[part::parts])
        run(optimizers[1], twin, x, y)
    close(model.named_parameters(), twin.parameters(), "joint")


def check_joint_parts(world_size):
    """A joint over the stages of a pipeline, one of which has no parameters for the second optimizer."""
    rank, scaler = dist.get_rank(), torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def make(owned, **options):
        first, second = ([p for part in owned for p in part[k]] for k in (0, 1))
        parts = (
            FusedSAM([{"params": first}], torch.optim.SGD, rho=0.3, **SGD, **options),
            FusedSAM([{"params": second}], torch.optim.AdamW, lr=0.01, rho=0.2, **options),
        )
        return joint(*parts, max_grad_norm=0.2), [*first, *second]

    for p in (2.0, 3.0):
        torch.manual_seed(2)
        values = [[[torch.randn(r + 3)], [torch.randn(4)] * (r > 0)] for r in range(world_size)]
        mine, all_of = ([[[nn.Parameter(v.clone()) for v in k] for k in part] for part in values] for _ in range(2))
        (one, own), (other, everything) = make([mine[rank]], p=p, norm_group=dist.group.WORLD), make(all_of, p=p)
        for t in range(4):
            for optimizer, params in ((one, own), (other, everything)):
                for q in params:
                    q.grad = (0.3 * q + (t + 1) / q.numel()).detach()
                if t % 2 == 0:
                    optimizer.first_step()
                    continue
                for q in params:
                    q.grad *= scaler.scale(torch.ones(()))
                scaler.unscale_(optimizer)  # whose gradients are then measured, by all ranks or by none
                scaler.step(optimizer)
                scaler.update()
        theirs = [q for k in (0, 1) for q in all_of[rank][k]]
        for q, expected in zip(own, theirs, strict=True):
            torch.testing.assert_close(q, expected, rtol=1e-6, atol=1e-6, msg=lambda m, p=p: f"joint, p={p}: {m}")


def check_gradients_elsewhere(world_size):
    """Gradients that lie on the ranks otherwise are brought to their parameters; what cannot be is named."""
    mesh, rank = init_device_mesh("cpu", (world_size,)), dist.get_rank()
    for backend in ("auto", "reference"):
        whole = torch.arange(24.0, dtype=torch.float64).reshape(6, 4) - 9
        params = [
            nn.Parameter(DTensor.from_local(whole.clone(), mesh, [Replicate()]).redistribute(placements=[p]))
            for p in (Replicate(), Shard(0), Shard(1))
        ]
        alone = [nn.Parameter(whole.clone()) for _ in params]
        one, other = (FusedSAM(ps, torch.optim.SGD, rho=0.3, backend=backend, **SGD) for ps in (params, alone))
        summand = whole * (rank + 1) * 2 / (world_size * (world_size + 1))  # which add up to the whole
        for _ in range(2):
            for optimizer, own in ((one, params), (other, alone)):
                for p in own:
                    part = DTensor.from_local(summand, mesh, [Partial()])
                    p.grad = part if isinstance(p, DTensor) else whole.clone()
                optimizer.first_step()
                for p in own:
                    p.grad = DTensor.from_local(whole, mesh, [Replicate()]) if isinstance(p, DTensor) else whole.clone()
                optimizer.step()
        close(enumerate(params), alone, f"gradients elsewhere, {backend}")


def check_refusals(world_size):
    """Each rank's own ascent under FSDP2, by name, closures that do not clear, flat weights."""
    wrap, parts, part = layouts(world_size)["fsdp"]
    model = wrap(Net())
    optimizer = FusedSAM(model.parameters(), torch.optim.SGD, rho=0.3, **SGD)
    x, y = batch(0)
    model.set_requires_gradient_sync(False)
    backward(model, x[part::parts], y[part::parts])
    with pytest.raises(RuntimeError, match=r"FSDP2 keeps gradients to itself.*set_requires_gradient_sync\(True\)"):
        optimizer.first_step()
    assert not optimizer.perturbed
    model.set_requires_gradient_sync(True)
    backward(model, x[part::parts], y[part::parts])
    optimizer.first_step()
    optimizer.step()

    def adding():
        return backward(model, x[part::parts], y[part::parts])

    with pytest.raises(RuntimeError, match="the closure does not clear the gradients"):
        optimizer.step(adding)
    with pytest.raises(ValueError, match=r"perturb='local' is not possible under FSDP2"):
        SAMStep(model, optimizer, nn.functional.mse_loss, perturb="local")
    flat = FusedSAM(model.parameters(), torch.optim.SGD, rho=0.3, flatten=True, **SGD)
    with pytest.warns(UserWarning, match="flatten=True leaves .* it is a DTensor"):
        flat.prepare()
    with pytest.raises(ValueError, match=r"SparseSAM: its mask takes the largest of all elements"):
        methods.SparseSAM(model.parameters(), torch.optim.SGD, lr=0.1)


def check_replaced(world_size):
    """What accelerate does: the optimizer is built first, its parameters are replaced by DTensors in their place."""
    rank = dist.get_rank()
    twin = Net()
    model = copy.deepcopy(twin)
    one = FusedSAM(model.parameters(), torch.optim.AdamW, lr=0.01, rho=0.3)
    one.load_state_dict(one.state_dict())
    names = [name for name, _ in model.named_parameters()]
    for group in one.param_groups:
        for j in range(len(group["params"])):
            group["params"][j] = torch.empty(1)
    model.first = fully_shard(model.first)
    model = fully_shard(model)
    replaced = dict(model.named_parameters())
    for group in one.param_groups:
        for j, name in enumerate(names):
            group["params"][j] = replaced[name]
    other = FusedSAM(twin.parameters(), torch.optim.AdamW, lr=0.01, rho=0.3)
    for t in range(3):
        x, y = batch(t)
        run(one, model, x[rank::world_size], y[rank::world_size])
        run(other, twin, x, y)
    close(model.named_parameters(), twin.parameters(), "replaced")


def check_cast(world_size):
    """`model.to()` another dtype: the memory is another one, and the states follow."""
    pair = Pair(init_device_mesh("cpu", (world_size,)), LINE)
    one, other = (FusedSAM(params, torch.optim.AdamW, lr=0.01, rho=0.3) for params in (pair.split, pair.alone))
    for seed, dtype in enumerate((torch.float64, torch.float64, torch.float32, torch.float32)):
        for params in (pair.split, pair.alone):
            nn.ParameterList(params).zero_grad()
            nn.ParameterList(params).to(dtype)
        pair.dtype = dtype
        for optimizer in (one, other):
            two_passes(optimizer, pair.gradients, seed)
    pair.close(one, other, "cast", 2e-6)


def check_all(world_size):
    checks = [check_parts, check_gradients_elsewhere]
    if world_size == 2:
        checks += [check_fsdp1, check_zero, check_joint, check_joint_parts, check_refusals, check_replaced, check_cast]
    for check in checks:
        check(world_size)
    return [check.__name__ for check in checks]
