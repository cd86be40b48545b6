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
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor


class Left:
    """A gradient left with the node that made the tensor, in one run of the engine; `stride`: at those positions.

    The run owns it (as a callback that does nothing), the node refers to it weakly: a run that fails takes it along.
    """

    __slots__ = ("__weakref__", "gradient", "stream", "stride")

    def __init__(self, gradient: Tensor, stride: list[int] | None, stream: Any) -> None:
        self.gradient: Tensor | None = gradient
        self.stride, self.stream = stride, stream

    def __call__(self) -> None:
        pass


_makers: list[type] = []


def takes_part(function: type[torch.autograd.Function]) -> None:
    """Let the nodes of this Function leave gradients (with `target` and `leave`) and find out who watches them."""
    node: Any = function._backward_cls

    def watched(name: str):
        register = getattr(node, name)

        def wrapper(self, *args, **options):
            self.fork_watched = True
            return register(self, *args, **options)

        return wrapper

    node.fork_source, node.fork_watched = None, False
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
    """What the node of a tail keeps: where its residual came from, and what will be left with it, by run."""
    ctx.fork_source, ctx.fork_left = source_of(residual), {}


def source_of(x: Tensor | None) -> weakref.ref[Tensor] | None:
    """What a node keeps of a tensor that a tail of ours made, whose gradient it may leave there; None of any other."""
    if x is None or type(x) is not Tensor or x.output_nr != 0:
        return None
    if type(x.grad_fn) not in _makers:
        return None
    return weakref.ref(x)


def target(ctx: Any, edge: int) -> Any:
    """The node to leave the gradient along this edge with; None where autograd is to add it."""
    if ctx.fork_source is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    x = ctx.fork_source()
    if x is None or x._backward_hooks or x.retains_grad:
        return None
    node = ctx.next_functions[edge][0]
    # Another one, where x was written to in place since.
    if node is None or node is not x.grad_fn or node.fork_watched or ctx.fork_watched:
        return None
    run = torch._C._current_graph_task_id()
    if run < 0 or run in node.fork_left:
        return None
    return node if _runs_whole(ctx, node) else None


def _runs_whole(ctx: Any, node: Any) -> bool:
    """Whether the engine runs `node`, and for a plain `backward()`, in which nobody asks for x by name.

    A leaf parameter of the node tells: asked about one, the engine says no where only some gradients are wanted, and
    refuses to answer where it is one of those.
    """
    leaf = next(
        (f for f, _ in ctx.next_functions if f is not None and hasattr(f, "variable")), None
    )
    if leaf is None:
        return False
    will_run = torch._C._will_engine_execute_node
    try:
        return will_run(leaf) and will_run(node)
    except RuntimeError:
        return False


def leave(node: Any, gradient: Tensor, stride: list[int] | None = None) -> None:
    """Leave a gradient with `target`'s node; the edge gets None."""
    stream = torch.cuda.current_stream(gradient.device) if gradient.is_cuda else None
    left = Left(gradient, stride, stream)
    torch.autograd.Variable._execution_engine.queue_callback(left)
    # Other runs may be under way at the same node, in a hook of this one or in another thread; failed ones are gone.
    for run in [run for run, reference in list(node.fork_left.items()) if reference() is None]:
        node.fork_left.pop(run, None)
    node.fork_left[torch._C._current_graph_task_id()] = weakref.ref(left)


def hand_over(ctx: Any, edge: int, gradient: Tensor | None) -> Tensor | None:
    """The gradient along this edge, or None where it was left with the node there."""
    if gradient is None or (node := target(ctx, edge)) is None:
        return gradient
    leave(node, gradient)
    return None


def take(ctx: Any) -> tuple[Tensor | None, list[int] | None]:
    """What was left with this node in this run of the engine: a gradient and its stride, or nothing."""
    reference = None
    if ctx.fork_left:
        reference = ctx.fork_left.pop(torch._C._current_graph_task_id(), None)
    left: Left | None = None if reference is None else reference()
    if left is None or left.gradient is None:
        return None, None
    gradient, left.gradient = left.gradient, None
    if left.stream is not None:
        stream = torch.cuda.current_stream(gradient.device)
        if stream != left.stream:
            stream.wait_stream(left.stream)
            gradient.record_stream(stream)
    return gradient, left.stride
