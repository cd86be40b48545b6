"""`import fusedres` touches no device, loads nothing optional, and works where Triton is not installed."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.once

WITHOUT_TRITON = "import sys; sys.modules['triton'] = None\n"


def run(code: str, **variables: str) -> str:
    """The output of `code` in a Python of its own, with none of this process's choices."""
    environment = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FUSEDRES_BACKEND")
    }
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:fusedres", "-c", code],
        env=environment | variables, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_adds_only_our_own_light_modules():
    code = """
import sys, json, torch
before = set(sys.modules)
import fusedres
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    added = json.loads(run(code))
    heavy = (
        "triton",
        "torchvision",
        "timm",
        "sklearn",
        "matplotlib",
        "tqdm",
        "numpy.testing",
        "torch._inductor",
    )
    assert [name for name in added if name.startswith(heavy)] == []
    kernels = {name for name in added if name.startswith("fusedres.kernels")}
    light = {"fusedres.kernels", "fusedres.kernels.layout", "fusedres.kernels.dtypes"}
    assert kernels <= light, "the others need Triton"
    assert [name for name in added if name.startswith("fusedres.cli")] == []
    # What torch.fx brings in for the matcher is the bulk; a few hundred would be a framework.
    assert len(added) < 200, added


def test_import_touches_no_device():
    code = """
import torch, fusedres
print(torch.cuda.is_initialized(), torch.get_num_threads() > 0)
"""
    assert run(code).split() == ["False", "True"]


def test_import_registers_the_operators():
    """What a saved program (torch.export) needs in a process that has only imported the package."""
    code = """
import torch, fusedres
for name in ("batch_norm_act", "dual_batch_norm_act", "projection"):
    print(torch.ops.fusedres.__getattr__(name).default)
"""
    assert run(code).split() == [
        f"fusedres.{name}.default"
        for name in ("batch_norm_act", "dual_batch_norm_act", "projection")
    ]


def test_import_and_train_without_triton():
    code = (
        WITHOUT_TRITON
        + """
import torch, fusedres
layer = fusedres.nn.BatchNormAct2d(4)
x = torch.randn(2, 4, 3, 3, requires_grad=True)
y = layer(x, torch.ones_like(x))
y.sum().backward()
print(fusedres.get_backend(), bool((y >= 0).all()), x.grad is not None)
"""
    )
    assert run(code).split() == ["auto", "True", "True"]


def test_asking_for_triton_without_triton_says_so():
    code = (
        WITHOUT_TRITON
        + """
import fusedres
try:
    fusedres.set_backend("triton")
except RuntimeError as error:
    print(error)
print(fusedres.get_backend())
"""
    )
    said = run(code)
    assert "Triton is not installed" in said
    assert said.split()[-1] == "auto"


def test_an_unknown_backend_in_the_environment_is_named():
    code = """
try:
    import fusedres
except ValueError as error:
    print(error)
"""
    assert "FUSEDRES_BACKEND: unknown backend 'cuda'" in run(code, FUSEDRES_BACKEND="cuda")
