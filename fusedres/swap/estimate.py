"""How many bytes BatchNorm, add and activation move in a training step, and how many of them a fused site saves.

Counted in passes, a pass being one read or write of a tensor of the activation's size: eager runs each operation by
itself (in place where it can), a fused site as `benchmarks/floors.py` says. What the fork of a residual and the moments
of a projection save comes on top; time is not estimated.
"""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..nn.norms import is_batch_norm
from .config import check_not_lazy
from .install import install

# Passes, forward and backward: (eager, fused); where an activation follows, and it is one that a bit an element is kept
# for, the bit is written once and read twice.
_PASSES = {
    "BN": (3 + 5, 3 + 5),
    "BN+ReLU": (5 + 8, 3 + 5),
    "BN+add": (6 + 5, 4 + 5),
    "BN+add+ReLU": (8 + 8, 4 + 6),
    "BN+BN+add": (9 + 10, 5 + 8),
    "BN+BN+add+ReLU": (11 + 13, 5 + 8),
    "add+BN": (6 + 8, 5 + 6),
    "add+BN+ReLU": (8 + 11, 5 + 6),
}
_BITS = 3 / 8  # bytes an element


def passes(pattern: str, piecewise: bool, element_size: int) -> tuple[float, float]:
    """(eager, fused) passes of a pattern in a training step, "ReLU" standing for any activation."""
    eager, fused = _PASSES[pattern]
    if "+add+ReLU" not in pattern:
        return eager, fused
    if piecewise:
        return eager, fused + _BITS / element_size
    # The residual is read again in both passes; that of two BatchNorms is read there anyway.
    return eager, fused + (0 if pattern.startswith("BN+BN") else 2)


def norm_outputs(
    model: nn.Module, input_shape: Sequence[int], caller: str
) -> dict[str, tuple[int, int]]:
    """(elements, bytes an element) that each BatchNorm of a model puts out for one input, by name.

    The model itself is not run: a double of it on the meta device is, which computes no values.

    Raises:
        TypeError: `input_shape` is not a sequence of whole numbers.
        ValueError: one of them is below 1; a layer is lazy and has had no input; or the model does not take one tensor
            of this shape, and the text says what it raised.
    """
    _check_shape(caller, input_shape)
    check_not_lazy(caller, model)
    found: Counter[str] = Counter()
    element_sizes: dict[str, int] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[name] += output.numel()
            element_sizes[name] = output.element_size()

        return hook

    try:
        double = _double(model)
        for name, module in double.named_modules():
            if is_batch_norm(module):
                module.register_forward_hook(note(name))
        dtype = next((p.dtype for p in double.parameters() if p.is_floating_point()), torch.float32)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            double(torch.empty(tuple(input_shape), dtype=dtype, device="meta"))
    except Exception as error:
        # The model is foreign code: whatever it raises is why there is no estimate.
        text = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{caller}: the model does not take a tensor of shape {list(input_shape)}: {type(error).__name__}: {text}"
            f"{_channels_wanted(model, input_shape)}"
        ) from error
    return {name: (count, element_sizes[name]) for name, count in found.items()}


def _check_shape(caller: str, shape: Any) -> None:
    wanted = "expected whole numbers, for example (256, 3, 224, 224)"
    if isinstance(shape, torch.Tensor):
        raise TypeError(
            f"{caller}: input_shape is a tensor of shape {list(shape.shape)}, {wanted}; pass its shape"
        )
    is_sequence = isinstance(shape, Sequence) and not isinstance(shape, str)
    if not is_sequence or not all(type(size) is int for size in shape):
        raise TypeError(f"{caller}: input_shape is {shape!r}, {wanted}")
    if not shape or min(shape) < 1:
        raise ValueError(f"{caller}: input_shape is {shape!r}, expected sizes of 1 or more")


def _channels_wanted(model: nn.Module, shape: Sequence[int]) -> str:
    """That the first convolution wants another number of channels, where it does: PyTorch's own words may not say."""
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            wanted = module.in_channels
            if len(shape) > 1 and shape[1] != wanted:
                return f"; its first convolution takes {wanted} channels, and {list(shape)} has {shape[1]}"
            break
    return ""


def _double(model: nn.Module) -> nn.Module:
    """The same tree of modules in eval mode on the meta device, unfused and without hooks; no memory is copied."""
    memo: dict[int, Any] = {}
    attributes = [value for module in model.modules() for value in vars(module).values()]
    others = [value for value in attributes if type(value) is torch.Tensor]
    for tensor in (*model.parameters(), *model.buffers(), *others):
        made = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(made, False) if isinstance(tensor, nn.Parameter) else made
    double = copy.deepcopy(model, memo)
    for module in double.modules():
        install(module, None)
        for name, hooks in vars(module).items():
            if name.endswith("_hooks") and isinstance(hooks, OrderedDict):
                hooks.clear()
    return double.eval()
