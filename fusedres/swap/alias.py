"""Who may write to what: the rules that say whether a BatchNorm may run later than it was called.

A site runs where its last operation stood. That is right only when nothing in between has written to what it reads.
Everything unknown is taken to alias its inputs, and to write to them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from ..nn.norms import is_frozen, why_called
from .guards import Guard
from .operators import unpack

IN_PLACE_OPERATORS = frozenset(
    (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
     operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift, operator.imatmul,
     operator.setitem)
)  # fmt: skip
# Their result is always new memory, and they only read their inputs.
_FRESH_MODULES = (_ConvNd, nn.Linear, _NormBase)
# They only read their input where they are not told to work in place.
_QUIET = (nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Mish)
_FRESH_FUNCTIONS = frozenset(
    (operator.add, operator.sub, operator.mul, torch.add, torch.sub, torch.mul, torch.relu, F.relu, torch.cat,
     F.conv1d, F.conv2d, F.conv3d, F.batch_norm, F.max_pool2d, F.avg_pool2d, F.linear, torch.sigmoid)
)  # fmt: skip
_FRESH_METHODS = frozenset(("add", "sub", "mul", "relu", "sigmoid", "mean", "clone", "sum"))
_KNOWN_PACKAGES = ("torch", "_operator", "math", "builtins")


class Made(NamedTuple):
    """That what a child gives back is new memory.

    names: the children below it that were trusted in that. guards: what their forwards depend on.
    """

    names: tuple[str, ...] = ()
    guards: tuple[Guard, ...] = ()


_NOTHING = Made()


class Effects:
    """For the nodes of one graph: which share memory, and which write to it.

    Args:
        modules: the child that each `call_module` target names.
        made: what is known of a child that gives back new memory; None where nothing is.
    """

    def __init__(
        self,
        graph: fx.Graph,
        modules: Mapping[str, nn.Module],
        made: Callable[[nn.Module], Made | None] = lambda child: None,
    ) -> None:
        self._modules = modules
        self._order = {node: i for i, node in enumerate(graph.nodes)}
        self._made = {
            node: found
            for node in graph.nodes
            if node.op == "call_module" and (found := made(modules[str(node.target)])) is not None
        }
        self._group: dict[fx.Node, fx.Node] = {}
        outside: fx.Node | None = None
        for node in graph.nodes:
            self._group[node] = node
            if node.op == "placeholder" or self._is_tensor_of_module(node):
                # Two inputs may be one tensor, and two attributes views of one.
                self._merge(node, outside or node)
                outside = node
            if not self._is_fresh(node):
                for source in _written(node) if in_place(node) else node.all_input_nodes:
                    # What works in place gives back its first argument.
                    self._merge(node, source)

    def between(self, first: fx.Node, last: fx.Node) -> list[fx.Node]:
        """The nodes strictly between two, in order."""
        low, high = self._order[first], self._order[last]
        return [node for node, i in self._order.items() if low < i < high]

    def after(self, last: fx.Node) -> list[fx.Node]:
        """The nodes behind one, in order."""
        return [node for node, i in self._order.items() if i > self._order[last]]

    def position(self, node: fx.Node) -> int:
        """Where the node stands in the graph."""
        return self._order[node]

    def writer(self, nodes: Iterable[fx.Node], read: fx.Node) -> fx.Node | None:
        """The first of `nodes` that may write to the memory of `read`."""
        group = self._find(read)
        for node in nodes:
            if any(self._find(target) is group for target in self.writes(node)):
                return node
        return None

    def is_private(self, read: fx.Node, last: fx.Node) -> bool:
        """Whether the memory of `read` was made in this forward, and is seen by nobody after `last`.

        A child is trusted not to keep what it gives back, as long as nobody hangs a hook on it.
        """
        group = [node for node in self._order if self._find(node) is self._find(read)]
        before = [node for node in group if self._order[node] < self._order[last]]
        return all(
            self._makes(node) and all(self._order[user] <= self._order[last] for user in node.users)
            for node in before
        )

    def trusted(self, read: fx.Node, last: fx.Node) -> Made:
        """The children that `is_private` has trusted: what they are must not change."""
        names: list[str] = []
        guards: list[Guard] = []
        for node in self._order:
            is_one = node.op == "call_module" and self._find(node) is self._find(read)
            if is_one and self._order[node] < self._order[last]:
                path = str(node.target)
                below = self._made.get(node, _NOTHING)
                names += (path, *(f"{path}.{name}" for name in below.names))
                guards += (each.below(tuple(path.split("."))) for each in below.guards)
        return Made(tuple(names), tuple(guards))

    def _makes(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            child = self._modules.get(str(node.target))
            makes = self._is_fresh(node) or bool(node.all_input_nodes)
            return child is not None and makes and why_called(child) is None
        return self._is_fresh(node) or in_place(node)

    def why_state_is_used(
        self, nodes: Iterable[fx.Node], state: Iterable[Tensor], norm: nn.Module | None = None
    ) -> str | None:
        """Why one of `nodes` would see whether a BatchNorm has run: it calls it, or reads its statistics.

        Under any name: what counts is the module, where it is one, and the tensors that are its state.
        """
        ids = {id(tensor) for tensor in state}
        for node in nodes:
            if node.op == "call_module":
                child = self._modules[str(node.target)]
                if child is norm:
                    return "it is called again before the site ends"
                held = (*child.modules(), *child.buffers(), *child.parameters())
                if any(each is norm or id(each) in ids for each in held):
                    return f"{node.target} holds its statistics too, and is called before the site ends"
            for source in node.all_input_nodes:
                for each in self._views_of(source):
                    if each.op == "get_attr" and self._reads(str(each.target), ids, norm):
                        return f"{each.target} is used before the site ends"
        return None

    def _views_of(self, node: fx.Node) -> list[fx.Node]:
        """The node, and all that it may share memory with since it was made of it."""
        found = [node]
        for each in found:  # it grows
            if not self._is_fresh(each):
                found += (source for source in each.all_input_nodes if source not in found)
        return found

    def _reads(self, target: str, ids: set[int], norm: nn.Module | None) -> bool:
        owner = self._modules.get(target.rpartition(".")[0])
        return (norm is not None and owner is norm) or id(self.tensor(target)) in ids

    def tensor(self, target: str) -> Any:
        """What a `get_attr` of this name reads; None where there is nothing."""
        owner, _, attribute = target.rpartition(".")
        if (module := self._modules.get(owner)) is None:
            return None
        groups = (module._parameters, module._buffers, vars(module))
        return next((group[attribute] for group in groups if attribute in group), None)

    def _is_tensor_of_module(self, node: fx.Node) -> bool:
        return node.op == "get_attr" and isinstance(self.tensor(str(node.target)), Tensor)

    def writes(self, node: fx.Node) -> list[fx.Node]:
        """The inputs that this node may write to."""
        if node.op == "call_module":
            child = self._modules.get(str(node.target))
            quiet = is_fresh_module(child) or type(child) in _QUIET
            return [] if quiet and not getattr(child, "inplace", False) else node.all_input_nodes
        if node.op not in ("call_function", "call_method"):
            return []
        if in_place(node):
            return _written(node)
        if "out" in node.kwargs or not _is_known(node):
            return node.all_input_nodes
        return []

    def _is_fresh(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return node in self._made or is_fresh_module(self._modules.get(str(node.target)))
        if in_place(node):
            return False
        if node.op == "call_function":
            return node.target in _FRESH_FUNCTIONS and "out" not in node.kwargs
        return node.op == "call_method" and node.target in _FRESH_METHODS

    def _find(self, node: fx.Node) -> fx.Node:
        while self._group[node] is not node:
            node = self._group[node]
        return node

    def _merge(self, a: fx.Node, b: fx.Node) -> None:
        self._group[self._find(a)] = self._find(b)


def is_fresh_module(child: nn.Module | None) -> bool:
    """Whether a child takes one tensor, only reads it, and gives back new memory."""
    if child is None or is_frozen(child):
        return child is not None
    if not isinstance(child, _FRESH_MODULES):
        return False
    # A class derived from these, with a forward of its own, may do anything.
    forward = type(child).forward
    is_known = type(child).__module__.startswith(("torch.nn.", "timm.layers."))
    inherits = any(
        base.__module__.startswith("torch.nn.") and vars(base).get("forward") is forward
        for base in type(child).__mro__
    )
    return is_known or inherits


def in_place(node: fx.Node) -> bool:
    """Whether this function or method writes to its first argument."""
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target in IN_PLACE_OPERATORS or _is_true(node.kwargs.get("inplace")):
        return True
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    code = getattr(node.target, "__code__", None)
    names = () if code is None else code.co_varnames[: code.co_argcount]
    if "inplace" in names and len(node.args) > names.index("inplace"):
        return _is_true(node.args[names.index("inplace")])
    return str(name).endswith("_") and not str(name).endswith("__")


def _written(node: fx.Node) -> list[fx.Node]:
    """What a node that works in place writes to: its first argument, or any where that is a list or has a name."""
    is_first = bool(node.args) and isinstance(node.args[0], fx.Node)
    return [node.args[0]] if is_first else node.all_input_nodes  # type: ignore[list-item]


def _is_true(value: Any) -> bool:
    # A proxy given as a flag could be either.
    return value is True or isinstance(value, fx.Node)


def _is_known(node: fx.Node) -> bool:
    if node.op == "call_method" or node.target is unpack:
        return True
    package = str(getattr(node.target, "__module__", None) or "torch").partition(".")[0]
    return package in _KNOWN_PACKAGES
