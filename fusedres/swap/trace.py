"""A module's own forward as a graph, every child a node of it, with all that the graph depends on.

A trace is trusted only where it says everything that forward does; `interpret` sees to that. Here: what may be traced
at all, and that both modes give one graph.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ..nn.norms import is_replaced
from .guards import Guard, Look
from .interpret import Interpreter
from .source import source_of
from .values import PLAIN, ModuleAt, NotTraceable


@dataclass(frozen=True)
class Trace:
    """The graph of one forward.

    inputs: the required arguments, each taken to be a Tensor. defaults: the others, taken to have their default.
    guards: what it depends on. asked: whether forward asks one of its inputs what it is, and got that answer.
    why_tensor: what else it depends on that it gives a Tensor; None where it need not give one.
    """

    graph: fx.Graph
    inputs: tuple[str, ...]
    defaults: tuple[tuple[str, Any], ...]
    guards: tuple[Guard, ...]
    asked: bool = False
    why_tensor: Callable[[], tuple[Guard, ...] | None] = lambda: None


def trace(
    module: nn.Module,
    look: Look = lambda child, of_tensors: None,
) -> Trace:
    """Trace the forward of a module's class in train and in eval mode.

    Args:
        look: asked of a child whose output is asked for what it is.

    Raises:
        NotTraceable: the forward cannot be rewritten from a trace; the text says why.
    """
    original: Any = type(module)
    _refuse_special(module, original)
    inputs, defaults = _signature(original)
    runs = []
    for training in (True, False):
        run = Interpreter(training, look)
        run.run(ModuleAt((), module), original.forward, inputs)
        runs.append(run)
    train, evaluation = runs
    _name_the_mode(train.graph, evaluation.graph)
    if source_of(train.graph) != source_of(evaluation.graph):
        raise NotTraceable("its forward is another one in train and in eval mode")
    return Trace(
        train.graph,
        inputs,
        defaults,
        tuple(dict.fromkeys((*train.guards, *evaluation.guards))),
        train.asked or evaluation.asked,
        train.why_tensor,
    )


def _name_the_mode(training: fx.Graph, evaluation: fx.Graph) -> None:
    """An argument that is True in train and False in eval mode is `self.training`, the other way round its opposite:
    nothing else differs between the two."""
    pairs = list(zip(list(training.nodes), list(evaluation.nodes), strict=False))
    if any((node.op, node.target) != (other.op, other.target) for node, other in pairs):
        return
    for node, other in pairs:
        for key, value in [*enumerate(node.args), *node.kwargs.items()]:
            now = _argument(other, key)
            if isinstance(value, bool) and isinstance(now, bool) and now is not value:
                for each in (node, other):
                    _give_the_mode(each, key, value)


def _argument(node: fx.Node, key: Any) -> Any:
    if isinstance(key, str):
        return node.kwargs.get(key)
    return node.args[key] if key < len(node.args) else None


def _give_the_mode(node: fx.Node, key: int | str, as_it_is: bool) -> None:
    with node.graph.inserting_before(node):
        mode = node.graph.create_node("get_attr", "training")
        if not as_it_is:
            mode = node.graph.create_node("call_function", operator.not_, (mode,))
    if isinstance(key, int):
        node.update_arg(key, mode)
    else:
        node.update_kwarg(key, mode)


def copy_of(graph: fx.Graph) -> fx.Graph:
    """The same graph, to be changed."""
    copy = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result = copy.graph_copy(graph, copies)
    copy.output(result)
    return copy


def _refuse_special(module: nn.Module, original: type[nn.Module]) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise NotTraceable(
            "it is a TorchScript module; call fuse_ before torch.jit.script or torch.jit.trace"
        )
    if isinstance(module, fx.GraphModule):
        raise NotTraceable("it is a torch.fx.GraphModule; call fuse_ before symbolic_trace")
    if is_lazy(module):
        raise NotTraceable("it has no parameters yet; run one batch first, then fuse")
    if is_replaced(module):
        raise NotTraceable("its forward was replaced on the instance")
    if not inspect.isfunction(original.forward):
        raise NotTraceable("its forward is not a plain function")
    if original.forward is nn.Module.forward:
        raise NotTraceable("it has no forward")


def is_lazy(module: nn.Module) -> bool:
    """Whether a module waits for its first input (nn.LazyConv2d)."""
    if not isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return False
    waits = getattr(module, "has_uninitialized_params", None)
    return bool(waits and waits())


def _signature(original: type[nn.Module]) -> tuple[tuple[str, ...], tuple[tuple[str, Any], ...]]:
    inputs, defaults = [], []
    for parameter in list(inspect.signature(original.forward).parameters.values())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.default is not parameter.empty:
            if not isinstance(parameter.default, PLAIN):
                raise NotTraceable(
                    f"its forward has a default that may change, for {parameter.name}"
                )
            defaults.append((parameter.name, parameter.default))
        elif parameter.kind is parameter.KEYWORD_ONLY:
            raise NotTraceable(f"its forward has a required keyword argument, {parameter.name}")
        else:
            inputs.append(parameter.name)
    return tuple(inputs), tuple(defaults)
