"""Launch choices: which tile a pass gets, how many programs share it. Data and arithmetic, no Triton.

The numbers come from what a multiprocessor needs in flight (bandwidth x latency: 4.8 TB/s x 0.7 us / 132 = 25 KiB on
an H200) and from the registers that the compiler takes (tests/test_budgets.py). An H200 reached 57 to 96 percent of
its copy bandwidth on tensors of 100 MB and more (benchmarks/results/2026-11-26-h200/kernels.md), with 16 applying
programs a multiprocessor, tiles of 1024 rows of a plane and of 64 columns of a flat walk; these have not been timed.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from .chip import Chip
from .layout import PLANE_ROWS, VECTOR, RowMap, bits_layout

ROWS_A_PROGRAM = 256  # at least, so that partial sums stay below 3 percent of what a pass reads
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

    The programs are those that registers let be resident, one round of which takes all tiles, each with its per-channel
    values loaded once. With `half` a tile and four warps there are others (the passes of a dual tail). The loop of a
    reducing pass has the loads of the next two tiles under way (cp.async) while it works on one; an applying pass has
    those of one, so that its tiles are to be large enough: 40 KiB and more a multiprocessor.
    """

    tile_bytes: int
    warps: int
    programs: int
    stages: int
    half: int


STATISTICS = Pass(16384, 4, 4, 3, half=4)
REDUCING = Pass(8192, 4, 4, 3, half=4)
# One that computes more an element (the positions of a strided gradient, a smooth activation beside a residual): with
# four warps it spills.
CROWDED = Pass(8192, 8, 2, 2, half=4)
ALONE = Pass(16384, 8, 4, 1, half=6)  # reads one tensor
APPLYING = Pass(8192, 8, 4, 1, half=5)  # reads two
GRAD_APPLYING = Pass(8192, 8, 3, 1, half=4)
VECTOR_BYTES = 16
REGISTERS = 65536  # of a multiprocessor
# Of a tensor of planes: a few images take the tiles of many, which they do not fill, if as many images as do fill them
# would have no more bytes than this. That is some microseconds, and no kernels of their own.
FEW_BYTES = 64 << 20
FLAT_COLUMNS = 256  # of a tile of a flat walk
FLAT_ROWS_A_PROGRAM = 32  # there, where a program leaves a few sums for 256 columns
MOST_GROUP = 8  # rows of a column that a thread adds up before it merges them


class Block(NamedTuple):
    """What a kernel is compiled for: a tile of outer x inner rows of `channels` columns, and how it is walked.

    stages: tiles under way in the loop; second: in the loop behind it, over the same tiles. wide: offsets are int64.
    one_outer: there is one outer row; flat: a channel has several columns. row_vectors: rows are read together. Others
    are told to who asks for them: whole_bytes: no byte of the mask is a part of one; alike: all tensors have the same
    strides; parts: what the columns of a flat walk are added up in; see `Tile` and `layout`. No dtypes are among them:
    Triton writes a kernel's constants as JSON.
    """

    outer: int
    inner: int
    channels: int
    stages: int
    second: int
    wide: bool
    one_outer: bool
    flat: bool
    row_vectors: bool = False
    even: bool = False
    group: int = 1
    run: int = 1
    alike: bool = False
    packs_channels: bool = False
    whole_bytes: bool = False
    parts: int = 0


@dataclass(frozen=True)
class Tile:
    """block_outer x block_inner rows of block_channels columns; `programs` share the `tiles` of a block of columns.

    whole: tiles that have all their rows; even: all blocks have all their columns. group: rows of a column that a
    thread of a reducing pass holds, in runs of `run`. slots: channels that the columns of a block may belong to, in a
    flat walk; else 0. width: partial sums of a kind that a row program leaves, in all blocks. registers: the most of a
    thread, where the compiler is told; else 0.
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
    run: int
    slots: int
    width: int
    registers: int = 0

    @functools.cached_property
    def options(self) -> dict[str, int]:
        """Triton's options of a launch. Contraction into fused multiply-adds is asked for by name, since Triton's
        default for it changes from 3.9 to 3.10."""
        told = {"maxnreg": self.registers} if self.registers else {}
        return told | {"num_warps": self.warps, "enable_fp_fusion": True}

    def block(self, rows: RowMap) -> Block:
        """What every pass over such rows is compiled for."""
        return Block(
            self.block_outer,
            self.block_inner,
            self.block_channels,
            self.stages,
            self.stages,
            wide=rows.needs_int64,
            one_outer=rows.outer == 1,
            flat=rows.spread > 1,
            row_vectors=rows.row_vectors,
        )

    @functools.cached_property
    def grid(self) -> tuple[int, int]:
        return self.channel_blocks, self.programs

    def groups(self, are_vectors: bool) -> dict[str, Any]:
        """The rows that a thread holds, for a `Block`; none where its values are loaded one by one."""
        return {"group": self.group, "run": self.run} if are_vectors else {"group": 1, "run": 1}


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def is_aligned(tensor: Tensor | None) -> bool:
    """Whether its values can be read as vectors; where there is none, nothing stands in the way."""
    return tensor is None or tensor.data_ptr() % VECTOR_BYTES == 0


def _rows_a_thread(
    rows: RowMap, block_rows: int, block_channels: int, size: int, threads: int
) -> tuple[int, int]:
    """(rows, of which follow each other) of a column that Triton's layout surely gives a thread: a sum of more needs
    shuffles, or shared memory.
    """
    vector = VECTOR_BYTES // size
    if rows.channels_fastest:
        lanes = max(1, block_channels // vector)  # along the columns
        return max(1, min(MOST_GROUP, block_rows // max(1, threads // lanes))), 1
    steps = (
        rows.inner if rows.outer > 1 else 0,
        *(s for walk in rows.strides for s in (walk[0], walk[2])),
    )
    if any(step % VECTOR for step in steps) or any(walk[1] != 1 for walk in rows.strides):
        return 1, 1  # Triton sees no vector there
    run = max(1, min(vector, block_rows * block_channels // threads))
    return max(run, min(MOST_GROUP, run * (block_rows // (run * threads)))), run


def touched(length: int, unit: int) -> int:
    """The most units of so many columns that a run of `length` columns may touch."""
    return (length + unit - 2) // unit + 1


def partials_a_channel(spread: int, block_channels: int) -> int:
    """Blocks of columns that leave something for a channel."""
    return touched(spread, block_channels)


def _block_inner(inner: int, outer: int, most: int) -> int:
    """The longest power of two that pads the inner rows by at most an eighth, else the one that pads them least."""
    if outer == 1:  # only the last tile is padded
        return max(min(BITS, most), min(_power_of_two(inner), most))
    candidates = [1 << k for k in range(3, 20) if (1 << k) <= max(most, BITS)]
    candidates = [b for b in candidates if b < 2 * max(inner, BITS)]
    good = [b for b in candidates if _ceil(inner, b) * b <= inner * 9 // 8]
    return max(good) if good else min(candidates, key=lambda b: (_ceil(inner, b) * b, -b))


@functools.lru_cache(maxsize=4096)
def choose_tile(rows: RowMap, element_size: int, kind: Pass, chip: Chip, share: int = 1) -> Tile:
    """The tile of a pass over `rows`; `share` is 2 for half a tile."""
    elements = kind.tile_bytes // share // element_size
    programs_at_once = (kind.programs if share == 1 else kind.half) * chip.multiprocessors
    channels = _power_of_two(rows.columns)
    if rows.channels_fastest:
        # Whole 128-byte lines; more in a flat walk, whose rows are images: so few of them fill a tile, and one round of
        # programs, or little more, has all columns.
        block_channels = min(
            channels, FLAT_COLUMNS if rows.spread > 1 else 128 // min(element_size, 4)
        )
        block_inner = _block_inner(rows.inner, rows.outer, elements // block_channels)
        # However few there are: one tile has all that they have of a block.
        block_outer = elements // (block_channels * block_inner) if rows.outer > 1 else 1
    else:
        # Of a float32 tensor so few that a thread's rows are of one channel.
        wide = 16 if element_size == 2 else 4
        block_channels = min(channels, wide)
        # The same for all planes, but where there are too few of them to fill a tile, and these are large.
        planes = _power_of_two(rows.outer)
        filled = max(planes, elements // (wide * PLANE_ROWS))
        if rows.outer > 1 and filled * rows.inner * rows.channels * element_size <= FEW_BYTES:
            planes = filled
        most = elements // (block_channels * planes)
        block_inner = _block_inner(rows.inner, rows.outer, max(PLANE_ROWS, most))
        block_outer = min(planes, elements // (block_channels * block_inner))
    block_outer = max(block_outer, 1)
    tiles_inner = _ceil(rows.inner, block_inner)
    tiles = tiles_inner * _ceil(rows.outer, block_outer)
    channel_blocks = _ceil(rows.columns, block_channels)
    wanted = max(1, programs_at_once // channel_blocks)
    if kind.stages > 1:  # a reducing one
        most = min(
            rows.outer * rows.inner // (FLAT_ROWS_A_PROGRAM if rows.spread > 1 else ROWS_A_PROGRAM),
            MAX_PARTIALS // partials_a_channel(rows.spread, block_channels),
        )
        wanted = min(wanted, max(1, most))
    programs = max(1, min(tiles, wanted, MOST_PROGRAMS))
    programs = _ceil(tiles, _ceil(tiles, programs))  # the same number of tiles for nearly all
    slots = touched(block_channels, rows.spread) if rows.spread > 1 else 0
    tile_size = block_outer * block_inner * block_channels
    warps = kind.warps if tile_size * element_size >= kind.tile_bytes else 4
    group, run = _rows_a_thread(
        rows, block_outer * block_inner, block_channels, element_size, chip.warp_size * warps
    )
    return Tile(
        block_outer, block_inner, block_channels, warps, kind.stages,
        tiles_inner, tiles, programs, channel_blocks,
        whole=(rows.inner // block_inner) * (rows.outer // block_outer),
        even=rows.columns % block_channels == 0,
        group=group,
        run=run,
        slots=slots,
        width=channel_blocks * slots if slots else rows.columns,
        registers=_registers(rows, kind, chip, warps, programs_at_once // chip.multiprocessors),
    )  # fmt: skip


def _registers(rows: RowMap, kind: Pass, chip: Chip, warps: int, programs: int) -> int:
    """As many as let the programs be resident; 0 where the compiler finds a good number itself.

    On sm_100 it aims at 40 for the gradients of planes, with room for 80, and spills two of a second gradient's.
    """
    if kind is not GRAD_APPLYING or rows.channels_fastest or chip.architecture < 100:
        return 0
    return REGISTERS // (chip.warp_size * warps * programs) // 8 * 8


# --- one launch for a whole direction -------------------------------------------------------------------------------

# Where a program may have all rows of its channels: at most so many bytes of a tensor, if at least this share of the
# multiprocessors has a program. A launch takes 2 to 3 us of its own, so three in place of one take 5 us more. A program
# that is alone on a multiprocessor gets 50 KB/us (40 KiB in flight, 0.7 us), while a launch over a whole H200 gets 36
# KB/us for each (4.8 TB/s / 132). The backward of BN+ReLU walks five tensors: of D bytes each and with a share f of the
# multiprocessors busy that is 5 D / 50 us in one launch and 5 D f / 36 us in three, 6.6 - 1.8 us at 64 KiB and 1/5
# (2,048 rows of a sector), and 1.6 us at most at 16 KiB. A model: not timed yet.
SMALL = ((64 << 10, 0.2), (16 << 10, 0.0))
# Of a tensor: the second walk finds it and its gradient in the last-level cache (50 MB), and beyond it launches are a
# small part of the time.
SMALL_IN_ALL = 16 << 20
# What takes the form, by the tensors: all of one walk and no mask apart from it. A ResNet's tails and forks do; the
# gradient of its average pooling (one value for all positions), a strided second gradient (a projected shortcut's), one
# without a mask, and slices take the three passes, whose kernels there are: each would be a kernel of its own.
SECTOR = 32  # bytes that the memory moves at a time: a program's channels are whole ones
# Columns of a flat walk that a program has room for, by element size: 2 KiB, and the 49, 196, 784, 3136 and 12544
# values of a ResNet's planes all come to 784 columns, or 392: one kernel for them.
MOST_KEPT = {2: 1024, 4: 512, 8: 512}
FORWARD = Pass(16384, 8, 1, 3, half=1)
BACKWARD = Pass(8192, 8, 1, 3, half=1)
# Of a thread in the backward; 8 warps of them fill a multiprocessor. ptxas aims at two programs' 128 without a word,
# and spills. AMD's compiler is not told.
MOST_REGISTERS = 248

# Whether the last program of the statistics takes the final step too (`merging`), where its partials are few and of one
# column a channel. Off until benchmarks/ordering.py has passed on a GPU: no other place can show that its order holds.
LAST_MERGES = False
FEW_PARTIALS = 128


def last_merges(x: Tensor, rows: RowMap, chip: Chip) -> bool:
    """Whether the statistics of x, walked so, take one launch."""
    if not LAST_MERGES or rows.spread > 1:
        return False
    return choose_tile(rows, x.element_size(), STATISTICS, chip).programs <= FEW_PARTIALS


PASSES = ("by size", "one", "three")
_passes = "by size"


on_change: set[Callable[[], None]] = set()  # to be told that tiles are chosen otherwise


@contextmanager
def passes(how: str) -> Iterator[None]:
    """Within it, all directions are "one" launch (where there is a tile for it), or "three": for tests and timings."""
    if how not in PASSES:
        raise ValueError(f"passes: {how!r}, expected one of {', '.join(map(repr, PASSES))}")
    before = _passes
    _choose(how)
    try:
        yield
    finally:
        _choose(before)


def _choose(how: str) -> None:
    global _passes
    if how != _passes:
        _passes = how
        for told in on_change:
            told()


@dataclass(frozen=True)
class Whole:
    """A direction in one launch: its tile, and how a program walks the rows of its channels.

    walk: rows of all channels; or a flat walk, whose outer rows are images, of pieces (inner) of so many columns as a
    program has. bits: bytes from one outer row, inner row and eight columns of the mask to the next.
    """

    tile: Tile
    walk: RowMap
    bits: tuple[int, int, int]
    packs_channels: bool
    values: int
    parts: int

    @property
    def is_flat(self) -> bool:
        return self.tile.slots > 0

    @property
    def has_whole_bytes(self) -> bool:
        along = self.walk.channels if self.packs_channels else self.walk.inner
        return self.is_flat or along % BITS == 0

    @property
    def row_stride(self) -> int | None:
        """From one outer row to the next, in a flat walk."""
        return self.walk.strides[0][0] if self.is_flat else None

    def integers(self) -> tuple:
        """What both kernels are told of the walk, in their order."""
        walk, tile = self.walk, self.tile
        return (
            *self.bits,
            walk.outer,
            walk.inner,
            walk.channels,
            walk.spread,
            tile.slots,
            tile.width,
        )

    @functools.cached_property
    def block(self) -> Block:
        """What both kernels are compiled for. The loop that applies finds its tiles in a cache."""
        return self.tile.block(self.walk)._replace(
            second=1,
            row_vectors=False,
            even=self.tile.even,
            packs_channels=self.packs_channels,
            parts=self.parts,
            **self.tile.groups(True),
        )


def choose_whole(rows: RowMap, element_size: int, kind: Pass, chip: Chip) -> Whole | None:
    """A direction in one launch, in which a program has all rows of its channels; None: three launches."""
    if _passes == "three" or len(set(rows.strides)) > 1:
        return None
    whole = _whole(rows, element_size, kind, chip)
    if whole is None or _passes == "one":
        return whole
    return whole if _is_small(rows, element_size, whole.tile, chip) else None


@functools.lru_cache(maxsize=4096)
def _is_small(rows: RowMap, element_size: int, tile: Tile, chip: Chip) -> bool:
    in_all = rows.values * rows.channels * element_size
    share = tile.channel_blocks / chip.multiprocessors
    return in_all <= SMALL_IN_ALL and any(
        in_all <= most * tile.channel_blocks and share >= least for most, least in SMALL
    )


@functools.lru_cache(maxsize=4096)
def _whole(rows: RowMap, element_size: int, kind: Pass, chip: Chip) -> Whole | None:
    elements = kind.tile_bytes // element_size
    least = max(SECTOR // element_size, BITS)  # columns, and whole bytes of the mask
    packs_channels, _, stride = bits_layout(rows)
    if rows.spread == 1 and rows.channels_fastest:
        if rows.outer > 1:
            return None
        walk, slots, parts = rows, 0, 0
        block_channels = width = min(_power_of_two(rows.channels), least)
        block_outer, block_inner = 1, elements // block_channels
        channel_blocks = _ceil(rows.channels, block_channels)
        bits = (0, stride[1], stride[2] if len(stride) == 4 else BITS)
    else:
        found = _flat_walk(rows, element_size, least)
        if found is None:
            return None
        (walk, slots), parts = found, least
        width, channel_blocks = walk.strides[0][1], rows.channels // slots
        if rows.spread > 1:
            bits = (stride[1], 0, stride[2] if len(stride) == 4 else BITS)
        else:  # bytes of a plane follow each other, as its values do
            bits = (walk.strides[0][0] // BITS, width // BITS, BITS)
        packs_channels = True
        block_channels = _power_of_two(width)
        block_outer = min(elements // block_channels, _power_of_two(walk.outer))
        block_inner = elements // block_channels // block_outer
    tiles_inner = _ceil(walk.inner, block_inner)
    group, run = _rows_a_thread(
        walk, block_outer * block_inner, block_channels, element_size, chip.warp_size * kind.warps
    )
    tile = Tile(
        block_outer, block_inner, block_channels, kind.warps, kind.stages,
        tiles_inner, tiles_inner * _ceil(walk.outer, block_outer), 1, channel_blocks,
        whole=(walk.inner // block_inner) * (walk.outer // block_outer),
        even=not slots and rows.channels % block_channels == 0,
        group=group,
        run=run,
        slots=slots,
        width=width,
        registers=MOST_REGISTERS if kind is BACKWARD and chip.backend == "cuda" else 0,
    )  # fmt: skip
    return Whole(tile, walk, bits, packs_channels, rows.values, parts)


def _flat_walk(rows: RowMap, element_size: int, least: int) -> tuple[RowMap, int] | None:
    """A flat walk of planes that follow each other, and how many a program has; None where `least` columns at a time do
    not come out even."""
    outer, inner, column, *_ = rows.strides[0]
    if rows.spread > 1 and len(rows.strides[0]) == 3:
        images, row, plane = rows.inner, inner, rows.spread
    elif rows.spread == 1 and (inner, column) == (1, rows.inner) and rows.inner % BITS == 0:
        images, row, plane = rows.outer, outer, rows.inner
    else:
        return None
    most, slots, pieces = MOST_KEPT[element_size], 1, 1
    if plane > most:
        pieces = next(
            (n for n in range(2, plane) if plane % (n * least) == 0 and plane <= n * most), 0
        )
    else:
        slots = least // math.gcd(least, plane)
        while (
            2 * slots * plane <= FLAT_COLUMNS and slots < least and rows.channels % (2 * slots) == 0
        ):
            slots *= 2
    if pieces == 0 or rows.channels % slots or slots * plane > most * pieces:
        return None
    walk = (row, slots * plane // pieces, 1)
    return RowMap(images, pieces, rows.channels, (walk,), rows.needs_int64, plane), slots


class Product(NamedTuple):
    """What a product's kernel is compiled for: a tile of rows by output by input channels, and how it is computed.

    wide: offsets are int64; dims, other_dims: how many dimensions the rows of x (or of dy) and of y (or of x) have;
    blocks_in: tiles along the input channels. accumulate: y is added to.
    """

    rows: int
    channels_out: int
    channels_in: int
    stages: int
    precision: str
    wide: bool
    dims: int
    other_dims: int
    blocks_in: int = 1
    split: bool = False
    accumulate: bool = False


@dataclass(frozen=True)
class GemmTile:
    """block_rows rows by block_out output and block_in input channels; `programs` share the `tiles` of rows.

    split: whether a thread holds rows r and r + 8 of a product's result (on sm_100 it has one row).
    """

    block_rows: int
    block_out: int
    block_in: int
    warps: int
    stages: int
    tiles: int
    programs: int
    blocks_out: int
    blocks_in: int
    split: bool

    @functools.cached_property
    def options(self) -> dict[str, int]:
        """As `Tile.options`."""
        return {"num_warps": self.warps, "enable_fp_fusion": True}


# (rows, output channels, input channels, warps, stages, programs a multiprocessor) of the products, by architecture and
# element size. The first where one block holds all input channels: its program loads the weight once. Each output
# channel of a tile costs registers twice, as an accumulator and as moments, so tiles are wide rather than long: x is
# read once a block of output channels, from the cache, which is the limit where there are many blocks.
PRODUCT_WHOLE = {
    80: {2: (64, 64, 64, 4, 2, 4), 4: (32, 64, 64, 4, 2, 5), 8: (32, 16, 16, 4, 1, 2)},
    90: {2: (64, 128, 256, 8, 3, 2), 4: (64, 64, 64, 4, 2, 3), 8: (32, 16, 16, 4, 1, 2)},
    100: {2: (64, 64, 64, 4, 3, 3), 4: (64, 32, 32, 4, 3, 2), 8: (32, 16, 16, 4, 1, 2)},
}
PRODUCT = {
    80: {2: (64, 64, 64, 4, 2, 3), 4: (32, 32, 32, 4, 2, 4), 8: (32, 16, 16, 4, 1, 2)},
    90: {2: (128, 64, 64, 8, 3, 2), 4: (64, 64, 32, 4, 3, 3), 8: (32, 16, 16, 4, 1, 2)},
    100: {2: (64, 64, 64, 4, 3, 3), 4: (64, 32, 32, 4, 3, 2), 8: (32, 16, 16, 4, 1, 2)},
}
# Where sixteen does not divide the channels, values are loaded one by one and every address takes registers of its own.
PRODUCT_NARROW = {2: (32, 32, 32, 4, 1, 2), 4: (32, 32, 16, 4, 1, 2), 8: (32, 16, 16, 4, 1, 2)}
# The same for the gradient of the weight, whose accumulators are output by input channels; 64 output channels are the
# fewest that sm_90's wide instruction takes.
GRAD_WEIGHT = {2: (64, 64, 128, 4, 2), 4: (32, 64, 64, 4, 3), 8: (16, 16, 32, 4, 1)}
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
    if not _is_aligned(channels_in, channels_out):
        choice = PRODUCT_NARROW[element_size]
    else:
        architecture = 80 if chip.architecture < 90 else min(chip.architecture // 10 * 10, 100)
        choice = PRODUCT_WHOLE[architecture][element_size]
        if channels_in > choice[2]:
            choice = PRODUCT[architecture][element_size]
    block_rows, block_out, block_in, warps, stages, programs = choice
    block_out, block_in = _fit(block_out, channels_out), _fit(block_in, channels_in)
    block_rows = _fit(block_rows, rows)
    if stages > 2:
        # Two programs a multiprocessor rather than three tiles of one.
        moved = element_size * block_rows * block_in
        stays = element_size * (block_in + block_rows) * block_out
        if stays + 3 * moved > chip.shared_memory // 2 >= stays + 2 * moved:
            stages = 2
    tiles, blocks_out = _ceil(rows, block_rows), _ceil(channels_out, block_out)
    return GemmTile(
        block_rows, block_out, block_in, warps if block_rows * block_out >= 64 * 128 else 4, stages,
        tiles, _row_programs(programs * chip.multiprocessors, tiles, blocks_out), blocks_out,
        blocks_in=_ceil(channels_in, block_in),
        split=chip.architecture < 100,
    )  # fmt: skip


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
    tiles, blocks_out = _ceil(rows, block_rows), _ceil(channels_out, block_out)
    programs = _row_programs(2 * chip.multiprocessors, tiles, blocks_out * blocks_in)
    return GemmTile(
        block_rows, block_out, block_in, warps, stages, tiles, programs, blocks_out, blocks_in, split=False
    )  # fmt: skip


def _row_programs(wanted: int, tiles: int, blocks: int) -> int:
    """How many programs share the tiles of a block of channels, each the same number but the last."""
    wanted = min(_ceil(wanted, blocks), MAX_PARTIALS, tiles)
    return _ceil(tiles, _ceil(tiles, max(1, wanted)))
