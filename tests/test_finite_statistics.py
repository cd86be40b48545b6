"""Running statistics kept finite: `keep_finite_statistics`, over every way on which something moves them."""

import contextlib
import copy
import importlib.util

import pytest
import torch
from torch import nn

import fusedres
from fusedres.nn.batch_norm import call_add_batch_norm, call_dual_batch_norm, call_tail

from .swap_blocks import Block, images

KEEP = fusedres.FuseConfig(keep_finite_statistics=True)


def norm(device, momentum=0.1, dtype=torch.float32):
    module = nn.BatchNorm2d(4, momentum=momentum).to(device, dtype)
    nn.init.uniform_(module.running_mean, -1, 1)
    nn.init.uniform_(module.running_var, 0.5, 2)
    module.num_batches_tracked.fill_(3)
    return module


def input(device, *, bad=None, value=float("inf"), dtype=torch.float32):
    """Four channels, of which those in `bad` have a value that is not finite."""
    x = images(3, 4, 5, 4).to(device, dtype)
    for channel in bad or ():
        x[1, channel, 2, 1] = value
    return x


def buffers(module):
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


WAYS = {
    "tail": lambda n, m, x: call_tail(n, x, None, "relu", None, True),
    "residual": lambda n, m, x: call_tail(n, x, torch.ones_like(x), "relu", None, True),
    "dual": lambda n, m, x: call_dual_batch_norm(n, x, m, torch.ones_like(x) + x, "relu", keep=True),
    "preactivation": lambda n, m, x: call_add_batch_norm(n, x, torch.ones_like(x), "relu", True),
    "function": lambda n, m, x: fusedres.functional.batch_norm_act(
        x, n.running_mean, n.running_var, n.weight, n.bias, True, keep_finite_statistics=True),
    "add function": lambda n, m, x: fusedres.functional.add_batch_norm_act(
        x, torch.ones_like(x), n.running_mean, n.running_var, n.weight, n.bias, True, keep_finite_statistics=True),
    "dual function": lambda n, m, x: fusedres.functional.dual_batch_norm_act(
        x, torch.ones_like(x) + x, n.running_mean, n.running_var, m.running_mean, m.running_var, n.weight, n.bias,
        training=True, keep_finite_statistics=True),
    "projection function": lambda n, m, x: fusedres.functional.projection_batch_norm_act(
        x, torch.ones_like(x), torch.ones(4, 4, 1, 1, device=x.device), n.running_mean, n.running_var, m.running_mean,
        m.running_var, training=True, keep_finite_statistics=True),
}  # fmt: skip


@pytest.mark.parametrize("launches", ["one", "three"])
@pytest.mark.parametrize("way", WAYS)
def test_a_channel_that_is_not_finite_stays(way, launches, device):
    """The others move exactly as in the batch where nothing is wrong."""
    moved, other = norm(device), norm(device)
    kept = copy.deepcopy(moved)
    before = buffers(kept)
    with launched(launches):
        WAYS[way](moved, copy.deepcopy(other), input(device))
        WAYS[way](kept, other, input(device, bad=[2]))
    expected = buffers(moved)
    for name in ("running_mean", "running_var"):
        expected[name][2] = before[name][2]
    found = buffers(kept)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def launched(how):
    """With the forward in so many launches, where there are any."""
    if not importlib.util.find_spec("triton"):
        return contextlib.nullcontext()
    from fusedres.kernels.launch import passes

    return passes(how)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("way", ["tail", "dual"])
def test_a_batch_that_is_not_finite_did_not_happen(way, value, device):
    kept, other = norm(device), norm(device)
    before = buffers(kept), buffers(other)
    WAYS[way](kept, other, input(device, bad=range(4), value=value))
    after = buffers(kept), buffers(other)
    for module, was in zip(after, before, strict=True):
        assert all(torch.equal(module[name], was[name]) for name in was)


def test_what_is_not_asked_for_is_as_in_pytorch(device):
    plain = norm(device)
    ours = copy.deepcopy(plain)
    plain(input(device, bad=[1]))
    call_tail(ours, input(device, bad=[1]), None, "relu")
    assert ours.running_var[1].isnan()
    assert ours.num_batches_tracked == plain.num_batches_tracked == 4


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_counter_goes_with_the_first_channel(layout, device):
    first, second = norm(device), norm(device)
    WAYS["tail"](first, None, input(device, bad=[0]).to(memory_format=layout))
    WAYS["tail"](second, None, input(device, bad=[1, 2, 3]).to(memory_format=layout))
    assert (int(first.num_batches_tracked), int(second.num_batches_tracked)) == (3, 4)


def test_a_cumulative_average_stays_too(device):
    kept = norm(device, momentum=None)
    before = buffers(kept)
    WAYS["tail"](kept, None, input(device, bad=range(4)))
    assert all(torch.equal(buffer, before[name]) for name, buffer in kept.named_buffers())


@pytest.mark.parametrize("keep", [True, False])
def test_a_module_keeps_them_if_it_is_asked_to(keep, device):
    module = fusedres.nn.BatchNormAct2d(4, keep_finite_statistics=keep).to(device)
    module(input(device, bad=[2])).sum().backward()
    assert bool(module.running_var.isfinite().all()) is keep
    assert ("keep_finite_statistics=True" in repr(module)) is keep


def Bare(**how):
    return nn.Sequential(fusedres.nn.Projection(4, 4, **how), nn.Identity())


class Joined(nn.Module):
    def __init__(self, **how):
        super().__init__()
        self.bn, self.downsample = nn.BatchNorm2d(4), fusedres.nn.Projection(4, 4, **how)

    def forward(self, x):
        return self.downsample.join(self.bn, x, x)


class Hooked(Joined):
    """So that the modules are called one by one."""

    def __init__(self, **how):
        super().__init__(**how)
        self.bn.register_forward_hook(lambda *_: None)


OURS = {
    "Projection": Bare,
    "Projection.join": Joined,
    "Projection.join, one by one": Hooked,
    "BasicBlock": lambda **how: fusedres.nn.BasicBlock(4, 4, shortcut="conv", **how),
    "Bottleneck, weighed": lambda **how: fusedres.nn.Bottleneck(4, 1, shortcut="scale", **how),
    "Residual": lambda **how: fusedres.nn.Residual(
        nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), **how),
    "Residual, projected": lambda **how: fusedres.nn.Residual(
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), fusedres.nn.Projection(4, 4), **how),
    "ResNet": lambda **how: fusedres.models.ResNet(
        fusedres.nn.BasicBlock, (1,), 3, 4, widths=(4,), stem="3x3", **how),
    "PreActResNet": lambda **how: fusedres.models.PreActResNet(
        fusedres.nn.PreActBasicBlock, (2,), 3, 4, widths=(4,), stem="3x3", **how),
}  # fmt: skip


def spoilt(model, device):
    """The buffers that a batch with an infinity moves, of a model that has seen one without."""
    model.to(device)(input(device))
    before = buffers(model)
    model(input(device, bad=range(4)))
    return {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}


@pytest.mark.parametrize("how", ["when it is made", "by fuse_"])
@pytest.mark.parametrize("name", OURS)
def test_a_module_of_ours_keeps_those_of_all_that_it_runs(name, how, device):
    if how == "by fuse_":
        model = OURS[name]()
        fusedres.fuse_(model, KEEP)
    else:
        model = OURS[name](keep_finite_statistics=True)
    assert spoilt(model, device) == set()
    assert "keep_finite_statistics=True" in repr(model)


@pytest.mark.once
@pytest.mark.parametrize("name", OURS)
def test_unfused_a_module_of_ours_does_as_it_was_made(name, device):
    model = OURS[name]()
    fusedres.fuse_(model, KEEP)
    fusedres.unfuse_(model)
    assert spoilt(model, device) == {*buffers(model)}


@pytest.mark.once
@pytest.mark.parametrize("made_with", [True, False])
def test_what_a_module_was_made_with_comes_back(made_with):
    model = fusedres.nn.BatchNormAct2d(4, keep_finite_statistics=made_with)
    state = dict(vars(model))
    found = []
    for config in (KEEP, KEEP, None):
        fusedres.fuse_(model, config)
        found.append(copy.deepcopy(model).keep_finite_statistics)
    fusedres.fuse_(model, KEEP)
    fusedres.unfuse_(model)
    assert found == [True, True, made_with]
    assert vars(model) == state


@pytest.mark.once
def test_a_module_of_ours_that_the_filter_leaves_out_does_as_it_was_made():
    model = nn.ModuleDict({name: fusedres.nn.BatchNormAct2d(4) for name in "ab"})
    fusedres.fuse_(model, KEEP, filter_fn=lambda module, name: name != "a")
    assert [each.keep_finite_statistics for each in model.values()] == [False, True]


def test_gradients_are_those_without_it(device):
    """A backward before which the statistics moved on, as in an accumulation of two batches."""
    found = []
    for keep in (False, True):
        module = fusedres.nn.BatchNormAct2d(4, keep_finite_statistics=keep).to(device)
        x = input(device).requires_grad_()
        first = module(x)
        (first.square().sum() + module(x.detach() + 1).sum()).backward()
        found.append((x.grad, module.weight.grad, *module.buffers()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class Net(Block):
    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)) + x)
        return self.relu(self.bn2(self.conv2(x)))


def train(model, batches, device):
    """float16 under autocast, with a scaler; what is left of it."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=16.0, growth_interval=1000)
    for x in batches:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.float16):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update(16.0)
    return list(model.state_dict().values())


@pytest.mark.composes("a step that `GradScaler` skips, with `keep_finite_statistics`", "works")
def test_a_step_that_the_scaler_skips_did_not_happen(device):
    """The batch overflows float16 in every channel of the first convolution."""
    torch.manual_seed(0)
    batches = [images(2, 4, 4, 4).float().to(device) * k for k in (1, 1e7, 2)]
    plain = Net().to(device)
    fusedres.fuse_(plain, KEEP)
    expected = train(copy.deepcopy(plain), [batches[0], batches[2]], device)
    found = train(plain, batches, device)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_batch_norm_that_is_converted_after_fusing_keeps_them(device):
    """The option is the block's, not its child's."""
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()).to(device)
    fusedres.fuse_(model, KEEP)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if device.type == "cpu":  # where PyTorch's own refuses to run
        model[0].__class__ = nn.BatchNorm2d
    model(input(device, bad=[1]))
    assert model[0].running_var.isfinite().all()


@pytest.mark.composes("`keep_finite_statistics` under `torch.compile`", "works")
@pytest.mark.compiler
def test_compiled_they_are_kept_too():
    model = Net()
    fusedres.fuse_(model, KEEP)
    torch._dynamo.reset()
    x = input("cpu", bad=[2])
    eager = copy.deepcopy(model)
    eager(x)
    torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(dict(model.named_buffers()), dict(eager.named_buffers()))


@pytest.mark.once
@pytest.mark.parametrize("field", ["keep_finite_statistics", "recompute"])
def test_an_option_is_true_or_false(field):
    with pytest.raises(TypeError, match=f"{field} is 'yes', expected True or False"):
        fusedres.FuseConfig(**{field: "yes"})
