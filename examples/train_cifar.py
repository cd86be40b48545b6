"""Train a small ResNet to a stated accuracy, in minutes: CIFAR-10 as a folder, or the digits that scikit-learn ships.

    python examples/train_cifar.py
    python examples/train_cifar.py --data PATH --size 32 --epochs 60 --target 0.91 --channels-last --dtype bf16

PATH is a folder with one sub-folder of images for each class; a fifth of them is held out. The network is the ResNet-20
of He et al. 2015 (arXiv:1512.03385, section 4.2; 0.9125 on CIFAR-10's test images), the augmentation theirs. The exit
status is 1 where the accuracy falls short of what is stated.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from common import (
    CommandError,
    accuracy,
    add_data,
    at_least,
    batches,
    build,
    load,
    load_weights,
    recipe,
    recipe_parser,
    save_weights,
)
from torch import Tensor
from torch.nn import functional as F

import fusedres
from fusedres.cli.device import choose_device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def augment(images: Tensor, mirror: bool) -> Tensor:
    """Each image [3, S, S] moved by up to an eighth of its size, zeros moving in, and half of them mirrored."""
    count, _, size, _ = images.shape
    reach = size // 8
    # [N, 3, 2 reach + 1, 2 reach + 1, S, S], a view: every place where the image could stand.
    places = F.pad(images, (reach,) * 4).unfold(2, size, 1).unfold(3, size, 1)
    down, right = torch.randint(2 * reach + 1, (2, count), device=images.device)
    moved = places[torch.arange(count, device=images.device), :, down, right]
    if mirror:
        chosen = torch.rand(count, 1, 1, 1, device=images.device) < 0.5
        moved = torch.where(chosen, moved.flip(3), moved)
    return moved


def train(options: argparse.Namespace) -> int:
    """Train, measure, say whether the accuracy is what was stated."""
    device = choose_device(options.device)
    data = load(options.data, options.size, options.seed, most=options.images).to(device)
    if len(data.held_out_labels) == 0:
        raise CommandError(
            f"--data {options.data!r} has too few images to hold a fifth of them out"
        )
    print(f"data      {data.description}, {options.size}x{options.size}")

    # Weights first, by the names of the plain model; then where they lie in memory; then fuse_, which changes no
    # parameter; the compiler last. The optimizer takes the parameters when they are where they stay.
    torch.manual_seed(options.seed)
    model = build(options.model, data.classes)
    if options.weights is not None:
        load_weights(model, options.weights)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    model.to(device, memory_format=layout)
    report = fusedres.fuse_(model)
    print(f"model     {options.model}, {report.n_fused} BatchNorms fused")
    step_model = torch.compile(model) if options.compile else model
    steps = options.epochs * max(1, len(data.labels) // options.batch)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=options.lr, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=steps)
    autocast = torch.autocast(device.type, DTYPES[options.dtype], options.dtype != "fp32")

    model.train()
    start = time.perf_counter()
    feed = batches(data, options.batch, steps, options.seed)
    for step, (images, labels) in enumerate(feed, 1):
        images = augment(images, mirror=options.mirror).contiguous(memory_format=layout)
        with autocast:
            loss = F.cross_entropy(step_model(images), labels, label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 10) == 0:  # .item() waits for the GPU: not at each step
            print(f"step      {step}/{steps}, loss {loss.item():.3f}", flush=True)

    seconds = time.perf_counter() - start
    print(f"trained   {steps} steps of {options.batch} images in {seconds:.0f} s")
    if options.save is not None:
        save_weights(model, options.save)
        print(f"saved     {options.save}")
    reached = accuracy(model, data.held_out_images, data.held_out_labels)
    verdict = "reached" if reached >= options.target else "NOT reached"
    print(f"accuracy  {reached:.4f} of the held-out images; stated: {options.target}, {verdict}")
    return int(reached < options.target)


def run(arguments: Sequence[str] | None = None) -> int:
    """From the command line."""
    parser = recipe_parser("train_cifar", __doc__ or "", model="resnet20")
    add_data(parser)
    number = {"type": at_least(1), "metavar": "N"}
    parser.add_argument("--size", default=16, **number, help="pixels a side")
    parser.add_argument("--images", default=60_000, **number, help="a larger folder is sampled")
    parser.add_argument(
        "--mirror", action="store_true", help="what a mirror image shows is the same"
    )
    parser.add_argument("--epochs", default=15, **number, help="passes over the images")
    parser.add_argument("--batch", default=64, **number, help="images a step")
    parser.add_argument("--lr", type=float, default=0.1, help="the highest learning rate")
    parser.add_argument("--target", type=float, default=0.97, help="the accuracy that is stated")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of autocast")
    parser.add_argument("--channels-last", action="store_true", help="channels_last memory format")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="a state_dict to start from")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the state_dict there")
    return recipe(train, parser, arguments)


if __name__ == "__main__":
    sys.exit(run())
