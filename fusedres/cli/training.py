"""One model's training, a step at a time, timed. `compare` drives two of them over the same batches."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..words import a_type
from .data import Images

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {False: torch.contiguous_format, True: torch.channels_last}
LEARNING_RATE = 0.02
MOMENTUM = 0.9
# float16 gradients below 6e-8 vanish; the losses here are near 1, so a modest scale is enough and never overflows.
FLOAT16_LOSS_SCALE = 1024.0


@dataclass(frozen=True)
class Setting:
    """Where, in what precision and in what layout.

    Below float32 the model runs under autocast, its parameters in float32, for float16 with a scaled loss.
    """

    device: torch.device
    dtype: torch.dtype
    memory_format: torch.memory_format

    def autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32
        )

    def scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(
            self.device.type,
            init_scale=FLOAT16_LOSS_SCALE,
            enabled=self.dtype == torch.float16,
        )


class Trainee:
    """A model in training: SGD with momentum, cross-entropy; losses, seconds and bytes of every step."""

    def __init__(self, name: str, model: nn.Module, setting: Setting) -> None:
        self.name = name
        self.model = model
        self.setting = setting
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.peak_bytes: list[int] = []
        self._scaler = setting.scaler()
        self._optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)

    def step(self, images: Tensor, labels: Tensor, seed: int) -> None:
        """Forward, backward and the optimizer's step; the gradients stay, for whoever wants to look at them.

        Dropout draws from `seed`, so that two models given the same one drop the same values.
        """
        self._optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(seed)
        device = self.setting.device
        images = images.contiguous(memory_format=self.setting.memory_format)
        resident = _reset_peak(device)
        _synchronize(device)
        start = time.perf_counter()
        with self.setting.autocast():
            loss = F.cross_entropy(logits_of(self.model(images)), labels)
        self._scaler.scale(loss).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        _synchronize(device)
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())
        if resident is not None:
            self.peak_bytes.append(_peak(device) - resident)

    def forget_after(self, steps: int) -> None:
        """As if it had made only so many: of the step that Ctrl-C has ended, one of two may have its part."""
        for kept in (self.losses, self.seconds, self.peak_bytes):
            del kept[steps:]

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of the last step, by parameter."""
        return {
            name: parameter.grad
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        }

    def running_statistics(self) -> dict[str, Tensor]:
        """The running means and variances, by buffer."""
        return {name: buffer for name, buffer in self.model.named_buffers() if "running_" in name}

    def accuracy(self, data: Images, batch: int) -> float:
        """The share of held-out images that is named rightly, in eval mode."""
        pairs = zip(
            data.held_out_images.split(batch), data.held_out_labels.split(batch), strict=True
        )
        self.model.eval()
        with torch.no_grad(), self.setting.autocast():
            right = [
                (logits_of(self.model(images)).argmax(1) == labels).sum()
                for images, labels in pairs
            ]
        self.model.train()
        return sum(map(int, right)) / len(data.held_out_labels)


class NotLogits(TypeError):
    """What a model gives is nothing that the data's labels can be held against."""


def logits_of(output: Any) -> Tensor:
    """Inception and GoogLeNet answer with a tuple while training: the logits, then those of the auxiliary heads;
    Hugging Face's models with an object that has them by name.

    Raises:
        NotLogits: there are none in it.
    """
    found = getattr(output, "logits", output)
    if isinstance(found, Mapping):
        found = found.get("logits")
    elif isinstance(found, (tuple, list)) and found:
        found = found[0]
    if isinstance(found, Tensor):
        return found
    keys = f" of {', '.join(map(repr, output))}" if isinstance(output, Mapping) else ""
    raise NotLogits(
        f"it gives {a_type(output)}{keys}, expected logits: a tensor, the first of a tuple, or what is named 'logits'"
    )


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _reset_peak(device: torch.device) -> int | None:
    """Start a new peak; the bytes resident now, or None where the device does not tell."""
    module = torch.get_device_module(device)
    if not hasattr(module, "reset_peak_memory_stats"):
        return None
    module.reset_peak_memory_stats(device)
    return module.memory_allocated(device)


def _peak(device: torch.device) -> int:
    return torch.get_device_module(device).max_memory_allocated(device)
