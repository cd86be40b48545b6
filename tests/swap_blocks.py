"""Blocks as people write them, and the comparison of a swapped model with its untouched copy."""

from __future__ import annotations

import copy
import operator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusedres
from fusedres.nn import batch_norm, projection


def spy_on_sites(monkeypatch) -> list[nn.Module]:
    """A list that gets the main BatchNorm of each site that runs fused, call by call."""
    calls = []

    def spied(function):
        def spy(norm, *args, **options):
            calls.append(norm)
            return function(norm, *args, **options)

        return spy

    for owner, name in ((batch_norm, "call_batch_norm"), (projection, "call_dual_batch_norm")):
        monkeypatch.setattr(owner, name, spied(getattr(owner, name)))
    straight_tail = batch_norm.straight_tail

    def spy_on_the_straight_way(norm, *args, **options):
        output = straight_tail(norm, *args, **options)
        if output is not None:
            calls.append(norm)
        return output

    monkeypatch.setattr(batch_norm, "straight_tail", spy_on_the_straight_way)
    return calls


class Block(nn.Module):
    """conv, bn, conv, bn and a ReLU; `make` gives it a forward."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.identity = nn.Identity()
        self.dropout, self.no_dropout = nn.Dropout(0.5), nn.Dropout(0.0)
        self.scale = 1.0
        self.options = {"scale": 1.0}
        self.skip: nn.Module | None = None
        for norm in (self.bn1, self.bn2):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)


def make(forward, double: bool = True) -> nn.Module:
    """A block with this forward, the same weights each time."""
    torch.manual_seed(0)
    block = type("Home", (Block,), {"forward": forward})()
    return block.double() if double else block


def images(*shape: int, device: torch.device | str = "cpu") -> Tensor:
    """An input in float64, the same each time."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)


def fused_copy(model: nn.Module, **options) -> nn.Module:
    """A fused copy; the model stays as it is."""
    model = copy.deepcopy(model)
    fusedres.fuse_(model, **options)
    return model


# --- how a block may be spelled ----------------------------------------------------------------------------------


def relu_child(self, x):
    return self.conv2(self.relu(self.bn1(self.conv1(x))))


def relu_functional(self, x):
    return F.relu(self.bn1(self.conv1(x)))


def relu_functional_in_place(self, x):
    return F.relu(self.bn1(self.conv1(x)), inplace=True)


def relu_functional_flag(self, x):
    return F.relu(self.bn1(self.conv1(x)), True)


def relu_torch(self, x):
    return torch.relu(input=self.bn1(self.conv1(x)))


def relu_torch_in_place(self, x):
    return torch.relu_(self.bn1(self.conv1(x)))


def relu_method(self, x):
    return self.bn1(self.conv1(x)).relu()


def relu_method_in_place(self, x):
    return self.bn1(self.conv1(x)).relu_()


def relu_statement(self, x):
    out = self.bn1(self.conv1(x))
    out.relu_()
    return self.conv2(out)


def add_operator(self, x):
    return self.bn1(self.conv1(x)) + x


def add_swapped(self, x):
    return x + self.bn1(self.conv1(x))


def add_in_place(self, x):
    out = self.bn1(self.conv1(x))
    out += x
    return out


def add_torch(self, x):
    return torch.add(x, other=self.bn1(self.conv1(x)), alpha=1)


def add_method(self, x):
    return x.add(self.bn1(self.conv1(x)))


def add_method_in_place(self, x):
    return self.bn1(self.conv1(x)).add_(x)


def add_statement(self, x):
    out = self.bn1(self.conv1(x))
    out.add_(x)
    return out


def tail(self, x):
    out = self.relu(self.bn1(self.conv1(x)))
    out = self.bn2(self.conv2(out))
    out += x
    return self.relu(out)


def tail_swapped(self, x):
    out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
    return torch.add(x, out).relu()


def tail_projected(self, x):
    return self.relu(self.bn1(self.conv1(x)) + self.bn2(self.conv2(x)))


def tail_skip_between(self, x):
    out = self.bn1(self.conv1(x))
    x = self.skip(x) if self.skip is not None else self.conv2(x)
    return F.relu(out + x)


def relu_after_identity(self, x):
    return self.conv2(self.relu(self.identity(self.bn1(self.conv1(x)))))


def relu_after_no_dropout(self, x):
    return F.relu(self.no_dropout(self.identity(self.bn1(self.conv1(x)))))


def tail_with_identities(self, x):
    out = self.identity(self.bn1(self.conv1(x)))
    out += self.identity(x)
    return self.relu(self.no_dropout(out))


def identity_returned(self, x):
    return self.identity(self.bn1(self.conv1(x)) + x)


def pre_activation(self, x):
    out = self.conv1(self.relu(self.bn1(x)))
    return self.conv2(F.relu(self.bn2(out))) + x


def residual_made_here(self, x):
    y = self.identity(self.conv2(x))
    y += self.bn1(self.conv1(x))
    return self.relu(y)


def broadcast_residual(self, x):
    return self.relu(self.bn1(self.conv1(x)) + x.mean((2, 3), keepdim=True))


def broadcast_residual_in_place(self, x):
    out = self.bn1(self.conv1(x))
    out += x.mean((2, 3), keepdim=True)
    return self.relu(out)


def shared_norm(self, x):
    return F.relu(self.bn1(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def optional_argument(self, x, residual=None, flag=True):
    out = self.bn1(self.conv1(x))
    if residual is not None:
        out = out * 3 + residual
    return self.relu(out) if flag else out


def asks_for_a_tensor(self, x):
    x = x if isinstance(x, Tensor) else x[0]
    return self.relu(self.bn1(self.conv1(x)))


def by_grad_mode(self, x):
    out = self.bn1(self.conv1(x))
    return F.relu(out) if torch.is_grad_enabled() else out


def calls_a_method(self, x):
    return F.relu(self.bn1(self.conv1._conv_forward(x, self.conv1.weight, None)))


def makes_a_constant(self, x):
    return F.relu(self.bn1(self.conv1(x))) * torch.ones((), dtype=torch.float64)


SPELLINGS = {
    by_grad_mode: ["BN+ReLU"],
    calls_a_method: ["BN+ReLU"],
    makes_a_constant: ["BN+ReLU"],
    relu_child: ["BN+ReLU"],
    relu_functional: ["BN+ReLU"],
    relu_functional_in_place: ["BN+ReLU"],
    relu_functional_flag: ["BN+ReLU"],
    relu_torch: ["BN+ReLU"],
    relu_torch_in_place: ["BN+ReLU"],
    relu_method: ["BN+ReLU"],
    relu_method_in_place: ["BN+ReLU"],
    relu_statement: ["BN+ReLU"],
    add_operator: ["BN+add"],
    add_swapped: ["BN+add"],
    add_in_place: ["BN+add"],
    add_torch: ["BN+add"],
    add_method: ["BN+add"],
    add_method_in_place: ["BN+add"],
    add_statement: ["BN+add"],
    tail: ["BN+ReLU", "BN+add+ReLU"],
    tail_swapped: ["BN+ReLU", "BN+add+ReLU"],
    tail_projected: ["BN+BN+add+ReLU", "BN+BN+add+ReLU"],
    tail_skip_between: ["BN+add+ReLU"],
    relu_after_identity: ["BN+ReLU"],
    relu_after_no_dropout: ["BN+ReLU"],
    tail_with_identities: ["BN+add+ReLU"],
    identity_returned: ["BN+add"],
    pre_activation: ["BN+ReLU", "BN+ReLU"],
    residual_made_here: ["BN+add+ReLU"],
    broadcast_residual: ["BN+add+ReLU"],
    broadcast_residual_in_place: ["BN+add+ReLU"],
    shared_norm: ["BN+ReLU", "BN+ReLU"],
    optional_argument: ["BN+ReLU"],
    asks_for_a_tensor: ["BN+ReLU"],
}


# --- what is left alone ------------------------------------------------------------------------------------------


def plain(self, x):
    return self.bn1(self.conv1(x))


def other_activation(self, x):
    return F.hardtanh(self.bn1(self.conv1(x)))


def dropped(self, x):
    return F.relu(self.dropout(self.bn1(self.conv1(x))))


def identity_used_twice(self, x):
    out = self.identity(self.bn1(self.conv1(x)))
    return self.conv2(F.relu(out)) + out


def used_twice(self, x):
    out = self.bn1(self.conv1(x))
    return self.conv2(F.relu(out)) + out


def added_to_itself(self, x):
    out = self.bn1(self.conv1(x))
    return out + out


def constant(self, x):
    return F.relu(self.bn1(self.conv1(x)) + 1)


def scaled(self, x):
    return torch.add(x, self.bn1(self.conv1(x)), alpha=2)


def residual_statement(self, x):
    x.add_(self.bn1(self.conv1(x)))
    return self.relu(x)


def input_written(self, x):
    y = self.conv1(x)
    out = self.bn1(y)
    y.mul_(2)
    return F.relu(out + y)


def input_given_away(self, x):
    y = self.conv1(x)
    out = self.bn1(y)
    return F.relu(out + self.relu(y))


def residual_read_later(self, x):
    y = self.conv2(x)
    z = self.identity(y)
    y += self.bn1(self.conv1(x))
    return self.relu(y) * z


def residual_rewritten(self, x):
    y = self.conv2(x)
    out = self.bn1(self.conv1(x)) + y
    y.zero_()
    return F.relu(out) + y


def called_between(self, x):
    first = self.bn1(self.conv1(x))
    second = F.relu(self.bn1(self.conv2(x)))
    return F.relu(first + second)


def statistics_between(self, x):
    first = self.bn1(self.conv1(x))
    return F.relu(first + self.bn1.running_mean.view(1, -1, 1, 1) * x)


def by_mode(self, x):
    out = self.bn1(self.conv1(x))
    return F.relu(out) if self.training else out


def by_data(self, x):
    out = F.relu(self.bn1(self.conv1(x)))
    return out * 2 if x.sum() > 0 else out


def by_chance(self, x):
    out = F.relu(self.bn1(self.conv1(x)))
    return out * 2 if torch.rand(()) < 0.5 else out


def without_gradient(self, x):
    with torch.no_grad():
        x = self.conv1(x)
    return F.relu(self.bn1(x))


def under_autocast(self, x):
    with torch.autocast("cpu", enabled=True):
        x = self.conv1(x)
    return F.relu(self.bn1(x))


def checkpointed(self, x):
    x = torch.utils.checkpoint.checkpoint(self.conv1, x, use_reentrant=False)
    return F.relu(self.bn1(x))


def offloaded(self, x):
    with torch.autograd.graph.save_on_cpu():
        x = self.conv1(x)
    return F.relu(self.bn1(x))


def writes_itself(self, x):
    self.last = x
    return F.relu(self.bn1(self.conv1(x)))


def reads_a_dict(self, x):
    return F.relu(self.bn1(self.conv1(x)) * self.options["scale"])


def reads_parameters(self, x):
    x = x.to(next(self.parameters()).dtype)
    return F.relu(self.bn1(self.conv1(x)))


def keyword_only(self, x, *, must=1.0, **rest):
    return operator.add(self.bn1(x), must)


# forward: (the row's pattern, a part of its reason)
LEFT_ALONE = {
    residual_read_later: (
        "BN+add+ReLU",
        "conv2 is added to in place, and somebody else may hold it",
    ),
    residual_statement: ("BN+add+ReLU", "x is added to in place"),
    input_written: ("BN+add+ReLU", "its input may be written to before the site ends, by mul_"),
    input_given_away: ("BN+add+ReLU", "its input may be written to before the site ends, by relu"),
    residual_rewritten: (
        "BN+add+ReLU",
        "the residual may be written to before the activation, by zero_",
    ),
    called_between: ("BN+add+ReLU", "bn1: it is called again before the site ends"),
    statistics_between: ("BN+add+ReLU", "bn1.running_mean is used before the site ends"),
    by_mode: ("unknown", "another one in train and in eval mode"),
    by_data: ("unknown", "it branches on a value computed from its input"),
    by_chance: ("unknown", "it branches on a value computed from its input"),
    without_gradient: ("unknown", "it enters torch.autograd.grad_mode.no_grad on its way"),
    under_autocast: ("unknown", "it enters torch.amp.autocast_mode.autocast on its way"),
    checkpointed: ("unknown", "call checkpoint around the block, not inside it"),
    offloaded: ("unknown", "it enters torch.autograd.graph.save_on_cpu on its way"),
    writes_itself: ("unknown", "its forward writes to an attribute, last (swap_blocks.py:"),
    reads_parameters: ("unknown", "it calls self.parameters(), nn.Module's own"),
}

# forward: a part of the note that says why its BatchNorm runs by itself
BY_ITSELF = {
    reads_a_dict: "nothing to fuse follows it: its output goes to mul",
    plain: "nothing to fuse follows it: its output is returned",
    other_activation: "nothing to fuse follows it: its output goes to hardtanh",
    dropped: "nothing to fuse follows it: its output goes to dropout (Dropout)",
    identity_used_twice: "its output is used 2 times",
    used_twice: "its output is used 2 times",
    added_to_itself: "added to a constant, scaled",
    constant: "added to a constant, scaled",
    scaled: "added to a constant, scaled",
    keyword_only: "added to a constant, scaled",
}
