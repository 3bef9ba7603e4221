"""Files that are compiled once and kept."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path


def made(target: Path, make: Callable[[Path], None]) -> Path:
    """A file or folder, made now unless it is there; who else makes it meanwhile is not disturbed."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f"{os.getpid()}-{target.name}")
        make(unfinished)
        try:
            unfinished.rename(target)
        except OSError:  # another process was quicker with a folder
            assert target.exists()
    return target


def run(command: Sequence[str | Path | None]) -> None:
    """Run a compiler.

    Raises:
        RuntimeError: what it printed.
    """
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
