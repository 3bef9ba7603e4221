"""What tests/test_data_parallel.py runs in two processes: DistributedDataParallel's options, and a rank that fails."""

from __future__ import annotations

import datetime
import os
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from oracle import SamByHand, assert_same
from processes import join
from sam_step_processes import OPTIONS, RHO, batch, check_drift, close, network, optimizer_of, sam_gradient
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from fastsam import SAMStep


def part(t, rank, world_size, dtype=torch.float64):
    x, y = batch(t, 8 * world_size)
    return x[rank::world_size].to(dtype), y[rank::world_size]


def no_drift(model, what):
    mine = torch.cat([p.detach().flatten() for p in model.parameters()])
    theirs = mine.clone()
    dist.broadcast(theirs, 0)
    assert torch.equal(mine, theirs) and mine.isfinite().all(), what


def bfloat16(state, bucket):
    return default_hooks.bf16_compress_hook(state, bucket)  # by its own name DDP takes it on GPUs alone


def power_sgd():
    state = powerSGD_hook.PowerSGDState(None, 1, start_powerSGD_iter=2, min_compression_rate=1)
    return state, powerSGD_hook.powerSGD_hook


def check_by_hand(rank, world_size):
    """Whatever DDP does to gradients, a step has the bits of SAM by hand in it, and ranks stay together."""
    for name, options, hook, local, set_to_none in (
        ("views", dict(gradient_as_bucket_view=True), None, True, False),
        ("views, set to None", dict(gradient_as_bucket_view=True), None, True, True),
        ("static graph", dict(static_graph=True, gradient_as_bucket_view=True), None, True, True),
        ("looking for unused", dict(find_unused_parameters=True), None, True, False),
        ("bfloat16", {}, lambda: (None, bfloat16), False, True),
        ("PowerSGD", {}, power_sgd, False, True),
        ("PowerSGD, views", dict(gradient_as_bucket_view=True), power_sgd, True, False),
    ):
        nets = [network(torch.float32) for _ in range(2)]
        parallels = [DistributedDataParallel(net, **options) for net in nets]
        for parallel in parallels if hook else ():
            parallel.register_comm_hook(*hook())
        opt = optimizer_of(nets[0])
        hand = SamByHand([dict(params=list(nets[1].parameters()))], torch.optim.SGD, rho=RHO, **OPTIONS)
        for t in range(5):
            x, y = part(t, rank, world_size, torch.float32)
            silent = local and not (t == 0 and "static_graph" in options)
            for parallel, climb, descend, zero_grad in (
                (parallels[0], opt.first_step, opt.step, opt.zero_grad),
                (parallels[1], hand.climb, hand.descend, hand.base.zero_grad),
            ):
                with parallel.no_sync() if silent else nullcontext():
                    F.cross_entropy(parallel(x), y).backward()
                climb()
                zero_grad(set_to_none=set_to_none)
                F.cross_entropy(parallel(x), y).backward()
                descend()
                zero_grad(set_to_none=set_to_none)
            for p, q in zip(*(net.parameters() for net in nets), strict=True):
                assert_same(p, q)
        no_drift(nets[0], name)


def check_local(rank, world_size):
    """With `no_sync` around the first pass a step is that with the mean of the ranks' SAM gradients."""
    for options in (dict(gradient_as_bucket_view=True), dict(find_unused_parameters=True)):
        for count in (1, 2):
            model, twin = network(), network()
            parallel, opt = DistributedDataParallel(model, **options), optimizer_of(model)
            if count > 1:
                more = dict(perturb="local", sharpness="micro", micro_batches=count)
                step = SAMStep(parallel, opt, F.cross_entropy, **more)
            base = torch.optim.SGD(twin.parameters(), foreach=False, **OPTIONS)
            for t in range(3):
                x, y = part(t, rank, world_size)
                if count > 1:
                    step(x, y)
                else:
                    with parallel.no_sync():
                        F.cross_entropy(parallel(x), y).backward()
                    opt.first_step()
                    opt.zero_grad(set_to_none=False)
                    F.cross_entropy(parallel(x), y).backward()
                    opt.step()
                    opt.zero_grad()
                parts = [part(t, r, world_size) for r in range(world_size)]
                pairs = [pair for x, y in parts for pair in zip(x.chunk(count), y.chunk(count), strict=True)]
                grads = [sam_gradient(twin, a, b) for a, b in pairs]
                for p, *each in zip(twin.parameters(), *grads, strict=True):
                    p.grad = sum(each) / len(each)
                base.step()
                close(model, twin, f"{options}, {count} micro-batches")


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 4).double(), nn.Linear(6, 4).double()

    def forward(self, x, names):
        return sum(getattr(self, name)(x) for name in names)


def check_unused(rank, world_size):
    """Parameters that one of the passes leaves out, with and without communication in the first."""
    for perturb in ("local", "global"):
        for passes in (("ab", "a"), ("a", "ab"), ("a", "b")):
            model, twin = Branches(), Branches()
            parallel = DistributedDataParallel(model, find_unused_parameters=True)
            opt, calls = optimizer_of(model), iter(passes * 3)

            def both(backward, x, y, parallel=parallel, calls=calls):
                loss = F.cross_entropy(parallel(x, next(calls)), y)
                backward(loss)
                return loss

            step = SAMStep(parallel, opt, forward_backward=both, perturb=perturb)
            base = torch.optim.SGD(twin.parameters(), foreach=False, **OPTIONS)
            named = list(twin.named_parameters())
            for t in range(3):
                step(*part(t, rank, world_size))
                parts = [part(t, r, world_size) for r in range(world_size)]
                if perturb == "global":
                    parts = [batch(t, 8 * world_size)]
                base.zero_grad()
                for x, y in parts:
                    loss = F.cross_entropy(twin(x, passes[0]), y)
                    g1 = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
                    norm = torch.cat([g.flatten() for g in g1 if g is not None]).norm()
                    moved = {
                        name: p if g is None else p + g * RHO / norm for (name, p), g in zip(named, g1, strict=True)
                    }
                    loss = F.cross_entropy(torch.func.functional_call(twin, moved, (x, passes[1])), y)
                    (loss / len(parts)).backward(inputs=[p for name, p in named if name[0] in passes[1]])
                for name, p in named:  # without communication in the first pass they get zeros
                    if perturb == "local" and name[0] in passes[0] and p.grad is None:
                        p.grad = torch.zeros_like(p)
                base.step()
                close(model, twin, f"{perturb}, {passes}")
            no_drift(model, (perturb, passes))


def check_running_statistics(rank, world_size):
    """They are those of the first passes, each counted once: rank 0's are what DDP hands to the others."""
    for perturb in ("local", "global"):
        torch.manual_seed(0)
        model, seen = nn.Sequential(network(), nn.BatchNorm1d(4).double()), nn.BatchNorm1d(4).double()
        step = SAMStep(DistributedDataParallel(model), optimizer_of(model), F.cross_entropy, perturb=perturb)
        for t in range(3):
            with torch.no_grad():
                seen(model[0](part(t, 0, world_size)[0]))
            step(*part(t, rank, world_size))
            assert model[1].num_batches_tracked == t + 1
            if rank == 0 or perturb == "global":
                torch.testing.assert_close(model[1].running_var, seen.running_var)
                torch.testing.assert_close(model[1].running_mean, seen.running_mean)
        no_drift(model, perturb)


def check_overflow_on_one_rank(rank, world_size):
    """In its own first pass it takes the gradient at w; in the second one no rank steps, and all halve the scale."""
    model, twin = network(), network()
    parallel, opt = DistributedDataParallel(model), optimizer_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    base = torch.optim.SGD(twin.parameters(), foreach=False, **OPTIONS)
    for t, overflows_in in enumerate((None, 1, 2, None)):

        def both(backward, x, y, overflows_in=overflows_in):
            loss = F.cross_entropy(parallel(x), y)
            over = rank == 1 and overflows_in == 1 + opt.perturbed
            backward(loss * float("inf") if over else loss)
            return loss

        SAMStep(parallel, opt, forward_backward=both, scaler=scaler, perturb="local")(*part(t, rank, world_size))
        grads = []
        for r in range(world_size):
            x, y = part(t, r, world_size)
            if r == 1 and overflows_in == 1:
                grads.append(torch.autograd.grad(F.cross_entropy(twin(x), y), list(twin.parameters())))
            else:
                grads.append(sam_gradient(twin, x, y))
        for p, *each in zip(twin.parameters(), *grads, strict=True):
            p.grad = sum(each) / len(each)
        if overflows_in != 2:
            base.step()
        close(model, twin, f"an overflow in pass {overflows_in}")
        assert scaler.get_scale() == (256.0 if t < 2 else 128.0)
    no_drift(model, "overflows")


def check_compiled(rank, world_size):
    """A compiled model within DDP: one graph, whether a pass communicates or not."""
    from torch._dynamo.testing import CompileCounter

    model, twin, graphs = network(), network(), CompileCounter()
    steps = [
        SAMStep(DistributedDataParallel(inner), optimizer_of(net), F.cross_entropy, perturb="local")
        for net, inner in ((model, torch.compile(model, backend=graphs)), (twin, twin))
    ]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for t in range(3):
            for step in steps:
                step(*part(t, rank, world_size))
    close(model, twin, "compiled")
    assert graphs.frame_count == 1


class Gone(Exception):
    pass


def check_a_rank_that_fails(rank, world_size):
    """Between the passes: the other one is told within the time limit, and both have their old weights back."""

    def two_calls(parallel, opt, leave):
        x, y = part(0, rank, world_size)
        try:
            with parallel.no_sync():
                F.cross_entropy(parallel(x), y).backward()
            opt.first_step(zero_grad=True)
            leave()
            F.cross_entropy(parallel(x), y).backward()
            opt.step()
        except BaseException:
            opt.restore()
            raise

    def closure(parallel, opt, leave):
        x, y = part(0, rank, world_size)

        def run():
            opt.zero_grad()
            if opt.perturbed:
                leave()
            F.cross_entropy(parallel(x), y).backward()

        opt.step(run)

    def one_call(parallel, opt, leave):
        def both(backward, x, y):
            if opt.perturbed:
                leave()
            backward(F.cross_entropy(parallel(x), y))

        SAMStep(parallel, opt, forward_backward=both, perturb="local")(*part(0, rank, world_size))

    def raises():
        if rank == 1:
            raise Gone

    def dies():
        if rank == 1:
            os._exit(0)

    for loop in (two_calls, closure, one_call):
        group = dist.new_group(timeout=datetime.timedelta(seconds=1))
        model = network()
        parallel, opt = DistributedDataParallel(model, process_group=group), optimizer_of(model)
        loop(parallel, opt, lambda: None)
        old = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(Gone) if rank == 1 else pytest.raises(RuntimeError, match="(?i)timed? ?out"):
            loop(parallel, opt, raises)
        assert not opt.perturbed
        for p, w in zip(model.parameters(), old, strict=True):
            assert_same(p, w)
    for p, w in zip(model.parameters(), network().parameters(), strict=True):
        assert not torch.equal(p, w)
    model = network()
    parallel, opt = DistributedDataParallel(model), optimizer_of(model)
    with pytest.raises(RuntimeError, match="(?i)connection"):
        closure(parallel, opt, dies)
    for p, w in zip(model.parameters(), network().parameters(), strict=True):
        assert_same(p, w)


def main():
    rank, world_size, _ = join()
    torch.set_num_threads(1)
    checks = (
        check_by_hand,
        check_local,
        check_drift,
        check_unused,
        check_running_statistics,
        check_overflow_on_one_rank,
        check_compiled,
        check_a_rank_that_fails,  # and leaves the other one alone
    )
    for check in checks:
        check(rank, world_size)
    print("checked", *(check.__name__ for check in checks))
    os._exit(0)


if __name__ == "__main__":
    main()
