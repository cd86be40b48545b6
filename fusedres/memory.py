"""What a model keeps for its backward: bytes by unique storage, unfused and fused, by kind.

A forward is run under hooks that see each tensor that autograd saves, and a dispatch mode that sees what each was to
the operator that read or made it. Only what is alive at the end counts, each storage once, parameters and buffers not
at all. The runs are those of a copy that shares the parameters and nothing else.
"""

from __future__ import annotations

import copy
import json
import random
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .dispatch import backend, get_backend, resolve
from .swap import FuseConfig, fuse_, is_fused, unfuse_
from .swap.config import check_arguments, check_not_lazy
from .swap.report import written
from .tables import paragraph
from .words import a_type

# In the order in which a storage that is several of them is counted.
KINDS = ("convolution inputs", "BatchNorm inputs", "statistics", "masks", "others")
UNFUSED, FUSED, KERNELS = "unfused", "fused", "fused, on a GPU"


@dataclass(frozen=True)
class MemoryReport:
    """Bytes kept for the backward of one call, by unique storage; `str()` is a table.

    Args:
        columns: for "unfused", "fused" and, where it could be told, "fused, on a GPU": bytes of each kind. Kinds
            are "convolution inputs", "BatchNorm inputs", "statistics" (four values a channel, or two), "masks" (one bit
            an element of a tail) and "others" (pooling, linear layers, the loss; what an activation keeps of itself). A
            storage that is several of them is counted as the first.
        note: which backend ran, where the last column is from, or why there is none.
        model: the class of the model. input: shapes of what it was called with. training: its mode.
    """

    columns: dict[str, dict[str, int]]
    note: str
    model: str
    input: tuple[tuple[int, ...], ...]
    training: bool

    @property
    def before(self) -> int:
        """Bytes of the unfused model."""
        return sum(self.columns[UNFUSED].values())

    @property
    def after(self) -> int:
        """Bytes of the fused model, on the backend and the device that it was run on."""
        return sum(self.columns[FUSED].values())

    @property
    def on_gpu(self) -> int | None:
        """Bytes that the kernels would keep; None where it could not be told. Where they ran, `after` itself."""
        return sum(self.columns[KERNELS].values()) if KERNELS in self.columns else None

    def _table(self) -> list[tuple[str, ...]]:
        titles = [name for name in (UNFUSED, FUSED, KERNELS) if name in self.columns]
        rows = [("kept for the backward", *titles)]
        for kind in KINDS:
            rows.append((kind, *(_size(self.columns[name][kind]) for name in titles)))
        totals = [sum(self.columns[name].values()) for name in titles]
        rows.append(("all", *map(_size, totals)))
        shares = (f"{n / totals[0]:.1%}" if totals[0] else "-" for n in totals)
        rows.append(("of the unfused", *shares))
        return rows

    def _headline(self) -> str:
        inputs = ", ".join(str(list(shape)) for shape in self.input)
        return f"fusedres: {self.model}, {'train' if self.training else 'eval'}, input {inputs}"

    def __str__(self) -> str:
        table = self._table()
        widths = [max(len(row[k]) for row in table) for k in range(len(table[0]))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in table
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([paragraph(self._headline()), *lines, paragraph(self.note)])

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON text, all figures in bytes; also written to `path` when one is given."""
        text = json.dumps(
            {
                "model": self.model, "training": self.training, "input": self.input, "note": self.note,
                "before": self.before, "after": self.after, "on_gpu": self.on_gpu, "columns": self.columns,
            },
            indent=2,
        )  # fmt: skip
        return written(text, path)

    def to_markdown(self, path: str | Path | None = None) -> str:
        """The table in Markdown; also written to `path` when one is given."""
        head, *rows = self._table()
        lines = [self._headline(), ""]
        for line in (head, ("---", *["---:"] * (len(head) - 1)), *rows):
            lines.append(f"| {' | '.join(line)} |")
        return written("\n".join([*lines, "", self.note]) + "\n", path)


def memory_report(
    model: nn.Module,
    input: Tensor | Sequence[Any],
    config: FuseConfig | None = None,
) -> MemoryReport:
    """What `model(input)` keeps for its backward, unfused and fused.

    The model stays as it was: it is a copy that runs, with the same Parameters and buffers of its own, in the model's
    mode (train or eval); there is no backward, and the random generators of PyTorch, Python and numpy are put back.
    Hooks of the model run with it. It is copied by `copy.deepcopy`, which refuses a tensor that was computed, but for
    one that is an attribute of a module (as pruning and the old weight norm have).

    Args:
        model: any module, fused or not; one that is not is fused in the copy.
        input: what it is called with: a tensor, a tuple of arguments (with dicts, lists and tuples of tensors among
            them), or a shape, for which a tensor of zeros is made on the device and in the dtype of the model's first
            parameter.
        config: as in `fuse_`; of a model that is fused already the default is how it is fused.

    Returns:
        A `MemoryReport`: `print` it for a table. On the aten backend, without autocast, its last column says what the
        kernels would keep on a GPU; it comes from the operators' shapes, by a forward on the meta device.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a layer is lazy and has had no input. Whatever else the model's forward raises.
    """
    if torch.is_inference_mode_enabled():  # in which nothing is kept
        with torch.inference_mode(False):
            return memory_report(model, input, config)
    check_arguments("memory_report", model, config, None)
    check_not_lazy("memory_report", model)
    arguments = tree_map_only(
        Tensor, lambda t: t.clone() if t.is_inference() else t, _arguments(model, input)
    )
    tensors = _tensors_in(arguments)
    columns = {}
    with backend("off"):
        columns[UNFUSED] = _kept(_copied(model, None, config), arguments)
    columns[FUSED] = _kept(_copied(model, True, config), arguments)
    ran = _ran(tensors)
    note = f"by storage, without parameters and buffers; the fused model ran on the {ran} backend"
    if ran != "triton":
        try:
            columns[KERNELS] = _by_shapes(model, config, arguments)
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            note += f"; what the kernels keep cannot be told: {reason}"
        else:
            note += "; the last column by the shapes of the kernels' operators"
    shapes = tuple(tuple(each.shape) for each in tensors)
    return MemoryReport(columns, note, type(model).__name__, shapes, model.training)


def _arguments(model: nn.Module, input: Any) -> tuple[Any, ...]:
    if isinstance(input, Tensor):
        return (input,)
    if isinstance(input, (tuple, list)) and input:
        if not all(isinstance(each, Integral) and not isinstance(each, bool) for each in input):
            return tuple(input)
        like = next(model.parameters(), torch.empty(0))
        return (torch.zeros(tuple(map(int, input)), dtype=like.dtype, device=like.device),)
    raise TypeError(
        f"memory_report: input is {a_type(input)}, {input!r:.40}, expected a tensor, a tuple of arguments, or a "
        "shape, for example (8, 3, 224, 224)"
    )


def _tensors_in(arguments: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]


def _ran(tensors: list[Tensor]) -> str:
    if get_backend() == "off" or not tensors:
        return get_backend()
    floating = next((each for each in tensors if each.is_floating_point()), tensors[0])
    return resolve(floating.device, floating.dtype)[0]


def _copied(
    model: nn.Module, fused: bool | None, config: FuseConfig | None, on_meta: bool = False
) -> nn.Module:
    """A copy with the same parameters (`on_meta`: with none but their shapes), fused or not."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = _shape_of(parameter) if on_meta else parameter
    # What a parametrization of the old kind computes at each call: `deepcopy` refuses it.
    for tensor in (t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor)):
        if not tensor.is_leaf:
            memo[id(tensor)] = _shape_of(tensor) if on_meta else tensor
    if on_meta:
        memo |= {id(buffer): _shape_of(buffer) for buffer in model.buffers()}
    double = copy.deepcopy(model, memo)
    if not fused:
        unfuse_(double)
    elif config is not None or not is_fused(double):
        fuse_(double, config)
    return double


def _shape_of(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _by_shapes(
    model: nn.Module, config: FuseConfig | None, arguments: tuple[Any, ...]
) -> dict[str, int]:
    """What the kernels' operators keep, by a forward on the meta device."""
    if torch._C._is_any_autocast_enabled():
        raise RuntimeError("autocast does not know tensors without values")
    # Fused with its values, which `fuse_` may look at.
    double = _copied(_copied(model, True, config), True, None, on_meta=True)
    moved = tree_map_only(Tensor, _shape_of, arguments)
    with backend("triton"):
        return _kept(double, moved)


class _Held:
    """A tensor that autograd saves, as long as it does."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextmanager
def _others_generators() -> Iterator[None]:
    """The state of Python's random generator and, where it is loaded, of numpy's is put back."""
    numpy: Any = sys.modules.get("numpy")
    state, numpys = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(state)
        if numpys is not None:
            numpy.random.set_state(numpys)


def _kept(model: nn.Module, arguments: tuple[Any, ...]) -> dict[str, int]:
    """Bytes by kind that one call keeps."""
    held: list[weakref.ref[_Held]] = []

    def pack(tensor: Tensor) -> _Held:
        one = _Held(tensor.detach())  # an output, which knows its node, would keep it
        held.append(weakref.ref(one))
        return one

    devices = {each.device for each in _tensors_in(arguments) if each.is_cuda}
    roles = _Roles()
    with (
        torch.random.fork_rng(sorted(device.index for device in devices)),
        _others_generators(),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one.tensor),
        roles,
    ):
        output = model(*arguments)
    own = {StorageWeakRef(t.untyped_storage()) for t in (*model.parameters(), *model.buffers())}
    storages = {}
    for reference in held:
        one = reference()
        if one is not None and one.tensor.layout is torch.strided:
            storage = one.tensor.untyped_storage()
            storages[StorageWeakRef(storage)] = storage.nbytes()
    found = dict.fromkeys(KINDS, 0)
    for reached, count in storages.items():
        if reached not in own:
            found[KINDS[roles.of.get(reached, len(KINDS) - 1)]] += count
    del output  # the graph is needed until here
    return found


class _Roles(TorchDispatchMode):
    """What the storages were to the operators: the number of the kind, the lowest of several.

    A weak reference keeps the address from being used again, not the memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        name = func._schema.name
        returned = results if isinstance(results, tuple) else (results,)
        if "convolution" in name:
            self._note("convolution inputs", args[0])
        elif name.startswith("fusedres::"):
            self._note_ours(name, args, [*zip(func._schema.returns, returned, strict=True)])
        elif "batch_norm" in name and args:
            self._note("BatchNorm inputs", args[0])
            self._note("statistics", *returned[1:])
        return results

    def _note_ours(self, name: str, args: tuple, returned: list) -> None:
        if "batch_norm_act" in name and "add_batch_norm_act" not in name:
            self._note("BatchNorm inputs", *args[: 2 if "dual" in name else 1])
        for result, value in returned:
            if result.name == "sum":
                self._note("BatchNorm inputs", value)
            elif result.name.endswith("saved"):
                self._note("statistics", value)
            elif result.name == "bits":
                self._note("masks", value)

    def _note(self, kind: str, *tensors: Any) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                storage = StorageWeakRef(tensor.untyped_storage())
                number = KINDS.index(kind)
                self.of[storage] = min(number, self.of.get(storage, number))


def _size(count: float) -> str:
    """Bytes with one decimal: 28.3 MB."""
    if count < 1000:
        return f"{count} B"
    for unit in ("kB", "MB"):
        count /= 1000
        if count < 999.95:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} GB"
