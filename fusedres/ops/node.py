"""A call in the graph, for eager mode: what it saves, and back from the engine to the launches by one look-up.

The backward of a call that went straight (`tail`) goes straight too, by a plan that was made for the first of its kind;
where somebody looks by then, through the operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import fork
from .norm import Skip
from .operator import remember
from .straight import are_plain, guard, is_quiet
from .tail import ALIKE, NONE, Gradients, Planned, are_ready

_grad_mode = torch.is_grad_enabled


class Node(torch.autograd.Function):
    """What a `Tail` is in the graph, for eager calls; see `is_node`.

    Its inputs are those of the tail, and (what runs it, momentum and eps of each BatchNorm, what was made). Where it
    goes through the operators, the groups of the forward operator stand for what was made.

    Saved for backward: what the backward reads of the inputs and outputs, and in one block of bytes what the forward
    kept: four values a channel of each BatchNorm, one bit an element of a mask; never the running statistics (two
    forwards before a backward would trip their version counter).
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        planned, floats, made = arguments[-1]
        if planned.forward is None:  # else it has run already
            made = planned.tail.forward(*made)
            planned.stride = made[0].stride()
        ctx.save_for_backward(*planned.saved(arguments + made))
        ctx.set_materialize_grads(False)
        ctx.planned, ctx.floats = planned, floats
        # Not as saved tensors: their values may change until the backward.
        ctx.biases = arguments[3:-1:2]
        if planned.forks:
            fork.begin(ctx, arguments[1])
        return made[0] if planned.outputs == 1 else made[: planned.outputs]

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Gradients:
        return gradients(ctx, dy, _NO_SKIP, ctx.needs_input_grad)


_NO_SKIP = Skip()


def is_node(function: type[Node]) -> None:
    """Make a `Node` ready, with a forward and a backward that are its own by now."""
    node: Any = function._backward_cls
    # The engine's way into Python, past a look for which of two functions is the backward.
    node.apply = function.backward


is_node(Node)


class TailFunction(Node):
    """A tail in the graph; it takes part in the fork of a residual."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Gradients:
        skip = _NO_SKIP
        if ctx.fork_left:
            second, stride = fork.take(ctx)
            skip = Skip(second, None if stride is None else tuple(stride))
        found = gradients(ctx, dy, skip, ctx.needs_input_grad)
        if ctx.fork_source is None:
            return found
        return found[0], fork.hand_over(ctx, 1, found[1]), *found[2:]


fork.takes_gradients(TailFunction)
is_node(TailFunction)


def gradients(ctx: Any, dy: Tensor | None, skip: Skip, needs: tuple) -> Gradients:
    """Those of a node's inputs, None for its last argument.

    skip: a second gradient: of the same output, which came over a skip connection, or of a second output.
    """
    planned: Planned = ctx.planned
    found = saved = None
    if (
        planned.forward is not None
        and dy is not None
        and not _grad_mode()
        and is_quiet()
        and (planned.state is None or planned.state == planned.tail.backward.state())
    ):
        second, saved = skip.gradient, ctx.saved_tensors
        tensors = (dy, NONE[1] if second is None else second, *saved)
        # Hooks of saved tensors may have given back others.
        for back in planned.backwards.get((needs, skip.stride), ()):
            if back.check(*tensors):
                if back.plan is not None:
                    found = back.plan.launch(tensors, ())
                break
        if found is None:
            found = _straight_back(ctx, tensors, skip, needs)
    if found is None:
        found = (*_long_back(ctx, dy, skip, saved, needs), None)
    return found


def _long_back(
    ctx: Any, dy: Tensor | None, skip: Skip, saved: Sequence[Tensor] | None, needs: tuple
) -> Gradients:
    """The backward by the operators, or as a graph."""
    needs = needs[:-1]
    if dy is None and skip.gradient is None:
        return (None,) * len(needs)
    _complete(ctx)
    return ctx.planned.tail.gradients(ctx, dy, saved_by(ctx, saved), needs, skip)


def _complete(ctx: Any) -> None:
    """What the operators' way reads off a node."""
    planned: Planned = ctx.planned
    ctx.how, ctx.stride, ctx.dtypes, ctx.eps = (
        planned.how,
        planned.stride,
        planned.dtypes,
        ctx.floats[1::2],
    )
    ctx.residual_dtype, ctx.bias_dtypes = planned.dtypes[1], planned.dtypes[3::2]


def saved_by(node: Any, tensors: Sequence[Tensor] | None = None) -> tuple:
    """What a node saved: the inputs and outputs that its backward reads, and what was kept as the operators give it.

    tensors: its saved tensors, where they were unpacked already: checkpointing unpacks them once.
    """
    planned: Planned = node.planned
    saved = list(node.saved_tensors if tensors is None else tensors)
    n = len(planned.reads)
    kept = saved[n:]
    if planned.forward is not None:
        parts = _parts(planned, kept)
        kept = planned.forward.kept_results(parts, planned.outputs, planned.device)
    return *_in_order(planned, saved[:n]), *kept


def _parts(planned: Planned, block: Sequence[Tensor]) -> list[Tensor]:
    """What a plan kept, of the block that has it, if there is one."""
    return planned.forward.parts(block[0]) if block else []


def _in_order(planned: Planned, saved: Sequence[Tensor]) -> list[Tensor | None]:
    """What is saved of inputs and outputs, as `Tail.reads` names them, None for one that there was not."""
    read: dict[Any, Tensor] = dict(zip(planned.reads, saved, strict=True))
    return [read.get(k) for k in planned.tail.reads(planned.how)]


class _Back:
    """A plan of the backward, None where it goes through the operators. check: whether another call looks like it."""

    __slots__ = ("check", "plan")

    def __init__(self, check: Callable[..., bool]) -> None:
        self.check = check
        self.plan: Any = None


def _straight_back(ctx: Any, tensors: tuple, skip: Skip, needs: tuple) -> Gradients | None:
    """The first backward of its kind, past `torch.ops`; None where it has to go through the operators.

    tensors: dy, the second gradient, and what is saved.
    """
    planned: Planned = ctx.planned
    key = (needs, skip.stride)
    if not are_plain(tensors) or not are_ready(tensors, planned.index):
        return None
    back = next((each for each in planned.backwards.get(key, ()) if each.check(*tensors)), None)
    if back is None:
        back = _plan_back(ctx, tensors, skip, needs)
        remember(planned.backwards, key, [back, *planned.backwards.get(key, ())][:ALIKE])
    if back.plan is None:
        return None
    parts = _parts(planned, tensors[2 + len(planned.reads) :])
    return back.plan.start((*tensors, *parts), (), planned.device)


def _plan_back(ctx: Any, tensors: tuple, skip: Skip, needs: tuple) -> _Back:
    """What runs backwards like this one."""
    back, planned = _Back(guard(tensors)), ctx.planned
    _complete(ctx)
    tail = planned.tail
    # Stand-ins, since two of the tensors may be one, as x is where it is its own residual, and the next time not.
    stand_ins = [
        torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in tensors
    ]
    dy, second, *saved = stand_ins
    n = len(planned.reads)
    parts = _parts(planned, saved[n:])
    if skip.gradient is not None:
        skip = Skip(second, skip.stride)
    kept = planned.forward.kept_results(parts, planned.outputs, dy.device)
    read = _in_order(planned, saved[:n])
    groups = tail.backward_groups(ctx, dy, (*read, *kept), needs[:-1], skip)
    plan = tail.backward.plan(groups)
    results = [plan.results[k] if need else torch.uint8 for k, need in zip(tail.of, needs, strict=False)]  # fmt: skip
    if needs[1] and type(results[1]) is not int:  # dy itself is the residual's gradient
        if dy.dtype != planned.dtypes[1]:
            return back
        results[1] = 0
    sources = {id(t): k for k, t in enumerate((*stand_ins, *parts))}
    # The place of what there is none of is never looked at.
    places = [sources.get(id(t), 0) for t in tail.backward.tensors_of(groups)]
    n = len(tensors)
    # And none for what was said of the call.
    results.append(torch.uint8)
    back.plan = plan.of_parts(places, n, n - 1, planned.forward.kept, tuple(results))
    return back
