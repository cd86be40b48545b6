"""Launch choices: which tile a pass gets, how many programs share it. Data and arithmetic, no Triton.

The numbers come from what a multiprocessor needs in flight (bandwidth x latency: 4.8 TB/s x 0.7 us / 132 = 25 KiB on
an H200) and from the registers that the compiler takes. With them an H200 reaches 57 to 96 percent of its copy
bandwidth on tensors of 100 MB and more (benchmarks/results/2026-11-26-h200/kernels.md); no others were timed.
"""

import functools
from dataclasses import dataclass

from torch import Tensor

from .chip import Chip
from .layout import PLANE_ROWS, VECTOR, RowMap

ROWS_A_PROGRAM = 256  # at least, so that partial sums stay below 3 percent of what a pass reads
FEWEST_SLOTS = 8  # of a block of columns: so planes of 5x5 and of 14x14 share a kernel
MAX_PARTIALS = 512  # the finalising step holds all partials of 8 channels in registers
BITS = 8  # mask bits in a byte
# A CUDA grid takes 2^31 - 1 programs along its first axis and this many along the others. So what grows with the number
# of channels stands on the first, and the programs that share a channel block, which the chip bounds, on the second.
MOST_PROGRAMS = 65535
# The passes of a dual tail hold a third tensor, and its sums: with a whole tile they spill on sm_90. So do, on sm_100,
# those that compute the input of an activation again beside a third tensor, a residual or a second gradient.
DUAL_SHARE = 2


@dataclass(frozen=True)
class Pass:
    """What a kind of pass wants: bytes of a tensor in a tile, warps, programs a multiprocessor, tiles in flight.

    The accumulators of a reducing pass leave room for three or four programs, one round of which takes all tiles; its
    loop has the loads of the next two under way (cp.async) while it works on one.
    """

    tile_bytes: int
    warps: int
    programs: int
    stages: int


STATISTICS = Pass(16384, 4, 4, 3)
REDUCING = Pass(8192, 4, 4, 3)
# One that computes more an element (the positions of a strided gradient, a smooth activation beside a residual): with
# four warps it spills.
CROWDED = Pass(8192, 8, 2, 2)
APPLYING = Pass(8192, 8, 16, 1)
VECTOR_BYTES = 16
MOST_GROUP = 8  # rows of a column that a thread adds up before it merges them


@dataclass(frozen=True)
class Tile:
    """BLOCK_OUTER x BLOCK_INNER rows of BLOCK_CHANNELS columns; `programs` share the `tiles` of a block of columns.

    whole: tiles that have all their rows; even: all blocks have all their columns. group: rows of a column that a
    thread of a reducing pass holds. slots: channels that the columns of a block may belong to, in a flat walk; else 0.
    width: partial sums of a kind that a row program leaves, in all blocks.
    """

    block_outer: int
    block_inner: int
    block_channels: int
    warps: int
    stages: int
    tiles_inner: int
    tiles: int
    programs: int
    channel_blocks: int
    whole: int
    even: bool
    group: int
    slots: int
    width: int

    @functools.cached_property
    def options(self) -> dict[str, int]:
        """The tile as keyword arguments of a launch. Contraction into fused multiply-adds is asked for by name, since
        Triton's default for it changes from 3.9 to 3.10."""
        return {
            "BLOCK_OUTER": self.block_outer,
            "BLOCK_INNER": self.block_inner,
            "BLOCK_CHANNELS": self.block_channels,
            "STAGES": self.stages,
            "num_warps": self.warps,
            "enable_fp_fusion": True,
        }

    @functools.cached_property
    def grid(self) -> tuple[int, int]:
        return self.channel_blocks, self.programs


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def is_aligned(tensor: Tensor | None) -> bool:
    """Whether its values can be read as vectors; where there is none, nothing stands in the way."""
    return tensor is None or tensor.data_ptr() % VECTOR_BYTES == 0


def _rows_a_thread(
    rows: RowMap, block_rows: int, block_channels: int, size: int, warps: int
) -> int:
    """How many rows of a column Triton's layout surely gives a thread: a sum of more needs shuffles, or shared
    memory.
    """
    vector = VECTOR_BYTES // size
    threads = 32 * warps
    if rows.channels_fastest:
        lanes = max(1, block_channels // vector)  # along the columns
        return max(1, min(MOST_GROUP, block_rows // max(1, threads // lanes)))
    steps = (
        rows.inner if rows.outer > 1 else 0,
        *(s for walk in rows.strides for s in (walk[0], walk[2])),
    )
    if any(step % VECTOR for step in steps) or any(walk[1] != 1 for walk in rows.strides):
        return 1  # Triton sees no vector there
    return max(1, min(vector, block_rows * block_channels // threads))


def touched(length: int, unit: int) -> int:
    """The most units of so many columns that a run of `length` columns may touch."""
    return (length + unit - 2) // unit + 1


def partials_a_channel(spread: int, block_channels: int) -> int:
    """Blocks of columns that leave something for a channel."""
    return touched(spread, block_channels)


def _block_inner(inner: int, outer: int, most: int) -> int:
    """The longest power of two that pads the inner rows by at most an eighth, else the one that pads them least."""
    if outer == 1:  # only the last tile is padded
        return max(BITS, min(_power_of_two(inner), most))
    candidates = [1 << k for k in range(3, 20) if (1 << k) <= max(most, BITS)]
    candidates = [b for b in candidates if b < 2 * max(inner, BITS)]
    good = [b for b in candidates if _ceil(inner, b) * b <= inner * 9 // 8]
    return max(good) if good else min(candidates, key=lambda b: (_ceil(inner, b) * b, -b))


@functools.lru_cache(maxsize=4096)
def choose_tile(rows: RowMap, element_size: int, kind: Pass, chip: Chip, share: int = 1) -> Tile:
    """The tile of a pass over `rows`; `share` is 2 for half a tile."""
    elements = kind.tile_bytes // share // element_size
    channels = _power_of_two(rows.columns)
    if rows.channels_fastest:
        # Whole 128-byte lines; two of them in a flat walk, whose rows are images: so 32 of them fill a tile.
        lines = 2 if rows.spread > 1 else 1
        block_channels = min(channels, lines * 128 // min(element_size, 4))
        block_inner = _block_inner(rows.inner, rows.outer, elements // block_channels)
        block_outer = min(_power_of_two(rows.outer), elements // (block_channels * block_inner))
    else:
        block_channels = min(channels, 16)
        # The same for all planes, but where there are too few of them to fill a tile.
        most = elements // (block_channels * _power_of_two(rows.outer))
        block_inner = _block_inner(rows.inner, rows.outer, max(PLANE_ROWS, most))
        block_outer = min(_power_of_two(rows.outer), elements // (block_channels * block_inner))
    block_outer = max(block_outer, 1)
    tiles_inner = _ceil(rows.inner, block_inner)
    tiles = tiles_inner * _ceil(rows.outer, block_outer)
    channel_blocks = _ceil(rows.columns, block_channels)
    wanted = max(1, kind.programs * chip.multiprocessors // channel_blocks)
    if kind is not APPLYING:
        most = min(
            rows.outer * rows.inner // ROWS_A_PROGRAM,
            MAX_PARTIALS // partials_a_channel(rows.spread, block_channels),
        )
        wanted = min(wanted, max(1, most))
    programs = max(1, min(tiles, wanted, MOST_PROGRAMS))
    programs = _ceil(tiles, _ceil(tiles, programs))  # the same number of tiles for nearly all
    slots = 0
    if rows.spread > 1:
        slots = max(FEWEST_SLOTS, _power_of_two(touched(block_channels, rows.spread)))
    tile_size = block_outer * block_inner * block_channels
    warps = kind.warps if tile_size * element_size >= kind.tile_bytes else 4
    return Tile(
        block_outer, block_inner, block_channels, warps, kind.stages,
        tiles_inner, tiles, programs, channel_blocks,
        whole=(rows.inner // block_inner) * (rows.outer // block_outer),
        even=rows.columns % block_channels == 0,
        group=_rows_a_thread(rows, block_outer * block_inner, block_channels, element_size, warps),
        slots=slots,
        width=channel_blocks * slots if slots else rows.columns,
    )  # fmt: skip


@dataclass(frozen=True)
class GemmTile:
    """BLOCK_ROWS rows by BLOCK_OUT output and BLOCK_IN input channels; `programs` share the `tiles` of rows."""

    block_rows: int
    block_out: int
    block_in: int
    warps: int
    stages: int
    tiles: int
    programs: int
    blocks_out: int

    @functools.cached_property
    def options(self) -> dict[str, int]:
        """As `Tile.options`."""
        return {
            "BLOCK_ROWS": self.block_rows,
            "BLOCK_OUT": self.block_out,
            "BLOCK_IN": self.block_in,
            "STAGES": self.stages,
            "num_warps": self.warps,
            "enable_fp_fusion": True,
        }


# (rows, output channels, input channels, warps, stages) of the products, by element size. Twice as many accumulators
# spill on sm_100 once the moments are taken, and leave room for one program a multiprocessor on sm_90.
GEMM = {2: (128, 64, 64, 8, 3), 4: (64, 32, 32, 4, 3), 8: (32, 16, 16, 4, 1)}
# Before sm_90, where float32 spills with three stages (Triton 3.6) and with more rows (3.9).
GEMM_BEFORE_90 = {**GEMM, 4: (32, 32, 32, 4, 2)}
# The same for the gradient of the weight, whose accumulators are output by input channels; 64 output channels are the
# fewest that sm_90's wide instruction takes.
GRAD_WEIGHT = {2: (64, 64, 128, 4, 2), 4: (32, 64, 64, 4, 3), 8: (16, 16, 32, 4, 1)}
# Where sixteen does not divide the channels, values are loaded one by one and every address takes registers of its own.
GEMM_NARROW = {2: (32, 32, 32, 4, 1), 4: (32, 32, 16, 4, 1), 8: (32, 16, 16, 4, 1)}
GRAD_WEIGHT_NARROW = {2: (32, 64, 64, 4, 1), 4: (32, 32, 32, 4, 1), 8: (16, 16, 32, 4, 1)}
GEMM_SMALLEST = 16  # of a tensor core's operands, and what addresses are known to be divided by


def _fit(block: int, size: int) -> int:
    return max(GEMM_SMALLEST, min(block, _power_of_two(size)))


def _is_aligned(*channels: int) -> bool:
    return all(size % GEMM_SMALLEST == 0 for size in channels)


@functools.lru_cache(maxsize=4096)
def choose_product(
    rows: int, channels_in: int, channels_out: int, element_size: int, chip: Chip
) -> GemmTile:
    """The tile of y [rows, Cout] = x [rows, Cin] @ weight; a program keeps its output channels and walks the rows."""
    table = GEMM if chip.architecture >= 90 else GEMM_BEFORE_90
    if not _is_aligned(channels_in, channels_out):
        table = GEMM_NARROW
    block_rows, block_out, block_in, warps, stages = table[element_size]
    block_out, block_in = _fit(block_out, channels_out), _fit(block_in, channels_in)
    block_rows = _fit(block_rows, rows)
    return _gemm_tile(rows, channels_out, block_rows, block_out, block_in, warps, stages, chip, 1)


@functools.lru_cache(maxsize=4096)
def choose_grad_weight(
    rows: int, channels_in: int, channels_out: int, element_size: int, chip: Chip
) -> GemmTile:
    """The tile of dweight [Cout, Cin] = dy^T @ x; the rows are split until every multiprocessor has a program."""
    table = GRAD_WEIGHT if _is_aligned(channels_in, channels_out) else GRAD_WEIGHT_NARROW
    block_rows, block_out, block_in, warps, stages = table[element_size]
    block_out, block_in = _fit(block_out, channels_out), _fit(block_in, channels_in)
    block_rows = _fit(block_rows, rows)
    blocks_in = _ceil(channels_in, block_in)
    return _gemm_tile(rows, channels_out, block_rows, block_out, block_in, warps, stages, chip, blocks_in)  # fmt: skip


def _gemm_tile(rows, channels_out, block_rows, block_out, block_in, warps, stages, chip, columns):
    tiles, blocks_out = _ceil(rows, block_rows), _ceil(channels_out, block_out)
    if block_rows * block_out < 128 * 64 and warps == 8:
        warps = 4
    wanted = min(_ceil(2 * chip.multiprocessors, blocks_out * columns), MAX_PARTIALS, tiles)
    programs = _ceil(tiles, _ceil(tiles, max(1, wanted)))
    return GemmTile(block_rows, block_out, block_in, warps, stages, tiles, programs, blocks_out)
