"""`fusedres.functional.batch_norm_act` against the oracle, over both backends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fusedres
from fusedres.functional import batch_norm_act

from .helpers import DTYPES, LAYOUTS, Case, error, lay_out, over_budget, run, run_eager, run_oracle


@pytest.mark.parametrize("residual", [True, False], ids=["add", "plain"])
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "unscaled"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parity(dtype, layout, training, affine, activation, residual, device):
    case = Case(
        dtype=DTYPES[dtype], layout=layout, training=training, affine=affine,
        activation=activation, residual=residual, device=device,
    )  # fmt: skip
    assert over_budget(case) == {}


@pytest.mark.parametrize(
    "shape",
    [
        (2, 3),  # BatchNorm1d on features
        (5, 4, 9),  # BatchNorm1d on sequences
        (2, 1, 3, 3),  # one channel
        (2, 3, 1, 1),  # two values a channel
        (1, 7, 2, 1),  # one image
        (3, 24, 7, 7),  # channels no power of two
        (2, 100, 3, 5),  # more than a block of channels, not divisible
        (2, 64, 14, 14),  # the packed-channel mask over several tiles
        (3, 5, 33, 31),  # odd sizes, several tiles of rows
        (2, 4, 3, 4, 5),  # BatchNorm3d
    ],
    ids=lambda shape: "x".join(map(str, shape)),
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shapes(shape, layout, dtype, device):
    assert over_budget(Case(shape=shape, dtype=DTYPES[dtype], layout=layout, device=device)) == {}


@pytest.mark.parametrize(
    "shape", [(3, 6, 4, 5), (2, 64, 6, 6), (9, 21, 7, 5)], ids=["C6", "C64", "flat"]
)
@pytest.mark.parametrize("other", ["channels_last", "contiguous", "sliced", "transposed"])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_residual_and_gradient_in_another_layout(shape, layout, other, device):
    case = Case(shape=shape, layout=layout, residual_layout=other, grad_layout=other, device=device)
    assert over_budget(case) == {}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [6, 64])
def test_expanded_gradient(layout, channels, device):
    """What the mean of global average pooling sends back: one value an image and channel, with strides 0."""
    case = Case(shape=(3, channels, 4, 6), layout=layout, device=device)
    grad = torch.randn(3, channels, 1, 1, device=device).expand(3, channels, 4, 6)
    assert over_budget(case.with_tensors(grad=grad)) == {}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_expanded_input(layout, device):
    case = Case(shape=(3, 6, 4, 5), layout=layout, device=device)
    one = case.tensors["input"][:1]
    assert over_budget(case.with_tensors(input=one.expand(3, 6, 4, 5))) == {}


@pytest.mark.parametrize("mean_over_std", [30, 300])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_large_mean(mean_over_std, training, dtype, device):
    case = Case(
        shape=(8, 4, 12, 12), dtype=DTYPES[dtype], training=training, mean_over_std=mean_over_std, device=device
    )  # fmt: skip
    assert over_budget(case) == {}


@pytest.mark.kernels  # PyTorch itself does not keep this
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_variance_keeps_its_digits_when_the_mean_is_large(layout, device):
    """E[x^2] - E[x]^2 loses 1e-3 to 0.3 of this variance."""
    x = lay_out(torch.randn(64, 8, 16, 16, device=device) + 300, layout)
    running_mean, running_var = torch.zeros(8, device=device), torch.zeros(8, device=device)
    batch_norm_act(x, running_mean, running_var, training=True, momentum=1.0)
    exact = x.double().transpose(0, 1).flatten(1).var(1)
    assert ((running_var - exact).abs() / exact).max() < 2e-7


@pytest.mark.kernels  # PyTorch itself does not keep this
def test_constant_channel_normalises_to_the_bias(device):
    x = torch.full((4, 3, 5, 5), 1234.5, device=device)
    bias = torch.tensor([0.5, 1.0, 2.0], device=device)
    y = batch_norm_act(x, None, None, torch.ones(3, device=device), bias, training=True)
    assert torch.equal(y, bias.view(1, 3, 1, 1).expand_as(y))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["first", "last"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_not_finite_values_travel_as_in_pytorch(dtype, value, where, training, device):
    case = Case(shape=(4, 3, 5, 5), dtype=DTYPES[dtype], training=training, device=device)
    x = case.tensors["input"].clone()
    x[(0, 1, 0, 0) if where == "first" else (-1, 1, -1, -1)] = value
    case = case.with_tensors(input=x)
    actual, eager = run(case)["output"], run_eager(case)["output"]
    assert torch.equal(actual.isnan(), eager.isnan())
    assert torch.equal(actual.isinf(), eager.isinf())


@pytest.mark.parametrize("where", ["residual", "grad"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_residual_and_gradient_travel_as_in_pytorch(where, value, device):
    case = Case(shape=(4, 3, 5, 5), device=device)
    tensor = case.tensors[where].clone()
    tensor[0, 1, 0, 0] = value
    case = case.with_tensors(**{where: tensor})
    actual, eager = run(case), run_eager(case)
    for name in ("output", "grad_input", "grad_residual", "grad_bias"):
        assert torch.equal(actual[name].isfinite(), eager[name].isfinite()), name


def test_relu_does_not_swallow_nan(device):
    x = torch.randn(4, 3, 5, 5, device=device)
    x[0, 1] = float("nan")
    y = batch_norm_act(x, None, None, training=True)
    assert y[:, 1].isnan().all()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [True, False], ids=["add", "plain"])
def test_empty_batch(training, residual, device):
    case = Case(shape=(0, 3, 4, 4), training=training, residual=residual, device=device)
    actual, eager = run(case), run_eager(case)
    assert all(torch.equal(actual[name], eager[name]) for name in eager)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("parameter_dtype", ["float32", "same"])
@pytest.mark.parametrize("buffer_dtype", ["float32", "same"])
def test_parameters_in_float32_or_in_the_dtype_of_the_input(
    dtype, parameter_dtype, buffer_dtype, device
):
    """A 16-bit input takes each in either; on a CPU PyTorch wants all of them in one dtype, on a GPU it does not."""
    case = Case(dtype=DTYPES[dtype], device=device)
    for name, wanted in (
        ("weight", parameter_dtype), ("bias", parameter_dtype),
        ("running_mean", buffer_dtype), ("running_var", buffer_dtype),
    ):  # fmt: skip
        to = torch.float32 if wanted == "float32" else DTYPES[dtype]
        case = case.with_tensors(**{name: case.tensors[name].to(to)})
    assert over_budget(case) == {}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_strided_parameters_and_buffers(training, device):
    """Views into something larger: every second element, and one value for all channels."""
    case = Case(training=training, device=device)
    strided = {
        name: torch.stack([case.tensors[name], torch.full_like(case.tensors[name], 1e3)], 1)[:, 0]
        for name in ("weight", "running_mean", "running_var")
    }
    case = case.with_tensors(**strided, bias=case.tensors["bias"][:1].expand(8))

    def function(input, mean, var, *rest, **options):
        large = torch.stack([mean, var], 1)
        y = batch_norm_act(input, large[:, 0], large[:, 1], *rest, **options)
        mean.copy_(large[:, 0])
        var.copy_(large[:, 1])
        return y

    assert over_budget(case, run(case, function)) == {}


def test_input_as_its_own_residual(device):
    case = Case(device=device)
    x = case.tensors["input"]
    assert over_budget(case.with_tensors(residual=x)) == {}


def test_residual_of_another_dtype_gives_the_dtype_of_the_input(device):
    x = torch.randn(4, 3, 5, 5, device=device, dtype=torch.bfloat16)
    residual = torch.randn(4, 3, 5, 5, device=device, requires_grad=True)
    y = batch_norm_act(x, None, None, training=True, residual=residual)
    y.sum().backward()
    assert (y.dtype, residual.grad.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_two_runs_give_the_same_bits(layout, device):
    case = Case(shape=(8, 16, 20, 20), layout=layout, device=device)
    first, second = run(case), run(case)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_inputs_are_not_written_to(device):
    case = Case(device=device)
    before = {name: t.clone() for name, t in case.tensors.items()}
    run(case)
    assert all(torch.equal(t, before[name]) for name, t in case.tensors.items())


def test_momentum_as_a_tensor(device):
    case = Case(device=device)
    as_tensor = run(
        case, lambda *a, **k: batch_norm_act(*a[:6], torch.tensor(0.1, device=device), *a[7:], **k)
    )
    assert over_budget(case, as_tensor) == {}


@settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)  # fmt: skip
@given(data=st.data())
def test_any_shape_and_strides(data, device):
    """Any order of the dimensions in memory, any step along each of them, any subset of the fused parts."""
    dims = data.draw(st.integers(2, 5), "dims")
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=dims, max_size=dims), "shape"))
    if shape[0] * torch.Size(shape[2:]).numel() < 2:
        shape = (2, *shape[1:])

    def strided(name):
        order = data.draw(st.permutations(range(dims)), f"order of {name}")
        steps = data.draw(
            st.lists(st.integers(1, 2), min_size=dims, max_size=dims), f"steps of {name}"
        )
        storage = torch.randn([shape[d] * steps[d] for d in order], device=device)
        view = storage.permute([order.index(d) for d in range(dims)])
        return view[tuple(slice(None, None, step) for step in steps)]

    case = Case(
        shape=shape,
        training=data.draw(st.booleans(), "training"),
        residual=data.draw(st.booleans(), "residual"),
        activation=data.draw(st.sampled_from(["relu", None]), "activation"),
        device=device,
    )
    tensors = {"input": strided("input"), "grad": strided("grad")}
    if case.residual:
        tensors["residual"] = strided("residual")
    case = case.with_tensors(**tensors)
    actual, oracle = run(case), run_oracle(case)
    # A batch of few values may have a variance near 0, where an error of one rounding grows by 1 / sqrt(eps).
    for name, exact in oracle.items():
        assert error(actual[name], exact) <= 1e-3 * (1 + abs(exact).max()), name


def test_off_runs_plain_pytorch(device):
    case = Case(device=device)
    with fusedres.backend("off"):
        off = run(case)
    eager = run_eager(case)
    assert all(torch.equal(off[name], eager[name]) for name in eager)
