"""DTensors (FSDP2, HSDP, tensor parallelism), `norm_group=` and their checkpoints, in two and in four processes."""

import pytest
from processes import run_in_processes


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Where two processes leave checkpoints for four."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.mark.parametrize("world_size", [2, 4])
def test_in_processes(world_size, tmp_path, checkpoints):
    said = run_in_processes("distributed_processes.py", world_size, tmp_path, str(checkpoints), seconds=240)
    done = ["steps", "by_hand", "models", "weights_come_back", "overflow", "sam_step", "parts", "gradients_elsewhere"]
    done += ["same_size", "fsdp1", "zero"] if world_size == 2 else ["other_sizes"]
    assert {f"check_{name}" for name in done} <= set(said.split())
