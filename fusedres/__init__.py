"""fusedres: BatchNorm, ReLU and the residual add of a ResNet, fused, forward and backward.

    import fusedres
    print(fusedres.fuse_(model))  # in place: same parameters, same state_dict, same results

Importing the package compiles nothing and touches no device; Triton is imported when a kernel is first needed.
"""

import os
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

__all__ = [
    "FuseConfig",
    "FuseReport",
    "MemoryReport",
    "backend",
    "checkpoint",
    "explain",
    "functional",
    "fuse_",
    "get_backend",
    "is_fused",
    "memory_report",
    "models",
    "nn",
    "set_backend",
    "unfuse_",
]


# In a checkout kernels/ and benchmarks/ lie beside this folder, and a Python that is started there finds it before what
# `pip install .` has installed.
_BESIDE = os.path.dirname(__path__[0])
if _BESIDE not in __path__ and not os.path.isdir(os.path.join(__path__[0], "kernels")):
    __path__.append(_BESIDE)


def _is_command_line() -> bool:
    """Whether the script `fusedres` or `python -m fusedres` is what begins here.

    They answer `--help` and mistakes before PyTorch is imported, which takes seconds. Python runs a module with "-m" in
    the place of its name until the package is imported.
    """
    arguments = getattr(sys, "argv", [])
    if not arguments:
        return False
    if arguments[0] == "-m":
        return sys.orig_argv[-len(arguments)].endswith("fusedres")
    return arguments[0].replace("\\", "/").rpartition("/")[2] in ("fusedres", "fusedres.exe")


# Of a package that is executed again, as `__getattr__` does, this is no longer the beginning.
_WAITS = "_WAITS" not in globals() and _is_command_line()

if TYPE_CHECKING or not _WAITS:
    from . import functional, models, nn
    from .checkpointing import checkpoint
    from .dispatch import backend, get_backend, set_backend
    from .memory import MemoryReport, memory_report
    from .swap import FuseConfig, FuseReport, explain, fuse_, is_fused, unfuse_
else:
    import threading

    _LOADING = threading.RLock()

    def __getattr__(name: str) -> Any:
        """Of the command line: the rest of the package, when something of it is first asked for."""
        import importlib

        if name in __all__:
            with _LOADING:  # by the first thread that asks; what the others want is there then
                if name not in globals():
                    importlib.reload(sys.modules[__name__])
        if name not in globals():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals()[name]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
