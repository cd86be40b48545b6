"""`fusedres explain MODEL`: what `fuse_` would do to a model, and why it would leave a block alone."""

from __future__ import annotations

import argparse

import fusedres

from .errors import CommandError
from .models import build_model, settle


def run(options: argparse.Namespace) -> None:
    model = build_model(options.model)
    if options.input is not None:
        settle(options.model, model, options.input)
    try:
        report = fusedres.explain(model, input_shape=options.input)
    except ValueError as error:
        raise CommandError(str(error).removeprefix("explain: ")) from error
    if options.json:
        print(report.to_json())
    elif options.markdown:
        print(report.to_markdown())
    else:
        print(report)
