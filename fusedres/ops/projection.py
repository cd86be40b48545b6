"""The 1x1 convolution of a shortcut, of any stride, and which of two implementations of it runs.

    fusedres::projection                  input, weight -> output, partial (the moments of the output, where asked for)
    fusedres::projection_backward         dy, input, weight -> gradients of input, weight and bias
    fusedres::projection_input_gradient   dy, weight -> gradient of the input
    fusedres::projection_input_gradient_  the same, added to a gradient that is there
    fusedres::projection_weight_gradient  dy, input -> gradient of the weight

The Triton product reads the strided rows where they stand and leaves the statistics of what it wrote. Where both were
timed the library's convolution was faster all the same, so it is what runs (`why_library`), but for whoever asks for
the other with `in_triton`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import fork
from ..dispatch import INTERPRET, has_tangents, is_eager, wants_triton, why_not_triton
from ..kernels.dtypes import accumulate_dtype, partial_dtype
from ..kernels.layout import GatherMap, gather_map
from ..layouts import output_format
from .graph import needs_graph
from .node import Node, gradients, is_node
from .norm import Skip, names
from .operator import Operator
from .straight import is_quiet
from .tail import Gradients, Tail, straight, through_operators

if TYPE_CHECKING:
    from ..kernels.plan import Planner

FORWARD_SCHEMA = (
    "projection(Tensor input, Tensor weight, Tensor? bias, int[] stride, bool moments) "
    "-> (Tensor output, Tensor partial)"
)
BACKWARD_SCHEMA = (
    "projection_backward(Tensor dy, Tensor input, Tensor weight, int[] stride, int input_gradient, bool need_weight, "
    "ScalarType? bias_dtype) -> (Tensor dx, Tensor dweight, Tensor dbias)"
)
INPUT_SCHEMA = (
    "projection_input_gradient(Tensor dy, Tensor weight, SymInt[] spatial, int[] stride) -> Tensor"
)
ADDING_SCHEMA = (
    "projection_input_gradient_(Tensor(a!) dx, Tensor dy, Tensor weight, int[] stride) -> ()"
)
WEIGHT_SCHEMA = "projection_weight_gradient(Tensor dy, Tensor input, int[] stride) -> Tensor"


class How(NamedTuple):
    """moments: whether the partial moments of the output are asked for."""

    stride: tuple[int, ...]
    moments: bool


VISITED = 2  # of a gradient of the input, where it is asked for: at the positions alone that the stride visits


class Wanted(NamedTuple):
    """Which gradients a backward is asked for: of the input False, True or `VISITED`, of the bias in a dtype."""

    input: int
    weight: bool
    bias_dtype: torch.dtype | None


_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
# Flops a chip does while it moves a byte, by architecture: dense tensor-core peak over memory bandwidth of A100
# (312 T, 2.0 TB/s), H200 (989 T, 4.8 TB/s) and B200 (2250 T, 8 TB/s), for 16-bit values. Not measured.
RIDGE = {80: 156, 90: 206, 100: 281}
OTHER_RIDGE = 100
TF32_SHARE = 0.5  # of the 16-bit peak


def intensity(channels_in: int, channels_out: int, element_size: int) -> float:
    """Flops a byte of a product [rows, Cin] @ [Cin, Cout] with many rows."""
    return 2 * channels_in * channels_out / (element_size * (channels_in + channels_out))


# An H200 (torch 2.11, Triton 3.6, 26 November 2026), the projections of a ResNet-50 at batch 256: in bfloat16 the
# Triton product with its moments took 497, 332, 348 and 243 us, the library's 183, 109, 86 and 82, and a pass for the
# moments some 100 at most; in float32 it was 5 to 8 times slower (benchmarks/results/).
_asked = threading.local()


@contextmanager
def in_triton() -> Iterator[None]:
    """In this thread, projections that are bound by memory go to the Triton product: for tests and for measuring it."""
    before = getattr(_asked, "depth", 0)
    _asked.depth = before + 1
    try:
        yield
    finally:
        _asked.depth = before


def describe_choice(channels_in: int, channels_out: int, architecture: int = 90) -> str:
    """Which implementation a projection of 16-bit channels-last tensors gets, for the report of `fuse_`."""
    found, ridge = intensity(channels_in, channels_out, 2), RIDGE.get(architecture, OTHER_RIDGE)
    if getattr(_asked, "depth", 0) and found < ridge:
        return f"1x1 in Triton: memory-bound at {found:.0f} flop/byte"
    return "1x1 by the library: faster where both were timed"


def why_library(input: Tensor, weight: Tensor) -> str | None:
    """Why this projection is left to the library's convolution; None where the Triton product runs."""
    if not wants_triton(input.is_cuda) or input.numel() == 0:
        return "the backend is plain PyTorch"
    if torch.compiler.is_compiling():
        return "torch.compile schedules PyTorch's own convolution"
    if torch._C._functorch.maybe_current_level() is not None:
        return "torch.func transforms PyTorch's own convolution"
    # Of other permutations PyTorch's convolution makes a contiguous output.
    if input.stride(1) != 1 or (
        not input.is_contiguous() and output_format(input) is torch.contiguous_format
    ):
        return "the input is not channels_last"
    if why_not_triton(input.device, input.dtype) is not None:
        return "Triton cannot run there"
    if INTERPRET:
        return None
    if input.dtype == torch.float64:
        return "float64 products are the library's"
    if input.dtype == torch.float32 and not _allows_tf32():
        return "float32 products without tf32 are the library's"
    if not getattr(_asked, "depth", 0):
        return "the library's was faster where both were timed"
    channels_out, channels_in = weight.shape[:2]
    ridge = RIDGE.get(_architecture(), OTHER_RIDGE) * (
        TF32_SHARE if input.dtype == torch.float32 else 1
    )
    if intensity(channels_in, channels_out, input.element_size()) >= ridge:
        return "it is compute-bound"
    return None


def _architecture() -> int:
    from ..kernels.chip import current_chip

    return current_chip().architecture // 10 * 10


def _allows_tf32() -> bool:
    """Whether float32 products may round their operands: the switch is cuDNN's, and AMD has no tf32."""
    from ..kernels.chip import current_chip

    convolutions: Any = torch.backends.cudnn
    return current_chip().backend == "cuda" and convolutions.conv.fp32_precision == "tf32"


def precision(dtype: torch.dtype) -> str:
    """Of the Triton products of such values: "tf32" (operands rounded to 10 bits) or "ieee"."""
    is_tf32 = dtype == torch.float32 and not INTERPRET and _allows_tf32()
    return "tf32" if is_tf32 else "ieee"


# --- the rows of both sides --------------------------------------------------------------------------------------


def _spatial(input: Tensor, stride: Sequence[int]) -> list[int]:
    return [(size - 1) // step + 1 for size, step in zip(input.shape[2:], stride, strict=True)]


def _empty_rows(like: Tensor, channels: int, spatial: Any) -> Tensor:
    """[N, channels, *spatial] with the channels next to each other (channels_last)."""
    return like.new_empty((like.shape[0], *spatial, channels)).movedim(-1, 1)


def _row_strides(tensor: Tensor, stride: Sequence[int]) -> tuple[int, ...]:
    """How far apart neighbours stand along [N, ...] when every `stride`-th is visited."""
    return (
        tensor.stride(0),
        *(s * step for s, step in zip(tensor.stride()[2:], stride, strict=True)),
    )


def _map(small: Tensor, first: Tensor, second: Tensor, stride: Sequence[int]) -> GatherMap:
    """The rows of `small`; the one of the two that it is not is visited with the stride."""
    sizes = (small.shape[0], *small.shape[2:])
    ones = [1] * len(stride)
    strides = [_row_strides(t, ones if t is small else stride) for t in (first, second)]
    return gather_map(
        sizes,
        strides[0],
        strides[1],
        (first.shape[1], second.shape[1]),
        (first.stride(1), second.stride(1)),
    )


def _side(tensor: Tensor) -> Any:
    from ..kernels.projection import Side

    return Side(tensor, tensor.shape[1], tensor.stride(1))


def _cast(p: Planner, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in the dtype of the values, as autocast would give it, or a gradient in that of its parameter."""
    return tensor if tensor.dtype == dtype else p.copy(tensor, tensor, dtype)


# --- forward -----------------------------------------------------------------------------------------------------


def _forward(
    p: Planner, input: Tensor, weight: Tensor, bias: Tensor | None, how: How
) -> tuple:  # fmt: skip
    from ..kernels.projection import launch_projection

    stride, moments = how
    output = p.like(_empty_rows(input, weight.shape[0], _spatial(input, stride)))
    weight = _cast(p, weight, input.dtype)
    partial = launch_projection(
        p, _side(input), _side(output), weight, (weight.stride(1), weight.stride(0)), bias,
        _map(output, input, output, stride), False, moments, precision(input.dtype),
    )  # fmt: skip
    return output, partial_dtype(input.dtype) if partial is None else partial


# --- backward ----------------------------------------------------------------------------------------------------


def _transposed(
    p: Planner, dy: Tensor, weight: Tensor, dx: Tensor, stride: tuple[int, ...], adds: bool
) -> None:
    """dx <- dy @ weight^T at the rows that the stride visits, or += where it `adds`."""
    from ..kernels.projection import launch_projection

    weight = _cast(p, weight, dy.dtype)
    steps = weight.stride(0), weight.stride(1)
    if precision(dy.dtype) == "tf32":
        # sm_90 takes float32 only with a sum's terms next to each other: transposed here, not in every tile.
        across = p.empty((weight.shape[1], weight.shape[0], *weight.shape[2:]), weight.dtype)
        p.do(lambda out, w: out.copy_(w.transpose(0, 1)), across, weight)
        weight, steps = across, (across.stride(1), across.stride(0))
    launch_projection(
        p, _side(dy), _side(dx), weight, steps, None, _map(dy, dy, dx, stride), adds, False, precision(dy.dtype)
    )  # fmt: skip


def _input_gradient(
    p: Planner, dy: Tensor, weight: Tensor, spatial: tuple[int, ...], stride: tuple[int, ...]
) -> Tensor:
    dx = p.like(_empty_rows(dy, weight.shape[1], spatial))
    if any(step != 1 for step in stride):
        p.do(Tensor.zero_, dx)
    _transposed(p, dy, weight, dx, stride, adds=False)
    return dx


def _adding(p: Planner, dx: Tensor, dy: Tensor, weight: Tensor, stride: tuple[int, ...]) -> None:
    _transposed(p, dy, weight, dx, stride, adds=True)


def _weight_gradient(p: Planner, dy: Tensor, input: Tensor, stride: tuple[int, ...]) -> Tensor:
    from ..kernels.projection_grad_weight import launch_projection_grad_weight

    dweight = p.like(_empty_weight(dy, input, stride))
    gather = _map(dy, dy, input, stride)
    partial = launch_projection_grad_weight(p, _side(dy), _side(input), gather, precision(dy.dtype))
    p.do(lambda out, parts: torch.sum(parts, 0, out=out.view(parts.shape[1:])), dweight, partial)
    return dweight


def _bias_gradient(p: Planner, dy: Tensor, dtype: torch.dtype) -> Tensor:
    wide, dims = accumulate_dtype(dy.dtype), _all_but_channels(dy)
    total = p.empty((dy.shape[1],), wide)
    p.do(lambda out, dy: torch.sum(dy, dims, dtype=wide, out=out), total, dy)
    return _cast(p, total, dtype)


def _all_but_channels(dy: Tensor) -> list[int]:
    return [0, *range(2, dy.dim())]


def _backward(
    p: Planner, dy: Tensor, input: Tensor, weight: Tensor, stride: tuple[int, ...], wanted: Wanted
) -> tuple:
    dx = dweight = dbias = None
    if wanted.input == VISITED:
        dx = p.like(_empty_rows(dy, weight.shape[1], dy.shape[2:]))
        _transposed(p, dy, weight, dx, (1,) * len(stride), adds=False)
    elif wanted.input:
        dx = _input_gradient(p, dy, weight, input.shape[2:], stride)
    if wanted.weight:
        dweight = _cast(p, _weight_gradient(p, dy, input, stride), weight.dtype)
    if wanted.bias_dtype is not None:
        dbias = _bias_gradient(p, dy, wanted.bias_dtype)
    found = zip((dx, dweight, dbias), (dy.dtype, weight.dtype, dy.dtype), strict=True)
    return tuple(dtype if tensor is None else tensor for tensor, dtype in found)


# --- shapes ------------------------------------------------------------------------------------------------------


def _empty_weight(dy: Tensor, input: Tensor, stride: Sequence[int]) -> Tensor:
    shape = (dy.shape[1], input.shape[1], *[1] * len(stride))
    return dy.new_empty(shape, dtype=accumulate_dtype(dy.dtype))


def _fake_backward(dy, input, weight, stride, wanted) -> tuple[Tensor, Tensor, Tensor]:
    none, channels = dy.new_empty(0), weight.shape[1]
    spatial = dy.shape[2:] if wanted.input == VISITED else input.shape[2:]
    dtype = wanted.bias_dtype
    return (
        _empty_rows(dy, channels, spatial) if wanted.input else none,
        weight.new_empty(weight.shape if wanted.weight else (0,)),
        none if dtype is None else dy.new_empty(dy.shape[1], dtype=dtype),
    )


def _fake_forward(input, weight, bias, how) -> tuple[Tensor, Tensor]:
    stride, moments = how
    output = _empty_rows(input, weight.shape[0], _spatial(input, stride))
    # How many programs there are is known where it runs; nobody but the finalising step looks. On the meta device
    # there is nobody to ask for a size that is not known.
    programs: Any = 1
    if moments and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        programs = torch.library.get_ctx().new_dynamic_size()
    shape = (programs, 3, weight.shape[0]) if moments else (0,)
    return output, output.new_empty(shape, dtype=partial_dtype(input.dtype))


# --- operators ---------------------------------------------------------------------------------------------------


def _may_round() -> bool:
    return precision(torch.float32) == "tf32"


FORWARD = Operator(
    FORWARD_SCHEMA,
    ("input", "weight", "bias", names(How, "stride", "moments")),
    recipe=_forward,
    plain=None,
    fake=_fake_forward,
    state=_may_round,
)
_WANTED: Any = names(Wanted, "input_gradient", "need_weight", "bias_dtype")
BACKWARD = Operator(
    BACKWARD_SCHEMA,
    ("dy", "input", "weight", "stride", _WANTED),
    recipe=_backward,
    plain=None,
    fake=_fake_backward,
    state=_may_round,
)
INPUT = Operator(
    INPUT_SCHEMA,
    ("dy", "weight", "spatial", "stride"),
    recipe=_input_gradient,
    plain=None,
    fake=lambda dy, weight, spatial, stride: _empty_rows(dy, weight.shape[1], spatial),
    state=_may_round,
)
ADDING = Operator(
    ADDING_SCHEMA,
    ("dx", "dy", "weight", "stride"),
    recipe=_adding,
    plain=None,
    fake=lambda *_: None,
    state=_may_round,
)
WEIGHT = Operator(
    WEIGHT_SCHEMA,
    ("dy", "input", "stride"),
    recipe=_weight_gradient,
    plain=None,
    fake=_empty_weight,
    state=_may_round,
)


# --- autograd ----------------------------------------------------------------------------------------------------


class Projection(Node):
    """The Triton product; saved for backward: its input and weight. `partial` has no gradient of its own: what the
    BatchNorm's statistics do to the output's gradient is in the BatchNorm's derivative."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        output, partial = Node.forward(ctx, *arguments)
        if partial is not None:
            ctx.mark_non_differentiable(partial)
        ctx.fork_source = fork.source_of(arguments[0])
        return output, partial

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> Gradients:  # type: ignore[override]
        needs = ctx.needs_input_grad
        node = fork.target(ctx, 0) if needs[0] and dy is not None else None
        if node is None:
            return gradients(ctx, dy, Skip(), needs)
        found: Any = gradients(ctx, dy, Skip(), (VISITED, *needs[1:]))
        stride = ctx.planned.how.stride
        fork.leave(node, found[0], list(stride) if max(stride) > 1 else None)
        return None, *found[1:]


class _Library(torch.autograd.Function):
    """The library's convolution of a tensor that a tail of ours made, for the sake of its input's gradient: what is
    left with that tail is a product of the visited rows, not a tensor full of zeros."""

    @staticmethod
    def forward(ctx: Any, input, weight, bias, stride) -> Tensor:
        _remember(ctx, input, weight, bias, stride)
        return _convolve(input, weight, bias, stride)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None, None
        input, weight = ctx.saved_tensors
        need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
        if need_input and (node := fork.target(ctx, 0)) is not None:
            fork.leave(node, *_visited_gradient(dy, weight, ctx.stride))
            need_input = False
        dx, dweight = _aten_backward(ctx, dy, input, weight, need_input, need_weight)
        return dx, dweight, _summed(ctx, dy) if need_bias else None, None


fork.takes_part(Projection)
is_node(Projection)
fork.takes_part(_Library)
# As `tail` calls its own: past what only a transform asks.
_apply_library: Any = super(torch.autograd.Function, _Library).apply
_Library._backward_cls.apply = _Library.backward


def _remember(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int]):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, weight)
    ctx.stride, ctx.dtypes = stride, (None, None, None if bias is None else bias.dtype)
    ctx.fork_source = fork.source_of(input)


def _visited_gradient(
    dy: Tensor, weight: Tensor, stride: list[int]
) -> tuple[Tensor, list[int] | None]:
    """The gradient of the input at the positions that the stride visits, and that stride (None: it visits all)."""
    visited = stride if max(stride) > 1 else None
    return _convolve(dy, weight.transpose(0, 1), None, [1] * len(stride)), visited


def _summed(ctx: Any, dy: Tensor) -> Tensor:
    """The gradient of the bias."""
    total = dy.sum(_all_but_channels(dy), dtype=accumulate_dtype(dy.dtype))
    return total.to(ctx.dtypes[2])


def _aten_backward(ctx, dy, input, weight, need_input, need_weight):
    """The same by PyTorch's own differentiable operation: for `create_graph=True`, and where the library ran."""
    if not need_input and not need_weight:
        return None, None
    zeros = [0] * len(ctx.stride)
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        dy, input, weight.to(input.dtype), None, ctx.stride, zeros, [1] * len(zeros), False, zeros, 1,
        [need_input, need_weight, False],
    )  # fmt: skip
    return dx, None if dweight is None else dweight.to(weight.dtype)


def _convolve(input: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int]) -> Tensor:
    dtype = input.dtype
    bias = None if bias is None else bias.to(dtype)
    return _CONVOLUTIONS[len(stride)](input, weight.to(dtype), bias, tuple(stride))


def _backward_groups(ctx: Any, dy: Tensor, tensors: tuple, needs: tuple, skip: Skip) -> tuple:
    wanted = Wanted(needs[0], needs[1], ctx.dtypes[2] if needs[2] else None)
    return dy, *tensors, ctx.how.stride, wanted


def _gradients(ctx: Any, dy: Tensor, tensors: tuple, needs: tuple, skip: Skip) -> Gradients:
    found: tuple[Tensor | None, ...]
    if needs_graph(dy, *tensors):
        ctx.stride = ctx.how.stride
        dx, dweight = _aten_backward(ctx, dy, *tensors, *map(bool, needs[:2]))
        found = dx, dweight, _summed(ctx, dy) if needs[2] else None
    else:
        found = BACKWARD(*_backward_groups(ctx, dy, tensors, needs, skip))
    return tuple(each if need else None for each, need in zip(found, needs, strict=True))


TAIL = Tail(
    FORWARD,
    BACKWARD,
    Projection,
    how=3,
    check=lambda *_: None,  # the caller has
    compose=None,
    reads=lambda how: (0, 1),
    backward_groups=_backward_groups,
    gradients=_gradients,
    of=(0, 1, 2),
    outputs=2,
    told=False,
)


def _project(input: Tensor, weight: Tensor, bias: Tensor | None, how: How) -> tuple:
    groups = (input, weight, bias, how)
    if is_quiet():
        key = "projection", input.shape, input.dtype, how, torch.is_grad_enabled(), _may_round()
        found = straight(TAIL, key, groups)
        if found is not None:
            return found
    return through_operators(TAIL, groups)


def project(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], moments: bool
) -> tuple[Tensor, Tensor | None]:
    """conv(input, weight, bias, stride) for a 1x1 weight, and its moments where the Triton product left them."""
    if why_library(input, weight) is None:
        output, partial = _project(input, weight, bias, How(tuple(stride), moments))
        return output, partial if moments else None
    if max(stride) > 1 and is_eager() and not has_tangents() and fork.source_of(input) is not None:
        return _apply_library(input, weight, bias, list(stride)), None
    return _convolve(input, weight, bias, stride), None


def add_input_gradient(dx: Tensor, dy: Tensor, weight: Tensor, stride: tuple[int, ...]) -> None:
    """dx += the gradient of a projection's input, at the rows that its stride visits; the others are not touched."""
    ADDING(dx, dy, weight, list(stride))
