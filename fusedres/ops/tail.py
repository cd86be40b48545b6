"""The eager way from a call to its launches by one look-up; back from the engine it is `node`'s.

What depends on shapes, strides, dtypes, devices, activation and mode alone was decided when such a call was first met:
a `Plan` of its forward, and one of each kind of backward. A call makes its result, one block of bytes with all that the
backward needs (statistics and mask) and one that is gone after it, and starts the launches. Whatever may be looked at
(`straight.is_quiet`) goes through the operators, whose kernels are the same.

It was made for the tails of blocks and takes whatever is described as they are: `Tail`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import itemgetter, or_
from typing import Any

import torch
from torch import Tensor

from .. import dispatch, reference
from .norm import BatchNorm
from .operator import Operator, caches, remember
from .straight import PLAIN, are_plain, guard, is_current, is_quiet, look

Gradients = tuple[Tensor | None, ...]


@dataclass(frozen=True, eq=False)
class Tail:
    """A forward and a backward operator, and what stands for them elsewhere.

    The forward's groups are those that hold its inputs (tensors, or a `BatchNorm`), then one that says how, then maybe
    whether to save (`told`), and maybe more. Its `inputs` are what it has gradients of: the tensors, and of each
    BatchNorm weight and bias.

    function: the node in the graph, a `node.Node`.
    how: which of the groups says how.
    check: (the groups up to how) raises what is to be said of a wrong call.
    compose: (the same) -> the outputs in plain PyTorch; None where only the kernels do it.
    reads: (how) -> what the backward reads, in the order in which it is told of them: k of the k-th input, ~k of the
    k-th output; None of those that it does without.
    backward_groups: (node, dy, what was saved, needs, a second gradient) -> the groups of the backward.
    gradients: (the same) -> the backward by the operators, or as a graph.
    of: the backward's result that each input's gradient is.
    outputs: how many of the forward's results the call returns; what is kept for the backward comes behind.
    forks: whether it takes part in the fork of its second input.
    """

    forward: Operator
    backward: Operator
    function: Any
    how: int
    check: Callable[..., None]
    compose: Callable[..., Any] | None
    reads: Callable[[Any], tuple[int | None, ...]]
    backward_groups: Callable[..., tuple]
    gradients: Callable[..., Gradients]
    of: tuple[int, ...]
    outputs: int = 1
    told: bool = True
    forks: bool = False

    def inputs(self, groups: tuple) -> list[Tensor | None]:
        found: list[Tensor | None] = []
        for group in groups[: self.how]:
            if isinstance(group, BatchNorm):
                found += group.weight, group.bias
            else:
                found.append(group)
        return found

    def saving(self, groups: tuple, saves: bool) -> tuple:
        """The groups, with whether to save."""
        if not self.told:
            return groups
        place = self.how + 1
        return *groups[:place], saves, *groups[place + 1 :]


class Planned:
    """What runs calls that look alike.

    check: whether another call does. forward: its plan; None where it goes through the operators, or, `composed`, is
    PyTorch's own composition. saves: whether autograd is to remember it; reads: which inputs then, and outputs; saved:
    (what the node is given and what was made) -> these, and all that is kept. forks: as in `Tail`. counts: whether the
    launches count the batches, or there are none to count. dtypes: of the inputs. stride: of the output. looks: how
    many of the tensors `check` is given: all, or the first two, input and residual, where PyTorch, which is given the
    others as they are, asks what there is to ask of them.
    """

    __slots__ = (
        "apply", "backend", "backwards", "check", "composed", "counts", "device", "dtypes", "forks", "forward", "how",
        "index", "looks", "outputs", "reads", "saved", "saves", "state", "stride", "tail",
    )  # fmt: skip

    def __init__(self, tail: Tail, groups: tuple) -> None:
        self.tail, self.how, self.backend = tail, groups[tail.how], dispatch.get_backend()
        self.outputs, self.state = tail.outputs, tail.forward.state()
        inputs = tail.inputs(groups)
        input: Any = inputs[0]
        self.device, self.index = input.device, input.get_device()
        self.dtypes = [None if t is None else t.dtype for t in inputs]
        self.reads = tuple(
            k for k in tail.reads(self.how) if k is not None and (k < 0 or inputs[k] is not None)
        )
        self.saves = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)  # fmt: skip
        self.forks, returned = tail.forks, len(tail.forward.op._schema.returns)
        self.keep(range(self.outputs, returned), len(inputs))
        # The C method: no look for wrappers of torch.func whose level has ended, and for a `setup_context`.
        self.apply: Any = super(torch.autograd.Function, tail.function).apply  # type: ignore[misc]
        self.check: Callable[..., bool] = _never
        self.forward: Any = None
        self.stride: Any = None
        self.composed = self.counts = False
        self.looks: int | None = None
        self.backwards: dict[tuple, list[Any]] = {}

    def keep(self, kept: Iterable[int], inputs: int) -> None:
        """Save what is read, and of what was made that which stands at these places."""
        # A node is given one thing more than its inputs.
        read = [k if k >= 0 else inputs + 1 + ~k for k in self.reads]
        self.saved = _picker([*read, *(inputs + 1 + k for k in kept)])


def _picker(places: list[int]) -> Callable[[tuple], tuple]:
    if len(places) < 2:
        return lambda given: tuple([given[k] for k in places])
    return itemgetter(*places)


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
        looked_at = tensors if planned.looks is None else tensors[: planned.looks]
        if planned.check(*looked_at) and planned.backend == dispatch.eager_backend():
            return planned
    return None


def run(
    planned: Planned, tensors: Sequence[Tensor], floats: tuple[float, ...], inputs: Sequence[Tensor | None]
) -> Any:  # fmt: skip
    """A call by its plan; None where there is none, or an address is not aligned, or another device is the current one.

    tensors: those of the forward operator's groups, with `NONE` for those that there are not: of a tail input,
    residual, and of each BatchNorm weight, bias, running mean and variance and counter, then what else it takes.
    """
    plan = planned.forward
    if plan is None:
        return None
    if not planned.counts and planned.how.training:
        if not are_ready(tensors, planned.index):
            return None
        for k in range(6, len(tensors), 5):
            if tensors[k] is not NONE[k]:
                tensors[k].add_(1)
    made = plan.launch(tensors, floats)
    if made is None:
        if not are_ready(tensors, planned.index):
            return None
        made = plan.start(tensors, floats, planned.device)
    if planned.saves:
        return planned.apply(*inputs, (planned, floats, made))
    return made[0] if planned.outputs == 1 else made[: planned.outputs]


def may_be_met(*tensors: Any) -> bool:
    """Whether a call with these may look like one that went straight (`again`), as far as is asked without looking."""
    # First: torch.compile knows the answer, and takes none of what follows into its graph.
    return (
        not torch.compiler.is_compiling()
        and dispatch.eager_backend() != "aten"
        and all(type(t) in PLAIN for t in tensors)
    )


def again(key: tuple, *tensors: Tensor) -> Any:
    """A call that looks like one that went straight, all of whose tensors are inputs; None where more looks are due.

    The key is the one that `straight` was given; the caller has asked `may_be_met`.
    """
    planned = find(key, tensors)
    if planned is None or not is_quiet():
        return None
    return run(planned, tensors, (), tensors)


def straight(
    tail: Tail,
    key: tuple,
    groups: tuple,
    check: Callable[[], bool] | None = None,
    kind: tuple | None = None,
) -> Any:
    """The call, past `torch.ops`; None where it has to go through the operators. The caller has asked `is_quiet`.

    key: what calls that look alike have in common. groups: the forward's; whether to save is seen to here. check:
    whether the caller has nothing against this one; asked once for all calls that look alike and are of one `kind`,
    which is the key if it says nothing of who calls.
    """
    given = tail.forward.tensors_of(groups)
    tensors: list[Any] = [none if t is None else t for t, none in zip(given, NONE, strict=False)]
    planned = find(key, tensors)
    if planned is None:
        if not all(isinstance(t, Tensor) for t in tensors):
            return None
        ids = [id(t) for t in tensors]
        same = tuple([ids.index(each) for each in ids])  # which of them are one tensor
        who = tail, dispatch.get_backend(), groups[tail.how], kind or key
        alike = (*who, same, *[look(t) for t in tensors])
        planned = _kinds.get(alike)
        if planned is None:
            planned = _plan(tail, groups, check)
            if planned.forward is not None and not are_ready(tensors, planned.index):
                return None  # it was planned for addresses as these are
            planned.check = guard(tensors[: planned.looks])
            remember(_kinds, alike, planned)
        known = [each for each in _planned.get(key, ()) if each is not planned]
        remember(_planned, key, [planned, *known][:ALIKE])
    if planned.composed and tail.compose is not None:
        if planned.how.training:
            _count(_norms_of(groups))
        return tail.compose(*groups[: tail.how + 1])
    return run(planned, tensors, tail.forward.floats_of(groups), tail.inputs(groups))


def _norms_of(groups: tuple) -> list[BatchNorm]:
    return [group for group in groups if isinstance(group, BatchNorm)]


def _count(norms: Sequence[BatchNorm]) -> None:
    for n in norms:
        if n.batches is not None:
            n.batches.add_(1)


def _plan(tail: Tail, groups: tuple, check: Callable[[], bool] | None) -> Planned:
    """What runs calls like this one."""
    planned, inputs, norms = Planned(tail, groups), tail.inputs(groups), _norms_of(groups)
    input: Any = inputs[0]
    try:
        tail.check(*groups[: tail.how + 1])
        is_ours = check is None or check()
        backend = dispatch.resolve(input.device, input.dtype)[0]
    except (TypeError, ValueError, RuntimeError):  # which is for the long way to say
        return planned
    if (
        not is_ours
        or _is_refused(inputs, norms)
        or input.numel() == 0
        or not are_plain(tail.forward.tensors_of(groups))
        or not all(t.is_contiguous() for n in norms for t in n[2:4] if t is not None)
    ):
        return planned
    training = bool(norms) and planned.how.training
    keeps = training and any(n.keep for n in norms)
    if backend != "triton":
        planned.composed = tail.compose is not None and not keeps
        # In 16 bits, some of them may have to be cast.
        if planned.composed and norms and input.dtype not in reference.BELOW_FLOAT32:
            planned.looks = 2
        return planned
    planned.counts = all(_is_counter(n.batches, input) for n in norms)
    if keeps and not planned.counts:
        return planned
    if not planned.counts:
        groups = tuple(g._replace(batches=None) if isinstance(g, BatchNorm) else g for g in groups)
    planned.forward = tail.forward.plan(tail.saving(groups, planned.saves))
    # What is kept is the last that a plan makes.
    kept = [len(planned.forward.apart)] if planned.forward.kept else []
    planned.keep(kept, len(inputs))
    first = planned.forward.results[0] - planned.forward.given
    planned.stride = planned.forward.alone[first].stride
    return planned


def _is_counter(batches: Tensor | None, input: Tensor) -> bool:
    return batches is None or (
        batches.dtype == torch.int64 and batches.dim() == 0 and batches.device == input.device
    )


def are_ready(tensors: Sequence[Tensor], index: int) -> bool:
    """Whether a plan may be started: all addresses aligned, on the current device."""
    return reduce(or_, [t.data_ptr() for t in tensors]) & 15 == 0 and is_current(index)


def _is_refused(inputs: Sequence[Tensor | None], norms: Sequence[BatchNorm]) -> bool:
    """Whether autograd has something to say of this call: PyTorch's own is to say it, before anything is done."""
    if not torch.is_grad_enabled():
        return False
    saves = any(t is not None and t.requires_grad for t in inputs)
    statistics = (t for n in norms for t in (n.running_mean, n.running_var) if t is not None)
    return any(t.requires_grad for t in statistics) or (
        saves and any(t is not None and t.is_inference() for t in inputs)
    )


def through_operators(tail: Tail, groups: tuple) -> Any:
    """The same call in eager mode, by the operators."""
    inputs = tail.inputs(groups)
    if tail.compose is not None and _is_refused(inputs, _norms_of(groups)):
        return tail.compose(*groups[: tail.how + 1])
    planned = Planned(tail, groups)
    groups = tail.saving(groups, planned.saves)
    if planned.saves:
        floats = tail.forward.floats_of(groups)
        return tail.function.apply(*inputs, (planned, floats, groups))
    found = tail.forward(*groups)
    return found[0] if tail.outputs == 1 else found[: tail.outputs]
