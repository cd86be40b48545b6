"""Architectures by name, of the packages that are installed: what `sweep` looks at. Nothing is downloaded.

torchvision's by their names, those of the others with a prefix: `timm:`, `transformers:`, `smp:`
(segmentation_models_pytorch), `monai:`.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..cli.models import TIMM, build_model

IMAGE = (3, 224, 224)
CLIP = (3, 16, 112, 112)


@dataclass(frozen=True)
class Architecture:
    """How to build one network, and one input of it, (C, *spatial); None for what timm says of the model."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] | None = None

    def input_shape(self, model: nn.Module) -> tuple[int, ...]:
        if self.shape is not None:
            return self.shape
        return tuple(getattr(model, "default_cfg", {}).get("input_size", IMAGE))


Listed = Iterator[tuple[str, Architecture]]


def architectures(
    patterns: tuple[str, ...] = ("*",), left_out: Callable[[str], None] = lambda text: None
) -> dict[str, Architecture]:
    """Those whose name matches a pattern. A package that is not there, or does not load, is told to `left_out`."""
    found: dict[str, Architecture] = {}
    for package, listed in _LISTED.items():
        try:
            found |= listed(importlib.import_module(package))
        except (ImportError, RuntimeError) as error:
            # torchvision raises RuntimeError beside a build of torch that it was not made for.
            left_out(f"{package}: {error}")
    return {
        name: each
        for name, each in found.items()
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    }


def _torchvision(package: Any) -> Listed:
    """Classifiers, and what is built on them: segmentation, detection, video (but nothing quantized)."""
    models = package.models
    quantized = set(models.list_models(module=models.quantization))
    video = set(models.list_models(module=models.video))
    for name in models.list_models():
        if name not in quantized:
            shape = CLIP if name in video else IMAGE
            yield name, Architecture(functools.partial(build_model, name), shape)


def _timm(package: Any) -> Listed:
    for name in package.list_models():
        yield f"{TIMM}{name}", Architecture(functools.partial(build_model, f"{TIMM}{name}"))


# Beside each family's default: the other spellings of ResNet's and RegNet's blocks.
_VARIANTS: dict[str, list[dict[str, Any]]] = {
    "resnet": [
        {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]},
        {"downsample_in_first_stage": True},
        {"downsample_in_bottleneck": True},
    ],
    "regnet": [{"layer_type": "x"}],
}


def _transformers(package: Any) -> Listed:
    """Image classifiers, and the backbones that no classifier is built on, each as its configuration's defaults say."""
    classifiers = dict(package.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.items())
    others = package.MODEL_FOR_BACKBONE_MAPPING.items()
    for config, classes in {**dict(others), **classifiers}.items():
        made = classes[0] if isinstance(classes, (list, tuple)) else classes
        for number, keywords in enumerate([{}, *_VARIANTS.get(config.model_type, [])]):
            build = functools.partial(_configured, made, config, keywords)
            name = f"transformers:{config.model_type}{f'-{number}' if number else ''}"
            yield name, Architecture(build, IMAGE)


def _configured(made: Any, config: Any, keywords: dict[str, Any]) -> nn.Module:
    return made(config(**keywords))


def _smp(package: Any) -> Listed:
    """A U-Net on each encoder."""
    for name in package.encoders.get_encoder_names():
        build = functools.partial(package.Unet, name, encoder_weights=None)
        yield f"smp:{name}", Architecture(build, IMAGE)


def _monai(package: Any) -> Listed:
    nets = importlib.import_module(f"{package.__name__}.networks.nets")
    depths = (10, 18, 34, 50, 101, 152, 200)
    for depth, dimensions, shortcut in itertools.product(depths, (1, 2, 3), "AB"):
        build = functools.partial(
            getattr(nets, f"resnet{depth}"),
            spatial_dims=dimensions,
            n_input_channels=3,
            num_classes=10,
            shortcut_type=shortcut,
        )
        yield f"monai:resnet{depth}-{dimensions}d-{shortcut}", _volumes(build, dimensions)
    for made, dimensions in itertools.product(
        (nets.SEResNet50, nets.SEResNext50, nets.SENet154, nets.DenseNet121), (2, 3)
    ):
        channels = {"in_channels": 3, "spatial_dims": dimensions}
        if made is nets.DenseNet121:
            channels["out_channels"] = 10
        build = functools.partial(made, **channels)
        yield f"monai:{made.__name__.lower()}-{dimensions}d", _volumes(build, dimensions)


def _volumes(build: Callable[[], nn.Module], dimensions: int) -> Architecture:
    return Architecture(build, (3, *(64,) * dimensions))


_LISTED: dict[str, Callable[[Any], Listed]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "transformers": _transformers,
    "segmentation_models_pytorch": _smp,
    "monai": _monai,
}
