"""What `fuse_` is asked to do, and the checks of its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from ..activations import NAMES
from ..words import a_type

# The longest pattern that a BatchNorm stands in is the one that is fused.
SUM = "add+ReLU"
PATTERNS = (
    "BN", "BN+ReLU", "BN+add", "BN+add+ReLU", "BN+BN+add", "BN+BN+add+ReLU", "add+BN", "add+BN+ReLU", SUM,
)  # fmt: skip

FilterFn = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class FuseConfig:
    """What `fuse_` fuses.

    Args:
        patterns: any of "BN", "BN+ReLU", "BN+add", "BN+add+ReLU", "BN+BN+add", "BN+BN+add+ReLU", "add+BN",
            "add+BN+ReLU" and "add+ReLU", where "ReLU" stands for any activation; all of them by default. A site of a
            pattern that is not listed is left to the module's own forward, and the report says so. Those with two BN
            take the BatchNorm (and the 1x1 convolution) of a projected shortcut into the tail; where they are not
            listed, the shortcut is left as it is and the tail is one of the two before. Those with the add in front are
            pre-activation units: the sum is kept, and written where its statistics are taken; where they are not
            listed, "BN" and "BN+ReLU" is what is left of them. "add+ReLU" is the end of a block that scales what its
            last BatchNorm gave (squeeze-and-excitation).
        activations: any of "relu", "relu6", "leaky_relu", "silu", "gelu", "gelu_tanh", "hardswish" and "mish"; all of
            them by default.
        min_elements: a block that is called with an input of fewer elements runs its own forward; 0 by default, which
            fuses inputs of any size. Kernels pay by the byte: on small inputs there is little to gain.
        keep_finite_statistics: in training, a channel whose running mean or variance would not be finite (the batch has
            an infinity or a NaN in it, as where float16 overflows and `GradScaler` skips the step) keeps both as they
            were; `num_batches_tracked` goes with the first channel. False by default, as PyTorch. It costs a fused site
            nothing on the Triton backend, a few operations on [C] elsewhere; there is no host synchronisation. What is
            not fused moves as ever, and so does a block that runs its own forward. Modules of `fusedres.nn` and
            `fusedres.models` inside have the same option, which is on until `unfuse_`.
        recompute: a `relu(batch_norm(x))` in training that nothing reads but a convolution of the same block is not
            kept for its backward, but computed again there from `x`, which is kept anyway: fewer bytes for one more
            pass, the same gradients bit for bit. False by default. Under `torch.compile` it steps aside, since the
            compiler decides by itself what it computes again.

    Raises:
        TypeError: `patterns` or `activations` is not a collection of strings, `min_elements` no whole number,
            `keep_finite_statistics` or `recompute` no bool.
        ValueError: an unknown pattern or activation, a negative number.
    """

    patterns: tuple[str, ...] = PATTERNS
    activations: tuple[str, ...] = NAMES
    min_elements: int = 0
    keep_finite_statistics: bool = False
    recompute: bool = False

    def __post_init__(self) -> None:
        for field, names in (("patterns", PATTERNS), ("activations", NAMES)):
            given = getattr(self, field)
            if isinstance(given, str) or not isinstance(given, (tuple, list, set, frozenset)):
                raise TypeError(
                    f"FuseConfig: {field} is {given!r}, expected a tuple of names; choose from {_quoted(names)}"
                )
            for name in given:
                if name not in names:
                    raise ValueError(
                        f"FuseConfig: unknown {field[:-1]} {name!r} in {field}; choose from {_quoted(names)}"
                    )
            object.__setattr__(self, field, tuple(name for name in names if name in given))
        for field in ("keep_finite_statistics", "recompute"):
            if type(getattr(self, field)) is not bool:
                raise TypeError(
                    f"FuseConfig: {field} is {getattr(self, field)!r}, expected True or False"
                )
        if type(self.min_elements) is not int:
            raise TypeError(
                f"FuseConfig: min_elements is {self.min_elements!r}, expected a whole number of elements"
            )
        if self.min_elements < 0:
            raise ValueError(f"FuseConfig: min_elements is {self.min_elements}, expected 0 or more")


def check_arguments(name: str, model: Any, config: Any, filter_fn: Any) -> FuseConfig:
    """The config to use; a TypeError that names the argument when one is not what it should be."""
    check_model(name, model)
    if config is not None and not isinstance(config, FuseConfig):
        raise TypeError(
            f"{name}: config is {a_type(config)}, expected a FuseConfig or None; "
            "write config=FuseConfig(patterns=(...))"
        )
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(
            f"{name}: filter_fn is {a_type(filter_fn)}, expected a function "
            "(module, fqn) -> bool, or None"
        )
    if filter_fn is not None:
        _check_filter(name, filter_fn)
    return FuseConfig() if config is None else config


def _check_filter(name: str, filter_fn: Callable[..., Any]) -> None:
    """Refuse a function that cannot be called with a module and a name."""
    try:
        signature = inspect.signature(filter_fn)
    except (TypeError, ValueError):  # some that are written in C have none
        return
    try:
        signature.bind(None, "")
    except TypeError as error:
        called = getattr(filter_fn, "__name__", type(filter_fn).__name__)
        raise TypeError(
            f"{name}: filter_fn is {called}{signature}, expected a function of two arguments, the module and its name "
            "in the model: filter_fn=lambda module, fqn: ..."
        ) from error


def check_model(name: str, model: Any) -> None:
    """Refuse what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{name}: model is {a_type(model)}, expected a torch.nn.Module; "
            "pass the model itself, not its name, its class or its state_dict"
        )


def check_not_lazy(name: str, model: nn.Module) -> None:
    """Refuse a model whose shapes a first input is still to tell: there is nothing to count yet."""
    for fqn, module in model.named_modules():
        if any(map(is_lazy, (*module.parameters(False), *module.buffers(False)))):
            raise ValueError(
                f"{name}: {fqn or 'the model'} is {a_type(module)}, whose shapes its first input tells; run one batch "
                "through the model first"
            )


def _quoted(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names))
