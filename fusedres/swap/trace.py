"""A module's own forward as a graph, every child a node of it, with all that the graph depends on.

A trace is trusted only where it says everything that forward does; `interpret` sees to that. Here: what may be traced
at all, and that both modes give one graph.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..nn.norms import is_replaced
from .guards import Guard
from .interpret import Interpreter
from .source import source_of
from .values import PLAIN, ModuleAt, NotTraceable


@dataclass(frozen=True)
class Trace:
    """The graph of one forward.

    inputs: the required arguments, each taken to be a Tensor. defaults: the others, taken to have their default.
    guards: what it depends on. asked: whether forward asks one of its inputs what it is, and got that answer.
    """

    graph: fx.Graph
    inputs: tuple[str, ...]
    defaults: tuple[tuple[str, Any], ...]
    guards: tuple[Guard, ...]
    asked: bool = False


def trace(module: nn.Module) -> Trace:
    """Trace the forward of a module's class in train and in eval mode.

    Raises:
        NotTraceable: the forward cannot be rewritten from a trace; the text says why.
    """
    original: Any = type(module)
    _refuse_special(module, original)
    inputs, defaults = _signature(original)
    runs = []
    for training in (True, False):
        run = Interpreter(training)
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
    )


def _name_the_mode(training: fx.Graph, evaluation: fx.Graph) -> None:
    """Where F.batch_norm was told True in one mode and False in the other, it was told `self.training`."""
    pairs = zip(list(training.nodes), list(evaluation.nodes), strict=False)
    for node, other in pairs:
        if (
            node.target is F.batch_norm
            and other.target is F.batch_norm
            and (_mode_given(node), _mode_given(other)) == (True, False)
        ):
            for each in (node, other):
                with each.graph.inserting_before(each):
                    mode = each.graph.create_node("get_attr", "training")
                if len(each.args) > _TRAINING:
                    each.args = (*each.args[:_TRAINING], mode, *each.args[_TRAINING + 1 :])
                else:
                    each.kwargs = {**each.kwargs, "training": mode}


_TRAINING = 5  # its place among the arguments of F.batch_norm


def _mode_given(node: fx.Node) -> Any:
    if len(node.args) > _TRAINING:
        return node.args[_TRAINING]
    return node.kwargs.get("training")


def copy_of(graph: fx.Graph) -> fx.Graph:
    """The same graph, to be changed."""
    copy = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result = copy.graph_copy(graph, copies)
    copy.output(result)
    return copy


def _refuse_special(module: nn.Module, original: type[nn.Module]) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise NotTraceable("it is a TorchScript module; fuse before torch.jit.script or trace")
    if isinstance(module, fx.GraphModule):
        raise NotTraceable("it is a torch.fx.GraphModule; fuse before tracing")
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
    waits = getattr(module, "has_uninitialized_params", None)
    return isinstance(module, nn.modules.lazy.LazyModuleMixin) and bool(waits and waits())


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
