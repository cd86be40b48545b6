"""A forward interpreted from its bytecode: plain values are computed, what is computed with tensors becomes a graph.

Nothing of the user's is run, and no tensor is made: a forward cannot notice that it was looked at, nor can a thread.
What a forward reads is either known to stay (constants, functions of PyTorch) or leaves a guard; what cannot be known
ends the interpretation with a reason that names the line.
"""

from __future__ import annotations

import linecache
import os
import types
from typing import Any

from .calls import Calls
from .guards import Guard, Look
from .values import ModuleAt, NotTraceable, Symbol


class Interpreter(Calls):
    """The forward of one module and what it calls, in one mode; `graph` is what becomes of it."""

    def __init__(self, training: bool, look: Look) -> None:
        super().__init__()
        self.training, self.look = training, look
        self._result: Any = None

    def run(self, module: ModuleAt, function: types.FunctionType, inputs: tuple[str, ...]) -> None:
        """Interpret `function(module, *inputs)`, each of the inputs a Tensor.

        Raises:
            NotTraceable: with the line where it came to an end.
        """
        for path, below in module.module.named_modules(remove_duplicate=False):
            self._ours.setdefault(id(below), path)
        placeholders = [
            Symbol(self.graph.create_node("placeholder", name), True) for name in inputs
        ]
        try:
            result = self.enter(function, [module, *placeholders], {})
            self._result, count = result, len(self.guards)
            self.guard_children()
            end = self.graph.output(self.argument(result))
            self.give(result)
            if self.last is not None:
                node, guards, reason = self.last
                if end.prev is not node or guards != count:
                    raise NotTraceable(reason)
        except NotTraceable as error:
            raise NotTraceable(f"{error}{self._where()}") from None
        except RecursionError:
            raise NotTraceable("its forward calls itself without an end") from None
        except Exception as error:
            # Python itself, on the way: an iterator of other lengths, arguments that a builtin does not take.
            text = f"it raises {type(error).__name__}: {error}"
            raise NotTraceable(f"{text}{self._where()}") from None
        finally:
            self.frames.clear()  # they know this, in a circle

    def why_tensor(self) -> tuple[Guard, ...] | None:
        """What it depends on that the forward gives a Tensor, beside its guards; None where it need not give one."""
        before, self.guards = self.guards, {}
        try:
            is_one = isinstance(self._result, Symbol) and self.is_tensor(self._result)
            return tuple(self.guards) if is_one else None
        finally:
            self.guards = before

    def _where(self) -> str:
        """The line of the user's code that stands innermost."""
        for frame in reversed(self.frames):
            name = frame.code.co_filename
            if f"{os.sep}torch{os.sep}" not in name or len(self.frames) == 1:
                text = linecache.getline(name, frame.line).strip()
                quoted = f": `{text[:70]}`" if text else ""
                advice = (
                    "; write torch._assert(condition, text)" if text.startswith("assert ") else ""
                )
                return f" ({os.path.basename(name)}:{frame.line}{quoted}){advice}"
        return ""
