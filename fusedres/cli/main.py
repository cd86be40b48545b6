"""The argument parser, and the one place where a command's error becomes a line and an exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import bench, compare, env, explain, warm
from .errors import CommandError

COMMANDS = (env, explain, compare, warm, bench)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; `sys.argv` when no arguments are given. Returns the exit status: 0, or 2 for a user's error."""
    parser = argparse.ArgumentParser(
        prog="python -m fusedres",
        description="Fused BatchNorm, ReLU and residual add for ResNets.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add_to(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except CommandError as error:
        print(f"{parser.prog} {options.command}: {error}", file=sys.stderr)
        return 2
    return 0
