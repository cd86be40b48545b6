"""The suite from outside: its cases are those of the real networks, its clock and command line do what they say."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

import fusedres
from fusedres.benchmarks import cases, code, run, timing
from fusedres.benchmarks.timing import Effort, Step
from fusedres.benchmarks.workload import Setting, Workload
from fusedres.cli.bench import LEVELS
from fusedres.cli.main import main

pytestmark = pytest.mark.once

CPU = torch.device("cpu")
GPU_SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu.sh"


# --- cases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_table_of_shapes_is_that_of_torchvision(name):
    """What follows each BatchNorm is read off the swap's own report: the last one of a block has the add."""
    with torch.device("meta"):
        network = cases.build_model(name)
    found: dict[str, set] = {"bn": set(), "bn_relu": set(), "bn_add_relu": set()}
    last = "bn3" if name == "resnet50" else "bn2"

    def note(module: nn.Module, inputs, output, *, path: str) -> None:
        leaf = path.rpartition(".")[2]
        kind = "bn" if "downsample" in path else "bn_add_relu" if leaf == last else "bn_relu"
        found[kind].add((output.shape[1], output.shape[2]))

    for path, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda m, i, o, path=path: note(m, i, o, path=path))
    network(torch.empty(1, 3, 224, 224, device="meta"))
    table = {"resnet18": cases.RESNET18, "resnet50": cases.RESNET50}[name]
    assert {kind: set(shapes) for kind, shapes in table.items()} == found


def test_the_operator_level_is_every_shape_at_both_batches_and_the_grid():
    shapes = {(case.kernel, case.shape) for case in cases.operators((32, 256), grid=True)}
    for batch in (32, 256):
        for network in (cases.RESNET18, cases.RESNET50):
            for kernel, places in network.items():
                assert {(kernel, (batch, c, h, h)) for c, h in places} <= shapes
    grid = {(32, c, h, h) for h in (1, 7, 8, 14, 28, 56, 112) for c in (16, 64, 256, 2048)}
    assert grid <= {shape for kernel, shape in shapes if kernel == "bn_add_relu"}


@pytest.mark.parametrize("case", cases.blocks(1), ids=lambda case: case.kernel)
def test_blocks_take_their_inputs(case):
    with torch.device("meta"):
        output = case.build()(torch.empty(case.shape))
    assert (output.shape[2] < case.shape[2]) == ("projected" in case.kernel)


def test_models_are_those_of_the_contract():
    expected = {
        "resnet18", "resnet50", "resnet152", "wide_resnet50_2", "resnext50_32x4d", "timm:resnet50d", "cifar_resnet18",
    }  # fmt: skip
    assert {case.kernel for case in cases.models(2, 224)} == expected


def test_inputs_are_never_zeros_and_differ_from_set_to_set():
    workload = Workload(
        cases.operator("bn_add_relu", (2, 4, 6, 6)), Setting(CPU, torch.bfloat16, torch.channels_last)
    )  # fmt: skip
    first, second = workload.inputs(0)[0], workload.inputs(1)[0]
    assert first.is_contiguous(memory_format=torch.channels_last)
    assert first.dtype == torch.bfloat16
    assert not torch.equal(first, second)
    assert (first != 0).float().mean() > 0.99
    assert workload.inputs(workload.rotation)[0] is first


def test_a_rotation_is_larger_than_the_cache_or_says_that_it_is_not():
    cache = timing.last_level_cache(CPU)
    setting = Setting(CPU, torch.float32, torch.contiguous_format)
    large = Workload(cases.operator("bn", (1, 1, 1024, cache // 4096)), setting)
    small = Workload(cases.operator("bn", (2, 4, 6, 6)), setting)
    assert (large.rotation, large.fits_in_cache) == (2, False)
    assert small.fits_in_cache


# --- the clock -------------------------------------------------------------------------------------------------------


def test_steps_take_turns_with_the_warm_up_of_each_round_first():
    order: list[str] = []
    steps = {name: Step(lambda i, name=name: order.append(f"{name}{i}")) for name in "ab"}
    effort = Effort(seconds=0.0, repetitions=2, warm_up=1, most=2)
    timings = timing.time_steps(steps, CPU, effort, rounds=2)
    assert order == ["a0", "a0", "a1", "b0", "b0", "b1"] * 2
    assert [timings[name].count for name in "ab"] == [4, 4]


def test_what_is_prepared_and_what_comes_between_is_outside_the_clock(monkeypatch):
    now = iter(range(10**6))
    clock = {"t": 0.0}
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock["t"] + 0 * next(now))

    def spend(seconds: float) -> None:
        clock["t"] += seconds

    step = Step(lambda i: spend(1.0), lambda i: spend(100.0))
    found = timing.time_steps({"a": step}, CPU, Effort(0.0, 3, 1, 3), lambda: spend(1000.0))["a"]
    assert (found.median, found.p20, found.p80, found.spread) == (1.0, 1.0, 1.0, timing.HOST_FLOOR)


def test_a_step_that_raises_does_not_stop_the_others():
    def fail(i):
        raise ValueError("planted")

    found = timing.time_steps({"a": Step(fail), "b": Step(lambda i: i)}, CPU, Effort(0.0, 1, 0, 1))
    assert isinstance(found["a"], ValueError)
    assert found["b"].count == timing.ROUNDS


# --- the command -----------------------------------------------------------------------------------------------------


def bench(*arguments: str) -> int:
    return main(["bench", "--device", "cpu", *arguments])


TINY = ["--level", "operator", "--quick", "--batch", "1", "--dtype", "float32", "--provider", "fusedres"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("bench")
    assert bench(*TINY, "--out", str(made)) == 0
    return made


def test_bench_writes_rows_and_page(folder):
    rows = json.loads((folder / "results.json").read_text())
    assert {row["provider"] for row in rows} == {"eager", "fusedres", "copy"}
    assert {row["mode"] for row in rows} == {"forward", "backward", "step"}
    assert all(row["device"] and row["versions"] and row["date"] for row in rows)
    assert {"README.md", "results.csv"} <= {path.name for path in folder.iterdir()}


def test_bench_appends(folder, tmp_path, capsys):
    copy = tmp_path / "again"
    shutil.copytree(folder, copy)
    before = json.loads((copy / "results.json").read_text())
    assert bench(*TINY, "--out", str(copy), "--compare", str(folder / "results.json")) == 0
    assert json.loads((copy / "results.json").read_text())[: len(before)] == before
    said = capsys.readouterr().out
    assert f"since {folder / 'results.json'}:" in said
    assert "slower or larger:" in said


def test_a_comparison_names_what_got_slower(folder, tmp_path, capsys):
    rows = json.loads((folder / "results.json").read_text())
    new = [row | {"spread": 0.0} for row in rows]
    old = [row | {"median": row["median"] / 2} for row in new]
    (tmp_path / "results.json").write_text(json.dumps(new))
    (tmp_path / "old.json").write_text(json.dumps(old))
    arguments = ["--report", "--out", str(tmp_path), "--compare", str(tmp_path / "old.json")]
    assert bench(*arguments) == 0
    said = capsys.readouterr().out
    assert "slower or larger: 9, better: 0, no difference: 0" in said
    assert "operator, bn_add_relu, fusedres, forward, N1-C64-H56-W56" in said


def test_the_budget_names_what_was_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run.time, "monotonic", iter(range(0, 10**9, 10**6)).__next__)
    assert bench("--level", "code", "--quick", "--budget", "1", "--out", str(tmp_path)) == 0
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["note"] for row in rows] == ["not run: the budget of 1 s was over"] * 4
    assert "not run: the budget of 1 s was over" in (tmp_path / "README.md").read_text()


def test_a_level_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def fail(target):
        raise ValueError("planted")

    monkeypatch.setattr(code, "compile_target", fail)
    assert bench("--level", "code", "--quick", "--out", str(tmp_path)) == 0
    assert "failed: ValueError: planted" in (tmp_path / "README.md").read_text()


def test_levels_of_the_command_are_those_of_the_suite():
    assert set(LEVELS) == set(run.LEVELS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--level", "kernel"], "invalid choice: 'kernel'"),
        (["--compare", "none.json"], "there is no none.json"),
        (["--report"], "--report: out/bench has no results.json"),
        (["--out", "taken"], "'taken' cannot be a folder: File exists"),
        (["--provider", "tensorflow"], "unknown provider 'tensorflow'; there are eager, eager, in place"),
        (["--level", "model", "--model", "resnet19"], "unknown model 'resnet19'"),
        (["--budget", "0"], "'0' is not a whole number of at least 1"),
        (["--device", "gpu"], "--device 'gpu' is not a device"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_mistakes_are_answered_before_anything_is_measured(
    capsys, tmp_path, monkeypatch, arguments, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("")
    monkeypatch.setattr(run, "run", lambda *arguments: pytest.fail("it measured"))
    try:
        status = main(["bench", *arguments])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert words in capsys.readouterr().err


def test_bench_leaves_the_backend_as_it_was(folder):
    assert fusedres.get_backend() == "aten"


# --- the script for a GPU --------------------------------------------------------------------------------------------


def test_the_gpu_script_says_how_it_is_used_and_what_is_missing(tmp_path):
    bash = shutil.which("bash")
    assert subprocess.run([bash, "-n", GPU_SCRIPT]).returncode == 0
    usage = subprocess.run([bash, GPU_SCRIPT], capture_output=True, text=True)
    assert (usage.returncode, usage.stderr) == (2, "usage: benchmarks/gpu.sh OUTDIR\n")
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": "/nowhere/python"}
    none = subprocess.run([bash, GPU_SCRIPT, tmp_path], capture_output=True, text=True, env=environment)  # fmt: skip
    assert none.returncode == 1
    assert "cannot import torch and fusedres, or torch sees no GPU" in none.stderr


def test_what_was_measured_before_an_interrupt_is_kept(tmp_path, monkeypatch, capsys):
    compiled = []

    def interrupt_the_second(target):
        compiled.append(target)
        if len(compiled) == 2:
            raise KeyboardInterrupt
        return []

    monkeypatch.setattr(code, "compile_target", interrupt_the_second)
    assert bench("--level", "code", "--quick", "--out", str(tmp_path)) == 130
    assert "stopped at code: sm_90" in capsys.readouterr().out
    assert "stopped from outside" in (tmp_path / "README.md").read_text()


def test_an_interpreter_that_was_left_on_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fusedres.dispatch, "INTERPRET", True)
    assert bench("--out", str(tmp_path)) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
