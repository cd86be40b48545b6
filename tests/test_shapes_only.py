"""Where tensors have shapes and no values: FakeTensorMode and the meta device; and what torch.jit.script is told."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import fusedres
import fusedres.models
import fusedres.nn

from .test_torch_compile import Small


def fake():
    return FakeTensorMode(allow_non_fake_inputs=False)


@pytest.mark.composes("FakeTensorMode", "steps aside")
def test_fuse_and_a_training_step_under_fake_tensors():
    """A fused block runs its own forward on tensors of another class than Tensor, which gives the same shapes."""
    with fake():
        model = Small()
        report = fusedres.fuse_(model)
        output = model(torch.randn(2, 3, 8, 8))
        output.sum().backward()
        told = fusedres.explain(model)
    assert (report.n_fused, told.n_fused, output.shape) == (8, 8, (2, 5))
    assert {name for name, p in model.named_parameters() if p.grad.shape != p.shape} == set()


@pytest.mark.parametrize("name", ["auto", "aten", "triton"])
@pytest.mark.composes("the meta device", "works")
def test_fuse_and_a_training_step_on_the_meta_device(name):
    """Also where the backend is `triton`, and no kernel could be launched."""
    with torch.device("meta"):
        model = Small()
    report = fusedres.fuse_(model)
    with fusedres.backend(name):
        output = model(torch.randn(2, 3, 8, 8, device="meta"))
        output.sum().backward()
    assert (report.n_fused, output.shape, output.device.type) == (8, (2, 5), "meta")
    assert {n for n, p in model.named_parameters() if p.grad.device.type != "meta"} == set()


@pytest.mark.parametrize("where", ["fake", "meta"])
def test_explain_tells_the_bytes_without_values(where):
    shape = (2, 3, 8, 8)
    expected = fusedres.explain(Small(), input_shape=shape)
    with fake() if where == "fake" else torch.device("meta"):
        found = fusedres.explain(Small(), input_shape=shape)
    # (The convolution of a shortcut is called where its weight is a fake one, which is a note.)
    told = [
        [(row.where, row.status, row.reason, row.moves, row.saves) for row in report.rows]
        for report in (found, expected)
    ]
    assert told[0] == told[1]


@pytest.mark.once
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (fusedres.models.resnet20, "ResNet"),
        (fusedres.models.preact_resnet110, "PreActResNet"),
        (lambda: fusedres.nn.BasicBlock(4, 4), "BasicBlock"),
        (lambda: fusedres.nn.BatchNormAct2d(4), "BatchNormAct2d"),
        (lambda: fusedres.nn.Residual(nn.Linear(4, 4)), "Residual"),
        (lambda: nn.Sequential(fusedres.nn.PreActSequential()), "PreActSequential"),
    ],
)
@pytest.mark.composes("torch.jit.script of fusedres.nn and fusedres.models", "refused")
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_scripting_a_module_of_ours_is_refused_in_a_sentence(make, name):
    with pytest.raises(
        RuntimeError,
        match=f"^torch.jit.script cannot compile {name}, whose .* use torch.jit.trace,",
    ):
        torch.jit.script(make())


@pytest.mark.once
@pytest.mark.composes("torch.jit.trace of fusedres.models", "works")
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_tracing_a_model_of_ours_gives_the_same():
    model, x = fusedres.models.resnet20().eval(), torch.randn(2, 3, 8, 8)
    traced = torch.jit.trace(copy.deepcopy(model), x)
    assert torch.equal(traced(x), model(x))
