"""The fork of a residual: its two gradients are added in a pass that is made anyway, not in a kernel of their own.

A block's input x goes to the main path and to the tail's residual, so autograd adds two gradients of x: 3 passes. Where
x was made by a tail of ours, the later tail keeps the gradient of its residual back: it leaves it with the node that
made x and gives the engine nothing along that edge. The engine runs that node all the same, after everything that
reads x, and its reducing pass reads both gradients and writes the masked sum, which the applying pass reads: one pass
more than without a fork. A strided projection leaves its gradient at the positions that it visits.

Nobody may notice. So whoever could see the gradient of x gets it whole, added by autograd as ever: hooks on x or on
either node, `retain_grad`, `torch.autograd.grad` and `backward(inputs=...)` (which may ask for x), `create_graph`, x
written to since, or gone (checkpointing frees it), a second residual of the same x. What is hung on x while the engine
runs, after the later tail, comes too late: it sees the main path's gradient.

What is left belongs to one run of the engine, and goes with it. Several may be under way: in a hook of another, at a
checkpoint inside it, in other threads. The engine numbers them, and no two in a process have the same number.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dispatch import has_tangents


class Left(NamedTuple):
    """A gradient that was left, at the positions that `stride` visits, by work on the stream of this description."""

    gradient: Tensor
    stride: list[int] | None
    stream: tuple[int, int, int] | None


class _Run:
    """A run of the engine: whether nobody asked for single gradients, and what is left for which node.

    It is a callback of that run, which owns it: one that fails takes it along, with all that was left.
    """

    __slots__ = ("__weakref__", "is_whole", "left")

    def __init__(self, is_whole: bool) -> None:
        self.is_whole, self.left = is_whole, dict[Any, Left]()

    def __call__(self) -> None:
        pass


# By the engine's number for it.
_runs: dict[int, weakref.ref[_Run]] = {}
_makers: list[type] = []
Leaf: Any = torch._C._functions.AccumulateGrad


def takes_part(function: type[torch.autograd.Function]) -> None:
    """Let the nodes of this Function leave gradients (with `target` and `leave`) and find out who watches them."""
    node: Any = function._backward_cls

    def watched(name: str):
        register = getattr(node, name)

        def wrapper(self, *args, **options):
            self.fork_watched = True
            return register(self, *args, **options)

        return wrapper

    node.fork_source, node.fork_left, node.fork_watched = None, False, False
    node.register_hook, node.register_prehook = (
        watched("register_hook"),
        watched("register_prehook"),
    )


def takes_gradients(function: type[torch.autograd.Function]) -> None:
    """`takes_part`, for a Function whose first output's gradient may come in two (`take`).

    Its forward calls `begin`.
    """
    takes_part(function)
    _makers.append(function._backward_cls)


def begin(ctx: Any, residual: Tensor | None) -> None:
    """What the node of a tail keeps: where its residual came from."""
    if residual is not None and (source := source_of(residual)) is not None:
        ctx.fork_source = source


def source_of(x: Tensor | None) -> weakref.ref[Tensor] | None:
    """What a node keeps of a tensor that a tail of ours made, whose gradient it may leave there; None of any other."""
    if type(x) is not Tensor or type(x.grad_fn) not in _makers or x.output_nr != 0:
        return None
    return weakref.ref(x)


def target(ctx: Any, edge: int) -> Any:
    """The node to leave the gradient along this edge with; None where autograd is to add it."""
    if ctx.fork_source is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if has_tangents():  # which an operator of ours does not know
        return None
    x = ctx.fork_source()
    if x is None or x._backward_hooks or x.retains_grad:
        return None
    functions = ctx.next_functions
    node = functions[edge][0]
    # Another one, where x was written to in place since.
    if node is None or node is not x.grad_fn or node.fork_watched or ctx.fork_watched:
        return None
    run = _this_run() or _begun(functions)
    if run is None or not run.is_whole or node in run.left:
        return None
    return node if _will_run(node) else None


def _this_run() -> _Run | None:
    reference = _runs.get(torch._C._current_graph_task_id())
    return None if reference is None else reference()


def _begun(functions: tuple[tuple[Any, int], ...]) -> _Run | None:
    """This run of the engine, which a node that goes on to these has met first; None where it cannot tell.

    A leaf parameter of the node tells: asked about one, the engine says no where only some gradients are wanted, and
    refuses to answer where it is one of those. (Where `backward(inputs=...)` wants it, x retains its gradient or is
    not among those.) One answer holds for the whole run.
    """
    number = torch._C._current_graph_task_id()
    leaf = next((f for f, _ in functions if type(f) is Leaf), None)
    if number < 0 or leaf is None:
        return None
    for gone in [each for each, reference in list(_runs.items()) if reference() is None]:
        _runs.pop(gone, None)
    run = _Run(_will_run(leaf))
    # Threads of one run, which each device has, may come here together: the first one's counts.
    known = _runs.setdefault(number, weakref.ref(run))()
    if known is not run:
        return known
    torch.autograd.Variable._execution_engine.queue_callback(run)
    return run


def _will_run(node: Any) -> bool:
    """Whether the engine runs a node in this run."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # of a leaf whose gradient somebody asks for
        return False


def leave(node: Any, gradient: Tensor, stride: list[int] | None = None) -> None:
    """Leave a gradient with `target`'s node; the edge gets None."""
    run: Any = _this_run()
    stream = None
    if gradient.is_cuda:  # what `torch.cuda.current_stream` makes an object of
        stream = torch._C._cuda_getCurrentStream(gradient.get_device())
    run.left[node] = Left(gradient, stride, stream)
    node.fork_left = True


def hand_over(ctx: Any, edge: int, gradient: Tensor | None) -> Tensor | None:
    """The gradient along this edge, or None where it was left with the node there."""
    if gradient is None or (node := target(ctx, edge)) is None:
        return gradient
    leave(node, gradient)
    return None


def take(ctx: Any) -> tuple[Tensor | None, list[int] | None]:
    """What was left with this node in this run of the engine: a gradient and its stride, or nothing."""
    if not ctx.fork_left or (run := _this_run()) is None:  # nothing ever, or not now
        return None, None
    left = run.left.pop(ctx, None)
    if left is None:
        return None, None
    if left.stream is not None:
        _wait_for(left.gradient, left.stream)
    return left.gradient, left.stride


def _wait_for(gradient: Tensor, stream: tuple[int, int, int]) -> None:
    """Let the current stream wait for the one that a gradient was made on, where it is another."""
    if torch._C._cuda_getCurrentStream(gradient.get_device()) == stream:
        return
    number, device, kind = stream
    now = torch.cuda.current_stream(gradient.device)
    now.wait_stream(torch.cuda.Stream(stream_id=number, device_index=device, device_type=kind))
    gradient.record_stream(now)
