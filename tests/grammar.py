"""Programs for hypothesis: the source of a block as people write them, and what is done to it between its calls.

Every statement takes `h` [N, 4, H, W] to another `h` of that shape, next to `x`, what the block was called with, and
`r`, an `h` from before; so any of them may follow, and stand inside, any other.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import strategies as st

from . import grammar_words as words

HEADER = """\
import contextlib, enum, functools, itertools, math, os, random, types
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SEEN, STATE = [], {'calls': 0}
Pair = namedtuple('Pair', ('first', 'second'))

class Base(nn.Module):
    scale = 2

    def shared(self, t):
        return F.relu(t) * self.scale
"""
_DEEPEST = 2  # statements within statements


@dataclass(frozen=True)
class Step:
    """A call of the block: what is done before it, the mode, whether a backward follows, and whether the fused model is
    fused again afterwards."""

    flip: str = ""
    training: bool = True
    grad: bool = True
    again: bool = False

    def __str__(self) -> str:
        mode = ("train" if self.training else "eval") + ("" if self.grad else ", no_grad")
        lines = [*self.flip.split("\n"), f"-> {mode}", *["fuse_"] * self.again]
        return "".join(f"# {line}\n" for line in lines if line)


@dataclass(frozen=True)
class Program:
    """The source of a module with a class Block, and the steps."""

    source: str = field(repr=False)  # it is in the note
    steps: tuple[Step, ...] = field(repr=False)

    def __str__(self) -> str:
        return self.source + "\n" + "".join(map(str, self.steps))


@dataclass
class Class:
    """A class that is being written; `path`: where its instance stands, seen from the model."""

    name: str
    path: str
    body: list[str] = field(default_factory=list)
    init: list[str] = field(default_factory=list)

    def source(self, forward: list[str]) -> list[str]:
        init = ["def __init__(self):", "    super().__init__()", *indented(self.init)]
        return [f"class {self.name}(Base):", *indented([*self.body, *init, *forward]), ""]


def indented(lines: list[str]) -> list[str]:
    return ["    " + line for text in lines for line in text.split("\n")]


class Writer:
    """Writes a program, at each choice as hypothesis decides."""

    def __init__(self, draw: Callable) -> None:
        self.draw = draw
        self.count = self.depth = 0
        self.top: list[str] = []
        self.flips: list[str] = []  # of what is read
        self.others: list[str] = []  # of children, and of the whole
        self.cls = Class("Block", "model")

    def one(self, options):
        return self.draw(st.sampled_from(options))

    def number(self) -> str:
        self.count += 1
        return str(self.count)

    def write(self, term: words.Term, value: str = "", arg: str = "h") -> str:
        """An expression, with all that it needs."""
        number = self.number()

        def filled(text: str) -> str:
            names = {"VALUE": value, "ME": self.cls.path, "CLASS": self.cls.name}
            text = re.sub(r"_N\b", f"_{number}", text)
            return re.sub(r"\b(VALUE|ME|CLASS)\b", lambda found: names[found[0]], text)

        for lines, text in ((self.top, term.top), (self.cls.body, term.body), (self.cls.init, term.init)):  # fmt: skip
            if text:
                lines.append(filled(text))
        self.flips += map(filled, term.flips)
        return filled(term.text).replace("ARG", arg)

    # --- expressions ------------------------------------------------------------------------------------------------

    def condition(self) -> str:
        text = self.write(self.one(words.CONDITIONS), self.one(("True", "False")))
        form = self.one(("{}", "{}", "{}", "not {}", "({} and self.training)", "({} or FLAG)"))
        if "FLAG" in form and "FLAG = False" not in self.top:
            self.top.append("FLAG = False")
            self.flips.append("FLAG = True")
        return form.format(text)

    def value(self) -> str:
        return self.write(self.one(words.NUMBERS), self.one(("2", "0.5", "1")))

    def activated(self, arg: str) -> str:
        return self.write(self.one(words.ACTIVATIONS), self.one(("False", "True")), arg)

    def child(self, made: str, stem: str, flips: tuple[str, ...]) -> str:
        """A child, under one of the ways to hold and to find it."""
        name = f"{stem}_{self.number()}"
        held, found = self.one(
            (
                ("{}", "self.{}"), ("{}", "self.{}"), ("{}", "self.{}"), ("{}", "getattr(self, '{}')"),
                ("nn.ModuleList([{}])", "self.{}[0]"), ("nn.ModuleDict({{'a': {}}})", "self.{}['a']"),
                ("nn.Sequential({})", "self.{}[-1]"), ("nn.Sequential({})", "self.{}"),
            )
        )  # fmt: skip
        held = held if held == "{}" else held.format(made)
        self.cls.init.append(f"self.{name} = {made if held == '{}' else held}")
        inner = {"nn.S": "[0]", "nn.ModuleL": "[0]", "nn.ModuleD": "['a']"}
        end = next((end for start, end in inner.items() if held.startswith(start)), "")
        path = f"{self.cls.path}.{name}{end}"
        self.others += [
            re.sub(r"ME\.(NORM|CONV)", path, flip) for flip in (self.one(flips), self.one(flips))
        ]
        return found.format(name)

    def norm(self) -> str:
        options = (
            "",
            "",
            "",
            "momentum=None",
            "affine=False",
            "track_running_stats=False",
            "eps=0.1",
        )
        return self.child(f"nn.BatchNorm2d(4, {self.one(options)})", "bn", words.TO_NORMS)

    def conv(self) -> str:
        made = self.one(("1", "3, padding=1", "1, bias=False"))
        return self.child(f"nn.Conv2d(4, 4, {made})", "conv", words.TO_CONVOLUTIONS)

    def normed(self, arg: str) -> str:
        """A BatchNorm of something, most often of a convolution."""
        form = self.one(("conv", "conv", "alone", "sequential", "part", "functional", "twice"))
        if form == "conv":
            return f"{self.norm()}({self.conv()}({arg}))"
        if form == "alone":
            return f"{self.norm()}({arg})"
        if form == "twice":
            again = self.one((True, False))
            first = self.norm()
            return f"{first if again else self.norm()}({first}({arg}))"
        number = self.number()
        if form == "functional":
            self.cls.init.append(f"self.bn_{number} = nn.BatchNorm2d(4)")
            bn = f"self.bn_{number}"
            return f"F.batch_norm({arg}, {bn}.running_mean, {bn}.running_var, {bn}.weight, {bn}.bias, {bn}.training)"
        made = "nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))"
        if form == "part":
            made = f"Part_{number}()"
            self.top.append(
                f"class Part_{number}(Base):\n    def __init__(self):\n        super().__init__()\n"
                "        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)\n"
                "    def forward(self, t):\n        return self.bn(self.conv(t))\n"
            )
            self.others.append(f"Part_{number}.forward = lambda self, t: self.bn(t) * 2")
        self.cls.init.append(f"self.part_{number} = {made}")
        self.others += [
            f"{self.cls.path}.part_{number}.append(nn.Tanh())"
            if form == "sequential"
            else f"{self.cls.path}.part_{number}.bn = nn.Identity()",
            f"{self.cls.path}.part_{number}.register_forward_hook(lambda m, a, o: SEEN.append(o))",
        ]
        return f"self.part_{number}({arg})"

    def other(self) -> str:
        """Something to add."""
        form = self.one(("x", "r", "conv", "normed", "mean", "size", "self"))
        if form == "conv":
            return f"{self.conv()}(x)"
        if form == "normed":
            return self.normed("x")
        texts = {"mean": "x.mean((2, 3), keepdim=True)", "size": "x.size(0)", "self": "h"}
        return texts.get(form, form)

    # --- statements -------------------------------------------------------------------------------------------------

    def statements(self, most: int = 2) -> list[str]:
        count = self.draw(st.integers(1, most))
        return [line for _ in range(count) for line in self.statement()]

    def statement(self) -> list[str]:
        kinds = (*_PLAIN, *_AROUND, *_AROUND) if self.depth < _DEEPEST else _PLAIN
        return self.one(kinds)(self)

    def inside(self, most: int = 2) -> list[str]:
        self.depth += 1
        lines = self.statements(most)
        self.depth -= 1
        return indented(lines)

    def block(self) -> list[str]:
        return ["h = " + self.activated(self.normed("h"))]

    def tail(self) -> list[str]:
        made, other = self.normed("h"), self.other()
        spelled = self.one((
            ["h = A + B"], ["h = B + A"], ["h = A", "h += B"], ["h = torch.add(A, B)"], ["h = (A).add_(B)"],
            ["h = A", "h.add_(B)"], ["h = torch.add(B, A, alpha=1)"], ["h = (A).add(B)"], ["t = B", "h = A + t"],
            ["t = A", "h = B", "h = t + h"], ["t = B", "t += A", "h = t"], ["t = B", "h = t.add_(A)"],
            ["h = F.relu(A + B)"], ["h = F.relu(A + B)"], ["h = B", "h += A", "h = F.relu(h)"],
            ["h = sum([A, B])"], ["h = A - B"], ["h = torch.add(A, B, alpha=2)"],
        ))  # fmt: skip
        lines = [
            re.sub(r"\b[AB]\b", lambda m: made if m[0] == "A" else other, line) for line in spelled
        ]
        return [*lines, "h = " + self.activated("h")] if self.one((True, True, False)) else lines

    def preactivation(self) -> list[str]:
        return [f"h = {self.conv()}({self.activated(f'{self.norm()}(h)')}) + h"]

    def scaled(self) -> list[str]:
        forms = ("h = h * {}", "h = h + {}", "h *= {}", "h += {}", "h.mul_({})", "h = torch.mul(h, {})")  # fmt: skip
        return [self.one(forms).format(self.value())]

    def norm_alone(self) -> list[str]:
        return ["h = " + self.normed("h")]

    def activation_alone(self) -> list[str]:
        return ["h = " + self.activated("h")]

    def kept(self) -> list[str]:
        return [self.one(("r = h", "r = h.clone()", "r = x", "r = h.detach()"))]

    def simple(self) -> list[str]:
        return self.one(words.SIMPLE)

    def outside(self) -> list[str]:
        return self.one(words.OUTSIDE)

    def dropped(self) -> list[str]:
        made = self.one(("Dropout(0.0)", "Dropout(0.5)", "Dropout2d(0.5)", "Identity()"))
        name = f"drop_{self.number()}"
        self.cls.init.append(f"self.{name} = nn.{made}")
        self.flips += [f"{self.cls.path}.{name}.{to}" for to in ("p = 0.0", "p = 0.7", "eval()")]
        arg = self.one(("h", self.normed("h")))
        return ["h = " + self.activated(f"self.{name}({arg})")]

    def drop_path(self) -> list[str]:
        return [
            f"if self.training and {self.value()} > 0:",
            "    h = h * (torch.rand(h.shape[0], 1, 1, 1) < 0.5)",
        ]

    def layers(self) -> list[str]:
        """A list of layers, and a way through it."""
        name, kind = f"layers_{self.number()}", self.one(("ModuleList", "Sequential", "ModuleDict"))
        some = [
            self.one(("nn.BatchNorm2d(4)", "nn.ReLU()", "nn.Conv2d(4, 4, 1)", "nn.Identity()"))
            for _ in range(3)
        ]
        path = f"{self.cls.path}.{name}"
        if kind == "ModuleDict":
            held = "dict(a={}, b={}, c={})".format(*some)
            ways = words.DICT_LOOPS
            flips = (f"{path}['d'] = nn.Tanh()", f"{path}['b'] = nn.Hardtanh()", f"del {path}['c']")
        else:
            held = f"[{', '.join(some)}]" if kind == "ModuleList" else ", ".join(some)
            ways = (*words.LIST_LOOPS, *(words.SEQUENTIAL_LOOPS if kind == "Sequential" else ()))
            flips = (f"{path}.append(nn.Tanh())", f"{path}[1] = nn.Hardtanh()", f"del {path}[2]")
        self.cls.init.append(f"self.{name} = nn.{kind}({held})")
        self.flips += flips
        return [line.replace("LAYERS", f"self.{name}") for line in self.one(ways)]

    def branch(self) -> list[str]:
        form = self.one(("if", "if", "else", "expression", "return", "assert"))
        condition = self.condition()
        if form == "expression":
            return [f"h = {self.activated('h')} if {condition} else {self.normed('h')}"]
        if form == "return":
            return [f"if {condition}:", "    return h"]
        if form == "assert":
            return [f"assert {condition} or True"]
        lines = [f"if {condition}:", *self.inside()]
        return [*lines, "else:", *self.inside()] if form == "else" else lines

    def context(self) -> list[str]:
        ways = (
            "contextlib.nullcontext",
            "torch.no_grad",
            "torch.enable_grad",
            "torch.inference_mode",
        )
        return [f"with {self.one(ways)}():", *self.inside()]

    def attempt(self) -> list[str]:
        raised = self.one(([], ["    h = h + STATE['absent']"], ["    h.view(7, -1)"]))
        return ["try:", *self.inside(), *raised, "except (KeyError, RuntimeError):", *self.inside(1)]  # fmt: skip

    def loop(self) -> list[str]:
        name = f"TIMES_{self.number()}"
        self.top.append(f"{name} = 2")
        self.flips.append(f"{name} = 1")
        self.flips += ["range = lambda n: ()", "enumerate = lambda _: ()"]
        head = self.one((f"for _ in range({name}):", f"for i, t in enumerate([x] * {name}):"))
        return [head, *self.inside(1)]

    def function(self) -> list[str]:
        """Statements in a function of their own."""
        name = f"stage_{self.number()}"
        form = self.one(("method", "module", "nested", "default", "super", "wrapped", "static"))
        lines = ["    r = h", *self.inside(), "    return h"]
        if form == "nested":
            return [f"def {name}(h, r=None):", *lines, f"h = {name}(h)"]
        if form == "module":
            self.top += [f"def {name}(self, h, x):", *lines]
            self.flips.append(f"def {name}(self, h, x):\n    return h * 2")
            self.flips.append(f"{name}.__code__ = (lambda s, h, x: h * 3).__code__")
            return [f"h = {name}(self, h, x)"]
        if form == "super":
            self.top += [f"def {name}(self, h, x):", *lines, f"Base.{name} = {name}"]
            self.flips.append(f"Base.{name} = lambda self, h, x: h * 2")
            return [f"h = super().{name}(h, x)"]
        if form == "wrapped":
            self.top.append(
                f"def wrap_{name}(f):\n    @functools.wraps(f)\n    def wrapped(*args, **kwargs):\n"
                "        return f(*args, **kwargs)\n    return wrapped"
            )
            self.cls.body.append(f"@wrap_{name}")
        if form == "static":
            self.cls.body.append("@staticmethod")
        head = f"def {name}(self, h, x{', *, flag=True' if form == 'default' else ''}):"
        self.cls.body += [head, *lines]
        self.flips += [
            f"{self.cls.name}.{name}.__code__ = (lambda s, h, x: h * 2).__code__",
            f"{self.cls.name}.{name} = "
            + ("staticmethod(lambda s, h, x: h)" if form == "static" else "lambda s, h, x, **_: h"),
            f"{self.cls.path}.{name} = lambda *args, **_: args[-2] * 3",
        ]
        return [f"h = self.{name}({'self, ' if form == 'static' else ''}h, x)"]

    def module(self) -> list[str]:
        """Statements in the forward of a child."""
        number, outer = self.number(), self.cls
        self.cls = Class(f"Stage_{number}", f"{outer.path}.stage_{number}")
        forward = [
            "def forward(self, x):",
            "    h = r = x",
            *self.inside(),
            *indented(["return h"]),
        ]
        self.top += self.cls.source(forward)
        self.flips += [
            f"{self.cls.name}.forward = lambda self, x: x * 2",
            f"{self.cls.path} = nn.Identity()",
            f"{self.cls.path}.train(not {self.cls.path}.training)",
            f"{self.cls.path}.register_forward_hook(lambda m, a, o: SEEN.append(o))",
            f"{self.cls.path}.register_forward_pre_hook(lambda m, a: SEEN.append(a[0]))",
        ]
        self.cls = outer
        self.cls.init.append(f"self.stage_{number} = Stage_{number}()")
        form = self.one(("h", "h", self.normed("h"), self.activated("h")))
        return [f"h = self.stage_{number}({form})", *self.one(([], ["h = F.relu(h + x)"]))]

    # --- the whole --------------------------------------------------------------------------------------------------

    def program(self) -> Program:
        forward = ["def forward(self, x):", "    h = r = x", *indented(self.statements(4))]
        forward += indented([self.one(words.RETURNS)])
        source = "\n".join([HEADER, *self.top, *self.cls.source(forward)])
        reads, others = self.flips, self.others
        self.flips = []
        self.write(words.Term("", flips=words.TO_BLOCKS))
        pools = [pool for pool in (reads, reads, reads, others, [*self.flips, "COPY"]) if pool]
        steps = [Step(), Step(training=False)]
        for _ in range(self.draw(st.integers(1, 6))):
            modes = self.one((True, False)), self.one((True, True, True, False))
            steps.append(Step(self.one(self.one(pools)), *modes, self.one((False, True))))
        return Program(source, tuple(steps))


_PLAIN = (Writer.block, Writer.tail, Writer.block, Writer.tail, Writer.preactivation, Writer.layers, Writer.norm_alone,
          Writer.activation_alone, Writer.scaled, Writer.kept, Writer.simple, Writer.dropped, Writer.drop_path,
          Writer.outside)  # fmt: skip
_AROUND = (Writer.branch, Writer.branch, Writer.branch, Writer.function, Writer.function, Writer.module, Writer.context,
           Writer.attempt, Writer.loop)  # fmt: skip


@st.composite
def programs(draw) -> Program:
    """A program; `hypothesis` makes it smaller where it fails."""
    return Writer(draw).program()
