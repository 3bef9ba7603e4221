"""As `fastsam.integrations.lightning`, for the package `pytorch_lightning`, whose classes are others."""

from __future__ import annotations

from fastsam.integrations import require
from fastsam.integrations.lightning_parts import CallbackParts, MixedPrecisionParts

require("pytorch_lightning")

from pytorch_lightning.callbacks import Callback  # noqa: E402
from pytorch_lightning.plugins.precision import MixedPrecision  # noqa: E402

__all__ = ["SAMCallback", "SAMMixedPrecision"]


class SAMCallback(CallbackParts, Callback):
    """See `fastsam.integrations.lightning.SAMCallback`."""


class SAMMixedPrecision(MixedPrecisionParts, MixedPrecision):  # type: ignore[misc]  # its arguments are Lightning's
    """See `fastsam.integrations.lightning.SAMMixedPrecision`."""
