"""Labelled images to train on: scikit-learn's handwritten digits, random ones of any size, or those of a folder."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import CommandError, first_line, require

CHANNELS = 3
DIGITS = 1797
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
    count, _ = _split(len(order))
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


def open_folder(path: str) -> Any:
    """torchvision's ImageFolder: one sub-folder of images for each class; no image is read.

    Raises:
        CommandError: it is no folder, or is not laid out so.
    """
    expected = "expected a folder with one sub-folder of images for each class"
    if not path or not Path(path).is_dir():
        raise CommandError(
            f"--data {path!r} is not a folder, nor a name that --help lists; {expected}"
        )
    datasets = require("torchvision.datasets", "models", "--data FOLDER")
    try:
        folder = datasets.ImageFolder(path)
    except FileNotFoundError as error:
        said = str(error).split(". ")[0].rstrip(".")
        raise CommandError(f"--data {path!r}: {said}; {expected}") from error
    if len(folder.classes) < 2:
        raise CommandError(f"--data {path!r} has one class only, {folder.classes[0]!r}; {expected}")
    return folder


def load_folder(path: str, size: int, seed: int, most: int) -> Images:
    """As `load_digits`, of a folder, at most so many of its images: scaled and cropped to a square.

    Raises:
        CommandError: as `open_folder`; an image cannot be read.
    """
    folder = open_folder(path)
    transforms = require("torchvision.transforms.v2", "models", "--data FOLDER")
    square = transforms.Compose(
        [transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()]
    )
    order = torch.randperm(len(folder), generator=torch.Generator().manual_seed(seed))[:most]
    held, train = _split(len(order))
    pixels = torch.empty(len(order), CHANNELS, size, size)
    for place, index in enumerate(order.tolist()):
        try:
            pixels[place] = square(folder[index][0])
        except Exception as error:  # Pillow's, of a file that is no image, or one too large
            name = folder.samples[index][0]
            raise CommandError(f"--data: {name} cannot be read: {first_line(error)}") from error
    pixels = (pixels - pixels[held:].mean()) / pixels[held:].std().clamp(min=1e-6)
    labels = torch.tensor(folder.targets)[order]
    classes = len(folder.classes)
    return Images(
        description=f"{Path(path).name} ({classes} classes), {train} to train on, {held} held out",
        classes=classes,
        images=pixels[held:].contiguous(),
        labels=labels[held:],
        held_out_images=pixels[:held].contiguous(),
        held_out_labels=labels[:held],
    )


def _split(count: int) -> tuple[int, int]:
    """How many are held out, and how many are left."""
    held = round(count * HELD_OUT)
    return held, count - held


@dataclass(frozen=True)
class Source:
    """What is known of images before one of them is read: classes, how many there are to train on; and `load(size)`."""

    classes: int
    count: int
    load: Callable[[int], Images]


def source(options: argparse.Namespace) -> Source:
    """What `--data` names, and what the options around it say of it.

    Raises:
        CommandError: there is no such data, or less of it than a batch.
    """
    what, seed = options.data, options.seed
    if what == "digits":
        require("sklearn.datasets", "demo", "--data digits")
        found = Source(10, _split(DIGITS)[1], lambda size: load_digits(size, seed))
    elif what == "synthetic":
        count, classes = options.images, options.classes
        found = Source(classes, count, lambda size: make_synthetic(count, size, classes, seed))
    else:
        folder = open_folder(what)
        count = _split(min(len(folder), options.images))[1]
        found = Source(
            len(folder.classes), count, lambda size: load_folder(what, size, seed, options.images)
        )
    check_batch(options.batch, found.count)
    return found


def check_batch(batch: int, count: int) -> None:
    """Refuse a batch that is larger than the data.

    Raises:
        CommandError: it is.
    """
    if batch > count:
        raise CommandError(f"--batch {batch} is more than the {count} images there are to train on")


def batches(images: Images, batch: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` batches of exactly `batch` images, in an order shuffled anew each epoch.

    Raises:
        CommandError: a batch is larger than the data (before the first batch is made).
    """
    check_batch(batch, len(images.labels))
    return _batches(images, batch, steps, torch.Generator().manual_seed(seed))


def _batches(images, batch, steps, generator) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(images.labels), generator=generator)
        chosen, order = order[:batch].to(images.labels.device), order[batch:]
        yield images.images[chosen], images.labels[chosen]
