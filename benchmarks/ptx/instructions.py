"""The lane-wise instructions of PTX: one line each, with the section of the PTX ISA manual that it follows.

`define(names, to, of, text)`: the type that is written, the types that are read, and the value as a C expression of the
operands a, b, c, d. `build.py` makes a case of the interpreter of each. A type says how a lane stores it: registers of
16 bits and predicates live in 32 bits, and u16 and pred mask what they write.

Approximate instructions (ex2, lg2, div.full and their kind) are computed exactly; a chip is off by a few units in the
last place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Lanewise:
    """An instruction that computes each lane from the same lane of its operands."""

    to: str
    of: tuple[str, ...]
    text: str
    section: str


LANEWISE: dict[str, Lanewise] = {}


def _section(title: str) -> Callable[[str, str, str, str], None]:
    def define(names: str, to: str, of: str, text: str) -> None:
        for name in names.split():
            LANEWISE[name] = Lanewise(to, tuple(of.split()), text, title)

    return define


_ARITHMETIC = {"add": "+", "sub": "-", "mul": "*"}
_BITWISE = {"and": "&", "or": "|", "xor": "^"}
_ORDER = {"lt": "<", "le": "<=", "gt": ">", "ge": ">="}

# --- Integer Arithmetic Instructions -----------------------------------------------------------------------------

define = _section("Integer Arithmetic Instructions")
for bits in (32, 64):
    u, s = f"u{bits}", f"s{bits}"
    for name in ("add", "sub"):
        define(f"{name}.s{bits} {name}.u{bits}", u, f"{u} {u}", f"a {_ARITHMETIC[name]} b")
    define(f"mul.lo.s{bits} mul.lo.u{bits}", u, f"{u} {u}", "a * b")
    define(f"mad.lo.s{bits} mad.lo.u{bits}", u, f"{u} {u} {u}", "a * b + c")
    for t in (u, s):
        define(f"min.{t}", t, f"{t} {t}", "a < b ? a : b")
        define(f"max.{t}", t, f"{t} {t}", "a > b ? a : b")
        # Division by zero gives what the manual leaves open; the most negative number by -1 wraps.
        wraps = "b == (T)-1 && (T)-1 < 0"
        define(f"div.{t}", t, f"{t} {t}", f"b ? ({wraps} ? 0 - a : a / b) : (T)-1")
        define(f"rem.{t}", t, f"{t} {t}", f"b ? ({wraps} ? 0 : a % b) : a")
    define(f"neg.s{bits}", u, u, "0 - a")
    define(f"abs.s{bits}", s, s, "a < 0 ? (T)(0 - (unsigned long long)a) : a")
    define(f"bfe.u{bits}", u, f"{u} u32 u32", f"bfe_u(a, b, c, {bits})")
    define(f"bfe.s{bits}", s, f"{s} u32 u32", f"bfe_s(a, b, c, {bits})")
    define(f"popc.b{bits}", "u32", u, "__builtin_popcountll(a)")
    define(f"clz.b{bits}", "u32", u, f"a ? __builtin_clzll(a) - {64 - bits} : {bits}")
for t, wide in (("s32", "s64"), ("u32", "u64")):
    define(f"mul.wide.{t}", wide, f"{t} {t}", f"({wide})a * ({wide})b")
    define(f"mad.wide.{t}", wide, f"{t} {t} {wide}", f"({wide})a * ({wide})b + c")
    define(f"mul.hi.{t}", t, f"{t} {t}", f"(({wide})a * ({wide})b) >> 32")
    define(f"mad.hi.{t}", t, f"{t} {t} {t}", f"((({wide})a * ({wide})b) >> 32) + c")
define("mul.hi.u64", "u64", "u64 u64", "((unsigned __int128)a * b) >> 64")
define("mul.hi.s64", "s64", "s64 s64", "((__int128)a * b) >> 64")
for name, sign in {**_ARITHMETIC, "mul.lo": "*"}.items():
    if name != "mul":
        define(f"{name}.s16 {name}.u16", "u16", "u32 u32", f"a {sign} b")
define("mul.wide.u16", "u32", "u32 u32", "(u16)a * (u32)(u16)b")
define("mul.wide.s16", "u32", "u32 u32", "(s16)a * (s32)(s16)b")
for t in ("s16", "u16"):
    first, second = f"({t})a", f"({t})b"
    define(f"div.{t}", "u16", "u32 u32", f"{second} ? {first} / {second} : -1")
    define(f"rem.{t}", "u16", "u32 u32", f"{second} ? {first} % {second} : a")
define("neg.s16", "u16", "u32", "0 - a")
define("brev.b32", "u32", "u32", "brev(a)")
define("bfi.b32", "u32", "u32 u32 u32 u32", "bfi(a, b, c, d)")

# --- Floating-Point Instructions ---------------------------------------------------------------------------------

define = _section("Floating-Point Instructions")
for bits, suffix in ((32, "f"), (64, "")):
    f, u = f"f{bits}", f"u{bits}"
    root, fma = f"__builtin_sqrt{suffix}", f"__builtin_fma{suffix}"
    sign, top = f"__builtin_signbit{suffix}", f"((T)1 << {bits - 1})"
    for name, symbol in _ARITHMETIC.items():
        define(f"{name}.{f}", f, f"{f} {f}", f"a {symbol} b")
    define(f"div.{f} div.full.{f} div.approx.{f}", f, f"{f} {f}", "a / b")
    define(f"fma.{f}", f, f"{f} {f} {f}", f"{fma}(a, b, c)")
    define(f"rcp.{f} rcp.approx.{f}", f, f, "1 / a")
    define(f"sqrt.{f} sqrt.approx.{f}", f, f, f"{root}(a)")
    define(f"rsqrt.approx.{f}", f, f, f"1 / {root}(a)")
    define(f"neg.{f}", u, u, f"a ^ {top}")
    define(f"abs.{f}", u, u, f"a & ~{top}")
    define(f"copysign.{f}", u, f"{u} {u}", f"(b & ~{top}) | (a & {top})")  # the sign of the first
    # The other operand where one is NaN; +0 is above -0.
    number = "a != a ? b : b != b ? a :"
    define(f"max.{f}", f, f"{f} {f}", f"{number} a > b ? a : a < b ? b : {sign}(a) ? b : a")
    define(f"min.{f}", f, f"{f} {f}", f"{number} a < b ? a : a > b ? b : {sign}(a) ? a : b")
    nan = "a != a ? a : b != b ? b :"
    define(f"max.NaN.{f}", f, f"{f} {f}", f"{nan} a > b ? a : b")
    define(f"min.NaN.{f}", f, f"{f} {f}", f"{nan} a < b ? a : b")
for name, call in (("ex2", "exp2"), ("lg2", "log2")):
    define(f"{name}.approx.f32", "f32", "f32", f"(f32){call}((f64)a)")
    define(f"{name}.approx.ftz.f32", "f32", "f32", f"flush((f32){call}((f64)flush(a)))")
for name in ("tanh", "sin", "cos"):
    define(f"{name}.approx.f32", "f32", "f32", f"(f32){name}((f64)a)")
# .ftz: subnormal operands and results are zeros of their sign.
for name, symbol in {**_ARITHMETIC, "div.full": "/"}.items():
    define(f"{name}.ftz.f32", "f32", "f32 f32", f"flush(flush(a) {symbol} flush(b))")
define("fma.ftz.f32", "f32", "f32 f32 f32", "flush(__builtin_fmaf(flush(a), flush(b), flush(c)))")
define("abs.ftz.f32", "f32", "f32", "__builtin_fabsf(flush(a))")
define("neg.ftz.f32", "f32", "f32", "-flush(a)")
define("rcp.approx.ftz.f32", "f32", "f32", "flush(1 / flush(a))")
define("rsqrt.approx.ftz.f32", "f32", "f32", "flush(1 / __builtin_sqrtf(flush(a)))")
define("rcp.approx.ftz.f64", "u64", "u64", "rcp_high(a)")
# Two float32 in a register of 64 bits (sm_100).
_PAIRS = {name: f"a{{0}} {symbol} b{{0}}" for name, symbol in _ARITHMETIC.items()}
for name, text in {**_PAIRS, "fma": "__builtin_fmaf(a{0}, b{0}, c{0})"}.items():
    operands = "u64 u64 u64" if name == "fma" else "u64 u64"
    define(f"{name}.f32x2", "u64", operands, f"PAIR({text.format('_0')}, {text.format('_1')})")

define = _section("Half Precision Floating-Point Instructions")
_HALVES = {"bf16": ("float_to_bf16", "bf16_to_float"), "f16": ("float_to_half", "half_to_float")}
for kind, (narrow, widen) in _HALVES.items():
    for name, symbol in _ARITHMETIC.items():
        low, high = (
            f"{narrow}({widen}({part.format('a')}) {symbol} {widen}({part.format('b')}))"
            for part in ("{} & 65535", "{} >> 16")
        )
        define(f"{name}.{kind}", "u32", "u32 u32", low)
        define(f"{name}.{kind}x2", "u32", "u32 u32", f"{low} | {high} << 16")
    # The product is exact in float64, and so is the sum but for exponents far apart.
    low, high = (
        f"{narrow}((f32)((f64){widen}(a {part}) * {widen}(b {part}) + {widen}(c {part})))"
        for part in ("& 65535", ">> 16")
    )
    define(f"fma.{kind}", "u32", "u32 u32 u32", low)
    define(f"fma.{kind}x2", "u32", "u32 u32 u32", f"{low} | {high} << 16")
    define(f"neg.{kind}", "u32", "u32", "a ^ 0x8000")
    define(f"neg.{kind}x2", "u32", "u32", "a ^ 0x80008000")

define = _section("Mixed Precision Floating-Point Instructions")
for kind, (_, widen) in _HALVES.items():
    for name in ("add", "sub"):
        define(f"{name}.f32.{kind}", "f32", "u32 f32", f"{widen}(a) {_ARITHMETIC[name]} b")
    define(f"fma.f32.{kind}", "f32", "u32 u32 f32", f"__builtin_fmaf({widen}(a), {widen}(b), c)")

# --- Comparison and Selection Instructions -----------------------------------------------------------------------

define = _section("Comparison and Selection Instructions")
for bits in (32, 64):
    u, s, f = f"u{bits}", f"s{bits}", f"f{bits}"
    ordered = "(a == a) & (b == b)"
    for name, symbol in {"eq": "==", **_ORDER}.items():
        define(f"setp.{name}.{f}", "pred", f"{f} {f}", f"a {symbol} b")
        define(f"setp.{name}u.{f}", "pred", f"{f} {f}", f"!({ordered}) | (a {symbol} b)")
        for t in (u, s):
            define(f"setp.{name}.{t}", "pred", f"{t} {t}", f"a {symbol} b")
    define(f"setp.eq.b{bits}", "pred", f"{u} {u}", "a == b")
    define(f"setp.ne.b{bits} setp.ne.s{bits} setp.ne.u{bits}", "pred", f"{u} {u}", "a != b")
    define(f"setp.ne.{f}", "pred", f"{f} {f}", f"{ordered} & (a != b)")
    define(f"setp.neu.{f}", "pred", f"{f} {f}", "!(a == b)")
    define(f"setp.num.{f}", "pred", f"{f} {f}", ordered)
    define(f"setp.nan.{f}", "pred", f"{f} {f}", f"!({ordered})")
    define(f"selp.b{bits} selp.u{bits} selp.s{bits} selp.f{bits}", u, f"{u} {u} pred", "c ? a : b")
for name, symbol in {"eq": "==", "ne": "!=", **_ORDER}.items():
    define(f"setp.{name}.s16", "pred", "u32 u32", f"(s16)a {symbol} (s16)b")
    define(f"setp.{name}.u16 setp.{name}.b16", "pred", "u32 u32", f"(u16)a {symbol} (u16)b")
define("selp.b16 selp.u16 selp.s16", "u16", "u32 u32 pred", "c ? a : b")

define = _section("Half Precision Comparison Instructions")
for kind, (_, widen) in _HALVES.items():
    first, second = f"{widen}(a & 65535)", f"{widen}(b & 65535)"
    for name, symbol in {"eq": "==", **_ORDER}.items():
        define(f"setp.{name}.{kind}", "pred", "u32 u32", f"{first} {symbol} {second}")
        nan = f"({first} != {first}) | ({second} != {second})"
        define(f"setp.{name}u.{kind}", "pred", "u32 u32", f"{nan} | ({first} {symbol} {second})")
    define(f"setp.neu.{kind}", "pred", "u32 u32", f"!({first} == {second})")
    # Of a pair, for a predicate each (decode.py): the lower half as it is, the upper one shifted down.
    define(f"shift.upper.{kind}x2", "u32", "u32", "a >> 16")

# --- Logic and Shift Instructions --------------------------------------------------------------------------------

define = _section("Logic and Shift Instructions")
for bits in (32, 64):
    u, s = f"u{bits}", f"s{bits}"
    for name, symbol in _BITWISE.items():
        define(f"{name}.b{bits}", u, f"{u} {u}", f"a {symbol} b")
    define(f"not.b{bits}", u, u, "~a")
    # Shifts by more than the width are clamped to it.
    define(f"shl.b{bits}", u, f"{u} u32", f"b > {bits - 1} ? 0 : a << b")
    define(f"shr.b{bits} shr.u{bits}", u, f"{u} u32", f"b > {bits - 1} ? 0 : a >> b")
    define(f"shr.s{bits}", s, f"{s} u32", f"b > {bits - 1} ? (a < 0 ? (T)-1 : 0) : a >> b")
for name, symbol in _BITWISE.items():
    define(f"{name}.b16", "u16", "u32 u32", f"a {symbol} b")
    define(f"{name}.pred", "u32", "u32 u32", f"a {symbol} b")
define("not.b16", "u16", "u32", "~a")
define("not.pred", "u32", "u32", "~a")
define("shl.b16", "u16", "u32 u32", "b > 15 ? 0 : a << b")
define("shr.b16 shr.u16", "u16", "u32 u32", "b > 15 ? 0 : (a & 65535) >> b")
define("shr.s16", "u16", "u32 u32", "(s16)a >> (b > 15 ? 15 : b)")
define("lop3.b32", "u32", "u32 u32 u32 u32", "lop3(a, b, c, d)")
_JOINED = "((u64)b << 32 | a)"
define("shf.l.wrap.b32", "u32", "u32 u32 u32", f"(u32)(({_JOINED} << (c & 31)) >> 32)")
define("shf.r.wrap.b32", "u32", "u32 u32 u32", f"(u32)({_JOINED} >> (c & 31))")

# --- Data Movement and Conversion Instructions -------------------------------------------------------------------

define = _section("Data Movement and Conversion Instructions")
for bits in (32, 64):
    define(f"mov.b{bits} mov.u{bits} mov.s{bits} mov.f{bits}", f"u{bits}", f"u{bits}", "a")
define("mov.b16 mov.u16 mov.s16", "u16", "u32", "a")
define("mov.pred", "u32", "u32", "a")
define("cvta.to.global.u64 cvta.to.shared.u64", "u64", "u64", "a")
define("prmt.b32", "u32", "u32 u32 u32", "prmt(a, b, c)")
# Between integers: cut or extended by the sign of the source; 8 bits live in a register of 16.
for to in (8, 16, 32, 64):
    for of in (8, 16, 32, 64):
        for to_sign in "su":
            for of_sign in "su":
                text = f"(({to_sign}{to})(({of_sign}{of})a))"
                target, source = f"u{max(to, 16)}", f"u{max(of, 32)}"
                define(f"cvt.{to_sign}{to}.{of_sign}{of}", target, source, text)
_ROUND = {"rni": "rint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}
_LIMITS = {"s32": ("-2147483648.0", "2147483647.0"), "u32": ("0.0", "4294967295.0")}
for f in ("f32", "f64"):
    for mode, call in _ROUND.items():
        call = f"__builtin_{call}"
        define(f"cvt.{mode}.{f}.{f}", f, f, f"{call}(a)")
        for t, (least, most) in _LIMITS.items():  # saturating, NaN is 0
            clamped = f"__builtin_fmax({least}, __builtin_fmin({most}, {call}((f64)a)))"
            define(f"cvt.{mode}.{t}.{f}", t, f, f"a != a ? 0 : ({t}){clamped}")
    for t in ("s32", "u32", "s64", "u64"):
        define(f"cvt.rn.{f}.{t}", f, t, "a")
define("cvt.f64.f32", "f64", "f32", "a")
define("cvt.rn.f32.f64", "f32", "f64", "a")
for kind, (narrow, widen) in _HALVES.items():
    define(f"cvt.f32.{kind}", "f32", "u32", f"{widen}(a)")
    define(f"cvt.f64.{kind}", "f64", "u32", f"{widen}(a)")
    define(f"cvt.rn.{kind}.f32", "u32", "f32", f"{narrow}(a)")
    define(f"cvt.rn.{kind}x2.f32", "u32", "f32 f32", f"{narrow}(a) << 16 | {narrow}(b)")
define("cvt.rn.f16.f64", "u32", "f64", "double_to_half(a)")
# To tf32: 13 bits fewer, halves away from zero (rna) or to even (rn).
_FINITE = "(a & 0x7f800000) == 0x7f800000 ? a :"
define("cvt.rna.tf32.f32", "u32", "u32", f"{_FINITE} (a + 0x1000) & 0xffffe000")
define("cvt.rn.tf32.f32", "u32", "u32", f"{_FINITE} (a + 0xfff + ((a >> 13) & 1)) & 0xffffe000")
