"""What the tests executed and compared, as one line for a developer."""

from __future__ import annotations

from collections import Counter

from ptx.grid import Grid


class Tally:
    """Counts of one test file."""

    def __init__(self, target: str) -> None:
        """Nothing yet, for a target as "compute_90"."""
        self.target, self.launches, self.compared = target, 0, 0
        self.configurations: set[object] = set()
        self.executed: dict[str, tuple[list[int], set[int]]] = {}  # by kernel: its blocks' sizes, those that ran

    def note(self, grid: Grid, configuration: object, kind: str = "") -> None:
        """Count a launch; `configuration` is what it is one of, `kind` tells kernels of one name apart."""
        kernel = grid.kernel.name + kind
        sizes = [len(block.instructions) for block in grid.kernel.blocks]
        self.executed.setdefault(kernel, (sizes, set()))[1].update(grid.executed)
        self.launches += 1
        self.configurations.add((kernel, configuration))

    def __str__(self) -> str:
        """The line."""
        counts: Counter[str] = Counter()
        for sizes, blocks in self.executed.values():
            counts["all"] += sum(sizes)
            counts["executed"] += sum(sizes[block] for block in blocks)
        share = 100 * counts["executed"] / max(counts["all"], 1)
        return (
            f"{self.target}: {len(self.executed)} kernels, {len(self.configurations)} configurations of them, "
            f"{self.launches} launches; {share:.1f} % of {counts['all']} instructions executed, "
            f"{self.compared} elements compared"
        )
