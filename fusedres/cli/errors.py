"""Errors that the user can put right, and what finds them."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType

from ..words import printable

# Where a package is installed under another name than it is imported by.
DISTRIBUTIONS = {"sklearn": "scikit-learn", "PIL": "pillow"}
# Letters of what an error says.
LONGEST = 500


class CommandError(Exception):
    """Printed as one line, without a traceback; the exit status is 2."""


class Interrupted(Exception):
    """Ctrl-C, and what was done until then is kept: a line that says where; the exit status is 130."""


def require(package: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional package, or say what needs it and how to get it.

    Raises:
        CommandError: it is not installed, or it is installed and does not load.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        missing = (error.name or package).partition(".")[0]
        raise CommandError(
            f"{purpose} needs {missing}, which is not installed: "
            f"pip install {DISTRIBUTIONS.get(missing, missing)} (it is in the extra {extra!r} of fusedres)"
        ) from error
    except (ImportError, RuntimeError) as error:
        # torchvision raises RuntimeError beside a build of torch that it was not made for.
        raise CommandError(
            f"{purpose} needs {package}, which does not load: {first_line(error)}"
        ) from error


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The closest of the known names, as a question, each with the prefix that it is written with; or nothing."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"did you mean {' or '.join(prefix + each for each in close)}?" if close else ""


def unknown(
    what: str, name: str, known: Iterable[str], listing: str, prefix: str = ""
) -> CommandError:
    """The error for a name that is not one of `known`: the closest ones, or where the whole list is."""
    hint = did_you_mean(name, known, prefix) or f"see {listing}"
    return CommandError(f"unknown {what} {prefix + name!r}; {hint}")


def first_line(error: BaseException) -> str:
    """What an error says, in one line that begins with what it is."""
    name = type(error).__name__
    try:
        said = str(error)
    except Exception:  # its own `__str__` is foreign code
        return name
    words = printable(next((line.strip() for line in said.splitlines() if line.strip()), ""))
    if len(words) > LONGEST:
        words = f"{words[:LONGEST]}..."
    return f"{name}: {words}" if words else name
