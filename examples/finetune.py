"""Fine-tune a model whose weights are in a file: a new head, BatchNorms frozen; what is saved is the plain model.

    python examples/train_cifar.py --model resnet18 --save out/pretrained.pt
    python examples/finetune.py --weights out/pretrained.pt --model resnet18 --data PATH --save out/finetuned.pt

The file holds a state_dict. Of torchvision's own weights:

    torch.save(torchvision.models.resnet18(weights="DEFAULT").state_dict(), "out/pretrained.pt")

A frozen BatchNorm uses its running statistics, which stay what they are, and its weight and bias are not trained: the
new images are too few to estimate them. Fused, it is a scale and a shift, and its backward pass reads no statistics.
"""

from __future__ import annotations

import argparse
import sys
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
    read_weights,
    recipe,
    recipe_parser,
    save_weights,
)
from torch import nn
from torch.nn import functional as F

import fusedres
from fusedres.cli.device import choose_device


def head_of(model: nn.Module) -> str:
    """The name of the classifier: the last linear layer (`fc` in a ResNet)."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise CommandError("the model has no linear classifier to put a new one in its place")
    return names[-1]


def freeze_batch_norms(model: nn.Module) -> None:
    """Running statistics are used and not updated, weight and bias not trained. To be called after `model.train()`."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval().requires_grad_(False)


def finetune(options: argparse.Namespace) -> None:
    """Load, put a new head on, train, unfuse, save; then show that the plain model takes what was saved."""
    device = choose_device(options.device)
    data = load(options.data, options.size, options.seed).to(device)
    print(f"data      {data.description}, {options.size}x{options.size}")

    # Weights first, all but the head's, whose shape is another one; the new head keeps its fresh weights.
    torch.manual_seed(options.seed)
    model = build(options.model, data.classes)
    head = head_of(model)
    load_weights(model, options.weights, without=head)
    # Then where they lie in memory, then fuse_. It changes no parameter, so the optimizer may take them on either side.
    model.to(device, memory_format=torch.channels_last)
    report = fusedres.fuse_(model)
    print(f"model     {options.model}, {report.n_fused} BatchNorms fused, new head {head!r}")

    model.train()
    freeze_batch_norms(model)
    statistics = {name: b.clone() for name, b in model.named_buffers() if "running_" in name}
    new = list(model.get_submodule(head).parameters())
    known = {id(p) for p in new}
    old = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    # What is known already is changed with care.
    groups = [{"params": old, "lr": options.lr / 10}, {"params": new, "lr": options.lr}]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    feed = batches(data, options.batch, options.steps, options.seed)
    for step, (images, labels) in enumerate(feed, 1):
        loss = F.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % max(1, options.steps // 5) == 0:
            print(f"step      {step}/{options.steps}, loss {loss.item():.3f}", flush=True)
    now = dict(model.named_buffers())
    moved = sum(not torch.equal(value, now[name]) for name, value in statistics.items())
    print(f"frozen    {len(statistics)} running statistics, {moved} of them moved")
    if len(data.held_out_labels):
        share = accuracy(model, data.held_out_images, data.held_out_labels)
        print(f"accuracy  {share:.4f} of the held-out images")

    # The state_dict is the same before and after unfuse_; the model without it is the class that was built, to the bit.
    fusedres.unfuse_(model)
    save_weights(model, options.save)
    plain = build(options.model, data.classes).eval()
    plain.load_state_dict(read_weights(options.save))
    some = data.images[: options.batch]
    model.cpu().eval()
    with torch.no_grad():
        same = torch.equal(
            plain(some.cpu()), model.to(memory_format=torch.contiguous_format)(some.cpu())
        )
    print(
        f"saved     {options.save}; a plain {options.model} with it gives {'the same' if same else 'OTHER'} outputs"
    )


def run(arguments: Sequence[str] | None = None) -> int:
    """From the command line."""
    parser = recipe_parser("finetune", __doc__ or "", model="resnet18")
    add_data(parser)
    number = {"type": at_least(1), "metavar": "N"}
    file = {"type": Path, "metavar": "FILE"}
    parser.add_argument("--weights", **file, required=True, help="a state_dict to start from")
    parser.add_argument("--save", **file, default="out/finetuned.pt", help="written at the end")
    parser.add_argument("--size", default=32, **number, help="pixels a side")
    parser.add_argument("--steps", default=100, **number, help="of training")
    parser.add_argument("--batch", default=32, **number, help="images a step")
    parser.add_argument(
        "--lr", type=float, default=0.02, help="of the head; a tenth of it elsewhere"
    )
    return recipe(finetune, parser, arguments)


if __name__ == "__main__":
    sys.exit(run())
