"""The words that messages share."""

import pytest
from torch import nn

from fusedres import words

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    ("value", "said"),
    [(1, "an int"), ("", "a str"), (None, "a NoneType"), (nn.LSTM(1, 1), "an LSTM"), (nn.RNN(1, 1), "an RNN"),
     (nn.Identity(), "an Identity"), (nn.GRU(1, 1), "a GRU"), (nn.ReLU(), "a ReLU"), (nn.ELU(), "an ELU")],
)  # fmt: skip
def test_a_type_has_its_article(value, said):
    assert words.a_type(value) == said


@pytest.mark.parametrize(
    ("name", "said"),
    [("CNN", "a CNN"), ("MLP", "an MLP"), ("UNet", "a UNet"), ("array", "an array")],
)  # fmt: skip
def test_a_name_has_its_article(name, said):
    assert words.with_article(name) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dünn 日本", "dünn 日本"),
        ("\x1b[31m", "\\x1b[31m"),
        ("a\0b", "a\\x00b"),
        ("\udcff", "\\udcff"),
    ],
)
def test_what_a_terminal_would_obey_is_written_out(text, said):
    assert words.printable(text) == said
