"""`F.batch_norm` and `nn.BatchNorm`, call by call: what works there works here, what raises there raises here.

Without an activation `batch_norm_act` is `F.batch_norm`. Errors are of its types, with texts of our own; after one,
nothing has changed (PyTorch has counted the batch by then). What is expected is what PyTorch does on a CPU; only of its
own samples, which name a device, what it does there.
"""

from __future__ import annotations

import copy
import functools
import warnings
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedres
from fusedres import functional
from fusedres.functional import batch_norm_act

from .helpers import DTYPES

ours = functools.partial(batch_norm_act, activation=None)


def on(device, values):
    """The tensors among them there, but those of the meta device and of oneDNN's layout, which are on no GPU."""
    return [
        t.to(device) if isinstance(t, torch.Tensor) and not (t.is_meta or t.is_mkldnn) else t
        for t in values
    ]


# --- PyTorch's own samples ---------------------------------------------------------------------------------------


@functools.cache
def operators():
    """PyTorch's descriptions of its own function: with cuDNN and without."""
    pytest.importorskip(
        "expecttest"
    )  # PyTorch's own tests import it; it comes with our extra `test`
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    # The import forbids the flags of torch.backends to the whole process; other tests set them.
    flags = torch.backends.disable_global_flags.__globals__
    flags["__allow_nonbracketed_mutation_flag"] = True
    return [op for op in op_db if op.name == "nn.functional.batch_norm"]


def outcome(function, input, arguments, options):
    """Output, gradients and statistics; the arguments are left as they were."""
    tensors = [
        t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t
        for t in (input, *arguments)
    ]
    output = function(*tensors, **options)
    leaves = [t for t in tensors if t is not None and t.requires_grad]
    scale = torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape)
    gradients = torch.autograd.grad(
        output, leaves, scale.to(output.dtype), allow_unused=True, materialize_grads=True
    )
    return [output.detach(), *gradients, *(t for t in tensors[1:3] if t is not None)]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_every_sample_of_pytorch(dtype, device):
    """Values, gradients, statistics, shapes, dtypes and strides; a tensor of one dimension and no elements is there."""
    assert len(operators()) == 2
    count = 0
    for op in operators():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            samples = list(op.sample_inputs(device.type, DTYPES[dtype], requires_grad=True))
            if op.error_inputs_func is not None:
                for sample in op.error_inputs(device.type):
                    wrong = sample.sample_input
                    with pytest.raises(sample.error_type):
                        ours(wrong.input, *wrong.args, **wrong.kwargs)
        for sample in samples:
            count += 1
            found = outcome(ours, sample.input, sample.args, sample.kwargs)
            expected = outcome(F.batch_norm, sample.input, sample.args, sample.kwargs)
            if dtype == "bfloat16":
                wide = [t.double() if isinstance(t, torch.Tensor) else t for t in sample.args]
                exact = outcome(F.batch_norm, sample.input.double(), wide, sample.kwargs)
                assert_within_budget(found, expected, exact)
            else:
                torch.testing.assert_close(found, expected)
            assert found[0].stride() == expected[0].stride()
    assert count >= 24


def assert_within_budget(found, expected, exact):
    """No larger an error than PyTorch's own (times 1.1, and one unit in the last place), as `helpers` defines it."""
    for ours, theirs, truth in zip(found, expected, exact, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        if truth.numel():
            error, allowed = ((t.double() - truth).abs().max() for t in (ours, theirs))
            assert error <= 1.1 * allowed + torch.finfo(ours.dtype).eps * truth.abs().max()


# --- dtypes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("input", DTYPES)
def test_dtypes_of_input_parameters_and_statistics(input, training, device):
    """All of one dtype, or float32 ones with a 16-bit input."""
    works = 0
    for parameter in (None, *DTYPES):
        for statistic in (None, *DTYPES):
            x = torch.randn(3, 4, 2).to(DTYPES[input])
            vectors = [
                None if dtype is None else make(4, dtype=DTYPES[dtype])
                for dtype, make in zip(
                    (statistic, statistic, parameter, parameter),
                    (torch.zeros, torch.ones, torch.ones, torch.zeros),
                    strict=True,
                )
            ]
            expected = kind_of(F.batch_norm, x, *vectors, training)
            found = kind_of(ours, *on(device, (x, *vectors)), training)
            is_16_bit = input in ("bfloat16", "float16")
            if is_16_bit and {parameter, statistic} == {"float32", input}:
                # Its CPU kernels refuse this mixture, which FSDP makes, its CUDA kernels do not.
                expected = DTYPES[input]
            assert found == expected, (input, parameter, statistic)
            works += not isinstance(found, type)
    assert works == {True: 9 if is_16_bit else 4, False: 6 if is_16_bit else 2}[training]


def kind_of(function, *arguments, **options):
    """The output's dtype, or the type of what is raised."""
    try:
        return function(*arguments, **options).dtype
    except Exception as error:
        return type(error)


# --- errors ------------------------------------------------------------------------------------------------------

X, ZERO, ONE = torch.randn(4, 3, 5), torch.zeros(3), torch.ones(3)
CALLS = {
    "channels": (torch.randn(4, 2, 5), ZERO, ONE, ONE, ZERO),
    "short mean": (X, ZERO[:2], ONE, ONE, ZERO),
    "short variance": (X, ZERO, ONE[:2], ONE, ZERO),
    "long weight": (X, ZERO, ONE, torch.ones(4), ZERO),
    "short bias": (X, ZERO, ONE, ONE, ZERO[:2]),
    "mean of two dimensions": (X, ZERO[:, None], ONE[:, None], ONE, ZERO),
    "weight of none": (X, ZERO, ONE, torch.tensor(1.0), ZERO),
    "integers": (X.long(), ZERO, ONE, ONE, ZERO),
    "booleans": (X > 0, ZERO, ONE, ONE, ZERO),
    "complex": (X.to(torch.complex64), ZERO, ONE, ONE, ZERO),
    "complex, no vectors": (X.to(torch.complex64), None, None),
    "8 bits": (X.to(torch.float8_e4m3fn), ZERO, ONE, ONE, ZERO),
    "integer weight": (X, ZERO, ONE, ONE.long(), ZERO),
    "integer mean": (X, ZERO.long(), ONE, ONE, ZERO),
    "float64": (X.double(), ZERO, ONE, ONE, ZERO),
    "sparse": (X.to_sparse(), ZERO, ONE, ONE, ZERO),
    "one dimension": (torch.randn(3), ZERO, ONE, ONE, ZERO),
    "one dimension, no vectors": (torch.randn(3), None, None),
    "one dimension, one value": (torch.randn(1), None, None),
    "no dimension": (torch.tensor(3.0), ZERO, ONE),
    "one value a channel": (torch.randn(1, 3, 1), ZERO, ONE),
    "list as a weight": (X, ZERO, ONE, [1, 1, 1], ZERO),
    "list as a mean": (X, [0, 0, 0], ONE, ONE, ZERO),
    "no mean": (X, None, ONE, ONE, ZERO),
    "no variance": (X, ZERO, None, ONE, ZERO),
    "no statistics": (X, None, None, ONE, ZERO),
    "weight elsewhere": (X, ZERO, ONE, ONE.to("meta"), ZERO),
    "mean elsewhere": (X, ZERO.to("meta"), ONE, ONE, ZERO),
    "empty batch": (torch.randn(0, 3, 5), ZERO, ONE, ONE, ZERO),
    "empty batch, other channels": (torch.randn(0, 3, 5), ZERO[:2], ONE[:2], ONE, ZERO),
    "no channels": (torch.randn(2, 0, 5), ZERO[:0], ONE[:0]),
    "no positions": (torch.randn(2, 3, 0), ZERO, ONE),
    "empty vector": (torch.randn(0), ZERO[:0], ONE[:0]),
    "empty vector, no statistics": (torch.randn(0), None, None),
    "six dimensions": (torch.randn(2, 3, 2, 1, 2, 2), ZERO, ONE, ONE, ZERO),
    "oneDNN's layout": (torch.randn(2, 3, 4, 4).to_mkldnn(), ZERO, ONE, ONE, ZERO),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("call", CALLS)
def test_what_is_raised(call, training, device):
    input, mean, var, *affine = CALLS[call]
    if isinstance(input, torch.Tensor) and input.is_mkldnn:
        device = "cpu"
    statistics = [t.clone() if isinstance(t, torch.Tensor) else t for t in (mean, var)]
    expected = kind_of(F.batch_norm, input, *statistics, *affine, training=training)
    statistics = [t.clone() if isinstance(t, torch.Tensor) else t for t in on(device, (mean, var))]
    input, *affine = on(device, (input, *affine))
    found = kind_of(ours, input, *statistics, *affine, training=training)
    if expected is RuntimeError and call.startswith("complex"):
        expected = (
            NotImplementedError  # for the dtype, before it is asked what statistics there are
        )
    assert found == expected
    if isinstance(found, type):
        for now, before in zip(statistics, on(device, (mean, var)), strict=True):
            assert not isinstance(now, torch.Tensor) or now.is_meta or torch.equal(now, before)


@pytest.mark.parametrize("training", [1, 0, None, "yes", np.bool_(True), torch.tensor(True), 2.5])
def test_training_is_a_bool(training):
    for function in (F.batch_norm, ours):
        with pytest.raises(TypeError, match="training"):
            function(X, ZERO.clone(), ONE.clone(), ONE, ZERO, training)


# --- numbers -----------------------------------------------------------------------------------------------------

NUMBERS = {
    "float": 0.25, "int": 1, "zero": 0, "bool": True, "negative": -0.5, "two": 2,
    "np.float64": np.float64(0.2), "np.float32": np.float32(0.2), "np.float16": np.float16(0.2),
    "np.longdouble": np.longdouble(0.2), "np.int64": np.int64(1), "np.int8": np.int8(1), "np.uint8": np.uint8(1),
    "np.bool_": np.bool_(True),
    "tensor": torch.tensor(0.2), "tensor of float16": torch.tensor(0.2).half(), "tensor of an int": torch.tensor(1),
    "tensor of a bool": torch.tensor(True),
    "nan": float("nan"), "inf": float("inf"),
    # Refused.
    "tensor of one": torch.tensor([0.2]), "tensor of two": torch.tensor([0.2, 0.2]),
    "tensor that trains": torch.tensor(0.2, requires_grad=True),
    "array": np.array(0.2), "array of one": np.array([0.2]), "Fraction": Fraction(1, 4), "Decimal": Decimal("0.25"),
    "complex": 0.2 + 0j, "str": "0.2", "list": [0.2], "None": None, "too large": 10**400,
}  # fmt: skip
EPS = {"-0.0": -0.0, "-1": -1, "-1e-300": -1e-300, "-inf": -float("inf"), "1e-300": 1e-300}


def numbers_outcome(function, device, training, **options):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64).to(device)
    mean, var = x.new_zeros(3), x.new_ones(3)
    try:
        return [function(x, mean, var, None, None, training, **options), mean, var]
    except Exception as error:
        assert not mean.any()
        return type(error)


def assert_same(found, expected):
    assert isinstance(found, type) == isinstance(expected, type), (found, expected)
    if isinstance(found, type):
        assert found is expected
    else:
        torch.testing.assert_close(
            found, expected, rtol=1e-12, atol=1e-12, equal_nan=True, check_device=False
        )


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("argument", ["momentum", "eps"])
@pytest.mark.parametrize("what", {**NUMBERS, **EPS})
def test_numbers(what, argument, training, device):
    value = {**NUMBERS, **EPS}[what]
    expected = numbers_outcome(F.batch_norm, "cpu", training, **{argument: value})
    if what == "tensor of two" and argument == "eps":
        expected = TypeError  # there a RuntimeError, by chance: it has no truth value
    assert_same(numbers_outcome(ours, device, training, **{argument: value}), expected)
    # The other two functions that have one, on the same numbers.
    if isinstance(expected, type):
        x, zero, one = on(device, (torch.randn(4, 3, 5), ZERO, ONE))
        with pytest.raises(expected):
            functional.add_batch_norm_act(x, x, zero, one, training=training, **{argument: value})
        for name in (argument, f"residual_{argument}"):
            with pytest.raises(expected):
                functional.dual_batch_norm_act(
                    x, x, zero, one, zero, one, training=training, **{name: value}
                )


class Network(nn.Module):
    """A plain unit, a tail, a projected tail and a pre-activation unit."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.first, self.tail, self.last = (nn.BatchNorm2d(4) for _ in range(3))
        self.wide, self.short = nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 1)
        self.a, self.b = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x):
        x = F.relu(self.first(self.conv(x)))
        x = F.relu(self.tail(x * 2) + x)
        x = x + x.sin()
        y = F.relu(self.last(x))
        return F.relu(self.a(self.wide(y)) + self.b(self.short(y)))


MODULE_NUMBERS = [n for n in NUMBERS if n not in ("nan", "inf", "zero", "negative", "too large")]


@pytest.mark.parametrize("argument", ["momentum", "eps"])
@pytest.mark.parametrize("what", [*MODULE_NUMBERS, *EPS])
def test_numbers_of_a_network(what, argument, device):
    """Set on modules, as a configuration does; swapped, the network gives the same, or the same type of error."""
    value = {**NUMBERS, **EPS}[what]
    torch.manual_seed(0)
    plain = Network().double()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            setattr(module, argument, value)
    fused = copy.deepcopy(plain).to(device)
    assert fusedres.fuse_(fused).n_fused > 0
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    for training in (True, False):
        expected = step(plain.train(training), x)
        assert_same(step(fused.train(training), x.to(device)), expected)
        for name, buffer in plain.named_buffers():
            torch.testing.assert_close(
                fused.get_buffer(name), buffer, equal_nan=True, check_device=False
            )


def step(model, x):
    try:
        y = model(x)
        return [y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))]
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "x",
    [
        pytest.param(torch.randn(2, 5, 3, 3), id="channels"),
        pytest.param(torch.randn(2, 4, 3), id="3-D"),
        pytest.param(torch.randn(2, 4, 3, 3, 3), id="5-D"),
        pytest.param(torch.randn(2, 4, 3, 3).double(), id="float64"),
        pytest.param(torch.randn(2, 4, 3, 3).half(), id="float16"),
        pytest.param(torch.ones(2, 4, 3, 3, dtype=torch.int64), id="integers"),
        pytest.param(torch.randn(2, 4, 3, 3, dtype=torch.complex64), id="complex"),
        pytest.param(torch.randn(2, 4, 3, 3).to_sparse(), id="sparse"),
        pytest.param([1.0], id="list"),
        pytest.param(torch.randn(0, 4, 3, 3), id="empty"),
    ],
)
def test_inputs_of_a_module(x, training, device):
    """The type of error of nn.BatchNorm2d, alone, in a tail and in a dual tail; and no state has changed."""
    plain = nn.BatchNorm2d(4).train(training)
    module = fusedres.nn.BatchNormAct2d(4, activation=None, device=device).train(training)
    expected, [x] = kind_of(plain, x), on(device, [x])
    found = kind_of(module, x)
    assert found == expected
    if not isinstance(found, type):
        return
    with pytest.raises(expected):
        module(x, x)
    block = fusedres.nn.Projection(4, 4).to(device).train(training)
    if isinstance(x, torch.Tensor):
        with pytest.raises(expected):
            fusedres.nn.batch_norm.call_dual_batch_norm(module.bn, x, block[1], x)
    for norm in (module.bn, block[1]):
        assert norm.num_batches_tracked == 0
        assert not norm.running_mean.any()


@pytest.mark.parametrize(
    ("name", "value"), [("momentum", Fraction(1, 4)), ("momentum", "0.1"), ("eps", 0.0), ("eps", -1.0), ("eps", None)]
)  # fmt: skip
def test_a_module_with_a_number_that_pytorch_refuses_raises_pytorch_s_error(name, value, device):
    found = []
    for fuse in (False, True):
        model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()).to(device)
        setattr(model[0], name, value)
        if fuse:
            fusedres.fuse_(model)
        with pytest.raises((TypeError, ValueError)) as raised:
            model(torch.randn(2, 4, 3, 3, device=device))
        found.append((type(raised.value), str(raised.value), int(model[0].num_batches_tracked)))
    assert found[0] == found[1]
