"""The Triton kernels beside PyTorch on one small block, against float64: what `demo` shows where there is no GPU.

A process of its own, since Triton decides as it is imported whether its kernels are interpreted:
`TRITON_INTERPRET=1 python -m fusedres.cli.beside` prints them as JSON, {what is compared: {whose: error}}.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusedres

from ..tables import paragraph, table


class Block(nn.Module):
    """A residual block with a projected shortcut: one BN + ReLU, one BN + BN + add + ReLU."""

    def __init__(self, channels: int = 8, wide: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, wide, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.shortcut = nn.Conv2d(channels, wide, 1, stride=2, bias=False)
        self.bn3 = nn.BatchNorm2d(wide)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.bn3(self.shortcut(x)))


def step(block: Block, x: Tensor) -> dict[str, Any]:
    """Forward and backward: what came out, by what it is called."""
    x = x.clone().requires_grad_()
    y = block(x)
    (y * torch.cos(y.detach())).sum().backward()
    norm: Any = block.bn2
    return {
        "output": y.detach(),
        "gradient of the input": x.grad,
        "gradient of the weight": norm.weight.grad,
        "gradient of the bias": norm.bias.grad,
        "running variance": norm.running_var,
    }


def errors() -> dict[str, dict[str, float]]:
    """Of PyTorch in float32 and of the kernels, each against PyTorch in float64, relative to the largest value."""
    torch.manual_seed(0)
    block, x = Block(), 3 + torch.randn(4, 8, 12, 12)
    expected = step(copy.deepcopy(block).double(), x.double())
    plain = step(copy.deepcopy(block), x)
    fusedres.fuse_(block)
    with fusedres.backend("triton"):  # or an error
        kernels = step(block, x)
    result = {}
    for name, exact in expected.items():
        largest = float(exact.abs().max())
        result[name] = {
            who: float((found[name] - exact).abs().max()) / largest
            for who, found in (("PyTorch", plain), ("kernels", kernels))
        }
    return result


def run() -> str:
    """The table, from a child process; or a sentence that says why there is none."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "FUSEDRES_BACKEND": "auto"}
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", __name__], env=environment, capture_output=True, text=True
    )  # fmt: skip
    if child.returncode != 0:
        last = (child.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return paragraph(f"the kernels cannot be interpreted here: {last}")
    found = json.loads(child.stdout)
    rows = [["largest error, against float64", "PyTorch, float32", "the kernels, float32"]]
    rows += [[name, f"{e['PyTorch']:.1e}", f"{e['kernels']:.1e}"] for name, e in found.items()]
    return table(rows)


if __name__ == "__main__":
    print(json.dumps(errors()))
