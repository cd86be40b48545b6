"""`relu(batch_norm(x))` that its reader does not keep for the backward: it is computed again there, with the same bits.

    fusedres::batch_norm_apply  input, weight, saved [4, C], activation -> output

BatchNorm keeps x in any case, and a convolution needs y = relu(bn(x)) for the gradient of its weight. Whoever reads y
is called under hooks of saved tensors, which put down how y came about in the place of y. On the Triton backend the
second pass is run again, with the statistics that are kept: one pass. In plain PyTorch it is BatchNorm and ReLU, and
ReLU itself keeps y no more. What was changed in place since is told, as PyTorch tells it of what it has saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import reference
from ..activations import activate, parse
from ..layouts import like_output
from .batch_norm_act import normalized
from .node import TailFunction, saved_by
from .norm import Kept, names
from .operator import Operator

if TYPE_CHECKING:
    from ..kernels.plan import Planner

SCHEMA = "batch_norm_apply(Tensor input, Tensor? weight, Tensor saved, str activation) -> Tensor"
_NAME = "_fusedres_again"
_autograd: Any = torch._C._autograd


def _apply(p: Planner, kept: Kept, activation: str) -> Tensor:
    from ..kernels.apply import launch_bn_apply
    from ..kernels.norm import Norm

    output = p.like(like_output(kept.input))
    rows, (input,) = p.common_rows(output, kept.input)
    norm = Norm(kept.weight, saved=kept.saved)
    launch_bn_apply(p, input, None, norm, None, output, None, rows, parse(activation))
    return output


APPLY = Operator(
    SCHEMA,
    (names(Kept, "input", "weight", "saved"), "activation"),
    recipe=_apply,
    plain=lambda kept, activation: like_output(kept.input).copy_(
        activate(normalized(kept), activation)
    ),
    fake=lambda kept, activation: like_output(kept.input),
)


class Again:
    """How a `relu(batch_norm(x))` came about: it holds the node of the BatchNorm, and by that what that has saved."""

    def __init__(self, bias: Tensor | None = None, eps: float = 0.0) -> None:
        self.node: Any = None
        self._bias, self._eps = bias, eps
        self._output: tuple[Any, ...] | None = None
        self._version = 0

    def of(self, output: Tensor) -> None:
        """It is for this tensor, which carries it to its reader."""
        storage = output.untyped_storage()._cdata
        self._output = (storage, output.shape, output.stride(), output.dtype)
        self._version = output._version
        setattr(output, _NAME, self)

    def is_for(self, tensor: Tensor, output: Tensor) -> bool:
        """Whether a tensor that is saved is the output itself, in which nothing was changed."""
        found = (tensor.untyped_storage()._cdata, tensor.shape, tensor.stride(), tensor.dtype)
        return found == self._output and output._version == self._version

    def value(self) -> Tensor:
        """The output once more."""
        with torch.no_grad():
            if isinstance(self.node, TailFunction._backward_cls):
                input, weight, _, saved, *_ = saved_by(self.node)
                return APPLY(Kept(input, weight, saved), "relu")
            return reference.batch_norm_act(
                self.node._saved_input, None, None, self.node._saved_weight, self._bias, True, 0.0, self._eps
            )  # fmt: skip


def may_recompute() -> bool:
    """Whether a reader can be told at all: torch.compile decides by itself, torch.func allows no hooks, and what is
    checkpointed keeps nothing anyway, and may be asked for once only."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    if torch._C._functorch.maybe_current_level() is not None:
        return False
    outer = _autograd._top_saved_tensors_default_hooks(True)
    if outer is not None and getattr(outer[0], "__module__", "") == "torch.utils.checkpoint":
        return False
    return _autograd._saved_tensors_hooks_is_enabled()


def remember(output: Tensor) -> None:
    """Have the reader of what the kernels gave not keep it."""
    node: Any = output.grad_fn
    if isinstance(node, TailFunction._backward_cls):
        again = Again()
        again.node = node
        again.of(output)


def composed(run: Callable[[], Tensor], input: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """`run()`, which is `reference.batch_norm_act` of these, a ReLU at its end; neither it nor its reader keeps it."""
    # Its value: BatchNorm does not keep its bias, and who changes it before the backward is not refused.
    again = Again(None if bias is None else bias.detach().clone(), eps)
    source, shape = input.untyped_storage()._cdata, input.shape

    def is_result(tensor: Tensor) -> bool:
        return tensor.shape == shape and tensor.untyped_storage()._cdata != source

    with _hooks(again, is_result):
        output = run()
    node: Any = output.grad_fn
    if node is not None:
        again.node = node.next_functions[0][0]
        again.of(output)
    return output


def read(reader: Callable[[Tensor], Any], output: Tensor) -> Any:
    """`reader(output)`, which keeps how `output` came about in its place, where that is known."""
    again: Again | None = output.__dict__.pop(_NAME, None) if hasattr(output, _NAME) else None
    if again is None or not may_recompute():
        return reader(output)
    known = again
    with _hooks(known, lambda tensor: known.is_for(tensor, output)):
        return reader(output)


@contextmanager
def _hooks(again: Again, is_it: Callable[[Tensor], bool]) -> Iterator[None]:
    """Hooks that put `again` in the place of a tensor, and leave all others to who was there before."""
    outer = _autograd._top_saved_tensors_default_hooks(True)
    # Emptied at the end: PyTorch keeps `pack` as long as what it gave, and with it would keep the output itself, and
    # a BatchNorm's node in what that node has saved, which gc cannot look into.
    known = [(again, is_it)]

    def pack(tensor: Tensor) -> Any:
        for one, is_one in known:
            if is_one(tensor):
                return one
        # Detached: an output would keep its own node.
        return (tensor.detach(), tensor._version) if outer is None else (outer[0](tensor), None)

    def unpack(packed: Any) -> Tensor:
        if type(packed) is Again:
            return packed.value()
        value, version = packed
        if outer is not None:
            return outer[1](value)
        if value._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{value.type()} {list(value.shape)}] is at version {value._version}; expected version {version} "
                "instead."
            )
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        try:
            yield
        finally:
            known.clear()
