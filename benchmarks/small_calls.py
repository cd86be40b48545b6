"""Every kernel at small and awkward shapes, for tools that watch memory accesses."""

from __future__ import annotations

import torch

import fusedres
from fusedres.functional import batch_norm_act

SHAPES = ((2, 3, 5, 7), (3, 24, 9, 9), (4, 64, 14, 14))


def main() -> None:
    """Forward and backward of each operator, over dtypes and layouts."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    calls = 0
    with fusedres.backend("auto"):
        for shape in SHAPES:
            for dtype in (torch.bfloat16, torch.float32):
                for layout in (torch.channels_last, torch.contiguous_format):
                    for residual in (False, True):
                        _call(shape, dtype, layout, residual, device)
                        calls += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"{calls} calls, forward and backward, on {device}")


def _call(shape, dtype, layout, residual: bool, device) -> None:
    def draw() -> torch.Tensor:
        values = torch.randn(shape, device=device, dtype=dtype)
        return values.contiguous(memory_format=layout).requires_grad_()

    vectors = [torch.rand(shape[1], device=device) for _ in range(4)]
    x, other = draw(), draw() if residual else None
    weight, bias = (vector.requires_grad_() for vector in vectors[2:])
    output = batch_norm_act(x, vectors[0], vectors[1], weight, bias, True, residual=other)
    leaves = [t for t in (x, weight, bias, other) if t is not None]
    torch.autograd.grad(output, leaves, torch.randn_like(output))


if __name__ == "__main__":
    main()
