"""Changes of single lines of PTX, and how to make them: what a check of the PTX must notice.

`python tests/ptx/mutate.py` runs random ones; the tests run those of `MUTANTS`.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from rounding import PLAIN, STOCHASTIC

from ptx.backend import Interpreted
from ptx.buckets import UPDATES, Comparer, Make, pair_of
from ptx.directions import COMBINATIONS, MIXES, SMALL, Directions
from ptx.parse import Module
from ptx.races import races

BFLOAT16_DRAWN = STOCHASTIC[0]


class Mutant(NamedTuple):
    """A line of a kernel, by its place in the kernel's text, and what it becomes."""

    kernel: str
    line: int
    old: str
    new: str


def text_of(module: Module, kernel: str) -> str:
    """A kernel's own text, which is a module by itself."""
    start = module.entries[kernel].start()
    return module.text[start : module.text.index("\n}", start) + 2]


def applied(text: str, mutant: Mutant) -> str:
    """The text with the mutant in it."""
    lines = text.split("\n")
    assert lines[mutant.line].strip() == mutant.old
    lines[mutant.line] = mutant.new
    return "\n".join(lines)


def matching(kernel: str, text: str, pattern: str, new: str, nth: int = 0) -> Mutant:
    """The mutant of the nth line in which a pattern is found."""
    found = [(i, line) for i, line in enumerate(text.split("\n")) if re.search(pattern, line)]
    i, line = found[nth]
    return Mutant(kernel, i, line.strip(), re.sub(pattern, new, line).strip())


SWAPS = {"add": "sub", "sub": "add", "mul": "add", "and": "or", "or": "and", "xor": "or", "min": "max", "max": "min"}
COMPARISONS = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt", "eq": "ne", "ne": "eq"}


def changes(line: str) -> list[str]:
    """What a line of PTX may become."""
    match = re.fullmatch(r"\s*(@!?%p\d+\s+)?([a-z][\w.:]*)\s+(.*);", line)
    if match is None:
        return []
    guard, name, operands = match[1] or "", match[2], match[3]
    head, *rest = name.split(".")
    found = []
    if guard:
        flipped = guard.replace("@!", "@") if "@!" in guard else guard.replace("@", "@!")
        found.append(f"{flipped}{name} {operands};")
    if head in SWAPS and rest[-1] != "pred" and (head != "mul" or rest[-1] in ("f32", "f64")):
        found.append(f"{guard}{'.'.join([SWAPS[head], *rest])} {operands};")
    if head == "setp" and rest[0] in COMPARISONS:
        found.append(f"{guard}{'.'.join([head, COMPARISONS[rest[0]], *rest[1:]])} {operands};")
    if head == "fma":
        found.append(f"{guard}{name.replace('fma', 'mul')} {operands.rpartition(',')[0]};")
    if head == "selp":
        to, a, b, c = (each.strip() for each in operands.split(","))
        found.append(f"{guard}{name} {to}, {b}, {a}, {c};")
    if head in ("ld", "st") and (address := re.search(r"\[(%r?d?\d+)(?:\+(\d+))?\]", operands)):
        size = int(re.search(r"\d+$", rest[-1])[0]) // 8  # type: ignore[index]
        moved = f"[{address[1]}+{int(address[2] or 0) + size}]"
        found.append(f"{guard}{name} {operands.replace(address[0], moved)};")
    if head in ("st", "bar", "red", "fence"):
        found.append("")
    if head == "atom":
        found.append(f"{guard}{name.replace('acq_rel', 'relaxed').replace('release', 'relaxed')} {operands};")
    return [each for each in found if each != line.strip()]


def random_mutants(kernel: str, text: str, executed: Sequence[int], n: int, seed: int) -> list[Mutant]:
    """Up to n of the lines that are executed."""
    chosen = random.Random(seed)
    lines = text.split("\n")
    every = [Mutant(kernel, i, lines[i].strip(), new) for i in executed for new in changes(lines[i])]
    return chosen.sample(every, min(n, len(every)))


def check_kernel(check: Comparer, make: Make, kernel: str, updated: Sequence[Any], perturbed: Sequence[Any]) -> None:
    """Run all that a kernel is for, as the tests of every kernel do, and look for races.

    Args:
        check: compares.
        make: makes backends, which log their accesses.
        kernel: its mangled name.
        updated: situations of `Comparer.same_updates`.
        perturbed: those of `Comparer.same_perturbations`.
    """
    ran: list[Interpreted] = []

    def noted(**options: Any) -> Interpreted:
        ran.append(make(**options))
        return ran[-1]

    format = BFLOAT16_DRAWN if "bfloat16" in kernel else PLAIN[0]
    if match := re.search(r"KernelE(\d+)E", kernel):
        name = list(UPDATES)[int(match[1])]
        buckets = pair_of(UPDATES[name], format, 0)
        check.same_updates(noted, lambda i: buckets, name, updated, 0)
    elif re.search(r"\d(dot|combine)I", kernel):
        small, large = Directions(MIXES[1], 1, sizes=SMALL), Directions(MIXES[1])
        small.same_products(check, noted())
        small.same_combination(check, noted(split_bits=1), COMBINATIONS[3])
        large.same_everything(check, [noted()])
        large.fill("a", [math.inf, math.nan])
        large.same_combination(check, noted(split_bits=2), COMBINATIONS[5])
        del ran[2:]
    else:
        buckets = pair_of(["sgd-nesterov-maximize", "sgd"], format, 0)
        check.same_perturbations(noted, lambda i: buckets, perturbed)
    for each in (ran[0], ran[-1]):  # the usual, and an overflow
        for done in each.ran:
            assert not races(done.grid), "a race"
