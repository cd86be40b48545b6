"""Errors that the user can put right, and what finds them."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class CommandError(Exception):
    """Printed as one line, without a traceback; the exit status is 2."""


def require(package: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional package, or say what needs it and how to get it.

    Raises:
        CommandError: it is not installed, or it is installed and does not load.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        missing = error.name or package
        raise CommandError(
            f"{purpose} needs {missing}, which is not installed; get it with the extra {extra!r}: "
            f"pip install 'fusedres[{extra}]'"
        ) from error
    except (ImportError, RuntimeError) as error:
        # torchvision raises RuntimeError beside a build of torch that it was not made for.
        raise CommandError(f"{purpose} needs {package}, which does not load: {error}") from error


def unknown(what: str, name: str, known: Iterable[str], listing: str) -> CommandError:
    """The error for a name that is not one of `known`: the closest ones, and where the whole list is."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}?" if close else f"see {listing}"
    return CommandError(f"unknown {what} {name!r}; {hint}")
