"""fusedres: BatchNorm, ReLU and the residual add of a ResNet, fused, forward and backward.

    import fusedres
    print(fusedres.fuse_(model))  # in place: same parameters, same state_dict, same results

Importing the package compiles nothing and touches no device; Triton is imported when a kernel is first needed.
"""

from . import functional, models, nn
from .dispatch import backend, get_backend, set_backend
from .swap import FuseConfig, FuseReport, explain, fuse_, is_fused, unfuse_

__version__ = "0.2.0"

__all__ = [
    "FuseConfig",
    "FuseReport",
    "backend",
    "explain",
    "functional",
    "fuse_",
    "get_backend",
    "is_fused",
    "models",
    "nn",
    "set_backend",
    "unfuse_",
]
