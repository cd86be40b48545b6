"""BatchNorms that share their statistics among processes: three of them, with uneven batches and an empty one, find
what one process finds with the whole batch."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import fusedres
from fusedres.activations import is_piecewise
from fusedres.benchmarks.compile_only import compile_only
from fusedres.ops import sync
from fusedres.ops.dual import Wanted
from fusedres.ops.norm import BatchNorm, Kept

from . import sync_cases
from .helpers import DTYPES, Case, over_budget
from .sync_cases import CASES, MANY, alone, narrow, share_of, trained

FLOAT64 = 1e-13  # of what is to be the same in another order of additions
CATTED = ("output", "grad x", "grad r")

# The kernels run in Triton's interpreter; on GPUs there is a test of its own.
RUNS = {"aten": pytest.mark.once, "triton": pytest.mark.interpreter}
FIRST = {"aten": "eager", "triton": "kernels"}
BACKENDS = [pytest.param(backend, marks=mark) for backend, mark in RUNS.items()]


def started(collectives: str, backend: str, share: str) -> list[dict]:
    """What each of the processes found; that some cases are compiled in two of them takes less time."""
    found, said = _ran(
        collectives, backend, share, 3 if share in ("eager", "kernels", "rest") else 2
    )
    assert found, said
    return found


@functools.cache
def _ran(collectives: str, backend: str, share: str, count: int) -> tuple[list[dict], str]:
    """The same; nothing, and what was printed, where one of them failed."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        arguments = collectives, backend, share
        processes = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", sync_cases.__file__, *arguments, str(rank), str(count), folder],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for rank in range(count)
        ]  # fmt: skip
        said = [process.communicate()[0] for process in processes]
        if any(process.returncode for process in processes):
            return [], "\n".join(said)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(count)], ""


def whole(case, name, found):
    """What all processes found of a result, as one would have."""
    if case.members is not None:
        found = [found[k] for k in case.members]
    parts = [each[name] for each in found]
    if name in CATTED:
        return torch.cat(parts)
    if name.startswith("grad "):
        return sum(part.double() for part in parts)
    assert all(torch.equal(part, parts[0]) for part in parts)
    return parts[0]


def too_far(case, found, oracle, eager):
    """The results that err more than PyTorch's do in one process."""
    wrong = {}
    for name, exact in oracle.items():
        actual = whole(case, name, found).double()
        size = float(exact.double().abs().max())
        eps = torch.finfo(eager[name].dtype).eps if eager[name].is_floating_point() else 0.0
        allowed = 1.1 * float((eager[name].double() - exact).abs().max()) + eps * size
        if case.dtype == torch.float64:
            allowed = FLOAT64 * size
        error = float((actual - exact).abs().max())
        if not error <= allowed:
            wrong[name] = (error, allowed)
    return wrong


def cases(compiled, compiler="aot_eager"):
    """Each with each backend; what takes long is slow."""
    found = []
    for name, case in CASES.items():
        for backend, mark in RUNS.items():
            slow = (pytest.mark.slow,) if "rest" in share_of(name, backend) else ()
            if case.compiled == compiled and case.compiler == compiler:
                found.append(
                    pytest.param(name, backend, marks=(mark, *slow), id=f"{name}-{backend}")
                )
    return found


def check(name, backend, collectives="gloo"):
    share = share_of(name, backend) if collectives == "gloo" else collectives
    found = [each[name] for each in started(collectives, backend, share)]
    case = CASES[name].among(len(found))
    assert too_far(case, found, *(alone(case, oracle) for oracle in (True, False))) == {}


@pytest.mark.parametrize(("name", "backend"), cases(compiled=False))
@pytest.mark.composes("SyncBatchNorm", "works")
def test_processes_find_what_one_does(name, backend):
    check(name, backend)


@pytest.mark.parametrize(("name", "backend"), cases(compiled=True))
@pytest.mark.composes("SyncBatchNorm under torch.compile(fullgraph=True)", "works")
def test_compiled_processes_find_what_one_does(name, backend):
    check(name, backend)


@pytest.mark.parametrize(("name", "backend"), cases(compiled=True, compiler="inductor"))
@pytest.mark.composes(
    "SyncBatchNorm under torch.compile with its default backend, inductor", "works"
)
def test_compiled_by_inductor_they_find_it_too(name, backend):
    check(name, backend)


# Of aten they are with the others; the kernels take long.
LONG = [
    pytest.param("aten", "eager", marks=pytest.mark.once),
    pytest.param("triton", "rest", marks=(pytest.mark.interpreter, pytest.mark.slow)),
]


@pytest.mark.parametrize(("backend", "share"), LONG)
@pytest.mark.parametrize("make", MANY[:-1])
def test_one_collective_each_way(make, backend, share):
    found = started("gloo", backend, share)[0]["collectives"][make.__name__]
    assert found == {"all_gather_into_tensor": 1, "all_reduce": 1, "wait_tensor": 2}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", ["dual tensors", "jvp", "grad", "vmap"])
@pytest.mark.composes("SyncBatchNorm under torch.func and forward-mode AD", "refused")
def test_what_has_no_rule_is_refused_before_anything_is_done(what, backend):
    said, is_as_it_was = started("gloo", backend, FIRST[backend])[0]["refused"][what]
    assert said.startswith("SyncBatchNorm: ")
    assert "3 processes share" in said
    assert is_as_it_was


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_value_a_channel_in_all_leaves_the_running_statistics(backend):
    """nn.BatchNorm refuses it, nn.SyncBatchNorm makes the running variance a NaN: nobody waits for the count here."""
    found = [each["one value"] for each in started("gloo", backend, FIRST[backend])]
    case = sync_cases.Case(sync_cases.AddRelu, sizes=(1, 0, 0), plane=(1, 1))
    shift = case.model().bn.bias.detach().view(1, -1, 1, 1)
    torch.testing.assert_close(found[0]["output"], torch.relu(shift + case.batch()[1]))
    for each in found:
        assert each["state bn.running_mean"].eq(0).all()
        assert each["state bn.running_var"].eq(1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", sync_cases.KEPT)
@pytest.mark.composes("SyncBatchNorm with `keep_finite_statistics`", "works")
def test_what_is_not_finite_in_one_process_leaves_the_statistics_of_all(order, backend):
    """In its channel; nobody asks for a value on the host."""
    for each in started("gloo", backend, FIRST[backend]):
        found = each["kept finite"][order]
        expected = {name: tensor.clone() for name, tensor in found["finite"].items()}
        expected["bn.running_mean"][2], expected["bn.running_var"][2] = 0, 1
        torch.testing.assert_close(found["not finite"], expected, rtol=0, atol=0)
        assert not found["asked"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_report_tells_of_the_processes(backend):
    found = dict(started("gloo", backend, FIRST[backend])[0]["report"])
    assert found.keys() == {"bn", "shortcut.1"}
    assert all(note.endswith("statistics of 3 processes in training") for note in found.values())


@pytest.mark.parametrize(("backend", "share"), LONG)
@pytest.mark.composes("DistributedDataParallel with SyncBatchNorm", "works")
def test_a_whole_network_trains_as_one_process_does(backend, share):
    expected = trained(*narrow())
    for each in started("gloo", backend, share):
        assert each["parallel"].keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(each["parallel"][name], tensor, rtol=1e-9, atol=1e-11)


@pytest.mark.once
def test_a_process_outside_of_the_group_has_statistics_of_its_own():
    case, found = CASES["two of three"], started("gloo", "aten", "eager")[2]["two of three"]
    for name, expected in alone(case, rank=2).items():
        torch.testing.assert_close(found[name], expected)


# Of two GPUs; where there are fewer there is no such test.
if torch.cuda.device_count() > 1:

    @pytest.mark.kernels
    @pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.compiled])
    def test_gpus_find_what_one_process_does(name):
        check(name, "triton", "nccl")


# --- the operators, one process after the other in this one ------------------------------------------------------


def in_shards(case, sizes):
    """The results of a `Case`, its batch divided among processes of these sizes, with the collectives done by hand."""
    t = {name: None if value is None else value.detach() for name, value in case.tensors.items()}
    parts = [
        [None] * len(sizes) if value is None else value.split(sizes)
        for value in (t["input"], t["residual"], t["grad"])
    ]
    shards = list(zip(*parts, strict=True))
    reads = case.activation is not None and not is_piecewise(case.activation)
    gathered = torch.stack([sync.MOMENTS(x, None, None, False)[0] for x, _, _ in shards])
    count, act = gathered[:, 0, 0, 0].sum(), case.activation
    outputs, summed, kept = [], [], []
    for x, r, dy in shards:
        buffers = [None if t[n] is None else t[n].clone() for n in ("running_mean", "running_var")]
        norm = BatchNorm(t["weight"], t["bias"], *buffers, case.momentum, case.eps)
        y, saved, _, bits = sync.FORWARD(x, r, norm, sync.NO_NORM, gathered[:, 0], None, act, True)
        one, other = Kept(x, t["weight"], saved), Kept(r if reads else None, None, None)
        dtype = None if t["bias"] is None else t["bias"].dtype
        wanted = Wanted((True, True, t["weight"] is not None, False), dtype, None)
        summed.append(sync.SUMS(dy, one, other, bits, act, wanted)[:3])
        outputs.append((y, buffers))
        kept.append((dy, one, other, bits))
    means = sum(each[0] for each in summed) / count
    sought = sync.Sought(True, None if t["residual"] is None else t["residual"].dtype)
    gradients = [sync.BACKWARD(*each, means, None, act, sought, None) for each in kept]
    found = {
        "output": torch.cat([y for y, _ in outputs]),
        "grad_input": torch.cat([dx for dx, _ in gradients]),
    }
    if t["residual"] is not None:
        found["grad_residual"] = torch.cat([dr for _, dr in gradients])
    if t["weight"] is not None:
        for k, name in enumerate(("weight", "bias"), 1):
            total = sum(each[k].double() for each in summed)
            found[f"grad_{name}"] = total.to(t[name].dtype)
    if t["running_mean"] is not None:
        found["running_mean"], found["running_var"] = outputs[-1][1]
    return found


SHARDED = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16, "layout": "channels_last"},
    "float16-plain": {"dtype": torch.float16, "residual": False, "affine": False},
    "float64-silu": {"dtype": torch.float64, "activation": "silu"},
    "float32-flat": {"shape": (12, 8, 3, 3), "layout": "contiguous", "tracked": False},
    "float32-far": {"mean_over_std": 300.0, "residual": False, "activation": None},
    "float32-sliced": {"layout": "sliced", "grad_layout": "transposed", "activation": "mish"},
}


@pytest.mark.parametrize("name", SHARDED)
def test_shards_err_no_more_than_a_whole_batch(name, device):
    case = Case(**{"shape": (4, 4, 3, 5), **SHARDED[name]}, device=device)
    n = case.shape[0]
    assert over_budget(case, in_shards(case, (n - 1, 0, 1))) == {}


def two_ways(dtype, device):
    """A projected tail and a pre-activation unit of two processes, one of them empty: all that the operators give."""
    torch.manual_seed(0)
    draw = functools.partial(torch.randn, dtype=torch.float64)
    x, r, dy = (draw(3, 5, 2, 3).to(dtype).to(device) for _ in range(3))
    w, b, rw, rb = (draw(5).to(device) for _ in range(4))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    w, b, rw, rb = (t.to(wide) for t in (w, b, rw, rb))
    norm, other = BatchNorm(w, b, None, None), BatchNorm(rw, rb, None, None)
    empty = x[:0]
    moments = torch.stack(
        [sync.MOMENTS(*pair, None, False)[0] for pair in ((x, r), (empty, empty))]
    )
    y, saved, rsaved, bits = sync.FORWARD(x, r, norm, other, *moments.unbind(1), "relu", True)
    kept, rkept = Kept(x, w, saved), Kept(r, rw, rsaved)
    sums = sync.SUMS(dy, kept, rkept, bits, "relu", Wanted((True,) * 4, wide, wide))
    means = sums[0] / moments[:, 0, 0, 0].sum()
    gradients = sync.BACKWARD(
        dy, kept, rkept, bits, means[:1], means[1:], "relu", sync.Sought(True, dtype), None
    )
    added, total = sync.MOMENTS(x, r, None, True)
    z, zsaved, *_ = sync.FORWARD(total, None, norm, sync.NO_NORM, added, None, "silu", True)
    zkept, nothing = Kept(total, w, zsaved), Kept(None, None, None)
    zsums = sync.SUMS(dy, zkept, nothing, bits[:0], "silu", Wanted((True,) * 4, wide, None))
    dz, _ = sync.BACKWARD(
        dy, zkept, nothing, bits[:0], zsums[0] / 18, None, "silu", sync.Sought(True, None), dy
    )
    return moments, y, *sums, *gradients, added, total, z, *zsums[:3], dz


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_kernels_give_what_plain_pytorch_gives(dtype, device):
    dtype = DTYPES[dtype]
    with fusedres.backend("aten"):
        expected = two_ways(dtype, device)
    tolerance = 1e-12 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps
    for found, wanted in zip(two_ways(dtype, device), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.compiler
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])  # fmt: skip
def test_nothing_spills(layout, dtype, architecture):
    """What a process of eight launches between its collectives: one tail, one way and back."""
    x = torch.empty((64, 256, 28, 28), dtype=DTYPES[dtype], memory_format=layout)
    w, b, mean, var = (torch.empty(256) for _ in range(4))
    norm, nothing = BatchNorm(w, b, mean, var), Kept(None, None, None)
    with fusedres.backend("triton"), compile_only(architecture) as recorded:
        moments, _ = sync.MOMENTS(x, None, None, False)
        gathered = moments.expand(8, 3, 256).contiguous()
        y, saved, _, bits = sync.FORWARD(x, None, norm, sync.NO_NORM, gathered, None, "relu", True)
        kept = Kept(x, w, saved)
        wanted = Wanted((True,) * 4, torch.float32, None)
        sums = sync.SUMS(y, kept, nothing, bits, "relu", wanted)[0]
        sought = sync.Sought(True, None)
        sync.BACKWARD(y, kept, nothing, bits, sums, None, "relu", sought, None)
        found = {each.kernel: each.code.spills for each in recorded}
    assert found == dict.fromkeys(
        [
            "bn_stats_kernel", "bn_moments_kernel", "bn_finalize_kernel", "bn_apply_kernel",
            "bn_grad_reduce_kernel", "bn_grad_sums_kernel", "bn_grad_finalize_kernel", "bn_grad_apply_kernel",
        ],
        0,
    )  # fmt: skip
