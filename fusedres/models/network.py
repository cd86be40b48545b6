"""What the post-activation and the pre-activation ResNets have in common: stem, stages, head, initialisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.batch_norm import run_tail
from ..nn.keeping import KeepsStatistics
from ..nn.norms import FUSED_NORMS
from ..nn.projection import CONVOLUTIONS
from ..nn.script import NotScriptable
from ..nn.shortcuts import SHORTCUTS, check_choice, check_count

_STEMS = ("7x7", "3x3")
_MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_AVERAGE_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_INITS: dict[str, Callable[[Tensor], Tensor]] = {
    # He et al. 2015, arXiv:1502.01852; Glorot and Bengio 2010.
    "he": lambda weight: nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu"),
    "xavier": nn.init.xavier_uniform_,
}
_CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


class Network(KeepsStatistics, NotScriptable, nn.Module):
    """Stem, stages `layer1`, `layer2`, ... of blocks, average pooling and a linear classifier."""

    _stage: type[nn.Sequential] = nn.Sequential

    def __init__(
        self,
        block: type[Any],
        layers: Sequence[int],
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        widths: Sequence[int] = (64, 128, 256, 512),
        stem: str = "7x7",
        shortcut: str = "project",
        stride_on: str = "3x3",
        groups: int = 1,
        base_width: int = 64,
        activation: str | None = "relu",
        gate_bias: float = -6.0,
        init: str = "he",
        zero_init_residual: bool = False,
        channels_last: bool = False,
        dims: int = 2,
        keep_finite_statistics: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        caller = type(self).__name__
        check_choice(caller, "dims", dims, (1, 2, 3))
        check_choice(caller, "init", init, tuple(_INITS))
        check_choice(caller, "shortcut", shortcut, SHORTCUTS)
        check_choice(caller, "stem", stem, _STEMS)
        counts = {
            "num_classes": num_classes, "in_channels": in_channels, "groups": groups, "base_width": base_width,
            **{f"layers[{k}]": count for k, count in enumerate(layers)},
            **{f"widths[{k}]": width for k, width in enumerate(widths)},
        }  # fmt: skip
        for argument, count in counts.items():
            check_count(caller, argument, count)
        if channels_last and dims not in _CHANNELS_LAST:
            raise ValueError(
                f"{caller}: channels_last is {channels_last!r} and dims is {dims!r}; PyTorch has that memory format "
                "for 2 and 3 dimensions only, pass channels_last=False"
            )
        if len(layers) != len(widths):
            raise ValueError(
                f"{caller}: layers has {len(layers)} entries and widths {len(widths)}, expected one "
                "of each for every stage"
            )
        where = {"device": device, "dtype": dtype}
        options = {
            "shortcut": shortcut, "stride_on": stride_on, "groups": groups, "base_width": base_width,
            "activation": activation, "gate_bias": gate_bias, "dims": dims, **where,
        }  # fmt: skip
        if keep_finite_statistics:  # a block of one's own need not know of it
            options["keep_finite_statistics"] = True
        self.activation, self.keep_finite_statistics = activation, keep_finite_statistics
        self._add_stem(stem, in_channels, widths[0], dims, where)
        channels, first = widths[0], self._first_options()
        for k, (width, count) in enumerate(zip(widths, layers, strict=True)):
            blocks = []
            for i in range(count):
                stride = 2 if k > 0 and i == 0 else 1
                blocks.append(block(channels, width, stride, **options, **first))
                channels, first = width * block.expansion, {}
            self.add_module(f"layer{k + 1}", self._stage(*blocks))
        self._stages = tuple(f"layer{k + 1}" for k in range(len(layers)))
        self._add_last_norm(channels, dims, where)
        self.avgpool = _AVERAGE_POOLS[dims - 1](1)
        self.fc = nn.Linear(channels, num_classes, **where)
        self._initialise(init, zero_init_residual)
        if channels_last:
            self.to(memory_format=_CHANNELS_LAST[dims])

    def _add_stem(
        self, stem: str, in_channels: int, width: int, dims: int, where: dict[str, Any]
    ) -> None:
        convolution: Any = CONVOLUTIONS[dims - 1]
        kernel, stride = (7, 2) if stem == "7x7" else (3, 1)
        self.conv1 = convolution(
            in_channels, width, kernel, stride, kernel // 2, bias=False, **where
        )
        self.bn1 = FUSED_NORMS[dims - 1](width, **where)
        self.maxpool: nn.Module | None = _MAX_POOLS[dims - 1](3, 2, 1) if stem == "7x7" else None

    def _first_options(self) -> dict[str, Any]:
        """Options of the very first block alone."""
        return {}

    def _add_last_norm(self, channels: int, dims: int, where: dict[str, Any]) -> None:
        """A BatchNorm behind the last stage, where there is one."""

    @torch.no_grad()
    def _initialise(self, init: str, zero_init_residual: bool) -> None:
        # The biases of gates and of the classifier stay as they were made; a BatchNorm begins as ones and zeros.
        for module in self.modules():
            if isinstance(module, CONVOLUTIONS):
                _INITS[init](module.weight)
        if zero_init_residual:
            for name in self._stages:
                for block in self.get_submodule(name).children():
                    block.zero_last()  # type: ignore[operator]

    def _stem(self, x: Tensor) -> Tensor:
        x = run_tail(self.bn1, self.conv1(x), None, self.activation, self.keep_finite_statistics)
        return x if self.maxpool is None else self.maxpool(x)

    def _body(self, x: Tensor) -> Tensor:
        for name in self._stages:
            x = self._modules[name](x)  # type: ignore[misc]
        return x

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, in_channels, ...] -> logits [N, num_classes]."""
        x = self.avgpool(self._body(self._stem(x)))
        return self.fc(torch.flatten(x, 1))

    def fused_norms(self) -> dict[str, str]:
        """The pattern that each BatchNorm of its own runs in, by its name, for `fusedres.explain`."""
        return {"bn1": "BN" if self.activation is None else f"BN+{self.activation}"}
