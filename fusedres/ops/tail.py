"""The eager way of a tail: from a call to its launches by one look-up, and back from the engine.

What depends on shapes, strides, dtypes, devices, activation and mode alone was decided when such a call was first met:
a `Plan` of its forward, and one of each kind of backward. A call makes its result, one block of bytes with all that the
backward needs (statistics and mask) and one that is gone after it, and starts the launches. Whatever may be looked at
(`straight.is_quiet`) goes through the operators, whose kernels are the same.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch, fork
from ..kernels.private import dispatch_keys, is_current
from .norm import BatchNorm, How, Skip
from .operator import Operator, remember
from .straight import are_plain, is_quiet

Gradients = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Tail:
    """A forward and a backward operator, and what stands for them elsewhere.

    The forward's groups are input, residual, a `BatchNorm` or two, `How`, whether to save, and maybe more. Gradients
    are those of input, residual, and of weight and bias of each BatchNorm: the `inputs`.

    check: (input, residual, norms, how) raises what is to be said of a wrong call.
    compose: (input, residual, norms, how) -> the output in plain PyTorch.
    reads: (inputs, how) -> those of the inputs that the backward reads.
    backward_groups: (dy, what was saved, what was kept, how, ctx, needs, skip) -> the groups of the backward.
    gradients: the backward by the operators, or as a graph.
    """

    forward: Operator
    backward: Operator
    check: Callable[..., None]
    compose: Callable[..., Tensor]
    reads: Callable[[tuple, How], tuple]
    backward_groups: Callable[..., tuple]
    gradients: Callable[..., Gradients]


class Planned:
    """The plans of one kind of call; counts: whether its launches count the batches."""

    __slots__ = ("backwards", "counts", "device", "forward", "stride")

    def __init__(self, forward: Any, input: Tensor, counts: bool) -> None:
        self.forward, self.counts = forward, counts
        self.device, self.stride = input.device, input.stride()
        self.backwards: dict[tuple, Any] = {}


class Call(NamedTuple):
    """One call on its way into the graph; without a plan it goes through the operators."""

    tail: Tail
    norms: tuple[BatchNorm, ...]
    how: How
    more: tuple
    planned: Planned | None = None
    tensors: Sequence[Tensor | None] = ()
    pointers: Sequence[int] = ()
    floats: tuple[float, ...] = ()


_LONG = object()  # in the place of a plan: it goes through the operators
_COMPOSED = object()  # PyTorch's own composition runs, and the arguments are as they should be
_planned: dict[tuple, Any] = {}


def is_saved(inputs: Sequence[Tensor | None]) -> bool:
    """Whether autograd is to remember this call."""
    if torch.is_grad_enabled():
        for tensor in inputs:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def _look(t: Tensor | None) -> Any:
    return None if t is None else (type(t), t.dtype, t.shape, t.stride(), t.get_device())


def _look_closely(t: Tensor | None) -> Any:
    return None if t is None else (type(t), dispatch_keys(t), t.dtype, t.shape, t.stride(), t.get_device())  # fmt: skip


def straight(
    tail: Tail,
    input: Tensor,
    residual: Tensor | None,
    norms: tuple[BatchNorm, ...],
    how: How,
    more: tuple[Tensor | None, ...] = (),
    check: Callable[[], bool] | None = None,
    kind: Any = None,
) -> Tensor | None:
    """The call, past `torch.ops`; None where it has to go through the operators. The caller has asked `is_quiet`.

    check: once for all calls of this `kind` that look alike, whether the caller has nothing against it.
    """
    inputs: list[Tensor | None] = [input, residual]
    tensors: list[Tensor | None] = [input, residual]
    floats: list[float] = []
    for n in norms:
        w, b, mean, var, momentum, eps, batches = n
        inputs += w, b
        tensors += w, b, mean, var, batches
        floats += momentum, eps
    save = is_saved(inputs)
    key = (
        tail, kind, how, save, dispatch.get_backend(), _look_closely(input), _look_closely(residual),
        *[_look(t) for t in tensors[2:]], *[_look_closely(t) for t in more],
    )  # fmt: skip
    planned = _planned.get(key)
    if planned is None:
        planned = _plan(tail, input, residual, norms, how, save, more, check)
        remember(_planned, key, planned)
    if planned is _LONG:
        return None
    if planned is _COMPOSED:
        for n in norms:
            if how.training and n.batches is not None:
                n.batches.add_(1)
        return tail.compose(input, residual, norms, how)
    tensors += more
    pointers, together = [], 0
    for t in tensors:
        if t is None:
            pointers.append(0)
        else:
            pointers.append(pointer := t.data_ptr())
            together |= pointer
    if together & 15 or not is_current(planned.device):
        return None
    call = Call(tail, norms, how, more, planned, tensors, pointers, tuple(floats))
    output = _apply(*inputs, call) if save else _run(call)[0]
    if not planned.counts:
        for n in norms:
            if how.training and n.batches is not None:
                n.batches.add_(1)
    return output


def _plan(tail, input, residual, norms, how, save, more, check) -> Any:
    """What runs calls like this one."""
    try:
        tail.check(input, residual, norms, how)
        if check is not None and not check():
            return _LONG
        backend = dispatch.resolve(input.device, input.dtype)[0]
    except (TypeError, ValueError, RuntimeError):  # which is for the long way to say
        return _LONG
    everything = [input, residual, *more, *[t for n in norms for t in n if isinstance(t, Tensor)]]
    vectors = [t for n in norms for t in n[:4] if t is not None]
    if (
        input.numel() == 0
        or input.layout is not torch.strided
        or not are_plain(everything)
        or not all(t.is_contiguous() for t in vectors)
    ):
        return _LONG
    if backend != "triton":
        return _COMPOSED
    counts = all(_is_counter(n.batches, input) for n in norms)
    if not counts:
        norms = tuple(n._replace(batches=None) for n in norms)
    plan = tail.forward.plan((input, residual, *norms, how, save, *more))
    return Planned(plan, input, counts) if plan.launches_only else _LONG


def _is_counter(batches: Tensor | None, input: Tensor) -> bool:
    return batches is None or (
        batches.dtype == torch.int64 and batches.dim() == 0 and batches.device == input.device
    )


def _run(call: Call) -> tuple[Tensor, Tensor | None]:
    """(output, what is kept) of a call that has a plan."""
    planned: Any = call.planned
    plan = planned.forward
    results = plan.launch(call.pointers, call.floats, planned.device)
    if results is None:
        results = plan.start(call.tensors, call.floats, planned.device)
    (output,), kept = results
    return output, kept


class TailFunction(torch.autograd.Function):
    """A tail in the graph, for eager calls; it takes part in the fork of a residual.

    Saved for backward: what the backward reads of the inputs, four values a channel, and for a tail one bit an element;
    never the running statistics (two forwards before a backward would trip their version counter).
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        inputs: tuple[Tensor | None, ...] = arguments[:-1]
        call: Call = arguments[-1]
        tail, how, planned = call.tail, call.how, call.planned
        if planned is not None:
            output, kept = _run(call)
            ctx.save_for_backward(*tail.reads(inputs, how), kept)
        else:
            output, *all_kept = tail.forward(
                inputs[0], inputs[1], *call.norms, how, True, *call.more
            )
            ctx.save_for_backward(*tail.reads(inputs, how), *all_kept)
        ctx.set_materialize_grads(False)
        ctx.planned, ctx.tail, ctx.how = planned, tail, how
        # Not as saved tensors: their values may change until the backward.
        ctx.biases = inputs[3::2]
        ctx.eps = call.floats[1::2] if planned is not None else [n.eps for n in call.norms]
        ctx.residual_dtype = None if inputs[1] is None else inputs[1].dtype
        fork.begin(ctx, inputs[1])
        return output

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Gradients:
        skip = _NO_SKIP
        if ctx.fork_left:
            second, stride = fork.take(ctx)
            skip = Skip(second, None if stride is None else tuple(stride))
        if (
            ctx.planned is not None
            and dy is not None
            and not torch.is_grad_enabled()
            and is_quiet()
        ):
            found = _straight_back(ctx, dy, skip)
        else:
            found = None
        if found is None:
            found = _long_back(ctx, dy, skip)
        dx, dresidual, *rest = found
        if dresidual is not None and ctx.fork_source is not None:
            dresidual = fork.hand_over(ctx, 1, dresidual)
        return dx, dresidual, *rest, None


_NO_SKIP = Skip()
fork.takes_gradients(TailFunction)
# The C method: no look for wrappers of torch.func whose level has ended, and for a `setup_context`.
_apply: Any = super(torch.autograd.Function, TailFunction).apply


def through_operators(
    tail: Tail, input: Tensor, residual: Tensor | None, norms: tuple[BatchNorm, ...], how: How, more: tuple = ()
) -> Tensor:  # fmt: skip
    """The same call in eager mode, by the operators."""
    inputs = (input, residual, *[t for n in norms for t in n[:2]])
    if not is_saved(inputs):
        return tail.forward(input, residual, *norms, how, False, *more)[0]
    return TailFunction.apply(*inputs, Call(tail, norms, how, more))


def _long_back(ctx: Any, dy: Tensor | None, skip: Skip) -> Gradients:
    tail: Tail = ctx.tail
    needs = ctx.needs_input_grad[:-1]
    if dy is None and skip.gradient is None:
        return (None,) * len(needs)
    ctx.bias_dtypes = [None if b is None else b.dtype for b in ctx.biases]
    return tail.gradients(ctx, dy, saved_by(ctx), needs, skip)


def saved_by(node: Any) -> tuple:
    """What the node of a tail saved: the inputs that its backward reads, and what was kept as the operators give it."""
    saved = node.saved_tensors
    if node.planned is None:
        return saved
    return (*saved[:-1], *node.planned.forward.kept_results(saved[-1]))


class _Back(NamedTuple):
    """A plan of a backward. picks: which of a call's tensors the plan is given; places: of each gradient among its
    results; passes: dy itself is the residual's gradient."""

    plan: Any
    picks: Callable[[Sequence], tuple]
    places: tuple[int | None, ...]
    passes: bool


def _straight_back(ctx: Any, dy: Tensor, skip: Skip) -> Gradients | None:
    """The backward, past `torch.ops`; None where it has to go through the operators."""
    planned: Planned = ctx.planned
    *saved, block = ctx.saved_tensors
    needs = ctx.needs_input_grad
    second = skip.gradient
    key = (
        type(dy), dispatch_keys(dy), dy.stride(), dy.dtype, needs,
        None if second is None else (_look_closely(second), skip.stride),
        # Hooks of saved tensors may have given back others.
        *[None if t is None else (type(t), t.stride()) for t in saved],
    )  # fmt: skip
    back = planned.backwards.get(key)
    if back is None:
        back = _plan_back(ctx, dy, saved, block, skip)
        remember(planned.backwards, key, back)
    if back is _LONG:
        return None
    start = block.data_ptr()
    pointers = [0, dy.data_ptr(), 0 if second is None else second.data_ptr()]
    for t in saved:
        pointers.append(0 if t is None else t.data_ptr())
    together = start
    for pointer in pointers:
        together |= pointer
    if together & 15 or not is_current(planned.device):
        return None
    plan = back.plan
    pointers += [start + at for at in planned.forward.kept_at]
    results = plan.launch(back.picks(pointers), (), planned.device)
    if results is None:
        tensors = (None, dy, second, *saved, *planned.forward.parts(block))
        results, _ = plan.start(back.picks(tensors), (), planned.device)
    else:
        results = results[0]
    gradients = [None if k is None else results[k] for k in back.places]
    if back.passes:
        gradients[1] = dy
    return tuple(gradients)


def _plan_back(ctx: Any, dy: Tensor, saved: list, block: Tensor, skip: Skip) -> Any:
    """What runs backwards like this one."""
    if not are_plain([dy, skip.gradient, block, *saved]):
        return _LONG
    tail: Tail = ctx.tail
    needs = ctx.needs_input_grad[:-1]
    ctx.bias_dtypes = [None if b is None else b.dtype for b in ctx.biases]
    kept = ctx.planned.forward.kept_results(block)
    groups = tail.backward_groups(ctx, dy, (*saved, *kept), needs, skip)
    plan = tail.backward.plan(groups)
    places = [r - plan.given if type(r) is int else None for r in plan.results]
    passes = needs[1] and places[1] is None
    if not plan.launches_only or (passes and dy.dtype != ctx.residual_dtype):
        return _LONG
    sources = [None, dy, skip.gradient, *saved, *ctx.planned.forward.parts(block)]
    picks = [_place(t, sources) for t in tail.backward.tensors_of(groups)]
    return _Back(plan, operator.itemgetter(*picks), tuple(places), passes)


def _place(tensor: Tensor | None, sources: list[Any]) -> int:
    """Where a tensor stands among the sources; one of nothing stands for none."""
    if tensor is None or tensor.numel() == 0:
        return 0
    at = tensor.data_ptr(), tensor.dtype
    return next(
        k
        for k, t in enumerate(sources)
        if t is tensor or (t is not None and (t.data_ptr(), t.dtype) == at)
    )
