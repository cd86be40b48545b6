"""The bytes that the fused operators move, measured: run as a program, it interprets the kernels and prints JSON.

    python -m fusedres.benchmarks.traffic '[["bn_relu", [8, 16, 48, 48], "bfloat16", "channels_last"]]'

Triton decides to interpret when the kernels are decorated, so a process of its own does it (`measure_traffic`).
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from .floors import OPERATORS, Operator


@dataclass(frozen=True)
class Site:
    """One operator at one shape."""

    kernel: str
    shape: tuple[int, ...]
    dtype: str = "bfloat16"
    layout: str = "channels_last"


@dataclass(frozen=True)
class Traffic:
    """Bytes read and written, and kernel launches, of one forward and of one backward."""

    forward: int
    backward: int
    forward_launches: int
    backward_launches: int


class TrafficError(RuntimeError):
    """The interpreter could not run; the message says why."""


def measure_traffic(sites: Sequence[Site], processes: int = 1) -> list[Traffic]:
    """The byte meter's count of each site, the work shared by so many processes.

    Raises:
        TrafficError: Triton's interpreter does not run here.
    """
    # The largest sites are dealt out first, so that no process is left with two of them.
    order = sorted(range(len(sites)), key=lambda i: -math.prod(sites[i].shape))
    shares = [order[k::processes] for k in range(processes) if order[k::processes]]
    with ThreadPoolExecutor(processes) as pool:
        answers = list(pool.map(lambda share: _interpret([sites[i] for i in share]), shares))
    found = {
        i: t
        for share, answer in zip(shares, answers, strict=True)
        for i, t in zip(share, answer, strict=True)
    }
    return [found[i] for i in range(len(sites))]


def _interpret(sites: Sequence[Site], timeout: float = 600.0) -> list[Traffic]:
    wanted = json.dumps([[s.kernel, s.shape, s.dtype, s.layout] for s in sites])
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "FUSEDRES_BACKEND": "triton",
        "OMP_NUM_THREADS": "1",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "fusedres.benchmarks.traffic", wanted],
            env=environment, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise TrafficError(f"the interpreter took more than {timeout:.0f} s") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["it printed nothing"]
        raise TrafficError(f"the interpreter failed: {lines[-1]}")
    return [Traffic(*numbers) for numbers in json.loads(done.stdout)]


def run_operator(site: Site) -> tuple[Tensor, list[Tensor]]:
    """(output, leaves) of one call at a site, on the CPU; the caller differentiates."""
    from fusedres.functional import batch_norm_act
    from fusedres.ops.dual import dual_batch_norm_act
    from fusedres.ops.norm import BatchNorm, How

    operator = OPERATORS[site.kernel]
    dtype, layout = getattr(torch, site.dtype), getattr(torch, site.layout)
    channels = site.shape[1]

    def draw() -> Tensor:
        made = torch.randn(site.shape).to(dtype).contiguous(memory_format=layout)
        return made.requires_grad_()

    leaves = [draw(), *(torch.rand(channels).requires_grad_() for _ in range(2))]
    if operator.residual:
        leaves.append(draw())
    if operator.residual_norm:
        leaves += [torch.rand(channels).requires_grad_() for _ in range(2)]
        x, weight, bias, residual, residual_weight, residual_bias = leaves
        buffers = [make(channels) for make in (torch.zeros, torch.ones) * 2]
        norms = (
            BatchNorm(weight, bias, buffers[0], buffers[1]),
            BatchNorm(residual_weight, residual_bias, buffers[2], buffers[3]),
        )
        moments = torch.rand(1, 3, channels) if operator.moments else None
        how = How(operator.training, operator.activation)
        output = dual_batch_norm_act(x, residual, norms, how, moments)
        return output, leaves
    output = batch_norm_act(
        leaves[0], torch.zeros(channels), torch.ones(channels), leaves[1], leaves[2], operator.training,
        residual=leaves[3] if operator.residual else None, activation=operator.activation,
    )  # fmt: skip
    return output, leaves


def backward_of_two(operator: Operator, output: Tensor, gradient: Tensor, skip: Tensor) -> None:
    """The backward of an output whose second gradient, `skip`, came over a skip connection."""
    from fusedres.ops.node import saved_by

    stride = operator.skip or 1
    steps = [stride, stride] if stride > 1 else None
    saved = saved_by(output.grad_fn)
    if operator.residual_norm:
        common = (gradient, *saved, operator.training, operator.activation)
        torch.ops.fusedres.dual_batch_norm_act_backward(
            *common, [True] * 4, torch.float32, torch.float32, skip, steps
        )
    else:
        input, weight, residual, *kept = saved
        torch.ops.fusedres.batch_norm_act_backward(
            gradient, input, weight, *kept, operator.training, operator.activation, output.dtype, True, True, True,
            torch.float32, skip, steps, residual,
        )  # fmt: skip


def count(site: Site) -> Traffic:
    """One forward and backward under the meter; only where Triton interprets."""
    from .meter import meter

    with meter() as forward:
        output, leaves = run_operator(site)
    gradient = torch.randn(site.shape).to(output.dtype)
    gradient = torch.empty_like(output).copy_(gradient)
    stride = OPERATORS[site.kernel].skip
    with meter() as backward:
        if stride is None:
            torch.autograd.grad(output, leaves, gradient)
        else:
            layout = getattr(torch, site.layout)
            skip = gradient[:, :, ::stride, ::stride].clone(memory_format=layout)
            backward_of_two(OPERATORS[site.kernel], output, gradient, skip)
    return Traffic(
        forward.bytes, backward.bytes, len(forward.launches), len(backward.launches)
    )  # fmt: skip


def main() -> None:
    from fusedres.kernels.launch import passes

    torch.manual_seed(0)
    found = []
    for kernel, shape, dtype, layout in json.loads(sys.argv[1]):
        with passes("three"):  # a batch may stand for a larger one
            traffic = count(Site(kernel, tuple(shape), dtype, layout))
        found.append(
            [
                traffic.forward,
                traffic.backward,
                traffic.forward_launches,
                traffic.backward_launches,
            ]
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
