"""A byte meter: the distinct 32-byte sectors that each launch reads and writes, counted in Triton's interpreter.

A GPU moves memory in sectors of 32 bytes; what a launch touches twice comes from a cache the second time, so a sector
counts once a launch and direction.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from triton.runtime import interpreter

SECTOR = 32


@dataclass
class Traffic:
    """Sectors of one launch."""

    read: set[int] = field(default_factory=set)
    written: set[int] = field(default_factory=set)


@dataclass
class Meter:
    launches: list[Traffic] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Bytes of all launches, reads and writes."""
        return SECTOR * sum(len(launch.read) + len(launch.written) for launch in self.launches)


@contextmanager
def meter() -> Iterator[Meter]:
    """`with meter() as m:` every kernel launched by the interpreter inside is counted."""
    found = Meter()
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    call = interpreter.GridExecutor.__call__

    def sectors(pointers, mask) -> set[int]:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = pointers.data[np.broadcast_to(mask.data.astype(bool), pointers.data.shape)]
        first, last = addresses // SECTOR, (addresses + (size - 1)) // SECTOR
        return set(np.unique(first).tolist()) | set(np.unique(last).tolist())

    def counted_load(self, pointers, mask, *rest):
        found.launches[-1].read |= sectors(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        found.launches[-1].written |= sectors(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counted_call(self, *arguments, **options):
        found.launches.append(Traffic())
        return call(self, *arguments, **options)

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    interpreter.GridExecutor.__call__ = counted_call
    try:
        yield found
    finally:
        builder.create_masked_load, builder.create_masked_store = load, store
        interpreter.GridExecutor.__call__ = call
