"""What a repository's host and an index read: valid, and of one mind with the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fusedres

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parent.parent
FORMS = sorted((ROOT / ".github").rglob("*.yml"))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_workflows_and_forms_are_yaml_with_what_they_must_have(path):
    import yaml

    found = yaml.safe_load(path.read_text())
    keys = {"workflows": {"name", "jobs"}, "ISSUE_TEMPLATE": {"name", "description", "body"}}
    wanted = {"blank_issues_enabled"} if path.name == "config.yml" else keys[path.parent.name]
    assert wanted <= set(found)


def test_a_workflow_makes_targets_that_there_are():
    made = set(re.findall(r"make ([\w-]+)", read(".github/workflows/ci.yml"))) - {"test-"}
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE))
    assert made <= targets
    assert {"test-aten", "test-triton", "docs", "types"} <= targets


def test_every_form_asks_for_the_environment_in_words_of_the_command_line():
    forms = [path for path in FORMS if path.parent.name == "ISSUE_TEMPLATE" and path.name != "config.yml"]  # fmt: skip
    assert [path.name for path in forms if "`python -m fusedres env`" not in path.read_text()] == []


def test_every_python_of_the_classifiers_is_tested():
    classified = re.findall(r"Python :: (3\.\d+)", read("pyproject.toml"))
    (matrix,) = re.findall(r"python: \[(.*)\]", read(".github/workflows/ci.yml"))
    assert re.findall(r"3\.\d+", matrix) == classified


def test_the_linter_is_one_version():
    (pinned,) = re.findall(r"^ruff==(.*)$", read("constraints.txt"), re.MULTILINE)
    assert f"rev: v{pinned}\n" in read(".pre-commit-config.yaml")


@pytest.mark.parametrize("name", ["mkdocs.yml", "CITATION.cff"])
def test_the_address_is_that_of_the_metadata(name):
    (source,) = re.findall(r'^Source = "(.*)"$', read("pyproject.toml"), re.MULTILINE)
    (found,) = re.findall(r"^rep\w+[-_](?:url|code): (\S+)", read(name), re.MULTILINE)
    assert found == source


def test_the_version_is_the_newest_of_the_changelog_and_that_of_the_citation():
    newest = re.findall(r"^## (\S+)", read("CHANGELOG.md"), re.MULTILINE)[0]
    (cited,) = re.findall(r"^version: (\S+)$", read("CITATION.cff"), re.MULTILINE)
    assert (newest, cited) == (fusedres.__version__, fusedres.__version__)
