"""Models under FSDP2, HSDP, tensor parallelism and FSDP2 over it, against SAM by hand on one process."""

from __future__ import annotations

import copy

import oracle
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

import fastsam
from fastsam import FusedSAM, SAMStep

SGD = dict(lr=0.1, momentum=0.8, weight_decay=0.02)
PLAN = {
    "up": ColwiseParallel(),
    "down": RowwiseParallel(output_layouts=Shard(1)),
    "norm": SequenceParallel(),
    "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
}


class Net(nn.Module):
    """[n, 4, 6] to [n, 4, 5]; biases of 5 and the like leave ranks with uneven parts, or none."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.LayerNorm(6, dtype=dtype)  # of tensor parallelism's, this one is no DTensor
        self.up, self.down = nn.Linear(6, 12, dtype=dtype), nn.Linear(12, 3, dtype=dtype)
        self.norm, self.head = nn.LayerNorm(3, dtype=dtype), nn.Linear(3, 5, dtype=dtype)

    def forward(self, x):
        return self.head(self.norm(self.down(self.up(self.first(x)).tanh())))


def batch(t, n=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(t)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return draw(n, 4, 6), draw(n, 4, 5)


def layouts(world_size):
    """By name, what wraps a model, and which part of the batch a rank has: (number of parts, its own)."""
    rank = dist.get_rank()
    line = init_device_mesh("cpu", (world_size,))

    def fsdp(model, mesh=line, **options):
        for part in (model.up, model.head):
            fully_shard(part, mesh=mesh, **options)
        return fully_shard(model, mesh=mesh, **options)

    def tensor_parallel(model, mesh=line):
        return parallelize_module(model, mesh, PLAN)

    found = {
        "fsdp": (fsdp, world_size, rank),
        "fsdp, weights kept whole": (lambda m: fsdp(m, reshard_after_forward=False), world_size, rank),
        "fsdp, offloaded": (lambda m: fsdp(m, offload_policy=CPUOffloadPolicy(pin_memory=False)), world_size, rank),
        "tensor parallel": (tensor_parallel, 1, 0),
    }
    if world_size == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
        found = {"fsdp": found["fsdp"]}
        found["hsdp"] = lambda m: fsdp(m, square), 4, rank
        found["fsdp over tensor parallel"] = (
            lambda m: fsdp(tensor_parallel(m, square["inner"]), square["outer"]),
            2,
            rank // 2,
        )
    return found


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def close(params, twins, what, tolerance=1e-10):
    for (name, p), q in zip(params, twins, strict=True):
        mine, theirs = whole(p.detach()), q.detach()
        torch.testing.assert_close(
            mine, theirs, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{what}: {name}: {m}"
        )


def backward(model, x, y, scale=1.0):
    loss = F.mse_loss(model(x), y)
    (loss * scale).backward()
    return loss


def check_models(world_size):
    """Forward and backward passes, by closure and by two calls, clipped between the passes and not."""
    for name, (wrap, parts, part) in layouts(world_size).items():
        twin = Net()
        model = wrap(copy.deepcopy(twin))
        one = FusedSAM(model.parameters(), torch.optim.AdamW, lr=0.01, rho=0.3, adaptive=True, eta=0.02)
        group = dict(params=list(twin.parameters()), lr=0.01)
        other = oracle.SamByHand([group], torch.optim.AdamW, norm="float64", rho=0.3, adaptive=True, eta=0.02)
        for t in range(3):
            x, y = batch(t)
            mine = x[part::parts], y[part::parts]
            clips, clip = t > 0, torch.nn.utils.clip_grad_norm_
            mixed = clips and "tensor" in name  # torch does not clip plain gradients beside distributed ones
            one.max_grad_norm = 0.05 if mixed else None

            def closure(model=model, mine=mine):
                model.zero_grad()
                return backward(model, *mine)

            if clips:
                closure()
                assert one.first_step(zero_grad=True)
                backward(model, *mine)
                if not mixed:
                    clip(model.parameters(), 0.05)
                one.second_step()
            else:
                one.step(closure)
            twin.zero_grad()
            backward(twin, x, y)
            norm = other.norm()
            other.climb()
            twin.zero_grad()
            backward(twin, x, y)
            if clips:
                clip(twin.parameters(), 0.05)
            other.descend()
            torch.testing.assert_close(one.stats().first_norm.item(), norm, rtol=1e-10, atol=0, msg=name)
            close(model.named_parameters(), twin.parameters(), f"{name}, step {t}")
        for (key, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            for state in ("exp_avg", "exp_avg_sq"):
                theirs = other.base.state[q][state]
                close([(f"{key}, {state}", one.state[p][state])], [theirs], name)


def check_weights_come_back(world_size):
    """Exactly, by restore(), by an exception, for unperturbed(), and at a learning rate of 0."""
    wrap, parts, part = layouts(world_size)["fsdp"]
    model = wrap(Net(torch.float32))
    (x, y), params = batch(0, dtype=torch.float32), list(model.parameters())
    x, y = x[part::parts], y[part::parts]
    optimizer = FusedSAM(params, torch.optim.SGD, lr=0.0, momentum=0.9, rho=0.5)
    before, places = [whole(p.detach()) for p in params], [p.to_local().data_ptr() for p in params]

    def back(moved=False):
        assert [p.to_local().data_ptr() for p in params] == places
        return all(torch.equal(whole(p.detach()), w) for p, w in zip(params, before, strict=True)) != moved

    backward(model, x, y)
    optimizer.first_step()
    assert back(moved=True)
    with optimizer.unperturbed():
        assert back()
        with torch.no_grad():
            found = model(x)
        model.reshard()
    assert back(moved=True)
    with torch.no_grad():
        assert not torch.equal(model(x), found)
    model.reshard()
    optimizer.restore()
    assert back()
    optimizer.first_step(zero_grad=True)
    backward(model, x, y)
    optimizer.step()
    assert back() and optimizer.state[params[0]]["momentum_buffer"].full_tensor().any()

    def failing():
        if optimizer.perturbed:
            raise KeyError("in the second pass")
        optimizer.zero_grad()
        backward(model, x, y)

    try:
        optimizer.step(failing)
    except KeyError:
        assert back()
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.zero_grad()
    backward(model, x, y)
    optimizer.base_step()
    assert back(moved=True)


def check_overflow(world_size):
    """An overflow on one rank alone: the same on all, in the first pass and, with a GradScaler, in the second."""
    wrap, parts, part = layouts(world_size)["fsdp"]
    model, twin = Net(), Net()
    model = wrap(model)
    one = FusedSAM(model.parameters(), torch.optim.SGD, rho=0.3, **SGD)
    base = torch.optim.SGD(twin.parameters(), foreach=False, **SGD)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for t, (first, second) in enumerate([(float("inf"), 1.0), (1.0, float("inf"))]):
        x, y = batch(t)
        mine = x[part::parts], y[part::parts]
        model.zero_grad()
        scaler.scale(backward_loss(model, *mine)).backward()
        spoil(model, first)
        one.first_step(zero_grad=True)
        scaler.scale(backward_loss(model, *mine)).backward()
        spoil(model, second)
        scaler.step(one)
        scaler.update()
        if second == 1.0:
            twin.zero_grad()
            backward(twin, x, y)
            base.step()
        close(model.named_parameters(), twin.parameters(), f"overflow in pass {t + 1}")
    stats = one.stats()
    assert (stats.first_overflows.item(), stats.second_overflows.item()) == (1, 1)
    assert scaler.get_scale() == 512.0


def backward_loss(model, x, y):
    return F.mse_loss(model(x), y)


def spoil(model, value):
    """Put a number into the last rank's part of a gradient alone."""
    if value != 1.0 and dist.get_rank() == 1:
        model.up.weight.grad.to_local()[0] = value


def check_sam_step(world_size):
    """SAMStep with micro-batches, which FSDP2 adds up in the split gradients, and with one perturbation for each."""
    wrap, parts, part = layouts(world_size)["fsdp"]
    for cls, options in ((fastsam.methods.GSAM, {}), (FusedSAM, dict(sharpness="micro")))[: 4 // world_size]:
        twin = Net()
        model = wrap(copy.deepcopy(twin))
        one, other = (cls(m.parameters(), torch.optim.SGD, rho=0.3, **SGD) for m in (model, twin))
        step, alone = (SAMStep(m, o, F.mse_loss, micro_batches=2, **options) for m, o in ((model, one), (twin, other)))
        for t in range(2):
            x, y = batch(t, 4 * world_size)
            rows = [
                i for k in range(2) for i in range(4 * world_size) if i // (2 * world_size) == k and i % parts == part
            ]
            step(x[rows], y[rows])
            alone(x, y)
        close(model.named_parameters(), twin.parameters(), f"SAMStep, {cls.__name__}, {options}")


def check_low_precision(world_size):
    """A policy of bfloat16 within FSDP2, whose split weights and gradients are float32; the step is SAM's for these."""
    wrap, parts, part = layouts(world_size)["fsdp"]
    model = Net(torch.float32)
    for module in (model.up, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (world_size,)), mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    optimizer = FusedSAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.5)
    x, y = batch(0, dtype=torch.float32)
    losses = []
    for _ in range(12):

        def closure():
            optimizer.zero_grad()
            return backward(model, x[part::parts], y[part::parts].bfloat16())

        losses.append(optimizer.step(closure).item())
    assert all(p.dtype == torch.float32 for p in model.parameters()) and losses[-1] < losses[0]


def check_all(world_size):
    checks = [check_models, check_weights_come_back, check_overflow, check_sam_step]
    checks += [check_low_precision] if world_size == 2 else []
    for check in checks:
        check(world_size)
    return [check.__name__ for check in checks]
