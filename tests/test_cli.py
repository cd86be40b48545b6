"""The command line: what it prints, what it writes, and what it says to a mistake."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import fusedres
from fusedres import dispatch
from fusedres.cli import arguments as words_of
from fusedres.cli import bench, demo, training
from fusedres.cli import compare as compare_command
from fusedres.cli.data import batches, load_digits, load_folder, make_synthetic
from fusedres.cli.differences import Difference, difference, largest
from fusedres.cli.main import main
from fusedres.cli.models import build_model, image_size
from fusedres.cli.progress import Progress
from fusedres.cli.summary import Spread, compare_seconds
from fusedres.cli.training import DTYPES, Setting, Trainee
from fusedres.tables import table

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
# A user's own file: what may stand behind the colon, and what may not.
NET = """
from torch import nn

SIZE = 3

class Net(nn.Sequential):
    def __init__(self, num_classes=7):
        super().__init__(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(4, num_classes),
        )

class Square(Net):
    def forward(self, x):
        assert x.shape[2] == 16, "Expected 16"
        return super().forward(x)

MODEL = Net()

class Families:
    small = staticmethod(lambda: Net(3))

class Lazy(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)
        )

class Dict(Net):
    def forward(self, x):
        return {"out": super().forward(x)}

class Pixels(Net):
    def forward(self, x):
        return x

class Two(Net):
    def forward(self, x, y):
        return super().forward(x + y)

class Frozen(Net):
    def __init__(self):
        super().__init__(10)
        self.requires_grad_(False)

def nothing():
    pass

def needs(depth, width=2):
    return Net()

def broken():
    raise KeyError("weights")

class Mute(Exception):
    def __str__(self):
        raise ValueError("mute")

class Stop(BaseException):
    pass

def mute():
    raise Mute

def stop():
    raise Stop("here")

def coloured():
    raise ValueError("\\x1b[31m" + "x" * 5000)

class Quits(Net):
    def forward(self, x):
        raise SystemExit(0)
"""
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
        "time of a step, median ",
        "images per second",
        "largest relative difference  first step",
        "time: ",
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


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to be in, but for files of the user's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("net", "syntax", "imports"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "syntax.py").write_text("def net(:\n")
    (tmp_path / "imports.py").write_text("import no_such_package\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "one" / "cats").mkdir(parents=True)
    (tmp_path / "one" / "cats" / "0.png").write_bytes(b"")
    images(tmp_path / "broken")
    (tmp_path / "broken" / "dark" / "1.png").write_bytes(b"not an image")
    images(tmp_path / "half")
    (tmp_path / "half" / "none").mkdir()
    (tmp_path / "bytes.py").write_bytes(b"x = 1\x00\n")
    return tmp_path


def images(folder: Path) -> None:
    """Six images in two classes."""
    from PIL import Image

    for label, colour in (("dark", 10), ("light", 240)):
        (folder / label).mkdir(parents=True)
        for k in range(5):
            Image.new("RGB", (12, 9), (colour, k, 0)).save(folder / label / f"{k}.png")


OWN = ["compare", "net.py:Net", "--device", "cpu"]
MISTAKES = [
    ([], "the following arguments are required: COMMAND"),
    (["frobnicate"], "invalid choice: 'frobnicate'"),
    (["explain"], "the following arguments are required: model"),
    (["explain", "resnet18", "--frobnicate"], "unrecognized arguments: --frobnicate"),
    # names of models
    (["explain", "resnet81"], "unknown model 'resnet81'; did you mean"),
    (["compare", "resnet81"], "unknown model 'resnet81'; did you mean"),
    (["compare", "xyzzy"], "unknown model 'xyzzy'; see torchvision.models.list_models()"),
    (["compare", "timm:resnet81"], "unknown model 'timm:resnet81'; did you mean timm:resnet"),
    (["explain", "timm:resnet50x"], "did you mean timm:"),
    (["explain", "timm/resnet50d"], "did you mean timm:resnet50d"),
    (["explain", "resnet50d"], "unknown model 'resnet50d'; did you mean timm:resnet50d"),
    (["explain", "microsoft/resnet-50"], "did you mean hf:microsoft/resnet-50?"),
    (["compare", "fcn_resnet50"], "'fcn_resnet50' is not an image classifier"),
    # one's own
    (["explain", "net.py"], "'net.py' is a file: say what builds the model in it, as net.py:Network"),
    (["explain", "nowhere.py:Net"], "'nowhere.py:Net': there is no file nowhere.py"),
    (["explain", "nowhere:Net"], "there is no module 'nowhere' here"),
    (["explain", "no.where:Net"], "there is no module 'no.where' here"),
    (["explain", ":Net"], "':Net' is no model; write module:callable"),
    (["explain", "net.py:"], "'net.py:' is no model; write module:callable"),
    (["explain", "net.py:Nett"], "there is no 'Nett' in net.py; did you mean Net?"),
    (["explain", "net:qqq"], "there is no 'qqq' in net; write the name of a class or a function"),
    (["explain", "net.py:SIZE"], "'net.py:SIZE' is an int, expected a class, a function"),
    (["explain", "net.py:nothing"], "'net.py:nothing' gives a NoneType, expected a torch.nn.Module"),
    (["explain", "net.py:needs"], "cannot be called without arguments (missing a required argument: 'depth')"),
    (["explain", "net.py:broken"], "'net.py:broken': KeyError: 'weights' ("),
    (["explain", "net.py:mute"], "'net.py:mute': Mute ("),
    (["explain", "net.py:stop"], "'net.py:stop': Stop: here ("),
    (["explain", "net.py:coloured"], "ValueError: \\x1b[31mxxx"),
    (["explain", "bytes.py:x"], "'bytes.py:x': SyntaxError: source code string cannot contain null bytes"),
    (["compare", "net.py:Quits", *TINY], "the model's code has ended it: SystemExit: 0"),
    (["explain", "syntax.py:net"], "'syntax.py:net': SyntaxError: "),
    (["explain", "imports:net"], "'imports:net': ModuleNotFoundError: No module named 'no_such_package' ("),
    # shapes
    (["explain", "net.py:Net", "--input", "0,3,224,224"], "'0,3,224,224' has a size of 0; sizes are 1 or more"),
    (["explain", "net.py:Net", "--input", "-1,3,64,64"], "'-1,3,64,64' has a size of -1; sizes are 1 or more"),
    (["explain", "net.py:Net", "--input", "8,1,64,64"], "its first convolution takes 3 channels"),
    (["explain", "resnet18", "--input", "256,4,224,224"], "does not take a tensor of shape [256, 4, 224, 224]"),
    (["explain", "resnet18", "--input", "256x3"], "'256x3' is no shape; write it as 256,3,224,224"),
    (["explain", "resnet18", "--input", ""], "'' is no shape; write it as 256,3,224,224"),
    (["explain", "resnet18", "--input", "99999999999999999999,3,8,8"], "has more elements than a tensor can have"),
    (["explain", "resnet18", "--json", "--markdown"], "argument --markdown: not allowed with argument --json"),
    # data
    ([*OWN, "--data", "imagenet"], "--data 'imagenet' is not a folder, nor a name that --help lists"),
    ([*OWN, "--data", "net.py"], "--data 'net.py' is not a folder, nor a name that --help lists"),
    ([*OWN, "--data", "empty"], "--data 'empty': Couldn't find any class folder"),
    ([*OWN, "--data", "one"], "--data 'one' has one class only, 'cats'"),
    ([*OWN, "--data", "broken", "--batch", "4"], "dark/1.png cannot be read: UnidentifiedImageError"),
    ([*OWN, "--data", ""], "--data '' is not a folder, nor a name that --help lists"),
    ([*OWN, "--data", "half"], "--data 'half': Found no valid file for the classes none"),
    ([*OWN, *TINY, "--image-size", "100000000"], "the images, of 100000000x100000000, do not fit into memory: "),
    ([*OWN, "--batch", "5000"], "--batch 5000 is more than the 1438 images there are to train on"),
    ([*OWN, *TINY, "--batch", "9"], "--batch 9 is more than the 8 images"),
    ([*OWN, "--data", "broken", "--batch", "9"], "--batch 9 is more than the 8 images"),
    ([*OWN, "--batch", "few"], "--batch: 'few' is not a whole number of at least 1"),
    (["compare", "resnet18", *TINY, "--batch", "1"], "of shape [1, 3, 32, 32]: ValueError: Expected more than 1 value"),
    (["compare", "net.py:Square", *TINY], "[4, 3, 32, 32]: AssertionError: Expected 16; another --image-size or"),
    (["compare", "net.py:Dict", *TINY], "it gives a dict of 'out', expected logits: a tensor, the first of a tuple"),
    (["compare", "net.py:Pixels", *TINY], "it gives a tensor of shape [4, 3, 32, 32], expected logits of shape [4, cl"),
    (["compare", "net.py:Families.small", *TINY], "it has 3 classes and the data 10"),
    (["compare", "net.py:Frozen", *TINY], "it has no parameters that need a gradient"),
    (["compare", "net.py:Two", *TINY], "a model is called with the images alone: wrap one that takes more"),
    # how it runs
    ([*OWN, "--device", "gpu"], "--device 'gpu' is not a device; try cpu"),
    ([*OWN, "--device", "xpu"], "--device 'xpu' is not available; here there is cpu"),
    ([*OWN, "--steps", "0"], "--steps: '0' is not a whole number of at least 1"),
    ([*OWN, "--steps", "-3"], "--steps: '-3' is not a whole number of at least 1"),
    ([*OWN, "--seed", "99999999999999999999"], "--seed: '99999999999999999999' is no whole number of 64 bits"),
    ([*OWN, "--dtype", "int8"], "--dtype: 'int8' is none of float32 (fp32), bfloat16 (bf16), float16 (fp16)"),
    ([*OWN, *TINY, "--backend", "triton"], "the triton backend cannot run"),
    ([*OWN, "--backend", "cuda"], "argument --backend: invalid choice: 'cuda'"),
    ([*OWN, *TINY, "--out", "net.py"], "--out 'net.py' cannot be a folder: File exists"),
    # the other commands
    (["demo", "--out", "net.py", "--steps", "1"], "--out 'net.py' cannot be a folder: File exists"),
    (["warm", "resnet18"], "the following arguments are required: --input"),
    (["warm", "resnet18", "--input", "8,3,64,64", "--arch", "7"], "--arch: '7' is not a whole number of at least 75"),
    (["bench", "--level", "network"], "argument --level: invalid choice: 'network'"),
    (["bench", "--dtype", "fp8"], "--dtype: 'fp8' is none of float32 (fp32)"),
    (["bench", "--report", "--out", "empty"], "--report: empty has no results.json"),
    (["bench", "--level", "model", "--model", "resnet81"], "unknown model 'resnet81'; did you mean"),
    (["bench", "--provider", "cudnn"], "unknown provider 'cudnn'; there are eager"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"), MISTAKES, ids=[" ".join(arguments) or "nothing" for arguments, _ in MISTAKES]
)  # fmt: skip
def test_mistakes_are_answered_with_a_line_before_anything_is_printed(
    capsys, here, arguments, words
):
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr()
    *usage, line = said.err.strip().splitlines()
    assert words in line
    assert line.startswith("fusedres")
    assert (status, said.out) == (2, "")
    assert all(each.startswith(("usage:", "  ")) for each in usage)


@pytest.mark.parametrize(
    "command",
    ["bench --report", "bench --provider cudnn", "bench --level model --model resnet81", "bench --compare none.json",
     "compare resnet81", f"compare net.py:Square {' '.join(TINY)}"],
)  # fmt: skip
def test_a_mistake_leaves_no_folder(here, command):
    assert main([*command.split(), "--out", "never"]) == 2
    assert not (here / "never").exists()


def test_a_file_that_is_no_text_has_no_line_to_name(capsys, here):
    assert "None" not in refusal(capsys, "explain", "bytes.py:x")


def test_an_error_is_a_line_of_what_can_be_printed_and_read(capsys, here):
    line = refusal(capsys, "explain", "net.py:coloured")
    assert line.isprintable()
    assert len(line) < 700


def test_an_image_too_large_for_pillow_is_a_line(capsys, here, monkeypatch):
    from PIL import Image

    images(here / "pictures")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    line = refusal(capsys, *OWN, "--data", "pictures", "--batch", "4", "--image-size", "8")
    assert "png cannot be read: DecompressionBombError: " in line


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA"])
def test_images_that_are_not_rgb(here, mode):
    from PIL import Image

    images(here / "rgb")
    for path in (here / "rgb").rglob("*.png"):
        colour = Image.open(path)
        other = here / mode / path.relative_to(here / "rgb")
        other.parent.mkdir(parents=True, exist_ok=True)
        colour.convert(mode).save(other)
        Image.open(other).convert("RGB").save(path)
    as_colours, found = (load_folder(str(here / name), 8, 0, 10) for name in ("rgb", mode))
    assert torch.equal(found.images, as_colours.images)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["dünn 日本", "$\\frac$", "\udcff"])
def test_names_that_nobody_expects(here, monkeypatch, name):
    """On a terminal of ASCII, with warnings as errors."""
    images(here / name)
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    (here / f"{name}.py").write_text(NET)
    arguments = ["--data", name, "--batch", "4", "--steps", "1", "--image-size", "8", "--out", name]
    assert main(["compare", f"{name}.py:Net", "--device", "cpu", *arguments]) == 0
    assert "8 to train on, 2 held out" in terminal.buffer.getvalue().decode("ascii")


def test_modules_of_ones_own_do_not_stand_for_those_that_are_loaded(capsys, here):
    """Beside the file lie a torch.py and a random.py: PyTorch has been loaded when the folder is looked at."""
    for name in ("torch", "random", "json"):
        (here / f"{name}.py").write_text("raise RuntimeError('the wrong one')")
    assert main(["explain", "net.py:Net"]) == 0
    (here / "torch.py").write_text(NET)
    assert main(["explain", "torch.py:Net"]) == 0
    assert sys.modules["torch"] is torch


def test_warm_looks_whether_triton_can_keep_what_is_compiled(capsys, here, monkeypatch):
    knobs = pytest.importorskip("triton.knobs")
    monkeypatch.setattr(knobs.cache, "dir", str(here / "net.py" / "cache"))
    monkeypatch.setattr(dispatch, "INTERPRET", False)
    line = refusal(capsys, "warm", "net.py:Net", "--arch", "90", "--input", "2,3,8,8")
    assert "cannot be written to: Not a directory; set TRITON_CACHE_DIR" in line


def test_a_line_says_where_the_users_code_is_wrong(capsys, here):
    line = refusal(capsys, "explain", "net.py:broken")
    number = NET.splitlines().index('    raise KeyError("weights")') + 1
    assert line.endswith(f"net.py:{number})")


@pytest.mark.parametrize(
    "name", ["net.py:Net", "net:Net", "net.py:MODEL", "net:Families.small", "fusedres.models:resnet20"]
)  # fmt: skip
def test_a_model_of_ones_own(capsys, here, name):
    assert main(["explain", name]) == 0
    assert "fusable" in capsys.readouterr().out or name.startswith("fusedres.")


def test_a_model_of_ones_own_gets_the_classes_of_the_data(here):
    assert build_model("net.py:Net", 5)[-1].out_features == 5
    assert build_model("net.py:Families.small", 5)[-1].out_features == 3


@pytest.mark.parametrize(
    "command", ["explain net.py:Lazy --input 4,3,8,8", f"compare net.py:Lazy {' '.join(TINY)}"]
)
def test_lazy_layers_take_their_shapes_from_the_input(capsys, here, command):
    assert main(command.split()) == 0
    assert re.search(r"1 BatchNorm: 1 fus(able|ed)", capsys.readouterr().out)


def test_what_lies_beside_a_file_is_found_from_anywhere(capsys, here, monkeypatch):
    (here / "sub").mkdir()
    (here / "sub" / "whole.py").write_text("from part import Part\n")
    (here / "sub" / "part.py").write_text(
        NET.replace("class Net(", "class Part(").split("class Square")[0]
    )
    monkeypatch.chdir(here / "empty")
    assert main(["explain", str(here / "sub" / "whole.py:Part")]) == 0


def test_a_folder_of_images(capsys, here):
    images(here / "pictures")
    arguments = ["--data", "pictures", "--batch", "4", "--steps", "1", "--image-size", "8"]
    assert main([*OWN, *arguments]) == 0
    assert "pictures (2 classes), 8 to train on, 2 held out, 8x8" in capsys.readouterr().out
    record = json.loads((here / "out" / "compare-net.py-Net.json").read_text())
    assert record["settings"]["image_size"] == 8
    assert main([*OWN, *arguments, "--images", "5"]) == 0
    assert "pictures (2 classes), 4 to train on, 1 held out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "name"),
    [("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16"), ("torch.bfloat16", "bfloat16"),
     ("float16", "float16")],
)  # fmt: skip
@pytest.mark.parametrize("command", ["compare", "warm --input 1,3,8,8", "bench"])
def test_spellings_of_dtypes(command, given, name):
    command, *more = command.split()
    model = [] if command == "bench" else ["resnet18"]
    found = words_of.parse([command, *model, *more, "--dtype", given]).dtype
    assert found == ([name] if command == "bench" else name)


def test_names_that_the_parser_knows_without_torch_are_those_of_the_library():
    assert words_of.BACKENDS == dispatch.BACKENDS
    assert tuple(words_of.DTYPES) == tuple(DTYPES)


@pytest.mark.parametrize(
    ("name", "size"),
    [("resnet18", 224), ("inception_v3", 299), ("vit_b_16", 224), ("efficientnet_b1", 240), ("timm:resnet50d", 224),
     ("timm:vit_base_patch16_384", 384), ("net.py:Net", 224)],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
def test_the_models_own_image_size(here, name, size):
    with torch.device("meta"):
        assert image_size(name, build_model(name)) == size


def test_a_size_that_a_model_says_is_taken(capsys, here):
    (here / "own.py").write_text(NET + "\nSquare.image_size = 16\n")
    arguments = ["--data", "synthetic", "--images", "4", "--batch", "4", "--steps", "1", "--device", "cpu"]  # fmt: skip
    assert main(["compare", "own.py:Square", *arguments]) == 0
    assert "16x16" in capsys.readouterr().out


# --- Hugging Face's models, of a stand-in for the package -------------------------------------------------------------


class Config:
    image_size = 32

    def __init__(self, num_labels=2):
        self.num_labels = num_labels


class Output(types.SimpleNamespace):
    pass


class HuggingFace(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, config.num_labels)

    def forward(self, pixels):
        return Output(loss=None, logits=self.head(torch.relu(self.norm(pixels)).mean((2, 3))))


@pytest.fixture
def transformers(monkeypatch):
    """The family `resnet`, a text model, and a hub that is out of reach."""

    def unreachable(name, **_):
        raise OSError(f"We couldn't connect to 'https://huggingface.co' to load {name}\nCheck")

    automatic = types.SimpleNamespace(_model_mapping={Config}, from_config=HuggingFace)
    stand_in = types.SimpleNamespace(
        CONFIG_MAPPING={"resnet", "bert"},
        AutoConfig=types.SimpleNamespace(
            for_model=lambda name, **options: Config(**options) if name == "resnet" else object(),
            from_pretrained=unreachable,
        ),
        AutoModelForImageClassification=automatic,
        AutoModel=automatic,
    )
    monkeypatch.setitem(sys.modules, "transformers", stand_in)


def test_a_family_of_hugging_faces(capsys, here, transformers):
    arguments = ["--data", "synthetic", "--images", "4", "--batch", "4", "--steps", "1", "--device", "cpu"]  # fmt: skip
    assert main(["compare", "hf:resnet", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "32x32" in printed
    assert build_model("hf:resnet", 5).head.out_features == 5


@pytest.mark.parametrize(
    ("name", "words"),
    [("hf:microsoft/resnet-50", "its configuration is not to be had: OSError: We couldn't connect"),
     ("hf:bert", "'hf:bert' is not an image classifier")],
)  # fmt: skip
def test_what_hugging_face_does_not_give(capsys, here, transformers, name, words):
    line = refusal(capsys, "compare", name)
    assert words in line
    assert "without a network" in line or name == "hf:bert"


# --- the system -------------------------------------------------------------------------------------------------------


def start(*arguments: str, unbuffered: bool = False, **options) -> subprocess.Popen:
    """The command line in a process of its own, which Ctrl-C reaches (a shell's background job would not be)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        environment = os.environ | {"PYTHONUNBUFFERED": "1" if unbuffered else ""}
        return subprocess.Popen(
            [sys.executable, *arguments],
            text=True,
            stderr=subprocess.PIPE,
            env=environment,
            **options,
        )
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["compare", "--help"], ["explain"]]
)
def test_help_and_mistakes_come_before_pytorch(arguments):
    process = start("-X", "importtime", "-m", "fusedres", *arguments, stdout=subprocess.PIPE)
    said, loaded = process.communicate(timeout=60)
    assert process.returncode == (2 if arguments == ["explain"] else 0)
    assert said.startswith(("usage: fusedres", "fusedres 0")) or arguments == ["explain"]
    names = {
        line.rpartition("|")[2].strip() for line in loaded.splitlines() if "import time" in line
    }
    assert {
        name for name in names if name.split(".")[0] in ("torch", "numpy", "rich", "triton")
    } == set()


def test_the_rest_of_the_package_is_there_when_it_is_asked_for():
    """As a user's own model file would, in the process of the command line."""
    code = """
import sys
sys.argv = ["/usr/bin/fusedres", "--help"]
import fusedres
print("torch" in sys.modules, *(hasattr(fusedres, name) for name in fusedres.__all__))
print("torch" in sys.modules, hasattr(fusedres, "cuda"), hasattr(sys.modules["torch"].ops.fusedres, "batch_norm_act"))
"""
    process = start("-c", code, stdout=subprocess.PIPE)
    said, complaint = process.communicate(timeout=120)
    assert complaint == ""
    assert said.split() == ["False", *["True"] * len(fusedres.__all__), "True", "False", "True"]


def test_ctrl_c_while_it_trains_keeps_what_was_measured(here):
    process = start(
        "-m", "fusedres", "compare", "resnet18", *TINY, "--steps", "100000", stdout=subprocess.PIPE, cwd=here
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("  step "):
            break
    process.send_signal(signal.SIGINT)
    said, complaint = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "time of a step, median" in said
    (line,) = complaint.splitlines()
    record = json.loads((here / "out" / "compare-resnet18.json").read_text())
    done = len(record["differences"])
    assert line.startswith(f"fusedres compare: interrupted after {done} of 100000 steps;")
    assert record["interrupted"]
    assert len(record["original"]["losses"]) == len(record["fused"]["losses"]) == done


@pytest.mark.parametrize(("steps", "kept"), [(0, False), (1, False), (2, True), (5, True)])
def test_ctrl_c_in_the_middle_of_a_step(capsys, here, monkeypatch, steps, kept):
    """Of a step that only one of the two has made, nothing is kept."""
    step, made = Trainee.step, []

    def interrupted(trainee, *arguments):
        if len(made) == steps + 2:  # the first two are made to look whether it can be trained
            raise KeyboardInterrupt
        made.append(step(trainee, *arguments))

    monkeypatch.setattr(Trainee, "step", interrupted)
    assert main(["compare", "net.py:Net", *TINY, "--steps", "4"]) == 130
    said = capsys.readouterr()
    whole = steps // 2
    (line,) = said.err.splitlines()
    assert line.endswith("interrupted") != kept
    assert ("time of a step" in said.out) == kept
    written = here / "out" / "compare-net.py-Net.json"
    assert written.exists() == kept
    if kept:
        record = json.loads(written.read_text())
        kinds = ("losses", "step_seconds")
        counts = {len(record[name][each]) for name in ("original", "fused") for each in kinds}
        assert counts == {whole}


def test_ctrl_c_anywhere_else_is_a_line(capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(fusedres, "explain", interrupt)
    assert main(["explain", "fusedres.models:resnet20"]) == 130
    assert capsys.readouterr().err == "fusedres explain: interrupted\n"


@pytest.mark.parametrize("unbuffered", [False, True], ids=["at the end", "at once"])
def test_a_pipe_that_nobody_reads_ends_it_without_a_word(unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    process = start("-m", "fusedres", "--help", stdout=writing, unbuffered=unbuffered)
    os.close(writing)
    assert (process.communicate(timeout=60)[1], process.returncode) == ("", 141)


@pytest.mark.parametrize(
    ("arguments", "unbuffered"),
    [(["--version"], False), (["--version"], True), (["explain", "net.py:Net"], False)],
)
def test_a_full_disk_is_a_line(here, arguments, unbuffered):
    with open("/dev/full", "w") as full:
        process = start("-m", "fusedres", *arguments, stdout=full, cwd=here, unbuffered=unbuffered)
        (line,) = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 1
    assert line.endswith(": No space left on device")


def test_a_file_that_cannot_be_written_is_a_line(capsys, here):
    (here / "out" / "compare-net.py-Net.json").mkdir(parents=True)
    assert main([*OWN, *TINY, "--steps", "1"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"fusedres compare: {Path('out/compare-net.py-Net.json')}: Is a directory"
    ]


@pytest.mark.parametrize(
    "variables", [{"NO_COLOR": "1"}, {"FORCE_COLOR": "1", "TERM": "xterm-256color"}]
)
def test_in_60_columns_and_without_a_colour(capsys, here, monkeypatch, variables):
    for name, value in ({"COLUMNS": "60"} | variables).items():
        monkeypatch.setenv(name, value)
    assert main([*OWN, *TINY]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines) <= 60
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize(
    ("package", "arguments", "install", "extra"),
    [
        ("torchvision", ["compare", "resnet18"], "torchvision", "models"),
        ("torchvision", ["explain", "resnet18"], "torchvision", "models"),
        ("timm", ["explain", "timm:resnet18"], "timm", "models"),
        ("transformers", ["explain", "hf:resnet"], "transformers", "hf"),
        ("sklearn.datasets", ["compare", "resnet18"], "scikit-learn", "demo"),
        ("matplotlib", ["compare", "resnet18"], "matplotlib", "demo"),
    ],
)
def test_a_missing_package_says_how_to_get_it(
    capsys, tmp_path, monkeypatch, package, arguments, install, extra
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    said = refusal(capsys, *arguments)
    assert (
        f"needs {package.partition('.')[0]}, which is not installed: pip install {install} " in said
    )
    assert f"the extra {extra!r}" in said
    extras = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert f'"{install}"' in extras.split(f"\n{extra} = [")[1].split("]")[0]


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
    rows = [["a", "bb"], ["ccc", "d"]]
    assert table(rows).splitlines() == ["a    bb", "---- ---", "ccc  d"]
    assert table(rows, head=False).splitlines() == ["a    bb", "ccc  d"]


@pytest.mark.parametrize("without", [[], ["rich", "rich.table"]], ids=["rich", "plain"])
def test_at_40_columns_a_row_is_a_paragraph_and_no_word_is_broken(monkeypatch, without):
    for name in without:
        monkeypatch.setitem(sys.modules, name, None)
    rows = [
        ["n", "block", "why", "where"],
        ["12", "BottleneckWithAttention", "", "layer1.0.bn1, layer2.0.bn1, layer2.1"],
    ]
    assert table(rows, width=40).splitlines() == [
        "n      12",
        "block  BottleneckWithAttention",
        "where  layer1.0.bn1, layer2.0.bn1,",
        "       layer2.1",
    ]
    assert (
        len(table(rows, width=60).splitlines()) == 4
    )  # a head, a line of dashes, and a row of two lines


def test_progress_off_a_terminal_is_a_few_lines(capsys):
    progress = Progress(100)
    assert [progress.tell(f"loss {i}") or i for i in progress] == list(range(100))
    lines = capsys.readouterr().out.splitlines()
    assert 5 <= len(lines) <= 8
    assert lines[0] == "  step   1/100  loss 0"
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


# --- demo ------------------------------------------------------------------------------------------------------------


def test_the_demo_shows_each_part_and_says_what_it_comes_to(capsys, tmp_path):
    assert main(["demo", "--steps", "2", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert [line[0] for line in re.findall(r"^\d\. .*$", printed, re.MULTILINE)] == ["1", "2", "3"]
    errors = re.findall(
        r"^(?:output|gradient of|running variance).*? +(\S+) +(\S+)$", printed, re.MULTILINE
    )
    assert [float(kernels) < 1e-5 for _, kernels in errors] == [True] * 5
    last = " ".join(printed.strip().splitlines()[-2:])
    assert re.fullmatch(
        r"20 of 20 BatchNorms fused, losses equal to the bit, \d+\.\d GB less a step of 256 images on a GPU\.", last
    )  # fmt: skip


def test_the_demo_where_there_is_a_gpu(capsys, here, monkeypatch):
    """Of a stand-in: the two parts that work on the GPU run on the CPU, and what the suite would measure is given."""
    from fusedres.benchmarks import run as suite
    from fusedres.benchmarks.record import Row

    def measured(wish, book, say, progress):
        asked.append((wish.levels, wish.models, wish.batch, [each.name for each in wish.providers]))
        step = Row("model", "resnet50", "eager", "time_us", "step", median=54400.0, spread=300.0)
        book.add([step, replace(step, provider="fusedres", graph=True, median=35100.0)])
        book.add([replace(step, provider="compile", median=None, note="failed: no compiler")])
        book.add([Row("model", "resnet50 bfloat16", "", "", note="not run: the budget was over")])
        book.add([Row("state", "after", "driver", "clock_mhz", median=1980.0)])
        return True

    asked, gpu, cpu = [], torch.device("cuda"), torch.device("cpu")
    memory = types.SimpleNamespace(total_memory=3e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    monkeypatch.setattr(demo, "choose_device", lambda name: gpu)
    for module in (compare_command, bench):
        monkeypatch.setattr(module, "choose_device", lambda name: cpu)
    monkeypatch.setattr(
        compare_command, "build_model", lambda _, classes: build_model("net.py:Net", classes)
    )
    monkeypatch.setattr(suite, "run", measured)
    monkeypatch.setattr(training, "_reset_peak", lambda device: 0)
    monkeypatch.setattr(training, "_peak", lambda device: 5 << 20)
    small = ("--image-size", "8", "--images", "16", "--steps", "2")
    monkeypatch.setattr(demo, "ON_A_GPU", (*demo.ON_A_GPU, *small))
    assert main(["demo"]) == 0
    assert asked == [(("model",), ["resnet50"], 8, ["eager", "fusedres", "compile"])]
    printed = capsys.readouterr().out
    parts = re.split(r"^\d\. .*\n=+$", printed, flags=re.MULTILINE)
    assert len(parts) == 4
    assert "bfloat16, channels_last" in parts[1]
    assert re.search("^peak memory beyond weights, data +5 MiB +5 MiB$", parts[1], re.MULTILINE)
    for line in (
        r"eager +54\.4 ms +0\.3 ms",
        r"fusedres \+ CUDA graph +35\.1 ms +0\.3 ms",
        r"compile: failed: no compiler",
        r"resnet50 bfloat16: not run: the budget was over",
    ):
        assert re.search(f"^{line}$", parts[2], re.MULTILINE)
    assert "1980" not in parts[2]
    assert re.search(r"^fused, on a GPU +\d+\.\d GB$", parts[3], re.MULTILINE)
    last = " ".join(printed.split("\n\n")[-1].split())
    assert re.fullmatch(r"1 of 1 BatchNorms fused, losses .*, \d+\.\d GB less a step .*\.", last)
