"""One process in a group of its own: DistributedDataParallel, FSDP2 and DTensors have the bits of plain parameters."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import cases
import pytest
import torch
import torch.distributed as dist
from oracle import assert_same
from processes import run_in_processes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

from fastsam import FusedSAM, methods


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("bucket_view", [True, False])
def test_like_one_process(backend, device, process_group, bucket_view, set_to_none):
    """Gradients may be views of buckets and move after the first step, off the 16-byte grid; no false alarm comes."""
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


@pytest.mark.filterwarnings(cases.NO_GRADIENTS)
@pytest.mark.parametrize("name", ["groups", "adamw_groups"])
def test_dtensors_on_one_rank(backend, device, process_group, name):
    """All layouts, with gradients that come and go; states are DTensors of their parameters' strides."""
    config = next(config for config in cases.CONFIGS if config.name == name)
    mesh = init_device_mesh(device, (1,))
    alone, split = cases.make_params(device=device), []
    for p in alone:
        placement = Shard(p.dim() - 1) if p.dim() else Replicate()
        split.append(torch.nn.Parameter(DTensor.from_local(p.detach().clone(), mesh, [placement], run_check=False)))
    one, other = (cases.fused(params, config, backend) for params in (split, alone))
    for step in range(cases.STEPS):
        for pass_, (mine, theirs) in enumerate([(one.first_step, other.first_step), (one.step, other.step)], 1):
            cases.set_gradients(alone, step, pass_)
            for p, q in zip(split, alone, strict=True):
                g = q.grad
                p.grad = None if g is None else DTensor.from_local(g.clone(), mesh, p.placements, run_check=False)
            if step != 6:  # there nobody has one, which is an error for DTensors
                mine()
                theirs()
    for i, (p, q) in enumerate(zip(split, alone, strict=True)):
        assert_same(p.to_local(), q, f"parameter {i}")
        assert list(one.state.get(p, {})) == list(other.state.get(q, {}))
        for key, value in one.state.get(p, {}).items():
            assert isinstance(value, DTensor) == (key != "step") and value.stride() == other.state[q][key].stride()
            assert_same(value.to_local() if key != "step" else value, other.state[q][key], f"{key} of parameter {i}")


@pytest.mark.parametrize("cls", [FusedSAM, methods.ESAM, methods.FriendlySAM])
def test_fsdp2_on_one_rank(process_group, cls):
    alone = torch.nn.Sequential(torch.nn.Linear(7, 33), torch.nn.Tanh(), torch.nn.Linear(33, 5))
    model, mesh = copy.deepcopy(alone), init_device_mesh("cpu", (1,))
    for part in (model[0], model):
        fully_shard(part, mesh=mesh)
    x = torch.randn(16, 7)
    for net in (alone, model):
        optimizer = cls(net.parameters(), torch.optim.AdamW, lr=0.03, rho=0.4, weight_decay=0.1, max_grad_norm=0.2)

        def closure(net=net, optimizer=optimizer):
            optimizer.zero_grad()
            loss = net(x).square().mean()
            loss.backward()
            return loss

        for _ in range(4):
            optimizer.step(closure)
    for expected, found in zip(alone.parameters(), model.parameters(), strict=True):
        assert_same(found.full_tensor(), expected)
