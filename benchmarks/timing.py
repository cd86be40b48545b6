"""The clock: how one step is timed, and when two times differ.

Warm-up is outside the numbers. On a GPU each repetition stands between two device events and the stream is not drained
in between, as in training; on a CPU `time.perf_counter`. A step is timed in rounds, and the rounds of all providers
take turns: what drifts (clocks, temperature, neighbours) drifts for all of them, and shows as the run-to-run spread.

What Python costs is processor time instead (`processor_time`), which does not count while others have the processor.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROUNDS = 3
WARM_UP = 5  # turns that do not count
# Two copies of one module on a CPU were seen 2 percent apart, over all rounds (memory placement; 2026-11).
HOST_FLOOR = 0.03


@dataclass(frozen=True)
class Step:
    """What is timed: `run(prepare(i))` for i = 0, 1, 2 ...; `prepare` is outside the clock."""

    run: Callable[[Any], Any]
    prepare: Callable[[int], Any] = lambda i: i


@dataclass(frozen=True)
class Effort:
    """How long a step is timed in one round: at least `repetitions`, then until `seconds` are over."""

    seconds: float = 0.1
    repetitions: int = 5
    warm_up: int = 3
    most: int = 200


QUICK = Effort(seconds=0.03, repetitions=3, warm_up=2, most=50)


@dataclass(frozen=True)
class Timing:
    """Seconds. `spread`: how far two runs of the same thing are apart; a smaller difference between two is none."""

    median: float
    p20: float
    p80: float
    spread: float
    count: int
    minimum: float
    p10: float

    @classmethod
    def of(cls, rounds: list[list[float]], floor: float = 0.0) -> Timing:
        """From the samples of each round. The spread: how far the rounds' medians, or p20 and p80, are apart, and at
        least `floor` times the median."""
        samples = sorted(value for values in rounds for value in values)
        medians = [statistics.median(values) for values in rounds]
        p20, p80 = percentile(samples, 0.2), percentile(samples, 0.8)
        median = statistics.median(samples)
        spread = max(max(medians) - min(medians), p80 - p20, floor * median)
        p10 = percentile(samples, 0.1)
        return cls(median, p20, p80, spread, len(samples), samples[0], p10)


def percentile(ordered: list[float], share: float) -> float:
    """Linear between the two nearest of sorted values."""
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def verdict(
    ours: float | None, ours_spread: float | None, theirs: float | None, theirs_spread: float | None
) -> str:
    """How `ours` does against `theirs`, both times: "1.30x as fast", "takes 1.10x as long" or "no difference"."""
    if ours is None or theirs is None:
        return ""
    if abs(ours - theirs) <= max(ours_spread or 0.0, theirs_spread or 0.0):
        return "no difference"
    if ours < theirs:
        return f"{theirs / ours:.2f}x as fast"
    return f"takes {ours / theirs:.2f}x as long"


def time_steps(
    steps: Mapping[str, Step],
    device: torch.device,
    effort: Effort,
    between: Callable[[], None] | None = None,
    rounds: int = ROUNDS,
) -> dict[str, Timing | Exception]:
    """Time all steps, taking turns; `between` runs before each repetition, outside the clock.

    A step that raises is answered with its exception, and the others go on.
    """
    found: dict[str, list[list[float]]] = {name: [] for name in steps}
    failed: dict[str, Exception] = {}
    with _no_collection():
        for _ in range(rounds):
            for name, step in steps.items():
                if name in failed:
                    continue
                try:
                    found[name].append(_round(step, device, effort, between))
                except Exception as error:
                    failed[name] = error
    floor = HOST_FLOOR if device.type == "cpu" else 0.0
    return {
        name: failed[name] if name in failed else Timing.of(values, floor)
        for name, values in found.items()
    }


def processor_time(
    steps: Mapping[str, Step], device: torch.device, seconds: float, calls: int = 1
) -> dict[str, Timing]:
    """The processor time of a call of each step, a few `calls` of each in turn, for so many `seconds` in all.

    Of the thread, in which a CPU's backward runs, too; for a GPU, where it does not, of the process. Whoever comes next
    finds the caches as the last one left them, so the order of a turn is drawn anew.
    """
    on_gpu = device.type == "cuda"
    clock = time.process_time if on_gpu else time.thread_time
    found: dict[str, list[float]] = {name: [] for name in steps}
    order, generator = list(steps), random.Random(0)
    with _no_collection():
        turns, end = 0, time.perf_counter() + seconds
        while time.perf_counter() < end or turns < WARM_UP + ROUNDS:
            turns += 1
            generator.shuffle(order)
            for name in order:
                step = steps[name]
                argument = step.prepare(turns)
                start = clock()
                for _ in range(calls):
                    step.run(argument)
                found[name].append((clock() - start) / calls)
                if on_gpu:
                    torch.cuda.synchronize(device)
    return {
        name: Timing.of(_thirds(values[WARM_UP:]), HOST_FLOOR) for name, values in found.items()
    }


def _thirds(values: list[float]) -> list[list[float]]:
    """The rounds, where everyone has a turn all the time."""
    n = len(values)
    return [values[n * i // ROUNDS : n * (i + 1) // ROUNDS] for i in range(ROUNDS)]


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage is collected before, and not in between."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _round(step: Step, device: torch.device, effort: Effort, between) -> list[float]:
    for i in range(effort.warm_up):
        step.run(step.prepare(i))
    clock = _time_on_gpu if device.type == "cuda" else _time_on_host
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock(step, device, effort, between)


def _time_on_host(step: Step, device: torch.device, effort: Effort, between) -> list[float]:
    seconds: list[float] = []
    end = time.perf_counter() + effort.seconds
    while len(seconds) < effort.most:
        if len(seconds) >= effort.repetitions and time.perf_counter() > end:
            break
        argument = step.prepare(len(seconds))
        if between is not None:
            between()
        start = time.perf_counter()
        step.run(argument)
        seconds.append(time.perf_counter() - start)
    return seconds


def _time_on_gpu(step: Step, device: torch.device, effort: Effort, between) -> list[float]:
    """The events are read at the end: asking for one would drain the stream."""
    with torch.cuda.device(device):
        count = _repetitions_on_gpu(step, effort, between)
        marks = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(count)
        ]
        for i, (start, stop) in enumerate(marks):
            argument = step.prepare(i)
            if between is not None:
                between()
            start.record()
            step.run(argument)
            stop.record()
        torch.cuda.synchronize(device)
        return [start.elapsed_time(stop) / 1e3 for start, stop in marks]


def _repetitions_on_gpu(step: Step, effort: Effort, between) -> int:
    """How many fit into the round, by the wall time of two."""
    start = time.perf_counter()
    for i in range(2):
        argument = step.prepare(i)
        if between is not None:
            between()
        step.run(argument)
    torch.cuda.synchronize()
    one = (time.perf_counter() - start) / 2
    return int(min(max(effort.seconds / max(one, 1e-6), effort.repetitions), effort.most))


def last_level_cache(device: torch.device) -> int:
    """Bytes of the device's last-level cache; 32 MiB where it does not tell."""
    if device.type == "cuda":
        return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
    sizes = [
        _cache_bytes(p) for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max(sizes, default=0) or 32 << 20


def _cache_bytes(path: Path) -> int:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    try:
        text = path.read_text().strip()
        return int(text.rstrip("KMG")) * units.get(text[-1:], 1)
    except (OSError, ValueError):
        return 0


class Eviction:
    """Call it to push everything out of the last-level cache: it writes a buffer twice as large."""

    def __init__(self, device: torch.device) -> None:
        self._buffer = torch.empty(2 * last_level_cache(device), dtype=torch.uint8, device=device)

    def __call__(self) -> None:
        self._buffer.fill_(1)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For CPU times: on a shared machine, threads that wait for each other time the neighbours."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def threads() -> int:
    """CPU threads that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
