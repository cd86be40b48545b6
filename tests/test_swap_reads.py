"""Forwards that read or write what a graph does not show; each was once fused and computed something else."""

from __future__ import annotations

import abc
import builtins
import copy
import enum
import functools
import gc
import math
import operator
import weakref
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedres
from fusedres.swap.guards import compiled
from fusedres.swap.install import plan_of

from .swap_blocks import fused_copy, images, make

pytestmark = pytest.mark.once
X = images(2, 4, 6, 6)


def same(fused, plain, *args, **kwargs) -> None:
    """Both give the same, and have the same buffers afterwards."""
    with torch.no_grad():
        given = [[arg.clone() for arg in args] for _ in range(2)]
        found = fused(*given[0], **kwargs), given[0], dict(fused.named_buffers())
        wanted = plain(*given[1], **kwargs), given[1], dict(plain.named_buffers())
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11, equal_nan=True)


def normed(self, x):
    return F.relu(self.bn1(self.conv1(x)))


# --- how it is called --------------------------------------------------------------------------------------------


def takes_more(self, x, *more):
    return F.relu(sum(more, self.bn1(self.conv1(x))))


def takes_more_behind_a_default(self, x, scale=2.0, *more):
    return sum(more, F.relu(self.bn1(self.conv1(x)))) * scale


@pytest.mark.parametrize(
    ("forward", "args"),
    [(takes_more, (X, X)), (takes_more_behind_a_default, (X, 2.0, X))],
    ids=["alone", "behind a default"],
)
def test_further_arguments_are_not_dropped(forward, args):
    block = make(forward)
    fused, plain = fused_copy(block)(*args), block(*args)
    torch.testing.assert_close(fused, plain)


def test_an_argument_too_many_is_refused_as_before():
    with pytest.raises(TypeError, match="takes 2 positional arguments"):
        fused_copy(make(normed))(X, X)


def doubled_by_name(forward):
    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        return forward(self, *args, **kwargs) * (2 if kwargs else 1)

    return wrapper


def test_a_wrapper_sees_what_it_was_given_by_name():
    block = make(doubled_by_name(normed))
    torch.testing.assert_close(fused_copy(block)(x=X), block(x=X))


# --- how it is written down --------------------------------------------------------------------------------------

WRITTEN = {
    "a negative base": lambda self, x: normed(self, x) * (-2) ** x.size(0),
    "an infinite complex": lambda self, x: (normed(self, x) * complex(1, float("inf"))).real,
    "a long int": lambda self, x: normed(self, x) * (x.size(0) % 10**5000),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_constant_is_written_as_it_is(name):
    block = make(WRITTEN[name])
    same(fused_copy(block), block, X)


def defined() -> None:
    """A class, anew, as a notebook does when its cell is run again."""

    class Result(NamedTuple):
        y: Tensor

    Result.__qualname__ = "Result"
    globals()["Result"] = Result


def test_a_class_that_is_defined_anew_is_the_new_one():
    def forward(self, x):
        return Result(normed(self, x))  # noqa: F821

    for _ in range(2):
        defined()
        assert type(fused_copy(make(forward))(X)) is globals()["Result"]


# --- who writes to what ------------------------------------------------------------------------------------------


def elu(self, x):
    y = self.conv1(x)
    out = self.bn1(y)
    F.elu(y, 1.0, True)
    return F.relu(out + x)


def dropout(self, x):
    y = self.conv1(x)
    out = self.bn1(y)
    F.dropout(y, 1.0, True, True)
    return F.relu(out + x)


def for_each(self, x):
    y = self.conv1(x)
    out = self.bn1(y)
    torch._foreach_mul_([y], 2)
    return F.relu(out + x)


def by_name(self, x):
    y = self.conv1(x)
    out = self.bn1(y)
    torch.relu_(input=y)
    return F.relu(out + x)


def attribute_twice(self, x):
    out = self.bn1(self.kept)
    self.kept.mul_(2)
    return F.relu(out + x)


def attribute_and_view(self, x):
    out = self.bn1(self.kept)
    self.view.mul_(2)
    return F.relu(out + x)


def statistics_by_a_view(self, x):
    mean = self.bn1.running_mean.view(1, -1, 1, 1)
    out = self.bn1(self.conv1(x))
    return F.relu(out + mean * x)


@pytest.mark.parametrize(
    "forward",
    [elu, dropout, for_each, by_name, attribute_twice, attribute_and_view, statistics_by_a_view],
)
def test_an_input_that_is_written_to_is_normalised_as_it_was(forward):
    block = make(forward)
    block.register_buffer("kept", X.clone())
    block.register_buffer("view", block.kept.view(-1))
    same(fused_copy(block), block, X)


def test_two_inputs_may_be_one_tensor():
    def forward(self, x, y):
        out = self.bn1(x)
        y.mul_(2)
        return F.relu(out + y)

    block = make(forward)
    with torch.no_grad():
        x, y = X.clone(), X.clone()
        torch.testing.assert_close(fused_copy(block)(x, x), block(y, y))


def test_reports_are_made_of_an_activation_in_place_by_name():
    assert fusedres.explain(make(by_name)).rows[0].pattern == "BN+add+ReLU"


# --- what is read, and changed afterwards ------------------------------------------------------------------------


class Settings:
    def __init__(self) -> None:
        self.held = 2.0

    def get(self):
        return self.held


class Level(enum.Enum):
    LOW = 2.0

    @property
    def scale(self):
        return Settings.level if hasattr(Settings, "level") else self.value


class Number(float):
    scale = 2.0


def scale_of(y, scale):
    return y * scale[0]


PARTIAL = functools.partial(scale_of, scale=[2.0])
NUMBER = Number(2.0)
builtins.fusedres_test_scale = 2.0  # as icecream's install() and line_profiler do


class HasScale(nn.Module):
    """What `reads` may look at."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()
        self.gamma = nn.Parameter(torch.full((), 2.0))
        self.left, self.right = nn.Tanh(), nn.Sigmoid()
        self.settings, self.level, self.zero, self.options = Settings(), Level.LOW, 0.0, [0.0]
        self.register_module("none", None)


class Between(HasScale):
    def method(self):
        return 2.0


class Below(Between):
    pass


class Lowest(Below):
    def method(self):
        return super().method()


def reads(function, kind=HasScale):
    """A block of a class of its own, which multiplies by what the function gives."""
    torch.manual_seed(0)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x))) * function(self)

    return type("Reads", (kind,), {"forward": forward})().double()


def goes_through_children(self, x):
    for child in self.children():
        x = child(x)
    return x


def emptied():
    scale = 2.0

    def read(self):
        return scale

    def empty(block):
        nonlocal scale
        del scale

    return read, empty


def at(owner, name, value):
    """A change of a class or a module, taken back by the test."""
    return lambda block, patch: patch.setattr(owner, name, value, raising=False)


def of(change):
    """A change of the instance."""
    return lambda block, patch: change(block)


# what is multiplied by: what changes then
CHANGES = {
    "an attribute of an Enum": (lambda self: self.level.scale, at(Settings, "level", 5.0)),
    "an attribute of a float": (lambda self: NUMBER.scale, at(Number, "scale", 5.0)),
    "what a class has not": (lambda self: getattr(Settings, "level", 1.0), at(Settings, "level", 5.0)),
    "what an object has not": (lambda self: getattr(self.settings, "level", 1.0), at(Settings, "level", 5.0)),
    "what a module has not": (lambda self: getattr(self, "level2", 1.0), at(HasScale, "level2", 5.0)),
    "an attribute that becomes a property": (lambda self: self.zero, at(HasScale, "zero", property(lambda self: 5.0))),
    "a method of an object": (
        lambda self: self.settings.get(), of(lambda block: vars(block.settings).update(get=lambda: 5.0)),
    ),
    "a parameter that is gone": (
        lambda self: 1.0 if self.gamma is None else self.gamma, of(lambda block: setattr(block, "gamma", None)),
    ),
    "a parameter that is deleted": (
        lambda self: self.gamma if hasattr(self, "gamma") else 1.0, of(lambda block: delattr(block, "gamma")),
    ),
    "a sign": (lambda self: math.copysign(1.0, self.zero), of(lambda block: setattr(block, "zero", -0.0))),
    "a sign in a list": (
        lambda self: math.copysign(1.0, self.options[0]), of(lambda block: setattr(block, "options", [-0.0])),
    ),
    "a list that comes to hold itself": (
        lambda self: len(self.options), of(lambda block: block.options.append(block.options)),
    ),
    "a builtin": (lambda self: fusedres_test_scale, at(builtins, "fusedres_test_scale", 5.0)),  # noqa: F821
    "a partial's list": (
        lambda self: PARTIAL(1.0), lambda block, patch: patch.setitem(PARTIAL.keywords, "scale", [5.0]),
    ),
    "a name with braces": (lambda self: getattr(self, "{s}", 1.0), of(lambda block: setattr(block, "{s}", 5.0))),
    "which module it is": (
        lambda self: 2.0 if self.left is self.right else 1.0, of(lambda block: setattr(block, "right", block.left)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_read_is_read_again(name, monkeypatch):
    read, change = CHANGES[name]
    block = reads(read)
    fused = fused_copy(block)
    same(fused, block, X)
    fits = looks(fused)
    assert fits() in (None, (True, True))
    for each in (fused, block):
        change(each, monkeypatch)
    same(fused, block, X)
    assert fits() in (None, (False, False))


def looks(fused):
    """Tells whether the guards hold, as they are asked when nothing compiles and when something does; None where
    nothing is fused."""
    plan = plan_of(fused)
    if plan is None:
        return lambda: None
    both = [compiled(plan.guards, is_eager) for is_eager in (True, False)]
    return lambda: tuple(fits(fused) for fits in both)


def without_its_weight(norm):
    weight = norm.weight
    del norm.weight
    norm.weight = weight.detach()


# of a child, which the fused forward does not call, and whether it fits afterwards
OF_CHILDREN = {
    "a hook": (lambda block: block.bn.register_forward_hook(lambda *_: None), False),
    "a hook before": (lambda block: block.bn.register_forward_pre_hook(lambda *_: None), False),
    "a hook backward": (lambda block: block.bn.register_full_backward_hook(lambda *_: None), False),
    "a hook before backward": (
        lambda block: block.bn.register_full_backward_pre_hook(lambda *_: None), False,
    ),
    "a hook on the activation": (lambda block: block.act.register_forward_hook(lambda *_: None), False),
    "a forward": (lambda block: setattr(block.bn, "forward", lambda x: x), False),
    "a forward of the activation": (lambda block: setattr(block.act, "forward", lambda x: x), False),
    "a forward of None": (lambda block: vars(block.bn).update(forward=None), True),
    "a computed weight": (lambda block: nn.utils.parametrizations.weight_norm(block.bn, dim=None), False),
    "a weight that is no parameter": (lambda block: without_its_weight(block.bn), False),
    "no bias": (lambda block: setattr(block.bn, "bias", None), True),
    "another BatchNorm": (lambda block: setattr(block, "bn", nn.BatchNorm2d(4)), True),
    "a SyncBatchNorm": (lambda block: setattr(block, "bn", nn.SyncBatchNorm(4)), True),
    "a class of the user's": (
        lambda block: setattr(block.bn, "__class__", type("Own", (nn.BatchNorm2d,), {})), False,
    ),
    "another activation": (lambda block: setattr(block, "act", nn.Tanh()), False),
    "no activation": (lambda block: setattr(block, "act", None), False),
    "none at all": (lambda block: delattr(block, "act"), False),
    "no BatchNorm": (lambda block: delattr(block, "bn"), False),
    "one that the instance hides": (lambda block: vars(block).update(act=nn.Tanh()), False),
    "one that its class hides": (lambda block: setattr(type(block), "act", nn.Tanh()), False),
    "a convolution that its class hides": (lambda block: setattr(type(block), "conv", nn.Tanh()), False),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_CHILDREN)
def test_children_are_looked_at_again(name):
    change, still_fits = OF_CHILDREN[name]
    torch.manual_seed(0)

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))

    fused = fused_copy(type("Own", (HasScale,), {"forward": forward})().double())
    fits = looks(fused)
    assert fits() == (True, True)
    change(fused)
    assert fits() == (still_fits, still_fits)


@pytest.mark.parametrize("name", ["none", "left"])
def test_children_are_gone_through_as_they_are(name):
    torch.manual_seed(0)
    block = type("Own", (HasScale,), {"forward": goes_through_children})().double()
    fused = fused_copy(block)
    for each in (fused, block):
        setattr(each, name, nn.Softsign() if name == "none" else each.right)
    same(fused, block, X)


def test_a_child_that_something_hides_is_not_called():
    torch.manual_seed(0)

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))

    block = type("Own", (HasScale,), {"forward": forward})().double()
    fused = fused_copy(block)
    for each in (fused, block):
        vars(each)["act"] = nn.Tanh()
    same(fused, block, X)
    torch._dynamo.reset()
    compiled_one = torch.compile(fused, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled_one(X), block(X), rtol=1e-9, atol=1e-11)


def test_super_finds_what_a_class_in_between_has_now(monkeypatch):
    block = reads(lambda self: self.method(), Lowest)
    fused = fused_copy(block)
    monkeypatch.setattr(Below, "method", lambda self: 5.0, raising=False)
    same(fused, block, X)


def test_a_variable_that_was_deleted_is_missed_as_before():
    read, empty = emptied()
    fused = fused_copy(reads(read))
    empty(fused)
    with pytest.raises(NameError, match="scale"):
        fused(X)


class Wraps(nn.Module):
    def forward(self, x):
        return (x,)


def asks_what_a_layer_gave(self, x):
    y = self.conv(x)
    return F.relu(self.bn(y[0] * 2 if isinstance(y, tuple) else y))


@pytest.mark.parametrize("how", ["another layer", "a hook"])
def test_a_layer_that_gives_something_else_is_noticed(how):
    torch.manual_seed(0)
    block = type("Own", (HasScale,), {"forward": asks_what_a_layer_gave})().double()
    fused = fused_copy(block)
    for each in (fused, block):
        if how == "a hook":
            each.conv.register_forward_hook(lambda module, args, output: (output,))
        else:
            each.conv = Wraps()
    same(fused, block, X)


# --- what is not computed as it looks ----------------------------------------------------------------------------


class Renamed(nn.ModuleDict):
    def __contains__(self, key):
        return super().__contains__(f"own_{key}")


class Longer(nn.ModuleList):
    def __len__(self):
        return 7


class Decides(type):
    def __getattr__(cls, name):
        if name == "scale":
            return 5.0
        raise AttributeError(name)


class Decided(metaclass=Decides):
    pass


class Pair(NamedTuple):
    a: int
    b: int

    @property
    def total(self):
        return self.a + self.b


DEFAULT: list = []


def given_or_not(value=DEFAULT):
    return 2.0 if value is DEFAULT else 1.0


def puts_into_a_dict(self):
    operator.setitem(self.settings_by_name, "n", 1 + self.settings_by_name["n"])
    return self.settings_by_name["n"]


def puts_into_the_children(self):
    self._modules["left"] = self.right
    return self.left(torch.ones((), dtype=torch.float64))


class Holds(HasScale):
    def __init__(self) -> None:
        super().__init__()
        self.renamed, self.longer = Renamed({"own_a": nn.Tanh()}), Longer([nn.Tanh()])
        self.one = self.other = [1.0]
        self.listed = nn.ModuleList([self.left])
        self.settings_by_name = {"n": 1}


LOOKS_OTHERWISE = {
    "a ModuleDict's own `in`": lambda self: 2.0 if "a" in self.renamed else 1.0,
    "a ModuleList's own length": lambda self: len(self.longer),
    "a list of two names": lambda self: 2.0 if self.one is self.other else 1.0,
    "a module of two names": lambda self: 2.0 if self.listed[0] in [self.left] else 1.0,
    "a default by identity": lambda self: given_or_not(),
    "a metaclass": lambda self: getattr(Decided, "scale", 1.0),
    "a namedtuple's property": lambda self: getattr(Pair(1, 2), "total", 1.0),
    "a partial of an object": lambda self: functools.partial(getattr, Decided)("scale", 1.0),
    "setitem as a function": puts_into_a_dict,
    "a child that is put there": puts_into_the_children,
}


@pytest.mark.parametrize("name", LOOKS_OTHERWISE)
def test_it_computes_what_python_computes(name):
    block = reads(LOOKS_OTHERWISE[name], Holds)
    same(fused_copy(block), block, X)


def test_children_that_are_one_are_gone_through_once():
    torch.manual_seed(0)
    block = type("Own", (Holds,), {"forward": goes_through_children})().double()
    del block.renamed, block.longer, block.listed
    block.again = block.left
    same(fused_copy(block), block, X)


# --- nothing of the user's runs ----------------------------------------------------------------------------------

RAN: list[str] = []


class Hooked(abc.ABC):  # noqa: B024
    @classmethod
    def __subclasshook__(cls, other):
        RAN.append("__subclasshook__")
        return True


class Checks(type):
    def __subclasscheck__(cls, other):
        RAN.append("__subclasscheck__")
        return True

    def __len__(cls):
        RAN.append("__len__")
        return 1


class Checked(metaclass=Checks):
    pass


class Equal(enum.Enum):
    ONE = 1

    def __eq__(self, other):
        RAN.append("__eq__")
        return True


class Made(NamedTuple("Made", [("a", int)])):
    def __new__(cls, a):
        RAN.append("__new__")
        return super().__new__(cls, a)


def by_key(value):
    RAN.append("key")
    return value


RUNS = {
    "__subclasshook__": lambda self: 2.0 if isinstance(self.act, Hooked) else 1.0,
    "__subclasscheck__": lambda self: 2.0 if issubclass(int, Checked) else 1.0,
    "__len__": lambda self: len(Checked),
    "__eq__": lambda self: 2.0 if Equal.ONE == 3 else 1.0,
    "__new__": lambda self: Made(2).a,
    "key": lambda self: max([1.0, 2.0], key=by_key),
    "operator.call": lambda self: operator.call(by_key, 2.0),
}


@pytest.mark.parametrize("name", RUNS)
def test_nothing_of_the_user_s_runs_while_it_is_looked_at(name):
    block = reads(RUNS[name])
    RAN.clear()
    fusedres.fuse_(block)
    assert not RAN


# --- what Python raises is a reason ------------------------------------------------------------------------------

RAISES = {
    "zip": lambda self: sum(a * b for a, b in zip([1.0], [], strict=True)),
    "format": lambda self: len(f"{3:zz}"),
    "isinstance": lambda self: isinstance(self),
}


@pytest.mark.parametrize("name", RAISES)
def test_what_would_raise_is_left_alone_with_a_reason(name):
    assert "it raises" in fusedres.explain(reads(RAISES[name])).rows[0].reason


# --- what is handed on -------------------------------------------------------------------------------------------


class Appends(nn.Module):
    def forward(self, x, kept):
        kept.append(x * 2)
        return x


class HandsOn(HasScale):
    def __init__(self) -> None:
        super().__init__()
        self.appends = Appends()


def reads_what_was_appended(self, x):
    kept = []
    x = self.appends(x, kept)
    return F.relu(self.bn(self.conv(x))) + kept[0]


def returns_what_was_appended(self, x):
    kept = []
    x = self.appends(x, kept)
    return F.relu(self.bn(self.conv(x))), kept


def appends_to_its_own(self, x):
    x = self.appends(x, self.options)
    return F.relu(self.bn(self.conv(x))) * len(self.options)


def returns_an_ordered_dict(self, x):
    return OrderedDict(y=F.relu(self.bn(self.conv(x))))


HANDED_ON = [
    reads_what_was_appended, returns_what_was_appended, appends_to_its_own, returns_an_ordered_dict,
]  # fmt: skip


@pytest.mark.parametrize("forward", HANDED_ON)
def test_a_list_is_what_a_child_made_of_it(forward):
    torch.manual_seed(0)
    block = type("Own", (HandsOn,), {"forward": forward})().double()
    same(fused_copy(block), block, X)


def test_its_own_list_is_the_one_that_is_returned():
    def forward(self, x):
        return F.relu(self.bn(self.conv(x))), self.options

    block = type("Own", (HasScale,), {"forward": forward})().double()
    fusedres.fuse_(block)
    assert block(X)[1] is block.options


# --- for the whole process ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["__call__", "_call_impl"])
def test_a_layer_s_call_that_is_replaced_runs(name, monkeypatch):
    fused = fused_copy(make(lambda self, x: self.relu(self.bn1(self.conv1(x)))))
    plain = copy.deepcopy(fused)
    fusedres.unfuse_(plain)
    own = getattr(nn.ReLU, name)
    monkeypatch.setattr(nn.ReLU, name, lambda self, x: own(self, x) * 3)
    same(fused, plain, X)


class Triples(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        return found * 3 if function is F.relu else found


def test_a_mode_that_waits_for_functions_sees_them():
    block = make(normed)
    fused = fused_copy(block)
    with Triples():
        same(fused, block, X)


# --- what it costs -----------------------------------------------------------------------------------------------


def test_a_list_that_is_too_long_to_be_compared_at_each_call_is_left_alone():
    block = reads(lambda self: self.options[0])
    block.options = [1.0] * 10_000
    assert "too long a list" in fusedres.fuse_(block).rows[0].reason


def test_a_module_that_was_left_alone_goes_with_its_last_owner():
    block = make(lambda self, x: normed(self, x) if x.sum() > 0 else x)
    fusedres.fuse_(block)
    gone = weakref.ref(block)
    gc.disable()
    del block
    is_gone = gone() is None
    gc.enable()
    assert is_gone


def test_batch_norm_with_arguments_that_it_does_not_take_is_left_alone():
    block = make(lambda self, x: F.relu(F.batch_norm(input=x, size=x.shape[2:])))
    assert {row.pattern for row in fusedres.explain(block).rows} == {"BN"}
