"""`fusedres compare MODEL`: the original and the swapped model, trained side by side on the same batches."""

from __future__ import annotations

import argparse
import copy
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import fusedres

from ..tables import paragraph, table
from .data import Images, Source, batches, source
from .device import Choice, choose_device, chosen_backend, device_name
from .errors import CommandError, Interrupted, first_line, require
from .experiment import Outcome, against_itself, train_side_by_side
from .models import build_model, image_size, settle
from .picture import save_losses
from .record import Accuracies, difference_table, finite, record, speed_table
from .training import DTYPES, LAYOUTS, Setting


def run(options: argparse.Namespace, heading: str = "") -> tuple[fusedres.FuseReport, Outcome]:
    """Everything that can be wrong is looked at before a line is printed or a folder made; a step is made for that.

    Args:
        heading: stands before the first line.
    """
    require("matplotlib", "demo", "compare")
    device, dtype = choose_device(options.device), DTYPES[options.dtype]
    with chosen_backend(options.backend, device, dtype) as backend:
        return _run(options, heading, device, dtype, backend)


def _run(
    options: argparse.Namespace,
    heading: str,
    device: torch.device,
    dtype: torch.dtype,
    backend: Choice,
) -> tuple[fusedres.FuseReport, Outcome]:
    data = source(options)
    torch.manual_seed(options.seed)
    model = build_model(options.model, data.classes).train()
    if options.image_size is None:
        options.image_size = image_size(options.model, model)
    images = _load(data, options.image_size, device)
    settle(options.model, model, images.images.shape)
    setting = Setting(device, dtype, LAYOUTS[options.channels_last])
    model = model.to(device).to(memory_format=setting.memory_format)
    itself = against_itself(options.model, model, images, setting, options.batch, options.seed)
    fused = copy.deepcopy(model)
    report = fusedres.fuse_(fused)
    _make_folder(options.out)
    print(f"{heading}{report}")
    if report.n_fused == 0:
        print(paragraph("nothing was fused: what follows compares the original with itself"))
    print(f"\n{_what_runs(options, images, backend, device)}")
    print(f"\nsame weights, same {options.steps} batches of {options.batch} images", flush=True)

    feed = batches(images, options.batch, options.steps, options.seed)
    outcome = train_side_by_side(model, fused, feed, setting, options.steps, options.seed, itself)
    accuracies = None if outcome.interrupted else _accuracies(outcome, images, options.batch)
    print(f"\n{speed_table(outcome, options.batch, accuracies)}")
    print(f"\n{difference_table(outcome)}\n")
    print(paragraph(f"backend that ran: {backend.name} ({backend.expectation})"))

    facts: dict[str, Any] = {"backend": asdict(backend), "device": device_name(device)}
    facts |= {"data": images.description, "report": json.loads(report.to_json())}
    json_file = _write(options, backend, outcome, accuracies, facts)
    if outcome.interrupted:
        done = len(outcome.differences)
        raise Interrupted(
            f"interrupted after {done} of {options.steps} steps; what they measured is in {json_file}"
        )
    return report, outcome


def _load(data: Source, size: int, device: torch.device) -> Images:
    try:
        return data.load(size).to(device)
    except (MemoryError, RuntimeError) as error:
        raise CommandError(
            f"the images, of {size}x{size}, do not fit into memory: {first_line(error)}; fewer --images or a smaller "
            "--image-size may help"
        ) from error


def _what_runs(
    options: argparse.Namespace, images: Images, backend: Choice, device: torch.device
) -> str:
    layout = "channels_last" if options.channels_last else "contiguous"
    size = options.image_size
    rows = [
        ("model", f"{options.model}, {options.dtype}, {layout}"),
        ("data", f"{images.description}, {size}x{size}"),
        ("device", device_name(device)),
        ("backend", f"{backend.name}: {backend.reason}"),
        ("", backend.expectation),
    ]
    return table(rows, head=False)


def _write(
    options: argparse.Namespace,
    backend: Choice,
    outcome: Outcome,
    accuracies: Accuracies,
    facts: dict[str, Any],
) -> Path:
    """The picture and the JSON; the path of the latter."""
    stem = f"compare-{''.join(c if c.isalnum() or c in '._' else '-' for c in options.model)}"
    picture, json_file = options.out / f"{stem}.png", options.out / f"{stem}.json"
    where = choose_device(options.device).type
    title = f"{options.model} on {options.data}, {options.dtype}, backend {backend.name}, {where}"
    everything = finite(facts | record(options, outcome, accuracies))
    json_file.write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")
    save_losses(picture, title, outcome.original.losses, outcome.fused.losses)
    print(f"wrote {json_file}\nwrote {picture}")
    return json_file


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--out {str(folder)!r} cannot be a folder: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise CommandError(f"--out {str(folder)!r} cannot be written to")


def _accuracies(outcome: Outcome, images: Images, batch: int) -> Accuracies:
    if len(images.held_out_labels) == 0:
        return None
    return outcome.original.accuracy(images, batch), outcome.fused.accuracy(images, batch)
