"""`torch.library` operators: the contract with PyTorch (schemas, allocation, fakes), above the launchers.

    fusedres::batch_norm_act           input, ... -> output, saved [4, C] = (mean, mean_low, invstd, bias), bits
    fusedres::batch_norm_act_backward  dy, input, weight, saved, bits -> dx, dresidual, dweight, dbias
    fusedres::gradient_mask            input, weight, saved, bits -> where the gradient passes (for double backward)

The bias is in `saved`, by value, for a backward that computes z again: PyTorch's BatchNorm does not keep its bias, and
who changes it between two backward passes over one graph must not be refused here either.

`skip` is a second gradient of the output, to be added to dy, which came over a skip connection (module `fork`); with
`skip_stride` it holds every stride-th position only. An output that was not asked for (dbias, without `bias_dtype`) is
an empty tensor, so that the arity is fixed. The backward is given the residual where act' cannot be told from one bit
(`activations.SMOOTH`). Which implementation runs is decided when the operator runs, by `dispatch.resolve`; both write
the same `saved` and `bits`, so a backward may use the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import activations, reference
from .activations import is_piecewise
from .dispatch import resolve
from .kernels.layout import MASK_PIECE, RowMap, Strides, bits_layout, row_map, row_map_of
from .layouts import like_output

LIBRARY = torch.library.Library("fusedres", "DEF")
LIBRARY.define(
    "batch_norm_act(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, bool training, float momentum, float eps, str? activation, bool save) "
    "-> (Tensor output, Tensor saved, Tensor bits)"
)
LIBRARY.define(
    "batch_norm_act_backward(Tensor dy, Tensor input, Tensor? weight, Tensor saved, Tensor bits, "
    "bool training, str? activation, ScalarType? residual_dtype, bool need_input, bool need_residual, "
    "bool need_weight, ScalarType? bias_dtype, Tensor? skip=None, int[]? skip_stride=None, Tensor? residual=None, "
    "Tensor? addend=None) "
    "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)"
)
LIBRARY.define(
    "gradient_mask(Tensor input, Tensor? weight, Tensor saved, Tensor bits, str activation) -> Tensor"
)
batch_norm_act = torch.ops.fusedres.batch_norm_act.default
batch_norm_act_backward = torch.ops.fusedres.batch_norm_act_backward.default
gradient_mask = torch.ops.fusedres.gradient_mask.default


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic and of the saved statistics."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _partial_dtype(dtype: torch.dtype) -> torch.dtype:
    # A float32 mean would round off what decides the last digit of a float32 result; a 16-bit one has no such digit.
    return torch.float64 if dtype.itemsize >= 4 else torch.float32


def _needs_bits(residual: object, activation: str | None, save: bool) -> bool:
    # Without a residual the backward recomputes the mask from the input, which it reads anyway.
    return save and residual is not None and activation is not None and is_piecewise(activation)


Buffers = tuple[Tensor | None, Tensor | None]
_loaded: SimpleNamespace | None = None


def _kernels() -> SimpleNamespace:
    """The launchers; Triton is imported when the first of them is needed."""
    global _loaded
    if _loaded is None:
        import triton.language as tl

        from .kernels import (
            apply,
            backward,
            chip,
            finalize,
            forward,
            grad_apply,
            grad_reduce,
            launch,
            merging,
            projection,
            projection_grad_weight,
            stats,
        )

        _loaded = SimpleNamespace(
            forward=forward.launch_bn_forward,
            backward=backward.launch_bn_backward,
            stats=stats.launch_bn_stats,
            stats_finalize=merging.launch_bn_stats_finalize,
            counters=merging.counters,
            last_merges=launch.last_merges,
            finalize=finalize.launch_bn_finalize,
            apply=apply.launch_bn_apply,
            residual_norm=apply.ResidualNorm,
            grad_reduce=grad_reduce.launch_bn_grad_reduce,
            skip=grad_reduce.Skip,
            grad_finalize=finalize.launch_bn_grad_finalize,
            grad_apply=grad_apply.launch_bn_grad_apply,
            projection=projection.launch_projection,
            projection_grad_weight=projection_grad_weight.launch_projection_grad_weight,
            product_tile=launch.choose_product,
            grad_weight_tile=launch.choose_grad_weight,
            chip=chip.current_chip,
            tile=launch.choose_tile,
            whole=launch.choose_whole,
            FORWARD=launch.FORWARD,
            BACKWARD=launch.BACKWARD,
            DUAL_SHARE=launch.DUAL_SHARE,
            STATISTICS=launch.STATISTICS,
            REDUCING=launch.REDUCING,
            CROWDED=launch.CROWDED,
            ALONE=launch.ALONE,
            APPLYING=launch.APPLYING,
            GRAD_APPLYING=launch.GRAD_APPLYING,
            dtype={torch.float32: tl.float32, torch.float64: tl.float64},
            offset={False: tl.int32, True: tl.int64},
        )
    return _loaded


def _rows_of(tensor: Tensor) -> RowMap:
    """The index map of a dense tensor, which always has one."""
    rows = row_map_of(tensor)
    if rows is None:
        raise RuntimeError(f"no index map for strides {tensor.stride()}; please report it")
    return rows


def _common_rows(output: Tensor, *others: Tensor) -> tuple[RowMap, tuple[Tensor, ...]]:
    """The index map that `output` and the others share; what does not fit is copied into the output's layout."""
    alone = _rows_of(output)
    rows_packed = not bits_layout(alone)[0]

    def fits(rows: RowMap | None) -> bool:
        # Bits are found again only where the rows are split in the same way, if they are packed along the rows.
        return (
            rows is not None
            and rows.spread == alone.spread
            and (not rows_packed or rows.inner == alone.inner)
        )

    rows = row_map_of(output, *others)
    if not fits(rows):
        others = tuple(
            t if fits(row_map_of(output, t)) else torch.empty_like(output, dtype=t.dtype).copy_(t)
            for t in others
        )
        rows = row_map_of(output, *others)
        if not fits(rows):
            others = tuple(torch.empty_like(output, dtype=t.dtype).copy_(t) for t in others)
            rows = row_map_of(output, *others)
    if rows is None:
        raise RuntimeError(f"no common index map for strides {output.stride()}; please report it")
    return rows, others


def _batch_norm_act(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if resolve(input.device, input.dtype)[0] != "triton":
        return _batch_norm_act_aten(
            input, residual, weight, bias, running_mean, running_var,
            training, momentum, eps, activation, save,
        )  # fmt: skip
    k = _kernels()
    weight, bias = _dense(weight), _dense(bias)
    buffers = running_mean, running_var
    output = like_output(input)
    if residual is None:
        rows, (input,) = _common_rows(output, input)
    else:
        rows, (input, residual) = _common_rows(output, input, residual)
    chip = k.chip()
    channels = rows.channels
    wide = accumulate_dtype(input.dtype)
    offset = k.offset[rows.needs_int64]
    saved = input.new_empty((4, channels) if training or save else (0,), dtype=wide)
    pack_channels, n_bytes, bits_stride = bits_layout(rows)
    has_bits = _needs_bits(residual, activation, save)
    bits = input.new_empty((n_bytes if has_bits else 0,), dtype=torch.uint8)
    size = input.element_size()
    whole = k.whole(rows, size, k.FORWARD, chip) if training else None
    if whole is not None:
        mean, var = map(_dense, buffers)
        k.forward(
            input, residual, weight, bias, mean, var, saved, None, output, bits if has_bits else None,
            rows, bits_stride, pack_channels, whole, momentum, eps, 0.0, *activations.parse(activation), offset,
        )  # fmt: skip
        _write_back(buffers, (mean, var))
        return output, saved, bits
    if training:
        _statistics(k, input, rows, bias, saved, buffers, momentum, eps)
    k.apply(
        input,
        residual,
        weight,
        None if training else bias,
        None if training else _dense(running_mean),
        None if training else _dense(running_var),
        saved if training or save else None,
        None,
        output,
        bits if has_bits else None,
        rows,
        bits_stride,
        pack_channels,
        k.tile(rows, size, k.ALONE if residual is None else k.APPLYING, chip),
        eps,
        *activations.parse(activation),
        k.dtype[wide],
        offset,
    )
    return output, saved, bits


def _statistics(
    k: SimpleNamespace, x: Tensor, rows: RowMap, bias: Tensor | None, saved: Tensor, buffers: Buffers,
    momentum: float, eps: float, known: Tensor | None = None, added: Buffers = (None, None),
) -> None:  # fmt: skip
    """saved [4, C] <- the moments of x, which is rows.strides[1], and the bias; the running statistics move on.

    known: the partial moments that whatever wrote x has left. added: a residual (rows.strides[2]), and where x +
    residual goes (rows.strides[0]): the moments are those of the sum.
    """
    mean, var = _dense(buffers[0]), _dense(buffers[1])
    if known is None:
        tile = k.tile(rows, x.element_size(), k.STATISTICS, k.chip())
        partial = x.new_empty((tile.programs, 3, tile.width), dtype=_partial_dtype(x.dtype))
        residual, total = added
        offset = k.offset[rows.needs_int64]
        if total is None and k.last_merges(rows, tile):
            done = k.counters(x.device, tile.channel_blocks)
            k.stats_finalize(
                x, partial, done, bias, saved, mean, var, rows, tile, momentum, eps, offset
            )
        else:
            k.stats(x, residual, total, partial, rows, tile, offset)
            first, which = (x, 1) if total is None else (total, 0)
            k.finalize(partial, first, bias, saved, mean, var, rows, which, tile, momentum, eps)
    else:
        k.finalize(known, None, bias, saved, mean, var, None, 0, None, momentum, eps)
    _write_back(buffers, (mean, var))


def _write_back(buffers: Buffers, updated: Buffers) -> None:
    """Into buffers that the kernels were given dense copies of."""
    for buffer, dense in zip(buffers, updated, strict=True):
        if buffer is not None and dense is not None and dense is not buffer:
            buffer.copy_(dense)


def _dense(vector: Tensor | None) -> Tensor | None:
    """The kernels walk a per-channel vector without strides."""
    return vector if vector is None or vector.is_contiguous() else vector.contiguous()


def _empty_gradient(vector: Tensor | None, needed: bool, like: Tensor) -> Tensor:
    return torch.empty_like(vector) if needed and vector is not None else like.new_empty(0)


def _empty_bias_gradient(saved: Tensor, dtype: torch.dtype | None) -> Tensor:
    return saved.new_empty(0) if dtype is None else saved.new_empty(saved.shape[1], dtype=dtype)


def _batch_norm_act_backward(
    dy: Tensor,
    input: Tensor,
    weight: Tensor | None,
    saved: Tensor,
    bits: Tensor,
    training: bool,
    activation: str | None,
    residual_dtype: torch.dtype | None,
    need_input: bool,
    need_residual: bool,
    need_weight: bool,
    bias_dtype: torch.dtype | None,
    skip: Tensor | None = None,
    skip_stride: list[int] | None = None,
    residual: Tensor | None = None,
    addend: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if resolve(input.device, input.dtype)[0] != "triton":
        return _batch_norm_act_backward_aten(
            dy, input, weight, saved, bits, training, activation, residual_dtype,
            need_input, need_residual, need_weight, bias_dtype, skip, skip_stride, residual, addend,
        )  # fmt: skip
    k = _kernels()
    chip = k.chip()
    dweight = _empty_gradient(weight, need_weight, saved)
    dbias = _empty_bias_gradient(saved, bias_dtype)
    weight = _dense(weight)
    dx = like_output(input)
    reduces = need_weight or bias_dtype is not None or (training and need_input)
    if skip is not None and not reduces:
        dy, skip = add_skip(dy, skip, skip_stride), None
    # A pre-activation unit has an addend, whatever ends in a sum has a residual: never both.
    rows, (input, dy, *others) = _common_rows(
        dx, input, dy, *[each for each in (residual, addend) if each is not None]
    )
    if residual is not None:
        residual = others[0]
    elif addend is not None:
        addend = others[0]
    channels, wide = rows.channels, saved.dtype
    offset = k.offset[rows.needs_int64]
    pack_channels, _, bits_stride = bits_layout(rows)
    mask = bits if bits.numel() else None
    size = input.element_size()
    # Where z is computed again beside a third tensor.
    is_smooth = activation is not None and not is_piecewise(activation)
    share = k.DUAL_SHARE if residual is not None or (is_smooth and skip is not None) else 1
    # With a second gradient the first pass writes dz, which is the residual's gradient, and the other pass reads it.
    dz = torch.empty_like(dx) if skip is not None and (need_input or need_residual) else None
    if dz is not None and need_residual and residual_dtype == dz.dtype:
        dresidual, writes_residual = dz, False
    else:
        writes_residual = need_residual
        dresidual = torch.empty_like(dx, dtype=residual_dtype) if need_residual else dx.new_empty(0)
    whole = k.whole(rows, size, k.BACKWARD, chip) if training and need_input else None
    if whole is not None:
        k.backward(
            dy, input, mask, weight, saved, dweight if need_weight else None, None if bias_dtype is None else dbias,
            dx, dresidual if writes_residual else None, residual, None, None, None, None, addend,
            _skip(k, rows, dx, skip, skip_stride, dz), rows, bits_stride, pack_channels, whole,
            *activations.parse(activation), k.dtype[wide], offset,
        )  # fmt: skip
        return dx, dresidual, dweight, dbias
    coefficients = None
    # With running statistics dx waits for no sum: the pass that reduces writes everything.
    is_whole = reduces and not training and skip is None and addend is None
    if reduces:
        is_crowded = skip_stride is not None or (is_smooth and residual is not None)
        # Beside the positions of a strided gradient there is room for half a tile.
        part = k.DUAL_SHARE if skip_stride is not None else share
        tile = k.tile(rows, size, k.CROWDED if is_crowded else k.REDUCING, chip, part)
        partial = saved.new_empty((tile.programs, 2, tile.width), dtype=_partial_dtype(input.dtype))
        if is_whole:
            second = k.skip(None, None, None, dresidual if writes_residual else None)
        else:
            second = _skip(k, rows, dx, skip, skip_stride, dz)
        k.grad_reduce(
            dy, input, mask, weight, saved, partial, residual, None, None, None,
            second, dx if is_whole and need_input else None,
            rows, bits_stride, pack_channels, tile, *activations.parse(activation), k.dtype[wide], offset,
        )  # fmt: skip
        if training and need_input:
            coefficients = saved.new_empty((2, channels))
        k.grad_finalize(
            partial,
            saved,
            weight,
            coefficients,
            dweight if need_weight else None,
            None if bias_dtype is None else dbias,
            rows,
            tile,
            k.dtype[wide],
        )
    if dz is not None:
        rows, (input, dy) = _common_rows(dx, input, dz)
        mask = activation = residual = None
    if (need_input or writes_residual) and not is_whole:
        k.grad_apply(
            dy,
            input,
            mask,
            weight,
            saved,
            coefficients,
            dx if need_input else None,
            dresidual if writes_residual else None,
            residual,
            None,
            None,
            None,
            addend,
            rows,
            bits_stride,
            pack_channels,
            k.tile(rows, size, k.GRAD_APPLYING, chip, share),
            *activations.parse(activation),
            k.dtype[wide],
            offset,
        )
    return dx if need_input else dx.new_empty(0), dresidual, dweight, dbias


def _skip(
    k: SimpleNamespace, rows: RowMap, dx: Tensor, skip: Tensor | None, stride: list[int] | None, dz: Tensor | None
) -> Any:  # fmt: skip
    """What the reducing pass needs of a second gradient; one that it cannot walk is copied into dx's layout first."""
    if skip is None:
        return None
    if stride is not None and (own_stride := _walked_as(rows, dx, skip)) is not None:
        place = (dx.shape[2], dx.shape[3], *stride, skip.shape[2], skip.shape[3])
        return k.skip(skip, own_stride, place, dz)
    full = spread_skip(skip, stride, dx)
    own = row_map_of(dx, full)
    if own is None or (own.outer, own.inner, own.spread, own.needs_int64) != (
        rows.outer,
        rows.inner,
        rows.spread,
        rows.needs_int64,
    ):
        full = torch.empty_like(dx, dtype=full.dtype).copy_(full)
        return k.skip(full, rows.strides[0], None, dz)
    return k.skip(full, own.strides[1], None, dz)


def _walked_as(rows: RowMap, dx: Tensor, small: Tensor) -> Strides | None:
    """The strides of a smaller image along the positions of a larger one, both dense in one layout; else None."""
    if dx.dim() != 4:
        return None
    images, channels, height, width = small.shape
    if rows.spread > 1:
        is_dense = dx.is_contiguous() and small.is_contiguous()
        # `visited` gives the position in the small image, and its channel with it.
        return (0, channels * height * width, 1) if is_dense else None
    formats = (
        (torch.channels_last, images * dx.shape[2] * dx.shape[3], (0, channels, 1)),
        (torch.contiguous_format, dx.shape[2] * dx.shape[3], (channels * height * width, 1, height * width)),
    )  # fmt: skip
    for layout, inner, strides in formats:
        is_dense = all(t.is_contiguous(memory_format=layout) for t in (dx, small))
        if is_dense and rows.inner == inner:
            return strides
    return None


def spread_skip(skip: Tensor, stride: list[int] | None, like: Tensor) -> Tensor:
    """A gradient that holds every stride-th position only, with zeros in between; like `like` in shape."""
    if stride is None:
        return skip
    full = torch.zeros_like(like, dtype=skip.dtype)
    full[(slice(None), slice(None), *(slice(None, None, step) for step in stride))] = skip
    return full


def add_skip(dy: Tensor, skip: Tensor, stride: list[int] | None) -> Tensor:
    """dy + skip, in dy's dtype, as autograd adds two gradients of one tensor."""
    return dy + spread_skip(skip, stride, dy).to(dy.dtype)


# --- the same in plain PyTorch -----------------------------------------------------------------------------------


def _per_channel(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view([1, -1] + [1] * (like.dim() - 2))


def _rows_view(tensor: Tensor, rows: RowMap) -> Tensor:
    """[outer, inner, columns] of a tensor that is laid out as the map's first."""
    return tensor.as_strided((rows.outer, rows.inner, rows.columns), rows.strides[0])


def _pack(mask: Tensor) -> Tensor:
    """A boolean tensor, dense, into the bytes that `kernels.bits.pack` writes for that layout."""
    rows = _rows_of(mask)
    pack_channels, _, stride = bits_layout(rows)
    view = _rows_view(mask, rows).to(torch.uint8)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    if pack_channels:
        view = torch.nn.functional.pad(view, (0, -rows.columns % 8))
        view = (view.unflatten(2, (-1, 8)) * weights).sum(3, dtype=torch.uint8)
        return (
            view if len(stride) == 3 else view.unflatten(2, (-1, MASK_PIECE)).permute(2, 0, 1, 3)
        ).flatten()
    view = torch.nn.functional.pad(view, (0, 0, 0, -rows.inner % 8))
    view = (view.unflatten(1, (-1, 8)) * weights[:, None]).sum(2, dtype=torch.uint8)
    return (view if stride[2] == 1 else view.transpose(1, 2)).flatten()


def unpack(bits: Tensor, mask: Tensor) -> Tensor:
    """The inverse of `_pack`: into a boolean tensor laid out as the output was."""
    rows = _rows_of(mask)
    pack_channels, _, stride = bits_layout(rows)
    positions = torch.arange(8, dtype=torch.uint8, device=bits.device)
    if pack_channels:
        if len(stride) == 3:
            view = bits.view(rows.outer, rows.inner, -1)
        else:
            view = bits.view(-1, rows.outer, rows.inner, MASK_PIECE).permute(1, 2, 0, 3).flatten(2)
        view = view.unsqueeze(3) >> positions
        view = (view & 1).flatten(2)[:, :, : rows.columns]
    else:
        if stride[2] == 1:
            view = bits.view(rows.outer, -1, rows.columns)
        else:
            view = bits.view(rows.outer, rows.columns, -1).transpose(1, 2)
        view = ((view.unsqueeze(2) >> positions[:, None]) & 1).flatten(1, 2)[:, : rows.inner]
    _rows_view(mask, rows).copy_(view)
    return mask


def _gradient_mask(input, weight, saved, bits, activation) -> Tensor:
    """Where a piecewise activation lets the gradient pass, as a boolean tensor; in plain PyTorch on every backend."""
    mask = like_output(input, torch.bool)
    if bits.numel():
        return unpack(bits, mask)
    return mask.copy_(activations.passes(_normalized(input, weight, saved), activation))


def _normalized(input, weight, saved) -> Tensor:
    scale = saved[2] if weight is None else saved[2] * weight
    return _centered(input, saved) * _per_channel(scale, input) + _per_channel(saved[3], input)


def _centered(input: Tensor, saved: Tensor) -> Tensor:
    return (input - _per_channel(saved[0], input)) - _per_channel(saved[1], input)


def _batch_norm_act_aten(
    input, residual, weight, bias, running_mean, running_var, training, momentum, eps, activation, save
):  # fmt: skip
    wide = accumulate_dtype(input.dtype)
    saved = input.new_empty((4, input.shape[1]) if training or save else (0,), dtype=wide)
    if saved.numel():
        if training:
            dims = [0, *range(2, input.dim())]
            var, mean = torch.var_mean(input.to(wide), dims, correction=0)
        else:
            var, mean = running_var.to(wide), running_mean.to(wide)
        zero = torch.zeros_like(mean)
        shift = zero if bias is None else bias.to(wide)
        saved.copy_(torch.stack([mean, zero, (var + eps).rsqrt(), shift]))
    result = reference.batch_norm_act(
        input, running_mean, running_var, weight, bias, training, momentum, eps,
        residual=residual, activation=None,
    )  # fmt: skip
    output = like_output(input).copy_(activations.activate(result, activation))
    if _needs_bits(residual, activation, save):
        # Laid out as the output, which the kernels are.
        mask = like_output(input, torch.bool).copy_(activations.passes(result, activation))
        return output, saved, _pack(mask)
    return output, saved, input.new_empty(0, dtype=torch.uint8)


def _batch_norm_act_backward_aten(
    dy, input, weight, saved, bits, training, activation, residual_dtype,
    need_input, need_residual, need_weight, bias_dtype, skip=None, skip_stride=None, residual=None, addend=None,
):  # fmt: skip
    dz = (dy if skip is None else add_skip(dy, skip, skip_stride)).to(saved.dtype)
    if activation is not None and is_piecewise(activation):
        mask = _gradient_mask(input, weight, saved, bits, activation)
        dz = activations.keep_passing(dz, mask, activation)
    elif activation is not None:
        z = _normalized(input, weight, saved)
        dz = activations.gradient(dz, z if residual is None else z + residual, activation)
    dims = [0, *range(2, input.dim())]
    centered = _centered(input, saved)
    dbias, dot = dz.sum(dims), (dz * centered).sum(dims)
    invstd = saved[2]
    scale = invstd if weight is None else invstd * weight
    dx = input.new_empty(0)
    if need_input:
        dx = like_output(input)
        gradient = dz
        if training:
            n = input.numel() // input.shape[1]
            slope = invstd * invstd * dot / n
            gradient = dz - _per_channel(dbias / n, input) - centered * _per_channel(slope, input)
        gradient = gradient * _per_channel(scale, input)
        dx.copy_(gradient if addend is None else gradient + addend)
    dresidual = input.new_empty(0)
    if need_residual:
        dresidual = like_output(input, residual_dtype).copy_(dz)
    return (
        dx,
        dresidual,
        (dot * invstd).to(weight.dtype) if need_weight else saved.new_empty(0),
        saved.new_empty(0) if bias_dtype is None else dbias.to(bias_dtype),
    )


# --- registration ------------------------------------------------------------------------------------------------


def _on_its_device(implementation: Callable) -> Callable:
    """Triton launches on the current device, which need not be the one that the tensors are on."""

    @functools.wraps(implementation)
    def guarded(first: Tensor, *rest: Any) -> Any:
        if first.get_device() == torch.cuda.current_device():
            return implementation(first, *rest)
        with torch.cuda.device(first.device):
            return implementation(first, *rest)

    return guarded


for _name, _implementation in (
    ("batch_norm_act", _batch_norm_act),
    ("batch_norm_act_backward", _batch_norm_act_backward),
    ("gradient_mask", _gradient_mask),
):
    LIBRARY.impl(_name, _implementation, "CPU")
    LIBRARY.impl(_name, _on_its_device(_implementation), "CUDA")


@torch.library.register_fake("fusedres::batch_norm_act", lib=LIBRARY)
def _(
    input, residual, weight, bias, running_mean, running_var, training, momentum, eps, activation, save
):  # fmt: skip
    wide = accumulate_dtype(input.dtype)
    output = like_output(input)
    n_bytes: Any = 0
    if _needs_bits(residual, activation, save):
        # Past the cache: while shapes are symbols they cannot be hashed.
        rows = row_map.__wrapped__(tuple(output.shape), tuple(output.stride()))
        n_bytes = bits_layout(rows)[1]
    saved = input.new_empty((4, input.shape[1]) if training or save else (0,), dtype=wide)
    return output, saved, input.new_empty((n_bytes,), dtype=torch.uint8)


@torch.library.register_fake("fusedres::gradient_mask", lib=LIBRARY)
def _(input, weight, saved, bits, activation):
    return like_output(input, torch.bool)


@torch.library.register_fake("fusedres::batch_norm_act_backward", lib=LIBRARY)
def _(
    dy, input, weight, saved, bits, training, activation, residual_dtype,
    need_input, need_residual, need_weight, bias_dtype, skip=None, skip_stride=None, residual=None, addend=None,
):  # fmt: skip
    return (
        like_output(input) if need_input else input.new_empty(0),
        like_output(input, residual_dtype) if need_residual else input.new_empty(0),
        _empty_gradient(weight, need_weight, saved),
        _empty_bias_gradient(saved, bias_dtype),
    )
