"""All benchmarks of this machine's CPU in one command, with tables and plots.

    python -m benchmarks --quick     # under five minutes on two cores: few rounds, what a first look needs
    python -m benchmarks             # as the committed results were made: an hour, on a machine without other work

Writes JSON, `tables.md` and pictures to `benchmark-results/` (`--out`). A part that fails is named at the end; the
others are still run. For a GPU: `benchmarks/gpu.sh`.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import extras  # noqa: E402  # the path comes first
import methods  # noqa: E402
import pages  # noqa: E402
import scaling  # noqa: E402
import table  # noqa: E402
import train  # noqa: E402

Render = Callable[[dict[str, Any]], str]


def parts(quick: bool) -> list[tuple[str, list[str], Render]]:
    """Title, command and what makes a table of the JSON."""
    few = ["--quick"] if quick else []
    whole = ["train.py", "--models", *train.ON_A_CPU, *(few or ["--processes", "3"])]
    return [
        ("Optimizer's part of a step", ["step.py", "--model", "resnet18" if quick else "resnet50", *few], table.render),
        ("Host time", ["step.py", "--model", "tiny161", *few], table.render),
        ("Size", ["scaling.py", *few], scaling.render),
        ("Options", ["extras.py", *few], extras.render),
        ("Whole training steps", whole, train.render),
        ("Methods", ["methods.py", *few], methods.render),
    ]


def main() -> int:
    """Run the parts; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds: under five minutes on two cores")
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    texts, failed, documents = [], [], {}
    for title, command, render in parts(args.quick):
        began = time.perf_counter()
        print(f"{title}: {' '.join(command)} ...", flush=True)
        file = args.out.resolve() / f"{title.lower().replace(' ', '-').replace(chr(39), '')}.json"
        file.unlink(missing_ok=True)  # train.py would take over what an earlier run found
        done = subprocess.run(
            [sys.executable, str(HERE / command[0]), *command[1:], "--json", str(file)],
            stdout=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode:
            failed.append(title)
            continue
        documents[title] = json.loads(file.read_text())
        texts.append(f"## {title}\n\n{render(documents[title])}\n")
        print(f"  {time.perf_counter() - began:.0f} s", flush=True)
    for title, draw in (("Optimizer's part of a step", pages.draw_step), ("Size", pages.draw_scaling)):
        if title in documents:
            name = draw.__name__.removeprefix("draw_")
            (args.out / f"{name}.png").write_bytes(draw(documents[title]))
    if "Methods" in documents:
        (args.out / "methods.png").write_bytes(pages.draw_methods(documents["Methods"]))
    (args.out / "tables.md").write_text("\n".join(["# Benchmarks\n", *texts]))
    print("\n".join(texts))
    print(f"In {args.out}: tables.md, pictures and JSON." + (f" FAILED: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
