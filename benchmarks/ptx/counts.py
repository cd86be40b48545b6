"""Figures of what launches did: instructions by class, sectors a request, bank conflicts, barriers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from .driver import Launch

# The class of an instruction by the first word of its opcode; what computes is float or integer by its type.
CLASSES = {
    "conversion": ("cvt",),
    "move": ("mov", "selp", "prmt", "createpolicy"),
    "comparison": ("setp",),
    "shuffle": ("shfl", "vote", "elect", "redux"),
    "memory": ("ld", "st", "cp", "atom", "red", "ldmatrix", "stmatrix"),
    "tensor_core": ("mma", "wgmma"),
    "control": ("bra", "ret", "exit", "bar", "barrier", "fence", "membar"),
}
COMPUTING = ("float", "integer")
_CLASS = {word: name for name, words in CLASSES.items() for word in words}
_WAITS = ("cp.async.commit", "cp.async.wait", "wgmma.fence", "wgmma.commit", "wgmma.wait")
_FLOAT = re.compile(r"\.b?f(16|32|64)")
# cp.async is a load of global memory; what it writes into shared memory is not counted.
REQUESTS = {
    "load_sectors": ("ld.global", "cp.async.ca", "cp.async.cg"),
    "store_sectors": ("st.global",),
    "shared_load_wavefronts": ("ld.shared", "ldmatrix"),
    "shared_store_wavefronts": ("st.shared", "stmatrix"),
}


def class_of(opcode: str) -> str:
    """One of `CLASSES` or `COMPUTING`."""
    if opcode.startswith(_WAITS):
        return "control"
    found = _CLASS.get(opcode.split(".")[0])
    return found or ("float" if _FLOAT.search(opcode) else "integer")


def by_class(launches: Sequence[Launch]) -> Counter[str]:
    """Instructions that warps issued."""
    found: Counter[str] = Counter()
    for launch in launches:
        for opcode, n in launch.instructions().items():
            found[class_of(opcode)] += n
    return found


def figures(launches: Sequence[Launch], elements: int) -> Iterator[tuple[str, float]]:
    """(metric, value) of the launches of one kernel, over a tensor of so many elements.

    Instructions are those of threads for an element: 32 for each that a warp issues, whichever lanes take part. Of each
    kind of access that there is: sectors or wavefronts a request, and `_ratio`, those over the fewest that could be
    (below 1 where lanes ask for the same bytes). A request none of whose lanes takes part counts as one of no sectors.
    """
    classes = by_class(launches)
    yield "instructions", 32 * classes.total() / elements
    for name in (*COMPUTING, *CLASSES):
        yield f"{name}_instructions", 32 * classes[name] / elements
    for name, prefixes in REQUESTS.items():
        parts = [launch.memory(*prefixes) for launch in launches]
        requests, units, fewest = (sum(part[k] for part in parts) for k in range(3))
        if units:
            yield name, units / requests
            yield f"{name}_ratio", units / fewest
    warps = sum(_warps(launch) for launch in launches)
    barriers = sum(_barriers(launch) for launch in launches)
    yield "barriers", barriers / warps


def _warps(launch: Launch) -> int:
    x, y, z = launch.grid
    return x * y * z * -(-launch.program.threads // 32)


def _barriers(launch: Launch) -> int:
    """Those of a whole program; what orders the lanes of one warp costs next to nothing."""
    return sum(
        n
        for opcode, n in launch.instructions().items()
        if opcode.startswith(("bar", "barrier")) and ".warp." not in opcode
    )
