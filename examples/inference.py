"""Make a trained model ready to serve: BatchNorms folded into the convolutions, exported, each step checked.

    python examples/inference.py --weights out/finetuned.pt --model resnet18 --classes 10 --size 32

While a model is trained BatchNorm has to see its batch, and fusedres makes that cheap. In eval mode it is a scale and a
shift that the convolution in front of it can take over: nothing is left to fuse, so `unfuse_` and fold. Without a file
of weights the model has fresh ones, and running statistics of a few random batches.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from common import (
    CommandError,
    at_least,
    build,
    largest_difference,
    load_weights,
    recipe,
    recipe_parser,
)
from torch import Tensor, nn
from torch.fx.experimental import optimization

import fusedres
from fusedres.cli.device import choose_device

ALLOWED = 1e-4  # relative, in float32: folding rounds each weight once more


def batch_norms(model: nn.Module) -> int:
    """How many there are."""
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def check(what: str, values: Tensor, reference: Tensor) -> None:
    """Print how far apart they are, or end with that."""
    apart = largest_difference(values, reference)
    if not apart <= ALLOWED:  # NaN is not
        raise CommandError(
            f"{what}: outputs differ by {apart:.1e} of the largest, allowed is {ALLOWED}"
        )
    print(f"{what:<9} largest relative difference {apart:.1e}")


def export_onnx(model: nn.Module, example: Tensor, path: Path) -> None:
    """Write an ONNX file, and run it where onnxruntime is installed."""
    missing = [p for p in ("onnx", "onnxscript") if importlib.util.find_spec(p) is None]
    if missing:
        print(
            f"onnx      not written: {' and '.join(missing)} not installed (pip install onnx onnxscript)"
        )
        return
    torch.onnx.export(model, (example,), path, dynamo=True, verbose=False)
    print(f"onnx      {path}")
    if importlib.util.find_spec("onnxruntime") is None:
        print("          not run: onnxruntime is not installed")
        return
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (values,) = session.run(None, {session.get_inputs()[0].name: example.numpy()})
    check("onnx", torch.from_numpy(values), model(example))


@torch.no_grad()
def infer(options: argparse.Namespace) -> None:
    """From the trained model to the files that are served."""
    device = choose_device(options.device)
    torch.manual_seed(options.seed)
    model = build(options.model, options.classes)
    images = torch.randn(options.batch, 3, options.size, options.size)
    if options.weights is not None:
        load_weights(model, options.weights)
    else:
        for _ in range(3):
            model(torch.randn_like(images))
    options.out.mkdir(parents=True, exist_ok=True)
    model.to(device).eval()
    images = images.to(device)
    expected = model(images)

    # eval mode: a fused model gives what the plain one gives, and is faster than it where nothing is folded.
    fused = copy.deepcopy(model)
    fusedres.fuse_(fused)
    check("fused", fused(images), expected)

    # unfuse_ first: folding looks for BatchNorms behind convolutions, in the model's own forward.
    fusedres.unfuse_(fused)
    folded = optimization.fuse(fused)
    check("folded", folded(images), expected)
    print(f"          {batch_norms(model)} BatchNorms, {batch_norms(folded)} of them left")

    # What is exported holds PyTorch's operations alone: whoever loads it needs no fusedres.
    example = images.cpu()
    folded.cpu()
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(folded, (example,), dynamic_shapes=({0: batch},))
    file = options.out / f"{options.model.replace(':', '-')}.pt2"
    torch.export.save(program, file)
    check("exported", torch.export.load(file).module()(example), folded(example))
    print(f"          {file}")
    export_onnx(folded, example, file.with_suffix(".onnx"))


def run(arguments: Sequence[str] | None = None) -> int:
    """From the command line."""
    parser = recipe_parser("inference", __doc__ or "", model="resnet18")
    number = {"type": at_least(1), "metavar": "N"}
    parser.add_argument("--weights", type=Path, metavar="FILE", help="a state_dict")
    parser.add_argument("--classes", default=10, **number, help="of the classifier")
    parser.add_argument("--size", default=64, **number, help="pixels a side")
    parser.add_argument("--batch", default=8, **number, help="images that outputs are compared on")
    parser.add_argument("--out", type=Path, default="out", metavar="DIR", help="where the files go")
    return recipe(infer, parser, arguments)


if __name__ == "__main__":
    sys.exit(run())
