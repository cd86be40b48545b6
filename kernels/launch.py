"""Launch choices: which tile a pass gets, how many programs share it. Data and arithmetic, no Triton.

Not one of these numbers has been timed on a GPU yet. They come from what a multiprocessor needs in flight
(bandwidth x latency: 4.8 TB/s x 0.7 us / 132 = 25 KiB on an H200): eight warps with two 16-byte loads a thread and
tensor are 8 KiB a program, and four programs share a multiprocessor at 64 registers.
"""

import functools
from dataclasses import dataclass

from .chip import Chip
from .layout import RowMap

TILE_BYTES = 8192  # of a tensor: two 16-byte accesses a thread with 8 warps
ROWS_A_PROGRAM = 256  # at least, so that partial sums stay below 3 percent of what a pass reads
MAX_PARTIALS = 512  # the finalising step holds all partials of 8 channels in registers
BITS = 8  # mask bits in a byte
# The passes of a dual tail hold a third tensor, and its sums: with a whole tile they spill on sm_90.
DUAL_SHARE = 2
# Programs a multiprocessor, in all: a reducing pass keeps its accumulators, an applying pass keeps nothing.
REDUCING, APPLYING = 4, 16
# Tiles in flight: the accumulators leave a reducing pass two programs at a time (97 registers), so its loop has the
# loads of the next two tiles under way (cp.async) while it works on one.
STAGES = {REDUCING: 3, APPLYING: 1}


@dataclass(frozen=True)
class Tile:
    """BLOCK_OUTER x BLOCK_INNER rows of BLOCK_CHANNELS channels; `programs` share the `tiles` of a channel block."""

    block_outer: int
    block_inner: int
    block_channels: int
    warps: int
    stages: int
    tiles_inner: int
    tiles: int
    programs: int
    channel_blocks: int

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
        return self.programs, self.channel_blocks


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _block_inner(inner: int, outer: int, most: int) -> int:
    """The longest power of two that pads the inner rows by at most an eighth, else the one that pads them least."""
    if outer == 1:  # only the last tile is padded
        return max(BITS, min(_power_of_two(inner), most))
    candidates = [1 << k for k in range(3, 20) if (1 << k) <= max(most, BITS)]
    candidates = [b for b in candidates if b < 2 * max(inner, BITS)]
    good = [b for b in candidates if _ceil(inner, b) * b <= inner * 9 // 8]
    return max(good) if good else min(candidates, key=lambda b: (_ceil(inner, b) * b, -b))


@functools.lru_cache(maxsize=4096)
def choose_tile(
    rows: RowMap, element_size: int, per_multiprocessor: int, chip: Chip, share: int = 1
) -> Tile:
    """The tile of a pass over `rows`; `per_multiprocessor` is REDUCING or APPLYING, `share` 2 for half a tile."""
    elements = TILE_BYTES // share // element_size
    channels = _power_of_two(rows.channels)
    if rows.channels_fastest:
        block_channels = min(channels, 128 // min(element_size, 4))  # whole 128-byte lines
        block_inner = _block_inner(rows.inner, rows.outer, elements // block_channels)
        block_outer = min(_power_of_two(rows.outer), elements // (block_channels * block_inner))
    else:
        block_inner = _block_inner(rows.inner, rows.outer, 1024)
        block_channels = min(channels, 16, max(1, elements // block_inner))
        block_outer = min(_power_of_two(rows.outer), elements // (block_channels * block_inner))
    block_outer = max(block_outer, 1)
    tiles_inner = _ceil(rows.inner, block_inner)
    tiles = tiles_inner * _ceil(rows.outer, block_outer)
    channel_blocks = _ceil(rows.channels, block_channels)
    wanted = _ceil(per_multiprocessor * chip.multiprocessors, channel_blocks)
    if per_multiprocessor == REDUCING:
        wanted = min(wanted, max(1, rows.rows // ROWS_A_PROGRAM), MAX_PARTIALS)
    programs = max(1, min(tiles, wanted))
    programs = _ceil(tiles, _ceil(tiles, programs))  # the same number of tiles for nearly all
    tile_size = block_outer * block_inner * block_channels
    warps = 8 if tile_size * element_size >= TILE_BYTES // 2 else 4
    return Tile(
        block_outer, block_inner, block_channels, warps, STAGES[per_multiprocessor],
        tiles_inner, tiles, programs, channel_blocks,
    )  # fmt: skip
