"""The tables and pictures of README and documentation, made from committed results.

    python benchmarks/pages.py           # writes all of them
    python benchmarks/pages.py --check   # writes nothing; says which are stale, and ends with 1 if any is

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`. A picture holds the hash of what it was drawn from. After a
new measurement, put its file into `RESULTS`.
"""

import argparse
import hashlib
import inspect
import io
import json
import re
import struct
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import extras
import methods
import realised
import scaling
import table
import train
from ratios import across, paired_ratio

from fastsam.commands import methods as family

ROOT = Path(__file__).resolve().parent.parent
RESULTS = {
    "step": "2026-11-29-cpu-resnet50-sgd-float32.json",
    "cases": "2026-11-21-cpu-all.json",
    "host": "2026-11-28-cpu-tiny161-sgd-float32.json",
    "scaling": "2026-11-29-cpu-scaling.json",
    "extras": "2026-11-29-cpu-extras.json",
    "train": "2026-11-29-cpu-train.json",
    "realised": "2026-11-21-cpu-realised.json",
    "methods": "2026-11-29-cpu-methods.json",
}
Document = Mapping[str, Any]


def load(name: str) -> Document:
    """The result that is shown under this name."""
    document = json.loads((ROOT / "benchmarks" / "results" / RESULTS[name]).read_text())
    document["command"] = document["command"].replace(" --readme", "")  # what this file does since then
    return cast(Document, document)


def with_source(name: str, text: str) -> str:
    """The text, and the file that it is made of."""
    return f"{text}\n\nOf `benchmarks/results/{RESULTS[name]}`."


def brief(name: str) -> str:
    """The first table alone, and where it is explained."""
    first = table.render(load(name)).split("\n\n")[0]
    told = "[What the columns are, the machine and how to repeat it](docs/benchmarks.md#the-optimizers-part)."
    return f"{first}\n\n{with_source(name, told)}".replace(").\n\nOf", "). Of")


def measured(document: Document, names: Sequence[str]) -> str:
    """The lines of these methods, after those of SAM and the base optimizers."""
    head, rule, *lines = methods.table(document).splitlines()
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in lines}
    bases = {methods.base_name(method.base) for method in family.FAMILY if method.name in names}
    source = with_source("methods", "[What the columns are](index.md#cost-and-effect-measured).").replace("\n\n", " ")
    return "\n".join([head, rule, *(rows[name] for name in dict.fromkeys([*sorted(bases), "SAM", *names])), "", source])


def sections() -> Iterator[tuple[str, str, str]]:
    """Page, name of the markers, and what is to stand between them."""
    yield "README.md", "benchmarks:cpu", brief("step")
    yield "docs/benchmarks.md", "benchmarks:step", with_source("step", table.render(load("step")))
    yield "docs/benchmarks.md", "benchmarks:cases", with_source("cases", table.render(load("cases")))
    yield "docs/benchmarks.md", "benchmarks:host", with_source("host", table.render(load("host")))
    yield "docs/benchmarks.md", "benchmarks:scaling", with_source("scaling", scaling.render(load("scaling")))
    yield "docs/benchmarks.md", "benchmarks:extras", with_source("extras", extras.render(load("extras")))
    yield "docs/benchmarks.md", "benchmarks:train", with_source("train", train.render(load("train")))
    yield "docs/precision.md", "benchmarks:realised", with_source("realised", realised.render(load("realised")))
    yield "docs/methods/index.md", "methods", family.markdown()
    yield "docs/methods/index.md", "benchmarks:methods", with_source("methods", methods.render(load("methods")))
    for page in sorted((ROOT / "docs" / "methods").glob("*.md")):
        for names in re.findall("<!-- measured: (.+) -->", page.read_text()):
            yield str(page.relative_to(ROOT)), f"measured: {names}", measured(load("methods"), names.split("; "))


def replace(text: str, name: str, body: str) -> str:
    """`text` with `body` between the markers of that name."""
    opening, closing = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(opening) != 1 or text.count(closing) != 1 or text.index(opening) > text.index(closing):
        raise SystemExit(f"expected {opening} and then {closing}, once each")
    before, rest = text.split(opening)
    return f"{before}{opening}\n{body}\n{closing}{rest.split(closing)[1]}"


# --- pictures --------------------------------------------------------------------------------------------------------


def draw_step(document: Document) -> bytes:
    """Bars: the optimizer's part of a step, contender by contender, in times of FusedSAM's."""
    (result,) = document["results"]
    own = result["fastsam"][0]
    names = [n for n in result["processes"][0] if n not in (table.ANCHOR, *table.YARDSTICKS)][::-1]
    milliseconds = [1e3 * across(result["processes"], name)["median"] for name in names]
    labels = [table.label(result, name).replace("**", "").replace("`", "") for name in names]
    figure, axes = _figure(8, 0.42 * len(names) + 1.2)
    colours = ["#00897b" if name == own else "#9e9e9e" if name == "base_fused" else "#cfd8dc" for name in names]
    axes.barh(labels, milliseconds, color=colours)
    for i, (name, value) in enumerate(zip(names, milliseconds, strict=True)):
        times = "" if name == own else f"  ({paired_ratio(result['processes'], name, own)['median']:.2f} x)"
        axes.text(value, i, f" {value:.1f} ms{times}", va="center", fontsize=9)
    axes.set_xlim(0, 1.5 * max(milliseconds))
    axes.set_xlabel("milliseconds")
    figure.suptitle("Optimizer's part of a SAM step: ResNet-50's parameters, SGD, float32, 2 CPU threads", fontsize=10)
    return _png(figure)


def draw_methods(document: Document) -> bytes:
    """Points: what each method costs and what it gains with 30 % wrong labels."""
    figure, axes = _figure(7.2, 4.6)
    learnt = document["accuracy"]
    processes = document["processes"]
    for method in family.FAMILY:
        if method.name not in processes[0]["times"]:
            continue
        base = methods.base_name(method.base)
        cost = methods.ratio(processes, method.name, base)
        pairs = zip(learnt[method.name]["accuracy"]["0.3"], learnt[base]["accuracy"]["0.3"], strict=True)
        gains = [a - b for a, b in pairs]
        sam = method.name == "SAM"  # in front of its neighbours
        axes.plot(cost, sum(gains) / len(gains), "o", color="#00897b" if sam else "#78909c", zorder=2 + sam)
    points = [line.get_xydata()[0] for line in axes.lines]
    shown = {"MSAM", "LookSAM", "Friendly SAM", "every k-th step", "preconditioned, experimental"}
    timed = [method.name for method in family.FAMILY if method.name in processes[0]["times"]]
    for name, (x, y) in zip(timed, points, strict=True):
        if name in shown:
            axes.annotate(name, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=9)
    axes.plot([], [], "o", color="#00897b", label="SAM")
    axes.plot([], [], "o", color="#78909c", label="its family")
    axes.legend(frameon=False)
    axes.set_xlabel("time of a training step / the base optimizer's")
    axes.set_ylabel("accuracy - the base optimizer's, points")
    axes.set_title("30 % wrong labels, scikit-learn's digits", fontsize=10)
    axes.set_xlim(0.9, 2.6)
    return _png(figure)


def draw_scaling(document: Document) -> bytes:
    """Lines: time over the number of parameters, and over the number of tensors."""
    figure, pair = _figure(8.4, 3.6, columns=2)
    titles = {"elements": "parameters, in 16 tensors", "tensors": "tensors of 1,000 elements"}
    colours = dict(zip((scaling.OWN, *scaling.AGAINST), ("#00897b", "#6d4c41", "#5c6bc0", "#9e9e9e"), strict=True))
    for axes, (kind, title) in zip(pair, titles.items(), strict=True):
        results = scaling.series(document, kind)
        for name, colour in colours.items():
            label = "FusedSAM" if name == scaling.OWN else table.LABELS[name].replace("`", "")
            milliseconds = [1e3 * across(result["processes"], name)["median"] for result in results]
            axes.loglog([result[kind] for result in results], milliseconds, "o-", ms=3, color=colour, label=label)
        axes.set_xlabel(title)
        axes.set_ylabel("milliseconds")
    pair[1].legend(frameon=False, fontsize=7)
    return _png(figure)


PICTURES: dict[str, tuple[str, Callable[[Document], bytes]]] = {
    "docs/images/step.png": ("step", draw_step),
    "docs/images/scaling.png": ("scaling", draw_scaling),
    "docs/images/methods.png": ("methods", draw_methods),
}


def _figure(width: float, height: float, columns: int = 1) -> Any:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(width, height), layout="constrained")
    for one in axes if columns > 1 else [axes]:
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, dpi=110, metadata={"Software": None})
    return out.getvalue()


def fingerprint(name: str, draw: Callable[[Document], bytes]) -> str:
    """The hash of what a picture is drawn from: the result and the function."""
    content = (ROOT / "benchmarks" / "results" / RESULTS[name]).read_bytes() + inspect.getsource(draw).encode()
    return hashlib.sha256(content).hexdigest()


def with_fingerprint(png: bytes, text: str) -> bytes:
    """The PNG, with the text in a tEXt chunk before its end (PNG specification, 11.3.4.3)."""
    content = b"tEXt" + b"Source\0" + text.encode("latin-1")
    chunk = struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
    end = png.rindex(b"IEND") - 4
    return png[:end] + chunk + png[end:]


def stale(write: bool) -> list[str]:
    """What is not as it should be; if `write`, it is so afterwards."""
    found = []
    for page, name, body in sections():
        path = ROOT / page
        old = path.read_text()
        new = replace(old, name, body)
        if new != old:
            found.append(f"{page}, {name}")
            if write:
                path.write_text(new)
    for picture, (name, draw) in PICTURES.items():
        path, mark = ROOT / picture, fingerprint(name, draw)
        if not path.is_file() or mark.encode() not in path.read_bytes():
            found.append(picture)
            if write:
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(with_fingerprint(draw(load(name)), mark))
    return found


def main() -> int:
    """Write what is stale, or say it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, end with 1 if something is stale")
    check = parser.parse_args().check
    found = stale(write=not check)
    print("\n".join(found) or "nothing is stale")
    return int(check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
