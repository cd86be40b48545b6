"""A fused model in the world: copied, pickled, compiled, exported, hooked, frozen, converted, its children replaced.

Each either works fused or falls back by itself, with the same numbers as the untouched model.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

import fusedres
from fusedres.benchmarks.steps import ALLOWED, difference, excess, run

from .swap_blocks import fused_copy, images, make, relu_child, relu_functional, spy_on_sites, tail

pytestmark = pytest.mark.once
X = images(2, 3, 32, 32)


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    """A ResNet of one BasicBlock a stage, in float64."""
    torch.manual_seed(0)
    resnet = torchvision.models.resnet
    return resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=5).double()


@pytest.fixture
def fused(plain) -> nn.Module:
    return fused_copy(plain)


@pytest.fixture
def fused_calls(monkeypatch):
    """One entry for each site that runs fused."""
    return spy_on_sites(monkeypatch)


# --- copies ------------------------------------------------------------------------------------------------------


@pytest.mark.composes("`copy.deepcopy`, pickle, `torch.save` and `torch.load`", "works")
@pytest.mark.parametrize(
    "duplicate",
    [
        copy.copy,
        copy.deepcopy,
        *(lambda m, p=p: pickle.loads(pickle.dumps(m, p)) for p in (0, 2, 5)),
    ],
    ids=["copy", "deepcopy", "pickle0", "pickle2", "pickle5"],
)
def test_a_copy_is_fused_too(fused, duplicate, fused_calls):
    model = duplicate(fused)
    assert difference(run(fused, X), run(model, X)) == 0
    assert len(fused_calls) == 2 * 9


def test_a_copy_runs_its_own_parameters(fused):
    model = copy.deepcopy(fused)
    with torch.no_grad():
        model.bn1.bias.fill_(7)
    assert not torch.equal(model(X), fused(X))


@pytest.mark.composes("`copy.deepcopy`, pickle, `torch.save` and `torch.load`", "works")
def test_pickled_to_another_process(fused, tmp_path):
    fused.eval()
    torch.save((fused, X, fused(X)), tmp_path / "model.pt")
    source = (
        "import sys, torch\n"
        "model, x, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "import fusedres\n"
        "assert fusedres.explain(model).n_fused == 12, fusedres.explain(model)\n"
        "assert torch.equal(model(x), expected)\n"
        "fusedres.unfuse_(model)\n"
        "assert torch.equal(model(x), expected)\n"
    )
    command = [sys.executable, "-c", source, str(tmp_path / "model.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_a_pickle_of_other_code_comes_back_unfused(fused, monkeypatch):
    data = pickle.dumps(fused)
    block = torchvision.models.resnet.BasicBlock
    monkeypatch.setattr(block, "forward", lambda self, x: self.conv1(x), raising=True)
    assert not fusedres.is_fused(pickle.loads(data).layer1)


def test_a_class_patched_after_fusing_runs_as_patched(fused, monkeypatch):
    block = torchvision.models.resnet.BasicBlock
    monkeypatch.setattr(block, "forward", lambda self, x: x)
    x = images(2, 64, 8, 8)
    assert fused.layer1(x) is x


@pytest.mark.composes("EMA of the weights", "works")
def test_ema_by_deepcopy(plain, fused):
    averaged = torch.optim.swa_utils.AveragedModel(fused)
    averaged.update_parameters(fused)
    assert torch.equal(averaged.eval()(X), copy.deepcopy(plain).eval()(X))


@pytest.mark.composes("`nn.DataParallel`", "steps aside")
def test_data_parallel_replicas_run_with_their_own_parameters(fused):
    replica = fused.layer1[0]._replicate_for_data_parallel()
    assert type(replica) is type(fused.layer1[0])


# --- compilers, tracers, exporters -------------------------------------------------------------------------------


@pytest.mark.composes("`torch.compile(fullgraph=True)` of a fused model", "works")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiles_in_one_graph(plain, fused, training):
    torch._dynamo.reset()
    model = torch.compile(fused.train(training), fullgraph=True, backend="aot_eager")
    expected = copy.deepcopy(plain).train(training)
    model(X).sum().backward()
    expected(X).sum().backward()
    found = {name: p.grad for name, p in fused.named_parameters()} | dict(fused.named_buffers())
    exact = {name: p.grad for name, p in expected.named_parameters()} | dict(
        expected.named_buffers()
    )
    assert difference(exact, found) <= 1e-12


@pytest.mark.composes("a child that is replaced after `fuse_`", "works")
def test_compiled_code_notices_a_replaced_child(plain, fused):
    torch._dynamo.reset()
    model, expected = torch.compile(fused.eval(), backend="eager"), copy.deepcopy(plain).eval()
    model(X)
    for each in (fused, expected):
        each.layer1[0].relu = nn.SiLU()
    torch.testing.assert_close(model(X), expected(X), rtol=1e-12, atol=1e-12)


@pytest.mark.composes("`torch.jit.trace`", "steps aside")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_jit_trace(plain, fused):
    traced = torch.jit.trace(fused.eval(), X)
    assert torch.equal(traced(X), copy.deepcopy(plain).eval()(X))


@pytest.mark.composes("`torch.jit.script` of a fused model", "steps aside")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_jit_script(plain, fused):
    scripted = torch.jit.script(fused.eval())
    assert torch.equal(scripted(X), copy.deepcopy(plain).eval()(X))
    assert fusedres.explain(fused).n_fused == 12


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_jit_script_keeps_the_modules_that_it_has_seen():
    """It remembers them by id; what it lets go of must not lend its id to another."""
    torch.manual_seed(0)
    resnet = torchvision.models.resnet
    plain = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=5).double().eval()
    for _ in range(5):
        assert torch.equal(torch.jit.script(fused_copy(plain))(X), plain(X))


@pytest.mark.composes("`torch.export`, strict or not", "works")
@pytest.mark.parametrize("strict", [True, False])
def test_export(plain, fused, strict):
    program = torch.export.export(fused.eval(), (X,), strict=strict)
    torch.testing.assert_close(
        program.module()(X), copy.deepcopy(plain).eval()(X), rtol=1e-12, atol=1e-12
    )


@pytest.mark.composes("torchvision's feature extractor", "works")
def test_feature_extractor(plain, fused):
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    assert get_graph_node_names(fused) == get_graph_node_names(plain)
    nodes = ["relu", "layer1.0.bn2", "layer2.0.add", "layer4"]
    expected = create_feature_extractor(copy.deepcopy(plain).eval(), nodes)(X)
    assert difference(expected, create_feature_extractor(fused.eval(), nodes)(X)) == 0


@pytest.mark.composes("`torch.fx.symbolic_trace`", "steps aside")
def test_symbolic_trace_sees_the_own_forward(plain, fused):
    traced = torch.fx.symbolic_trace(fused.eval())
    assert traced.code == torch.fx.symbolic_trace(copy.deepcopy(plain).eval()).code


@pytest.mark.composes("folding BatchNorm into convolutions after `unfuse_`", "works")
def test_fuse_conv_bn_after_unfusing(plain, fused):
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    fusedres.unfuse_(fused.eval())
    fused.conv1 = fuse_conv_bn_eval(fused.conv1, fused.bn1)
    fused.bn1 = nn.Identity()
    torch.testing.assert_close(fused(X), copy.deepcopy(plain).eval()(X), rtol=1e-12, atol=1e-12)


@pytest.mark.composes(
    "`torch.func.functional_call` and `vmap` over parameters (ensembles)", "works"
)
def test_functional_call_and_vmap(plain, fused):
    def per_image(model):
        model = copy.deepcopy(model).eval()
        weights = {name: p.detach() for name, p in model.named_parameters()}

        def loss(weights, x):
            return torch.func.functional_call(model, weights, (x[None],)).square().sum()

        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, X)

    assert difference(per_image(plain), per_image(fused)) <= 1e-12


@pytest.mark.composes("activation checkpointing (`torch.utils.checkpoint`)", "works")
def test_checkpointing_updates_as_often(plain, fused):
    def train(model):
        model = copy.deepcopy(model)
        checkpoint(model, X, use_reentrant=False).sum().backward()
        return {name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())

    assert difference(train(plain), train(fused)) == 0


# --- what is done to children afterwards -------------------------------------------------------------------------


def in_eval(block):
    block.bn1.eval()
    block.bn2.eval()


def frozen(block):
    block.bn1.requires_grad_(False)


def untracked(block):
    block.bn1.track_running_stats = False
    block.bn1.running_mean = block.bn1.running_var = block.bn1.num_batches_tracked = None


def cumulative(block):
    block.bn1.momentum = None


def other_conv(block):
    block.conv1 = nn.Conv2d(4, 4, 1, bias=False, dtype=torch.float64)
    nn.init.constant_(block.conv1.weight, 0.1)


def other_norm(block):
    block.bn1 = nn.BatchNorm2d(4, eps=0.1, dtype=torch.float64)


def channels_last(block):
    block.to(memory_format=torch.channels_last)


def without_norm(block):
    block.bn1 = nn.Identity()


def group_norm(block):
    block.bn1 = nn.GroupNorm(2, 4, dtype=torch.float64)


def frozen_batch_norm(block):
    block.bn1 = torchvision.ops.FrozenBatchNorm2d(4).double()


def sync_batch_norm(block):
    nn.SyncBatchNorm.convert_sync_batchnorm(block).eval()


def norm_hook(block):
    block.bn1.register_forward_hook(lambda module, args, output: output * 2)


def norm_pre_hook(block):
    block.bn1.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def norm_backward_hook(block):
    block.relu = nn.ReLU()  # PyTorch refuses to write to the output of a module with such a hook
    block.bn1.register_full_backward_hook(lambda module, grad_in, grad_out: (grad_in[0] * 2,))


def relu_hook(block):
    block.relu.register_forward_hook(lambda module, args, output: output * 2)


def other_relu(block):
    block.relu = nn.SiLU()


def leaky_relu_class(block):
    block.relu = type("Leaky", (nn.ReLU,), {"forward": lambda self, x: x.clamp(min=-0.1)})()


def relu_forward(block):
    block.relu.forward = torch.tanh


def norm_forward(block):
    block.bn1.forward = torch.sin


def computed_weight(block):
    from torch.nn.utils import parametrize

    parametrize.register_parametrization(block.bn1, "weight", nn.Softplus())


def own_forward(block):
    block.forward = block.conv1.forward


# what was done: how many of the block's two sites still run fused
AFTERWARDS = {
    in_eval: 2, frozen: 2, untracked: 2, cumulative: 2, other_conv: 2, other_norm: 2, channels_last: 2,
    without_norm: 0, group_norm: 0, frozen_batch_norm: 2, sync_batch_norm: 2, norm_hook: 0, norm_pre_hook: 0,
    norm_backward_hook: 0, relu_hook: 0, other_relu: 0, leaky_relu_class: 0, relu_forward: 0, norm_forward: 0,
    computed_weight: 0, own_forward: 0,
}  # fmt: skip


def same_change(change):
    block = make(tail)
    fused = fused_copy(block)
    torch.manual_seed(2)
    change(block)
    torch.manual_seed(2)
    change(fused)
    return block, fused


@pytest.mark.parametrize("change", AFTERWARDS, ids=lambda f: f.__name__)
def test_changed_afterwards_computes_the_same(change):
    block, fused = same_change(change)
    # Two steps on the objects themselves: a copy of a hooked or patched module would call into the first one.
    found = []
    for model in (block, fused):
        x = images(2, 4, 6, 5).requires_grad_()
        for _ in range(2):
            model(x * 1).square().sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({"x": x.grad, **grads, **dict(model.named_buffers())})
    assert difference(*found) <= 1e-12


@pytest.mark.parametrize("change", AFTERWARDS, ids=lambda f: f.__name__)
def test_changed_afterwards_runs_fused_or_falls_back(change, fused_calls):
    _, fused = same_change(change)
    fused(images(2, 4, 6, 5))
    assert len(fused_calls) == AFTERWARDS[change]


# change: what the report says then
TOLD = {
    norm_hook: "bn1: it has hooks",
    relu_hook: "relu: it has hooks",
    other_relu: "relu: it is a SiLU, not an nn.ReLU",
    group_norm: "bn1: it is a GroupNorm, not an nn.BatchNorm",
    without_norm: "bn1: it is an Identity, not an nn.BatchNorm",
    relu_forward: "relu: its forward was replaced on the instance",
}


@pytest.mark.parametrize("change", TOLD, ids=lambda f: f.__name__)
def test_the_fallback_is_told(change):
    _, fused = same_change(change)
    row = fusedres.explain(fused).rows[0]
    assert row.status == "own forward"
    assert TOLD[change] in row.reason


def test_a_forward_put_over_the_fused_one_is_told():
    _, fused = same_change(own_forward)
    row = fusedres.explain(fused).rows[0]
    assert (row.status, row.reason) == ("left alone", "its forward was replaced on the instance")


def test_fusing_again_takes_in_what_was_changed():
    _, fused = same_change(norm_hook)
    report = fusedres.fuse_(fused)
    assert [(row.where, row.status) for row in report.rows] == [
        ("bn1", "left alone"),
        ("bn2", "fused"),
    ]


def test_a_removed_child_is_an_error_as_before():
    block, fused = same_change(lambda block: delattr(block, "bn1"))
    for each in (block, fused):
        with pytest.raises(AttributeError, match="no attribute 'bn1'"):
            each(images(2, 4, 5, 5))


def scaled(self, x):
    return self.relu(self.bn1(self.conv1(x) * self.scale))


def guarded_by_method(self, x):
    return self.relu(self.bn1(self.before(x)))


def asks_for_an_attribute(self, x):
    if hasattr(self, "gain"):
        x = x * self.gain
    return self.relu(self.bn1(self.conv1(x)))


def reads_a_child(self, x):
    return self.relu(
        self.bn1(self.conv1(x))
        if self.identity.training is None
        else self.bn1(x * self.conv1.groups)
    )


@pytest.mark.parametrize(
    ("forward", "change"),
    [
        (scaled, lambda block: setattr(block, "scale", 3.0)),
        (asks_for_an_attribute, lambda block: setattr(block, "gain", 3.0)),
        (asks_for_an_attribute, lambda block: setattr(block, "gain", nn.Parameter(torch.ones(())))),
        (reads_a_child, lambda block: setattr(block.conv1, "groups", 2)),
    ],
    ids=["value", "new value", "new parameter", "child's value"],
)
def test_an_attribute_set_afterwards_is_taken_in(forward, change):
    block = make(forward)
    fused = fused_copy(block)
    change(block)
    change(fused)
    x = images(2, 4, 5, 5)
    assert torch.equal(fused(x), block(x))


def test_a_method_set_afterwards_is_run(monkeypatch):
    block = make(guarded_by_method)
    monkeypatch.setattr(type(block), "before", lambda self, x: self.conv1(x), raising=False)
    fused = fused_copy(block)
    for each in (block, fused):
        each.before = torch.exp
    x = images(2, 4, 5, 5)
    assert torch.equal(fused(x), block(x))


@pytest.mark.composes("hooks on all modules", "steps aside")
def test_hooks_on_all_modules_run(fused_calls):
    fused, seen = fused_copy(make(tail)), []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(type(module))
    )
    try:
        fused(images(2, 4, 5, 5))
    finally:
        handle.remove()
    assert (seen.count(nn.BatchNorm2d), len(fused_calls)) == (2, 0)


@pytest.mark.composes("hooks on a block", "works")
def test_hooks_on_the_block_run():
    fused, seen = fused_copy(make(tail)), []
    fused.register_forward_hook(lambda module, args, output: seen.append(output))
    assert fused(images(2, 4, 5, 5)) is seen[0]


@pytest.mark.composes("inputs of a tensor subclass", "steps aside")
def test_a_tensor_subclass_goes_to_the_own_forward(fused_calls):
    class Marked(torch.Tensor):
        pass

    fused_copy(make(relu_child))(images(2, 4, 5, 5).as_subclass(Marked))
    assert fused_calls == []


@pytest.mark.composes("`.to(device, dtype)`, `.half()` after `fuse_`", "works")
def test_moved_and_cast_after_fusing():
    block = make(tail)
    fused = fused_copy(block).float()
    assert excess(copy.deepcopy(block).float(), fused, images(2, 4, 6, 5).float()) <= ALLOWED


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_jit_script_finds_the_names_that_forward_uses():
    block, x = make(relu_functional), images(2, 4, 5, 5)
    assert torch.equal(torch.jit.script(fused_copy(block))(x), block(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_jit_script_of_a_parent_that_is_not_fused(plain):
    parent = nn.Sequential(fused_copy(plain)).eval()
    scripted = torch.jit.script(parent)
    assert torch.equal(scripted(X), copy.deepcopy(plain).eval()(X))
    assert torch.equal(parent(X), scripted(X))


class Final(type):
    """Its classes cannot be derived from, except by those with a forward of their own."""

    def __new__(cls, name, bases, body):
        if nn.Module in bases:
            raise TypeError(f"{name} is final")
        return super().__new__(cls, name, bases, body)


class Slotted(type(make(tail))):
    __slots__ = ("extra",)
    forward = tail


UNDERIVABLE = {
    "final": Final("Sealed", (type(make(tail)),), {"forward": tail}),
    "slots": Slotted,
    "Sequential": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()),
}


@pytest.mark.parametrize("name", UNDERIVABLE)
def test_a_module_whose_class_takes_no_plan_keeps_it(name):
    model = UNDERIVABLE[name]().double()
    fused = copy.deepcopy(model)
    is_fused = [row.status == "fused" for row in fusedres.fuse_(fused).rows]
    assert (all(is_fused), type(fused)) == (True, type(model))
    assert excess(model, fused, images(2, 4, 6, 6), 3) <= ALLOWED


# --- what people do to timm's models -----------------------------------------------------------------------------


def timm_pair(name="resnet10t", **options) -> tuple[nn.Module, nn.Module]:
    """A small timm model in float64 and its fused copy."""
    import timm

    torch.manual_seed(0)
    plain = timm.create_model(name, **options).double()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return plain, fused_copy(plain)


@pytest.mark.composes("timm's `features_only`", "works")
@pytest.mark.parametrize("name", ["resnet10t", "regnetx_002", "mobilenetv3_small_050"])
def test_timm_features_only(name):
    plain, fused = timm_pair(name, features_only=True)
    x = images(2, 3, 64, 64)
    assert fusedres.is_fused(fused)
    for one, other in zip(plain.eval()(x), fused.eval()(x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.composes("timm's gradient checkpointing", "works")
@pytest.mark.parametrize("reentrant", [True, False])
def test_timm_gradient_checkpointing(reentrant, monkeypatch):
    monkeypatch.setenv("TIMM_REENTRANT_CKPT", str(int(reentrant)))
    plain, fused = timm_pair("regnetx_002", num_classes=4)
    for each in (plain, fused):
        each.set_grad_checkpointing(True)
    assert excess(plain, fused, images(2, 3, 64, 64)) <= ALLOWED


@pytest.mark.composes("timm's `forward_intermediates`", "works")
def test_timm_forward_intermediates():
    plain, fused = timm_pair()
    x = images(2, 3, 64, 64)
    found = [
        each.eval().forward_intermediates(x, intermediates_only=True) for each in (plain, fused)
    ]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


# --- what people do to any model ---------------------------------------------------------------------------------


def freeze_all(model):
    model.requires_grad_(False)
    model.fc.requires_grad_(True)


def initialise(model):
    def each(module):
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 0.7)

    model.apply(each)


def freeze_norms(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.requires_grad_(False)


def fold_batch_norms(model):
    """Convolution and BatchNorm in one, child by child, as for inference."""
    model.eval()
    for block in model.modules():
        if isinstance(block, torchvision.models.resnet.BasicBlock):
            for k in (1, 2):
                folded = torch.nn.utils.fusion.fuse_conv_bn_eval(
                    getattr(block, f"conv{k}"), getattr(block, f"bn{k}")
                )
                setattr(block, f"conv{k}", folded)
                setattr(block, f"bn{k}", nn.Identity())


def convert(model):
    return nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()


def load(model):
    other = torchvision.models.resnet.ResNet(
        torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5
    )
    model.load_state_dict({name: t * 0.9 for name, t in other.state_dict().items()})


def new_head(model):
    model.fc = nn.Linear(512, 3, dtype=torch.float64)


DONE_TO_IT = (
    freeze_all,
    initialise,
    freeze_norms,
    fold_batch_norms,
    convert,
    load,
    new_head,
)


@pytest.mark.composes(
    "what is done to any module after `fuse_` (weight norm, pruning, freezing, SWA...)", "works"
)
@pytest.mark.parametrize("done", DONE_TO_IT, ids=lambda f: f.__name__)
def test_done_to_a_fused_model_as_to_any(plain, fused, done):
    models = [copy.deepcopy(plain), fused]
    for model in models:
        torch.manual_seed(1)
        done(model)
    assert excess(*models, X) <= ALLOWED
