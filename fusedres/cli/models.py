"""Models by name: torchvision's, and timm's as `timm:NAME`. Without weights: nothing is downloaded."""

from __future__ import annotations

from typing import Any

from torch import nn

from .errors import CommandError, require, unknown

TIMM = "timm:"


def build_model(name: str, classes: int | None = None) -> nn.Module:
    """A freshly initialised model. With `classes`, a classifier of that many classes.

    Raises:
        CommandError: no such model, not a classifier where one is wanted, or its package is missing.
    """
    if name.startswith(TIMM):
        return _build_timm(name.removeprefix(TIMM), classes)
    models = require("torchvision", "models", f"model {name!r}").models
    known = models.list_models()
    if name not in known:
        raise unknown("model", name, known, "torchvision.models.list_models(), or timm:NAME")
    classifiers = models.list_models(module=models)
    keywords: dict[str, Any] = {"weights": None}
    if classes is not None:
        if name not in classifiers:
            raise CommandError(
                f"model {name!r} is not an image classifier, and the data is labelled images; "
                "`python -m fusedres explain` looks at any model"
            )
        keywords["num_classes"] = classes
    if name in models.list_models(module=models.detection) + models.list_models(
        module=models.segmentation
    ):
        keywords["weights_backbone"] = None
    return models.get_model(name, **keywords)


def _build_timm(name: str, classes: int | None) -> nn.Module:
    timm = require("timm", "models", f"model '{TIMM}{name}'")
    if not timm.is_model(name):
        raise unknown("timm model", name, timm.list_models(), "timm.list_models()")
    keywords = {} if classes is None else {"num_classes": classes}
    return timm.create_model(name, pretrained=False, **keywords)
