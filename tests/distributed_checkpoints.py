"""torch.distributed.checkpoint: saved, resharded to another number of processes, and resumed."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_steps import ADAMW, BF16, LINE, Pair, same, two_passes
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fastsam import FusedSAM, methods

KINDS = {
    "adamw": (FusedSAM, torch.optim.AdamW, dict(ADAMW, rho=0.3, amsgrad=True), torch.float64),
    "friendly": (methods.FriendlySAM, torch.optim.SGD, dict(lr=0.1, momentum=0.9, rho=0.3), torch.float64),
    "masters": (FusedSAM, torch.optim.AdamW, dict(ADAMW, rho=0.3, master_weights=True), BF16),
}


class Holder(nn.Module):
    """A model of these parameters."""

    def __init__(self, params):
        super().__init__()
        self.weights = nn.ParameterList(params)


class Trained:
    """Parameters, as DTensors on a mesh or whole, and an optimizer that took the steps before `until`."""

    def __init__(self, kind, mesh, until=0):
        cls, base, options, dtype = KINDS[kind]
        self.pair = Pair(mesh, LINE, dtype)
        self.split = mesh is not None
        self.params = self.pair.split if self.split else self.pair.alone
        self.model = Holder(self.params)
        self.optimizer = cls(self.params, base, **options)
        self.go_on(0, until)

    def go_on(self, start, until):
        for seed in range(start, until):
            two_passes(self.optimizer, self.pair.gradients, seed)
        self.model.zero_grad()

    def state(self):
        held = self.optimizer.state
        return [*self.params, *(v for p in self.params for v in held[p].values() if isinstance(v, torch.Tensor))]


def same_state(one, other, what, tolerance):
    for mine, theirs in zip(one.state(), other.state(), strict=True):
        same(mine, theirs, what, tolerance)


def save(trained, path, group=None):
    model, optimizer = get_state_dict(trained.model, trained.optimizer)
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=path, process_group=group)


def load(trained, path, group=None, **options):
    model, optimizer = get_state_dict(trained.model, trained.optimizer)
    dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=path, process_group=group, **options)
    set_state_dict(trained.model, trained.optimizer, model_state_dict=model, optim_state_dict=optimizer)


def check_same_size(kind, mesh, folder):
    """Half-way into a fresh optimizer: split, whole from every rank or from rank 0, flattened; bit for bit."""
    finished, half = Trained(kind, mesh, 4), Trained(kind, mesh, 2)
    size = mesh.size()
    save(half, f"{folder}/{kind}{size}")
    fresh = Trained(kind, mesh)
    load(fresh, f"{folder}/{kind}{size}")
    same_state(fresh, half, f"{kind}: split", 0)
    fresh.go_on(2, 4)
    same_state(fresh, finished, f"{kind}: split", 0)
    for options in dict(
        adamw=(dict(full_state_dict=True), dict(flatten_optimizer_state_dict=True)),
        friendly=(),
        masters=(dict(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True),),
    )[kind]:
        options = StateDictOptions(**options)
        taken = get_optimizer_state_dict(half.model, half.optimizer, options=options)
        fresh = Trained(kind, mesh)
        for p, q in zip(fresh.params, half.params, strict=True):
            p.data.copy_(q.data)
        set_optimizer_state_dict(fresh.model, fresh.optimizer, optim_state_dict=taken, options=options)
        fresh.go_on(2, 4)
        same_state(fresh, finished, f"{kind}: {options}", 0)
    # Of one process without DTensors, as torch.save wrote it: each rank takes its part.
    alone, fresh = Trained(kind, None, 2), Trained(kind, mesh)
    for p, q in zip(fresh.params, half.params, strict=True):
        p.data.copy_(q.data)
    fresh.optimizer.load_state_dict(alone.optimizer.state_dict())
    fresh.go_on(2, 4)
    same_state(fresh, finished, f"{kind}: of one process", 2**-7 if kind == "masters" else 1e-10)


def check_other_sizes(kind, mesh, folder):
    """From 2 processes to 4, from 4 to 2, and from 2 to one without DTensors; then as one process all along.

    The norm is summed in another order.
    """
    tolerance = 1e-10
    finished = Trained(kind, None, 4)
    grown = Trained(kind, mesh)
    load(grown, f"{folder}/{kind}2")
    grown.go_on(2, 4)
    same_state(grown, finished, f"{kind}: 2 to 4", tolerance)
    save(Trained(kind, mesh, 2), f"{folder}/{kind}4")
    pairs = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("outer", "inner"))["inner"]
    shrunk = Trained(kind, pairs)
    load(shrunk, f"{folder}/{kind}4", pairs.get_group())
    shrunk.go_on(2, 4)
    same_state(shrunk, finished, f"{kind}: 4 to 2", tolerance)
    if dist.get_rank() == 0:
        alone = Trained(kind, None)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            load(alone, f"{folder}/{kind}2", no_dist=True)
        alone.go_on(2, 4)
        same_state(alone, finished, f"{kind}: 2 to 1", tolerance)
    dist.barrier()


def check_all(world_size, folder):
    check = check_same_size if world_size == 2 else check_other_sizes
    mesh = init_device_mesh("cpu", (world_size,))
    for kind in KINDS if world_size == 2 else ("adamw", "friendly"):
        check(kind, mesh, folder)
    return [check.__name__]
