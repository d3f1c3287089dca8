"""What pieces of several experiments need, imported once by the server that their processes are forked from."""

import gc
import importlib
from contextlib import suppress

from experiments.detection.published import detectors
from experiments.runner import Unavailable

NEEDED = ("experiments.detection.running", "experiments.joint", "experiments.layers.running")
#: A method that needs one of these says so itself.
PERHAPS = ("laplace.curvature", "statsmodels.api", "sklearn.gaussian_process")

for name in NEEDED:
    importlib.import_module(name)
for name in PERHAPS:
    with suppress(ImportError):
        importlib.import_module(name)
with suppress(Unavailable):
    detectors()
gc.collect()  # as there
gc.freeze()
