"""The pages: each is in the navigation, each link and each test that they name is there, their code runs."""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path

import pytest

import fusedres

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
# Pages of the repository that are written by hand, the tables of measured results left out.
WRITTEN = [*PAGES, *sorted(ROOT.glob("*.md")), ROOT / "benchmarks" / "README.md"]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
TEST = re.compile(r"(?:tests/)?(test_\w+\.py)(?:::(\w+))?(?:::(\w+))?")


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def nav(entries) -> list[str]:
    """The files of a navigation of mkdocs, which nests."""
    if isinstance(entries, str):
        return [entries]
    values = entries.values() if isinstance(entries, dict) else entries
    return [name for each in values for name in nav(each)]


def test_the_navigation_lists_every_page():
    import yaml

    listed = nav(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub and the site name them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}  # fmt: skip


@pytest.mark.parametrize("page", WRITTEN, ids=named)
def test_every_relative_link_leads_somewhere(page):
    links = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    broken = []
    for link in links:
        target, _, anchor = link.partition("#")
        found = (page.parent / target).resolve() if target else page
        if not found.exists() or (anchor and anchor not in anchors(found)):
            broken.append(link)
    assert broken == []


@functools.cache
def defined(file: str) -> set[str]:
    """The functions and classes of a file of tests; nothing of a file that is not there."""
    path = ROOT / "tests" / file
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return set(re.findall(r"^ *(?:def|class) (\w+)", text, re.MULTILINE))


@pytest.mark.parametrize("page", WRITTEN, ids=named)
def test_every_test_that_is_named_is_there(page):
    missing = [
        "::".join(filter(None, each))
        for each in TEST.findall(page.read_text(encoding="utf-8"))
        if not defined(each[0]) or not set(filter(None, each[1:])) <= defined(each[0])
    ]
    assert missing == []


# Those of CUDA graphs run on a GPU: tests/test_cuda_graphs.py.
BLOCKS = [
    pytest.param(block, id=f"{named(page)}-{k}")
    for page in PAGES
    if page.name != "cuda_graphs.md"
    for k, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_the_code_of_a_page_runs(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "a page", "exec"), {})


def test_every_public_name_is_in_the_reference():
    text = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    shown = {*re.findall(r"^::: fusedres\.(\S+)$", text, re.MULTILINE), *re.findall(r"`(\w+)`", text)}  # fmt: skip
    public = {name for name in fusedres.__all__ if name not in ("functional", "models", "nn")}
    public |= {f"functional.{name}" for name in fusedres.functional.__all__}
    public |= {f"nn.{name}" for name in fusedres.nn.__all__}
    # The functions that build a model stand in a table.
    public |= {
        name if name in shown else f"models.{name}" for name in map(str, fusedres.models.__all__)
    }
    assert public - shown == set()


def test_the_pictures_are_those_of_the_numbers():
    spec = importlib.util.spec_from_file_location("pictures", DOCS / "site" / "pictures.py")
    assert spec is not None
    assert spec.loader is not None
    drawn = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawn)
    assert {path.name: path.read_text() for path in (DOCS / "pictures").iterdir()} == drawn.pictures()  # fmt: skip
