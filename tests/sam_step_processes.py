"""What tests/test_sam_step_parallel.py runs in four processes: SAMStep under DistributedDataParallel."""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import join
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastsam
from fastsam import SAMStep, methods

RHO, OPTIONS = 0.2, dict(lr=0.05, momentum=0.8, weight_decay=0.01)


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).to(dtype)


def batch(t, n):
    generator = torch.Generator().manual_seed(t)
    return torch.randn(n, 6, generator=generator, dtype=torch.float64), torch.randint(0, 4, (n,), generator=generator)


def optimizer_of(model, cls=fastsam.FusedSAM, **more):
    return cls(model.parameters(), torch.optim.SGD, RHO, **OPTIONS, **more)


def joint_of(params, *options, **more):
    """Two optimizers under one norm, over the parameters of one."""
    params = list(params)
    return fastsam.joint(*(fastsam.FusedSAM(part, *options, **more) for part in (params[:2], params[2:])))


def sam_gradient(model, x, y):
    params = list(model.parameters())
    g1 = torch.autograd.grad(F.cross_entropy(model(x), y), params)
    n = torch.cat([g.flatten() for g in g1]).norm()
    moved = {name: p + g * (RHO / n) for (name, p), g in zip(model.named_parameters(), g1, strict=True)}
    return torch.autograd.grad(F.cross_entropy(torch.func.functional_call(model, moved, (x,)), y), params)


def close(model, twin, what):
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11, msg=lambda m: f"{what}: {m}")


def check_global(rank, world_size):
    """A step is that of one process with the whole batch, with micro-batches, too."""
    for micro_batches in (1, 3):
        for cls in (fastsam.FusedSAM, methods.GSAM, methods.LookSAM, joint_of):
            model, twin = network(), network()
            parallel = DistributedDataParallel(model)
            step = SAMStep(parallel, optimizer_of(model, cls), F.cross_entropy, micro_batches=micro_batches)
            one = fastsam.FusedSAM if cls is joint_of else cls
            alone = SAMStep(twin, optimizer_of(twin, one), F.cross_entropy)
            for t in range(6):
                x, y = batch(t, 6 * world_size)
                step(x[rank::world_size], y[rank::world_size])
                alone(x, y)
            close(model, twin, f"global, {cls.__name__}, {micro_batches} micro-batches")


def check_local(rank, world_size):
    """A step is that with the mean of the ranks' SAM gradients."""
    for static, cls in ((False, fastsam.FusedSAM), (True, fastsam.FusedSAM), (False, joint_of)):
        for sharpness, micro_batches in (("batch", 1), ("batch", 2), ("micro", 2)):
            model, twin = network(), network()
            parallel = DistributedDataParallel(model, static_graph=static)
            step = SAMStep(
                parallel,
                optimizer_of(model, cls),
                F.cross_entropy,
                perturb="local",
                micro_batches=micro_batches,
                sharpness=sharpness,
            )
            base = torch.optim.SGD(twin.parameters(), foreach=False, **OPTIONS)
            for t in range(4):
                x, y = batch(t, 8 * world_size)
                step(x[rank::world_size], y[rank::world_size])
                parts = [(x[r::world_size], y[r::world_size]) for r in range(world_size)]
                if sharpness == "micro":
                    parts = [(a[i : i + 4], b[i : i + 4]) for a, b in parts for i in (0, 4)]
                if static and t == 0:  # the first iteration of a static graph communicates in both passes
                    for p, q in zip(twin.parameters(), model.parameters(), strict=True):
                        p.data.copy_(q)
                    base.state.clear()
                    for p, q in zip(twin.parameters(), model.parameters(), strict=True):
                        base.state[p]["momentum_buffer"] = step.optimizer.state[q]["momentum_buffer"].clone()
                    continue
                grads = [sam_gradient(twin, a, b) for a, b in parts]
                for p, *each in zip(twin.parameters(), *grads, strict=True):
                    p.grad = sum(each) / len(each)
                base.step()
                close(model, twin, f"local, {sharpness}, {micro_batches} micro-batches, static_graph={static}")


def check_select(rank, world_size):
    """ESAM's selection: each rank climbs by its own part and takes its own samples; what they give is averaged."""
    model, twin, per_sample = network(), network(), torch.nn.CrossEntropyLoss(reduction="none")
    parallel = DistributedDataParallel(model)
    step = SAMStep(parallel, optimizer_of(model), per_sample, perturb="local", select=0.5)
    base = torch.optim.SGD(twin.parameters(), foreach=False, **OPTIONS)
    for t in range(4):
        x, y = batch(t, 8 * world_size)
        step(x[rank::world_size], y[rank::world_size])
        each = []
        for r in range(world_size):
            a, b = x[r::world_size], y[r::world_size]
            g1 = torch.autograd.grad(per_sample(twin(a), b).mean(), list(twin.parameters()))
            n = torch.cat([g.flatten() for g in g1]).norm()
            moved = {name: p + g * (RHO / n) for (name, p), g in zip(twin.named_parameters(), g1, strict=True)}
            losses = per_sample(torch.func.functional_call(twin, moved, (a,)), b)
            chosen = (losses - per_sample(twin(a), b)).argsort(descending=True)[:4]
            each.append(torch.autograd.grad(losses[chosen].mean(), list(twin.parameters())))
        for p, *grads in zip(twin.parameters(), *each, strict=True):
            p.grad = sum(grads) / world_size
        base.step()
    close(model, twin, "select")


def check_drift(rank, world_size):
    """After 300 steps of each kind all ranks have the same bits."""
    for dtype, options in (
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.bfloat16, dict(master_weights=True)),
        (torch.bfloat16, dict(stochastic_rounding=True)),
    ):
        model = network(dtype)
        parallel = DistributedDataParallel(model)
        step = SAMStep(parallel, optimizer_of(model, **options), F.cross_entropy, perturb="local")
        for t in range(300):
            x, y = batch(t, 3 * world_size)
            step(x[rank::world_size].to(dtype), y[rank::world_size])
        mine = torch.cat([p.detach().flatten() for p in model.parameters()])
        theirs = mine.clone()
        dist.broadcast(theirs, 0)
        assert torch.equal(mine, theirs) and mine.isfinite().all(), (dtype, options)


def check_communication(rank, world_size):
    """Under "local" only the second pass communicates, under "global" both, whatever the number of micro-batches."""
    for perturb, micro_batches, expected in (("local", 1, 1), ("local", 3, 1), ("global", 1, 2), ("global", 3, 2)):
        model, calls = network(), []
        parallel = DistributedDataParallel(model)

        def hook(state, bucket, calls=calls):
            calls.append(0)
            return (
                dist.all_reduce(bucket.buffer().div_(world_size), async_op=True)
                .get_future()
                .then(lambda future: future.value()[0])
            )

        parallel.register_comm_hook(None, hook)
        step = SAMStep(parallel, optimizer_of(model), F.cross_entropy, perturb=perturb, micro_batches=micro_batches)
        x, y = batch(0, 6)
        step(x, y)
        calls.clear()
        step(x, y)
        assert len(calls) == expected, (perturb, micro_batches, len(calls))


def main():
    rank, world_size, _ = join()
    with contextlib.suppress(RuntimeError):
        torch.set_num_threads(1)
    checks = [check_global, check_local, check_select, check_communication]
    for check in checks:
        check(rank, world_size)
    if rank == 0:
        print("checked", *(check.__name__ for check in checks))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
