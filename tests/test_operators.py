"""The contract with PyTorch: opcheck, fakes, torch.compile, what is saved for backward."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from fusedres.functional import batch_norm_act
from fusedres.ops import batch_norm_act as single

from .helpers import Case, force_int64, lay_out, over_budget, run, without_plans


def samples(device):
    for layout in ("contiguous", "channels_last", "transposed"):
        for dtype in (torch.float32, torch.bfloat16):
            for training in (True, False):
                case = Case(
                    shape=(2, 5, 4, 6), dtype=dtype, layout=layout, training=training, device=device
                )
                t = case.tensors
                yield (
                    t["input"], t["residual"], t["weight"], t["bias"], t["running_mean"], t["running_var"],
                    training, 0.1, 1e-5, "relu", True,
                )  # fmt: skip


def test_opcheck_forward(device):
    for arguments in samples(device):
        torch.library.opcheck(single.FORWARD.op, arguments)


def test_opcheck_backward(device):
    for arguments in samples(device):
        input, _, weight, _, *_ = arguments
        _, saved, bits = single.FORWARD.op(*arguments)
        torch.library.opcheck(
            single.BACKWARD.op,
            (
                torch.randn_like(input), input, weight, saved, bits, arguments[6], "relu",
                torch.float32, True, True, True, torch.float32,
            ),
        )  # fmt: skip
        torch.library.opcheck(single.gradient_mask.op, (input, weight, saved, bits, "relu"))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [6, 16, 64, 70])
def test_bits_are_the_same_from_both_implementations(layout, channels, device):
    case = Case(shape=(3, channels, 3, 5), layout=layout, device=device)
    t = case.tensors
    arguments = (
        t["input"],
        t["residual"],
        t["weight"],
        t["bias"],
        None,
        None,
        True,
        0.1,
        1e-5,
        "relu",
        True,
    )
    _, saved, bits = single.FORWARD.op(*arguments)
    _, saved_aten, bits_aten = single.plain_forward(*single.FORWARD.grouped(arguments))
    assert torch.equal(bits, bits_aten)
    torch.testing.assert_close(saved, saved_aten)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, while it compiles
def test_compile_fullgraph(training, layout, device):
    """The compiled function keeps the budget, forward, backward and buffers."""
    case = Case(shape=(3, 5, 4, 6), layout=layout, training=training, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(batch_norm_act, fullgraph=True, backend="aot_eager")
    assert over_budget(case, run(case, compiled)) == {}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, while it compiles
def test_compile_dynamic_shapes_once(device):
    torch._dynamo.reset()
    compiled = torch.compile(batch_norm_act, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in [(3, 5, 4, 6), (4, 5, 8, 7), (7, 5, 9, 2)]:
            results = run(Case(shape=shape, device=device), compiled)
    assert over_budget(Case(shape=(7, 5, 9, 2), device=device), results) == {}


@pytest.mark.parametrize("residual", [True, False], ids=["add", "plain"])
def test_no_more_is_saved_than_by_the_plain_composition(residual, device):
    """Bytes of distinct storages that autograd keeps for the backward, per-channel vectors left out."""
    case = Case(shape=(4, 16, 16, 16), residual=residual, device=device)
    from fusedres import reference

    def kept(function):
        storages = {}

        def pack(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with saved_tensors_hooks(pack, lambda t: t):
            x, r = (
                None if case.tensors[n] is None else case.tensors[n].detach().requires_grad_()
                for n in ("input", "residual")
            )
            function(x, None, None, training=True, residual=r)
        return sum(size for size in storages.values() if size > 2048)

    assert kept(batch_norm_act) <= kept(
        lambda *a, **k: reference.batch_norm_act(*a, **k, weight=None)
    )


def test_a_tail_keeps_one_bit_an_element(device):
    t = Case(shape=(4, 64, 8, 8), layout="channels_last", device=device).tensors
    _, _, bits = single.FORWARD.op(
        t["input"], t["residual"], None, None, None, None, True, 0.1, 1e-5, "relu", True
    )
    assert bits.numel() * 8 == t["input"].numel()


@pytest.mark.kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("channels", [5, 64])
def test_forced_int64_offsets_give_the_same_bits(layout, channels, device, monkeypatch):
    """What a tensor of 2^31 elements and more takes, on a small one."""
    case = Case(shape=(3, channels, 4, 6), layout=layout, device=device)
    expected = run(case)
    force_int64(monkeypatch)
    found = run(case)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.kernels
def test_every_output_element_is_written(device, monkeypatch):
    """PyTorch fills fresh memory with NaN in deterministic mode; none of it may be left."""
    from fusedres.kernels import memory

    without_plans(monkeypatch)
    filled = functools.partial(torch.empty_strided, device=device)  # the quick ones are not
    monkeypatch.setitem(
        memory.EMPTY, device.type, lambda size, stride, dtype: filled(size, stride, dtype=dtype)
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for shape in [(3, 5, 4, 6), (2, 70, 3, 3), (2, 64, 9, 9)]:
            for layout in ("contiguous", "channels_last"):
                found = run(Case(shape=shape, layout=layout, device=device))
                assert all(t.isfinite().all() for t in found.values())
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.kernels
def test_lay_out_cases_reach_the_kernels(device, monkeypatch):
    """The tests above would prove nothing if they ran plain PyTorch."""
    monkeypatch.setattr(single.FORWARD, "plain", None)
    monkeypatch.setattr(single.BACKWARD, "plain", None)
    case = Case(device=device)
    x = lay_out(case.tensors["input"], "sliced")
    assert over_budget(case.with_tensors(input=x)) == {}
