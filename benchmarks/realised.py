"""How much of a SAM perturbation reaches bfloat16 weights: rounded to nearest, from float32 masters, or at random.

    python benchmarks/realised.py --json     # prints the table and keeps it under results/

Weights are normal with the deviation 0.02 of a trained layer, gradients normal too; the perturbation e has the size an
element that rho = 0.05 gives a model of so many parameters, rho / sqrt(parameters). With d what the weights moved by:
the share of e that is realised, <d, e> / <e, e>; the cosine of d and e; |d| / |e|; and how many weights moved at all.
"""

import argparse
import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from devices import ROOT, Cpu
from table import markdown
from timing import environment

import fastsam

SAMPLES, DEVIATION, RHO, SEED = 4_000_000, 0.02, 0.05, 0
MODELS = {"ResNet-50": 25_557_032, "ViT-L/16": 304_326_632}
METHODS: dict[str, dict[str, Any]] = {
    "bfloat16, to nearest": {},
    "`master_weights=True`": {"master_weights": True},
    "`stochastic_rounding=True`": {"stochastic_rounding": True},
    "float32 (autocast)": {"dtype": torch.float32},
}


def realised(parameters: int, options: Mapping[str, Any], backend: str) -> dict[str, float]:
    """What one perturbation does to `SAMPLES` weights of a model of that size."""
    options = dict(options)
    dtype = options.pop("dtype", torch.bfloat16)
    generator = torch.Generator().manual_seed(SEED)
    fine, g = (torch.randn(SAMPLES, generator=generator) for _ in range(2))
    fine *= DEVIATION
    w = torch.nn.Parameter(fine.to(dtype))
    rho = RHO * (SAMPLES / parameters) ** 0.5
    opt = fastsam.FusedSAM([w], torch.optim.SGD, rho=rho, lr=0.1, backend=backend, **options)
    if "master_weights" in options:
        opt.load_state_dict({**opt.state_dict(), "state": {0: {"master": fine}}})
    w.grad = g.to(dtype)
    e = w.grad.double() * (rho / w.grad.double().norm())
    before = w.detach().double()
    opt.first_step()
    d = w.detach().double() - before
    return {
        "share": float(d @ e / (e @ e)),
        "cosine": float(d @ e / (d.norm() * e.norm())),
        "length": float(d.norm() / e.norm()),
        "moved": float((d != 0).double().mean()),
    }


def table(document: Mapping[str, Any]) -> str:
    """A row for each model and method."""
    rows = []
    for result in document["results"]:
        moved = f"{100 * result['moved']:.1f} %"
        numbers = [f"{result[name]:.2f}" for name in ("share", "cosine", "length")]
        rows.append([f"{result['model']} ({result['parameters'] / 1e6:.1f} M)", result["method"], *numbers, moved])
    columns = ["rho 0.05 over the parameters of", "weights", "share of e realised", "cosine", "length / that of e"]
    return markdown([*columns, "weights moved"], rows)


def render(document: dict[str, Any]) -> str:
    """The table, and the command that made it."""
    return f"{table(document)}\n\nTo repeat: `{document['command']}`."


def main() -> None:
    """Measure, print the table, keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--json", nargs="?", const="", metavar="FILE", help="keep the result [benchmarks/results/...]")
    args = parser.parse_args()
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    document: dict[str, Any] = {
        "format": 1,
        "date": date,
        "command": "python benchmarks/realised.py --json",
        "environment": {**environment(Cpu(), torch.get_num_threads()), "fastsam": fastsam.__version__},
        "samples": SAMPLES,
        "results": [
            {"model": model, "parameters": count, "method": method, **realised(count, options, args.backend)}
            for model, count in MODELS.items()
            for method, options in METHODS.items()
        ],
    }
    print(table(document))
    file = Path(args.json or ROOT / "benchmarks" / "results" / f"{date}-cpu-realised.json")
    if args.json is not None:
        file.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
