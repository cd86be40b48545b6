"""Only what pyproject.toml cannot say: kernels/ is installed as fusedres.kernels, benchmarks/ (not ptx/) likewise; and
README as a package index shows it, where a relative link leads nowhere."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def description() -> str:
    """README with its links made absolute: to this version's tag, at the address that pyproject.toml names."""
    (address,) = re.findall(r'^Source = "(.*)"$', read("pyproject.toml"), re.MULTILINE)
    (version,) = re.findall(r'^__version__ = "(.*)"$', read("fusedres/__init__.py"), re.MULTILINE)

    def absolute(link: re.Match) -> str:
        mark, text, target = link.groups()
        form = "raw" if mark else "blob"  # of a picture the bytes, of a page what the host shows
        return f"{mark}[{text}]({address}/{form}/v{version}/{target})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?!#|\w+:)([^)\s]+)\)", absolute, read("README.md"))


packages = find_packages(include=["fusedres", "fusedres.*"])
beside = find_packages(
    include=["kernels", "kernels.*", "benchmarks", "benchmarks.*"], exclude=["benchmarks.ptx"]
)
setup(
    packages=packages + ["fusedres." + name for name in beside],
    package_dir={"fusedres." + name: name for name in ("kernels", "benchmarks")},
    package_data={"fusedres.benchmarks": ["stub.c"]},
    long_description=description(),
    long_description_content_type="text/markdown",
    include_package_data=False,  # else what MANIFEST.in names for the sdist is in the wheel, too
)
