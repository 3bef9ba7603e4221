"""The methods of the SAM family, one file each: which direction the weights climb along, and which the step takes.

Each is a `FusedSAM` with the same arguments and its own beside them. Write your own the same way:

    class Half(FusedSAM):
        def ascent(self, g1):  # the gradients at w
            self.keep(g1)
            return g1  # climb along them

        def descent(self, g2):  # the gradients at w + e
            return self.combine("half", (0.5, g2), (0.5, self.direction("kept")))  # and step with the mean of both
"""

from fastsam.methods.esam import ESAM
from fastsam.methods.friendly import FriendlySAM
from fastsam.methods.gsam import GSAM
from fastsam.methods.looksam import LookSAM
from fastsam.methods.msam import MSAM
from fastsam.methods.preconditioned import PreconditionedSAM
from fastsam.methods.sparse import SparseSAM
from fastsam.methods.vasso import VaSSO
from fastsam.methods.wsam import WSAM

__all__ = [
    "ESAM",
    "GSAM",
    "MSAM",
    "WSAM",
    "FriendlySAM",
    "LookSAM",
    "PreconditionedSAM",
    "SparseSAM",
    "VaSSO",
]
