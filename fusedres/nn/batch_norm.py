"""BatchNorm with what follows it fused in, as a module, and the same for a BatchNorm that somebody else owns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import reference
from ..activations import activate, check_activation
from ..checks import takes
from ..functional import add_batch_norm_act, batch_norm_act
from ..layouts import output_format
from ..ops import batch_norm_act as single
from ..ops import dual, preactivation, sync
from ..ops.norm import BatchNorm, How
from ..ops.statistics import Statistics, keep_finite
from ..ops.straight import is_quiet
from ..ops.tail import NONE, Tail, find, run, straight
from .norms import (
    activates,
    begin,
    group_of,
    left_to_pytorch,
    parts_inside,
    usual,
    why_not_fused,
)
from .script import NotScriptable

_is_compiling, _grad_mode = torch.compiler.is_compiling, torch.is_grad_enabled
_level = torch._C._functorch.maybe_current_level
# Of checks and kernels; not what checkpointing throws once it has recomputed enough.
_REFUSALS = (TypeError, ValueError, RuntimeError, LookupError, ArithmeticError)


def straight_tail(
    norm: Any,
    input: Tensor,
    residual: Tensor | None = None,
    activation: str | None = None,
    into: str | None = None,
    is_asked: bool = False,
    keep: bool = False,
    tail: Tail = single.TAIL,
) -> Any:
    """`activation(norm(input) + residual)` by one look at everything; None where more looks are due.

    Of a call like one before, the module's own dictionaries are read and nothing is decided.
    is_asked: the caller has asked `why_not_fused`, as a fused block does of all its children at once.
    keep: whether running statistics stay where they would not be finite. tail: what runs, given a residual and one
    BatchNorm: this, or the pair of a pre-activation unit.
    """
    # First: torch.compile knows the answer, and takes none of what follows into its graph.
    if _is_compiling() or type(input) is not Tensor:
        return None
    if activation is not None and type(activation) is not str:
        return None
    try:
        own = norm.__dict__
        parameters, buffers = own["_parameters"], own["_buffers"]
        momentum, eps, training = own["momentum"], own["eps"], own["training"]
        tensors = (
            input, NONE[1] if residual is None else residual, parameters["weight"], parameters["bias"],
            buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"] if training else NONE[6],
        )  # fmt: skip
    except (AttributeError, KeyError):  # no BatchNorm of PyTorch's, or a parametrized one
        return None
    key = (
        id(norm), tail, type(norm), activation, into, training, residual is None, tensors[4] is None, _grad_mode(),
        keep,
    )  # fmt: skip
    planned = find(key, tensors)
    if planned is not None and _is_usual(own, momentum, eps, is_asked):
        if planned.composed:  # of PyTorch's own operations, for whoever looks on
            batches = tensors[6] if training else None
            if batches is not None:
                batches.add_(1)
            try:
                if planned.looks and tail is single.TAIL and _level() is None:
                    vectors, numbers = tensors[2:6], (momentum, eps)
                    return reference.eager(
                        input, residual, vectors, numbers, planned.how.training, activation
                    )
                one = BatchNorm(*tensors[2:6], momentum, eps)
                return tail.compose(input, residual, one, planned.how)  # type: ignore[misc]
            except _REFUSALS:
                _uncount(batches)
                raise
        if not is_quiet():
            return None
        return run(planned, tensors, (momentum, eps), (input, residual, tensors[2], tensors[3]))
    if not is_quiet():
        return None
    found = usual(norm)
    if found is None:
        return None
    one, use_batch = found
    if keep:
        one = one._replace(keep=True)
    return straight(
        tail, key, (input, residual, one, How(use_batch, activation), True),
        lambda: _fits(norm, input, residual, activation, into), key[1:],
    )  # fmt: skip


def _is_usual(own: dict[str, Any], momentum: Any, eps: Any, is_asked: bool) -> bool:
    """Whether a BatchNorm that calls of it were planned for is still one that they were planned for."""
    return (
        own["track_running_stats"]
        and type(momentum) is float
        and type(eps) is float
        and eps > 0
        and (
            is_asked
            or not (
                own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
                or "forward" in own
            )
        )
    )


def _fits(
    norm: Any, input: Tensor, residual: Tensor | None, activation: str | None, into: str | None
) -> bool:
    """Whether what this BatchNorm gives is what the kernels give.

    Raises:
        ValueError: an input of a rank that it does not take.
    """
    norm._check_input_dim(input)
    return residual is None or is_like(residual, input, into)


def call_batch_norm(
    norm: Any, input: Tensor, residual: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """`activation(norm(input) + residual)` for a real `nn.BatchNorm1d/2d/3d`, fused, without calling the module.

    `num_batches_tracked` counts only calls that succeed. The caller has asked `why_not_fused` first.
    """
    call, use_batch = begin(norm, input)
    group = group_of(norm)
    if call.batches is not None:
        call.batches.add_(1)
    try:
        if group is not None:
            norm._check_non_zero_input_channels(input)
            return sync.shared_batch_norm_act(input, residual, call, activation, group)
        return batch_norm_act(
            input, call.running_mean, call.running_var, call.weight, call.bias, use_batch, call.momentum,
            norm.eps, residual=residual, activation=activation,
        )  # fmt: skip
    except _REFUSALS:
        _uncount(call.batches)
        raise


def _uncount(*counters: Tensor | None) -> None:
    """The counters as they were before a call that failed.

    A mode that allows no such write (selective checkpointing, in the backward) is not heard of: the error that is on
    its way is the one to tell.
    """
    for batches in counters:
        try:
            if batches is not None:
                batches.sub_(1)
        except Exception:
            return


def run_tail(
    norm: Any,
    input: Tensor,
    residual: Tensor | None = None,
    activation: str | None = "relu",
    keep: bool = False,
) -> Tensor:
    """`activation(norm(input) + residual)` for whatever stands as `norm`: fused, or by calling it where it must be
    called (another module, hooks, parametrizations, a trace). What a module's own forward uses."""
    output = straight_tail(norm, input, residual, activation, keep=keep)
    if output is not None:
        return output
    if keep:
        return _kept((norm,), lambda: run_tail(norm, input, residual, activation))
    if _is_called(norm, input):
        return plain_call(norm, input, residual, activation)
    return call_tail(norm, input, residual, activation)


def _kept(norms: tuple[Any, ...], run: Callable[[], Any]) -> Any:
    """`run()`, which calls these BatchNorms; what their running statistics would not be finite in stays."""
    moved = {}
    for norm in norms:
        buffers = norm._buffers if isinstance(norm, nn.Module) else {}
        mean, var = buffers.get("running_mean"), buffers.get("running_var")
        if mean is not None and var is not None and norm.training:
            moved[id(mean)] = Statistics(mean, var, buffers.get("num_batches_tracked"))
    return keep_finite(list(moved.values()), run)


def _is_called(norm: Any, input: Tensor) -> bool:
    return (
        torch.jit.is_tracing()
        or not isinstance(input, Tensor)  # a proxy of torch.fx
        or why_not_fused(norm) is not None
        or bool(parts_inside(norm))
        or left_to_pytorch(norm, input)
    )


def call_add_batch_norm(
    norm: Any,
    input: Tensor,
    residual: Tensor,
    activation: str | None = "relu",
    keep: bool = False,
) -> tuple[Tensor, Tensor]:
    """`sum = input + residual` and `activation(norm(sum))`, fused where the two summands are alike.

    A norm that is no BatchNorm, or one that must be called itself (hooks, parametrizations), is called.
    """
    found = straight_tail(norm, input, residual, activation, None, False, keep, preactivation.TAIL)
    if found is not None:
        return found
    if keep:
        return _kept((norm,), lambda: call_add_batch_norm(norm, input, residual, activation))
    if _is_called(norm, input) or not is_like(residual, input):
        total = input + residual
        return total, activate(norm(total), activation)
    call, use_batch = begin(norm, input)
    group = group_of(norm)
    if isinstance(call.momentum, Tensor) and group is None:  # a cumulative average
        total = input + residual
        return total, call_batch_norm(norm, total, None, activation)
    if call.batches is not None:
        call.batches.add_(1)
    try:
        if group is not None:
            norm._check_non_zero_input_channels(input)
            return sync.shared_add_batch_norm_act(input, residual, call, activation, group)
        return add_batch_norm_act(
            input, residual, call.running_mean, call.running_var, call.weight, call.bias, use_batch,
            call.momentum, norm.eps, activation=activation,
        )  # fmt: skip
    except _REFUSALS:
        _uncount(call.batches)
        raise


def call_dual_batch_norm(
    norm: Any,
    input: Tensor,
    residual_norm: Any,
    residual: Tensor,
    activation: str | None = None,
    into: str | None = None,
    moments: Tensor | None = None,
    keep: bool = False,
) -> Tensor:
    """`activation(norm(input) + residual_norm(residual))` for two real BatchNorms, as `call_batch_norm`.

    moments: the partial moments of the residual, where what wrote it has left them.
    Two that cannot run as one (one normalises with the batch and the other does not, a cumulative average, a residual
    that PyTorch would broadcast or promote) run one after the other.
    """
    how = activation, into, moments
    output = _straight_pair(norm, input, residual_norm, residual, *how, keep)
    if output is not None:
        return output
    if keep:
        again = call_dual_batch_norm
        return _kept(
            (norm, residual_norm), lambda: again(norm, input, residual_norm, residual, *how)
        )
    (a, use_batch), (b, uses_batch_too) = begin(norm, input), begin(residual_norm, residual)
    group = group_of(norm)
    # Processes that wait for each other decide alike, whatever the layout of what each is given.
    alike = into if group is None else None
    if (
        use_batch != uses_batch_too
        or group != group_of(residual_norm)
        or (group is None and any(isinstance(each.momentum, Tensor) for each in (a, b)))
        or not is_like(residual, input, alike)
        or left_to_pytorch(norm, input)
        or left_to_pytorch(residual_norm, residual)
    ):
        other = call_tail(residual_norm, residual)
        return call_tail(norm, input, other, activation, into)
    counters = [call.batches for call in (a, b) if call.batches is not None]
    for batches in counters:
        batches.add_(1)
    try:
        norms = (a._replace(batches=None), b._replace(batches=None))
        if group is not None:
            norm._check_non_zero_input_channels(input)
            return sync.shared_dual_batch_norm_act(
                input, residual, norms, activation, group, moments
            )
        return dual.tail_of_two(
            "dual_batch_norm_act", input, residual, norms, How(use_batch, activation), moments
        )
    except _REFUSALS:
        _uncount(*counters)
        raise


def _straight_pair(
    norm: Any, input: Tensor, other: Any, residual: Tensor, activation: str | None, into: str | None,
    moments: Tensor | None, keep: bool,
) -> Tensor | None:  # fmt: skip
    """As `straight_tail`, of two BatchNorms that were asked."""
    if _is_compiling() or type(input) is not Tensor or type(residual) is not Tensor:
        return None
    if activation is not None and type(activation) is not str:
        return None
    try:
        one, two = norm.__dict__, other.__dict__
        training, momentum, eps = one["training"], one["momentum"], one["eps"]
        trained, second_momentum, second_eps = two["training"], two["momentum"], two["eps"]
        p, q, s, t = one["_parameters"], two["_parameters"], one["_buffers"], two["_buffers"]
        tensors = (
            input, residual, p["weight"], p["bias"], s["running_mean"], s["running_var"],
            s["num_batches_tracked"] if training else NONE[6],
            q["weight"], q["bias"], t["running_mean"], t["running_var"],
            t["num_batches_tracked"] if training else NONE[11], NONE[12] if moments is None else moments,
        )  # fmt: skip
    except (AttributeError, KeyError):
        return None
    without = tensors[4] is None, tensors[9] is None
    kind = type(norm), type(other), into, activation, training, trained, without, _grad_mode(), keep
    key = (id(norm), id(other), *kind)
    planned = find(key, tensors)
    if (
        planned is not None
        and _is_usual(one, momentum, eps, True)
        and _is_usual(two, second_momentum, second_eps, True)
    ):
        weights = tensors[2], tensors[3], tensors[7], tensors[8]
        floats = momentum, eps, second_momentum, second_eps
        if planned.composed:
            counters = [t for t in (tensors[6], tensors[11]) if training and t is not None]
            for batches in counters:
                batches.add_(1)
            try:
                if planned.looks and _level() is None:
                    return dual.eager(input, residual, tensors, floats, planned.how)
                a, b = BatchNorm(*tensors[2:6], *floats[:2]), BatchNorm(*tensors[7:11], *floats[2:])
                return dual.compose(input, residual, a, b, planned.how)
            except _REFUSALS:
                _uncount(*counters)
                raise
        if not is_quiet():
            return None
        return run(planned, tensors, floats, (input, residual, *weights))
    if not is_quiet():
        return None
    if (first := usual(norm)) is None or (second := usual(other)) is None:
        return None
    (a, use_batch), (b, uses_batch_too) = first, second
    if use_batch != uses_batch_too:
        return None

    def fits() -> bool:
        other._check_input_dim(residual)
        return _fits(norm, input, residual, activation, into)

    if keep:
        a, b = a._replace(keep=True), b._replace(keep=True)
    how = How(use_batch, activation)
    groups = (input, residual, a, b, how, True, moments)
    return straight(dual.TAIL, key, groups, fits, key[2:])


def call_tail(
    norm: Any,
    input: Tensor,
    residual: Tensor | None = None,
    activation: str | None = None,
    into: str | None = None,
    keep: bool = False,
) -> Tensor:
    """`activation(norm(input) + residual)`, fused where the residual is like the input.

    What PyTorch would broadcast or promote is left to PyTorch. keep: whether running statistics stay where they would
    not be finite.
    """
    output = straight_tail(norm, input, residual, activation, into, True, keep)
    if output is not None:
        return output
    if keep:
        return _kept((norm,), lambda: call_tail(norm, input, residual, activation, into))
    if left_to_pytorch(norm, input) and activates(norm):
        return norm(input)  # the activation is the one inside
    # By itself, a BatchNorm is better left to what torch.compile fuses it with; one that shares its statistics is
    # better off with one collective.
    is_shared = group_of(norm) is not None
    is_alone = residual is None and activation is None and not is_shared
    if left_to_pytorch(norm, input) or (is_alone and torch.compiler.is_compiling()):
        return plain_call(norm, input, residual, activation, into)
    if residual is None or is_like(residual, input, into):
        return call_batch_norm(norm, input, residual, activation)
    if is_shared:
        return _finished(call_batch_norm(norm, input), residual, activation, into)
    return plain_call(norm, input, residual, activation, into)


def call_function(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None = None,
    activation: str | None = None,
    into: str | None = None,
    keep: bool = False,
) -> Tensor:
    """`activation(F.batch_norm(input, ...) + residual)`: `call_tail` for a BatchNorm that is called as a function."""
    if keep and training and running_mean is not None and running_var is not None:
        arguments = input, running_mean, running_var, weight, bias, training, momentum, eps
        return keep_finite(
            [Statistics(running_mean, running_var)],
            lambda: call_function(*arguments, residual, activation, into),
        )
    vectors = running_mean, running_var, weight, bias
    fits = all(t is None or takes(t.dtype, input.dtype) for t in vectors)
    is_alone = residual is None and activation is None
    if (
        fits
        and (residual is None or is_like(residual, input, into))
        and not (is_alone and torch.compiler.is_compiling())
    ):
        return batch_norm_act(
            input, *vectors, training, momentum, eps, residual=residual, activation=activation
        )
    output = F.batch_norm(input, *vectors, training, momentum, eps)
    return _finished(output, residual, activation, into)


def is_like(residual: Any, input: Tensor, into: str | None = None) -> bool:
    """Whether a residual is a tensor of the input's shape, dtype and device, laid out alike where it stands first.

    Of two layouts PyTorch's sum has that of the first operand, a fused call that of BatchNorm's output.
    """
    return (
        isinstance(residual, Tensor)
        and residual.shape == input.shape
        and residual.dtype == input.dtype
        and residual.device == input.device
        and (
            into not in ("residual", "residual first")
            or torch.compiler.is_compiling()
            or (
                residual.stride() == input.stride()
                and input.is_contiguous(memory_format=output_format(input))
            )
        )
    )


def plain_call(
    norm: nn.Module,
    input: Tensor,
    residual: Tensor | None,
    activation: str | None,
    into: str | None = None,
) -> Tensor:
    """The same by calling the module; `into`: what the add is written to, "output" or "residual", or that it
    has the "residual first"."""
    return _finished(norm(input), residual, activation, into)


def _finished(
    output: Tensor, residual: Tensor | None, activation: str | None, into: str | None
) -> Tensor:
    if residual is not None and into == "output":
        output += residual
    elif residual is not None and into == "residual":
        residual += output
        output = residual
    elif residual is not None and into == "residual first":
        output = residual + output
    elif residual is not None:
        output = output + residual
    return activate(output, activation)


class _BatchNormAct(NotScriptable, nn.Module):
    """The shared part: a real BatchNorm child named `bn`, whose state appears under this module's own name.

    Why a child and not a subclass of nn.BatchNorm2d: `nn.SyncBatchNorm.convert_sync_batchnorm` replaces every
    BatchNorm instance by a SyncBatchNorm and would drop the activation and the residual with it (pytorch issue
    187298). So it replaces the child, and `forward` looks at what the child is when it is called.
    """

    _norm: type[nn.Module]
    bn: nn.Module

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: str | None = "relu",
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        keep_finite_statistics: bool = False,
    ) -> None:
        super().__init__()
        check_activation(type(self).__name__, activation)
        self.activation = activation
        self.keep_finite_statistics = keep_finite_statistics
        self.bn = self._norm(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        if affine and not bias:
            self.bn.register_parameter("bias", None)
        self._register_state_dict_hook(_lift_state)
        self.register_load_state_dict_pre_hook(_lower_state)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """`activation(bn(input) + residual)`; shapes as in `fusedres.functional.batch_norm_act`."""
        norm: Any = self._modules["bn"]
        # By `get`: a module that an older version has pickled has none.
        keep = self.__dict__.get("keep_finite_statistics", False)
        output = straight_tail(norm, input, residual, self.activation, keep=keep)
        if output is not None:
            return output
        if keep:
            return _kept((norm,), lambda: self._by_itself(norm, input, residual))
        return self._by_itself(norm, input, residual)

    def _by_itself(self, norm: Any, input: Tensor, residual: Tensor | None) -> Tensor:
        if _is_called(norm, input):
            return plain_call(norm, input, residual, self.activation)
        return call_batch_norm(norm, input, residual, self.activation)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in _BORROWED:
                return getattr(self.bn, name)
            raise

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _BORROWED and "bn" in self.__dict__.get("_modules", ()):
            setattr(self.bn, name, value)
        else:
            super().__setattr__(name, value)

    def extra_repr(self) -> str:
        kept = (
            ", keep_finite_statistics=True" if self.__dict__.get("keep_finite_statistics") else ""
        )
        return f"activation={self.activation}{kept}"


_STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_BORROWED = frozenset(
    [
        *_STATE,
        "num_features",
        "eps",
        "momentum",
        "affine",
        "track_running_stats",
        "reset_parameters",
        "reset_running_stats",
    ]
)


def _lift_state(module, state_dict, prefix, local_metadata) -> None:
    """`bn.weight` -> `weight`: the keys of nn.BatchNorm."""
    for name in _STATE:
        if f"{prefix}bn.{name}" in state_dict:
            state_dict[prefix + name] = state_dict.pop(f"{prefix}bn.{name}")


def _lower_state(module, state_dict, prefix, *args) -> None:
    """`weight` -> `bn.weight`, so that a state_dict of nn.BatchNorm loads."""
    for name in _STATE:
        if prefix + name in state_dict:
            state_dict[f"{prefix}bn.{name}"] = state_dict.pop(prefix + name)


class BatchNormAct1d(_BatchNormAct):
    """`activation(nn.BatchNorm1d(input) + residual)` for inputs [N, C] or [N, C, L]; arguments of nn.BatchNorm1d.

    The state_dict is that of nn.BatchNorm1d, in both directions. keep_finite_statistics: as in `FuseConfig`.
    """

    _norm = nn.BatchNorm1d


class BatchNormAct2d(_BatchNormAct):
    """`activation(nn.BatchNorm2d(input) + residual)` for inputs [N, C, H, W]; arguments of nn.BatchNorm2d.

    The state_dict is that of nn.BatchNorm2d, in both directions. keep_finite_statistics: as in `FuseConfig`.
    """

    _norm = nn.BatchNorm2d


class BatchNormAct3d(_BatchNormAct):
    """`activation(nn.BatchNorm3d(input) + residual)` for inputs [N, C, D, H, W]; arguments of nn.BatchNorm3d.

    The state_dict is that of nn.BatchNorm3d, in both directions. keep_finite_statistics: as in `FuseConfig`.
    """

    _norm = nn.BatchNorm3d
