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
    assert "20 fused" in capsys.readouterr().out
    assert all(parameter.grad is not None for parameter in names["model"].parameters())


@pytest.mark.once
def test_the_commands_are_ones_that_there_are(capsys):
    commands = re.findall(r"^    python -m fusedres (.*?)(?:\s+#.*)?$", README, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["env", "explain", "compare"]
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


@pytest.mark.once
def test_the_newest_results_are_the_ones_that_are_shown():
    newest = max(path.name for path in (ROOT / "benchmarks" / "results").iterdir())
    assert f"(benchmarks/results/{newest}/README.md)" in README
    rows = record.latest(record.read(ROOT / "benchmarks" / "results" / newest / "results.json"))
    shown = re.findall(
        r"^\| (eager|compile|fusedres) \| (.*?) \| (.*?) \| \*?\*?(.*?) GB", README, re.MULTILINE
    )
    measured = {
        (row.provider, row.mode): f"{row.median / 1e9:.1f}"
        for row in rows
        if row.level == "network" and row.metric == "bytes"
    }
    modes = ("forward", "backward", "step")
    assert [(name, *figures) for name, *figures in shown] == [
        (name, *(measured[name, mode] for mode in modes))
        for name in ("eager", "compile", "fusedres")
    ]
