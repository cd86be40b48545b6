"""Children whose forward ends in a BatchNorm that the caller goes on from, put into the caller's graph.

A block often calls its main path or its shortcut as one child (`self.f(x)`, `self.downsample(x)`): an nn.Sequential, a
convolution with its BatchNorm, a module with a forward of its own. What follows stands in the block, so the BatchNorm
is brought there: the child's own traced graph takes the place of the call. A BatchNorm with an activation inside
(timm's BatchNormAct2d) is told apart into both.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from ..nn.norms import is_batch_norm, parts_inside, why_called, why_not_fused
from .alias import Effects, Made, is_fresh_module
from .guards import Guard
from .nodes import (
    Modules,
    Skipped,
    activation_in,
    activation_of,
    gives_back,
    is_add,
    is_identity_kind,
    name_of,
    skipped,
    why_not_skipped,
)
from .trace import Trace, trace
from .values import NotTraceable


class Traces:
    """The traced forwards of modules, each traced once while one `fuse_` looks at a model."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[nn.Module, Trace | str]] = {}
        self._looking: list[nn.Module] = []
        self._made: dict[int, Made | None] = {}

    def of(self, module: nn.Module) -> Trace:
        """Its trace.

        Raises:
            NotTraceable: as `trace` does.
        """
        if id(module) not in self._found:
            try:
                found: Trace | str = trace(module, self._look)
            except NotTraceable as error:
                # Not the error, whose traceback would keep the model alive.
                found = str(error)
            # With the module, whose id may not be used again meanwhile.
            self._found[id(module)] = module, found
        found = self._found[id(module)][1]
        if isinstance(found, str):
            raise NotTraceable(found)
        return found

    def _look(self, child: nn.Module, of_tensors: bool) -> tuple[Guard, ...] | None:
        if any(child is each for each in self._looking):
            return None  # it holds itself
        self._looking.append(child)
        try:
            traced = self.of(child)
        except NotTraceable:
            return None
        finally:
            self._looking.pop()
        if not (of_tensors or _demands_a_tensor(child, self)):
            return None
        more = traced.why_tensor()
        return None if more is None else (*traced.guards, *more)

    def made(self, module: nn.Module) -> Made | None:
        """What is known of a module that gives back new memory at each call; None where nothing is.

        Asked of what has a BatchNorm below, which is traced anyway, and of an nn.Sequential.
        """
        if id(module) not in self._made:
            self._made[id(module)] = None  # of one that holds itself
            if may_be_traced(module):
                self._made[id(module)] = self._look_for_made(module)
        return self._made[id(module)]

    def _look_for_made(self, module: nn.Module) -> Made | None:
        try:
            traced = self.of(module)
        except NotTraceable:
            return None
        graph, result = traced.graph, _result(traced.graph)
        modules = dict(module.named_modules(remove_duplicate=False))
        end = next(iter(reversed(graph.nodes)))
        effects = Effects(graph, modules, self.made)
        if result is None or not effects.is_private(result, end):
            return None
        below = effects.trusted(result, end)
        return Made(below.names, (*traced.guards, *below.guards))


def may_be_traced(module: nn.Module) -> bool:
    """Whether a BatchNorm is below, as in what is traced anyway, or nothing but calls of children is in its forward."""
    return type(module) is nn.Sequential or any(is_batch_norm(below) for below in module.modules())


FILTERED = "filter_fn said no to its owner"
# By name, as functions and as methods.
_GIVE_A_TENSOR = frozenset(
    ("add", "iadd", "sub", "isub", "mul", "imul", "truediv", "neg", "relu", "relu6", "leaky_relu", "silu", "gelu",
     "hardswish", "mish", "sigmoid", "tanh", "softmax", "cat", "mean", "sum", "pad", "dropout", "interpolate",
     "flatten", "view", "reshape", "contiguous", "clone", "float", "to", "permute", "transpose", "expand", "matmul",
     "conv1d", "conv2d", "conv3d", "batch_norm", "linear", "avg_pool2d", "adaptive_avg_pool2d")
)  # fmt: skip


@dataclass
class Inlined:
    """What became of a graph.

    Args:
        skipped: children that are not called any more, and what class they must be of.
        guards: what their forwards depend on.
        refused: calls of children that end in a BatchNorm and stay: its name, and why.
        inside: for each BatchNorm with an activation inside, the calls of its parts, which `fold` takes back.
    """

    skipped: list[Skipped] = field(default_factory=list)
    guards: list[Guard] = field(default_factory=list)
    refused: dict[fx.Node, tuple[str, str]] = field(default_factory=dict)
    inside: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)

    def fold(self, taken: set[fx.Node]) -> None:
        """Take the parts back into the call of the whole where the BatchNorm is in no site that is fused."""
        for norm, parts in self.inside.items():
            if norm not in taken:
                parts[-1].replace_all_uses_with(norm)
                for part in reversed(parts):
                    part.graph.erase_node(part)


def inline(
    graph: fx.Graph, modules: Modules, traces: Traces, allows: Callable[[str], bool]
) -> Inlined:
    """Change the graph of a module; `modules`: its children by name; `allows(name)`: whether one may be changed."""
    found = Inlined()
    nodes = list(graph.nodes)
    while nodes:
        node = nodes.pop(0)
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            continue
        child = modules[str(node.target)]
        if is_batch_norm(child):
            _tell_apart(node, child, found)
        elif _goes_on(node, modules) and (norm := _ends_in(child, str(node.target), traces)):
            takes_one = _demands_a_tensor(child, traces)
            if not takes_one and not _is_tensor(node.args[0], modules, traces):
                continue  # the child was traced with one
            if not allows(str(node.target)):
                found.refused[node] = norm, FILTERED
            elif (obstacle := why_called(child)) is not None:
                found.refused[node] = norm, f"{node.target}: {obstacle}"
            else:
                nodes[:0] = _put_in(node, child, traces, found)
    return found


def _is_tensor(value: Any, modules: Modules, traces: Traces) -> bool:
    """Whether a value is one tensor for sure, not a list or a tuple.

    A child is asked by its trace, where it may be traced; of the others those of the packages are trusted, and those of
    a user's own not.
    """
    if not isinstance(value, fx.Node):
        return False
    if value.op == "placeholder":
        return True  # looked at when the owner is called
    if value.op == "call_module":
        child = modules[str(value.target)]
        if type(child).__module__.startswith(("torch.nn.modules.", "timm.", "torchvision.")):
            return not isinstance(child, (nn.RNNBase, nn.MultiheadAttention))
        if not may_be_traced(child):
            return False
        try:
            result = _result(traces.of(child).graph)
        except NotTraceable:
            return False
        below = dict(child.named_modules(remove_duplicate=False))
        return result is not None and _is_tensor(result, below, traces)
    if value.op == "get_attr":
        return True
    if value.target is operator.getitem:
        return _is_tensor(value.args[0], modules, traces)
    return name_of(value).rstrip("_") in _GIVE_A_TENSOR


def _demands_a_tensor(child: nn.Module, traces: Traces) -> bool:
    """Whether a child that was given something else would raise: a convolution takes what it is given, for one."""
    traced = traces.of(child)
    if traced.asked:
        return False
    graph = traced.graph
    modules = dict(child.named_modules(remove_duplicate=False))
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    return bool(inputs) and any(
        user.op == "call_module"
        and user.args[:1] == (inputs[0],)
        and _child_demands_a_tensor(modules[str(user.target)], traces)
        for user in inputs[0].users
    )


def _child_demands_a_tensor(child: nn.Module, traces: Traces) -> bool:
    if is_fresh_module(child) or not may_be_traced(child):
        return is_fresh_module(child)
    try:
        return _demands_a_tensor(child, traces)
    except NotTraceable:
        return False


def _tell_apart(node: fx.Node, norm: nn.Module, found: Inlined) -> None:
    """Let the parts inside a BatchNorm follow its call, which then stands for what it does before them."""
    parts = parts_inside(norm)
    if not parts or why_not_fused(norm) is not None:
        return
    for name in parts:
        part = norm.get_submodule(name)
        is_known = is_identity_kind(type(part)) or activation_of(part) is not None
        if not is_known or why_not_skipped(part, skipped(name, part)) is not None:
            return
    calls: list[fx.Node] = []
    users, last = list(node.users), node
    with node.graph.inserting_after(node):
        for name in reversed(parts):
            calls.insert(0, node.graph.create_node("call_module", f"{node.target}.{name}", (node,)))
    for call in calls:
        call.args = (last,)
        last = call
    for user in users:
        user.replace_input_with(node, last)
    found.inside[node] = calls


def _goes_on(node: fx.Node, modules: Modules) -> bool:
    """Whether something that can be fused with a BatchNorm follows."""
    for user in node.users:
        if is_add(user) or activation_in(user, modules) is not None:
            return True
        if gives_back(user, modules) and _goes_on(user, modules):
            return True
    return False


def _ends_in(child: nn.Module, path: str, traces: Traces) -> str | None:
    """The name of the BatchNorm whose output a child gives back; None where it gives something else."""
    if is_batch_norm(child):
        return (
            path
            if all(is_identity_kind(type(getattr(child, p))) for p in parts_inside(child))
            else None
        )
    if not any(is_batch_norm(below) for below in child.modules()):
        return None
    try:
        traced = traces.of(child)
    except NotTraceable:
        return None
    modules = dict(child.named_modules(remove_duplicate=False))
    last = _result(traced.graph)
    while last is not None and gives_back(last, modules) and len(last.users) == 1:
        last = last.all_input_nodes[0] if last.all_input_nodes else None
    if last is None or last.op != "call_module" or len(last.users) != 1 or len(traced.inputs) != 1:
        return None
    return _ends_in(modules[str(last.target)], f"{path}.{last.target}", traces)


def _result(graph: fx.Graph) -> fx.Node | None:
    value = next(iter(reversed(graph.nodes))).args[0]
    return value if isinstance(value, fx.Node) else None


def _put_in(node: fx.Node, child: nn.Module, traces: Traces, found: Inlined) -> list[fx.Node]:
    """The graph of a child in place of its call; the new nodes."""
    traced, prefix = traces.of(child), str(node.target)
    copies: dict[fx.Node, fx.Node] = {}
    with node.graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "placeholder":
                copies[inner] = node.all_input_nodes[0]
            elif inner.op != "output":
                copies[inner] = node.graph.node_copy(inner, copies.__getitem__)
                if inner.op in ("call_module", "get_attr"):
                    copies[inner].target = f"{prefix}.{inner.target}"
    result = _result(traced.graph)
    if result is not None:
        node.replace_all_uses_with(copies[result])
    node.graph.erase_node(node)
    found.skipped.append(skipped(prefix, child))
    found.guards.extend(guard.below(tuple(prefix.split("."))) for guard in traced.guards)
    return [copy for inner, copy in copies.items() if inner.op != "placeholder"]
