"""The eager way of a tail: from a call to its launches by one look-up, and back from the engine.

What depends on shapes, strides, dtypes, devices, activation and mode alone was decided when such a call was first met:
a `Plan` of its forward, and one of each kind of backward. A call makes its result, one block of bytes with all that the
backward needs (statistics and mask) and one that is gone after it, and starts the launches. Whatever may be looked at
(`straight.is_quiet`) goes through the operators, whose kernels are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

from .. import dispatch, fork
from .graph import leaves_behind
from .norm import BatchNorm, How, Skip
from .operator import Operator, caches, remember
from .straight import are_plain, guard, is_current, is_quiet, look

Gradients = tuple[Tensor | None, ...]


@dataclass(frozen=True, eq=False)
class Tail:
    """A forward and a backward operator, and what stands for them elsewhere.

    The forward's groups are input, residual, a `BatchNorm` or two, `How`, whether to save, and maybe more. Gradients
    are those of input, residual, and of weight and bias of each BatchNorm: the `inputs`.

    check: (input, residual, norms, how) raises what is to be said of a wrong call.
    compose: (input, residual, norms, how) -> the output in plain PyTorch.
    reads: (how) -> which of the inputs the backward reads, in the order in which it is told of them; None of those that
    it does without.
    backward_groups: (dy, what was saved, what was kept, how, ctx, needs, skip) -> the groups of the backward.
    gradients: the backward by the operators, or as a graph.
    """

    forward: Operator
    backward: Operator
    check: Callable[..., None]
    compose: Callable[..., Tensor]
    reads: Callable[[How], tuple[int | None, ...]]
    backward_groups: Callable[..., tuple]
    gradients: Callable[..., Gradients]


class Planned:
    """What runs calls that look alike.

    check: whether another call does. forward: its plan; None where it goes through the operators, or, `composed`, is
    PyTorch's own composition. saves: whether autograd is to remember it; reads: which inputs then. counts: whether the
    launches count the batches.
    """

    __slots__ = (
        "backend", "backwards", "check", "composed", "counts", "device", "forward", "how", "index", "reads",
        "residual_dtype", "saves", "tail",
    )  # fmt: skip

    def __init__(self, tail: Tail, how: How, inputs: Sequence[Tensor | None]) -> None:
        self.tail, self.how, self.backend = tail, how, dispatch.get_backend()
        input: Any = inputs[0]
        residual = inputs[1]
        self.device, self.index = input.device, input.get_device()
        self.residual_dtype = None if residual is None else residual.dtype
        self.reads = tuple(k for k in tail.reads(how) if k is not None and inputs[k] is not None)
        self.saves = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)  # fmt: skip
        self.check: Callable[..., bool] = _never
        self.forward: Any = None
        self.composed = self.counts = False
        self.backwards: dict[tuple, list[_Back]] = {}


def _never(*_: Any) -> bool:
    return False


# By what is cheap to ask, as whose call it is; of each key the kinds of call that were met last.
_planned: dict[tuple, list[Planned]] = {}
# By all that counts: for a module that calls for the first time, as one does that is a copy for one step.
_kinds: dict[tuple, Planned] = {}
caches.extend((lambda: _planned, lambda: _kinds))
ALIKE = 8
# Each in its own place, for a tensor that there is not: its address is 0.
NONE = tuple(torch.empty(0) for _ in range(16))


def find(key: tuple, tensors: Sequence[Tensor]) -> Planned | None:
    """What runs calls of this key with tensors like these (`straight`), if one was met."""
    for planned in _planned.get(key, ()):
        if planned.check(*tensors) and planned.backend == dispatch.eager_backend():
            return planned
    return None


def run(
    planned: Planned, tensors: Sequence[Tensor], floats: tuple[float, ...], inputs: Sequence[Tensor | None]
) -> Tensor | None:  # fmt: skip
    """A call by its plan; None where there is none, or an address is not aligned, or another device is the current one.

    tensors: input, residual, and of each BatchNorm weight, bias, running mean and variance and counter, with `NONE` for
    those that there are not; then what else the operator takes.
    """
    plan = planned.forward
    if plan is None:
        return None
    if not planned.counts and planned.how.training:
        if not _are_ready(tensors, planned.index):
            return None
        for k in range(6, len(tensors), 5):
            if tensors[k] is not NONE[k]:
                tensors[k].add_(1)
    made = plan.launch(tensors, floats)
    if made is None:
        if not _are_ready(tensors, planned.index):
            return None
        made = plan.start(tensors, floats, planned.device)
    return _apply(*inputs, (planned, floats, made)) if planned.saves else made[0]


def straight(
    tail: Tail,
    key: tuple,
    input: Tensor,
    residual: Tensor | None,
    norms: tuple[BatchNorm, ...],
    how: How,
    more: tuple[Tensor | None, ...] = (),
    check: Callable[[], bool] | None = None,
    kind: tuple | None = None,
) -> Tensor | None:
    """The call, past `torch.ops`; None where it has to go through the operators. The caller has asked `is_quiet`.

    key: what calls that look alike have in common. check: whether the caller has nothing against this one; asked once
    for all calls that look alike and are of one `kind`, which is the key if it says nothing of who calls.
    """
    given: list[Tensor | None] = [input, residual]
    floats: list[float] = []
    for w, b, mean, var, momentum, eps, batches, _ in norms:
        given += w, b, mean, var, batches
        floats += momentum, eps
    given += more
    tensors: list[Any] = [none if t is None else t for t, none in zip(given, NONE, strict=False)]
    planned = find(key, tensors)
    if planned is None:
        if not all(isinstance(t, Tensor) for t in tensors):
            return None
        ids = [id(t) for t in tensors]
        same = tuple([ids.index(each) for each in ids])  # which of them are one tensor
        same += tuple([n.keep for n in norms])
        alike = (tail, dispatch.get_backend(), how, kind or key, same, *[look(t) for t in tensors])
        planned = _kinds.get(alike)
        if planned is None:
            planned = _plan(tail, input, residual, norms, how, more, check)
            if planned.forward is not None and not _are_ready(tensors, planned.index):
                return None  # it was planned for addresses as these are
            planned.check = guard(tensors)
            remember(_kinds, alike, planned)
        known = [each for each in _planned.get(key, ()) if each is not planned]
        remember(_planned, key, [planned, *known][:ALIKE])
    if planned.composed:
        if how.training:
            _count(norms)
        return tail.compose(input, residual, norms, how)
    return run(planned, tensors, tuple(floats), _inputs(input, residual, norms))


def _count(norms: tuple[BatchNorm, ...]) -> None:
    for n in norms:
        if n.batches is not None:
            n.batches.add_(1)


def _inputs(
    input: Tensor, residual: Tensor | None, norms: tuple[BatchNorm, ...]
) -> list[Tensor | None]:
    return [input, residual, *[t for n in norms for t in (n.weight, n.bias)]]


def _plan(
    tail: Tail, input: Tensor, residual: Tensor | None, norms: tuple[BatchNorm, ...], how: How,
    more: tuple[Tensor | None, ...], check: Callable[[], bool] | None,
) -> Planned:  # fmt: skip
    """What runs calls like this one."""
    planned = Planned(tail, how, _inputs(input, residual, norms))
    everything = [input, residual, *more, *[t for n in norms for t in n if isinstance(t, Tensor)]]
    vectors = [t for n in norms for t in n[:4] if t is not None]
    try:
        tail.check(input, residual, norms, how)
        is_ours = check is None or check()
        backend = dispatch.resolve(input.device, input.dtype)[0]
    except (TypeError, ValueError, RuntimeError):  # which is for the long way to say
        return planned
    if (
        not is_ours
        or _is_refused(_inputs(input, residual, norms), norms)
        or input.numel() == 0
        or input.layout is not torch.strided
        or not are_plain(everything)
        or not all(t.is_contiguous() for t in vectors)
    ):
        return planned
    keeps = how.training and any(n.keep for n in norms)
    if backend != "triton":
        planned.composed = not keeps
        return planned
    planned.counts = all(_is_counter(n.batches, input) for n in norms)
    if keeps and not planned.counts:
        return planned
    if not planned.counts:
        norms = tuple(n._replace(batches=None) for n in norms)
    plan = tail.forward.plan((input, residual, *norms, how, planned.saves, *more))
    planned.forward = plan if plan.launches_only else None
    return planned


def _is_counter(batches: Tensor | None, input: Tensor) -> bool:
    return batches is None or (
        batches.dtype == torch.int64 and batches.dim() == 0 and batches.device == input.device
    )


def _are_ready(tensors: Sequence[Tensor], index: int) -> bool:
    """Whether a plan may be started: all addresses aligned, on the current device."""
    return reduce(or_, [t.data_ptr() for t in tensors]) & 15 == 0 and is_current(index)


def _is_refused(inputs: Sequence[Tensor | None], norms: tuple[BatchNorm, ...]) -> bool:
    """Whether autograd has something to say of this call: PyTorch's own is to say it, before anything is done."""
    if not torch.is_grad_enabled():
        return False
    saves = any(t is not None and t.requires_grad for t in inputs)
    statistics = (t for n in norms for t in (n.running_mean, n.running_var) if t is not None)
    return any(t.requires_grad for t in statistics) or (
        saves and any(t is not None and t.is_inference() for t in inputs)
    )


class TailFunction(torch.autograd.Function):
    """A tail in the graph, for eager calls; it takes part in the fork of a residual.

    Its inputs are those of the tail, and (what runs it, momentum and eps of each BatchNorm, what was made). Where it
    goes through the operators, the groups of the forward operator stand for what was made.

    Saved for backward: what the backward reads of the inputs, four values a channel, and for a tail one bit an element;
    never the running statistics (two forwards before a backward would trip their version counter).
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        planned, floats, made = arguments[-1]
        if planned.forward is not None:  # it has run already
            output, kept = made[0], made[-1]
            ctx.save_for_backward(*[arguments[k] for k in planned.reads], kept)
        else:
            output, *all_kept = planned.tail.forward(*made)
            ctx.save_for_backward(*[arguments[k] for k in planned.reads], *all_kept)
        ctx.set_materialize_grads(False)
        ctx.planned, ctx.floats = planned, floats
        # Not as saved tensors: their values may change until the backward.
        ctx.biases = arguments[3:-1:2]
        fork.begin(ctx, arguments[1])
        return output

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> Gradients:
        skip = _NO_SKIP
        if ctx.fork_left:
            second, stride = fork.take(ctx)
            skip = Skip(second, None if stride is None else tuple(stride))
        planned: Planned = ctx.planned
        found = saved = None
        if planned.forward is not None and dy is not None and not _grad_mode() and is_quiet():
            second, saved = skip.gradient, ctx.saved_tensors
            tensors = (dy, NONE[1] if second is None else second, *saved)
            # Hooks of saved tensors may have given back others.
            for back in planned.backwards.get((ctx.needs_input_grad, skip.stride), ()):
                if back.check(*tensors):
                    if back.plan is not None:
                        found = back.plan.launch(tensors, ())
                    break
            if found is None:
                found = _straight_back(ctx, tensors, skip)
        if found is None:
            found = (*_long_back(ctx, dy, skip, saved), None)
        if ctx.fork_source is None:
            return found
        return found[0], fork.hand_over(ctx, 1, found[1]), *found[2:]


_NO_SKIP = Skip()
fork.takes_gradients(TailFunction)
_grad_mode = torch.is_grad_enabled
# The engine's way into Python, past a look for which of two functions is the backward.
TailFunction._backward_cls.apply = TailFunction.backward
# The C method: no look for wrappers of torch.func whose level has ended, and for a `setup_context`.
_apply: Any = super(torch.autograd.Function, TailFunction).apply


def through_operators(
    tail: Tail, input: Tensor, residual: Tensor | None, norms: tuple[BatchNorm, ...], how: How, more: tuple = ()
) -> Tensor:  # fmt: skip
    """The same call in eager mode, by the operators."""
    inputs = _inputs(input, residual, norms)
    if _is_refused(inputs, norms):
        return tail.compose(input, residual, norms, how)
    planned = Planned(tail, how, inputs)
    groups = (input, residual, *norms, how, planned.saves, *more)
    if not planned.saves:
        return tail.forward(*groups)[0]
    floats = tuple([value for n in norms for value in (n.momentum, n.eps)])
    return TailFunction.apply(*inputs, (planned, floats, groups))


def _long_back(
    ctx: Any, dy: Tensor | None, skip: Skip, saved: Sequence[Tensor] | None
) -> Gradients:
    """The backward by the operators, or as a graph."""
    needs = ctx.needs_input_grad[:-1]
    if dy is None and skip.gradient is None:
        return (None,) * len(needs)
    _complete(ctx)
    return ctx.planned.tail.gradients(ctx, dy, saved_by(ctx, saved), needs, skip)


def _complete(ctx: Any) -> None:
    """What the operators' way reads off a node."""
    planned: Planned = ctx.planned
    ctx.how, ctx.residual_dtype, ctx.eps = planned.how, planned.residual_dtype, ctx.floats[1::2]
    ctx.bias_dtypes = [None if b is None else b.dtype for b in ctx.biases]
    is_masked = planned.residual_dtype is not None and planned.how.activation is not None
    ctx.behind = leaves_behind(ctx, 1) if is_masked and 1 not in planned.reads else ()


def saved_by(node: Any, tensors: Sequence[Tensor] | None = None) -> tuple:
    """What the node of a tail saved: the inputs that its backward reads, and what was kept as the operators give it.

    tensors: its saved tensors, where they were unpacked already: checkpointing unpacks them once.
    """
    planned: Planned = node.planned
    saved = list(node.saved_tensors if tensors is None else tensors)
    n = len(planned.reads)
    kept = saved[n:]
    if planned.forward is not None:
        kept = planned.forward.kept_results(planned.forward.parts(kept[0]))
    return *_in_order(planned, saved[:n]), *kept


def _in_order(planned: Planned, saved: Sequence[Tensor]) -> list[Tensor | None]:
    """The saved inputs as `Tail.reads` names them, None for one that there was not."""
    inputs: dict[Any, Tensor] = dict(zip(planned.reads, saved, strict=True))
    return [inputs.get(k) for k in planned.tail.reads(planned.how)]


class _Back:
    """A plan of the backward, None where it goes through the operators. check: whether another call looks like it."""

    __slots__ = ("check", "plan")

    def __init__(self, check: Callable[..., bool]) -> None:
        self.check = check
        self.plan: Any = None


def _straight_back(ctx: Any, tensors: tuple, skip: Skip) -> Gradients | None:
    """The first backward of its kind, past `torch.ops`; None where it has to go through the operators.

    tensors: dy, the second gradient, and what is saved.
    """
    planned: Planned = ctx.planned
    key = (ctx.needs_input_grad, skip.stride)
    if not are_plain(tensors) or not _are_ready(tensors, planned.index):
        return None
    back = next((each for each in planned.backwards.get(key, ()) if each.check(*tensors)), None)
    if back is None:
        back = _plan_back(ctx, tensors, skip)
        remember(planned.backwards, key, [back, *planned.backwards.get(key, ())][:ALIKE])
    if back.plan is None:
        return None
    parts = planned.forward.parts(tensors[-1])
    return back.plan.start((*tensors, *parts), (), planned.device)


def _plan_back(ctx: Any, tensors: tuple, skip: Skip) -> _Back:
    """What runs backwards like this one."""
    back, planned = _Back(guard(tensors)), ctx.planned
    _complete(ctx)
    tail, needs = planned.tail, ctx.needs_input_grad[:-1]
    # Stand-ins, since two of the tensors may be one, as x is where it is its own residual, and the next time not.
    stand_ins = [
        torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in tensors
    ]
    dy, second, *saved, block = stand_ins
    parts = planned.forward.parts(block)
    if skip.gradient is not None:
        skip = Skip(second, skip.stride)
    kept = planned.forward.kept_results(parts)
    groups = tail.backward_groups(ctx, dy, (*_in_order(planned, saved), *kept), needs, skip)
    plan = tail.backward.plan(groups)
    passes = needs[1] and type(plan.results[1]) is not int
    if not plan.launches_only or (passes and dy.dtype != planned.residual_dtype):
        return back
    sources = {id(t): k for k, t in enumerate((*stand_ins, *parts))}
    # The place of what there is none of is never looked at.
    places = [sources.get(id(t), 0) for t in tail.backward.tensors_of(groups)]
    results = [*plan.results, torch.uint8]  # and none for what was said of the call
    if passes:  # dy itself is the residual's gradient
        results[1] = 0
    n = len(tensors)
    back.plan = plan.of_parts(places, n, n - 1, planned.forward.kept, tuple(results))
    return back
