"""Which bucket takes a parameter, and which parameters none can take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastsam import ops
from fastsam.bases.rules import Group
from fastsam.memory.placements import is_partial
from fastsam.memory.segments import address_of, is_dense, is_uninitialized, name_at, name_of, real_dtype
from fastsam.ops.local import local_of


def backend_of(param: Tensor, asked: str) -> str:
    """The name of the backend that serves a parameter; kernels walk dense storage only, and by its address."""
    chosen, part = ops.choose(asked, param.device, real_dtype(param)), local_of(param)
    readable = is_dense(part) and (address_of(part) != 0 or part.numel() == 0)
    return chosen if chosen is not None and readable else "reference"


def is_unused(param: Tensor) -> bool:
    """Whether a parameter takes no part in a step: frozen or without memory (meta, lazy), and without a gradient."""
    return param.grad is None and (not param.requires_grad or param.is_meta or is_uninitialized(param))


def _why_unreachable(param: Tensor, sharded: bool) -> str | None:
    """Why no step can reach all of a parameter, and what to do; None if one can."""
    if any(base.__name__ == "FakeTensor" for base in type(param).__mro__):
        return (
            "a FakeTensor, which has no memory that a step could write. For a dry run let the base optimizer step "
            "alone: the states are the same, and SAM takes one copy of the weights more"
        )
    if param.is_meta:
        return (
            "on the meta device and has a gradient, but no memory that a step could write. Give the model memory "
            "(model.to_empty(device=...)) before the optimizer is built; for a dry run let the base optimizer step "
            "alone: the states are the same, and SAM takes one copy of the weights more"
        )
    if getattr(param, "_fsdp_flattened", False) and not sharded:
        return (
            "part of a FlatParameter of FullyShardedDataParallel (FSDP1), of which each rank holds another piece, so "
            "that SAM's norm would be that of the piece. Say over which ranks it is split, FusedSAM(..., "
            "norm_group=model.process_group), or use FSDP2 (fully_shard), which needs nothing"
        )
    if is_partial(param):
        return (
            f"a DTensor of which each rank has a summand ({param.placements}), so that no rank knows a weight. "  # type: ignore[attr-defined]
            "Redistribute it to Replicate() or Shard() before the optimizer is built"
        )
    if param.layout != torch.strided:
        return (
            f"sparse ({param.layout}), and the perturbation of all weights is dense. Use a dense parameter "
            "(param.to_dense()); its gradients may be sparse"
        )
    return None


def check_duplicates(groups: Sequence[Group]) -> None:
    """Refuse a parameter that is listed twice: it would be stepped twice, from the same backup.

    Raises:
        ValueError: one is.
    """
    places: dict[int, str] = {}
    for i, group in enumerate(groups):
        for j, param in enumerate(group["params"]):
            place = name_at(i, j, group)
            if id(param) in places:
                raise ValueError(
                    f"FusedSAM: each parameter must be listed once, but {place} is the same Parameter as "
                    f"{places[id(param)]}. model.parameters() lists tied ones once; list(dict.fromkeys(params)) keeps "
                    "the first of each"
                )
            places[id(param)] = place


def check_param(param: Tensor, group: int, groups: Sequence[Group], asked: str, *, sharded: bool = False) -> None:
    """Refuse what no backend can do right.

    Args:
        param: the parameter.
        group: the index of its group.
        groups: all groups.
        asked: the backend that was asked for.
        sharded: whether sums are added over ranks that hold other pieces of plain parameters.

    Raises:
        ValueError: no memory, or only a part of it here; a complex parameter in an adaptive group, or a backend that
            does not serve its device.
    """
    name = name_of(param, groups)
    if (why := _why_unreachable(param, sharded)) is not None:
        raise ValueError(f"FusedSAM: {name} is {why}")
    if param.is_complex() and groups[group]["adaptive"]:
        raise ValueError(
            f"FusedSAM: {name} is complex ({param.dtype}), which adaptive=True (ASAM) does not define: abs(w) is not "
            "element-wise there. Put it in a group with adaptive=False"
        )
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
    whole = {}
    for owner in params:
        param = local_of(owner)
        whole[id(param)] = owner
        if param.numel() > 0 and address_of(param) != 0:
            reach = sum((n - 1) * s for n, s in zip(param.shape, param.stride(), strict=True))
            start = param.data_ptr()
            extents.append((start, start + (reach + 1) * param.element_size(), param))
            if reach + 1 < param.numel():
                return owner, owner
    extents.sort(key=lambda extent: extent[:2])
    reaching: list[tuple[int, int, Tensor]] = []  # those that end behind the start of the next one
    for extent in extents:
        reaching = [other for other in reaching if other[1] > extent[0]]
        for _, _, other in reaching:
            if _share(other, extent[2]):
                return whole[id(other)], whole[id(extent[2])]
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
