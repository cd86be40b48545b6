"""In which dtype what is computed."""

import torch


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic and of the saved statistics."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def partial_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what the programs of a reducing pass leave for the finalising step."""
    # A float32 mean would round off what decides the last digit of a float32 result; a 16-bit one has no such digit.
    return torch.float64 if dtype.itemsize >= 4 else torch.float32
