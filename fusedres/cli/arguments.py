"""What may be said to each command: names, defaults, help, and what can be told to be wrong from the words alone.

Nothing heavy is imported here.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import __version__

PROGRAM = "fusedres"
# As torch calls them, with what people write for them.
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
BACKENDS = ("auto", "triton", "aten", "off")
LEVELS = ("operator", "block", "model", "bytes", "code", "executed", "host")
LAYOUTS = ("channels_last", "contiguous")
LARGEST = 2**63 - 1
MODEL = (
    "resnet50 (torchvision's), timm:NAME, hf:NAME (Hugging Face's, from its configuration), module:callable or "
    "path.py:callable (your own: a class, or a function that builds the model)"
)
DEVICE = "cpu, cuda, cuda:1; auto: a GPU if there is one"


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Tells the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """One that says it where help cannot be written: argparse's own passes over a full disk in silence."""

    def _print_message(self, message: str, file: Any = None) -> None:
        (file or sys.stderr).write(message)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command, its name among them.

    Raises:
        SystemExit: help or the version was asked for, or something is wrong; it has been printed.
    """
    parser = _Parser(
        prog=PROGRAM,
        description="Fused BatchNorm, ReLU and residual add for ResNets.",
        epilog="`fusedres COMMAND --help` tells what a command takes.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_demo, _env, _explain, _compare, _warm, _bench):
        add(commands)
    return parser.parse_args(_attached(arguments))


def _attached(arguments: Sequence[str]) -> list[str]:
    """`--input -1,3,64,64` as `--input=-1,3,64,64`: else argparse takes the value for an option."""
    attached: list[str] = []
    for argument in arguments:
        if re.match(r"-\d", argument) and attached and re.fullmatch(r"--[\w-]+", attached[-1]):
            attached[-1] += f"={argument}"
        else:
            attached.append(argument)
    return attached


def at_least(smallest: int) -> Callable[[str], int]:
    """An argument's type: a whole number, and not below `smallest`."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = smallest - 1
        if number < smallest:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number of at least {smallest}"
            )
        return number

    return parse


def shape(text: str) -> tuple[int, ...]:
    """An argument's type: the sizes of a tensor, none of them below 1."""
    try:
        sizes = tuple(int(size) for size in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shape; write it as 256,3,224,224"
        ) from None
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} has a size of {min(sizes)}; sizes are 1 or more, as in 256,3,224,224"
        )
    if math.prod(sizes) > LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r} has more elements than a tensor can have")
    return sizes


def seed(text: str) -> int:
    """An argument's type: what torch.manual_seed takes, with room for a number of each step."""
    try:
        number = int(text)
    except ValueError:
        number = LARGEST + 1
    if not -LARGEST <= number <= LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 64 bits")
    return number


def dtype(text: str) -> str:
    """An argument's type: what torch calls this dtype."""
    for name, short in DTYPES.items():
        if text.removeprefix("torch.") in (name, short):
            return name
    raise argparse.ArgumentTypeError(f"{text!r} is none of {_DTYPES_LISTED}")


_DTYPES_LISTED = ", ".join(f"{name} ({short})" for name, short in DTYPES.items())


def _command(commands: Any, name: str, brief: str, description: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(
        name, help=brief, description=description, formatter_class=_Help
    )
    return made


def _demo(commands: Any) -> None:
    parser = _command(
        commands,
        "demo",
        "what fusedres does, shown on this machine",
        "Train a ResNet and its fused form side by side, run the Triton kernels beside PyTorch, and count the bytes "
        "that the model moves; on a GPU a ResNet-50 at 224x224, with CUDA graphs beside.",
    )
    parser.add_argument(
        "--steps",
        type=at_least(1),
        metavar="N",
        help="of training; without it, what suits the device",
    )
    _add_out(parser)


def _add_out(parser: Any) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("out"), metavar="DIR", help="where PNG and JSON go"
    )


def _env(commands: Any) -> None:
    _command(
        commands,
        "env",
        "versions, device and backend",
        "Print versions, the device, and which backend runs and why; paste it into an issue.",
    )


def _explain(commands: Any) -> None:
    parser = _command(
        commands,
        "explain",
        "what fuse_ would do to a model, block by block",
        "Print what fuse_ would do to a model, block by block, and why a block would be left alone.",
    )
    parser.add_argument("model", help=MODEL)
    parser.add_argument(
        "--input",
        metavar="N,C,H,W",
        type=shape,
        help="estimate the bytes saved in a training step with this input",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    form.add_argument("--json", action="store_true", help="print JSON")


def _compare(commands: Any) -> None:
    parser = _command(
        commands,
        "compare",
        "train the original and the fused model side by side",
        "Train a model and its fused form from the same weights on the same batches, and compare losses, gradients, "
        "running statistics, time and memory.",
    )
    parser.add_argument("model", help=f"an image classifier: {MODEL}")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        default="digits",
        metavar="WHAT",
        help="digits, synthetic, or a folder with one sub-folder of images for each class",
    )
    data.add_argument(
        "--image-size",
        type=at_least(1),
        metavar="N",
        help="pixels a side; without it, the model's own (224 of most: on a CPU, 64 is quicker)",
    )
    data.add_argument(
        "--images",
        type=at_least(1),
        default=512,
        metavar="N",
        help="how many synthetic images, or how many of a folder's at most",
    )
    data.add_argument(
        "--classes", type=at_least(2), default=10, metavar="N", help="how many synthetic classes"
    )
    data.add_argument("--batch", type=at_least(1), default=32, metavar="N", help="images a step")
    run_as = parser.add_argument_group("how it runs")
    run_as.add_argument(
        "--steps", type=at_least(1), default=32, metavar="N", help="steps of training"
    )
    _add_dtype(run_as)
    run_as.add_argument("--channels-last", action="store_true", help="channels_last memory format")
    run_as.add_argument("--device", default="auto", help=DEVICE)
    run_as.add_argument("--backend", choices=BACKENDS, help="instead of what is set")
    run_as.add_argument(
        "--seed", type=seed, default=0, metavar="N", help="weights, order of the batches, dropout"
    )
    _add_out(run_as)


def _add_dtype(parser: Any) -> None:
    parser.add_argument(
        "--dtype",
        type=dtype,
        default="float32",
        metavar="DTYPE",
        help=f"{_DTYPES_LISTED}; below float32: autocast",
    )


def _warm(commands: Any) -> None:
    parser = _command(
        commands,
        "warm",
        "compile a model's kernels ahead of its first step",
        "Compile the Triton kernels of a model's training step into Triton's cache, in parallel, so that its first "
        "step need not wait for them. Nothing is computed, and no GPU is needed: the step's shapes are followed "
        "through forward and backward.",
    )
    parser.add_argument("model", help=MODEL)
    parser.add_argument(
        "--input",
        metavar="N,C,H,W",
        type=shape,
        required=True,
        help="what a step takes: the batch counts too",
    )
    _add_dtype(parser)
    parser.add_argument("--channels-last", action="store_true", help="channels_last memory format")
    parser.add_argument(
        "--eval",
        action="store_true",
        help="the forward of model.eval() without gradients, instead of a training step",
    )
    parser.add_argument(
        "--arch",
        type=at_least(75),
        metavar="N",
        help="80, 90, 100 for sm_80 and so on; without it, the GPU that is there",
    )
    parser.add_argument(
        "--multiprocessors",
        type=at_least(1),
        metavar="N",
        help="of the GPU that --arch means; without it, those of an A100 (80), H100 or H200 (90), B200 (100)",
    )
    parser.add_argument(
        "--processes",
        type=at_least(1),
        metavar="N",
        help="how many compile; without it, one a core",
    )


def _bench(commands: Any) -> None:
    parser = _command(
        commands,
        "bench",
        "the benchmark suite",
        "Measure fusedres beside PyTorch eager, torch.compile and other peers: the time of operators, blocks and "
        "models, and what needs no GPU: bytes, machine code, what it executes, host cost. Every result is checked "
        "before it is timed. Rows are appended to results.json and results.csv; plots and a page are made from them.",
    )
    parser.add_argument(
        "--level",
        action="append",
        choices=LEVELS,
        metavar="LEVEL",
        help=f"{', '.join(LEVELS)}; may be given more than once; without it, all of them",
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases, shorter rounds")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/bench"),
        metavar="DIR",
        help="where rows, plots and page go",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="OLD.json",
        help="print what got slower or larger since that file",
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="measure nothing: make the page (and the comparison) from --out again",
    )
    parser.add_argument(
        "--budget",
        type=at_least(1),
        metavar="SECONDS",
        help="start nothing new after that time, and name what was left out",
    )
    parser.add_argument("--device", default="auto", help=DEVICE)
    parser.add_argument(
        "--batch", type=at_least(1), metavar="N", help="instead of what suits the device"
    )
    parser.add_argument(
        "--dtype",
        action="append",
        type=dtype,
        metavar="DTYPE",
        help=f"{_DTYPES_LISTED}; may be given more than once",
    )
    parser.add_argument(
        "--layout", action="append", choices=LAYOUTS, help="may be given more than once"
    )
    parser.add_argument(
        "--model",
        action="append",
        metavar="NAME",
        help=f"for --level model: cifar_resnet18, {MODEL}; may be given more than once",
    )
    parser.add_argument(
        "--provider",
        action="append",
        metavar="NAME",
        help="only these (eager is always there); may be given more than once",
    )
    parser.add_argument("--no-graphs", action="store_true", help="no CUDA graphs")
