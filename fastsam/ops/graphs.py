"""CUDA graphs and the CUDA kernels: a captured step reads the groups' values from the device, where `upload` puts them.

Outside a capture they travel in a launch's arguments instead, which a graph would repeat for good. The Triton kernels
have the same functions in their own module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastsam.ops import native
from fastsam.rules import Row

if TYPE_CHECKING:
    from fastsam.buckets import Bucket


def capturing(device: torch.device) -> bool:
    """Whether what is queued on this device now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def own_rows(n_segments: int, n_groups: int) -> int:
    """Rows behind the segments in a bucket's table that are the kernels' own, as in csrc/cuda/launch.h."""
    return 1 + -(-n_groups * len(Row._fields) // 8) + -(-n_segments // 8)


def settle(bucket: Bucket) -> None:
    """Before a pass: see to it that a graph finds the groups' values on the device.

    Raises:
        RuntimeError: a graph is being captured and the device holds other values.
    """
    if bucket.uploaded == bucket.rows:
        return
    if capturing(bucket.device):
        raise RuntimeError(
            "FusedSAM: a captured step reads lr, rho and the other values of the groups from the device: call "
            "optimizer.refresh() after changing them, before the capture and before each replay"
        )
    if bucket.uploaded is None:
        upload(bucket)


def upload(bucket: Bucket) -> None:
    """Bring the groups' values to the device, outside of graphs."""
    if len(bucket.segment_table) != len(bucket.segments) + own_rows(len(bucket.segments), len(bucket.rows)):
        bucket.point()  # groups were added
    native.upload_rows(bucket)
    bucket.uploaded = bucket.rows
