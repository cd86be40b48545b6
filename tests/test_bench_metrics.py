"""Every metric of the benchmark suite can fail: what is planted is found."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import nn

from fusedres.benchmarks import bytes_level, cases, code, measure, network, traffic
from fusedres.benchmarks import parity as parity_module
from fusedres.benchmarks.compile_only import compile_only
from fusedres.benchmarks.floors import OPERATORS
from fusedres.benchmarks.parity import Parity, Wrong
from fusedres.benchmarks.providers import Provider, Unfit
from fusedres.benchmarks.record import Row
from fusedres.benchmarks.timing import Effort
from fusedres.benchmarks.workload import Setting, Workload

from .helpers import without_plans

CPU = torch.device("cpu")
SITE = traffic.Site("bn_add_relu", (8, 16, 32, 32))


# --- bytes -----------------------------------------------------------------------------------------------------------


def faults_of(found: traffic.Traffic) -> list[str]:
    row = bytes_level._row(
        SITE, "fusedres", "bytes", "forward", found.forward,
        OPERATORS[SITE.kernel].bytes("forward", SITE.shape, 2),
    )  # fmt: skip
    return bytes_level.faults([row])


@pytest.mark.interpreter
def test_an_extra_pass_is_seen_by_the_byte_meter(monkeypatch):
    assert faults_of(traffic.count(SITE)) == []
    from fusedres.kernels.apply import bn_apply_kernel
    from fusedres.kernels.plan import Planner

    without_plans(monkeypatch)
    once = Planner.start

    def twice(self, kernel, *rest):
        for _ in range(1 + (kernel is bn_apply_kernel)):
            once(self, kernel, *rest)

    monkeypatch.setattr(Planner, "start", twice)
    assert len(faults_of(traffic.count(SITE))) == 1


@pytest.mark.once
@pytest.mark.parametrize("kernel", ["bn", "bn_relu", "bn_add", "bn_add_relu", "bn_bn_add_relu"])
def test_eager_passes_are_counted_operation_by_operation(kernel):
    """3 + 5 for each BatchNorm, 2 + 3 for the ReLU, 3 for the add, whose gradients are free."""
    operator = OPERATORS[kernel]
    shape = (4, 8, 64, 64)

    shapes = [shape] * (2 if operator.residual else 1)
    counted = network.count_step(lambda: cases.tail(kernel, 8), shapes, differentiable=True)
    relu, norms = operator.activation is not None, 1 + operator.residual_norm
    expected = {
        "forward": 3 * norms + 3 * operator.residual + 2 * relu,
        "backward": 5 * norms + 3 * relu,
    }
    size = 2 * 4 * 8 * 64 * 64
    assert {mode: moved / size for mode, moved in counted.bytes.items()} == expected


@pytest.mark.once
def test_an_extra_operation_is_seen_in_a_network():
    class Clumsy(cases.Tail):
        def forward(self, x, residual=None):
            return torch.relu(super().forward(x, residual))

    plain, clumsy = (
        network.count_step(lambda kind=kind: kind(8, True, "relu"), [(4, 8, 64, 64)] * 2).total
        for kind in (cases.Tail, Clumsy)
    )
    assert clumsy > plain


@pytest.mark.once
def test_the_network_sum_of_resnet50():
    """At batch 256: 87.2 GB in eager, 51.0 as the table's floors; a byte more or less is a change to be looked at."""
    case = cases.model("resnet50", 256, 224)
    eager = network.count_step(case.build, [case.shape])

    def floor(site: traffic.Site) -> traffic.Traffic:
        forward, backward = (
            OPERATORS[site.kernel].bytes(m, site.shape, 2) for m in ("forward", "backward")
        )
        return traffic.Traffic(forward, backward, 3, 3)  # fmt: skip

    fused = network.count_step(case.build, [case.shape], measured=floor)
    assert (round(eager.total / 1e9, 1), round(fused.total / 1e9, 1)) == (87.2, 51.0)
    assert eager.operations["native_batch_norm"] == 53
    assert fused.operations["batch_norm_act"] + fused.operations["dual_batch_norm_act"] == 49


@pytest.mark.once
def test_bytes_at_any_batch_from_two_small_ones():
    once = network.MeasuredOnce()
    wanted = traffic.Site("bn", (256, 2048, 7, 7))
    assert once(wanted) == traffic.Traffic(0, 0, 0, 0)
    once.measure(lambda plan: [traffic.Traffic(5 + 7 * s.shape[0], 9 * s.shape[0], 3, 2) for s in plan])  # fmt: skip
    assert once(wanted) == traffic.Traffic(5 + 7 * 256, 9 * 256, 3, 2)


# --- machine code ----------------------------------------------------------------------------------------------------


@triton.jit
def spilling_kernel(p_x, p_y, SIZE: tl.constexpr):
    o = tl.arange(0, SIZE)
    b_x = tl.load(p_x + o)
    tl.store(p_y + o, b_x / tl.sum(b_x, axis=0))


@pytest.mark.compiler
@pytest.mark.parametrize(("size", "spills"), [(1024, False), (32768, True)])
def test_a_spill_is_seen_in_the_machine_code(size, spills):
    """32768 values in one warp are 1024 registers a thread; there are 255."""
    x = torch.empty(size)
    with compile_only(90) as launches:
        spilling_kernel[(1,)](x, torch.empty_like(x), SIZE=size, num_warps=1, enable_fp_fusion=True)
        (launch,) = launches
    target = code.Target(90, "planted", "here", (size,) * 4, "float32", "contiguous_format")
    assert bool(code.faults(list(code.rows_of(target, [launch])))) == spills


@pytest.mark.compiler
def test_occupancy_follows_registers_and_shared_memory():
    target = code.Target(90, "bn_add_relu", "first stage", (256, 256, 56, 56), "bfloat16", "channels_last")  # fmt: skip
    launch = code.compile_target(target)[0]
    registers = -(-launch.code.registers * 32 // 256) * 256 * launch.warps
    assert launch.occupancy == 65536 // registers * launch.warps / 64
    assert launch.code.widths["load"][128] > 0


# --- parity ----------------------------------------------------------------------------------------------------------


class Altered(nn.Module):
    """A Tail with something wrong in it."""

    def __init__(self, tail: cases.Tail, what: str) -> None:
        super().__init__()
        self.tail, self.what = tail, what

    def forward(self, x, residual=None):
        if self.what == "input detached":
            x = x.detach() + 0 * x
        output = self.tail(x, residual)
        if self.what == "output scaled":
            output = output * 1.001
        elif self.what == "variance biased":
            self.tail.bn.running_var.data.mul_(1 - 1e-4)
        elif self.what == "NaN":
            output = output.index_fill(0, torch.tensor([0]), float("nan"))
        elif self.what == "dtype":
            output = output.double()
        elif self.what == "raises":
            raise RuntimeError("planted")
        elif self.what == "unfit":
            raise Unfit("planted")
        return output


def rows_of(what: str, dtype: torch.dtype = torch.float32) -> list[Row]:
    case = cases.operator("bn_add_relu", (4, 8, 9, 9))
    providers = [
        Provider("eager", lambda module: module),
        Provider("altered", lambda module: Altered(module, what)),
        Provider("absent", lambda module: module, lambda device: "it is not installed"),
    ]
    effort = Effort(seconds=0.0, repetitions=1, warm_up=1, most=1)
    plan = measure.Plan(Setting(CPU, dtype, torch.channels_last), effort, ("step",), providers)
    return [row for rows in measure.measure(case, plan) for row in rows]


@pytest.mark.once
@pytest.mark.parametrize(
    ("what", "note"),
    [
        ("output scaled", "wrong, so not timed: output: relative error"),
        ("input detached", "wrong, so not timed: gradient of input 0: relative error"),
        ("variance biased", "wrong, so not timed: buffer 1: relative error"),
        ("NaN", "wrong, so not timed: output: relative error nan"),
        ("dtype", "wrong, so not timed: output is [4, 8, 9, 9] torch.float64"),
        ("raises", "failed: RuntimeError: planted"),
        ("unfit", "not here: planted"),
    ],
)
def test_a_provider_that_is_wrong_gets_a_reason_and_no_time(what, note):
    (row,) = (row for row in rows_of(what) if row.provider == "altered")
    assert row.note.startswith(note)
    assert row.median is None


@pytest.mark.once
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_provider_that_is_right_is_timed_beside_eager_and_the_copy(dtype):
    rows = rows_of("nothing", dtype)
    timed = {(row.provider, row.cache) for row in rows if row.median}
    assert timed == {(p, c) for p in ("eager", "altered", "copy") for c in ("cold", "hot")}


@pytest.mark.once
def test_a_provider_that_is_not_installed_is_named():
    (row,) = (row for row in rows_of("nothing") if row.provider == "absent")
    assert row.note == "missing: it is not installed"


@pytest.mark.once
@pytest.mark.parametrize("level", ["block", "model"])
def test_fused_blocks_and_models_pass_parity_under_autocast(level):
    from fusedres.benchmarks.providers import PROVIDERS

    case = {"block": cases.blocks(1)[3], "model": cases.model("cifar_resnet18", 2, 32)}[level]
    effort = Effort(seconds=0.0, repetitions=1, warm_up=0, most=1)
    setting = Setting(CPU, torch.bfloat16, torch.channels_last)
    plan = measure.Plan(setting, effort, ("step",), [p for p in PROVIDERS if not p.compiles])
    rows = [row for rows in measure.measure(case, plan) for row in rows]
    assert {row.provider for row in rows if row.median} == {"eager", "eager, in place", "fusedres"}


@pytest.mark.once
def test_no_gradient_comes_in_where_rounding_decides_on_the_relu():
    """A mask that differs only there is not a mistake; one that differs elsewhere is."""
    case = cases.operator("bn_add_relu", (4, 8, 9, 9))
    workload = Workload(case, Setting(CPU, torch.float32, torch.channels_last))
    module = workload.build()
    parity = Parity(workload, module)

    def results(margin: float):
        class Shifted(cases.Tail):
            def forward(self, x, residual=None):
                z = self.bn(x) + residual
                return z * (z.detach() > margin)

        shifted = Shifted(8, True, "relu")
        shifted.load_state_dict(workload.build().state_dict())
        found = workload.results(shifted)
        return {name: value for name, value in found.items() if name.startswith("gradient")}

    parity.hold(results(parity_module.MARGIN / 2))
    with pytest.raises(Wrong):
        parity.hold(results(0.1))
