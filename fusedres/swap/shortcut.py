"""Where the residual of a site is a BatchNorm itself: a projected shortcut, whose BatchNorm the tail takes in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..dispatch import why_called, why_not_fused
from ..nn.projection import CONVOLUTIONS, why_not_projection
from ..projection import describe_choice
from .alias import Effects
from .record import NotTraceable, Reads
from .subclass import original_class
from .trace import trace

Skipped = tuple[tuple[str, type[nn.Module]], ...]


@dataclass(frozen=True)
class Shortcut:
    """A residual `norm(convolution(...lead(source)))`, every part a child of the site's owner.

    Args:
        node: the residual in the graph.
        source: what the first of the parts is given.
        lead: children that are called, in this order.
        convolution: the 1x1 convolution that runs together with the BatchNorm; None where there is none.
        norm: the BatchNorm.
        shell: the child that holds the parts; None where they are the owner's own.
        skipped: children that are not called any more, apart from the BatchNorm, and what class they must be of.
        inner: nodes in front of `node` that belong to it.
        reads: what the forward of the child that holds the parts depends on.
        note: which implementation runs the convolution, for the report.
        reason: why it is left as it is; None where the tail takes it in. `excluded`: it is since the user said so.
    """

    node: fx.Node
    source: fx.Node
    lead: tuple[str, ...]
    convolution: str | None
    norm: str
    shell: str | None = None
    skipped: Skipped = ()
    inner: tuple[fx.Node, ...] = ()
    reads: tuple[Reads, ...] = ()
    note: str = ""
    reason: str | None = None
    excluded: bool = False


def find_shortcut(
    residual: fx.Node,
    main: str,
    site: Iterable[fx.Node | None],
    end: fx.Node,
    modules: Mapping[str, nn.Module],
    effects: Effects,
) -> Shortcut | None:
    """The projected shortcut that a residual is, None where it is none.

    main, site, end: the other BatchNorm of the tail, the tail's nodes and the last of them.
    """
    if (
        residual.op != "call_module"
        or residual.kwargs
        or len(residual.args) != 1
        or not residual.all_input_nodes
    ):
        return None
    child = modules[str(residual.target)]
    is_norm = isinstance(child, _BatchNorm)
    found = _of_the_owner(residual, modules) if is_norm else _of_a_child(residual, child)
    if found is None:
        return None
    if found.reason is None:
        found = replace(found, reason=_why_left(found, main, modules))
    if found.reason is None:
        found = _settled(found, site, end, modules, effects)
    return found


def _of_the_owner(norm: fx.Node, modules: Mapping[str, nn.Module]) -> Shortcut:
    """The owner calls the BatchNorm itself, and perhaps the convolution in front of it."""
    before = norm.all_input_nodes[0]
    shortcut = Shortcut(norm, before, (), None, str(norm.target))
    is_convolution = (
        before.op == "call_module" and type(modules[str(before.target)]) in CONVOLUTIONS
    )
    if is_convolution and len(before.users) == 1 and len(before.args) == 1 and not before.kwargs:
        source = before.all_input_nodes[0]
        return replace(shortcut, source=source, convolution=str(before.target), inner=(before,))
    return shortcut


def _of_a_child(node: fx.Node, child: nn.Module) -> Shortcut | None:
    """A child (nn.Sequential, or one with a forward of its own) calls them one after the other."""
    cls, prefix = original_class(child), str(node.target)
    if not any(isinstance(part, _BatchNorm) for part in child._modules.values()):
        return None
    try:
        traced = trace(child, cls)
    except NotTraceable:
        return None
    parts = _chain(traced.graph)
    if not parts or not isinstance(_part(child, parts[-1]), _BatchNorm):
        return None
    *lead, norm = (f"{prefix}.{part}" for part in parts)
    found = Shortcut(
        node, node.all_input_nodes[0], tuple(lead), None, norm,
        shell=prefix, skipped=((prefix, cls),),
        reads=tuple(replace(r, path=(*prefix.split("."), *r.path)) for r in traced.reads),
    )  # fmt: skip
    if any(isinstance(_part(child, part), _BatchNorm) for part in parts[:-1]):
        return replace(found, reason=f"{prefix} holds another BatchNorm in front of it")
    if (obstacle := why_called(child)) is not None:
        return replace(found, reason=f"{prefix}: {obstacle}")
    if lead and type(_part(child, parts[-2])) in CONVOLUTIONS:
        return replace(found, lead=tuple(lead[:-1]), convolution=lead[-1])
    return found


def _chain(graph: fx.Graph) -> list[str]:
    """The children that a forward calls one after the other; nothing where it does anything else."""
    first, *calls, output = graph.nodes
    if first.op != "placeholder" or output.args != (calls[-1] if calls else first,):
        return []
    for before, node in zip((first, *calls), calls, strict=False):
        if node.op != "call_module" or node.args != (before,) or node.kwargs:
            return []
    return [str(node.target) for node in calls]


def _part(child: nn.Module, path: str) -> nn.Module:
    return child.get_submodule(path)


def _why_left(shortcut: Shortcut, main: str, modules: Mapping[str, nn.Module]) -> str | None:
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
    modules: Mapping[str, nn.Module],
    effects: Effects,
) -> Shortcut:
    """With the convolution where it is a 1x1 that may wait; and refused where the BatchNorm may not wait either."""
    own = {*site, shortcut.node, *shortcut.inner}
    first = shortcut.inner[0] if shortcut.inner else shortcut.node
    waiting = [node for node in effects.between(first, end) if node not in own]
    if (reason := effects.why_state_is_used(waiting, shortcut.norm)) is not None:
        return replace(shortcut, reason=reason)
    writer = effects.writer(waiting, shortcut.source)
    if shortcut.convolution is None:
        if writer is not None:
            return replace(shortcut, reason=_written(writer))
        return replace(shortcut, note="its statistics take a pass of their own")
    convolution = modules[shortcut.convolution]
    obstacle = why_not_projection(convolution) or (writer and _written(writer))
    if obstacle is None:
        skipped = (*shortcut.skipped, (shortcut.convolution, type(convolution)))
        note = _describe(convolution)
        return replace(shortcut, skipped=skipped, note=note)
    note = f"{shortcut.convolution} is called: {obstacle}"
    if not shortcut.inner:
        lead = (*shortcut.lead, shortcut.convolution)
        return replace(shortcut, lead=lead, convolution=None, note=note)
    called = shortcut.inner[0]
    if (writer := effects.writer(waiting, called)) is not None:
        return replace(shortcut, reason=_written(writer))
    return replace(shortcut, source=called, convolution=None, inner=(), note=note)


def _written(writer: fx.Node) -> str:
    name = writer.target if isinstance(writer.target, str) else writer.target.__name__
    return f"its input may be written to before the site ends, by {name}"


def _describe(convolution: nn.Module) -> str:
    weight: Any = convolution.weight
    architecture = 90
    if weight.is_cuda:
        major, minor = torch.cuda.get_device_capability(weight.device)
        architecture = 10 * major + minor
    return describe_choice(weight.shape[1], weight.shape[0], architecture)
