"""Two models over the same batches, from the same weights: how `compare` trains them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .data import Images, batches
from .differences import Difference, difference
from .errors import CommandError, first_line
from .progress import Progress
from .summary import Spread
from .training import NotLogits, Setting, Trainee, logits_of

# The first steps compile kernels and choose convolution algorithms: trained, not timed.
WARM_UP = 5


@dataclass(frozen=True)
class Outcome:
    """Two trained models and how they compared, step by step; `itself` is the original against its own twin.

    There are fewer `differences` than `steps` where Ctrl-C has ended it.
    """

    original: Trainee
    fused: Trainee
    differences: list[Difference]
    itself: Difference
    steps: int

    @property
    def warm_up(self) -> int:
        """Steps that are not timed."""
        return min(WARM_UP, len(self.differences) - 1)

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C has ended it."""
        return len(self.differences) < self.steps

    def seconds(self, trainee: Trainee) -> Spread:
        """The step times after the warm-up."""
        return Spread.of(trainee.seconds[self.warm_up :])


def train_side_by_side(
    model: nn.Module,
    fused: nn.Module,
    feed: Iterator[tuple[Tensor, Tensor]],
    setting: Setting,
    steps: int,
    seed: int,
    itself: Difference,
) -> Outcome:
    """Train both, interleaved, each going first every other step, so that both see the same weather.

    Ctrl-C ends it after the steps that both have made.

    Raises:
        CommandError: the device has too little memory.
        KeyboardInterrupt: before the first step was made.
    """
    original, swapped = Trainee("original", model, setting), Trainee("fused", fused, setting)
    differences: list[Difference] = []
    progress = Progress(steps)
    try:
        for index, (pixels, labels) in zip(progress, feed, strict=True):
            order = (original, swapped) if index % 2 == 0 else (swapped, original)
            for trainee in order:
                trainee.step(pixels, labels, seed + index)
            differences.append(difference(original, swapped))
            progress.tell(
                f"loss {original.losses[-1]:.4f} original, {swapped.losses[-1]:.4f} fused"
            )
    except torch.OutOfMemoryError as error:
        raise CommandError(f"{first_line(error)}; a smaller --batch may help") from error
    except KeyboardInterrupt:
        if not differences:
            raise
        for trainee in (original, swapped):
            trainee.forget_after(len(differences))
    finally:
        progress.close()
    return Outcome(original, swapped, differences, itself, steps)


def against_itself(
    name: str, model: nn.Module, images: Images, setting: Setting, batch: int, seed: int
) -> Difference:
    """A copy's first step, made twice: what the device's own convolutions leave undetermined.

    It is also the proof that this model can be trained on these images.

    Raises:
        CommandError: it cannot.
    """
    ((pixels, labels),) = batches(images, batch, 1, seed)
    try:
        _check_logits(_answer(model, pixels, setting), batch, images.classes)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise NotLogits("it has no parameters that need a gradient: there is nothing to train")
        twins = [Trainee("original", copy.deepcopy(model), setting) for _ in range(2)]
        for twin in twins:
            twin.step(pixels, labels, seed)
    except NotLogits as error:
        raise CommandError(f"{name} cannot be trained here: {error}") from error
    except Exception as error:  # whatever the model says to an input that it does not take
        raise CommandError(
            f"{name} cannot be trained on a batch of shape {list(pixels.shape)}: {first_line(error)}; "
            + _hint(model, error)
        ) from error
    return difference(*twins)


def _answer(model: nn.Module, pixels: Tensor, setting: Setting) -> Tensor:
    model.eval()
    with torch.no_grad(), setting.autocast():
        answer = logits_of(model(pixels.contiguous(memory_format=setting.memory_format)))
    model.train()
    return answer


def _check_logits(logits: Tensor, batch: int, classes: int) -> None:
    """Refuse what cross-entropy takes for something else, or stumbles over in the middle of an epoch."""
    if logits.dim() != 2 or len(logits) != batch:
        raise NotLogits(
            f"it gives a tensor of shape {list(logits.shape)}, expected logits of shape [{batch}, classes]"
        )
    if logits.shape[1] < classes:
        raise NotLogits(
            f"it has {logits.shape[1]} classes and the data {classes}; a model whose callable has an argument "
            "num_classes is given the data's"
        )


def _hint(model: nn.Module, error: Exception) -> str:
    try:
        inspect.signature(model.forward).bind(None)
    except TypeError:
        return "a model is called with the images alone: wrap one that takes more"
    smaller = isinstance(error, torch.OutOfMemoryError)
    return (
        f"{'a smaller --batch' if smaller else 'another --image-size or a larger --batch'} may help"
    )
