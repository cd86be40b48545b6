"""`python -m fusedres explain MODEL`: what `fuse_` would do to a model, and why it would leave a block alone."""

from __future__ import annotations

import argparse

import fusedres

from .models import build_model


def add_to(commands) -> None:
    parser = commands.add_parser(
        "explain",
        help="what fuse_ would do to a model, block by block",
        description="Print what fuse_ would do to a model, block by block, and why a block would be left alone.",
    )
    parser.add_argument("model", help="a torchvision model (resnet50), or timm:NAME")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")
    form.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    report = fusedres.explain(build_model(options.model))
    if options.json:
        print(report.to_json())
    elif options.markdown:
        print(report.to_markdown())
    else:
        print(report)
