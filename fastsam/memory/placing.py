"""Which bucket takes a parameter, and which parameters none can take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastsam import ops
from fastsam.bases.rules import Group
from fastsam.memory.segments import address_of, is_dense, name_of, real_dtype


def backend_of(param: Tensor, asked: str) -> str:
    """The name of the backend that serves a parameter; kernels walk dense storage only, and by its address."""
    chosen = ops.choose(asked, param.device, real_dtype(param))
    readable = is_dense(param) and (address_of(param) != 0 or param.numel() == 0)
    return chosen if chosen is not None and readable else "reference"


def check_param(param: Tensor, group: int, groups: Sequence[Group], asked: str) -> None:
    """Refuse what no backend can do right.

    Raises:
        ValueError: a complex parameter in an adaptive group, a distributed tensor, or a backend that does not serve its
            device.
    """
    name = name_of(param, groups)
    if param.is_complex() and groups[group]["adaptive"]:
        raise ValueError(
            f"FusedSAM: {name} is complex ({param.dtype}), which adaptive=True (ASAM) does not define: abs(w) is not "
            "element-wise there. Put it in a group with adaptive=False"
        )
    if hasattr(param, "_local_tensor"):
        raise ValueError(f"FusedSAM: {name} is a DTensor (FSDP2, tensor parallelism), which is not supported yet")
    if ops.choose(asked, param.device, real_dtype(param)) is None:
        why = ops.device_reason(asked, param.device)
        raise ValueError(
            f"FusedSAM: backend={asked!r} must serve every parameter, but {name} is {param.dtype} on "
            f"{param.device}{'' if why is None else f', and {why}'}; use backend='auto'"
        )


def check_overlaps(params: Iterable[Tensor], groups: Sequence[Group]) -> None:
    """Refuse parameters that share memory: the result would depend on the order of writes.

    Raises:
        ValueError: two of them do, or one overlaps itself.
    """
    pair = overlapping(params)
    if pair is not None:
        raise ValueError(
            f"FusedSAM: parameters must not share memory, got {name_of(pair[0], groups)} and "
            f"{name_of(pair[1], groups)}; tie weights by using one Parameter in both places"
        )


def overlapping(params: Iterable[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Two parameters that share memory (the same one twice if it overlaps itself), or None."""
    extents: list[tuple[int, int, Tensor]] = []
    for param in params:
        if param.numel() > 0 and address_of(param) != 0:
            reach = sum((n - 1) * s for n, s in zip(param.shape, param.stride(), strict=True))
            start = param.data_ptr()
            extents.append((start, start + (reach + 1) * param.element_size(), param))
            if reach + 1 < param.numel():
                return param, param
    extents.sort(key=lambda extent: extent[:2])
    reaching: list[tuple[int, int, Tensor]] = []  # those that end behind the start of the next one
    for extent in extents:
        reaching = [other for other in reaching if other[1] > extent[0]]
        for _, _, other in reaching:
            if _share(other, extent[2]):
                return other, extent[2]
        reaching.append(extent)
    return None


def _share(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors whose extents meet have an address in common (columns of one matrix need not)."""

    def addresses(t: Tensor) -> Tensor:
        offsets = torch.zeros((), dtype=torch.int64, device="cpu")
        for n, s in zip(t.shape, t.stride(), strict=True):
            offsets = offsets[..., None] + torch.arange(n, device="cpu") * s
        return t.data_ptr() + offsets.reshape(-1) * t.element_size()

    return bool(torch.isin(addresses(a), addresses(b)).any())
