"""What the nodes of a traced forward are: an activation, an addition, a child that gives back what it is given."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..activations import SLOPE, is_piecewise
from ..nn.activations import activation_of, gelu, leaky
from ..nn.norms import is_batch_norm, why_called
from ..words import a_type
from .values import Path

Modules = Mapping[str, nn.Module]

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_TITLES = {
    "relu": "ReLU", "relu6": "ReLU6", "leaky_relu": "LeakyReLU", "silu": "SiLU", "gelu": "GELU",
    "gelu_tanh": "GELU", "hardswish": "Hardswish", "mish": "Mish",
}  # fmt: skip


# What a function or a method is given besides its tensor, by position, and which activation that makes it.
_FUNCTIONS: dict[Any, tuple[tuple[str, ...], Callable[..., str]]] = {
    F.relu: (("inplace",), lambda inplace=False: "relu"),
    torch.relu: ((), lambda: "relu"),
    torch.relu_: ((), lambda: "relu"),
    "relu": ((), lambda: "relu"),
    "relu_": ((), lambda: "relu"),
    F.relu6: (("inplace",), lambda inplace=False: "relu6"),
    F.leaky_relu: (
        ("negative_slope", "inplace"), lambda negative_slope=SLOPE, inplace=False: leaky(negative_slope),
    ),
    F.silu: (("inplace",), lambda inplace=False: "silu"),
    F.gelu: (("approximate",), lambda approximate="none": gelu(approximate)),
    F.hardswish: (("inplace",), lambda inplace=False: "hardswish"),
    F.mish: (("inplace",), lambda inplace=False: "mish"),
}  # fmt: skip
_ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)
_ADD_METHODS = ("add", "add_")


class Skipped(NamedTuple):
    """A child that is not called any more: where, what class it must be of, and the activation that it must compute.

    is_called: it is called, and trusted to be what it is.
    """

    path: Path
    kind: type[nn.Module]
    activation: str | None = None
    is_called: bool = False


def skipped(path: str, child: nn.Module) -> Skipped:
    """The child as it is now."""
    return Skipped(tuple(path.split(".")), type(child), activation_of(child))


def why_not_skipped(child: nn.Module | None, expected: Skipped) -> str | None:
    """Why this child cannot be left out; None when it can. Looked at again at each call."""
    if child is None:
        return "it was removed"
    kind = expected.kind
    if type(child) is not kind:
        name = kind.__name__
        package = "nn." if kind.__module__.startswith("torch.nn.") else ""
        return f"it is {a_type(child)}, not an {package}{name}"
    drops = is_identity_kind(kind) and not expected.is_called
    if drops and (share := _dropped_share(child)) != 0:
        return f"it drops a share of {share}"
    if expected.activation is not None and (now := activation_of(child)) != expected.activation:
        return f"it computes {now}, not {expected.activation}"
    return why_called(child)


def title(activation: str) -> str:
    """An activation as patterns name it."""
    return _TITLES[activation.partition("(")[0]]


def family_of(pattern: str) -> tuple[str, bool]:
    """(a pattern with "ReLU" for whatever activation it has, whether a bit tells that activation's derivative)."""
    start, _, end = pattern.rpartition("+")
    name = next((name for name, text in _TITLES.items() if text == end), None)
    if pattern == "unknown":
        return "BN", False
    return (pattern, False) if name is None else (f"{start}+ReLU", is_piecewise(name))


def is_identity_kind(kind: type[nn.Module]) -> bool:
    """Whether instances give back what they are given: those that drop something, as long as it is nothing."""
    return kind in (nn.Identity, *_DROPOUTS) or _is_drop_path(kind)


def _is_drop_path(kind: type[nn.Module]) -> bool:
    return kind.__name__ == "DropPath" and kind.__module__.startswith("timm.")


def _dropped_share(child: Any) -> Any:
    if type(child) in _DROPOUTS:
        return child.p
    return (child.drop_prob or 0) if _is_drop_path(type(child)) else 0


def gives_back(node: fx.Node, modules: Modules) -> bool:
    """Whether this is a call of a child that gives back what it is given."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return False
    child = modules[str(node.target)]
    return is_identity_kind(type(child)) and why_not_skipped(child, skipped("", child)) is None


def past_identities(
    node: fx.Node, modules: Modules
) -> tuple[fx.Node | None, tuple[fx.Node, ...], str | None]:
    """(the only user of a node, the children in between that give back what they are given, why there is no user)."""
    passed: list[fx.Node] = []
    user, reason = _only_user(node)
    while user is not None and gives_back(user, modules):
        passed.append(user)
        user, reason = _only_user(user)
    return user, tuple(passed), reason


def _only_user(node: fx.Node) -> tuple[fx.Node | None, str | None]:
    users = list(node.users)
    if len(users) != 1:
        uses = f"{len(users)} times" if users else "nowhere"
        return None, f"its output is used {uses}, so it cannot be left out"
    if users[0].op == "output":
        return None, "nothing to fuse follows it: its output is returned"
    return users[0], None


def activation_in(node: fx.Node, modules: Modules) -> str | None:
    """The activation that a node computes of its one tensor; None where it is none that the kernels know."""
    if node.op == "call_module":
        child = modules.get(str(node.target))
        return None if child is None or len(node.args) != 1 else activation_of(child)
    # Nodes are hashable, their targets need not be.
    is_call = node.op in ("call_function", "call_method") and isinstance(node.target, Hashable)
    found = _FUNCTIONS.get(node.target) if is_call else None
    if found is None or len(node.all_input_nodes) != 1:
        return None
    names, name = found
    options = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
    options.pop("input", None)
    if len(node.args) - 1 > len(names) or not set(options) <= set(names):
        return None
    return name(**options) or None


class NormCall(NamedTuple):
    """The arguments of a call of F.batch_norm; state is read off modules, the rest are numbers."""

    input: fx.Node
    running_mean: fx.Node | None = None
    running_var: fx.Node | None = None
    weight: fx.Node | None = None
    bias: fx.Node | None = None
    training: fx.Node | bool = False
    momentum: float = 0.1
    eps: float = 1e-5

    @property
    def state(self) -> list[fx.Node]:
        """What it reads off modules, apart from the mode."""
        return [node for node in self[1:5] if isinstance(node, fx.Node)]


def norm_call(node: fx.Node) -> NormCall | None:
    """A call of F.batch_norm on attributes; None for anything else."""
    if node.op != "call_function" or node.target is not F.batch_norm:
        return None
    given: tuple[Any, dict[str, Any]] = node.args, node.kwargs
    try:
        call = NormCall(*given[0], **given[1])
    except TypeError:
        return None  # arguments that it does not take
    reads = [value for value in call[1:6] if isinstance(value, fx.Node)]
    is_plain = all(type(value) in (int, float) for value in call[6:])
    if not isinstance(call.input, fx.Node) or not is_plain or not call.state:
        return None
    return call if all(value.op == "get_attr" for value in reads) else None


def is_norm(node: fx.Node, modules: Modules) -> bool:
    """Whether a node is a BatchNorm, called as a module or as a function."""
    if node.op == "call_module":
        return is_batch_norm(modules[str(node.target)])
    return norm_call(node) is not None


def is_add(node: fx.Node) -> bool:
    """Whether a node adds two values."""
    if node.op == "call_function":
        return node.target in _ADD_FUNCTIONS
    return node.op == "call_method" and node.target in _ADD_METHODS


def operands(add: fx.Node) -> list[fx.Node] | None:
    """Both operands of a plain sum of two values; None for anything else."""
    options = dict(add.kwargs)
    values = [*add.args, *(options.pop(k) for k in ("input", "other") if k in options)]
    if options.pop("alpha", 1) != 1 or options or len(values) != 2:
        return None
    found = [value for value in values if isinstance(value, fx.Node)]
    return found if len(found) == 2 else None


def describe(node: fx.Node, modules: Modules) -> str:
    """A node as the report names it."""
    if node.op == "call_module":
        return f"{node.target} ({type(modules[str(node.target)]).__name__})"
    return name_of(node)


def name_of(node: fx.Node) -> str:
    """What a node calls, by name."""
    if node.op == "call_function":
        return getattr(node.target, "__name__", str(node.target))
    return str(node.target)
