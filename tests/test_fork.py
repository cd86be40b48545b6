"""The fork of a residual: where the addition of its two gradients is folded into the tail's backward, and every way in
which somebody might notice."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from contextvars import copy_context
from unittest.mock import Mock, call

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fusedres
from fusedres import fork
from fusedres.benchmarks.steps import ALLOWED, difference, excess
from fusedres.dispatch import INTERPRET
from fusedres.ops import batch_norm_act as single
from fusedres.ops import dual

from .helpers import force_int64
from .swap_blocks import fused_copy, images

pytestmark = pytest.mark.cpu
LAYOUTS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}


# --- the pass that adds ------------------------------------------------------------------------------------------


def draw(shape, dtype, layout):
    return torch.randn(shape).to(dtype).contiguous(memory_format=layout)


def second_gradient(kind, shape, dtype, layout):
    """(skip, its stride, the same as a full tensor)."""
    if kind == "full":
        skip = draw(shape, dtype, layout)
        return skip, None, skip
    if kind == "another layout":
        skip = torch.randn(shape).to(dtype).transpose(2, 3).contiguous().transpose(2, 3)
        return skip, None, skip
    stride = {"stride 2": [2, 2], "stride 2x3": [2, 3], "stride 1x2": [1, 2]}[kind]
    full = torch.zeros(shape, dtype=dtype).contiguous(memory_format=layout)
    visited = full[:, :, :: stride[0], :: stride[1]]
    skip = draw(visited.shape, dtype, layout)
    visited.copy_(skip)
    return skip, stride, full


KINDS = ["full", "another layout", "stride 2", "stride 2x3", "stride 1x2"]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 8, 7, 6), (3, 3, 5, 4), (9, 5, 7, 6)], ids=str)
@pytest.mark.parametrize("tail", ["add, relu", "add", "relu", "dual"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_gradients_are_their_sum(kind, tail, shape, dtype, layout, training):
    torch.manual_seed(0)
    x, residual, dy = (draw(shape, dtype, LAYOUTS[layout]) for _ in range(3))
    skip, stride, full = second_gradient(kind, shape, dtype, LAYOUTS[layout])
    # What the kernels store is rounded to nearest on a GPU and cut off by the interpreter: values that are exact.
    dy, skip, full = ((16 * t).round() / 16 for t in (dy, skip, full))
    weight, bias, mean, var = torch.rand(4, shape[1])
    activation = None if tail == "add" else "relu"
    if tail == "dual":
        affine = (weight, bias, weight, bias)
        saved = dual.FORWARD.op(
            x, residual, *affine, mean, var, mean.clone(), var.clone(), training, 0.1, 1e-5, 0.1, 1e-5, activation, True
        )[1:]  # fmt: skip
        rest = (
            x,
            residual,
            weight,
            weight,
            *saved,
            training,
            activation,
            [True] * 4,
            weight.dtype,
            weight.dtype,
        )
        operator = dual.BACKWARD.op
    else:
        given = None if tail == "relu" else residual
        saved = single.FORWARD.op(
            x, given, weight, bias, mean, var, training, 0.1, 1e-5, activation, True
        )[1:]  # fmt: skip
        wanted = (True, given is not None, True, bias.dtype)
        rest = (x, weight, *saved, training, activation, None if given is None else dtype, *wanted)  # fmt: skip
        operator = single.BACKWARD.op
    both = operator(dy, *rest, skip, stride)
    alone = operator((dy + full).contiguous(memory_format=LAYOUTS[layout]), *rest)
    # Sums have another order where the second gradient is strided (another tile), and in compiled code, where it may
    # give the rows to threads in another way.
    is_exact = INTERPRET and stride is None
    tolerance = 0.0 if is_exact else 4e-6 if dtype == torch.float32 else 2**-7
    for a, b in zip(both, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * 20)


@pytest.mark.parametrize("tail", ["add", "dual"])
def test_the_same_in_float64_and_a_flat_walk(tail):
    """Beside the sums of a dual tail there is room for tiles of one row."""
    test_two_gradients_are_their_sum("stride 2", tail, (9, 8, 7, 7), torch.float64, "nchw", True)


def test_the_sums_are_those_of_the_gradient_as_it_is_stored():
    x, residual, dy, skip = (draw((2, 8, 7, 6), torch.bfloat16, torch.channels_last) for _ in range(4))  # fmt: skip
    weight = torch.ones(8)
    saved = single.FORWARD.op(
        x, residual, weight, weight, None, None, True, 0.1, 1e-5, "relu", True
    )[1:]
    _, dresidual, _, dbias = single.BACKWARD.op(
        dy, x, weight, *saved, True, "relu", x.dtype, True, True, True, torch.float32, skip
    )
    torch.testing.assert_close(
        dbias.double(), dresidual.double().sum((0, 2, 3)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["full", "stride 2"])
def test_forced_int64_offsets_give_the_same_bits(kind, layout, monkeypatch):
    """What a tensor of 2^31 elements and more takes, on a small one."""
    x, residual, dy = (draw((2, 8, 7, 6), torch.float32, LAYOUTS[layout]) for _ in range(3))
    skip, stride, _ = second_gradient(kind, x.shape, torch.float32, LAYOUTS[layout])
    saved = single.FORWARD.op(x, residual, None, None, None, None, True, 0.1, 1e-5, "relu", True)[
        1:
    ]
    rest = (x, None, *saved, True, "relu", x.dtype, True, True, False, None, skip, stride)
    expected = single.BACKWARD.op(dy, *rest)
    force_int64(monkeypatch)
    found = single.BACKWARD.op(dy, *rest)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_frozen_statistics_and_parameters_need_no_sum_over_rows():
    x, dy, skip = (images(2, 4, 5, 5) for _ in range(3))
    saved = single.FORWARD.op(
        x, x, None, None, torch.zeros(4), torch.ones(4), False, 0.1, 1e-5, "relu", True
    )[1:]
    rest = (x, None, *saved, False, "relu", x.dtype, True, True, False, None)
    both = single.BACKWARD.op(dy, *rest, skip, None)
    alone = single.BACKWARD.op(dy + skip, *rest)
    assert all(torch.equal(a, b) for a, b in zip(both, alone, strict=True))


# --- in a network ------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """conv, bn, add, ReLU."""

    def __init__(self, channels: int = 4, affine: bool = True) -> None:
        super().__init__()
        # Without a bias, whose gradient is zero but for rounding.
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels, affine=affine)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)) + x)


class Projected(nn.Module):
    """The same with a shortcut that changes shape."""

    def __init__(self, channels: int = 4, stride: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 3, stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(2 * channels)
        self.shortcut = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 1, stride, bias=False), nn.BatchNorm2d(2 * channels)
        )

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)) + self.shortcut(x))


def chain(*blocks: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A network in float64 and its fused copy."""
    torch.manual_seed(0)
    for block in blocks:
        nn.init.uniform_(block.bn.weight, 0.5, 1.5) if block.bn.affine else None
    network = nn.Sequential(*blocks).double()
    return network, fused_copy(network)


@pytest.fixture
def left(monkeypatch):
    """The stride of each gradient that is left with the node that made its tensor."""
    found = []
    leave = fork.leave

    def spy(node, gradient, stride=None):
        found.append(stride)
        leave(node, gradient, stride)

    monkeypatch.setattr(fork, "leave", spy)
    return found


X = images(2, 4, 7, 6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("blocks", "forks"),
    [
        (lambda: (Block(), Block(), Block()), [None, None]),
        (lambda: (Block(), Projected(), Block(8)), [None, [2, 2]]),
        (lambda: (Block(), Projected(stride=3), Projected(8)), [[2, 2], [3, 3]]),
        (lambda: (Block(), Projected(stride=1)), [None]),
    ],
    ids=["identity", "projected", "projected twice", "stride 1"],
)
def test_every_fork_between_two_tails_is_folded_in(blocks, forks, layout, left):
    network, fused = chain(*blocks())
    network, fused = (m.to(memory_format=LAYOUTS[layout]) for m in (network, fused))
    x = X.contiguous(memory_format=LAYOUTS[layout])
    assert excess(network, fused, x) <= ALLOWED
    if layout == "nchw" and forks == [None]:
        forks = []  # the library adds nothing at every position
    assert left == forks


def test_with_the_library_for_the_convolution(left, monkeypatch):
    monkeypatch.setattr("fusedres.ops.projection.why_library", lambda *_: "the test wants it")
    network, fused = chain(Block(), Projected(), Block(8))
    assert excess(network, fused, X) <= ALLOWED
    assert left == [None, [2, 2]]


def test_frozen_parameters_of_the_first(left):
    network, fused = chain(Block(), Block())
    for model in (network, fused):
        model[0].bn.requires_grad_(False)
        model[0].conv.requires_grad_(False)
        model[0].bn.eval()
    assert excess(network, fused, X) <= ALLOWED
    assert left == [None]


# --- who might notice --------------------------------------------------------------------------------------------


def gradients(model: nn.Module, act) -> dict[str, torch.Tensor]:
    """All that `act(blocks, x)` leaves: parameters' gradients, the input's, and what it returns."""
    model = copy.deepcopy(model)
    x = X.clone().requires_grad_()
    seen = act(list(model), x * 1)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found |= {f"seen {k}": t for k, t in enumerate(seen or ())}
    return found | ({"x": x.grad} if x.grad is not None else {})


def loss_of(y):
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()


def hook_on_the_tensor(blocks, x):
    seen = []
    x = blocks[0](x)
    x.register_hook(seen.append)
    loss_of(blocks[1](x)).backward()
    return seen


def hook_on_the_tensor_afterwards(blocks, x):
    seen = []
    x = blocks[0](x)
    y = blocks[1](x)
    x.register_hook(seen.append)
    loss_of(y).backward()
    return seen


def hook_that_changes(blocks, x):
    x = blocks[0](x)
    x.register_hook(lambda g: 2 * g)
    loss_of(blocks[1](x)).backward()


def multi_grad_hook(blocks, x):
    seen = []
    x = blocks[0](x)
    torch.autograd.graph.register_multi_grad_hook([x], lambda g: seen.extend(g))
    loss_of(blocks[1](x)).backward()
    return seen


def retain_grad(blocks, x):
    x = blocks[0](x)
    x.retain_grad()
    loss_of(blocks[1](x)).backward()
    return [x.grad]


def prehook_on_the_node(blocks, x):
    seen = []
    x = blocks[0](x)
    x.grad_fn.register_prehook(lambda g: seen.append(g[0]))
    loss_of(blocks[1](x)).backward()
    return seen


def hook_on_the_node(blocks, x):
    seen = []
    x = blocks[0](x)
    x.grad_fn.register_hook(lambda _, g: seen.append(g[0]))
    loss_of(blocks[1](x)).backward()
    return seen


def grad_of_the_tensor(blocks, x):
    x = blocks[0](x)
    return torch.autograd.grad(loss_of(blocks[1](x)), [x])


def grad_of_the_tensor_and_parameters(blocks, x):
    x = blocks[0](x)
    wanted = [x, *blocks[0].parameters(), *blocks[1].parameters()]
    return torch.autograd.grad(loss_of(blocks[1](x)), wanted)


def grad_of_parameters(blocks, x):
    loss = loss_of(blocks[1](blocks[0](x)))
    return torch.autograd.grad(loss, [*blocks[0].parameters(), *blocks[1].parameters()])


def grad_of_an_edge(blocks, x):
    x = blocks[0](x)
    edge = torch.autograd.graph.get_gradient_edge(x)
    return torch.autograd.grad(loss_of(blocks[1](x)), [edge, *blocks[1].parameters()])


def backward_into_the_tensor(blocks, x):
    x = blocks[0](x)
    loss_of(blocks[1](x)).backward(inputs=[x, *blocks[1].parameters()])
    return [x.grad]


def backward_into_some(blocks, x):
    loss_of(blocks[1](blocks[0](x))).backward(inputs=list(blocks[1].parameters()))


def second_derivative(blocks, x):
    loss = loss_of(blocks[1](blocks[0](x)))
    first = torch.autograd.grad(loss, list(blocks[0].parameters()), create_graph=True)
    weights = [blocks[0].conv.weight, blocks[1].conv.weight]
    return torch.autograd.grad(sum(g.square().sum() for g in first), weights)


def create_graph(blocks, x):
    loss_of(blocks[1](blocks[0](x))).backward(create_graph=True)


def two_residuals(blocks, x):
    x = blocks[0](x)
    loss_of(blocks[1](x) + 3 * blocks[2](x)).backward()


def reentrant(blocks, x):
    x = blocks[0](x)
    loss_of(checkpoint(blocks[1], x, use_reentrant=True)).backward()


def checkpointed(blocks, x):
    x = checkpoint(blocks[0], x, use_reentrant=False)
    loss_of(checkpoint(blocks[1], x, use_reentrant=False)).backward()


def checkpointed_together(blocks, x):
    loss_of(checkpoint(nn.Sequential(*blocks), x, use_reentrant=False)).backward()


def reentrant_together(blocks, x):
    loss_of(checkpoint(nn.Sequential(*blocks), x, use_reentrant=True)).backward()


def module_hook(blocks, x):
    seen = []
    blocks[0].register_full_backward_hook(lambda _, __, g: seen.append(g[0]))
    loss_of(blocks[1](blocks[0](x))).backward()
    return seen


def offloaded(blocks, x):
    with torch.autograd.graph.save_on_cpu():
        y = blocks[1](blocks[0](x))
    loss_of(y).backward()


def anomaly(blocks, x):
    with torch.autograd.detect_anomaly(check_nan=True):
        loss_of(blocks[1](blocks[0](x))).backward()


def many_readers(blocks, x):
    x = blocks[0](x)
    loss_of(blocks[1](x) + 2 * x + x.sin()).backward()


def twice(blocks, x):
    loss = loss_of(blocks[1](blocks[0](x)))
    loss.backward(retain_graph=True)
    loss.backward()


def after_one_that_failed(blocks, x):
    """The first run stops between the later tail and the one that made x; in the second a hook sees x's gradient."""
    seen, fails = [], [True]
    x = blocks[0](x)
    blocks[1].conv.register_full_backward_hook(lambda *_: 1 / (not fails[0]) and None)
    loss = loss_of(blocks[1](x))
    with pytest.raises(ZeroDivisionError):
        loss.backward(retain_graph=True)
    fails[0] = False
    for block in blocks:
        block.zero_grad()
    x.register_hook(seen.append)
    loss.backward()
    return seen


def another_run_in_between(blocks, x):
    """A hook between the two tails runs the engine over the first one."""
    x = blocks[0](x)
    other, seen = x.sin().sum(), []

    def run_another(_):
        seen.extend(torch.autograd.grad(other, list(blocks[0].parameters()), retain_graph=True))

    loss = loss_of(blocks[1](x))
    blocks[1].conv.weight.register_hook(run_another)
    loss.backward(retain_graph=True)
    return seen


def another_backward_in_between(blocks, x):
    """The same, where the other run leaves a gradient with the first tail too."""
    x = blocks[0](x)
    other, done = loss_of(blocks[2](x)), []

    def run_another(_):
        if not done:
            done.append(True)
            other.backward(retain_graph=True)

    loss = loss_of(blocks[1](x))
    blocks[1].conv.weight.register_hook(run_another)
    loss.backward(retain_graph=True)


def grad_of_the_tensor_in_between(blocks, x):
    """A hook between the two tails runs the engine for x alone: what the outer run found out says nothing of it."""
    x = blocks[0](x)
    loss, other, seen = loss_of(blocks[1](x)), loss_of(blocks[2](x)), []
    blocks[1].conv.weight.register_hook(lambda _: seen.extend(torch.autograd.grad(other, [x])))
    loss.backward(retain_graph=True)
    return seen


def backward_in_between_of_a_grad(blocks, x):
    """The other way round, with more of the outer run to come."""
    x = blocks[0](x)
    y = blocks[1](x)
    other, done = loss_of(blocks[2](x)), []

    def run_another(_):
        if not done:
            done.append(True)
            other.backward(retain_graph=True)

    y.register_hook(run_another)
    return torch.autograd.grad(loss_of(y), [x, *blocks[1].parameters()], retain_graph=True)


def backward_into_some_of_each(blocks, x):
    """The last tail's leaf is asked for, the second one's is not; nobody asks for a tensor in between."""
    wanted = [blocks[0].conv.weight, blocks[1].conv.weight, blocks[2].bn.weight]
    loss_of(blocks[2](blocks[1](blocks[0](x)))).backward(inputs=wanted)


def backward_into_a_tensor_and_a_leaf(blocks, x):
    """The same, where somebody does."""
    x = blocks[0](x)
    wanted = [x, blocks[0].conv.weight, blocks[2].bn.weight]
    loss_of(blocks[2](blocks[1](x))).backward(inputs=wanted)
    return [x.grad]


def three_runs_over_one_graph(blocks, x):
    """A whole one, one for a tensor, a whole one."""
    x = blocks[0](x)
    loss = loss_of(blocks[1](x))
    loss.backward(retain_graph=True)
    seen = torch.autograd.grad(loss, [x], retain_graph=True)
    loss.backward()
    return seen


def nested(blocks, x):
    """A backward inside another's hook."""
    x = blocks[0](x)
    y = blocks[1](x)
    other = copy.deepcopy(nn.Sequential(*blocks[:2]))
    inner = torch.ones_like(x).requires_grad_()

    def run_another(_):
        with torch.enable_grad():
            loss_of(other(inner * 1)).backward()

    y.register_hook(run_another)
    loss_of(y).backward()
    return [inner.grad, *(p.grad for p in other.parameters())]


class Named(torch.autograd.Function):
    """Somebody's own, whose node has an attribute that PyTorch's leaves have."""

    @staticmethod
    def forward(ctx, x):
        ctx.variable = x.shape
        return 2 * x

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy


def grad_of_the_tensor_past_a_node_that_looks_like_a_leaf(blocks, x):
    class Main(nn.Module):
        def forward(self, x):
            return Named.apply(x)

    x = blocks[0](x)
    blocks[1].conv = Main()
    return torch.autograd.grad(loss_of(blocks[1](x)), [x])


# What was done, and how many gradients were left with the node that made the tensor.
NOTICED = {
    hook_on_the_tensor: 0,
    hook_on_the_tensor_afterwards: 0,
    hook_that_changes: 0,
    multi_grad_hook: 0,
    retain_grad: 0,
    prehook_on_the_node: 0,
    hook_on_the_node: 0,
    grad_of_the_tensor: 0,
    grad_of_the_tensor_and_parameters: 0,
    grad_of_parameters: 0,
    grad_of_an_edge: 0,
    backward_into_the_tensor: 0,
    backward_into_some: 0,
    second_derivative: 0,
    create_graph: 0,
    two_residuals: 1,
    reentrant: 0,
    checkpointed: 1,
    checkpointed_together: 0,
    reentrant_together: 2,
    module_hook: 0,
    offloaded: 1,
    anomaly: 1,
    many_readers: 1,
    twice: 2,
    after_one_that_failed: 1,
    another_run_in_between: 1,
    another_backward_in_between: 2,
    grad_of_the_tensor_in_between: 1,
    backward_in_between_of_a_grad: 1,
    backward_into_some_of_each: 2,
    backward_into_a_tensor_and_a_leaf: 1,
    three_runs_over_one_graph: 2,
    grad_of_the_tensor_past_a_node_that_looks_like_a_leaf: 0,
    nested: 2,
}
# The second and the third block read what the first made, which they cannot where the second changes the shape.
READ_TWICE = (
    two_residuals,
    many_readers,
    another_backward_in_between,
    grad_of_the_tensor_in_between,
    backward_in_between_of_a_grad,
    grad_of_the_tensor_past_a_node_that_looks_like_a_leaf,
)


@pytest.mark.composes("hooks, `retain_grad` and `autograd.grad` at a fork", "works")
@pytest.mark.filterwarnings("ignore:.*create_graph=True.*", "ignore:Anomaly Detection.*")
@pytest.mark.parametrize("act", NOTICED, ids=lambda f: f.__name__)
def test_nobody_notices(act, left):
    network, fused = chain(Block(), Block(), Block())
    found = gradients(fused, act)
    count = len(left)
    assert difference(gradients(network, act), found) <= 1e-12
    assert count == NOTICED[act]


@pytest.mark.filterwarnings("ignore:.*create_graph=True.*", "ignore:Anomaly Detection.*")
@pytest.mark.parametrize("act", NOTICED, ids=lambda f: f.__name__)
def test_nobody_notices_at_a_projection(act):
    if act in READ_TWICE:
        act = many_readers_of_the_projected
    network, fused = chain(Block(), Projected(), Block(8))
    assert difference(gradients(network, act), gradients(fused, act)) <= 1e-12


def many_readers_of_the_projected(blocks, x):
    x = blocks[0](x)
    (loss_of(blocks[1](x)) + loss_of(2 * x + x.sin())).backward()


def test_a_hook_on_the_later_node_sees_the_gradient_of_its_residual(left):
    _, fused = chain(Block(), Block())
    seen = []
    y = fused[1](fused[0](X))
    y.grad_fn.register_hook(lambda g, _: seen.append(g[1]))
    loss_of(y).backward()
    assert (left, seen[0] is None) == ([], False)


def test_a_tensor_that_was_written_to_since(left):
    _, fused = chain(Block(), Block())
    found = []
    for write in (lambda x: x.mul_(2), lambda x: x * 2):
        x = fused[0](X)
        y = fusedres.functional.batch_norm_act(
            X, None, None, fused[1].bn.weight, training=True, residual=x
        )
        fused.zero_grad()
        (loss_of(y) + loss_of(write(x))).backward()
        found.append({n: p.grad for n, p in fused.named_parameters() if p.grad is not None})
    assert difference(*found) <= 1e-12
    assert left == [None]  # by the second, which wrote elsewhere


def test_the_residual_is_the_only_reader(left):
    _, fused = chain(Block(), Block())
    found = []
    for change in (lambda x: x, lambda x: x * 1):
        x = fused[0](X)
        y = fusedres.functional.batch_norm_act(
            x.detach(), None, None, fused[1].bn.weight, training=True, residual=change(x)
        )
        fused.zero_grad()
        loss_of(y).backward()
        found.append({n: p.grad for n, p in fused.named_parameters() if p.grad is not None})
    assert difference(*found) <= 1e-12
    assert left == [None]


class Join(Block):
    """A tail whose residual is not what its main path reads."""

    def forward(self, a, b):
        return F.relu(self.bn(self.conv(a)) + b)


@pytest.mark.parametrize("wrap", [checkpoint, lambda f, x, **_: f(x)], ids=["checkpointed", "plain"])  # fmt: skip
def test_a_tensor_that_only_a_residual_reads(wrap, left):
    torch.manual_seed(0)
    blocks = nn.ModuleList([Block(), Join()]).double()
    found = []
    for model in (blocks, fused_copy(blocks)):
        x = wrap(model[0], X, use_reentrant=False)
        loss_of(model[1](X, x)).backward()
        found.append({n: p.grad for n, p in model.named_parameters()})
    assert difference(*found) <= 1e-12
    assert left == [None]


@pytest.mark.parametrize("later", [Block, Projected])
def test_two_threads_that_share_the_first_tail(later, left):
    """Another thread's run begins and ends while this one stands between the later tail and the first."""
    found = []
    for model in chain(Block(), later(), later()):
        x = model[0](X)
        loss, other = (loss_of(block(x)) for block in model[1:])

        def run_another(_, other=other):
            thread = threading.Thread(
                target=copy_context().run, args=(other.backward,), kwargs={"retain_graph": True}
            )
            thread.start()
            thread.join()

        model[1].conv.weight.register_hook(run_another)
        loss.backward(retain_graph=True)
        found.append({n: p.grad for n, p in model.named_parameters()})
    assert difference(*found) <= 1e-12
    assert len(left) == 2


@pytest.mark.parametrize("other_is", ["another backward", "for x alone"])
def test_two_runs_that_stand_between_the_tails_together(other_is, left):
    """This one stands there until the other does, which goes on when this one has ended."""
    network, fused = chain(Block(), Block(), Block())
    found = []
    for model in (network, fused):
        x, seen, stands, ended = model[0](X), [], threading.Event(), threading.Event()

        def run_other(model=model, x=x, seen=seen):
            other = loss_of(model[2](x))
            if other_is == "for x alone":
                seen.extend(torch.autograd.grad(other, [x], retain_graph=True))
            else:
                other.backward(retain_graph=True)

        thread = threading.Thread(target=copy_context().run, args=(run_other,))

        def until_it_stands(*_, thread=thread, stands=stands):
            thread.start()
            assert stands.wait(60)

        def until_this_ended(*_, stands=stands, ended=ended):
            stands.set()
            assert ended.wait(60)

        model[1].conv.register_full_backward_hook(until_it_stands)
        model[2].conv.register_full_backward_hook(until_this_ended)
        loss_of(model[1](x)).backward(retain_graph=True)
        ended.set()
        thread.join()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        found[-1] |= {str(k): t for k, t in enumerate(seen)}
    assert difference(*found) <= 1e-12
    assert len(left) == (1 if other_is == "for x alone" else 2)


def living_runs():
    return [run for reference in fork._runs.values() if (run := reference()) is not None]


def test_a_run_that_failed_keeps_nothing_alive(monkeypatch):
    references = []
    leave = fork.leave
    monkeypatch.setattr(
        fork, "leave", lambda n, g, s=None: (references.append(weakref.ref(g)), leave(n, g, s))
    )
    _, fused = chain(Block(), Block())
    x = fused[0](X)
    loss = loss_of(fused[1](x))
    fused[1].conv.weight.register_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    assert x.grad_fn.fork_left  # it got that far
    del loss
    gc.collect()
    assert [reference() for reference in references] == [None]
    assert living_runs() == []


@pytest.mark.composes("compiled autograd", "works")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_autograd_adds_itself(left):
    network, fused = chain(Block(), Block())
    found = []
    for model in (network, fused):
        torch._dynamo.reset()
        loss = loss_of(model(X))

        @torch.compile(backend="eager")
        def step(loss=loss):
            loss.backward()

        with torch._dynamo.config.patch(compiled_autograd=True):
            step()
        found.append({n: p.grad for n, p in model.named_parameters()})
    assert difference(*found) <= 1e-12
    assert left == []


def test_without_a_parameter_nobody_can_tell_so_autograd_adds(left):
    network, fused = chain(Block(), Block(affine=False))
    assert excess(network, fused, X) <= ALLOWED
    assert left == []


def test_a_node_without_a_parameter_relies_on_what_another_one_found_out(left):
    network, fused = chain(Block(), Block(affine=False), Block())
    assert excess(network, fused, X) <= ALLOWED
    assert left == [None, None]


def test_a_gradient_that_was_left_goes_when_it_was_added(monkeypatch):
    """Not with its run, which goes on for as long as the network is deep."""
    references, alive = [], []
    leave = fork.leave
    monkeypatch.setattr(
        fork, "leave", lambda n, g, s=None: (references.append(weakref.ref(g)), leave(n, g, s))
    )
    _, fused = chain(Block(), Block())
    x = X.clone().requires_grad_()
    x.register_hook(lambda _: alive.extend(reference() for reference in references))
    gc.collect()
    loss_of(fused(x)).backward()
    assert (alive, living_runs()) == ([None], [])


def test_a_run_asks_once_and_has_one_callback(left, monkeypatch):
    begun = []

    class Counted(fork._Run):
        def __init__(self, *args):
            super().__init__(*args)
            begun.append(None)

    monkeypatch.setattr(fork, "_Run", Counted)
    _, fused = chain(*(Block() for _ in range(5)))
    for runs in (1, 2):
        loss_of(fused(X)).backward()
        assert (len(left), len(begun)) == (4 * runs, runs)
    assert len(fork._runs) == 1  # those before are swept out


@pytest.mark.parametrize("same", [True, False], ids=["same stream", "another stream"])
def test_the_stream_that_adds_waits_for_the_one_that_left(same, monkeypatch):
    """As objects that look like CUDA's: it has no streams on a CPU."""
    now, streams = [(7, 0, 1)], Mock()
    monkeypatch.setattr(torch._C, "_cuda_getCurrentStream", lambda _: now[0], raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", streams.current)
    monkeypatch.setattr(torch.cuda, "Stream", streams.of)
    run, node = fork._Run(True), Node()
    monkeypatch.setitem(fork._runs, -1, weakref.ref(run))  # the number of no run
    gradient = Mock(is_cuda=True)
    fork.leave(node, gradient, [2, 2])
    if not same:
        now[0] = (9, 0, 1)
    assert fork.take(node) == (gradient, [2, 2])
    waits, records = streams.current().wait_stream.mock_calls, gradient.record_stream.mock_calls
    if same:
        assert (waits, records) == ([], [])
    else:
        assert streams.of.mock_calls == [call(stream_id=7, device_index=0, device_type=1)]
        assert waits == [call(streams.of())]
        assert records == [call(streams.current())]


class Node:
    """What the fork asks of a node that takes."""

    fork_left = False


def test_a_node_that_is_called_without_an_engine(left):
    _, fused = chain(Block(), Block())
    y = fused[1](fused[0](X))
    with torch.no_grad():
        dresidual = y.grad_fn.apply(torch.ones_like(y))[1]
    torch.testing.assert_close(dresidual, (y > 0).to(y.dtype))
    assert (left, living_runs()) == ([], [])


def test_only_tails_of_ours_take_part():
    x = X.clone().requires_grad_()
    made = fusedres.functional.batch_norm_act(x, None, None, training=True)
    assert [fork.source_of(t) is None for t in (None, x, x * 2, made.view(-1), made)] == [
        True, True, True, True, False,
    ]  # fmt: skip
