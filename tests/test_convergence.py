"""Training on real images: the fused and the original network side by side over 32 steps, fewer in the interpreter.

Training amplifies rounding, so neither run is compared with the other alone: both are held against the same steps in
float64. The fused run may be as far from them as twice the original is, plus what one rounding at the start grows to.
Whether a ReLU's input of almost 0 ends above or below it is chance in either run, and what follows is another run: so
of three starts two decide.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, resnet18

import fusedres

STEPS = 32


class Small(nn.Module):
    """A stem, an identity block, a projected block, a head: every site of a ResNet-18, small enough to interpret."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
        self.layer1 = BasicBlock(8, 8)
        self.layer2 = BasicBlock(8, 16, 2, shortcut)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


def digits(size: int, batch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """32 batches of handwritten digits, [batch, 3, size, size] in [0, 1]."""
    # On a GPU that is only lent for the kernels' sake, scikit-learn may be missing.
    data = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.tensor(data.images[: STEPS * batch] / 16.0)[:, None]
    images = F.interpolate(images, size=(size, size), mode="nearest").expand(-1, 3, -1, -1)
    labels = torch.tensor(data.target[: STEPS * batch])
    return list(zip(images.split(batch), labels.split(batch), strict=True))


def train(model: nn.Module, batches, dtype: torch.dtype, device) -> dict[str, torch.Tensor]:
    """Losses, parameters and running statistics after a step of SGD with momentum a batch."""
    model = model.to(device, torch.float64 if dtype == torch.float64 else torch.float32).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for images, labels in batches:
        images = images.to(device, next(model.parameters()).dtype)
        with torch.autocast(str(device.type), torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = F.cross_entropy(model(images), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    state = {k: v.double() for k, v in model.state_dict().items() if v.is_floating_point()}
    return {"loss": torch.stack(losses).double(), **state}


def distance(run: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    """By kind of tensor, the root of the summed squares of the differences over that of the values."""
    kinds: dict[str, list[torch.Tensor]] = {}
    for name, value in exact.items():
        kind = (
            name.rsplit(".", 1)[-1]
            if "running" in name
            else "loss"
            if name == "loss"
            else "parameters"
        )
        difference, size = (run[name] - value).square().sum(), value.square().sum()
        kinds.setdefault(kind, []).append(torch.stack([difference, size]))
    sums = {kind: torch.stack(found).sum(0) for kind, found in kinds.items()}
    return {kind: (difference / size).sqrt().item() for kind, (difference, size) in sums.items()}


def compare(model: nn.Module, batches, dtype: torch.dtype, device):
    """(distance of the fused run, distance of the original run) from the run in float64."""
    fused = copy.deepcopy(model)
    assert fusedres.fuse_(fused).n_fused > 0
    exact = train(copy.deepcopy(model), batches, torch.float64, device)
    ours = train(fused, batches, dtype, device)
    with fusedres.backend("off"):
        theirs = train(copy.deepcopy(model), batches, dtype, device)
    assert exact["loss"][-1] < exact["loss"][0]  # it learns
    return distance(ours, exact), distance(theirs, exact)


def farther(build, batches, dtype: torch.dtype, device) -> dict[str, float]:
    """What the fused run is too far off in, at two of three starts; empty where there are not two."""
    rounding = 100 * torch.finfo(torch.float32).eps
    good, found = 0, []
    for seed in range(3):
        torch.manual_seed(seed)
        ours, theirs = compare(build(), batches, dtype, device)
        far = {k: d for k, d in ours.items() if d > 2 * theirs[k] + rounding}
        good += not far
        found += [far] if far else []
        if good == 2 or len(found) == 2:
            break
    return found[-1] if len(found) == 2 else {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "steps",
    [
        pytest.param(STEPS, marks=pytest.mark.once),
        pytest.param(8, marks=pytest.mark.kernels),
        pytest.param(STEPS, marks=[pytest.mark.kernels, pytest.mark.slow], id="kernels"),
    ],
)
def test_small_network(steps, dtype, device):
    assert farther(Small, digits(8, 8)[:steps], dtype, device) == {}


@pytest.mark.once
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_resnet18(dtype, device):
    torch.manual_seed(0)
    ours, theirs = compare(resnet18(num_classes=10), digits(32, 8), dtype, device)
    rounding = 100 * torch.finfo(torch.float32).eps
    assert {k: d for k, d in ours.items() if d > 2 * theirs[k] + rounding} == {}
