"""A forward interpreted from its bytecode: plain values are computed, what is computed with tensors becomes a graph.

Nothing of the user's is run, and no tensor is made: a forward cannot notice that it was looked at, nor can a thread.
What a forward reads is either known to stay (constants, functions of PyTorch) or leaves a guard; what cannot be known
ends the interpretation with a reason that names the line.
"""

from __future__ import annotations

import linecache
import os
import types

from .calls import Calls
from .guards import Look
from .values import ModuleAt, NotTraceable, Symbol


class Interpreter(Calls):
    """The forward of one module and what it calls, in one mode; `graph` is what becomes of it."""

    def __init__(self, training: bool, look: Look) -> None:
        super().__init__()
        self.training, self.look = training, look
        self.gives_tensor = False

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
            self.graph.output(self.argument(result))
            self.gives_tensor = isinstance(result, Symbol) and self.is_tensor(result)
        except NotTraceable as error:
            raise NotTraceable(f"{error}{self._where()}") from None
        except RecursionError:
            raise NotTraceable("its forward calls itself without an end") from None

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
