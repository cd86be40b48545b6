"""The pictures of docs/how_it_works.md, from the numbers that the code is held to: `python docs/site/pictures.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fusedres.benchmarks.floors import OPERATORS
from fusedres.benchmarks.plots import COLOURS
from fusedres.swap.estimate import passes

PICTURES = Path(__file__).resolve().parents[1] / "pictures"
TWO_BYTES = 2  # an element of bfloat16
EAGER_ADD = 3  # passes: two gradients are read, their sum is written
PATTERNS = ("BN+ReLU", "BN+add+ReLU", "BN+BN+add+ReLU", "add+BN+ReLU")
TAILS = {
    "BN+add+ReLU": "bn_add_relu", "BN+add+SiLU": "bn_add_silu", "BN+BN+add+ReLU": "bn_bn_add_relu",
}  # fmt: skip

Bar = tuple[str, str, float]  # whose, its colour, passes


def patterns() -> list[tuple[str, list[Bar]]]:
    """Passes of a training step, as `explain` estimates them and the benchmarks count them."""
    found = []
    for pattern in PATTERNS:
        eager, fused = passes(pattern, True, TWO_BYTES)
        bars = [("eager", COLOURS["eager"], eager), ("fused", COLOURS["fusedres"], fused)]
        found.append((pattern.replace("+", " + "), bars))
    return found


def forks() -> list[tuple[str, list[Bar]]]:
    """Passes of a tail's backward, with the sum of the two gradients that come to its output."""
    found = []
    for title, name in TAILS.items():
        apart = OPERATORS[name].passes("backward", TWO_BYTES) + EAGER_ADD
        together = OPERATORS[f"{name}_fork"].passes("backward", TWO_BYTES)
        bars = [
            ("autograd adds", COLOURS["eager"], apart),
            ("the tail adds", COLOURS["fusedres"], together),
        ]
        found.append((title.replace("+", " + "), bars))
    return found


def svg(title: str, groups: Sequence[tuple[str, list[Bar]]]) -> str:
    """Horizontal bars in groups, each with its number."""
    left, scale, height, bar, gap = 200, 18.0, 44, 20, 22
    lines, y = [], height
    for name, bars in groups:
        middle = y + bar * len(bars) / 2
        lines.append(f'<text x="{left - 10}" y="{middle + 5:g}" text-anchor="end">{name}</text>')
        for whose, colour, value in bars:
            width = value * scale
            lines.append(
                f'<rect x="{left}" y="{y}" width="{width:g}" height="{bar - 3}" fill="{colour}"/>'
            )
            lines.append(
                f'<text x="{left + width + 6:g}" y="{y + 13}" class="small">{value:.3g} {whose}</text>'
            )
            y += bar
        y += gap
    widest = max(value for _, bars in groups for *_, value in bars)
    size = f"{left + widest * scale + 130:g} {y}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" font-family="sans-serif" font-size="14">',
            f"<title>{title}</title>",
            "<style>.small { font-size: 12px }</style>",
            '<rect width="100%" height="100%" fill="#ffffff"/>',
            f'<text x="12" y="24" font-weight="bold">{title}</text>',
            *lines,
            "</svg>\n",
        ]
    )


def pictures() -> dict[str, str]:
    """The text of each file."""
    return {
        "passes.svg": svg("Passes over memory in a training step (bfloat16)", patterns()),
        "fork.svg": svg("Passes of the backward at a fork (bfloat16)", forks()),
    }


if __name__ == "__main__":
    for name, text in pictures().items():
        (PICTURES / name).write_text(text, encoding="utf-8")
