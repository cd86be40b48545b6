"""A traced graph with its sites fused, as source; and that source as a function."""

from __future__ import annotations

import hashlib
import linecache
import operator
import types
from typing import Any

from torch import fx, nn

from ..nn.add import call_add
from ..nn.batch_norm import call_add_batch_norm, call_function, call_tail
from ..nn.projection import call_projected_tail
from ..nn.recompute import call_reader, call_tail_again
from .alias import in_place
from .config import FuseConfig
from .guards import digest
from .match import Match, Sum
from .nodes import Skipped, operands
from .source import IS_CHILD, Imports, resolve, written
from .values import NotTraceable

_FUNCTIONS: dict[tuple[Any, ...], types.FunctionType] = {}


def rewrite(
    graph: fx.Graph, matches: list[Match], sums: list[Sum], config: FuseConfig
) -> tuple[str, Imports]:
    """Replace each match and each sum by a call of what runs it; the new source, and where its globals come from.

    Raises:
        NotTraceable: the source would need an object that cannot be imported by name.
    """
    # What stands now where an earlier match ended.
    now: dict[fx.Node, fx.Node] = {}
    # Where it is not asked for, sources are as they were.
    keeps: tuple[bool, ...] = (True,) if config.keep_finite_statistics else ()
    for match in matches:
        end = match.end
        if match.before is not None:
            now[match.before], now[end] = _replace_pair(graph, match, match.before, now, keeps)
        else:
            now[end] = _replace(graph, match, now, keeps)
    for each in sums:
        _replace_sum(graph, each, now)
    try:
        graph.lint()
    except RuntimeError as error:
        raise NotTraceable(
            f"its rewritten forward is not valid, please report it: {error}"
        ) from error
    return written(graph)


def _child(graph: fx.Graph, path: Any) -> fx.Node:
    """A read of a child."""
    node = graph.create_node("get_attr", path)
    node.meta[IS_CHILD] = True
    return node


def _replace(
    graph: fx.Graph, match: Match, now: dict[fx.Node, fx.Node], keeps: tuple[bool, ...]
) -> fx.Node:
    """Put the call that runs a site in its place; that call."""
    activation = match.activation
    input, shortcut, call = match.input, match.projected, match.call
    residual = None if match.residual is None else now.get(match.residual, match.residual)
    obsolete = {*match.nodes}
    if call is not None:
        with graph.inserting_before(match.end):
            site = graph.call_function(
                call_function, (*call, residual, activation, match.into, *keeps)
            )
    elif shortcut is None:
        with graph.inserting_before(match.end):
            norm = _child(graph, match.norm.target)
            tail = call_tail if match.reader is None else call_tail_again
            site = graph.call_function(
                tail, (norm, input, residual, activation, match.into, *keeps)
            )
    else:
        with graph.inserting_before(match.end):
            norms = [_child(graph, path) for path in (match.norm.target, shortcut.norm)]
            convolution, source = None, now.get(shortcut.source, shortcut.source)
            if shortcut.convolution is not None:
                convolution = _child(graph, shortcut.convolution)
            site = graph.call_function(
                call_projected_tail,
                (norms[0], input, norms[1], convolution, source, activation, match.into, *keeps),
            )
        obsolete.update(shortcut.nodes)
    match.end.replace_all_uses_with(site)
    if (reader := match.reader) is not None:
        with graph.inserting_before(reader):
            read = graph.call_function(call_reader, (_child(graph, reader.target), site))
        reader.replace_all_uses_with(read)
        obsolete.add(reader)
    for node in [node for node in graph.nodes if node in obsolete][::-1]:
        graph.erase_node(node)
    return site


def _replace_pair(
    graph: fx.Graph,
    match: Match,
    before: fx.Node,
    now: dict[fx.Node, fx.Node],
    keeps: tuple[bool, ...],
) -> tuple[fx.Node, fx.Node]:
    """The sum and what follows it as one call; what stands for each now."""
    summands = [now.get(node, node) for node in operands(before) or ()]
    with graph.inserting_before(match.end):
        norm = _child(graph, match.norm.target)
        pair = graph.call_function(call_add_batch_norm, (norm, *summands, match.activation, *keeps))
        total, output = (graph.call_function(operator.getitem, (pair, k)) for k in (0, 1))
    match.end.replace_all_uses_with(output)
    for node in sorted(match.nodes, key=list(graph.nodes).index, reverse=True):
        graph.erase_node(node)
    before.replace_all_uses_with(total)
    graph.erase_node(before)
    return total, output


def _replace_sum(graph: fx.Graph, each: Sum, now: dict[fx.Node, fx.Node]) -> None:
    values = [now.get(node, node) for node in (each.input, each.residual)]
    with graph.inserting_before(each.act):
        call = graph.call_function(call_add, (*values, each.activation, in_place(each.add)))
    each.act.replace_all_uses_with(call)
    now[each.act] = call
    for node in (each.act, *reversed(each.passed), each.add):
        graph.erase_node(node)


def compile_source(source: str, imports: Imports) -> types.FunctionType:
    """The function `forward` that the source defines; the same one for the same source and the same globals."""
    scope = {name: resolve(module, attribute) for name, module, attribute in imports}
    # A class that was defined anew has the name of the old one.
    key = (source, imports, *map(id, scope.values()))
    if key not in _FUNCTIONS:
        filename = f"<fusedres {hashlib.sha256(source.encode()).hexdigest()[:12]}>"
        # So that tracebacks and inspect show the source.
        linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
        exec(compile(source, filename, "exec", dont_inherit=True), scope)
        _FUNCTIONS[key] = scope["forward"]
    return _FUNCTIONS[key]


def fingerprint(cls: type[nn.Module], skipped: tuple[Skipped, ...] = ()) -> str:
    """A digest of the code of a class's own methods, down to nn.Module, and of children that are walked through."""
    found = hashlib.sha256()
    for base in (*cls.__mro__, *(base for each in skipped for base in each.kind.__mro__)):
        if base in (nn.Module, object):
            continue
        for name, value in sorted(vars(base).items()):
            function = getattr(value, "__func__", value)
            if isinstance(function, types.FunctionType):
                found.update(f"{name} {digest(function.__code__)}".encode())
    return found.hexdigest()[:16]
