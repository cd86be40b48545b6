"""The experiments: that each shows the effect it is about, by the numbers of the committed run, and that each runs.

The margins are half or less of what was seen over the seeds of that run, which the JSON lists as lowest and highest.
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.once
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "examples" / "results"
NAMES = ("gradient_norms", "depth", "learnable_scale", "preactivation")
PAGE = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")


def found(name: str) -> dict:
    """The findings of the committed run."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["findings"]


def test_the_gradient_moves_from_the_connection_to_the_branch():
    """In all of five seeds the branch's gradient begins the smaller one and ends the larger one."""
    numbers = found("gradient_norms")
    ratio = numbers["ratio_glorot"]
    assert (numbers["seeds_that_cross"], numbers["seeds"]) == (5, 5)
    assert ratio["start"]["highest"] < 0.75
    assert ratio["end"]["lowest"] > 1.05
    assert 1 < numbers["crossing_step"]["lowest"] <= numbers["crossing_step"]["highest"] < 359


def test_deep_plain_networks_train_worse_and_residual_ones_do_not():
    numbers = found("depth")
    plain, residual = numbers["loss_plain"], numbers["loss_residual"]
    assert plain["56"]["lowest"] > 3 * plain["20"]["highest"]
    assert plain["56"]["lowest"] > 5 * residual["56"]["highest"]
    assert residual["56"]["highest"] < 0.25


def test_a_scale_from_zero_begins_calmly_and_the_scales_leave_zero():
    numbers = found("learnable_scale")
    plain, learnable = (numbers[f"{kind} sum, without BatchNorm"] for kind in ("plain", "learnable"))  # fmt: skip
    assert plain["loss_first"]["lowest"] > 3 * learnable["loss_first"]["highest"]
    assert learnable["loss_early"]["highest"] < plain["loss_early"]["lowest"]
    assert numbers["size of the scales at the end, without BatchNorm"]["lowest"] > 0.03


def test_the_identity_is_the_best_shortcut_at_110_layers():
    numbers = found("preactivation")
    shortcuts = dict(numbers["loss_by_shortcut"])
    identity = shortcuts.pop("identity")
    assert len(shortcuts) == 4
    assert min(each["lowest"] for each in shortcuts.values()) > 1.5 * identity["highest"]


def test_pre_activation_stands_the_larger_learning_rate():
    orders = found("preactivation")["loss_by_order"]
    before, after = (orders[f"{kind}-activation, rate 0.1"] for kind in ("pre", "post"))
    assert after["lowest"] > 1.5 * before["highest"]


@pytest.mark.parametrize("name", NAMES)
def test_the_page_shows_it_and_its_caption_states_the_numbers_of_the_run(name):
    (caption,) = re.findall(rf"!\[.*?\]\(\.\./examples/results/{name}\.png\)\n\n((?:.+\n)+)", PAGE)
    text = re.sub(r"`[^`]*`", "", caption)  # the command
    stated = set(re.findall(r"\d+\.\d+", text))
    values = set(_values(found(name)))
    assert stated
    assert {n for n in stated if not any(_is_rounded(n, v) for v in values)} == set()


def _values(value):
    if isinstance(value, dict):
        for key, each in value.items():
            yield from map(float, re.findall(r"\d+\.\d+", key))  # a learning rate
            yield from _values(each)
    elif isinstance(value, (int, float)):
        yield float(value)


def _is_rounded(text: str, value: float) -> bool:
    digits = len(text.partition(".")[2])
    # The JSON has four digits: a five behind them may be rounded either way.
    return abs(float(text) - value) <= 0.5001 * 10**-digits


# --- they run ----------------------------------------------------------------------------------------------------


@pytest.fixture
def experiment(monkeypatch):
    """The `run` of an experiment, imported from its folder."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    threads = torch.get_num_threads()
    yield lambda name: importlib.import_module(name).run
    torch.set_num_threads(threads)


def record(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_it_writes_a_picture_and_the_same_numbers_for_the_same_seed(name, experiment, tmp_path):
    folders = [tmp_path / "first", tmp_path / "again"]
    for folder in folders:
        given = ["--steps", "2", "--repeat", "1", "--batch", "4", "--out", str(folder)]
        assert experiment(name)(given) == 0
    first, again = (record(folder, name) for folder in folders)
    assert (folders[0] / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert (first["series"], first["findings"]) == (again["series"], again["findings"])


def test_another_seed_gives_other_numbers(experiment, tmp_path):
    for seed in ("0", "1"):
        given = ["--steps", "1", "--repeat", "1", "--seed", seed, "--out", str(tmp_path / seed)]
        experiment("learnable_scale")(given)
    first, second = (record(tmp_path / seed, "learnable_scale") for seed in ("0", "1"))
    assert first["series"] != second["series"]


def test_a_folder_of_images_is_taken(experiment, tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    for label, colour in (("dark", 10), ("light", 240)):
        (tmp_path / "data" / label).mkdir(parents=True)
        for k in range(4):
            image.new("RGB", (12, 9), (colour, k, 0)).save(tmp_path / "data" / label / f"{k}.png")
    data, out = str(tmp_path / "data"), str(tmp_path)
    given = ["--data", data, "--steps", "1", "--repeat", "1", "--batch", "2", "--out", out]
    assert experiment("learnable_scale")(given) == 0
    assert "data (2 classes), 6 to train on, 2 held out, 8x8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path: None, "is not a folder"),
        (lambda path: path.mkdir(), "Couldn't find any class folder"),
        (lambda path: (path / "one").mkdir(parents=True), "Found no valid file for the classes one"),
    ],
    ids=["nothing", "empty", "no images"],
)  # fmt: skip
def test_what_is_no_folder_of_images_is_refused_in_a_line(make, text, experiment, tmp_path, capsys):
    make(tmp_path / "data")
    data = str(tmp_path / "data")
    assert experiment("depth")(["--data", data, "--out", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    wanted = "expected a folder with one sub-folder"
    assert (text in told, wanted in told, told.count("\n")) == (True, True, 1)


def test_a_batch_larger_than_the_data_is_refused(experiment, tmp_path, capsys):
    given = ["--batch", "5000", "--steps", "1", "--out", str(tmp_path)]
    assert experiment("depth")(given) == 2
    assert "--batch 5000 is more than the 1438 images" in capsys.readouterr().err
