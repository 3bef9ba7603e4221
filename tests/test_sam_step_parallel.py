"""SAMStep under DistributedDataParallel in four processes; test_data_parallel.py has what two are enough for."""

from processes import run_in_processes


def test_in_four_processes(tmp_path):
    assert "checked" in run_in_processes("sam_step_processes.py", 4, tmp_path)
