"""The bytes of operators and networks, without a GPU: eager counted, torch.compile by its own scheduler, ours measured.

Bytes decide here: between two convolutions there is almost no arithmetic. What a schedule moves is the same on every
GPU; how fast it moves it, only a GPU can tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from . import cases
from .cases import Case, Tail, shape_name
from .floors import OPERATORS
from .network import Count, MeasuredOnce, count_step
from .record import Row, first_line
from .timing import threads
from .traffic import Site, TrafficError, measure_traffic

EAGER, COMPILE, FUSED = "eager", "compile", "fusedres"
KERNELS = ("bn_relu", "bn_add_relu", "bn_bn_add_relu", "bn", "bn_add")
SHAPES = ((256, 64, 56, 56), (256, 2048, 7, 7))
NETWORKS = ("resnet50",)
BATCH, SIZE = 256, 224
TOLERANCE = 1.03
DTYPE, LAYOUT = torch.bfloat16, torch.channels_last
LABELS: dict[str, Any] = {"dtype": "bfloat16", "layout": "channels_last"}


def measure(quick: bool) -> Iterator[list[Row]]:
    """Operators first, then whole networks; a peer that cannot be counted here is a row that says why."""
    shapes = SHAPES[1:] if quick else SHAPES
    sites = [Site(kernel, shape) for kernel in KERNELS for shape in shapes]
    networks = [] if quick else [cases.model(name, BATCH, SIZE) for name in NETWORKS]
    measured, obstacle = _measured(sites, networks)
    for site in sites:
        yield from _operator(site, measured, obstacle)
    for case in networks:
        yield from _network(case, measured, obstacle)


def _measured(sites: list[Site], networks: list[Case]) -> tuple[MeasuredOnce, str | None]:
    """Everything that will be asked of the byte meter, measured at once; or why it cannot be."""
    once = MeasuredOnce()
    for site in sites:
        once(site)
    for case in networks:
        count_step(case.build, [case.shape], DTYPE, LAYOUT, once)
    try:
        once.measure(lambda plan: measure_traffic(plan, threads()))
    except TrafficError as error:
        return once, str(error)
    return once, None


def _operator(site: Site, measured: MeasuredOnce, obstacle: str | None) -> Iterator[list[Row]]:
    operator = OPERATORS[site.kernel]
    size = math.prod(site.shape) * DTYPE.itemsize

    def rows(provider: str, forward: int, backward: int, *kernels: int) -> list[Row]:
        found = []
        for i, (mode, moved) in enumerate((("forward", forward), ("backward", backward))):
            figures: dict[str, float] = {"passes": moved / size, "bytes": moved}
            if kernels:
                figures["kernels"] = kernels[i]
            floor = operator.bytes(mode, site.shape, DTYPE.itemsize)
            for metric, value in figures.items():
                found.append(_row(site, provider, metric, mode, value, floor))
        return found

    def tail() -> Tail:
        return cases.tail(site.kernel, site.shape[1])

    inputs = [site.shape] * (2 if operator.residual else 1)
    eager = count_step(tail, inputs, DTYPE, LAYOUT, differentiable=True)
    yield rows(EAGER, eager.bytes["forward"], eager.bytes["backward"])
    yield _inductor(site, lambda: _tail_schedule(tail, inputs), rows)
    if obstacle is not None:
        yield [_missing(site, FUSED, obstacle)]
        return
    found = measured(site)
    yield rows(
        FUSED, found.forward, found.backward, found.forward_launches, found.backward_launches
    )


def _network(case: Case, measured: MeasuredOnce, obstacle: str | None) -> Iterator[list[Row]]:
    def rows(provider: str, forward: int, backward: int, *kernels: int) -> list[Row]:
        modes = {"forward": forward, "backward": backward, "step": forward + backward}
        found = [_row(case, provider, "bytes", mode, moved) for mode, moved in modes.items()]
        if kernels:
            found.append(_row(case, provider, "kernels", "step", sum(kernels)))
        return found

    def of(count: Count) -> tuple[int, int]:
        return count.bytes["forward"], count.bytes["backward"]

    yield rows(EAGER, *of(count_step(case.build, [case.shape], DTYPE, LAYOUT)))
    yield _inductor(case, lambda: _network_schedule(case), rows)
    if obstacle is not None:
        yield [_missing(case, FUSED, obstacle)]
        return
    yield rows(FUSED, *of(count_step(case.build, [case.shape], DTYPE, LAYOUT, measured)))


def _inductor(of: Site | Case, schedule: Callable, rows: Callable) -> list[Row]:
    try:
        found = schedule()
    except Exception as error:
        return [_missing(of, COMPILE, f"not counted: {first_line(error)}")]
    return rows(
        COMPILE,
        found.forward_bytes,
        found.backward_bytes,
        found.forward_kernels,
        found.backward_kernels,
    )


def _tail_schedule(tail: Callable[[], Tail], shapes: list[tuple[int, ...]]):
    from .inductor import inductor_schedule

    inputs = [
        torch.empty(shape, dtype=DTYPE, device="meta")
        .contiguous(memory_format=LAYOUT)
        .requires_grad_()
        for shape in shapes
    ]
    with torch.device("meta"):
        module = tail()
    for norm in module.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.num_batches_tracked = None  # a kernel of its own, for everyone
    return inductor_schedule(module, inputs)


def _network_schedule(case: Case):
    from .inductor import inductor_schedule

    images = torch.empty(case.shape, dtype=DTYPE, device="meta").contiguous(memory_format=LAYOUT)
    with torch.device("meta"):
        network = case.build().train()
    for module in network.modules():
        if not isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(DTYPE)
    # Inductor fuses max-pooling with what stands before it; a convolution of the same shape is left to the library.
    pool: Any = network.maxpool
    with torch.device("meta"):
        network.maxpool = torch.nn.Conv2d(
            64, 64, pool.kernel_size, pool.stride, pool.padding, groups=64, bias=False, dtype=DTYPE
        )
    return inductor_schedule(network, [images])


def faults(rows: Sequence[Row]) -> list[str]:
    """Where a fused operator moves more than the table says, by more than 3 percent."""
    return [
        f"{row.kernel} ({row.mode}, {row.shape}) moves {row.median / 1e6:.1f} MB, {row.bytes / 1e6:.1f} MB are needed"
        for row in rows
        if row.level == "bytes" and row.metric == "bytes" and row.provider == FUSED
        if row.median is not None and row.bytes is not None and row.median > TOLERANCE * row.bytes
    ]


def _row(
    of: Site | Case, provider: str, metric: str, mode: str, value: float, floor: int | None = None
) -> Row:
    return _blank(of, provider, metric, mode=mode, median=float(value), bytes=floor)


def _missing(of: Site | Case, provider: str, why: str) -> Row:
    return _blank(of, provider, "bytes", note=why)


def _blank(of: Site | Case, provider: str, metric: str, **more: Any) -> Row:
    level = "network" if isinstance(of, Case) else "bytes"
    return Row(level, of.kernel, provider, metric, shape=shape_name(of.shape), **LABELS, **more)
