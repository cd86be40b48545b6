"""What stands around a model that is fused: sizes that reach C code, other threads, other processes, names and classes
that somebody else chose, and how copies of all kinds run."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import tempfile
import threading
import weakref
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fusedres
from fusedres.benchmarks.steps import ALLOWED, excess

from .swap_blocks import fused_copy, images

pytestmark = pytest.mark.once
X = images(2, 4, 6, 6)


# --- sizes in C code ---------------------------------------------------------------------------------------------

EVERY_FUNCTION = """
import sys
import torch, torch.nn as nn, torch.nn.functional as F
import fusedres

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

def sizes(o):
    return o.size(2), o.shape[2:], (o.size(2), o.size(3)), o.shape

def look(run):
    rows = fusedres.explain(type("Own", (Block,), {"forward": run})()).rows
    assert len(rows) == 1, rows

chosen = [int(k) for k in sys.argv[2]]  # of the spellings of a size
if sys.argv[1] == "functions":
    found = {n: f for p in (F, torch) for n, f in vars(p).items() if callable(f) and n[0] != "_" and n[0].islower()}
    for name, function in found.items():
        for k in chosen:
            look(lambda s, x: function(F.relu(s.bn(x)), sizes(x)[k]))
            look(lambda s, x: function(F.relu(s.bn(x)), size=sizes(x)[k]))
else:
    found = [n for n in dir(torch.Tensor) if n[0] != "_"]
    for name in found:
        for k in chosen:
            look(lambda s, x: getattr(F.relu(s.bn(x)), name)(sizes(x)[k]))
            look(lambda s, x: getattr(F.relu(s.bn(x)), name)(*sizes(x)[1]))
print(len(found), "tried")
"""


@pytest.mark.parametrize("sizes", ["1", pytest.param("023", marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", ["functions", "methods"])
def test_no_function_is_given_a_size_that_is_none(what, sizes):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EVERY_FUNCTION, what, sizes],
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout.endswith("tried\n")) == (0, True), done.stderr[-2000:]


class Squeeze(nn.Module):
    """Pools by the size of what it is given, in a spelling."""

    def __init__(self, pool) -> None:
        super().__init__()
        self.bn, self.pool = nn.BatchNorm2d(4), [pool]

    def forward(self, x):
        h = F.relu(self.bn(x))
        return self.pool[0](h)


POOLS = {
    "size": lambda h: F.avg_pool2d(h, h.size(2)),
    "shape": lambda h: F.avg_pool2d(h, h.shape[2:]),
    "sizes": lambda h: F.avg_pool2d(h, (h.size(2), h.size(3))),
    "a view": lambda h: h.view(h.size(0), -1),
    "unpacked": lambda h: unpacked(h),
}


def unpacked(h):
    n, c, height, width = h.shape
    return h.view(n, c, height * width).mean(2)


@pytest.mark.parametrize("name", POOLS)
def test_sizes_are_those_of_the_call(name):
    plain = Squeeze(POOLS[name]).double()
    fused = fused_copy(plain)
    assert [row.status for row in fusedres.explain(fused).rows] == ["fused"]
    assert max(excess(plain, fused, x) for x in (X, images(3, 4, 2, 2))) <= ALLOWED


def test_a_shape_of_another_rank_is_refused_as_before():
    fused = fused_copy(nn.Sequential(Squeeze(unpacked)).double())
    fused[0].bn = nn.BatchNorm3d(4).double()
    with pytest.raises(ValueError, match="values to unpack"):
        fused(images(2, 4, 2, 2, 2))


# --- threads -----------------------------------------------------------------------------------------------------


def in_threads(*functions):
    """Run these at once; what they raised."""
    errors: list[BaseException] = []

    def run(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1)
    ).double()


def test_a_forward_in_another_thread_does_not_notice():
    other, expected = small().eval(), small().eval()(X)

    def forward():
        for _ in range(200):
            assert torch.equal(other(X), expected)

    def fuse():
        for _ in range(100):
            model = small()
            fusedres.fuse_(model)
            fusedres.explain(model)
            fusedres.unfuse_(model)

    assert in_threads(forward, fuse, fuse) == []


@pytest.mark.composes("`fuse_` while other threads run models", "works")
def test_a_model_is_fused_while_it_runs():
    model, expected = small().eval(), small().eval()(X)

    def forward():
        for _ in range(300):
            torch.testing.assert_close(model(X), expected)

    def fuse():
        for _ in range(60):
            fusedres.fuse_(model)
            fusedres.unfuse_(model)

    assert in_threads(forward, forward, fuse) == []


@pytest.mark.composes("`fuse_` in several threads", "works")
def test_two_threads_fuse_one_model():
    model = small()
    errors = in_threads(*[lambda: fusedres.fuse_(model)] * 4)
    assert (errors, fusedres.explain(model).n_fused) == ([], 1)


def test_nothing_of_pytorch_s_is_touched():
    before = [
        dict(vars(each)) for each in (nn.Module, nn.Sequential, nn.BatchNorm2d, F, torch.Tensor)
    ]
    fusedres.fuse_(small())
    after = [
        dict(vars(each)) for each in (nn.Module, nn.Sequential, nn.BatchNorm2d, F, torch.Tensor)
    ]
    assert after == before


# --- classes -----------------------------------------------------------------------------------------------------


class Backbone(nn.Sequential):
    """An idiom of detection backbones."""

    def train(self, mode=True):
        return super(self.__class__, self).train(mode)

    def forward(self, x):
        return super(type(self), self).forward(x)


def test_super_of_its_own_class_ends():
    model = Backbone(nn.BatchNorm2d(4), nn.ReLU()).double()
    fused = fused_copy(model)
    assert excess(model.train(), fused.train(), X) <= ALLOWED


def test_exact_types_stay():
    model = nn.Sequential(small(), Backbone(nn.BatchNorm2d(4), nn.ReLU()), Squeeze(POOLS["size"]))
    fused = fused_copy(model)
    kinds = [[(type(m), m.__class__) for m in each.modules()] for each in (model, fused)]
    assert kinds[0] == kinds[1]


class Clone(nn.Module):
    """What meta-learning does: a new object with a copy of the `__dict__`."""

    @staticmethod
    def of(module: nn.Module) -> nn.Module:
        clone = module.__new__(type(module))
        clone.__dict__ = module.__dict__.copy()
        clone._parameters = {
            k: None if p is None else p.clone() for k, p in module._parameters.items()
        }
        clone._buffers = {k: None if b is None else b.clone() for k, b in module._buffers.items()}
        clone._modules = {k: None if m is None else Clone.of(m) for k, m in module._modules.items()}
        return clone


def replica(module: nn.Module) -> nn.Module:
    """What DataParallel makes: parameters are plain attributes."""
    made = module._replicate_for_data_parallel()
    vars(made).update({name: p.clone() for name, p in module._parameters.items()})
    return made


COPIES = {
    "copy.copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "pickle 0": lambda m: pickle.loads(pickle.dumps(m, 0)),
    "clone": Clone.of,
    "replica": lambda m: replica(m),
    "of a copy": lambda m: copy.deepcopy(pickle.loads(pickle.dumps(copy.copy(m)))),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.gain = nn.BatchNorm2d(4), nn.Parameter(torch.ones(()))

    def forward(self, x):
        return F.relu(self.bn(x) + x) * self.gain


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("make", [small, Block], ids=["Sequential", "a class"])
@torch.no_grad()
def test_a_copy_runs_on_itself(make, name):
    fused = make().double().eval()
    fusedres.fuse_(fused)
    twin = COPIES[name](fused)
    twin._modules = dict(twin._modules, bn=nn.BatchNorm2d(4).double().eval()) if make is Block else dict(
        twin._modules, **{"1": nn.BatchNorm2d(4).double().eval()}
    )  # fmt: skip
    norm = twin._modules["bn" if make is Block else "1"]
    norm.weight.fill_(3.0)
    plain = make().double().eval()
    plain.load_state_dict(fused.state_dict())
    plain._modules["bn" if make is Block else "1"] = norm
    assert fusedres.is_fused(twin)
    torch.testing.assert_close(twin(X), plain(X))


@pytest.mark.parametrize("is_gone", [False, True])
@torch.no_grad()
def test_clones_of_one_module_run_on_themselves_while_there_are_several(is_gone):
    """Who calls a seat is asked only where several may: from when a second one is there, until it is gone."""
    fused = fused_copy(Block().double().eval())
    alone = fused(X)
    clones = [Clone.of(fused) for _ in range(2)]
    for k, clone in enumerate(clones, 2):
        clone._modules["bn"].running_mean.fill_(k)
    expected = [type(each).forward(each, X) for each in clones]
    if is_gone:
        fused = clones[0]
        alone = expected[0]
    found = [each(X) for each in clones]
    torch.testing.assert_close(found, expected)
    del clone, clones
    torch.testing.assert_close(fused(X), alone)


def test_a_fused_model_goes_when_it_is_let_go():
    model = small()
    fusedres.fuse_(model)
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_a_plan_that_has_no_name_elsewhere_comes_out_of_a_pickle_unfused():
    global act
    act = lambda x: F.relu(x)  # noqa: E731
    block = UsesALambda()
    fusedres.fuse_(block)
    twin = pickle.loads(pickle.dumps(block))
    fused_again = fusedres.fuse_(copy.deepcopy(twin)).n_fused
    assert (fusedres.is_fused(twin), torch.equal(twin.eval()(X.float()), block.eval()(X.float())), fused_again) == (
        False, True, 1,
    )  # fmt: skip


class UsesALambda(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return act(self.bn(x))


def test_a_class_that_is_derived_and_assigned_runs_on():
    from torch.nn.utils import parametrize

    plain = Block().double()
    fused = fused_copy(plain)
    for each in (plain, fused):
        parametrize.register_parametrization(each, "gain", Doubled())
    assert (fusedres.is_fused(fused), excess(plain, fused, X) <= ALLOWED) == (True, True)


class Doubled(nn.Module):
    def forward(self, x):
        return x * 2


def test_another_class_that_is_assigned_has_its_own_forward():
    class Other(Block):
        def forward(self, x):
            return x + 1

    fused = fused_copy(Block().double())
    fused.__class__ = Other
    assert torch.equal(fused(X), X + 1)


# --- names -------------------------------------------------------------------------------------------------------

NAMES = [
    "self", "cls", "call_tail", "class", "a0", "v1", "0x", "back\\slash", "quo'te", 'quo"te', "new\nline", "ünï", "{0}",
    "{m}", "{s}", "x y", "None", "F", "torch", "call_projected_tail", "forward_", "__x__", "___", "k0", "m1", "²",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_child_may_have_any_name(name):
    torch.manual_seed(0)
    model = nn.Sequential(
        OrderedDict([("first", nn.Conv2d(4, 4, 1)), (name, nn.BatchNorm2d(4)), (f"{name} act", nn.ReLU())])
    ).double()  # fmt: skip
    outer = nn.Sequential(OrderedDict([(name, model)]))
    fused = fused_copy(outer)
    assert [row.status for row in fusedres.explain(fused).rows] == ["fused"]
    assert excess(outer, fused, X) <= ALLOWED


class Named(nn.Module):
    """With arguments and children called like what the generated source uses."""

    def __init__(self) -> None:
        super().__init__()
        self.call_tail, self.relu = nn.BatchNorm2d(4), nn.ReLU()

    def forward(this, v1, a0=None):
        call_tail = this.call_tail
        return this.relu(call_tail(v1) + v1)


def test_arguments_may_have_any_name():
    model = Named().double()
    fused = fused_copy(model)
    assert (
        [r.status for r in fusedres.explain(fused).rows],
        excess(model, fused, X) <= ALLOWED,
    ) == (["fused"], True)


# --- wrapped in DistributedDataParallel --------------------------------------------------------------------------


def _wrapped(rank: int, file: str, orders: tuple[str, ...], results) -> None:
    """Two steps of each order, the first without communication; what stands in the weights afterwards."""
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=2
    )
    found = {}
    for order, options in ((o, p) for o in orders for p in ({}, {"find_unused_parameters": True})):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3), nn.ReLU()).double()
        if order == "before":
            fusedres.fuse_(model)
        wrapped = DistributedDataParallel(model, **options)
        if order in ("after", "explained"):
            {"after": fusedres.fuse_, "explained": fusedres.explain}[order](wrapped)
        optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
        local = []
        for step in range(2):
            x = images(4, 4, 2, 2) + 10 * rank + step
            if step == 0:
                with wrapped.no_sync():
                    wrapped(x).square().sum().backward()
                local = [p.grad.clone() for p in model.parameters()]
            else:
                wrapped(x).square().sum().backward()
            optimizer.step()
        is_fused = fusedres.is_fused(model) == (order in ("before", "after"))
        found[order, bool(options)] = is_fused, [*local, *(p.detach() for p in model.parameters())]
    results.put((rank, {k: (ok, [t.tolist() for t in ts]) for k, (ok, ts) in found.items()}))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.composes("`DistributedDataParallel`", "works")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_wrapper_of_ddp_is_looked_through_and_left_as_it_is():
    orders = ("plain", "before", "after", "explained")
    context = torch.multiprocessing.get_context("fork")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_wrapped, args=(rank, f"{folder}/init", orders, results))
            for rank in range(2)
        ]
        for process in processes:
            process.start()
        found = dict(results.get(timeout=100) for _ in processes)
        for process in processes:
            process.join(60)
    for rank, by_order in found.items():
        for (order, options), (is_right, values) in by_order.items():
            expected = [torch.tensor(v) for v in by_order["plain", options][1]]
            torch.testing.assert_close([torch.tensor(v) for v in values], expected)
            assert is_right, (rank, order)
