"""examples/train.py: fused and plain lose alike, and a training that was killed ends as one that was not."""

from __future__ import annotations

import importlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SMALL = ["--image-size", "32", "--batch", "8", "--log-every", "1", "--warmup", "2"]


@pytest.fixture
def train(monkeypatch):
    """The script as a module; what it sets for the process is put back."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return importlib.import_module("train")


def losses(train, capsys, *given: object) -> torch.Tensor:
    train.main([*SMALL, *map(str, given)])
    return torch.tensor([float(n) for n in re.findall(r"loss (\S+)", capsys.readouterr().out)])


# --- fused and plain -------------------------------------------------------------------------------------------------


LOOPS = [
    pytest.param("timm:test_resnet", ["--accumulate", "2", "--ema", "0.9"], id="accumulated"),
    pytest.param("timm:test_resnet", ["--dtype", "bf16", "--channels-last"], id="bf16, nhwc"),
    pytest.param("timm:test_resnet", ["--dtype", "fp16"], id="fp16, scaled"),
    pytest.param("resnet18", ["--label-smoothing", "0"], id="torchvision", marks=pytest.mark.slow),
]


@pytest.mark.once  # in the interpreter a step of these takes minutes
@pytest.mark.parametrize(("model", "given"), LOOPS)
@pytest.mark.composes("training loop: autocast, GradScaler, EMA, accumulated gradients", "works")
def test_the_losses_with_and_without_fuse_are_the_same(
    train, model, given, monkeypatch, capsys, tmp_path
):
    """To the rounding of the plain run, which its distance from the same run in float64 shows."""
    assert_alike(train, ["--model", model, "--steps", 3, *given], monkeypatch, capsys, tmp_path)


def assert_alike(train, given, monkeypatch, capsys, tmp_path):
    fused = losses(train, capsys, *given, "--fuse", "--out", tmp_path / "fused")
    plain = losses(train, capsys, *given, "--out", tmp_path / "plain")
    build, to_device = train.build, train.Training.to_device

    def wide(self, images, labels):
        images, labels = to_device(self, images, labels)
        return images.double(), labels

    monkeypatch.setattr(train, "build", lambda *asked: build(*asked).double())
    monkeypatch.setattr(train.Training, "to_device", wide)
    exact = losses(train, capsys, *given, "--dtype", "fp32", "--out", tmp_path / "exact")
    rounding = (plain - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
    assert len(exact) > 1
    assert (fused - plain).abs().max() <= 4 * rounding


class Small(nn.Sequential):
    """A stem and two blocks of torchvision's, one of them projected: 6 BatchNorms."""

    def __init__(self, classes: int) -> None:
        block, shortcut = torchvision.models.resnet.BasicBlock, nn.Conv2d(4, 8, 1, 2, bias=False)
        super().__init__(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
            block(4, 4), block(4, 8, 2, nn.Sequential(shortcut, nn.BatchNorm2d(8))),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
        )  # fmt: skip


@pytest.mark.kernels
@pytest.mark.parametrize(
    "given",
    [
        [],
        pytest.param(["--accumulate", 2], marks=pytest.mark.slow),
        pytest.param(["--dtype", "bf16", "--channels-last"], marks=pytest.mark.slow),
    ],
)
def test_the_losses_by_the_kernels_are_the_same(train, given, monkeypatch, capsys, tmp_path):
    """Of a model and images that are small enough for the interpreter; as above."""
    # The Triton product of a projection rounds to tf32 where it may, which no CPU does.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(train, "build", lambda name, classes: Small(classes))
    given = ["--data", "synthetic", "--image-size", 8, "--batch", 4, "--steps", 2, *given]
    assert_alike(train, given, monkeypatch, capsys, tmp_path)


# --- killed ----------------------------------------------------------------------------------------------------------


KILLED = """
import os, signal, sys
import torch, train
run, save = train.Training.run, torch.save
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def until_the_fourth(self, *given):
    return die() if self.step == 3 else run(self, *given)
def half(state, file, **options):
    if not isinstance(state, dict) or state["step"] < 4:
        return save(state, file, **options)
    file.write(b"half")
    file.flush()
    die()
if sys.argv.pop(1) == "step":
    train.Training.run = until_the_fourth
else:
    torch.save = half
train.main(sys.argv[1:])
"""


@pytest.fixture
def run(tmp_path):
    """A process, or several by torchrun, with a script of the examples' folder or a text; the exit status."""
    path = os.pathsep.join(filter(None, [str(EXAMPLES), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    environment.pop("WORLD_SIZE", None)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]

    def start(script: str, *given: object, processes: int = 1) -> tuple[int, str]:
        path = EXAMPLES / script
        if "\n" in script:
            path = tmp_path / "script.py"
            path.write_text(script)
        several = [*torchrun, str(processes)] if processes > 1 else []
        command = [sys.executable, "-W", "ignore", *several, str(path), *map(str, given)]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        return done.returncode, done.stdout + done.stderr

    return start


@pytest.fixture
def photographs(tmp_path):
    """A folder of 24 images in two classes, as `--data PATH` wants it."""
    import numpy as np
    from PIL import Image

    numbers = np.random.default_rng(0)
    for k in range(24):
        folder = tmp_path / "images" / ("val" if k >= 20 else "train") / "ab"[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = numbers.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    return tmp_path / "images"


def same(one: object, other: object) -> bool:
    """Whether two checkpoints hold the same bits."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


# Dropout in the classifier, crops and flips drawn for each image, a scaled loss, an average, parts.
DROPS = [
    *SMALL, "--model", "mobilenet_v3_small", "--fuse", "--dtype", "fp16", "--accumulate", 2, "--ema", 0.9,
    "--steps", 5, "--checkpoint-every", 2,
]  # fmt: skip


@pytest.mark.once
@pytest.mark.parametrize(
    ("processes", "more"),
    [
        (1, []),
        pytest.param(2, [], marks=pytest.mark.slow),
        pytest.param(2, ["--sync-bn"], marks=pytest.mark.slow),
    ],
    ids=["one", "two", "two, sync-bn"],
)
@pytest.mark.composes("checkpoint, kill and resume", "works")
def test_a_training_that_was_killed_twice_ends_as_one_that_was_not(
    run, photographs, processes, more, tmp_path
):
    """Bit for bit: killed after a step behind the last checkpoint, then in the middle of writing one, then loaded by
    other processes."""
    given = [*DROPS, *more, "--data", photographs, "--out"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    status, said = run("train.py", *given, whole, processes=processes)
    assert status == 0, said
    for when in ("step", "save"):
        status, said = run(KILLED, when, *given, killed, processes=processes)
        assert "SIGKILL" in said if processes > 1 else status == -signal.SIGKILL, said
    assert (killed / "checkpoint.writing").read_bytes() == b"half"
    status, said = run("train.py", *given, killed, "--workers", 1, processes=processes)
    assert (status, "goes on after step 2" in said) == (0, True), said
    one, other = (torch.load(each / "checkpoint.pt") for each in (whole, killed))
    assert (one["step"], {"model", "average", "optimizer", "scaler"} <= one.keys()) == (5, True)
    assert same(one, other)


@pytest.mark.once
def test_another_training_is_not_gone_on_with(train, capsys, tmp_path):
    given = ["--model", "timm:test_resnet", "--data", "synthetic", "--steps", 1, "--out", tmp_path]
    losses(train, capsys, *given)
    with pytest.raises(
        SystemExit, match=r": a training with different dtype, lr; choose another --out"
    ):
        losses(train, capsys, *given, "--lr", 0.2, "--dtype", "bf16")


@pytest.mark.once
def test_a_step_of_two_processes_sees_each_image_of_an_epoch_once(train, monkeypatch):
    options = train.arguments(["--batch", "4", "--accumulate", "2"])
    options.processes = 2
    drawn = {}
    for rank in (0, 1):
        monkeypatch.setattr(train.dist, "get_rank", lambda rank=rank: rank)
        drawn[rank] = list(train.Parts(17, range(4), options))
    for epoch in (0, 1):
        parts = [part for rank in (0, 1) for part in drawn[rank][4 * epoch :][:4]]
        draws = {draw for part in parts for draw in part}
        assert (len(draws), {draw // 17 for draw in draws}) == (16, {epoch})
    # From the third step on the same as without a stop.
    monkeypatch.setattr(train.dist, "get_rank", lambda: 0)
    assert list(train.Parts(17, range(2, 4), options)) == drawn[0][4:]


@pytest.mark.once
@pytest.mark.parametrize(("step", "rate"), [(0, 0.05), (1, 0.1), (2, 0.1), (6, 0.05), (10, 0.0)])
def test_the_learning_rate_goes_up_in_a_line_and_down_in_half_a_cosine(train, step, rate):
    options = train.arguments(["--warmup", "2", "--lr", "0.1"])
    assert train.learning_rate(step, 10, options) == pytest.approx(rate)


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.composes("DistributedDataParallel and torch.compile, by torchrun", "works")
def test_two_processes_train_alike_compiled_or_not(run, tmp_path):
    given = [*SMALL, "--model", "timm:test_resnet", "--fuse", "--steps", 2]
    said = [
        run("train.py", *given, *more, "--out", tmp_path / str(len(more)), processes=2)
        for more in ([], ["--compile"])
    ]
    assert [status for status, _ in said] == [0, 0], said
    eager, compiled = (
        torch.tensor([float(n) for n in re.findall(r"loss (\S+)", text)]) for _, text in said
    )
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


WIDE = """
import sys
import train
build, to_device = train.build, train.Training.to_device
def wide(self, images, labels):
    images, labels = to_device(self, images, labels)
    return images.double(), labels
train.build = lambda *asked: build(*asked).double()
train.Training.to_device = wide
train.main(sys.argv[1:])
"""


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.composes("DistributedDataParallel with SyncBatchNorm on a CPU, by torchrun", "works")
def test_two_processes_with_shared_statistics_train_as_one_with_the_whole_batch(run, tmp_path):
    """In float64; the one process is plain PyTorch, whose SyncBatchNorm does not run on a CPU."""
    given = [
        "--model",
        "timm:test_resnet",
        "--image-size",
        32,
        "--warmup",
        2,
        "--steps",
        3,
        "--out",
    ]
    one = run(WIDE, *given, tmp_path / "one", "--batch", 8)
    two = run(WIDE, *given, tmp_path / "two", "--batch", 4, "--sync-bn", "--fuse", processes=2)
    assert (one[0], two[0]) == (0, 0), two[1]
    expected, found = (torch.load(tmp_path / name / "checkpoint.pt") for name in ("one", "two"))
    for name in ("model", "average"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-9)


@pytest.mark.once
def test_without_fuse_shared_statistics_on_a_cpu_are_refused(train, monkeypatch, tmp_path):
    options = train.arguments(["--sync-bn", "--model", "timm:test_resnet"])
    options.processes = 2
    with pytest.raises(
        SystemExit, match="PyTorch's SyncBatchNorm does not run on a CPU; add --fuse"
    ):
        train.prepare(options, 10, torch.device("cpu"))


@pytest.mark.once
def test_the_script_stays_short_enough_to_be_read():
    assert len((EXAMPLES / "train.py").read_text().splitlines()) < 350
