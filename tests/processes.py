"""Runs a script of the tests in several processes that talk by gloo; none outlives its time limit."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import runpy
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

# New processes are copies of one that has imported torch already, which takes longer than most of what they do.
COPIES = multiprocessing.get_context("forkserver")
COPIES.set_forkserver_preload(["torch.distributed", "fastsam"])


def run_in_processes(script: str, world_size: int, directory: Path, *arguments: str, seconds: float = 120) -> str:
    """What rank 0 printed; an assertion fails with the output of the first process that failed."""
    logs = [directory / f"rank{rank}.log" for rank in range(world_size)]
    running = []
    for rank, log in enumerate(logs):
        argv = [str(Path(__file__).parent / script), str(directory / "store"), str(rank), str(world_size), *arguments]
        running.append(COPIES.Process(target=_run, args=(argv, log), daemon=True))
        running[-1].start()
    ends = time.monotonic() + seconds
    try:
        for process in running:
            process.join(max(ends - time.monotonic(), 0))
        codes = [process.exitcode for process in running]  # None: it has not ended
    finally:
        for process in running:
            process.kill()
            process.join()
    failed = [log.read_text() for code, log in zip(codes, logs, strict=True) if code != 0]
    assert not failed, f"{codes}\n{failed[0]}"
    return logs[0].read_text()


def _run(argv: list[str], log: Path) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    sys.argv[:] = argv
    runpy.run_path(argv[0], run_name="__main__")


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
