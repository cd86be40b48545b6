"""Two models over the same batches, from the same weights: how `compare` trains them."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import nn

from .data import Images, batches
from .differences import Difference, difference
from .errors import CommandError
from .progress import Progress
from .summary import Spread
from .training import Setting, Trainee

# The first steps compile kernels and choose convolution algorithms: trained, not timed.
WARM_UP = 5


@dataclass(frozen=True)
class Outcome:
    """Two trained models and how they compared, step by step; `itself` is the original against its own twin."""

    original: Trainee
    fused: Trainee
    differences: list[Difference]
    itself: Difference
    warm_up: int

    def seconds(self, trainee: Trainee) -> Spread:
        """The step times after the warm-up."""
        return Spread.of(trainee.seconds[self.warm_up :])


def train_side_by_side(
    model: nn.Module,
    fused: nn.Module,
    images: Images,
    setting: Setting,
    batch: int,
    steps: int,
    seed: int,
) -> Outcome:
    """Train both, interleaved, each going first every other step, so that both see the same weather.

    Raises:
        CommandError: the model cannot be trained on these images, or a batch is larger than the data.
    """
    feed = batches(images, batch, steps, seed)
    itself = _against_itself(model, images, setting, batch, seed)
    original, swapped = Trainee("original", model, setting), Trainee("fused", fused, setting)
    differences = []
    progress = Progress(steps)
    for index, (pixels, labels) in zip(progress, feed, strict=True):
        order = (original, swapped) if index % 2 == 0 else (swapped, original)
        for trainee in order:
            trainee.step(pixels, labels, seed + index)
        differences.append(difference(original, swapped))
        progress.tell(f"loss {original.losses[-1]:.4f} original, {swapped.losses[-1]:.4f} fused")
    return Outcome(original, swapped, differences, itself, warm_up=min(WARM_UP, steps - 1))


def _against_itself(
    model: nn.Module, images: Images, setting: Setting, batch: int, seed: int
) -> Difference:
    """The original's first step, made twice: what the device's own convolutions leave undetermined."""
    twins = [Trainee("original", copy.deepcopy(model), setting) for _ in range(2)]
    ((pixels, labels),) = batches(images, batch, 1, seed)
    try:
        for twin in twins:
            twin.step(pixels, labels, seed)
    except (RuntimeError, ValueError) as error:
        raise CommandError(
            f"{type(model).__name__} cannot be trained on a batch of shape {list(pixels.shape)}: {error}; "
            "a larger --image-size or --batch may help"
        ) from error
    return difference(*twins)
