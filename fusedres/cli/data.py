"""Labelled images to train on: scikit-learn's handwritten digits, or random ones of any size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import CommandError, require

SOURCES = ("digits", "synthetic")
CHANNELS = 3
HELD_OUT = 0.2


@dataclass(frozen=True)
class Images:
    """Images [N, 3, S, S] in float32 and labels [N]; nothing is held out (N = 0) where there is nothing to learn."""

    description: str
    classes: int
    images: Tensor
    labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor

    def to(self, device: torch.device) -> Images:
        """All of it on the device, so that no step waits for a copy."""
        return replace(
            self,
            images=self.images.to(device),
            labels=self.labels.to(device),
            held_out_images=self.held_out_images.to(device),
            held_out_labels=self.held_out_labels.to(device),
        )


def load_digits(size: int, seed: int) -> Images:
    """The 1,797 digits of 8x8 pixels, enlarged to `size`, normalised, in three channels; a fifth is held out."""
    digits = require("sklearn.datasets", "demo", "--data digits").load_digits()
    small = torch.from_numpy(digits.images).float().unsqueeze(1)
    images = F.interpolate(small, size=(size, size), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    count = round(len(order) * HELD_OUT)
    held, train = order[:count], order[count:]
    images = (images - images[train].mean()) / images[train].std()
    images = images.expand(-1, CHANNELS, -1, -1)
    return Images(
        description=f"handwritten digits (scikit-learn), {len(train)} to train on, {len(held)} held out",
        classes=10,
        images=images[train].contiguous(),
        labels=labels[train],
        held_out_images=images[held].contiguous(),
        held_out_labels=labels[held],
    )


def make_synthetic(count: int, size: int, classes: int, seed: int) -> Images:
    """Normally distributed images with random labels: for timing at any size; there is nothing to learn."""
    generator = torch.Generator().manual_seed(seed)
    return Images(
        description=f"{count} synthetic images, {classes} classes",
        classes=classes,
        images=torch.randn(count, CHANNELS, size, size, generator=generator),
        labels=torch.randint(classes, (count,), generator=generator),
        held_out_images=torch.empty(0, CHANNELS, size, size),
        held_out_labels=torch.empty(0, dtype=torch.long),
    )


def batches(images: Images, batch: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` batches of exactly `batch` images, in an order shuffled anew each epoch.

    Raises:
        CommandError: a batch is larger than the data (before the first batch is made).
    """
    count = len(images.labels)
    if batch > count:
        raise CommandError(f"--batch {batch} is more than the {count} images there are to train on")
    return _batches(images, batch, steps, torch.Generator().manual_seed(seed))


def _batches(images, batch, steps, generator) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(images.labels), generator=generator)
        chosen, order = order[:batch].to(images.labels.device), order[batch:]
        yield images.images[chosen], images.labels[chosen]
