"""The pre-activation ResNet of He et al. 2016."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..nn.blocks import BATCH_NORM_ACTS, PreActSequential, norm_pattern, run_units
from .network import Network


class PreActResNet(Network):
    """The pre-activation network of He et al. 2016 (arXiv:1603.05027), fused, for signals, images and volumes.

    The addition at the end of each block runs with the BatchNorm and the activation that the next one begins with, over
    the borders of stages too. As in the paper's appendix the stem has a BatchNorm and an activation of its own, which
    the first block does not repeat, and another pair stands behind the last block.

    Args:
        block: `fusedres.nn.PreActBasicBlock` or `fusedres.nn.PreActBottleneck`.
        layers, num_classes, in_channels, widths, stem, shortcut, stride_on, groups, base_width: as for `ResNet`.
        activation, gate_bias, init, zero_init_residual, channels_last, dims, keep_finite_statistics, device, dtype: as
            for `ResNet`.

    Raises:
        TypeError: a number that is no whole one.
        ValueError: an argument that is none of these; the text lists what is accepted.
    """

    _stage = PreActSequential

    def _first_options(self) -> dict[str, Any]:
        return {"input_activated": True}

    def _add_last_norm(self, channels: int, dims: int, where: dict[str, Any]) -> None:
        self.bn = BATCH_NORM_ACTS[dims - 1](
            channels, activation=self.activation, keep_finite_statistics=self.keep_finite_statistics, **where
        )  # fmt: skip

    def _body(self, x: Tensor) -> Tensor:
        return run_units([*(self._modules[name] for name in self._stages), self.bn], x)

    def fused_norms(self) -> dict[str, str]:
        """The pattern that each BatchNorm of its own runs in, by its name, for `fusedres.explain`."""
        return {**super().fused_norms(), "bn": norm_pattern(self.bn)}
