"""A case in one setting, ready to run: its inputs, what comes out of a module, and the steps that are timed."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .cases import Case, draw
from .timing import Step, last_level_cache

MODES = ("forward", "backward", "step")
LEARNING_RATE = (
    1e-6  # the weights stay what they are, whatever the number of steps; SGD takes as long
)
MOMENTUM = 0.9
MOST_SETS = 16


@dataclass(frozen=True)
class Setting:
    """On what, in which dtype and memory format. Operators take `dtype`; blocks and models run under autocast."""

    device: torch.device
    dtype: torch.dtype
    layout: torch.memory_format

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def layout_name(self) -> str:
        return str(self.layout).removeprefix("torch.").removesuffix("_format")


class Workload:
    """The inputs and gradients of a case: one set for results, several to rotate among while timing."""

    def __init__(self, case: Case, setting: Setting) -> None:
        self.case = case
        self.setting = setting
        self.autocast = case.level != "operator" and setting.dtype.itemsize < 4
        # Autocast takes float32 and casts what is to be cast.
        self._dtype = torch.float32 if self.autocast else setting.dtype
        self._sets: list[list[Tensor]] = []
        self._grads: dict[tuple, Tensor] = {}
        self._muted: Tensor | None = None

    def context(self) -> contextlib.AbstractContextManager:
        """Autocast where the case runs under it; its cache of cast weights would outlive a captured graph."""
        if not self.autocast:
            return contextlib.nullcontext()
        return torch.autocast(
            self.setting.device.type, dtype=self.setting.dtype, cache_enabled=False
        )

    def build(self) -> nn.Module:
        """The plain module of the case, on the device, with the weights that everyone gets."""
        with _seeded(0):
            module = self.case.build()
        module = module.train().to(self.setting.device)
        return module.to(memory_format=self.setting.layout)

    def inputs(self, i: int = 0) -> list[Tensor]:
        """Set `i`, modulo their number; a gradient is asked for where a network inside would need one."""
        while len(self._sets) <= i % self.rotation:
            made = draw(
                self.case, self._dtype, self.setting.layout, self.setting.device, len(self._sets)
            )
            for tensor in made:
                tensor.requires_grad_(self.case.level != "model")
            self._sets.append(made)
        return self._sets[i % self.rotation]

    @property
    def rotation(self) -> int:
        """How many sets make twice the last-level cache, so that none is found there when its turn comes."""
        one = self._dtype.itemsize * math.prod(self.case.shape) * (2 if self.case.residual else 1)
        return max(2, min(MOST_SETS, math.ceil(2 * last_level_cache(self.setting.device) / one)))

    @property
    def fits_in_cache(self) -> bool:
        """Whether even all the sets together may stay in the last-level cache."""
        one = self._dtype.itemsize * math.prod(self.case.shape) * (2 if self.case.residual else 1)
        return one * self.rotation < 2 * last_level_cache(self.setting.device)

    def results(self, module: nn.Module, wide: torch.dtype | None = None) -> dict[str, Tensor]:
        """Output, gradients and buffers of one forward and backward; with `wide`, module and inputs in that dtype."""
        inputs = [t.detach() for t in self.inputs()]
        context = self.context()
        if wide is not None:
            module, inputs, context = (
                module.to(wide),
                [t.to(wide) for t in inputs],
                contextlib.nullcontext(),
            )
        inputs = [t.requires_grad_(self.case.level != "model") for t in inputs]
        with context:
            output = module(*inputs)
        leaves = {f"input {i}": t for i, t in enumerate(inputs) if t.requires_grad}
        leaves |= {f"weight {n}": p for n, p in _named(module.named_parameters())}
        gradients = torch.autograd.grad(output, list(leaves.values()), self._grad_for(output))
        found = {"output": output.detach()}
        found |= {f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)}
        found |= {f"buffer {n}": b.detach().clone() for n, b in _named(module.named_buffers())}
        return found

    def step(self, module: nn.Module, mode: str, hot: bool = False) -> Step:
        """What is timed: `forward` and `backward` by themselves, or a whole training `step` with SGD."""
        pick = (lambda i: self.inputs(0)) if hot else self.inputs

        def forward(inputs: list[Tensor]) -> Tensor:
            with self.context():
                return module(*inputs)

        if mode == "forward":
            return Step(forward, pick)
        if mode == "backward":
            return self._backward_step(module, forward, pick)
        optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)

        def train(inputs: list[Tensor]) -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            for tensor in inputs:
                tensor.grad = None
            output = forward(inputs)
            torch.autograd.backward(output, self._grad_for(output))
            optimizer.step()
            return output

        return Step(train, pick)

    def _backward_step(self, module, forward: Callable, pick: Callable) -> Step:
        parameters = list(module.parameters())

        def prepare(i: int) -> tuple[Tensor, list[Tensor], Tensor]:
            inputs = pick(i)
            output = forward(inputs)
            leaves = [*(t for t in inputs if t.requires_grad), *parameters]
            return output, leaves, self._grad_for(output)

        return Step(lambda made: torch.autograd.grad(made[0], made[1], made[2]), prepare)

    def _grad_for(self, output: Tensor) -> Tensor:
        """The gradient that comes in: the same values for every provider, in the output's dtype and memory format."""
        key = (tuple(output.shape), output.dtype, output.stride())
        if key not in self._grads:
            generator = torch.Generator(output.device).manual_seed(1)
            values = torch.randn(output.shape, generator=generator, device=output.device)
            if self._muted is not None:
                values.masked_fill_(self._muted, 0.0)
            narrow = values.to(self.setting.dtype)
            self._grads[key] = torch.empty_like(output.detach()).copy_(narrow)
        return self._grads[key]

    def mute(self, where: Tensor) -> None:
        """Let no gradient come in at these places of the output."""
        self._muted = where
        self._grads.clear()


def captured(step: Step, sets: int) -> Step:
    """The step as CUDA graphs, one for each of `sets` inputs: what is timed is their replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(3):
            step.run(step.prepare(i))
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graphs, outputs, pool = [], [], None
    for i in range(sets):
        graph = torch.cuda.CUDAGraph()
        argument = step.prepare(i)
        with torch.cuda.graph(graph, pool=pool):
            outputs.append(step.run(argument))
        pool = graph.pool()
        graphs.append(graph)
    torch.cuda.synchronize()

    def replay(i: int) -> Tensor:
        graphs[i].replay()
        return outputs[i]

    return Step(replay, lambda i: i % sets)


def _named(pairs: Iterator[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """By position: a provider may call its parameters something else, but has them in the same order."""
    return [(str(i), tensor) for i, (_, tensor) in enumerate(pairs)]


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
