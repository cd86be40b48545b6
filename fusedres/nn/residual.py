"""`y = act(skip(x) + scale * block(x))` around any module."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ..activations import activate, check_activation
from ..dispatch import is_eager
from ..ops.projection import project
from ..words import a_type
from .activations import activation_of
from .add import call_scaled_add
from .batch_norm import run_tail
from .keeping import KeepsStatistics
from .norms import is_batch_norm, why_called, why_not_fused
from .projection import Projection, why_not_projection
from .script import NotScriptable

SKIPS, SCALES = ("project", "pad"), ("scalar", "channel")
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class _MadeLater(NotScriptable, nn.Module):
    """A module with parameters whose shape is known at the first call."""

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        _save(self, destination, prefix, keep_vars, super()._save_to_state_dict)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        _shape_as_loaded(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Residual(KeepsStatistics, _MadeLater):
    """`y = activation(skip(x) + scale * block(x))` (He et al. 2015, arXiv:1512.03385; with a scale: Bachlechner et al.
    2020, arXiv:2003.04887).

    Whatever the block is, its channels are dimension 1 of what it gives: [N, C], [N, C, L], [N, C, H, W],
    [N, C, D, H, W]. The sum, the scale and the activation are one operator; where the block is an `nn.Sequential` that
    ends in a BatchNorm (and there is no scale), that one too, and each BatchNorm with an activation behind it.

    Args:
        block: any module that takes one tensor and gives one.
        skip: None for the identity; a module; "project": a convolution with a 1x1 kernel, without a bias, of the stride
            that brings one shape to the other (a linear map for [N, C]), whose weight is made at the first call; "pad":
            every stride-th position and channels of zeros, without parameters (option A of He et al. 2015).
        scale: None; "scalar" (or True) or "channel": a parameter that starts at 0, so that the block starts as the
            identity; a number, or a tensor of one element or of one per channel: a parameter that starts there. The
            shape of "channel" is known at the first call.
        activation: None, a name as for `fusedres.functional.batch_norm_act`, or a module that is called.
        device, dtype: of `scale`, and of a weight that is made at the first call (on the device of what comes).
        keep_finite_statistics: as in `FuseConfig`, for the BatchNorms that are run here: those of an `nn.Sequential`.

    Parameters made at the first call are there for an optimizer after one batch, as with PyTorch's lazy modules.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a name that is not known; in `forward`, shapes that do not match.
    """

    scale: Tensor | None

    def __init__(
        self,
        block: nn.Module,
        skip: nn.Module | str | None = None,
        scale: Tensor | float | str | None = None,
        activation: nn.Module | str | None = None,
        device: Any = None,
        dtype: Any = None,
        *,
        keep_finite_statistics: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(block, nn.Module):
            raise TypeError(f"Residual: block is {a_type(block)}, expected an nn.Module")
        if not isinstance(activation, nn.Module):
            check_activation("Residual", activation)
        where = {"device": device, "dtype": dtype}
        self.block = block
        self.skip = _make_skip(skip, where)
        self.scale = _make_scale(scale, where)
        self.activation = activation
        self.keep_finite_statistics = keep_finite_statistics

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, ...] -> the shape that the block gives.

        Raises:
            TypeError: the block or the skip connection gives something else than a tensor.
            ValueError: the block and the skip connection give different shapes.
        """
        norm, out = self._branch(x)
        if isinstance(out, (tuple, list, dict)) or out is None:
            raise TypeError(_no_tensor("block", self.block, out))
        name = self.activation if isinstance(self.activation, str) else None
        keep = self.keep_finite_statistics
        if not isinstance(out, Tensor) or torch.jit.is_tracing():  # a proxy of torch.fx, a trace
            out = out if norm is None else norm(out)
            y = activate(self._shortcut(x, out) + self._scaled(out), name)
        elif norm is not None and isinstance(self.skip, Projection):
            _check_projection(self.skip, out, x)
            y = self.skip.joined(norm, out, x, name, keep or self.skip.keep_finite_statistics)
        elif norm is not None:
            y = run_tail(norm, out, self._shortcut(x, out), name, keep)
        else:
            y = call_scaled_add(out, self._shortcut(x, out), self._shaped_scale(out), name)
        return self.activation(y) if isinstance(self.activation, nn.Module) else y

    def _shortcut(self, x: Tensor, out: Tensor) -> Tensor:
        if isinstance(self.skip, (_Project, _Pad)):
            return self.skip(x, out)
        residual = x if self.skip is None else self.skip(x)
        if isinstance(residual, (tuple, list, dict)) or residual is None:
            raise TypeError(_no_tensor("skip connection", self.skip, residual))
        if isinstance(out, Tensor) and _sizes(out) != _sizes(residual):
            raise ValueError(_mismatch(_sizes(out), _sizes(residual)))
        return residual

    def _branch(self, x: Tensor) -> tuple[Any, Tensor]:
        """What the block gives; or, without a scale, its last BatchNorm and what is still to be normalised."""
        if self.scale is None:
            return _run(self.block, x, self.keep_finite_statistics)
        return None, self.block(x)

    def _shaped_scale(self, out: Tensor) -> Tensor | None:
        if isinstance(self.scale, UninitializedParameter):
            _materialize(self.scale, (out.shape[1],), out)
            nn.init.zeros_(self.scale)
        return self.scale

    def _scaled(self, out: Any) -> Any:
        """`scale * out` in a trace; of a proxy, `scale` is one too."""
        if self.scale is None:
            return out
        own: Any = self._parameters.get("scale", self.scale)
        if isinstance(own, UninitializedParameter):
            raise ValueError(
                "Residual: the shape of scale is unknown until the first call, which comes before a trace"
            )
        shape = [-1] + [1] * (out.dim() - 2) if max(_sizes(own), default=1) > 1 else []
        return self.scale.view(shape) * out

    def extra_repr(self) -> str:
        scale = self.scale
        if scale is None:
            text = "None"
        elif isinstance(scale, UninitializedParameter):
            text = "channel"
        else:
            text = "scalar" if scale.numel() == 1 else "channel"
        name = "" if isinstance(self.activation, nn.Module) else f", activation={self.activation}"
        return f"scale={text}{name}{self._kept_repr()}"


def _make_skip(skip: Any, where: dict[str, Any]) -> nn.Module | None:
    if skip == "project":
        return _Project(**where)
    if skip == "pad":
        return _Pad()
    if isinstance(skip, str):
        raise ValueError(
            f"Residual: skip is {skip!r}, expected None (the identity), a module, 'project' (a 1x1 convolution "
            "where the shape changes), or 'pad' (channels of zeros where it changes)"
        )
    if skip is not None and not isinstance(skip, nn.Module):
        raise TypeError(
            f"Residual: skip is {a_type(skip)}, expected None, an nn.Module, "
            f"{' or '.join(map(repr, SKIPS))}"
        )
    return skip


def _make_scale(scale: Any, where: dict[str, Any]) -> Tensor | None:
    if scale is None or scale is False:
        return None
    if scale is True:
        scale = "scalar"
    if isinstance(scale, str):
        if scale not in SCALES:
            raise ValueError(
                f"Residual: scale is {scale!r}, expected None, {', '.join(map(repr, SCALES))}, a number or a tensor"
            )
        if scale == "channel":
            return _unshaped(where)
        scale = 0.0
    if isinstance(scale, nn.Parameter):
        start: Tensor = scale
    elif isinstance(scale, Tensor):
        start = nn.Parameter(scale.detach().clone().to(**where))
    elif type(scale) in (int, float):
        start = nn.Parameter(torch.full((), float(scale), **where))
    else:
        raise TypeError(
            f"Residual: scale is {a_type(scale)}, expected None, a number, a tensor, "
            f"{' or '.join(map(repr, SCALES))}"
        )
    if start.dim() > 1 and start.numel() > 1:
        raise ValueError(
            f"Residual: scale has shape {list(start.shape)}, expected one element, or one per channel [C]"
        )
    return start


def _no_tensor(what: str, module: Any, given: Any) -> str:
    return (
        f"Residual: the {what}, {type(module).__name__}, gives {a_type(given)}, expected one tensor; wrap it "
        "in a module whose forward returns the one that is to be added"
    )


def _mismatch(out: Sequence[int], residual: Sequence[int]) -> str:
    return (
        f"Residual: the block gives {list(out)} and the skip connection {list(residual)}; expected one "
        'shape. Give skip="project" (a 1x1 convolution with a stride), skip="pad" (every stride-th position, channels '
        "of zeros), or a module of your own that brings one to the other"
    )


def _check_projection(skip: Projection, out: Tensor, x: Tensor) -> None:
    """Refuse what cannot be joined, before a BatchNorm has counted it."""
    convolution: Any = skip[0]
    if why_not_projection(convolution) is not None or x.dim() != convolution.weight.dim():
        return  # it is called, or PyTorch says what is wrong
    steps = zip(x.shape[2:], convolution.stride, strict=True)
    sizes = [(size - 1) // step + 1 for size, step in steps]
    shape = [x.shape[0], convolution.out_channels, *sizes]
    if list(out.shape) != shape:
        raise ValueError(_mismatch(list(out.shape), shape))


def _run(block: nn.Module, x: Tensor, keep: bool) -> tuple[Any, Tensor]:
    """(None, block(x)), or the BatchNorm that the block ends in, and its input; fused as far as it is a chain."""
    if type(block) is not nn.Sequential or why_called(block) is not None:
        return None, block(x)
    chain: Any = block
    children = list(chain)  # `children()` leaves out a module that stands in it twice
    while children:
        child = children.pop(0)
        if is_batch_norm(child) and why_not_fused(child) is None:
            if not children:
                return child, x
            name = activation_of(children[0])
            if name is not None and why_called(children[0]) is None:
                children.pop(0)
            else:
                name = None
            x = run_tail(child, x, None, name, keep)
            continue
        norm, x = _run(child, x, keep)
        if norm is not None and not children:
            return norm, x
        if norm is not None:
            children.insert(0, norm)
    return None, x


def _sizes(x: Tensor) -> Sequence[int]:
    """The shape, of numbers in a trace too."""
    if not torch.jit.is_tracing():
        return x.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return [int(size) for size in x.shape]


def _steps(given: Sequence[int], wanted: Sequence[int]) -> tuple[int, ...] | None:
    """The stride of each spatial dimension that brings one size to the other; None where there is none."""
    steps = []
    for size, target in zip(given[2:], wanted[2:], strict=True):
        step = -(-size // target) if target else 1
        if size != target and (size - 1) // max(step, 1) + 1 != target:
            return None
        steps.append(max(step, 1))
    return tuple(steps)


@torch.fx.wrap
def _project_as(x: Tensor, like: Tensor, weight: Tensor) -> Tensor:
    given, wanted = _sizes(x), _sizes(like)
    steps = _steps(given, wanted) if len(given) == len(wanted) else None
    dimensions = x.dim() - 2
    if steps is None or dimensions not in (0, *_CONVOLVE):
        raise ValueError(_mismatch(wanted, given))
    if isinstance(weight, UninitializedParameter):
        _materialize(weight, (wanted[1], given[1], *(1,) * dimensions), x)
        nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
    if dimensions == 0:
        return F.linear(x, weight)
    # The compiler, which is not eager, cannot look behind the last question (PyTorch 2.11).
    is_ours = is_eager() and not torch.jit.is_tracing() and x.dtype == weight.dtype
    if is_ours and not _casts(x.device.type):
        return project(x, weight, None, steps, False)[0]
    return _CONVOLVE[dimensions](x, weight, None, steps)


def _casts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


@torch.fx.wrap
def _pad_as(x: Tensor, like: Tensor) -> Tensor:
    given, wanted = _sizes(x), _sizes(like)
    steps = _steps(given, wanted) if len(given) == len(wanted) else None
    if steps is None or wanted[1] < given[1]:
        raise ValueError(_mismatch(wanted, given))
    small = x[(slice(None), slice(None), *(slice(None, None, step) for step in steps))]
    missing = wanted[1] - given[1]
    return F.pad(small, (0, 0) * len(steps) + (0, missing)) if missing else small


class _Project(_MadeLater):
    """x [N, Cin, ...] as `like` [N, Cout, ...], by a strided 1x1 convolution; its weight is made at the first call."""

    weight: Tensor

    def __init__(self, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.weight = _unshaped({"device": device, "dtype": dtype})

    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        return _project_as(x, like, self.weight)

    def extra_repr(self) -> str:
        shape = "unknown until the first call"
        if not isinstance(self.weight, UninitializedParameter):
            shape = f"{self.weight.shape[1]}, {self.weight.shape[0]}"
        return f"{shape}, kernel_size=1"


class _Pad(nn.Module):
    """x [N, Cin, ...] as `like` [N, Cout, ...]: every stride-th position, channels of zeros behind (option A)."""

    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        return _pad_as(x, like)


# --- parameters whose shape is known at the first call ---------------------------------------------------------------


def _unshaped(where: dict[str, Any]) -> UninitializedParameter:
    made: Any = UninitializedParameter
    return made(**where)


def _materialize(parameter: UninitializedParameter, shape: tuple[int, ...], like: Tensor) -> None:
    with torch.inference_mode(False):  # a parameter made there could not be trained
        parameter.materialize(shape, device=like.device, dtype=parameter.dtype)


def _uninitialized(module: nn.Module) -> dict[str, UninitializedParameter]:
    parameters: dict[str, Any] = dict(module._parameters)
    return {n: p for n, p in parameters.items() if isinstance(p, UninitializedParameter)}


def _save(module: nn.Module, destination: Any, prefix: str, keep_vars: bool, save: Any) -> None:
    """As PyTorch's lazy modules: what has no shape yet is put in as it is."""
    waiting: dict[str, Any] = _uninitialized(module)
    for name in waiting:
        destination[prefix + name] = module._parameters[name]
        module._parameters[name] = None
    try:
        save(destination, prefix, keep_vars)
    finally:
        module._parameters.update(waiting)


def _shape_as_loaded(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    for name, parameter in _uninitialized(module).items():
        loaded = state_dict.get(prefix + name)
        if isinstance(loaded, Tensor) and not isinstance(loaded, UninitializedParameter):
            with torch.no_grad():
                parameter.materialize(loaded.shape)
