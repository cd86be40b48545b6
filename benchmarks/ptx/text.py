"""PTX as text: what a kernel's entry declares, and its statements in order. Nothing here knows an instruction."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

# Bytes of a fundamental type.
BYTES = {
    f"{letter}{bits}": bits // 8
    for bits, letters in {8: "bus", 16: "busf", 32: "busf", 64: "busf"}.items()
    for letter in letters
} | {"bf16": 2}


@dataclass(frozen=True)
class Entry:
    """The head of a kernel: its parameters (name, offset, bytes), threads a program, source files, and its body."""

    name: str
    params: tuple[tuple[str, int, int], ...]
    param_bytes: int
    threads: int
    files: dict[str, str]
    body: str


def read_entry(ptx: str) -> Entry:
    """The one kernel of a PTX file."""
    head = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", ptx, re.S)
    if head is None:
        raise ValueError("the PTX has no .entry")
    threads = re.search(r"\.reqntid\s+(\d+)", head[3])
    if threads is None:
        raise ValueError("the kernel does not say how many threads it wants (.reqntid)")
    params, offset = [], 0
    for kind, name in re.findall(r"\.param\s+\.(\w+)[^,]*?([\w$]+)\s*(?:,|$)", head[2].strip()):
        size = BYTES[kind]
        offset = -(-offset // size) * size
        params.append((name, offset, size))
        offset += size
    depth, end = 1, len(ptx)
    for found in re.finditer(r"[{}]", ptx[head.end() :]):
        depth += 1 if found[0] == "{" else -1
        if depth == 0:
            end = head.end() + found.start()
            break
    files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', ptx))
    return Entry(
        head[1], tuple(params), offset, int(threads[1]), files, ptx[head.end() : end]
    )  # fmt: skip


def statements(body: str) -> Iterator[tuple[str, str]]:
    """("label" | "open" | "close" | "loc" | "text", its text) in order; a brace of operands stays in its statement."""
    for kind, text in _scan(body):
        yield kind, " ".join(text.split())


def _scan(body: str) -> Iterator[tuple[str, str]]:
    buffer = ""
    for line in body.split("\n"):
        line = line.strip()
        if line.split(maxsplit=1)[:1] in ([".loc"], [".file"]):
            yield "loc", line
            continue
        for character in line.split("//")[0] + " ":
            if character == ";":
                if buffer.strip():
                    yield "text", buffer
                buffer = ""
            elif character in "{}" and not buffer.strip():
                yield "open" if character == "{" else "close", ""
            elif character == ":" and re.fullmatch(r"\s*[$\w]+", buffer):
                yield "label", buffer
                buffer = ""
            else:
                buffer += character


def split_operands(text: str) -> list[str]:
    """`a, {b, c}, [d], e|f` is [a, {b, c}, [d], e, f]."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character in ",|" and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    return [*parts, current.strip()] if current.strip() else parts


def members(text: str) -> list[str]:
    """`{a, b}` is [a, b], and so is one that stands alone."""
    return split_operands(text.strip("{} "))


def literal(text: str, kind: str) -> int:
    """The bits of a literal as a register of this type holds them (0f and 0d: the bits of a float32, a float64)."""
    is_wide = kind.endswith("64")
    if text.startswith(("0f", "0d")) or ("." in text and kind.startswith("f")):
        if text.startswith("0f"):
            (value,) = struct.unpack("<f", struct.pack("<I", int(text[2:], 16)))
            if not is_wide:
                return int(text[2:], 16)  # a NaN keeps its bits
        elif text.startswith("0d"):
            (value,) = struct.unpack("<d", struct.pack("<Q", int(text[2:], 16)))
            if is_wide:
                return int(text[2:], 16)
        else:
            value = float(text)
        bits = struct.pack("<d" if is_wide else "<f", value)
        return int.from_bytes(bits, "little")
    bits = 16 if kind in ("u16", "s16") else 64 if is_wide else 32
    return int(text.rstrip("U"), 0) & ((1 << bits) - 1)
