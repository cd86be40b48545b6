"""`fusedres.nn.Residual` against the same children, called one after the other and added up by PyTorch."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fusedres.benchmarks.steps import ALLOWED, difference, excess, run
from fusedres.nn import Projection, Residual

from .swap_blocks import fused_copy, images, spy_on_sites

CONVOLUTIONS = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
SHAPES = {0: (6, 4), 1: (3, 4, 6), 2: (3, 4, 5, 4), 3: (2, 4, 3, 4, 2)}


class Plain(Residual):
    """The same children and parameters, and PyTorch's own operators."""

    def forward(self, x):
        out = self.block(x)
        if self.skip is None:
            y = x
        elif "_Project" in str(type(self.skip)):
            steps = [-(-a // b) for a, b in zip(x.shape[2:], out.shape[2:], strict=True)]
            function = (F.linear, F.conv1d, F.conv2d, F.conv3d)[len(steps)]
            y = function(x, self.skip.weight, None, *([steps] if steps else []))
        elif "_Pad" in str(type(self.skip)):
            y = torch.zeros_like(out)
            steps = [-(-a // b) for a, b in zip(x.shape[2:], out.shape[2:], strict=True)]
            y[:, : x.shape[1]] = x[(..., *(slice(None, None, step) for step in steps))]
        else:
            y = self.skip(x)
        if self.scale is not None:
            channels = [-1] + [1] * (out.dim() - 2)
            out = out * (self.scale.view(channels) if self.scale.numel() > 1 else self.scale)
        y = y + out
        if isinstance(self.activation, nn.Module):
            return self.activation(y)
        return y if self.activation is None else getattr(F, self.activation)(y)


def chain(dims: int = 2, out: int = 4, stride: int = 1) -> nn.Sequential:
    """convolution, BatchNorm, ReLU, convolution, BatchNorm; linear maps where `dims` is 0."""
    # No bias in front of a BatchNorm: its gradient is nothing but rounding.
    if dims == 0:
        first, second = nn.Linear(4, out, bias=False), nn.Linear(out, out, bias=False)
    else:
        first = CONVOLUTIONS[dims](4, out, 3, stride, 1, bias=False)
        second = CONVOLUTIONS[dims](out, out, 3, 1, 1, bias=False)
    return nn.Sequential(first, NORMS[dims](out), nn.ReLU(), second, NORMS[dims](out))


def pair(block, x, training=True, **options) -> tuple[nn.Module, nn.Module]:
    """In float64, with the same state, called once (which makes the parameters): the composition, and the module."""
    torch.manual_seed(0)
    module = Residual(block, **options).double().to(x.device)
    with torch.no_grad():
        module(x)
        for name, parameter in module.named_parameters():
            if name == "scale" or parameter.dim() == 1:  # a BatchNorm starts at 1 and 0
                parameter.copy_(torch.rand(parameter.shape, dtype=torch.float64) + 0.5)
    plain = copy.deepcopy(module)
    plain.__class__ = Plain
    return plain.train(training), module.train(training)


def apart(plain, module, x) -> float:
    """How far two steps come apart; refuses a model of which rounding makes so much that it would hide a difference."""
    noise = difference(run(plain, x, 2), run(plain, x * (1 + torch.finfo(x.dtype).eps), 2))
    assert noise < 1e-9
    return excess(plain, module, x, steps=2)


BRANCHES = {
    "chain": chain,
    "one BatchNorm": lambda: nn.Sequential(nn.BatchNorm2d(4)),
    "BatchNorm itself": lambda: nn.BatchNorm2d(4),
    "no BatchNorm": lambda: nn.Conv2d(4, 4, 3, 1, 1),
    "convolution last": lambda: nn.Sequential(
        nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1, bias=False)
    ),
    "activation last": lambda: chain().append(nn.ReLU(inplace=True)),
    "Dropout last": lambda: chain().append(nn.Dropout(0.5)),
    "other activation": lambda: chain().append(nn.Hardtanh()).append(nn.BatchNorm2d(4)),
    "nested": lambda: nn.Sequential(
        nn.Conv2d(4, 4, 1, bias=False), nn.Sequential(chain(), nn.ReLU(), chain())
    ),
    "nested, no activation": lambda: nn.Sequential(chain(), chain()),
    "a Residual": lambda: nn.Sequential(Residual(chain(), scale=0.5), nn.ReLU(), nn.BatchNorm2d(4)),
}


# Of a Projection, which is a convolution, there is none without a dimension.
SKIPS = [
    (skip, dims)
    for skip in (None, "module", "Projection", "project", "pad")
    for dims in SHAPES
    if dims or skip != "Projection"
]


class TestParity:
    """Outputs, gradients, parameters and buffers over two steps are those of the composition."""

    @pytest.mark.parametrize(
        ("scale", "training"), [(None, True), (None, False), ("channel", True)], ids=str
    )
    @pytest.mark.parametrize(("skip", "dims"), SKIPS)
    def test_skips(self, skip, dims, scale, training, device):
        x, out = images(*SHAPES[dims], device=device), 4 if skip is None else 6
        if skip == "Projection":
            skip = Projection(4, out, 2, dims=dims)
        elif skip == "module":
            skip = CONVOLUTIONS[dims](4, out, *([1, 2] if dims else []))
        block = chain(dims, out, 1 if skip is None else 2)
        pairs = pair(block, x, training, skip=skip, scale=scale, activation="relu")
        assert apart(*pairs, x) <= ALLOWED

    @pytest.mark.parametrize(
        "scale",
        [True, "scalar", "channel", 1, 0.5, torch.ones(()), torch.ones(1), torch.ones(4), nn.Parameter(torch.ones(4))],
        ids=lambda scale: f"{type(scale).__name__} {getattr(scale, 'shape', scale)}",
    )  # fmt: skip
    def test_scales(self, scale, device):
        x = images(*SHAPES[2], device=device)
        assert apart(*pair(chain(), x, scale=scale, activation="silu"), x) <= ALLOWED

    @pytest.mark.parametrize("scale", [None, "scalar"])
    @pytest.mark.parametrize(
        "activation", [None, "relu", "gelu", nn.ReLU(inplace=True), nn.PReLU()], ids=str
    )
    def test_activations(self, activation, scale, device):
        x = images(*SHAPES[2], device=device)
        pairs = pair(chain(), x, scale=scale, activation=activation)
        assert apart(*pairs, x) <= ALLOWED

    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("name", BRANCHES)
    def test_blocks(self, name, training, device):
        x = images(*SHAPES[2], device=device)
        assert apart(*pair(BRANCHES[name](), x, training), x) <= ALLOWED

    @pytest.mark.parametrize("shared", ["activation", "half"])
    def test_a_child_that_stands_in_it_twice_runs_twice(self, shared, device):
        x, relu, half = (
            images(*SHAPES[2], device=device),
            nn.ReLU(),
            [nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)],
        )
        other = half if shared == "half" else [nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)]
        block = nn.Sequential(*half, relu, *other, relu, nn.Conv2d(4, 4, 1, bias=False))
        assert apart(*pair(block, x), x) <= ALLOWED

    @pytest.mark.parametrize("scale", [None, "channel"])
    def test_fuse_computes_the_same(self, scale, device):
        x = images(*SHAPES[2], device=device)
        options = {"scale": scale, "activation": "relu"}
        pairs = [pair(chain(), x, **options), pair(chain(out=6), x, skip="project", **options)]
        plain, module = (nn.Sequential(*both) for both in zip(*pairs, strict=True))
        assert apart(plain, fused_copy(module), x) <= ALLOWED


def wide(**options) -> Residual:
    """A block that changes the shape, called before for its parameters; in float64, evaluating."""
    module = Residual(chain(out=6, stride=2), **{"skip": "project", **options}).double()
    with torch.no_grad():
        module(images(*SHAPES[2]))
    return module.eval()


@pytest.mark.parametrize("skip", [None, "project"])
@pytest.mark.parametrize("scale", ["scalar", "channel"])
class TestAtZero:
    def test_it_is_the_skip_connection_to_the_bit(self, scale, skip, device):
        x = images(*SHAPES[2], device=device)
        module = Residual(chain(), skip, scale).double().to(device)
        expected = x if skip is None else F.conv2d(x, (module(x), module.skip.weight)[1])
        assert torch.equal(module(x), expected)

    def test_the_scale_has_a_gradient_and_the_block_has_none(self, scale, skip, device):
        x = images(*SHAPES[2], device=device)
        module = Residual(chain(), skip, scale, "silu").double().to(device)
        module(x).square().sum().backward()
        assert module.scale.grad.abs().min() > 0
        assert all(p.grad.abs().max() == 0 for p in module.block.parameters())


@pytest.mark.once
class TestFusion:
    def test_the_chain_and_the_tail_run_fused(self, monkeypatch):
        calls = spy_on_sites(monkeypatch)
        module = Residual(chain(), activation="relu").double()
        module(images(*SHAPES[2]))
        assert calls == [module.block[1], module.block[4]]

    @pytest.mark.parametrize(
        "where", ["", "block", "block.0", "block.1", "block.2", "block.4", "skip"]
    )
    def test_hooks_are_called_once(self, where):
        module, seen = wide(activation="relu"), []
        expected = module(images(*SHAPES[2]))
        module.get_submodule(where).register_forward_hook(lambda *_: seen.append(where))
        assert torch.equal(module(images(*SHAPES[2])), expected)
        assert seen == [where]

    def test_a_hook_may_replace_what_the_block_gives(self):
        x, module = images(*SHAPES[2]), Residual(chain()).double()
        module.block.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
        assert torch.equal(module(x), x)


def loaded(state) -> Residual:
    module = Residual(chain(out=6), "project", "channel")
    module.load_state_dict(state)
    return module


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "state_dict": lambda module: loaded(module.state_dict()),
    "saved": lambda module: loaded(saved(module.state_dict())),
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
}


@pytest.mark.once
class TestParametersMadeAtTheFirstCall:
    @pytest.mark.parametrize("called", [False, True], ids=["before", "after"])
    @pytest.mark.parametrize("how", COPIES)
    def test_copies_compute_the_same(self, how, called):
        x = images(*SHAPES[2]).float()
        module = Residual(chain(out=6), "project", "channel").eval()
        if called:
            module(x)
            nn.init.normal_(module.scale)
        copied = COPIES[how](module).eval()
        outputs = []
        for each in (module, copied):
            torch.manual_seed(0)  # of a weight that is made now
            outputs.append(each(x))
        assert torch.equal(*outputs)

    def test_a_state_of_another_shape_is_refused(self):
        module = Residual(chain(out=4), "project", "channel").double()
        module(images(*SHAPES[2]))
        with pytest.raises(RuntimeError, match="size mismatch for scale"):
            module.load_state_dict(wide(scale="channel").state_dict())

    def test_they_have_the_dtype_that_the_module_was_given(self):
        module = Residual(chain(), "project", "channel").double()
        module(images(*SHAPES[2]))
        assert {module.scale.dtype, module.skip.weight.dtype} == {torch.float64}

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_an_optimizer_after_one_batch_moves_them(self, mode):
        x, module = images(*SHAPES[2]), Residual(chain(out=6), "project", "channel").double()
        with mode():
            module(x)
        before = [module.scale.clone(), module.skip.weight.clone()]
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        module(x).square().sum().backward()
        optimizer.step()
        assert not torch.equal(module.scale, before[0])
        assert not torch.equal(module.skip.weight, before[1])


COMBINATIONS = [(s, k) for s in ("project", "pad", "Projection") for k in (None, "channel")]


@pytest.mark.once
@pytest.mark.parametrize(("skip", "scale"), COMBINATIONS)
class TestTraces:
    def made(self, skip, scale):
        module = wide(skip=Projection(4, 6, 2) if skip == "Projection" else skip, scale=scale)
        if scale is not None:
            nn.init.normal_(module.scale)
        return module, images(*SHAPES[2])

    @pytest.mark.filterwarnings("ignore:`torch.jit")
    def test_jit_trace(self, skip, scale):
        module, x = self.made(skip, scale)
        traced = torch.jit.trace(module, (x,))
        torch.testing.assert_close(traced(x + 1), module(x + 1))

    def test_symbolic_trace(self, skip, scale):
        module, x = self.made(skip, scale)
        traced = torch.fx.symbolic_trace(module.train())
        torch.testing.assert_close(traced(x), module(x))

    def test_compile(self, skip, scale):
        module, x = self.made(skip, scale)
        torch.compiler.reset()
        compiled = torch.compile(module.train(), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize("scale", [None, "channel"])
def test_autocast(scale, device):
    module, x = (
        Residual(chain(out=6, stride=2), "project", scale, "relu").to(device),
        images(*SHAPES[2], device=device).float(),
    )
    with torch.autocast(device.type, torch.bfloat16):
        module(x).float().sum().backward()
        assert module.skip(x, module.block(x)).dtype == torch.bfloat16
    assert module.skip.weight.grad.dtype == torch.float32


@pytest.mark.once
class TestErrors:
    @pytest.mark.parametrize("skip", [None, "module", "Projection", "pad", "project"])
    def test_shapes_that_do_not_match(self, skip):
        made = {"module": nn.Identity(), "Projection": Projection(4, 3, 1)}
        module = Residual(chain(out=3, stride=2), made.get(skip, skip)).double()
        channels, size = (3, "5, 4") if skip == "Projection" else (4, "5, 4")
        if skip == "project":  # no stride makes 4 of 5
            module.block[0] = nn.Conv2d(4, 3, 2, padding=(0, 1)).double()
        given = "[3, 3, 4, 5]" if skip == "project" else "[3, 3, 3, 2]"
        with pytest.raises(ValueError, match="Residual: the block gives") as error:
            module(images(*SHAPES[2]))
        parts = (
            given,
            f"[3, {channels}, {size}]",
            'skip="project"',
            'skip="pad"',
            "a module of your own",
        )
        assert [part for part in parts if part not in str(error.value)] == []

    def test_a_refused_call_is_not_counted(self):
        module = Residual(nn.Sequential(nn.BatchNorm2d(4)), Projection(4, 4, 2))
        with pytest.raises(ValueError, match="Residual: the block gives"):
            module(images(*SHAPES[2]).float())
        assert module.block[0].num_batches_tracked == module.skip[1].num_batches_tracked == 0

    @pytest.mark.parametrize(
        ("options", "kind", "text"),
        [
            ({"block": len}, TypeError, "block is a builtin_function_or_method, expected an nn.Module"),
            ({"skip": "conv"}, ValueError, r"skip is 'conv', expected None .*, 'project' \(a 1x1 convolution"),
            ({"skip": 2}, TypeError, "skip is an int, expected None, an nn.Module, 'project' or 'pad'"),
            ({"scale": "row"}, ValueError, "scale is 'row', expected None, 'scalar', 'channel', a number or"),
            ({"scale": [1.0]}, TypeError, "scale is a list, expected None, a number, a tensor, 'scalar'"),
            ({"scale": torch.ones(2, 2)}, ValueError, r"scale has shape \[2, 2\], expected one element"),
            ({"activation": "tanh"}, ValueError, "unknown activation 'tanh'; choose one of None, 'relu'"),
            ({"activation": 3}, ValueError, "unknown activation 3, expected a name or None"),
        ],
        ids=str,
    )  # fmt: skip
    def test_arguments(self, options, kind, text):
        with pytest.raises(kind, match="Residual: " + text):
            Residual(**{"block": nn.Identity(), **options})

    @pytest.mark.parametrize(
        ("block", "skip", "text"),
        [
            (nn.LSTM(4, 4), None, "the block, LSTM, gives a tuple, expected one tensor; wrap it in a module"),
            (nn.Linear(4, 4), nn.LSTM(4, 4), "the skip connection, LSTM, gives a tuple, expected one tensor"),
            (nn.ModuleDict(), None, None),
        ],
        ids=["block", "skip", "no forward"],
    )  # fmt: skip
    def test_what_is_no_tensor(self, block, skip, text):
        """A module without a forward is PyTorch's to refuse."""
        with pytest.raises(TypeError if text else NotImplementedError, match=text):
            Residual(block, skip)(torch.randn(3, 2, 4))
