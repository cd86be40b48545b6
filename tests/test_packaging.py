"""A wheel, installed in an environment of its own, seen from outside the checkout."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import fusedres

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tracked() -> list[str]:
    names = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
    return [name for name in names if name and (ROOT / name).is_file()]


def copied(folder: Path) -> Path:
    """The tracked files alone: what the checkout has lying about must not get in, nor be touched."""
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def wheel(copy: Path) -> Path:
    run(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index",
        "--wheel-dir", copy / "dist", copy, cwd=copy,
    )  # fmt: skip
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment that holds the wheel, and borrows torch from this one.

    Torch comes by a line in a .pth file: that adds this environment's folder to the path but runs none of its own .pth
    files, so an editable install of fusedres is not seen.
    """
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment)
    new = environment / "bin" / "python"
    run(
        sys.executable, "-m", "pip", "--python", new, "install", "--no-deps", "--no-index", wheel,
        cwd=environment,
    )  # fmt: skip
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    return new


def test_the_wheel_holds_every_tracked_module(wheel):
    expected = {
        name if name.startswith("fusedres/") else f"fusedres/{name}"
        for name in tracked()
        if name.startswith(("fusedres/", "kernels/", "benchmarks/"))
        and name.endswith((".py", ".typed", ".c"))
        and not name.startswith("benchmarks/ptx/")  # an instrument: it needs gcc and a checkout
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == expected
    assert any(name.startswith("fusedres/kernels/") for name in held)


def test_the_only_top_level_name_is_fusedres(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (top,) = (name for name in archive.namelist() if name.endswith("/top_level.txt"))
        assert archive.read(top).decode().split() == ["fusedres"]


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        return archive.read(name).decode()


def test_the_wheel_states_its_licence_and_needs_only_torch_and_triton(metadata):
    lines = metadata.splitlines()
    assert "License-Expression: MIT" in lines
    needs = [line for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert [line.split()[1].split(">")[0] for line in needs] == ["torch", "triton"]
    assert 'platform_system == "Linux"' in needs[1]


def test_the_source_distribution_holds_what_is_tracked(copy):
    """All but what a repository's host alone reads: its tests and its `make` run as those of a checkout do."""
    build = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    run(sys.executable, "-c", build, cwd=copy)
    (built,) = (copy / "dist").glob("*.tar.gz")
    with tarfile.open(built) as archive:
        held = {member.name.partition("/")[2] for member in archive if member.isfile()}
    made = {"PKG-INFO", "setup.cfg"}
    of_the_host = {name for name in tracked() if name.startswith((".git", ".ci/"))}
    ours = {name for name in held - made if ".egg-info/" not in name}
    assert ours == set(tracked()) - of_the_host


def addresses(metadata: str) -> dict[str, str]:
    return dict(re.findall(r"^Project-URL: (\w+), (\S+)$", metadata, re.MULTILINE))


def test_the_metadata_name_the_project_s_addresses(metadata):
    assert list(addresses(metadata)) == ["Source", "Documentation", "Changelog", "Issues"]


LINK = re.compile(r"(?<=\]\()[^)\s]+")


def test_on_an_index_readme_reads_as_here_and_every_link_of_it_is_absolute(metadata):
    """They are held together link by link: a page by `blob`, a picture by `raw`, both of this version's tag."""
    headers, _, shown = metadata.partition("\n\n")
    version = f"{addresses(metadata)['Source']}/{{}}/v{fusedres.__version__}/"
    wanted = [
        link if re.match(r"#|\w+:", link)
        else version.format("raw" if link.endswith(".png") else "blob") + link
        for link in LINK.findall(README)
    ]  # fmt: skip
    assert "Description-Content-Type: text/markdown" in headers
    assert LINK.findall(shown) == wanted
    assert LINK.sub("", shown).strip() == LINK.sub("", README).strip()


def test_kernels_come_with_it_and_run_nowhere_else(python, tmp_path):
    code = """
import fusedres, fusedres.kernels, fusedres.kernels.stats, sys
print(fusedres.__file__, fusedres.kernels.__file__, sep="\\n")
try:
    import kernels
except ModuleNotFoundError:
    print("no top-level kernels")
"""
    package, kernels, said = run(python, "-c", code, cwd=tmp_path).splitlines()
    home = python.parent.parent
    assert Path(package).is_relative_to(home)
    assert Path(kernels) == Path(package).parent / "kernels" / "__init__.py"
    assert said == "no top-level kernels"


def test_in_the_checkout_its_own_kernels_are_found_before_those_of_the_wheel(python, copy):
    """As after README's `pip install .`, of a Python that is started there: its folder stands first on the path."""
    code = "import fusedres.benchmarks.floors, fusedres.kernels; print(fusedres.kernels.__file__)"
    assert run(python, "-c", code, cwd=copy).strip() == str(copy / "kernels" / "__init__.py")


def test_the_command_line_runs_from_the_wheel(python, tmp_path):
    assert "fusedres" in run(python, "-m", "fusedres", "env", cwd=tmp_path)


def test_the_script_fusedres_answers_before_pytorch_is_loaded(python, tmp_path):
    """Seen from what is left when PyTorch cannot be imported at all."""
    (tmp_path / "torch.py").write_text("raise SystemExit('PyTorch is imported')")
    done = subprocess.run(
        [python.parent / "fusedres", "--version"],
        cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == (f"fusedres {fusedres.__version__}\n", "")


def test_in_the_checkout_the_folder_refuses_the_short_name():
    done = subprocess.run(
        [sys.executable, "-c", "import kernels"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert "'kernels' is fusedres.kernels" in done.stderr


def test_what_readme_shows_needs_nothing_but_the_package(python, tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    nothing_else = (
        "import sys\nsys.modules.update(dict.fromkeys(('torchvision', 'timm', 'numpy')))\n"
    )
    assert "1 fused" in run(python, "-W", "ignore", "-c", nothing_else + example, cwd=tmp_path)


# Of README's commands those that a test cannot run as they are written, and why: what is added to them (the last
# of an option twice counts), or for `make` that it only says what it would run.
SHORTER = {
    "compare": [
        "--batch",
        "2",
        "--images",
        "2",
        "--steps",
        "1",
    ],  # written for a GPU: hours on a CPU
    "warm": [] if torch.cuda.is_available() else ["--arch", "90"],  # there is no GPU to ask
    "test": ["--dry-run"],  # this one is of it
    "bench": ["--dry-run"],  # an hour
}
WORDS = {
    "demo": "BatchNorms fused",
    "compare": "time",
    "env": "backend",
    "explain": "moves",
    "warm": "kernels",
}


@pytest.mark.slow
@pytest.mark.timeout(1800)  # several minutes on two idle cores
def test_readme_from_top_to_bottom_in_a_clean_environment(tmp_path):
    """Every block in its order, in a copy of the repository that has an environment of its own with nothing in it.

    Downloads are borrowed: what `pip install` would fetch is found in this environment's folder (the line in a .pth
    file, as above), and `make` is told that it has installed its own.
    """
    copied(tmp_path)
    run(sys.executable, "-m", "venv", tmp_path / ".venv", cwd=tmp_path)
    (site,) = tmp_path.glob(".venv/lib/python*/site-packages")
    (site / "borrowed.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
    for old in site.glob("setuptools*"):  # what came with Python: a build would fetch a newer one
        shutil.rmtree(old)
    for target in ("ready", "demo-ready"):
        (tmp_path / ".venv" / target).touch()
    environment = os.environ | {
        "PATH": f"{tmp_path / '.venv' / 'bin'}:{os.environ['PATH']}",
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads it the other way round
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
        "PYTHONWARNINGS": "ignore",
    }
    blocks = re.findall(
        r"^    ((?:pip|make|python) [^\n]*?)(?: +#[^\n]*)?$|^```python\n(.*?)```",
        README,
        re.M | re.S,
    )
    assert len(blocks) > 10
    for command, example in blocks:
        words = shlex.split(command) or ["python", "-c", example]
        name = words[3 if words[1] == "-m" else 1]
        done = subprocess.run(
            [*words, *SHORTER.get(name, [])], cwd=tmp_path, env=environment, text=True, capture_output=True
        )  # fmt: skip
        assert done.returncode == 0, f"{command or example}\n{done.stdout}{done.stderr}"
        assert WORDS.get(name, "") in done.stdout
