"""The 1x1 convolution of a shortcut, of any stride: operators, autograd, and which of two implementations runs.

    fusedres::projection                  input, weight -> output, partial (the moments of the output, where asked for)
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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import fork, operators
from .dispatch import INTERPRET, is_eager, wants_triton, why_not_triton
from .kernels.layout import GatherMap, gather_map
from .layouts import output_format
from .operators import LIBRARY, accumulate_dtype

LIBRARY.define(
    "projection(Tensor input, Tensor weight, Tensor? bias, int[] stride, bool moments) "
    "-> (Tensor output, Tensor partial)"
)
LIBRARY.define(
    "projection_input_gradient(Tensor dy, Tensor weight, SymInt[] spatial, int[] stride) -> Tensor"
)
LIBRARY.define(
    "projection_input_gradient_(Tensor(a!) dx, Tensor dy, Tensor weight, int[] stride) -> ()"
)
LIBRARY.define("projection_weight_gradient(Tensor dy, Tensor input, int[] stride) -> Tensor")
_forward_operator = torch.ops.fusedres.projection.default
_input_operator = torch.ops.fusedres.projection_input_gradient.default
_adding_operator = torch.ops.fusedres.projection_input_gradient_.default
_weight_operator = torch.ops.fusedres.projection_weight_gradient.default

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
    from .kernels.chip import current_chip

    return current_chip().architecture // 10 * 10


def _allows_tf32() -> bool:
    """Whether float32 products may round their operands: the switch is cuDNN's, and AMD has no tf32."""
    from .kernels.chip import current_chip

    convolutions: Any = torch.backends.cudnn
    return current_chip().backend == "cuda" and convolutions.conv.fp32_precision == "tf32"


def precision(tensor: Tensor) -> str:
    """Of the Triton products of such a tensor: "tf32" (operands rounded to 10 bits) or "ieee"."""
    is_tf32 = tensor.dtype == torch.float32 and not INTERPRET and _allows_tf32()
    return "tf32" if is_tf32 else "ieee"


# --- operators ---------------------------------------------------------------------------------------------------


def _spatial(input: Tensor, stride: list[int]) -> list[int]:
    return [(size - 1) // step + 1 for size, step in zip(input.shape[2:], stride, strict=True)]


def _empty_rows(like: Tensor, channels: int, spatial: Any) -> Tensor:
    """[N, channels, *spatial] with the channels next to each other (channels_last)."""
    return like.new_empty((like.shape[0], *spatial, channels)).movedim(-1, 1)


def _row_strides(tensor: Tensor, stride: list[int]) -> tuple[int, ...]:
    """How far apart neighbours stand along [N, ...] when every `stride`-th is visited."""
    return (
        tensor.stride(0),
        *(s * step for s, step in zip(tensor.stride()[2:], stride, strict=True)),
    )


def _map(small: Tensor, first: Tensor, second: Tensor, stride: list[int]) -> GatherMap:
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


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, stride: list[int], small: Tensor,
    transposed: bool, adds: bool, moments: bool,
) -> Tensor:  # fmt: skip
    """y (+)= x @ weight, and the moments of y where asked for (else an empty tensor)."""
    k = operators._kernels()
    channels = (x.shape[1], y.shape[1])
    if transposed and precision(x) == "tf32":
        # sm_90 takes float32 only with a sum's terms next to each other: transposed here, not in every tile.
        weight, transposed = weight.transpose(0, 1).contiguous(), False
    gather = _map(small, x, y, stride)
    tile = k.product_tile(gather.rows, *channels, x.element_size(), k.chip())
    shape = (tile.programs, 3, channels[1]) if moments else (0,)
    partial = y.new_empty(shape, dtype=operators._partial_dtype(y.dtype))
    step_out, step_in = weight.stride()[:2]
    k.projection(
        x, weight, bias, y, partial if moments else None, gather, (x.stride(1), y.stride(1)),
        (step_out, step_in) if transposed else (step_in, step_out), channels, tile, adds, precision(x),
        k.dtype[accumulate_dtype(x.dtype)], k.offset[gather.needs_int64],
    )  # fmt: skip
    return partial


def _projection(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], moments: bool
) -> tuple[Tensor, Tensor]:
    output = _empty_rows(input, weight.shape[0], _spatial(input, stride))
    weight, bias = weight.to(input.dtype), operators._dense(bias)
    partial = _product(input, weight, bias, output, stride, output, False, False, moments)
    return output, partial


def _projection_input_gradient(
    dy: Tensor, weight: Tensor, spatial: list[int], stride: list[int]
) -> Tensor:
    visits_all = all(step == 1 for step in stride)
    dx = _empty_rows(dy, weight.shape[1], spatial)
    if not visits_all:
        dx.zero_()
    _product(dy, weight.to(dy.dtype), None, dx, stride, dy, True, False, False)
    return dx


def _projection_input_gradient_(dx: Tensor, dy: Tensor, weight: Tensor, stride: list[int]) -> None:
    _product(dy, weight.to(dy.dtype), None, dx, stride, dy, True, True, False)


def _projection_weight_gradient(dy: Tensor, input: Tensor, stride: list[int]) -> Tensor:
    k = operators._kernels()
    channels_out, channels_in = dy.shape[1], input.shape[1]
    gather = _map(dy, dy, input, stride)
    tile = k.grad_weight_tile(gather.rows, channels_in, channels_out, dy.element_size(), k.chip())
    wide = accumulate_dtype(dy.dtype)
    partial = dy.new_empty((tile.programs, channels_out, channels_in), dtype=wide)
    k.projection_grad_weight(
        dy, input, partial, gather, (dy.stride(1), input.stride(1)), tile, precision(dy),
        k.dtype[wide], k.offset[gather.needs_int64],
    )  # fmt: skip
    return partial.sum(0).view(channels_out, channels_in, *[1] * len(stride))


for _name, _implementation in (
    ("projection", _projection),
    ("projection_input_gradient", _projection_input_gradient),
    ("projection_input_gradient_", _projection_input_gradient_),
    ("projection_weight_gradient", _projection_weight_gradient),
):
    LIBRARY.impl(_name, _implementation, "CPU")
    LIBRARY.impl(_name, operators._on_its_device(_implementation), "CUDA")


@torch.library.register_fake("fusedres::projection", lib=LIBRARY)
def _(input, weight, bias, stride, moments):
    output = _empty_rows(input, weight.shape[0], _spatial(input, stride))
    # How many programs there are is known where it runs; nobody but the finalising step looks. On the meta device
    # there is nobody to ask for a size that is not known.
    programs: Any = 1
    if moments and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        programs = torch.library.get_ctx().new_dynamic_size()
    shape = (programs, 3, weight.shape[0]) if moments else (0,)
    return output, output.new_empty(shape, dtype=operators._partial_dtype(input.dtype))


@torch.library.register_fake("fusedres::projection_input_gradient", lib=LIBRARY)
def _(dy, weight, spatial, stride):
    return _empty_rows(dy, weight.shape[1], spatial)


@torch.library.register_fake("fusedres::projection_input_gradient_", lib=LIBRARY)
def _(dx, dy, weight, stride):
    return None


@torch.library.register_fake("fusedres::projection_weight_gradient", lib=LIBRARY)
def _(dy, input, stride):
    shape = (dy.shape[1], input.shape[1], *[1] * len(stride))
    return dy.new_empty(shape, dtype=accumulate_dtype(dy.dtype))


# --- autograd ----------------------------------------------------------------------------------------------------


class Projection(torch.autograd.Function):
    """The Triton product; saved for backward: its input and weight. `partial` has no gradient of its own: what the
    BatchNorm's statistics do to the output's gradient is in the BatchNorm's derivative."""

    @staticmethod
    def forward(ctx: Any, input, weight, bias, stride, moments) -> tuple[Tensor, Tensor]:
        output, partial = _forward_operator(input, weight, bias, stride, moments)
        ctx.mark_non_differentiable(partial)
        _remember(ctx, input, weight, bias, stride)
        return output, partial

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if dy is None:
            return None, None, None, None, None
        input, weight = ctx.saved_tensors
        need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            dx, dweight = _aten_backward(ctx, dy, input, weight, need_input, need_weight)
        else:
            dx = dweight = None
            if need_input and (node := fork.target(ctx, 0)) is not None:
                fork.leave(node, *_visited_gradient(dy, weight, ctx.stride, True))
            elif need_input:
                dx = _input_operator(dy, weight, input.shape[2:], ctx.stride)
            if need_weight:
                dweight = _weight_operator(dy, input, ctx.stride).to(weight.dtype)
        return dx, dweight, _bias_gradient(ctx, dy) if need_bias else None, None, None


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
            fork.leave(node, *_visited_gradient(dy, weight, ctx.stride, False))
            need_input = False
        dx, dweight = _aten_backward(ctx, dy, input, weight, need_input, need_weight)
        return dx, dweight, _bias_gradient(ctx, dy) if need_bias else None, None


fork.takes_part(Projection)
fork.takes_part(_Library)


def _remember(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int]):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, weight)
    ctx.stride, ctx.bias_dtype = stride, None if bias is None else bias.dtype
    ctx.fork_source = fork.source_of(input)


def _visited_gradient(
    dy: Tensor, weight: Tensor, stride: list[int], in_triton: bool
) -> tuple[Tensor, list[int] | None]:
    """The gradient of the input at the positions that the stride visits, and that stride (None: it visits all)."""
    ones, weight = [1] * len(stride), weight.transpose(0, 1)
    visited = stride if stride != ones else None
    if in_triton:
        return _forward_operator(dy, weight, None, ones, False)[0], visited
    return _convolve(dy, weight, None, ones), visited


def _bias_gradient(ctx: Any, dy: Tensor) -> Tensor:
    wide = accumulate_dtype(dy.dtype)
    return dy.sum([0, *range(2, dy.dim())], dtype=wide).to(ctx.bias_dtype)


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


def project(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], moments: bool
) -> tuple[Tensor, Tensor | None]:
    """conv(input, weight, bias, stride) for a 1x1 weight, and its moments where the Triton product left them."""
    if why_library(input, weight) is None:
        output, partial = Projection.apply(input, weight, bias, list(stride), moments)
        return output, partial if moments else None
    if max(stride) > 1 and is_eager() and fork.source_of(input) is not None:
        return _Library.apply(input, weight, bias, list(stride)), None
    return _convolve(input, weight, bias, stride), None


def add_input_gradient(dx: Tensor, dy: Tensor, weight: Tensor, stride: tuple[int, ...]) -> None:
    """dx += the gradient of a projection's input, at the rows that its stride visits; the others are not touched."""
    _adding_operator(dx, dy, weight, list(stride))
