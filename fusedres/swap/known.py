"""What is known of functions that a forward may call: which become a node of the graph, which are answered while it is
interpreted, which are asked again at each call, and which cannot be followed."""

from __future__ import annotations

import builtins
import functools
import itertools
import math
import operator
import sys
import types
import typing
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..words import a_type


@functools.cache
def tensor_functions() -> frozenset[int]:
    """The ids of PyTorch's functions of tensors: they depend on their arguments and on a torch.Generator alone."""
    found = [
        # Those of object are made anew at each look, and what is made later may have their ids.
        getattr(torch._C._VariableFunctions, name)
        for name in dir(torch._C._VariableFunctions)
        if not name.startswith("__")
    ]
    for package in (F, torch, torch.functional, torch.special, torch.linalg, torch.fft):
        found += [
            value
            for name, value in vars(package).items()
            if not name.startswith("__") and _is_of(value, _HOMES)
        ]
    return frozenset(map(id, found)) - frozenset(map(id, (*ANSWERS, *QUESTIONS, *_STATEFUL)))


_HOMES = ("torch.nn.functional", "torch.functional", "torch._C._nn", "torch._C._special", "torch._C._linalg",
          "torch._C._fft", "torch._jit_internal", "torch.nn._reduction")  # fmt: skip
_STATEFUL = tuple(
    getattr(torch, name)
    for name in (
        "manual_seed", "seed", "initial_seed", "set_rng_state", "get_rng_state", "set_default_dtype",
        "set_default_device", "set_grad_enabled", "set_num_threads", "use_deterministic_algorithms", "save", "load",
        "compile", "set_printoptions", "is_deterministic_algorithms_warn_only_enabled",
        "are_deterministic_algorithms_enabled", "get_deterministic_debug_mode", "get_default_dtype",
    )
    if hasattr(torch, name)
)  # fmt: skip


def _is_of(value: Any, homes: tuple[str, ...]) -> bool:
    is_function = isinstance(value, (types.FunctionType, types.BuiltinFunctionType))
    return is_function and str(getattr(value, "__module__", None)) in homes


def is_tensor_function(function: Any) -> bool:
    """Whether a call of it is a node of the graph."""
    return id(function) in tensor_functions() or function in (
        torch._assert,
        torch.is_floating_point,
    )


# What these say is fixed where a fused forward runs: it steps aside in a trace, and nobody scripts it.
ANSWERS: dict[Any, Any] = {
    torch.jit.is_scripting: False,
    torch.jit.is_tracing: False,
}
# Asked while it is interpreted, and again at each call.
QUESTIONS: tuple[Any, ...] = (
    torch.is_grad_enabled, torch.is_inference_mode_enabled, torch.is_autocast_enabled,
    torch.is_autocast_cpu_enabled, torch.is_anomaly_enabled, torch.are_deterministic_algorithms_enabled,
    torch.get_default_dtype, torch.get_num_threads, torch.onnx.is_in_onnx_export, torch.cuda.is_available,
    torch.cuda.device_count, torch.distributed.is_available,
    *(
        getattr(package, name)
        for package, names in (
            (torch.distributed, ("is_initialized", "get_rank", "get_world_size")),
            (torch.compiler, ("is_compiling", "is_dynamo_compiling", "is_exporting")),
        )
        for name in names
        if hasattr(package, name)
    ),
)  # fmt: skip
# Functions of plain values: called as they are on these, a node of the graph on symbols.
PURE: tuple[Any, ...] = (
    abs, divmod, round, pow, min, max, int, float, complex, str, len, ord, chr, repr, slice, range, hash,
    *(f for f in vars(math).values() if isinstance(f, types.BuiltinFunctionType)),
    *(
        f for name, f in vars(operator).items()
        if isinstance(f, types.BuiltinFunctionType) and not name.startswith("_") and name != "call"
    ),
)  # fmt: skip
_PURE = frozenset(map(id, PURE))
# Of those, what writes to its first argument where that is a list, a dict or a set.
WRITING = frozenset(
    getattr(operator, name)
    for name in ("setitem", "delitem", "iconcat", "iadd", "isub", "imul", "iand", "ior", "ixor", "ifloordiv", "ilshift",
                 "imatmul", "imod", "ipow", "irshift", "itruediv")
)  # fmt: skip
# Of plain values only: they would look into a symbol, or keep it.
BUILDERS: tuple[Any, ...] = (
    list, tuple, set, frozenset, dict, OrderedDict, zip, enumerate, reversed, itertools.chain, itertools.zip_longest,
    itertools.product, itertools.islice, itertools.repeat, torch.Size, torch.device, bytes, callable,
)  # fmt: skip
_BUILDERS = frozenset(map(id, BUILDERS))


def is_pure(function: Any) -> bool:
    """Whether it depends on its arguments alone, plain values or symbols, and changes nothing."""
    return id(function) in _PURE


def is_builder(function: Any) -> bool:
    """Whether it makes a plain value of plain values, whatever stands in them."""
    return id(function) in _BUILDERS


def is_plain_namedtuple(kind: Any) -> bool:
    """Whether it is a namedtuple whose author has changed nothing of what a tuple does."""
    if not isinstance(kind, type) or kind.__bases__ != (tuple,) or not hasattr(kind, "_fields"):
        return False
    made = {"__new__", "__repr__", "__getnewargs__", "__replace__"}
    own = {
        n for n, v in vars(kind).items() if isinstance(v, types.FunctionType) and n.startswith("__")
    }
    return type(kind) is type and own <= made and kind.__new__.__code__.co_name == "<lambda>"


# Methods of plain values; those of the second line change the value itself.
METHODS: dict[type, frozenset[str]] = {
    list: frozenset(("copy", "index", "count", "append", "extend", "insert", "pop", "reverse", "clear", "remove")),
    tuple: frozenset(("index", "count")),
    dict: frozenset(("get", "items", "keys", "values", "copy", "pop", "update", "setdefault", "clear", "popitem")),
    set: frozenset(("copy", "union", "intersection", "difference", "add", "update", "discard", "remove", "issubset")),
    frozenset: frozenset(("copy", "union", "intersection", "difference", "issubset")),
    str: frozenset(name for name in dir(str) if not name.startswith("_")),
    bytes: frozenset(("decode", "startswith", "endswith")),
    int: frozenset(("bit_length", "conjugate")),
    float: frozenset(("is_integer", "conjugate")),
    torch.Size: frozenset(("numel", "index", "count")),
}  # fmt: skip
METHODS[OrderedDict] = METHODS[dict] | {"move_to_end"}
CHANGING = frozenset(
    ("append", "extend", "insert", "pop", "reverse", "clear", "remove", "update", "setdefault", "popitem", "add",
     "discard", "move_to_end")
)  # fmt: skip
# They compare their items.
COMPARING = frozenset(("index", "count", "remove"))

_FUSE_BEFORE = "fuse what is called inside instead, or move the call out of this forward"
# Why a call cannot be followed, and what to do, by the name of the function.
ADVICE: dict[str, str] = {
    "torch.utils.checkpoint.checkpoint": "call checkpoint around the block, not inside it",
    "torch.utils.checkpoint.checkpoint_sequential": "call checkpoint around the block, not inside it",
    "builtins.print": "print outside of the forward, or from a hook",
    "warnings.warn": "warn outside of the forward",
}


def full_name(function: Any) -> str:
    """A function as a report names it."""
    name = getattr(function, "__qualname__", None) or getattr(function, "__name__", None)
    if name is None:
        return f"{a_type(function)}"
    module = getattr(function, "__module__", None)
    owner = getattr(function, "__self__", None)
    if owner is not None and not isinstance(owner, (types.ModuleType, type)):
        module = type(owner).__module__
    if module is None and isinstance(owner, types.ModuleType):
        module = owner.__name__
    return name if module in (None, "builtins", "__main__") else f"{module}.{name}"


def advice(function: Any) -> str:
    """What to do about a call that cannot be followed."""
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    return ADVICE.get(f"{module}.{name}", "")


def may_be_entered(function: types.FunctionType) -> bool:
    """Whether a Python function is interpreted: anybody's but PyTorch's (its layers are) and the standard library's."""
    module = str(function.__globals__.get("__name__"))
    package = module.partition(".")[0]
    is_machinery = package == "torch" or package in sys.stdlib_module_names - {"__main__"}
    return not is_machinery or module.startswith(_LAYERS) or function in _ENTERED


_LAYERS = ("torch.nn.modules.", "torch.ao.nn.", "torch.nn.intrinsic.")
_ENTERED = (torch.jit.annotate, torch.is_tensor, typing.cast)

TENSOR_METHODS = frozenset(
    name for name in dir(torch.Tensor) if callable(getattr(torch.Tensor, name, None))
)
SPECIAL: dict[str, Callable[..., Any]] = {
    name: getattr(builtins, name)
    for name in ("isinstance", "issubclass", "hasattr", "getattr", "type", "bool", "iter", "next", "sum", "any", "all",
                 "map", "filter", "super")
}  # fmt: skip

IN_PLACE = {
    "+=": operator.iadd, "-=": operator.isub, "*=": operator.imul, "/=": operator.itruediv, "//=": operator.ifloordiv,
    "%=": operator.imod, "**=": operator.ipow, "&=": operator.iand, "|=": operator.ior, "^=": operator.ixor,
    "<<=": operator.ilshift, ">>=": operator.irshift, "@=": operator.imatmul,
}  # fmt: skip
BINARY = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "//": operator.floordiv,
    "%": operator.mod, "**": operator.pow, "&": operator.and_, "|": operator.or_, "^": operator.xor,
    "<<": operator.lshift, ">>": operator.rshift, "@": operator.matmul, "[]": operator.getitem,
}  # fmt: skip
COMPARE = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
# Functions that give a Tensor where their first argument is one.
GIVE_A_TENSOR = frozenset(
    ("add", "iadd", "sub", "isub", "mul", "imul", "truediv", "itruediv", "neg", "relu", "relu6", "leaky_relu", "silu",
     "gelu", "hardswish", "mish", "sigmoid", "tanh", "softmax", "cat", "mean", "sum", "pad", "dropout", "interpolate",
     "flatten", "view", "reshape", "contiguous", "clone", "float", "to", "permute", "transpose", "expand", "matmul",
     "conv1d", "conv2d", "conv3d", "batch_norm", "linear", "avg_pool2d", "adaptive_avg_pool2d", "unsqueeze", "squeeze",
     "pow", "rsub", "stack", "adaptive_max_pool2d", "layer_norm", "group_norm", "type", "half", "detach")
)  # fmt: skip


def is_layer(child: nn.Module) -> bool:
    """Whether a child gives a Tensor where it is given one: PyTorch's layers, but those that give more than one."""
    is_torch = type(child).__module__.startswith("torch.nn.modules.")
    gives_more = (
        nn.RNNBase,
        nn.MultiheadAttention,
        nn.Sequential,
        nn.ModuleList,
        nn.ModuleDict,
        nn.Identity,
    )
    return is_torch and not isinstance(child, gives_more) and not hasattr(child, "return_indices")
