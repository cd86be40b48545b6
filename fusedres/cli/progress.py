"""A progress bar on a terminal; a line now and then elsewhere, or where tqdm is not installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator

LINES = 6


class Progress:
    """Iterate over `range(steps)`; `tell` says what the step is like. `lines`: how many are printed off a terminal."""

    def __init__(self, steps: int, lines: int = LINES) -> None:
        self._steps = steps
        self._every = max(1, steps // lines)
        self._said = ""
        self._bar = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ModuleNotFoundError:
                return
            self._bar = tqdm(total=steps, unit="step", dynamic_ncols=True)

    def __iter__(self) -> Iterator[int]:
        for index in range(self._steps):
            yield index
            if self._bar is not None:
                self._bar.update()
            elif index in (0, self._steps - 1) or (index + 1) % self._every == 0:
                words = f"  step {index + 1:>{len(str(self._steps))}}/{self._steps}  {self._said}"
                print(words, flush=True)
        self.close()

    def close(self) -> None:
        """Leave the bar's line: before the end it is where the cursor stands."""
        if self._bar is not None:
            self._bar.close()

    def tell(self, words: str) -> None:
        self._said = words
        if self._bar is not None:
            self._bar.set_postfix_str(words)
