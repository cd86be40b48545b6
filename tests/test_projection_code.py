"""What the products of a projection are made of: one loop over tiles and channels, no divisions; and their index maps.

The machine code is read at a ResNet-50's shapes, batch 256 (docs/testing.md, "Machine code read").
"""

from __future__ import annotations

import functools
import random
import re
import subprocess
import tempfile
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

import fusedres
from fusedres.benchmarks.compile_only import TENSOR_CORE, Launch, compile_only, tool
from fusedres.kernels.projection import dimensions, divisors
from fusedres.ops.projection import project

from .helpers import DTYPES, lay_out

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.M)
# A division of integers goes by way of a float reciprocal.
DIVISION = ("I2F", "F2I", "MUFU.RCP")


@functools.cache
def launches(
    shape, channels_out, stride, architecture, moments=True, dtype=torch.bfloat16
) -> list[Launch]:
    """Forward, gradient of the input, gradient of the weight."""
    input = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last).requires_grad_()
    weight = torch.empty(channels_out, shape[1], 1, 1, dtype=dtype).requires_grad_()
    with (
        fusedres.backend("triton"),
        pytest.MonkeyPatch.context() as patch,
        compile_only(architecture) as recorded,
    ):
        patch.setattr(fusedres.ops.projection, "why_library", lambda *_: None)
        output, _ = project(input, weight, None, (stride, stride), moments)
        torch.autograd.grad(output, (input, weight), torch.empty_like(output))
        return list(recorded)


def loops(launch: Launch) -> list[Counter[str]]:
    """The instructions of each loop, from where a branch leads back to it.

    Two that overlap are one, whose conditional part stands behind it; a loop inside another is a loop of its own.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(launch.cubin)
        file.flush()
        text = subprocess.run(
            [tool("cuobjdump"), "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout
    code = [(int(address, 16), name, rest) for address, name, rest in INSTRUCTION.findall(text)]
    ranges: list[list[int]] = []
    for address, name, rest in code:
        target = re.search(r"0x([0-9a-f]+)\s*$", rest) if name.startswith("BRA") else None
        start = int(target[1], 16) if target is not None else address
        if start >= address:
            continue
        crossed = [r for r in ranges if r[0] < start <= r[1] < address]
        if crossed:
            crossed[0][1] = address
        else:
            ranges.append([start, address])
    return [Counter(n for at, n, _ in code if start <= at <= end) for start, end in ranges]


def count(loop: Counter[str], *prefixes: str) -> int:
    return sum(n for name, n in loop.items() if name.startswith(prefixes))


# One block of input channels, and several.
@pytest.mark.compiler
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(
    ("shape", "channels_out", "stride"), [((256, 64, 56, 56), 256, 1), ((256, 512, 28, 28), 256, 2)],
    ids=["64 channels", "512 channels"],
)  # fmt: skip
def test_one_loop_loads_multiplies_and_stores(shape, channels_out, stride, architecture):
    """So that the loads of the next tile are under way while one is finished: no loop multiplies and does not store."""
    found = loops(launches(shape, channels_out, stride, architecture)[0])
    multiplying = [loop for loop in found if count(loop, *TENSOR_CORE)]
    assert multiplying
    for loop in multiplying:
        assert min(count(loop, "LDGSTS"), count(loop, "STG")) > 0, loop
        # The sums of the moments stay in their threads until all tiles are done.
        assert count(loop, "SHFL.BFLY") == 0, loop


@pytest.mark.compiler
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "tf32"])
def test_the_weight_is_loaded_once_where_it_fits(dtype, architecture):
    """The loop copies x, 16 bytes a thread and copy, and nothing else."""
    forward = launches((256, 64, 56, 56), 256, 1, architecture, dtype=dtype)[0]
    rows = {(80, 2): 64, (90, 2): 64, (80, 4): 32, (90, 4): 64}[architecture, dtype.itemsize]
    vectors = rows * 64 * dtype.itemsize // 16 // (32 * forward.warps)
    (loop,) = [loop for loop in loops(forward) if count(loop, *TENSOR_CORE)]
    assert count(loop, "LDGSTS") == vectors


@pytest.mark.compiler
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["forward", "grad_input", "grad_weight"])
def test_no_loop_divides(which, architecture):
    """Rows that follow each other need no index map; others are found by multiplications with high words."""
    follow, strided = (
        [
            loop
            for loop in loops(launches((256, 64, 56, 56), 256, stride, architecture, False)[which])
            if count(loop, *TENSOR_CORE)
        ]
        for stride in (1, 2)
    )
    assert min(len(follow), len(strided)) > 0
    for loop in follow:
        assert count(loop, *DIVISION, "IMAD.HI") == 0, loop
    assert all(count(loop, "IMAD.HI") > 0 for loop in strided)
    assert all(count(loop, *DIVISION) == 0 for loop in strided)


@pytest.mark.once
def test_divisors_divide():
    generator = random.Random(0)
    most = 2**31 - 1
    sizes = [2, 3, 5, 7, 28, 49, 56, 112, 641, 65537, 2**16, 2**30, 2**30 + 1, most]
    for size in sizes + [generator.randrange(2, most) for _ in range(200)]:
        ((given, magic, shift),) = divisors((size,))
        assert (given, -(2**31) <= magic < 2**31, 0 <= shift < 32) == (size, True, True)
        edges = [k * size + d for k in (0, 1, 2, most // size) for d in (-1, 0, 1)]
        for n in edges + [most] + [generator.randrange(most + 1) for _ in range(50)]:
            if 0 <= n <= most:
                assert (n * (magic % 2**32) >> 32) >> shift == n // size, (n, size)


@pytest.mark.once
@pytest.mark.parametrize(
    ("sizes", "strides", "expected"),
    [
        ((1, 1, 1, 100), (0, 0, 0, 64, 1), 1),
        ((1, 4, 5, 6), (0, 30 * 8, 6 * 8, 8, 1), 1),
        ((1, 4, 5, 6), (0, 130 * 8, 24 * 8, 16, 1), 3),
        ((1, 1, 5, 6), (0, 0, 24 * 8, 16, 1), 2),
        ((3, 4, 5, 6), (999, 240, 48, 8, 1), 4),
        ((1, 1, 1, 1), (0, 0, 0, 0, 1), 1),
    ],
)
def test_dimensions_of_rows(sizes, strides, expected):
    assert dimensions(sizes, strides) == expected


@pytest.mark.kernels
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("channels", [(1, 1), (1, 65), (17, 3), (65, 17), (256, 64)], ids=str)
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 5, 9)], ids=["one row", "odd"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_hard_sizes(dtype, size, channels, stride, device):
    """Forward with moments: the output against the exact product, the moments against the output."""
    generator = torch.Generator().manual_seed(5)
    # Small whole numbers: sums are exact in float32.
    input = torch.randint(-3, 4, (size[0], channels[0], *size[1:]), generator=generator)
    weight = torch.randint(-3, 4, (channels[1], channels[0], 1, 1), generator=generator)
    exact = F.conv2d(input.double(), weight.double(), stride=stride)
    x = lay_out(input.to(DTYPES[dtype]), "channels_last").to(device)
    output, moments = project(x, weight.to(DTYPES[dtype]).to(device), None, (stride, stride), True)
    torch.testing.assert_close(output.cpu(), exact.to(DTYPES[dtype]), rtol=0, atol=0)
    if moments is None:
        assert channels[0] == 1  # a contiguous tensor: PyTorch's
        return
    count, mean, m2 = moments.double().cpu().unbind(1)
    wide = output.double().cpu()
    rows = wide[:, 0].numel()
    assert bool((count.sum(0) == rows).all())
    center = (count * mean).sum(0) / rows
    square = (m2 + count * (mean - center).square()).sum(0)
    torch.testing.assert_close(center, wide.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
    expected = (wide - wide.mean((0, 2, 3), keepdim=True)).square().sum((0, 2, 3))
    torch.testing.assert_close(square, expected, rtol=1e-5, atol=1e-4 * rows)
