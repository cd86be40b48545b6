"""ResNets ready to train, fused by themselves: one definition each for post- and pre-activation, and a table of sizes.

    model = fusedres.models.resnet50(channels_last=True, device="cuda")
    model.load_state_dict(torchvision.models.resnet50(weights="DEFAULT").state_dict())

Each function takes the keyword arguments of its class, `ResNet` or `PreActResNet`; `list_models()` gives their names.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from ..nn.blocks import BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck
from .network import Network
from .preact import PreActResNet
from .resnet import ResNet

_Net = TypeVar("_Net", bound=Network)
# How torchvision and timm are asked for trained weights.
_WEIGHTS = ("weights", "pretrained")


def _model(
    name: str, net: type[_Net], block: type[Any], layers: tuple[int, ...], source: str, **fixed: Any
) -> Callable[..., _Net]:
    """A function that builds this row of the table; what it is given goes over what is fixed."""

    def build(**options: Any) -> _Net:
        _check_options(name, options, parameters, source in _WITH_WEIGHTS)
        return net(block, layers, **{**fixed, **options})

    described: Any = build
    described.__signature__ = signature = _signature(net, fixed)
    parameters = tuple(signature.parameters)
    build.__name__ = build.__qualname__ = name
    build.__doc__ = (
        f"{source}.\n\n`{net.__name__}({block.__name__}, {layers}, ...)`; the arguments are those of `{net.__name__}`, "
        f"by keyword.\n\nRaises:\n    TypeError, ValueError: as `{net.__name__}`; weights or pretrained, since there "
        "are no weights here: the text says how to load torchvision's.\n"
    )
    return build


def _signature(net: type[Network], fixed: dict[str, Any]) -> inspect.Signature:
    """Of a function of the table: the arguments behind block and layers, with the defaults that it fixes."""
    _, _, *rest = inspect.signature(net, eval_str=True).parameters.values()
    keywords = [
        each.replace(kind=each.KEYWORD_ONLY, default=fixed.get(each.name, each.default))
        for each in rest
    ]
    return inspect.Signature(keywords, return_annotation=net)


def _check_options(
    name: str, options: dict[str, Any], known: tuple[str, ...], as_torchvision: bool
) -> None:
    """Refuse what is no argument, weights above all: but for none of them, which is what there is.

    Raises:
        TypeError: the text says what to do.
    """
    for option in [each for each in options if each not in known]:
        if option in _WEIGHTS and not options[option]:
            del options[option]
        elif option in _WEIGHTS:
            how = (
                f"load torchvision's: model = fusedres.models.{name}(); model.load_state_dict("
                f"torchvision.models.{name}(weights='DEFAULT').state_dict())"
                if as_torchvision
                else "load your own with model.load_state_dict(torch.load(path))"
            )
            raise TypeError(
                f"{name}: {option} is {options[option]!r}, and there are none here; {how}"
            )
        else:
            close = difflib.get_close_matches(option, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
            raise TypeError(f"{name}: there is no argument {option!r}; {hint}")


def list_models() -> list[str]:
    """The names of the functions here that build a model, for `getattr(fusedres.models, name)`."""
    return [name for name in __all__ if name[0].islower() and name != "list_models"]


_IMAGENET = (
    "He et al. 2015 (arXiv:1512.03385, table 1), for ImageNet, with torchvision's state_dict"
)
_WIDE = "Zagoruyko and Komodakis 2016 (arXiv:1605.07146), with torchvision's state_dict"
_RESNEXT = "Xie et al. 2017 (arXiv:1611.05431), with torchvision's state_dict"
_WITH_WEIGHTS = (_IMAGENET, _WIDE, _RESNEXT)
_CIFAR_TEXT = (
    "He et al. 2015 (arXiv:1512.03385, section 4.2), for CIFAR, with shortcuts of option A"
)
_PREACT = "He et al. 2016 (arXiv:1603.05027), pre-activation"
_CIFAR: dict[str, Any] = {"num_classes": 10, "widths": (16, 32, 64), "stem": "3x3"}

resnet18 = _model("resnet18", ResNet, BasicBlock, (2, 2, 2, 2), _IMAGENET)
resnet34 = _model("resnet34", ResNet, BasicBlock, (3, 4, 6, 3), _IMAGENET)
resnet50 = _model("resnet50", ResNet, Bottleneck, (3, 4, 6, 3), _IMAGENET)
resnet101 = _model("resnet101", ResNet, Bottleneck, (3, 4, 23, 3), _IMAGENET)
resnet152 = _model("resnet152", ResNet, Bottleneck, (3, 8, 36, 3), _IMAGENET)

wide_resnet50_2 = _model("wide_resnet50_2", ResNet, Bottleneck, (3, 4, 6, 3), _WIDE, base_width=128)
wide_resnet101_2 = _model(
    "wide_resnet101_2", ResNet, Bottleneck, (3, 4, 23, 3), _WIDE, base_width=128
)
resnext50_32x4d = _model(
    "resnext50_32x4d", ResNet, Bottleneck, (3, 4, 6, 3), _RESNEXT, groups=32, base_width=4
)
resnext101_32x8d = _model(
    "resnext101_32x8d", ResNet, Bottleneck, (3, 4, 23, 3), _RESNEXT, groups=32, base_width=8
)
resnext101_64x4d = _model(
    "resnext101_64x4d", ResNet, Bottleneck, (3, 4, 23, 3), _RESNEXT, groups=64, base_width=4
)

# 6 n + 2 layers
_A: dict[str, Any] = {**_CIFAR, "shortcut": "pad"}
resnet20 = _model("resnet20", ResNet, BasicBlock, (3,) * 3, _CIFAR_TEXT, **_A)
resnet32 = _model("resnet32", ResNet, BasicBlock, (5,) * 3, _CIFAR_TEXT, **_A)
resnet44 = _model("resnet44", ResNet, BasicBlock, (7,) * 3, _CIFAR_TEXT, **_A)
resnet56 = _model("resnet56", ResNet, BasicBlock, (9,) * 3, _CIFAR_TEXT, **_A)
resnet110 = _model("resnet110", ResNet, BasicBlock, (18,) * 3, _CIFAR_TEXT, **_A)
resnet1202 = _model("resnet1202", ResNet, BasicBlock, (200,) * 3, _CIFAR_TEXT, **_A)

# 6 n + 2 layers, then 9 n + 2
preact_resnet110 = _model(
    "preact_resnet110", PreActResNet, PreActBasicBlock, (18,) * 3, f"{_PREACT}, for CIFAR", **_A
)
preact_resnet164 = _model(
    "preact_resnet164", PreActResNet, PreActBottleneck, (18,) * 3, f"{_PREACT}, for CIFAR", **_CIFAR
)
preact_resnet1001 = _model(
    "preact_resnet1001", PreActResNet, PreActBottleneck, (111,) * 3, f"{_PREACT}, for CIFAR", **_CIFAR
)  # fmt: skip
preact_resnet200 = _model(
    "preact_resnet200", PreActResNet, PreActBottleneck, (3, 24, 36, 3), f"{_PREACT}, for ImageNet"
)

__all__ = [
    "PreActResNet",
    "ResNet",
    "list_models",
    "preact_resnet110",
    "preact_resnet164",
    "preact_resnet200",
    "preact_resnet1001",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet44",
    "resnet50",
    "resnet56",
    "resnet101",
    "resnet110",
    "resnet152",
    "resnet1202",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]  # fmt: skip


def __dir__() -> list[str]:
    return list(__all__)
