"""`memory_report`: bytes kept for the backward, by unique storage and kind, of a model that stays as it was."""

import copy
import json
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import fusedres
from fusedres.memory import FUSED, KERNELS, KINDS

from .swap_blocks import Block, images
from .test_recompute import AGAIN, Tail, saved

SHAPE = (2, 4, 4, 4)
PLACES = 2 * 4 * 4 * 4 * 4  # bytes of an activation


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.dropout, self.fc = Tail(), nn.Dropout(0.5), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.dropout(self.block(x).mean((2, 3))))


def net(device="cpu"):
    torch.manual_seed(0)
    return Net().to(device)


def test_kinds_are_counted_by_what_reads_them(device):
    """Two convolutions, two BatchNorms; in plain PyTorch the last ReLU's output, which nobody here reads but a mean."""
    report = fusedres.memory_report(Tail().to(device), SHAPE)
    unfused = report.columns["unfused"]
    assert unfused["convolution inputs"] == unfused["BatchNorm inputs"] == 2 * PLACES
    assert unfused["masks"] == 0
    assert unfused["others"] == PLACES


def test_a_tail_on_the_kernels_keeps_a_bit_an_element(device, backend):
    report = fusedres.memory_report(Tail().to(device), SHAPE)
    column = report.columns[FUSED if backend == "triton" else KERNELS]
    assert column["masks"] == PLACES // 4 // 8
    assert column["others"] == 0
    assert column["statistics"] == 2 * 4 * 4 * 4  # of two BatchNorms, four values of four channels


@pytest.mark.kernels
def test_the_estimate_by_shapes_is_what_the_kernels_keep(device):
    model = net(device)
    ran = fusedres.memory_report(model, SHAPE)
    with fusedres.backend("aten"):
        told = fusedres.memory_report(model, SHAPE)
    assert told.columns[KERNELS] == ran.columns[FUSED]


@pytest.mark.parametrize("config", [None, AGAIN], ids=["default", "recompute"])
def test_all_of_it_is_what_autograd_is_told(config, device, backend):
    """Counted again, with hooks alone, of a model that runs as it is."""
    model = Tail().to(device)
    report = fusedres.memory_report(model, SHAPE, config)
    fusedres.fuse_(model, config)
    counted, _ = saved(model, torch.zeros(SHAPE, device=device))
    own = sum(p.untyped_storage().nbytes() for p in model.parameters() if p.dim() == 4)
    own += sum(norm.weight.nbytes for norm in (model.bn1, model.bn2))
    if backend == "aten":  # PyTorch's BatchNorm saves its running statistics
        own += sum(b.nbytes for b in model.buffers() if b.dim())
        assert report.after == counted - own
    else:  # what is kept lies in one block, each part of which begins on a boundary
        assert 0 <= counted - own - report.after < 512


def test_recompute_keeps_one_activation_less(device):
    model = Tail().to(device)
    reports = [fusedres.memory_report(model, SHAPE, config) for config in (None, AGAIN)]
    assert reports[0].after - reports[1].after == PLACES


@pytest.mark.parametrize("is_fused", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_stays_as_it_was(is_fused, training, device):
    model = net(device).train(training)
    if is_fused:
        fusedres.fuse_(model)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    state = copy.deepcopy(model.state_dict())
    parameters, generator = list(model.parameters()), torch.get_rng_state()
    fusedres.memory_report(model, SHAPE)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(torch.get_rng_state(), generator)
    assert fusedres.is_fused(model) is is_fused
    assert all(module.training is training for module in model.modules())
    assert model.fc.weight.grad.sum() == 12
    assert model.fc.bias.grad is None


def test_a_fused_model_is_told_as_it_is_fused(device):
    """Without a config: with the options that it has."""
    model = Tail().to(device)
    expected = fusedres.memory_report(model, SHAPE, AGAIN)
    fusedres.fuse_(model, AGAIN)
    assert fusedres.memory_report(model, SHAPE) == expected


@pytest.mark.once
def test_an_input_may_be_a_tensor_arguments_or_a_shape():
    model = net()
    x = images(*SHAPE).float()
    reports = [
        fusedres.memory_report(model, input) for input in (x, (x,), SHAPE, torch.Size(SHAPE))
    ]
    assert all(report.columns == reports[0].columns for report in reports)


class OfMany(Tail):
    def forward(self, x, more):
        return super().forward(x + more["a"][0]) * more["scale"]


@pytest.mark.once
def test_tensors_in_dicts_are_moved_to_where_shapes_are_and_are_told():
    x = images(*SHAPE).float()
    report = fusedres.memory_report(OfMany(), (x, {"a": [x], "scale": 2}))
    assert report.on_gpu is not None, report.note
    assert report.input == (SHAPE, SHAPE)


@pytest.mark.once
def test_a_shape_may_be_of_numpys_numbers():
    report = fusedres.memory_report(Tail(), tuple(np.array(SHAPE)))
    assert report == fusedres.memory_report(Tail(), SHAPE)


class Draws(Tail):
    def forward(self, x):
        return super().forward(x) * (random.random() + np.random.rand())


@pytest.mark.once
def test_other_generators_are_put_back_too():
    expected = random.getstate(), np.random.get_state()[1].tolist()
    fusedres.memory_report(Draws(), SHAPE)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == expected


def weight_norm(conv):
    torch.nn.utils.weight_norm(conv)


@pytest.mark.once
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "how",
    [weight_norm, lambda conv: prune.l1_unstructured(conv, "weight", 1)],
    ids=["norm", "pruned"],
)
def test_a_weight_that_is_computed_at_each_call_is_no_obstacle(how):
    model = net()
    how(model.block.conv1)
    model(images(*SHAPE).float())
    weight = model.block.conv1.weight
    report = fusedres.memory_report(model, SHAPE)
    assert report.on_gpu is not None, report.note
    assert model.block.conv1.weight is weight


@pytest.mark.once
def test_what_is_frozen_keeps_nothing():
    model = net().requires_grad_(False)
    assert fusedres.memory_report(model, SHAPE).before == 0


@pytest.mark.once
def test_what_went_before_the_end_does_not_count():
    class Drops(Block):
        def forward(self, x):
            self.conv2(x).relu().square()
            return self.conv1(x)

    report = fusedres.memory_report(Drops(), SHAPE)
    assert report.before == PLACES


@pytest.mark.once
def test_shapes_alone_cannot_tell_of_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        report = fusedres.memory_report(net(), SHAPE)
    assert report.on_gpu is None
    assert "autocast does not know tensors without values" in report.note


@pytest.mark.once
def test_the_table_fits_a_terminal():
    report = fusedres.memory_report(fusedres.models.resnet20(), (2, 3, 8, 8))
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split("  ")[0] for line in lines if line.startswith(KINDS)] == [*KINDS]


@pytest.mark.once
def test_files_say_the_same(tmp_path):
    report = fusedres.memory_report(net(), SHAPE)
    text = report.to_json(tmp_path / "memory.json")
    assert (tmp_path / "memory.json").read_text() == text
    found = json.loads(text)
    assert found["columns"] == report.columns
    assert (found["before"], found["after"]) == (report.before, report.after)
    table = report.to_markdown(tmp_path / "memory.md")
    assert (tmp_path / "memory.md").read_text() == table
    assert "| convolution inputs |" in table


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet50", SHAPE), "memory_report: model is a str"),
        (
            (nn.Identity(), "resnet50"),
            "memory_report: input is a str, 'resnet50', expected a tensor",
        ),
        ((nn.Identity(), SHAPE, {}), "memory_report: config is a dict"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message):
    with pytest.raises(TypeError, match=message):
        fusedres.memory_report(*arguments)


def test_inference_mode_around_it_changes_nothing(device):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    model.to(device)
    expected = fusedres.memory_report(model, (2, 3, 4, 4)).to_json()
    with torch.inference_mode():
        assert fusedres.memory_report(model, (2, 3, 4, 4)).to_json() == expected
        given = torch.zeros(2, 3, 4, 4, device=device)
        assert fusedres.memory_report(model, given).to_json() == expected
