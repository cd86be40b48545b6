"""The device a command runs on, and which backend runs there, in words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

import fusedres
from fusedres import dispatch

from .errors import CommandError


def choose_device(name: str) -> torch.device:
    """`auto` is the accelerator where there is one, else the CPU; anything else is a torch device.

    Raises:
        CommandError: no such device here.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found if found is not None else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CommandError(f"--device {name!r} is not a device; try cpu, cuda or cuda:0") from error
    if device.type == "cpu":
        return device
    here = torch.accelerator.current_accelerator(check_available=True)
    if here is None or here.type != device.type:
        there_is = "cpu" if here is None else f"cpu and {here.type}"
        raise CommandError(f"--device {name!r} is not available; here there is {there_is}")
    count = torch.accelerator.device_count()
    if device.index is not None and device.index >= count:
        raise CommandError(
            f"--device {name!r} does not exist; there are {count} {here.type} devices"
        )
    return device


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    module = torch.get_device_module(device)
    name = getattr(module, "get_device_name", lambda device: "")(device)
    return f"{device} ({name})" if name else str(device)


@dataclass(frozen=True)
class Choice:
    """The backend that runs, why it is that one, and what may be expected of it."""

    name: str
    reason: str
    expectation: str


EXPECTATIONS = {
    "off": "both models run the same code: no difference is to be expected",
    "aten": "plain PyTorch makes the same passes over memory as the original: no speed-up is to be expected",
    "triton": "the fused Triton kernels",
    "interpreted": "the fused Triton kernels, interpreted on the CPU: for checking results, far slower than PyTorch",
}


@contextmanager
def chosen_backend(name: str | None, device: torch.device, dtype: torch.dtype) -> Iterator[Choice]:
    """The backend (None: the one that is set) for as long as a command runs, and what will run for it.

    Raises:
        CommandError: the triton backend is asked for and cannot run there.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(fusedres.backend(name or fusedres.get_backend()))
        except RuntimeError as error:
            raise CommandError(str(error)) from error
        yield _choice(device, dtype)


def _choice(device: torch.device, dtype: torch.dtype) -> Choice:
    try:
        if fusedres.get_backend() == "off":
            return Choice("off", "swapped blocks run their own forward", EXPECTATIONS["off"])
        name, reason = dispatch.resolve(device, dtype)
    except RuntimeError as error:
        raise CommandError(str(error)) from error
    interpreted = name == "triton" and device.type == "cpu"
    return Choice(name, reason, EXPECTATIONS["interpreted" if interpreted else name])
