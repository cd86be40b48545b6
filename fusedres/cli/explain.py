"""`python -m fusedres explain MODEL`: what `fuse_` would do to a model, and why it would leave a block alone."""

from __future__ import annotations

import argparse

import fusedres

from .errors import CommandError
from .models import build_model


def add_to(commands) -> None:
    parser = commands.add_parser(
        "explain",
        help="what fuse_ would do to a model, block by block",
        description="Print what fuse_ would do to a model, block by block, and why a block would be left alone.",
    )
    parser.add_argument("model", help="a torchvision model (resnet50), or timm:NAME")
    parser.add_argument(
        "--input",
        metavar="N,C,H,W",
        type=shape,
        help="estimate the bytes saved in a training step with this input",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    form.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shape; write it as 256,3,224,224"
        ) from None


def run(options: argparse.Namespace) -> None:
    try:
        report = fusedres.explain(build_model(options.model), input_shape=options.input)
    except ValueError as error:
        raise CommandError(str(error)) from error
    if options.json:
        print(report.to_json())
    elif options.markdown:
        print(report.to_markdown())
    else:
        print(report)
