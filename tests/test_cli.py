"""The command line: what it prints, what it writes, and what it says to a mistake."""

import contextlib
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import fusedres
from fusedres.cli.data import batches, load_digits, make_synthetic
from fusedres.cli.differences import Difference, difference, largest
from fusedres.cli.main import main
from fusedres.cli.progress import Progress
from fusedres.cli.summary import Spread, compare_seconds, table
from fusedres.cli.training import Setting, Trainee

pytestmark = pytest.mark.once

TINY = [
    "--data",
    "synthetic",
    "--images",
    "8",
    "--batch",
    "4",
    "--image-size",
    "32",
    "--steps",
    "3",
    "--device",
    "cpu",
]
CPU = Setting(torch.device("cpu"), torch.float32, torch.contiguous_format)


def compare(capsys, folder, *arguments: str) -> tuple[str, dict]:
    """What `compare` printed and the JSON it wrote."""
    assert main(["compare", "resnet18", *TINY, "--out", str(folder), *arguments]) == 0
    return capsys.readouterr().out, json.loads((folder / "compare-resnet18.json").read_text())


def refusal(capsys, *arguments: str) -> str:
    """The one line that a mistake is answered with; the exit status is 2."""
    try:
        status = main(list(arguments))
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr()
    assert status == 2
    assert "Traceback" not in said.err
    return said.err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> tuple[str, Path]:
    """One run: what it printed, and the folder it wrote to."""
    folder, printed = tmp_path_factory.mktemp("compared"), io.StringIO()
    arguments = [
        "compare",
        "resnet18",
        *TINY,
        "--seed",
        "3",
        "--backend",
        "auto",
        "--out",
        str(folder),
    ]
    with fusedres.backend("auto"), contextlib.redirect_stdout(printed):
        assert main(arguments) == 0
    return printed.getvalue(), folder


def test_compare_prints_report_tables_and_backend(compared):
    printed, _ = compared
    for words in (
        "20 fused",
        "backend  aten:",
        "no speed-up is to be expected",
        "8 synthetic images, 10 classes, 32x32",
        "step  ",
        "images per second",
        "the device does not tell",
        "largest relative difference  first step",
        "gradients ",
        "running statistics ",
        "backend that ran: aten",
    ):
        assert words in printed


def test_compare_writes_everything_as_json(compared):
    record = json.loads((compared[1] / "compare-resnet18.json").read_text())
    assert record["backend"]["name"] == "aten"
    assert record["settings"]["seed"] == 3
    assert record["versions"]["torch"] == torch.__version__
    assert record["report"]["n_fused"] == 20
    assert len(record["differences"]) == 3
    for name in ("original", "fused"):
        assert len(record[name]["losses"]) == len(record[name]["step_seconds"]) == 3
        assert record[name]["images_per_second"] > 0
    assert record["largest_difference"]["gradients"] <= 1e-5
    assert record["warm_up_steps"] == 2


def test_compare_draws_a_picture(compared):
    from PIL import Image

    with Image.open(compared[1] / "compare-resnet18.png") as picture:
        colours = picture.convert("RGB").getcolors(maxcolors=1 << 20)
        assert picture.format == "PNG"
        assert min(picture.size) > 500
    assert len(colours) > 10


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_compare_below_float32_in_channels_last(capsys, tmp_path, dtype):
    printed, record = compare(capsys, tmp_path, "--dtype", dtype, "--channels-last")
    assert f"{dtype}, channels_last" in printed
    assert record["differences"][0]["loss"] <= 1e-2
    assert all(isinstance(loss, float) for loss in record["fused"]["losses"])


def test_compare_with_the_backend_off_says_that_both_are_one(capsys, tmp_path):
    printed, record = compare(capsys, tmp_path, "--backend", "off")
    assert "backend that ran: off (both models run the same code" in printed
    assert record["largest_difference"] == {
        "loss": 0.0,
        "gradients": 0.0,
        "running_statistics": 0.0,
    }


def test_compare_sees_a_swap_that_is_wrong(capsys, tmp_path, monkeypatch):
    """The judge is judged: a swap that changes one epsilon, and one that forgets the running statistics."""
    true_fuse = fusedres.fuse_

    def wrong_fuse(model):
        model.bn1.eps = 0.1
        model.layer1[0].bn1.momentum = 0.0
        return true_fuse(model)

    monkeypatch.setattr(fusedres, "fuse_", wrong_fuse)
    _, record = compare(capsys, tmp_path)
    first = record["differences"][0]
    assert first["loss"] > 1e-4
    assert first["gradients"] > 1e-2
    assert first["running_statistics"] > 1e-2
    assert record["original_against_itself"]["loss"] <= 1e-6


def test_compare_says_when_nothing_was_fused(capsys, tmp_path):
    arguments = ["--steps", "1", "--image-size", "64", "--out", str(tmp_path)]
    assert main(["compare", "squeezenet1_1", *TINY, *arguments]) == 0
    printed = capsys.readouterr().out
    assert "nothing was fused" in printed
    assert "one timed step: no spread, no verdict" in printed


def test_digits_from_the_shell_in_a_folder_of_its_own(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fusedres", "compare", "resnet18", "--data", "digits", "--steps", "2",
         "--image-size", "32", "--device", "cpu", "--backend", "auto"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1438 to train on, 359 held out" in done.stdout
    assert "accuracy, held out" in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "compare-resnet18.png",
        "compare-resnet18.json",
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compare", "resnet81"], "unknown model 'resnet81'; did you mean"),
        (["compare", "xyzzy"], "unknown model 'xyzzy'; see torchvision.models.list_models()"),
        (["compare", "timm:resnet81"], "unknown timm model 'resnet81'; did you mean"),
        (["compare", "fcn_resnet50"], "'fcn_resnet50' is not an image classifier"),
        (["compare", "resnet18", "--data", "imagenet"], "argument --data: invalid choice: 'imagenet'"),
        (["compare", "resnet18", "--device", "gpu"], "--device 'gpu' is not a device; try cpu"),
        (["compare", "resnet18", "--device", "xpu"], "--device 'xpu' is not available; here there is cpu"),
        (["compare", "resnet18", "--steps", "0"], "--steps: '0' is not a whole number of at least 1"),
        (["compare", "resnet18", "--batch", "few"], "--batch: 'few' is not a whole number of at least 1"),
        (["compare", "resnet18", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["compare", "resnet18", *TINY, "--batch", "9"], "--batch 9 is more than the 8 images"),
        (["compare", "resnet18", *TINY, "--batch", "1"], "batch of shape [1, 3, 32, 32]: Expected more than 1 value"),
        (["compare", "resnet18", *TINY, "--backend", "triton"], "the triton backend cannot run"),
        (["compare", "resnet18", "--backend", "cuda"], "argument --backend: invalid choice: 'cuda'"),
        (["explain", "resnet81"], "unknown model 'resnet81'; did you mean"),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else "",
)  # fmt: skip
def test_mistakes_are_answered_with_a_line(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert words in refusal(capsys, *arguments)


def test_an_output_folder_that_is_a_file_is_refused(capsys, tmp_path):
    (tmp_path / "taken").write_text("")
    said = refusal(capsys, "compare", "resnet18", *TINY, "--out", str(tmp_path / "taken"))
    assert "--out" in said
    assert "cannot be a folder: File exists" in said


@pytest.mark.parametrize(
    ("package", "arguments", "extra"),
    [
        ("torchvision", ["compare", "resnet18"], "models"),
        ("torchvision", ["explain", "resnet18"], "models"),
        ("timm", ["explain", "timm:resnet18"], "models"),
        ("sklearn.datasets", ["compare", "resnet18"], "demo"),
        ("matplotlib", ["compare", "resnet18"], "demo"),
    ],
)
def test_a_missing_package_names_its_extra(
    capsys, tmp_path, monkeypatch, package, arguments, extra
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    said = refusal(capsys, *arguments)
    assert f"needs {package}, which is not installed" in said
    assert f"pip install 'fusedres[{extra}]'" in said


def test_explain_in_three_forms(capsys):
    assert main(["explain", "resnet18"]) == 0
    assert "20 fusable" in capsys.readouterr().out
    assert main(["explain", "resnet18", "--markdown"]) == 0
    assert "| --- |" in capsys.readouterr().out
    assert main(["explain", "timm:resnet18", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"]


def test_explain_with_an_input_tells_the_bytes(capsys):
    assert main(["explain", "timm:resnet50d", "--input", "256,3,224,224"]) == 0
    assert "moves 66.1 GB less of 167.9 GB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ("256,4,224,224", "does not take a tensor of shape [256, 4, 224, 224]"),
        ("256x3", "'256x3' is no shape; write it as 256,3,224,224"),
    ],
)
def test_explain_refuses_an_input_that_does_not_fit(capsys, shape, text):
    assert text in refusal(capsys, "explain", "resnet18", "--input", shape)


def test_explain_downloads_nothing_for_a_model_with_a_backbone(capsys, monkeypatch):
    def no_network(*arguments, **keywords):
        raise AssertionError("a download was tried")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    assert main(["explain", "fcn_resnet50"]) == 0


def test_env_tells_versions_and_backends(capsys):
    assert main(["env"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["fusedres"].strip() == fusedres.__version__
    assert lines["torch"] == torch.__version__
    assert lines["backend"].startswith("aten is asked for")
    assert {"python", "triton", "torchvision", "timm", "on"} <= lines.keys()


def test_env_without_triton(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton.runtime", None)
    assert main(["env"]) == 0
    assert "none: Triton does not load" in capsys.readouterr().out


def test_digits_are_split_without_overlap():
    data = load_digits(16, seed=0)
    assert data.images.shape == (1438, 3, 16, 16)
    assert data.held_out_images.shape == (359, 3, 16, 16)
    assert abs(data.images.mean().item()) < 1e-5
    assert abs(data.images.std().item() - 1) < 1e-3
    counts = data.labels.bincount() + data.held_out_labels.bincount()
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert torch.equal(data.images, load_digits(16, seed=0).images)
    assert not torch.equal(data.labels, load_digits(16, seed=1).labels)


def test_an_epoch_shows_each_image_once():
    data = make_synthetic(12, 4, 3, seed=0)
    seen = torch.cat([pixels for pixels, _ in batches(data, 4, 3, seed=0)])
    assert torch.equal(
        seen.flatten(1).sum(1).sort().values, data.images.flatten(1).sum(1).sort().values
    )
    assert [len(labels) for _, labels in batches(data, 5, 4, seed=0)] == [5, 5, 5, 5]


def trainees(change=lambda model: None) -> tuple[Trainee, Trainee]:
    """Two of one small network, the second changed, after one step."""
    made = []
    for number in range(2):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)
        )
        if number == 1:
            change(model)
        made.append(Trainee(str(number), model, CPU))
    data = make_synthetic(4, 8, 3, seed=0)
    for trainee in made:
        trainee.step(data.images, data.labels, seed=0)
    return made[0], made[1]


def test_no_difference_between_equals():
    assert difference(*trainees()) == Difference(0.0, 0.0, 0.0)


def test_accuracy_is_taken_in_eval_mode_and_leaves_no_trace():
    trainee, _ = trainees()
    before = {name: buffer.clone() for name, buffer in trainee.running_statistics().items()}
    data = make_synthetic(4, 8, 3, seed=0)
    data = replace(data, held_out_images=data.images, held_out_labels=data.labels)
    with torch.no_grad():
        right = trainee.model.eval()(data.images).argmax(1) == data.labels
    trainee.model.train()
    assert trainee.accuracy(data, batch=3) == right.float().mean().item()
    assert trainee.model.training
    assert all(torch.equal(before[name], b) for name, b in trainee.running_statistics().items())


def test_a_difference_is_relative_and_of_the_tensor_that_has_most():
    def stretch(model):
        model[4].weight.data *= 1 + 1e-3

    apart = difference(*trainees(stretch))
    assert 0 < apart.loss < 1e-2
    assert 1e-5 < apart.gradients < 1e-1
    assert apart.running_statistics == 0.0


def test_a_gradient_that_is_zero_up_to_rounding_does_not_decide():
    """A bias before BatchNorm has no gradient: what is there is rounding, and its relative difference is 1."""
    first, second = trainees()
    second.model[0].bias.grad.neg_()
    assert difference(first, second).gradients < 1e-2


def test_a_parameter_without_a_counterpart_is_an_error():
    first, second = trainees()
    second.model[0].weight.grad = None
    with pytest.raises(RuntimeError, match=r"only one of the two models has 0\.weight"):
        difference(first, second)


def test_a_nan_is_the_largest_difference():
    worst = largest([Difference(0.0, float("nan"), 2.0), Difference(1.0, 3.0, 0.0)])
    assert (worst.loss, worst.running_statistics) == (1.0, 2.0)
    assert worst.gradients != worst.gradients


def test_a_tuple_of_logits_is_trained_by_its_first():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3 * 16, 3)

        def forward(self, images):
            return self.head(images.flatten(1)), None

    data = make_synthetic(4, 4, 3, seed=0)
    trainee = Trainee("auxiliary", Auxiliary(), CPU)
    for seed in range(20):
        trainee.step(data.images, data.labels, seed)
    assert trainee.losses[-1] < trainee.losses[0]


@pytest.mark.parametrize(
    ("original", "fused", "verdict"),
    [
        ([1.0, 1.1, 1.2], [1.05, 1.15, 1.25], "no difference (within the spread)"),
        ([2.0, 2.0, 2.1], [1.0, 1.0, 1.1], "fused is 2.00x as fast"),
        ([1.0, 1.0, 1.1], [2.0, 2.0, 2.1], "fused takes 2.00x as long"),
        ([2.0], [1.0], "one timed step: no spread, no verdict"),
    ],
    ids=["close", "faster", "slower", "single"],
)
def test_verdicts(original, fused, verdict):
    assert compare_seconds(Spread.of(original), Spread.of(fused)) == verdict


def test_a_table_is_as_wide_as_its_cells():
    assert table([["a", "bb"], ["ccc", "d"]]).splitlines() == ["a    bb", "---  --", "ccc  d"]


def test_progress_off_a_terminal_is_a_few_lines(capsys):
    progress = Progress(100)
    assert [progress.tell(f"loss {i}") or i for i in progress] == list(range(100))
    lines = capsys.readouterr().out.splitlines()
    assert 5 <= len(lines) <= 8
    assert lines[-1] == "  step 100/100  loss 99"


def test_progress_on_a_terminal_is_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = Progress(3)
    for _ in progress:
        progress.tell("loss 1")
    said = capsys.readouterr()
    assert said.out == ""
    assert "3/3" in said.err
    assert "loss 1" in said.err
