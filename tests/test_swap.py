"""`fuse_` on torchvision's ResNets against an untouched copy in float64, and its contract: control, errors, undoing."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn

import fusedres
from fusedres.benchmarks.steps import ALLOWED, difference, excess, run

from .swap_blocks import LEFT_ALONE, fused_copy, images, make, spy_on_sites, tail, used_twice

# All of them are fused.
COUNTS = {
    "resnet18": 20,
    "resnet34": 36,
    "resnet50": 53,
    "resnet101": 104,
    "resnet152": 155,
    "resnext50_32x4d": 53,
    "wide_resnet50_2": 53,
}
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def network(name: str) -> nn.Module:
    """A torchvision model in float64 whose BatchNorms have something to scale, shift and remember."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.double()


@pytest.fixture(scope="module")
def resnet18():
    return network("resnet18")


@MODES
def test_resnet18_trains_the_same(resnet18, training, device):
    model = copy.deepcopy(resnet18).to(device).train(training)
    assert excess(model, fused_copy(model), images(2, 3, 32, 32, device=device)) <= ALLOWED


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "training", "steps"),
    [
        ("resnet18", True, 3),
        ("resnet50", True, 2),
        ("resnet50", False, 1),
        ("wide_resnet50_2", True, 1),
        pytest.param("resnext50_32x4d", True, 1, marks=pytest.mark.slow),
    ],
    ids=["resnet18-train", "resnet50-train", "resnet50-eval", "wide-train", "resnext-train"],
)
def test_steps_are_the_same(name, training, steps):
    model = network(name).train(training)
    assert excess(model, fused_copy(model), images(2, 3, 32, 32), steps) <= ALLOWED


@pytest.mark.once
@pytest.mark.parametrize("name", COUNTS)
def test_sites_are_counted(name):
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    report = fusedres.fuse_(model)
    assert (report.n_fused, len(report.rows)) == (COUNTS[name],) * 2


@pytest.mark.once
class TestContract:
    def test_parameters_and_buffers_are_the_same_objects(self, resnet18):
        model = copy.deepcopy(resnet18)
        before = [*model.named_parameters(), *model.named_buffers(), *model.named_modules()]
        fusedres.fuse_(model)
        after = [*model.named_parameters(), *model.named_buffers(), *model.named_modules()]
        assert all(a[0] == b[0] and a[1] is b[1] for a, b in zip(before, after, strict=True))

    def test_state_dict_goes_both_ways(self, resnet18):
        fused = fused_copy(network("resnet18"))
        trained = copy.deepcopy(resnet18)
        trained(images(2, 3, 32, 32))
        fused.load_state_dict(trained.state_dict())
        trained.load_state_dict(fused.state_dict())
        assert difference(fused.state_dict(), trained.state_dict()) == 0

    def test_an_optimizer_built_before_still_trains(self, resnet18):
        model = copy.deepcopy(resnet18)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        fusedres.fuse_(model)
        before = model.layer1[0].bn2.weight.clone()
        model(images(2, 3, 32, 32)).sum().backward()
        optimizer.step()
        assert not torch.equal(before, model.layer1[0].bn2.weight)

    def test_it_looks_the_same(self, resnet18):
        assert repr(fused_copy(resnet18)) == repr(resnet18)

    def test_an_instance_is_still_of_its_class(self, resnet18):
        assert isinstance(fused_copy(resnet18), torchvision.models.ResNet)

    def test_no_class_is_touched(self, resnet18):
        before = dict(vars(torchvision.models.resnet.BasicBlock))
        fused_copy(resnet18)
        assert dict(vars(torchvision.models.resnet.BasicBlock)) == before

    def test_other_instances_are_not_touched(self, resnet18):
        fused_copy(resnet18)
        assert not fusedres.is_fused(resnet18)

    def test_an_instance_gets_a_forward_and_nothing_else_changes(self, resnet18):
        model = copy.deepcopy(resnet18)
        before = dict(vars(model.layer1[0]))
        fusedres.fuse_(model)
        after = dict(vars(model.layer1[0]))
        added = [after.pop(name) for name in ("forward", "__prepare_scriptable__")]
        assert (after, len(added)) == (before, 2)

    def test_unfusing_leaves_the_instance_as_it_was(self, resnet18):
        model = copy.deepcopy(resnet18)
        before = [dict(vars(module)) for module in model.modules()]
        fusedres.fuse_(model)
        fusedres.unfuse_(model)
        assert [vars(module) for module in model.modules()] == before

    def test_signature_and_docs_of_forward_stay(self, resnet18):
        import inspect

        fused = fused_copy(resnet18)
        assert inspect.signature(fused.forward) == inspect.signature(resnet18.forward)

    def test_twice_is_once(self, resnet18):
        model = copy.deepcopy(resnet18)
        first = fusedres.fuse_(model)
        classes = [type(module) for module in model.modules()]
        assert fusedres.fuse_(model) == first
        assert [type(module) for module in model.modules()] == classes

    @pytest.mark.parametrize("name", ["resnet18", "resnet50", "wide_resnet50_2"])
    def test_fuse_unfuse_fuse(self, name):
        with torch.device("meta"):
            model = torchvision.models.get_model(name)
        classes = [type(module) for module in model.modules()]
        first = fusedres.fuse_(model)
        fusedres.unfuse_(model)
        assert [type(module) for module in model.modules()] == classes
        assert fusedres.fuse_(model) == first

    def test_explain_changes_nothing(self, resnet18):
        report = fusedres.explain(resnet18)
        assert (report.n_fusable, report.n_fused, fusedres.is_fused(resnet18)) == (20, 0, False)

    def test_explain_of_a_fused_model(self, resnet18):
        assert fusedres.explain(fused_copy(resnet18)).n_fused == 20

    def test_off_runs_the_own_forward(self, resnet18, monkeypatch):
        fused = fused_copy(resnet18)
        calls = spy_on_sites(monkeypatch)
        with fusedres.backend("off"):
            assert torch.equal(
                fused(images(2, 3, 32, 32)), copy.deepcopy(resnet18)(images(2, 3, 32, 32))
            )
        assert calls == []

    def test_the_report_tells_that_the_backend_is_off(self, resnet18):
        with fusedres.backend("off"):
            assert "the backend is 'off'" in str(fusedres.explain(resnet18))


@pytest.mark.once
class TestControl:
    def test_filter_decides_by_owner(self, resnet18):
        model = copy.deepcopy(resnet18)
        report = fusedres.fuse_(model, filter_fn=lambda module, fqn: fqn.startswith("layer1"))
        assert {row.where.split(".")[0] for row in report.rows if row.status == "fused"} == {
            "layer1"
        }

    def test_filter_gets_the_owner(self, resnet18):
        seen = {}
        fusedres.explain(resnet18, filter_fn=lambda module, fqn: bool(seen.setdefault(fqn, module)))
        assert seen["layer2.1"] is resnet18.layer2[1]

    def test_what_is_filtered_keeps_its_state(self, resnet18):
        fused = fused_copy(resnet18)
        assert fusedres.fuse_(fused, filter_fn=lambda module, fqn: False).n_fused == 20

    def test_patterns(self, resnet18):
        config = fusedres.FuseConfig(patterns=("BN+add+ReLU",))
        report = fusedres.fuse_(copy.deepcopy(resnet18), config)
        assert {row.pattern for row in report.rows if row.status == "fused"} == {"BN+add+ReLU"}

    def test_a_narrower_config_narrows(self, resnet18):
        fused = fused_copy(resnet18)
        fusedres.fuse_(fused, fusedres.FuseConfig(patterns=()))
        assert not fusedres.is_fused(fused)

    def test_strict_passes_a_plain_batch_norm(self, resnet18):
        assert fusedres.fuse_(copy.deepcopy(resnet18), strict=True).n_fused == 20

    @pytest.mark.parametrize("name", [f.__name__ for f, (p, _) in LEFT_ALONE.items() if p != "BN"])
    def test_strict_raises_before_anything_is_touched(self, name, resnet18):
        forward = next(f for f in LEFT_ALONE if f.__name__ == name)
        model = nn.Sequential(copy.deepcopy(resnet18), make(forward))
        with pytest.raises(RuntimeError, match=r"strict=True, and \d of \d+ .*\n  1.bn1 \("):
            fusedres.fuse_(model, strict=True)
        assert not fusedres.is_fused(model)

    def test_strict_takes_no_offence_at_what_the_user_left_out(self):
        model = nn.Sequential(make(tail), make(used_twice))
        config = fusedres.FuseConfig(patterns=("BN+ReLU",))
        assert fusedres.fuse_(model, config, strict=True).n_fused == 1


@pytest.mark.once
class TestErrors:
    @pytest.mark.parametrize(
        "function", [fusedres.fuse_, fusedres.explain, fusedres.unfuse_, fusedres.is_fused]
    )
    def test_no_module(self, function):
        expected = rf"{function.__name__}: model is a str, expected a torch.nn.Module; pass the model itself"
        with pytest.raises(TypeError, match=expected):
            function("resnet50")

    @pytest.mark.parametrize("function", [fusedres.fuse_, fusedres.explain])
    def test_filter_that_cannot_be_called(self, function):
        expected = (
            rf"{function.__name__}: filter_fn is a str, expected a function \(module, fqn\) -> bool"
        )
        with pytest.raises(TypeError, match=expected):
            function(make(tail), filter_fn="layer1")

    @pytest.mark.parametrize("function", [fusedres.fuse_, fusedres.explain])
    @pytest.mark.parametrize(
        ("filter_fn", "shown"),
        [(lambda module: True, r"<lambda>\(module\)"), (lambda *, module, fqn: True, r"<lambda>\(\*, module, fqn\)")],
    )  # fmt: skip
    def test_filter_that_does_not_take_two_arguments(self, function, filter_fn, shown):
        block = make(tail)
        expected = (
            rf"{function.__name__}: filter_fn is {shown}, expected a function of two arguments"
        )
        with pytest.raises(TypeError, match=expected):
            function(block, filter_fn=filter_fn)
        assert not fusedres.is_fused(block)

    def test_filter_of_any_arguments(self):
        assert fusedres.fuse_(make(tail), filter_fn=lambda *of_any: True).n_fused == 2

    @pytest.mark.parametrize("function", [fusedres.fuse_, fusedres.explain])
    def test_config_of_another_type(self, function):
        expected = (
            rf"{function.__name__}: config is a dict, expected a FuseConfig or None; write config="
        )
        with pytest.raises(TypeError, match=expected):
            function(make(tail), {"patterns": ("BN+ReLU",)})

    def test_unknown_pattern(self):
        expected = r"unknown pattern 'BN\+GELU' in patterns; choose from 'BN', 'BN\+ReLU', 'BN\+add', 'BN\+add\+ReLU'"
        with pytest.raises(ValueError, match=expected):
            fusedres.FuseConfig(patterns=("BN+GELU",))

    def test_patterns_as_one_string(self):
        with pytest.raises(TypeError, match=r"patterns is 'BN\+ReLU', expected a tuple of names"):
            fusedres.FuseConfig(patterns="BN+ReLU")

    def test_an_error_in_the_middle_leaves_the_model_as_it_was(self, resnet18, monkeypatch):
        from fusedres.swap import api

        model, calls = copy.deepcopy(resnet18), []
        classes = [type(module) for module in model.modules()]

        def fail_at_the_fifth(module, plan, install=api.install):
            calls.append(module)
            if len(calls) == 5:
                raise KeyboardInterrupt
            install(module, plan)

        monkeypatch.setattr(api, "install", fail_at_the_fifth)
        with pytest.raises(KeyboardInterrupt):
            fusedres.fuse_(model)
        assert [type(module) for module in model.modules()] == classes
        assert len(calls) == 5 + 5  # the fifth may be half done; all are given back

    def test_an_error_in_the_filter_leaves_the_model_as_it_was(self, resnet18):
        model = copy.deepcopy(resnet18)

        def fail_late(module, fqn):
            if fqn == "layer4.1":
                raise LookupError(fqn)
            return True

        with pytest.raises(LookupError):
            fusedres.fuse_(model, filter_fn=fail_late)
        assert not fusedres.is_fused(model)

    def test_errors_of_a_call_are_those_of_the_unfused_model(self, resnet18):
        fused = fused_copy(resnet18)
        with pytest.raises(
            ValueError, match="Expected more than 1 value per channel when training"
        ):
            fused(images(1, 3, 32, 32))

    def test_a_failed_call_leaves_the_block_statistics(self):
        fused = fused_copy(make(tail))
        before = run(fused.eval(), images(2, 4, 5, 5))
        fused.train()
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            fused(images(1, 4, 1, 1))
        assert all(
            torch.equal(before[k], v) for k, v in fused.state_dict().items() if "running" in k
        )

    def test_unfusing_under_another_class(self):
        from torch.nn.utils import parametrize

        block = fused_copy(make(tail))
        block.gain = nn.Parameter(torch.ones(()))
        parametrize.register_parametrization(block, "gain", nn.Identity())
        was_fused = fusedres.is_fused(block)
        fusedres.unfuse_(block)
        assert (was_fused, fusedres.is_fused(block)) == (True, False)
