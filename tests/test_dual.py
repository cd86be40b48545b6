"""The dual tail, `act(bn(input) + bn'(residual))`: held against the composition in float64, and to its passes.

A result may err as much as the composition in the same dtype does, times 1.1, plus one unit in the last place.
"""

from __future__ import annotations

import pytest
import torch

import fusedres
from fusedres.benchmarks.compile_only import compile_only
from fusedres.functional import dual_batch_norm_act
from fusedres.ops import dual

from .helpers import DTYPES, lay_out

NAMES = ("input", "residual", "weight", "bias", "residual_weight", "residual_bias")
BUFFERS = ("running_mean", "running_var", "residual_running_mean", "residual_running_var")


def draw(shape, dtype=torch.float32, layout="contiguous", residual_layout=None, device="cpu", mean=2.0):  # fmt: skip
    """Tensors by name; inputs with a mean of several standard deviations."""
    generator = torch.Generator().manual_seed(1)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    channels = shape[1]
    made = {
        "input": lay_out((normal(*shape) + mean).to(device, dtype), layout),
        "residual": lay_out(
            (3 * normal(*shape) - mean).to(device, dtype), residual_layout or layout
        ),
        "grad": lay_out(normal(*shape).to(device, dtype), layout),
    }
    made |= {name: normal(channels).to(device, wide) for name in NAMES[2:]}
    made |= {name: (normal(channels).square() + 0.5).to(device, wide) for name in BUFFERS}
    return made


def run(tensors, training=True, activation="relu", trains=NAMES):
    """Output, gradients of what trains, and buffers of one forward and backward."""
    leaves = {n: tensors[n].detach().requires_grad_(n in trains) for n in NAMES if n in tensors}
    buffers = {n: tensors[n].clone() for n in BUFFERS if n in tensors}
    output = dual_batch_norm_act(
        leaves["input"], leaves["residual"], *(buffers.get(n) for n in BUFFERS),
        *(leaves.get(n) for n in NAMES[2:]), training, 0.1, 1e-5, 0.3, 1e-3, activation=activation,
    )  # fmt: skip
    wanted = [n for n in trains if n in leaves]
    gradients = torch.autograd.grad(output, [leaves[n] for n in wanted], tensors["grad"])
    found = {"output": output.detach()} | {f"grad_{n}": g for n, g in zip(wanted, gradients, strict=True)}  # fmt: skip
    return found | buffers


def off(tensors, **options):
    """What errs by more than the composition in the same dtype."""
    with fusedres.backend("aten"):
        exact = run({n: t.double() for n, t in tensors.items()}, **options)
        eager = run(tensors, **options)
    actual = run(tensors, **options)
    assert actual.keys() == eager.keys()
    found = {}
    for name, result in actual.items():
        assert result.dtype == eager[name].dtype, name
        error, allowed = (
            float((t.double() - exact[name]).abs().max()) for t in (result, eager[name])
        )
        allowed = 1.1 * allowed + torch.finfo(result.dtype).eps * float(exact[name].abs().max())
        if tensors["input"].dtype == torch.float64:  # the oracle itself, in another order
            allowed *= 64
        if not error <= allowed:
            found[name] = (error, allowed)
    return found


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results(dtype, layout, activation, training, device):
    tensors = draw((4, 24, 7, 9), DTYPES[dtype], layout, device=device)
    assert off(tensors, training=training, activation=activation) == {}


@pytest.mark.parametrize(
    "shape", [(2, 1, 5, 5), (3, 3, 9, 7), (7, 100, 3, 3), (5, 16), (4, 8, 6), (2, 8, 3, 4, 5), (1, 64, 14, 14)], ids=str
)  # fmt: skip
def test_shapes(shape, device):
    assert off(draw(shape, device=device)) == {}


@pytest.mark.parametrize("residual_layout", ["contiguous", "sliced", "transposed"])
def test_a_residual_in_another_layout(residual_layout, device):
    tensors = draw((2, 8, 6, 6), torch.float32, "channels_last", residual_layout, device)
    assert off(tensors) == {}


def test_a_mean_of_300_standard_deviations(device):
    assert off(draw((8, 16, 7, 7), mean=300.0, device=device)) == {}


@pytest.mark.parametrize(
    "absent", [("weight", "bias"), ("residual_weight", "residual_bias"), NAMES[2:], BUFFERS, ("bias",)], ids="+".join
)  # fmt: skip
def test_absent_vectors(absent, device):
    tensors = draw((4, 8, 5, 5), device=device)
    assert off({n: t for n, t in tensors.items() if n not in absent}) == {}


@pytest.mark.parametrize(
    "trains",
    [("input",), ("residual",), ("weight",), ("residual_bias",), NAMES[:2], NAMES[2:]],
    ids="+".join,
)  # fmt: skip
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients_of_what_trains_alone(trains, training, device):
    assert off(draw((4, 8, 5, 5), device=device), training=training, trains=trains) == {}


def test_two_runs_give_the_same_bits(device):
    tensors = draw((16, 24, 9, 9), torch.bfloat16, device=device)
    first, second = run(tensors), run(tensors)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_nan_reaches_the_output_and_the_gradients(device):
    tensors = draw((4, 8, 5, 5), device=device)
    tensors["residual"][0, 3, 0, 0] = float("nan")
    with fusedres.backend("aten"):
        expected = run(tensors)
    actual = run(tensors)
    assert all(torch.equal(actual[n].isnan(), expected[n].isnan()) for n in expected)


def test_nothing_given_is_written_to(device):
    tensors = draw((4, 8, 5, 5), device=device)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    run(tensors)
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)


# --- autograd, torch.func, torch.compile -----------------------------------------------------------------------------


def leaves(device, shape=(2, 3, 2, 2)):
    tensors = draw(shape, torch.float64, "channels_last", device=device)
    return [tensors[name].requires_grad_() for name in NAMES]


def call(training, activation):
    def function(input, residual, *vectors):
        statistics = [None] * 4
        if not training:
            ones = input.detach().new_ones(input.shape[1])
            statistics = [0.1 * ones, 1.2 * ones, 0.3 * ones, 0.9 * ones]
        return dual_batch_norm_act(input, residual, *statistics, *vectors, training, activation=activation)  # fmt: skip

    return function


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", ["relu", None])
def test_gradcheck_and_gradgradcheck(activation, training, device):
    function, inputs = call(training, activation), leaves(device)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_opcheck(device):
    t = draw((3, 8, 4, 5), layout="channels_last", device=device)
    inputs = [t[name] for name in NAMES]
    forward = (*inputs, *(t[name] for name in BUFFERS), True, 0.1, 1e-5, 0.2, 1e-3, "relu", True)
    torch.library.opcheck(dual.FORWARD.op, forward)
    _, saved, residual_saved, bits = dual.FORWARD.op(*forward)
    input, residual, weight, bias, residual_weight, residual_bias = inputs
    backward = (
        t["grad"], input, residual, weight, residual_weight, saved, residual_saved, bits, True, "relu", [True] * 4,
        bias.dtype, residual_bias.dtype,
    )  # fmt: skip
    torch.library.opcheck(dual.BACKWARD.op, backward)


def test_vmap_is_a_loop_over_the_mapped_dimension(device):
    many = [torch.stack([t.detach(), 2 * t.detach() + 1]) for t in leaves(device, (3, 4, 2, 2))]
    function = call(True, "relu")
    expected = torch.stack([function(*(t[k] for t in many)) for k in range(2)])
    torch.testing.assert_close(torch.vmap(function)(*many), expected)

    def loss(*tensors):
        return function(*tensors).square().sum()

    grad = torch.func.grad(loss, argnums=(0, 1, 4))
    expected = [torch.stack(g) for g in zip(*(grad(*(t[k] for t in many)) for k in range(2)), strict=True)]  # fmt: skip
    torch.testing.assert_close(list(torch.vmap(grad)(*many)), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, while it compiles
def test_it_compiles_without_a_break(device):
    torch._dynamo.reset()
    tensors = draw((4, 8, 5, 5), device=device)

    def loss(input, residual, weight):
        return dual_batch_norm_act(input, residual, None, None, None, None, weight, training=True)

    inputs = [tensors[n].requires_grad_() for n in ("input", "residual", "weight")]
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(loss(*inputs), inputs, tensors["grad"])
    actual = torch.autograd.grad(compiled(*inputs), inputs, tensors["grad"])
    torch.testing.assert_close(actual, expected)


# --- what it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.compiler
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_machine_code(layout, dtype, architecture):
    """No spills, wide accesses; two launches for each statistics and one apply, then reduce, two finalize, apply."""
    shape = (256, 256, 56, 56)
    x, residual = (
        torch.empty(shape, dtype=dtype, memory_format=layout).requires_grad_() for _ in range(2)
    )
    vectors = [torch.empty(256).requires_grad_() for _ in range(4)]
    buffers = [torch.empty(256) for _ in range(4)]
    with fusedres.backend("triton"), compile_only(architecture) as launches:
        output = dual_batch_norm_act(x, residual, *buffers, *vectors, True)
        torch.autograd.grad(output, [x, residual, *vectors], torch.empty_like(output))
        found = list(launches)
    assert len(found) == 5 + 4
    assert {launch.kernel: launch.code.spills for launch in found if launch.code.spills} == {}
    for launch in found:
        if "finalize" not in launch.kernel:
            assert 128 in launch.code.widths["load"], launch


# --- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"residual": torch.zeros(4, 8, 5, 6)}, RuntimeError, "residual has shape [4, 8, 5, 6], expected [4, 8, 5, 5]"),
        ({"residual": None}, TypeError, "residual is None, expected a torch.Tensor"),
        ({"residual_weight": torch.zeros(7)}, RuntimeError, "of the residual: weight has shape [7], expected [8]"),
        ({"residual_running_var": None}, ValueError, "of the residual: running_var is None and running_mean is not"),
        ({"weight": torch.zeros(8, dtype=torch.float16)}, RuntimeError, "weight has dtype torch.float16"),
        ({"residual_momentum": torch.ones(1)}, TypeError, "residual_momentum is tensor([1.]), expected a number"),
        ({"residual_eps": -1.0}, ValueError, "residual_eps is -1.0, expected a positive number"),
        ({"activation": "tanh"}, ValueError, "unknown activation 'tanh'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_a_buffer_moves(change, error, words):
    t = draw((4, 8, 5, 5))
    arguments = {n: t[n] for n in (*NAMES, *BUFFERS)} | {"training": True} | change
    before = [t[n].clone() for n in BUFFERS]
    with pytest.raises(error) as caught:
        dual_batch_norm_act(**arguments)
    assert words in str(caught.value)
    assert all(torch.equal(t[n], b) for n, b in zip(BUFFERS, before, strict=True))
