"""A module's own forward as a torch.fx graph, every child a leaf.

A trace is trusted only where it says everything that forward does. torch.fx alone would silently lose in-place
operators (`a += b`), `torch.no_grad`, autocast, checkpointing and draws from a random generator, would take the wrong
branch of `isinstance(x, Tensor)` and `x is None`, and would run on the module itself; each of these is closed here.
"""

from __future__ import annotations

import inspect
import operator
import random
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .alias import IN_PLACE_OPERATORS
from .record import (
    CONTAINERS,
    PLAIN,
    Notes,
    NotTraceable,
    Reads,
    call,
    changed_attribute,
    collect_reads,
    make_twin,
    snapshot,
)


@dataclass(frozen=True)
class Trace:
    """The graph of one forward.

    inputs: the required arguments, each taken to be a Tensor. defaults: the others, taken to have their default.
    asked: whether forward asks one of its inputs what it is (isinstance), and got that answer.
    """

    graph: fx.Graph
    inputs: tuple[str, ...]
    defaults: tuple[tuple[str, Any], ...]
    reads: tuple[Reads, ...]
    asked: bool = False


def trace(module: nn.Module, original: type[nn.Module]) -> Trace:
    """Trace the forward of `original` (the class of `module` before any swap) in train and in eval mode.

    Raises:
        NotTraceable: the forward cannot be rewritten from a trace; the text says why.
    """
    _refuse_special(module, original)
    inputs, defaults = _signature(original)
    training, reads, asked = _trace_mode(module, original, inputs, training=True)
    evaluation, more, asked_too = _trace_mode(module, original, inputs, training=False)
    _name_the_mode(training, evaluation)
    if _text(training) != _text(evaluation):
        raise NotTraceable("its forward is another one in train and in eval mode")
    modules = dict(module.named_modules(remove_duplicate=False))
    containers = _containers(training, modules)
    found = tuple(dict.fromkeys((*reads, *more, *containers)))
    return Trace(training, inputs, defaults, found, asked or asked_too)


def _name_the_mode(training: fx.Graph, evaluation: fx.Graph) -> None:
    """Where F.batch_norm was told True in one mode and False in the other, it was told `self.training`."""
    pairs = zip(list(training.nodes), list(evaluation.nodes), strict=False)
    for node, other in pairs:
        if (
            node.kwargs.get("training") is True
            and other.kwargs.get("training") is False
            and node.target is F.batch_norm
            and other.target is F.batch_norm
        ):
            for each in (node, other):
                with each.graph.inserting_before(each):
                    mode = each.graph.create_node("get_attr", "training")
                each.kwargs = {**each.kwargs, "training": mode}


def copy_of(graph: fx.Graph) -> fx.Graph:
    """The same graph, to be changed."""
    copy = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result = copy.graph_copy(graph, copies)
    copy.output(result)
    return copy


def _containers(graph: fx.Graph, modules: dict[str, nn.Module]) -> tuple[Reads, ...]:
    """That a container which forward walked through still has the same children, no more and no fewer."""
    parents = dict.fromkeys(
        str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "call_module"
    )
    return tuple(
        Reads(
            tuple(parent.split(".")) if parent else (), (), (), (), tuple(modules[parent]._modules)
        )
        for parent in parents
        if isinstance(modules[parent], CONTAINERS)
    )


def _refuse_special(module: nn.Module, original: type[nn.Module]) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise NotTraceable("it is a TorchScript module")
    if isinstance(module, fx.GraphModule):
        raise NotTraceable("it is a torch.fx.GraphModule, whose forward is generated already")
    if "forward" in vars(module):
        raise NotTraceable("its forward was replaced on the instance")
    if not inspect.isfunction(original.forward):
        raise NotTraceable("its forward is not a plain function")


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


def _trace_mode(
    module: nn.Module, original: type[nn.Module], inputs: tuple[str, ...], training: bool
):
    notes = Notes()
    try:
        twin = make_twin(module, original, notes)
    except TypeError as error:
        raise NotTraceable(f"a class in it cannot be derived from: {error}") from error
    for child in twin.modules():
        vars(child)["training"] = training
    before, generators = snapshot(twin), _generator_states()
    tracer = _Tracer(notes)
    try:
        # Gradients off in eval mode: a forward that asks whether they are on gives two graphs.
        with torch.set_grad_enabled(training):
            graph = tracer.trace_forward(twin, original, inputs)
    except NotTraceable:
        raise
    except Exception as error:
        # The forward is foreign code run on proxies: whatever it raises is the reason, told in the report.
        text = " ".join(str(error).split())
        raise NotTraceable(
            f"torch.fx cannot trace its forward: {type(error).__name__}: {text[:160]}"
        ) from error
    finally:
        notes.on = False
        drew = _restore_generators(generators)
    if drew:
        raise NotTraceable("its forward draws random numbers while it decides what to run")
    if (name := changed_attribute(before, twin)) is not None:
        raise NotTraceable(f"its forward writes to self.{name}, or makes a constant tensor")
    return graph, collect_reads(twin, notes), tracer.asked


def _generator_states() -> tuple[torch.Tensor, Any]:
    return torch.random.get_rng_state(), random.getstate()


def _restore_generators(before: tuple[torch.Tensor, Any]) -> bool:
    """Put the generators back; whether they had moved."""
    state, python_state = _generator_states()
    if torch.equal(state, before[0]) and python_state == before[1]:
        return False
    torch.random.set_rng_state(before[0])
    random.setstate(before[1])
    return True


def _text(graph: fx.Graph) -> str:
    return graph.python_code("self").src


def _ambient() -> tuple[Any, ...]:
    """The state around an operation that a graph cannot hold."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
        torch._C._len_torch_dispatch_stack(),
    )


class _Tensor(fx.Proxy):
    """A proxy that says it is a Tensor, and that keeps an in-place operator in place."""

    # Asked by isinstance(x, nn.Parameter) and by Module.__setattr__ of whatever is a Tensor.
    _is_param = False
    _is_buffer = False

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        if isinstance(self.tracer, _Tracer):
            self.tracer.asked |= self.node.op == "placeholder"
        return torch.Tensor


def _in_place(function: Any) -> Any:
    def record(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _operator in IN_PLACE_OPERATORS - {operator.setitem}:
    setattr(_Tensor, f"__{_operator.__name__}__", _in_place(_operator))


class _Tracer(fx.Tracer):
    """torch.fx's tracer with every child a leaf, reads of the module noted, ambient state watched."""

    proxy_buffer_attributes = True

    def __init__(self, notes: Notes) -> None:
        super().__init__()
        self.asked = False
        self._notes = notes
        self._around = _ambient()
        notes.call = self._call_attribute

    def _call_attribute(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        attribute = self.create_proxy("get_attr", path, (), {})
        return self.create_proxy("call_function", call, (attribute, *args), kwargs)

    def trace_forward(
        self, twin: nn.Module, original: type[nn.Module], inputs: tuple[str, ...]
    ) -> fx.Graph:
        """The graph of `original.forward(twin, *inputs)`."""
        self._around = _ambient()
        names = ", ".join(inputs)
        scope: dict[str, Any] = {"_forward": original.forward, "_notes": self._notes}
        # fx reads the arguments off the function's code, so it gets one with just the required ones.
        source = f"def forward(self, {names}):\n    _notes.on = True\n    return _forward(self, {names})\n"
        exec(source, scope)
        type(twin).forward = scope["forward"]
        return self.trace(twin)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Tensor(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _ambient() != self._around:
            raise NotTraceable(
                "its forward switches gradients, autocast, checkpointing or a dispatch mode on its way"
            )
        return super().create_node(*args, **kwargs)

    # What the tracer itself reads off the module is no read of forward's.

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        with _Pause(self._notes):
            return super().create_arg(a)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        with _Pause(self._notes):
            return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        with _Pause(self._notes):
            return super().call_module(m, forward, args, kwargs)


class _Pause:
    def __init__(self, notes: Notes) -> None:
        self._notes = notes

    def __enter__(self) -> None:
        self._was, self._notes.on = self._notes.on, False

    def __exit__(self, *_: object) -> None:
        self._notes.on = self._was
