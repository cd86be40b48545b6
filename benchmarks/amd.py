"""What the compiler for AMD makes of a kernel, read off the notes of its code object: registers and spills.

Triton's wheel holds that compiler, so a launch is compiled for gfx942 (MI300) as `compile_only` compiles it for sm_90.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CodeObject:
    """Of a kernel: vector registers (and those of the matrix units) a lane, scalar registers a warp, how many of them
    are spilled, bytes of memory that a lane has for itself.
    """

    vector: int
    matrix: int
    scalar: int
    vector_spills: int
    scalar_spills: int
    private: int

    @property
    def spills(self) -> int:
        """Vector registers that go to memory, or bytes of it where there is an array that is not in registers; scalar
        ones are kept in lanes of a vector register.
        """
        return self.vector_spills or self.private


# LLVM's user guide of the AMDGPU backend, code object metadata: a map in MessagePack.
NAMES = {
    "vector": ".vgpr_count",
    "matrix": ".agpr_count",
    "scalar": ".sgpr_count",
    "vector_spills": ".vgpr_spill_count",
    "scalar_spills": ".sgpr_spill_count",
    "private": ".private_segment_fixed_size",
}


def read_code_object(hsaco: bytes) -> CodeObject:
    """Read the notes of a code object that holds one kernel.

    Raises:
        ValueError: a figure is not there.
    """
    return CodeObject(**{field: _integer(hsaco, name) for field, name in NAMES.items()})


def _integer(hsaco: bytes, name: str) -> int:
    """The value that follows a name: itself up to 127, else a byte that tells the size before it."""
    written = bytes([0xA0 | len(name)]) + name.encode()  # a string of less than 32 bytes
    at = hsaco.find(written)
    if at < 0:
        raise ValueError(f"the code object does not tell {name}")
    at += len(written)
    value = hsaco[at : at + 5]
    if value[0] < 0x80:
        return value[0]
    if value[0] not in (0xCC, 0xCD, 0xCE):
        raise ValueError(f"the code object tells {name} in an unknown way: {value.hex()}")
    return int.from_bytes(value[1 : 1 + (1 << (value[0] - 0xCC))], "big")
