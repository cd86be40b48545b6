"""Models with synchronised BatchNorms, each process with its part of a batch: what `test_sync` looks at.

    python sync_cases.py COLLECTIVES BACKEND SHARE RANK PROCESSES FOLDER

is one process of a group: it runs all cases of a share, and leaves what it found in FOLDER. A case is a model, which is
made alike in all processes, and what it is given; `alone` runs the same model, its BatchNorms not converted, on the
whole batch.
"""

from __future__ import annotations

import contextlib
import datetime
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fusedres

CHANNELS = 4
IMAGES = 6  # of a whole network
convert = nn.SyncBatchNorm.convert_sync_batchnorm

# --- models ------------------------------------------------------------------------------------------------------


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


class ProjectedSilu(Model):
    def forward(self, x, r):
        return F.silu(self.bn(x) + self.shortcut(r))


class Preactivation(Model):
    def forward(self, x, r):
        x = x + r
        return x * F.relu(self.bn(x))


class NoBias(Dual):
    def __init__(self) -> None:
        super().__init__()
        self.bn.register_parameter("bias", None)
        self.other.register_parameter("bias", None)


class OneOfTwo(Model):
    """The shortcut's BatchNorm is in eval mode, and a process's own."""

    def forward(self, x, r):
        return F.relu(self.bn(x) + self.other(r))

    def train(self, mode: bool = True):
        super().train(mode)
        self.other.eval()
        return self


class Checkpointed(nn.Module):
    """What is inside runs twice, and moves the running statistics twice, as PyTorch's does."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = Dual()

    def forward(self, x, r):
        return checkpoint(self.inside, x, r, use_reentrant=False)


class Ours(Model):
    """Modules of fusedres.nn, which are fused by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.act = fusedres.nn.BatchNormAct2d(CHANNELS, activation="silu")
        self.block = fusedres.nn.BasicBlock(CHANNELS, CHANNELS, shortcut="conv")
        self.pre = fusedres.nn.PreActBasicBlock(CHANNELS, CHANNELS)

    def forward(self, x, r):
        return self.pre(self.block(self.act(x, r)))


class Narrow(torchvision.models.ResNet):
    """A ResNet-18 with a sixteenth of the channels."""

    def __init__(self) -> None:
        super().__init__(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2], num_classes=5)
        self.fc = nn.Linear(32, 5)

    def _make_layer(self, block, planes, *args, **options):
        return super()._make_layer(block, planes // 16, *args, **options)


KEEP = fusedres.FuseConfig(keep_finite_statistics=True)
KEPT = {"before": (Projected, "before"), "after": (Preactivation, "after")}

# --- cases -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model and what it is given.

    sizes: images of each process. order: whether it is converted before or after it is fused. penalty: what is
    differentiated is the square of the gradients. members: of the group that shares the statistics. needs: what gets a
    gradient. parameters: their dtype, where it is not float32 or float64.
    """

    make: Callable[..., nn.Module]
    sizes: tuple[int, ...] = (3, 1, 0)
    dtype: torch.dtype = torch.float64
    order: str = "before"
    options: dict[str, Any] = field(default_factory=dict)
    plane: tuple[int, int] = (2, 3)
    layout: torch.memory_format = torch.contiguous_format
    training: bool = True
    autocast: bool = False
    compiled: bool = False
    compiler: str = "aot_eager"
    penalty: bool = False
    steps: int = 1
    mean: float = 1.0
    members: tuple[int, ...] | None = None
    needs: str = "xr weight bias"
    parameters: torch.dtype | None = None

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.make(**self.options)
        for norm in model.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.weight is not None:
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                if norm.bias is not None:
                    nn.init.normal_(norm.bias)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.rpartition(".")[2] in self.needs)
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return model.to(self.parameters or wide).train(self.training)

    def among(self, processes: int) -> Case:
        """The same with as many processes."""
        return replace(self, sizes=self.sizes[:processes])

    def batch(self) -> list[Tensor]:
        """x, r and the gradient of the output, of the whole batch."""
        torch.manual_seed(1)
        n = sum(self.sizes)
        shift = (
            torch.arange(n).view(-1, 1, 1, 1) + self.mean
        )  # what the processes have differs in its mean
        x, r, dy = (torch.randn(n, CHANNELS, *self.plane, dtype=torch.float64) for _ in range(3))
        return [t.to(self.dtype).to(memory_format=self.layout) for t in (x + shift, r - shift, dy)]


MANY = (
    Alone, Relu, Silu, Add, AddRelu, AddGelu, AddBroadcast, Dual, DualSilu, Projected, Preactivation, Ours,
)  # fmt: skip
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
CASES: dict[str, Case] = {
    **{make.__name__: Case(make, order=("before", "after")[k % 2]) for k, make in enumerate(MANY)},
    "converted later": Case(Projected, order="after"),
    "one of two": Case(OneOfTwo),
    "cumulative": Case(Dual, options={"momentum": None}, steps=3),
    "untracked": Case(Dual, options={"track_running_stats": False}),
    "not affine": Case(AddRelu, options={"affine": False}),
    "no bias": Case(NoBias),
    "channels_last": Case(Projected, layout=torch.channels_last),
    "eval": Case(Dual, training=False),
    "one value each": Case(AddRelu, sizes=(1, 1, 1), plane=(1, 1)),
    "frozen affine": Case(Dual, needs="xr"),
    "only the affine": Case(Dual, needs="weight bias"),
    "only the residual": Case(AddRelu, needs="r"),
    "two of three": Case(Dual, sizes=(3, 2, 2), members=(0, 1)),
    "checkpointed": Case(Checkpointed),
    "far from zero": Case(AddRelu, mean=3e3, dtype=torch.float32),
    "float32": Case(Preactivation, dtype=torch.float32, steps=2),
    **{f"AddRelu in {name}": Case(AddRelu, dtype=dtype) for name, dtype in HALF.items()},
    **{f"Dual in {name}": Case(Dual, dtype=dtype) for name, dtype in HALF.items()},
    "whole in bfloat16": Case(Preactivation, dtype=torch.bfloat16, parameters=torch.bfloat16),
    # Smooth: a mask may differ where a 16-bit product is rounded otherwise.
    "autocast": Case(ProjectedSilu, dtype=torch.float32, autocast=True),
    **{f"{make.__name__} twice": Case(make, penalty=True) for make in (Silu, AddRelu, AddGelu, Dual, Preactivation)},
}  # fmt: skip
# What each of them compiles takes seconds.
CASES |= {
    f"{name}, compiled": replace(case, compiled=True)
    for name, case in {
        "projected": Case(Projected, sizes=(3, 0, 1)),
        "tail": Case(AddGelu, sizes=(2, 3, 2), steps=2),
        "pre-activation": Case(Preactivation, sizes=(2, 3, 2), order="after"),
        "alone": Case(Alone, sizes=(2, 3, 2)),
        "not alike": Case(AddBroadcast, sizes=(2, 3, 2)),
        "cumulative": Case(Dual, options={"momentum": None}, steps=2),
        "float32": Case(Dual, dtype=torch.float32, sizes=(2, 3, 2)),
        "ours": Case(Ours, sizes=(2, 3, 2)),
        "inductor": Case(Projected, sizes=(2, 3, 2), compiler="inductor", steps=2),
        "tail, inductor": Case(AddGelu, sizes=(2, 3, 2), compiler="inductor", dtype=torch.float32),
    }.items()
}
# Those whose kernels differ; what the others are about is the same on both backends.
KERNELS = (
    "Silu", "AddRelu", "AddGelu", "Projected", "Preactivation", "channels_last", "only the affine", "only the residual",
    "far from zero", "float32", "Dual in bfloat16", "whole in bfloat16",
)  # fmt: skip


def share_of(name: str, backend: str) -> str:
    """The processes that run a case; the rest takes long."""
    if CASES[name].compiled:
        return (
            "compiled" if name.startswith("projected") and backend == "aten" else "compiled, rest"
        )
    if backend == "aten":
        return "eager"
    return "kernels" if name in KERNELS else "rest"


def found(model: nn.Module, case: Case, x: Tensor, r: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers after the last step."""
    run = torch.compile(model, backend=case.compiler, fullgraph=True) if case.compiled else model
    results: dict[str, Tensor] = {}
    for _ in range(case.steps):
        model.zero_grad()
        x, r = (
            t.detach().clone().requires_grad_(n in case.needs[:2]) for n, t in (("x", x), ("r", r))
        )
        with torch.autocast(x.device.type, torch.bfloat16, enabled=case.autocast):
            y = run(x, r)
        results = {"output": y.detach()}
        if case.penalty:
            given = [t for t in (x, r) if t.requires_grad]
            first = torch.autograd.grad(y, given, dy, create_graph=True, allow_unused=True)
            sum(g.square().sum() for g in first if g is not None).backward()
        else:
            y.backward(dy.to(y.dtype))
        leaves = {"x": x, "r": r, **dict(model.named_parameters())}
        results |= {f"grad {n}": t.grad.clone() for n, t in leaves.items() if t.grad is not None}
        results |= {f"state {n}": t.clone() for n, t in model.named_buffers()}
    return results


def alone(case: Case, oracle: bool = False, rank: int = 0) -> dict[str, Tensor]:
    """What one process finds with all that those which share with `rank` are given; `oracle`: in float64."""
    model, tensors = case.model(), case.batch()
    if case.members is not None:
        first, last = (sum(case.sizes[:n]) for n in (case.members[0], case.members[-1] + 1))
        rest = (sum(case.sizes[:rank]), sum(case.sizes[: rank + 1]))
        first, last = (first, last) if rank in case.members else rest
        tensors = [t[first:last] for t in tensors]
    if oracle:
        model, tensors = model.double(), [t.double() for t in tensors]
        case = replace(case, autocast=False)
    with fusedres.backend("aten"):
        return found(model, replace(case, compiled=False), *tensors)


def trained(net: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The state after two steps."""
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
    return {name.removeprefix("module."): t.cpu() for name, t in net.state_dict().items()}


def narrow() -> tuple[nn.Module, Tensor, Tensor]:
    """A network, and images and labels for each process."""
    torch.manual_seed(0)
    net, images = Narrow().double(), torch.randn(IMAGES, 3, 32, 32, dtype=torch.float64)
    return net, images, torch.arange(IMAGES) % 5


# --- a process ---------------------------------------------------------------------------------------------------


class Counting(TorchDispatchMode):
    """Which collectives are called, and who waits for a value."""

    WAITS = "_local_scalar_dense"

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        if function.namespace in ("c10d", "_c10d_functional") or name == self.WAITS:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


class Process:
    """One of the processes. device: where its tensors are."""

    def __init__(self, rank: int, processes: int, device: str) -> None:
        self.rank, self.processes, self.device = rank, processes, device

    def model(self, case: Case, config: fusedres.FuseConfig | None = None) -> nn.Module:
        """The model of a case, fused and converted."""
        model, group = case.model(), None
        if case.members is not None:
            group = torch.distributed.new_group(case.members)
        if case.order == "before":
            model = convert(model, group)
        fusedres.fuse_(model, config)
        if case.order == "after":
            model = convert(model, group)
        return model.to(self.device).train(case.training)

    def part(self, case: Case) -> list[Tensor]:
        first = sum(case.sizes[: self.rank])
        return [t[first : first + case.sizes[self.rank]].to(self.device) for t in case.batch()]

    def run(self, case: Case) -> dict[str, Tensor]:
        case = case.among(self.processes)
        results = found(self.model(case), case, *self.part(case))
        return {name: tensor.cpu() for name, tensor in results.items()}

    def one_value(self) -> dict[str, Tensor]:
        """One value a channel in all, which cannot be refused without waiting for the count."""
        return self.run(Case(AddRelu, sizes=(1, 0, 0), plane=(1, 1)))

    def collectives(self, make: type[Model]) -> dict[str, int]:
        """How many of each there are in a step."""
        case = Case(make).among(self.processes)
        with Counting() as counting:
            found(self.model(case), case, *self.part(case))
        return dict(counting.found)

    def kept_finite(self, make: type[Model], order: str) -> dict[str, Any]:
        """The buffers after a step with `keep_finite_statistics`: as the batch is, and with an infinity in one channel
        of one image of one process; and which operators asked for a value."""
        results: dict[str, Any] = {}
        for name in ("finite", "not finite"):
            case = Case(make, order=order).among(self.processes)
            model, (x, r, dy) = self.model(case, KEEP), self.part(case)
            if name == "not finite" and self.rank == 0:
                x[1, 2, 0, 1] = torch.inf
            with Counting() as counting:
                found(model, case, x, r, dy)
            results |= {
                name: {n: t.cpu() for n, t in model.named_buffers()},
                "asked": counting.found[Counting.WAITS],
            }
        return results

    def refused(self, what: str) -> tuple[str, bool]:
        """What is said of a transform, and whether the state is what it was."""
        # What moves running statistics is refused by torch.func itself.
        options = {"track_running_stats": what == "dual tensors"}
        case = Case(Dual, options=options).among(self.processes)
        model, (x, r, dy) = self.model(case), self.part(case)
        before = {name: t.clone() for name, t in model.state_dict().items()}
        try:
            if what == "dual tensors":
                with forward_ad.dual_level():
                    model(forward_ad.make_dual(x, dy), r)
            elif what == "jvp":
                torch.func.jvp(lambda x: model(x, r), (x,), (dy,))
            elif what == "grad":
                torch.func.grad(lambda x: model(x, r).sum())(x)
            else:
                torch.func.vmap(lambda x: model(x, r))(x[None])
        except NotImplementedError as error:
            return str(error), all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
        return "", False

    def report(self) -> list[tuple[str, str]]:
        """What is said of a model that was converted after it was fused."""
        model = Projected()
        fusedres.fuse_(model)
        rows = fusedres.explain(convert(model)).rows
        return [(row.where, row.note) for row in rows if row.status == "fused"]

    def parallel(self) -> dict[str, Tensor]:
        """A whole network by DistributedDataParallel, which has no objection once it is made."""
        net, images, labels = narrow()
        net = DistributedDataParallel(net.to(self.device))
        convert(net.module)
        fusedres.fuse_(net)
        each = IMAGES // self.processes
        mine = slice(each * self.rank, each * (self.rank + 1))
        return trained(net, images[mine].to(self.device), labels[mine].to(self.device))


def results(process: Process, backend: str, share: str) -> dict[str, Any]:
    """What a process finds."""
    names = [name for name in CASES if share_of(name, backend) == share]
    if share == "nccl":
        names = [name for name, case in CASES.items() if not case.compiled]
    found: dict[str, Any] = {name: process.run(CASES[name]) for name in names}
    if share in ("eager", "kernels"):
        found["one value"] = process.one_value()
        found["report"] = process.report()
        found["kept finite"] = {order: process.kept_finite(*each) for order, each in KEPT.items()}
        refused = ("dual tensors", "jvp", "grad", "vmap")
        found["refused"] = {what: process.refused(what) for what in refused}
    if share in ("eager", "rest"):
        found["collectives"] = {make.__name__: process.collectives(make) for make in MANY[:-1]}
        found["parallel"] = process.parallel()
    return found


def main(
    collectives: str, backend: str, share: str, rank: int, processes: int, folder: str
) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        collectives, init_method=f"file://{folder}/store", rank=rank, world_size=processes,
        timeout=datetime.timedelta(seconds=120),
    )  # fmt: skip
    fusedres.set_backend(backend)
    process = Process(rank, processes, f"cuda:{rank}" if collectives == "nccl" else "cpu")
    kernels = contextlib.nullcontext()
    if backend == "triton":
        from fusedres.ops.projection import in_triton

        kernels = in_triton()
    with kernels:
        torch.save(results(process, backend, share), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5]), sys.argv[6])
