"""What needs the model, not only its parameters: normalisation layers in the second pass, groups of ASAM and SAM-ON."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

NORM_LAYERS = (_BatchNorm, _InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)  # and what derives from them


@contextmanager
def freeze_running_stats(model: nn.Module) -> Iterator[None]:
    """Within the block, forward passes in training mode leave the running statistics of normalisation layers alone.

    SAM runs every batch twice, and the second time at weights that are not the model's. Without protection running
    means and variances would count each batch twice, half of it at w + e. Only the statistics of the first pass should
    stay, as in the original implementation of SAM. The output of the pass is the same with and without this block.

    BatchNorm in one to three dimensions, SyncBatchNorm and other subclasses of torch's batch normalisation get
    `track_running_stats=False` for the time being: no write happens, `num_batches_tracked` does not count, and
    `momentum=None` (a cumulative average) stays right. InstanceNorm ignores that flag, so its running statistics are
    copied and put back. Layers in evaluation mode are not touched. Leaving the block, by an exception too, restores
    everything; blocks may be nested. An infinite activation in the block leaves no trace.

    Setting a momentum of 0 instead, as is often done, still counts batches, misses InstanceNorm, and turns running
    statistics into NaN at the first infinite activation (0 * inf).

    Layers that keep statistics in a class of their own, not derived from torch's, are not known here: see
    `preserve_buffers`.

    Args:
        model: the module whose layers are protected; it and all modules in it.

    Example:
        A closure runs twice. `opt.perturbed` tells which time it is: false in the first call, true in the second.

        >>> def closure():
        ...     opt.zero_grad()
        ...     with freeze_running_stats(model) if opt.perturbed else nullcontext():
        ...         loss = loss_fn(model(x), y)
        ...     loss.backward()
        ...     return loss
        >>> opt.step(closure)

        With two calls:

        >>> loss_fn(model(x), y).backward(); opt.first_step(zero_grad=True)
        >>> with freeze_running_stats(model):
        ...     loss_fn(model(x), y).backward()
        >>> opt.step()
    """
    flagged: list[_BatchNorm] = []
    copies: list[tuple[Tensor, Tensor]] = []
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            # In evaluation mode the flag would say nothing new; already false, it is somebody else's to restore.
            if module.training and module.track_running_stats:
                flagged.append(module)
        elif isinstance(module, _InstanceNorm) and (module.training or not module.track_running_stats):
            copies += [(buffer, buffer.clone()) for buffer in module.buffers(recurse=False)]
    try:
        for module in flagged:
            module.track_running_stats = False
        yield
    finally:
        for module in flagged:
            module.track_running_stats = True
        with torch.no_grad():
            for buffer, old in copies:
                buffer.copy_(old)


@contextmanager
def preserve_buffers(model: nn.Module) -> Iterator[None]:
    """Leaving the block, all buffers of the model are what they were before it.

    It is `freeze_running_stats` for layers that keep statistics in a class of their own: whatever the second pass
    writes to a buffer, or puts in a buffer's place, is undone, by an exception too. That includes what it should
    write, such as a counter of calls. Other attributes than buffers are not known.

    It copies every buffer, where `freeze_running_stats` copies nothing for torch's batch normalisation. The backward
    pass belongs into the block: a buffer that the forward pass wrote to, and autograd saved, is outdated after it.

    Args:
        model: the module whose buffers are kept, and those of all modules in it.

    Example:
        >>> loss_fn(model(x), y).backward(); opt.first_step(zero_grad=True)
        >>> with preserve_buffers(model):
        ...     loss_fn(model(x), y).backward()
        >>> opt.step()
    """
    places = [(module._buffers, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    written = {id(buffer): buffer for *_, buffer in places if buffer is not None and _can_be_written(buffer)}
    kept = [(buffer, buffer._version, buffer.clone()) for buffer in written.values()]
    try:
        yield
    finally:
        for buffers, name, buffer in places:
            buffers[name] = buffer
        with torch.no_grad():
            for buffer, version, old in kept:
                # Batch normalisation's writes are not counted; others make what autograd saved of a buffer outdated.
                (buffer.data if buffer._version == version else buffer).copy_(old)


def _can_be_written(buffer: Tensor) -> bool:
    """Whether an operation can write to a buffer: not if it was expanded, or made in inference mode."""
    if buffer.is_inference():
        return False
    sizes = zip(buffer.shape, buffer.stride(), strict=True) if buffer.layout == torch.strided else ()
    return all(stride != 0 or n <= 1 for n, stride in sizes)


def asam_groups(model: nn.Module, rho: float = 0.5, eta: float = 0.01) -> list[dict[str, Any]]:
    """Parameter groups for ASAM as in its authors' code (Kwon et al., arXiv 2102.11600): only weights are adaptive.

    Parameters with "weight" in their name are perturbed in units of T = abs(w) + eta, the others (biases above all)
    with T = 1. One norm is taken over both. An optimizer sees no names, so the split has to happen here.

    Args:
        model: frozen parameters are kept, so that they can be thawed later; tied ones are listed once, under the first
            of their names.
        rho: radius of the perturbation, about ten times what plain SAM takes.
        eta: added to abs(w), so that weights near 0 move too.

    Returns:
        One or two groups for `FusedSAM`; a group without parameters is left out.

    Example:
        >>> opt = FusedSAM(asam_groups(model, rho=0.5), torch.optim.SGD, lr=0.1, momentum=0.9)
    """
    weights: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, param in model.named_parameters():
        (weights if "weight" in name else others).append(param)
    groups: list[dict[str, Any]] = [
        {"params": weights, "rho": rho, "adaptive": True, "eta": eta},
        {"params": others, "rho": rho, "adaptive": False, "eta": 0.0},
    ]
    return [group for group in groups if group["params"]]


def norm_layers_only(
    model: nn.Module, *, layers: tuple[type[nn.Module], ...] = (), **options: Any
) -> list[dict[str, Any]]:
    """Parameter groups for SAM-ON (Mueller et al., arXiv 2306.04226): only normalisation layers are perturbed.

    These are scale and shift of BatchNorm in any dimension, SyncBatchNorm, InstanceNorm, LayerNorm, GroupNorm,
    RMSNorm and of classes that derive from them; less than a thousandth of most networks. The norm of the gradients is
    taken over them alone, and only they need a backup. The base optimizer steps with all parameters.

    Args:
        model: frozen parameters are kept, so that they can be thawed later; shared ones are listed once, as perturbed
            if any layer that has them is a normalisation layer.
        layers: further classes of normalisation layers, which derive from none of torch's.
        **options: of both groups (`rho`, `adaptive`, `eta`, `lr`, ...). What is to differ, such as `weight_decay`, can
            be written into the groups afterwards.

    Returns:
        The group that is perturbed, and, if there are other parameters, the group that is not, for `FusedSAM`.

    Raises:
        ValueError: there is no normalisation layer with parameters, or `perturb` is among the options.

    Example:
        >>> opt = FusedSAM(norm_layers_only(model, rho=0.5), torch.optim.SGD, lr=0.1, momentum=0.9)
    """
    if "perturb" in options:
        raise ValueError("norm_layers_only: perturb is what it decides; leave it out of the options")
    scales = {
        param
        for module in model.modules()
        if isinstance(module, (*NORM_LAYERS, *layers))
        for param in module.parameters(recurse=False)
    }
    if not scales:
        raise ValueError(
            "norm_layers_only: the model has no normalisation layer with parameters, so nothing would be perturbed; "
            "name classes that derive from none of torch's: norm_layers_only(model, layers=(MyNorm,))"
        )
    params = list(model.parameters())
    perturbed = [param for param in params if param in scales]
    others = [param for param in params if param not in scales]
    groups = [{**options, "params": perturbed, "perturb": True}, {**options, "params": others, "perturb": False}]
    return [group for group in groups if group["params"]]
