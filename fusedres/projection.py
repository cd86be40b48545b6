"""Which implementation a projection runs, under the name that CHANGELOG and others know: see `ops.projection`."""

from .ops.projection import in_triton

__all__ = ["in_triton"]
