"""Derivatives taken in every way that PyTorch has: forward-mode AD, torch.func, graphs of gradients.

Each is compared with the same of the plain composition, in float64, where both differ by rounding alone.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import fusedres
import fusedres.functional as F

# PyTorch says so of itself where a tangent is first asked for.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
SHAPE = (3, 2, 3, 2)


def _statistics(like: Tensor) -> tuple[Tensor, Tensor]:
    return torch.full_like(like, 0.3), torch.full_like(like, 1.7)


def _norm(training: bool, activation: str | None = "relu", residual: bool = False) -> Callable:
    def call(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        mean, var = (None, None) if training else _statistics(w)
        added = r if residual else None
        return F.batch_norm_act(x, mean, var, w, b, training, residual=added, activation=activation)

    return call


def _dual(activation: str) -> Callable:
    def call(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.dual_batch_norm_act(
            x, r, None, None, None, None, w, b, b, w, True, activation=activation
        )

    return call


def _preactivation(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
    total, output = F.add_batch_norm_act(x, r, None, None, w, b, True)
    return total * output


def _scaled(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.scaled_add_act(x, r, w, activation="silu")


def _projected(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> Tensor:
    weight = torch.outer(w, b)[..., None, None]
    return F.projection(x, weight, b, stride=2) + F.projection(r, weight)[..., :2, :1]


CALLS: dict[str, Callable[..., Tensor]] = {
    "bn-relu-train": _norm(True),
    "bn-relu-eval": _norm(False),
    "bn-train": _norm(True, None),
    "bn-add-relu-train": _norm(True, residual=True),
    "bn-add-leaky-eval": _norm(False, "leaky_relu", residual=True),
    "bn-add-silu-train": _norm(True, "silu", residual=True),
    "bn-gelu-eval": _norm(False, "gelu"),
    "dual-relu": _dual("relu"),
    "dual-mish": _dual("mish"),
    "add-bn-relu": _preactivation,
    "add-relu": lambda x, r, w, b: F.add_act(x, r),
    "add-silu": lambda x, r, w, b: F.add_act(x, r, activation="silu"),
    "scaled-add-silu": _scaled,
    "projection": _projected,
}
A_FEW = tuple(
    name
    for name in CALLS
    if name not in ("bn-train", "dual-mish", "add-relu", "add-silu", "projection")
)


@pytest.fixture
def inputs(device) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    shapes = (SHAPE, SHAPE, SHAPE[1:2], SHAPE[1:2])
    return tuple(
        torch.randn(s, generator=generator, dtype=torch.float64).to(device) for s in shapes
    )


def _tangents(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.cos(1 + 3 * t) for t in inputs)


def _same_as_plain(transformed: Callable[[Callable], object], call: Callable) -> None:
    found = transformed(call)
    with fusedres.backend("aten"):
        expected = transformed(call)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# --- forward-mode AD ---------------------------------------------------------------------------------------------


def _forward_ad(inputs):
    def of(call):
        with forward_ad.dual_level():
            duals = map(forward_ad.make_dual, inputs, _tangents(inputs))
            return forward_ad.unpack_dual(call(*duals))

    return of


@pytest.mark.composes("forward-mode AD (`torch.autograd.forward_ad`)", "works")
@pytest.mark.parametrize("name", CALLS)
def test_tangents(name, inputs):
    _same_as_plain(_forward_ad(inputs), CALLS[name])


@pytest.mark.parametrize("name", A_FEW)
def test_tangents_where_parameters_require_grad_and_grad_mode_is_off(name, inputs):
    for parameter in inputs[2:]:
        parameter.requires_grad_()
    with torch.no_grad():
        _same_as_plain(_forward_ad(inputs), CALLS[name])


@pytest.mark.parametrize("name", [name for name in A_FEW if "silu" not in name])
def test_tangents_of_a_backward_whose_forward_knew_of_none(name, inputs):
    x, *others = inputs

    # (PyTorch refuses: of SiLU's backward it knows no tangents.)
    def of(call):
        leaf = x.clone().requires_grad_()
        y = call(leaf, *others)
        with forward_ad.dual_level():
            dy = forward_ad.make_dual(torch.sin(y.detach()), torch.cos(y.detach()))
            (dx,) = torch.autograd.grad(y, leaf, dy)
            return forward_ad.unpack_dual(dx)

    _same_as_plain(of, CALLS[name])


def test_tangents_of_the_backward_of_a_chain_with_forks(device):
    """Where a gradient is left with the node of the tail before, its tangent has to be, too."""
    torch.manual_seed(0)
    blocks = [fusedres.nn.BatchNormAct2d(2, activation="relu").double().to(device) for _ in range(3)]  # fmt: skip
    x = torch.randn(SHAPE, dtype=torch.float64, device=device)

    def of(blocks):
        leaf = x.clone().requires_grad_()
        outputs = [leaf]
        for block in blocks:
            outputs.append(block(outputs[-1] * 1.5, outputs[-1]))
        h = outputs[-1]
        with forward_ad.dual_level():
            dy = forward_ad.make_dual(torch.sin(h.detach()), torch.cos(h.detach()))
            h.backward(
                dy
            )  # (`autograd.grad` wants one gradient only, and nothing is left anywhere)
            return forward_ad.unpack_dual(leaf.grad)

    _same_as_plain(of, blocks)


def test_tangents_of_a_strided_projection_of_what_a_tail_made(inputs):
    x, _, w, b = inputs

    def of(project):
        y = F.batch_norm_act(x.clone().requires_grad_(), None, None, w, b, True)
        weight = torch.outer(w, b)[..., None, None]
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(weight, torch.ones_like(weight))
            return forward_ad.unpack_dual(project(y, dual, stride=2))

    _same_as_plain(of, F.projection)


class _Tail(nn.Module):
    """A block with both kinds of tails."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1 = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.down = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn1(self.conv(x)) + self.down(x))


@pytest.mark.composes("forward-mode AD of a model with frozen parameters", "works")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_swapped_model_keeps_tangents(training, inputs, device):
    model = _Tail().double().to(device).requires_grad_(False).train(training)
    fusedres.fuse_(model)

    def of(model):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(inputs[0], torch.ones_like(inputs[0]))
            return forward_ad.unpack_dual(model(dual))

    _same_as_plain(of, model)


# --- torch.func --------------------------------------------------------------------------------------------------

_ALL = (0, 1, 2, 3)
_TRANSFORMS: dict[str, Callable] = {
    "jvp": lambda call, inputs: torch.func.jvp(call, inputs, _tangents(inputs)),
    "linearize": lambda call, inputs: torch.func.linearize(call, *inputs)[1](*_tangents(inputs)),
    "jacfwd": lambda call, inputs: torch.func.jacfwd(call, _ALL)(*inputs),
    "vjp": lambda call, inputs: _vjp(call, inputs),
    "vjp, called without grad": lambda call, inputs: torch.no_grad()(_vjp)(call, inputs),
    "jacrev": lambda call, inputs: torch.func.jacrev(call, _ALL)(*inputs),
    "vmap of a vjp": lambda call, inputs: _mapped_vjp(call, inputs),
    "grad of a mapped vjp": lambda call, inputs: torch.func.grad(
        lambda *inputs: sum(t.sin().sum() for t in _mapped_vjp(call, inputs)), _ALL
    )(*inputs),
    "grad by what a vjp is given": lambda call, inputs: _by_cotangents(call, inputs),
    "vjp of grad": lambda call, inputs: _vjp(torch.func.grad(_loss(call), _ALL), inputs),
    "grad of grad": lambda call, inputs: torch.func.grad(_loss(torch.func.grad(_loss(call))))(*inputs),
    "jvp of grad": lambda call, inputs: torch.func.jvp(torch.func.grad(_loss(call)), inputs, _tangents(inputs)),
    "hessian": lambda call, inputs: torch.func.hessian(_loss(call), (2, 3))(*inputs),
    "jacrev of jacfwd": lambda call, inputs: torch.func.jacrev(torch.func.jacfwd(_loss(call), 2), 3)(*inputs),
}  # fmt: skip


def _vjp(call, inputs):
    output, back = torch.func.vjp(call, *inputs)
    if isinstance(output, tuple):
        return back(tuple(torch.cos(t) for t in output))
    return back(torch.cos(output))


def _mapped_vjp(call, inputs):
    output, back = torch.func.vjp(call, *inputs)
    return torch.func.vmap(back)(torch.stack([torch.cos(k * output) for k in range(3)]))


def _by_cotangents(call, inputs):
    output, back = torch.func.vjp(call, *inputs)
    mapped = torch.func.vmap(back)
    cotangents = torch.stack([torch.cos(k * output) for k in range(3)])
    return torch.func.grad(lambda c: sum(t.sin().sum() for t in mapped(c)))(cotangents)


def _loss(call):
    return lambda *inputs: call(*inputs).sin().sum()


@pytest.mark.composes("torch.func: jvp, jacfwd, linearize, vjp, jacrev, hessian, nested", "works")
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
@pytest.mark.parametrize("transform", _TRANSFORMS)
@pytest.mark.parametrize("name", A_FEW)
def test_func(name, transform, inputs):
    _same_as_plain(lambda call: _TRANSFORMS[transform](call, inputs), CALLS[name])


def test_a_jvp_that_is_compiled(inputs):
    def of(call):
        def run(*inputs):
            return torch.func.jvp(call, inputs, _tangents(inputs))

        return torch.compile(run, backend="aot_eager", fullgraph=True)(*inputs)

    _same_as_plain(of, CALLS["bn-relu-train"])


# --- gradients of gradients --------------------------------------------------------------------------------------


@pytest.mark.composes("a gradient penalty (`create_graph=True`)", "works")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_penalty_reaches_the_parameters_that_it_reaches_in_pytorch(training, inputs, device):
    """Weight decay does more with a gradient of zeros than with None."""
    model = _Tail().double().to(device).train(training)
    plain = _Tail().double().to(device).train(training)
    fusedres.fuse_(model)

    def reached(model):
        x = inputs[0].clone().requires_grad_()
        (dx,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        dx.square().sum().backward()
        return {name: p.grad is not None for name, p in model.named_parameters()}

    assert reached(model) == reached(plain)


@pytest.mark.parametrize("name", ["bn-relu-eval", "bn-relu-train", "dual-relu"])
def test_a_bias_that_trains_alone_has_a_second_derivative_of_zeros(name, inputs):
    x, r, w, b = inputs
    b.requires_grad_()

    def of(call):
        (db,) = torch.autograd.grad(call(x, r, w, b).sum(), b, create_graph=True)
        return torch.autograd.grad(db.sum(), b)[0]

    _same_as_plain(of, CALLS[name])


_FROM_A_RESIDUAL: dict[str, Callable[..., Tensor]] = {
    name: CALLS[name] for name in ("bn-add-relu-train", "bn-add-leaky-eval", "dual-relu", "add-bn-relu", "add-relu")
} | {
    "bn-add-train": _norm(True, None, residual=True),
    "bn-add-silu-eval": _norm(False, "silu", residual=True),
    "scaled-add-relu": lambda x, r, w, b: F.scaled_add_act(x, r, w, activation="relu"),
}  # fmt: skip


@pytest.mark.parametrize("frozen", ["nothing", "all else"])
@pytest.mark.parametrize("name", _FROM_A_RESIDUAL)
def test_a_penalty_reaches_what_only_a_residual_leads_to(name, frozen, inputs):
    """Also where nobody keeps the residual: zeros, as in PyTorch, or None where PyTorch has None."""
    x, r, w, b = inputs
    for each in (x, w, b):
        each.requires_grad_(frozen == "nothing")

    def of(call):
        bias = torch.full_like(b, 0.5).requires_grad_()
        dy = torch.cos(x.detach()).requires_grad_()
        y = call(x, r * 1.5 + bias.view(1, -1, 1, 1), w, b)
        leaves = [t for t in (x, w, b, bias) if t.requires_grad]
        first = torch.autograd.grad(y, leaves, dy, create_graph=True, allow_unused=True)
        penalty = sum(g.square().sum() for g in first if g is not None)
        return torch.autograd.grad(penalty, [*leaves, dy], allow_unused=True)

    _same_as_plain(of, _FROM_A_RESIDUAL[name])


# --- the backend is a context's choice ---------------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.composes("`with fusedres.backend(...)` in several threads", "works")
def test_two_overlapping_blocks_of_two_threads_leave_nothing_behind():
    first_is_in, second_is_out = threading.Event(), threading.Event()
    seen = {}

    def first():
        with fusedres.backend("off"):
            first_is_in.set()
            second_is_out.wait(60)
            seen["first"] = fusedres.get_backend()

    before = contextvars.Context().run(fusedres.get_backend)
    thread = threading.Thread(target=first)
    thread.start()
    first_is_in.wait(60)
    with fusedres.backend("aten"):
        seen["second"] = fusedres.get_backend()
    second_is_out.set()
    thread.join()
    after = contextvars.Context().run(fusedres.get_backend)
    assert (seen, after) == ({"first": "off", "second": "aten"}, before)


@pytest.mark.once
def test_a_block_in_a_block_ends_with_what_was_before():
    with fusedres.backend("off"):
        with fusedres.backend("auto"):
            pass
        assert fusedres.get_backend() == "off"


@pytest.mark.once
def test_a_block_outlives_what_the_process_chooses_meanwhile():
    before = contextvars.Context().run(fusedres.get_backend)
    try:
        with fusedres.backend("off"):
            fusedres.set_backend("aten")
            inside = fusedres.get_backend()
        assert (inside, contextvars.Context().run(fusedres.get_backend)) == ("off", "aten")
    finally:
        fusedres.set_backend(before)


@pytest.mark.once
def test_a_compiled_function_is_compiled_again_where_the_backend_is_another():
    compiled = torch.compile(lambda x: x + len(fusedres.get_backend()), backend="eager", fullgraph=True)  # fmt: skip
    lengths = []
    for name in ("aten", "off"):
        with fusedres.backend(name):
            lengths.append(int(compiled(torch.zeros(()))))
    assert lengths == [4, 3]
