"""Options of methods that are out of range."""

from __future__ import annotations


def check_range(who: str, name: str, value: float, least: float, most: float = float("inf")) -> float:
    """The value, if it is a finite number in [least, most].

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, (int, float)) and least <= value <= most and abs(value) < float("inf"):
        return float(value)
    bounds = f">= {least:g}" if most == float("inf") else f"in [{least:g}, {most:g}]"
    raise ValueError(f"{who}: {name} must be {bounds}, got {value!r}")


def check_no_decay(who: str, decays: bool, climbs: str) -> None:
    """Refuse the weight decay in the perturbation, which is added to a gradient, where it climbs along another thing.

    Raises:
        ValueError: it is asked for.
    """
    if decays:
        raise ValueError(
            f"{who}: perturb_with_weight_decay=True would add the weight decay to {climbs}, of which it is no part; "
            "leave it out"
        )
