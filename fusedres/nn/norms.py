"""What counts as a BatchNorm, whether one may be run without calling it, and what a call of it reads off it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..checks import momentum_number, number
from ..dispatch import resolve
from ..kernels.dtypes import accumulate_dtype
from ..ops.norm import BatchNorm
from ..ops.sync import Group
from ..words import with_article

FUSED_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_TIMM = "timm.layers.norm_act"
# By name, since neither package need be installed: the statistics and the affine are buffers that nothing changes.
_FROZEN = {("torchvision.ops.misc", "FrozenBatchNorm2d"), (_TIMM, "FrozenBatchNormAct2d")}
# These call children of their own, `drop` and `act`, on what they have normalised.
_WITH_PARTS = {(_TIMM, name) for name in ("BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d")}  # fmt: skip


# What stands as `forward` in the `__dict__` of an instance that nobody replaced it on; `fuse_` adds its own class.
OWN_FORWARDS: set[type] = {type(None)}


def _name(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__


def is_batch_norm(module: nn.Module) -> bool:
    """Whether this is a BatchNorm of some kind, one that cannot be fused included."""
    if isinstance(module, torch.jit.ScriptModule):
        return "BatchNorm" in str(getattr(module, "original_name", ""))
    if isinstance(module, _BatchNorm) or "BatchNorm" not in type(module).__name__:
        return isinstance(module, _BatchNorm)
    # A block that is called so for the BatchNorm in it is none; a module of ours is.
    is_ours = type(module).__module__.startswith("fusedres.")
    return is_ours or not any(isinstance(child, _BatchNorm) for child in module.children())


def is_frozen(module: nn.Module) -> bool:
    """Whether this is a BatchNorm whose statistics and affine are buffers that nothing changes."""
    return _name(type(module)) in _FROZEN


def parts_inside(norm: nn.Module) -> tuple[str, ...]:
    """The children that a BatchNorm calls on what it has normalised, in order."""
    if _name(type(norm)) not in _WITH_PARTS:
        return ()
    return tuple(name for name in ("drop", "act") if norm._modules.get(name) is not None)


def activates(norm: nn.Module) -> bool:
    """Whether the activation is inside: nothing is added in front of it then."""
    return "act" in parts_inside(norm) and not isinstance(norm._modules["act"], nn.Identity)


def why_called(child: nn.Module) -> str | None:
    """Why what this child computes cannot be computed without calling it; None when it can."""
    if (
        child._forward_hooks
        or child._forward_pre_hooks
        or child._backward_hooks
        or child._backward_pre_hooks
    ):
        return "it has hooks, which run only when the module itself is called"
    if is_replaced(child):
        return "its forward was replaced on the instance"
    return None


def is_replaced(module: nn.Module) -> bool:
    """Whether somebody gave an instance a forward of its own; what `fuse_` put there says what it is."""
    return type(module.__dict__.get("forward")) not in OWN_FORWARDS


def why_not_fused(norm: nn.Module) -> str | None:
    """Why this child cannot be run fused, looked at now; None when it can.

    What a child is may change after a swap (SyncBatchNorm conversion, hooks, sharding), so this is asked at each call.
    """
    kind = type(norm)
    if kind not in FUSED_NORMS and (reason := _why_not_of_kind(kind, norm)) is not None:
        return reason
    if (reason := why_called(norm)) is not None:
        return reason
    state = norm._buffers if is_frozen(norm) else norm._parameters
    if "weight" not in state or "bias" not in state:
        return "its parameters are computed (parametrization or weight norm), not stored"
    tensor_module = sys.modules.get("torch.distributed.tensor")
    if tensor_module is not None:
        for tensor in norm._parameters.values():
            if isinstance(tensor, tensor_module.DTensor) and id(tensor) not in _gathered.get():
                return "its parameters are DTensors"
    return None


# The ids of parameters that are DTensors now and not when their module is called; empty at a call.
_gathered: ContextVar[frozenset[int]] = ContextVar("fusedres_gathered", default=frozenset())


@contextmanager
def as_called(model: nn.Module) -> Iterator[None]:
    """Look at a model as its calls will find it: FSDP (`fully_shard`) gathers its shards in front of them."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    managed = () if fsdp is None else (m for m in model.modules() if isinstance(m, fsdp.FSDPModule))
    found = frozenset(id(shard) for module in managed for shard in _shards(module))
    token = _gathered.set(found)
    try:
        yield
    finally:
        _gathered.reset(token)


def _shards(module: Any) -> Iterator[Tensor]:
    """What FSDP gathers for a call of this module to a plain tensor; a parameter that was a DTensor before stays one.

    Inside of PyTorch, which has one group of parameters a module up to 2.11 and several in 2.15.
    """
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [state._fsdp_param_group]
    for group in groups:
        for parameter in group.fsdp_params if group is not None else ():
            if not parameter.is_dtensor:
                yield parameter.sharded_param


def _why_not_of_kind(kind: type, norm: Any) -> str | None:
    if is_synchronised(norm) or is_frozen(norm) or _name(kind) in _WITH_PARTS:
        return None
    if isinstance(norm, nn.modules.lazy.LazyModuleMixin):
        return "it waits for its first input; run one batch first, then fuse"
    if isinstance(norm, torch.jit.ScriptModule):
        return "it is a TorchScript module; call fuse_ before torch.jit.script or torch.jit.trace"
    return f"it is {with_article(kind.__name__)}, not an nn.BatchNorm1d/2d/3d"


def is_synchronised(norm: nn.Module) -> bool:
    """Whether this is a BatchNorm that shares its statistics among processes while it trains."""
    kind = type(norm)
    return kind is nn.SyncBatchNorm or _name(kind) == (_TIMM, "SyncBatchNormAct")


def group_of(norm: Any) -> Group | None:
    """The processes that this call of a BatchNorm shares its statistics with; None where it shares none."""
    return None if type(norm) in FUSED_NORMS or not norm.training else processes_of(norm)


def processes_of(norm: Any) -> Group | None:
    """The processes that a BatchNorm shares its statistics with in training, as `nn.SyncBatchNorm` finds them; None
    where there is only this one, and of any other BatchNorm."""
    distributed = torch.distributed
    if (
        not is_synchronised(norm)
        or not distributed.is_available()
        or not distributed.is_initialized()
    ):
        return None
    group: Any = norm.process_group or distributed.group.WORLD
    size = distributed.get_world_size(group)
    return Group(group.group_name, size) if size > 1 else None


def begin(norm: Any, input: Tensor) -> tuple[BatchNorm, bool]:
    """Read everything off `norm` at the call: training, momentum (None included), tracked statistics, affine or not;
    and whether it normalises with the batch. A momentum may be a tensor.

    Raises:
        ValueError: an input of a rank that it does not take.
    """
    # From the dictionaries, not by attribute: nn.Module looks in three of them, five times a call.
    buffers, parameters = norm._buffers, norm._parameters
    try:
        running_mean, running_var = buffers["running_mean"], buffers["running_var"]
    except KeyError:  # PyTorch's own error, where they are gone
        running_mean, running_var = norm.running_mean, norm.running_var
    if "weight" in buffers:
        weight, bias = buffers["weight"], buffers["bias"]
        return BatchNorm(weight, bias, running_mean, running_var, 0.0, norm.eps), False
    norm._check_input_dim(input)
    momentum: Any = norm.momentum
    batches = None
    if norm.training:
        use_batch = True
        if not norm.track_running_stats:
            running_mean = running_var = None
        elif (batches := norm.num_batches_tracked) is not None and momentum is None:
            wide = torch.float32 if running_mean is None else running_mean.dtype
            # This batch included; not in the default dtype, which somebody may have set to bfloat16.
            momentum = 1.0 / (batches + 1).to(accumulate_dtype(wide))
    else:
        use_batch = running_mean is None and running_var is None
    momentum = 0.0 if momentum is None else momentum
    weight, bias = parameters["weight"], parameters["bias"]
    return BatchNorm(
        weight, bias, running_mean, running_var, momentum, norm.eps, batches
    ), use_batch


def usual(norm: Any) -> tuple[BatchNorm, bool] | None:
    """As `begin`, of a plain BatchNorm that nothing was done to; None of any other, which is to be asked in full."""
    if type(norm) not in FUSED_NORMS:
        return None
    own = norm.__dict__
    if (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    ):
        return None
    momentum, eps, training = own["momentum"], own["eps"], own["training"]
    parameters, buffers = own["_parameters"], own["_buffers"]
    try:
        weight, bias = parameters["weight"], parameters["bias"]
        mean, var = buffers["running_mean"], buffers["running_var"]
        batches = buffers["num_batches_tracked"]
    except KeyError:  # parametrized
        return None
    if type(eps) is not float or not eps > 0 or type(training) is not bool:
        return None
    if training:
        if not own["track_running_stats"]:
            mean = var = batches = None
        elif momentum is None:  # a cumulative average
            return None
        use_batch = True
    else:
        batches, use_batch = None, mean is None and var is None
    if momentum is None:
        momentum = 0.0
    elif type(momentum) is not float:
        return None
    return BatchNorm(weight, bias, mean, var, momentum, eps, batches), use_batch


def left_to_pytorch(norm: Any, input: Tensor) -> bool:
    """Whether PyTorch itself runs this call of a BatchNorm: it gives another dtype than its input's (a frozen one
    multiplies), or momentum or eps is what PyTorch refuses, which is its error to raise, or it shares its statistics
    on a GPU without the kernels."""
    momentum, eps = norm.__dict__.get("momentum"), norm.eps
    is_usual = (momentum is None or type(momentum) is float) and type(eps) is float and eps > 0
    if not is_usual and _refuses(momentum, eps):
        return True
    if group_of(norm) is not None:
        # The same on all processes, whatever they are given: they wait for each other.
        is_compiled = torch.compiler.is_compiling()
        return not is_compiled and input.is_cuda and resolve(input.device, input.dtype)[0] != "triton"  # fmt: skip
    weight = norm._buffers.get("weight")
    return weight is not None and weight.dtype != input.dtype


def _refuses(momentum: Any, eps: Any) -> bool:
    try:
        if momentum is not None:
            momentum_number("momentum", momentum)
        return not number("BatchNorm", "eps", eps) > 0
    except TypeError:
        return True
