"""The public names: all of `__all__` exists, has a docstring, and shows itself readably."""

import inspect
import types

import pytest
from torch import nn

import fusedres

pytestmark = pytest.mark.once

PUBLIC = {
    fusedres: {
        "FuseConfig", "FuseReport", "MemoryReport", "backend", "checkpoint", "explain", "functional", "fuse_",
        "get_backend", "is_fused", "memory_report", "models", "nn", "set_backend", "unfuse_",
    },
    fusedres.functional: {
        "add_act", "add_batch_norm_act", "batch_norm_act", "dual_batch_norm_act", "projection",
        "projection_batch_norm_act", "scaled_add_act",
    },
    fusedres.nn: {
        "BasicBlock", "BatchNormAct1d", "BatchNormAct2d", "BatchNormAct3d", "Bottleneck", "PreActBasicBlock",
        "PreActBottleneck", "PreActSequential", "Projection", "Residual",
    },
    fusedres.models: {
        "PreActResNet", "ResNet", "preact_resnet110", "preact_resnet164", "preact_resnet200", "preact_resnet1001",
        "resnet18", "resnet20", "resnet32", "resnet34", "resnet44", "resnet50", "resnet56", "resnet101", "resnet110",
        "resnet152", "resnet1202", "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2",
        "wide_resnet101_2",
    },
}  # fmt: skip
NAMES = [(module, name) for module in PUBLIC for name in sorted(PUBLIC[module])]


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_all_is_exactly_the_contract(module):
    assert set(module.__all__) == PUBLIC[module]
    assert len(module.__all__) == len(set(module.__all__))


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_nothing_else_is_lying_about(module):
    """A public name that is not in `__all__` is a submodule, an import of the language, or a mistake."""
    stray = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and name not in module.__all__
        and not isinstance(value, types.ModuleType)
        and (getattr(value, "__module__", "") or "").startswith("fusedres")
        and inspect.getmodule(value) is module
    }
    assert stray == set()


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[f"{m.__name__}.{n}" for m, n in NAMES])
def test_every_public_name_has_a_docstring(module, name):
    assert (inspect.getdoc(getattr(module, name)) or "").strip()


def test_version_is_that_of_the_installed_distribution():
    from importlib.metadata import version

    assert version("fusedres") == fusedres.__version__


@pytest.mark.parametrize("name", [f"BatchNormAct{dims}d" for dims in (1, 2, 3)])
def test_a_module_shows_what_it_is(name):
    shown = repr(getattr(fusedres.nn, name)(8, activation="relu"))
    assert shown.startswith(name)
    assert "activation=relu" in shown
    assert f"BatchNorm{name[-2:]}(8," in shown


def test_a_projection_shows_what_it_is():
    shown = repr(fusedres.nn.Projection(4, 8, 2))
    assert shown.startswith("Projection(")
    assert "Conv2d(4, 8, kernel_size=(1, 1), stride=(2, 2), bias=False)" in shown


def test_reports_and_configs_show_themselves():
    report = fusedres.explain(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    for shown in (str(report), repr(report), repr(fusedres.FuseConfig())):
        assert shown.strip()
        assert " object at 0x" not in shown


@pytest.mark.parametrize("block", ["resnet18", "resnet50"])
def test_a_fused_model_shows_itself(block):
    import torchvision

    model = torchvision.models.get_model(block, weights=None)
    fusedres.fuse_(model)
    assert "BatchNorm2d(64" in repr(model)
    assert " object at 0x" not in repr(model)
