"""What a forward decides anew at each call, and what it does besides computing: both stay as they are when it is fused.

Where a decision is known to the trace or can be looked at again, the block is fused and falls back when it changes; all
else leaves it to its own forward, with a reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import time
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedres
from fusedres.benchmarks.steps import ALLOWED, excess

from .swap_blocks import fused_copy, images

X = images(2, 4, 6, 6)

SKIPS = True
SCALES = [1.0, 2.0]
OPTIONS = {"skip": True, "more": {"scale": 1.0}}
SETTINGS = types.SimpleNamespace(skip=True, inner=types.SimpleNamespace(scale=2.0))
KEPT: list[torch.Tensor] = []


class Switches:
    skip = True


def end(h, x, factor=1.0):
    return F.relu(h + x) * factor


def choose():
    return end


def counter():
    """A function with a variable of its own, and one that changes it."""
    state = 1.0

    def read():
        return state

    def write(value):
        nonlocal state
        state = value

    return read, write


read_state, write_state = counter()


class Block(nn.Module):
    """conv, bn and ways to decide."""

    skips = True
    table = (1.0, 2.0)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()
        self.options = {"skip": True}
        self.config = types.SimpleNamespace(skip=True)
        self.function = end
        self.functions = [F.relu, torch.tanh]
        self.last = None
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def body(self, x):
        return self.bn(self.conv(x))

    @staticmethod
    def join(a, b):
        return F.relu(a + b)

    @classmethod
    def scale(cls):
        return cls.table[0]

    @property
    def factor(self):
        return 2.0 if self.skips else 1.0


def block(forward) -> nn.Module:
    torch.manual_seed(0)
    return type("Own", (Block,), {"forward": forward})().double()


# --- looked at again ---------------------------------------------------------------------------------------------


def a_global_flag(self, x):
    h = self.bn(self.conv(x))
    return F.relu(h + x) if SKIPS else F.relu(h)


def a_global_list(self, x):
    return F.relu(self.bn(self.conv(x)) + x) * SCALES[0]


def a_global_dict(self, x):
    h = self.bn(self.conv(x))
    return F.relu(h + x) * OPTIONS["more"]["scale"] if OPTIONS["skip"] else F.relu(h)


def a_global_object(self, x):
    return F.relu(self.bn(self.conv(x)) + x) * (SETTINGS.inner.scale if SETTINGS.skip else 1.0)


def a_class_outside(self, x):
    h = self.bn(self.conv(x))
    return F.relu(h + x) if Switches.skip else F.relu(h)


def a_helper(self, x):
    return end(self.bn(self.conv(x)), x)


def a_helper_of_a_helper(self, x):
    return choose()(self.bn(self.conv(x)), x)


def a_variable_of_an_enclosing_function(self, x):
    return F.relu(self.bn(self.conv(x)) + x) * read_state()


def a_method(self, x):
    return F.relu(self.body(x) + x)


def a_static_method(self, x):
    return self.join(self.bn(self.conv(x)), x)


def a_class_method(self, x):
    return F.relu(self.bn(self.conv(x)) + x) * self.scale()


def a_property(self, x):
    return F.relu(self.bn(self.conv(x)) + x) * self.factor


def a_missing_attribute(self, x):
    h = F.relu(self.bn(self.conv(x)))
    return h * 2 if hasattr(self, "late") else h


def an_attribute_with_a_default(self, x):
    return F.relu(self.bn(self.conv(x))) * getattr(self, "late", 1.0)


def a_dict_of_its_own(self, x):
    h = self.bn(self.conv(x))
    return F.relu(h + x) if self.options["skip"] else F.relu(h)


def an_object_of_its_own(self, x):
    h = self.bn(self.conv(x))
    return F.relu(h + x) if self.config.skip else F.relu(h)


def a_function_of_its_own(self, x):
    return self.function(self.bn(self.conv(x)), x)


def a_list_of_functions(self, x):
    return self.functions[0](self.bn(self.conv(x)))


def the_class_of_a_child(self, x):
    h = F.relu(self.bn(self.conv(x)))
    return h * 2 if isinstance(self.act, nn.Tanh) else h


def whether_processes_are_connected(self, x):
    h = F.relu(self.bn(self.conv(x)))
    return h * 2 if torch.distributed.is_initialized() else h


def whether_gradients_are_on(self, x):
    h = F.relu(self.bn(self.conv(x)))
    return h if torch.is_grad_enabled() else h * 2


def a_name_that_hides_a_builtin(self, x):
    return F.relu(self.bn(self.conv(x))) * float(max(1, 2))


def end_twice(h, x, factor=2.0):
    return torch.tanh(h - x) * factor


def for_each(name, value):
    def change(monkeypatch, models):
        for model in models:
            setattr(model, name, value)

    return change


def of_the_class(name, value):
    return lambda monkeypatch, models: monkeypatch.setattr(Block, name, value)


def of_this_file(name, value):
    return lambda monkeypatch, models: monkeypatch.setitem(globals(), name, value)


def an_item(holder, key, value):
    return lambda monkeypatch, models: monkeypatch.setitem(holder, key, value)


def its_options(monkeypatch, models):
    for model in models:
        model.options["skip"] = False


def its_config(monkeypatch, models):
    for model in models:
        model.config.skip = False


def its_functions(monkeypatch, models):
    for model in models:
        model.functions.reverse()


# forward: how what it decides by is changed
LOOKED_AT = {
    a_global_flag: of_this_file("SKIPS", False),
    a_global_list: lambda m, _: m.setattr(f"{__name__}.SCALES", [3.0]),
    a_global_dict: an_item(OPTIONS, "skip", False),
    a_global_object: lambda m, _: m.setattr(SETTINGS.inner, "scale", 5.0),
    a_class_outside: lambda m, _: m.setattr(Switches, "skip", False),
    a_helper: of_this_file("end", end_twice),
    a_helper_of_a_helper: of_this_file("choose", lambda: end_twice),
    a_variable_of_an_enclosing_function: lambda m, _: m.setattr(read_state.__closure__[0], "cell_contents", 3.0),
    a_method: of_the_class("body", lambda self, x: self.bn(self.conv(x)) * 2),
    a_static_method: of_the_class("join", staticmethod(lambda a, b: torch.tanh(a - b))),
    a_class_method: of_the_class("scale", classmethod(lambda cls: 7.0)),
    a_property: of_the_class("factor", property(lambda self: 7.0)),
    a_missing_attribute: for_each("late", 1),
    an_attribute_with_a_default: for_each("late", 4.0),
    a_dict_of_its_own: its_options,
    an_object_of_its_own: its_config,
    a_function_of_its_own: for_each("function", end_twice),
    a_list_of_functions: its_functions,
    the_class_of_a_child: for_each("act", nn.Tanh()),
    whether_processes_are_connected: lambda m, _: m.setattr(torch.distributed, "is_initialized", lambda: True),
    a_name_that_hides_a_builtin: of_this_file("max", lambda a, b: 5),
}  # fmt: skip


@pytest.mark.parametrize("forward", LOOKED_AT, ids=lambda f: f.__name__)
def test_it_is_fused_and_looks_again(forward, monkeypatch):
    plain = block(forward)
    fused = fused_copy(plain)
    statuses = {row.status for row in fusedres.explain(fused).rows}
    before = excess(plain, fused, X)
    LOOKED_AT[forward](monkeypatch, (plain, fused))
    assert (statuses, before <= ALLOWED, excess(plain, fused, X) <= ALLOWED) == (
        {"fused"},
        True,
        True,
    )


@pytest.mark.parametrize("forward", LOOKED_AT, ids=lambda f: f.__name__)
@pytest.mark.once
def test_the_report_tells_what_was_changed(forward, monkeypatch):
    fused = block(forward)
    fusedres.fuse_(fused)
    LOOKED_AT[forward](monkeypatch, (fused,))
    row = fusedres.explain(fused).rows[0]
    assert (row.status, bool(row.reason)) == ("own forward", True)


# PyTorch's compiler itself does not look again at a method of the class.
COMPILED = [
    a_global_flag, a_global_object, a_helper, a_variable_of_an_enclosing_function, a_property, a_missing_attribute,
    a_dict_of_its_own, the_class_of_a_child,
]  # fmt: skip


@pytest.mark.once
@pytest.mark.parametrize("forward", COMPILED, ids=lambda f: f.__name__)
@torch.no_grad()
def test_compiled_it_looks_again(forward, monkeypatch):
    torch._dynamo.reset()
    plain = block(forward)
    fused = fused_copy(plain)
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    before = compiled(X), plain(X)
    LOOKED_AT[forward](monkeypatch, (plain, fused))
    torch.testing.assert_close((before[0], compiled(X)), (before[1], plain(X)))


@torch.no_grad()
def test_a_question_to_the_process_is_asked_again():
    plain = block(whether_gradients_are_on)
    with torch.enable_grad():
        fused = fused_copy(plain)
    torch.testing.assert_close(fused(X), plain(X))


def test_a_default_argument_that_is_changed_in_place():
    def scaled(h, by=(1.0,)):
        return h * by[0]

    def forward(self, x):
        return scaled(F.relu(self.bn(self.conv(x))))

    plain = block(forward)
    fused = fused_copy(plain)
    scaled.__defaults__ = ((4.0,),)
    assert excess(plain, fused, X) <= ALLOWED


def test_the_code_of_a_helper_that_is_changed_in_place():
    def scaled(h):
        return h * 2

    plain = block(lambda self, x: scaled(F.relu(self.bn(self.conv(x)))))
    fused = fused_copy(plain)
    scaled.__code__ = (lambda h: h * 3).__code__
    assert excess(plain, fused, X) <= ALLOWED


def dropped(self, x):
    return F.dropout(F.relu(self.bn(self.conv(x))), 0.5, self.training)


def dropped_otherwise(self, x):
    return F.dropout(F.relu(self.bn(self.conv(x))), p=0.5, training=not self.training)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("forward", [dropped, dropped_otherwise], ids=lambda f: f.__name__)
@torch.no_grad()
def test_the_mode_is_given_on(forward, training):
    plain = block(forward).train(training)
    fused = fused_copy(plain)
    found = []
    for each in (plain, fused):
        torch.manual_seed(1)
        found.append(each(X))
    assert fusedres.is_fused(fused)
    torch.testing.assert_close(*found)


# --- for the whole process ---------------------------------------------------------------------------------------


def functional(self, x):
    return F.relu(self.bn(self.conv(x)) + x)


def with_child(self, x):
    return self.act(self.bn(self.conv(x)))


def by_method(self, x):
    return self.bn(self.conv(x)).relu_()


def doubled(function):
    return lambda *args, **kwargs: function(*args, **kwargs) * 2


# (who, name, forward)
REPLACED = [
    (nn.BatchNorm2d, "forward", functional),
    (nn.modules.batchnorm._BatchNorm, "forward", functional),
    (F, "batch_norm", functional),
    (torch, "batch_norm", with_child),
    (F, "relu", functional),
    (F, "relu", with_child),
    (torch, "relu", functional),
    (nn.ReLU, "forward", with_child),
    (torch.Tensor, "relu_", by_method),
]


@pytest.mark.parametrize(
    ("owner", "name", "forward"), REPLACED, ids=lambda v: getattr(v, "__name__", v)
)
@pytest.mark.parametrize("when", ["before", "after"])
@torch.no_grad()
def test_what_is_replaced_for_the_process_is_called(owner, name, forward, when, monkeypatch):
    plain = block(forward)
    early = fused_copy(plain) if when == "after" else None
    monkeypatch.setattr(owner, name, doubled(getattr(owner, name)))
    fused = fused_copy(plain) if early is None else early
    torch.testing.assert_close(fused(X), plain(X))


# --- left to the module's own forward ----------------------------------------------------------------------------


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
    assert (LEFT[forward] in reason, "test_swap_decisions.py:" in reason) == (True, True), reason


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
        (lambda: torch.jit.script(SCRIPTED), "fuse before torch.jit.script"),
        (lambda: nn.Sequential(torch.jit.script(SCRIPTED), nn.BatchNorm2d(4)), "fuse before torch.jit.script"),
        (lambda: torch.fx.symbolic_trace(block(with_child)), "fuse before tracing"),
    ],
    ids=["lazy", "script", "script inside", "fx"],
)  # fmt: skip
def test_a_kind_of_module_that_cannot_be_fused_says_what_to_do(make, advice):
    rows = fusedres.explain(make()).rows
    assert any(advice in row.reason for row in rows), rows


class Summed(nn.Module):
    """The sum of what two children give, begun with None, as HRNet's head is; `second` may give None."""

    def __init__(self, second: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), second])
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        total = None
        for part in self.parts:
            y = part(x)
            if y is not None:
                total = y if total is None else total + y
        return F.relu(self.bn(total))


class Nothing(nn.Module):
    def forward(self, x):
        return None


class Unknown(nn.Module):
    def forward(self, x):
        return [x * 2][0] if x.mean() > 0 else None


def test_a_child_whose_forward_gives_a_tensor_is_not_none():
    torch.manual_seed(0)
    plain = Summed(nn.Conv2d(4, 4, 1)).double()
    fused = fused_copy(plain)
    statuses = [row.status for row in fusedres.explain(fused).rows]
    before = excess(plain, fused, X)
    for each in (plain, fused):
        each.parts[1] = Nothing()
    assert (statuses, before <= ALLOWED, excess(plain, fused, X) <= ALLOWED) == (
        ["fused"],
        True,
        True,
    )


@pytest.mark.once
def test_a_child_that_may_give_none_is_told():
    reason = fusedres.explain(Summed(Unknown())).rows[0].reason
    assert "whether a value computed from its input is a certain object" in reason


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


def test_an_object_is_made_at_each_call():
    plain = block(a_dataclass).eval()
    fused = fused_copy(plain)
    KEPT.clear()
    torch.testing.assert_close(fused(X).value, plain(X).value)
    assert len(KEPT) == 2
    KEPT.clear()


def a_checked_size(self, x):
    torch._assert(x.shape[1] == 4, f"{x.shape[1]} channels, {self.conv.in_channels!r} wanted")
    return F.relu(self.bn(self.conv(x)))


def test_a_string_of_sizes_is_made_at_each_call():
    fused = block(a_checked_size)
    report = fusedres.fuse_(fused)
    with pytest.raises(AssertionError, match="5 channels, 4 wanted"):
        fused(images(2, 5, 3, 3))
    assert (report.rows[0].status, fused(X).shape) == ("fused", X.shape)
