"""What is to be fused in one module: a value that can be compared, copied and pickled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import fx, nn

from ..activations import NAMES, parse
from ..nn.blocks import BATCH_NORM_ACTS, norm_pattern
from ..nn.norms import is_batch_norm, is_replaced, why_not_fused
from ..nn.projection import CONVOLUTIONS
from .config import SUM, FuseConfig
from .guards import Guard, NotPortable, packed, unpacked, why_not
from .inline import Traces, inline
from .layers import guards_behind
from .match import Match, Sum, find_matches, find_sums
from .nodes import Skipped, family_of, skipped, title, why_not_skipped
from .rewrite import fingerprint, rewrite
from .trace import copy_of
from .values import NotTraceable


@dataclass(frozen=True)
class Site:
    """One BatchNorm of a module: the pattern it stands in, and why it is left alone (None: it is fused).

    It is a child of the module's, or one that stands on a shortcut (`downsample.1`), which then has another owner.
    itself: it runs fused with nothing done to it (`fusedres.nn`).
    """

    norm: str
    pattern: str
    reason: str | None = None
    excluded: bool = False
    note: str = ""
    itself: bool = False


@dataclass(frozen=True)
class Plan:
    """The fused forward of one module, as source, with all that it depends on.

    imports: (name, module, attribute) for each global of the source. guards: what must be as it was. skipped: the
    children that the source does not call, the BatchNorms apart. fingerprint: of the code that was traced; another
    release of it is not replayed from a pickle. min_elements: of an input that is to run fused. sums: how many
    additions run with their activation, beside the sites.
    """

    source: str
    imports: tuple[tuple[str, str, str], ...]
    inputs: tuple[str, ...]
    defaults: tuple[tuple[str, Any], ...]
    guards: tuple[Guard, ...]
    skipped: tuple[Skipped, ...]
    sites: tuple[Site, ...]
    fingerprint: str
    min_elements: int = 0
    sums: int = 0

    def __deepcopy__(self, memo: dict) -> Plan:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """By name; None where a guard is about something that has none (a lambda), so that the copy is not fused."""
        try:
            guards = tuple(map(packed, self.guards))
        except NotPortable:
            return _nothing, ()
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return _loaded, ({**values, "guards": guards},)


def _nothing() -> None:
    return None


def _loaded(values: dict[str, Any]) -> Plan | None:
    """The plan of a pickle; None where what it depends on is not there, or is other code."""
    try:
        return Plan(**{**values, "guards": tuple(map(unpacked, values["guards"]))})
    except NotPortable:
        return None


@dataclass(frozen=True)
class Decision:
    """A module that owns BatchNorms: its plan where something is fused, and a line for each BatchNorm."""

    plan: Plan | None
    sites: tuple[Site, ...]

    def refused(self, reason: str) -> Decision:
        """Nothing is fused after all, for this reason where there was none."""
        return Decision(None, tuple(replace(s, reason=s.reason or reason) for s in self.sites))


def owned_norms(module: nn.Module) -> tuple[str, ...]:
    """The names of the BatchNorm children of a module, those in a ModuleList or ModuleDict of its own included.

    Anything with BatchNorm in its class name counts, so that the report can say why it is left alone.
    """
    if is_list(module):
        return ()
    return tuple(_norms_below(module, ""))


def is_list(module: nn.Module) -> bool:
    """Whether a module only holds others: a ModuleList or ModuleDict that has no forward of its own."""
    is_one = isinstance(module, (nn.ModuleList, nn.ModuleDict))
    return is_one and type(module).forward is nn.Module.forward


def told_norms(module: nn.Module) -> tuple[Site, ...] | None:
    """The sites of a module that runs fused by itself; None of any other.

    Such a class has a forward and a method `fused_norms`, which gives for each BatchNorm below it, by its name, the
    pattern that it runs in, with the activation's own name at the end: `{"bn1": "BN+relu"}`.
    """
    cls = type(module)
    teller: Any = next((each for each in cls.__mro__ if "fused_norms" in vars(each)), None)
    if teller is None or cls.forward is not teller.forward or is_replaced(module):
        return None
    modules, told = dict(module.named_modules(remove_duplicate=False)), teller.fused_norms(module)
    return tuple(
        _told(name, pattern, modules[name])
        for name, pattern in told.items()
        if name in modules and is_batch_norm(modules[name])
    )


def _told(name: str, pattern: str, norm: nn.Module) -> Site:
    start, _, end = pattern.rpartition("+")
    if end.partition("(")[0] in NAMES:
        pattern = f"{start}+{title(end)}"
    inner: Any = norm.bn if isinstance(norm, BATCH_NORM_ACTS) else norm
    return Site(name, pattern, why_not_fused(inner), note="by the module itself", itself=True)


def _or_told(site: Site, modules: Mapping[str, nn.Module]) -> Site:
    """The site, or what a BatchNorm of our own that stands there says of itself."""
    norm = modules.get(site.norm)
    return _told(site.norm, norm_pattern(norm), norm) if isinstance(norm, BATCH_NORM_ACTS) else site


def _norms_below(module: nn.Module, prefix: str):
    for name, child in module._modules.items():
        if child is not None and is_list(child):
            yield from _norms_below(child, f"{prefix}{name}.")
        elif child is not None and is_batch_norm(child):
            yield prefix + name


def decide(
    module: nn.Module,
    traces: Traces,
    config: FuseConfig,
    allows: Callable[[str], bool] = lambda path: True,
) -> Decision:
    """What can be fused in `module`; changes nothing. `allows(path)`: whether a child below it may be changed."""
    norms = owned_norms(module)
    modules = dict(module.named_modules(remove_duplicate=False))
    try:
        traced = traces.of(module)
    except NotTraceable as error:
        unknown = (Site(norm, "unknown", str(error)) for norm in norms)
        return Decision(None, tuple(_or_told(site, modules) for site in unknown))
    graph = copy_of(traced.graph)
    inlined = inline(graph, modules, traces, allows)
    matches = find_matches(graph, modules, inlined, traces)
    for match in matches if config.recompute else ():
        match.reader = _reader(match, modules)
    sites, chosen = _sites(matches, norms, config)
    sites = tuple(_or_told(site, modules) for site in sites)
    taken = {node for match in matches if match.reason is None for node in match.nodes}
    sums = [each for each in find_sums(graph, modules, taken, traces) if _wants_sum(each, config)]
    if not chosen and not (sums and norms):
        return Decision(None, sites)
    sites = _with_sums(sites, sums, chosen)
    norms_taken = {node for match in chosen for node in _norms_of(match)}
    inlined.fold(norms_taken)
    inside = [
        skipped(str(part.target), modules[str(part.target)])
        for norm, parts in inlined.inside.items()
        if norm in norms_taken
        for part in parts
    ]
    trusted = [guard for each in (*chosen, *sums) for guard in each.trusted.guards]
    shortcuts = [match.projected for match in chosen if match.projected is not None]
    left_out = tuple(
        dict.fromkeys((*inlined.skipped, *inside, *_skipped([*chosen, *sums], modules)))
    )
    try:
        source, imports = rewrite(graph, chosen, sums, config)
    except NotTraceable as error:
        return Decision(None, sites).refused(str(error))
    norms = (*(match.name for match in chosen if match.call is None), *(s.norm for s in shortcuts))
    run = [
        *(Guard(tuple(name.split(".")), "{0}({m}) is None", (why_not_fused,)) for name in norms),
        *(Guard(each.path, "{0}({m}, {1}) is None", (why_not_skipped, each)) for each in left_out),
    ]
    run += guards_behind(
        [None if match.call is not None else modules[match.name] for match in chosen]
        + [modules[shortcut.norm] for shortcut in shortcuts],
        left_out,
        [match.activation for match in (*chosen, *sums)],
    )
    if (reason := why_not(module, run)) is not None:
        return Decision(None, sites).refused(reason)
    plan = Plan(
        source=source,
        imports=imports,
        inputs=traced.inputs,
        defaults=traced.defaults,
        guards=tuple(
            dict.fromkeys(
                (*run, *traced.guards, *inlined.guards, *trusted, *_modes(graph, modules))
            )
        ),
        skipped=left_out,
        sites=sites,
        fingerprint=fingerprint(type(module), left_out),
        min_elements=config.min_elements,
        sums=len(sums),
    )
    return Decision(plan, sites)


def _norms_of(match: Match) -> Iterable[fx.Node]:
    return (match.norm,) if match.projected is None else (match.norm, match.projected.node)


def _sites(matches: list[Match], norms: tuple[str, ...], config: FuseConfig):
    for match in matches:
        _limit_shortcut(match, config)
        if match.before is not None and family_of(match.pattern)[0] not in config.patterns:
            match.before = None  # the sum stays PyTorch's
    residuals = {match.shortcut.node for match in matches if match.shortcut is not None}
    sites, chosen = [], []
    for match in matches:
        if match.norm in residuals:
            continue
        left_out = _why_left_out(match, config) if match.reason is None else None
        excluded, reason = left_out is not None, left_out or match.reason
        again = "computed again for the backward of its convolution" if match.reader else ""
        note = "; ".join(filter(None, (match.note, again)))
        sites.append(Site(match.name, match.pattern, reason, excluded, note))
        if (shortcut := match.shortcut) is not None:
            refused = shortcut.reason if reason is None else reason
            sites.append(
                Site(
                    shortcut.norm,
                    match.whole_pattern,
                    refused,
                    excluded or shortcut.excluded,
                    shortcut.note,
                )
            )
        if reason is None:
            chosen.append(match)
    called = {site.norm for site in sites}
    for norm in norms:
        if norm not in called:
            sites.append(Site(norm, "BN", "it is not called by its owner's forward"))
    return tuple(sites), chosen


def _reader(match: Match, modules: Mapping[str, nn.Module]) -> fx.Node | None:
    """The convolution that is all that reads a `relu(batch_norm(x))`."""
    if match.pattern != "BN+ReLU" or match.activation != "relu" or match.call is not None:
        return None
    readers = [*match.end.users]
    if len(readers) != 1 or readers[0].op != "call_module":
        return None
    (reader,) = readers
    is_read = reader.args == (match.end,) and not reader.kwargs
    return reader if is_read and type(modules[str(reader.target)]) in CONVOLUTIONS else None


def _modes(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> list[Guard]:
    """That the children which are called still work in place, or not, as they did."""
    names = dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "call_module")
    return [
        Guard(
            tuple(name.split(".")),
            f"{{m}}.inplace is {modules[name].inplace}",
            (),
            "self.inplace was changed after it was fused",
        )
        for name in names
        if type(getattr(modules[name], "inplace", None)) is bool
    ]


def _wants_sum(each: Sum, config: FuseConfig) -> bool:
    return SUM in config.patterns and parse(each.activation).name in config.activations


def _with_sums(sites: tuple[Site, ...], sums: list[Sum], chosen: list[Match]) -> tuple[Site, ...]:
    """The sites, one of which tells of the sums, the last fused one if there is one: a row of the report is a
    BatchNorm."""
    if not sums:
        return sites
    last = chosen[-1].name if chosen else sites[-1].norm
    text = f"add+{title(sums[-1].activation)} of its block runs as one" + " too" * bool(chosen)
    return tuple(
        replace(site, note="; ".join(filter(None, (site.note if chosen else "", text))))
        if site.norm == last
        else site
        for site in sites
    )


def _limit_shortcut(match: Match, config: FuseConfig) -> None:
    """Leave the shortcut out of the site where the user wants it so."""
    shortcut = match.projected
    if shortcut is not None and (reason := _why_left_out(match, config)) is not None:
        match.shortcut = replace(shortcut, reason=reason, excluded=True)


def _why_left_out(match: Match, config: FuseConfig) -> str | None:
    """Why the user does not want this site; None when they do."""
    activation = parse(match.activation).name
    if activation is not None and activation not in config.activations:
        return f"config.activations leaves out {activation}"
    family, _ = family_of(match.pattern)
    return None if family in config.patterns else f"config.patterns leaves out {family}"


def _skipped(chosen: Iterable[Match | Sum], modules: Mapping[str, nn.Module]) -> list[Skipped]:
    """The children of the sites that are not called any more, apart from the BatchNorms."""
    found: list[Skipped] = []
    for match in chosen:
        called = (*match.passed, match.act)
        names = [str(n.target) for n in called if n is not None and n.op == "call_module"]
        found.extend(skipped(name, modules[name]) for name in names)
        trusted = match.trusted.names
        found.extend(skipped(name, modules[name])._replace(is_called=True) for name in trusted)
        if isinstance(match, Match) and match.projected is not None:
            found.extend(match.projected.skipped)
    return found
