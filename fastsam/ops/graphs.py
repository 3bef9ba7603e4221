"""CUDA graphs and the CUDA kernels: a captured step reads the groups' values from the device.

Outside a capture the values travel in a launch's arguments, which a graph would repeat for good. The Triton kernels
have the same functions in their own module.
"""

from __future__ import annotations

from typing import Any

import torch

from fastsam.bases.rules import Row
from fastsam.ops import native
from fastsam.ops.tables import Tables


class Captures:
    """What the captured graphs of an optimizer read: tables that were replaced since must not be freed.

    Attributes:
        any: whether a pass was captured.
        outdated: whether a table of the last capture was replaced since.
    """

    def __init__(self) -> None:
        """No pass was captured yet."""
        self.any = self.outdated = False
        self._held: list[Any] = []
        self._states: frozenset[str] = frozenset()  # those that the captured kernels know

    def begin(self, states: frozenset[str]) -> None:
        """A pass is being captured, with the tables of now and kernels for groups that use these states."""
        self.any, self.outdated, self._states = True, False, states

    def hold(self, *replaced: Any) -> None:
        """Keep tables, and what a backend kept beside them, that are replaced by others, if a graph may read them."""
        if self.any:
            self.outdated = True
            self._held += [item for item in replaced if item is not None]

    def require_current(self, states: frozenset[str]) -> None:
        """Refuse to go on with a graph whose tables were replaced, or whose kernels lack a state that a group uses now.

        Raises:
            RuntimeError: they were, or do.
        """
        if self.outdated or (self.any and not states <= self._states):
            raise RuntimeError(
                "FusedSAM: parameters, states or groups were added or moved, or momentum or amsgrad switched on, since "
                "the CUDA graph was captured, which goes on without them and without new values of lr and rho: capture "
                "it again"
            )


def capturing(device: torch.device) -> bool:
    """Whether what is queued on this device now goes into a CUDA graph."""
    if device.type != "cuda":
        return False
    if device.index == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def own_rows(n_segments: int, n_groups: int) -> int:
    """How many rows behind the segments in a bucket's table are the kernels' own, as in csrc/cuda/launch.h."""
    return 1 + -(-2 * n_groups * len(Row._fields) // 8) + -(-n_segments // 8)


def prepare_capture(tables: Tables) -> None:
    """Before a pass: make sure that a graph finds the groups' values on the device.

    Raises:
        RuntimeError: a graph is being captured and the device holds other values.
    """
    if tables.cache == tables.rows:  # the values that were uploaded
        return
    if capturing(tables.device):
        raise RuntimeError(
            "FusedSAM: a captured step reads lr, rho and the other values of the groups from the device: call "
            "optimizer.refresh() after changing them, before the capture and before each replay"
        )
    if tables.cache is None:
        upload_values(tables)


def upload_values(tables: Tables) -> None:
    """Bring the groups' values to the device, outside of graphs."""
    native.upload_rows(tables)
    tables.cache = tables.rows
