"""Where the residual of a site is a BatchNorm itself: a projected shortcut, whose BatchNorm the tail takes in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..nn.norms import is_batch_norm, why_not_fused
from ..nn.projection import CONVOLUTIONS, why_not_projection
from ..ops.projection import describe_choice
from .alias import Effects
from .inline import FILTERED
from .nodes import Modules, Skipped, gives_back, name_of, skipped

Refused = dict[fx.Node, tuple[str, str]]


@dataclass(frozen=True)
class Shortcut:
    """A residual `norm(convolution(source))`.

    Args:
        node: the call of the BatchNorm.
        source: what the first of the parts is given.
        norm: the BatchNorm.
        convolution: the 1x1 convolution that runs together with the BatchNorm; None where there is none.
        inner: nodes in front of `node` that belong to it. passed: such behind it, which give back what they are given.
        skipped: children that are not called any more, apart from the BatchNorm, and what class they must be of.
        note: which implementation runs the convolution, for the report.
        reason: why it is left as it is; None where the tail takes it in. `excluded`: it is since the user said so.
    """

    node: fx.Node
    source: fx.Node
    norm: str
    convolution: str | None = None
    inner: tuple[fx.Node, ...] = ()
    passed: tuple[fx.Node, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    note: str = ""
    reason: str | None = None
    excluded: bool = False

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All nodes that belong to it."""
        return (*self.inner, self.node, *self.passed)


def find_shortcut(
    residual: fx.Node,
    main: str,
    site: Iterable[fx.Node | None],
    end: fx.Node,
    modules: Modules,
    effects: Effects,
    refused: Refused,
) -> Shortcut | None:
    """The projected shortcut that a residual is, None where it is none.

    main, site, end: the other BatchNorm of the tail, the tail's nodes and the last of them. refused: calls of children
    that end in a BatchNorm and stay, with its name and the reason.
    """
    if residual in refused:
        norm, why = refused[residual]
        return Shortcut(residual, residual, norm, reason=why, excluded=why == FILTERED)
    passed: list[fx.Node] = []
    while gives_back(residual, modules) and len(residual.users) == 1:
        passed.append(residual)
        residual = residual.all_input_nodes[0]
    if (
        residual.op != "call_module"
        or not is_batch_norm(modules[str(residual.target)])
        or len(residual.args) != 1
        or residual.kwargs
        or not residual.all_input_nodes
    ):
        return None
    found = _with_convolution(residual, modules)
    if passed:
        left_out = tuple(skipped(str(node.target), modules[str(node.target)]) for node in passed)
        found = replace(found, passed=tuple(passed), skipped=left_out)
    if (reason := _why_left(found, main, modules)) is not None:
        return replace(found, reason=reason)
    return _settled(found, site, end, modules, effects)


def is_rather_the_shortcut(norm: fx.Node, other: fx.Node, modules: Modules, added_to: bool) -> bool:
    """Whether of two BatchNorms that are added this one has the projection that could run with the tail.

    added_to: the other is written to, as a block does with its main path; it decides where the projections do not.
    """
    if norm.op != "call_module":
        return False
    if other.op != "call_module" or not is_batch_norm(modules[str(other.target)]):
        return False
    if why_not_fused(modules[str(other.target)]) is not None:
        return False
    own, others = _projects(norm, modules), _projects(other, modules)
    return own > others or (own == others and added_to)


def _projects(norm: fx.Node, modules: Modules) -> int:
    """0 without a 1x1 convolution, more with one, most where it changes the size."""
    found = _with_convolution(norm, modules).convolution if norm.all_input_nodes else None
    if found is None or why_not_projection(modules[found]) is not None:
        return 0
    convolution: Any = modules[found]
    return 2 if max(convolution.stride) > 1 else 1


def _with_convolution(norm: fx.Node, modules: Modules) -> Shortcut:
    """The BatchNorm and the convolution in front of it, where there is one that nothing else reads."""
    before = norm.all_input_nodes[0]
    is_convolution = (
        before.op == "call_module" and type(modules[str(before.target)]) in CONVOLUTIONS
    )
    if is_convolution and len(before.users) == 1 and len(before.args) == 1 and not before.kwargs:
        source = before.all_input_nodes[0]
        return Shortcut(norm, source, str(norm.target), str(before.target), (before,))
    return Shortcut(norm, before, str(norm.target))


def _why_left(shortcut: Shortcut, main: str, modules: Modules) -> str | None:
    if len(shortcut.node.users) != 1:
        return "its output is used elsewhere too"
    norm = modules[shortcut.norm]
    if norm is modules[main]:
        return "it is the BatchNorm of the main path too"
    if {id(b) for b in norm.buffers()} & {id(b) for b in modules[main].buffers()}:
        return "it shares its statistics with the BatchNorm of the main path"
    obstacle = why_not_fused(norm)
    return None if obstacle is None else f"{shortcut.norm}: {obstacle}"


def _settled(
    shortcut: Shortcut,
    site: Iterable[fx.Node | None],
    end: fx.Node,
    modules: Modules,
    effects: Effects,
) -> Shortcut:
    """With the convolution where it is a 1x1 that may wait; and refused where the BatchNorm may not wait either."""
    own = {*site, *shortcut.nodes}
    first = shortcut.inner[0] if shortcut.inner else shortcut.node
    waiting = [node for node in effects.between(first, end) if node not in own]
    norm = modules[shortcut.norm]
    if (reason := effects.why_state_is_used(waiting, norm.buffers(), norm)) is not None:
        return replace(shortcut, reason=reason)
    writer = effects.writer(waiting, shortcut.source)
    if shortcut.convolution is None:
        if writer is not None:
            return replace(shortcut, reason=_written(writer))
        return replace(shortcut, note="its statistics take a pass of their own")
    convolution = modules[shortcut.convolution]
    obstacle = why_not_projection(convolution) or (writer and _written(writer))
    if obstacle is None:
        left_out = (*shortcut.skipped, skipped(shortcut.convolution, convolution))
        return replace(shortcut, skipped=left_out, note=_describe(convolution))
    note = f"{shortcut.convolution} is called: {obstacle}"
    called = shortcut.inner[0]
    if (writer := effects.writer(waiting, called)) is not None:
        return replace(shortcut, reason=_written(writer))
    return replace(shortcut, source=called, convolution=None, inner=(), note=note)


def _written(writer: fx.Node) -> str:
    return f"its input may be written to before the site ends, by {name_of(writer)}"


def _describe(convolution: Any) -> str:
    weight, architecture = convolution.weight, 90
    if weight.is_cuda:
        major, minor = torch.cuda.get_device_capability(weight.device)
        architecture = 10 * major + minor
    # Not by the weight's shape, which FullyShardedDataParallel flattens between calls.
    return describe_choice(convolution.in_channels, convolution.out_channels, architecture)
