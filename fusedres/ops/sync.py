"""A tail whose BatchNorms share their statistics among processes, as `nn.SyncBatchNorm` does.

    fusedres::shared_moments                  input, residual -> moments [K, 3, C] = (count, mean, M2), sum
        all_gather                            moments of all processes
    fusedres::shared_batch_norm_act           input, residual, those moments, ... -> output, saved, residual_saved, bits

    fusedres::shared_sums                     dy, ... -> sums [K, 2, C] = (sum(dz), sum(dz * (x - mean))), dweight, ...
        all_reduce                            sums of all processes, which the total count divides
    fusedres::shared_batch_norm_act_backward  dy, those means, ... -> dx, dresidual

K is the number of BatchNorms: 1, or 2 of a tail whose shortcut is projected (`dual`). Each direction is one collective,
of float64: 24 bytes a channel and BatchNorm forward, 16 backward. The passes over memory are those of `batch_norm_act`,
`dual` and `preactivation`.

The moments are merged by their counts (Chan, Golub and LeVeque 1983), in the order of the ranks and in a fixed tree: an
uneven batch weighs what it has, an empty one nothing, and every process finds the same bits. The total count stays on
the device, so nothing waits for it; what needs it on the host, PyTorch's error for one value a channel, is not raised:
with one value in all, or none, the running statistics stay as they are. dweight and dbias are a process's own, as
PyTorch's are (DistributedDataParallel averages them).

For `create_graph=True` the first derivatives are a graph of PyTorch's operations and of sums over the processes that
are differentiable themselves. torch.func's transforms and forward-mode AD are refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..activations import activate, gradient, is_piecewise, keep_passing, parse, passes
from ..checks import check_shared_batch_norm
from ..dispatch import has_tangents, is_eager
from ..kernels.dtypes import accumulate_dtype, partial_dtype
from ..kernels.layout import bits_layout
from ..layouts import like_output, like_sum
from . import batch_norm_act as single
from . import dual
from .dual import Wanted
from .graph import bias_in_graph, leaves_behind, needs_graph, passing, per_channel, smooth
from .masks import empty_bits, has_bits, pack
from .norm import BatchNorm, Kept, blend, empty_saved, names
from .operator import Operator
from .tail import Gradients

if TYPE_CHECKING:
    from ..kernels.plan import Planner

MOMENTS_SCHEMA = (
    "shared_moments(Tensor input, Tensor? residual, Tensor? residual_moments, bool adds) "
    "-> (Tensor moments, Tensor sum)"
)
FORWARD_SCHEMA = (
    "shared_batch_norm_act(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? residual_weight, "
    "Tensor? residual_bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? residual_running_mean, "
    "Tensor(d!)? residual_running_var, Tensor moments, Tensor? residual_moments, float momentum, float eps, "
    "float residual_momentum, float residual_eps, str? activation, bool save) "
    "-> (Tensor output, Tensor saved, Tensor residual_saved, Tensor bits)"
)
SUMS_SCHEMA = (
    "shared_sums(Tensor dy, Tensor input, Tensor? residual, Tensor? weight, Tensor? residual_weight, Tensor saved, "
    "Tensor? residual_saved, Tensor bits, str? activation, bool[] needs, ScalarType? bias_dtype, "
    "ScalarType? residual_bias_dtype) "
    "-> (Tensor sums, Tensor dweight, Tensor dbias, Tensor dresidual_weight, Tensor dresidual_bias)"
)
BACKWARD_SCHEMA = (
    "shared_batch_norm_act_backward(Tensor dy, Tensor input, Tensor? residual, Tensor? weight, "
    "Tensor? residual_weight, Tensor saved, Tensor? residual_saved, Tensor bits, Tensor? means, "
    "Tensor? residual_means, str? activation, bool need_input, ScalarType? residual_dtype, Tensor? addend) "
    "-> (Tensor dx, Tensor dresidual)"
)


_INPUTS = (
    6  # that get a gradient: input, residual, weight, bias, and the residual's weight and bias
)


class Group(NamedTuple):
    """The processes that share the statistics: the name of their group, as PyTorch has it, and how many they are."""

    name: str
    size: int


class Sought(NamedTuple):
    """Which gradients an applying pass of the backward writes: that of the input, and of the residual, in a dtype."""

    input: bool
    residual_dtype: torch.dtype | None


# --- forward -----------------------------------------------------------------------------------------------------


def _moments(
    p: Planner, input: Tensor, residual: Tensor | None, known: Tensor | None, adds: bool
) -> tuple:
    from ..kernels.finalize import Partial
    from ..kernels.ranks import launch_bn_moments
    from ..kernels.stats import launch_bn_stats

    moments = p.empty((_norms_of(residual, adds), 3, input.shape[1]), torch.float64)
    if residual is not None and adds:
        total = p.like(like_sum(input, residual))
        if input.numel() > 0:
            rows, (input, residual) = p.common_rows(total, input, residual)
            values, tile = launch_bn_stats(p, input, residual, total, rows)
            launch_bn_moments(p, Partial(values, total, rows, 0, tile), moments, 0)
        else:
            p.do(Tensor.zero_, moments)
        return moments, total
    if input.numel() == 0:
        p.do(Tensor.zero_, moments)
        return moments, input.dtype
    for k, x in enumerate((input, residual)[: moments.shape[0]]):
        if k == 1 and known is not None:
            launch_bn_moments(p, Partial(known), moments, k)
        elif x is not None:
            rows, (x,) = p.common_rows(like_output(x), x)
            values, tile = launch_bn_stats(p, x, None, None, rows)
            launch_bn_moments(p, Partial(values, x, rows, 1, tile), moments, k)
    return moments, input.dtype


def _norms_of(residual: Tensor | None, adds: bool) -> int:
    """How many BatchNorms there are, where a residual either has one of its own or is added first."""
    return 1 if residual is None or adds else 2


def _forward(
    p: Planner, input: Tensor, residual: Tensor | None, norm: BatchNorm, other: BatchNorm, moments: Tensor,
    residual_moments: Tensor | None, activation: str | None, save: bool,
) -> tuple:  # fmt: skip
    from ..kernels.apply import launch_bn_apply
    from ..kernels.finalize import Partial, launch_bn_finalize
    from ..kernels.norm import Norm

    output, wide = p.like(like_output(input)), accumulate_dtype(input.dtype)
    applied: list[Any] = [None, None]
    for k, (n, gathered) in enumerate(((norm, moments), (other, residual_moments))):
        if gathered is not None:
            if not gathered.is_contiguous():
                copied = p.empty(gathered.shape, gathered.dtype)
                p.do(Tensor.copy_, copied, gathered)
                gathered = copied
            saved = p.keep((4, input.shape[1]), wide)
            running = single.running_of(p, n)
            launch_bn_finalize(p, Partial(gathered, may_be_one=True), n.bias, saved, running, n.eps)
            applied[k] = Norm(n.weight, saved=saved, eps=n.eps)
    kept = [wide if each is None else each.saved for each in applied]
    if input.numel() == 0:
        return output, *kept, torch.uint8
    given = [input] if residual is None else [input, residual]
    rows, (input, *others) = p.common_rows(output, *given)
    bits = None
    if residual is not None and has_bits(activation, save):
        bits = p.keep((bits_layout(rows)[1],), torch.uint8)
    added, (first, second) = others[0] if others else None, applied
    launch_bn_apply(p, input, added, first, second, output, bits, rows, parse(activation))
    return output, *kept, torch.uint8 if bits is None else bits


# --- backward ----------------------------------------------------------------------------------------------------


def _sums(
    p: Planner, dy: Tensor, kept: Kept, other: Kept, bits: Tensor, activation: str | None, wanted: Wanted
) -> tuple:  # fmt: skip
    from ..kernels.grad import Operand
    from ..kernels.grad_reduce import launch_bn_grad_reduce
    from ..kernels.launch import CROWDED, DUAL_SHARE, REDUCING, choose_tile
    from ..kernels.norm import NO_NORM, Norm
    from ..kernels.ranks import launch_bn_grad_sums

    both = [kept] if other.saved is None else [kept, other]
    wide, channels = kept.saved.dtype, kept.input.shape[1]
    sums = p.empty((len(both), 2, channels), torch.float64)
    vectors: list[tuple[Tensor | None, Tensor | None]] = [(None, None), (None, None)]
    for k, (each, need, dtype) in enumerate(zip(both, wanted.needs[2:], wanted[1:], strict=False)):
        dweight = p.like(each.weight) if need and each.weight is not None else None
        vectors[k] = dweight, None if dtype is None else p.empty((channels,), dtype)
    flat = [each for pair in vectors for each in pair]
    results = sums, *[wide if each is None else each for each in flat]
    if dy.numel() == 0:
        for made in (sums, *flat):
            if made is not None:
                p.do(Tensor.zero_, made)
        return results
    rows, (input, dy, *others) = _walk(p, dy, kept, other)
    residual = others[0] if others else None
    # Where z is computed again beside a third tensor.
    is_crowded = len(both) == 1 and residual is not None
    share = 1 if residual is None else DUAL_SHARE
    tile = choose_tile(
        rows, input.element_size(), CROWDED if is_crowded else REDUCING, p.chip, share
    )
    operands = []
    for x, each, asked in zip((input, residual), (kept, other), vectors, strict=True):
        norm, partial = NO_NORM, None
        if each.saved is not None:
            norm = Norm(each.weight, saved=each.saved)
            partial = p.empty((tile.programs, 2, tile.width), partial_dtype(input.dtype))
        operands.append(Operand(x, norm, partial, None, None, *asked))
    mask = bits if bits.numel() else None
    main, second = operands
    launch_bn_grad_reduce(p, dy, main, second, mask, None, None, rows, tile, parse(activation))
    for k in range(len(both)):
        launch_bn_grad_sums(p, operands[k], sums, k, rows, tile)
    return results


def _walk(
    p: Planner, dy: Tensor, kept: Kept, other: Kept, addend: Tensor | None = None
) -> tuple[Any, tuple]:  # fmt: skip
    """Rows of dx, and input, dy, and residual or addend, where there is one, as they are walked by them."""
    more = [each for each in (other.input, addend) if each is not None]
    return p.common_rows(like_output(kept.input), kept.input, dy, *more)


def _backward(
    p: Planner, dy: Tensor, kept: Kept, other: Kept, bits: Tensor, means: Tensor | None,
    residual_means: Tensor | None, activation: str | None, sought: Sought, addend: Tensor | None,
) -> tuple:  # fmt: skip
    from ..kernels.finalize import launch_bn_grad_finalize
    from ..kernels.grad import Operand
    from ..kernels.grad_apply import launch_bn_grad_apply
    from ..kernels.launch import DUAL_SHARE, GRAD_APPLYING, choose_tile
    from ..kernels.norm import NO_NORM, Norm

    layout, dtype = like_output(kept.input), sought.residual_dtype
    dx = p.like(layout) if sought.input else None
    dresidual = None if dtype is None else p.like(layout, dtype)
    found = (layout.dtype if dx is None else dx), (layout.dtype if dresidual is None else dresidual)
    if dy.numel() == 0:
        return found
    rows, (input, dy, *others) = _walk(p, dy, kept, other, addend)
    residual = others[0] if other.input is not None else None
    addend = others[-1] if addend is not None else None
    operands = []
    for x, each, mean, written in (
        (input, kept, means, dx),
        (residual, other, residual_means, dresidual),
    ):
        norm = NO_NORM if each.saved is None else Norm(each.weight, saved=each.saved)
        operand = Operand(x, norm, mean, None, written)
        if mean is not None and written is not None:
            operand = operand._replace(coefficients=p.empty((2, rows.channels), kept.saved.dtype))
            launch_bn_grad_finalize(p, operand, operand.coefficients, None, None, rows, None)
        operands.append(operand)
    mask = bits if bits.numel() else None
    share = 1 if residual is None else DUAL_SHARE
    tile = choose_tile(rows, input.element_size(), GRAD_APPLYING, p.chip, share)
    main, second = operands
    launch_bn_grad_apply(p, dy, main, second, mask, addend, rows, tile, parse(activation))
    return found


# --- the same in plain PyTorch -----------------------------------------------------------------------------------


def _dims(input: Tensor) -> list[int]:
    return [0, *range(2, input.dim())]


def _plain_moments(
    input: Tensor, residual: Tensor | None, known: Tensor | None, adds: bool
) -> tuple[Tensor, Tensor]:
    total = input.new_empty(0)
    if residual is not None and adds:
        total = like_sum(input, residual)
        input, residual = torch.add(input, residual, out=total), None
    found = [_moments_of(x) for x in (input, residual) if x is not None]
    return torch.stack(found), total


def _moments_of(input: Tensor) -> Tensor:
    """(count, mean, M2) [3, C] of one tensor, by the deviations from a mean that is rounded."""
    count = input.numel() // input.shape[1]
    if count == 0:
        return input.new_zeros((3, input.shape[1]), dtype=torch.float64)
    x, dims = input.to(accumulate_dtype(input.dtype)), _dims(input)
    mean = x.mean(dims)
    x = x - per_channel(mean, x)
    low = x.sum(dims, dtype=torch.float64) / count
    squares = (x * x).sum(dims, dtype=torch.float64) - count * low * low
    return torch.stack([torch.full_like(low, count), mean + low, squares.clamp_min(0)])


def _plain_forward(
    input: Tensor, residual: Tensor | None, norm: BatchNorm, other: BatchNorm, moments: Tensor,
    residual_moments: Tensor | None, activation: str | None, save: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    saved = _finish(moments, norm, input)
    residual_saved = empty_saved(input, False)
    result = single.normalized(Kept(input, norm.weight, saved))
    if residual is not None and residual_moments is not None:
        residual_saved = _finish(residual_moments, other, input)
        result = result + single.normalized(Kept(residual, other.weight, residual_saved))
    elif residual is not None:
        result = result + residual
    output = like_output(input).copy_(activate(result, activation))
    bits = empty_bits(input, False)
    if residual is not None and has_bits(activation, save) and input.numel() > 0:
        bits = pack(like_output(input, torch.bool).copy_(passes(result, activation)))
    return output, saved, residual_saved, bits


def _finish(moments: Tensor, norm: BatchNorm, input: Tensor) -> Tensor:
    """saved [4, C] of moments [P, 3, C]; the running statistics move on."""
    counts, means, squares = moments.unbind(1)
    n = counts.sum(0)
    mean = (counts * means).sum(0) / n.clamp_min(1)
    apart = torch.where(counts > 0, means - mean, 0.0)
    m2 = (squares + apart * (apart * counts)).sum(0)
    saved = empty_saved(input, True)
    var = (m2 / n.clamp_min(1)).to(saved.dtype)
    high = mean.to(saved.dtype)
    low = torch.where(high.isfinite(), mean - high, 0.0).to(saved.dtype)
    shift = torch.zeros_like(high) if norm.bias is None else norm.bias.to(saved.dtype)
    saved.copy_(torch.stack([high, low, (var + norm.eps).rsqrt(), shift]))
    if norm.running_mean is not None and norm.running_var is not None:
        momentum = (n > 1).double() * norm.momentum
        unbiased = m2 / (n - 1).clamp_min(1)
        for running, batch in ((norm.running_mean, mean), (norm.running_var, unbiased)):
            running.copy_(running.double() * (1 - momentum) + batch * momentum)
    return saved


def _plain_dz(dy: Tensor, kept: Kept, other: Kept, bits: Tensor, activation: str | None) -> Tensor:
    dz = dy.to(kept.saved.dtype)
    if activation is None:
        return dz
    if is_piecewise(activation):
        return keep_passing(dz, single.gradient_mask(kept, bits, activation), activation)
    z = single.normalized(kept)
    if other.input is not None:
        z = z + (other.input if other.saved is None else single.normalized(other))
    return gradient(dz, z, activation)


def _plain_sums(
    dy: Tensor, kept: Kept, other: Kept, bits: Tensor, activation: str | None, wanted: Wanted
) -> tuple[Tensor, ...]:
    dz = _plain_dz(dy, kept, other, bits, activation)
    sums, *vectors = _fake_sums(dy, kept, other, bits, activation, wanted)
    dims, total = _dims(dz), None
    for k, (each, vector) in enumerate(zip((kept, other), (vectors[:2], vectors[2:]), strict=True)):
        if each.saved is None:
            continue
        if total is None:
            total = dz.sum(dims, dtype=torch.float64)
        dot = (dz * single.centered(each)).sum(dims, dtype=torch.float64)
        sums[k].copy_(torch.stack([total, dot]))
        if vector[0].numel():
            vector[0].copy_(dot * each.saved[2])
        if vector[1].numel():
            vector[1].copy_(total)
    return sums, *vectors


def _plain_backward(
    dy: Tensor, kept: Kept, other: Kept, bits: Tensor, means: Tensor | None, residual_means: Tensor | None,
    activation: str | None, sought: Sought, addend: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    dz = _plain_dz(dy, kept, other, bits, activation)
    found = _fake_backward(dy, kept, other, bits, means, residual_means, activation, sought, addend)
    is_sought = sought.input, sought.residual_dtype is not None
    for each, mean, written, asked in zip(
        (kept, other), (means, residual_means), found, is_sought, strict=True
    ):
        if not asked:
            continue
        if each.saved is None or mean is None:
            written.copy_(dz)
            continue
        invstd = each.saved[2]
        level, dot = mean[0].to(dz.dtype).unbind(0)
        scale = invstd if each.weight is None else invstd * each.weight
        dx = dz - per_channel(level, dz) - single.centered(each) * per_channel(invstd * invstd * dot, dz)  # fmt: skip
        dx = dx * per_channel(scale, dz)
        written.copy_(dx if addend is None else dx + addend)
    return found


# --- shapes ------------------------------------------------------------------------------------------------------


def _fake_moments(
    input: Tensor, residual: Tensor | None, known: Tensor | None, adds: bool
) -> tuple[Tensor, Tensor]:
    shape = (_norms_of(residual, adds), 3, input.shape[1])
    total = torch.empty_like(input + residual) if adds and residual is not None else input.new_empty(0)  # fmt: skip
    return input.new_empty(shape, dtype=torch.float64), total


def _fake_forward(
    input: Tensor, residual: Tensor | None, norm: BatchNorm, other: BatchNorm, moments: Tensor,
    residual_moments: Tensor | None, activation: str | None, save: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    output = like_output(input)
    has_mask = residual is not None and has_bits(activation, save) and input.numel() > 0
    saved = empty_saved(input, True), empty_saved(input, residual_moments is not None)
    return output, *saved, empty_bits(output, has_mask)


def _fake_sums(
    dy: Tensor, kept: Kept, other: Kept, bits: Tensor, activation: str | None, wanted: Wanted
) -> tuple[Tensor, ...]:
    count = 1 if other.saved is None else 2
    found = [kept.saved.new_empty((count, 2, kept.input.shape[1]), dtype=torch.float64)]
    for each, need, dtype in zip((kept, other), wanted.needs[2:], wanted[1:], strict=True):
        found.append(single.empty_weight_gradient(each.weight, need, kept.saved))
        found.append(single.empty_bias_gradient(kept.saved, dtype))
    return tuple(found)


def _fake_backward(
    dy: Tensor, kept: Kept, other: Kept, bits: Tensor, means: Tensor | None, residual_means: Tensor | None,
    activation: str | None, sought: Sought, addend: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    input, dtype = kept.input, sought.residual_dtype
    return (
        like_output(input) if sought.input else input.new_empty(0),
        input.new_empty(0) if dtype is None else like_output(input, dtype),
    )


# --- operators ---------------------------------------------------------------------------------------------------

_KEPT: Any = names(Kept, "input", "weight", "saved")
_OTHER_KEPT: Any = names(Kept, "residual", "residual_weight", "residual_saved")

MOMENTS = Operator(
    MOMENTS_SCHEMA,
    ("input", "residual", "residual_moments", "adds"),
    recipe=_moments,
    plain=_plain_moments,
    fake=_fake_moments,
)
FORWARD = Operator(
    FORWARD_SCHEMA,
    ("input", "residual", single.NORM, dual.OTHER, "moments", "residual_moments", "activation", "save"),
    recipe=_forward,
    plain=_plain_forward,
    fake=_fake_forward,
)  # fmt: skip
SUMS = Operator(
    SUMS_SCHEMA,
    ("dy", _KEPT, _OTHER_KEPT, "bits", "activation", names(Wanted, "needs", "bias_dtype", "residual_bias_dtype")),
    recipe=_sums,
    plain=_plain_sums,
    fake=_fake_sums,
)  # fmt: skip
BACKWARD = Operator(
    BACKWARD_SCHEMA,
    (
        "dy", _KEPT, _OTHER_KEPT, "bits", "means", "residual_means", "activation",
        names(Sought, "need_input", "residual_dtype"), "addend",
    ),
    recipe=_backward,
    plain=_plain_backward,
    fake=_fake_backward,
)  # fmt: skip


# --- collectives -------------------------------------------------------------------------------------------------


def _gathered(moments: Tensor, group: Group) -> Tensor:
    """[P, K, 3, C] of the [K, 3, C] of each process, in the order of their ranks."""
    functional = torch.ops._c10d_functional
    found = functional.all_gather_into_tensor(moments, group.size, group.name)
    return functional.wait_tensor(found).view(group.size, *moments.shape)


def _summed(tensor: Tensor, group: Group) -> Tensor:
    """The sum over all processes."""
    functional = torch.ops._c10d_functional
    return functional.wait_tensor(functional.all_reduce(tensor.contiguous(), "sum", group.name))


class _Summed(torch.autograd.Function):
    """`_summed` in a graph: what each process does with the sum is a function of every process's tensor."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _summed(tensor, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Summed.apply(gradient, ctx.group), None


# --- second derivatives ------------------------------------------------------------------------------------------


class _Graph(NamedTuple):
    """A BatchNorm with the statistics of all processes, as a graph."""

    xhat: Tensor
    invstd: Tensor
    weight: Tensor | None
    n: Tensor

    def output(self, bias: Tensor | None) -> Tensor:
        y, like = self.xhat, self.xhat
        y = y if self.weight is None else y * per_channel(self.weight, like)
        return y if bias is None else y + per_channel(bias.to(y.dtype), like)

    def gradients(self, dz: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
        """Those of input, weight and bias, in the dtype of the arithmetic."""
        dz, like = dz.to(self.xhat.dtype), self.xhat
        dims = _dims(dz)
        dbias, dweight = dz.sum(dims), (dz * self.xhat).sum(dims)
        level, slope = _Summed.apply(torch.stack([dbias, dweight]), group).div(self.n).unbind(0)
        dx = dz - per_channel(level, like) - self.xhat * per_channel(slope, like)
        scale = self.invstd if self.weight is None else self.invstd * self.weight
        return dx * per_channel(scale, like), dweight, dbias


def _graph(kept: Kept, count: Tensor, eps: float, group: Group) -> _Graph:
    x, count = kept.input.to(kept.saved.dtype), count.to(kept.saved.dtype)
    dims = _dims(x)
    x = x - per_channel(_Summed.apply(x.sum(dims), group) / count, x)
    invstd = (_Summed.apply((x * x).sum(dims), group) / count + eps).rsqrt()
    weight = None if kept.weight is None else kept.weight.to(x.dtype)
    return _Graph(x * per_channel(invstd, x), invstd, weight, count)


def _differentiable(
    ctx: Any, dy: Tensor, kept: Kept, other: Kept, bits: Tensor, count: Tensor, needs: tuple,
    behind: tuple[Tensor, ...],
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of input, residual, weight, bias, residual weight and bias, as a graph (see `graph`)."""
    activation, residual = ctx.how.activation, other.input
    both = [kept] if other.saved is None else [kept, other]
    graphs = [_graph(k, count, eps, ctx.group) for k, eps in zip(both, ctx.eps, strict=False)]
    biases = [
        bias_in_graph(None, bias, k.saved, activation)
        for k, bias in zip(both, ctx.biases, strict=False)
    ]
    dz = dy
    if activation is not None and is_piecewise(activation):
        with torch.no_grad():
            mask = single.gradient_mask(kept, bits, activation)
        sources = (*kept[:2], *other[:2], *biases, *behind)
        dz = passing(dy, mask, activation, sources)
    elif activation is not None:
        z = graphs[0].output(biases[0])
        if len(both) == 2:
            z = z + graphs[1].output(biases[1])
        elif residual is not None:
            z = z + residual.to(z.dtype)
        dz = smooth(dy, z, activation)
    found: list[Any] = [None] * _INPUTS
    if len(both) == 1 and needs[1]:
        found[1] = dz.to(ctx.residual_dtype)
    places = (0, 2, 3), (1, 4, 5)
    for k, graph, at, bias_dtype in zip(both, graphs, places, ctx.bias_dtypes, strict=False):
        dtypes = k.input.dtype, None if k.weight is None else k.weight.dtype, bias_dtype
        for place, value, dtype in zip(at, graph.gradients(dz, ctx.group), dtypes, strict=True):
            found[place] = value.to(dtype) if needs[place] else None
    return found


# --- autograd ----------------------------------------------------------------------------------------------------


class How(NamedTuple):
    """What becomes of a residual: it is added first, and the sum is normalised (`adds`), or it has a BatchNorm of its
    own (`is_dual`), or it is added at the end. save: the backward will come."""

    activation: str | None
    adds: bool
    is_dual: bool
    save: bool


Norms = tuple[BatchNorm, BatchNorm]
NO_NORM = BatchNorm(None, None, None, None)


class _Found(NamedTuple):
    """What a forward found. total: of a pre-activation unit, what it normalised; n: values of a channel in all."""

    output: Tensor
    saved: Tensor
    residual_saved: Tensor
    bits: Tensor
    total: Tensor
    n: Tensor


def _run(
    input: Tensor, residual: Tensor | None, norms: Norms, known: Tensor | None, how: How, group: Group
) -> _Found:  # fmt: skip
    """The forward, outside of autograd."""
    beside = residual if how.adds or how.is_dual else None
    moments, total = MOMENTS(input, beside, known, how.adds)
    gathered = _gathered(moments, group)
    others = gathered[:, 1] if how.is_dual else None
    if how.adds:
        input, residual = total, None
    output, saved, residual_saved, bits = FORWARD(
        input, residual, *norms, gathered[:, 0], others, how.activation, how.save
    )
    return _Found(output, saved, residual_saved, bits, total, gathered[:, 0, 0, 0].sum())


_INPUTS = (
    6  # that get a gradient: input, residual, weight, bias, and the residual's weight and bias
)


class SharedTail(torch.autograd.Function):
    """A tail with shared statistics in the graph. Its arguments are flat, for torch.compile to find the tensors: the
    inputs, the running statistics, the residual's moments where they are known, and then numbers.

    Saved for backward: what is normalised, the weights, four values a channel and BatchNorm, of a tail one bit an
    element, and the count.
    """

    @staticmethod
    def forward(ctx: Any, *flat: Any) -> Any:
        input, residual, w, b, rw, rb, mean, var, rmean, rvar, known, *numbers = flat
        momentum, eps, rmomentum, reps, *more = numbers
        how, group = How(*more[:4]), Group(*more[4:])
        first = BatchNorm(w, b, mean, var, momentum, eps)
        norms = first, BatchNorm(rw, rb, rmean, rvar, rmomentum, reps)
        found = _run(input, residual, norms, known, how, group)
        recomputes = how.activation is not None and not is_piecewise(how.activation)
        reads_residual = how.is_dual or (recomputes and not how.adds)
        ctx.save_for_backward(
            found.total if how.adds else input, residual if reads_residual else None, w, rw, *found[1:4], found.n
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.how, ctx.group, ctx.eps = how, group, (eps, reps)
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.bias_dtypes = (None if b is None else b.dtype, None if rb is None else rb.dtype)
        # Not as saved tensors: their values may change until the backward.
        ctx.biases = (None, None) if torch.compiler.is_compiling() else (b, rb)
        return (found.total, found.output) if how.adds else found.output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Gradients:
        needs = ctx.needs_input_grad[:_INPUTS]
        dy, dtotal = gradients[-1], gradients[0] if ctx.how.adds else None
        if dy is None:
            found: Gradients = (*(dtotal if need else None for need in needs[:2]), *(None,) * 4)
        elif ctx.how.adds:
            wanted = (needs[0] or needs[1], False, *needs[2:])
            dx, _, *others = _gradients(ctx, dy, dtotal, wanted)
            found = (*(dx if need else None for need in needs[:2]), *others)
        else:
            found = _gradients(ctx, dy, None, needs)
        return *found, *(None,) * (len(ctx.needs_input_grad) - _INPUTS)


def _gradients(ctx: Any, dy: Tensor, addend: Tensor | None, needs: tuple) -> Gradients:
    """Of what is normalised, residual, weight, bias, and the residual's weight and bias."""
    input, residual, weight, rweight, saved, rsaved, bits, count = ctx.saved_tensors
    how: How = ctx.how
    theirs: Any = rsaved if how.is_dual else None
    kept, other = Kept(input, weight, saved), Kept(residual, rweight, theirs)
    is_masked = how.activation is not None and ctx.residual_dtype is not None and not how.adds
    behind = leaves_behind(ctx, 1) if is_masked and residual is None else ()
    if needs_graph(dy, addend, input, residual, weight, rweight, *ctx.biases, *behind):
        dx, *others = _differentiable(ctx, dy, kept, other, bits, count, needs, behind)
        return (dx if dx is None or addend is None else dx + addend), *others
    bias, rbias = ctx.bias_dtypes[0] if needs[3] else None, ctx.bias_dtypes[1] if needs[5] else None
    is_moved = needs[0] or (needs[1] and how.is_dual)  # by what the other processes have
    vectors: tuple[Any, ...] = (None,) * 4
    means: list[Tensor | None] = [None, None]
    if is_moved or any(needs[2:]):
        wanted = Wanted((needs[0], needs[1], needs[2], needs[4]), bias, rbias)
        sums, *vectors = SUMS(dy, kept, other, bits, how.activation, wanted)
        if is_moved:
            whole = _summed(sums, ctx.group) / count
            means = [whole[:1], whole[1:] if how.is_dual else None]
    # Without an activation dz is dy itself, which no kernel need write again.
    passes_on = how.activation is None and not how.is_dual
    sought = Sought(needs[0], None if passes_on or not needs[1] else ctx.residual_dtype)
    dx = dresidual = None
    if sought.input or sought.residual_dtype is not None:
        dx, dresidual = BACKWARD(dy, kept, other, bits, *means, how.activation, sought, addend)
    if needs[1] and passes_on:
        dresidual = dy.to(ctx.residual_dtype)
    found = (dx, dresidual, *vectors)
    return tuple(each if need else None for each, need in zip(found, needs, strict=True))


# --- entry -------------------------------------------------------------------------------------------------------


def shared_batch_norm_act(
    input: Tensor, residual: Tensor | None, norm: BatchNorm, activation: str | None, group: Group
) -> Tensor:  # fmt: skip
    """`activation(norm(input) + residual)`, the statistics those of all processes of the group.

    Raises:
        TypeError, NotImplementedError, RuntimeError, ValueError: as `fusedres.functional.batch_norm_act`, but for one
            value a channel; NotImplementedError too for a transform of torch.func and for forward-mode AD.
    """
    _check(input, norm, residual, activation)
    return _tail(
        input, residual, (norm, NO_NORM), None, How(activation, False, False, False), group
    )


def shared_dual_batch_norm_act(
    input: Tensor, residual: Tensor, norms: Norms, activation: str | None, group: Group,
    moments: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`activation(norm(input) + norm'(residual))`, both with the statistics of all processes, in one collective.

    moments: the partial moments of the residual, where what wrote it has left them.

    Raises:
        TypeError, NotImplementedError, RuntimeError, ValueError: as `shared_batch_norm_act`.
    """
    _check(input, norms[0], residual, activation)
    _check(residual, norms[1], None, activation)
    return _tail(input, residual, norms, moments, How(activation, False, True, False), group)


def shared_add_batch_norm_act(
    input: Tensor, residual: Tensor, norm: BatchNorm, activation: str | None, group: Group
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`sum = input + residual` and `activation(norm(sum))`, the statistics of the sum those of all processes.

    Raises:
        TypeError, NotImplementedError, RuntimeError, ValueError: as `shared_batch_norm_act`.
    """
    _check(input, norm, residual, activation)
    return _tail(input, residual, (norm, NO_NORM), None, How(activation, True, False, False), group)


def _check(input: Tensor, norm: BatchNorm, residual: Tensor | None, activation: str | None) -> None:
    check_shared_batch_norm(
        "SyncBatchNorm", input, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps, residual,
        activation,
    )  # fmt: skip


def _tail(
    input: Tensor, residual: Tensor | None, norms: Norms, known: Tensor | None, how: How, group: Group
) -> Any:  # fmt: skip
    inputs = input, residual, norms[0].weight, norms[0].bias, norms[1].weight, norms[1].bias
    if not torch.compiler.is_compiling() and (transform := _transform_of(inputs)) is not None:
        raise NotImplementedError(
            f"SyncBatchNorm: {transform} cannot go through statistics that {group.size} processes share; use "
            "torch.autograd, or nn.BatchNorm"
        )
    first, second = (_moving(n) for n in norms)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        how = how._replace(save=True)
        buffers = first.running_mean, first.running_var, second.running_mean, second.running_var
        numbers = first.momentum, first.eps, second.momentum, second.eps
        result = SharedTail.apply(*inputs, *buffers, known, *numbers, *how, *group)
    else:
        found = _run(input, residual, (first, second), known, how, group)
        result = (found.total, found.output) if how.adds else found.output
    for n, batch in zip(norms, (first, second), strict=True):
        if isinstance(n.momentum, Tensor) and n.running_mean is not None:
            blend(n.running_mean, batch.running_mean, n.momentum)
            blend(n.running_var, batch.running_var, n.momentum)
    return result


def _transform_of(tensors: tuple[Tensor | None, ...]) -> str | None:
    """What goes on in this thread that has no rule here; None where nothing does."""
    if not is_eager():
        return "a transform of torch.func"
    if has_tangents() and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        return "forward-mode AD"
    return None


def _moving(norm: BatchNorm) -> BatchNorm:
    """The BatchNorm as the operator takes it: where its momentum is a tensor, with copies of the running statistics,
    which become those of the batch."""
    if not isinstance(norm.momentum, Tensor):
        return norm
    if norm.running_mean is None or norm.running_var is None:
        return norm._replace(momentum=0.0)
    wide = accumulate_dtype(norm.running_mean.dtype)
    mean, var = (t.detach().to(wide, copy=True) for t in (norm.running_mean, norm.running_var))
    return norm._replace(running_mean=mean, running_var=var, momentum=1.0)
