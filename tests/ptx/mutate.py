"""Change random lines of the CUDA kernels' PTX, one at a time, and see whether the tests' checks notice. By hand:

    python tests/ptx/mutate.py [mutants of each kernel] [seed]

Only lines that the checks execute are changed. The last run's table is in tests/mutate.md.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path

sys.path.pop(0)  # this folder, whose names are those of others' modules, too
sys.path.insert(0, str(Path(__file__).parents[1]))

import test_ptx_cuda as tests

from ptx import cuda, mutants
from ptx.buckets import Comparer
from ptx.grid import Fault
from ptx.tally import Tally
from ptx.translate import Unknown

ARCH = 90
KERNELS = [
    tests.NORM,
    tests.CLIMB,
    tests.SGD,
    "KernelE9ELi4077ENS0_5TypesIffff",  # RAdam, in float32
    tests.DRAWN,
    tests.DOT,
    tests.COMBINE,
]


def outcome(make: object, kernel: str) -> str:
    """What notices: a fault, a difference, an instruction that is none; "" if nothing does."""
    try:
        mutants.check_kernel(Comparer(Tally("")), make, kernel, tests.UPDATED[0], tests.PERTURBED)  # type: ignore[arg-type]
    except Fault:
        return "fault"
    except AssertionError as error:
        return "race" if str(error) == "a race" else "difference"
    except (Unknown, NotImplementedError):
        return "not PTX that the interpreter takes"
    return ""


def main(n: int, seed: int) -> None:
    """Print a row for each kernel, and every mutant that lives."""
    folder = cuda.ROOT / ".pytest_cache" / "d" / "ptx"
    lives, begun = [], time.monotonic()
    print("| kernel | lines executed | mutants | difference | fault | race | other | alive |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for part in KERNELS:
        whole = cuda.ptx_of(folder, ARCH)
        kernel = next(name for name in whole.places if part in name)
        text = mutants.text_of(whole.places[kernel], kernel)
        made: list[cuda.Library] = []

        def make(text: str = text, kernel: str = kernel, made: list[cuda.Library] = made, **options: object) -> object:
            ptx = cuda.ptx_of(folder, ARCH).replaced(kernel, text)
            made.append(cuda.Library(ARCH, folder, ptx=ptx, log=True, **options))  # type: ignore[arg-type]
            return made[-1]

        if found := outcome(make, kernel):
            raise SystemExit(f"without any mutant: {found} in {kernel}")
        grids = [ran.grid for library in made for ran in library.ran if ran.launch.kernel.name == kernel]
        blocks = grids[0].kernel.blocks
        lines = sorted({i.line - 1 for grid in grids for b in grid.executed for i in blocks[b].instructions})
        counts: Counter[str] = Counter()
        chosen = mutants.random_mutants(kernel, text, lines, n, seed)
        for mutant in chosen:
            changed = mutants.applied(text, mutant)
            found = outcome(lambda changed=changed, **options: make(text=changed, **options), kernel)
            counts[found] += 1
            lives += [] if found else [mutant]
        named = ("difference", "fault", "race", "not PTX that the interpreter takes", "")
        cells = [part, len(lines), len(chosen), *(counts[each] for each in named)]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
    print(f"\n{len(lives)} alive, {time.monotonic() - begun:.0f} s:\n")
    for mutant in lives:
        print(f"- `{mutant.kernel}`, line {mutant.line}: `{mutant.old}` becomes `{mutant.new}`")


if __name__ == "__main__":
    main(*(int(each) for each in (sys.argv[1:] or ["20", "1"])))
