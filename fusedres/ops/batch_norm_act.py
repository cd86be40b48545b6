"""`act(batch_norm(input) + residual)`: one BatchNorm, what is added to it and what follows.

    fusedres::batch_norm_act           input, ... -> output, saved [4, C] = (mean, mean_low, invstd, bias), bits
    fusedres::batch_norm_act_backward  dy, input, weight, saved, bits -> dx, dresidual, dweight, dbias
    fusedres::gradient_mask            input, weight, saved, bits -> where the gradient passes (for double backward)

With xhat = (x - mean) * invstd, z = xhat * weight + bias + residual, y = act(z) and dz = dy * act'(z), over the n rows
of a channel (Ioffe and Szegedy 2015, section 3):

    dbias = sum(dz),  dweight = sum(dz * xhat),  dresidual = dz
    dx = weight * invstd * (dz - dbias / n - xhat * dweight / n)        (in eval: weight * invstd * dz)

The bias is in `saved`, by value, for a backward that computes z again: PyTorch's BatchNorm does not keep its bias, and
who changes it between two backward passes over one graph must not be refused here either.

`skip` is a second gradient of the output, to be added to dy, which came over a skip connection (module `fork`). An
output that was not asked for (dbias, without `bias_dtype`) is an empty tensor, so that the arity is fixed. The backward
is given the residual where act' cannot be told from one bit (`activations.SMOOTH`). Which implementation runs is
decided when the operator runs, by `dispatch.resolve`; both write the same `saved` and `bits`, so a backward may use the
other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import activations, reference
from ..activations import activate, is_piecewise, keep_passing, parse
from ..checks import check_batch_norm_act
from ..dispatch import is_eager
from ..kernels.dtypes import accumulate_dtype, partial_dtype
from ..kernels.layout import bits_layout
from ..layouts import like_output
from . import skips
from .graph import (
    bias_in_graph,
    needs_graph,
    norm_gradients,
    normalized_graph,
    passing,
    per_channel,
    smooth,
)
from .masks import empty_bits, has_bits, pack, unpack
from .node import TailFunction
from .norm import BatchNorm, How, Kept, Needs, Skip, empty_saved, names
from .operator import Operator
from .straight import is_quiet
from .tail import Gradients, Tail, straight, through_operators

if TYPE_CHECKING:
    from ..kernels.plan import Planner

FORWARD_SCHEMA = (
    "batch_norm_act(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, bool training, float momentum, float eps, str? activation, bool save) "
    "-> (Tensor output, Tensor saved, Tensor bits)"
)
BACKWARD_SCHEMA = (
    "batch_norm_act_backward(Tensor dy, Tensor input, Tensor? weight, Tensor saved, Tensor bits, "
    "bool training, str? activation, ScalarType? residual_dtype, bool need_input, bool need_residual, "
    "bool need_weight, ScalarType? bias_dtype, Tensor? skip=None, int[]? skip_stride=None, Tensor? residual=None, "
    "Tensor? addend=None) "
    "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)"
)
MASK_SCHEMA = "gradient_mask(Tensor input, Tensor? weight, Tensor saved, Tensor bits, str activation) -> Tensor"


# --- forward -----------------------------------------------------------------------------------------------------


def _forward(
    p: Planner, input: Tensor, residual: Tensor | None, norm: BatchNorm, how: How, save: bool
) -> tuple:
    from ..kernels.apply import launch_bn_apply
    from ..kernels.forward import launch_bn_forward
    from ..kernels.launch import FORWARD as FORWARD_PASS
    from ..kernels.launch import choose_whole

    output = p.like(like_output(input))
    if residual is None:
        rows, (input,) = p.common_rows(output, input)
    else:
        rows, (input, residual) = p.common_rows(output, input, residual)
    saved = bits = None
    if how.training or save:
        saved = p.keep((4, rows.channels), accumulate_dtype(input.dtype))
    if residual is not None and has_bits(how.activation, save):
        bits = p.keep((bits_layout(rows)[1],), torch.uint8)
    whole = choose_whole(rows, input.element_size(), FORWARD_PASS, p.chip) if how.training else None
    wide = accumulate_dtype(input.dtype)
    results = output, wide if saved is None else saved, torch.uint8 if bits is None else bits
    if whole is not None and saved is not None:
        launch_bn_forward(
            p,
            input,
            residual,
            [as_trained(p, norm, saved)],
            output,
            bits,
            whole,
            parse(how.activation),
        )
        return results
    if how.training and saved is not None:
        statistics(p, input, rows, norm, saved)
    launch_bn_apply(
        p, input, residual, as_applied(norm, how, saved), None, output, bits, rows, parse(how.activation)
    )  # fmt: skip
    return results


def as_trained(p: Planner, norm: BatchNorm, saved: Tensor) -> tuple[Any, Any]:
    """A BatchNorm as the forward in one launch takes it, and what that moves."""
    from ..kernels.norm import Norm

    return Norm(norm.weight, norm.bias, saved=saved, eps=norm.eps), running_of(p, norm)


def running_of(p: Planner, norm: BatchNorm) -> Any:
    """What a batch moves. Where somebody else counts the batches there is a counter that nobody reads: the kernels are
    the same then."""
    from ..kernels.finalize import Running

    batches = norm.batches
    if batches is None and norm.running_mean is not None:
        batches = p.empty((), torch.int64)
    return Running(norm.running_mean, norm.running_var, batches, norm.momentum, bool(norm.keep))


def as_applied(norm: BatchNorm, how: How, saved: Tensor | None) -> Any:
    """A BatchNorm as the applying pass reads it: by what is saved in training, else by the running statistics."""
    from ..kernels.norm import Norm

    if how.training:
        return Norm(norm.weight, saved=saved, eps=norm.eps)
    return Norm(norm.weight, norm.bias, norm.running_mean, norm.running_var, saved, norm.eps)


def statistics(
    p: Planner, x: Tensor, rows: Any, norm: BatchNorm, saved: Tensor, known: Tensor | None = None,
    added: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """saved [4, C] <- the moments of x, which is rows.strides[1], and the bias; the running statistics move on.

    known: the partial moments that whatever wrote x has left. added: a residual (rows.strides[2]), and where x +
    residual goes (rows.strides[0]): the moments are those of the sum.
    """
    from ..kernels.finalize import Partial, launch_bn_finalize
    from ..kernels.launch import last_merges
    from ..kernels.merging import launch_bn_stats_finalize
    from ..kernels.stats import launch_bn_stats

    running = running_of(p, norm)
    if known is None and added is None and last_merges(x, rows, p.chip):
        launch_bn_stats_finalize(p, x, norm.bias, saved, running, norm.eps, rows)
        return
    if known is not None:
        partial = Partial(known)
    else:
        residual, total = added or (None, None)
        values, tile = launch_bn_stats(p, x, residual, total, rows)
        first, which = (x, 1) if total is None else (total, 0)
        partial = Partial(values, first, rows, which, tile)
    launch_bn_finalize(p, partial, norm.bias, saved, running, norm.eps)


# --- backward ----------------------------------------------------------------------------------------------------


def _backward(
    p: Planner, dy: Tensor, kept: Kept, bits: Tensor, how: How, needs: Needs, skip: Skip,
    residual: Tensor | None, addend: Tensor | None,
) -> tuple:  # fmt: skip
    from ..kernels.backward import launch_bn_backward
    from ..kernels.finalize import launch_bn_grad_finalize
    from ..kernels.grad import Operand
    from ..kernels.grad_apply import launch_bn_grad_apply
    from ..kernels.grad_reduce import Skip as Second
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

    (input, weight, saved), size = kept, kept.input.element_size()
    layout, activation = like_output(input), parse(how.activation)
    dx: Any = p.like(layout) if needs.input else None
    dweight = p.like(weight) if needs.weight and weight is not None else None
    dbias = None if needs.bias_dtype is None else p.empty((saved.shape[1],), needs.bias_dtype)
    reduces = needs.weight or dbias is not None or (how.training and needs.input)
    if skip.gradient is not None and not reduces:
        dy, skip = skips.added(p, dy, skip, layout), Skip()
    # A pre-activation unit has an addend, whatever ends in a sum has a residual: never both.
    rows, (input, dy, *others) = p.common_rows(
        layout, input, dy, *[each for each in (residual, addend) if each is not None]
    )
    if residual is not None:
        residual = others[0]
    elif addend is not None:
        addend = others[0]
    mask = bits if bits.numel() else None
    norm, strides = Norm(weight, saved=saved), skip.stride
    # Where z is computed again beside a third tensor.
    is_smooth = how.activation is not None and not is_piecewise(how.activation)
    has_skip = skip.gradient is not None
    share = DUAL_SHARE if residual is not None or (is_smooth and has_skip) else 1
    # With a second gradient the first pass writes dz, which is the residual's gradient, and the other pass reads it.
    dz = p.like(layout) if has_skip and (needs.input or needs.residual) else None
    dresidual: Any = None
    if dz is not None and needs.residual and needs.residual_dtype == dz.dtype:
        dresidual, writes_residual = dz, False
    else:
        writes_residual = needs.residual
        dresidual = p.like(layout, needs.residual_dtype) if needs.residual else None
    written = dresidual if writes_residual else None
    asked = (dx, dresidual, dweight, dbias), (*[input.dtype] * 2, *[saved.dtype] * 2)
    results = tuple(dtype if t is None else t for t, dtype in zip(*asked, strict=True))
    walked: Any = skips.walked(p, skip, rows, layout, dz)
    whole = None
    again = mask is None and how.activation is not None
    if how.training and needs.input and skips.is_alike(walked, rows, again):
        whole = choose_whole(rows, size, BACKWARD_PASS, p.chip)
    if whole is not None:
        main = Operand(input, norm, gradient=dx, dweight=dweight, dbias=dbias)
        other = Operand(residual, gradient=written)
        launch_bn_backward(p, dy, main, other, mask, addend, walked, whole, activation, is_smooth)
        return results
    coefficients = None
    # With running statistics dx waits for no sum: the pass that reduces writes everything.
    is_whole = reduces and not how.training and not has_skip and addend is None
    if reduces:
        is_crowded = strides is not None or (is_smooth and residual is not None)
        # Beside the positions of a strided gradient there is room for half a tile.
        part = DUAL_SHARE if strides is not None else share
        tile = choose_tile(rows, size, CROWDED if is_crowded else REDUCING, p.chip, part)
        partial = p.empty((tile.programs, 2, tile.width), partial_dtype(input.dtype))
        second: Any = Second(None, None, None, written)
        if not is_whole:
            second = walked
        main = Operand(input, norm, partial)
        launch_bn_grad_reduce(
            p, dy, main, Operand(residual), mask, second, dx if is_whole else None, rows, tile, activation,
        )  # fmt: skip
        if how.training and dx is not None:
            coefficients = p.empty((2, rows.channels), saved.dtype)
        launch_bn_grad_finalize(p, main, coefficients, dweight, dbias, rows, tile)
    if dz is not None:
        rows, (input, dy) = p.common_rows(layout, input, dz)
        mask = residual = None
        activation = parse(None)
    if (dx is not None or written is not None) and not is_whole:
        main = Operand(input, norm, None, coefficients, dx)
        tile = choose_tile(rows, size, GRAD_APPLYING, p.chip, share)
        other = Operand(residual, gradient=written)
        launch_bn_grad_apply(p, dy, main, other, mask, addend, rows, tile, activation)
    return results


# --- the same in plain PyTorch -----------------------------------------------------------------------------------


def compose(input: Tensor, residual: Tensor | None, norm: BatchNorm, how: How) -> Tensor:
    """The composition, with the add and the activation in place on the BatchNorm's output."""
    return reference.batch_norm_act(
        input, norm.running_mean, norm.running_var, norm.weight, norm.bias, how.training, norm.momentum, norm.eps,
        residual=residual, activation=how.activation,
    )  # fmt: skip


def plain_forward(
    input: Tensor, residual: Tensor | None, norm: BatchNorm, how: How, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Whatever it is given, `saved` and `bits` are those of the kernels."""
    saved = empty_saved(input, how.training or save)
    if saved.numel():
        wide = saved.dtype
        if how.training:
            dims = [0, *range(2, input.dim())]
            var, mean = torch.var_mean(input.to(wide), dims, correction=0)
        else:
            running: Any = norm
            var, mean = running.running_var.to(wide), running.running_mean.to(wide)
        zero = torch.zeros_like(mean)
        shift = zero if norm.bias is None else norm.bias.to(wide)
        saved.copy_(torch.stack([mean, zero, (var + norm.eps).rsqrt(), shift]))
    result = compose(input, residual, norm, How(how.training, None))
    output = like_output(input).copy_(activate(result, how.activation))
    if residual is not None and has_bits(how.activation, save):
        # Laid out as the output, which the kernels are.
        mask = like_output(input, torch.bool).copy_(activations.passes(result, how.activation))
        return output, saved, pack(mask)
    return output, saved, empty_bits(input, False)


def plain_backward(
    dy: Tensor, kept: Kept, bits: Tensor, how: How, needs: Needs, skip: Skip,
    residual: Tensor | None, addend: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    input, weight, saved = kept
    dz = skips.add(dy, skip).to(saved.dtype)
    if how.activation is not None and is_piecewise(how.activation):
        mask = _gradient_mask(kept, bits, how.activation)
        dz = keep_passing(dz, mask, how.activation)
    elif how.activation is not None:
        z = normalized(kept)
        dz = activations.gradient(dz, z if residual is None else z + residual, how.activation)
    dims = [0, *range(2, input.dim())]
    deviations = centered(kept)
    dbias, dot = dz.sum(dims), (dz * deviations).sum(dims)
    invstd = saved[2]
    scale = invstd if weight is None else invstd * weight
    dx, dresidual, dweight, dbias_out = fake_backward(dy, kept, bits, how, needs, skip, None, None)
    if needs.input:
        gradient = dz
        if how.training:
            n = input.numel() // input.shape[1]
            slope = invstd * invstd * dot / n
            gradient = dz - per_channel(dbias / n, input) - deviations * per_channel(slope, input)
        gradient = gradient * per_channel(scale, input)
        dx.copy_(gradient if addend is None else gradient + addend)
    if needs.residual:
        dresidual.copy_(dz)
    if needs.weight and weight is not None:
        dweight.copy_(dot * invstd)
    if needs.bias_dtype is not None:
        dbias_out.copy_(dbias)
    return dx, dresidual, dweight, dbias_out


def _gradient_mask(kept: Kept, bits: Tensor, activation: str) -> Tensor:
    """Where a piecewise activation lets the gradient pass, as a boolean tensor; in plain PyTorch on every backend."""
    mask = like_output(kept.input, torch.bool)
    if bits.numel():
        return unpack(bits, mask)
    return mask.copy_(activations.passes(normalized(kept), activation))


def normalized(kept: Kept) -> Tensor:
    """What the activation was given, but for a residual."""
    input, weight, saved = kept
    scale = saved[2] if weight is None else saved[2] * weight
    return centered(kept) * per_channel(scale, input) + per_channel(saved[3], input)


def centered(kept: Kept) -> Tensor:
    input, _, saved = kept
    return (input - per_channel(saved[0], input)) - per_channel(saved[1], input)


# --- shapes ------------------------------------------------------------------------------------------------------


def _fake_forward(
    input: Tensor, residual: Tensor | None, norm: BatchNorm, how: How, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    output = like_output(input)
    bits = empty_bits(output, residual is not None and has_bits(how.activation, save))
    return output, empty_saved(input, how.training or save), bits


def fake_backward(
    dy: Tensor, kept: Kept, bits: Tensor, how: How, needs: Needs, skip: Skip,
    residual: Tensor | None, addend: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Empty results of the backward."""
    input, weight, saved = kept
    return (
        like_output(input) if needs.input else input.new_empty(0),
        like_output(input, needs.residual_dtype) if needs.residual else input.new_empty(0),
        empty_weight_gradient(weight, needs.weight, saved),
        empty_bias_gradient(saved, needs.bias_dtype),
    )


def empty_weight_gradient(weight: Tensor | None, needed: bool, saved: Tensor) -> Tensor:
    """Room for the gradient of a weight, or a tensor of nothing."""
    return torch.empty_like(weight) if needed and weight is not None else saved.new_empty(0)


def empty_bias_gradient(saved: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Room for the gradient of a bias, or a tensor of nothing."""
    return saved.new_empty(0) if dtype is None else saved.new_empty(saved.shape[1], dtype=dtype)


# --- operators ---------------------------------------------------------------------------------------------------

NORM: Any = names(
    BatchNorm, "weight", "bias", "running_mean", "running_var", "momentum", "eps", None
)
_HOW: Any = names(How, "training", "activation")
_KEPT: Any = names(Kept, "input", "weight", "saved")
_NEEDS: Any = names(
    Needs, "need_input", "need_residual", "need_weight", "bias_dtype", "residual_dtype"
)

FORWARD = Operator(
    FORWARD_SCHEMA,
    ("input", "residual", NORM, _HOW, "save"),
    recipe=_forward,
    plain=plain_forward,
    fake=_fake_forward,
    folds={"input": 1, "residual": 1, "weight": 0, "bias": 0},
    unfolds=(1, 1, None),
)
BACKWARD = Operator(
    BACKWARD_SCHEMA,
    ("dy", _KEPT, "bits", _HOW, _NEEDS, names(Skip, "skip", "skip_stride"), "residual", "addend"),
    recipe=_backward,
    plain=plain_backward,
    fake=fake_backward,
    folds={"dy": 1, "input": 1, "weight": 0, "saved": 1, "skip": 1, "residual": 1, "addend": 1},
    unfolds=(1, 1, 0, 0),
)
gradient_mask = Operator(
    MASK_SCHEMA,
    (_KEPT, "bits", "activation"),
    recipe=None,
    plain=_gradient_mask,
    fake=lambda kept, bits, activation: like_output(kept.input, torch.bool),
    folds={"input": 1, "weight": 0, "saved": 1},
    unfolds=(1,),
)


# --- second derivatives ------------------------------------------------------------------------------------------


def differentiable(
    dy: Tensor, kept: Kept, bits: Tensor, residual: Tensor | None, bias: Tensor | None, context: Any, needs: tuple
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of input, residual, weight and bias as a graph (see `graph`); bias: `bias_in_graph`; context: eps,
    how, and the dtypes of bias and residual."""
    training, activation = context.how
    dz = dy
    if activation is not None and is_piecewise(activation):
        with torch.no_grad():
            mask = gradient_mask(kept, bits, activation)
        dz = passing(dy, mask, activation, (kept.input, kept.weight, bias, residual))
    elif activation is not None:
        y = normalized_graph(kept, bias, training, context.eps[0])
        dz = smooth(dy, y if residual is None else y + residual.to(y.dtype), activation)
    dresidual = dz.to(context.residual_dtype) if needs[1] else None
    dx, dweight, dbias = norm_gradients(dz, kept, training, context.eps[0], (needs[0], *needs[2:4]))
    dbias = None if dbias is None else dbias.to(context.bias_dtypes[0])
    return [dx, dresidual, dweight, dbias]


# --- autograd ----------------------------------------------------------------------------------------------------


def _backward_groups(ctx: Any, dy: Tensor, tensors: tuple, needs: tuple, skip: Skip) -> tuple:
    input, weight, residual, saved, bits = tensors
    # Without an activation dz is dy itself, which no kernel need write again.
    passes_on = needs[1] and ctx.how.activation is None and skip.gradient is None
    wanted = Needs(
        needs[0], needs[1] and not passes_on, needs[2], ctx.bias_dtypes[0] if needs[3] else None,
        ctx.residual_dtype,
    )  # fmt: skip
    return dy, Kept(input, weight, saved), bits, ctx.how, wanted, skip, residual, None


def _gradients(ctx: Any, dy: Tensor | None, tensors: tuple, needs: tuple, skip: Skip) -> Gradients:
    """Of input, residual, weight and bias, from what `_reads` and the forward kept."""
    input, weight, residual, saved, bits, *bias = tensors
    if dy is None:
        dy, skip = skips.spread(skip, input), Skip()
    known = bias[0] if bias else None
    if needs_graph(dy, input, weight, residual, known, ctx.biases[0]):
        kept = Kept(input, weight, saved)
        as_it_was = bias_in_graph(known, ctx.biases[0], saved, ctx.how.activation)
        return tuple(differentiable(dy, kept, bits, residual, as_it_was, ctx, needs))
    groups = _backward_groups(ctx, dy, tensors[:5], needs, skip)
    found = list(BACKWARD(*groups))
    if needs[1] and not groups[4].residual:
        found[1] = dy.to(ctx.residual_dtype)
    return tuple(each if need else None for each, need in zip(found, needs, strict=True))


def _reads(how: How) -> tuple[int | None, ...]:
    recomputes = how.activation is not None and not is_piecewise(how.activation)
    return 0, 2, 1 if recomputes else None


def _check(input: Tensor, residual: Tensor | None, n: BatchNorm, how: How) -> None:
    check_batch_norm_act(
        "batch_norm_act", input, n.running_mean, n.running_var, n.weight, n.bias, how.training, n.eps, residual,
        how.activation,
    )  # fmt: skip


TAIL = Tail(
    FORWARD,
    BACKWARD,
    TailFunction,
    how=3,
    check=_check,
    compose=compose,
    reads=_reads,
    backward_groups=_backward_groups,
    gradients=_gradients,
    forks=True,
    of=(0, 1, 2, 3),
)


class BatchNormAct(torch.autograd.Function):
    """The tail for torch.func and torch.compile: the arguments of the operator, one by one.

    The bias is saved as well: the double backward of a smooth activation goes through it.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*flat: Any) -> tuple[Tensor, Tensor, Tensor]:
        return FORWARD.op(*flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        input, residual, norm, how, _ = FORWARD.grouped(inputs)
        _, saved, bits = output
        ctx.mark_non_differentiable(saved, bits)
        ctx.set_materialize_grads(False)
        inputs = (input, residual, norm.weight)
        read = [None if k is None else inputs[k] for k in _reads(how)]
        ctx.save_for_backward(*read, saved, bits, norm.bias)
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.bias_dtypes = (None if norm.bias is None else norm.bias.dtype,)
        ctx.how, ctx.eps, ctx.biases = how, (norm.eps,), (None,)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> Gradients:
        needs = ctx.needs_input_grad[:4]
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        found = _gradients(ctx, dy, ctx.saved_tensors, needs, Skip())
        return *found, *(None,) * (len(ctx.needs_input_grad) - 4)


def batch_norm_act(input: Tensor, residual: Tensor | None, norm: BatchNorm, how: How) -> Tensor:
    """`fusedres.functional.batch_norm_act` on checked arguments, by the kernels."""
    if not is_eager():
        return BatchNormAct.apply(*FORWARD.flat((input, residual, norm, how, True)))[0]
    groups = (input, residual, norm, how, True)
    if is_quiet():
        key = input.shape, input.dtype, how, torch.is_grad_enabled()
        output = straight(TAIL, key, groups)
        if output is not None:
            return output
    return through_operators(TAIL, groups)
