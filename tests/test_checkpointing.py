"""Activation checkpointing: running statistics that move once, PyTorch's gradients, errors that come through."""

import copy
import functools
import types

import pytest
import torch
from torch import nn
from torch.utils import checkpoint as torch_checkpoint

import fusedres

from .swap_blocks import Block, fused_copy, images


class Tail(Block):
    def forward(self, x):
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


class One(nn.Module):
    """A block, which `how` runs."""

    def __init__(self, how=lambda block, x: block(x)):
        super().__init__()
        torch.manual_seed(0)
        self.block, self.how = Tail(), how

    def forward(self, x):
        return self.how(self.block, x)


def stepped(model, how, device="cpu", backwards=1):
    """(gradients, buffers) of one step of a copy."""
    model = copy.deepcopy(model).to(device)
    model.how = how
    x = images(2, 4, 4, 4).float().to(device).requires_grad_()
    loss = model(x).square().sum()
    for k in range(backwards):
        loss.backward(retain_graph=k + 1 < backwards)
    gradients = [x.grad, *(p.grad for p in model.parameters())]
    return gradients, [b.clone() for b in model.buffers()]


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def plainly(block, x):
    return block(x)


def closed_over(block, x, **options):
    blocks = {"one": [block]}
    return fusedres.checkpoint(lambda x: blocks["one"][0](x), x, **options)


class _Runner:
    def __init__(self, block):
        self.block = block

    def run(self, x):
        return self.block(x)


WAYS = {
    "non-reentrant": lambda block, x: fusedres.checkpoint(block, x),
    "reentrant": lambda block, x: fusedres.checkpoint(block, x, use_reentrant=True),
    "method": lambda block, x: fusedres.checkpoint(block.forward, x),
    "closure": closed_over,
    "reentrant closure": functools.partial(closed_over, use_reentrant=True),
    "partial": lambda block, x: fusedres.checkpoint(functools.partial(plainly, block), x),
    "argument": lambda block, x: fusedres.checkpoint(plainly, block, x),
    "object": lambda block, x: fusedres.checkpoint(_Runner(block).run, x),
    "decorator": lambda block, x: fusedres.checkpoint(use_reentrant=False)(block.forward)(x),
    "nested": lambda block, x: fusedres.checkpoint(lambda x: fusedres.checkpoint(block, x), x),
    "no early stop": lambda block, x: fusedres.checkpoint(block, x, early_stop=False),
}  # fmt: skip


# How a function is looked through does not depend on the backend.
CASES = [
    pytest.param(how, is_fused, id=f"{how}-{'fused' if is_fused else 'plain'}",
                 marks=() if is_fused and how in ("non-reentrant", "reentrant") else pytest.mark.once)
    for how in WAYS for is_fused in (True, False)
]  # fmt: skip


@pytest.mark.composes("`fusedres.checkpoint`: running statistics move once", "works")
@pytest.mark.parametrize(("how", "is_fused"), CASES)
def test_running_statistics_move_once(how, is_fused, device):
    model = fused_copy(One()) if is_fused else One()
    expected = stepped(model, plainly, device)
    gradients, buffers = stepped(model, WAYS[how], device)
    assert same(buffers, expected[1])
    assert same(gradients, expected[0])


@pytest.mark.once
def test_pytorchs_own_moves_them_twice(device):
    """What the others would not see if it were not so."""
    how = functools.partial(torch_checkpoint.checkpoint, use_reentrant=False)
    _, buffers = stepped(One(), how, device)
    assert not same(buffers, stepped(One(), plainly, device)[1])


@pytest.mark.once
def test_a_second_backward_moves_nothing_either(device):
    model = fused_copy(One())
    expected = stepped(model, plainly, device, backwards=2)
    found = stepped(model, WAYS["non-reentrant"], device, backwards=2)
    assert same(found[1], expected[1])
    assert same(found[0], expected[0])


@pytest.mark.composes("`fusedres.checkpoint` with selective checkpointing (`context_fn`)", "works")
@pytest.mark.once
def test_selective_checkpointing_keeps_its_operations(device):
    """The copies are made outside of the mode, which knows only what ran the first time."""
    policy = [torch.ops.aten.convolution.default]
    contexts = functools.partial(torch_checkpoint.create_selective_checkpoint_contexts, policy)
    model = fused_copy(One())
    expected = stepped(model, plainly, device)
    gradients, buffers = stepped(
        model, functools.partial(fusedres.checkpoint, context_fn=contexts), device
    )
    assert same(buffers, expected[1])
    assert same(gradients, expected[0])


@pytest.mark.once
def test_an_error_in_the_second_run_leaves_the_statistics_where_they_were(device):
    runs = []

    def fails(x):
        runs.append(1)
        if len(runs) == 2:
            raise ArithmeticError("the second run")
        return block(x)

    block = Tail().to(device)
    before = dict(block.named_buffers())
    output = fusedres.checkpoint(fails, images(2, 4, 4, 4).float().to(device).requires_grad_())
    with pytest.raises(ArithmeticError, match="the second run"):
        output.sum().backward()
    assert all(buffer is before[name] for name, buffer in block.named_buffers())


@pytest.mark.once
def test_a_function_and_its_arguments_are_asked_for():
    with pytest.raises(ValueError, match="function is None"):
        fusedres.checkpoint(None, torch.ones(1))


@pytest.mark.composes("`fusedres.checkpoint` under `torch.compile`", "works")
@pytest.mark.compiler
def test_compiled_statistics_move_once():
    def run(model, how):
        torch._dynamo.reset()
        model = copy.deepcopy(model)
        model.how = how
        loss = torch.compile(model, backend="aot_eager")(images(2, 4, 4, 4).float()).square().sum()
        loss.backward()
        return list(model.buffers())

    expected = run(One(), plainly)
    found = run(fused_copy(One()), WAYS["non-reentrant"])
    torch.testing.assert_close(found, expected)


# --- an error inside of a region -------------------------------------------------------------------------------------


def _message(model, run, device):
    x = images(2, 4, 4, 4).float().to(device).requires_grad_()
    with pytest.raises(RuntimeError) as caught:
        run(model.to(device), x)
    return str(caught.value)


def _cached(model, x):
    """Checkpointing that caches what BatchNorm gives, whatever runs it."""
    operators = [
        torch.ops.aten.native_batch_norm.default,
        torch.ops.fusedres.batch_norm_act.default,
    ]
    contexts = functools.partial(torch_checkpoint.create_selective_checkpoint_contexts, operators)
    return torch_checkpoint.checkpoint(model, x, use_reentrant=False, context_fn=contexts)


@pytest.mark.composes("selective checkpointing that caches PyTorch's BatchNorm", "refused")
@pytest.mark.once
@pytest.mark.parametrize("is_fused", [True, False], ids=["fused", "plain"])
def test_what_pytorch_says_of_a_cached_region_comes_through(is_fused):
    """The counter is put back after an error, which such a mode refuses: its refusal hid PyTorch's own words."""
    model = fused_copy(One()) if is_fused else One()
    output = _cached(model, images(2, 4, 4, 4).float().requires_grad_())
    with pytest.raises(RuntimeError, match="has been mutated"):
        output.sum().backward()


@pytest.mark.composes("selective checkpointing that caches a fused operator", "works")
@pytest.mark.kernels
def test_a_fused_operator_in_a_cached_region(device):
    """Nothing works in place on what it gives."""
    model = fused_copy(One())
    expected, _ = stepped(model, plainly, device)
    assert same(stepped(model, _cached, device)[0], expected)


def test_the_counter_of_a_failed_call_is_put_back_where_it_may_be(device):
    norm = fusedres.nn.BatchNormAct2d(4).to(device)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(torch.ones(1, 4, 1, 1, device=device))
    assert norm.num_batches_tracked == 0


def _in_a_lambda(block):
    _GLOBAL["block"] = block
    return lambda x: next(_GLOBAL["block"](x) for _ in range(1))


class _Holder:
    def __init__(self, block):
        self.block = block


def _in_an_object_that_holds_itself_to_be_met_twice(block):
    holder = _Holder(block)
    return lambda x, also=[holder]: holder.block(x)


class _InAList(torch.nn.Module):
    def __init__(self, block):
        super().__init__()
        self.hidden = [block]

    def forward(self, x):
        return self.hidden[0](x)


class _Slotted:
    __slots__ = ("__block", "empty")

    def __init__(self, block):
        self.__block = block

    def run(self, x):
        return self.__block(x)


def _in_slots(block):
    return _Slotted(block).run


def _in_an_object_in_an_object(block):
    holder = _Holder(_Holder(_Holder(block)))
    return lambda x: holder.block.block.block(x)


def _in_a_python_module(block):
    _module.net = _Holder(block)
    return lambda x: _module.net.block(x)


_module = types.ModuleType("models_of_a_test")
_GLOBAL: dict = {}


@pytest.mark.once
@pytest.mark.parametrize(
    "hide",
    [
        _in_a_lambda,
        _in_an_object_that_holds_itself_to_be_met_twice,
        _InAList,
        _in_slots,
        _in_an_object_in_an_object,
        _in_a_python_module,
    ],
)
def test_what_is_hidden_in_what_is_run_moves_once_too(hide):
    block = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3))
    function = hide(block)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    fusedres.checkpoint(function, x, use_reentrant=False).sum().backward()
    assert block[1].num_batches_tracked == 1
