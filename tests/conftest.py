"""Options of the tests. `--backend {aten,triton}` is what they run over, `--share K/N` runs the K-th of N shares,
`--seconds S` stops after so long.

`aten` is plain PyTorch. `triton` is the kernels: on the GPU where there is one, else in Triton's interpreter. Each test
runs under at least one of the two, and `make test` runs both: a test marked `kernels` needs the kernels to run, one
marked `compiler` needs them not to be interpreted, one marked `once` does not depend on the backend.
"""

from __future__ import annotations

import os
import time

import pytest

_START = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", choices=["aten", "triton"], default="aten")
    parser.addoption("--share", default="1/1", help="run the K-th of N shares of the tests: K/N")
    parser.addoption("--seconds", type=float, help="start no test after so long, and report")


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        "kernels: runs the Triton kernels (under --backend triton)",
        "interpreter: reads Triton's interpreter (under --backend triton, where there is no GPU)",
        "compiler: compiles the Triton kernels (not in the interpreter: under --backend aten)",
        "once: does not depend on the backend (under --backend aten)",
    ):
        config.addinivalue_line("markers", line)
    if config.getoption("--backend") == "triton":
        import torch

        # numpy's words for inf - inf and the like, where the interpreter does what a GPU does silently.
        # Triton 3.6's interpreter reads scalars in a way that numpy has deprecated (and numpy 2.4 refuses).
        config.addinivalue_line(
            "filterwarnings", "ignore:Conversion of an array:DeprecationWarning"
        )
        for text in ("invalid value", "overflow", "divide by zero"):
            config.addinivalue_line("filterwarnings", f"ignore:{text} encountered:RuntimeWarning")
        if not torch.cuda.is_available():
            os.environ["TRITON_INTERPRET"] = "1"


def pytest_runtest_teardown(item: pytest.Item) -> None:
    limit = item.config.getoption("--seconds")
    if limit is not None and time.monotonic() - _START > limit:
        item.session.shouldstop = f"its {limit:.0f} s were over"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    unwanted = {"kernels", "interpreter"}
    if config.getoption("--backend") == "triton":
        unwanted = {"compiler", "once"}
        if os.environ.get("TRITON_INTERPRET") != "1":  # on a GPU
            unwanted.add("interpreter")
    share, shares = map(int, config.getoption("--share").split("/"))
    wanted = [i for i in items if not unwanted & {mark.name for mark in i.iter_markers()}]
    wanted = wanted[share - 1 :: shares]
    if len(wanted) < len(items):
        kept = set(wanted)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = wanted


@pytest.fixture(autouse=True)
def backend(request: pytest.FixtureRequest):
    """The backend under test, set for every test and put back after it."""
    import fusedres

    name = request.config.getoption("--backend")
    with fusedres.backend(name):
        yield name


@pytest.fixture(autouse=True)
def seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture
def device(backend: str):
    """Where the kernels run: the GPU where there is one."""
    import torch

    return torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")
