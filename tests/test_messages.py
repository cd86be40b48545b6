"""Bad input: the type of the error, the argument and both values in its text, and nothing half-done after it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import fusedres
from fusedres.functional import batch_norm_act


def arguments(**changes):
    """A call that is right, with something changed."""
    return {
        "input": torch.randn(2, 3, 4, 4),
        "running_mean": torch.zeros(3),
        "running_var": torch.ones(3),
        "weight": torch.ones(3),
        "bias": torch.zeros(3),
        "training": True,
        "residual": torch.randn(2, 3, 4, 4),
        **changes,
    }


BAD = {
    "residual shape": (
        {"residual": torch.randn(2, 3, 2, 2)}, RuntimeError, ["residual", "[2, 3, 2, 2]", "[2, 3, 4, 4]"],
    ),
    "residual that would broadcast": (
        {"residual": torch.randn(1, 3, 4, 4)}, RuntimeError, ["residual", "[1, 3, 4, 4]", "[2, 3, 4, 4]"],
    ),
    "weight channels": ({"weight": torch.ones(4)}, RuntimeError, ["weight", "[4]", "[3]"]),
    "bias channels": ({"bias": torch.ones(3, 1)}, RuntimeError, ["bias", "[3, 1]", "[3]"]),
    "running_mean channels": ({"running_mean": torch.zeros(2)}, RuntimeError, ["running_mean", "[2]", "[3]"]),
    "running_var channels": ({"running_var": torch.zeros(5)}, RuntimeError, ["running_var", "[5]", "[3]"]),
    "weight on another device": (
        {"weight": torch.ones(3, device="meta")}, RuntimeError, ["weight", "meta", "cpu"],
    ),
    "residual on another device": (
        {"residual": torch.randn(2, 3, 4, 4, device="meta")}, RuntimeError, ["residual", "meta", "cpu"],
    ),
    "integer input": (
        {"input": torch.ones(2, 3, 4, 4, dtype=torch.int64)}, NotImplementedError, ["input", "int64", "float32"],
    ),
    "integer residual": (
        {"residual": torch.ones(2, 3, 4, 4, dtype=torch.int32)}, NotImplementedError, ["residual", "int32", "float32"],
    ),
    "weight dtype": ({"weight": torch.ones(3).double()}, RuntimeError, ["weight", "float64", "float32"]),
    "unknown activation": ({"activation": "tanh"}, ValueError, ["activation", "'tanh'", "'relu'"]),
    "one dimension": ({"input": torch.randn(3)}, RuntimeError, ["input", "[3]", "2 dimensions"]),
    "not a tensor": ({"input": [1.0]}, TypeError, ["input", "list", "torch.Tensor"]),
    "weight not a tensor": ({"weight": 1.0}, TypeError, ["weight", "float", "torch.Tensor"]),
    "residual not a tensor": ({"residual": 1.0}, TypeError, ["residual", "float", "torch.Tensor"]),
    "parameters of a float64 input": (
        {"input": torch.randn(2, 3, 4, 4).double()}, RuntimeError, ["running_mean", "float32", "float64", "convert"],
    ),
    "sparse input": ({"input": torch.eye(3).to_sparse()}, NotImplementedError, ["input", "sparse", "to_dense"]),
    "no dimension": ({"input": torch.tensor(1.0)}, IndexError, ["input", "[]", "2 dimensions"]),
    "negative eps": ({"eps": -1.0}, ValueError, ["eps", "-1.0", "positive"]),
    "no eps": ({"eps": 0}, ValueError, ["eps", "0", "positive", "training"]),
    "eps of an eval call": ({"eps": -1.0, "training": False}, ValueError, ["eps", "-1.0", "negative"]),
    "eps None": ({"eps": None}, TypeError, ["eps", "None", "number"]),
    "training an int": ({"training": 1}, TypeError, ["training", "1", "bool"]),
    "momentum of two": ({"momentum": torch.ones(2)}, TypeError, ["momentum", "tensor", "no dimension"]),
    "momentum None": ({"momentum": None}, TypeError, ["momentum", "None", "num_batches_tracked"]),
    "one of the running statistics": (
        {"running_mean": None}, ValueError, ["running_mean is None", "running_var"],
    ),
    "eval without statistics": (
        {"running_mean": None, "running_var": None, "training": False},
        RuntimeError, ["running_mean", "None", "training=False"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_error_names_the_argument_and_both_values(name):
    changes, kind, words = BAD[name]
    with pytest.raises(kind) as caught:
        batch_norm_act(**arguments(**changes))
    assert [word for word in ["batch_norm_act", *words] if word not in str(caught.value)] == []


@pytest.mark.parametrize("name", BAD)
def test_running_statistics_are_what_they_were(name):
    changes, kind, _ = BAD[name]
    given = arguments(**changes)
    before = {n: None if given[n] is None else given[n].clone() for n in ("running_mean", "running_var")}  # fmt: skip
    with pytest.raises(kind):
        batch_norm_act(**given)
    assert all(t is None or torch.equal(given[n], t) for n, t in before.items())


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1), (1, 3, 1, 1, 1)])
def test_one_value_per_channel_raises_as_pytorch_does(shape):
    x, mean, var = torch.randn(shape), torch.zeros(3), torch.ones(3)
    with pytest.raises(ValueError, match="more than 1 value per channel") as expected:
        F.batch_norm(x, mean, var, training=True)
    with pytest.raises(ValueError, match="more than 1 value per channel") as found:
        batch_norm_act(x, mean, var, training=True)
    assert str(found.value) == str(expected.value)
    assert torch.equal(mean, torch.zeros(3))


def test_a_module_does_not_count_a_batch_that_failed():
    module = fusedres.nn.BatchNormAct2d(3)
    with pytest.raises(RuntimeError, match="residual"):
        module(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 1, 1))
    assert module.num_batches_tracked.item() == 0
    assert torch.equal(module.running_mean, torch.zeros(3))


@pytest.mark.parametrize(
    "choose", [fusedres.set_backend, lambda name: fusedres.backend(name).__enter__()]
)
def test_unknown_backend(choose):
    before = fusedres.get_backend()
    with pytest.raises(
        ValueError, match=r"unknown backend 'cuda'; choose one of auto, triton, aten, off"
    ):
        choose("cuda")
    assert fusedres.get_backend() == before


@pytest.mark.once
def test_unknown_backend_in_the_environment():
    run = subprocess.run(
        [sys.executable, "-c", "import fusedres"], capture_output=True, text=True,
        env={**os.environ, "FUSEDRES_BACKEND": "cuda"}, check=False,
    )  # fmt: skip
    assert "FUSEDRES_BACKEND: unknown backend 'cuda'" in run.stderr


@pytest.mark.once
def test_triton_where_it_cannot_run_says_why():
    given = arguments()
    with (
        fusedres.backend("triton"),
        pytest.raises(
            RuntimeError,
            match=r"triton backend cannot run: .*(no active driver|on the CPU).*set_backend",
        ),
    ):
        batch_norm_act(**given)
    assert torch.equal(given["running_mean"], torch.zeros(3))


def test_the_backend_is_put_back_after_an_exception():
    before = fusedres.get_backend()
    with pytest.raises(KeyError), fusedres.backend("off"):
        raise KeyError
    assert fusedres.get_backend() == before


@pytest.mark.once
@pytest.mark.parametrize(
    "call", [fusedres.explain, fusedres.memory_report], ids=["explain", "memory_report"]
)
def test_a_lazy_layer_is_named_where_shapes_are_asked_for(call):
    model = torch.nn.Sequential(torch.nn.LazyConv2d(4, 3), torch.nn.BatchNorm2d(4))
    keyword = "input_shape" if call is fusedres.explain else "input"
    with pytest.raises(
        ValueError, match="0 is a LazyConv2d, whose shapes its first input tells; run one batch"
    ):
        call(model, **{keyword: (2, 3, 8, 8)})
