"""What a captured CUDA graph needs of the host's side, where nothing is captured: the operations run at once.

On a GPU, tests/test_cuda.py and tests/test_triton.py capture and replay.
"""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import cases
import oracle
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from fastsam import FusedSAM, ops
from fastsam.ops import graphs
from fastsam.ops.formats import Precision
from fastsam.ops.tables import Tables

AGAIN = "capture it again"


class Switch:
    """Whether a capture is said to go on."""

    on = False

    def __enter__(self) -> None:
        self.on = True

    def __exit__(self, *error: object) -> None:
        self.on = False


@pytest.fixture
def capture(monkeypatch):
    """A context in which a graph is said to be captured; a backend that knows of no graphs is given what it takes."""
    switch, plain = Switch(), ops.backend_named
    support = SimpleNamespace(own_rows=lambda *_: 0, prepare_capture=lambda _: None, upload_values=lambda _: None)

    def backend_named(name):
        backend = plain(name)
        return backend._replace(graphs=support) if backend.graphs is None else backend

    monkeypatch.setattr(ops, "backend_named", backend_named)
    monkeypatch.setattr("fastsam.ops.graphs.capturing", lambda device: switch.on)
    return switch


def make(backend, device, dtype=torch.float32, **options):
    params = [Parameter(torch.linspace(-1, 1, n).to(device, dtype)) for n in (5, 70)]
    groups = [dict(params=[p]) for p in params]
    options = dict(lr=0.1, momentum=0.9) | options
    return params, FusedSAM(groups, torch.optim.SGD, rho=0.1, backend=backend, **options)


def take(opt):
    """A step with new gradients in either pass, which it returns."""
    params = [p for group in opt.param_groups for p in group["params"]]
    taken = []
    for finish in (opt.first_step, opt.second_step):
        for p in params:
            p.grad = torch.full_like(p, 0.5)
        taken.append([p.grad for p in params])
        finish()
    return taken


def test_refresh_uploads_only_what_the_device_was_not_told_yet(monkeypatch):
    tables, uploads = Tables(torch.device("cpu"), Precision().format_of(torch.float32)), []
    monkeypatch.setattr("fastsam.ops.native.upload_rows", uploads.append)
    changes = [
        dict(rows=[1.0]),
        dict(q=3.0),
        dict(format=tables.format._replace(grad=torch.bfloat16)),
        dict(cache=None),
    ]
    for change in changes:
        for name, value in change.items():
            setattr(tables, name, value)
        for _ in range(3):
            graphs.upload_values(tables)
            graphs.prepare_capture(tables)
    assert len(uploads) == len(changes)


def graph_memory(opt):
    """Weak references to what a replay reads and writes."""
    buckets = opt._sam.buckets
    found = {f"sums of {device}": t for device, t in buckets.sums.items()}
    for bucket in buckets.items:
        tables, own = bucket.tables, bucket.tables.cache
        for name in ("segment_table", "chunk_table", "partials", "dot_partials", "overflows", "rounding"):
            found[name] = getattr(tables, name)
        for name in ("tickets", "one", "zero", "unclipped", "uncounted"):  # of Triton's cache
            found[f"cache.{name}"] = getattr(own, name, None)
        for name in ("rows", "ascent", "descent", "perturbed", "numbers_there"):
            found[f"cache.{name}"] = getattr(getattr(own, name, None), "copy", None)
        for i, segment in enumerate(bucket.segments):
            found[f"backup {i}"], found[f"master {i}"] = segment.backup, segment.master
            found |= {f"state {i} {j}": state for j, state in enumerate(segment.states)}
            found[f"progress {i}"] = segment.progress
    return {name: weakref.ref(t) for name, t in found.items() if isinstance(t, Tensor)}


def add_parameter(opt, params):
    opt.add_param_group(dict(params=[Parameter(torch.ones_like(params[0]))]))


def add_empty_group(opt, params):
    opt.add_param_group(dict(params=[Parameter(torch.ones_like(params[0]), requires_grad=False)], lr=0.3))


def double(opt, params):
    for p in params:
        p.data = p.data.double()


def move_weight(opt, params):
    params[0].data = params[0].data.clone()


def move_state(opt, params):
    state = opt.state[params[0]]["momentum_buffer"]
    state.data = state.data.clone()


def drop_parameter(opt, params):
    del opt.param_groups[1]


CHANGES = [add_parameter, add_empty_group, double, move_weight, move_state, drop_parameter]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("options", [{}, dict(master_weights=True), dict(stochastic_rounding=True)], ids=str)
def test_nothing_that_a_replay_reads_or_writes_is_freed(backend, device, capture, change, options):
    params, opt = make(backend, device, torch.bfloat16 if options else torch.float32, **options)
    take(opt)
    with capture:
        take(opt)
    memory = graph_memory(opt)
    held = {p.data_ptr(): weakref.ref(p.untyped_storage()) for p in params}
    opt.refresh()
    change(opt, params)
    take(opt)
    with pytest.raises(RuntimeError, match=AGAIN):
        opt.refresh()
    gc.collect()
    assert memory and [name for name, t in memory.items() if t() is None] == []
    assert all(storage() is not None for storage in held.values())
    with capture:
        take(opt)
    opt.refresh()


def test_the_gradients_of_both_passes_are_kept(backend, device, capture):
    params, opt = make(backend, device)
    take(opt)
    with capture:
        first, second = take(opt)
    addresses = [[weakref.ref(g) for g in grads] for grads in (first, second)]
    opt.check_capture()
    del first, second
    params[0].data = params[0].data.double()  # its bucket is built anew
    for _ in range(2):
        take(opt)
    gc.collect()
    assert all(g() is not None for grads in addresses for g in grads)


def test_a_group_whose_perturb_was_switched_is_not_in_the_graph(backend, device, capture):
    params, opt = make(backend, device)
    opt.param_groups[1]["perturb"] = False
    take(opt)
    with capture:
        take(opt)
    opt.refresh()
    for i in range(2):
        before = opt.param_groups[i]["perturb"]
        opt.param_groups[i]["perturb"] = not before
        for check in (opt.refresh, opt.check_capture):
            with pytest.raises(RuntimeError, match=f"amsgrad or perturb switched.*{AGAIN}"):
                check()
        opt.param_groups[i]["perturb"] = before
    opt.refresh()


def test_a_weight_that_moved_is_not_followed_in_a_capture(backend, device, capture):
    params, opt = make(backend, device)
    take(opt)
    params[0].data = params[0].data.clone()
    before = [oracle.bits(p) for p in params]
    with capture, pytest.raises(RuntimeError, match="before a CUDA graph is captured"):
        take(opt)
    assert [oracle.bits(p) for p in params] == before and not opt.perturbed
    take(opt)
    with capture:
        take(opt)


def test_a_refresh_in_a_capture_is_refused(backend, device, capture):
    params, opt = make(backend, device)
    take(opt)
    with capture, pytest.raises(RuntimeError, match=r"refresh\(\) was called while a CUDA graph is captured"):
        opt.refresh()
    with capture:
        take(opt)
    opt.refresh()


def test_masters_are_compared_before_a_capture_not_in_every_replay(backend, device, capture, monkeypatch):
    params, opt = make(backend, device, torch.bfloat16, master_weights=True)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.prepare()
    before = [oracle.bits(p) for p in params]
    for operation in (opt.first_step, opt.base_step):
        with capture, pytest.raises(RuntimeError, match=r"refresh\(\), or take a step, before the capture"):
            operation()
    assert [oracle.bits(p) for p in params] == before and not opt.perturbed
    opt.refresh()
    monkeypatch.setattr("fastsam.memory.segments.Segment.refresh_master", lambda segment: pytest.fail("in the graph"))
    with capture:
        take(opt)


@pytest.mark.parametrize(
    "options",
    [dict(p=3.0), dict(p=float("inf")), dict(perturb_with_weight_decay=True, weight_decay=0.1), dict(adaptive=True)],
    ids=str,
)
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_a_capture_right_after_prepare(backend, device, capture, options, max_grad_norm):
    """Every kernel that it launches is loaded already: that of the norm to clip by may be another than of the first."""
    params, opt = make(backend, device, max_grad_norm=max_grad_norm, **options)
    opt.prepare()
    with capture:
        take(opt)
    opt.refresh()


def test_an_optimizer_that_captured_is_freed_at_once(backend, device, capture):
    _, opt = make(backend, device)
    take(opt)
    with capture:
        take(opt)
    buckets = weakref.ref(opt._sam.buckets)
    gc.disable()
    try:
        del opt
        assert buckets() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("config", **cases.ids(cases.UNFUSED[:1]))
def test_an_unfused_base_restores_in_a_capture(backend, device, capture, config):
    """Its own step is not ours to capture, but nothing of ours is in the way."""
    params = cases.make_params(names=["matrix"], device=device)
    opt = cases.fused(params, config, backend)
    opt.step(cases.closure_of(params, 0, ["matrix"]))
    with capture:
        cases.set_gradients(params, 1, 1, ["matrix"])
        opt.first_step()
        opt.restore()
    opt.refresh()
