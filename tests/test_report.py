"""The report of a swap: the table a person reads, and the same as Markdown and JSON."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torchvision
from torch import nn

import fusedres
from fusedres.benchmarks.floors import OPERATORS
from fusedres.swap.estimate import passes
from fusedres.swap.nodes import family_of
from fusedres.swap.report import FuseReport, Row

from .swap_blocks import make, relu_child, tail, tail_projected

pytestmark = pytest.mark.once

TABLE = """\
fusedres: 20 BatchNorm: 20 fused
where                   n  block       pattern         status  reason
----------------------  -  ----------  --------------  ------  --------------------------------------------------------
bn1                     1  ResNet      BN+ReLU         fused
layer1-4.0-1.bn1        8  BasicBlock  BN+ReLU         fused
layer{1.0-1,2-4.1}.bn2  5  BasicBlock  BN+add+ReLU     fused
layer2-4.0.bn2          3  BasicBlock  BN+BN+add+ReLU  fused
layer2.0.downsample.1   1  BasicBlock  BN+BN+add+ReLU  fused   1x1 in Triton: memory-bound at 43 flop/byte (not timed)
layer3.0.downsample.1   1  BasicBlock  BN+BN+add+ReLU  fused   1x1 in Triton: memory-bound at 85 flop/byte (not timed)
layer4.0.downsample.1   1  BasicBlock  BN+BN+add+ReLU  fused   1x1 in Triton: memory-bound at 171 flop/byte (not timed)
""".rstrip()


@pytest.fixture(scope="module")
def report() -> FuseReport:
    with torch.device("meta"):
        return fusedres.fuse_(torchvision.models.resnet18())


def test_table(report):
    assert str(report) == TABLE


def test_markdown(report):
    lines = report.to_markdown().splitlines()
    assert lines[0] == TABLE.splitlines()[0]
    assert lines[4] == "| bn1 | 1 | ResNet | BN+ReLU | fused |  |"


def test_markdown_keeps_a_bar_in_a_reason():
    row = Row("bn", "Block", "unknown", "left alone", "int | str")
    assert r"int \| str" in FuseReport((row,)).to_markdown()


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
    ("names", "span"),
    [
        (["bn1"], "bn1"),
        (["layer1.0.bn1", "layer1.1.bn1", "layer2.0.bn1", "layer2.1.bn1"], "layer1-2.0-1.bn1"),
        (["layer1.0.bn1", "layer2.0.bn1", "layer2.1.bn1"], "layer{1.0,2.0-1}.bn1"),
        (["a.0.bn", "a.1.bn", "a.3.bn", "a.10.bn"], "a.{0-1,3,10}.bn"),
        (["0", "2"], "{0,2}"),
    ],
    ids=["one", "range", "ragged", "gaps", "numbers only"],
)
def test_names_are_put_together_exactly(names, span):
    rows = tuple(Row(name, "Block", "BN+ReLU", "fused") for name in names)
    assert str(FuseReport(rows)).splitlines()[3].split()[0] == span


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
    lines = str(report).splitlines()
    assert lines[0].endswith(
        "; with an input of [256, 3, 224, 224] a training step moves 62.0 GB less of 157.2 GB"
    )
    assert lines[3].split()[-2:] == ["4.1", "GB"]
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
    ],
)
def test_a_shape_that_does_not_fit_is_refused_before_anything_is_changed(shape, error, text):
    block = make(relu_child)
    with pytest.raises(error, match=text):
        fusedres.fuse_(block, input_shape=shape)
    assert not fusedres.is_fused(block)
