"""What every pass may cost, by the model of `fusedres.benchmarks.machine`: read from machine code, nothing is run.

A ResNet-50 at batch 256, sm_90. `python -m fusedres.benchmarks.machine` prints the whole table. By default a few places
that differ in kind are held to the budgets; `-m slow` takes all.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import triton

from fusedres.benchmarks import code, machine, sass
from fusedres.benchmarks.code import Target
from fusedres.benchmarks.compile_only import Launch
from fusedres.benchmarks.machine import MODE, Pass, Place
from fusedres.kernels import launch as launching

pytestmark = pytest.mark.compiler

RATIO, COUNT = "instruction_to_memory_H200", "instructions_an_element"
# The most, but bytes_in_flight: the least. What a metric is: `machine.METRICS`.
BUDGETS: dict[str, Any] = {
    # Instruction time over memory time, by dtype: the rest is for what the model leaves out.
    RATIO: {"bfloat16": 0.6, "float16": 0.6, "float32": 0.5},
    # The same at 7x7, contiguous, in every dtype.
    f"{RATIO}, 7x7 contiguous": 0.8,
    # In channels_last, by dtype, kernel and operator (or of all of them).
    COUNT: {
        ("bfloat16", "bn_stats"): 7.5,
        ("bfloat16", "bn_apply", "bn_relu"): 6.5,
        ("bfloat16", "bn_apply", "bn_add_relu"): 12,
        ("bfloat16", "bn_apply", "bn_add_relu_fork"): 12,
        ("bfloat16", "bn_apply", "bn_bn_add_relu"): 14,
        ("bfloat16", "bn_grad_reduce"): 13,
        ("bfloat16", "bn_grad_apply"): 12,
        ("float32", "bn_stats"): 10.5,
        ("float32", "bn_grad_reduce"): 17.5,
        # With a third tensor: the residual's own BatchNorm, or a second gradient, and a sum or a store more.
        ("bfloat16", "bn_grad_reduce", "bn_bn_add_relu"): 17.5,
        ("bfloat16", "bn_grad_reduce", "bn_add_relu_fork"): 16,
        ("bfloat16", "bn_grad_apply", "bn_bn_add_relu"): 16.5,
        ("float32", "bn_grad_reduce", "bn_bn_add_relu"): 31,
        ("float32", "bn_grad_reduce", "bn_add_relu_fork"): 21.5,
    },
    # The same code of an older Triton (3.6: up to 7 percent more instructions) may have so many times as many.
    "older": 1.1,
    # Of passes that move so many bytes: what they read and write, of the tiles under way.
    "large": 50e6,
    "bytes_in_flight": 40e3,
    "rounds": 1,
    "spills": 0,
}
# What does not meet its budget, where, and what was reached: (metric, reached, place). An entry that nothing needs any
# more is a failure (`test_no_exception_is_left_that_nothing_needs`).
NOT_YET: list[tuple[str, float, dict[str, Any]]] = [
    # A flat walk of 14 * 14 * 1024 columns is 784 blocks, a program each at least. Wider ones would be one round, and
    # have so many channels at 7x7 that adding them up takes a tenth of the pass; another tile for 7x7 is eight more
    # kernels to compile. The last round has two programs and more on a multiprocessor, 64 KB in flight.
    ("rounds", 2, {"layout": "contiguous_format", "height": 14}),
    # 392 blocks of columns are three programs on a multiprocessor, of small tiles.
    ("bytes_in_flight", 36.8e3, {"kernel": "bn_apply", "operator": "bn_bn_add_relu", "height": 7}),
]  # fmt: skip

BATCH = 256
IS_OLDER = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
EVERY = machine.sites((BATCH,))
# Places that differ in kind, which other tests compile, too.
SOME = {
    ("bn_relu", "bfloat16", "channels_last", 112),
    ("bn_add_relu", "bfloat16", "channels_last", 56),
    ("bn_bn_add_relu", "bfloat16", "channels_last", 56),
    ("bn_add_relu_fork", "bfloat16", "channels_last", 56),
    ("bn_add_relu", "float32", "channels_last", 56),
    ("bn_add_relu", "bfloat16", "contiguous_format", 56),
    ("bn_add_relu", "bfloat16", "contiguous_format", 7),
}
KERNELS = ("bn_stats", "bn_apply", "bn_grad_reduce", "bn_grad_apply")


def cases(targets: list[Target]) -> list[Any]:
    """A case for each pass of each place."""
    found = []
    for target in targets:
        _, channels, height, _ = target.shape
        quick = (target.kernel, target.dtype, target.layout, height) in SOME
        layout = {"channels_last": "nhwc", "contiguous_format": "nchw"}[target.layout]
        for kernel in KERNELS:
            name = f"{kernel}-{target.kernel}-{target.dtype}-{layout}-C{channels}-H{height}"
            marks = () if quick else pytest.mark.slow
            found.append(pytest.param(target, kernel, id=name, marks=marks))
    return found


@functools.cache
def passes(target: Target) -> tuple[Pass, ...]:
    launches = code.compile_target(target, machine.FINALISING)
    return tuple(place.of for place in machine.places(target, launches))


def figures(target: Target, of: Pass) -> dict[str, float]:
    rows = machine.rows_of([Place(target, of)])
    return {row.metric: row.median for row in rows if row.mode == MODE and row.median is not None}


def budgets(target: Target, of: Pass) -> dict[str, float]:
    """The budgets of a pass."""
    is_contiguous = target.layout == "contiguous_format"
    found = {RATIO: BUDGETS[RATIO][target.dtype], "spills": BUDGETS["spills"]}
    if is_contiguous and target.shape[2] == 7:
        found[RATIO] = BUDGETS[f"{RATIO}, 7x7 contiguous"]
    if not is_contiguous:
        for key in ((target.dtype, of.kernel), (target.dtype, of.kernel, target.kernel)):
            if key in BUDGETS[COUNT]:
                found[COUNT] = BUDGETS[COUNT][key]
    if of.bytes >= BUDGETS["large"]:
        found |= {name: BUDGETS[name] for name in ("bytes_in_flight", "rounds")}
    return found


def excepted(metric: str, target: Target, of: Pass) -> list[int]:
    """The entries of NOT_YET that are about this figure."""
    is_at = {
        "kernel": of.kernel,
        "operator": target.kernel,
        "dtype": target.dtype,
        "layout": target.layout,
        "height": target.shape[2],
    }
    return [
        i
        for i, (name, _, where) in enumerate(NOT_YET)
        if name == metric and where.items() <= is_at.items()
    ]


def is_within(metric: str, value: float, bound: float) -> bool:
    if metric == COUNT and IS_OLDER:
        bound *= BUDGETS["older"]
    return value >= bound if metric == "bytes_in_flight" else value <= bound


@pytest.mark.parametrize(("target", "kernel"), cases(EVERY))
def test_a_pass_is_within_its_budget(target, kernel):
    found = [of for of in passes(target) if of.kernel == kernel]
    assert found
    over = {}
    for of in found:
        figure = figures(target, of)
        for metric, bound in budgets(target, of).items():
            allowed = [bound, *(NOT_YET[i][1] for i in excepted(metric, target, of))]
            if not any(is_within(metric, figure[metric], b) for b in allowed):
                over[metric] = f"{figure[metric]:.2f}, budget {bound}, allowed {allowed[-1]}"
    assert over == {}


@pytest.mark.slow
def test_no_exception_is_left_that_nothing_needs():
    needed = set()
    for target in EVERY:
        for of in passes(target):
            figure = figures(target, of)
            for metric, bound in budgets(target, of).items():
                if not is_within(metric, figure[metric], bound):
                    needed |= set(excepted(metric, target, of))
    assert [entry for i, entry in enumerate(NOT_YET) if i not in needed] == []


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 100])
@pytest.mark.parametrize("dtype", machine.DTYPES)
@pytest.mark.parametrize("layout", machine.LAYOUTS)
@pytest.mark.parametrize("operator", machine.SHAPES)
def test_nothing_spills_elsewhere(operator, layout, dtype, architecture):
    spilt = {}
    for channels, height in machine.SHAPES[operator]:
        shape = (BATCH, channels, height, height)
        target = Target(architecture, operator, "here", shape, dtype, layout)
        for launch in code.compile_target(target):
            if launch.code.spills:
                spilt[launch.kernel, shape] = launch.code.spills
    assert spilt == {}


# --- one launch for a whole direction ---------------------------------------------------------------------------------

# Instructions an element of its loops, over those of the passes that it replaces. The floor is 1: it does the same work
# on the same values. What it takes more: its tiles are half as large, or a quarter, so that what is done once a tile
# weighs more (a thread has 8 values of a float32 tensor in the backward's); all kinds of tails are one kernel, which
# decides on the way. The backward of a plain one has loops of its own.
WHOLE = {"bfloat16": 1.25, "float32": 1.45}
PLACES = {"channels_last": (32, 2048, 7, 7), "contiguous_format": (32, 2048, 7, 7)}


def loops_of(launch: Launch) -> list[tuple[float, float]]:
    """Instructions an element of each loop: in the fullest case, and in the plainest."""
    given = launch.arguments
    tile = math.prod(given[f"TILE.{name}"] for name in ("outer", "inner", "channels"))
    return [
        (
            most.instructions * 32 * launch.warps / tile,
            least.instructions * 32 * launch.warps / tile,
        )
        for most, least in sass.inner_loops(launch.cubin)
    ]


def in_one(target: Target) -> tuple[float, float]:
    """Of the forward and of the backward."""
    forward, backward = map(loops_of, code.compile_target(target))
    # Of x and of the residual: whole tiles, then the partial ones.
    moments, _, moments_of_residual, _, apply = forward
    plain, tail = backward[:2], backward[2:]
    if target.kernel == "bn_relu":
        return moments[1] + apply[1], sum(least for _, least in plain)
    return moments[0] + moments_of_residual[0] + apply[0], sum(most for most, _ in tail)


def in_three(target: Target) -> tuple[float, float]:
    with launching.passes("three"):
        found = passes.__wrapped__(target)
    forward = [of.instructions for of in found if of.kernel in ("bn_stats", "bn_apply")]
    backward = [of.instructions for of in found if "grad" in of.kernel]
    return sum(forward), sum(backward)


@pytest.mark.by_size
@pytest.mark.parametrize("operator", ["bn_relu", "bn_bn_add_relu_fork"])
@pytest.mark.parametrize("dtype", WHOLE)
@pytest.mark.parametrize("layout", PLACES)
def test_one_launch_takes_little_more_than_the_passes_that_it_replaces(layout, dtype, operator):
    target = Target(90, operator, "one launch", PLACES[layout], dtype, layout)
    found = {
        way: (one, three)
        for way, one, three in zip(
            ("forward", "backward"), in_one(target), in_three(target), strict=True
        )
    }
    assert all(one <= WHOLE[dtype] * three for one, three in found.values()), found


def test_a_pass_over_its_budget_is_named(monkeypatch):
    (target,) = machine.sites((BATCH,), ["bn_add_relu"], ["bfloat16"], ["channels_last"])[:1]
    monkeypatch.setitem(BUDGETS[COUNT], ("bfloat16", "bn_stats"), 1.0)
    with pytest.raises(AssertionError, match=r"'instructions_an_element': '\d+\.\d\d, budget 1.0"):
        test_a_pass_is_within_its_budget(target, "bn_stats")
