"""Where BatchNorm, add and ReLU stand in a traced forward, and whether they may be run as one."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..dispatch import why_called, why_not_fused
from .alias import Effects, in_place
from .shortcut import Shortcut, find_shortcut

_RELU_FUNCTIONS = (F.relu, torch.relu, torch.relu_)
_RELU_METHODS = ("relu", "relu_")
_ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)
_ADD_METHODS = ("add", "add_")
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
# `a += b` is not among them: on numbers it makes a new one, and Python has rebound the name already.
_RETURN_SELF = (F.relu, torch.relu_, "relu_", "add_")


@dataclass
class Match:
    """One call of a BatchNorm, what follows it, and why that is not fused (None: it can be).

    The nodes of the site are `norm`, `add` and `relu`, the last two None where there is none, and `passed`: children in
    between that give back what they are given. `residual` is the other operand of the add, and `shortcut` what is known
    of it where it is a BatchNorm itself.
    """

    norm: fx.Node
    add: fx.Node | None = None
    relu: fx.Node | None = None
    residual: fx.Node | None = None
    shortcut: Shortcut | None = None
    reason: str | None = None
    passed: tuple[fx.Node, ...] = ()

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All nodes of the site."""
        nodes = (self.norm, *self.passed, self.add, self.relu)
        return tuple(node for node in nodes if node is not None)

    @property
    def pattern(self) -> str:
        """The report's name of it."""
        return self._pattern(self.projected is not None)

    @property
    def whole_pattern(self) -> str:
        """The pattern with the shortcut, taken in or not."""
        return self._pattern(self.shortcut is not None)

    def _pattern(self, with_shortcut: bool) -> str:
        parts = (("+BN", with_shortcut), ("+add", self.add), ("+ReLU", self.relu))
        return "BN" + "".join(name for name, there in parts if there)

    @property
    def projected(self) -> Shortcut | None:
        """The shortcut, where the site takes it in."""
        return self.shortcut if self.shortcut is not None and self.shortcut.reason is None else None

    @property
    def end(self) -> fx.Node:
        """The node whose value the site computes."""
        return self.relu or self.add or self.norm


def find_matches(graph: fx.Graph, modules: Mapping[str, nn.Module], norms: tuple[str, ...]) -> list[Match]:  # fmt: skip
    """What follows each call of the children in `norms`, in the order of the calls.

    Of two BatchNorms that are added, the one computed last is the main path and the other its residual.
    """
    _follow_in_place(graph)
    effects = Effects(graph, modules)
    taken: set[fx.Node] = set()
    matches = []
    for node in reversed(list(graph.nodes)):
        if node.op == "call_module" and node.target in norms:
            match = _match(node, modules, effects, taken)
            if match.reason is None:
                taken.update(match.nodes[1:])
            matches.append(match)
    return matches[::-1]


def _follow_in_place(graph: fx.Graph) -> None:
    """Let what reads `a` after the statement `a.add_(b)` read that statement's result, which is `a` itself."""
    nodes = list(graph.nodes)
    for i, node in enumerate(nodes):
        if in_place(node) and node.target in _RETURN_SELF and isinstance(node.args[0], fx.Node):
            later = set(nodes[i + 1 :])
            node.args[0].replace_all_uses_with(node, delete_user_cb=later.__contains__)


def _match(norm: fx.Node, modules, effects: Effects, taken: set[fx.Node]) -> Match:
    match = Match(norm)
    reason = _follow(match, modules, taken)
    if match.end is norm:
        match.reason = reason
        return match
    child = modules[str(norm.target)]
    if (obstacle := why_not_fused(child)) is not None:
        match.reason = f"{norm.target}: {obstacle}"
    elif match.relu is not None and (obstacle := why_relu_not_skipped(match.relu, modules)):
        match.reason = obstacle
    else:
        match.reason = reason or _hazard(match, effects)
    if match.reason is None and match.residual is not None:
        match.shortcut = find_shortcut(
            match.residual, str(norm.target), match.nodes, match.end, modules, effects
        )  # fmt: skip
    return match


def _follow(match: Match, modules, taken: set[fx.Node]) -> str | None:
    """Walk on from the BatchNorm as far as a pattern goes; a reason against it, None when there is none."""
    norm = match.norm
    if len(norm.args) + len(norm.kwargs) != 1 or len(norm.all_input_nodes) != 1:
        return "it is called with more than one argument"
    user, passed, reason = _past_identities(norm, modules)
    if user is None:
        return reason
    output, match.passed = (passed or (norm,))[-1], passed
    if _is_relu(user, modules):
        match.relu = user
        return None
    if not _is_add(user):
        return f"nothing to fuse follows it: its output goes to {_describe(user, modules)}"
    operands = _operands(user)
    if operands is None or operands.count(output) != 1:
        return "its output is added to a constant, scaled or written elsewhere in the same add"
    if user in taken:
        return "it is the residual of a site that is fused: the sum runs with the other operand"
    match.add, match.residual = user, operands[1 - operands.index(output)]
    following, passed, _ = _past_identities(user, modules)
    if following is not None and _is_relu(following, modules):
        match.relu, match.passed = following, (*match.passed, *passed)
    if in_place(user) and operands[0] is not output:
        return (
            f"{_name(match.residual)} is added to in place, and somebody else may hold it; "
            "write `a = a + b` or `b += a`"
        )
    return None


def _hazard(match: Match, effects: Effects) -> str | None:
    """Why the BatchNorm cannot wait until the end of its site; None when it can."""
    norm, end = match.norm, match.end
    site = match.nodes
    waiting = [node for node in effects.between(norm, end) if node not in site]
    source = norm.all_input_nodes[0]
    if (writer := effects.writer(waiting, source)) is not None:
        return f"its input may be written to before the site ends, by {_name(writer)}"
    if (reason := effects.why_state_is_used(waiting, str(norm.target))) is not None:
        return reason
    if match.add is not None and match.residual is not None:
        after = [node for node in effects.between(match.add, end) if node not in site]
        if (writer := effects.writer(after, match.residual)) is not None:
            return f"the residual may be written to before the ReLU, by {_name(writer)}"
    return None


def why_relu_not_skipped(relu: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    """Why the ReLU must be called as a module; None for a function, or a child that only computes."""
    if relu.op != "call_module":
        return None
    reason = why_not_skipped(modules[str(relu.target)], nn.ReLU)
    return None if reason is None else f"{relu.target}: {reason}"


def why_not_skipped(child: nn.Module | None, kind: type[nn.Module]) -> str | None:
    """Why this child cannot be left out, `kind` being what it has to be; looked at again at each call."""
    if child is None:
        return "it was removed"
    if type(child) is not kind:
        name = kind.__name__
        package = "nn." if kind.__module__.startswith("torch.nn.") else ""
        return f"it is a {type(child).__name__}, not an {package}{name}"
    if is_identity_kind(kind) and (share := _dropped_share(child)) != 0:
        return f"it drops a share of {share}"
    return why_called(child)


def is_identity_kind(kind: type[nn.Module]) -> bool:
    """Whether instances give back what they are given: those that drop something, as long as it is nothing."""
    return kind in (nn.Identity, *_DROPOUTS) or _is_drop_path(kind)


def _is_drop_path(kind: type[nn.Module]) -> bool:
    return kind.__name__ == "DropPath" and kind.__module__.startswith("timm.")


def _dropped_share(child: Any) -> Any:
    if type(child) in _DROPOUTS:
        return child.p
    return (child.drop_prob or 0) if _is_drop_path(type(child)) else 0


def _past_identities(
    node: fx.Node, modules: Mapping[str, nn.Module]
) -> tuple[fx.Node | None, tuple[fx.Node, ...], str | None]:
    """(the only user of a node, the children in between that give back what they are given, why there is no user)."""
    passed: list[fx.Node] = []
    user, reason = _only_user(node)
    while user is not None and _gives_back(user, modules):
        passed.append(user)
        user, reason = _only_user(user)
    return user, tuple(passed), reason


def _gives_back(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return False
    child = modules[str(node.target)]
    return is_identity_kind(type(child)) and why_not_skipped(child, type(child)) is None


def _only_user(node: fx.Node) -> tuple[fx.Node | None, str | None]:
    users = list(node.users)
    if len(users) != 1:
        uses = f"{len(users)} times" if users else "nowhere"
        return None, f"its output is used {uses}, so it cannot be left out"
    if users[0].op == "output":
        return None, "nothing to fuse follows it: its output is returned"
    return users[0], None


def _is_relu(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules.get(str(node.target)), nn.ReLU) and len(node.args) == 1
    if node.op == "call_function":
        return node.target in _RELU_FUNCTIONS and set(node.kwargs) <= {"input", "inplace"}
    return node.op == "call_method" and node.target in _RELU_METHODS


def _is_add(node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target in _ADD_FUNCTIONS
    return node.op == "call_method" and node.target in _ADD_METHODS


def _operands(add: fx.Node) -> list[fx.Node] | None:
    """Both operands of a plain sum of two values; None for anything else."""
    options = dict(add.kwargs)
    values = [*add.args, *(options.pop(k) for k in ("input", "other") if k in options)]
    if options.pop("alpha", 1) != 1 or options or len(values) != 2:
        return None
    found = [value for value in values if isinstance(value, fx.Node)]
    return found if len(found) == 2 else None


def _describe(node: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    if node.op == "call_module":
        return f"{node.target} ({type(modules[str(node.target)]).__name__})"
    return _name(node)


def _name(node: fx.Node) -> str:
    if node.op == "call_function":
        return getattr(node.target, "__name__", str(node.target))
    return str(node.target)
