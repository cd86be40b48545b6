"""`FuseConfig(recompute=True)`: what a convolution reads is computed again for its backward, with the same bits."""

import copy
import functools
import gc
import weakref

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import fusedres
from fusedres.ops import recompute

from .swap_blocks import Block, images

AGAIN = fusedres.FuseConfig(recompute=True)


class Tail(Block):
    """A block, of which relu(bn1(...)) is read by conv2 alone."""

    def forward(self, x):
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


def blocks(device, kind=Tail, layout=torch.contiguous_format):
    """The same block without and with it, and an input."""
    torch.manual_seed(0)
    model = kind().to(device, memory_format=layout)
    both = copy.deepcopy(model), model
    for block, config in zip(both, (None, AGAIN), strict=True):
        fusedres.fuse_(block, config)
    return both, images(2, 4, 4, 4).float().to(device, memory_format=layout)


def step(block, x, how=lambda block, x: block(x), change=None, backwards=1):
    """The gradients of input and parameters, and the buffers."""
    x = x.clone().requires_grad_()
    loss = how(block, x).square().sum()
    if change is not None:
        with torch.no_grad():
            change(block)
    for k in range(backwards):
        loss.backward(retain_graph=k + 1 < backwards)
    return [x.grad, *(p.grad for p in block.parameters() if p.grad is not None), *block.buffers()]


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def launched(how):
    pytest.importorskip("triton")
    from fusedres.kernels.launch import passes

    return passes(how)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "launches", [pytest.param("one", marks=[pytest.mark.kernels, pytest.mark.slow]), "three"]
)
def test_gradients_are_the_same_bits(layout, launches, device):
    (plain, again), x = blocks(device, layout=layout)
    with launched(launches):
        assert same(step(again, x), step(plain, x))


def saved(block, x):
    """The bytes that autograd saves, by storage; nothing but what it is told."""
    held = {}

    def pack(tensor):
        held[tensor.untyped_storage()._cdata] = tensor
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = block(x.requires_grad_())
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values()), output


def test_one_activation_less_is_kept(device):
    (plain, again), x = blocks(device)
    assert saved(plain, x)[0] - saved(again, x)[0] == x.numel() * x.element_size()


def test_the_report_says_so(device):
    _, again = blocks(device)[0]
    assert "computed again for the backward of its convolution" in str(fusedres.explain(again))


WAYS = {
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "save_on_cpu": lambda block, x: _under(torch.autograd.graph.save_on_cpu(), block, x),
}


def _under(context, block, x):
    with context:
        return block(x)


@pytest.mark.composes("`FuseConfig(recompute=True)` in a checkpointed region", "works")
def test_what_is_checkpointed_keeps_nothing_anyway(device):
    """Its saved tensors may be asked for once only."""
    (plain, again), x = blocks(device)
    way = functools.partial(checkpoint, use_reentrant=False)
    assert same(step(again, x, way), step(plain, x, way))


@pytest.mark.composes("`FuseConfig(recompute=True)` under `save_on_cpu`", "works")
@pytest.mark.parametrize("way", [pytest.param("reentrant", marks=pytest.mark.slow), "save_on_cpu"])
def test_with_others_that_keep_less(way, device):
    (plain, again), x = blocks(device)
    assert same(step(again, x, WAYS[way]), step(plain, x, WAYS[way]))


@pytest.mark.slow
@pytest.mark.composes("`FuseConfig(recompute=True)`, two backward passes over one graph", "works")
def test_a_second_backward(device):
    (plain, again), x = blocks(device)
    assert same(step(again, x, backwards=2), step(plain, x, backwards=2))


@pytest.mark.composes("`FuseConfig(recompute=True)`, double backward", "works")
def test_a_double_backward(device):
    found = []
    both, x = blocks(device)
    for block in both:
        x = x.detach().requires_grad_()
        (dx,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        dx.square().sum().backward()
        found.append([x.grad, *(p.grad for p in block.parameters())])
    torch.testing.assert_close(found[1], found[0])


def test_hooks_of_the_convolution_run(device):
    (_, again), x = blocks(device)
    seen = []
    again.conv2.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    again(x)
    assert seen == [x.shape]


@pytest.mark.parametrize("of", ["conv2.weight", "bn1.weight"])
def test_what_was_changed_in_place_since_is_refused(of, device):
    """As it is without: PyTorch looks at the version of what it saves itself."""
    messages = []
    both, x = blocks(device)
    for block in both:
        with pytest.raises(RuntimeError) as error:
            step(block, x, change=lambda block: block.get_parameter(of).mul_(2))
        messages.append(str(error.value).partition(":")[0])
    assert messages[0] == messages[1]
    assert "modified by an inplace operation" in messages[0]


@pytest.mark.slow
def test_a_bias_may_be_changed_before_the_backward(device):
    """PyTorch's BatchNorm does not keep its bias; the activation is that of the forward."""

    def change(block):
        block.bn1.bias.add_(1.0)

    (plain, again), x = blocks(device)
    assert same(step(again, x, change=change), step(plain, x, change=change))


@pytest.mark.slow
@pytest.mark.kernels  # in plain PyTorch the ReLU has kept it, and refuses
def test_an_activation_that_its_reader_changes_is_kept(device):
    """What the convolution saves then is no longer what the ReLU gave."""
    (plain, again), x = blocks(device)
    for block in (plain, again):
        block.conv2.register_forward_pre_hook(lambda module, args: (args[0].mul_(2),))
    assert same(step(again, x), step(plain, x))


@pytest.mark.composes("`FuseConfig(recompute=True)` under `torch.compile`", "works")
@pytest.mark.compiler
def test_compiled_it_steps_aside():
    (plain, again), x = blocks("cpu")
    torch._dynamo.reset()
    compiled = torch.compile(again, backend="aot_eager", fullgraph=True)
    found = step(again, x, lambda _, x: compiled(x))
    torch.testing.assert_close(found, step(plain, x))


class Twice(Block):
    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y))) + y


class Smooth(Block):
    def forward(self, x):
        return self.bn2(self.conv2(torch.nn.functional.silu(self.bn1(self.conv1(x)))))


@pytest.mark.once
@pytest.mark.parametrize("kind", [Twice, Smooth])
def test_what_others_read_too_is_kept(kind):
    (plain, again), x = blocks("cpu", kind)
    assert "computed again" not in str(fusedres.explain(again))
    assert saved(again, x)[0] == saved(plain, x)[0]


def test_in_eval_it_is_kept(device):
    (plain, again), x = blocks(device)
    assert saved(again.eval(), x)[0] == saved(plain.eval(), x)[0]


@pytest.mark.slow
def test_with_finite_statistics_too(device):
    (plain, again), x = blocks(device)
    fusedres.fuse_(again, fusedres.FuseConfig(recompute=True, keep_finite_statistics=True))
    assert same(step(again, x), step(plain, x))


def test_the_activation_is_freed_when_the_forward_ends(device):
    """What hooks are told is one thing, what lives another."""
    (_, again), x = blocks(device)
    read = []
    again.conv2.register_forward_pre_hook(
        lambda _, inputs: read.append(StorageWeakRef(inputs[0].untyped_storage()))
    )
    fusedres.fuse_(again, AGAIN)
    output = again(x.requires_grad_())
    gc.collect()
    assert [storage.expired() for storage in read] == [True]
    output.sum().backward()


def test_a_graph_that_no_backward_frees_goes_with_its_output(device, monkeypatch):
    made, init = [], recompute.Again.__init__

    def noted(self, *given, **named):
        init(self, *given, **named)
        made.append(weakref.ref(self))

    monkeypatch.setattr(recompute.Again, "__init__", noted)
    (_, again), x = blocks(device)
    output = again(x.requires_grad_())
    del output
    gc.collect()
    assert made
    assert [each() for each in made if each() is not None] == []
