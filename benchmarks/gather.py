"""Put together what the sections of gpu.sh have written so far: results.json and a text summary.

    python benchmarks/gather.py PARTS OUT --device cuda

It runs after every section, so that a run which is killed loses at most the section that it was in. The exit status
is 0 if every section ended with 0, no case failed and all keys are there, which are the same on every device.
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from table import render

SECTIONS = [
    "build",
    "tests",
    "step-float32",
    "launches",
    "host",
    "train",
    "tests-library",
    "memcheck",
    "racecheck",
    "initcheck",
    "step-precision",
    "tests-triton",
    "step-bfloat16",
    "step-others",
]
BACKENDS = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}
# What a complete run has: of the whole, of each case, of each backend's launches, of each model that is trained.
KEYS = {"device", "command", "date", "environment", "seconds", "sections", "results", "failures", "launches", "train"}
RESULT = {"kind", "name", "model", "case", "elements", "bytes", "fused_base", "fastsam", "operations", "launches"}
RESULT |= {"peak_bytes", "cores_taken", "processes"}
LAUNCHES = {"kernels", "names", "host_us", "closure_us", "profiler_us", "gap_us"}
TRAIN = {"ms", "over_passes"}


def gather(parts: Path, device: str) -> dict[str, Any]:
    """The one document of all parts; a part that is not there, or not whole, is left out."""
    document: dict[str, Any] = {"device": device, "sections": {}, "launches": {}, "train": {}}
    document |= {"environment": {}, "results": [], "failures": {}}
    for line in (parts / "sections").read_text().splitlines():
        name, status, seconds = line.split()
        document["sections"][name] = {"status": int(status), "seconds": int(seconds)}
    document["seconds"] = sum(section["seconds"] for section in document["sections"].values())
    for file in sorted(parts.glob("*.json"), key=lambda file: file.stat().st_mtime):
        try:
            part = json.loads(file.read_text())
        except json.JSONDecodeError:  # killed while it wrote
            continue
        document["results"] += part.pop("results", [])
        document["failures"] |= part.pop("failures", {})
        document["environment"] |= part.pop("environment", {})
        document |= {key: value for key, value in part.items() if key not in ("device", "format")}
    document["command"] = shlex.join(["benchmarks/gpu.sh", "OUT", *(["--device", device] if device != "cuda" else [])])
    return document


def missing(document: dict[str, Any]) -> list[str]:
    """Sections and keys that a complete run has and this one has not."""
    found = [f"section {name}" for name in SECTIONS if name not in document["sections"]]
    found += [f"key {key}" for key in sorted(KEYS - document.keys())]
    for kind in ("step", "host"):
        measured = {name for result in document["results"] if result["kind"] == kind for name in result["fastsam"]}
        wanted = BACKENDS[document["device"]]
        found += [f"{kind} times of {name}" for name in wanted if f"fastsam_{name}" not in measured]
    parts = [(result["model"], result, RESULT) for result in document["results"]]
    found += [f"any {name}" for name in ("launches", "train") if not document[name]]
    for model, backends in document["launches"].items():
        found += [] if backends else [f"launches of {model}"]
        parts += [(f"launches of {model}, {backend}", one, LAUNCHES) for backend, one in backends.items()]
    parts += [(f"training of {model}", one, TRAIN) for model, one in document["train"].items()]
    return found + [f"{what}: {key}" for what, one, keys in parts for key in sorted(keys - one.keys())]


def summary(document: dict[str, Any]) -> str:
    """Sections, failures and all tables."""
    lines = [f"{document['device']}, {document['seconds']} s", ""]
    for name, section in document["sections"].items():
        outcome = "ok" if section["status"] == 0 else f"FAILED, status {section['status']}"
        lines.append(f"{name}: {outcome}, {section['seconds']} s")
    lines += [f"FAILED {name}: {why}" for name, why in document["failures"].items()]
    lines += [f"MISSING {what}" for what in document["missing"]]
    if document["results"]:
        lines += ["", render(document)]
    return "\n".join(lines) + "\n"


def write(file: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    beside = file.with_suffix(".new")
    beside.write_text(text)
    os.replace(beside, file)


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", type=Path, help="folder with the file `sections` and the parts' JSON")
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    document = gather(args.parts, args.device)
    document["missing"] = missing(document)
    write(args.out / "results.json", json.dumps(document) + "\n")
    write(args.out / "summary.txt", summary(document))
    failed = any(section["status"] for section in document["sections"].values())
    sys.exit(bool(failed or document["failures"] or document["missing"]))


if __name__ == "__main__":
    main()
