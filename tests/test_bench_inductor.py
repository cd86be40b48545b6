"""What inductor is said to do, held to what it was seen to do: passes over memory and kernels, no GPU needed."""

from __future__ import annotations

import multiprocessing
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedres.benchmarks.inductor import inductor_schedule

pytestmark = pytest.mark.once

SHAPE = (256, 64, 56, 56)
SMALL_CHANNEL = (256, 2048, 7, 7)
FORMATS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}


def activation(shape=SHAPE, layout="nhwc", *, grad=True) -> Tensor:
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    return x.to(memory_format=FORMATS[layout]).requires_grad_(grad)


def vectors(channels: int) -> list[Tensor]:
    """weight, bias, running mean, running var: float32, as under autocast."""
    return [torch.empty(channels).requires_grad_(i < 2) for i in range(4)]


def bn(x, weight, bias, mean, var):
    return F.batch_norm(x, mean, var, weight, bias, training=True)


def bn_relu(x, *vectors):
    return torch.relu(bn(x, *vectors))


def bn_add_relu(x, residual, *vectors):
    return torch.relu(bn(x, *vectors) + residual)


def projected(x, shortcut, *vectors):
    return torch.relu(bn(x, *vectors[:4]) + bn(shortcut, *vectors[4:]))


# The expression, tensors of the activation's size, BatchNorms.
ROWS = {
    "BN+ReLU": (bn_relu, 1, 1),
    "BN+add+ReLU": (bn_add_relu, 2, 1),
    "BN+BN+add+ReLU": (projected, 2, 2),
}


def schedule(row: str, shape=SHAPE, layout="nhwc"):
    function, tensors, norms = ROWS[row]
    inputs = [activation(shape, layout) for _ in range(tensors)]
    return inductor_schedule(function, [*inputs, *vectors(shape[1]) * norms])


def passes(moved: int, shape=SHAPE) -> float:
    return moved / (2 * torch.Size(shape).numel())


@pytest.mark.parametrize(
    ("row", "shape", "layout", "forward", "backward", "kernels"),
    [
        ("BN+ReLU", SHAPE, "nhwc", 3.5, 6, (4, 4)),
        ("BN+add+ReLU", SHAPE, "nhwc", 4.5, 7.5, (4, 5)),
        ("BN+BN+add+ReLU", SHAPE, "nhwc", 5.5, 9, (7, 6)),
        # A channel of 256 x 49 elements fits one block: read once, normalised where it lies.
        ("BN+ReLU", SMALL_CHANNEL, "nchw", 2.5, 3.5, (1, 1)),
    ],
    ids=["bn_relu", "bn_add_relu", "projected", "bn_relu-nchw-C2048-H7"],
)
def test_passes_and_kernels(row, shape, layout, forward, backward, kernels):
    """Within 3 percent, partial sums and vectors included; the kernels are torch 2.11's and 2.15's."""
    got = schedule(row, shape, layout)
    assert passes(got.forward_bytes, shape) == pytest.approx(forward, rel=0.03)
    assert passes(got.backward_bytes, shape) == pytest.approx(backward, rel=0.03)
    assert (got.forward_kernels, got.backward_kernels) == kernels
    assert got.forward_extern_bytes == got.backward_extern_bytes == got.conversion_bytes == 0


def test_pointwise():
    """One read, one write, one kernel; nothing to differentiate, no backward."""
    got = inductor_schedule(torch.relu, [activation(grad=False)])
    assert passes(got.forward_bytes) == 2
    assert (got.forward_kernels, got.backward_kernels, got.backward_bytes) == (1, 0, 0)


def test_planted_pass_is_seen():
    """An output more is a write more."""
    got = inductor_schedule(lambda x: (torch.relu(x), x + 1), [activation(grad=False)])
    assert passes(got.forward_bytes) == 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(64)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)))


def test_module_under_autocast():
    """The convolution's bytes stand apart, its weight's cast is a conversion, and its output stays channels-last."""
    block = Block().to(memory_format=torch.channels_last)
    before = {name: value.data_ptr() for name, value in block.state_dict().items()}
    got = inductor_schedule(block, [activation(grad=False)], autocast=torch.bfloat16)
    assert passes(got.forward_bytes) == pytest.approx(3.5, rel=0.03)
    assert passes(got.backward_bytes) == pytest.approx(6, rel=0.03)
    weight = block.conv.weight.numel()
    # Forward the weight from float32 to bfloat16, backward its gradient the other way.
    assert got.conversion_bytes == 2 * 6 * weight
    assert got.forward_extern_bytes == 2 * (2 * torch.Size(SHAPE).numel() + weight)
    assert {name: value.data_ptr() for name, value in block.state_dict().items()} == before
    assert all(value.device.type == "cpu" for value in block.state_dict().values())


def patchable() -> dict[str, object]:
    """What the stand-in replaces, as it is now."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor import config, graph

    return {
        "is_available": torch.cuda.is_available,
        "properties": torch.cuda.get_device_properties,
        "count": torch.cuda.device_count,
        "format": torch._C._conv_determine_backend_memory_format,
        "interface": dict(vars(CudaInterface)),
        "worker": dict(vars(CudaInterface.Worker)),
        "compile": graph.GraphLowering.compile_to_module,
        "config": (config.compile_threads, config.force_disable_caches, config.shape_padding),
        "filters": list(warnings.filters),
        "children": multiprocessing.active_children(),
    }


def fails(x):
    raise ArithmeticError("planted")


@pytest.mark.parametrize("function", [torch.relu, fails], ids=["done", "failed"])
def test_nothing_stays_patched(function):
    inductor_schedule(torch.sigmoid, [activation(grad=False)])  # imports what it needs
    available, before = torch.cuda.is_available(), patchable()
    if function is fails:
        with pytest.raises(RuntimeError, match="no schedule without running it: "):
            inductor_schedule(function, [activation()])
    else:
        inductor_schedule(function, [activation()])
    assert patchable() == before
    assert torch.cuda.is_available() is available
    # What is compiled next runs, and on what it is given.
    compiled = torch.compile(lambda x: torch.relu(x) + 1, backend="aot_eager")
    assert compiled(torch.tensor([-1.0, 2.0])).tolist() == [1, 3]


def test_another_private_api_is_one_sentence(monkeypatch):
    """A torch whose parts have moved is refused with what is missing, not with a traceback of ours."""
    from torch._inductor import graph

    monkeypatch.delattr(graph.GraphLowering, "compile_to_module")
    with pytest.raises(RuntimeError, match=r"running it: AttributeError: .*compile_to_module"):
        inductor_schedule(torch.relu, [activation()])


def test_unknown_architecture():
    with pytest.raises(ValueError, match="architecture 12 is unknown; known are: 90"):
        inductor_schedule(torch.relu, [activation()], architecture=12)
