"""What a forward decides anew at each call, and what it does besides computing: both stay as they are when it is fused.

Where a decision is known to the trace or can be looked at again, the block is fused and falls back when it changes; all
else leaves it to its own forward, with a reason.
"""

from __future__ import annotations

import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedres
from fusedres.benchmarks.steps import ALLOWED, excess

from .deciding import Block, X, block, end, functional, with_child
from .swap_blocks import fused_copy

SKIPS = True
SCALES = [1.0, 2.0]
OPTIONS = {"skip": True, "more": {"scale": 1.0}}
SETTINGS = types.SimpleNamespace(skip=True, inner=types.SimpleNamespace(scale=2.0))


class Switches:
    skip = True


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
def test_it_is_fused_and_looks_again(forward, monkeypatch, device):
    plain, x = block(forward).to(device), X.to(device)
    fused = fused_copy(plain)
    statuses = {row.status for row in fusedres.explain(fused).rows}
    before = excess(plain, fused, x)
    LOOKED_AT[forward](monkeypatch, (plain, fused))
    assert (statuses, before <= ALLOWED, excess(plain, fused, x) <= ALLOWED) == (
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
def test_a_question_to_the_process_is_asked_again(device):
    plain, x = block(whether_gradients_are_on).to(device), X.to(device)
    with torch.enable_grad():
        fused = fused_copy(plain)
    torch.testing.assert_close(fused(x), plain(x))


def test_a_default_argument_that_is_changed_in_place(device):
    def scaled(h, by=(1.0,)):
        return h * by[0]

    def forward(self, x):
        return scaled(F.relu(self.bn(self.conv(x))))

    plain = block(forward).to(device)
    fused = fused_copy(plain)
    scaled.__defaults__ = ((4.0,),)
    assert excess(plain, fused, X.to(device)) <= ALLOWED


def test_the_code_of_a_helper_that_is_changed_in_place(device):
    def scaled(h):
        return h * 2

    plain = block(lambda self, x: scaled(F.relu(self.bn(self.conv(x))))).to(device)
    fused = fused_copy(plain)
    scaled.__code__ = (lambda h: h * 3).__code__
    assert excess(plain, fused, X.to(device)) <= ALLOWED


def dropped(self, x):
    return F.dropout(F.relu(self.bn(self.conv(x))), 0.5, self.training)


def dropped_otherwise(self, x):
    return F.dropout(F.relu(self.bn(self.conv(x))), p=0.5, training=not self.training)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("forward", [dropped, dropped_otherwise], ids=lambda f: f.__name__)
@torch.no_grad()
def test_the_mode_is_given_on(forward, training, device):
    plain = block(forward).to(device).train(training)
    fused = fused_copy(plain)
    found = []
    for each in (plain, fused):
        torch.manual_seed(1)
        found.append(each(X.to(device)))
    assert fusedres.is_fused(fused)
    torch.testing.assert_close(*found)


# --- for the whole process ---------------------------------------------------------------------------------------


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
def test_what_is_replaced_for_the_process_is_called(
    owner, name, forward, when, monkeypatch, device
):
    plain, x = block(forward).to(device), X.to(device)
    early = fused_copy(plain) if when == "after" else None
    monkeypatch.setattr(owner, name, doubled(getattr(owner, name)))
    fused = fused_copy(plain) if early is None else early
    torch.testing.assert_close(fused(x), plain(x))


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


def test_a_child_whose_forward_gives_a_tensor_is_not_none(device):
    torch.manual_seed(0)
    plain, x = Summed(nn.Conv2d(4, 4, 1)).double().to(device), X.to(device)
    fused = fused_copy(plain)
    statuses = [row.status for row in fusedres.explain(fused).rows]
    before = excess(plain, fused, x)
    for each in (plain, fused):
        each.parts[1] = Nothing()
    assert (statuses, before <= ALLOWED, excess(plain, fused, x) <= ALLOWED) == (
        ["fused"],
        True,
        True,
    )


@pytest.mark.once
def test_a_child_that_may_give_none_is_told():
    reason = fusedres.explain(Summed(Unknown())).rows[0].reason
    assert "whether a value computed from its input is a certain object" in reason
