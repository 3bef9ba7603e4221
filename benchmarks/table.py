"""Markdown tables of a benchmark's JSON, step.py's or gpu.sh's; as a command, to the screen.

python benchmarks/table.py benchmarks/results/FILE.json
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ratios import across, paired_ratio

LABELS = {
    "eager": "eager SAM + default base",
    "eager_foreach": "eager SAM + `foreach=True` base",
    "eager_fused": "eager SAM + `fused=True` base",
    "foreach_mul": "foreach SAM (`mul`, `add`) + `fused=True` base",
    "foreach_alpha": "foreach SAM (`add(alpha=)`) + `fused=True` base",
    "compiled": "foreach SAM, `torch.compile`d with its base",
    "pytorch_optimizer": "pytorch_optimizer's SAM + `fused=True` base",
    "foreach_masters": "foreach SAM on float32 masters + `fused=True` base",
    "base_fused": "`fused=True` base alone, no SAM",
    "triad": "streaming triad",
    "copy": "device-to-device copy",
}

YARDSTICKS = ("triad", "copy")
ANCHOR = "anchor"  # FusedSAM with SGD in fp32, timed beside every other case
MISSING = "-"
GPU_COLUMNS = {"launches": "launches", "peak_bytes": "peak MiB beyond the base"}
LAUNCH_COLUMNS = {
    "kernels": "launches",
    "host_us": "two calls, us",
    "closure_us": "step(closure), us",
    "profiler_us": "the same in the profiler, us",
    "gap_us": "gap between kernels, us",
}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def label(result: Mapping[str, Any], name: str) -> str:
    """What a table calls a contender."""
    if name.startswith("fastsam_"):
        return f"**FusedSAM**, `{name.removeprefix('fastsam_')}`"
    return LABELS[name] if result["fused_base"] else LABELS[name].replace("`fused=True`", "`foreach=True`")


def spread(found: Mapping[str, float], digits: int = 2, times: float = 1) -> str:
    """The median and, where there are several processes, the quartiles."""
    median, q1, q3 = (f"{found[key] * times:.{digits}f}" for key in ("median", "q1", "q3"))
    return median if found["n"] == 1 else f"{median} ({q1} to {q3})"


def yardstick_of(result: Mapping[str, Any]) -> str | None:
    """The bandwidth contender that the result holds."""
    return next((name for name in YARDSTICKS if name in result["bytes"]), None)


def share_of_yardstick(result: Mapping[str, Any], name: str) -> dict[str, float]:
    """Bandwidth by ideal bytes over the yardstick's of the same round."""
    yardstick = yardstick_of(result)
    assert yardstick is not None
    times = result["bytes"][name] / result["bytes"][yardstick]
    ratio = paired_ratio(result["processes"], yardstick, name)
    return {key: value if key == "n" else value * times for key, value in ratio.items()}


def over_prediction(result: Mapping[str, Any]) -> dict[str, float]:
    """FusedSAM's time over what SGD's time of the same round and the bytes of both predict."""
    name = result["fastsam"][0]
    expected = result["bytes"][name] / result["bytes"][ANCHOR]
    ratio = paired_ratio(result["processes"], name, ANCHOR)
    return {key: value if key == "n" else value / expected for key, value in ratio.items()}


def step_table(result: Mapping[str, Any]) -> str:
    """One model and case: a row per contender."""
    processes, yardstick = result["processes"], yardstick_of(result)
    on_gpu = {key: title for key, title in GPU_COLUMNS.items() if result.get(key)}
    rows = []
    for name in processes[0]:
        if name == ANCHOR:
            continue
        seconds = across(processes, name)
        count = result["operations"].get(name)
        bandwidth = share = faster = MISSING
        if name in result["bytes"]:
            bandwidth = f"{result['bytes'][name] / seconds['median'] / 1e9:.1f}"
            share = f"{100 * share_of_yardstick(result, name)['median']:.0f}" if yardstick else MISSING
        if result["fastsam"] and name not in YARDSTICKS and name != result["fastsam"][0]:
            faster = spread(paired_ratio(processes, name, result["fastsam"][0]))
        row = [
            label(result, name),
            spread(seconds, 2, 1e3),
            bandwidth,
            share,
            faster,
            MISSING if count is None else str(count),
        ]
        rows.append(row + [_per_contender(result, key, name) for key in on_gpu])
    columns = [f"{_title(result)}", "ms", "GB/s", f"% of {yardstick or 'triad'}", "its time / FusedSAM's", "ops"]
    return markdown(columns + list(on_gpu.values()), rows)


def run_tables(document: Mapping[str, Any]) -> list[str]:
    """What gpu.sh measured: a row for each case, for each number of tensors and for each model that was trained."""
    results = document["results"]
    steps = [result for result in results if result["kind"] == "step"]
    tables = [_sweep_table(steps)] if steps else []
    tables += [host_table(result) for result in results if result["kind"] == "host"]
    rows = [
        [model, backend, *(_number(found.get(key)) for key in LAUNCH_COLUMNS)]
        for model, backends in document["launches"].items()
        for backend, found in backends.items()
    ]
    tables += [markdown(["tensors of 8 elements", "backend", *LAUNCH_COLUMNS.values()], rows)] if rows else []
    train = {model: found for model, found in document["train"].items() if "ms" in found}
    if train:
        names = [name for name in next(iter(train.values()))["ms"] if name != "passes"]
        rows = [
            [model, _number(found["ms"]["passes"]), *(_number(found["over_passes"][name]) for name in names)]
            for model, found in train.items()
        ]
        tables.append(markdown(["whole step", "two passes, ms", *(f"{name} / passes" for name in names)], rows))
    if document["failures"]:
        tables.append(f"Not measured: {', '.join(document['failures'])}.")
    return tables


def _sweep_table(steps: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for result in steps for name in result["fastsam"]))
    rows = []
    for result in steps:
        processes, row = result["processes"], [_title(result)]
        for name in names:
            there = name in processes[0]
            row.append(_number(1e3 * across(processes, name)["median"]) if there else MISSING)
            share = there and yardstick_of(result) is not None
            row.append(f"{100 * share_of_yardstick(result, name)['median']:.0f}" if share else MISSING)
        own = result["fastsam"][0] if result["fastsam"] else None
        for rivals in (["eager"], ["foreach_mul", "foreach_alpha", "foreach_masters"], ["base_fused"]):
            there = [rival for rival in rivals if own and rival in processes[0]]
            ratios = [paired_ratio(processes, rival, own)["median"] for rival in there]
            row.append(f"{min(ratios):.2f}" if ratios else MISSING)
        rows.append(row + [_per_contender(result, key, own) for key in GPU_COLUMNS])
    yardstick = next((found for result in steps if (found := yardstick_of(result))), "copy")
    columns = ["optimizer part", *(f"{name}{what}" for name in names for what in (", ms", f", % of {yardstick}"))]
    rivals = ["eager SAM / FusedSAM", "best foreach SAM / FusedSAM", "fused base alone / FusedSAM"]
    return markdown([*columns, *rivals, *GPU_COLUMNS.values()], rows)


def _per_contender(result: Mapping[str, Any], key: str, name: str | None) -> str:
    found = (result[key] or {}).get(name)
    return MISSING if found is None else str(round(found / 2**20)) if key == "peak_bytes" else str(found)


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4g}"


def cases_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Every case, a row each: FusedSAM's time, against what its bytes predict and against two rivals."""
    rows = []
    for result in results:
        name, processes = result["fastsam"][0], result["processes"]
        seconds = across(processes, name)
        row = [
            result["name"],
            f"{result['bytes'][name] / result['elements']:.1f}",
            spread(seconds, 2, 1e3),
            f"{result['bytes'][name] / seconds['median'] / 1e9:.1f}",
            spread(over_prediction(result)) if ANCHOR in processes[0] else MISSING,
        ]
        for rivals in (("eager",), ("foreach_alpha", "foreach_masters")):
            there = [rival for rival in rivals if rival in processes[0]]
            row.append(spread(paired_ratio(processes, there[0], name)) if there else MISSING)
        rows.append(row)
    first = results[0]
    columns = [f"FusedSAM, {first['model']} shapes", "bytes a parameter", "ms", "GB/s", "time / predicted by bytes"]
    return markdown([*columns, "eager SAM / FusedSAM", "foreach SAM / FusedSAM"], rows)


def host_table(result: Mapping[str, Any]) -> str:
    """Host time of a step whose tensors hold next to nothing."""
    rows = []
    for name in result["processes"][0]["calls"]:
        row = [label(result, name)]
        for how in ("calls", "closure"):
            processes = [process[how] for process in result["processes"]]
            row.append(spread(across(processes, name), 0, 1e6))
            same = not result["fastsam"] or name == result["fastsam"][0]
            row.append(MISSING if same else spread(paired_ratio(processes, name, result["fastsam"][0]), 1))
        count = result["operations"].get(name)
        rows.append([*row, MISSING if count is None else str(count)])
    ratio = "its time / FusedSAM's"
    columns = [_title(result), "two calls, us", ratio, "step(closure), us", ratio, "ops"]
    return markdown(columns, rows)


def _title(result: Mapping[str, Any]) -> str:
    case = result["case"]
    extra = [name for name in ("adaptive", "missing", "misaligned", "flattened") if case.get(name)]
    extra += [f"{case['groups']} groups"] if case["groups"] > 1 else []
    extra += [case["precision"]] if case.get("precision", "plain") != "plain" else []
    return ", ".join([f"{result['model']} shapes", case["base"], case["dtype"], *extra])


def environment_line(document: Mapping[str, Any]) -> str:
    """One sentence: where and when, with what."""
    env = document["environment"]
    caches = ", ".join(
        f"L{cache['level']} {cache['bytes'] / 2**20:g} MiB"
        for cache in env["caches"]
        if cache["type"] != "Instruction" and cache["level"] > 1
    )
    where = f"{env['gpu']}, driver {env['driver']}" if "gpu" in env else f"{env['cpu']}, {caches}"
    commit = (env["commit"] or "none")[:12] + (" with uncommitted changes" if env["dirty"] else "")
    threads = f"{env['threads']} thread" + "s" * (env["threads"] != 1)
    versions = f"{threads}, torch {env['torch']}, Python {env['python']}, fastsam {env['fastsam']}"
    isa = f" ({env['cpu_isa']})" if env.get("cpu_isa") else ""
    return f"{where}; {versions}{isa}, commit {commit}, {document['date']}."


def render(document: Mapping[str, Any]) -> str:
    """Everything that a JSON holds, as Markdown."""
    results = document["results"]
    if "sections" in document:
        parts = run_tables(document)
    else:
        steps = [result for result in results if result["kind"] == "step"]
        cases = [result for result in steps if result["name"]]
        parts = [step_table(result) for result in steps if not result["name"] or result["name"] == "SGD"]
        parts += [cases_table(cases)] if cases and cases[0]["fastsam"] else []
        parts += [host_table(result) for result in results if result["kind"] == "host"]
    counts = {len(result["processes"]) for result in results}
    count = "one process" if counts == {1} else f"{'/'.join(map(str, sorted(counts)))} fresh processes"
    parts.append(
        f"Optimizer part only, gradients given, parity checked first; medians of {count}, quartiles in brackets; "
        "ratios are of times in the same round. GB/s counts the bytes that the step cannot do without. "
        + environment_line(document)
    )
    parts.append(f"To repeat: `{document['command']}`")
    return "\n\n".join(parts)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    print(render(json.loads(parser.parse_args().json.read_text())))


if __name__ == "__main__":
    main()
