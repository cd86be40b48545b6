"""What is to be fused in one module: a value that can be compared, copied and pickled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .config import FuseConfig
from .match import Match, find_matches
from .record import CONTAINERS, NotTraceable, Path, Reads
from .rewrite import fingerprint, rewrite
from .trace import trace


@dataclass(frozen=True)
class Site:
    """One BatchNorm child of a module: the pattern it stands in, and why it is left alone (None: it is fused)."""

    norm: str
    pattern: str
    reason: str | None = None
    excluded: bool = False


@dataclass(frozen=True)
class Plan:
    """The fused forward of one module, as source, with all that it depends on.

    imports: (name, module, attribute) for each global of the source. norms, relus: the children that the source does
    not call. fingerprint: of the code that was traced; another release of it is not replayed from a pickle.
    """

    source: str
    imports: tuple[tuple[str, str, str], ...]
    inputs: tuple[str, ...]
    defaults: tuple[tuple[str, Any], ...]
    reads: tuple[Reads, ...]
    norms: tuple[Path, ...]
    relus: tuple[Path, ...]
    sites: tuple[Site, ...]
    fingerprint: str

    def __deepcopy__(self, memo: dict) -> Plan:
        return self


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
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return ()
    return tuple(_norms_below(module, ""))


def _norms_below(module: nn.Module, prefix: str):
    for name, child in module._modules.items():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _norms_below(child, f"{prefix}{name}.")
        elif isinstance(child, _BatchNorm) or "BatchNorm" in type(child).__name__:
            yield prefix + name


def decide(module: nn.Module, original: type[nn.Module], config: FuseConfig) -> Decision:
    """What can be fused in `module`; changes nothing."""
    norms = owned_norms(module)
    try:
        traced = trace(module, original)
    except NotTraceable as error:
        return Decision(None, tuple(Site(norm, "unknown", str(error)) for norm in norms))
    modules = dict(module.named_modules(remove_duplicate=False))
    matches = find_matches(traced.graph, modules, norms)
    sites, chosen = _sites(matches, norms, config)
    if not chosen:
        return Decision(None, sites)
    containers = _containers(traced.graph, modules)
    try:
        source, imports = rewrite(traced.graph, chosen)
    except NotTraceable as error:
        return Decision(None, sites).refused(str(error))
    plan = Plan(
        source=source,
        imports=imports,
        inputs=traced.inputs,
        defaults=traced.defaults,
        reads=(*traced.reads, *containers),
        norms=_paths(match.norm for match in chosen),
        relus=_paths(
            match.relu
            for match in chosen
            if match.relu is not None and match.relu.op == "call_module"
        ),
        sites=sites,
        fingerprint=fingerprint(original),
    )
    return Decision(plan, sites)


def _sites(matches: list[Match], norms: tuple[str, ...], config: FuseConfig):
    sites, chosen = [], []
    for match in matches:
        excluded = match.reason is None and match.pattern not in config.patterns
        reason = f"config.patterns leaves out {match.pattern}" if excluded else match.reason
        sites.append(Site(str(match.norm.target), match.pattern, reason, excluded))
        if reason is None:
            chosen.append(match)
    called = {site.norm for site in sites}
    for norm in norms:
        if norm not in called:
            sites.append(Site(norm, "BN", "it is not called by its owner's forward"))
    return tuple(sites), chosen


def _paths(nodes) -> tuple[Path, ...]:
    return tuple(dict.fromkeys(tuple(str(node.target).split(".")) for node in nodes))


def _containers(graph: fx.Graph, modules: dict[str, nn.Module]) -> tuple[Reads, ...]:
    """That a container which forward walked through still has the same children, no more and no fewer."""
    parents = dict.fromkeys(
        str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "call_module"
    )
    return tuple(
        Reads(
            tuple(parent.split(".")) if parent else (), (), (), (), tuple(modules[parent]._modules)
        )
        for parent in parents
        if isinstance(modules[parent], CONTAINERS)
    )
