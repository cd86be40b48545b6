"""The tail of a block whose shortcut is projected, `act(bn(input) + bn'(residual))`: operators and autograd.

    fusedres::dual_batch_norm_act           input, residual, ... -> output, saved, residual_saved [4, C], bits
                                            (residual_moments: those of the residual, where its producer left them)
    fusedres::dual_batch_norm_act_backward  dy, input, residual, ... -> a gradient for each of the six that have one

`needs` says which of input, residual, weight and residual weight get a gradient; a bias gets one in its dtype, or none.
The kernels are those of `batch_norm_act`, told that the residual has a BatchNorm of its own. With dz = dy * act'(z),
each of the two gets the derivative that `autograd` states, from the same dz.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import fork, operators, reference
from .activations import activate, gradient, is_piecewise, keep_passing, parse
from .autograd import bias_in_graph, graph_gradients, normalized_graph
from .batching import fold, fold_buffers, unfold, write_back
from .checks import check_batch_norm_act, number
from .dispatch import goes_to_kernels, is_eager, resolve, wants_triton
from .kernels.layout import bits_layout, row_map, row_map_of
from .layouts import like_output
from .operators import LIBRARY, accumulate_dtype

LIBRARY.define(
    "dual_batch_norm_act(Tensor input, Tensor residual, Tensor? weight, Tensor? bias, Tensor? residual_weight, "
    "Tensor? residual_bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? residual_running_mean, "
    "Tensor(d!)? residual_running_var, bool training, float momentum, float eps, float residual_momentum, "
    "float residual_eps, str? activation, bool save, Tensor? residual_moments=None) "
    "-> (Tensor output, Tensor saved, Tensor residual_saved, Tensor bits)"
)
LIBRARY.define(
    "dual_batch_norm_act_backward(Tensor dy, Tensor input, Tensor residual, Tensor? weight, Tensor? residual_weight, "
    "Tensor saved, Tensor residual_saved, Tensor bits, bool training, str? activation, bool[] needs, "
    "ScalarType? bias_dtype, ScalarType? residual_bias_dtype, Tensor? skip=None, int[]? skip_stride=None) "
    "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias, Tensor dresidual_weight, Tensor dresidual_bias)"
)
forward_operator = torch.ops.fusedres.dual_batch_norm_act.default
backward_operator = torch.ops.fusedres.dual_batch_norm_act_backward.default


def _forward(
    input, residual, weight, bias, residual_weight, residual_bias, mean, var, residual_mean, residual_var,
    training, momentum, eps, residual_momentum, residual_eps, activation, save,
    residual_moments=None,
):  # fmt: skip
    if resolve(input.device, input.dtype)[0] != "triton":
        return _forward_aten(
            input, residual, weight, bias, residual_weight, residual_bias, mean, var, residual_mean, residual_var,
            training, momentum, eps, residual_momentum, residual_eps, activation, save,
        )  # fmt: skip
    k = operators._kernels()
    dense = operators._dense
    output = like_output(input)
    rows, (input, residual) = operators._common_rows(output, input, residual)
    wide = accumulate_dtype(input.dtype)
    keeps = training or save
    saved, residual_saved = (
        input.new_empty((4, rows.channels) if keeps else (0,), dtype=wide) for _ in range(2)
    )
    pack_channels, n_bytes, bits_stride = bits_layout(rows)
    has_bits = save and activation is not None and is_piecewise(activation)
    bits = input.new_empty((n_bytes if has_bits else 0,), dtype=torch.uint8)
    bias, residual_bias = dense(bias), dense(residual_bias)
    size, offset = input.element_size(), k.offset[rows.needs_int64]
    whole = (
        k.whole(rows, size, k.FORWARD, k.chip()) if training and residual_moments is None else None
    )
    if whole is not None:
        buffers = mean, var, residual_mean, residual_var
        mean, var, residual_mean, residual_var = map(dense, buffers)
        norm = k.residual_norm(
            dense(residual_weight),
            residual_bias,
            residual_mean,
            residual_var,
            residual_saved,
            residual_eps,
        )
        k.forward(
            input, residual, dense(weight), bias, mean, var, saved, norm, output, bits if has_bits else None,
            rows, bits_stride, pack_channels, whole, momentum, eps, residual_momentum, *parse(activation), offset,
        )  # fmt: skip
        operators._write_back(buffers, (mean, var, residual_mean, residual_var))
        return output, saved, residual_saved, bits
    if training:
        operators._statistics(k, input, rows, bias, saved, (mean, var), momentum, eps)
        alone = row_map_of(output, residual) or rows
        operators._statistics(
            k, residual, alone, residual_bias, residual_saved, (residual_mean, residual_var),
            residual_momentum, residual_eps, residual_moments,
        )  # fmt: skip
    norm = k.residual_norm(
        dense(residual_weight), None if training else residual_bias,
        None if training else dense(residual_mean), None if training else dense(residual_var),
        residual_saved if keeps else None, residual_eps,
    )  # fmt: skip
    k.apply(
        input, residual, dense(weight), None if training else bias,
        None if training else dense(mean), None if training else dense(var),
        saved if keeps else None, norm, output, bits if has_bits else None,
        rows, bits_stride, pack_channels, k.tile(rows, size, k.APPLYING, k.chip(), k.DUAL_SHARE),
        eps, *parse(activation), k.dtype[wide], offset,
    )  # fmt: skip
    return output, saved, residual_saved, bits


def _backward(
    dy, input, residual, weight, residual_weight, saved, residual_saved, bits,
    training, activation, needs, bias_dtype, residual_bias_dtype, skip=None, skip_stride=None,
):  # fmt: skip
    if resolve(input.device, input.dtype)[0] != "triton":
        if skip is not None:
            dy = operators.add_skip(dy, skip, skip_stride)
        return _backward_aten(
            dy, input, residual, weight, residual_weight, saved, residual_saved, bits,
            training, activation, needs, bias_dtype, residual_bias_dtype,
        )  # fmt: skip
    k = operators._kernels()
    chip, size = k.chip(), input.element_size()
    dx = like_output(input)
    bias_dtypes = bias_dtype, residual_bias_dtype
    reduces = any(needs[2:]) or bias_dtypes != (None, None) or (training and any(needs[:2]))
    if skip is not None and not reduces:
        dy, skip = operators.add_skip(dy, skip, skip_stride), None
    dresidual = torch.empty_like(dx, dtype=residual.dtype)
    rows, (input, dy, residual) = operators._common_rows(dx, input, dy, residual)
    channels, offset = rows.channels, k.offset[rows.needs_int64]
    pack_channels, _, bits_stride = bits_layout(rows)
    mask = bits if bits.numel() else None
    vectors = _empty_vectors(weight, residual_weight, saved, needs, bias_dtypes)
    weight, residual_weight = operators._dense(weight), operators._dense(residual_weight)
    both: list[Tensor | None] = [None, None]
    dz = torch.empty_like(dx) if skip is not None and any(needs[:2]) else None
    whole = k.whole(rows, size, k.BACKWARD, chip) if training and any(needs[:2]) else None
    if whole is not None:
        given = (needs[2], bias_dtype is not None, needs[3], residual_bias_dtype is not None)
        dweight, dbias, dresidual_weight, dresidual_bias = (
            vector if wanted else None for vector, wanted in zip(vectors, given, strict=True)
        )
        k.backward(
            dy, input, mask, weight, saved, dweight, dbias, dx if needs[0] else None, dresidual if needs[1] else None,
            residual, residual_weight, residual_saved, dresidual_weight, dresidual_bias, None,
            operators._skip(k, rows, dx, skip, skip_stride, dz), rows, bits_stride, pack_channels, whole,
            *parse(activation), k.dtype[saved.dtype], offset,
        )  # fmt: skip
        none = dx.new_empty(0)
        return (dx if needs[0] else none, dresidual if needs[1] else none, *vectors)
    if reduces:
        kind, share = (
            (k.REDUCING, k.DUAL_SHARE) if skip_stride is None else (k.CROWDED, 2 * k.DUAL_SHARE)
        )
        tile = k.tile(rows, size, kind, chip, share)
        shape = (tile.programs, 2, tile.width)
        partials = [
            saved.new_empty(shape, dtype=operators._partial_dtype(input.dtype)) for _ in range(2)
        ]
        k.grad_reduce(
            dy, input, mask, weight, saved, partials[0],
            residual, residual_weight, residual_saved, partials[1],
            operators._skip(k, rows, dx, skip, skip_stride, dz), None,
            rows, bits_stride, pack_channels, tile, *parse(activation), k.dtype[saved.dtype], offset,
        )  # fmt: skip
        if training:
            both = [saved.new_empty((2, channels)) if need else None for need in needs[:2]]
        for i, (moments, gamma) in enumerate(((saved, weight), (residual_saved, residual_weight))):
            k.grad_finalize(
                partials[i], moments, gamma, both[i],
                vectors[2 * i] if needs[2 + i] else None,
                None if bias_dtypes[i] is None else vectors[2 * i + 1], rows, tile, k.dtype[saved.dtype],
            )  # fmt: skip
    if dz is not None:
        rows, (input, dy, residual) = operators._common_rows(dx, input, dz, residual)
        mask = activation = None
    if any(needs[:2]):
        k.grad_apply(
            dy, input, mask, weight, saved, both[0],
            dx if needs[0] else None, dresidual if needs[1] else None,
            residual, residual_weight, residual_saved, both[1], None,
            rows, bits_stride, pack_channels, k.tile(rows, size, k.GRAD_APPLYING, chip, k.DUAL_SHARE),
            *parse(activation), k.dtype[saved.dtype], offset,
        )  # fmt: skip
    none = dx.new_empty(0)
    return (dx if needs[0] else none, dresidual if needs[1] else none, *vectors)


def _empty_vectors(weight, residual_weight, saved, needs, bias_dtypes) -> list[Tensor]:
    """The gradients of weight, bias, residual_weight and residual_bias."""
    found = []
    for vector, need, dtype in zip((weight, residual_weight), needs[2:], bias_dtypes, strict=True):
        found.append(operators._empty_gradient(vector, need, saved))
        found.append(operators._empty_bias_gradient(saved, dtype))
    return found


# --- the same in plain PyTorch -----------------------------------------------------------------------------------


def compose(
    input, residual, weight, bias, residual_weight, residual_bias, mean, var, residual_mean, residual_var,
    training, momentum, eps, residual_momentum, residual_eps, activation,
) -> Tensor:  # fmt: skip
    """The composition, with the add and the activation in place on the first BatchNorm's output."""
    other = reference.batch_norm_act(
        residual, residual_mean, residual_var, residual_weight, residual_bias,
        training, residual_momentum, residual_eps, activation=None,
    )  # fmt: skip
    return reference.batch_norm_act(
        input, mean, var, weight, bias, training, momentum, eps, residual=other, activation=activation
    )  # fmt: skip


def _forward_aten(
    input, residual, weight, bias, residual_weight, residual_bias, mean, var, residual_mean, residual_var,
    training, momentum, eps, residual_momentum, residual_eps, activation, save,
):  # fmt: skip
    other, residual_saved, _ = operators._batch_norm_act_aten(
        residual, None, residual_weight, residual_bias, residual_mean, residual_var,
        training, residual_momentum, residual_eps, None, save,
    )  # fmt: skip
    output, saved, bits = operators._batch_norm_act_aten(
        input, other, weight, bias, mean, var, training, momentum, eps, activation, save
    )  # fmt: skip
    wide = accumulate_dtype(input.dtype)
    return output, saved, residual_saved.to(wide), bits


def _backward_aten(
    dy, input, residual, weight, residual_weight, saved, residual_saved, bits,
    training, activation, needs, bias_dtype, residual_bias_dtype,
):  # fmt: skip
    dz = dy.to(saved.dtype)
    if activation is not None and is_piecewise(activation):
        mask = operators.unpack(bits, like_output(input, torch.bool))
        dz = keep_passing(dz, mask, activation)
    elif activation is not None:
        z = operators._normalized(input, weight, saved)
        z = z + operators._normalized(residual, residual_weight, residual_saved)
        dz = gradient(dz, z, activation)
    none = bits.new_empty(0)
    found = []
    for k, (x, w, moments, dtype) in enumerate(
        (
            (input, weight, saved, bias_dtype),
            (residual, residual_weight, residual_saved, residual_bias_dtype),
        )
    ):
        dx, _, dweight, dbias = operators._batch_norm_act_backward_aten(
            dz, x, w, moments, none, training, None, None, needs[k], False, needs[2 + k], dtype,
        )  # fmt: skip
        if needs[k]:  # in the layout of the input, as the kernels write it
            dx = like_output(input, x.dtype).copy_(dx)
        found.append((dx, dweight, dbias))
    (dx, dweight, dbias), (dresidual, dresidual_weight, dresidual_bias) = found
    return dx, dresidual, dweight, dbias, dresidual_weight, dresidual_bias


# --- registration ------------------------------------------------------------------------------------------------

for _name, _implementation in (
    ("dual_batch_norm_act", _forward),
    ("dual_batch_norm_act_backward", _backward),
):
    LIBRARY.impl(_name, _implementation, "CPU")
    LIBRARY.impl(_name, operators._on_its_device(_implementation), "CUDA")


@torch.library.register_fake("fusedres::dual_batch_norm_act", lib=LIBRARY)
def _(
    input, residual, weight, bias, residual_weight, residual_bias, mean, var, residual_mean, residual_var,
    training, momentum, eps, residual_momentum, residual_eps, activation, save,
    residual_moments=None,
):  # fmt: skip
    output = like_output(input)
    n_bytes: Any = 0
    if save and activation is not None and is_piecewise(activation):
        # Past the cache: while shapes are symbols they cannot be hashed.
        n_bytes = bits_layout(row_map.__wrapped__(tuple(output.shape), tuple(output.stride())))[1]
    shape = (4, input.shape[1]) if training or save else (0,)
    saved, residual_saved = (
        input.new_empty(shape, dtype=accumulate_dtype(input.dtype)) for _ in range(2)
    )
    return output, saved, residual_saved, input.new_empty((n_bytes,), dtype=torch.uint8)


@torch.library.register_fake("fusedres::dual_batch_norm_act_backward", lib=LIBRARY)
def _(
    dy, input, residual, weight, residual_weight, saved, residual_saved, bits,
    training, activation, needs, bias_dtype, residual_bias_dtype, skip=None, skip_stride=None,
):  # fmt: skip
    none = input.new_empty(0)
    return (
        like_output(input) if needs[0] else none,
        like_output(input, residual.dtype) if needs[1] else input.new_empty(0),
        *_empty_vectors(weight, residual_weight, saved, needs, (bias_dtype, residual_bias_dtype)),
    )


# --- vmap: the mapped dimension joins the channels ----------------------------------------------------------------


def _vmap_forward(info: Any, in_dims: tuple, *args: Any) -> tuple:
    size = info.batch_size
    positions = (1, 1, 0, 0, 0, 0)
    tensors = [
        fold(t, d, size, p) for t, d, p in zip(args[:6], in_dims[:6], positions, strict=True)
    ]
    buffers = fold_buffers("dual_batch_norm_act", args[6:10], in_dims[6:10], size, args[10])
    output, saved, residual_saved, bits = forward_operator(*tensors, *buffers, *args[10:])
    if args[10]:
        write_back(args[6:10], in_dims[6:10], buffers, size)
    found = [unfold(t, size, 1) for t in (output, saved, residual_saved)]
    return (*(t for t, _ in found), bits), (*(d for _, d in found), None)


def _vmap_backward(info: Any, in_dims: tuple, *args: Any) -> tuple:
    size = info.batch_size
    if in_dims[5] is None:
        # The forward was not mapped (only gradients are, as in a Jacobian), so the bits are not of a folded tensor.
        calls = [
            backward_operator(
                *(t if d is None else t.select(d, k) for t, d in zip(args[:8], in_dims[:8], strict=True)), *args[8:]
            )
            for k in range(size)
        ]  # fmt: skip
        return tuple(torch.stack(outputs) for outputs in zip(*calls, strict=True)), (0,) * 6
    positions = (1, 1, 1, 0, 0, 1, 1)
    tensors = [fold(t, d, size, p) for t, d, p in zip(args[:7], in_dims[:7], positions, strict=True)]  # fmt: skip
    outputs = backward_operator(*tensors, *args[7:])
    found = [unfold(t, size, p) for t, p in zip(outputs, (1, 1, 0, 0, 0, 0), strict=True)]
    return tuple(t for t, _ in found), tuple(d for _, d in found)


torch.library.register_vmap("fusedres::dual_batch_norm_act", _vmap_forward, lib=LIBRARY)
torch.library.register_vmap("fusedres::dual_batch_norm_act_backward", _vmap_backward, lib=LIBRARY)


# --- autograd ----------------------------------------------------------------------------------------------------


class DualBatchNormAct(torch.autograd.Function):
    """Saved for backward: both inputs, their weights, four values a channel each, one bit an element; the biases as in
    `BatchNormAct`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input, residual, weight, bias, residual_weight, residual_bias, mean, var, residual_mean, residual_var,
        training, momentum, eps, residual_momentum, residual_eps, activation, save,
        residual_moments=None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return forward_operator(
            input, residual, weight, bias, residual_weight, residual_bias, mean, var, residual_mean, residual_var,
            training, momentum, eps, residual_momentum, residual_eps, activation, save, residual_moments,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _remember(ctx, inputs, output, inputs[3], inputs[5])

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dy, None, None)


def _remember(
    ctx: Any, inputs: tuple, output: tuple, bias: Tensor | None, residual_bias: Tensor | None
) -> None:
    """What the backward needs; the biases, where they are to be saved as they are."""
    input, residual, weight, own_bias, residual_weight, own_residual_bias = inputs[:6]
    _, saved, residual_saved, bits = output
    ctx.mark_non_differentiable(saved, residual_saved, bits)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        input, residual, weight, residual_weight, saved, residual_saved, bits, bias, residual_bias
    )
    ctx.training, ctx.activation = inputs[10], inputs[15]
    ctx.eps = inputs[12], inputs[14]
    ctx.bias_dtypes = [None if b is None else b.dtype for b in (own_bias, own_residual_bias)]


def _gradients(
    ctx: Any, dy: Any, skip: Tensor | None, stride: list[int] | None
) -> tuple[Tensor | None, ...]:
    """`skip`, `stride`: a second gradient of the output, as `fork.take` gives it."""
    rest = (None,) * 12
    if dy is None and skip is None:
        return (*[None] * 6, *rest)
    needs = list(ctx.needs_input_grad[:6])
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return (*_differentiable_backward(ctx, dy, needs), *rest)
    saved = ctx.saved_tensors[:7]
    if dy is None and skip is not None:
        dy, skip = operators.spread_skip(skip, stride, saved[0]), None
    dtypes = [ctx.bias_dtypes[k] if needs[3 + 2 * k] else None for k in (0, 1)]
    gradients = backward_operator(
        dy, *saved, ctx.training, ctx.activation, [needs[k] for k in (0, 1, 2, 4)], *dtypes, skip, stride
    )  # fmt: skip
    return (*(g if need else None for g, need in zip(gradients, needs, strict=True)), *rest)


class _Eager(torch.autograd.Function):
    """The same without `setup_context`, which costs an `inspect.signature` at each call; it takes part in the fork of a
    residual."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = DualBatchNormAct.forward(*inputs)
        _remember(ctx, inputs, output, None, None)
        ctx.biases = inputs[3], inputs[5]
        fork.begin(ctx, inputs[1])
        return output

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        dx, dresidual, *rest = _gradients(ctx, dy, *fork.take(ctx))
        return dx, fork.hand_over(ctx, 1, dresidual), *rest


fork.takes_gradients(_Eager)


def _differentiable_backward(ctx: Any, dy: Tensor, needs: list[bool]) -> list[Tensor | None]:
    """For `create_graph=True`: as that of `autograd`, for both BatchNorms."""
    input, residual, weight, residual_weight, saved, residual_saved, bits, *biases = (
        ctx.saved_tensors
    )
    activation, dz = ctx.activation, dy
    kept = getattr(ctx, "biases", (None, None))
    bias, residual_bias = (
        bias_in_graph(biases[k], kept[k], (saved, residual_saved)[k], activation) for k in (0, 1)
    )
    y, leaves = normalized_graph(input, weight, bias, saved, ctx.training, ctx.eps[0])
    other, more = normalized_graph(
        residual, residual_weight, residual_bias, residual_saved, ctx.training, ctx.eps[1]
    )
    if activation is not None and is_piecewise(activation):
        with torch.no_grad():
            mask = operators.gradient_mask(input, weight, saved, bits, activation)
        dz = keep_passing(dy, mask, activation)
    y = (
        y + other
        if activation is None or is_piecewise(activation)
        else activate(y + other, activation)
    )
    order = (0, 2, 3, 1, 4, 5)
    found = graph_gradients(y, [*leaves, *more], [needs[k] for k in order], dz)
    gradients = [found[order.index(k)] for k in range(6)]
    for k, dtype in zip((3, 5), ctx.bias_dtypes, strict=True):
        gradients[k] = None if (found_bias := gradients[k]) is None else found_bias.to(dtype)
    return gradients


def dual_batch_norm_act(*arguments: Any, moments: Tensor | None = None) -> Tensor:
    """`fusedres.functional.dual_batch_norm_act` on checked arguments, in the operator's order without `save`.

    moments: the partial moments of the residual, from whatever wrote it; its own pass over it is saved then.
    """
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments[:6])
    if not is_eager():
        return DualBatchNormAct.apply(*arguments, True, moments)[0]
    if not save:
        return forward_operator(*arguments, False, moments)[0]
    return _Eager.apply(*arguments, True, moments)[0]


def tail_of_two(
    name, input, residual, running_mean, running_var, residual_running_mean, residual_running_var,
    weight, bias, residual_weight, residual_bias, training, momentum, eps, residual_momentum, residual_eps,
    activation, moments=None,
) -> Tensor:  # fmt: skip
    """`dual_batch_norm_act` as called `name`, with the partial moments of the residual where there are some."""
    momentum, eps = number(name, "momentum", momentum), number(name, "eps", eps)
    residual_momentum = number(name, "residual_momentum", residual_momentum)
    residual_eps = number(name, "residual_eps", residual_eps)
    _check_dual(
        name, input, residual, running_mean, running_var, residual_running_mean, residual_running_var,
        weight, bias, residual_weight, residual_bias, training, eps, residual_eps, activation,
    )  # fmt: skip
    arguments = (
        input, residual, weight, bias, residual_weight, residual_bias,
        running_mean, running_var, residual_running_mean, residual_running_var,
        training, momentum, eps, residual_momentum, residual_eps, activation,
    )  # fmt: skip
    if wants_triton(input.is_cuda) and goes_to_kernels(input):
        return dual_batch_norm_act(*arguments, moments=moments)
    return compose(*arguments)


def _check_dual(
    name, input, residual, running_mean, running_var, residual_running_mean, residual_running_var,
    weight, bias, residual_weight, residual_bias, training, eps, residual_eps, activation,
) -> None:  # fmt: skip
    check_batch_norm_act(
        name, input, running_mean, running_var, weight, bias, training, eps, residual, activation
    )
    if residual is None:
        raise TypeError(
            f"{name}: residual is None, expected a torch.Tensor; without one use batch_norm_act"
        )
    check_batch_norm_act(
        f"{name}, of the residual", residual, residual_running_mean, residual_running_var, residual_weight,
        residual_bias, training, residual_eps, None, activation, "residual_eps",
    )  # fmt: skip
