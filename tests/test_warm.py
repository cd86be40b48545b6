"""Which kernels a step has to compile, how few those are, and `python -m fusedres warm`, which compiles them ahead."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch import nn

import fusedres
from fusedres.benchmarks import compile_time
from fusedres.benchmarks.compile_time import FORKS, PRODUCTS, TAILS, Counted
from fusedres.cli import ahead
from fusedres.cli.main import main

pytestmark = [pytest.mark.compiler, pytest.mark.by_size]

NHWC, NCHW = torch.channels_last, torch.contiguous_format
# How many launches an evaluation makes, and how many kernels it compiled for them.
DRIVE = """
import json, sys
import torch, torchvision, fusedres
from triton import knobs
from fusedres.benchmarks.compile_only import compile_only
from fusedres.cli import ahead
from fusedres.cli.shapes import ShapesOnly
misses = []
knobs.compilation.listener = lambda *, cache_hit, **_: None if cache_hit else misses.append(1)
model = torchvision.models.resnet18().eval().to(memory_format=torch.channels_last)
fusedres.fuse_(model)
network = ahead.Network(model, json.loads(sys.argv[1]), torch.bfloat16, torch.channels_last)
with compile_only(90) as launches, fusedres.backend("triton"), ShapesOnly():
    network.inference()
print(len(launches), len(misses))
"""


# --- how many ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("layout", "most"), [("channels_last", 16), ("contiguous", 28)])
def test_a_step_of_resnet50_needs_few_kernels(layout, most, dtype):
    """And two more, at most, for another batch or image size."""
    counted = Counted(dtype, layout)
    assert len(counted.jobs(TAILS)) <= most
    for batch in compile_time.OTHER_BATCHES:
        assert counted.added(TAILS, batch=batch) <= 2, batch
    for image in compile_time.OTHER_IMAGES:
        assert counted.added(TAILS, image=image) <= 2, image


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_one_launch_a_direction_is_one_kernel(layout):
    """Of all tails and forks of a step whose maps are small."""
    jobs = Counted(torch.bfloat16, layout).jobs(FORKS, batch=16)
    ones = Counter(
        job.kernel for job in jobs if job.kernel in ("bn_forward_kernel", "bn_backward_kernel")
    )
    assert ones == {"bn_forward_kernel": 1, "bn_backward_kernel": 1}


def test_a_batch_that_sixteen_does_not_divide_needs_no_kernels_of_its_own():
    counted = Counted(torch.bfloat16, "channels_last")
    assert counted.added(TAILS, batch=100) == 0


def test_forks_and_products_are_counted_apart():
    counted = Counted(torch.bfloat16, "channels_last")
    tails, forks, products = (counted.jobs(part) for part in (TAILS, FORKS, PRODUCTS))
    assert len(tails) <= len(forks) < len(products)
    assert {job.kernel for job in products} - {job.kernel for job in forks} == {
        "projection_kernel",
        "projection_grad_weight_kernel",
    }


def test_rows_of_the_suite():
    rows = {
        row.metric: row for row in Counted(torch.bfloat16, "channels_last").rows(TAILS, times=False)
    }
    assert set(rows) == set(compile_time.METRICS) - {"compile_seconds"}
    assert rows["kernels"].kernel == "resnet50, tails"
    assert "bn_stats_kernel 1" in rows["kernels"].note
    assert rows["kernels_added_by_image"].note.startswith("160x160 ")


# --- the shapes of a step ---------------------------------------------------------------------------------------------


class Plain(nn.Sequential):
    """What meets in a network: a strided convolution, pooling, a tail, a mean, a linear layer."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1),
            fusedres.nn.BasicBlock(32, 64, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("layout", [NHWC, NCHW], ids=["nhwc", "nchw"])
def test_shapes_alone_lead_to_the_launches_of_a_step_that_computes(layout, dtype, monkeypatch):
    model = Plain().train().to(memory_format=layout)
    fusedres.fuse_(model)
    network = ahead.Network(model, (8, 3, 32, 32), dtype, layout)
    jobs = ahead.jobs_of(network.training_step, compile_time.CHIP)
    monkeypatch.setattr(ahead, "ShapesOnly", contextlib.nullcontext)
    assert jobs == ahead.jobs_of(network.training_step, compile_time.CHIP)
    assert {job.kernel for job in jobs} >= {"bn_forward_kernel", "bn_backward_kernel"}


def test_nothing_is_computed_and_nothing_is_left_behind():
    model = Plain().train()
    fusedres.fuse_(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    network = ahead.Network(model, (4, 3, 32, 32), torch.float32, NCHW)
    first = ahead.jobs_of(network.training_step, compile_time.CHIP)
    assert first == ahead.jobs_of(network.training_step, compile_time.CHIP)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_evaluation_needs_one_kernel_a_kind():
    model = Plain().eval()
    fusedres.fuse_(model)
    network = ahead.Network(model, (4, 3, 32, 32), torch.float32, NHWC)
    jobs = ahead.jobs_of(network.inference, compile_time.CHIP)
    assert {job.kernel for job in jobs} == {"bn_apply_kernel"}


# --- the command ------------------------------------------------------------------------------------------------------


def warm(*arguments: str, cache) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_what_is_warmed_is_not_compiled_again(tmp_path):
    """In another process, through the library's own launchers."""
    said = warm(
        "-m", "fusedres", "warm", "resnet18", "--input", "4,3,64,64", "--dtype", "bf16",
        "--channels-last", "--eval", "--arch", "90", "--processes", "1", cache=tmp_path,
    )  # fmt: skip
    assert (said.returncode, said.stderr) == (0, "")
    assert "for sm_90 with 132 multiprocessors, in 1 processes" in said.stdout
    assert "compiled, 0 were there: " in said.stdout
    drive = warm("-c", DRIVE, json.dumps([4, 3, 64, 64]), cache=tmp_path)
    # Of 20 BatchNorms, three go into the tails of their blocks.
    assert drive.stdout.split() == ["17", "0"], drive.stderr


def test_a_training_step_that_is_warmed_finds_its_kernels(tmp_path, monkeypatch):
    """The same of a whole step: nothing is compiled the second time, whatever asks."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    model = fusedres.nn.BatchNormAct2d(16).train()
    network = ahead.Network(model, (16, 16, 8, 8), torch.float32, NHWC)
    jobs = ahead.jobs_of(network.training_step, compile_time.CHIP)
    assert len(jobs) == 5  # the images want no gradient: no pass writes one
    first, second = (list(ahead.compile_all(jobs, compile_time.CHIP, 1)) for _ in range(2))
    assert [each.was_there for each in first + second] == [False] * 5 + [True] * 5
    assert {each.job for each in first} == set(jobs)


def refusal(capsys, *arguments: str) -> str:
    """The one line that a mistake is answered with; the exit status is 2."""
    try:
        status = main(["warm", *arguments])
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr()
    assert status == 2
    return said.err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["resnet18", "--input", "4,3,64", "--arch", "90"], "resnet18 does not take 4x3x64: "),
        (["resnet18", "--input", "4x3", "--arch", "90"], "write it as 256,3,224,224"),
        (["resnet18", "--arch", "90"], "--input"),
        (["resnet81", "--input", "4,3,64,64", "--arch", "90"], "unknown model 'resnet81'"),
        (["resnet18", "--input", "4,3,64,64", "--arch", "20"], "at least 75"),
        (["resnet18", "--input", "4,3,64,64", "--arch", "89"], "say it with --multiprocessors"),
        (["resnet18", "--input", "4,3,64,64", "--multiprocessors", "8"], "goes with --arch"),
        (
            ["resnet18", "--input", "4,3,64,64", "--arch", "90", "--dtype", "half"],
            "'half' is none of",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(arguments, words, capsys):
    assert words in refusal(capsys, *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_an_architecture_is_asked_for(capsys):
    assert "name one, as --arch 90" in refusal(capsys, "resnet18", "--input", "4,3,64,64")


def test_a_model_of_which_nothing_is_fused_has_nothing_to_compile(capsys):
    assert main(["warm", "vgg11", "--input", "2,3,224,224", "--arch", "90"]) == 0
    assert "no kernels: a training step of vgg11" in capsys.readouterr().out


def test_a_kernel_that_does_not_compile_is_named():
    broken = ahead.Job("fusedres.kernels.stats", "bn_stats_kernel", "", {}, {}, {}, "{}")
    with pytest.raises(RuntimeError, match="bn_stats_kernel does not compile: "):
        list(ahead.compile_all([broken], compile_time.CHIP, 1))
