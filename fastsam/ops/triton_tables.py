"""A host table's copy on the device, as the Triton kernels read it, in and out of captured CUDA graphs."""

from ctypes import string_at
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor

from fastsam.ops.triton_kernels import _update_kernel

INTERPRETED = not isinstance(_update_kernel, triton.JITFunction)


def argument_of(tensor: Tensor) -> Any:
    """How a kernel is given a tensor: the launcher takes an address as it is, the interpreter wants the tensor."""
    return tensor if INTERPRETED else tensor.data_ptr()


class DeviceCopy:
    """A host table's copy on the device, written only when a value changed.

    Every upload has a staging buffer of its own: a buffer kept for the next upload might be overwritten while the copy
    is still to come. What a captured graph reads is never written again, but for a `live` table: replays shall see its
    new values.
    """

    def __init__(self, table: Tensor, device: torch.device, live: bool = False) -> None:
        """A copy that nothing was written to yet."""
        self.live = live
        self.written = b""  # what `copy` holds
        self.copy = torch.empty_like(table, device=device)
        self.address = argument_of(self.copy)
        self.shared = False  # whether a captured graph reads `copy`, too
        self.held: list[Tensor] = []  # what else captured graphs read
        self.spare: Tensor | None = None  # for the next upload after a graph was captured that reads `copy`

    def __call__(self, table: Tensor, capturing: bool = False) -> Any:
        """Where the table's values are on the device."""
        values = string_at(table.data_ptr(), table.nbytes)
        if capturing:
            return self._captured(table, values)
        if values != self.written:
            self.written = b""
            self._upload(table)
            self.written = values
        return self.address

    def refill(self) -> None:
        """Have memory for the next upload: it may come in restore(), after the device's memory ran out."""
        if self.shared and self.spare is None:
            self.spare = torch.empty_like(self.copy)

    def _upload(self, table: Tensor) -> None:
        staging = table
        if self.copy.is_cuda:
            staging = torch.empty(table.shape, dtype=self.copy.dtype, device="cpu", pin_memory=True).copy_(table)
        if self.shared:
            self.refill()
            assert self.spare is not None
            self.held.append(self.copy)
            self.copy, self.spare, self.shared = self.spare, None, False
            self.address = argument_of(self.copy)
        self.copy.copy_(staging, non_blocking=True)

    def _captured(self, table: Tensor, values: bytes) -> Any:
        """Where a graph finds the values: it writes them itself unless they are on the device already.

        That takes nothing but kernels on the capturing stream, which have the values in their arguments: a replay reads
        no memory of the host, and no call is made that a capture may forbid (to wait, to query an event, to allocate
        pinned memory, to copy).
        """
        if values == self.written:
            self.shared = not self.live
            return self.address
        if self.live:
            raise RuntimeError(
                "FusedSAM: a captured step reads lr, rho and the other values of the groups from the device: call "
                "optimizer.refresh() after changing them, before the capture and before each replay"
            )
        copy = torch.zeros_like(self.copy)
        torch._foreach_add_(copy.unbind(), table.to(copy.dtype).tolist())
        self.held.append(copy)
        return argument_of(copy)


class AddressCopies:
    """Copies of the addresses of gradients and directions: of several tables of one length at a time.

    A table is found again by its values, whoever wrote it down: a direction's, which never change, are uploaded once,
    and a gradient's not again where `known` has them.
    """

    MOST = 8  # tables; one call takes four

    def __init__(self, table: Tensor, device: torch.device, *known: DeviceCopy) -> None:
        """No copies yet but those known, which others write and hold at least one."""
        self.table, self.device, self.known = table, device, known
        self.copies: list[DeviceCopy] = []  # the least recently used one first

    def __call__(self, table: Tensor, capturing: bool = False) -> Any:
        """Where the addresses are on the device, until MOST - 1 other tables were asked for."""
        values = string_at(table.data_ptr(), table.nbytes)
        for copy in (*reversed(self.copies), *self.known):
            if copy.written == values:
                break
        else:
            copy = self._least_used() if not capturing else self.known[0]  # which writes nothing in a capture
        if copy in self.copies:
            self.copies.append(self.copies.pop(self.copies.index(copy)))
        return copy(table, capturing)

    def refill(self) -> None:
        """Have memory for the next uploads."""
        for copy in self.copies:
            copy.refill()

    def _least_used(self) -> DeviceCopy:
        if len(self.copies) < self.MOST:
            self.copies.append(DeviceCopy(self.table, self.device))
            return self.copies[-1]
        return self.copies[0]
