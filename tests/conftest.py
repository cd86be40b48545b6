"""Options of the tests. `--backend {aten,triton,ptx}` is what they run over, `--share K/N` runs the K-th of N shares,
`--seconds S` stops after so long, `--sample N` takes about every N-th case of each test, `--sample-compiler N` of
those that compile kernels.

`aten` is plain PyTorch. `triton` is the kernels: on the GPU where there is one, else in Triton's interpreter. `ptx`
is what Triton compiles of them for `--arch {80,90}`, run on the CPU (fusedres.benchmarks.ptx): a test fails, too,
where a launch did what a chip must not (a race, an access outside of its tensors). Each test runs under `aten` or
`triton`, and `make test` runs `aten` and samples of the others. Marks say more: `kernels` needs the kernels to run,
`interpreter` reads Triton's interpreter, `machine` shows something only where machine code runs, `cpu` has its tensors
on the CPU, `compiler` needs the kernels not to run, `once` does not depend on the backend, `gpu` needs a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import time
import zlib
from contextlib import ExitStack

import pytest

_START = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", choices=["aten", "triton", "ptx"], default="aten")
    parser.addoption("--arch", type=int, choices=[80, 90], default=90, help="of --backend ptx")
    parser.addoption("--sample", type=int, default=1, help="about every N-th case of each test")
    parser.addoption(
        "--sample-compiler", type=int, default=1, help="the same, of tests that compile"
    )
    parser.addoption("--share", default="1/1", help="run the K-th of N shares of the tests: K/N")
    parser.addoption("--seconds", type=float, help="start no test after so long, and report")


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        "kernels: runs the Triton kernels (under --backend triton and ptx)",
        "interpreter: reads Triton's interpreter (under --backend triton, where there is no GPU)",
        "machine: runs the kernels as machine code (under --backend ptx, and triton where there is a GPU)",
        "cpu: its tensors are on the CPU (under --backend triton where there is no GPU, and ptx)",
        "compiler: compiles the Triton kernels (not in the interpreter: under --backend aten)",
        "once: does not depend on the backend (under --backend aten)",
        "gpu: needs a GPU (under --backend triton, where there is one)",
        "by_size: shapes decide in how many launches a direction is; else tests have three, whose tensors are small",
        "composes(feature, outcome): a row of docs/composability.md; outcome: works, steps aside, refused",
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
    elif config.getoption("--backend") == "ptx":
        os.environ.pop("TRITON_INTERPRET", None)


def pytest_runtest_teardown(item: pytest.Item) -> None:
    limit = item.config.getoption("--seconds")
    if limit is not None and time.monotonic() - _START > limit:
        item.session.shouldstop = f"its {limit:.0f} s were over"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    unwanted = {"kernels", "interpreter", "machine", "cpu"}
    if config.getoption("--backend") != "aten":
        unwanted = {"compiler", "once"}
        if os.environ.get("TRITON_INTERPRET") != "1":  # on a GPU, or compiled code on the CPU
            unwanted.add("interpreter")
            if config.getoption("--backend") != "ptx":
                unwanted.add("cpu")
        else:
            unwanted.add("machine")
    import torch

    if config.getoption("--backend") != "triton" or not torch.cuda.is_available():
        unwanted.add("gpu")
    share, shares = map(int, config.getoption("--share").split("/"))
    wanted = [i for i in items if not unwanted & {mark.name for mark in i.iter_markers()}]
    compiling = [i for i in wanted if i.get_closest_marker("compiler")]
    left_out = set(compiling) - set(_sample(compiling, config.getoption("--sample-compiler")))
    wanted = [i for i in wanted if i not in left_out]
    wanted = _sample(wanted, config.getoption("--sample"))[share - 1 :: shares]
    if len(wanted) < len(items):
        kept = set(wanted)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = wanted


def _sample(items: list[pytest.Item], n: int) -> list[pytest.Item]:
    """Of the cases of each test one in n, and one at least: the same at each run, another for each test."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.split("[")[0], []).append(item)
    kept = {
        case
        for name, all_of_it in cases.items()
        for case in all_of_it[zlib.crc32(name.encode()) % min(n, len(all_of_it)) :: n]
    }
    return [item for item in items if item in kept]


@pytest.fixture(autouse=True)
def backend(request: pytest.FixtureRequest):
    """The backend under test, set for every test and put back after it."""
    import fusedres

    name = request.config.getoption("--backend")
    with ExitStack() as stack:
        stack.enter_context(fusedres.backend("triton" if name == "ptx" else name))
        if importlib.util.find_spec("triton") and not request.node.get_closest_marker("by_size"):
            from fusedres.kernels.launch import passes

            stack.enter_context(passes("three"))
        if name != "aten":  # all kernels are tested, those too that the library is faster than
            from fusedres.ops.projection import in_triton

            stack.enter_context(in_triton())
        if name != "ptx":
            yield name
            return
        from fusedres.benchmarks.ptx import emulated

        with emulated(request.config.getoption("--arch")) as launches:
            request.node.stash[_LAUNCHES] = launches
            yield "triton"


_LAUNCHES = pytest.StashKey[list]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Under --backend ptx, what the launches of a test did wrong is a failure of the test, and told before all else."""
    failure = None
    try:
        result = yield
    except Exception as error:
        failure = error
    wrong = sorted({error for launch in item.stash.get(_LAUNCHES, []) for error in launch.errors})
    if wrong:
        raise AssertionError(
            "the compiled kernels did what they must not:\n" + "\n".join(wrong[:10])
        ) from failure
    if failure is not None:
        raise failure
    return result


@pytest.fixture(autouse=True)
def seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture
def device(request: pytest.FixtureRequest, backend: str):
    """Where the kernels run: the GPU where there is one."""
    import torch

    on_gpu = backend == "triton" and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu and _LAUNCHES not in request.node.stash else "cpu")
