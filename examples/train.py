"""Train an image classifier as a real job does, fused or not, on one device or many, and go on after a kill.

    python examples/train.py --data digits --model resnet18 --image-size 32 --fuse
    python examples/train.py --data PATH --model timm:resnet50d --fuse --channels-last --dtype bf16 --workers 8
    torchrun --nproc-per-node 8 examples/train.py --data PATH --model resnet50 --fuse --channels-last --sync-bn

PATH holds `train/CLASS/*.jpg` and, for the accuracy after each epoch, `val/CLASS/*.jpg`. The position of a training is
one number, the step: which images it sees, how each is augmented and the learning rate follow from it and the seed. A
training that finds `checkpoint.pt` in --out goes on from there and ends with the weights, bit for bit, of one that was
never stopped; on a GPU with --deterministic. Read from top to bottom: model, data, step, checkpoint, loop.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import fusedres.models
from fusedres.cli.data import load_digits, make_synthetic

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {False: torch.preserve_format, True: torch.channels_last}
# What a training that goes on may change without becoming another one.
FREE = {"out", "workers", "log_every", "checkpoint_every"}


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--data", default="digits", metavar="PATH", help="an image folder, 'digits' or 'synthetic'")
    add("--model", default="resnet18", help="torchvision's NAME, timm:NAME or fusedres:NAME")
    add("--weights", type=Path, metavar="FILE", help="a state_dict to start from")
    add("--out", type=Path, default=Path("out/train"), metavar="DIR")
    add("--image-size", type=int, default=224)
    add("--epochs", type=int, default=90)
    add("--steps", type=int, help="instead of --epochs")
    add("--batch", type=int, default=64, help="images a step and process")
    add("--accumulate", type=int, default=1, help="parts that a batch is computed in")
    add("--lr", type=float, default=0.1)
    add("--warmup", type=int, default=100, help="steps")
    add("--weight-decay", type=float, default=5e-5)
    add("--label-smoothing", type=float, default=0.1)
    add("--ema", type=float, default=0.999, help="decay of the averaged weights")
    add("--dtype", choices=DTYPES, default="fp32", help="of autocast")
    add("--channels-last", action="store_true")
    add("--fuse", action="store_true", help="fusedres.fuse_")
    add("--sync-bn", action="store_true", help="statistics over all processes")
    add("--compile", action="store_true", help="torch.compile")
    add("--deterministic", action="store_true", help="the same bits again, on a GPU too")
    add("--workers", type=int, default=0, help="processes that load images")
    add("--seed", type=int, default=0)
    add("--log-every", type=int, default=10, metavar="STEPS")
    add("--checkpoint-every", type=int, default=500, metavar="STEPS")
    options = parser.parse_args(given)
    if options.batch % options.accumulate:
        parser.error(f"--batch {options.batch} does not divide into {options.accumulate} parts")
    return options


def build(name: str, classes: int) -> nn.Module:
    """torchvision's model of this name, or `timm:NAME`, `fusedres:NAME`."""
    package, _, model = name.rpartition(":")
    if package == "fusedres":
        return getattr(fusedres.models, model)(num_classes=classes)
    if package == "timm":
        return importlib.import_module("timm").create_model(model, num_classes=classes)
    return torchvision.models.get_model(model, num_classes=classes)


def prepare(options: argparse.Namespace, classes: int, device: torch.device) -> tuple[Any, ...]:
    """The model itself, its moving average, and what the loop calls. Each line stands where it does for a reason."""
    model = build(options.model, classes)
    # Weights first: a checkpoint knows the plain model's names, whatever is wrapped around it below.
    if options.weights is not None:
        model.load_state_dict(torch.load(options.weights, map_location="cpu"))
    # Then where they lie in memory: DDP lays out its buckets, and the optimizer its state, as the parameters are.
    model.to(device=device, memory_format=LAYOUTS[options.channels_last])
    # On a CPU DDP refuses SyncBatchNorm, since PyTorch's own does not run there. Fused it does: it comes behind DDP.
    several, is_late = options.processes > 1, options.sync_bn and device.type == "cpu"
    if several and is_late and not options.fuse:
        raise SystemExit("--sync-bn: PyTorch's SyncBatchNorm does not run on a CPU; add --fuse")
    wrapped: Any = DistributedDataParallel(model) if several and is_late else model
    # SyncBatchNorm puts other modules in, with the same parameters and buffers: before what remembers modules.
    if options.sync_bn:
        # timm's own knows of its BatchNorms that hold an activation.
        is_timm = options.model.startswith("timm:")
        owner: Any = importlib.import_module("timm.layers") if is_timm else nn.SyncBatchNorm
        model = owner.convert_sync_batchnorm(model)
    # fuse_ when the modules are the final ones, so that its report tells what runs. It changes no parameter.
    if options.fuse:
        say(fusedres.fuse_(model))
    # The average is a deep copy of the bare model: fused too, with nothing of DDP or the compiler in it.
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(options.ema), use_buffers=True)
    # DDP when the parameters are where they will be: it makes its buckets of them.
    wrapped = DistributedDataParallel(model) if several and not is_late else wrapped
    # The compiler last: it cuts its graph at DDP's buckets, so that gradients travel while the backward runs.
    if options.compile:
        wrapped = torch.compile(wrapped)
    return model, average, wrapped


class Draws(Dataset):
    """Images by draw: number `epoch * len(images) + index`, which also seeds the augmentation of that image.

    So it does not matter which process loads an image, nor whether the training was stopped in between.
    """

    def __init__(self, images: Any, seed: int) -> None:
        self.images, self.seed = images, seed

    def __getitem__(self, draw: int) -> tuple[Tensor, int]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed + draw)
            return self.images[draw % len(self.images)]


class Parts(Sampler[list[int]]):
    """The draws of each part of each step of this process, from a step on; every epoch in an order of its own."""

    def __init__(self, count: int, steps: range, options: argparse.Namespace) -> None:
        self.count, self.steps, self.options = count, steps, options
        self.a_step = options.batch * options.processes
        if self.a_step > count:
            raise SystemExit(f"--batch: a step's {self.a_step} images are more than all {count}")

    def __iter__(self) -> Iterator[list[int]]:
        first, last = dist.get_rank() * self.options.batch, None
        for step in self.steps:
            epoch, k = divmod(step, self.count // self.a_step)
            if epoch != last:
                generator = torch.Generator().manual_seed(self.options.seed + epoch)
                order, last = torch.randperm(self.count, generator=generator), epoch
            mine = order[k * self.a_step + first :][: self.options.batch] + epoch * self.count
            yield from (part.tolist() for part in mine.chunk(self.options.accumulate))


def load(options: argparse.Namespace) -> tuple[Any, Any, int]:
    """Images to train on, held-out images (or None), and the number of classes."""
    size = options.image_size
    if options.data in ("digits", "synthetic"):
        digits = options.data == "digits"
        made = load_digits(size, 0) if digits else make_synthetic(1024, size, 10, 0)
        held_out = TensorDataset(made.held_out_images, made.held_out_labels) if digits else None
        return TensorDataset(made.images, made.labels), held_out, made.classes
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    augmented = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    centred = [v2.Resize(size * 8 // 7, antialias=True), v2.CenterCrop(size)]
    folder, val = (Path(options.data) / name for name in ("train", "val"))
    train = ImageFolder(str(folder), v2.Compose([*augmented, *tensor]))
    held_out = ImageFolder(str(val), v2.Compose([*centred, *tensor])) if val.is_dir() else None
    return train, held_out, len(train.classes)


def loader(images: Any, options: argparse.Namespace, **how: Any) -> DataLoader:
    # A generator of its own: else making a loader draws from the one that dropout draws from.
    how |= {"num_workers": options.workers, "pin_memory": torch.cuda.is_available()}
    return DataLoader(images, generator=torch.Generator(), **how)


def learning_rate(step: int, steps: int, options: argparse.Namespace) -> float:
    """A line up to --lr, then half a cosine down to 0."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    done = (step - options.warmup) / max(1, steps - options.warmup)
    return options.lr * (1 + math.cos(math.pi * done)) / 2


class Training:
    """What a step changes, all of which a checkpoint holds."""

    STATEFUL = ("model", "average", "optimizer", "scaler")

    def __init__(self, options: argparse.Namespace, classes: int, device: torch.device) -> None:
        self.options, self.device, self.step = options, device, 0
        self.settings = {name: str(vars(options)[name]) for name in vars(options).keys() - FREE}
        self.model, self.average, self.wrapped = prepare(options, classes, device)
        # Biases and BatchNorms are not decayed.
        groups: list[Any] = [{"params": [], "weight_decay": d} for d in (0.0, options.weight_decay)]
        for parameter in self.model.parameters():
            groups[parameter.dim() > 1]["params"].append(parameter)
        self.optimizer = torch.optim.SGD(groups, lr=options.lr, momentum=0.9, nesterov=True)
        dtype, low = DTYPES[options.dtype], options.dtype != "fp32"
        self.autocast: Any = {"device_type": device.type, "dtype": dtype, "enabled": low}
        # Gradients of float16 vanish below 6e-8; those of bfloat16 have float32's range.
        self.scaler = torch.amp.GradScaler(device.type, enabled=options.dtype == "fp16")
        self.criterion = nn.CrossEntropyLoss(label_smoothing=options.label_smoothing)

    def to_device(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        layout = LAYOUTS[self.options.channels_last]
        images = images.to(self.device, non_blocking=True, memory_format=layout)
        return images, labels.to(self.device, non_blocking=True)

    def run(self, parts: Iterator[tuple[Tensor, Tensor]], steps: int) -> Tensor:
        """One step over its parts; the loss stays on the device, so that nothing waits for it."""
        self.model.train()
        total = torch.zeros((), device=self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, steps, self.options)
        for left in reversed(range(self.options.accumulate)):
            images, labels = self.to_device(*next(parts))
            # Gradients travel once a step, with the last part.
            no_sync = left and getattr(self.wrapped, "no_sync", None)
            with no_sync() if no_sync else contextlib.nullcontext():
                with torch.autocast(**self.autocast):
                    loss = self.criterion(self.wrapped(images), labels) / self.options.accumulate
                self.scaler.scale(loss).backward()
            total += loss.detach()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update_parameters(self.model)
        self.step += 1
        return total

    @torch.no_grad()
    def accuracy(self, images: DataLoader) -> float:
        """The share of held-out images that the averaged weights name rightly; each process looks at its own."""
        self.average.eval()
        right = torch.zeros(2, device=self.device)
        for batch in images:
            pixels, labels = self.to_device(*batch)
            with torch.autocast(**self.autocast):
                named = self.average(pixels).argmax(1)
            right += torch.stack([(named == labels).sum(), torch.ones_like(labels).sum()])
        dist.all_reduce(right)
        return (right[0] / right[1]).item()

    def save(self, path: Path) -> None:
        """Everything, in one file that is there as a whole or not at all."""
        mine = [torch.get_rng_state()]
        if self.device.type == "cuda":
            mine.append(torch.cuda.get_rng_state(self.device))
        everyones: list[Any] = [None] * self.options.processes  # dropout is each one's own
        dist.all_gather_object(everyones, mine)
        if dist.get_rank() != 0:
            return
        state = {name: getattr(self, name).state_dict() for name in self.STATEFUL}
        state |= {"step": self.step, "generators": everyones, "settings": self.settings}
        scratch = path.with_suffix(".writing")
        with scratch.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # on the disk before it gets its name
        scratch.replace(path)

    def resume(self, path: Path) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before, now = state["settings"], self.settings
        if other := ", ".join(name for name in sorted(now) if before.get(name) != now[name]):
            raise SystemExit(f"{path}: a training with different {other}; choose another --out")
        for name in self.STATEFUL:
            getattr(self, name).load_state_dict(state[name])
        self.step = state["step"]
        generators = state["generators"][dist.get_rank()]
        torch.set_rng_state(generators[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(generators[1], self.device)


def say(*words: Any) -> None:
    if dist.get_rank() == 0:
        print(*words, flush=True)


def start(options: argparse.Namespace) -> torch.device:
    """This process's device; torchrun says which process it is."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    alone: Any = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(**({} if "WORLD_SIZE" in os.environ else alone))
    options.processes = dist.get_world_size()
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not options.deterministic
    torch.manual_seed(options.seed)  # the same weights everywhere; what is drawn later need not be
    return device


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def train(options: argparse.Namespace, device: torch.device) -> None:
    images, held_out, classes = load(options)
    training = Training(options, classes, device)
    torch.manual_seed(options.seed + 1 + dist.get_rank())  # what each process drops is its own
    checkpoint = options.out / "checkpoint.pt"
    options.out.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists():
        training.resume(checkpoint)
        say(f"goes on after step {training.step}")
    a_step = options.batch * options.processes
    an_epoch = len(images) // a_step
    steps = options.steps or options.epochs * an_epoch
    parts = Parts(len(images), range(training.step, steps), options)
    to_train_on = iter(loader(Draws(images, options.seed), options, batch_sampler=parts))
    if held_out is not None:
        mine = range(dist.get_rank(), len(held_out), options.processes)
        held_out = loader(held_out, options, sampler=mine, batch_size=options.batch)
    clock, counted = time.perf_counter(), training.step
    while training.step < steps:
        loss = training.run(to_train_on, steps)
        step, is_end = training.step, training.step == steps
        if step % options.log_every == 0 or is_end:
            value, now = loss.item(), time.perf_counter()  # all that waits for the device
            rate, memory = (step - counted) * a_step / (now - clock), peak_bytes(device) / 2**20
            clock, counted = now, step
            say(f"step {step}/{steps} loss {value:.9g} images/s {rate:.0f} peak {memory:.0f} MiB")
        if held_out is not None and (step % an_epoch == 0 or is_end):
            say(f"step {step}/{steps} accuracy {training.accuracy(held_out):.4f}")
        if step % options.checkpoint_every == 0 or is_end:
            training.save(checkpoint)


def main(given: list[str] | None = None) -> None:
    options = arguments(given)
    device = start(options)
    try:
        train(options, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
