"""What training scripts do around a model: a fused one ends a step as the plain one does, to rounding in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fusedres

from .swap_blocks import Block, images


class Net(Block):
    """A stem's BatchNorm and ReLU, a tail, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def stem(self, x: Tensor) -> Tensor:
        return self.relu(self.bn1(self.conv1(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.relu(self.bn2(self.conv2(x)) + x)
        return self.fc(x.mean((2, 3)))


def loss_of(model: nn.Module, device: torch.device, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    x = images(3, 4, 4, 4, device=device)
    return nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2], device=device))


def ends_alike(run: Callable[[nn.Module], object], device: torch.device) -> None:
    """What `run` gives, and the parameters, gradients and buffers after it."""
    torch.manual_seed(0)
    plain = Net().double().to(device)
    fused = copy.deepcopy(plain)
    assert fusedres.fuse_(fused).n_fused == 2
    found = []
    for model in (plain, fused):
        given = run(model)
        gradients = {name: p.grad for name, p in model.named_parameters()}
        found.append((given, dict(model.state_dict()), gradients))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)


# --- gradients -------------------------------------------------------------------------------------------------------


def accumulated_at_once(model, loss):
    """An optimizer step for each parameter as soon as its gradient is there."""

    def step(parameter):
        with torch.no_grad():
            parameter -= 0.1 * parameter.grad
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    for k in range(2):
        loss(k).backward()


def hook_of_all_gradients(model, loss):
    seen: list[Tensor] = []
    hook = torch.autograd.graph.register_multi_grad_hook(
        list(model.parameters()), lambda grads: seen.extend(g.sum() for g in grads)
    )
    loss().backward()
    hook.remove()
    return seen


def some_inputs_only(model, loss):
    loss().backward(inputs=[model.bn1.weight, model.conv2.weight])


def two_losses_of_one_graph(model, loss):
    value = loss()
    value.backward(retain_graph=True)
    value.square().backward()


def two_forwards_and_one_backward(model, loss):
    (loss(0) + loss(1).square()).backward()


def anomaly_mode(model, loss):
    with torch.autograd.detect_anomaly(check_nan=True):
        loss().backward()


def weights_that_change_before_the_backward(model, loss):
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        value = loss()
        with torch.no_grad():
            model.bn1.weight.mul_(2)
            model.bn2.weight.mul_(2)
        value.backward()


def products_with_the_hessian(model, loss):
    parameters = list(model.parameters())
    first = torch.autograd.grad(loss(), parameters, create_graph=True)
    given = [torch.cos(p.detach()) for p in parameters]
    return torch.autograd.grad(first, parameters, given, materialize_grads=True)


def sharpness_aware(model, loss):
    """The second forward moves no statistics."""
    loss().backward()
    for parameter in model.parameters():
        parameter.data.add_(parameter.grad, alpha=0.05)
    model.zero_grad()
    for norm in (model.bn1, model.bn2):
        norm.momentum = 0.0
    loss().backward()


def lbfgs(model, loss):
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


LOOPS = (
    accumulated_at_once, hook_of_all_gradients, some_inputs_only, two_losses_of_one_graph,
    two_forwards_and_one_backward, anomaly_mode, weights_that_change_before_the_backward, products_with_the_hessian,
    sharpness_aware, lbfgs,
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
@pytest.mark.parametrize("do", LOOPS, ids=lambda do: do.__name__)
@pytest.mark.composes(
    "hooks of gradients, anomaly mode, Hessian products, SAM, L-BFGS, several losses or forwards",
    "works",
)
def test_what_a_loop_does_with_gradients(do, device):
    ends_alike(lambda model: do(model, lambda k=0: loss_of(model, device, k)), device)


# --- what is changed between steps -----------------------------------------------------------------------------------


def one_in_eval(model):
    model.bn2.eval()


def momentum(model):
    model.bn1.momentum, model.bn2.momentum, model.bn2.eps = None, 0.5, 1e-2


def frozen(model):
    model.bn1.requires_grad_(False)
    model.conv2.requires_grad_(False)


def replaced(model):
    model.bn1 = nn.BatchNorm2d(4, affine=False).to(model.fc.weight)


def adapted(model):
    """As LoRA: the convolution is frozen, something small beside it learns."""

    class Beside(nn.Module):
        def __init__(self, inside):
            super().__init__()
            self.inside = inside.requires_grad_(False)
            torch.manual_seed(1)
            self.down, self.up = (nn.Conv2d(*c, 1).to(inside.weight) for c in ((4, 1), (1, 4)))

        def forward(self, x):
            return self.inside(x) + self.up(self.down(x))

    model.conv2 = Beside(model.conv2)


def shared(model):
    model.bn2.weight = model.bn1.weight


CHANGES = (one_in_eval, momentum, frozen, replaced, adapted, shared)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.composes(
    "what is changed between two steps: modes, momentum, freezing, LoRA, sharing", "works"
)
def test_a_model_that_is_changed_between_steps(change, device):
    def run(model):
        for k in range(3):
            if k == 1:
                change(model)
            loss_of(model, device, k).backward()

    ends_alike(run, device)


# --- DistributedDataParallel ---------------------------------------------------------------------------------------


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def no_sync(parallel, loss):
    with parallel.no_sync():
        loss(0).backward()
    loss(1).backward()


def join(parallel, loss):
    with parallel.join():
        loss().backward()


def backward(parallel, loss):
    for k in range(2):
        loss(k).backward()


SETTINGS = {
    "static_graph": (backward, {"static_graph": True}),
    "bucket view": (backward, {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.001}),
    "no_sync": (no_sync, {}),
    "join": (join, {}),
    "unused parameters": (backward, {"find_unused_parameters": True}),
}


@pytest.mark.once
@pytest.mark.filterwarnings("ignore:.*find_unused_parameters:UserWarning")
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.composes(
    "DistributedDataParallel: static_graph, gradient_as_bucket_view, find_unused_parameters, no_sync, join",
    "works",
)
def test_settings_of_ddp(name, alone, device):
    how, options = SETTINGS[name]

    def run(model):
        if name == "unused parameters":
            model.unused = nn.Linear(2, 2).double()
        parallel = DistributedDataParallel(model, **options)
        how(parallel, lambda k=0: loss_of(parallel, device, k))
        if name == "unused parameters":
            del model.unused

    ends_alike(run, device)
