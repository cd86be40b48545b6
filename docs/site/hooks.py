"""Links of the pages, which are written so that they work in the repository, as links of the site.

What the site shows besides docs/ (results of benchmarks with their pictures, CONTRIBUTING.md, ...) is a page or a file
of it; a link to anything else in the repository goes to the repository's own address. A link to nothing is left as it
is, and fails the build. The recipes are the files of examples/ that docs/experiments.md does not name, with their code.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
# Files of the repository that are shown, and under which names.
SHOWN = (
    "benchmarks/README.md",
    "benchmarks/results/*/*.md",
    "benchmarks/results/*/*.png",
    "examples/results/*.png",
)
RENAMED = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
}
_LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#:]+)(#[^)\s]*)?(\))")


_EXAMPLES = "<!-- every file of examples/ that is no experiment -->"


def on_files(files: Files, config: Any) -> Files:
    """The pages and pictures that stand elsewhere in the repository; they are in nobody's navigation."""
    for path in (path for pattern in SHOWN for path in sorted(ROOT.glob(pattern))):
        name = path.relative_to(ROOT).as_posix()
        file = File.generated(config, name, abs_src_path=str(path))
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Every relative link, from where the page stands in the repository to where its target is on the site."""
    here = page.file.src_uri
    markdown = markdown.replace(_EXAMPLES, _recipes())
    in_docs = (ROOT / "docs" / here).is_file()
    folder = posixpath.dirname(f"docs/{here}" if in_docs else here)
    # A page that includes a file of the root has that file's links.
    for name, uri in RENAMED.items():
        if uri == here and f'--8<-- "{name}"' in markdown:
            markdown, folder = (ROOT / name).read_text(encoding="utf-8"), ""

    def moved(link: re.Match[str]) -> str:
        opening, target, anchor, closing = link.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        uri = RENAMED.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(uri) is not None:
            found = posixpath.relpath(uri, posixpath.dirname(here) or ".")
        elif (ROOT / path).exists():
            found = f"{config.repo_url.rstrip('/')}/blob/main/{path}"
        else:
            found = target
        return f"{opening}{found}{anchor or ''}{closing}"

    return _LINK.sub(moved, markdown)


def _recipes() -> str:
    """What each recipe is, by its docstring, and its code."""
    experiments = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    parts = []
    for path in sorted((ROOT / "examples").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        source = path.read_text(encoding="utf-8")
        says = ast.get_docstring(ast.parse(source))
        if path.name == "common.py" or name in experiments or says is None:
            continue
        code = "".join(
            f"    {line}" if line.strip() else "\n" for line in source.splitlines(keepends=True)
        )
        parts.append(
            f'## {name}\n\n{says}\n\n??? example "The code"\n\n    ```python\n{code}    ```\n'
        )
    return "\n".join(parts)
