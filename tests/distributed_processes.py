"""What tests/test_distributed.py runs in several processes."""

from __future__ import annotations

import contextlib
import warnings

import distributed_checkpoints
import distributed_groups
import distributed_models
import distributed_steps
import torch
import torch.distributed as dist
from processes import join


def main():
    rank, world_size, (folder,) = join()
    with contextlib.suppress(RuntimeError):
        torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "FSDP2-wrapped module.* returned a view tensor")
    done = distributed_steps.check_all(world_size)
    done += distributed_models.check_all(world_size)
    done += distributed_checkpoints.check_all(world_size, folder)
    done += distributed_groups.check_all(world_size)
    if rank == 0:
        print("checked", *done)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
