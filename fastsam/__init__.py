"""fastsam: Sharpness-Aware Minimization with its optimizer side fused into three launches."""

import logging

from fastsam import losses, methods, radius, registry, schedules, when
from fastsam.bases.lion import Lion
from fastsam.joint import joint
from fastsam.ops import native
from fastsam.optimizer import FusedSAM
from fastsam.registry import create
from fastsam.sam_step import SAMStep
from fastsam.training import asam_groups, freeze_running_stats, norm_layers_only, preserve_buffers
from fastsam.wrappers import unwrap

__version__ = "0.1.0"
__all__ = [
    "FusedSAM",
    "Lion",
    "SAMStep",
    "__version__",
    "asam_groups",
    "create",
    "freeze_running_stats",
    "joint",
    "losses",
    "methods",
    "norm_layers_only",
    "preserve_buffers",
    "radius",
    "schedules",
    "unwrap",
    "when",
]

list = registry.names  # not in __all__: a star import would hide Python's own

if (_reason := native.reason()) is not None:  # pip does not show what a successful build printed
    logging.getLogger(__name__).warning(
        "fastsam: no C++ library, so the PyTorch reference serves CPU tensors: %s", _reason
    )
