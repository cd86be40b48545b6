"""The sweep over architectures: what is fused of each, weighted by size, and what stands against the rest."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from fusedres import FuseReport
from fusedres.benchmarks import packages
from fusedres.benchmarks.packages import Architecture, architectures
from fusedres.benchmarks.steps import ALLOWED, excess
from fusedres.benchmarks.sweep import Swept, main, sweep, table

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    ("name", "norms", "tails"),
    [("resnet18", 20, 11), ("resnet50", 53, 20), ("timm:resnet26d", 31, 12)],
)
def test_a_relu_resnet_is_fused_whole(name, norms, tails):
    found = sweep(name, architectures((name,))[name])
    assert found == Swept(name, norms, norms, 1.0, tails)


# name: (BatchNorms, tails): small ones of several families, trained a little beside their untouched copies
SAMPLE = {
    "timm:resnet10t": (14, 7),
    "timm:regnetx_002": (44, 17),
    "timm:mobilenetv3_small_050": (34, 7),
    "timm:legacy_seresnet18": (20, 3),
    "mnasnet0_5": (52, 10),
}


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_is_fused_whole_and_trains_as_before(name):
    found = sweep(name, architectures((name,))[name], parity=True)
    assert (found.norms, found.fused, found.share, found.tails) == (
        SAMPLE[name][0], SAMPLE[name][0], 1.0, SAMPLE[name][1],
    )  # fmt: skip
    assert found.parity <= ALLOWED


def test_parity_that_was_not_looked_at_says_why():
    def build():
        return nn.Sequential(nn.BatchNorm2d(5), nn.ReLU())

    assert sweep("narrow", Architecture(build), parity=True).reason.startswith("not run: ")


def test_parity_sees_a_model_that_computes_something_else(monkeypatch):
    monkeypatch.setattr("fusedres.nn.batch_norm.activate", lambda output, *_: output * 1.001)
    monkeypatch.setattr("fusedres.reference.in_place", lambda output, *_: output * 1.001)

    def build():
        return nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten())

    assert sweep("wrong", Architecture(build), parity=True).parity > ALLOWED


def test_a_gradient_of_pure_rounding_hides_nothing():
    """A bias in front of a BatchNorm has one; it must not be the unit that all else is measured by."""

    class Wrong(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * (1 + 1e-9)

    torch.manual_seed(0)
    model, wrong = (
        nn.Sequential(nn.Conv2d(3, 4, 1), norm(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()
        for norm in (nn.BatchNorm2d, Wrong)
    )
    wrong.load_state_dict(model.state_dict())
    assert excess(model, wrong, torch.randn(2, 3, 5, 5, dtype=torch.float64)) > ALLOWED


def test_what_is_left_alone_is_told_with_its_reason():
    def build():
        model = torchvision.models.mobilenet_v2()
        model.features[0][1].register_forward_hook(lambda *_: None)
        return model

    found = sweep("hooked", Architecture(build))
    assert (found.fused, found.norms, found.tails) == (51, 52, 10)
    assert found.reason == "it has hooks, which run only when the module itself is called"


@pytest.mark.parametrize("form", ["__str__", "to_markdown", "_repr_html_", "to_json"])
def test_a_report_that_cannot_be_shown_is_told(form, monkeypatch):
    def broken(self):
        raise ValueError("no such number")

    monkeypatch.setattr(FuseReport, form, broken)
    found = sweep("resnet18", architectures(("resnet18",))["resnet18"])
    assert found.reason == "report: ValueError: no such number"


def test_the_share_is_of_elements():
    class Special(nn.BatchNorm2d):
        pass

    def build():
        large = nn.Sequential(nn.Conv2d(3, 9, 1), nn.BatchNorm2d(9), nn.ReLU())
        small = nn.Sequential(nn.Conv2d(9, 1, 1), Special(1), nn.ReLU())
        return nn.Sequential(large, small)

    found = sweep("two", Architecture(build))
    assert (found.fused, found.norms, found.share) == (1, 2, 0.9)


def test_without_batch_norm():
    assert sweep("alexnet", Architecture(lambda: nn.Conv2d(3, 3, 1))) is None


def test_what_cannot_be_built_says_so():
    def build():
        raise LookupError("no such part")

    assert sweep("broken", Architecture(build)) == Swept(
        "broken", reason="not built: LookupError: no such part"
    )


def test_what_cannot_be_run_is_fused_all_the_same():
    found = sweep("narrow", Architecture(lambda: nn.Sequential(nn.BatchNorm2d(5), nn.ReLU())))
    assert (found.fused, found.share) == (1, None)
    assert found.reason.startswith("not run: ")


def test_a_constructor_that_computes_is_built_elsewhere():
    def build():
        width = int(torch.full((), 3.0).item())
        return nn.Sequential(nn.BatchNorm2d(width), nn.ReLU())

    assert sweep("computed", Architecture(build)).fused == 1


def test_table_and_files(tmp_path, capsys):
    assert main(["resnet18", "densenet121", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "sweep.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == text
    assert "| resnet18 | 20 | 20 | 100 % | 11 |  |  |" in text
    assert text.splitlines()[-1].startswith(
        "2 architectures with BatchNorm; 1 whose residual tails"
    )


def test_a_share_that_is_not_known():
    assert "| x | 0 | 0 | ? | 0 |  | not run |" in table([Swept("x", reason="not run")])


def test_a_package_that_is_not_installed_is_told(monkeypatch):
    monkeypatch.setattr(packages, "_LISTED", {"no_such_package": lambda package: iter(())})
    told: list[str] = []
    assert (architectures(left_out=told.append), told) == (
        {},
        ["no_such_package: No module named 'no_such_package'"],
    )


@pytest.mark.parametrize(
    ("name", "shape"), [("r3d_18", (3, 16, 112, 112)), ("timm:resnet10t", (3, 176, 176))]
)
def test_the_input_is_one_that_the_network_takes(name, shape):
    found = architectures((name,))[name]
    with torch.device("meta"):
        assert found.input_shape(found.build()) == shape
