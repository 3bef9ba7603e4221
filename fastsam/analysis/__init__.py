"""How sharp a minimum is: sharpness in a ball, the Hessian's eigenvalues, pictures of the loss around the weights.

Imported on demand (`from fastsam import analysis`); `pip install 'fastsam[analysis]'` brings what it needs. Every
function takes a model, `loss_fn(model(*inputs), targets)`, the mean over the samples, and data: one batch
`(*inputs, targets)` or an iterable of batches, such as a DataLoader. Weights, buffers, gradients, the modes of all
modules and the random generators are afterwards what they were, bit for bit, also after an exception or Ctrl-C.

Example:
    >>> from fastsam import analysis
    >>> analysis.sharpness(model, F.cross_entropy, loader, rho=0.05).value
    >>> analysis.top_eigenvalues(model, F.cross_entropy, loader, k=2).values
    >>> scan = analysis.landscape(model, F.cross_entropy, loader, dimensions=2)
    >>> analysis.plot_landscape(scan).savefig("landscape.png"); scan.save("landscape.npz")
"""

from fastsam.analysis.extras import unchanged
from fastsam.analysis.hessian import spectrum, top_eigenvalues, trace
from fastsam.analysis.landscapes import interpolation, landscape, random_direction
from fastsam.analysis.measures import sharpness
from fastsam.analysis.plots import plot_landscape, plot_sharpness, plot_spectrum
from fastsam.analysis.results import Eigenvalues, Landscape, Result, Sharpness, Spectrum

__all__ = [
    "Eigenvalues",
    "Landscape",
    "Result",
    "Sharpness",
    "Spectrum",
    "interpolation",
    "landscape",
    "plot_landscape",
    "plot_sharpness",
    "plot_spectrum",
    "random_direction",
    "sharpness",
    "spectrum",
    "top_eigenvalues",
    "trace",
    "unchanged",
]
