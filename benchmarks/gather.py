"""Put together what gpu.sh's sections have written so far: results.json, a text summary, and all of it in one file.

    python benchmarks/gather.py PARTS OUT --device cuda
    python benchmarks/gather.py PARTS OUT --device cuda --unpack BEFORE    # PARTS begins as BEFORE/parts.json says

It runs after every section, so that a run which is killed loses at most the section that it was in. The exit status
is 0 if every section ended with 0, no case failed and all keys are there, which are the same on every device.
"""

import argparse
import importlib
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from table import render

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = """
    library diagnosis tests step-float32 launches host train variants tests-triton step-precision step-bfloat16
    tests-library memcheck racecheck initcheck step-others
""".split()
NOT_REACHED = 125  # the status of a section for which there was no time
BACKENDS = {"cuda": ("cuda", "triton"), "cpu": ("cpu",), "stub": ("cpu", "triton")}
# What a complete run has: of the whole, of each case, of each backend's launches, of each model that is trained.
KEYS = set("device command date environment seconds sections results failures launches train variants".split())
RESULT = {"kind", "name", "model", "case", "elements", "bytes", "fused_base", "fastsam", "operations", "launches"}
RESULT |= {"peak_bytes", "cores_taken", "processes"}
LAUNCHES = {"kernels", "names", "host_us", "closure_us", "profiler_us", "gap_us"}
TRAIN = {"ms", "over_passes"}
VARIANT = {"first_us", "second_us", "over_default", "kernels_us"}


def gather(parts: Path, device: str) -> dict[str, Any]:
    """The one document of all parts; a part that is not there, or not whole, is left out."""
    document: dict[str, Any] = {"device": device, "sections": {}, "launches": {}, "train": {}, "variants": {}}
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
    found += [f"any {name}" for name in ("launches", "train", "variants") if not document[name]]
    for model, backends in document["launches"].items():
        found += [] if backends else [f"launches of {model}"]
        parts += [(f"launches of {model}, {backend}", one, LAUNCHES) for backend, one in backends.items()]
    parts += [(f"training of {model}", one, TRAIN) for model, one in document["train"].items()]
    for case, variants in document["variants"].items():
        found += [] if variants else [f"variants of {case}"]
        parts += [(f"{name} of {case}", one, VARIANT) for name, one in variants.items()]
    return found + [f"{what}: {key}" for what, one, keys in parts for key in sorted(keys - one.keys())]


def summary(document: dict[str, Any]) -> str:
    """Sections, failures and all tables."""
    lines = [f"{document['device']}, {document['seconds']} s", ""]
    if document.get("stopped"):
        lines += [f"STOPPED: {document['stopped']}", ""]
    for name, section in document["sections"].items():
        failed = "NOT REACHED" if section["status"] == NOT_REACHED else f"FAILED, status {section['status']}"
        lines.append(f"{name}: {'ok' if section['status'] == 0 else failed}, {section['seconds']} s")
    lines += [f"FAILED {name}: {why}" for name, why in document["failures"].items()]
    lines += [f"MISSING {what}" for what in document["missing"]]
    if document["results"]:
        lines += ["", render(document)]
    for case, variants in document["variants"].items():
        lines += ["", f"{case}: us of both parts, and of the default's"]
        for name, one in variants.items():
            ratios = ", ".join(f"{ratio:.3f}" for ratio in one["over_default"].values())
            lines.append(f"  {name:12s} {one['first_us']:9.1f} {one['second_us']:9.1f}   {ratios}")
    return "\n".join(lines) + "\n"


def unpack(before: Path, parts: Path) -> None:
    """Begin with what an earlier run has found, unless its kernels were others."""
    packed = json.loads((before / "parts.json").read_text())
    if packed["sources"] != sources(parts):
        print(f"csrc/ is not what it was when {before} was written: all sections run again", file=sys.stderr)
        return
    for name, text in packed["files"].items():
        (parts / name).write_text(text)


def sources(parts: Path) -> str:
    """What tells these kernels from others; asked once, as setuptools takes its time."""
    file = parts / "sources"
    if not file.is_file():
        sys.path.insert(0, str(ROOT))
        file.write_text(str(importlib.import_module("setup").source_hash()))
    return file.read_text()


def write(file: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    beside = file.with_suffix(".new")
    beside.write_text(text)
    os.replace(beside, file)


def main() -> None:
    """Write all three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", type=Path, help="folder with the file `sections` and the parts' JSON")
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--unpack", type=Path, metavar="BEFORE", help="only begin with what is there")
    parser.add_argument("--stopped", metavar="WHY", help="why no more sections follow")
    args = parser.parse_args()
    if args.unpack:
        return unpack(args.unpack, args.parts)
    document = gather(args.parts, args.device)
    document["missing"] = missing(document)
    if args.stopped:
        document["stopped"] = args.stopped
    files = {file.name: file.read_text() for file in args.parts.iterdir() if file.is_file()}
    write(args.out / "parts.json", json.dumps({"sources": sources(args.parts), "files": files}) + "\n")
    write(args.out / "results.json", json.dumps(document) + "\n")
    write(args.out / "summary.txt", summary(document))
    failed = any(section["status"] for section in document["sections"].values())
    sys.exit(bool(failed or document["failures"] or document["missing"]))


if __name__ == "__main__":
    main()
