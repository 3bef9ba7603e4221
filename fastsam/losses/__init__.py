"""Losses that flatten the minimum in one pass: SAF, and MESA, which needs no store (Du et al., arXiv 2205.14083).

Both add to a loss how far the outputs have moved along the training, so they go with a plain base optimizer.
"""

from fastsam.losses.mesa import MESA
from fastsam.losses.saf import SAF

__all__ = ["MESA", "SAF"]
