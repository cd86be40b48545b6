"""The device while it measures: clocks, power, temperature and throttling, where the driver tells them."""

from __future__ import annotations

import shutil
import subprocess

import torch

from .record import Row

# metric -> what nvidia-smi calls it
NUMBERS = {
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_watts": "power.draw",
    "temperature_celsius": "temperature.gpu",
}
THROTTLE = "clocks_throttle_reasons.active"
IDLE = 0x1  # the one reason that is none


def device_state(device: torch.device, when: str) -> list[Row]:
    """Rows of what the driver tells now; a single row that says why there is nothing, where it does not."""
    if device.type != "cuda":
        return []
    told = _ask(device)
    if isinstance(told, str):
        return [Row("state", when, "driver", "clocks", note=f"not told: {told}")]
    *numbers, reasons = told
    rows = []
    for metric, text in zip(NUMBERS, numbers, strict=True):
        value = _number(text)
        rows.append(
            Row("state", when, "driver", metric, median=value, note="" if value is not None else f"not told: {text}")
        )  # fmt: skip
    rows.append(Row("state", when, "driver", "throttled", median=_throttled(reasons), note=reasons))
    return rows


def _ask(device: torch.device) -> list[str] | str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "nvidia-smi is not installed"
    properties = torch.cuda.get_device_properties(device)
    # By UUID: torch's numbers follow CUDA_VISIBLE_DEVICES, nvidia-smi's do not.
    which = f"GPU-{properties.uuid}" if hasattr(properties, "uuid") else "0"
    query = ",".join([*NUMBERS.values(), THROTTLE])
    command = [tool, f"--query-gpu={query}", "--format=csv,noheader,nounits", f"--id={which}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    values = [value.strip() for value in done.stdout.strip().split(",")]
    if done.returncode != 0 or len(values) != len(NUMBERS) + 1:
        return (done.stdout + done.stderr).strip()[
            :200
        ] or f"nvidia-smi ended with {done.returncode}"
    return values


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _throttled(reasons: str) -> float | None:
    """1 where clocks are held back for any reason but idleness."""
    try:
        return float(bool(int(reasons, 16) & ~IDLE))
    except ValueError:
        return None
