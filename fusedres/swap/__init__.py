"""The swap: finds BatchNorm, ReLU and residual add in a model that exists, and runs them fused, instance by instance.

A module's forward is traced (`trace`, on a twin made by `record`), with the children that end in a BatchNorm put in
(`inline`), searched for patterns (`match`, which asks `nodes` what each node is and `alias` whether an operation may
move), rewritten to source (`rewrite`) and put into the instance as a subclass of its own class (`install`). `plan`
holds the result, `report` tells it, `api` is what users call.
"""

from .api import explain, fuse_, is_fused, unfuse_
from .config import FuseConfig
from .report import FuseReport

__all__ = ["FuseConfig", "FuseReport", "explain", "fuse_", "is_fused", "unfuse_"]
