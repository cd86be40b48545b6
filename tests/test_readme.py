"""What README shows runs."""

import re
from pathlib import Path

import pytest

from fusedres.benchmarks import record
from fusedres.cli.main import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.once
def test_the_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in example.splitlines() if line]) <= 5
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert "1 fused" in capsys.readouterr().out
    assert all(parameter.grad is not None for parameter in names["model"].parameters())


@pytest.mark.once
def test_the_commands_are_ones_that_there_are(capsys):
    commands = re.findall(r"^    python -m fusedres (.*?)(?:\s+#.*)?$", README, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["compare", "env", "explain", "warm"]
    for command in commands:
        with pytest.raises(SystemExit) as stop:
            main([*command.split(), "--help"])
        assert stop.value.code == 0


@pytest.mark.once
def test_the_make_targets_are_ones_that_there_are():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^    make (\S+)", README, re.MULTILINE)
    assert targets == ["demo", "test", "bench"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def newest(level):
    """The newest results with rows of a level: their folder's name, and the rows."""
    for folder in sorted((ROOT / "benchmarks" / "results").iterdir(), reverse=True):
        rows = [r for r in record.latest(record.read(folder / "results.json")) if r.level == level]
        if any(row.median is not None for row in rows):
            return folder.name, rows
    raise AssertionError(level)


TIMES = {
    "bfloat16, channels-last, as a CUDA graph": ("bfloat16", "channels_last", True),
    "bfloat16, channels-last, launched one by one": ("bfloat16", "channels_last", False),
    "bfloat16, contiguous, as a CUDA graph": ("bfloat16", "contiguous", True),
    "float32 (tf32), channels-last, as a CUDA graph": ("float32", "channels_last", True),
}


@pytest.mark.once
@pytest.mark.parametrize("case", TIMES)
def test_the_newest_times_are_the_ones_that_are_shown(case):
    folder, rows = newest("model")
    assert f"(benchmarks/results/{folder}/README.md)" in README
    (line,) = (line for line in README.split("\n") if line.startswith(f"| {case} |"))
    shown = [re.search(r"[\d.]+", cell)[0] for cell in line.split("|")[2:5]]
    measured = {
        row.provider: f"{row.median / 1e3:.1f}"
        for row in rows
        if (row.dtype, row.layout, row.graph) == TIMES[case] and row.median and row.mode == "step"
    }
    assert shown == [measured[provider] for provider in ("eager", "compile", "fusedres")]


@pytest.mark.once
def test_the_newest_bytes_are_the_ones_that_are_shown():
    folder, rows = newest("network")
    assert f"(benchmarks/results/{folder}/README.md)" in README
    shown = re.findall(
        r"^\| (eager|compile|fusedres) \| (.*?) \| (.*?) \| \*?\*?(.*?) GB", README, re.MULTILINE
    )
    measured = {
        (row.provider, row.mode): f"{row.median / 1e9:.1f}" for row in rows if row.metric == "bytes"
    }
    modes = ("forward", "backward", "step")
    assert [(name, *figures) for name, *figures in shown] == [
        (name, *(measured[name, mode] for mode in modes))
        for name in ("eager", "compile", "fusedres")
    ]


@pytest.mark.once
def test_the_extras_are_ones_that_there_are():
    _, options = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")
    extras = re.findall(r"^(\w+) = \[", options, re.MULTILINE)
    named = re.findall(r"'\.\[(\w+)\]'", README)
    assert sorted({*named} - {*extras}) == []
    assert "models" in named
