"""Modules on `fusedres.functional`: parameters and buffers, no arithmetic of their own."""

from .batch_norm import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from .blocks import BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck, PreActSequential
from .projection import Projection
from .residual import Residual

__all__ = [
    "BasicBlock",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "Bottleneck",
    "PreActBasicBlock",
    "PreActBottleneck",
    "PreActSequential",
    "Projection",
    "Residual",
]


def __dir__() -> list[str]:
    return list(__all__)
