"""A whole direction in one launch: the same results as in three, where it is chosen, and what it compiles to."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch

from fusedres.benchmarks import code
from fusedres.benchmarks.code import Target
from fusedres.ops import batch_norm_act as single

from . import test_dual, test_fork
from .helpers import DTYPES, Case, force_int64, lay_out, over_budget, run, run_eager

kernels = pytest.mark.kernels
VECTORS = ("output", "grad_input", "grad_residual")


@pytest.fixture
def one():
    from fusedres.kernels.launch import passes

    with passes("one"):
        yield


@contextlib.contextmanager
def launched(monkeypatch):
    """The names of the kernels that are started within."""
    from fusedres.kernels.start import Launch

    found, start = [], Launch.start
    with monkeypatch.context() as patch:

        def recorded(self, *arguments):
            found.append(self.kernel.__name__)
            start(self, *arguments)

        patch.setattr(Launch, "start", recorded)
        yield found


# --- results ---------------------------------------------------------------------------------------------------------

# Each for a reason of its own.
SHAPES = {
    "one row": (2, 3),
    "one channel": (4, 1, 3, 3),
    "C3": (3, 3, 5, 7),
    "C24, planes without vectors": (3, 24, 7, 7),
    "several tiles, the last partial": (5, 16, 15, 17),
    "planes of whole vectors": (2, 8, 12, 16),
    "flat, 7x7": (9, 16, 7, 7),
    "flat, 14x14": (11, 8, 14, 14),
    "flat, 2x2": (8, 64, 2, 2),
    "flat, whose channels no program divides": (9, 20, 5, 5),
    "flat, in parts of unequal length": (9, 16, 5, 10),
    "a plane in pieces": (3, 2, 40, 64),
    "three dimensions": (2, 8, 3, 4, 5),
}


@kernels
@pytest.mark.parametrize("residual", [True, False], ids=["add", "plain"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, dtype, layout, residual, one, device):
    case = Case(shape=shape, dtype=DTYPES[dtype], layout=layout, residual=residual, device=device)
    assert over_budget(case) == {}


@kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_strides(dtype, layout, one, device):
    for shape in ((4, 8, 5, 7), (9, 16, 7, 7)):
        assert (
            over_budget(Case(shape=shape, dtype=DTYPES[dtype], layout=layout, device=device)) == {}
        )


@kernels
@pytest.mark.parametrize("shape", [(3, 6, 4, 5), (9, 24, 7, 5)], ids=["C6", "flat"])
@pytest.mark.parametrize("other", ["channels_last", "sliced", "transposed"])
def test_residual_and_gradient_in_another_layout(shape, other, one, device):
    case = Case(shape=shape, residual_layout=other, grad_layout=other, device=device)
    assert over_budget(case) == {}


@kernels
@pytest.mark.parametrize("options", [
    {"activation": None}, {"affine": False}, {"tracked": False}, {"activation": "silu"},
    {"activation": "leaky_relu(0.2)", "residual": False}, {"activation": "relu6"}, {"momentum": 0.0},
], ids=str)  # fmt: skip
def test_what_may_be_absent_or_other(options, one, device):
    for shape in ((4, 8, 5, 7), (9, 16, 7, 7)):
        assert over_budget(Case(shape=shape, device=device, **options)) == {}


@kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_a_mean_of_300_standard_deviations(dtype, layout, one, device):
    for shape in ((8, 4, 12, 16), (9, 8, 7, 7)):
        case = Case(
            shape=shape, dtype=DTYPES[dtype], layout=layout, mean_over_std=300, device=device
        )
        assert over_budget(case) == {}


@kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(64, 8, 16, 16), (64, 8, 7, 7)], ids=str)
def test_variance_keeps_its_digits_when_the_mean_is_large(shape, layout, one, device):
    x = lay_out(torch.randn(shape, device=device) + 300, layout)
    running_mean, running_var = torch.zeros(8, device=device), torch.zeros(8, device=device)
    single.FORWARD.op(x, None, None, None, running_mean, running_var, True, 1.0, 1e-5, None, True)
    exact = x.double().transpose(0, 1).flatten(1).var(1)
    assert ((running_var - exact).abs() / exact).max() < 2e-7


@kernels
@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (9, 8, 5, 5)], ids=["planes", "flat"])
def test_constant_channel_normalises_to_the_bias(shape, one, device):
    x = torch.full(shape, 1234.5, device=device)
    bias = torch.linspace(0.5, 2.0, shape[1], device=device)
    y, *_ = single.FORWARD.op(
        x, None, torch.ones_like(bias), bias, None, None, True, 0.1, 1e-5, "relu", True
    )
    assert torch.equal(y, bias.view(1, -1, 1, 1).expand_as(y))


@kernels
@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (9, 8, 7, 7)], ids=["planes", "flat"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["input", "residual", "grad"])
def test_not_finite_values_travel_as_in_pytorch(where, value, shape, one, device):
    case = Case(shape=shape, device=device)
    tensor = case.tensors[where].clone()
    tensor[0, 1, 0, 0] = value
    case = case.with_tensors(**{where: tensor})
    actual, eager = run(case), run_eager(case)
    assert torch.equal(actual["output"].isnan(), eager["output"].isnan())
    for name in ("output",) if where == "input" else (*VECTORS, "grad_bias"):
        assert torch.equal(actual[name].isfinite(), eager[name].isfinite()), name


@kernels
@pytest.mark.parametrize("first", ["one", "three"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(4, 24, 6, 7), (9, 16, 7, 7), (2, 8, 16, 16)], ids=str)
def test_a_backward_after_a_forward_of_the_other_form(shape, layout, first, device):
    from fusedres.kernels.launch import passes

    second = {"one": "three", "three": "one"}[first]
    case = Case(shape=shape, layout=layout, device=device)
    arguments = [case.tensors[n] for n in ("input", "residual", "weight", "bias")]
    x, residual, weight, bias = arguments
    found = {}
    for forward in (first, second):
        with passes(forward):
            _, saved, bits = single.FORWARD.op(
                x, residual, weight, bias, None, None, True, 0.1, 1e-5, "relu", True
            )
        with passes(second):
            found[forward] = saved, bits, *single.BACKWARD.op(
                case.tensors["grad"], x, weight, saved, bits, True, "relu", x.dtype, True, True, True, bias.dtype
            )  # fmt: skip
    assert torch.equal(found[first][1], found[second][1])  # the mask: the same bytes
    for a, b in zip(found[first], found[second], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@kernels
@pytest.mark.parametrize("shape", [(8, 16, 20, 20), (16, 32, 7, 7)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_two_runs_give_the_same_bits(layout, shape, one, device):
    case = Case(shape=shape, layout=layout, device=device)
    first, second = run(case), run(case)
    assert all(torch.equal(first[name], second[name]) for name in first)


@kernels
def test_forced_int64_offsets_give_the_same_bits(one, device, monkeypatch):
    for shape in ((4, 8, 5, 7), (9, 16, 7, 7)):
        case = Case(shape=shape, device=device)
        expected = run(case)
        with monkeypatch.context() as patch:
            force_int64(patch)
            actual = run(case)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


@kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(4, 24, 7, 9), (9, 16, 7, 7), (3, 3, 5, 5)], ids=str)
def test_a_residual_with_a_batchnorm_of_its_own(shape, layout, dtype, one, device):
    assert test_dual.off(test_dual.draw(shape, DTYPES[dtype], layout, device=device)) == {}


@kernels
@pytest.mark.parametrize(
    "trains", [("input",), ("residual",), test_dual.NAMES[:2], test_dual.NAMES[2:]], ids="+".join
)
def test_gradients_of_what_trains_alone(trains, one, device):
    assert test_dual.off(test_dual.draw((4, 8, 5, 5), device=device), trains=trains) == {}


@kernels
@pytest.mark.cpu
@pytest.mark.parametrize("layout", test_fork.LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 8, 7, 6), (9, 16, 7, 6)], ids=str)
@pytest.mark.parametrize("tail", ["add, relu", "dual"])
@pytest.mark.parametrize("kind", test_fork.KINDS)
def test_a_second_gradient_is_added(kind, tail, shape, layout, one):
    test_fork.test_two_gradients_are_their_sum(kind, tail, shape, torch.float32, layout, True)


@kernels
def test_what_the_input_was_used_for_besides(device):
    """The sum of a pre-activation unit has a gradient of its own, added to dx."""
    from fusedres.kernels.launch import passes

    for shape in ((4, 8, 5, 7), (9, 16, 7, 7)):
        case = Case(shape=shape, residual=False, device=device)
        x, weight, bias, dy = (case.tensors[n] for n in ("input", "weight", "bias", "grad"))
        addend, found = torch.randn_like(x), []
        for how in ("one", "three"):
            with passes(how):
                _, saved, bits = single.FORWARD.op(
                    x, None, weight, bias, None, None, True, 0.1, 1e-5, "relu", True
                )
                found.append(single.BACKWARD.op(
                    dy, x, weight, saved, bits, True, "relu", None, True, False, True, bias.dtype, addend=addend
                ))  # fmt: skip
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


@kernels
@pytest.mark.parametrize("adds", [False, True], ids=["alone", "fork"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_residual_s_gradient_has_the_bits_of_three_launches(layout, adds, device):
    """Zeros keep their sign where nothing is added, and what is not finite its place."""
    from fusedres.kernels.launch import passes

    case = Case(shape=(9, 16, 7, 7), layout=layout, device=device)
    x, residual, weight, bias, dy = (
        case.tensors[n].clone() for n in ("input", "residual", "weight", "bias", "grad")
    )
    for k, value in enumerate((-0.0, 0.0, float("nan"), float("inf"), -float("inf"))):
        dy[:, k::5] = torch.where(torch.rand_like(dy[:, k::5]) < 0.5, value, dy[:, k::5])
    skip = torch.where(dy == 0, dy, torch.randn_like(dy)) if adds else None
    with passes("three"):
        _, saved, bits = single.FORWARD.op(
            x, residual, weight, bias, None, None, True, 0.1, 1e-5, "relu", True
        )
    found = []
    for how in ("one", "three"):
        with passes(how):
            gradients = single.BACKWARD.op(
                dy, x, weight, saved, bits, True, "relu", x.dtype, True, True, True, bias.dtype, skip=skip
            )  # fmt: skip
        found.append(gradients[1].nan_to_num(7e30, 8e30, -8e30).view(torch.int32))
    assert torch.equal(*found)


# --- the choice ------------------------------------------------------------------------------------------------------


@kernels
@pytest.mark.parametrize("how", ["one", "three"])
def test_how_many_launches(how, device, monkeypatch):
    from fusedres.kernels.launch import passes

    with passes(how), launched(monkeypatch) as found:
        run(Case(shape=(9, 16, 7, 7), device=device))
    three = ["bn_stats_kernel", "bn_finalize_kernel", "bn_apply_kernel"]
    three += ["bn_grad_reduce_kernel", "bn_grad_finalize_kernel", "bn_grad_apply_kernel"]
    assert found == {"one": ["bn_forward_kernel", "bn_backward_kernel"], "three": three}[how]


@kernels
@pytest.mark.by_size
def test_without_a_word_the_size_decides(device, monkeypatch):
    with launched(monkeypatch) as small:
        run(Case(shape=(9, 16, 7, 7), device=device))
    assert small == ["bn_forward_kernel", "bn_backward_kernel"]
    with launched(monkeypatch) as large:
        run(Case(shape=(1, 1, 300, 300), device=device))
    assert len(large) == 6


@pytest.mark.once
def test_a_word_that_nobody_knows_is_refused():
    from fusedres.kernels.launch import passes

    expected = "'two', expected one of 'by size', 'one', 'three'"
    with pytest.raises(ValueError, match=expected), passes("two"):
        pass


def chosen(shape, size, layout, multiprocessors=132):
    from fusedres.kernels import launch
    from fusedres.kernels.chip import Chip
    from fusedres.kernels.layout import row_map

    chip = Chip(architecture=90, multiprocessors=multiprocessors, shared_memory=227 << 10)
    meta = torch.empty(shape, device="meta").contiguous(memory_format=getattr(torch, layout))
    rows = row_map(shape, meta.stride())
    return launch.choose_whole(rows, size, launch.FORWARD, chip)


@pytest.mark.once
@pytest.mark.by_size
@pytest.mark.parametrize(
    ("shape", "layout", "is_one"),
    [
        # The last stage of a ResNet, up to a batch of 32.
        ((32, 512, 7, 7), "channels_last", True),
        ((32, 2048, 7, 7), "channels_last", True),
        ((64, 2048, 7, 7), "channels_last", False),
        ((32, 2048, 7, 7), "contiguous_format", True),
        ((64, 2048, 7, 7), "contiguous_format", False),
        # Too few blocks of channels for so many rows; few rows may have few blocks.
        ((8, 256, 14, 14), "channels_last", False),
        ((2, 256, 14, 14), "channels_last", True),
        # A plane is whole sectors: a program may have one channel.
        ((8, 256, 56, 56), "contiguous_format", True),
        ((16, 256, 56, 56), "contiguous_format", False),
        ((1, 64, 112, 112), "contiguous_format", True),
        ((1, 64, 112, 112), "channels_last", False),
        # Planes that no vector divides, however few.
        ((4, 2048, 7, 7), "contiguous_format", True),
        ((1, 2048, 7, 7), "contiguous_format", True),
        # No program divides the channels into whole sectors.
        ((9, 20, 7, 7), "contiguous_format", False),
        ((256, 64, 112, 112), "channels_last", False),
    ],
    ids=str,
)  # fmt: skip
def test_which_shapes_are_one_launch(shape, layout, is_one):
    assert (chosen(shape, 2, layout) is not None) == is_one


@pytest.mark.once
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous_format"])
@pytest.mark.parametrize(
    "shape",
    [(32, 2048, 7, 7), (9, 16, 5, 5), (8, 64, 2, 2), (11, 24, 14, 14), (2, 512, 28, 28), (8, 64, 56, 56), (2, 8, 1, 1)],
    ids=str,
)  # fmt: skip
def test_programs_have_all_columns_in_whole_sectors(shape, layout, size, one):
    whole = chosen(shape, size, layout)
    tile, walk = whole.tile, whole.walk
    assert tile.grid == (tile.channel_blocks, 1)
    assert tile.tiles * tile.block_outer * tile.block_inner >= walk.outer * walk.inner
    assert tile.width <= tile.block_channels
    assert tile.channel_blocks * tile.width * walk.inner * walk.outer >= math.prod(shape)
    assert tile.width * size % 32 == 0 or tile.channel_blocks == 1


# --- machine code ----------------------------------------------------------------------------------------------------

PLACES = {
    "channels_last": ("channels_last", (32, 2048, 7, 7)),
    "flat": ("contiguous_format", (32, 2048, 7, 7)),
    "pieces": ("contiguous_format", (4, 256, 56, 56)),
}
QUICK = {
    ("bn_add_relu", "bfloat16", 90),
    ("bn_bn_add_relu", "bfloat16", 90),
    ("bn_relu", "float32", 80),
    ("bn_bn_add_relu_fork", "float32", 90),
}


@pytest.mark.compiler
@pytest.mark.by_size
@pytest.mark.parametrize(("operator", "dtype", "architecture"), [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for operator in ("bn_relu", "bn_add_relu", "bn_bn_add_relu", "bn_add_relu_fork", "bn_bn_add_relu_fork")
    for dtype in ("bfloat16", "float16", "float32")
    for architecture in (80, 90, 100)
    for case in [(operator, dtype, architecture)]
])  # fmt: skip
@pytest.mark.parametrize("place", PLACES)
def test_nothing_spills_and_loads_are_wide(place, operator, dtype, architecture):
    layout, shape = PLACES[place]
    launches = code.compile_target(Target(architecture, operator, place, shape, dtype, layout))
    assert [launch.kernel for launch in launches] == ["bn_forward_kernel", "bn_backward_kernel"]
    for launch in launches:
        assert launch.code.spills == 0
        assert launch.grid[1:] == (1, 1)
        assert max(launch.code.widths["load"]) == max(launch.code.widths["store"]) == 128
