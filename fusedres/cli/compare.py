"""`python -m fusedres compare MODEL`: the original and the swapped model, trained side by side on the same batches."""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import asdict
from pathlib import Path

import torch

import fusedres

from .data import SOURCES, Images, load_digits, make_synthetic
from .device import choose_backend, choose_device, device_name
from .errors import CommandError, require
from .experiment import Outcome, train_side_by_side
from .models import build_model
from .picture import save_losses
from .record import difference_table, finite, record, speed_table
from .training import Setting

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {False: torch.contiguous_format, True: torch.channels_last}


def add_to(commands) -> None:
    parser = commands.add_parser(
        "compare",
        help="train the original and the fused model side by side",
        description="Train a model and its fused form from the same weights on the same batches, and compare losses, "
        "gradients, running statistics, time and memory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", help="a torchvision classifier (resnet18), or timm:NAME")
    data = parser.add_argument_group("data")
    data.add_argument("--data", choices=SOURCES, default="digits", help="what to train on")
    data.add_argument(
        "--image-size", type=at_least(1), default=48, metavar="N", help="pixels a side"
    )
    data.add_argument(
        "--images", type=at_least(1), default=512, metavar="N", help="how many synthetic images"
    )
    data.add_argument(
        "--classes", type=at_least(2), default=10, metavar="N", help="how many synthetic classes"
    )
    data.add_argument("--batch", type=at_least(1), default=32, metavar="N", help="images a step")
    run_as = parser.add_argument_group("how it runs")
    run_as.add_argument(
        "--steps", type=at_least(1), default=32, metavar="N", help="steps of training"
    )
    run_as.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="below float32: autocast"
    )
    run_as.add_argument("--channels-last", action="store_true", help="channels_last memory format")
    run_as.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1; auto: a GPU if there is one"
    )
    run_as.add_argument(
        "--backend", choices=fusedres.dispatch.BACKENDS, help="instead of what is set"
    )
    run_as.add_argument(
        "--seed", type=int, default=0, metavar="N", help="weights, order of the batches, dropout"
    )
    run_as.add_argument(
        "--out", type=Path, default=Path("out"), metavar="DIR", help="where PNG and JSON go"
    )
    parser.set_defaults(run=run)


def at_least(smallest: int):
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


def run(options: argparse.Namespace) -> None:
    """Everything that can be wrong is looked at before the first step."""
    require("matplotlib", "demo", "compare")
    device, dtype = choose_device(options.device), DTYPES[options.dtype]
    backend = choose_backend(options.backend, device, dtype)
    _make_folder(options.out)
    images = _load(options).to(device)
    setting = Setting(device, dtype, LAYOUTS[options.channels_last])
    torch.manual_seed(options.seed)
    model = build_model(options.model, images.classes).train().to(device)
    model = model.to(memory_format=setting.memory_format)
    fused = copy.deepcopy(model)
    report = fusedres.fuse_(fused)
    print(report)
    if report.n_fused == 0:
        print("nothing was fused: what follows compares the original with itself")
    layout = "channels_last" if options.channels_last else "contiguous"
    print(f"\nmodel    {options.model}, {options.dtype}, {layout}")
    print(f"data     {images.description}, {options.image_size}x{options.image_size}")
    print(f"device   {device_name(device)}")
    print(f"backend  {backend.name}: {backend.reason}")
    print(f"         {backend.expectation}")
    print(f"\nsame weights, same {options.steps} batches of {options.batch} images", flush=True)

    outcome = train_side_by_side(
        model, fused, images, setting, options.batch, options.steps, options.seed
    )
    accuracies = _accuracies(outcome, images, options.batch)
    print(f"\n{speed_table(outcome, options.batch, accuracies)}")
    print(f"\n{difference_table(outcome)}")
    print(f"\nbackend that ran: {backend.name} ({backend.expectation})")

    stem = f"compare-{options.model.replace(':', '-').replace('/', '-')}"
    picture, json_file = options.out / f"{stem}.png", options.out / f"{stem}.json"
    title = (
        f"{options.model} on {options.data}, {options.dtype}, backend {backend.name}, {device.type}"
    )
    save_losses(picture, title, outcome.original.losses, outcome.fused.losses)
    facts = {"backend": asdict(backend), "device": device_name(device)}
    facts |= {"data": images.description, "report": json.loads(report.to_json())}
    everything = finite(facts | record(options, outcome, accuracies))
    json_file.write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {picture} and {json_file}")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--out {str(folder)!r} cannot be a folder: {error.strerror}") from error


def _load(options: argparse.Namespace) -> Images:
    if options.data == "digits":
        return load_digits(options.image_size, options.seed)
    return make_synthetic(options.images, options.image_size, options.classes, options.seed)


def _accuracies(outcome: Outcome, images: Images, batch: int) -> tuple[float, float] | None:
    if len(images.held_out_labels) == 0:
        return None
    return outcome.original.accuracy(images, batch), outcome.fused.accuracy(images, batch)
