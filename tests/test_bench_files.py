"""Rows, the files they are kept in, the page that is made of them, and what changed between two of them."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, replace

import pytest

from fusedres.benchmarks import changes, host, record, report
from fusedres.benchmarks.record import Book, RecordError, Row
from fusedres.benchmarks.timing import Timing, verdict

pytestmark = pytest.mark.once

STAMP = {"device": "a GPU", "versions": "torch 9", "date": "2026-11-21T00:00:00+00:00"}
ROW = Row(
    "operator", "bn_relu", "eager", "time_us", "forward", "N2-C4-H5-W5", "bfloat16", "channels_last", "cold",
    median=100.0, p20=99.0, p80=102.0, spread=3.0, bytes=3000,
)  # fmt: skip
FUSED = replace(ROW, provider="fusedres", median=60.0)


def test_rows_come_back_from_json_and_stand_in_the_csv(tmp_path):
    Book.open(tmp_path, STAMP).add([ROW, FUSED])
    again = Book.open(tmp_path, STAMP)
    assert again.rows == [replace(ROW, **STAMP), replace(FUSED, **STAMP)]
    again.add([ROW])
    with (tmp_path / record.CSV_FILE).open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["provider"] for line in lines] == ["eager", "fusedres", "eager"]
    assert list(lines[0]) == list(asdict(ROW))


def test_a_csv_with_other_columns_is_written_anew(tmp_path):
    Book.open(tmp_path, STAMP).add([ROW])
    path = tmp_path / record.CSV_FILE
    path.write_text(path.read_text().replace(",minimum", ""))
    Book.open(tmp_path, STAMP).add([FUSED])
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["provider"] for line in lines] == ["eager", "fusedres"]
    assert list(lines[0]) == list(asdict(ROW))


def test_the_schema_has_the_columns_of_the_contract():
    assert {
        "kernel", "provider", "metric", "mode", "shape", "dtype", "layout", "median", "p20", "p80", "device",
        "versions", "date",
    } <= asdict(ROW).keys()  # fmt: skip


def test_numbers_that_json_does_not_know_become_null(tmp_path):
    Book.open(tmp_path, STAMP).add([replace(ROW, median=float("nan"), p80=float("inf"))])
    (entry,) = json.loads((tmp_path / record.JSON_FILE).read_text())
    assert (entry["median"], entry["p80"]) == (None, None)


def test_the_last_row_of_a_key_counts():
    newer = replace(ROW, median=90.0, date="later")
    assert record.latest([ROW, FUSED, newer]) == [newer, FUSED]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read as JSON"),
        ("{}", "is not a list of rows"),
        ('[{"level": "operator"}]', "row 0: "),
        ("[3]", "row 0: "),
        (json.dumps([asdict(ROW) | {"surprise": 1}]), "surprise"),
        (json.dumps([asdict(ROW) | {"median": "fast"}]), "median is 'fast', not a number"),
    ],
)
def test_a_file_that_is_no_file_of_results_is_named(tmp_path, text, said):
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=str(path)) as caught:
        record.read(path)
    assert said in str(caught.value)


def test_a_missing_file_and_a_folder_that_is_a_file(tmp_path):
    with pytest.raises(RecordError, match="there is no"):
        record.read(tmp_path / "none.json")
    (tmp_path / "taken").write_text("")
    with pytest.raises(RecordError, match="cannot be a folder"):
        Book.open(tmp_path / "taken", STAMP)


# --- verdicts and changes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ((60, 3), (100, 3), "1.67x as fast"),
        ((100, 3), (60, 3), "takes 1.67x as long"),
        ((98, 1), (100, 3), "no difference"),
        ((100, 0), (100, 0), "no difference"),
        ((None, None), (100, 3), ""),
    ],
)
def test_a_difference_within_the_spread_is_none(ours, theirs, said):
    assert verdict(*ours, *theirs) == said


def test_the_spread_is_that_between_rounds_where_rounds_differ_more_than_samples():
    timing = Timing.of([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [5.0]])
    assert (timing.median, timing.p20, timing.p80, timing.spread) == (1.0, 1.0, 1.0, 4.0)
    assert Timing.of([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]).spread == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("new", "worse", "better", "same"),
    [
        ({"median": 110.0}, 1, 0, 0),
        ({"median": 90.0}, 0, 1, 0),
        ({"median": 102.0}, 0, 0, 1),
        ({"median": 110.0, "spread": 20.0}, 0, 0, 1),
        ({"median": 110.0, "provider": "another"}, 0, 0, 0),
        ({"median": 110.0, "cache": "hot"}, 0, 0, 0),
        ({"median": 110.0, "graph": True}, 0, 0, 0),
        ({"median": 110.0, "metric": "occupancy_percent"}, 0, 0, 0),
    ],
)
def test_what_got_slower(new, worse, better, same):
    found = changes.compare([ROW], [replace(ROW, **new)])
    assert (len(found.worse), len(found.better), found.same) == (worse, better, same)


def test_counted_figures_have_no_spread():
    registers = replace(ROW, metric="registers", median=100.0, spread=None)
    found = changes.compare([registers], [replace(registers, median=101.0, device="another")])
    assert "registers 100 -> 101 (1.01x)" in str(found)


def test_times_of_another_device_are_not_compared_and_lost_numbers_are_named():
    other = changes.compare([ROW], [replace(ROW, device="another", median=1.0)])
    assert "not compared: 1 times from another device" in str(other)
    lost = changes.compare([ROW], [replace(ROW, median=None, note="wrong, so not timed: output")])
    assert "had a number, now wrong, so not timed: output" in str(lost)


# --- the page --------------------------------------------------------------------------------------------------------


def page(tmp_path, *rows: Row) -> str:
    book = Book.open(tmp_path, STAMP)
    book.add(rows)
    report.write_page(book)
    return (tmp_path / report.PAGE).read_text()


def test_the_page_shows_providers_side_by_side_with_the_share_of_the_copy(tmp_path):
    copy = replace(ROW, provider="copy", median=54.0)
    text = page(tmp_path, ROW, FUSED, replace(ROW, provider="compile", median=70.0), copy)
    assert "| BN + ReLU | N2-C4-H5-W5 | forward | 100 (99 to 102) | 60 (99 to 102) |" in text
    assert "| 1.67x as fast | 1.17x as fast (compile) | 90 |" in text
    assert "a GPU" in text
    assert "torch 9" in text


def test_the_page_shows_what_fusedres_loses_and_what_is_no_difference(tmp_path):
    rivals = (
        replace(ROW, provider="compile", median=30.0),
        replace(ROW, provider="eager", median=61.0),
    )
    text = page(tmp_path, FUSED, *rivals)
    assert "| no difference | takes 2.00x as long (compile) |" in text


def test_the_page_names_what_was_not_measured_once(tmp_path):
    note = "missing: apex is not installed"
    missing = [replace(ROW, provider="apex", mode=m, median=None, note=note) for m in "ab"]
    text = page(tmp_path, ROW, *missing)
    assert text.count("apex is not installed") == 1


def test_graphs_hot_and_cold_stand_in_tables_of_their_own(tmp_path):
    text = page(tmp_path, ROW, replace(ROW, cache="hot"), replace(ROW, graph=True))
    for title in ("cold cache\n", "hot cache\n", "cold cache, CUDA graph\n"):
        assert f"### bfloat16, channels_last, {title}" in text


def test_every_section_is_made_from_its_rows_and_plots_stand_beside_it(tmp_path):
    network = [
        Row("network", "resnet50", p, "bytes", m, "N256-C3-H224-W224", "bfloat16", "channels_last", median=b)
        for p, bytes_ in (("eager", 87e9), ("fusedres", 60e9))
        for m, b in (("forward", bytes_ / 3), ("backward", 2 * bytes_ / 3), ("step", bytes_))
    ]  # fmt: skip
    rows = [
        ROW, FUSED, *network,
        replace(ROW, level="model", kernel="resnet50", mode="step", bytes=None),
        replace(ROW, level="block", kernel="Bottleneck", mode="step", bytes=None),
        replace(ROW, level="host", kernel="call", minimum=90.0, p10=95.0),
        Row("bytes", "bn", "eager", "passes", "forward", "N1", median=3.0),
        Row("bytes", "bn", "eager", "passes", "backward", "N1", median=5.0),
        Row("code", "bn_stats_kernel", "fusedres", "registers", "sm_90", median=102.0),
        Row("state", "after it", "driver", "sm_clock_mhz", median=1980.0),
    ]  # fmt: skip
    text = page(tmp_path, *rows)
    titles = ["Bytes of an operator", "Bytes of a whole network", "Time: operator", "Time: block", "Time: model",
              "Host cost", "Machine code", "The device while it measured"]  # fmt: skip
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == titles
    assert "| resnet50 | N256-C3-H224-W224 | bfloat16 | fusedres | 20.0 | 40.0 | 60.0 |" in text
    for name in ("network.png", "operator.png", "model.png"):
        assert f"({name})" in text
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_host_cost_stands_beside_eager_and_what_is_allowed(tmp_path):
    eager = replace(
        ROW, level="host", kernel=host.CALL, mode="step", minimum=40.0, p10=50.0, median=60.0
    )
    ours = replace(eager, provider=host.TRITON, minimum=60.0, p10=80.0, note="on a stub")
    text = page(tmp_path, eager, ours)
    assert "\nfusedres, triton: on a stub.\n" in text
    assert "| call | step | eager | 40 (50, 60) |  |  |" in text
    assert "| call | step | fusedres, triton | 60 (80, 60) | 1.50 (1.60) | 1.0 |" in text


def test_the_page_needs_no_matplotlib(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "![" not in page(tmp_path, ROW, FUSED)
