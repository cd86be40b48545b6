"""A fused network under torch.compile, torch.export and the ONNX exporter, beside the plain one.

One graph of it all, none anew from step to step, gradients as near to float64 as the plain network's, and never more
kept for the backward pass than in eager mode. `aot_eager` is Dynamo and autograd as inductor
has them, without its code.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import fusedres
import fusedres.models

resnet = torchvision.models.resnet
EAGER = "aot_eager"
# With the partitioner that inductor has, which may compute again what it does not keep.
PARTITIONED = "aot_eager_decomp_partition"


@pytest.fixture(autouse=True)
def _forget():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Small(nn.Module):
    """A stem and three blocks of torchvision's, one of them projected."""

    def __init__(self, block=resnet.BasicBlock) -> None:
        super().__init__()
        wide = 8 * block.expansion
        shortcut = nn.Sequential(nn.Conv2d(8, wide, 1, 2, bias=False), nn.BatchNorm2d(wide))
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn, self.relu = nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.layers = nn.Sequential(block(8, 8, 2, shortcut), block(wide, 8), block(wide, 8))
        self.fc = nn.Linear(wide, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(self.relu(self.bn(self.conv(x)))).mean((2, 3)))


def network(name: str) -> nn.Module:
    if name == "small":
        return Small()
    if name == "small bottleneck":
        return Small(resnet.Bottleneck)
    return torchvision.models.get_model(name, num_classes=5)


def images(n=4, size=8, device="cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + size)
    x = torch.randn(n, 3, size, size, generator=generator)
    return x.to(device), torch.randint(0, 5, (n,), generator=generator).to(device)


def step(model, x: Tensor, labels: Tensor, optimizer=None) -> Tensor:
    model.zero_grad()
    loss = F.cross_entropy(model(x), labels)
    loss.backward()
    if optimizer is not None:
        optimizer.step()
    return loss.detach()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def distance(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The distance of all gradients together, of their size."""
    off = sum((found[n].double() - exact[n].double()).square().sum() for n in exact)
    return float((off / sum(each.double().square().sum() for each in exact.values())).sqrt())


@pytest.fixture
def pair(device):
    """The plain network and its fused copy."""

    def make(name: str) -> tuple[nn.Module, nn.Module]:
        plain = network(name).to(device)
        fused = copy.deepcopy(plain)
        assert fusedres.fuse_(fused).n_fused > 0
        return plain, fused

    return make


NETWORKS = [
    pytest.param("small", 8, id="small"),
    pytest.param("small bottleneck", 8, id="bottlenecks", marks=pytest.mark.slow),
    pytest.param("resnet18", 32, id="resnet18", marks=[pytest.mark.once, pytest.mark.slow]),
    pytest.param("resnet50", 32, id="resnet50", marks=[pytest.mark.once, pytest.mark.slow]),
]


@pytest.mark.parametrize(("name", "size"), NETWORKS)
@pytest.mark.composes("torch.compile(fullgraph=True), a training step", "works")
def test_a_training_step_is_one_graph_and_stays_it(pair, name, size, device):
    plain, fused = pair(name)
    exact, x, labels = copy.deepcopy(plain).double(), *images(size=size, device=device)
    counter = CompileCounterWithBackend(EAGER)
    compiled = torch.compile(fused, fullgraph=True, backend=counter)
    optimizer = torch.optim.SGD(fused.parameters(), 0.01, momentum=0.9)
    step(plain, x, labels), step(exact, x.double(), labels), step(compiled, x, labels)
    oracle = gradients(exact)
    # Of as many roundings as the plain network's, in another order.
    assert distance(gradients(fused), oracle) <= 2 * distance(gradients(plain), oracle) + 1e-6
    for _ in range(3):
        step(compiled, x, labels, optimizer)
    assert counter.frame_count == 1


@pytest.mark.parametrize(("name", "size"), NETWORKS)
@pytest.mark.composes("torch.compile(fullgraph=True), evaluation", "works")
def test_evaluation_is_one_graph_and_gives_the_same(pair, name, size, device):
    plain, fused = (each.eval() for each in pair(name))
    x, _ = images(size=size, device=device)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(fused, fullgraph=True, backend=counter)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), plain(x), rtol=1e-4, atol=1e-4)
        compiled(x + 1)
    assert counter.frame_count == 1


@pytest.mark.once
@pytest.mark.composes("torch.compile, train() and eval() in turn", "works")
def test_train_and_eval_in_turn_are_two_graphs(pair, device):
    _, fused = pair("small")
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(fused, fullgraph=True, backend=counter)
    for _ in range(3):
        for training in (True, False):
            fused.train(training)
            compiled(images(device=device)[0])
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    "dynamic", [pytest.param(True, id="asked for", marks=pytest.mark.slow), pytest.param(None, id="found")]
)  # fmt: skip
@pytest.mark.composes("torch.compile, batches of several sizes", "works")
def test_batches_of_several_sizes_share_the_graphs_that_the_plain_network_has(
    pair, dynamic, device
):
    """With `dynamic=None` the second size tells that the first was not the only one."""
    models, counts = pair("small"), []
    for model in models:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(EAGER)
        compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=counter)
        for n in (4, 6, 3, 5):
            step(compiled, *images(n, device=device))
        counts.append(counter.frame_count)
    plain, fused = map(gradients, models)
    torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-4)
    assert counts[1] == counts[0] <= 2


# --- fuse_ and compile, in any order ---------------------------------------------------------------------------------


def fused_calls(graphs: list[torch.fx.GraphModule]) -> int:
    """How many calls of our operators there are in what Dynamo traced."""
    inside = [each for graph in graphs for each in graph.modules() if hasattr(each, "graph")]
    return sum("fusedres" in str(node.target) for each in inside for node in each.graph.nodes)


@pytest.fixture
def traced():
    """A backend that keeps the graphs of the last trace, and runs them."""

    class Kept(list):
        def __call__(self, graph, inputs):
            self.append(graph)
            return graph.forward

    return Kept()


@pytest.mark.kernels
@pytest.mark.composes("torch.compile in front of fuse_; unfuse_ behind torch.compile", "works")
def test_what_is_fused_after_it_was_compiled_runs_fused_and_back(traced, device):
    model, (x, labels) = network("small").to(device), images(device=device)
    compiled = torch.compile(model, fullgraph=True, backend=traced)
    found = []
    for change in (lambda m: None, fusedres.fuse_, fusedres.unfuse_, fusedres.fuse_):
        change(compiled)
        traced.clear()
        step(compiled, x, labels)
        found.append(fused_calls(traced) > 0)
    assert found == [False, True, False, True]


# PyTorch's words on any block whose input has a gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("order", ["fuse_ first", "compile first"])
@pytest.mark.composes("regional compilation (block.compile())", "works")
def test_blocks_compiled_one_by_one_train_as_the_plain_ones(order, device):
    plain = network("small").to(device)
    fused, (x, labels) = copy.deepcopy(plain), images(device=device)
    if order == "fuse_ first":
        fusedres.fuse_(fused)
    for block in fused.layers:
        block.compile(fullgraph=True, backend=EAGER)
    if order == "compile first":
        step(fused, x, labels)
        fused.load_state_dict(plain.state_dict())
        assert fusedres.fuse_(fused).n_fused > 0
    step(fused, x, labels), step(plain, x, labels)
    torch.testing.assert_close(gradients(fused), gradients(plain), rtol=1e-3, atol=1e-4)


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "max-autotune", "reduce-overhead"])
@pytest.mark.composes("torch.compile(mode=...)", "works")
def test_the_modes_of_inductor_give_the_same(pair, mode):
    """On a CPU they have no CUDA graphs; benchmarks/gpu.sh runs those."""
    plain, fused = pair("small")
    x, labels = images()
    step(torch.compile(fused, fullgraph=True, mode=mode), x, labels), step(plain, x, labels)
    torch.testing.assert_close(gradients(fused), gradients(plain), rtol=1e-3, atol=1e-4)


# --- memory ----------------------------------------------------------------------------------------------------------


def kept_bytes(model, state: nn.Module, x: Tensor, labels: Tensor) -> int:
    """Bytes of the storages that a forward pass keeps for the backward, parameters and buffers apart."""
    own = {t.untyped_storage().data_ptr() for t in (*state.parameters(), *state.buffers(), x)}
    found: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.cross_entropy(model(x), labels)
    del loss
    return sum(found.values())


@pytest.mark.parametrize(
    "name", ["small", pytest.param("small bottleneck", marks=pytest.mark.slow)]
)
# PyTorch 2.11 says it of itself while the partitioner is imported.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")
@pytest.mark.composes("torch.compile, what is kept for the backward pass", "works")
def test_compiled_keeps_no_more_for_the_backward_than_eager(pair, name, device):
    plain, fused = pair(name)
    x, labels = images(8, 16, device=device)
    eager = kept_bytes(fused, fused, x, labels)
    compiled = kept_bytes(torch.compile(fused, backend=PARTITIONED), fused, x, labels)
    assert 0 < compiled <= eager <= kept_bytes(plain, plain, x, labels)


# --- exported --------------------------------------------------------------------------------------------------------


@pytest.mark.composes("torch.export with a batch of any size", "works")
def test_an_exported_model_takes_other_batches(pair, device):
    plain, fused = (each.eval() for each in pair("small"))
    sizes = {"x": {0: torch.export.Dim("n", min=2, max=64)}}
    program = torch.export.export(fused, (images(device=device)[0],), dynamic_shapes=sizes)
    x, _ = images(7, device=device)
    torch.testing.assert_close(program.module()(x), plain(x), rtol=1e-4, atol=1e-4)


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize("name", ["small", "resnet18", "fusedres"])
@pytest.mark.composes("torch.onnx.export(dynamo=True)", "works")
def test_onnx_gives_what_the_plain_model_gives(name, tmp_path, recwarn):
    import onnxruntime

    torch.manual_seed(0)
    plain = fusedres.models.resnet20() if name == "fusedres" else network(name)
    model = copy.deepcopy(plain.eval())
    fusedres.fuse_(model)
    x, _ = images(2, 32)
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad(), fusedres.backend("off"):
        torch.testing.assert_close(torch.tensor(found), plain(x), rtol=1e-4, atol=1e-4)
