"""The swap: finds BatchNorm, ReLU and residual add in a model that exists, and runs them fused, instance by instance.

A module's forward becomes a graph (`trace`), with the children that end in a BatchNorm put in (`inline`), is searched
for patterns (`match`, which asks `nodes` what each node is and `alias` whether an operation may move), rewritten to
source (`rewrite`, `source`) and put into the instance as its forward (`install`). `plan` holds the result, `report`
tells it, `api` is what users call.

The graph comes from interpreting the forward's bytecode (`interpret`): `frame` and `instructions` move values, `reads`
and `attributes` fetch them from outside and leave guards, `operators`, `calls` and `builtin` say what happens to them,
`known` lists what may be called. `guards` is what must be as it was at each call, `layers` what PyTorch's own layers
are made of.
"""

from .api import explain, fuse_, is_fused, unfuse_
from .config import FuseConfig
from .report import FuseReport

__all__ = ["FuseConfig", "FuseReport", "explain", "fuse_", "is_fused", "unfuse_"]
