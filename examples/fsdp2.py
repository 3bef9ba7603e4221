"""FSDP2: everything is split over the ranks, and SAM's norm is one over all of them.

It is saved and resumed half-way. Run it with
`torchrun --nproc-per-node 2 examples/fsdp2.py`.
"""

import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import fastsam


def built():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 3))
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    return model, fastsam.FusedSAM(
        model.parameters(), torch.optim.AdamW, lr=1e-2, weight_decay=0.1, rho=0.05
    )


def main(folder, steps=12):
    model, optimizer = built()
    torch.manual_seed(1 + dist.get_rank())  # other data
    x, y = torch.randn(16, 20), torch.randint(0, 3, (16,))
    for t in range(steps):
        if t == steps // 2:
            saved, state = get_state_dict(model, optimizer)
            dcp.save({"model": saved, "optimizer": state}, checkpoint_id=folder)
            model, optimizer = built()  # on any number of ranks
            saved, state = get_state_dict(model, optimizer)
            dcp.load({"model": saved, "optimizer": state}, checkpoint_id=folder)
            set_state_dict(
                model, optimizer, model_state_dict=saved, optim_state_dict=state
            )
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.first_step(zero_grad=True)
        nn.functional.cross_entropy(model(x), y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    folders = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folders)
    loss = main(folders[0])
    if dist.get_rank() == 0:
        print(f"loss {loss:.3f}")
    dist.destroy_process_group()
