"""Host time of a step over distributed parameters (DTensors): FusedSAM's two passes against one step of torch's AdamW.

    python benchmarks/distributed.py            # 161 tensors of 64 elements, one process
    python benchmarks/distributed.py --quick    # does it work?

One process in a group of its own, so nothing is communicated and what is left is Python. Gradients are given. torch's
optimizers go through DTensor's dispatch for each of their operations; FusedSAM reads the local parts in C++. Before the
first run the expectation was: the native reader has three attributes more to look up for a tensor than for a plain one,
some 0.2 us, twice a step, so 161 DTensors take less than 100 us more than 161 plain tensors; fused AdamW dispatches one
operation on five lists, which cannot be below 1 us a tensor, foreach AdamW about fifteen. So FusedSAM is to take less
time than either. Ratios are of times within a round; other programs on the machine widen their spread, not more.
Found with torch 2.13 on a quiet machine: fused AdamW takes 10.5 times FusedSAM's time, foreach AdamW 15.2 times;
FusedSAM's is 194 us for plain tensors, 307 us under FSDP2 and 325 us where a gradient's description is another object
than its parameter's, so 110 to 130 us more instead of 100.
"""

import argparse
import datetime
import statistics

import torch
import torch.distributed as dist
from devices import Cpu, HostClock
from timing import environment, interleave
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor

from fastsam import FusedSAM

COUNT, NUMEL = 161, 64


class Sam:
    """Both passes of FusedSAM."""

    def __init__(self, name, params):
        """Over these parameters."""
        self.name, self.optimizer = name, FusedSAM(params, torch.optim.AdamW, lr=1e-3, rho=0.05)

    def prepare_first(self):
        """Gradients stay where they are."""

    prepare_second = prepare_first

    def first(self):
        """Climb."""
        self.optimizer.first_step()

    def second(self):
        """Restore and step."""
        self.optimizer.step()


class Torch(Sam):
    """One step of AdamW."""

    def __init__(self, name, params, **options):
        """Over these parameters."""
        self.name, self.optimizer = name, torch.optim.AdamW(params, lr=1e-3, **options)

    def first(self):
        """It has one pass."""


class Squares(nn.Module):
    """A model whose gradients are twice its parameters."""

    def __init__(self, params):
        """Of these parameters."""
        super().__init__()
        self.weights = nn.ParameterList(params)

    def forward(self):
        """A loss."""
        return sum(weight.square().sum() for weight in self.weights)


def parameters(kind):
    """Tiny parameters with gradients, as backward leaves them: plain, of FSDP2, or DTensors made by DTensor's dispatch.

    FSDP2 gives a gradient its parameter's own description; those of dispatch are equal, but other objects.
    """
    values, mesh = [torch.randn(NUMEL) for _ in range(COUNT)], init_device_mesh("cpu", (1,))
    if kind == "dispatch":
        values = [distribute_tensor(value, mesh, [Replicate()]) for value in values]
    model = Squares([nn.Parameter(value) for value in values])
    if kind == "fsdp2":
        fully_shard(model, mesh=mesh)
    model().backward()
    return list(model.parameters())


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=40)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    contenders = [
        Sam("FusedSAM, plain", parameters("plain")),
        Sam("FusedSAM, FSDP2", parameters("fsdp2")),
        Sam("FusedSAM, DTensors of dispatch", parameters("dispatch")),
        Torch("AdamW(fused=True), plain", parameters("plain"), fused=True),
        Torch("AdamW(fused=True), FSDP2", parameters("fsdp2"), fused=True),
        Torch("AdamW(foreach=True), FSDP2", parameters("fsdp2"), foreach=True),
    ]
    rounds, burst = (3, 2) if args.quick else (30, 10)
    times = interleave(contenders, HostClock(Cpu()), rounds, 2, burst)
    facts = environment(Cpu(), 1)
    print(f"{facts['cpu']}, torch {facts['torch']}, load average {facts['load_average']}, {COUNT} tensors of {NUMEL}")
    mine = times["FusedSAM, FSDP2"]
    for name, seconds in times.items():
        quartiles = statistics.quantiles([a / b for a, b in zip(seconds, mine, strict=True)], n=4, method="inclusive")
        ratio = "{1:.2f} ({0:.2f} to {2:.2f})".format(*quartiles)
        print(f"{name:34} {statistics.median(seconds) * 1e6:8.0f} us   {ratio} of FusedSAM's under FSDP2")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
