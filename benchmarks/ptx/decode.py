"""PTX text -> the arrays that the interpreter reads: instructions, where their operands stand, constants.

A kernel with an instruction that is not known is refused, and all of them are named. `SECTIONS` says which section of
the PTX ISA manual an instruction follows that is more than a line of `instructions.py`.
"""

from __future__ import annotations

import functools
import hashlib
import pickle
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from triton.runtime.cache import get_cache_manager

from .instructions import LANEWISE
from .text import BYTES, literal, members, read_entry, split_operands, statements

SHARED_BASE = (
    1024  # address of a program's shared memory, so that 0 is nowhere; machine.h has the same
)
_CONTROL, _SYNC, _MOVE = (
    "Control Flow Instructions",
    "Parallel Synchronization and Communication Instructions",
    "Data Movement and Conversion Instructions",
)
_WARP, _WARPGROUP = (
    "Warp Level Matrix Multiply-Accumulate Instructions",
    "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions",
)
# What is no lane-wise arithmetic: operation of the interpreter -> section of the manual. The first ones run where no
# lane is active, too.
SECTIONS = {
    "bra": _CONTROL, "ret": _CONTROL, "bar": _SYNC, "nop": _SYNC, "warpsync": _SYNC,
    "commit": _MOVE, "wait": _MOVE,
    # From here on an instruction that no lane takes is skipped.
    "special": "Special Registers", "ldparam": _MOVE, "split": _MOVE, "join": _MOVE,
    "ld_global": _MOVE, "st_global": _MOVE, "ld_shared": _MOVE, "st_shared": _MOVE, "cp_async": _MOVE, "atom": _SYNC,
    "shfl": _MOVE, "vote": _SYNC, "elect": _SYNC, "redux": _SYNC,
    "ldmatrix": _WARP, "stmatrix": _WARP, "mma": _WARP, "wgmma": _WARPGROUP,
}  # fmt: skip
FIRST_SKIPPED = "special"
OPERATIONS = [*SECTIONS, *(name.replace(".", "_") for name in LANEWISE)]
NUMBER = {name: i for i, name in enumerate(OPERATIONS)}
# All lanes of a warp take these together.
COLLECTIVE = {
    NUMBER[name]
    for name in (
        "bar", "warpsync", "shfl", "vote", "elect", "redux", "ldmatrix", "stmatrix", "mma", "wgmma",
    )
}  # fmt: skip
# Hints, and orders that this interpreter keeps anyhow (it runs wgmma at once) or does not see (order.h).
_IGNORED = ("fence", "membar", "prefetch", "applypriority", "griddepcontrol", "discard")
_IGNORED_WGMMA = ("wgmma.fence", "wgmma.commit", "wgmma.wait")
_SPECIALS = [  # machine.c has the same order
    *(f"%{name}.{axis}" for name in ("tid", "ctaid", "nctaid") for axis in "xyz"),
    *("%laneid", "%ntid.x", "%warpid", "%ntid.y"),
]
_MATRIX_TYPES = {"bf16": 0, "f16": 1, "tf32": 2, "f64": 3}
_REDUCTIONS = ("add", "min", "max", "and", "or", "xor")  # machine.c: combined
# Of an atomic; order.h has the same.
_SCOPES = {"cta": 1, "gpu": 2, "sys": 2}
_ORDERS = {"relaxed": 0, "acquire": 1, "release": 2, "acq_rel": 3}
IMMEDIATES = 6
INSTRUCTION = np.dtype(
    [(name, "i4") for name in ("op", "guard", "negated", "leader", "collective", "operands", "n")]
    + [("immediates", "i4", IMMEDIATES)]
)


class Unknown(Exception):
    """An instruction, or a form of one, that this interpreter does not know; no type that a test of errors expects."""


@dataclass
class Program:
    """A decoded kernel. Registers are counted in units of 32 lanes of 32 bits; the first hold the constants."""

    name: str
    code: np.ndarray
    operands: np.ndarray
    units: int
    constants: bytes
    params: tuple[tuple[str, int, int], ...]
    param_bytes: int
    threads: int
    text: list[str]  # of each instruction
    place: list[str]  # the line of the source that it comes from
    opcode: list[str]


def width(kind: str) -> int:
    """Units that a register of this type takes."""
    return 2 if kind.endswith("64") else 1


# An operand is ("register", unit) or ("constant", (bits, units)); a constant's unit is known at the end.
_Operand = tuple[str, Any]


class _Decoder:
    def __init__(self, ptx: str) -> None:
        self.entry = read_entry(ptx)
        self.param_at = {name: offset for name, offset, _ in self.entry.params}
        self.scopes: list[dict[str, tuple[int, int]]] = [{}]
        self.constants: dict[tuple[int, int], None] = {}
        self.units = 0
        self.rows: list[tuple] = []
        self.labels: dict[str, int] = {}
        self.text: list[str] = []
        self.place: list[str] = []
        self.opcode: list[str] = []
        self.unknown: list[str] = []
        self.local: list[str] = []  # names in local memory: LLVM declares some that nothing uses
        self.where = ""
        for kind, text in statements(self.entry.body):
            if kind == "label":
                self.labels[text] = len(self.rows)
            elif kind == "open":
                self.scopes.append({})
            elif kind == "close":
                self.scopes.pop()
            elif kind == "loc":
                parts = text.split()
                file = self.entry.files.get(parts[1], "?").rsplit("/", 1)[-1]
                self.where = f"{file}:{parts[2]}"
            elif text.startswith(".reg"):
                self._declare(text)
            elif text.startswith(".local"):
                self.local += re.findall(r"([\w$]+)\s*(?:\[\d+\])?\s*$", text)
            elif not text.startswith("."):
                self._statement(text)

    def _declare(self, text: str) -> None:
        _, kind, names = text.split(None, 2)
        for name in names.split(","):
            many = re.fullmatch(r"\s*(%?[\w$]+)<(\d+)>\s*", name)
            for one in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]:
                self.scopes[-1][one] = (self.units, width(kind))
                self.units += width(kind)

    # --- operands

    def _register(self, name: str) -> tuple[int, int] | None:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), None)

    def _operand(self, text: str, kind: str) -> _Operand | None:
        if text == "_":
            return None
        found = self._register(text)
        if found is not None:
            return "register", found[0]
        if text.endswith("global_smem"):
            return self._constant(SHARED_BASE, width(kind))
        if text.startswith("%"):
            raise Unknown(f"the register {text}")
        return self._constant(literal(text, kind), width(kind))

    def _constant(self, value: int, units: int) -> _Operand:
        self.constants.setdefault((value, units))
        return "constant", (value, units)

    def _temporary(self) -> _Operand:
        self.units += 1
        return "register", self.units - 1

    def _address(self, text: str) -> tuple[_Operand, int, int]:
        """(what holds the address, offset, whether it is a register of 64 bits)"""
        base, _, offset = text.strip("[] ").partition("+")
        base, at = base.strip(), int(offset.strip(), 0) if offset else 0
        found = self._register(base)
        if found is not None:
            return ("register", found[0]), at, int(found[1] == 2)
        if base == "global_smem":
            return self._constant(SHARED_BASE, 1), at, 0
        raise Unknown(f"the address {text}")

    # --- statements

    def _statement(self, text: str) -> None:
        self.current, guard = text, None
        if any(name in text for name in self.local):
            self.unknown.append(f"{text}  (local memory)")
            return
        found = re.match(r"@(!?)\s*(%?[\w$]+)\s+(.*)", text)
        if found:
            register = self._operand(found[2], "pred")
            guard, text = (register[1] if register else 0, int(bool(found[1]))), found[3]
        self.guard = guard
        self.name, _, rest = text.partition(" ")
        try:
            self._instruction(self.name.split("."), split_operands(rest), rest)
        except (Unknown, KeyError, ValueError, IndexError) as error:
            self.unknown.append(f"{self.current}  ({error})")

    def _emit(self, operation: str, operands=(), immediates=(), target: str | None = None) -> None:
        self.rows.append((NUMBER[operation], self.guard, operands, immediates, target))
        self.text.append(self.current)
        self.place.append(self.where)
        self.opcode.append(self.name)

    def _instruction(self, parts: list[str], operands: list[str], rest: str) -> None:
        head = parts[0]
        if head == "bra":
            self._emit("bra", target=operands[0])
        elif head in ("ret", "exit"):
            self._emit("ret")
        elif head in ("bar", "barrier"):
            self._barrier(parts, operands)
        elif head in _IGNORED or self.name.startswith(_IGNORED_WGMMA):
            self._emit("nop")
        elif head == "createpolicy":  # a cache hint: any value will do
            self._emit("mov_b64", [self._operand(operands[0], "b64"), self._constant(0, 2)])
        elif head == "cp" and parts[1] == "async" and "bulk" not in parts:
            self._copy(parts, operands)
        elif head in ("ld", "st"):
            self._memory(parts, operands)
        elif head in ("atom", "red"):
            self._atomic(parts, operands)
        elif head == "shfl":
            self._shuffle(parts, operands, rest)
        elif head == "vote":
            mode = {"ballot": 0, "any": 1, "all": 2}[parts[2]]
            slots = [self._operand(operands[0], "b32"), self._operand(operands[1], "pred")]
            self._emit("vote", slots, [mode])
        elif head == "elect":
            self._emit("elect", [self._operand(operands[1], "pred")])
        elif head == "redux":
            slots = [self._operand(text, "b32") for text in operands[:2]]
            self._emit("redux", slots, [_REDUCTIONS.index(parts[2]), int(parts[3] == "s32")])
        elif head in ("ldmatrix", "stmatrix"):
            self._matrix(parts, operands)
        elif head == "mma":
            self._mma(parts, operands)
        elif self.name.startswith("wgmma.mma_async"):
            self._wgmma(parts, operands)
        elif head == "mov":
            self._move(parts[-1], operands)
        elif head == "setp":
            self._compare(parts, operands)
        else:
            self._lanewise(parts, operands)

    def _lanewise(self, parts: list[str], operands: list[str]) -> None:
        name = self.name
        if name not in LANEWISE:  # the rounding is said where it is the only one that is known
            name = ".".join(part for part in parts if part != "rn")
        if name not in LANEWISE:
            raise Unknown("not in instructions.py")
        known = LANEWISE[name]
        if len(operands) != 1 + len(known.of):
            raise Unknown(f"{len(operands)} operands, not {1 + len(known.of)}")
        kinds = (known.to, *known.of)
        slots = [self._operand(text, kind) for text, kind in zip(operands, kinds, strict=True)]
        for k, (text, kind) in enumerate(zip(operands, kinds, strict=True)):
            found = self._register(text)
            if found is None or found[1] == width(kind):
                continue
            if k == 0 or parts[0] != "cvt" or found[1] < width(kind):
                raise Unknown(f"{text} is no register for {kind}")
            wide, slots[k] = slots[k], self._temporary()  # a conversion reads the lower half of it
            self._emit("cvt_u32_u64", [slots[k], wide])
        self._emit(name.replace(".", "_"), slots)

    def _barrier(self, parts: list[str], operands: list[str]) -> None:
        if parts[1] == "warp":
            return self._emit("warpsync")
        if parts[1] != "sync":
            raise Unknown("a barrier that is not waited for")
        if len(operands) > 1 and int(operands[1], 0) != self.entry.threads:
            raise Unknown("a barrier of some warps")
        return self._emit("bar", immediates=[int(operands[0], 0)])

    def _move(self, kind: str, operands: list[str]) -> None:
        to, of = operands
        if of in _SPECIALS:
            return self._emit("special", [self._operand(to, "u32")], [_SPECIALS.index(of)])
        if to.startswith("{") or of.startswith("{"):
            names = members(to if to.startswith("{") else of)
            size = BYTES[kind] // len(names)
            whole = self._operand(of if to.startswith("{") else to, f"b{8 * max(BYTES[kind], 4)}")
            slots = [self._operand(name, f"b{8 * max(size, 4)}") for name in names]
            return self._emit("split" if to.startswith("{") else "join", [whole, *slots], [size])
        if kind == "pred" and not of.startswith("%"):
            bits = 0xFFFFFFFF if int(of, 0) else 0
            slots = [self._operand(to, "pred"), self._constant(bits, 1)]
        else:
            register = "u16" if kind in ("b16", "u16", "s16") else kind
            slots = [self._operand(to, register), self._operand(of, register)]
        return self._emit(f"mov_{kind}", slots)

    def _compare(self, parts: list[str], operands: list[str]) -> None:
        """setp.OP.and p, a, b, q is a comparison, then the logic; so is its negation (!q)."""
        logic = [part for part in parts if part in ("and", "or", "xor")]
        name = ".".join(part for part in parts if part not in ("and", "or", "xor", "ftz"))
        if name.endswith("x2") and "|" in self.current and not logic:
            return self._compare_pairs(name, operands)
        if name not in LANEWISE:
            raise Unknown("not in instructions.py")
        if "|" in self.current or len(operands) != 3 + len(logic):
            raise Unknown("a second predicate")
        result = self._operand(operands[0], "pred")
        first = self._temporary() if logic else result
        kinds = LANEWISE[name].of
        of = [self._operand(text, kind) for text, kind in zip(operands[1:3], kinds, strict=True)]
        self._emit(name.replace(".", "_"), [first, *of])
        if logic:
            other = self._operand(operands[3].lstrip("!"), "pred")
            if operands[3].startswith("!"):
                negated = self._temporary()
                self._emit("not_pred", [negated, other])
                other = negated
            self._emit(f"{logic[0]}_pred", [result, first, other])
        return None

    def _compare_pairs(self, name: str, operands: list[str]) -> None:
        """setp.OP.bf16x2 p|q, a, b: p is of the lower halves, q of the upper ones."""
        one = name.removesuffix("x2")
        kind = one.rsplit(".", 1)[1]
        low, high = (self._operand(text, "pred") for text in operands[:2])
        pair = [self._operand(text, "b32") for text in operands[2:4]]
        uppers = [self._temporary() for _ in pair]
        for upper, whole in zip(uppers, pair, strict=True):
            self._emit(f"shift_upper_{kind}x2", [upper, whole])
        self._emit(one.replace(".", "_"), [low, *pair])
        self._emit(one.replace(".", "_"), [high, *uppers])

    def _memory(self, parts: list[str], operands: list[str]) -> None:
        spaces = [part.split("::")[0] for part in parts]
        space = next((s for s in spaces if s in ("global", "shared", "param", "local")), "generic")
        if space in ("local", "generic"):
            raise Unknown(f"{space} memory")
        kind, loads = parts[-1], parts[0] == "ld"
        count = next((int(part[1:]) for part in parts if re.fullmatch(r"v[248]", part)), 1)
        place, values = (operands[1], operands[0]) if loads else operands[:2]
        names = members(values)
        if len(names) != count:
            raise Unknown(f"{len(names)} values")
        slots = [self._operand(name, f"b{8 * max(BYTES[kind], 4)}") for name in names]
        after: list[tuple[_Operand | None, _Operand]] = []
        for k, name in enumerate(names):  # a register may be wider than what is moved
            found = self._register(name)
            if BYTES[kind] < 8 and found is not None and found[1] == 2:
                wide, narrow = slots[k], self._temporary()
                slots[k] = narrow
                if loads:
                    after.append((wide, narrow))
                else:
                    self._emit("cvt_u32_u64", [narrow, wide])
        if space == "param":
            name, _, offset = place.strip("[] ").partition("+")
            at = self.param_at[name.strip()] + (int(offset, 0) if offset else 0)
            for k, slot in enumerate(slots):
                self._emit("ldparam", [slot], [BYTES[kind], at + k * BYTES[kind]])
        else:
            base, offset_of, is_wide = self._address(place)
            is_signed = int(loads and kind in ("s8", "s16"))
            immediates = [BYTES[kind], count, offset_of, is_signed, is_wide]
            self._emit(f"{parts[0]}_{space}", [base, *slots], immediates)
        for wide, narrow in after:
            self._emit("cvt_s64_s32" if kind.startswith("s") else "cvt_u64_u32", [wide, narrow])

    def _atomic(self, parts: list[str], operands: list[str]) -> None:
        """atom.global.SEM.SCOPE.OPERATION.TYPE was, [address], value; red has no `was`."""
        *said, operation, kind = parts[1:]
        if not re.fullmatch(r"[bsu](32|64)", kind) or operation not in _REDUCTIONS:
            raise Unknown("not a reduction of integers")
        if "global" not in said or not set(said) <= {"global", *_ORDERS, *_SCOPES}:
            raise Unknown("not an atomic in global memory that is known")
        base, offset, _ = self._address(operands[-2])
        slots = [base, self._operand(operands[-1], kind)]
        if parts[0] == "atom":
            slots.append(self._operand(operands[0], kind))
        scope = max((_SCOPES[part] for part in said if part in _SCOPES), default=_SCOPES["gpu"])
        # What is ordered within a program is a matter of its barriers.
        orders = max((_ORDERS[part] for part in said if part in _ORDERS), default=0)
        immediates = [BYTES[kind], _REDUCTIONS.index(operation), int(kind[0] == "s"), offset, scope]
        self._emit("atom", slots, [*immediates, orders if scope == _SCOPES["gpu"] else 0])

    def _copy(self, parts: list[str], operands: list[str]) -> None:
        if parts[2] == "commit_group":
            return self._emit("commit")
        if parts[2] == "wait_group":
            return self._emit("wait", immediates=[int(operands[0], 0)])
        if parts[2] == "wait_all":
            return self._emit("wait", immediates=[-1])
        if parts[2] not in ("ca", "cg"):
            raise Unknown("not a copy from global to shared memory")
        to, to_offset, _ = self._address(operands[0])
        of, of_offset, _ = self._address(operands[1])
        filled = [self._operand(operands[3], "b32")] if len(operands) > 3 else []
        return self._emit(
            "cp_async", [to, of, *filled], [int(operands[2], 0), to_offset, of_offset]
        )

    def _shuffle(self, parts: list[str], operands: list[str], rest: str) -> None:
        mode = {"up": 0, "down": 1, "bfly": 2, "idx": 3}[parts[2]]
        out = operands[:2] if "|" in rest.split(",")[0] else operands[:1]
        value, lane, clamp, _ = operands[len(out) :]
        slots = [self._operand(text, "b32") for text in (out[0], value, lane)]
        slots += [self._operand(text, "pred") for text in out[1:]]
        self._emit("shfl", slots, [mode, int(clamp, 0)])

    # --- matrices

    def _matrix(self, parts: list[str], operands: list[str]) -> None:
        loads = parts[0] == "ldmatrix"
        if "m8n8" not in parts or parts[-1] != "b16":
            raise Unknown("not 8x8 of 16 bits")
        place, values = (operands[1], operands[0]) if loads else operands
        base, offset, is_wide = self._address(place)
        slots = [self._operand(name, "b32") for name in members(values)]
        count = next(int(part[1:]) for part in parts if re.fullmatch(r"x[124]", part))
        self._emit(parts[0], [base, *slots], [count, int("trans" in parts), offset, is_wide])

    def _mma(self, parts: list[str], operands: list[str]) -> None:
        """mma.sync.aligned.SHAPE.row.col.D.A.B.C"""
        shape = re.fullmatch(r"m(\d+)n(\d+)k(\d+)", parts[3])
        kind = parts[7]
        is_double = kind == "f64"
        if shape is None or int(shape[2]) != 8 or parts[4:6] != ["row", "col"]:
            raise Unknown("not a shape that is known")
        if kind not in _MATRIX_TYPES or parts[6] != ("f64" if is_double else "f32"):
            raise Unknown("not types that are known")
        rows, k = int(shape[1]), int(shape[3])
        register = "f64" if is_double else "b32"
        slots = [self._operand(name, register) for group in operands for name in members(group)]
        self._emit("mma", slots, [rows, k, _MATRIX_TYPES[kind]])

    def _wgmma(self, parts: list[str], operands: list[str]) -> None:
        """wgmma.mma_async.sync.aligned.SHAPE.f32.A.B d, a, b, keeps, 1, 1, transposed..."""
        shape = re.fullmatch(r"m64n(\d+)k(\d+)", parts[4])
        kind = parts[6]
        if shape is None or parts[5] != "f32" or kind not in ("bf16", "f16", "tf32"):
            raise Unknown("not a form that is known")
        if [int(flag, 0) for flag in operands[4:6]] != [1, 1]:
            raise Unknown("a negated operand")
        in_registers = operands[1].startswith("{")
        slots = [self._operand(name, "b32") for name in members(operands[0])]
        slots += [
            self._operand(name, "b32" if in_registers else "b64") for name in members(operands[1])
        ]
        transposed = [int(flag, 0) for flag in operands[6:]]
        a_transposed = transposed[0] if len(transposed) == 2 else 0
        b_transposed = transposed[-1] if transposed else 0
        keeps = operands[3]
        is_register = self._register(keeps) is not None
        scale = self._operand(keeps, "pred") if is_register else self._constant(int(keeps, 0), 1)
        immediates = [int(shape[1]), int(shape[2]), _MATRIX_TYPES[kind], int(in_registers),
                      1 - a_transposed, 1 - b_transposed]  # fmt: skip
        self._emit("wgmma", [*slots, self._operand(operands[2], "b64"), scale], immediates)

    # --- arrays

    def program(self) -> Program:
        if self.unknown:
            lines = "\n    ".join(dict.fromkeys(self.unknown))
            raise Unknown(
                f"{self.entry.name} has instructions that are not known here:\n    {lines}"
            )
        at: dict[tuple[int, int], int] = {}
        base, data = 0, bytearray()
        for value, units in self.constants:
            at[value, units] = base
            base += units
            data += struct.pack("<Q" if units == 2 else "<I", value) * 32

        def unit(operand: _Operand | None) -> int:
            if operand is None:
                return -1
            return at[operand[1]] if operand[0] == "constant" else base + operand[1]

        code = np.zeros(len(self.rows) + 1, INSTRUCTION)
        pool: list[int] = []
        for i, (op, guard, operands, immediates, target) in enumerate(self.rows):
            row = code[i]
            row["op"], row["guard"] = op, -1
            row["operands"], row["n"] = len(pool), len(operands)
            row["collective"] = op in COLLECTIVE
            if guard is not None:
                row["guard"], row["negated"] = base + guard[0], guard[1]
            pool += [unit(operand) for operand in operands]
            row["immediates"][: len(immediates)] = immediates
            if target is not None:
                row["immediates"][0] = self.labels[target]
                # Where a branch leads, lanes of a warp may meet again.
                code[self.labels[target]]["leader"] = code[i + 1]["leader"] = 1
        code[-1]["op"], code[-1]["guard"] = NUMBER["ret"], -1
        entry = self.entry
        return Program(
            entry.name, code, np.array(pool or [0], "i4"), base + self.units, bytes(data), entry.params,
            entry.param_bytes, entry.threads, [*self.text, "ret"], [*self.place, ""],
            [*self.opcode, "ret"],
        )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def decode(ptx: str) -> Program:
    """The program of a PTX file with one kernel. Kept in Triton's cache, by the text and by this decoder's own.

    Raises:
        Unknown: there is an instruction that this interpreter does not know; its message has all of them.
    """
    key = hashlib.sha256((_version() + ptx).encode()).hexdigest()
    kept = get_cache_manager(key)
    path = kept.get_file("program.pickle")
    if path is not None:
        return pickle.loads(Path(path).read_bytes())
    program = _Decoder(ptx).program()
    kept.put(pickle.dumps(program), "program.pickle")
    return program


@functools.cache
def _version() -> str:
    files = ("decode.py", "instructions.py", "text.py")
    return "".join((Path(__file__).parent / name).read_text() for name in files)
