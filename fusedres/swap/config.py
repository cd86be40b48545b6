"""What `fuse_` is asked to do, and the checks of its arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

# The longest pattern that a BatchNorm stands in is the one that is fused.
PATTERNS = ("BN+ReLU", "BN+add", "BN+add+ReLU", "BN+BN+add", "BN+BN+add+ReLU")

FilterFn = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class FuseConfig:
    """Which patterns `fuse_` fuses.

    Args:
        patterns: any of "BN+ReLU", "BN+add", "BN+add+ReLU", "BN+BN+add", "BN+BN+add+ReLU"; all of them by default. A
            site of a pattern that is not listed is left to the module's own forward, and the report says so. The last
            two take the BatchNorm (and the 1x1 convolution) of a projected shortcut into the tail; where they are not
            listed, the shortcut is left as it is and the tail is one of the two before.

    Raises:
        TypeError: `patterns` is not a collection of strings.
        ValueError: an unknown pattern.
    """

    patterns: tuple[str, ...] = PATTERNS

    def __post_init__(self) -> None:
        if isinstance(self.patterns, str) or not isinstance(
            self.patterns, (tuple, list, set, frozenset)
        ):
            raise TypeError(
                f"FuseConfig: patterns is {self.patterns!r}, expected a tuple of names; "
                f"choose from {_quoted(PATTERNS)}"
            )
        for pattern in self.patterns:
            if pattern not in PATTERNS:
                raise ValueError(
                    f"FuseConfig: unknown pattern {pattern!r} in patterns; choose from {_quoted(PATTERNS)}"
                )
        object.__setattr__(self, "patterns", tuple(p for p in PATTERNS if p in self.patterns))


def check_arguments(name: str, model: Any, config: Any, filter_fn: Any) -> FuseConfig:
    """The config to use; a TypeError that names the argument when one is not what it should be."""
    check_model(name, model)
    if config is not None and not isinstance(config, FuseConfig):
        raise TypeError(
            f"{name}: config is a {type(config).__name__}, expected a FuseConfig or None; "
            "write config=FuseConfig(patterns=(...))"
        )
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(
            f"{name}: filter_fn is a {type(filter_fn).__name__}, expected a function "
            "(module, fqn) -> bool, or None"
        )
    return FuseConfig() if config is None else config


def check_model(name: str, model: Any) -> None:
    """Refuse what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{name}: model is a {type(model).__name__}, expected a torch.nn.Module; "
            "pass the model itself, not its name, its class or its state_dict"
        )


def _quoted(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names))
