"""One case against all providers, side by side: checked first, then timed; a row for every number and every refusal."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from .cases import Case, shape_name
from .parity import Parity, Wrong
from .providers import BASELINE, PROVIDERS, Provider, Unfit
from .record import Row, first_line
from .timing import Effort, Eviction, Step, Timing, time_steps
from .workload import MODES, Setting, Workload, captured

COPY = "copy"  # the ceiling: a plain copy of as many bytes


@dataclass
class Plan:
    """What to measure of each case, and how long to take over it."""

    setting: Setting
    effort: Effort = field(default_factory=Effort)
    modes: Sequence[str] = MODES
    providers: Sequence[Provider] = PROVIDERS
    graphs: bool = True  # where the device has them
    hot: bool = True

    @property
    def caches(self) -> tuple[str, ...]:
        return ("cold", "hot") if self.hot else ("cold",)


def measure(case: Case, plan: Plan) -> Iterator[list[Row]]:
    """Rows of one case, as they come: refusals, then a list for each mode and cache state."""
    for group in _groups(case, plan):
        measurement = _Measurement(case, plan, group)
        try:
            yield measurement.check()
            for mode in plan.modes:
                for cache in plan.caches if case.level == "operator" else ("cold",):
                    yield measurement.time(mode, cache)
            if plan.graphs and plan.setting.device.type == "cuda":
                for mode in plan.modes:
                    if mode != "backward":  # the graph of a backward would hold that of its forward
                        yield measurement.time_graphs(mode)
        finally:
            measurement.drop()


def _groups(case: Case, plan: Plan) -> list[Sequence[Provider]]:
    """Providers that take turns. A network on a GPU takes minutes to compile: those come last, one after the other."""
    if case.level != "model" or plan.setting.device.type != "cuda":
        return [plan.providers]
    at_once = [provider for provider in plan.providers if not provider.compiles]
    return [at_once, *([provider] for provider in plan.providers if provider.compiles)]


class _Measurement:
    def __init__(self, case: Case, plan: Plan, providers: Sequence[Provider]) -> None:
        self.case = case
        self.providers = providers
        self.plan = plan
        self.device = plan.setting.device
        # Compiled code is kept by code object: what an earlier case left would count against the limit.
        torch._dynamo.reset()
        self.workload = Workload(case, plan.setting)
        self.modules: dict[str, nn.Module] = {}

    def check(self) -> list[Row]:
        """Build and check every provider; a row for each that will not be timed."""
        module = self.workload.build()
        parity = Parity(self.workload, module)
        refused = []
        for provider in self.providers:
            missing = provider.why_not(self.device)
            if missing is not None:
                refused.append(self._row(provider.name, "", note=f"missing: {missing}"))
                continue
            note = self._admit(provider, copy.deepcopy(module), parity)
            if note is not None:
                refused.append(self._row(provider.name, "", note=note))
        self._clean()
        return refused

    def _admit(self, provider: Provider, module: nn.Module, parity: Parity) -> str | None:
        try:
            wrapped = provider.wrap(module)
            parity.check(wrapped)
        except Wrong as error:
            return f"wrong, so not timed: {error}"
        except Unfit as error:
            return f"not here: {error}"
        except Exception as error:
            return f"failed: {first_line(error)}"
        self.modules[provider.name] = wrapped
        return None

    def time(self, mode: str, cache: str) -> list[Row]:
        """All providers, taking turns, and the copy."""
        hot = cache == "hot"
        steps = {
            name: self.workload.step(module, mode, hot) for name, module in self.modules.items()
        }
        ceiling = self._copy(mode, hot)
        if ceiling is not None:
            steps[COPY] = ceiling
        evict = None
        if not hot and self.workload.fits_in_cache and self.device.type == "cuda":
            evict = Eviction(self.device)
        timings = time_steps(steps, self.device, self.plan.effort, evict)
        return [self._timed(name, mode, timing, cache) for name, timing in timings.items()]

    def time_graphs(self, mode: str) -> list[Row]:
        """One provider after the other: a captured step keeps its memory."""
        rows = []
        sets = 1 if self.case.level == "model" else min(self.workload.rotation, 4)
        for name, module in self.modules.items():
            rows.append(self._time_graph(name, module, mode, sets))
            self._clean()
        return rows

    def _time_graph(self, name: str, module: nn.Module, mode: str, sets: int) -> Row:
        try:
            step = captured(self.workload.step(module, mode), sets)
            timing = time_steps({name: step}, self.device, self.plan.effort)[name]
        except Exception as error:
            timing = error
        return self._timed(name, mode, timing, "cold", graph=True)

    def drop(self) -> None:
        self.modules.clear()
        self._clean()

    def _copy(self, mode: str, hot: bool) -> Step | None:
        total = self.case.bytes(mode, self.plan.setting.dtype)
        if total is None:
            return None
        sets = 1 if hot else max(2, min(8, (1 << 30) // max(total, 1)))
        pairs = []
        for _ in range(sets):
            source = torch.randint(0, 255, (total // 2,), dtype=torch.uint8, device=self.device)
            pairs.append((torch.empty_like(source), source))
        return Step(lambda pair: pair[0].copy_(pair[1]), lambda i: pairs[i % sets])

    def _timed(
        self, name: str, mode: str, timing: Timing | Exception, cache: str, graph: bool = False
    ) -> Row:
        return self._row(name, mode, cache=cache, graph=graph).timed(timing)

    def _row(self, provider: str, mode: str, **more) -> Row:
        setting = self.plan.setting
        return Row(
            level=self.case.level,
            kernel=self.case.kernel,
            provider=provider,
            metric="time_us",
            mode=mode,
            shape=shape_name(self.case.shape),
            dtype=setting.dtype_name,
            layout=setting.layout_name,
            bytes=self.case.bytes(mode, setting.dtype) if mode else None,
            **more,
        )

    def _clean(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


__all__ = ["BASELINE", "COPY", "Plan", "measure"]
