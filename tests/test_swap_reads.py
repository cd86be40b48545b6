"""Forwards that read or write what a graph does not show; each was once fused and computed something else."""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fusedres

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


@pytest.mark.parametrize(
    "forward", [elu, dropout, for_each, by_name, attribute_twice, attribute_and_view]
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
