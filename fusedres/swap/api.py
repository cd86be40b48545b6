"""`fuse_`, `unfuse_`, `explain`, `is_fused`."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..dispatch import current_backend
from ..nn.blocks import BATCH_NORM_ACTS
from ..nn.keeping import KeepsStatistics, let_keep
from ..nn.norms import as_called, is_batch_norm, processes_of
from .config import FilterFn, FuseConfig, check_arguments, check_model
from .estimate import norm_outputs, passes
from .inline import FILTERED, Traces
from .install import fused_forward, install, plan_of, why_plan_is_stale
from .nodes import family_of
from .plan import Plan, Site, decide, is_list, owned_norms, told_norms
from .report import ALONE, EXCLUDED, FALLBACK, FUSABLE, FUSED, FuseReport, Row, fallback_note


@dataclass(frozen=True)
class _Owner:
    """A module with BatchNorm children, what is to become of it, and its lines in the report."""

    name: str
    module: nn.Module
    plan: Plan | None
    sites: tuple[Site, ...]


def fuse_(
    model: nn.Module,
    config: FuseConfig | None = None,
    filter_fn: FilterFn | None = None,
    strict: bool = False,
    input_shape: Sequence[int] | None = None,
) -> FuseReport:
    """Fuse BatchNorm with the ReLU and the residual add that follow it, in place, wherever they are found.

    Each module whose forward holds BN+ReLU, BN+add or BN+add+ReLU, the BatchNorm being its own or that of a child which
    ends in one, gets a rewritten forward. The children stay where they are, with their names, Parameters and buffers:
    the state_dict, optimizers, hooks, `train()` and `eval()` work as before. At each call a module looks at what its
    children are, and runs its own forward where the fused one does not fit; `explain` says why. Calling it again
    changes nothing, or takes in what was changed in the model since.

    Args:
        model: any module; only instances inside it are changed, never a class.
        config: which patterns; all by default.
        filter_fn: `filter_fn(module, fqn) -> bool`, asked for each module that owns a BatchNorm or is to be changed;
            where it says False the module is left as it is.
        strict: raise where a pattern was found and cannot be fused, or could not be looked for.
        input_shape: of an input, for example (256, 3, 224, 224), for which the report estimates the bytes saved in a
            training step.

    Returns:
        A `FuseReport`; `print` it for a table.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: the model does not take an input of `input_shape`.
        RuntimeError: `strict`, and a site that could not be fused; the message lists them all.

    After an error the model is what it was.
    """
    with _looking_at("fuse_", model):
        return _fuse(model, config, filter_fn, strict, input_shape)


# A model that is being fused in one thread is not looked at in another; nothing outside of it is touched.
_LOCK = threading.RLock()


@contextmanager
def _looking_at(caller: str, model: nn.Module) -> Iterator[None]:
    check_model(caller, model)
    with _LOCK, as_called(model):
        yield


def _fuse(
    model: nn.Module,
    config: FuseConfig | None,
    filter_fn: FilterFn | None,
    strict: bool,
    input_shape: Sequence[int] | None,
) -> FuseReport:
    config = check_arguments("fuse_", model, config, filter_fn)
    allows = _asked_once(filter_fn)
    owners = list(_decisions(model, config, allows))
    keepers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, KeepsStatistics) and allows(module, name)
    ]
    report = _estimated(_report(owners, dry=False), model, input_shape, "fuse_")
    if strict:
        _raise_if_left(report)
    changed: list[tuple[nn.Module, Plan | None]] = []
    try:
        for owner in owners:
            if (before := plan_of(owner.module)) != owner.plan:
                changed.append((owner.module, before))
                install(owner.module, owner.plan)
    except BaseException:
        for module, before in changed:
            install(module, before)
        raise
    for keeper in keepers:
        let_keep(keeper, config.keep_finite_statistics)
    return report


def explain(
    model: nn.Module,
    config: FuseConfig | None = None,
    filter_fn: FilterFn | None = None,
    input_shape: Sequence[int] | None = None,
) -> FuseReport:
    """What `fuse_` would fuse, what not, and why; nothing is changed.

    Of a model that is fused already it tells what runs fused now, and which modules fall back to their own forward
    since something in them was changed.

    Args:
        model: any module, fused or not.
        config: as in `fuse_`.
        filter_fn: as in `fuse_`.
        input_shape: as in `fuse_`.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: the model does not take an input of `input_shape`.
    """
    with _looking_at("explain", model):
        config = check_arguments("explain", model, config, filter_fn)
        owners = list(_decisions(model, config, _asked_once(filter_fn), keep=True))
        return _estimated(_report(owners, dry=True), model, input_shape, "explain")


def unfuse_(model: nn.Module) -> None:
    """The inverse of `fuse_`: every module inside has its own forward again.

    Raises:
        TypeError: `model` is not a module.
    """
    check_model("unfuse_", model)
    with _LOCK:
        for module in model.modules():
            install(module, None)
            if isinstance(module, KeepsStatistics):
                let_keep(module, False)


def is_fused(model: nn.Module) -> bool:
    """Whether any module in the model is fused.

    Raises:
        TypeError: `model` is not a module.
    """
    check_model("is_fused", model)
    return any(plan_of(module) is not None for module in model.modules())


def _asked_once(filter_fn: FilterFn | None) -> Callable[[Any, str], bool]:
    """Whether a module of a name may be changed; its user is asked once."""
    asked: dict[str, bool] = {}

    def allows(module: Any, name: str) -> bool:
        if name not in asked:
            asked[name] = filter_fn is None or bool(filter_fn(module, name))
        return asked[name]

    return allows


def _decisions(
    model: nn.Module,
    config: FuseConfig,
    allows: Callable[[nn.Module, str], bool],
    keep: bool = False,
) -> Iterator[_Owner]:
    """What to do with each module that owns BatchNorms; `keep`: a fused one stays as it is."""
    traces = Traces()
    told_by_another: set[str] = set()  # those above a module come before it
    for name, module in _candidates(model):
        plan, owned = plan_of(module), owned_norms(module)
        if name in told_by_another:
            continue
        if plan is None and (told := told_norms(module)) is not None:
            prefix = f"{name}." if name else ""
            told_by_another |= {
                prefix + site.norm.rpartition(".")[0] for site in told if "." in site.norm
            }
            yield _Owner(name, module, None, told)
        elif owned and not allows(module, name):
            sites = _excluded(owned) if plan is None else plan.sites
            yield _Owner(name, module, plan, sites)
        elif plan is not None and keep:
            yield _Owner(name, module, plan, plan.sites)
        else:
            owner = _planned(name, module, config, traces, allows)
            if owned or owner.plan is None or allows(module, name):
                yield owner


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules with a forward that have a BatchNorm below them, or call it as a function."""
    above = {""} if is_batch_norm(model) else set()
    for name, module in model.named_modules(remove_duplicate=False):
        if is_batch_norm(module) and name:
            parts = name.split(".")
            above.update(".".join(parts[:k]) for k in range(len(parts)))
    for name, module in model.named_modules():
        if (
            (name in above or plan_of(module) is not None or _names_batch_norm(module))
            and not is_batch_norm(module)
            and not is_list(module)
        ):
            yield name, module


def _names_batch_norm(module: nn.Module) -> bool:
    """Whether a method of its class, PyTorch's own ones apart, says `batch_norm`."""
    return any(
        "batch_norm" in getattr(getattr(value, "__code__", None), "co_names", ())
        for cls in type(module).__mro__
        if not cls.__module__.startswith("torch.")
        for value in vars(cls).values()
    )


def _planned(
    name: str,
    module: nn.Module,
    config: FuseConfig,
    traces: Traces,
    allows: Callable[[nn.Module, str], bool],
) -> _Owner:
    prefix = f"{name}." if name else ""
    decision = decide(
        module, traces, config, lambda path: allows(module.get_submodule(path), prefix + path)
    )
    if decision.plan is not None:
        try:
            fused_forward(type(module), decision.plan)
        except SyntaxError as error:
            decision = decision.refused(f"its forward cannot be written down: {error}")
    return _Owner(name, module, decision.plan, decision.sites)


def _excluded(norms: tuple[str, ...]) -> tuple[Site, ...]:
    return tuple(Site(norm, "unknown", FILTERED, excluded=True) for norm in norms)


def _report(owners: list[_Owner], dry: bool) -> FuseReport:
    """A row for each BatchNorm, told by the module in whose forward it is fused, or by who can say most about it."""
    told: dict[str, tuple[_Owner, list[Site]]] = {}
    for owner in owners:
        sites: dict[str, list[Site]] = {}
        for site in owner.sites:
            sites.setdefault(f"{owner.name}.{site.norm}" if owner.name else site.norm, []).append(
                site
            )
        for where, found in sites.items():
            if where not in told or _tells(owner, found) > _tells(*told[where]):
                told[where] = owner, found
    stale = {
        owner.name: why_plan_is_stale(owner.module, owner.plan)
        for owner in owners
        if owner.plan is not None
    }
    sums = sum(o.plan.sums for o in owners if o.plan is not None and stale[o.name] is None)
    rows = []
    for where, owner, site in ((w, o, site) for w, (o, found) in told.items() for site in found):
        reason, why_own = site.reason or "", stale.get(owner.name)
        would_be = dry and plan_of(owner.module) is None and not site.itself
        active = FUSABLE if would_be else FUSED
        status = EXCLUDED if site.excluded else ALONE if reason else active
        if why_own is not None and status == FUSED:
            status, reason = FALLBACK, why_own
        block, note = type(owner.module).__name__, ""
        if not reason:
            # Looked at now: a model may be converted after it is fused.
            note = "; ".join(filter(None, (site.note, _shared(owner.module, site.norm))))
        elif status == ALONE and owner.plan is not None and owner.plan.sums and why_own is None:
            note = site.note
        rows.append(Row(where, block, site.pattern, status, reason, note))
    return FuseReport(tuple(rows), fallback_note(current_backend()), n_sums=sums)


def _shared(owner: nn.Module, name: str) -> str:
    """What there is to say of the processes that a BatchNorm shares its statistics with."""
    norm = dict(owner.named_modules(remove_duplicate=False)).get(name)
    if isinstance(norm, BATCH_NORM_ACTS):
        norm = norm.bn
    group = None if norm is None else processes_of(norm)
    return "" if group is None else f"statistics of {group.size} processes in training"


def _estimated(
    report: FuseReport, model: nn.Module, input_shape: Sequence[int] | None, caller: str
) -> FuseReport:
    """The report with the bytes that each BatchNorm's site moves and saves for an input."""
    if input_shape is None:
        return report
    outputs = norm_outputs(model, input_shape, caller)
    calls = Counter(row.where for row in report.rows)
    rows = []
    for row in report.rows:
        count, size = outputs.get(row.where, (0, 0))
        family, piecewise = family_of(row.pattern)
        eager, fused = passes(family, piecewise, max(size, 1))
        # Of two BatchNorms in one site each tells a half.
        share = count * size / calls[row.where] / (2 if family.startswith("BN+BN") else 1)
        saved = eager - fused if row.status in (FUSED, FUSABLE) else 0
        rows.append(replace(row, moves=round(share * eager), saves=round(share * saved)))
    return replace(report, rows=tuple(rows), input_shape=tuple(input_shape))


def _tells(owner: _Owner, sites: list[Site]) -> int:
    """More for a pattern that is fused, then for one that is not, then for a BatchNorm that runs by itself."""
    is_fused = any(
        site.reason is None and (site.itself or owner.plan is not None) for site in sites
    )
    if all(site.pattern in ("BN", "unknown") and not site.excluded for site in sites):
        return int(is_fused)
    return 3 if is_fused else 2


def _raise_if_left(report: FuseReport) -> None:
    left = [row for row in report.rows if row.status in (ALONE, FALLBACK) and row.pattern != "BN"]
    if left:
        lines = [f"  {row.where} ({row.pattern}): {row.reason}" for row in left]
        raise RuntimeError(
            f"fuse_: strict=True, and {len(left)} of {len(report.rows)} BatchNorms could not be fused; "
            "the model is unchanged. Leave them out with filter_fn, or pass strict=False:\n"
            + "\n".join(lines)
        )
