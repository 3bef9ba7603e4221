"""Statistics of paired times: medians of rounds, medians and spread over fresh processes.

Apart from timing.py because it needs no torch: tables are written without waiting for its import.
"""

import statistics
from collections.abc import Mapping, Sequence


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and extremes."""
    if len(values) == 1:
        q1 = median = q3 = values[0]
    else:
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "min": min(values), "max": max(values), "n": len(values)}


def across(processes: Sequence[Mapping[str, Sequence[float]]], name: str) -> dict[str, float]:
    """Summary over processes of the median time of `name`."""
    return summary([statistics.median(times[name]) for times in processes])


def paired_ratio(processes: Sequence[Mapping[str, Sequence[float]]], over: str, under: str) -> dict[str, float]:
    """Summary over processes of the median over rounds of time(over) / time(under), both of the same round."""
    return summary(
        [statistics.median(a / b for a, b in zip(times[over], times[under], strict=True)) for times in processes]
    )
