"""The interpreter as a shared library: the C files beside this, with a case for each line of `instructions.py`.

Built by gcc once for each state of the sources (some 15 s), and kept in Triton's cache.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from triton.runtime.cache import get_cache_manager

from .decode import FIRST_SKIPPED, OPERATIONS
from .instructions import LANEWISE, Lanewise

SOURCES = ("machine.c", "machine.h", "scalar.h", "order.h", "memory.h", "matrix.h")
# No contraction and no reassociation: a rounding where PTX has one.
FLAGS = "-O2 -ftree-vectorize -march=native -ffp-contract=off -fno-math-errno -fno-trapping-math -w -fPIC -shared"
_STORED = {"u16": "u32", "pred": "u32"}
_WRAPPED = {"u16": "(u32)({}) & 65535", "pred": "-(u32)(({}) != 0)"}


def _case(name: str, known: Lanewise) -> str:
    pointers = [f"{_STORED.get(known.to, known.to)} *out = (void *)REGISTER(0);"]
    lane = [f"typedef {known.of[0] if known.to == 'pred' else known.to} T;"]
    for k, (letter, kind) in enumerate(zip("abcd", known.of, strict=False), start=1):
        pointers.append(f"const {kind} *p{k} = (const void *)REGISTER({k});")
        lane.append(f"const {kind} {letter} = p{k}[l];")
        if "_0" in known.text:  # the halves of a pair
            lane += [f"const f32 {letter}_{i} = as_f32({letter} >> {32 * i});" for i in (0, 1)]
    value = _WRAPPED.get(known.to, "{}").format(known.text)
    body = f"{{ {' '.join(lane)} out[l] = {value}; }}"
    return (
        f"case OP_{name.replace('.', '_')}: {{ {' '.join(pointers)}\n"
        f'if (mask == FULL) {{ _Pragma("GCC ivdep") for (int l = 0; l < LANES; l++) {body} }}\n'
        f"else EACH_ACTIVE {body}\nbreak; }}\n"
    )


def _generated() -> dict[str, str]:
    names = ", ".join(f"OP_{name}" for name in OPERATIONS)
    return {
        "operations.h": f"enum {{ {names} }};\n#define FIRST_SKIPPED OP_{FIRST_SKIPPED}\n",
        "lanewise.h": "".join(_case(name, known) for name, known in LANEWISE.items()),
    }


@functools.cache
def library() -> ctypes.CDLL:
    """The interpreter, compiled where it is not yet.

    Raises:
        RuntimeError: there is no gcc, or it refuses.
    """
    here = Path(__file__).parent
    files = {name: (here / name).read_text() for name in SOURCES} | _generated()
    kept = get_cache_manager(hashlib.sha256("".join([FLAGS, *files.values()]).encode()).hexdigest())
    path = kept.get_file("ptx.so")
    if path is None:
        path = kept.put(_compile(files), "ptx.so")
    return ctypes.CDLL(path)


def _compile(files: dict[str, str]) -> bytes:
    gcc = shutil.which("gcc")
    if gcc is None:
        raise RuntimeError(
            "running compiled kernels needs gcc, which is not on the PATH (Debian: apt install gcc)"
        )
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(text)
        command = [gcc, *FLAGS.split(), "machine.c", "-o", "ptx.so", "-lm"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
        return (Path(folder) / "ptx.so").read_bytes()
