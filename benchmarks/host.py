"""Host cost: what Python and PyTorch spend, on tensors so small that nothing else counts.

One call; a chain of twenty tails, where what stands around a call no longer counts; forward and backward of whole
ResNets of eight channels. Eager, fusedres on either backend, torch.compile: processor time, in turn, and of many turns
the least and the tenth percentile.

Without a GPU, the Triton backend goes through Triton's own launcher into a libcuda that does nothing (`stub_driver`);
where that cannot be, to a stand-in for Triton's driver that notes its launches (`compile_only`). The rows say which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

import fusedres

from ..cli.errors import CommandError
from .cases import Tail, chain, narrow, shape_name
from .compile_only import compile_only
from .providers import BASELINE, PROVIDERS
from .record import Row, first_line
from .stub_driver import stub_driver, why_no_stub
from .timing import HOST_FLOOR, Step, one_thread, processor_time

CHANNELS, TAILS = 8, 20
SHAPE, IMAGES = (2, CHANNELS, 4, 4), (2, 3, 32, 32)
ATEN, TRITON, COMPILE = "fusedres, aten", "fusedres, triton", "compile"
CALL, CHAIN = "call", f"chain of {TAILS} tails"
RESNET18, RESNET50 = (f"{name}, {CHANNELS} channels" for name in ("resnet18", "resnet50"))
# Of eager's time. The networks have convolutions, too, and blocks whose own forward is entered.
ALLOWED = {
    (CALL, ATEN): 1.0, (CHAIN, ATEN): 1.0, (RESNET18, ATEN): 1.0, (RESNET50, ATEN): 1.0,
    (CALL, TRITON): 1.0, (CHAIN, TRITON): 1.0, (RESNET18, TRITON): 1.1, (RESNET50, TRITON): 1.1,
}  # fmt: skip
SECONDS, QUICK_SECONDS = 12.0, 1.0  # for one kind of step, everyone's turns together


@dataclass(frozen=True)
class Subject:
    """What is timed. calls: so many at a time, that the clock itself does not count."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    modes: tuple[str, ...] = ("step",)
    residual: bool = False
    calls: int = 1


SUBJECTS = (
    Subject(CALL, lambda: Tail(CHANNELS, True, "relu"), SHAPE, ("forward", "eval", "step"), residual=True, calls=10),
    Subject(CHAIN, lambda: chain(TAILS, CHANNELS), SHAPE, ("forward", "step")),
    Subject(RESNET18, lambda: narrow("resnet18", CHANNELS), IMAGES),
    Subject(RESNET50, lambda: narrow("resnet50", CHANNELS), IMAGES),
)  # fmt: skip
_PROVIDER = {provider.name: provider for provider in PROVIDERS}


def measure(device: torch.device, quick: bool = False) -> Iterator[list[Row]]:
    """Rows of the calls and the chain, and then, but for `quick`, of the networks."""
    for subject in SUBJECTS[: 2 if quick else None]:
        for mode in subject.modes:
            try:
                modules = forms(subject)
            except CommandError as error:  # torchvision is missing
                yield [_row(subject, mode, "", note=f"not run: {error}")]
                continue
            compiled, why = (None, "") if quick else _compiled(subject, mode, device)
            if compiled is not None:
                modules[COMPILE] = compiled
            rows = compare(subject, modules, mode, device, QUICK_SECONDS if quick else SECONDS)
            yield rows + [_row(subject, mode, COMPILE, note=why)] * bool(why)


def forms(subject: Subject) -> dict[str, nn.Module]:
    """The composition, and what replaces it on either backend."""
    fused = {name: _PROVIDER["fusedres"].wrap(subject.build()) for name in (ATEN, TRITON)}
    return {BASELINE: subject.build(), **fused}


def _compiled(subject: Subject, mode: str, device: torch.device) -> tuple[nn.Module | None, str]:
    """The composition under torch.compile, compiled already; or why there is none."""
    why = _PROVIDER[COMPILE].why_not(device)
    if why is not None:
        return None, why
    module = _PROVIDER[COMPILE].wrap(subject.build())
    try:
        step_of(subject, module, mode, device)()
    except Exception as error:
        return None, f"failed: {first_line(error)}"
    return module, ""


def step_of(
    subject: Subject, module: nn.Module, mode: str, device: torch.device
) -> Callable[[], object]:
    """One `forward`, `eval`, or `step`, which is forward and backward, gradients made anew."""
    module = module.to(device).train(mode != "eval")
    inputs = [torch.randn(subject.shape, device=device) for _ in range(1 + subject.residual)]
    if mode != "step":
        return lambda: module(*inputs)
    leaves = [*(inputs if subject.shape != IMAGES else []), *module.parameters()]
    for leaf in leaves:
        leaf.requires_grad_()
    gradient = torch.randn_like(module(*inputs))

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        module(*inputs).backward(gradient)

    return step


def compare(
    subject: Subject,
    modules: Mapping[str, nn.Module],
    mode: str,
    device: torch.device,
    seconds: float,
) -> list[Row]:
    """Time one kind of step of several modules, taking turns."""
    with one_thread(), _launched(device) as (how, forget), ExitStack() as chosen:

        def turn(name: str) -> None:
            chosen.close()
            chosen.enter_context(fusedres.backend("triton" if name == TRITON else "aten"))
            forget()

        def step(name: str) -> Step:
            turn(name)
            run = step_of(subject, modules[name], mode, device)
            return Step(lambda _: run(), lambda i: turn(name))

        steps = {name: step(name) for name in modules}
        timings = processor_time(steps, device, seconds, subject.calls)
    notes = {TRITON: how}
    return [
        _row(subject, mode, name, note=notes.get(name, "")).timed(timing)
        for name, timing in timings.items()
    ]


@contextmanager
def _launched(device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """What takes the launches, in words, and what makes it forget them."""
    if device.type == "cuda":
        yield "launched on the GPU", lambda: None
        return
    why = why_no_stub()
    if why is None:
        with stub_driver():
            yield "Triton's own launcher, into a libcuda that does nothing", lambda: None
        return
    with compile_only(90) as launches:
        yield f"a stand-in for Triton's driver notes the launches: {why}", launches.clear


def _row(subject: Subject, mode: str, name: str, note: str = "") -> Row:
    row = Row("host", subject.name, name, "time_us", mode, shape_name(subject.shape), "float32")
    return replace(row, note=note, layout="contiguous")


@dataclass(frozen=True)
class Share:
    """A time over eager's, by the least of many turns and by the tenth percentile."""

    minimum: float
    p10: float

    def __str__(self) -> str:
        return f"{self.minimum:.2f} ({self.p10:.2f})"


def share(row: Row, rows: Sequence[Row]) -> Share | None:
    """Of eager's time; None where one of the two has none."""
    eager = (other for other in rows if (other.subject, other.provider) == (row.subject, BASELINE))
    of = next(eager, None)
    if of is None or not (row.minimum and row.p10 and of.minimum and of.p10):
        return None
    return Share(row.minimum / of.minimum, row.p10 / of.p10)


def faults(rows: Sequence[Row]) -> list[str]:
    """Where a fused step takes more of eager's time than `ALLOWED`, by both figures: one of them may be luck."""
    found = []
    for row in rows:
        allowed = ALLOWED.get((row.kernel, row.provider))
        took = share(row, rows) if row.level == "host" else None
        if allowed is None or took is None:
            continue
        if min(took.minimum, took.p10) > allowed + HOST_FLOOR:
            found.append(
                f"{row.kernel}, {row.mode}, {row.provider}: takes {took} of eager's time, allowed is {allowed}"
            )
    return found
