"""Only what pyproject.toml cannot say: kernels/ is installed as fusedres.kernels."""

from setuptools import find_packages, setup

packages = find_packages(include=["fusedres", "fusedres.*"])
kernels = ["fusedres." + name for name in find_packages(include=["kernels", "kernels.*"])]
setup(packages=packages + kernels, package_dir={"fusedres.kernels": "kernels"})
