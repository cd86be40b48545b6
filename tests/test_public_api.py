"""The public names: all of `__all__` exists, has a docstring, and shows itself readably."""

import inspect
import pydoc
import rlcompleter
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
        "PreActResNet", "ResNet", "list_models", "preact_resnet110", "preact_resnet164", "preact_resnet200",
        "preact_resnet1001", "resnet18", "resnet20",
        "resnet32", "resnet34", "resnet44", "resnet50", "resnet56", "resnet101", "resnet110",
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


# --- what completion and help() show -----------------------------------------------------------------------------


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_dir_shows_the_public_names_only(module):
    more = {"__version__"} if module is fusedres else set()
    assert set(dir(module)) == PUBLIC[module] | more


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_completion_offers_the_public_names_only(module):
    completer = rlcompleter.Completer({"it": module})
    offered = set(completer.attr_matches("it."))
    assert {name[len("it.") :].rstrip("()") for name in offered} <= PUBLIC[module]


def test_list_models_gives_every_function_that_builds_one():
    functions = {name for name, value in vars(fusedres.models).items() if name in fusedres.models.__all__
                 and inspect.isfunction(value)}  # fmt: skip
    assert set(fusedres.models.list_models()) == functions - {"list_models"}


@pytest.mark.parametrize("name", fusedres.models.list_models())
def test_a_models_signature_is_what_it_takes(name):
    """Names and defaults: what is given as they say changes nothing."""
    build = getattr(fusedres.models, name)
    signature = inspect.signature(build)
    defaults = {each.name: each.default for each in signature.parameters.values()}
    assert {each.kind for each in signature.parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
    if name in ("resnet20", "resnext50_32x4d", "preact_resnet110"):  # one with each set of its own
        given = repr(build(**defaults | {"device": "meta"}))
        assert given == repr(build(device="meta"))
    assert signature.return_annotation in (fusedres.models.ResNet, fusedres.models.PreActResNet)


def test_help_shows_names_and_defaults():
    text = pydoc.render_doc(fusedres.models.resnet20, renderer=pydoc.plaintext)
    assert "num_classes: int = 10" in text
    assert "shortcut: str = 'pad'" in text
