"""The loop that a kernel spends its time in, read from its machine code: which instructions, on which pipes.

`steady(cubin)` disassembles with the nvdisasm that Triton brings and takes, of the loops that move nearly the most
bytes of global memory, the shortest: a kernel whose whole and partial tiles have a loop each is in the first of them
nearly always, and it needs no masks. Through it goes the shortest way that does all its accesses: what only a rare
branch does (the slow path of a division) is not counted, nor is what stands before and after the loop. A kernel without
a loop is taken whole.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .compile_only import tool, width

_LINE = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;?\s*(?:/\*.*)?$"
)
_LABEL = re.compile(r"^(\.L_\S+):")
_TARGET = re.compile(r"`\((\.L_\S+?)\)")
NEARLY = 0.75  # of the most bytes that a loop moves: the loop of partial tiles may move some twice

# What issues where on sm_90, by NVIDIA's public tables of arithmetic throughput and of instructions.
PIPES = {
    "fp": "FFMA FADD FMUL FFMA2 FADD2 FMUL2 HFMA2 HADD2 HMUL2 FSWZADD",
    "imad": "IMAD",
    "alu": "IADD3 IADD LOP3 LOP SHF LEA ISETP FSETP FSEL SEL FMNMX FMNMX3 PRMT PLOP3 MOV F2FP VIMNMX VIADD VIADDMNMX "
    "IABS P2R R2P VABSDIFF HMNMX2 HSETP2 HSET2 FSET BMSK SGXT I2FP CS2R FCHK VOTE VOTEU IMNMX I2IP S2R HSEL2",
    "xu": "MUFU I2F F2I F2F POPC FLO BREV FRND I2I",
    "fp64": "DADD DMUL DFMA DSETP DMNMX",
    "memory": "LDG STG LDGSTS LDS STS LDL STL LDSM STSM ATOMG ATOMS RED LDC SHFL UTMALDG UTMASTG",
    "tensor": "HMMA HGMMA IMMA DMMA QGMMA IGMMA",
    "uniform": "UIADD3 ULOP3 ULEA USHF UIMAD UMOV USEL UISETP ULDC UPRMT UPLOP3 R2UR UFLO UPOPC USGXT UBMSK UP2UR S2UR "
    "UVIADD UVIMNMX",
    "control": "BRA BAR BSSY BSYNC WARPSYNC NOP EXIT LDGDEPBAR DEPBAR CALL RET BREAK WARPGROUP FENCE YIELD SYNCS "
    "ERRBAR MEMBAR CCTL BMOV ENDCOLLECTIVE ACQBULK LEPC ELECT",
}  # fmt: skip
_PIPE_OF = {name: pipe for pipe, names in PIPES.items() for name in names.split()}
GLOBAL = ("LDG", "LDGSTS", "STG")
# A request is done in wavefronts of 128 bytes: 4 bytes of each of 32 threads.
_IN_WAVEFRONTS = ("LDG", "STG", "LDGSTS", "LDS", "STS", "LDSM", "STSM", "LDL", "STL")


@dataclass(frozen=True)
class Instruction:
    """One line: `guard` is the predicate it runs under, or empty."""

    guard: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def moved(self) -> int:
        """Bytes of global memory that a thread moves."""
        return width(self.opcode) // 8 if self.name in GLOBAL else 0

    @property
    def target(self) -> str | None:
        found = _TARGET.search(self.operands) if self.name == "BRA" else None
        return found and found[1]

    @property
    def conditional(self) -> bool:
        before = self.operands.partition("`")[0]
        return bool(self.guard or re.search(r"\bU?[PR](\d|Z)", before))


@dataclass(frozen=True)
class Steady:
    """The instructions that a warp issues once through the steady loop (`looped`), or through the whole kernel.

    Instructions whose predicate is off count: they issue.
    """

    opcodes: Counter[str]
    looped: bool

    @property
    def instructions(self) -> int:
        return self.opcodes.total()

    @property
    def pipes(self) -> Counter[str]:
        """Instructions by pipe; what stands in no table is `unknown`."""
        found: Counter[str] = Counter()
        for opcode, n in self.opcodes.items():
            found[_PIPE_OF.get(opcode.partition(".")[0], "unknown")] += n
        return found

    @property
    def wavefronts(self) -> int:
        """Of 128 bytes, of all accesses to global and shared memory, each as if it were coalesced and free of bank
        conflicts; a shuffle is one."""
        found = 0
        for opcode, n in self.opcodes.items():
            name = opcode.partition(".")[0]
            if name in _IN_WAVEFRONTS:
                found += n * max(1, width(opcode) // 32)
            elif name == "SHFL":
                found += n
        return found

    @property
    def cycles(self) -> dict[str, float]:
        """Cycles of a quarter of a multiprocessor (sm_90) that each pipe is taken by, for one warp.

        Assumed: a quarter issues one instruction a cycle; 32 lanes of float32, 16 of integers (multiply-adds share the
        float32 pipe), 16 of float64, 4 of special functions and conversions; and the four share one wavefront a cycle
        to memory.
        """
        n = self.pipes
        return {
            "issue": self.instructions,
            "alu": 2.0 * (n["alu"] + n["unknown"]),
            "fma": max(2.0 * n["imad"], n["fp"] + n["imad"]),
            "xu": 8.0 * n["xu"],
            "fp64": 2.0 * n["fp64"],
            "memory": 4.0 * self.wavefronts,
        }

    @property
    def asynchronous(self) -> bool:
        """Whether tensors are loaded ahead (cp.async, or the tensor memory accelerator)."""
        return any(name.startswith(("LDGSTS", "UTMALDG")) for name in self.opcodes)

    def widths(self, kind: str) -> dict[int, int]:
        """Accesses to global memory of a kind, `load` or `store`, by width in bits."""
        names = ("STG",) if kind == "store" else ("LDG", "LDGSTS")
        found: Counter[int] = Counter()
        for opcode, n in self.opcodes.items():
            if opcode.partition(".")[0] in names:
                found[width(opcode)] += n
        return dict(sorted(found.items()))

    def bytes(self, kind: str) -> int:
        """Bytes of global memory that a thread asks for in `load`s or `store`s."""
        return sum(bits // 8 * n for bits, n in self.widths(kind).items())


@dataclass(frozen=True)
class Listing:
    """A kernel's instructions, and where each label stands among them."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    def loops(self) -> Iterator[tuple[int, int]]:
        """(first, last) of the instructions between a label and a branch back to it."""
        for i, instruction in enumerate(self.instructions):
            first = self.labels.get(instruction.target or "")
            if first is not None and first <= i:
                yield first, i

    def way(self, first: int, last: int, shortest: bool = False) -> list[Instruction]:
        """From `first` to `last`: the way that moves most bytes of global memory, and of those the shortest; or the
        shortest of all."""
        code = self.instructions
        starts = {first} | {at for at in self.labels.values() if first <= at <= last}
        starts |= {i + 1 for i in range(first, last) if code[i].target or code[i].name == "EXIT"}
        ordered = sorted(starts)
        ends = [*(start - 1 for start in ordered[1:]), last]
        # best[k]: of the ways from block k to the end (bytes moved, -length), and the block that follows.
        best: dict[int, tuple[tuple[int, int], int | None]] = {}
        for k in range(len(ordered) - 1, -1, -1):
            block = code[ordered[k] : ends[k] + 1]
            following = [j for j in self._following(ordered, ends, k) if j in best]
            if ends[k] != last and not following:
                continue  # leaves the loop
            then = max(following, key=lambda j: best[j][0], default=None)
            moved, length = best[then][0] if then is not None else (0, 0)
            more = 0 if shortest else sum(i.moved for i in block)
            best[k] = (moved + more, length - len(block)), then
        found: list[Instruction] = []
        at: int | None = 0 if 0 in best else None
        while at is not None:
            found += code[ordered[at] : ends[at] + 1]
            at = best[at][1]
        return found or list(code[first : last + 1])

    def _following(self, starts: Sequence[int], ends: Sequence[int], k: int) -> Iterator[int]:
        """The blocks that may come after block k, forward only."""
        if ends[k] == ends[-1]:
            return
        last = self.instructions[ends[k]]
        at = self.labels.get(last.target or "")
        if at is not None and starts[k] < at <= ends[-1]:
            yield starts.index(at)
        falls_through = last.name not in ("BRA", "EXIT", "RET") or last.conditional
        if falls_through:
            yield k + 1


def disassemble(cubin: bytes) -> Listing:
    """The instructions of a cubin's kernel, with what it calls."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool("nvdisasm"), "-c", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _LINE.match(line):
            instructions.append(Instruction(found[1] or "", found[2], found[3]))
    if not instructions:
        raise RuntimeError(f"nvdisasm printed no instruction: {text.strip()[:200]!r}")
    return Listing(tuple(instructions), labels)


@functools.lru_cache(maxsize=512)
def steady(cubin: bytes) -> Steady:
    """What a kernel does again and again (see the module)."""
    (found,) = steady_loops(cubin)[:1]
    return found


@functools.lru_cache(maxsize=512)
def steady_loops(cubin: bytes) -> tuple[Steady, ...]:
    """The steady loop first, then the other innermost loops that move global memory, as they stand in the code; the
    whole kernel where there is no such loop."""
    listing = disassemble(cubin)
    ways = {}
    for first, last in listing.loops():
        way = listing.way(first, last)
        if any(i.moved for i in way):
            ways[first, last] = way
    if not ways:
        code = listing.instructions
        ends = [i for i, each in enumerate(code) if each.name == "EXIT" and not each.guard]
        return (_counted(listing.way(0, ends[0] if ends else len(code) - 1), False),)
    most = max(sum(i.moved for i in way) for way in ways.values())
    likely = [k for k, way in ways.items() if sum(i.moved for i in way) >= NEARLY * most]
    chosen = min(likely, key=lambda k: len(ways[k]))
    inner = [k for k in ways if not any(k != o and k[0] <= o[0] and o[1] <= k[1] for o in ways)]
    order = [chosen, *(k for k in inner if k != chosen)]
    return tuple(_counted(ways[k], True) for k in order)


@functools.lru_cache(maxsize=512)
def inner_loops(cubin: bytes) -> tuple[tuple[Steady, Steady], ...]:
    """The innermost loops that move global memory, as they stand in the code, each by the way that moves most and by
    the shortest one: what a kernel for several cases does in the fullest and in the plainest of them."""
    listing = disassemble(cubin)
    moving = [k for k in listing.loops() if any(i.moved for i in listing.way(*k))]
    inner = [k for k in moving if not any(k != o and k[0] <= o[0] and o[1] <= k[1] for o in moving)]
    return tuple(
        (_counted(listing.way(*k), True), _counted(listing.way(*k, shortest=True), True))
        for k in sorted(inner)
    )


def _counted(way: Sequence[Instruction], looped: bool) -> Steady:
    return Steady(Counter(i.opcode for i in way), looped)
