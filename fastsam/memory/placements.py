"""How distributed parameters (DTensors) lie on the ranks, and tensors that lie alike."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor

from fastsam.ops.local import distributed_class, is_distributed, local_of
from fastsam.ops.native import reader

_told: list[type[Any]] = []  # the class that the native reader knows


def ranks_of(param: Tensor) -> tuple[Any, ...]:
    """The process groups over which a parameter's elements are shared out: of each mesh dimension that splits it.

    What is not `Replicate` splits it; `_StridedShard`, of FSDP2 over tensor parallelism, is no subclass of `Shard`.
    """
    if not is_distributed(param):
        return ()
    tell_reader()
    spec = cast(Any, param)._spec
    return tuple(spec.mesh.get_group(dim) for dim in _split_dims(spec))


def place_among(param: Tensor) -> int:
    """The number of this rank's part of a parameter, 0 on a rank that has all of it or the first part."""
    if not is_distributed(param):
        return 0
    spec, place = cast(Any, param)._spec, 0
    for dim in _split_dims(spec):
        place = place * int(spec.mesh.size(dim)) + int(spec.mesh.get_local_rank(dim))
    return place


def _split_dims(spec: Any) -> list[int]:
    return [i for i, placement in enumerate(spec.placements) if not placement.is_replicate() and spec.mesh.size(i) > 1]


def is_partial(param: Tensor) -> bool:
    """Whether what lies on the ranks are summands of the values."""
    return is_distributed(param) and any(placement.is_partial() for placement in cast(Any, param).placements)


def tell_reader() -> None:
    """Let the native reader know the class of distributed tensors."""
    cls = distributed_class()
    if reader is not None and cls is not None and cls not in _told:
        reader.set_distributed_type(cls)
        _told.append(cls)


def distributed_as(param: Tensor, part: Tensor) -> Tensor:
    """A tensor that lies on the ranks as a parameter does, with this part here; the part itself if that is all.

    Not made by `DTensor.from_local`, which would move a part on the CPU to the mesh's device (offloaded parameters).
    """
    if not is_distributed(param):
        return part
    spec = cast(Any, param)._spec
    if part.dtype != spec.tensor_meta.dtype:
        spec = copy.copy(spec)
        spec.tensor_meta = spec.tensor_meta._replace(dtype=part.dtype)
    cls = distributed_class()
    assert cls is not None
    return cast(Tensor, cls(part, spec, requires_grad=False))


@torch.no_grad()
def part_of(value: Tensor, param: Tensor) -> Tensor:
    """What of a value, given as a DTensor or whole, belongs to this rank's part of a parameter.

    All ranks must ask where the value is a DTensor that lies otherwise than the parameter.
    """
    if not is_distributed(param):
        return cast(Any, value).full_tensor() if is_distributed(value) else value
    own = cast(Any, param)
    if is_distributed(value):
        other = cast(Any, value)
        if other.placements != own.placements or other.device_mesh != own.device_mesh:
            value = other.redistribute(own.device_mesh, own.placements)
        return local_of(value)
    if value.shape != param.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    whole = value.to(own.device_mesh.device_type)
    return local_of(distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None)).to(param.device)


def same_placements(param: Tensor, grad: Tensor) -> bool:
    """Whether a gradient lies on the ranks as its parameter does."""
    if is_distributed(param) != is_distributed(grad):
        return False
    return not is_distributed(param) or cast(Any, param).placements == cast(Any, grad).placements


@torch.no_grad()
def gradient_part(param: Tensor, name: str) -> Tensor:
    """This rank's part of a gradient, brought to where the parameter's is.

    Raises:
        ValueError: it is distributed and its parameter is not, or the other way round, or over other ranks.
    """
    grad = param.grad
    assert grad is not None
    if not is_distributed(param) and not is_distributed(grad):
        return grad
    own, other = cast(Any, param), cast(Any, grad)
    if is_distributed(param) != is_distributed(grad) or own.device_mesh != other.device_mesh:
        raise ValueError(
            f"FusedSAM: {name} and its gradient must both be DTensors on one device mesh, got "
            f"{_described(param)} and a gradient that is {_described(grad)}"
        )
    if same_placements(param, grad):
        return local_of(grad)
    return local_of(other.redistribute(placements=own.placements))


def _described(tensor: Tensor) -> str:
    if not is_distributed(tensor):
        return "a plain tensor"
    return f"a DTensor on {cast(Any, tensor).device_mesh}"
