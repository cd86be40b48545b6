"""What BatchNorm, ReLU and the residual add move in a training step of a whole network, operation by operation.

The network runs forward and backward on the meta device at its real shapes (nothing is computed, nothing is allocated),
and every operation that reaches PyTorch's dispatcher is seen, the adds of gradients at the forks among them.
PyTorch's own operations are counted as their kernels read and write; a fused one is counted as the byte meter
measured it. Convolutions, pooling and the classifier are not counted, for anyone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fusedres

from ..activations import is_piecewise
from .compile_only import compile_only
from .traffic import Site, Traffic

# Passes over the activation: BatchNorm reads its input for the statistics and again to normalise it; its backward
# reads input and gradient to reduce, and again to write the input's gradient.
BATCH_NORMS = {
    "native_batch_norm": 3, "cudnn_batch_norm": 3, "_batch_norm_with_update": 3, "_native_batch_norm_legit": 3,
    "native_batch_norm_backward": 5, "cudnn_batch_norm_backward": 5, "batch_norm_backward": 5,
}  # fmt: skip
# These read each tensor that they are given, and write one.
ELEMENTWISE = ("add", "add_", "relu", "relu_", "threshold_backward", "clamp_min", "clamp_min_")
# name: (phase, where the input stands among its arguments)
FUSED = {
    "batch_norm_act": ("forward", 0),
    "batch_norm_act_backward": ("backward", 1),
    "dual_batch_norm_act": ("forward", 0),
    "dual_batch_norm_act_backward": ("backward", 1),
}
SMALL = 65536  # elements: num_batches_tracked and per-channel vectors are not activations


@dataclass
class Count:
    """Bytes by phase (forward, backward), and how many operations made them, by name."""

    bytes: Counter = field(default_factory=Counter)
    operations: Counter = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


Measured = Callable[[Site], Traffic]


class _Counting(TorchDispatchMode):
    def __init__(self, measured: Measured | None, layout: torch.memory_format) -> None:
        super().__init__()
        self._format, self._layout = layout, str(layout).removeprefix("torch.")
        self.count = Count()
        self.phase = "forward"
        self._measured = measured

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        name = function.overloadpacket.__name__
        moved = 0
        if name == "convolution" and result.dim() == 4:
            # On the meta device it forgets its input's layout.
            result = torch.empty_like(result, memory_format=self._format)
        if function.namespace == "fusedres" and name in FUSED:
            moved = self._fused(name, arguments)
        elif function.namespace == "aten":
            moved = _moved_by_aten(name, arguments)
        if moved:
            self.count.bytes[self.phase] += moved
            self.count.operations[name] += 1
        return result

    def _fused(self, name: str, arguments) -> int:
        phase, position = FUSED[name]
        input = arguments[position]
        if self._measured is None:
            raise RuntimeError("a fused operator was met, and there is no measurement of it")
        dtype = str(input.dtype).removeprefix("torch.")
        site = Site(_kernel_of(name, arguments), tuple(input.shape), dtype, self._layout)
        return getattr(self._measured(site), phase)


def _kernel_of(name: str, arguments) -> str:
    """Which of `floors.OPERATORS` a call of a fused operator is."""
    given = {
        argument.name: value for argument, value in zip(_schema(name), arguments, strict=False)
    }
    activation, skip = given["activation"], given.get("skip_stride")
    is_dual = name.startswith("dual")
    residual = given.get("residual") if "residual_dtype" not in given else given["residual_dtype"]
    kernel = "bn" + "_bn" * is_dual + "_add" * (residual is not None)
    if activation is not None:
        # What is moved depends on no more than whether a bit tells the derivative.
        kernel += "_relu" if is_piecewise(activation) else "_silu"
    kernel += "_known" * (given.get("residual_moments") is not None)
    if given.get("skip") is not None:
        kernel += "_fork" if skip is None else f"_fork{skip[0]}"
    return kernel


def _schema(name: str):
    return getattr(torch.ops.fusedres, name).default._schema.arguments


def _moved_by_aten(name: str, arguments) -> int:
    tensors = [t for t in arguments if isinstance(t, Tensor) and t.numel() >= SMALL and t.dim() > 2]
    if not tensors:
        return 0
    if name in BATCH_NORMS:
        return BATCH_NORMS[name] * _bytes(tensors[0])
    if name in ELEMENTWISE:
        return sum(map(_bytes, tensors)) + max(map(_bytes, tensors))
    return 0


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def count_step(
    build: Callable[[], nn.Module],
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype = torch.bfloat16,
    layout: torch.memory_format = torch.channels_last,
    measured: Measured | None = None,
    differentiable: bool = False,
) -> Count:
    """One forward and backward in training mode of plain PyTorch, for inputs of these shapes.

    With `measured` the network is counted as `fuse_` leaves it. `differentiable`: the inputs too (images are not).
    """
    with torch.device("meta"):
        network = build().train()
    for module in network.modules():
        if not isinstance(
            module, nn.modules.batchnorm._BatchNorm
        ):  # which autocast leaves in float32
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    if measured is not None:
        fusedres.fuse_(network)
    backend = "off" if measured is None else "triton"
    with compile_only(90), fusedres.backend(backend), _Counting(measured, layout) as counting:
        inputs = [
            torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=layout)
            for shape in shapes
        ]
        output = network(*(t.requires_grad_(differentiable) for t in inputs))
        counting.phase = "backward"
        output.backward(torch.empty_like(output))
    return counting.count


class MeasuredOnce:
    """Bytes of a site at any batch, from measurements at one or two small batches.

    Bytes grow linearly with the batch: per-channel vectors and partial sums, then so much an image. An image of
    `ENOUGH` elements and more is measured alone, since there the constant part is below half a percent.
    """

    ENOUGH = 400_000
    SMALL_BATCH = 200_000  # elements, at least, of the smaller of two measurements

    def __init__(self) -> None:
        self._wanted: dict[Site, None] = {}
        self._found: dict[Site, Traffic] = {}

    def __call__(self, site: Site) -> Traffic:
        """While collecting, remembers the site and answers nothing; after `measure` answers its bytes."""
        image = self._image(site)
        if image not in self._found:
            self._wanted[image] = None
            return Traffic(0, 0, 0, 0)
        return self._scaled(site)

    def measure(self, run: Callable[[list[Site]], list[Traffic]]) -> None:
        """Measure what was asked for so far."""
        plan = [
            Site(site.kernel, (batch, *site.shape[1:]), site.dtype, site.layout)
            for site in self._wanted
            for batch in self._batches(site)
        ]
        self._found.update(zip(plan, run(plan), strict=True))
        for image in self._wanted:
            self._found.setdefault(
                image, Traffic(0, 0, 0, 0)
            )  # known, though not measured by itself
        self._wanted.clear()

    def _image(self, site: Site) -> Site:
        return Site(site.kernel, (1, *site.shape[1:]), site.dtype, site.layout)

    def _batches(self, site: Site) -> tuple[int, ...]:
        size = math.prod(site.shape[1:])
        if size >= self.ENOUGH:
            return (1,)
        first = math.ceil(self.SMALL_BATCH / size)
        return (first, 2 * first)

    def _scaled(self, site: Site) -> Traffic:
        batches = self._batches(site)
        points = [
            self._found[Site(site.kernel, (n, *site.shape[1:]), site.dtype, site.layout)]
            for n in batches
        ]

        def at(name: str) -> int:
            values = [getattr(point, name) for point in points]
            if len(values) == 1:
                return values[0] * site.shape[0] // batches[0]
            slope = (values[1] - values[0]) / (batches[1] - batches[0])
            return round(values[0] + slope * (site.shape[0] - batches[0]))

        return Traffic(
            at("forward"), at("backward"), points[0].forward_launches, points[0].backward_launches
        )
