"""The projected shortcut as a module, and the same for children that somebody else owns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..activations import check_activation
from ..dispatch import wants_triton
from ..ops.projection import project
from ..words import a_type
from .batch_norm import call_dual_batch_norm, plain_call
from .norms import FUSED_NORMS, parts_inside, why_called, why_not_fused

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ONES = ((1,), (1, 1), (1, 1, 1))


def why_not_projection(convolution: nn.Module | None) -> str | None:
    """Why this child is not a 1x1 convolution that can be run without calling it; None when it is."""
    if type(convolution) not in CONVOLUTIONS:
        return f"it is {a_type(convolution)}, not an nn.Conv1d/2d/3d"
    child: Any = convolution
    if (reason := why_called(child)) is not None:
        return reason
    if "_conv_forward" in child.__dict__:
        return "its _conv_forward was replaced on the instance"
    if type(child._parameters.get("weight")) is not nn.Parameter:
        return "its weight is not a plain Parameter"
    if child.kernel_size not in _ONES and any(size != 1 for size in child.kernel_size):
        return f"its kernel is {'x'.join(map(str, child.kernel_size))}"
    if child.groups != 1:
        return f"it has {child.groups} groups"
    if child.padding != "valid" and any(child.padding):
        return f"it pads by {child.padding}"
    return None


def call_projection(
    convolution: Any, input: Tensor, moments: bool = False
) -> tuple[Tensor, Tensor | None]:
    """`convolution(input)` for a real 1x1 `nn.Conv1d/2d/3d`, and the partial moments of it where there are some.

    One that is not, an input that it would not take, and torch.compile (which schedules PyTorch's own) go to
    the module itself.
    """
    # On plain PyTorch there is nothing to it.
    if torch.compiler.is_compiling() or not wants_triton(input.is_cuda):
        return convolution(input), None
    if why_not_projection(convolution) is not None:
        return convolution(input), None
    # From the dictionary, as `norms.begin`: an attribute costs 0.5 us. A bias may be computed.
    parameters = convolution._parameters
    weight = parameters["weight"]
    bias = parameters["bias"] if "bias" in parameters else convolution.bias  # noqa: SIM401
    if input.dim() != weight.dim():
        return convolution(input), None
    if (dtype := _autocast_dtype(input)) is not None:
        # What autocast does to a convolution's arguments; the weight is cast where it is used.
        input = input.to(dtype)
    elif weight.dtype != input.dtype:
        return convolution(input), None  # PyTorch's own error
    if input.shape[1] != weight.shape[1] or weight.device != input.device:
        return convolution(input), None
    return project(input, weight, bias, convolution.stride, moments)


def _autocast_dtype(input: Tensor) -> torch.dtype | None:
    if not torch._C._is_any_autocast_enabled():
        return None
    device = input.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return None if input.dtype == torch.float64 else torch.get_autocast_dtype(device)


def call_projected_tail(
    norm: Any,
    input: Tensor,
    shortcut_norm: Any,
    convolution: Any,
    shortcut: Tensor,
    activation: str | None = None,
    into: str | None = None,
    keep: bool = False,
) -> Tensor:
    """`activation(norm(input) + shortcut_norm(convolution(shortcut)))`; a convolution of None has been run already."""
    moments = None
    if convolution is not None:
        wanted = shortcut_norm.training or shortcut_norm._buffers.get("running_mean") is None
        shortcut, moments = call_projection(convolution, shortcut, wanted)
    return call_dual_batch_norm(
        norm, input, shortcut_norm, shortcut, activation, into, moments, keep
    )


class Projection(nn.Sequential):
    """The shortcut of a block that changes shape: a strided 1x1 convolution and a BatchNorm.

    `projection(x)` is the shortcut by itself. `projection.join(norm, input, x)` is the block's tail with it,
    `activation(norm(input) + projection(x))`, in as few passes over memory as it takes. The state_dict is that of
    torchvision's `downsample`: `0.weight`, `1.weight`, `1.bias`, `1.running_mean`, ...; `fuse_` finds it as such.

    Args:
        in_channels, out_channels: of the convolution.
        stride: one step, or one for each spatial dimension.
        bias: of the convolution.
        eps, momentum, affine, track_running_stats: of the BatchNorm.
        dims: 1, 2 or 3 spatial dimensions.

    Raises:
        ValueError: `dims` is none of these.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int | tuple[int, ...] = 1,
        bias: bool = False,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        dims: int = 2,
    ) -> None:
        if dims not in (1, 2, 3):
            raise ValueError(f"Projection: dims is {dims!r}, expected 1, 2 or 3")
        convolution: Any = CONVOLUTIONS[dims - 1]
        where = {"device": device, "dtype": dtype}
        super().__init__(
            convolution(in_channels, out_channels, 1, stride, bias=bias, **where),
            FUSED_NORMS[dims - 1](
                out_channels, eps, momentum, affine, track_running_stats, **where
            ),
        )

    def join(
        self, norm: nn.Module, input: Tensor, shortcut: Tensor, activation: str | None = "relu"
    ) -> Tensor:
        """`activation(norm(input) + self(shortcut))`.

        Args:
            norm: the last BatchNorm of the block's main path, which is given its input here and not called before.
            input: [N, out_channels, ...], what `norm` normalises.
            shortcut: [N, in_channels, ...], the block's input.
            activation: as for `fusedres.functional.batch_norm_act`.

        Raises:
            ValueError: an unknown activation.
            TypeError, ValueError, RuntimeError: as the modules themselves do.

        Where a child has hooks or was replaced, the modules are called one by one.
        """
        check_activation("Projection.join", activation)
        children: Any = [*self._modules.values()]
        if (
            len(children) != 2
            or torch.jit.is_tracing()
            or why_called(self) is not None
            or why_not_fused(norm) is not None
            or why_not_fused(children[1]) is not None
            or parts_inside(norm)
            or parts_inside(children[1])
        ):
            return plain_call(norm, input, self(shortcut), activation)
        return call_projected_tail(norm, input, children[1], children[0], shortcut, activation)
