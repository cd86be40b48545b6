"""What leaves a block to its own forward, with a reason that names the line and says what to do; and that looking at it
has no effect."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedres

from .deciding import X, block, functional, with_child
from .swap_blocks import fused_copy, images

KEPT: list[torch.Tensor] = []


def a_random_draw(self, x):
    h = self.bn(self.conv(x))
    return F.relu(h) if random.random() < 0.5 else F.relu(h + x)


def a_draw_of_numpy(self, x):
    h = self.bn(self.conv(x))
    return F.relu(h) if np.random.rand() < 0.5 else F.relu(h + x)


def a_draw_of_torch(self, x):
    h = self.bn(self.conv(x))
    return F.relu(h) if torch.rand(()) < 0.5 else F.relu(h + x)


def the_time(self, x):
    return F.relu(self.bn(self.conv(x))) * (time.time() > 0)


def the_environment(self, x):
    return F.relu(self.bn(self.conv(x))) * float(os.environ.get("NO_SUCH_NAME", 1))


def printing(self, x):
    print(end="")
    return F.relu(self.bn(self.conv(x)))


def keeping(self, x):
    KEPT.append(x)
    return F.relu(self.bn(self.conv(x)))


def counting(self, x):
    self.count = 1
    return F.relu(self.bn(self.conv(x)))


def catching(self, x):
    try:
        h = self.bn(self.conv(x))
    except ValueError:
        h = x
    return F.relu(h)


def in_a_context(self, x):
    with contextlib.nullcontext():
        h = self.bn(self.conv(x))
    return F.relu(h)


def recorded(self, x):
    with torch.autograd.profiler.record_function("block"):
        return F.relu(self.bn(self.conv(x)))


def by_an_attribute_of_the_input(self, x):
    h = F.relu(self.bn(self.conv(x)))
    return h * 2 if hasattr(x, "mask") else h


def by_a_default_of_the_input(self, x):
    return F.relu(self.bn(self.conv(x))) * getattr(x, "gain", 1.0)


def by_dtype(self, x):
    h = F.relu(self.bn(self.conv(x)))
    return h * 2 if x.dtype == torch.float64 else h


def by_dtype_identity(self, x):
    h = F.relu(self.bn(self.conv(x)))
    return h * 2 if x.dtype is torch.float64 else h


def by_layout(self, x):
    h = F.relu(self.bn(self.conv(x)))
    return h * 2 if x.layout is torch.strided else h


def by_history(self, x):
    h = F.relu(self.bn(self.conv(x)))
    return h if x.grad_fn is None else h * 2


def by_gradient(self, x):
    h = F.relu(self.bn(self.conv(x)))
    return h * 2 if x.requires_grad is True else h


def by_type(self, x):
    h = F.relu(self.bn(self.conv(x)))
    return h * 2 if type(x) is torch.Tensor else h


def by_truth(self, x):
    h = F.relu(self.bn(self.conv(x)))
    return h if x.mean() else h * 2


def by_identity(self, x):
    h = self.conv(x)
    return F.relu(self.bn(h)) * (2 if self.calls is h else 1)


# forward: a part of the reason
LEFT = {
    a_random_draw: "random", a_draw_of_numpy: "random.rand",
    a_draw_of_torch: "branches on a value computed from its input", the_time: "it calls time.time()",
    the_environment: "environ", printing: "it calls print()",
    keeping: "it writes to a list that outlives the call", counting: "writes to an attribute, count",
    catching: "it catches errors", in_a_context: "nullcontext", recorded: "record_function",
    by_an_attribute_of_the_input: "asks a tensor whether it has mask",
    by_a_default_of_the_input: "asks a tensor for gain",
    by_dtype: "branches on", by_dtype_identity: "a certain object", by_layout: "a certain object",
    by_history: "a certain object", by_gradient: "a certain object", by_type: "for its class", by_truth: "branches on",
    by_identity: "whether two tensors are one",
}  # fmt: skip


@pytest.mark.once
@pytest.mark.parametrize("forward", LEFT, ids=lambda f: f.__name__)
def test_it_is_left_alone_with_the_line(forward):
    reason = fusedres.explain(block(forward)).rows[0].reason
    assert (LEFT[forward] in reason, "test_swap_own_forward.py:" in reason) == (True, True), reason


@pytest.mark.parametrize("forward", LEFT, ids=lambda f: f.__name__)
def test_left_alone_it_computes_the_same(forward):
    plain = block(forward)
    fused = fused_copy(plain)
    found = []
    for each in (plain, fused):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        found.append(each(X.clone().requires_grad_()).detach())
    KEPT.clear()
    assert torch.equal(*found)


@pytest.mark.once
@pytest.mark.parametrize("look", [fusedres.explain, fusedres.fuse_], ids=["explain", "fuse_"])
@pytest.mark.parametrize("forward", LEFT, ids=lambda f: f.__name__)
def test_looking_has_no_effect(look, forward, capsys):
    def state():
        return (
            random.getstate(), np.random.get_state()[2], torch.get_rng_state().tolist(), len(KEPT), capsys.readouterr()
        )  # fmt: skip

    model = block(forward)
    before = state(), dict(vars(model))
    look(model)
    assert (state(), dict(vars(model))) == before


class Calls(nn.Module):
    """An owner whose child is all that may be fused."""

    def __init__(self) -> None:
        super().__init__()
        self.child, self.entered = block(functional), 0

    def forward(self, x):
        with self:
            return self.child(x)

    def __enter__(self):
        self.entered += 1

    def __exit__(self, *_):
        return False


@pytest.mark.once
def test_a_context_of_the_user_s_is_not_entered():
    model = Calls()
    fusedres.fuse_(model)
    assert (model.entered, fusedres.is_fused(model.child)) == (0, True)


ADVICE = {
    "assert": (lambda self, x: asserts(self, x), "write torch._assert(condition, text)"),
    "checkpoint": (
        lambda self, x: torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False),
        "call checkpoint around the block, not inside it",
    ),
    "print": (printing, "print outside of the forward"),
    "branch": (by_truth, "take the branch out of this forward"),
}


def asserts(self, x):
    assert x.shape[1] == 4
    return F.relu(self.bn(self.conv(x)))


@pytest.mark.once
@pytest.mark.parametrize("name", ADVICE)
def test_a_reason_says_what_to_do(name):
    forward, advice = ADVICE[name]
    assert advice in fusedres.explain(block(forward)).rows[0].reason


SCRIPTED = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())


@pytest.mark.once
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (lambda: nn.Sequential(nn.LazyBatchNorm2d(), nn.ReLU()), "run one batch first, then fuse"),
        (lambda: torch.jit.script(SCRIPTED), "call fuse_ before torch.jit.script"),
        (lambda: nn.Sequential(torch.jit.script(SCRIPTED), nn.BatchNorm2d(4)), "call fuse_ before torch.jit.script"),
        (lambda: torch.fx.symbolic_trace(block(with_child)), "call fuse_ before symbolic_trace"),
    ],
    ids=["lazy", "script", "script inside", "fx"],
)  # fmt: skip
def test_a_kind_of_module_that_cannot_be_fused_says_what_to_do(make, advice):
    rows = fusedres.explain(make()).rows
    assert any(advice in row.reason for row in rows), rows


@dataclasses.dataclass
class Output:
    """What a forward gives, with something that its making does besides."""

    value: torch.Tensor
    shape: tuple = ()

    def __post_init__(self):
        KEPT.append(self.value)


def a_dataclass(self, x):
    return Output(F.relu(self.bn(self.conv(x))))


def a_dataclass_in_between(self, x):
    out = Output(F.relu(self.bn(self.conv(x))))
    return out, x + 1


@pytest.mark.once
@pytest.mark.parametrize(
    ("forward", "status"), [(a_dataclass, "fusable"), (a_dataclass_in_between, "left alone")]
)
def test_an_object_may_be_the_last_thing_that_is_made(forward, status):
    assert fusedres.explain(block(forward)).rows[0].status == status


def test_an_object_is_made_at_each_call(device):
    plain, x = block(a_dataclass).to(device).eval(), X.to(device)
    fused = fused_copy(plain)
    KEPT.clear()
    torch.testing.assert_close(fused(x).value, plain(x).value)
    assert len(KEPT) == 2
    KEPT.clear()


def a_checked_size(self, x):
    torch._assert(x.shape[1] == 4, f"{x.shape[1]} channels, {self.conv.in_channels!r} wanted")
    return F.relu(self.bn(self.conv(x)))


def test_a_string_of_sizes_is_made_at_each_call(device):
    fused = block(a_checked_size).to(device)
    report = fusedres.fuse_(fused)
    with pytest.raises(AssertionError, match="5 channels, 4 wanted"):
        fused(images(2, 5, 3, 3, device=device))
    assert (report.rows[0].status, fused(X.to(device)).shape) == ("fused", X.shape)
