"""What all studies share: options from their settings, statistics, tables, figures, and the three files."""

import argparse
import datetime
import importlib
import json
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from types import ModuleType
from typing import Any

import torch
from devices import ROOT, Cpu, output
from table import markdown
from timing import environment

from benchmarks.studies import NAMES

RESULTS, PAGES = ROOT / "benchmarks" / "results" / "studies", ROOT / "docs" / "studies"
COLOURS = ("#4d4d4d", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito
Record = dict[str, Any]


# --- running ---------------------------------------------------------------------------------------------------------


def study(name: str) -> ModuleType:
    """Its module."""
    return importlib.import_module(f"benchmarks.studies.{name}")


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__import__("benchmarks.studies").studies.__doc__)
        print("\n".join(f"{name:16} {title(study(name))}" for name in NAMES))
        return
    name, rest = arguments[0], arguments[1:]
    if name == "page":
        from benchmarks.studies.page import write_pages

        write_pages()
        return
    if name != "all" and name not in NAMES:
        raise SystemExit(f"there is no study {name!r}; there are {', '.join((*NAMES, 'all', 'page'))}")
    for each in NAMES if name == "all" else [name]:
        run(each, rest)


def run(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Run a study and write its files; what it found."""
    module = study(name)
    settings, out = settings_of(module, name, arguments)
    torch.set_num_threads(settings["threads"])
    start, cpu = time.perf_counter(), time.process_time()
    records = [rounded(record) for record in module.run(settings)]
    document = {
        "format": 1,
        "study": name,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "command": shlex.join(["python", "-m", "benchmarks.studies", name, *arguments]),
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "settings": settings,
        "environment": environment(Cpu(), settings["threads"]) | {"tree": output("git", "rev-parse", "HEAD:fastsam")},
        "records": records,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_document(document, out / f"{name}.json")
    module.plot(document).savefig(out / f"{name}.png", dpi=80)
    (out / f"{name}.md").write_text(page(document, f"{name}.png", f"{name}.json"))
    print(module.report(document))
    print(f"\n{document['seconds']:.0f} s; {name}.json, {name}.png and {name}.md are in {out}", file=sys.stderr)
    return document


def settings_of(module: ModuleType, name: str, arguments: Sequence[str]) -> tuple[dict[str, Any], Path]:
    """What the command line asks for: the study's DEFAULTS are its options, QUICK those of --quick."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.studies {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help=f"other defaults: {module.QUICK}")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the files go (default: %(default)s)")
    defaults = {**module.DEFAULTS, "threads": 1}
    if parser.parse_known_args(arguments)[0].quick:
        defaults |= module.QUICK
    for key, value in defaults.items():
        several = isinstance(value, list)
        kind = type(value[0] if several else value)
        parser.add_argument(
            f"--{key.replace('_', '-')}",
            type=kind,
            nargs="+" if several else None,
            default=value,
            help=f"(default: {' '.join(map(str, value)) if several else value!r})",
        )
    options = vars(parser.parse_args(arguments))
    out: Path = options.pop("out")
    return options, out


def rounded(value: Any) -> Any:
    """Numbers to five places; numbers that JSON lacks are None."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def write_document(document: Mapping[str, Any], path: Path) -> None:
    """As JSON, a record a line."""
    head = json.dumps({**document, "records": []}, indent=1)
    lines = ",\n  ".join(json.dumps(record) for record in document["records"])
    path.write_text(head.removesuffix("[]\n}") + f"[\n  {lines}\n ]\n}}\n")


# --- statistics ------------------------------------------------------------------------------------------------------


def values(records: Sequence[Record], field: str, **where: Any) -> list[float]:
    """One field of the records that agree with `where`, by seed."""
    found = [r for r in records if all(r[key] == value for key, value in where.items())]
    return [math.nan if r[field] is None else r[field] for r in sorted(found, key=lambda r: r.get("seed", 0))]


def spread(numbers: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation."""
    deviation = f" ± {stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{fmean(numbers):.{digits}f}{deviation}"


def gain(mine: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """The mean of the differences of equal seeds, and its standard error (NaN for one seed)."""
    differences = [a - b for a, b in zip(mine, base, strict=True)]
    error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return fmean(differences), error


def verdict(mine: Sequence[float], base: Sequence[float]) -> str:
    """What the seeds say: whether the differences of equal seeds may be chance (Student's t, 5 %)."""
    from scipy.stats import t

    mean, error = gain(mine, base)
    if math.isnan(error):
        return "one seed cannot tell"
    bar = float(t.ppf(0.975, len(mine) - 1)) * error
    return "no clear difference" if abs(mean) <= bar else "a gain" if mean > 0 else "a loss"


def accuracy_table(records: Sequence[Record], by: Sequence[str], base: Mapping[str, Any], title: str = "") -> str:
    """A row for each combination of the fields `by`: test accuracy, and what it is against the row with `base`."""
    rows, combinations = [], []
    for record in records:
        if (key := {field: record[field] for field in by}) not in combinations:
            combinations.append(key)
    for key in combinations:
        mine, theirs = values(records, "test", **key), values(records, "test", **{**key, **base})
        row = [shown(field, value) for field, value in key.items()] + [spread(mine)]
        if all(key[field] == value for field, value in base.items()):
            rows.append([*row, "", ""])
        else:
            mean, error = gain(mine, theirs)
            uncertain = "" if math.isnan(error) else f" ± {error:.2f}"
            rows.append([*row, f"{mean:+.2f}{uncertain}", verdict(mine, theirs)])
    against = title or " ".join(str(value) for value in base.values())
    header = [*(field.replace("_", " ") for field in by), "test accuracy, %", f"minus {against}", "which is"]
    return markdown(header, rows)


def shown(field: str, value: Any) -> str:
    """A field's value for readers."""
    return f"{100 * value:g} %" if field in ("noise", "fraction", "start") else str(value)


NOTE = (
    "Mean and standard deviation over {seeds} seeds. Differences are of equal seeds (same split, labels, first "
    "weights, batches), with their standard error; a gain or a loss is what chance would give in fewer than one of "
    "twenty such studies (Student's t). Few seeds see large differences only."
)


def note(document: Mapping[str, Any]) -> str:
    """What the numbers of `accuracy_table` are."""
    return NOTE.format(seeds=document["settings"]["seeds"])


# --- figures ---------------------------------------------------------------------------------------------------------


def new_figure(columns: int = 1, width: float = 5.6, height: float = 3.6) -> tuple[Any, Any]:
    """A figure with axes side by side; a list of them if several."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    axes = figure.subplots(1, columns)
    for each in [axes] if columns == 1 else axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(axis="y", color="#e8e8e8", lw=0.8)
        each.set_axisbelow(True)
    return figure, axes


def draw(axes: Any, records: Sequence[Record], x: str, by: str, field: str = "test", joined: bool = True) -> None:
    """Means over the seeds as large dots, each seed as a small one; values of x stand at equal distances.

    Args:
        axes: where.
        records: the runs.
        x: the field along the axis.
        by: a line for each of its values.
        field: what is drawn.
        joined: draw lines between the means; otherwise the values of `by` stand side by side.
    """
    places = list(dict.fromkeys(r[x] for r in records))
    names = list(dict.fromkeys(r[by] for r in records))
    style = "o-" if joined else "o"
    for i, (colour, name) in enumerate(zip(COLOURS, names, strict=False)):
        aside = 0 if joined else 0.6 * (i + 0.5) / len(names) - 0.3
        at = {place: number + aside for number, place in enumerate(places)}
        mine = [r for r in records if r[by] == name and r[field] is not None]
        here = [place for place in places if values(mine, field, **{x: place})]
        axes.plot([at[r[x]] for r in mine], [r[field] for r in mine], ".", color=colour, ms=4, alpha=0.45)
        means = [fmean(values(mine, field, **{x: place})) for place in here]
        axes.plot([at[place] for place in here], means, style, color=colour, lw=1.8, ms=4, label=str(name))
    axes.set_xticks(range(len(places)), [shown(x, place) for place in places])
    axes.set(xlabel=x.replace("_", " "), ylabel="test accuracy, %" if field == "test" else field)
    axes.legend(frameon=False)


# --- pages -----------------------------------------------------------------------------------------------------------


def title(module: ModuleType) -> str:
    """The first line of its docstring."""
    return (module.__doc__ or "").strip().splitlines()[0].rstrip(".")


def page(document: Mapping[str, Any], image: str, file: str) -> str:
    """A study's page: what it is, the figure, the table, what others report, and where the numbers are from."""
    module = study(document["study"])
    about = (module.__doc__ or "").strip().split("\n", 1)[1].strip()
    found = document["environment"]
    changed = " (with changes that were not committed)" if found.get("dirty") else ""
    parts = [f"# {title(module)}", about, f"![{title(module)}]({image})", module.report(document)]
    if module.THEIRS:
        rows = [list(row) for row in module.THEIRS]
        parts += ["## What others report", "These figures are theirs, on other data and networks; none is ours."]
        parts += [markdown(["what", "figures", "source"], rows)]
    parts += [
        "## Where these numbers are from",
        f"`{document['command']}` on {document['date']}: {document['seconds']:.0f} seconds, "
        f"{document['cpu_seconds']:.0f} of them at work, on a machine that others used, too ({found['cpu']}, "
        f"{found['threads']} thread(s), load {found['load_average']}): accuracies do not depend on it, times do. "
        f"Commit {str(found['commit'])[:12]}"
        f"{changed}, `fastsam/` as in tree {str(found['tree'])[:12]}; Python {found['python']}, torch "
        f"{found['torch']}. Every run: `{file}`.",
    ]
    return "\n\n".join(parts) + "\n"
