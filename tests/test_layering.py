"""Four floors: a file imports only from its own floor and from the floors below it."""

import ast
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parent.parent
# From the bottom up. A name stands for a file or a folder of fusedres/; kernels/ is `kernels`.
FLOORS = (
    ("kernels",),
    (
        "activations",
        "reference",
        "dispatch",
        "checks",
        "layouts",
        "tables",
        "words",
        "fork",
        "ops",
        "projection",
        "functional",
    ),
    ("nn",),
    ("models",),
    ("swap", "cli", "benchmarks", "checkpointing", "memory", "__main__", "__init__"),
)
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}
BESIDE = ("kernels", "benchmarks")  # folders of the repository that are installed inside fusedres
# On one floor, who may not see whom: the swap knows nothing of the command line.
FORBIDDEN = {
    ("swap", "cli"), ("swap", "benchmarks"), ("swap", "__main__"), ("__init__", "cli"), ("__init__", "benchmarks"),
    ("cli", "__main__"), ("benchmarks", "__main__"),
}  # fmt: skip
TORCH_OFF_LIMITS_IN_KERNELS = ("torch.nn", "torch.autograd", "torch.library")


def _files() -> dict[str, Path]:
    """Every module by its dotted name, as installed."""
    found = {}
    for folder in ("fusedres", *BESIDE):
        prefix = "fusedres" if folder == "fusedres" else f"fusedres.{folder}"
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((prefix, *parts))] = path
    return found


def _imports(module: str, source: str) -> set[str]:
    """What a file imports, absolute: `from .a import b` in fusedres.x gives fusedres.a.b."""
    package = module.split(".")[:-1]
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = [*above, *(node.module.split(".") if node.module else [])]
            names |= {".".join((*base, alias.name)) for alias in node.names}
    return names


def _room(dotted: str) -> str:
    """`fusedres.swap.match` lives in `swap`; a name that fusedres itself holds (fuse_) lives in `__init__`."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FLOOR else "__init__"


def _faults(module: str, source: str) -> list[str]:
    room = _room(module)
    faults = []
    for name in sorted(_imports(module, source)):
        top = name.split(".")[0]
        if top == "fusedres":
            seen = _room(name)
            if FLOOR[seen] > FLOOR[room] or (room, seen) in FORBIDDEN:
                faults.append(f"{module} imports {name}: {room} may not see {seen}")
        elif room == "kernels" and (
            top not in {"torch", "triton", *sys.stdlib_module_names}
            or name.startswith(TORCH_OFF_LIMITS_IN_KERNELS)
        ):
            faults.append(
                f"{module} imports {name}: kernels/ knows torch's tensors, triton, stdlib"
            )
    return faults


def test_arrows_point_down():
    files = _files()
    assert len(files) > 30
    assert [f for name, path in files.items() for f in _faults(name, path.read_text())] == []


def test_every_room_has_a_floor():
    rooms = {p.stem for p in (ROOT / "fusedres").iterdir() if p.suffix == ".py" or p.is_dir()}
    assert rooms - {"__pycache__"} <= set(FLOOR), "put the new room on a floor"


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("fusedres.kernels.stats", "import numpy"),
        ("fusedres.kernels.stats", "from torch import nn"),
        ("fusedres.kernels.stats", "import torch.library"),
        ("fusedres.kernels.stats", "from ..dispatch import resolve"),
        ("fusedres.ops.operator", "from .. import nn"),
        ("fusedres.ops.operator", "from fusedres.nn.batch_norm import BatchNormAct2d"),
        ("fusedres.nn.batch_norm", "from ..swap import fuse_"),
        ("fusedres.nn.batch_norm", "import fusedres"),
        ("fusedres.nn.blocks", "from ..models import resnet18"),
        ("fusedres.models.resnet", "from ..swap import fuse_"),
        ("fusedres.swap.match", "from ..cli.main import main"),
        ("fusedres.__init__", "from .cli import main"),
    ],
)
def test_an_arrow_upwards_is_found(module, line):
    assert _faults(module, line)


MOST_ARGUMENTS = 10
MOST_ON_THE_DEVICE = 8
# What stands alone in a kernel, since Triton takes it otherwise in a tuple (kernels/tile.py): floats, and these.
ALONE = {
    "outer", "inner", "spread", "tiles", "tiles_inner", "whole", "programs", "width", "slots", "each", "first",
    "bits_outer", "bits_inner", "bits_piece", "adds", "normalizes", "writes_bits", "writes_residual", "plain", "keep",
}  # fmt: skip


def _faults_of_arguments(module: str, source: str) -> list[str]:
    """Functions with too many arguments."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef):
            continue
        arguments, most = [*node.args.args, *node.args.kwonlyargs], MOST_ARGUMENTS
        if any("jit" in ast.unparse(each) for each in node.decorator_list):
            most = MOST_ON_THE_DEVICE
        if node.name.endswith("_kernel"):
            arguments = [
                each
                for each in arguments
                if each.arg not in ALONE
                and (each.annotation is None or ast.unparse(each.annotation) != "'fp64'")
            ]
        if len(arguments) > most:
            found.append(f"{module}.{node.name}: {len(arguments)}")
    return found


def test_few_arguments_below_the_public_functions():
    """What belongs together travels as one value."""
    checked = ("fusedres.ops.", "fusedres.kernels.", "fusedres.swap.")
    files = {name: path for name, path in _files().items() if name.startswith(checked)}
    assert [f for name, path in files.items() for f in _faults_of_arguments(name, path.read_text())] == []  # fmt: skip


def _defined(decorator: str, name: str, arguments: list[str]) -> str:
    return f"{decorator}\ndef {name}({', '.join(arguments)}): pass"


@pytest.mark.parametrize(
    ("source", "counted"),
    [
        (_defined("", "launch", [f"a{k}" for k in range(11)]), 11),
        (_defined("@triton.jit", "load", [f"a{k}" for k in range(9)]), 9),
        (_defined("@triton.jit", "load", ["tiles", "outer", *(f"a{k}" for k in range(7))]), 9),
        (_defined("@triton.jit(debug=True)", "a_kernel", ["tiles", *(f"a{k}" for k in range(9))]), 9),
        (_defined("@triton.jit", "a_kernel", ["eps: 'fp64'", *(f"a{k}" for k in range(9))]), 9),
    ],
)  # fmt: skip
def test_a_long_list_of_arguments_is_found(source, counted):
    (fault,) = _faults_of_arguments("fusedres.kernels.stats", source)
    assert fault.endswith(f": {counted}")


@pytest.mark.compiler
def test_what_stands_alone_has_to():
    """Each such integer is one that no kernel is compiled for."""
    from fusedres.kernels import finalize, tile

    listed = {*tile.ANY_WHOLE, *tile.ANY_MULTIPLE, *finalize.ANY_SIZE, "first"}
    assert listed == ALONE


def test_no_bare_assert_outside_the_tests():
    asserts = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in _files().values()
        if not path.name.startswith("test_")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert)
    ]
    assert asserts == []
