"""Modules on `fusedres.functional`: parameters and buffers, no arithmetic of their own."""

from .batch_norm import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from .projection import Projection
from .residual import Residual

__all__ = ["BatchNormAct1d", "BatchNormAct2d", "BatchNormAct3d", "Projection", "Residual"]
