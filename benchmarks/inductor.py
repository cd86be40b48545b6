"""What torch.compile would do on an NVIDIA GPU, read from inductor's own schedule, with or without a GPU.

Dynamo and autograd trace on fake CPU tensors: for a fake CUDA tensor autograd asks the driver for a stream. The traced
graph is traced once more as CUDA's, split and scheduled with a stand-in for the device, and its Triton source is
written. It stops there: nothing is compiled, loaded or run. All of this leans on private parts of torch.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# What inductor's heuristics ask of the device, by architecture: an H100 SXM or H200.
DEVICES = {
    90: {
        "name": "NVIDIA H200",
        "multi_processor_count": 132,
        "total_memory": 141 * 10**9,
        "L2_cache_size": 50 * 2**20,
        "regs_per_multiprocessor": 65536,
        "max_threads_per_multi_processor": 2048,
        "max_threads_per_block": 1024,
        "shared_memory_per_block": 48 * 1024,
        "shared_memory_per_block_optin": 227 * 1024,
        "shared_memory_per_multiprocessor": 228 * 1024,
        "warp_size": 32,
        "gcnArchName": "",
    }
}
CUDA = torch.device("cuda", 0)
# A kernel of nothing else only changes dtype or layout.
CONVERSIONS = {"convert_element_type", "clone", "copy", "permute", "reshape", "unsqueeze", "view"}


@dataclass(frozen=True)
class Schedule:
    """Bytes and number of inductor's own kernels; the bytes of the library's (convolutions, mm) stand apart.

    `conversion_bytes` are those of inductor's own, in both directions, that only change dtype or layout.
    """

    forward_bytes: int
    backward_bytes: int
    forward_kernels: int
    backward_kernels: int
    forward_extern_bytes: int = 0
    backward_extern_bytes: int = 0
    conversion_bytes: int = 0


@dataclass(frozen=True)
class Source:
    """What inductor wrote for one direction: a module's text, and of each kernel in it, in the order of their calls,
    the bytes that it reads and writes."""

    phase: str
    text: str
    moved: tuple[tuple[int, int], ...]


def inductor_schedule(
    function: Callable[..., Any] | nn.Module,
    inputs: Sequence[Any],
    *,
    architecture: int = 90,
    autocast: torch.dtype | None = None,
) -> Schedule:
    """The schedule of `function(*inputs)` and of its backward, whose gradients come in as given tensors.

    Of the inputs (and of a module's parameters and buffers) only shape, dtype, strides and requires_grad are read.
    `autocast` is the dtype to trace under; a `torch.autocast("cuda")` inside the function is not seen. What dynamo
    has compiled before is forgotten.

    Raises:
        ValueError: no properties are written down for the architecture.
        RuntimeError: this torch cannot be read so, or cannot compile the function.
    """
    return Schedule(**_scheduled(function, inputs, architecture, autocast).counts)


def inductor_sources(
    function: Callable[..., Any] | nn.Module, inputs: Sequence[Any], *, architecture: int = 90
) -> list[Source]:
    """The source of `inductor_schedule`'s kernels, forward first; raises what that does."""
    return _scheduled(function, inputs, architecture, None).sources


def _scheduled(
    function: Callable[..., Any] | nn.Module,
    inputs: Sequence[Any],
    architecture: int,
    autocast: torch.dtype | None,
) -> _Parts:
    """The parts, with what they counted."""
    if architecture not in DEVICES:
        known = ", ".join(map(str, DEVICES))
        raise ValueError(f"architecture {architecture} is unknown; known are: {known}")
    try:
        # Inductor's advice is about a run that does not come.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parts = _Parts(architecture)
            with parts.settings():
                parts.compile(function, inputs, autocast)
        return parts
    except Exception as error:
        reason = f"torch {torch.__version__}: no schedule without running it: {_cause(error)}"
        raise RuntimeError(reason) from error


class _Scheduled(BaseException):
    """Both directions are scheduled. Not an Exception, which inductor would wrap or swallow."""


class _Parts:
    """The private parts of torch that are read or replaced, and what was counted."""

    def __init__(self, architecture: int) -> None:
        # Imported here: inductor takes seconds to import, and another torch may lack one of these.
        import torch._dynamo.config as dynamo_config
        import torch._functorch.config as functorch_config
        import torch._inductor.config as inductor_config
        from torch._dynamo.device_interface import CudaInterface
        from torch._inductor import compile_fx, graph, metrics, scheduler
        from torch._inductor.fx_passes import joint_graph

        self.compile_fx, self.graph, self.metrics = compile_fx, graph, metrics
        self.interface, self.joint_graph, self.scheduler = CudaInterface, joint_graph, scheduler
        self.configs = dynamo_config, functorch_config, inductor_config
        # torch 2.15 reaches it through a module, 2.11 imported it by name.
        self.home = getattr(compile_fx, "dynamo_common", compile_fx)
        self.aot_autograd = self.home.aot_autograd
        self.architecture = architecture
        self.counts: dict[str, int] = dict.fromkeys(Schedule.__dataclass_fields__, 0)
        self.sources: list[Source] = []

    def compile(
        self,
        function: Callable[..., Any] | nn.Module,
        inputs: Sequence[Any],
        autocast: torch.dtype | None,
    ) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            function, inputs = _fake_module(function), pytree.tree_map(_fake, tuple(inputs))
            compiled = torch.compile(function, backend=self.backend, fullgraph=True, dynamic=False)
            amp = torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext()
            with torch.enable_grad(), amp:
                try:
                    compiled(*inputs)
                except _Scheduled:
                    return
        raise RuntimeError("the function ran without reaching inductor")

    def backend(self, graph: Any, inputs: Sequence[Any]) -> Any:
        """Inductor up to the source of its kernels."""
        # Dynamo makes a mode of its own for a backend up to torch 2.10, and the fake tensors are not of it.
        modes = [each.fake_mode for each in inputs if hasattr(each, "fake_mode")]
        torch._guards.TracingContext.get().fake_mode = modes[0]
        lowering = self.graph.GraphLowering
        with (
            mock.patch.object(self.home, "aot_autograd", self._aot_autograd),
            mock.patch.object(lowering, "compile_to_module", self._count_function()),
        ):
            return self.compile_fx.compile_fx(graph, inputs)

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        """Caches off, nothing left to a later moment or another process; what torch remembers is cleared after."""
        dynamo_config, functorch_config, inductor_config = self.configs
        settings = (
            dynamo_config.patch(automatic_dynamic_local_pgo=False),
            # The backward is scheduled at once, not when a gradient first arrives.
            functorch_config.patch(
                force_non_lazy_backward_lowering=True, enable_autograd_cache=False
            ),
            # One thread starts no compile workers; padding a matmul would be tried on the device.
            inductor_config.patch(
                compile_threads=1,
                force_disable_caches=True,
                fx_graph_cache=False,
                shape_padding=False,
                cpp_wrapper=False,
                max_autotune=False,
            ),
        )
        counted = self.metrics.generated_kernel_count
        with contextlib.ExitStack() as stack:
            stack.callback(setattr, self.metrics, "generated_kernel_count", counted)
            stack.callback(self._forget)
            self._forget()
            for setting in settings:
                stack.enter_context(setting)
            yield

    @staticmethod
    def _forget() -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        torch._dynamo.reset()
        FakeTensorMode.cache_clear()
        _forget_device()

    def _count_function(self) -> Callable[[Any], Any]:
        """GraphLowering.compile_to_module as far as the source; what it counts is added up."""

        def compile_to_module(graph: Any) -> Any:
            before = self.metrics.generated_kernel_count
            code = graph.codegen()[0]
            phase = "backward" if graph.is_backward else "forward"
            self.counts[f"{phase}_kernels"] += self.metrics.generated_kernel_count - before
            each: list[tuple[int, int]] = []
            for node in graph.scheduler.nodes:
                extern = isinstance(node, self.scheduler.ExternKernelSchedulerNode)
                name = f"{phase}_extern_bytes" if extern else f"{phase}_bytes"
                moved = int(node.get_read_write_buffers_sizes())
                self.counts[name] += moved
                if not extern:
                    each.append((node.get_read_buffer_sizes(), node.get_write_buffer_sizes()))
                if not extern and _operations(node) <= CONVERSIONS:
                    self.counts["conversion_bytes"] += moved
            # torch 2.11 gives the text, 2.15 a value that holds it.
            self.sources.append(Source(phase, getattr(code, "value", code), tuple(each)))
            graph.cache_key, graph.cache_path, graph.cache_linemap = "", "", []
            return SimpleNamespace(call=_not_run)

        return compile_to_module

    def _aot_autograd(self, **keywords: Any) -> Callable[..., Any]:
        """aot_autograd whose graph becomes CUDA's after autograd and before inductor sees it."""
        partition = keywords["partition_fn"]

        def partition_fn(graph: Any, joint_inputs: Any, **options: Any) -> Any:
            with self._stand_in():
                graph = self._as_cuda(graph)
                return partition(graph, _on_cuda(joint_inputs), **options)

        def compiler(name: str, last: bool) -> Callable[..., Any]:
            def compile_graph(graph: Any, inputs: Sequence[Any]) -> Any:
                with self._stand_in():
                    # Nothing to differentiate: the graph did not pass through partition_fn.
                    if name == "inference_compiler":
                        graph = self._as_cuda(graph)
                    compiled = keywords[name](graph, _on_cuda(list(inputs)))
                if last:
                    raise _Scheduled
                return compiled

            return compile_graph

        replaced = {
            "fw_compiler": compiler("fw_compiler", False),
            "bw_compiler": compiler("bw_compiler", True),
            "inference_compiler": compiler("inference_compiler", True),
            "partition_fn": partition_fn,
            # Decompositions ask for the device: they wait for _as_cuda.
            "decompositions": {},
        }
        return self.aot_autograd(**{**keywords, **replaced})

    def _as_cuda(self, graph: Any) -> Any:
        """The graph traced again with CUDA tensors and inductor's decompositions; names and roles stay."""
        from torch._inductor.decomposition import select_decomp_table
        from torch.fx.experimental.proxy_tensor import make_fx
        from torch.fx.traceback import preserve_node_meta

        old = graph.graph.find_nodes(op="placeholder")
        inputs = _on_cuda([node.meta["val"] for node in old])
        table = select_decomp_table()
        with torch.no_grad(), _mode(inputs), preserve_node_meta():
            new_graph = make_fx(_OnCuda(graph).run, decomposition_table=table)(*inputs)
        for a, b in zip(old, new_graph.graph.find_nodes(op="placeholder"), strict=True):
            b.meta = {**a.meta, "val": b.meta["val"]}
            # The partitioner tells primals from tangents by name.
            b._rename(a.name)
            b.target = a.target
        output, new_output = graph.graph.output_node(), new_graph.graph.output_node()
        new_output.meta = {**new_output.meta, **output.meta}
        new_graph.recompile()
        return new_graph

    @contextlib.contextmanager
    def _stand_in(self) -> Iterator[None]:
        """What answers for the device while inductor plans and writes source."""
        major, minor = divmod(self.architecture, 10)
        properties = SimpleNamespace(major=major, minor=minor, **DEVICES[self.architecture])
        answers: dict[str, Any] = {"device_count": 1, "current_device": 0}
        answers["get_device_properties"] = properties
        replaced: list[tuple[Any, str, Any]] = [
            *((torch.cuda, name, _say(value)) for name, value in answers.items()),
            # Inductor enters the device where this says yes: with a GPU all goes as it does without.
            (torch.cuda, "is_available", _say(False)),
            (torch.cuda, "get_device_capability", _say((major, minor))),
            (torch.utils._triton, "triton_hash_with_backend", _say("")),
            (torch._C, "_conv_determine_backend_memory_format", _cudnn_memory_format),
            (self.joint_graph.UniformValueConstantFolder, "_deduce_value", self._deduce_value()),
        ]
        answers |= {"is_available": True, "is_bf16_supported": True}
        answers["get_compute_capability"] = self.architecture
        for name, value in answers.items():
            replaced.append((self.interface, name, staticmethod(_say(value))))
        worker = self.interface.Worker
        replaced.append((worker, "get_device_properties", staticmethod(_say(properties))))
        with contextlib.ExitStack() as stack:
            stack.callback(_forget_device)
            _forget_device()
            for owner, name, value in replaced:
                stack.enter_context(mock.patch.object(owner, name, value))
            yield

    def _deduce_value(self) -> Callable[[Any, Any], Any]:
        """Constants are folded by computing them: on the CPU, where the graph says CUDA."""
        original = self.joint_graph.UniformValueConstantFolder._deduce_value

        def deduce(folder: Any, node: Any) -> Any:
            keywords = node.kwargs
            if keywords.get("device") is None:
                return original(folder, node)
            node.kwargs = {**keywords, "device": torch.device("cpu")}
            try:
                return original(folder, node)
            finally:
                node.kwargs = keywords

        return deduce


class _OnCuda(torch.fx.Interpreter):
    """Runs a graph whose factory functions name the CPU as if they named CUDA."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": CUDA}
        return super().call_function(target, args, kwargs)


def _fake(value: Any) -> Any:
    """A CPU tensor like `value`, in the fake mode that is on."""
    if not isinstance(value, Tensor):
        return value
    fake = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="cpu")
    if isinstance(value, nn.Parameter):
        return nn.Parameter(fake, requires_grad=value.requires_grad)
    return fake.requires_grad_(value.requires_grad)


def _fake_module(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a module around fake tensors; a function as it is."""
    if not isinstance(function, nn.Module):
        return function
    tensors = itertools.chain(function.parameters(), function.buffers())
    return copy.deepcopy(function, {id(tensor): _fake(tensor) for tensor in tensors})


def _mode(tensors: Any) -> Any:
    from torch._guards import detect_fake_mode

    return detect_fake_mode(pytree.tree_leaves(tensors)) or contextlib.nullcontext()


def _on_cuda(values: Any) -> Any:
    """Fake tensors as CUDA's, with the same strides."""

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.device == CUDA:
            return value
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=CUDA)

    with _mode(values):
        return pytree.tree_map(move, values)


def _cudnn_memory_format(x: Tensor, weight: Tensor, backend: Any) -> torch.memory_format:
    """cuDNN's rule; without a driver torch does not ask it, and says contiguous."""
    from torch._prims_common import suggest_memory_format

    formats = [suggest_memory_format(tensor) for tensor in (x, weight)]
    kept = [format for format in formats if format != torch.contiguous_format]
    return kept[0] if kept and x.dtype != torch.float64 else torch.contiguous_format


def _forget_device() -> None:
    """Clears what torch remembers of the device that it asked."""
    from torch._inductor import utils
    from torch._inductor.runtime.hints import DeviceProperties
    from torch.utils import _triton

    for value in (*vars(_triton).values(), *vars(utils).values(), DeviceProperties.create):
        if hasattr(value, "cache_clear"):
            value.cache_clear()


def _operations(node: Any) -> set[str]:
    """The names of the operations that a scheduled kernel computes."""
    nodes = (part.node for part in node.get_nodes() if part.node is not None)
    origins = itertools.chain.from_iterable(node.origins for node in nodes)
    targets = (origin.target for origin in origins if origin.op == "call_function")
    return {getattr(target, "_opname", str(target)) for target in targets}


def _cause(error: BaseException) -> str:
    """One line: what dynamo and inductor wrapped."""
    while isinstance(inner := getattr(error, "inner_exception", None), BaseException):
        error = inner
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _say(value: Any) -> Callable[..., Any]:
    return lambda *args, **keywords: value


def _not_run(*args: Any) -> Any:
    raise RuntimeError("a kernel that was only scheduled was called")
