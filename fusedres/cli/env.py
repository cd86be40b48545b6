"""`fusedres env`: the versions, the device and the backend, to paste into an issue."""

from __future__ import annotations

import argparse
import os
import platform
from importlib import metadata

import torch

import fusedres
from fusedres import dispatch

from ..tables import table
from .device import choose_device, device_name

PACKAGES = (
    "triton", "torchvision", "timm", "transformers", "scikit-learn", "matplotlib", "tqdm", "rich",
)  # fmt: skip


def run(options: argparse.Namespace) -> None:
    rows = [
        *versions().items(),
        ("triton driver", _driver()),
        ("backend", _asked_for()),
        *_backends(),
    ]
    print(table(rows, head=False))


def versions() -> dict[str, str]:
    """fusedres, Python, and the packages it works with, by name; "not installed" where one is missing."""
    python = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    own = {"fusedres": fusedres.__version__, "python": python, "torch": str(torch.__version__)}
    return own | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    """What Triton's active driver drives; it is asked, not torch.cuda, since the launchers ask it too."""
    try:
        from triton.runtime import driver

        from ..kernels import chip
    except ImportError as error:
        return f"none: Triton does not load ({error})"
    if chip.INTERPRETED:
        return "none: TRITON_INTERPRET is set, kernels run in the interpreter"
    try:
        target, found = driver.active.get_current_target(), chip.current_chip()
    except RuntimeError as error:
        return f"none: {error}"
    return (
        f"{target.backend}, architecture {target.arch}, {found.multiprocessors} multiprocessors, "
        f"{found.shared_memory // 1024} KiB of shared memory a program"
    )


def _asked_for() -> str:
    variable = os.environ.get("FUSEDRES_BACKEND")
    origin = "FUSEDRES_BACKEND is not set" if variable is None else "from FUSEDRES_BACKEND"
    return f"{fusedres.get_backend()} is asked for ({origin})"


def _backends() -> list[tuple[str, str]]:
    rows = []
    for device in dict.fromkeys((torch.device("cpu"), choose_device("auto"))):
        try:
            name, reason = dispatch.resolve(device, torch.float32)
        except RuntimeError as error:
            name, reason = "nothing", str(error)
        rows.append((f"on {device.type}", f"{name} runs: {reason}  [{device_name(device)}]"))
    return rows
