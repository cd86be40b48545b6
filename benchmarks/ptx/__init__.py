"""Triton's compiled kernels, run on a CPU: an interpreter of their PTX, for tests and for counting.

`text` reads PTX as text; `instructions` is the table of lane-wise instructions; `decode` turns a kernel into arrays;
`machine.c` runs them a warp at a time (`memory.h`: accesses and their checks, `matrix.h`: ldmatrix, mma.sync and
wgmma, `scalar.h`: values, `machine.h`: what it is made of); `build` compiles that with gcc; `driver` stands in for
Triton's own and runs each launch; `counts` makes figures of what was counted.

What it finds, with the line of the source and of the PTX, the block and the thread: accesses outside of the tensors of
a launch or misaligned, shared memory that is read before it is written, races between barriers in shared memory and in
global memory, a cp.async that is read or overwritten before it is waited for, divergence at a collective, deadlock,
instructions that it does not know.

What it does not see: what ptxas makes of the PTX (contraction, order, spills); the rounding of approximate instructions
and of sums in a tensor core; a wgmma that is not waited for (it runs at once). It does not know tcgen05 and tensor
memory (products on sm_100), TMA and mbarrier, clusters, atomics, local memory, barriers of some warps.
"""

from .driver import ARCHITECTURES, KINDS, Launch, emulated

__all__ = ["ARCHITECTURES", "KINDS", "Launch", "emulated"]
