"""Words that messages share."""

from __future__ import annotations

from typing import Any

# Letters whose names begin with a vowel: an LSTM, but a CNN.
_SPELT_WITH_A_VOWEL = "AEFHILMNORSX"


def a_type(value: Any) -> str:
    """The type of a value with its article: "a str", "an int", "an LSTM"."""
    return with_article(type(value).__name__)


def printable(text: str) -> str:
    """A text in which what a terminal would obey, or cannot be encoded, is written out: "\\x1b"."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def with_article(name: str) -> str:
    """A name with its article."""
    vowels = _SPELT_WITH_A_VOWEL if name[:2].isupper() else "AEIOaeio"
    return f"{'an' if name[:1] in vowels else 'a'} {name}"
