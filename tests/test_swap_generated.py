"""fuse_ of programs that nobody wrote: whatever a block does, and whatever is done to it, it computes what it did.

Each program (`grammar`) is a module with a class Block. Its plain model and the fused copy take the same steps, with
the same changes made to both in between; they share the module, and what it keeps is put back before the other's turn.
"""

from __future__ import annotations

import contextlib
import copy
import linecache
import os
import random
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, note, settings
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

import fusedres

from .grammar import Program, Step, programs

# Relative to the largest value of a tensor, or a thousandth of the largest there is; float64 has seven more digits.
TOLERANCE = 1e-9
# What a program may patch for the whole process.
PATCHED = (
    (F, "relu"), (torch, "relu"), (Tensor, "relu"), (nn.ReLU, "forward"), (nn.modules.batchnorm._BatchNorm, "forward"),
)  # fmt: skip
ENVIRONMENT = "FUSEDRES_GENERATED"
NAME = "generated_block"
_INTERNAL = frozenset(vars(nn.Module())) - {"training"}

# Alike in all but how many programs they look at.
QUICK = settings(
    deadline=None, database=None, print_blob=True, derandomize=True, suppress_health_check=list(HealthCheck)
)  # fmt: skip


@contextlib.contextmanager
def module_of(source: str) -> Iterator[types.ModuleType]:
    """A module with this source, as if it had been imported; all that it can change goes back afterwards."""
    module, filename = types.ModuleType(NAME), f"<{NAME}>"
    before = [vars(owner).get(name) for owner, name in PATCHED]
    sys.modules[NAME] = module
    linecache.cache[filename] = len(source), None, source.splitlines(keepends=True), filename
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are the programs'
            exec(compile(source, filename, "exec", dont_inherit=True), vars(module))
            yield module
    finally:
        torch.set_default_dtype(dtype)
        for (owner, name), value in zip(PATCHED, before, strict=True):
            if value is not None:
                setattr(owner, name, value)
            elif name in vars(owner):
                delattr(owner, name)
        os.environ.pop(ENVIRONMENT, None)
        del sys.modules[NAME], linecache.cache[filename]


def seed(number: int) -> None:
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


def draws() -> tuple:
    """Where the generators stand."""
    kind, keys, *rest = np.random.get_state()
    return bytes(torch.get_rng_state().numpy()), random.getstate(), kind, bytes(keys), *rest


@dataclass
class Outcome:
    """What a call leaves behind: tensors by name, and everything else that can be compared."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, object] = field(default_factory=dict)
    error: Exception | None = None

    def add(self, name: str, value: object) -> None:
        for i, leaf in enumerate(tree_leaves(value)):
            if isinstance(leaf, Tensor):
                self.tensors[f"{name} {i}"] = leaf.detach().clone()
                self.facts[f"{name} {i}"] = leaf.dtype, leaf.shape, leaf.requires_grad
            elif isinstance(leaf, (int, float, str, type(None))):
                self.facts[f"{name} {i}"] = leaf

    def apart(self, other: Outcome) -> list[str]:
        """How that of the fused model differs."""
        if self.error is not None or other.error is not None:
            # Where the plain model's backward misses what was written to, the fused one need not have kept it.
            is_missed = other.error is None and "by an inplace operation" in str(self.error)
            is_same = type(self.error) is type(other.error)
            return [] if is_same or is_missed else [f"{self.error!r} != {other.error!r}"]
        if self.facts != other.facts or self.tensors.keys() != other.tensors.keys():
            names = sorted(self.facts.keys() | other.facts.keys())
            pairs = {n: (self.facts.get(n, "none"), other.facts.get(n, "none")) for n in names}
            return [f"{n}: {a!s:.200} != {b!s:.200}" for n, (a, b) in pairs.items() if a != b]
        largest = max(map(_size, self.tensors.values()), default=0.0)
        found = []
        for name, value in self.tensors.items():
            allowed = TOLERANCE * max(_size(value), 1e-3 * largest, 1e-3)
            if not torch.allclose(value, other.tensors[name], 0, allowed, equal_nan=True):
                found.append(f"{name}: {value} != {other.tensors[name]}")
        return found


def _size(value: Tensor) -> float:
    value = value.double().abs()
    return float(value[value.isfinite()].max()) if value.isfinite().any() else 0.0


def call(module: types.ModuleType, model: nn.Module, step: Step) -> Outcome:
    """Call a model as in training, and backward where the step has one."""
    found = Outcome()
    generator = torch.Generator("cpu").manual_seed(1)
    x = torch.randn(2, 4, 3, 3, generator=generator, device="cpu")
    x = x.to(torch.get_default_device()).requires_grad_(step.grad)
    seed(2)
    try:
        with torch.set_grad_enabled(step.grad):
            # A product keeps the block's input from being a leaf that must not be written to.
            given = x * 1
            output = model(given)
            leaves, structure = tree_flatten(output)
            found.facts["structure"] = str(structure), [leaf is given for leaf in leaves]
            found.add("output", leaves)
            found.add("the input, afterwards", given)
            leaves = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
            for i, leaf in enumerate(leaves):
                (leaf * torch.linspace(-1, 1, leaf.numel()).view_as(leaf)).sum().backward(
                    retain_graph=i + 1 < len(leaves)
                )
    except Exception as error:
        found.error = error.with_traceback(None)
        return found
    found.facts["draws"] = draws()
    found.add("gradient of the input", x.grad)
    found.add("SEEN", module.SEEN)
    found.add("STATE", module.STATE)
    for path, each in model.named_modules():
        for name, value in vars(each).items():
            if name not in _INTERNAL:
                found.add(f"{path}.{name}", value)
    for name, value in model.named_parameters():
        found.add(f"gradient of {name}", value.grad)
    for name, value in model.named_buffers():
        found.add(name, value)
    model.zero_grad()
    return found


@contextlib.contextmanager
def no_visible_effect(module: types.ModuleType, model: nn.Module) -> Iterator[None]:
    """That nothing but the forwards of a model is another afterwards, nor a program's module, nor a generator."""

    def visible() -> dict[object, object]:
        found: dict[object, object] = {"draws": draws(), "state": str((module.SEEN, module.STATE))}
        owners = [module, *(value for value in vars(module).values() if isinstance(value, type))]
        for owner in (*owners, *model.modules()):
            for name, value in vars(owner).items():
                if name not in ("forward", "__prepare_scriptable__") or owner in owners:
                    found[id(owner), name] = id(value)
                if name in _INTERNAL and isinstance(value, dict):
                    found[id(owner), name, "items"] = [(key, id(item)) for key, item in value.items()]  # fmt: skip
        for name, value in model.state_dict(keep_vars=True).items():
            found[name] = value._version, value.requires_grad, value.grad
        return found

    before = visible()
    yield
    after = visible()
    assert {key for key in before.keys() | after if before.get(key) != after.get(key)} == set()


def check(program: Program) -> int:
    """Take a program's steps with its plain model and with a fused copy; how many sites were fused."""
    with module_of(program.source) as module:
        seed(0)
        plain = module.Block()
        for norm in plain.modules():
            if isinstance(norm, nn.BatchNorm2d) and norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.normal_(norm.bias)
        fused = copy.deepcopy(plain)
        with no_visible_effect(module, fused):
            report = fusedres.fuse_(fused)
        note(str(report))
        for number, step in enumerate(program.steps):
            for model in (plain, fused):
                model.train(step.training)
            plain, fused = changed(module, plain, fused, step.flip)
            seen, state = list(module.SEEN), dict(module.STATE)
            expected = call(module, plain, step)
            module.SEEN[:] = seen
            module.STATE.update(state)
            found = call(module, fused, step)
            if apart := expected.apart(found):
                pytest.fail("\n".join([f"step {number}:", str(step), *apart]))
            if expected.error is not None:  # somewhere in between, where the two may differ
                break
            if step.again:
                fusedres.fuse_(fused)
        with no_visible_effect(module, fused):
            str(fusedres.explain(fused))
    return report.n_fused


def changed(
    module: types.ModuleType, plain: nn.Module, fused: nn.Module, flip: str
) -> tuple[nn.Module, nn.Module]:
    """Both models after a change, which may be none that can be made to them."""
    if flip == "COPY":
        with contextlib.suppress(RuntimeError):  # tensors that were kept with their graph
            return copy.deepcopy(plain), copy.deepcopy(fused)
    else:
        for model in (plain, fused) if "model" in flip else (None,):
            seed(3)
            with contextlib.suppress(AttributeError, TypeError, ValueError, LookupError, NameError):
                exec(flip, vars(module), {"model": model} if model else None)
    return plain, fused


@pytest.mark.once
@settings(QUICK, max_examples=100)
@given(programs())
def test_a_program_computes_what_it_did(program):
    note(str(program))
    check(program)


@pytest.mark.slow
@pytest.mark.once
@settings(QUICK, max_examples=2000, derandomize=False)
@given(programs())
def test_many_programs_compute_what_they_did(program):
    """`--hypothesis-seed N` chooses them."""
    note(str(program))
    check(program)


@pytest.mark.kernels
@settings(QUICK, max_examples=10)
@given(program=programs())
def test_a_program_computes_what_it_did_over_the_kernels(program, device):
    note(str(program))
    with torch.device(device):
        check(program)


@pytest.mark.once
def test_of_the_programs_many_are_fused_and_some_are_not():
    fused = []

    @settings(QUICK, max_examples=100, phases=[Phase.generate])
    @given(programs())
    def collect(program):
        with module_of(program.source) as module:
            fused.append(fusedres.fuse_(module.Block()).n_fused > 0)

    collect()
    assert 0.4 < np.mean(fused) < 0.95
