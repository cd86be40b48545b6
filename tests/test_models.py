"""The ResNets against torchvision's, the papers' parameter counts, and their own layers called one by one."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedres
from fusedres import models
from fusedres.benchmarks.steps import ALLOWED, excess
from fusedres.models import PreActResNet, ResNet
from fusedres.nn import BasicBlock, Bottleneck, PreActBasicBlock, PreActBottleneck

MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
TORCHVISION = [
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2",
    "resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d",
]  # fmt: skip


def of_torchvision(name):
    import torchvision

    return torchvision.models.get_model(name, weights=None)


@pytest.mark.once
@pytest.mark.parametrize("name", TORCHVISION)
def test_state_dict_is_that_of_torchvision(name):
    with torch.device("meta"):
        theirs = of_torchvision(name).state_dict()
    ours = getattr(models, name)(device="meta").state_dict()
    assert [(k, v.shape) for k, v in ours.items()] == [(k, v.shape) for k, v in theirs.items()]


@pytest.mark.once
@MODES
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_with_the_weights_of_torchvision_it_computes_the_same(name, training):
    """Both ways: into ours, and from ours into another of theirs, which is the same again."""
    theirs, ours, again = of_torchvision(name), getattr(models, name)(), of_torchvision(name)
    ours.load_state_dict(theirs.state_dict())
    again.load_state_dict(ours.state_dict())
    again, ours = again.double().train(training), ours.double().train(training)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert torch.equal(theirs.double().train(training)(x), copy.deepcopy(again)(x))
    again.load_state_dict(ours.state_dict())
    assert excess(again, ours, x) <= ALLOWED


@pytest.mark.once
@pytest.mark.parametrize("options", [{}, {"zero_init_residual": True}], ids=["plain", "zeroed"])
def test_a_seed_gives_the_weights_of_torchvision(options):
    import torchvision

    torch.manual_seed(1)
    theirs = torchvision.models.resnet50(**options).state_dict()
    torch.manual_seed(1)
    ours = models.resnet50(**options).state_dict()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


# name: (millions as published, digits). He et al. 2015, table 6.
PUBLISHED = {
    "resnet20": (0.27, 2), "resnet32": (0.46, 2), "resnet44": (0.66, 2), "resnet56": (0.85, 2),
    "resnet110": (1.7, 1), "resnet1202": (19.4, 1),
}  # fmt: skip
# He et al. 2016, tables 4 and 5. The 10.2 of ResNet-1001 leaves out the BatchNorms' own (10.3 with them).
PUBLISHED_WEIGHTS = {"preact_resnet164": (1.7, 1), "preact_resnet1001": (10.2, 1)}


@pytest.mark.once
@pytest.mark.parametrize("name", [*PUBLISHED, *PUBLISHED_WEIGHTS])
def test_the_papers_count_as_many_parameters(name):
    millions, digits = (PUBLISHED | PUBLISHED_WEIGHTS)[name]
    model = getattr(models, name)(device="meta")
    counted = [p for p in model.parameters() if name in PUBLISHED or p.dim() > 1]
    assert round(sum(p.numel() for p in counted) / 1e6, digits) == millions


@pytest.mark.once
@pytest.mark.parametrize("name", models.list_models())
def test_the_name_says_how_many_layers(name):
    """Convolutions on the longest path, and the classifier."""
    model = getattr(models, name)(device="meta")
    convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    on_path = [n for n in convolutions if "downsample" not in n and "shortcut" not in n]
    assert len(on_path) + 1 == int(re.search(r"resnex?t(\d+)", name)[1])


NARROW = {
    "basic": (ResNet, BasicBlock, {}),
    "bottleneck-pad": (ResNet, Bottleneck, {"shortcut": "pad", "stem": "3x3", "stride_on": "1x1"}),
    "preact-basic-pad": (PreActResNet, PreActBasicBlock, {"shortcut": "pad", "stem": "3x3"}),
    "preact-bottleneck": (PreActResNet, PreActBottleneck, {"groups": 2}),
}


def narrow(case, **options):
    kind, block, fixed = NARROW[case]
    return kind(block, (1, 2), 5, 2, widths=(4, 8), **fixed, **options)


class LayerByLayer(nn.Module):
    """The same network with every child of it called, under the names of the network itself."""

    def __init__(self, net):
        super().__init__()
        self._modules.update(net._modules)
        self.maxpool = net.maxpool

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = x if self.maxpool is None else self.maxpool(x)
        for block in (*self.layer1, *self.layer2):
            x = block(x)
        x = self.bn(x) if hasattr(self, "bn") else x
        return self.fc(x.mean(tuple(range(2, x.dim()))))


@MODES
@pytest.mark.parametrize("case", NARROW)
def test_it_trains_as_its_layers_called_one_by_one(case, training, device):
    net = narrow(case).double().to(device).train(training)
    plain = LayerByLayer(copy.deepcopy(net)).train(training)
    x = torch.randn(2, 2, 12, 10, dtype=torch.float64).to(device)
    assert excess(plain, net, x) <= ALLOWED


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("case", NARROW)
def test_signals_images_and_volumes(case, dims, device):
    net = narrow(case, dims=dims, device=device)
    assert net(torch.randn(2, 2, *[11] * dims, device=device)).shape == (2, 5)


@pytest.mark.parametrize(
    ("dims", "layout"), [(2, torch.channels_last), (3, torch.channels_last_3d)]
)
@pytest.mark.parametrize("case", ["basic", "preact-basic-pad"])
def test_channels_last_from_the_start_to_the_end(case, dims, layout, device):
    net = narrow(case, dims=dims, channels_last=True, device=device)
    seen = []
    net.avgpool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    net(torch.randn(2, 2, *[16] * dims, device=device).to(memory_format=layout))
    assert seen[0].is_contiguous(memory_format=layout)
    assert net.layer1[0].conv1.weight.is_contiguous(memory_format=layout)


def test_a_dtype_is_that_of_all_parameters():
    net = models.resnet20(dtype=torch.bfloat16)
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}


@pytest.mark.once
@pytest.mark.parametrize("init", ["he", "xavier"])
def test_initial_weights_have_the_spread_of_the_paper(init):
    weight = models.resnet18(init=init).layer4[0].conv1.weight.detach()  # 256 -> 512 channels, 3x3
    fan_in, fan_out = 256 * 9, 512 * 9
    expected = (2 / fan_out) ** 0.5 if init == "he" else (2 / (fan_in + fan_out)) ** 0.5
    assert float(weight.std()) == pytest.approx(expected, rel=0.01)


@pytest.mark.once
def test_a_network_of_1001_layers_trains():
    """Beginning as its shortcuts alone: each block gets a gradient, and a step lowers the loss on its batch."""
    net = models.preact_resnet1001(zero_init_residual=True)
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    loss = F.cross_entropy(net(x), labels)
    loss.backward()
    optimizer.step()
    ends = [p for name, p in net.named_parameters() if name.endswith("conv3.weight")]
    assert (len(ends), sum(bool(p.grad.any()) for p in ends)) == (333, 333)
    assert F.cross_entropy(net(x), labels) < loss


@pytest.mark.once
@pytest.mark.parametrize("name", ["resnet20", "preact_resnet110"])
def test_features_are_extracted_by_name(name):
    from torchvision.models.feature_extraction import create_feature_extractor

    net = getattr(models, name)().eval()
    seen, x = [], torch.randn(1, 3, 8, 8)
    handle = net.layer2[1].register_forward_hook(lambda *args: seen.append(args[2]))
    net(x)
    handle.remove()
    found = create_feature_extractor(net, {"layer2.1": "features"})(x)["features"]
    torch.testing.assert_close(found, seen[0])


@pytest.mark.once
@pytest.mark.filterwarnings(
    "ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning"
)
@pytest.mark.parametrize("case", NARROW)
def test_trace_in_eval(case):
    net, x = narrow(case).eval(), torch.randn(2, 2, 12, 10)
    torch.testing.assert_close(torch.jit.trace(net, (x,))(x + 1), net(x + 1))


@pytest.mark.once
@pytest.mark.parametrize("name", ["resnet50", "preact_resnet164"])
def test_every_batch_norm_reports_that_it_is_fused(name):
    report = fusedres.fuse_(getattr(models, name)(), strict=True, input_shape=(2, 3, 32, 32))
    counted = sum(isinstance(m, nn.BatchNorm2d) for m in getattr(models, name)().modules())
    assert (len(report.rows), report.n_fused) == (counted, counted)
    assert 0 < report.bytes_saved < report.bytes_moved


BAD = {
    "init": ({"init": "zero"}, r"ResNet: init is 'zero', expected one of 'he', 'xavier'"),
    "shortcut": ({"shortcut": "B"}, r"ResNet: shortcut is 'B', expected one of 'identity', 'project', 'pad', 'conv'"),
    "dims": ({"dims": 0}, r"ResNet: dims is 0, expected one of 1, 2, 3"),
    "stem": ({"stem": "5x5"}, r"ResNet: stem is '5x5', expected one of '7x7', '3x3'"),
    "channels_last": (
        {"channels_last": True, "dims": 1},
        r"ResNet: channels_last is True and dims is 1; PyTorch has that memory format for 2 and 3 dimensions only",
    ),
    "widths": ({"widths": (16, 32)}, r"ResNet: layers has 4 entries and widths 2, expected one of each"),
    "identity": ({"shortcut": "identity"}, r"BasicBlock: shortcut='identity' adds the input as it is"),
}  # fmt: skip


@pytest.mark.once
@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_is_told(case):
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        models.resnet18(**options)


# --- what it is asked for in vain ---------------------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "options", "kind", "text"),
    [
        ("resnet50", {"weights": "DEFAULT"}, TypeError, r"resnet50\(weights='DEFAULT'\).state_dict\(\)"),
        ("resnet18", {"pretrained": True}, TypeError, r"resnet18: pretrained is True, .*model.load_state_dict"),
        ("resnet20", {"weights": "DEFAULT"}, TypeError, r"load your own with model.load_state_dict"),
        ("resnet18", {"num_class": 10}, TypeError, r"there is no argument 'num_class'; did you mean 'num_classes'"),
        ("resnet18", {"xyzzy": 10}, TypeError, r"there is no argument 'xyzzy'; there are num_classes, in_channels"),
        ("resnet18", {"num_classes": -1}, ValueError, r"ResNet: num_classes is -1, expected a whole number"),
        ("resnet18", {"num_classes": "10"}, TypeError, r"num_classes is '10', expected a whole number"),
        ("resnet18", {"num_classes": 10.0}, TypeError, r"num_classes is 10.0, expected a whole number"),
        ("preact_resnet110", {"in_channels": 0}, ValueError, r"PreActResNet: in_channels is 0, expected"),
        ("resnet50", {"groups": 0}, ValueError, r"groups is 0, expected"),
        ("resnet50", {"base_width": 0}, ValueError, r"base_width is 0, expected"),
        ("resnet18", {"widths": (64, 128, 0, 512)}, ValueError, r"widths\[2\] is 0, expected"),
    ],
)  # fmt: skip
def test_what_there_is_not_is_said(name, options, kind, text):
    with pytest.raises(kind, match=text):
        getattr(models, name)(device="meta", **options)


@pytest.mark.once
@pytest.mark.parametrize(
    ("layers", "text"), [((2, 2, -1, 2), r"layers\[2\] is -1"), ((2, 2), "layers has 2 entries")]
)
def test_layers_that_are_none(layers, text):
    with pytest.raises(ValueError, match=text):
        ResNet(BasicBlock, layers, device="meta")


@pytest.mark.once
@pytest.mark.parametrize("argument", ["in_channels", "channels", "stride", "groups", "base_width"])
def test_a_blocks_numbers_are_looked_at(argument):
    with pytest.raises(ValueError, match=f"Bottleneck: {argument} is 0, expected a whole number"):
        Bottleneck(**{"in_channels": 8, "channels": 8, argument: 0})


@pytest.mark.once
@pytest.mark.parametrize("options", [{"weights": None}, {"pretrained": False}])
def test_no_weights_are_what_there_is(options):
    assert isinstance(models.resnet18(device="meta", **options), ResNet)
