"""The tail of a block whose shortcut is projected, `act(bn(input) + bn'(residual))`.

    fusedres::dual_batch_norm_act           input, residual, ... -> output, saved, residual_saved [4, C], bits
                                            (residual_moments: those of the residual, where its producer left them)
    fusedres::dual_batch_norm_act_backward  dy, input, residual, ... -> a gradient for each of the six that have one

`needs` says which of input, residual, weight and residual weight get a gradient; a bias gets one in its dtype, or none.
The kernels are those of `batch_norm_act`, told that the residual has a BatchNorm of its own. With dz = dy * act'(z),
each of the two gets the derivative that `batch_norm_act` states, from the same dz.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..activations import activate, gradient, is_piecewise, keep_passing, parse, passes
from ..checks import check_batch_norm_act, number
from ..dispatch import goes_to_kernels, is_eager, wants_triton
from ..kernels.dtypes import accumulate_dtype, partial_dtype
from ..kernels.layout import bits_layout, row_map_of
from ..layouts import like_output
from . import batch_norm_act as single
from . import skips
from .graph import bias_in_graph, needs_graph, norm_gradients, normalized_graph, passing, smooth
from .masks import empty_bits, has_bits, pack, unpack
from .node import TailFunction
from .norm import BatchNorm, How, Kept, Needs, Skip, empty_saved, names
from .operator import Operator
from .straight import is_quiet
from .tail import Gradients, Tail, straight, through_operators

if TYPE_CHECKING:
    from ..kernels.plan import Planner

FORWARD_SCHEMA = (
    "dual_batch_norm_act(Tensor input, Tensor residual, Tensor? weight, Tensor? bias, Tensor? residual_weight, "
    "Tensor? residual_bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? residual_running_mean, "
    "Tensor(d!)? residual_running_var, bool training, float momentum, float eps, float residual_momentum, "
    "float residual_eps, str? activation, bool save, Tensor? residual_moments=None) "
    "-> (Tensor output, Tensor saved, Tensor residual_saved, Tensor bits)"
)
BACKWARD_SCHEMA = (
    "dual_batch_norm_act_backward(Tensor dy, Tensor input, Tensor residual, Tensor? weight, Tensor? residual_weight, "
    "Tensor saved, Tensor residual_saved, Tensor bits, bool training, str? activation, bool[] needs, "
    "ScalarType? bias_dtype, ScalarType? residual_bias_dtype, Tensor? skip=None, int[]? skip_stride=None) "
    "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias, Tensor dresidual_weight, Tensor dresidual_bias)"
)


class Wanted(NamedTuple):
    """Which of input, residual, weight and residual weight get a gradient, and the dtypes of the biases' (or None)."""

    needs: tuple[bool, ...]
    bias_dtype: torch.dtype | None
    residual_bias_dtype: torch.dtype | None


# --- forward -----------------------------------------------------------------------------------------------------


def _forward(
    p: Planner, input: Tensor, residual: Tensor, norm: BatchNorm, other: BatchNorm, how: How, save: bool,
    moments: Tensor | None,
) -> tuple:  # fmt: skip
    from ..kernels.apply import launch_bn_apply
    from ..kernels.forward import launch_bn_forward
    from ..kernels.launch import FORWARD as FORWARD_PASS
    from ..kernels.launch import choose_whole

    output = p.like(like_output(input))
    rows, (input, residual) = p.common_rows(output, input, residual)
    wide = accumulate_dtype(input.dtype)
    both: list[Any] = [None, None]
    if how.training or save:
        both = [p.keep((4, rows.channels), wide) for _ in range(2)]
    bits = None
    if has_bits(how.activation, save):
        bits = p.keep((bits_layout(rows)[1],), torch.uint8)
    kept = [wide if saved is None else saved for saved in both]
    results = (output, *kept, torch.uint8 if bits is None else bits)
    whole = None
    if how.training and moments is None:
        whole = choose_whole(rows, input.element_size(), FORWARD_PASS, p.chip)
    if whole is not None:
        norms = [single.as_trained(p, *each) for each in zip((norm, other), both, strict=True)]
        launch_bn_forward(p, input, residual, norms, output, bits, whole, parse(how.activation))
        return results
    if how.training:
        single.statistics(p, input, rows, norm, both[0])
        alone = row_map_of(output, residual) or rows
        single.statistics(p, residual, alone, other, both[1], moments)
    launch_bn_apply(
        p, input, residual, single.as_applied(norm, how, both[0]), single.as_applied(other, how, both[1]),
        output, bits, rows, parse(how.activation),
    )  # fmt: skip
    return results


# --- backward ----------------------------------------------------------------------------------------------------


def _backward(
    p: Planner,
    dy: Tensor,
    kept: Kept,
    other: Kept,
    bits: Tensor,
    how: How,
    wanted: Wanted,
    skip: Skip,
) -> tuple:
    from ..kernels.backward import launch_bn_backward
    from ..kernels.finalize import launch_bn_grad_finalize
    from ..kernels.grad import Operand
    from ..kernels.grad_apply import launch_bn_grad_apply
    from ..kernels.grad_reduce import launch_bn_grad_reduce
    from ..kernels.launch import BACKWARD as BACKWARD_PASS
    from ..kernels.launch import (
        CROWDED,
        DUAL_SHARE,
        GRAD_APPLYING,
        REDUCING,
        choose_tile,
        choose_whole,
    )
    from ..kernels.norm import Norm

    size, needs, dtypes = kept.input.element_size(), wanted.needs, wanted[1:]
    layout, activation = like_output(kept.input), parse(how.activation)
    gradients = [
        p.like(layout, k.input.dtype) if need else None
        for k, need in zip((kept, other), needs, strict=False)
    ]
    vectors: list[tuple[Tensor | None, Tensor | None]] = []
    for k, need, dtype in zip((kept, other), needs[2:], dtypes, strict=True):
        dweight = p.like(k.weight) if need and k.weight is not None else None
        dbias = None if dtype is None else p.empty((k.saved.shape[1],), dtype)
        vectors.append((dweight, dbias))
    reduces = any(needs[2:]) or dtypes != (None, None) or (how.training and any(needs[:2]))
    if skip.gradient is not None and not reduces:
        dy, skip = skips.added(p, dy, skip, layout), Skip()
    rows, (input, dy, residual) = p.common_rows(layout, kept.input, dy, other.input)
    mask = bits if bits.numel() else None
    has_skip = skip.gradient is not None
    dz = p.like(layout) if has_skip and any(needs[:2]) else None
    main, second = (
        Operand(x, Norm(k.weight, saved=k.saved), None, None, gradient, *wished)
        for x, k, gradient, wished in zip(
            (input, residual), (kept, other), gradients, vectors, strict=True
        )
    )
    dtype, wide = layout.dtype, kept.saved.dtype
    found = zip(
        (*gradients, *vectors[0], *vectors[1]), (dtype, dtype, wide, wide, wide, wide), strict=True
    )
    results = tuple(other if tensor is None else tensor for tensor, other in found)
    is_smooth = how.activation is not None and not is_piecewise(how.activation)
    walked = skips.walked(p, skip, rows, layout, dz)
    whole = None
    if how.training and any(needs[:2]) and skips.is_alike(walked, rows, mask is None and is_smooth):
        whole = choose_whole(rows, size, BACKWARD_PASS, p.chip)
    if whole is not None:
        launch_bn_backward(p, dy, main, second, mask, None, walked, whole, activation, is_smooth)
        return results
    if reduces:
        kind, share = (REDUCING, DUAL_SHARE) if skip.stride is None else (CROWDED, 2 * DUAL_SHARE)
        tile = choose_tile(rows, size, kind, p.chip, share)
        shape, dtype = (tile.programs, 2, tile.width), partial_dtype(input.dtype)
        main, second = (each._replace(partial=p.empty(shape, dtype)) for each in (main, second))
        launch_bn_grad_reduce(p, dy, main, second, mask, walked, None, rows, tile, activation)
        if how.training:
            wide = kept.saved.dtype
            main, second = (
                each._replace(coefficients=p.empty((2, rows.channels), wide) if need else None)
                for each, need in zip((main, second), needs, strict=False)
            )
        for each, wished in zip((main, second), vectors, strict=True):
            launch_bn_grad_finalize(p, each, each.coefficients, *wished, rows, tile)
    if dz is not None:
        rows, (input, dy, residual) = p.common_rows(layout, input, dz, residual)
        mask, activation = None, parse(None)
        main, second = main._replace(x=input), second._replace(x=residual)
    if any(needs[:2]):
        tile = choose_tile(rows, size, GRAD_APPLYING, p.chip, DUAL_SHARE)
        launch_bn_grad_apply(p, dy, main, second, mask, None, rows, tile, activation)
    return results


# --- the same in plain PyTorch -----------------------------------------------------------------------------------


def compose(input: Tensor, residual: Tensor, norm: BatchNorm, other: BatchNorm, how: How) -> Tensor:
    """The composition, with the add and the activation in place on the first BatchNorm's output."""
    alone = How(how.training, None)
    output = single.compose(input, None, norm, alone)
    added = single.compose(residual, None, other, alone)
    return reference.finish(output, added, how.activation)


def eager(
    input: Tensor, residual: Tensor, tensors: Sequence[Tensor | None], floats: tuple[float, ...], how: How
) -> Tensor:  # fmt: skip
    """`compose` with nothing left to ask, as `reference.eager`; tensors, floats: those that `tail.run` is given."""
    output = reference.eager(input, None, tensors[2:6], floats[:2], how.training, None)
    added = reference.eager(residual, None, tensors[7:11], floats[2:], how.training, None)
    return reference.in_place(output, added, how.activation)


def plain_forward(
    input: Tensor, residual: Tensor, norm: BatchNorm, other: BatchNorm, how: How, save: bool, moments: Tensor | None
) -> tuple[Tensor, ...]:  # fmt: skip
    # In this order: the two may be one, whose running statistics move twice.
    alone = How(how.training, None)
    output, saved, _ = single.plain_forward(input, None, norm, alone, save)
    normalized, residual_saved, _ = single.plain_forward(residual, None, other, alone, save)
    output.add_(normalized)
    bits = empty_bits(input, False)
    if has_bits(how.activation, save):
        mask = like_output(input, torch.bool)
        bits = pack(mask.copy_(passes(output, how.activation)))
    output = activate(output, how.activation, in_place=True)
    return output, saved, residual_saved.to(saved.dtype), bits


def plain_backward(
    dy: Tensor, kept: Kept, other: Kept, bits: Tensor, how: How, wanted: Wanted, skip: Skip
) -> tuple[Tensor, ...]:
    input = kept.input
    dz = skips.add(dy, skip).to(kept.saved.dtype)
    if how.activation is not None and is_piecewise(how.activation):
        mask = unpack(bits, like_output(input, torch.bool))
        dz = keep_passing(dz, mask, how.activation)
    elif how.activation is not None:
        dz = gradient(dz, single.normalized(kept) + single.normalized(other), how.activation)
    none = bits.new_empty(0)
    found = []
    for k, (each, dtype) in enumerate(zip((kept, other), wanted[1:], strict=True)):
        needs = Needs(wanted.needs[k], False, wanted.needs[2 + k], dtype)
        dx, _, dweight, dbias = single.plain_backward(
            dz, each, none, How(how.training, None), needs, Skip(), None, None
        )
        if needs.input:  # in the layout of the input, as the kernels write it
            dx = like_output(input, each.input.dtype).copy_(dx)
        found.append((dx, dweight, dbias))
    (dx, dweight, dbias), (dresidual, dresidual_weight, dresidual_bias) = found
    return dx, dresidual, dweight, dbias, dresidual_weight, dresidual_bias


# --- shapes ------------------------------------------------------------------------------------------------------


def _fake_forward(
    input: Tensor, residual: Tensor, norm: BatchNorm, other: BatchNorm, how: How, save: bool, moments: Tensor | None
) -> tuple[Tensor, ...]:  # fmt: skip
    output = like_output(input)
    saved, residual_saved = (empty_saved(input, how.training or save) for _ in range(2))
    return output, saved, residual_saved, empty_bits(output, has_bits(how.activation, save))


def _fake_backward(
    dy: Tensor, kept: Kept, other: Kept, bits: Tensor, how: How, wanted: Wanted, skip: Skip
) -> tuple[Tensor, ...]:
    input, found = kept.input, []
    for each, need in zip((kept, other), wanted.needs, strict=False):
        found.append(like_output(input, each.input.dtype) if need else input.new_empty(0))
    for each, need, dtype in zip((kept, other), wanted.needs[2:], wanted[1:], strict=True):
        found.append(single.empty_weight_gradient(each.weight, need, each.saved))
        found.append(single.empty_bias_gradient(each.saved, dtype))
    return tuple(found)


# --- operators ---------------------------------------------------------------------------------------------------

OTHER: Any = names(
    BatchNorm,
    "residual_weight", "residual_bias", "residual_running_mean", "residual_running_var",
    "residual_momentum", "residual_eps", None,
)  # fmt: skip
_HOW: Any = names(How, "training", "activation")
_KEPT: Any = names(Kept, "input", "weight", "saved")
_OTHER_KEPT: Any = names(Kept, "residual", "residual_weight", "residual_saved")
_WANTED: Any = names(Wanted, "needs", "bias_dtype", "residual_bias_dtype")

FORWARD = Operator(
    FORWARD_SCHEMA,
    ("input", "residual", single.NORM, OTHER, _HOW, "save", "residual_moments"),
    recipe=_forward,
    plain=plain_forward,
    fake=_fake_forward,
    folds={"input": 1, "residual": 1, "weight": 0, "bias": 0, "residual_weight": 0, "residual_bias": 0},
    unfolds=(1, 1, 1, None),
)  # fmt: skip
BACKWARD = Operator(
    BACKWARD_SCHEMA,
    ("dy", _KEPT, _OTHER_KEPT, "bits", _HOW, _WANTED, names(Skip, "skip", "skip_stride")),
    recipe=_backward,
    plain=plain_backward,
    fake=_fake_backward,
    folds={
        "dy": 1, "input": 1, "residual": 1, "weight": 0, "residual_weight": 0, "saved": 1, "residual_saved": 1,
        "skip": 1,
    },
    unfolds=(1, 1, 0, 0, 0, 0),
)  # fmt: skip


# --- second derivatives ------------------------------------------------------------------------------------------


def _differentiable(
    ctx: Any, dy: Tensor, kept: Kept, other: Kept, bits: Tensor, biases: list[Tensor | None], needs: tuple
) -> list[Tensor | None]:  # fmt: skip
    """As a graph: as that of `batch_norm_act`, for both BatchNorms."""
    (training, activation), dz = ctx.how, dy
    both = (kept, other)
    if activation is not None and is_piecewise(activation):
        with torch.no_grad():
            mask = single.gradient_mask(kept, bits, activation)
        sources = (kept.input, kept.weight, other.input, other.weight, *biases)
        dz = passing(dy, mask, activation, sources)
    elif activation is not None:
        a, b = (
            normalized_graph(each, bias, training, eps)
            for each, bias, eps in zip(both, biases, ctx.eps, strict=True)
        )
        dz = smooth(dy, a + b, activation)
    gradients: list[Tensor | None] = [None] * 6
    places = ((0, 2, 3), (1, 4, 5))
    for each, eps, dtype, at in zip(both, ctx.eps, ctx.bias_dtypes, places, strict=True):
        dx, dweight, dbias = norm_gradients(
            dz, each, training, eps, (needs[at[0]], needs[at[1]], needs[at[2]])
        )
        gradients[at[0]], gradients[at[1]] = dx, dweight
        gradients[at[2]] = None if dbias is None else dbias.to(dtype)
    return gradients


# --- autograd ----------------------------------------------------------------------------------------------------


def _backward_groups(ctx: Any, dy: Tensor, tensors: tuple, needs: tuple, skip: Skip) -> tuple:
    input, residual, weight, residual_weight, saved, residual_saved, bits = tensors
    dtypes = (ctx.bias_dtypes[k] if needs[3 + 2 * k] else None for k in (0, 1))
    wanted = Wanted((needs[0], needs[1], needs[2], needs[4]), *dtypes)
    kept, other = Kept(input, weight, saved), Kept(residual, residual_weight, residual_saved)
    return dy, kept, other, bits, ctx.how, wanted, skip


def _gradients(ctx: Any, dy: Tensor | None, tensors: tuple, needs: tuple, skip: Skip) -> Gradients:
    tensors, biases = tensors[:7], tensors[7:] or (None, None)
    if dy is None:
        dy, skip = skips.spread(skip, tensors[0]), Skip()
    groups = _backward_groups(ctx, dy, tensors, needs, skip)
    if needs_graph(dy, *tensors[:4], *biases, *ctx.biases):
        _, kept, other, bits, *_ = groups
        as_they_were = [
            bias_in_graph(bias, was, each.saved, ctx.how.activation)
            for bias, was, each in zip(biases, ctx.biases, (kept, other), strict=True)
        ]
        return tuple(_differentiable(ctx, dy, kept, other, bits, as_they_were, needs))
    found = BACKWARD(*groups)
    return tuple(each if need else None for each, need in zip(found, needs, strict=True))


def _reads(how: How) -> tuple[int, ...]:
    return 0, 1, 2, 4


def check_dual(
    input: Tensor, residual: Tensor, a: BatchNorm, b: BatchNorm, how: How, name: str = "dual_batch_norm_act"
) -> None:  # fmt: skip
    """Refuse what is no call of it, in the words of whoever is called `name`."""
    check_batch_norm_act(
        name, input, a.running_mean, a.running_var, a.weight, a.bias, how.training, a.eps, residual, how.activation
    )  # fmt: skip
    if residual is None:
        raise TypeError(
            f"{name}: residual is None, expected a torch.Tensor; without one use batch_norm_act"
        )
    check_batch_norm_act(
        f"{name}, of the residual", residual, b.running_mean, b.running_var, b.weight, b.bias, how.training, b.eps,
        None, how.activation, "residual_eps",
    )  # fmt: skip


TAIL = Tail(
    FORWARD,
    BACKWARD,
    TailFunction,
    how=4,
    check=check_dual,
    compose=compose,
    reads=_reads,
    backward_groups=_backward_groups,
    gradients=_gradients,
    forks=True,
    of=(0, 1, 2, 3, 4, 5),
)


class DualBatchNormAct(torch.autograd.Function):
    """The tail for torch.func and torch.compile, as `batch_norm_act.BatchNormAct`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*flat: Any) -> tuple[Tensor, ...]:
        return FORWARD.op(*flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        input, residual, norm, other, how, *_ = FORWARD.grouped(inputs)
        _, *kept = output
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            input, residual, norm.weight, other.weight, *kept, norm.bias, other.bias
        )
        ctx.bias_dtypes = [None if b is None else b.dtype for b in (norm.bias, other.bias)]
        ctx.how, ctx.eps, ctx.biases = how, (norm.eps, other.eps), (None, None)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Gradients:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        # In the order of the operator's arguments, whose biases stand with their weights.
        found = _gradients(ctx, dy, ctx.saved_tensors, ctx.needs_input_grad[:6], Skip())
        return *found, *(None,) * (len(ctx.needs_input_grad) - 6)


def dual_batch_norm_act(
    input: Tensor, residual: Tensor, norms: tuple[BatchNorm, BatchNorm], how: How, moments: Tensor | None = None
) -> Tensor:  # fmt: skip
    """`fusedres.functional.dual_batch_norm_act` on checked arguments, by the kernels.

    moments: the partial moments of the residual, from whatever wrote it; its own pass over it is saved then.
    """
    groups = (input, residual, *norms, how, True, moments)
    if not is_eager():
        return DualBatchNormAct.apply(*FORWARD.flat(groups))[0]
    if is_quiet():
        key = "dual", input.shape, input.dtype, how, torch.is_grad_enabled()
        output = straight(TAIL, key, groups)
        if output is not None:
            return output
    return through_operators(TAIL, groups)


def tail_of_two(
    name: str,
    input: Tensor,
    residual: Tensor,
    norms: tuple[BatchNorm, BatchNorm],
    how: How,
    moments: Tensor | None = None,
) -> Tensor:
    """`dual_batch_norm_act` as called `name`, with the partial moments of the residual where there are some."""
    checked = []
    for norm, prefix in zip(norms, ("", "residual_"), strict=True):
        momentum = number(name, f"{prefix}momentum", norm.momentum)
        checked.append(norm._replace(momentum=momentum, eps=number(name, f"{prefix}eps", norm.eps)))
    both = (checked[0], checked[1])
    check_dual(input, residual, *both, how, name)
    if wants_triton(input.is_cuda) and goes_to_kernels(input):
        return dual_batch_norm_act(input, residual, both, how, moments)
    return compose(input, residual, *both, how)
