"""The recipes in examples/ that people copy, each run at small size: what it says of itself holds."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
import torchvision

pytestmark = [
    pytest.mark.once,
    # torch 2.11 says so of itself, when torch.fx.experimental.optimization is imported.
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),  # 2.10
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    # And torch.export.load of itself.
    pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning"),
]
ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
NAMES = ("train_cifar", "finetune", "inference", "unet")


@pytest.fixture
def recipe(monkeypatch):
    """The `run` of a recipe, imported from its folder."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return lambda name: importlib.import_module(name).run


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes of generated images, dark and light."""
    image = pytest.importorskip("PIL.Image")
    for label, colour in (("dark", 10), ("light", 240)):
        (tmp_path / "data" / label).mkdir(parents=True)
        for k in range(10):
            image.new("RGB", (18, 16), (colour, 5 * k, 0)).save(
                tmp_path / "data" / label / f"{k}.png"
            )
    return tmp_path / "data"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A state_dict of torchvision's resnet18 for ten classes, its running statistics not those of a fresh one."""
    torch.manual_seed(3)
    model = torchvision.models.resnet18(num_classes=10)
    model(torch.randn(4, 3, 32, 32))
    file = tmp_path_factory.mktemp("weights") / "resnet18.pt"
    torch.save(model.state_dict(), file)
    return file


def difference(told: str, what: str) -> float:
    """What `inference` printed of this step."""
    (text,) = re.findall(rf"^{what} +largest relative difference (\S+)$", told, re.M)
    return float(text)


# --- train_cifar -----------------------------------------------------------------------------------------------------


def test_a_resnet_20_reaches_its_stated_accuracy_on_the_digits(recipe, tmp_path, capsys):
    given = ["--size", "8", "--epochs", "3", "--target", "0.8", "--save", str(tmp_path / "w.pt")]
    assert recipe("train_cifar")(given) == 0
    told = capsys.readouterr().out
    assert "19 BatchNorms fused" in told
    assert re.search(r"accuracy  0\.[89]\d+ of the held-out images; stated: 0.8, reached$", told, re.M)  # fmt: skip


def test_an_accuracy_that_is_missed_is_said_and_is_the_exit_status(recipe, folder, capsys):
    given = ["--data", str(folder), "--size", "8", "--epochs", "1", "--batch", "8", "--mirror"]
    assert recipe("train_cifar")([*given, "--channels-last", "--target", "1.01"]) == 1
    assert "stated: 1.01, NOT reached" in capsys.readouterr().out


def test_an_image_is_moved_whole_and_mirrored_whole(recipe):
    recipe("train_cifar")
    augment = importlib.import_module("train_cifar").augment
    image = torch.zeros(1, 3, 16, 16)
    image[..., 8, 5:7] = torch.tensor([1.0, 2.0])
    seen = augment(image.expand(200, -1, -1, -1), mirror=True)
    rows, pairs = seen[:, 0].nonzero()[::2, 1], seen.sum(2)[:, 0]
    assert set(rows.tolist()) == {6, 7, 8, 9, 10}
    assert {tuple(row[row > 0].tolist()) for row in pairs} == {(1.0, 2.0), (2.0, 1.0)}


# --- finetune --------------------------------------------------------------------------------------------------------


def test_the_plain_model_takes_what_is_saved(recipe, weights, folder, tmp_path, capsys):
    save = tmp_path / "out" / "finetuned.pt"
    given = ["--weights", str(weights), "--data", str(folder), "--save", str(save), "--size", "16"]
    assert recipe("finetune")([*given, "--steps", "2", "--batch", "8"]) == 0
    told = capsys.readouterr().out
    assert "20 BatchNorms fused, new head 'fc'" in told
    assert "40 running statistics, 0 of them moved" in told
    assert "a plain resnet18 with it gives the same outputs" in told
    before, after = (torch.load(path, weights_only=True) for path in (weights, save))
    torchvision.models.resnet18(num_classes=2).load_state_dict(after)
    same = {name for name, value in after.items() if torch.equal(value, before[name])}
    norms = {name for name in after if re.search(r"bn\d|downsample\.1", name)}
    assert same == norms


# --- inference -------------------------------------------------------------------------------------------------------


def test_what_is_served_gives_what_was_trained(recipe, weights, tmp_path, capsys):
    given = ["--weights", str(weights), "--size", "32", "--batch", "2", "--out", str(tmp_path)]
    assert recipe("inference")(given) == 0
    told = capsys.readouterr().out
    assert "20 BatchNorms, 0 of them left" in told
    assert max(difference(told, what) for what in ("fused", "folded", "exported")) <= 1e-4
    images = torch.randn(3, 3, 32, 32)
    plain = torchvision.models.resnet18(num_classes=10).eval()
    plain.load_state_dict(torch.load(weights, weights_only=True))
    served = torch.export.load(tmp_path / "resnet18.pt2").module()
    torch.testing.assert_close(served(images), plain(images), rtol=1e-4, atol=1e-4)
    if importlib.util.find_spec("onnx") is None:
        assert "not written: onnx" in told
    else:
        assert (tmp_path / "resnet18.onnx").stat().st_size > 0


def test_a_folding_that_is_wrong_ends_in_a_line(recipe, monkeypatch, tmp_path, capsys):
    run = recipe("inference")
    optimization = importlib.import_module("inference").optimization
    monkeypatch.setattr(optimization, "fuse", lambda model: lambda images: model(images) * 1.01)
    given = ["--model", "resnet20", "--size", "8", "--batch", "2", "--out", str(tmp_path)]
    assert run(given) == 2
    assert re.fullmatch(r"inference: folded: outputs differ by 1\.0e-02 .*\n", capsys.readouterr().err)  # fmt: skip


# --- unet ------------------------------------------------------------------------------------------------------------


def test_a_u_net_learns_to_segment(recipe, capsys):
    assert recipe("unet")(["--steps", "30", "--batch", "8", "--size", "32"]) == 0
    (start, end), = re.findall(r"loss +(\S+) at first, (\S+) over", capsys.readouterr().out)  # fmt: skip
    assert float(end) < 0.5 * float(start)


# --- what is wrong is said in a line ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_help_begins_with_what_it_is_for(name, recipe, capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        recipe(name)(["--help"])
    told = capsys.readouterr().out
    first = (importlib.import_module(name).__doc__ or "").partition("\n")[0]
    assert f"python examples/{name}.py" in told
    assert first[:40] in told


@pytest.mark.parametrize(
    ("name", "given", "text"),
    [
        ("train_cifar", ["--model", "resnet21"], "unknown model 'resnet21'"),
        ("train_cifar", ["--data", "nowhere"], "'nowhere' is not a folder"),
        ("train_cifar", ["--batch", "5000"], "--batch 5000 is more than the 1438 images"),
        ("train_cifar", ["--device", "abacus"], "abacus"),
        ("finetune", ["--weights", "nowhere.pt"], "'nowhere.pt' cannot be read"),
        ("finetune", ["--weights", str(ROOT / "LICENSE")], "is not a file that torch.save has written"),
        ("finetune", ["--weights", "{weights}", "--model", "resnet20"], "is another model's: "),
        ("inference", ["--weights", "{weights}", "--classes", "3"], "is another model's: size mismatch for fc"),
        ("unet", ["--size", "18"], "--size 18 is not a multiple of 4"),
    ],
    ids=lambda value: None if isinstance(value, list) else str(value).split(":")[0][:40],
)  # fmt: skip
def test_what_is_wrong_is_said_in_a_line(name, given, text, recipe, weights, capsys):
    assert recipe(name)([word.format(weights=weights) for word in given]) == 2
    told = capsys.readouterr().err
    assert (told.startswith(f"{name}: "), text in told, told.count("\n")) == (True, True, 1)


# --- the notebook ----------------------------------------------------------------------------------------------------


def cells(kind: str) -> list[dict]:
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_the_notebook_runs_from_top_to_bottom(capsys):
    namespace: dict = {"__name__": "__main__"}
    for number, cell in enumerate(cells("code")):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)
    told = capsys.readouterr().out
    assert namespace["report"].n_fused == 20
    assert "gives the same outputs: True" in told
    assert max(namespace["differences"].values()) <= 1e-4


def test_the_notebook_is_committed_without_what_a_run_leaves():
    assert {(cell["execution_count"], len(cell["outputs"])) for cell in cells("code")} == {
        (None, 0)
    }


def test_the_first_cell_installs_what_is_missing(monkeypatch):
    called: list[list[str]] = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("subprocess.check_call", called.append)
    exec("".join(cells("code")[0]["source"]), {})
    assert [command[1:4] for command in called] == [["-m", "pip", "install"]]
