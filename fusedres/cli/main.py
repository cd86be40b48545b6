"""The one place where a command's error becomes a line and an exit status."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence

from .arguments import PROGRAM, parse
from .errors import CommandError, Interrupted, first_line

# As a shell reports a program that SIGINT or SIGPIPE has ended.
INTERRUPTED, CLOSED_PIPE = 130, 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; `sys.argv` when no arguments are given.

    Returns the exit status: 0; with a line on stderr 2 for a user's error, 1 for what the system refuses (a full disk),
    130 after Ctrl-C; without one 141 where nobody reads what is printed, as of `... | head`.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    name = PROGRAM
    if isinstance(
        sys.stdout, io.TextIOWrapper
    ):  # as stderr does with what its encoding has no letter for
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            options = parse(given)
            name = f"{PROGRAM} {options.command}"
            _run(options)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except CommandError as error:
        return _say(name, str(error), 2)
    except Interrupted as stop:
        return _say(name, str(stop), INTERRUPTED)
    except KeyboardInterrupt:
        return _say(name, "interrupted", INTERRUPTED)
    except BrokenPipeError:
        _drop_output()
        return CLOSED_PIPE
    except OSError as error:
        _drop_output()
        where = f"{error.filename}: " if error.filename else ""
        return _say(name, f"{where}{error.strerror or error}", 1)
    return 0


def _run(options: argparse.Namespace) -> None:
    # Only now: the commands import PyTorch.
    command = importlib.import_module(f".{options.command}", __package__)
    try:
        command.run(options)
    except SystemExit as stop:  # no command of ours ends so
        raise CommandError(f"the model's code has ended it: {first_line(stop)}") from stop


def _say(name: str, words: str, status: int) -> int:
    print(f"{name}: {words}", file=sys.stderr)
    return status


def _drop_output() -> None:
    """What is still to be printed goes nowhere: Python would try once more as it ends, and complain."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    except (OSError, io.UnsupportedOperation):
        return
