"""Triton's compiled kernels, run on a CPU: an interpreter of their PTX, for tests and for counting.

`text` reads PTX as text; `instructions` is the table of lane-wise instructions; `decode` turns a kernel into arrays;
`machine.c` runs them a warp at a time (`memory.h`: accesses and their checks, `order.h`: what orders two programs,
`matrix.h`: ldmatrix, mma.sync and wgmma, `scalar.h`: values, `machine.h`: what it is made of); `build` compiles that
with gcc; `driver` stands in for Triton's own and runs each launch; `counts` makes figures of what was counted.

What it finds, with the line of the source and of the PTX, the block and the thread: accesses outside of the tensors of
a launch or misaligned, shared memory that is read before it is written, races between barriers in shared memory and in
global memory, races between programs (but for what an atomic released before another acquired it), a cp.async that is
read or overwritten before it is waited for, divergence at a collective, deadlock, instructions that it does not know.

What it does not see: what ptxas makes of the PTX (contraction, order, spills); the rounding of approximate instructions
and of sums in a tensor core; a wgmma that is not waited for (it runs at once). A program runs to its end before the
next one begins: one that waits for another never ends, and what a fence orders, or an access that is no atomic, is
taken for a race. It does not know tcgen05 and tensor memory (products on sm_100), TMA and mbarrier, clusters, local
memory, barriers of some warps, and of atomics more than the reductions of integers in global memory.
"""

from .driver import ARCHITECTURES, KINDS, Launch, emulated

__all__ = ["ARCHITECTURES", "KINDS", "Launch", "emulated"]
