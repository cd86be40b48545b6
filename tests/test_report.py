"""The report of a swap: the table a person reads, and the same as Markdown and JSON."""

from __future__ import annotations

import copy
import html
import json
import os
import re
import sys
from collections import Counter
from dataclasses import asdict
from unittest import mock

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fusedres
from fusedres.benchmarks.floors import OPERATORS
from fusedres.cli.models import build_model
from fusedres.nn.norms import is_batch_norm
from fusedres.swap.estimate import passes
from fusedres.swap.nodes import family_of
from fusedres.swap.report import FuseReport, Row

from .swap_blocks import make, relu_child, tail, tail_projected

pytestmark = pytest.mark.once

# As rich lays it out, and as it is without it; in 80 columns.
TABLES = {
    "rich": """\
fusedres: 20 BatchNorm: 20 fused
n  block       pattern         status  why  where
-- ----------- --------------- ------- ---- ------------------------------------
1  ResNet      BN+ReLU         fused        bn1
8  BasicBlock  BN+ReLU         fused        layer1.0.bn1 ... layer4.1.bn1
5  BasicBlock  BN+add+ReLU     fused        layer1.0.bn2, layer1.1.bn2,
                                            layer2.1.bn2, layer3.1.bn2,
                                            layer4.1.bn2
3  BasicBlock  BN+BN+add+ReLU  fused        layer2.0.bn2, layer3.0.bn2,
                                            layer4.0.bn2
3  BasicBlock  BN+BN+add+ReLU  fused   1    layer2.0.downsample.1,
                                            layer3.0.downsample.1,
                                            layer4.0.downsample.1
1: 1x1 by the library: faster where both were timed""",
    "plain": """\
fusedres: 20 BatchNorm: 20 fused
n  block       pattern         status  why  where
-  ----------  --------------  ------  ---  ------------------------------------
1  ResNet      BN+ReLU         fused        bn1
8  BasicBlock  BN+ReLU         fused        layer1.0.bn1 ... layer4.1.bn1
5  BasicBlock  BN+add+ReLU     fused        layer1.0.bn2, layer1.1.bn2,
                                            layer2.1.bn2, layer3.1.bn2,
                                            layer4.1.bn2
3  BasicBlock  BN+BN+add+ReLU  fused        layer2.0.bn2, layer3.0.bn2,
                                            layer4.0.bn2
3  BasicBlock  BN+BN+add+ReLU  fused   1    layer2.0.downsample.1,
                                            layer3.0.downsample.1,
                                            layer4.0.downsample.1
1: 1x1 by the library: faster where both were timed""",
}
LAYOUTS = tuple(TABLES)


def text_of(report: FuseReport, layout: str, width: int) -> str:
    """What is printed on a terminal of this width, with rich or as if it were not installed."""
    hidden = {} if layout == "rich" else {"rich.table": None}
    with mock.patch.dict(os.environ, COLUMNS=str(width)), mock.patch.dict(sys.modules, hidden):
        return str(report)


def signs(*texts: str) -> str:
    """All that is not white."""
    return "".join("".join(texts).split())


# The cells of each rendering, the names of the columns first.


def cells_of_markdown(report: FuseReport) -> list[list[str]]:
    _, _, head, _, *lines, _ = report.to_markdown().split("\n")
    return [
        [re.sub(r"\\(.)", r"\1", cell[1:-1]) for cell in re.findall(r"(?:\\.|[^\\|])+", line)]
        for line in (head, *lines)
    ]


def cells_of_html(report: FuseReport) -> list[list[str]]:
    return [
        [html.unescape(cell) for cell in re.findall("<t[hd]>(.*?)</t[hd]>", line)]
        for line in re.findall("<tr>(.*)</tr>", report._repr_html_())
    ]


def assert_it_is_shown_whole(report: FuseReport) -> None:
    """Every line has all cells, in the text, in Markdown and in HTML the same ones; JSON and `n` leave no row out."""
    markdown, (columns, *groups) = cells_of_markdown(report), cells_of_html(report)
    assert markdown == [columns, *groups]
    assert {len(cells) for cells in groups} == {len(columns)}
    numbers = {
        reason: k for k, reason in enumerate(dict.fromkeys(g[-1] for g in groups if g[-1]), 1)
    }
    for layout in LAYOUTS:
        wide, narrow = text_of(report, layout, 10**6), text_of(report, layout, 60)
        headline, _, _, *lines = map(signs, wide.split("\n"))
        assert lines[: len(groups)] == [
            signs(*cells, str(numbers.get(reason, "")), where) for where, *cells, reason in groups
        ]
        # Where each cell has a line of its own, its column's name comes on top.
        assert Counter(signs(headline, *lines)) - Counter(signs(narrow)) == Counter()
    assert sum(int(cells[1]) for cells in groups) == len(report.rows)
    assert json.loads(report.to_json())["rows"] == [asdict(row) for row in report.rows]


@pytest.fixture(scope="module")
def report() -> FuseReport:
    with torch.device("meta"):
        return fusedres.fuse_(torchvision.models.resnet18())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_table(report, layout):
    assert text_of(report, layout, 80) == TABLES[layout]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["resnet50", "timm:repvgg_a0"])
def test_no_line_is_wider_than_the_terminal(name, layout, width):
    with torch.device("meta"):
        model = build_model(name)
    where = [n for n, module in model.named_modules() if is_batch_norm(module)]
    rows = [
        Row(n, "Block", f"BN+{'add' * (len(n) % 9)}", "fused", "a" * (len(n) % 99)) for n in where
    ]
    lines = text_of(FuseReport(tuple(rows)), layout, width).split("\n")
    assert max(map(len, lines)) <= width


def test_a_terminal_is_asked_for_its_width_and_80_are_none(report, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    widths = []
    for columns in (50, 100, 0):  # 0: what is no terminal
        size = os.terminal_size((columns, 24 if columns else 0))
        monkeypatch.setattr(os, "get_terminal_size", lambda *_, size=size: size)
        widths.append(max(map(len, str(report).split("\n"))))
    assert (widths[0] <= 50, 80 < widths[1] <= 100, 50 < widths[2] <= 80) == (True, True, True)


def test_markdown(report):
    lines = report.to_markdown().splitlines()
    assert lines[0] == TABLES["rich"].splitlines()[0]
    assert lines[4] == "| bn1 | 1 | ResNet | BN+ReLU | fused |  |"


@pytest.mark.parametrize(
    ("reason", "cell"),
    [
        ("int | str", r"int \| str"),
        ("a\\", r"a\\"),
        (r"\|", r"\\\|"),
        ("two\nlines", r"two\\nlines"),
        ("<lambda>", r"\<lambda>"),
    ],
)
def test_markdown_keeps_a_reason_in_its_cell(reason, cell):
    row = Row("bn", "Block", "unknown", "left alone", reason)
    assert FuseReport((row,)).to_markdown().endswith(f"| left alone | {cell} |\n")


def test_json(report):
    data = json.loads(report.to_json())
    assert (data["n_fused"], len(data["rows"])) == (20, 20)
    assert data["rows"][0] == {
        "where": "bn1", "block": "ResNet", "pattern": "BN+ReLU", "status": "fused", "reason": "", "note": "",
        "moves": None, "saves": None,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["to_json", "to_markdown"])
def test_written_to_a_file(report, name, tmp_path):
    text = getattr(report, name)(tmp_path / "report")
    assert (tmp_path / "report").read_text(encoding="utf-8") == text


def test_rows_are_in_the_order_of_the_model(report):
    assert [row.where for row in report.rows][:3] == ["bn1", "layer1.0.bn1", "layer1.0.bn2"]


@pytest.mark.parametrize(
    ("names", "where"),
    [
        (["bn1"], "bn1"),
        (["layer1.0.bn", "layer1.1.bn", "layer3.0.bn"], "layer1.0.bn, layer1.1.bn, layer3.0.bn"),
        ([f"layer{k}.bn" for k in range(7)], "layer0.bn ... layer6.bn"),
        ([f"branch{k}x{k}.bn" for k in (9, 8, 10, 1, 5, 3, 2)], "branch9x9.bn ... branch2x2.bn"),
        (["0", "2", "007", "²", "٣", "9" * 5000], f"0, 2, 007, ², ٣, {'9' * 5000}"),
        (["bn", "bn"], "bn"),
        ([""], "''"),
        (["a, b.bn", "c ... d.bn", "{e}.bn"], "'a, b.bn', 'c ... d.bn', '{e}.bn'"),
        (["two\nlines.bn", "\x1b[31m.bn", "\ud800.bn"], r"'two\nlines.bn', '\x1b[31m.bn', '\ud800.bn'"),
    ],
    ids=[
        "one", "few", "many", "in the order of the model", "numbers", "twice", "the model itself", "signs of the list",
        "what does not print",
    ],
)  # fmt: skip
def test_names_of_a_group(names, where):
    report = FuseReport(tuple(Row(name, "Block", "BN+ReLU", "fused") for name in names))
    assert [line[:2] for line in cells_of_html(report)[1:]] == [[where, str(len(names))]]


@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
@pytest.mark.parametrize(
    "name",
    [
        "inception_v3", "googlenet", "timm:resnet33ts", "timm:gernet_l", "timm:repvgg_a0", "timm:mobilevit_s",
        "timm:resnet50_clip", "timm:regnetz_b16", "timm:dpn68", "timm:nasnetalarge", "timm:inception_resnet_v2",
        "timm:halonet26t",
    ],
)  # fmt: skip
def test_names_that_hold_numbers_and_letters(name):
    with torch.device("meta"):
        modules = dict(build_model(name).named_modules())
    report = FuseReport(
        tuple(
            Row(where, type(modules[where.rpartition(".")[0]]).__name__, "BN+ReLU", "fused")
            for where, module in modules.items()
            if is_batch_norm(module)
        )
    )
    assert_it_is_shown_whole(report)


texts = st.sampled_from(["BN+ReLU", "two\nlines", "a \\| b</td>"]) | st.text()
sizes = st.none() | st.integers(0, 2**63)
rows = st.builds(
    Row,
    where=st.text("ab01²٣.,-_ |\\{}<&'\n", max_size=9) | st.text(),
    block=texts,
    pattern=texts,
    status=texts,
    reason=texts,
    note=texts,
    moves=sizes,
    saves=sizes,
)
reports = st.builds(
    FuseReport,
    rows=st.lists(rows, min_size=1, max_size=20).map(tuple),
    note=texts,
    input_shape=st.none() | st.lists(st.integers()).map(tuple),
)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(report=reports)
def test_any_names_and_reasons(report):
    assert_it_is_shown_whole(report)


def test_without_batch_norm():
    assert str(fusedres.fuse_(nn.Linear(2, 2))) == "fusedres: there is no BatchNorm in this model"


def test_a_dry_run_says_fusable():
    assert str(fusedres.explain(make(tail))).startswith("fusedres: 2 BatchNorm: 2 fusable\n")


# --- bytes -------------------------------------------------------------------------------------------------------


KERNELS = (
    "BN", "BN+ReLU", "BN+add", "BN+add+ReLU", "BN+BN+add+ReLU", "BN+SiLU", "BN+add+SiLU", "BN+BN+add+SiLU",
)  # fmt: skip


@pytest.mark.parametrize("pattern", KERNELS)
@pytest.mark.parametrize("element_size", [2, 4])
def test_fused_passes_are_those_of_the_kernels(pattern, element_size):
    operator = OPERATORS[pattern.lower().replace("+", "_")]
    family, piecewise = family_of(pattern)
    _, fused = passes(family, piecewise, element_size)
    assert fused == operator.passes("step", element_size)


@pytest.mark.parametrize(
    ("pattern", "eager"),
    [("BN+ReLU", 5 + 8), ("BN+add+ReLU", 8 + 8), ("BN+BN+add+ReLU", 11 + 13)],
)
def test_eager_passes_are_those_of_the_design(pattern, eager):
    assert passes(pattern, True, 2)[0] == eager


def test_bytes_of_one_site():
    """[2, 4, 5, 5] in float64: 13 passes, 8 of them fused."""
    row = fusedres.explain(make(relu_child), input_shape=(2, 4, 5, 5)).rows[0]
    assert (row.moves, row.saves) == (13 * 200 * 8, 5 * 200 * 8)


def test_the_two_batch_norms_of_a_site_have_a_half_each():
    rows = fusedres.explain(make(tail_projected), input_shape=(2, 4, 5, 5)).rows
    assert [(row.moves, row.saves) for row in rows] == [
        (24 * 200 * 8 / 2, round((24 - 13 - 3 / 64) * 200 * 8 / 2))
    ] * 2


def test_what_is_left_alone_moves_and_saves_nothing():
    block = make(relu_child)
    block.bn1.register_forward_hook(lambda *_: None)
    row = fusedres.explain(block, input_shape=(2, 4, 5, 5)).rows[0]
    assert (row.moves, row.saves) == (13 * 200 * 8, 0)


def test_the_table_of_a_network_with_bytes():
    with torch.device("meta"):
        report = fusedres.fuse_(torchvision.models.resnet50(), input_shape=(256, 3, 224, 224))
    lines = text_of(report, "rich", 200).splitlines()
    assert lines[0].endswith(
        "; with an input of [256, 3, 224, 224] a training step moves 62.0 GB less of 157.2 GB"
    )
    assert lines[3].split()[-3:] == ["4.1", "GB", "bn1"]
    assert report.bytes_saved == sum(row.saves for row in report.rows)


def test_json_and_html_with_bytes():
    report = fusedres.explain(make(relu_child), input_shape=(2, 4, 5, 5))
    assert json.loads(report.to_json())["bytes_saved"] == 5 * 200 * 8
    assert "<td>8 kB</td>" in report._repr_html_()


def test_html_escapes_what_it_shows():
    row = Row("bn", "Block", "unknown", "left alone", "<lambda> & more")
    assert "&lt;lambda&gt; &amp; more" in FuseReport((row,))._repr_html_()


def test_looking_at_bytes_runs_no_hook_and_leaves_the_model_as_it_is():
    block = make(relu_child)
    called = []
    block.register_forward_hook(lambda *_: called.append("hook"))
    before = copy.deepcopy(block.state_dict())
    fusedres.fuse_(block, input_shape=(2, 4, 5, 5))
    assert (called, block.training, len(block._forward_hooks)) == ([], True, 1)
    torch.testing.assert_close(block.state_dict(), before)


def test_of_a_fused_model_the_bytes_are_the_same():
    block = make(tail)
    before = fusedres.explain(block, input_shape=(2, 4, 5, 5)).bytes_saved
    fusedres.fuse_(block)
    assert fusedres.explain(block, input_shape=(2, 4, 5, 5)).bytes_saved == before


@pytest.mark.parametrize(
    ("shape", "error", "text"),
    [
        ((2, 3, 5, 5), ValueError, r"does not take a tensor of shape \[2, 3, 5, 5\]: RuntimeError"),
        ("2,4,5,5", TypeError, "input_shape is '2,4,5,5', expected whole numbers"),
        ((2, 4.0), TypeError, "expected whole numbers"),
        (224, TypeError, "input_shape is 224, expected whole numbers, for example"),
        (
            torch.zeros(2, 4, 5, 5),
            TypeError,
            r"is a tensor of shape \[2, 4, 5, 5\], .*; pass its shape",
        ),
        ((0, 4, 5, 5), ValueError, r"input_shape is \(0, 4, 5, 5\), expected sizes of 1 or more"),
        ((), ValueError, "expected sizes of 1 or more"),
        (
            (2, 1, 5, 5),
            ValueError,
            r"its first convolution takes 4 channels, and \[2, 1, 5, 5\] has 1",
        ),
    ],
)
def test_a_shape_that_does_not_fit_is_refused_before_anything_is_changed(shape, error, text):
    block = make(relu_child)
    with pytest.raises(error, match=text):
        fusedres.fuse_(block, input_shape=shape)
    assert not fusedres.is_fused(block)
