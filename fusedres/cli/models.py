"""Models by name: torchvision's, timm's as `timm:NAME`, Hugging Face's as `hf:NAME`, one's own as `module:callable` or
`path.py:callable`. Without weights: of Hugging Face's the configuration is downloaded, of the others nothing."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..words import a_type
from .errors import CommandError, did_you_mean, first_line, require, unknown

TIMM, HUGGING_FACE = "timm:", "hf:"
# Pixels a side, of a model that does not say.
IMAGE_SIZE = 224


def build_model(name: str, classes: int | None = None) -> nn.Module:
    """A freshly initialised model. With `classes`, a classifier of that many classes (one's own, if it has an argument
    `num_classes`).

    Raises:
        CommandError: no such model, not a classifier where one is wanted, or its package is missing.
    """
    for prefix, build in ((TIMM, _build_timm), (HUGGING_FACE, _build_hugging_face)):
        if name.startswith(prefix):
            return build(name.removeprefix(prefix), classes)
    if ":" in name:
        return _build_own(name, classes)
    return _build_torchvision(name, classes)


def settle(name: str, model: nn.Module, shape: Sequence[int]) -> nn.Module:
    """The model; if it has lazy layers, they have taken their own shapes from one image of this one.

    Raises:
        CommandError: it does not take such an input.
    """
    if any(map(is_lazy, (*model.parameters(), *model.buffers()))):
        training = model.training
        try:
            with torch.no_grad():
                model.eval()(torch.zeros(1, *shape[1:]))
        except Exception as error:  # of foreign code
            raise CommandError(
                f"{name} does not take a tensor of shape {list(shape)}: {first_line(error)}"
            ) from error
        model.train(training)
    return model


def image_size(name: str, model: nn.Module) -> int:
    """Pixels a side of the images that a model is made for."""
    config = getattr(model, "config", None)  # of Hugging Face's
    said = getattr(model, "image_size", getattr(config, "image_size", None))
    if said is None:
        timms = getattr(model, "pretrained_cfg", None) or {}
        said = timms.get("input_size") or _of_torchvisions_weights(name)
    while isinstance(said, (list, tuple)) and said:
        said = said[-1]
    return said if isinstance(said, int) and said > 0 else IMAGE_SIZE


def _of_torchvisions_weights(name: str) -> Any:
    """The size that torchvision evaluates its weights at; none is loaded."""
    models = getattr(sys.modules.get("torchvision"), "models", None)
    if models is None or name not in models.list_models():
        return None
    weights = next(iter(models.get_model_weights(name)), None)
    return getattr(getattr(weights, "transforms", None), "keywords", {}).get("crop_size")


def _build_torchvision(name: str, classes: int | None) -> nn.Module:
    models = require("torchvision", "models", f"model {name!r}").models
    known = models.list_models()
    if name not in known:
        raise _unknown(name, known)
    classifiers = models.list_models(module=models)
    keywords: dict[str, Any] = {"weights": None}
    if classes is not None:
        if name not in classifiers:
            raise CommandError(
                f"model {name!r} is not an image classifier, and the data is labelled images; "
                "`fusedres explain` looks at any model"
            )
        keywords["num_classes"] = classes
    if name in models.list_models(module=models.detection) + models.list_models(
        module=models.segmentation
    ):
        keywords["weights_backbone"] = None
    return models.get_model(name, **keywords)


def _unknown(name: str, known: list[str]) -> CommandError:
    """The error for a name that torchvision does not have: what was meant, if it is known somewhere else."""
    if name.endswith(".py"):
        return CommandError(
            f"{name!r} is a file: say what builds the model in it, as {name}:Network"
        )
    owner, slash, model = name.partition("/")
    if slash and owner != "timm":
        return CommandError(
            f"unknown model {name!r}; Hugging Face's models are written hf:NAME: did you mean {HUGGING_FACE}{name}?"
        )
    timms = _timms()
    if slash or name in timms:
        hint = did_you_mean(model or name, timms, TIMM) or f"timm's models are written {TIMM}NAME"
        return CommandError(f"unknown model {name!r}; {hint}")
    return unknown("model", name, known, "torchvision.models.list_models(), or timm:NAME")


def _timms() -> list[str]:
    """timm's models, where it is installed."""
    try:
        names: list[str] = require("timm", "models", "").list_models()
    except CommandError:
        return []
    return names


def _build_timm(name: str, classes: int | None) -> nn.Module:
    timm = require("timm", "models", f"model '{TIMM}{name}'")
    if not timm.is_model(name):
        raise unknown("model", name, timm.list_models(), "timm.list_models()", TIMM)
    keywords = {} if classes is None else {"num_classes": classes}
    return timm.create_model(name, pretrained=False, **keywords)


def _build_hugging_face(name: str, classes: int | None) -> nn.Module:
    said = f"model '{HUGGING_FACE}{name}'"
    transformers = require("transformers", "hf", said)
    keywords = {} if classes is None else {"num_labels": classes}
    try:
        if name in transformers.CONFIG_MAPPING:  # a family, with what it has by default
            config = transformers.AutoConfig.for_model(name, **keywords)
        else:
            config = transformers.AutoConfig.from_pretrained(name, **keywords)
    except Exception as error:  # of the network, of the hub, of the file
        raise CommandError(
            f"{said}: its configuration is not to be had: {first_line(error).rstrip('.')}. It is downloaded once (a "
            "few kB, no weights); without a network, name a folder with its config.json, or a family, as "
            f"{HUGGING_FACE}resnet"
        ) from error
    kinds = [transformers.AutoModelForImageClassification]
    if classes is None:
        kinds.append(transformers.AutoModel)
    for kind in kinds:
        if type(config) in kind._model_mapping:
            return kind.from_config(config)
    raise CommandError(
        f"{said} is not an image classifier, and the data is labelled images; `fusedres explain` looks at any model"
    )


# --- one's own --------------------------------------------------------------------------------------------------------


def _build_own(name: str, classes: int | None) -> nn.Module:
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise CommandError(f"{name!r} is no model; write module:callable, or path.py:callable")
    made = _module(name, place)
    for part in attribute.split("."):
        if not hasattr(made, part):
            raise CommandError(
                f"{name!r}: there is no {part!r} in {place}; "
                + (did_you_mean(part, vars(made)) or "write the name of a class or a function")
            )
        made = getattr(made, part)
    if isinstance(made, nn.Module):
        return made
    if not callable(made):
        raise CommandError(
            f"{name!r} is {a_type(made)}, expected a class, a function that builds the model, or a model"
        )
    keywords = (
        {} if classes is None or not _takes(made, "num_classes") else {"num_classes": classes}
    )
    try:
        inspect.signature(made).bind(**keywords)
    except TypeError as error:
        raise CommandError(
            f"{name!r} cannot be called without arguments ({error}); write a function of none that builds the model"
        ) from error
    except ValueError:  # of a callable without a signature
        pass
    model = _guarded(name, lambda: made(**keywords))
    if not isinstance(model, nn.Module):
        raise CommandError(f"{name!r} gives {a_type(model)}, expected a torch.nn.Module")
    return model


def _takes(function: Callable[..., Any], argument: str) -> bool:
    try:
        return argument in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def _module(name: str, place: str) -> ModuleType:
    """The module of a file, or of a name that Python finds from here."""
    path = Path(place)
    if path.suffix != ".py":
        _find_from(Path.cwd())
        try:
            found = importlib.util.find_spec(place)
        except (ImportError, ValueError):
            found = None
        if found is None:
            raise CommandError(
                f"{name!r}: there is no module {place!r} here or among what is installed; of a file, write path.py:"
                f"{name.rpartition(':')[2]}"
            )
        return _guarded(name, lambda: importlib.import_module(place))
    if not path.is_file():
        raise CommandError(f"{name!r}: there is no file {place}")
    _find_from(path.resolve().parent)
    # Under its own name, so that what it pickles is found; under another where that is taken.
    module = path.stem if path.stem not in sys.modules else f"fusedres_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(module, path)
    if spec is None or spec.loader is None:
        raise CommandError(f"{name!r}: {place} is no Python file")
    loaded = sys.modules[module] = importlib.util.module_from_spec(spec)
    loader = spec.loader
    _guarded(name, lambda: loader.exec_module(loaded))
    return loaded


def _find_from(folder: Path) -> None:
    """What the user's code imports may lie beside it, as for a script."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _guarded(name: str, call: Callable[[], Any]) -> Any:
    """What the user's code gives; what it raises, in a line that says where."""
    try:
        return call()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit is one too
        frames = traceback.extract_tb(error.__traceback__)
        # The innermost that is not a package's.
        own = next((f for f in reversed(frames) if "site-packages" not in f.filename), frames[-1])
        at = f" ({own.filename}:{own.lineno})"
        if isinstance(error, SyntaxError):  # which has no place where the file is no text
            at = f" ({error.filename}:{error.lineno})" if error.filename else ""
        raise CommandError(f"{name!r}: {first_line(error)}{at}") from error
