"""The modules against nn.BatchNorm, the add and the ReLU: state, semantics, life in a model."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fusedres
from fusedres.nn import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d

PAIRS = {
    "1d": (BatchNormAct1d, nn.BatchNorm1d, (6, 4, 5)),
    "2d": (BatchNormAct2d, nn.BatchNorm2d, (6, 4, 5, 3)),
    "3d": (BatchNormAct3d, nn.BatchNorm3d, (3, 4, 3, 2, 3)),
}
OPTIONS = {
    "default": {},
    "momentum None": {"momentum": None},
    "untracked": {"track_running_stats": False},
    "not affine": {"affine": False},
    "eps and momentum": {"eps": 1e-3, "momentum": 0.3},
}


def pair(dims="2d", device="cpu", **options):
    """Our module and PyTorch's, in float64, with the same state."""
    fused, plain, shape = PAIRS[dims]
    reference = plain(4, **options).double().to(device)
    for parameter in reference.parameters():
        nn.init.normal_(parameter)
    module = fused(4, **options).double().to(device)
    module.load_state_dict(reference.state_dict())
    return module, reference, shape


def compose(norm, x, residual):
    return torch.relu(norm(x) + residual)


@pytest.mark.parametrize("dims", PAIRS)
@pytest.mark.parametrize("options", OPTIONS)
def test_three_batches_then_eval(dims, options, device):
    """Outputs, buffers (num_batches_tracked too) and gradients, in train and then in eval."""
    module, reference, shape = pair(dims, device, **OPTIONS[options])
    for step in range(4):
        if step == 3:
            module.eval()
            reference.eval()
        x, residual, grad = (
            torch.randn(shape, dtype=torch.float64, device=device) for _ in range(3)
        )
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = module(ours, residual), compose(reference, theirs, residual)
        y.backward(grad)
        expected.backward(grad)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(dict(module.state_dict()), dict(reference.state_dict()))
    for name in reference._parameters:
        if getattr(reference, name) is not None:
            torch.testing.assert_close(getattr(module, name).grad, getattr(reference, name).grad)


@pytest.mark.composes("another default dtype", "works")
def test_a_cumulative_average_is_as_exact_as_its_buffers(device):
    """The default dtype is what somebody has set for what they make, not for 1 / n."""
    module, reference, shape = pair(device=device, momentum=None)
    torch.set_default_dtype(torch.bfloat16)
    try:
        for _ in range(3):
            x = torch.randn(shape, dtype=torch.float64, device=device)
            module(x)
            reference(x)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(module.running_mean, reference.running_mean, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dims", PAIRS)
@pytest.mark.parametrize("options", ["default", "untracked", "not affine"])
def test_state_dict_is_that_of_batch_norm(dims, options):
    module, reference, _ = pair(dims, **OPTIONS[options])
    assert list(module.state_dict()) == list(reference.state_dict())
    nn.Sequential(reference).load_state_dict(nn.Sequential(module).state_dict(), strict=True)
    nn.Sequential(module).load_state_dict(nn.Sequential(reference).state_dict(), strict=True)


def test_weight_without_bias(device):
    module = BatchNormAct2d(4, bias=False, device=device)
    x = torch.randn(2, 4, 3, 3, device=device)
    assert list(module.state_dict()) == [
        "weight",
        "running_mean",
        "running_var",
        "num_batches_tracked",
    ]
    expected = torch.relu(torch.nn.functional.batch_norm(x, None, None, module.weight, None, True))
    torch.testing.assert_close(module(x), expected)


def test_attributes_are_those_of_batch_norm():
    module = BatchNormAct2d(4)
    module.momentum = 0.3
    assert (module.bn.momentum, module.momentum, module.eps, module.num_features) == (
        0.3,
        0.3,
        1e-5,
        4,
    )
    assert module.weight is module.bn.weight


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_sync_batch_norm_conversion_keeps_activation_and_residual(training, device):
    """pytorch issue 187298: a BatchNorm subclass with a ReLU inside silently loses it there."""
    module, reference, shape = pair(device=device)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(module)).train(training)[0]
    reference.train(training)
    x, residual = (torch.randn(shape, dtype=torch.float64, device=device) for _ in range(2))
    assert type(converted.bn) is nn.SyncBatchNorm
    torch.testing.assert_close(converted(x, residual), compose(reference, x, residual))


def test_frozen_affine_gets_no_gradient(device):
    module, _, shape = pair(device=device)
    module.requires_grad_(False)
    x = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    module(x).sum().backward()
    assert (module.weight.grad, module.bias.grad) == (None, None)


def test_eval_on_the_child_freezes_its_statistics(device):
    """As detection code does: for m in model.modules(): if isinstance(m, BatchNorm2d): m.eval()."""
    module, reference, shape = pair(device=device)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.eval()
    x = torch.randn(shape, dtype=torch.float64, device=device)
    torch.testing.assert_close(module(x), torch.relu(reference.eval()(x)))


@pytest.mark.composes("hooks on a BatchNorm", "steps aside")
def test_hooks_on_the_child_run(device):
    module, _, shape = pair(device=device)
    seen = []
    module.bn.register_forward_hook(lambda *_: seen.append(1))
    module(torch.randn(shape, dtype=torch.float64, device=device))
    assert seen == [1]


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies_compute_the_same(duplicate, device):
    module, reference, shape = pair(device=device)
    x = torch.randn(shape, dtype=torch.float64, device=device)
    torch.testing.assert_close(duplicate(module.eval())(x), torch.relu(reference.eval()(x)))


def test_checkpoint_counts_as_batch_norm_does(device):
    """Recomputation runs the forward twice, in PyTorch too."""
    module, reference, shape = pair(device=device)
    x = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    checkpoint(module, x, use_reentrant=False).sum().backward()
    checkpoint(reference, x, use_reentrant=False).sum().backward()
    torch.testing.assert_close(module.running_mean, reference.running_mean)
    assert module.num_batches_tracked == reference.num_batches_tracked


def test_functional_call(device):
    module, reference, shape = pair(device=device)
    x = torch.randn(shape, dtype=torch.float64, device=device)
    weight = torch.rand(4, dtype=torch.float64, device=device)
    found = torch.func.functional_call(module, {"bn.weight": weight}, (x,))
    expected = torch.func.functional_call(reference, {"weight": weight}, (x,))
    torch.testing.assert_close(found, torch.relu(expected))


@pytest.mark.filterwarnings(
    "ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning"
)
def test_trace_in_eval(device):
    module, _, shape = pair(device=device)
    x = torch.randn(shape, dtype=torch.float64, device=device)
    traced = torch.jit.trace(module.eval(), (x,))
    torch.testing.assert_close(traced(x + 1), module(x + 1))


@pytest.mark.parametrize("dims", PAIRS)
def test_wrong_dimensions_raise_as_batch_norm_does(dims):
    module, reference, _ = pair(dims)
    x = torch.randn(4, 4, 4, 4, 4, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="expected") as expected:
        reference(x)
    with pytest.raises(ValueError, match="expected") as found:
        module(x)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_in_another_dtype(dtype, device):
    module = BatchNormAct2d(4, device=device, dtype=dtype)
    y = module(torch.randn(2, 4, 3, 3, device=device).to(dtype))
    assert (y.dtype, module.running_mean.dtype) == (dtype, dtype)


def test_repr_names_the_activation():
    assert "activation=relu" in repr(BatchNormAct2d(4))


def test_unknown_activation():
    with pytest.raises(
        ValueError, match=r"BatchNormAct2d: unknown activation 'tanh'; choose one of None, 'relu'"
    ):
        BatchNormAct2d(4, activation="tanh")


def test_off_is_the_composition(device):
    module, reference, shape = pair(device=device)
    x, residual = (torch.randn(shape, dtype=torch.float64, device=device) for _ in range(2))
    with fusedres.backend("off"):
        assert torch.equal(module(x, residual), compose(reference, x, residual))
