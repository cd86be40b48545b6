"""The report of a swap: the table a person reads, and the same as Markdown and JSON."""

from __future__ import annotations

import json

import pytest
import torch
import torchvision
from torch import nn

import fusedres
from fusedres.swap.report import FuseReport, Row

from .swap_blocks import make, tail

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
