"""A class derived from somebody else's without its author noticing."""

from __future__ import annotations

from typing import Any

from torch import nn

# An attribute of a class that the swap made: the plan it runs by.
PLAN = "_fusedres_plan"


def subclass(cls: type[nn.Module], body: dict[str, Any]) -> type[nn.Module]:
    """A subclass of `cls` that prints and is looked up as `cls` itself.

    It is made under nn.Module and moved under `cls` afterwards, so that an `__init_subclass__` that keeps a registry
    of models does not see it.

    Raises:
        TypeError: `cls` cannot be derived from (its instances are laid out in another way).
    """
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    metaclass: Any = type(cls)
    derived: type[nn.Module] = metaclass(cls.__name__, (nn.Module,), {**names, **body})
    if cls is not nn.Module:
        derived.__bases__ = (cls,)
    return derived
