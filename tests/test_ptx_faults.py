"""Faults planted in compiled kernels, one at a time: each must turn the interpreter's checks, or the results, red.

A fault is a change of one line of the PTX of a kernel that ships, run with one multiprocessor (a program has many
tiles, so that pipelines go round). What survives is in `SURVIVORS` with the reason. Lines where nothing can be seen
are not chosen: what no lane takes, and a store whose mask is true in every lane, which is the same store without it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

import fusedres
from fusedres.benchmarks.ptx import emulated
from fusedres.benchmarks.ptx.decode import decode
from fusedres.functional import batch_norm_act, projection
from fusedres.ops.projection import in_triton

pytestmark = pytest.mark.once

SITES = 4  # of a kind, in a kernel


def _other_accumulator(match: re.Match[str]) -> str:
    first, second, *rest = match[2].split(",")
    return match[1] + ",".join([second, first, *rest])


# kind -> (what is searched for, what stands there instead)
FAULTS: dict[str, tuple[str, str | Callable[[re.Match[str]], str]]] = {
    "no barrier": (r"^\s*bar\.sync[^\n]*\n", "\n"),
    "waits for one copy too few": (
        r"cp\.async\.wait_group\s+(\d+)", lambda m: f"cp.async.wait_group {int(m[1]) + 1}"
    ),
    "a store without its mask": (r"@%p\d+ (st\.global)", lambda m: m[1]),
    "16 bytes further": (
        r"((?:ld|st)\.global[^\n]*\+ )(\d+) \]", lambda m: f"{m[1]}{int(m[2]) + 16} ]"
    ),
    "another lane's value": (
        r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+, )(\d+),", lambda m: f"{m[1]}{int(m[2]) // 2 or 16},"
    ),
    "a comparison turned": (
        r"setp\.(lt|gt)\.s32", lambda m: f"setp.{ {'lt': 'ge', 'gt': 'le'}[m[1]] }.s32"
    ),
    "another accumulator": (
        r"(mma(?:\.sync|_async)[^\n{]*\{\s*)((?:%r\d+,\s*)+%r\d+)", _other_accumulator
    ),
}  # fmt: skip

# (kind, kernel) -> why a fault there may change nothing.
_ZEROS = "few programs at this size: the lanes that are added hold zeros"
_DRAIN = "the wait after a loop, or for a tile that is not there: nothing is read that it waits for"
_TWICE = "a barrier beside another: no access to shared memory between them"
SURVIVORS = {
    ("no barrier", "bn_stats_kernel"): "a thread reads what it copied itself; " + _TWICE,
    ("no barrier", "bn_grad_reduce_kernel"): "a thread reads what it copied itself (Triton 3.6)",
    ("no barrier", "projection_kernel"): _TWICE,
    ("no barrier", "projection_grad_weight_kernel"): _TWICE,
    ("waits for one copy too few", "bn_stats_kernel"): _DRAIN,
    ("waits for one copy too few", "bn_grad_reduce_kernel"): _DRAIN,
    ("waits for one copy too few", "projection_kernel"): _DRAIN,
    ("waits for one copy too few", "projection_grad_weight_kernel"): _DRAIN,
    ("a store without its mask", "projection_kernel"): (
        "in the gradient of the input: past the last channel, zeros where the stride leaves zeros"
    ),
    ("another lane's value", "bn_finalize_kernel"): _ZEROS,
    ("another lane's value", "bn_grad_finalize_kernel"): _ZEROS,
    ("another lane's value", "bn_grad_reduce_kernel"): "sums of what was rounded off: zeros",
    ("another lane's value", "bn_stats_kernel"): "sums of counts: another lane has the same",
    ("a comparison turned", "bn_stats_kernel"): "the pipeline's slot, which two tiles do not wrap",
    ("a comparison turned", "projection_kernel"): "the way around a loop that is entered anyhow",
    ("another accumulator", "projection_kernel"): (
        "in the gradient of the input: past the last channel, where zeros are added"
    ),
}


def _tail(dtype: torch.dtype, layout: torch.memory_format) -> Callable[[], list[torch.Tensor]]:
    """Forward and backward of BN + add + ReLU; channels and rows fill no block."""

    def draw() -> torch.Tensor:
        values = (torch.randn(7, 70, 20, 24, generator=generator) * 3 + 300).to(dtype)
        return values.contiguous(memory_format=layout).requires_grad_()

    generator = torch.Generator().manual_seed(0)
    x, residual, gradient = draw(), draw(), draw().detach()
    weight, bias = (torch.rand(70, generator=generator).requires_grad_() for _ in range(2))

    def call() -> list[torch.Tensor]:
        mean, var = torch.zeros(70), torch.ones(70)
        y = batch_norm_act(x, mean, var, weight, bias, True, residual=residual)
        return [y, mean, var, *torch.autograd.grad(y, [x, weight, bias, residual], gradient)]

    return call


def _product(dtype: torch.dtype) -> Callable[[], list[torch.Tensor]]:
    """Forward and backward of a projection with stride 2; output channels and rows fill no block."""

    def draw(*shape: int) -> torch.Tensor:
        values = torch.randn(shape, generator=generator).to(dtype)
        return values.contiguous(memory_format=torch.channels_last).requires_grad_()

    generator = torch.Generator().manual_seed(0)
    x, weight, gradient = draw(5, 224, 17, 17), draw(96, 224, 1, 1), draw(5, 96, 9, 9).detach()

    def call() -> list[torch.Tensor]:
        with in_triton():
            y = projection(x, weight, None, 2)
        return [y, *torch.autograd.grad(y, [x, weight], gradient)]

    return call


SUBJECTS = {
    "tail, bfloat16, channels_last": _tail(torch.bfloat16, torch.channels_last),
    "tail, float32, contiguous": _tail(torch.float32, torch.contiguous_format),
    "product, bfloat16": _product(torch.bfloat16),
    "product, float32": _product(torch.float32),
}


@dataclass(frozen=True)
class Healthy:
    """What a subject gives without a fault: its results, its PTX (text -> kernel), and the lines that are not chosen: a
    mask true in every lane, or no lane at all."""

    results: list[bytes]
    kernels: dict[str, str]
    silent: set[tuple[str, str]]


def _bits(tensors: list[torch.Tensor]) -> list[bytes]:
    return [t.detach().contiguous().view(torch.uint8).numpy().tobytes() for t in tensors]


@functools.cache
def healthy(subject: str, architecture: int) -> Healthy:
    kernels: dict[str, str] = {}

    def look(kernel: str, ptx: str) -> str:
        kernels[ptx] = kernel
        return ptx

    with fusedres.backend("triton"), emulated(architecture, multiprocessors=1, rewrite=look) as run:
        results = _bits(SUBJECTS[subject]())
    assert [error for launch in run for error in launch.errors] == []
    silent = {
        (launch.kernel, text)
        for launch in run
        for text, count in zip(launch.program.text, launch.counts, strict=True)
        if count["lanes"] == 0 or (text.startswith("@") and count["lanes"] == 32 * count["warps"])
    }
    return Healthy(results, kernels, silent)


def _is_found(subject: str, architecture: int, ptx: str, planted: str) -> bool:
    with (
        fusedres.backend("triton"),
        emulated(
            architecture,
            multiprocessors=1,
            limit=20_000_000,
            rewrite=lambda _, text: planted if text == ptx else text,
        ) as run,
    ):
        results = _bits(SUBJECTS[subject]())
    if any(launch.errors for launch in run):
        return True
    return results != healthy(subject, architecture).results


def _sites(pattern: str, ptx: str, kernel: str, silent: set[tuple[str, str]]):
    """Some places in the text, spread over it."""
    found = []
    for match in re.finditer(pattern, ptx, re.M):
        line = ptx[ptx.rfind("\n", 0, match.start()) + 1 : ptx.find("\n", match.end() - 1)]
        statement = " ".join(line.split("//")[0].split()).rstrip(";")
        if (kernel, statement) not in silent:
            found.append(match)
    return found[:: max(1, len(found) // SITES)][:SITES]


@pytest.mark.parametrize("architecture", [pytest.param(80, marks=pytest.mark.slow), 90])
@pytest.mark.parametrize("kind", FAULTS)
def test_a_planted_fault_is_found(kind, architecture):
    pattern, new = FAULTS[kind]
    planted, found, survivors = 0, 0, []
    for subject in SUBJECTS:
        good = healthy(subject, architecture)
        for ptx, kernel in good.kernels.items():
            for match in _sites(pattern, ptx, kernel, good.silent):
                line = new if isinstance(new, str) else new(match)
                changed = ptx[: match.start()] + line + ptx[match.end() :]
                planted += 1
                if _is_found(subject, architecture, ptx, changed):
                    found += 1
                elif (kind, kernel) not in SURVIVORS:
                    at = ptx[: match.start()].count("\n") + 1
                    survivors.append(f"{subject}: {kernel}, line {at}: {match[0].strip()}")
    assert survivors == []
    assert found >= planted / 3


def test_a_kernel_without_a_fault_is_not_found():
    subject = "tail, float32, contiguous"
    ptx = next(iter(healthy(subject, 90).kernels))
    assert not _is_found(subject, 90, ptx, ptx + "\n")


def test_the_faults_are_in_the_code_that_runs():
    """What `_sites` compares lines with is what the interpreter keeps of them."""
    ptx = next(iter(healthy("product, bfloat16", 90).kernels))
    lines = {" ".join(line.split("//")[0].split()).rstrip(";") for line in ptx.split("\n")}
    assert sum(text in lines for text in decode(ptx).text) > 0.8 * len(decode(ptx).text)
