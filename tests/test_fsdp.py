"""FSDP2 (`fully_shard`): what the report says is what runs, whichever came first; the gradients are the plain ones."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F

import fusedres

from .test_torch_compile import Small


@pytest.fixture
def mesh():
    """One process is enough for shards: its parameters are DTensors between calls, and plain tensors within."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def shard(model: Small, where: str, **options) -> None:
    if where == "blocks":
        for block in model.layers:
            fully_shard(block, **options)
    fully_shard(model, **options)


def loss_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, 8, 8, generator=generator).to(dtype)
    return F.cross_entropy(model(images).float(), torch.tensor([0, 1, 2]))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        n: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for n, p in model.named_parameters()
    }


@pytest.fixture
def forwards(monkeypatch):
    """The kernels that write what a BatchNorm gives, as they are launched."""
    from fusedres.kernels.start import Launch

    found, start = [], Launch.start

    def noted(self, *arguments):
        if self.kernel.__name__ == "bn_apply_kernel":
            found.append(self.kernel.__name__)
        start(self, *arguments)

    monkeypatch.setattr(Launch, "start", noted)
    return found


@pytest.mark.once
@pytest.mark.composes("FullyShardedDataParallel (FSDP1), in front of fuse_ and behind it", "works")
@pytest.mark.parametrize("order", ["fuse_ first", "fuse_ last"])
def test_parameters_that_are_flat_between_calls(order, mesh):
    """As `FullyShardedDataParallel` leaves them: pieces of one flat tensor, which are put back for a call. (It wants
    several processes for it; what is done in front of a call stands here.)"""
    model, plain = Small(), Small()
    plain.load_state_dict(model.state_dict())
    shapes = {p: p.shape for p in model.parameters()}
    if order == "fuse_ first":
        fusedres.fuse_(model)
    for parameter in shapes:
        parameter.data = parameter.data.flatten()
    report = fusedres.fuse_(model)
    for parameter, shape in shapes.items():
        parameter.data = parameter.data.view(shape)
    loss_of(model).backward()
    loss_of(plain).backward()
    assert report.n_fused == len(report.rows)
    torch.testing.assert_close(gradients(model), gradients(plain))


@pytest.mark.cpu
@pytest.mark.kernels
@pytest.mark.parametrize("where", ["root", "blocks"])
@pytest.mark.parametrize("order", ["fuse_ first", "fully_shard first"])
@pytest.mark.composes("FSDP2 (fully_shard), in front of fuse_ and behind it", "works")
def test_what_the_report_says_is_what_runs(order, where, mesh, forwards):
    model = Small()
    if order == "fuse_ first":
        fusedres.fuse_(model)
    shard(model, where, mesh=mesh)
    if order == "fully_shard first":
        fusedres.fuse_(model)
    report = fusedres.explain(model)
    fused = {row.where for row in report.rows if row.status == "fused"}
    # FSDP hooks into the first block, which the stem behind the hook's back would run on.
    left = {"bn"} if (order, where) == ("fuse_ first", "blocks") else set()
    assert {row.where for row in report.rows} - fused == left
    loss_of(model)
    # The two BatchNorms of a projected tail are one pass.
    assert len(forwards) == len(fused) - 1


@pytest.mark.once
@pytest.mark.parametrize("where", ["root", "blocks"])
@pytest.mark.parametrize("order", ["fuse_ first", "fully_shard first"])
def test_the_gradients_are_those_of_the_plain_network(order, where, mesh):
    plain = Small()
    model = copy.deepcopy(plain)
    if order == "fuse_ first":
        fusedres.fuse_(model)
    shard(model, where, mesh=mesh)
    if order == "fully_shard first":
        assert fusedres.fuse_(model).n_fused == 8
    loss_of(model).backward(), loss_of(plain).backward()
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.once
@pytest.mark.composes("FSDP2 with MixedPrecisionPolicy", "works")
def test_bfloat16_parameters_and_float32_statistics_train(mesh):
    """As an unsharded network of such parameters does. Plain BatchNorms refuse that on a CPU, on a GPU they take it."""
    whole = Small()
    fused, plain = (copy.deepcopy(whole) for _ in range(2))
    for model in (fused, plain):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        shard(model, "blocks", mesh=mesh, mp_policy=policy)
    for parameter in whole.parameters():
        parameter.data = parameter.data.bfloat16()
    fusedres.fuse_(fused), fusedres.fuse_(whole)
    with pytest.raises(RuntimeError, match="expected scalar type BFloat16 but found Float"):
        loss_of(plain)
    loss_of(fused).backward(), loss_of(whole, torch.bfloat16).backward()
    expected = {name: gradient.float() for name, gradient in gradients(whole).items()}
    torch.testing.assert_close(gradients(fused), expected, rtol=0, atol=0)


@pytest.mark.cpu
@pytest.mark.composes("DTensor parameters that are DTensors in a call too", "steps aside")
def test_what_stays_a_dtensor_is_left_alone(mesh):
    """Tensor parallelism: nobody gathers these."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    model = Small()
    norm = model.layers[1].bn1
    for name in ("weight", "bias"):
        whole = distribute_tensor(getattr(norm, name).data, mesh, [Replicate()])
        setattr(norm, name, nn.Parameter(whole))
    (row,) = (row for row in fusedres.explain(model).rows if row.where == "layers.1.bn1")
    assert (row.status, row.reason) == ("left alone", "bn1: its parameters are DTensors")


TWO = """
import copy, sys
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
import fusedres, torchvision
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
for order in ("before", "after"):
    for where in ("root", "blocks"):
        torch.manual_seed(0)
        plain = torchvision.models.resnet18(num_classes=5)
        model = copy.deepcopy(plain)
        if order == "before":
            fusedres.fuse_(model)
        if where == "blocks":
            for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
                for block in stage:
                    fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if order == "after":
            assert fusedres.fuse_(model).n_fused == 20
        x, y = torch.randn(4, 3, 32, 32), torch.arange(4)
        for each in (model, plain):
            optimizer = torch.optim.SGD(each.parameters(), 0.01)
            for _ in range(2):
                optimizer.zero_grad()
                F.cross_entropy(each(x), y).backward()
                optimizer.step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.full_tensor(), plain.get_parameter(name), rtol=1e-3, atol=1e-4)
dist.destroy_process_group()
"""


@pytest.mark.once
@pytest.mark.slow
def test_two_processes_train_as_one_plain_one(tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, "-W", "ignore", *torchrun, str(tmp_path / "two.py")]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
