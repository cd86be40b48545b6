"""Only what pyproject.toml cannot say: kernels/ is installed as fusedres.kernels, benchmarks/ (not ptx/) likewise."""

from setuptools import find_packages, setup

packages = find_packages(include=["fusedres", "fusedres.*"])
beside = find_packages(
    include=["kernels", "kernels.*", "benchmarks", "benchmarks.*"], exclude=["benchmarks.ptx"]
)
setup(
    packages=packages + ["fusedres." + name for name in beside],
    package_dir={"fusedres." + name: name for name in ("kernels", "benchmarks")},
    package_data={"fusedres.benchmarks": ["stub.c"]},
    include_package_data=False,  # else what MANIFEST.in names for the sdist is in the wheel, too
)
