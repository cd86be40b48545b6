"""Where BatchNorm, add and ReLU stand in a traced forward, and whether they may be run as one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..activations import is_piecewise
from ..nn.norms import parts_inside, why_not_fused
from .alias import Effects, Made, in_place
from .inline import Inlined, Traces
from .nodes import (
    Modules,
    NormCall,
    activation_in,
    describe,
    is_add,
    is_norm,
    name_of,
    norm_call,
    operands,
    past_identities,
    skipped,
    title,
    why_not_skipped,
)
from .shortcut import Shortcut, find_shortcut, is_rather_the_shortcut

# `a += b` is not among them: on numbers it makes a new one, and Python has rebound the name already.
_RETURN_SELF = (F.relu, torch.relu_, "relu_", "add_")


@dataclass
class Match:
    """One call of a BatchNorm, what follows it, and why that is not fused (None: it can be).

    The nodes of the site are `norm`, `add` and `act`, the last two None where there is none, and `passed`: children in
    between that give back what they are given. `activation` is the name of what `act` computes, `residual` the other
    operand of the add, and `shortcut` what is known of it where it is a BatchNorm itself. `note` says of a BatchNorm
    that runs by itself why nothing is fused with it, `into` which operand the add is written to ("output", "residual"),
    or that the residual stands first in it, `call` its arguments where it is called as a function, `trusted` the
    children that must stay what they are, `before` the sum that it normalises, where that is written by the site,
    `reader` the only convolution that reads what it gives, where that is not to be kept.
    """

    norm: fx.Node
    add: fx.Node | None = None
    act: fx.Node | None = None
    activation: str | None = None
    residual: fx.Node | None = None
    shortcut: Shortcut | None = None
    reason: str | None = None
    passed: tuple[fx.Node, ...] = ()
    note: str = ""
    into: str | None = None
    call: NormCall | None = None
    trusted: Made = field(default_factory=Made)
    before: fx.Node | None = None
    reader: fx.Node | None = None

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All nodes of the site."""
        nodes = (self.norm, *self.passed, self.add, self.act)
        return tuple(node for node in nodes if node is not None)

    @property
    def name(self) -> str:
        """The BatchNorm's name below the owner; of a function, that of the first of its attributes."""
        return str((self.norm if self.call is None else self.call.state[0]).target)

    @property
    def input(self) -> fx.Node:
        """What the BatchNorm normalises."""
        return self.norm.all_input_nodes[0] if self.call is None else self.call.input

    @property
    def pattern(self) -> str:
        """The report's name of it."""
        return self._pattern(self.projected is not None)

    @property
    def whole_pattern(self) -> str:
        """The pattern with the shortcut, taken in or not."""
        return self._pattern(self.shortcut is not None)

    def _pattern(self, with_shortcut: bool) -> str:
        end = "" if self.activation is None else f"+{title(self.activation)}"
        if self.before is not None:
            return f"add+BN{end}"
        return f"BN{'+BN' * with_shortcut}{'+add' * (self.add is not None)}{end}"

    @property
    def projected(self) -> Shortcut | None:
        """The shortcut, where the site takes it in."""
        return self.shortcut if self.shortcut is not None and self.shortcut.reason is None else None

    @property
    def end(self) -> fx.Node:
        """The node whose value the site computes."""
        return self.act or self.add or self.norm


def find_matches(
    graph: fx.Graph, modules: Modules, inlined: Inlined, traces: Traces
) -> list[Match]:
    """What follows each call of a BatchNorm, in the order of the calls.

    Of two BatchNorms that are added, the one computed last is the main path and the other its residual, unless it is
    the one with a projection. `inlined`: what became of the graph before.
    """
    _follow_in_place(graph)
    effects = Effects(graph, modules, traces.made)
    taken: set[fx.Node] = set()
    matches = []
    for node in reversed(list(graph.nodes)):
        if is_norm(node, modules):
            match = _match(node, modules, effects, taken, inlined)
            if match.reason is None:
                taken.update(match.nodes[1:])
            matches.append(match)
    for match in matches:
        if match.reason is None and _is_sum_before(match, effects, taken):
            match.before = match.input
            taken.add(match.input)
    return matches[::-1]


def _is_sum_before(match: Match, effects: Effects, taken: set[fx.Node]) -> bool:
    """Whether what a BatchNorm normalises is a sum that can be written while its statistics are taken.

    It is written later then than it stood: nobody may look at it, or write to what it is made of, before the site ends.
    """
    add, end = match.input, match.end
    summands = operands(add) if is_add(add) and add not in taken else None
    if summands is None or summands[0] is summands[1]:
        return False
    if match.add is not None or match.call is not None:
        return False
    if in_place(add) and not effects.is_private(summands[0], add):
        return False
    waiting = [node for node in effects.between(add, end) if node not in match.nodes]
    if any(user in waiting for user in add.users):
        return False
    if in_place(add):
        match.trusted = effects.trusted(summands[0], add)
    return all(effects.writer(waiting, node) is None for node in (*summands, add))


def _follow_in_place(graph: fx.Graph) -> None:
    """Let what reads `a` after the statement `a.add_(b)` read that statement's result, which is `a` itself."""
    nodes = list(graph.nodes)
    for i, node in enumerate(nodes):
        if (
            in_place(node)
            and node.target in _RETURN_SELF
            and isinstance(next(iter(node.args), None), fx.Node)
        ):
            later = set(nodes[i + 1 :])
            node.args[0].replace_all_uses_with(node, delete_user_cb=later.__contains__)


def _match(
    norm: fx.Node, modules: Modules, effects: Effects, taken: set[fx.Node], inlined: Inlined
) -> Match:
    match = Match(norm, call=norm_call(norm))
    reason = _follow(match, modules, effects, taken)
    if match.end is norm:
        match.passed, match.note = (), reason or ""
    if (obstacle := _why_norm_not_run(norm, modules, inlined)) is not None:
        match.reason = obstacle
    elif match.end is norm:
        match.reason = None
    elif match.act is not None and (obstacle := _why_act_not_skipped(match.act, modules)):
        match.reason = obstacle
    else:
        match.reason = reason or _hazard(match, modules, effects)
    if match.reason is None and match.residual is not None and match.call is None:
        match.shortcut = find_shortcut(
            match.residual, match.name, match.nodes, match.end, modules, effects, inlined.refused
        )  # fmt: skip
    return match


def _follow(match: Match, modules: Modules, effects: Effects, taken: set[fx.Node]) -> str | None:
    """Walk on from the BatchNorm as far as a pattern goes; a reason against it, None when there is none."""
    norm = match.norm
    user, passed, reason = past_identities(norm, modules)
    if user is None:
        return reason
    output, match.passed = (passed or (norm,))[-1], passed
    if (activation := activation_in(user, modules)) is not None:
        match.act, match.activation = user, activation
        return None
    if not is_add(user):
        return f"nothing to fuse follows it: its output goes to {describe(user, modules)}"
    summands = operands(user)
    if summands is None or summands.count(output) != 1:
        return "its output is added to a constant, scaled or written elsewhere in the same add"
    if user in taken:
        return "it is the residual of a site that is fused: the sum runs with the other operand"
    match.add, match.residual = user, summands[1 - summands.index(output)]
    following, passed, _ = past_identities(user, modules)
    if following is not None and (activation := activation_in(following, modules)) is not None:
        match.act, match.activation = following, activation
        match.passed = (*match.passed, *passed)
    if in_place(user):
        match.into = "output" if summands[0] is output else "residual"
    elif summands[0] is not output:
        match.into = "residual first"
    if is_rather_the_shortcut(norm, match.residual, modules, match.into == "residual"):
        return "its block's main path takes it in"
    if match.into == "residual" and not effects.is_private(match.residual, user):
        return (
            f"{name_of(match.residual)} is added to in place, and somebody else may hold it; "
            "write `a = a + b` or `b += a`"
        )
    if match.into == "residual":
        match.trusted = effects.trusted(match.residual, user)
    return None


@dataclass
class Sum:
    """An addition with an activation behind it that is no BatchNorm's site: `act(input + residual)`."""

    add: fx.Node
    act: fx.Node
    activation: str
    input: fx.Node
    residual: fx.Node
    passed: tuple[fx.Node, ...]
    trusted: Made = field(default_factory=Made)


def find_sums(graph: fx.Graph, modules: Modules, taken: set[fx.Node], traces: Traces) -> list[Sum]:
    """The sums outside of `taken` that their activation can be fused with; `find_matches` has seen the graph."""
    effects = Effects(graph, modules, traces.made)
    found = []
    for add in graph.nodes:
        summands = operands(add) if is_add(add) and add not in taken else None
        if summands is None or summands[0] is summands[1]:
            continue
        act, passed, _ = past_identities(add, modules)
        activation = None if act is None else activation_in(act, modules)
        if act is None or activation is None or act in taken:
            continue
        if in_place(add) and not effects.is_private(summands[0], add):
            continue
        between = [node for node in effects.between(add, act) if node not in passed]
        is_written = any(effects.writer(between, summand) is not None for summand in summands)
        if is_written or _why_act_not_skipped(act, modules) is not None:
            continue
        if any(_why_not_kept(summand, activation, act, effects) for summand in summands):
            continue
        trusted = effects.trusted(summands[0], add) if in_place(add) else Made()
        found.append(Sum(add, act, activation, summands[0], summands[1], passed, trusted))
    return found


def _hazard(match: Match, modules: Modules, effects: Effects) -> str | None:
    """Why the BatchNorm cannot wait until the end of its site; None when it can."""
    norm, end = match.norm, match.end
    site = match.nodes
    waiting = [node for node in effects.between(norm, end) if node not in site]
    if (writer := effects.writer(waiting, match.input)) is not None:
        return f"its input may be written to before the site ends, by {name_of(writer)}"
    if match.call is None:
        child = modules[match.name]
        reason = effects.why_state_is_used(waiting, child.buffers(), child)
    else:
        state = [effects.tensor(str(node.target)) for node in match.call.state]
        reason = effects.why_state_is_used(waiting, state)
    if reason is not None:
        return reason
    if match.add is not None and match.residual is not None:
        if (reason := _why_not_kept(match.residual, match.activation, end, effects)) is not None:
            return reason
        after = [node for node in effects.between(match.add, end) if node not in site]
        if (writer := effects.writer(after, match.residual)) is not None:
            return f"the residual may be written to before the activation, by {name_of(writer)}"
    return None


def _why_not_kept(
    value: fx.Node, activation: str | None, end: fx.Node, effects: Effects
) -> str | None:
    """Why a summand cannot be kept for the backward pass of a smooth activation, which needs it again."""
    if activation is None or is_piecewise(activation):
        return None
    writer = effects.writer(effects.after(end), value)
    return None if writer is None else f"the residual is written to later, by {name_of(writer)}"


def _why_norm_not_run(norm: fx.Node, modules: Modules, inlined: Inlined) -> str | None:
    """Why this call of a BatchNorm cannot be run without calling it; None when it can."""
    if norm.op != "call_module":
        return None
    if len(norm.args) + len(norm.kwargs) != 1 or len(norm.all_input_nodes) != 1:
        return "it is called with more than one argument"
    child = modules[str(norm.target)]
    if (obstacle := why_not_fused(child)) is not None:
        return f"{norm.target}: {obstacle}"
    if parts_inside(child) and norm not in inlined.inside:
        return f"{norm.target}: what it calls itself ({_inside(child)}) is not known"
    return None


def _inside(norm: nn.Module) -> str:
    return ", ".join(type(norm.get_submodule(name)).__name__ for name in parts_inside(norm))


def _why_act_not_skipped(act: fx.Node, modules: Modules) -> str | None:
    """Why the activation must be called as a module; None for a function, or a child that only computes."""
    if act.op != "call_module":
        return None
    child = modules[str(act.target)]
    reason = why_not_skipped(child, skipped("", child))
    return None if reason is None else f"{act.target}: {reason}"
