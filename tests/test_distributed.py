"""DTensors (FSDP2, HSDP, tensor parallelism), `norm_group=` and their checkpoints, in two and in four processes."""

import pytest
from processes import run_in_processes


@pytest.mark.parametrize("world_size", [2, 4])
def test_in_processes(world_size, tmp_path):
    said = run_in_processes("distributed_processes.py", world_size, tmp_path)
    assert "checked" in said
