"""Runs a script of the tests in several processes that talk by gloo; none outlives its time limit."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist


def run_in_processes(script: str, world_size: int, directory: Path, *arguments: str, seconds: float = 120) -> str:
    """What rank 0 printed; an assertion fails with the output of those that failed."""
    here = Path(__file__).parent
    env = dict(os.environ, OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", PYTHONPATH=os.pathsep.join(sys.path))
    logs = [open(directory / f"rank{rank}.log", "w+") for rank in range(world_size)]  # noqa: SIM115
    running = [
        subprocess.Popen(
            [sys.executable, str(here / script), str(directory / "store"), str(rank), str(world_size), *arguments],
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(seconds) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
        outputs = []
        for log in logs:
            log.seek(0)
            outputs.append(log.read())
            log.close()
    failed = [output for code, output in zip(codes, outputs, strict=True) if code != 0]
    assert not failed, "\n".join(failed)
    return outputs[0]


def join() -> tuple[int, int, list[str]]:
    """In the script: join the others; rank, number of processes and the other arguments."""
    store, rank, world_size, *arguments = sys.argv[1:]
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=int(rank),
        world_size=int(world_size),
        timeout=datetime.timedelta(seconds=40),  # of each collective: where one process fails, none waits for long
    )
    return int(rank), int(world_size), arguments
