"""SAMStep under DistributedDataParallel, in two and in four processes."""

import pytest
from processes import run_in_processes


@pytest.mark.parametrize("world_size", [2, 4])
def test_in_processes(world_size, tmp_path):
    said = run_in_processes("sam_step_processes.py", world_size, tmp_path)
    assert "checked check_global check_local check_select check_communication" in said
    assert ("check_drift" in said) == (world_size == 2)
