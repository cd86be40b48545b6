"""`add_batch_norm_act`: the sum at the end of a pre-activation unit, and BatchNorm with its activation at the next."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fusedres
from fusedres.activations import activate
from fusedres.benchmarks.compile_only import compile_only
from fusedres.functional import add_batch_norm_act, batch_norm_act
from fusedres.nn.batch_norm import call_add_batch_norm
from fusedres.ops import preactivation
from fusedres.ops.norm import BatchNorm, How

from .helpers import DTYPES, LAYOUTS, Case, force_int64, lay_out, over_budget, run


def halves(case: Case) -> tuple[Case, torch.Tensor]:
    """The case without its residual, and three quarters of its input: taken off and added again both are exact."""
    total = case.tensors["input"]
    part = lay_out((0.75 * total).contiguous(), case.residual_layout or case.layout)
    return case.with_tensors(residual=None), part


def wrong(case: Case) -> dict:
    """What is over the budget of BatchNorm on the sum."""
    case, part = halves(case)

    def pair(input, *vectors, residual, activation):
        total, output = add_batch_norm_act(input - part, part, *vectors, activation=activation)
        assert torch.equal(total, input)
        return output

    return over_budget(case, run(case, pair))


@pytest.mark.parametrize("activation", ["relu", "leaky_relu(0.2)", "silu", "gelu", None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results(dtype, activation, device):
    assert wrong(Case(dtype=DTYPES[dtype], activation=activation, device=device)) == {}


@pytest.mark.parametrize("residual_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, residual_layout, device):
    assert (
        wrong(Case((4, 8, 5, 6), torch.float32, layout, residual_layout, "sliced", device=device))
        == {}
    )


@pytest.mark.parametrize(
    "shape",
    [(2, 1, 5, 5), (1, 3, 1, 2), (7, 100, 3, 3), (5, 16), (4, 8, 6), (2, 8, 3, 4, 5)],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_shapes(shape, training, device):
    assert wrong(Case(shape=shape, training=training, device=device)) == {}


@pytest.mark.parametrize("options", [{"affine": False}, {"tracked": False}], ids=str)
def test_what_may_be_missing(options, device):
    assert wrong(Case(**options, device=device)) == {}


@pytest.mark.parametrize("mean_over_std", [300.0, 3e4])
def test_a_mean_far_from_zero(mean_over_std, device):
    """A residual stream's mean grows with the depth; the summand alone says nothing of it."""
    assert wrong(Case(mean_over_std=mean_over_std, layout="channels_last", device=device)) == {}


def test_the_pivot_is_that_of_the_sum(device):
    """Two large summands that cancel, and a sum with a variance of its own."""
    case = Case(dtype=torch.float32, device=device)
    small = case.tensors["input"]
    large = torch.full_like(small, 2.0**16)
    total, output = add_batch_norm_act(small + large, -large, None, None, training=True)
    expected = batch_norm_act(total.double(), None, None, training=True)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-6)


def composition(input, residual, weight, activation):
    total = input + residual
    return total, batch_norm_act(total, None, None, weight, training=True, activation=activation)


def leaves_of(shape=(3, 2, 2, 3), dtype=torch.float64, device="cpu"):
    return [
        torch.randn(shape, dtype=dtype, device=device).requires_grad_(),
        torch.randn(shape, dtype=dtype, device=device).requires_grad_(),
        torch.rand(shape[1], dtype=dtype, device=device).requires_grad_(),
    ]


def pair(input, residual, weight, activation="relu"):
    return add_batch_norm_act(
        input, residual, None, None, weight, training=True, activation=activation
    )


@pytest.mark.parametrize(
    "which", [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0)], ids=["both", "sum", "output"]
)
def test_the_gradients_of_both_results_are_added(which, device):
    leaves = leaves_of(device=device)
    found, expected = (
        torch.autograd.grad(
            [t for t, w in zip(function(*leaves, "relu"), which, strict=True) if w],
            leaves,
            [torch.full((3, 2, 2, 3), 0.5 * w, dtype=torch.float64, device=device) for w in which if w],
            allow_unused=True,
            materialize_grads=True,
        )
        for function in (pair, composition)
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_the_sum_of_both_gradients_is_rounded_once(activation, dtype, device):
    """No further from the exact gradient than two tensors that are rounded and added."""
    leaves = leaves_of((4, 6, 4, 4), torch.float32, device)
    leaves = [t.detach().to(DTYPES[dtype]).requires_grad_() for t in leaves]
    total = leaves[0].detach() + leaves[1].detach()
    leaves[1] = (total - leaves[0].detach()).requires_grad_()
    grads = [torch.randn_like(leaves[0]) for _ in range(2)]

    def gradient(function, *tensors):
        return torch.autograd.grad(
            function(*tensors, activation), tensors[0], [g.to(tensors[0].dtype) for g in grads]
        )[0].double()

    exact = gradient(composition, *(t.detach().double().requires_grad_() for t in leaves))
    found, eager = gradient(pair, *leaves), gradient(composition, *leaves)
    ulp = torch.finfo(DTYPES[dtype]).eps * exact.abs().max()
    assert (found - exact).abs().max() <= 1.1 * (eager - exact).abs().max() + ulp


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_second_derivatives(activation, device):
    leaves = leaves_of((2, 2, 2, 2), device=device)
    assert torch.autograd.gradgradcheck(
        lambda *t: pair(*t, activation), leaves, fast_mode=True, atol=1e-4
    )


def test_a_nan_reaches_both_results(device):
    x = torch.ones(2, 2, 2, 2, device=device)
    x[0, 1, 0, 0] = float("nan")
    total, output = add_batch_norm_act(x, torch.rand_like(x), None, None, training=True)
    reached = output.isnan().flatten(2).transpose(0, 1).flatten(1)
    assert (total.isnan().sum(), reached.all(1).tolist(), reached.any(1).tolist()) == (
        1, [False, True], [False, True],
    )  # fmt: skip


@pytest.mark.kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_forced_int64_offsets_give_the_same_bits(layout, device, monkeypatch):
    case, part = halves(Case(shape=(3, 5, 4, 6), layout=layout, device=device))

    def results():
        x = case.tensors["input"].detach().requires_grad_()
        found = add_batch_norm_act(x, part, None, None, training=True)
        return [*found, *torch.autograd.grad(found, x, [part, part])]

    expected = results()
    force_int64(monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(results(), expected, strict=True))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_opcheck(training, device):
    t = Case(shape=(2, 5, 4, 6), layout="channels_last", device=device).tensors
    torch.library.opcheck(
        preactivation.FORWARD.op,
        (
            t["input"], t["residual"], t["weight"], t["bias"], t["running_mean"], t["running_var"],
            training, 0.1, 1e-5, "relu", True,
        ),
    )  # fmt: skip


@pytest.mark.kernels
def test_a_backward_may_run_on_the_other_backend(device):
    leaves = leaves_of(device=device)
    grads = [torch.ones_like(leaves[0])] * 2
    expected = torch.autograd.grad(pair(*leaves), leaves, grads)
    with fusedres.backend("aten"):
        norm = BatchNorm(leaves[2], None, None, None)
        results = preactivation.add_batch_norm_act(leaves[0], leaves[1], norm, How(True, "relu"))
        found = torch.autograd.grad(results, leaves, grads)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", [(8, 16, 48, 48), (16, 128, 14, 14)], ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_passes(layout, shape):
    """5 forward and 6 backward: within 3 percent, per-channel vectors and partial sums included."""
    from fusedres.benchmarks.meter import meter

    x, f, dy, dsum = (lay_out(torch.randn(shape).bfloat16(), layout) for _ in range(4))
    weight = torch.rand(shape[1]).requires_grad_()
    leaves = [x.requires_grad_(), f.requires_grad_(), weight]
    with meter() as forward:
        results = pair(*leaves)
    with meter() as backward:
        torch.autograd.grad(results, leaves, [dsum, dy])
    size = x.numel() * x.element_size()
    assert (forward.bytes / size, backward.bytes / size) == pytest.approx((5, 6), rel=0.03)


@pytest.mark.compiler
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])  # fmt: skip
def test_machine_code(layout, dtype, architecture):
    """Three launches each way, no spills, and what is stored is stored in 128 bits."""
    shape = (64, 256, 28, 28)
    x, f = (
        torch.empty(shape, dtype=DTYPES[dtype], memory_format=layout).requires_grad_()
        for _ in range(2)
    )
    weight, bias = (torch.empty(256).requires_grad_() for _ in range(2))
    with fusedres.backend("triton"), compile_only(architecture) as recorded:
        results = add_batch_norm_act(x, f, None, None, weight, bias, training=True)
        torch.autograd.grad(results, [x, f, weight, bias], [torch.empty_like(x)] * 2)
        found = list(recorded)
    stores = [
        each.kernel
        for each in found
        if each.code.widths["store"].get(128) and "finalize" not in each.kernel
    ]
    assert (len(found), sum(each.code.spills for each in found), stores) == (
        6, 0, ["bn_stats_kernel", "bn_apply_kernel", "bn_grad_apply_kernel"],
    )  # fmt: skip


@pytest.mark.once
@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"residual": torch.randn(2, 3, 1, 1)}, RuntimeError, r"add_batch_norm_act: residual .*\[2, 3, 1, 1\]"),
        ({"residual": torch.randn(2, 3, 4, 4).double()}, RuntimeError, "residual has dtype torch.float64"),
        ({"weight": torch.ones(4)}, RuntimeError, r"weight has shape \[4\], expected \[3\]"),
        ({"running_var": None}, ValueError, "running_var is None and running_mean is not"),
        ({"activation": "tanh"}, ValueError, "unknown activation 'tanh'"),
    ],
    ids=["shape", "dtype", "weight", "statistics", "activation"],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_nothing_is_changed(changes, error, text):
    mean, var = torch.zeros(3), torch.ones(3)
    given = {
        "input": torch.randn(2, 3, 4, 4), "residual": torch.randn(2, 3, 4, 4),
        "running_mean": mean, "running_var": var, "training": True, **changes,
    }  # fmt: skip
    with pytest.raises(error, match=text):
        add_batch_norm_act(**given)
    assert (mean.tolist(), var.tolist()) == ([0.0] * 3, [1.0] * 3)


# --- the same with a BatchNorm that somebody owns ----------------------------------------------------------------


NORMS = {
    "plain": lambda: nn.BatchNorm2d(3),
    "cumulative": lambda: nn.BatchNorm2d(3, momentum=None),
    "untracked": lambda: nn.BatchNorm2d(3, track_running_stats=False),
    "group": lambda: nn.GroupNorm(1, 3),
    "hooked": lambda: hooked(),
}


def hooked() -> nn.Module:
    norm = nn.BatchNorm2d(3)
    norm.register_forward_hook(lambda module, inputs, output: output * 2)
    return norm


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", NORMS)
def test_a_norm_of_any_kind(name, training, device):
    norm, plain = (NORMS[name]().double().to(device).train(training) for _ in range(2))
    x, r = (torch.randn(4, 3, 5, 5, dtype=torch.float64, device=device) for _ in range(2))
    found = [*call_add_batch_norm(norm, x, r, "relu"), *norm.state_dict().values()]
    expected = [x + r, activate(plain(x + r), "relu"), *plain.state_dict().values()]
    torch.testing.assert_close(found, expected)


@pytest.mark.once
def test_a_call_that_fails_is_not_counted():
    norm = nn.BatchNorm2d(3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        call_add_batch_norm(norm, torch.ones(1, 3, 1, 1), torch.ones(1, 3, 1, 1))
    assert norm.num_batches_tracked == 0


def test_it_is_compiled_whole(device):
    """Under torch.compile the pair is left to the compiler."""
    leaves = leaves_of(device=device)
    compiled = torch.compile(pair, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*leaves), composition(*leaves, "relu"))
