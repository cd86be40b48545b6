"""One `torch.library` operator from one description: schema, devices, fake, vmap rule, and what runs it.

An operator's arguments stand in its schema one by one, for others to call. Here they travel in groups: `takes` says
once which names of the schema a group has. What it does is said three times: as a recipe, which a `Planner` makes a
plan of; in plain PyTorch; and by the shapes alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..dispatch import resolve
from .straight import are_plain, is_quiet

LIBRARY = torch.library.Library("fusedres", "DEF")
MOST = 4096  # plans: shapes that keep changing must not fill the memory
_plans: dict[tuple, Any] = {}
_filling = threading.Lock()
caches: list[Callable[[], dict]] = [lambda: _plans]  # of plans, or of what holds some


def forget() -> None:
    """Empty all caches: plans are made anew."""
    for cache in caches:
        cache().clear()


def remember(plans: dict, key: Any, plan: Any) -> None:
    """Put a plan in a cache that does not grow without end."""
    with _filling:
        if len(plans) >= MOST:
            plans.clear()
        plans[key] = plan


class Operator:
    """`fusedres::name`, called with its groups.

    Args:
        schema: as `torch.library` takes it.
        takes: the groups, each a name of the schema or a NamedTuple of names (of what is not in the schema: None for
            a tensor, False for what decides about a plan).
        recipe: (planner, *groups) -> results, which the kernels do; None where there are none.
        plain: (*groups) -> results, in plain PyTorch; None where only the kernels do it.
        fake: (*groups) -> results of which only the shapes count.
        folds: where in each tensor a dimension that vmap maps goes: 1 before the channels, 0 in front; those that are
            not named stay as they are. unfolds: the same of the results.
        state: what else a plan depends on.
    """

    def __init__(
        self,
        schema: str,
        takes: tuple,
        *,
        recipe: Callable[..., Any] | None,
        plain: Callable[..., Any] | None,
        fake: Callable[..., Any],
        folds: Mapping[str, int] | None = None,
        unfolds: Sequence[int | None] = (),
        state: Callable[[], Any] = lambda: None,
    ) -> None:
        self.name = LIBRARY.define(schema)
        self.op = getattr(torch.ops.fusedres, self.name).default
        self.takes, self.recipe, self.plain, self.state = takes, recipe, plain, state
        arguments = self.op._schema.arguments
        self.names = [a.name for a in arguments]
        self._defaults = tuple(a.default_value for a in arguments)
        kinds = {a.name: str(a.type) for a in arguments}
        self._pack = _packer(takes, {name: k for k, name in enumerate(self.names)})
        leaves = list(_leaves(takes))
        self._flat = [path for name in self.names for path, leaf in leaves if leaf == name]
        self._tensors = [
            path for path, leaf in leaves if leaf is None or kinds.get(leaf) in ("Tensor", "Optional[Tensor]")
        ]  # fmt: skip
        mutable = [self._flat[k] for k in written(self.op)]
        # Which of those it writes to.
        self._written = [k for k, path in enumerate(self._tensors) if path in mutable]
        self._floats = [path for path, leaf in leaves if kinds.get(leaf) == "float"]
        known = (*self._tensors, *self._floats)
        self._others = [path for path, _ in leaves if path not in known]
        LIBRARY.impl(self.name, self._on_any, "CPU")
        LIBRARY.impl(self.name, self._on_its_device, "CUDA")
        torch.library.register_fake(
            f"fusedres::{self.name}", lambda *flat: fake(*self.grouped(flat)), lib=LIBRARY
        )
        if folds is not None:
            from .batching import rule

            torch.library.register_vmap(
                f"fusedres::{self.name}", rule(self.op, folds, unfolds), lib=LIBRARY
            )

    def __repr__(self) -> str:
        return f"<fusedres::{self.name}>"

    def __call__(self, *groups: Any) -> Any:
        """The operator on its groups: straight, or by `torch.ops` where somebody may look."""
        if is_quiet() and are_plain(self.tensors_of(groups)):
            run = self._guarded if self._first(groups).is_cuda else self._run
            return run(groups)
        return self.op(*self.flat(groups))

    def tensors_of(self, groups: tuple) -> list[Tensor | None]:
        """The tensors of a call, in the order in which its plan is given them."""
        return [_get(groups, path) for path in self._tensors]

    def floats_of(self, groups: tuple) -> tuple[float, ...]:
        """The numbers of a call that a plan is given with its tensors."""
        return tuple([float(_get(groups, path)) for path in self._floats])

    def _first(self, groups: tuple) -> Tensor:
        return _get(groups, self._tensors[0])

    def flat(self, groups: tuple) -> list[Any]:
        """The arguments of the schema."""
        return [_get(groups, path) for path in self._flat]

    def grouped(self, flat: tuple) -> tuple:
        """The inverse of `flat`."""
        return self._pack(self._whole(flat))

    def _whole(self, flat: tuple) -> tuple:
        """PyTorch leaves out trailing arguments that have their default."""
        return (*flat, *self._defaults[len(flat) :])

    def _on_any(self, *flat: Any) -> Any:
        return self._run(self.grouped(flat))

    def _on_its_device(self, *flat: Any) -> Any:
        return self._guarded(self.grouped(flat))

    def _guarded(self, groups: tuple) -> Any:
        """Triton launches on the current device, which need not be the one that the tensors are on."""
        first = self._first(groups)
        if first.get_device() == torch.cuda.current_device():
            return self._run(groups)
        with torch.cuda.device(first.device):
            return self._run(groups)

    def _run(self, groups: tuple) -> Any:
        first = self._first(groups)
        if self.plain is not None and (
            self.recipe is None or resolve(first.device, first.dtype)[0] != "triton"
        ):
            return self.plain(*groups)
        tensors = self.tensors_of(groups)
        # The kernels write to vectors without strides; of what they read the plan sees to it.
        dense: list[Any] = [*tensors]
        for k in self._written:
            if (t := tensors[k]) is not None and t.dim() == 1:
                dense[k] = t.contiguous()
        floats = self.floats_of(groups)
        others = tuple(_frozen(_get(groups, path)) for path in self._others)
        from ..kernels.chip import current_chip

        key = (
            self, first.device, current_chip(), self.state(), others,
            *[None if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() % 16 == 0) for t in dense],
        )  # fmt: skip
        plan = _plans.get(key)
        if plan is None:
            plan = self.plan(groups, dense)
            remember(_plans, key, plan)
        results = plan.call(tuple(dense), floats, first.device)
        for k in self._written:
            if (t := tensors[k]) is not None and dense[k] is not t:
                t.copy_(dense[k])
        returned = len(self.op._schema.returns)
        return results if returned > 1 else results[0] if returned else None

    def plan(self, groups: tuple, tensors: Sequence[Tensor | None] | None = None) -> Any:
        """The plan of a call with these groups; `tensors`: instead of those in them."""
        from ..kernels import launch
        from ..kernels.bind import Given
        from ..kernels.plan import Planner

        launch.on_change.add(forget)

        if self.recipe is None:
            raise RuntimeError(f"fusedres::{self.name} has no kernels; please report it")
        if tensors is None:
            tensors = self.tensors_of(groups)
        with torch.no_grad():
            planner = Planner(tensors)
            given = [
                t if k in self._written else planner.dense(t) for k, t in enumerate(planner.given)
            ]
            values = dict(zip(self._tensors, given, strict=True))
            values |= {path: Given(k) for k, path in enumerate(self._floats)}
            values |= {path: _frozen(_get(groups, path)) for path in self._others}
            results = self.recipe(planner, *_filled(self.takes, values))
        if not isinstance(results, tuple):
            results = () if results is None else (results,)
        return planner.plan(results)


def written(op: Any) -> list[int]:
    """Which arguments of an operator it writes to."""
    return [
        k
        for k, a in enumerate(op._schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
    ]


def _get(groups: tuple, path: tuple[int, ...]) -> Any:
    return groups[path[0]] if len(path) == 1 else groups[path[0]][path[1]]


def _leaves(takes: tuple) -> Any:
    """(path, name) of all values in the groups."""
    for k, group in enumerate(takes):
        if isinstance(group, tuple):
            yield from (((k, i), name) for i, name in enumerate(group))
        else:
            yield (k,), group


def _packer(takes: tuple, index: Mapping[str, int]) -> Callable[[tuple], tuple]:
    """What makes groups of the schema's arguments."""

    parts: list[tuple[Any, Any]] = []
    for group in takes:
        if isinstance(group, tuple):
            parts.append(
                (type(group), [index[name] if isinstance(name, str) else None for name in group])
            )
        else:
            parts.append((None, index[group]))

    def pack(flat: tuple) -> tuple:
        groups = []
        for kind, at in parts:
            if kind is None:
                groups.append(flat[at])
            else:
                groups.append(kind(*[None if k is None else flat[k] for k in at]))
        return tuple(groups)

    return pack


def _filled(takes: tuple, values: Mapping[tuple[int, ...], Any]) -> tuple:
    """The groups with these values, by path."""
    return tuple(
        type(group)(*[values[k, i] for i in range(len(group))])
        if isinstance(group, tuple)
        else values[(k,)]
        for k, group in enumerate(takes)
    )


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
