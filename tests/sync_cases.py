"""Models with synchronised BatchNorms, each process with its part of a batch: what `test_sync` looks at.

`python sync_cases.py COLLECTIVES BACKEND RANK PROCESSES FOLDER` is one process of a group: it runs all cases, and leaves
what it found in FOLDER. A case is a model, made alike in all processes, and what it is given; `alone` runs the same
model, its BatchNorms not converted, on the whole batch.
"""

from __future__ import annotations

import copy
import datetime
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedres

CHANNELS = 4
convert = nn.SyncBatchNorm.convert_sync_batchnorm


class Model(nn.Module):
    """Two BatchNorms and a projection; a subclass says what it does with them."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(CHANNELS, **options)
        self.other = nn.BatchNorm2d(CHANNELS, **options)
        self.shortcut = nn.Sequential(
            nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False), nn.BatchNorm2d(CHANNELS, **options)
        )


class Alone(Model):
    def forward(self, x, r):
        return self.bn(x)


class Relu(Model):
    def forward(self, x, r):
        return F.relu(self.bn(x))


class Silu(Model):
    def forward(self, x, r):
        return F.silu(self.bn(x))


class Add(Model):
    def forward(self, x, r):
        return self.bn(x) + r


class AddRelu(Model):
    def forward(self, x, r):
        return F.relu(self.bn(x) + r)


class AddGelu(Model):
    def forward(self, x, r):
        return F.gelu(self.bn(x) + r)


class AddBroadcast(Model):
    def forward(self, x, r):
        return F.relu(self.bn(x) + r[:, :, :1, :1])


class Dual(Model):
    def forward(self, x, r):
        return F.relu(self.bn(x) + self.other(r))


class DualSilu(Model):
    def forward(self, x, r):
        return F.silu(self.bn(x) + self.other(r))


class Projected(Model):
    def forward(self, x, r):
        return F.relu(self.bn(x) + self.shortcut(r))


class Preactivation(Model):
    def forward(self, x, r):
        x = x + r
        return x * F.relu(self.bn(x))


class OneOfTwo(Model):
    """The shortcut's BatchNorm is a process's own, and in eval mode."""

    def forward(self, x, r):
        return F.relu(self.bn(x) + self.other(r))

    def train(self, mode: bool = True):
        super().train(mode)
        self.other.eval()
        return self


@dataclass(frozen=True)
class Case:
    """sizes: images of each process; `find`: what is done with the model."""

    make: Callable[[], nn.Module]
    sizes: tuple[int, ...] = (3, 1, 0)
    dtype: torch.dtype = torch.float64
    order: str = "before"
    training: bool = True
    layout: torch.memory_format = torch.contiguous_format
    autocast: bool = False
    compiled: bool = False
    steps: int = 2
    only: str = ""
    mean: float = 1.0
    parameters: torch.dtype | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.make(**self.options)
        for norm in model.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.weight is not None:
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.normal_(norm.bias)
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return model.to(self.parameters or wide).train(self.training)

    def batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """x, r and the gradient of the output, of the whole batch."""
        torch.manual_seed(1)
        n = sum(self.sizes)
        shift = torch.arange(n).view(-1, 1, 1, 1) + self.mean  # processes differ in their means
        x, r, dy = (torch.randn(n, CHANNELS, 3, 5, dtype=torch.float64) for _ in range(3))
        return tuple(
            t.to(self.dtype).to(memory_format=self.layout) for t in (x + shift, r - shift, dy)
        )


def found(model: nn.Module, case: Case, x: Tensor, r: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers after some steps on the same batch."""
    results = {}
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if case.compiled else model
    for _ in range(case.steps):
        model.zero_grad()
        x, r = (t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, r))
        with torch.autocast(x.device.type, torch.bfloat16, enabled=case.autocast):
            y = run(x, r)
        y.backward(dy.to(y.dtype))
        results = {"output": y.detach()}
        results |= {f"grad {name}": t.grad for name, t in (("x", x), ("r", r)) if t.grad is not None}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                results[f"grad of {name}"] = parameter.grad.clone()
        results |= {f"state {name}": t.clone() for name, t in model.named_buffers()}
    return results


def alone(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """What one process finds with the whole batch, in this dtype."""
    model = case.model()
    tensors = case.batch()
    if dtype == torch.float64:
        model, tensors = model.double(), tuple(t.double() for t in tensors)
    return found(model, Case(case.make, steps=case.steps, training=case.training), *tensors)


def synchronised(case: Case, group: Any) -> nn.Module:
    """The fused model, converted before or after it is fused."""
    model = case.model()
    if case.order == "before":
        model = convert(model, group)
        fusedres.fuse_(model)
    else:
        fusedres.fuse_(model)
        model = convert(model, group)
    if isinstance(model, OneOfTwo):
        model.train()
    return model


ONE = (Alone, Relu, Silu, Add, AddRelu, AddGelu, AddBroadcast)
TWO = (Dual, DualSilu, Projected, Preactivation)
CASES: dict[str, Case] = {
    **{f"{make.__name__}-{order}": Case(make, order=order) for make in (*ONE, *TWO) for order in ("before", "after")},
    **{
        f"{make.__name__}-compiled": Case(make, sizes=(2, 3, 2), compiled=True)
        for make in (Alone, AddGelu, AddBroadcast, Projected, Preactivation)
    },
    "cumulative compiled": Case(Dual, compiled=True, options={"momentum": None}),
    "uneven compiled": Case(AddRelu, compiled=True),
    "one of two": Case(OneOfTwo),
    "cumulative": Case(Dual, options={"momentum": None}),
    "untracked": Case(Dual, options={"track_running_stats": False}),
    "not affine": Case(AddRelu, options={"affine": False}),
    "channels_last": Case(AddRelu, layout=torch.channels_last),
    "eval": Case(Dual, training=False),
    "far from zero": Case(AddRelu, mean=3e3, dtype=torch.float32),
    **{
        f"{make.__name__}-{str(dtype)[6:]}": Case(make, dtype=dtype)
        for make in (AddRelu, Dual, Preactivation)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    },
}  # fmt: skip


def of_all(case: Case, rank: int, group: Any, device: str) -> dict[str, Tensor]:
    """What a process finds with its part of the batch."""
    model = synchronised(case, group).to(device)
    first = sum(case.sizes[:rank])
    mine = [t[first : first + case.sizes[rank]].to(device) for t in case.batch()]
    return found(model, case, *mine)


def main(collectives: str, backend: str, rank: int, processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        collectives, init_method=f"file://{folder}/store", rank=rank, world_size=processes,
        timeout=datetime.timedelta(seconds=120),
    )  # fmt: skip
    fusedres.set_backend(backend)
    device = f"cuda:{rank}" if collectives == "nccl" else "cpu"
    results: dict[str, Any] = {}
    only = sys.argv[6:]
    for name, case in CASES.items():
        if only and name not in only: continue
        try:
            results[name] = of_all(case, rank, None, device)
        except Exception:
            import traceback
            print(name); traceback.print_exc()
            raise
    torch.save(results, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
