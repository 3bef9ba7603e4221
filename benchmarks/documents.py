"""A result's document: what every one begins with, where it is kept, and whether its machine was quiet."""

import datetime
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from devices import ROOT, Cpu
from timing import environment

QUIET = 0.25  # cores that everything else may use; housekeeping of a small virtual machine takes 0.1


def begun(device: Cpu, threads: int, **more: Any) -> dict[str, Any]:
    """Date, command, device and environment of the script that runs; `more` belongs to the environment, too."""
    script = Path(sys.argv[0]).name
    return {
        "format": 1,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "command": shlex.join(["python", f"benchmarks/{script}", *sys.argv[1:]]),
        "device": device.name,
        "environment": {**environment(device, threads), **_fastsam(), **more},
    }


def path_of(document: Mapping[str, Any], asked: str | None, name: str) -> Path | None:
    """Where `--json` says: a file; benchmarks/results/DATE-DEVICE-NAME.json if it names none; None without it."""
    if asked is None:
        return None
    return Path(asked or ROOT / "benchmarks" / "results" / f"{document['date']}-{document['device']}-{name}.json")


def keep(document: Mapping[str, Any], path: Path | None) -> None:
    """Write it, if there is a path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")


def was_quiet(busiest: float) -> bool:
    """Whether others took few cores meanwhile; says so if not."""
    if busiest > QUIET:
        print(f"\nThis machine is busy, others took {busiest:.2f} cores: do not use these times.", file=sys.stderr)
    return busiest <= QUIET


def busiest_of(document: Mapping[str, Any]) -> float:
    """The most cores that others took while one of its results was measured."""
    return max(rate for result in document["results"] for rate in result["cores_taken"])


def _fastsam() -> dict[str, Any]:
    try:
        import fastsam
        from fastsam import ops
        from fastsam.commands.diagnosis import build_record
        from fastsam.ops import native
    except ModuleNotFoundError:
        return {"fastsam": None}
    found = {"fastsam": fastsam.__version__, "backends": ops.backends(), "build": build_record()}
    library: Any = native.reader
    if library is None:
        return {**found, "cpu_isa": None}
    return {**found, "cpu_isa": library.cpu_isa(), "source_hash": library.source_hash}
