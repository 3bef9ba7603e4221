"""DistributedDataParallel, whose gradients may be views of its buckets and move after the first step; one process."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from processes import run_in_processes
from torch.nn.parallel import DistributedDataParallel

from fastsam import FusedSAM


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("bucket_view", [True, False])
def test_like_one_process(backend, device, process_group, bucket_view, set_to_none):
    """Odd sizes put gradients off the 16-byte grid inside the buckets; the first closure must raise no false alarm."""
    alone = torch.nn.Sequential(torch.nn.Linear(7, 33), torch.nn.Tanh(), torch.nn.Linear(33, 5)).to(device)
    model = copy.deepcopy(alone)
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=bucket_view)
    x = torch.randn(16, 7, device=device)
    for net, params in ((alone, alone.parameters()), (parallel, model.parameters())):
        optimizer = FusedSAM(params, torch.optim.SGD, lr=0.3, momentum=0.8, rho=0.4, backend=backend)

        def closure(net=net, optimizer=optimizer):
            optimizer.zero_grad(set_to_none=set_to_none)
            loss = net(x).square().mean()
            loss.backward()
            return loss

        for _ in range(4):
            optimizer.step(closure)
    for expected, found in zip(alone.parameters(), model.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_in_two_processes(tmp_path):
    assert "checked" in run_in_processes("data_parallel_processes.py", 2, tmp_path)
