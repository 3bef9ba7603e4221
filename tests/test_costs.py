"""What a step costs in counts that no other work on the machine changes: ATen calls, allocations, Python calls, bytes.

Launches are counted where kernels are launched: test_triton.py and test_ptx_cuda.py.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import fastsam
from fastsam import ops

ROOT = Path(__file__).parents[1]
BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-3, "weight_decay": 0.05}),
}
BYTES = {"sgd": 40, "adamw": 48}  # docs/kernels.md
PYTHON_CALLS = 200  # of a step, whatever the number of tensors; torch's fused SGD makes 1500 for 161
INSTRUCTIONS = 0.8  # of fused SGD's, for 161 tensors

needs_library = pytest.mark.skipif(ops.backends()["cpu"] is not None, reason="there is no C++ library")


def stepping(base: str, tensors: int, **options: Any) -> Any:
    """A function that takes a step of the optimizer's part, after some that set everything up."""
    kind, values = BASES[base]
    params = [torch.nn.Parameter(torch.randn(8)) for _ in range(tensors)]
    for p in params:
        p.grad = torch.randn(8)
    optimizer = fastsam.FusedSAM(params, kind, backend="cpu", **options, **values)

    def step() -> None:
        optimizer.first_step()
        optimizer.step()

    for _ in range(3):
        step()
    return step


def python_calls(work: Any) -> int:
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(before)
    return calls


@needs_library
@pytest.mark.parametrize(
    ("options", "calls"),
    [({}, 0), ({"adaptive": True}, 0), ({"max_grad_norm": 0.7}, 2)],
    ids=["plain", "asam", "clipped"],
)
@pytest.mark.parametrize("base", BASES)
def test_a_step_calls_no_aten_and_allocates_nothing(base, options, calls):
    step = stepping(base, 161, **options)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    assert len([event.name for event in found.events() if event.name.startswith("aten::")]) <= calls
    assert sum(max(event.cpu_memory_usage, 0) for event in found.events()) == 0


@needs_library
@pytest.mark.parametrize("base", BASES)
def test_the_host_s_work_does_not_grow_with_the_number_of_tensors(base):
    few, many = (python_calls(stepping(base, tensors)) for tensors in (3, 161))
    assert few == many <= PYTHON_CALLS


@pytest.mark.skipif(not (ROOT / "benchmarks" / "traffic.py").is_file(), reason="not run from a source tree")
@pytest.mark.parametrize(
    ("base", "options", "more"),
    [
        ("sgd", {}, 0),
        ("adamw", {}, 0),
        ("sgd", {"adaptive": True}, 4),  # the norm reads the weights
        ("sgd", {"perturb_with_weight_decay": True}, 4),
        ("adamw", {"max_grad_norm": 0.7}, 4),  # the second gradients' norm
        ("sgd", {"ema_decay": 0.9}, 12),
    ],
    ids=str,
)
def test_a_step_moves_the_bytes_that_are_told(base, options, more, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from traffic import Traffic

    kind, values = BASES[base]
    traffic, weight = Traffic(), torch.nn.Parameter(torch.randn(1000))
    with traffic.stand_in():
        optimizer = fastsam.FusedSAM([weight], kind, backend="reference", **options, **values)
        for _ in range(3):
            traffic.bytes = 0
            for part in (optimizer.first_step, optimizer.step):
                weight.grad = torch.randn(1000)
                with traffic:
                    part()
    assert traffic.bytes // 1000 == BYTES[base] + more  # and a flag or two


@needs_library
@pytest.mark.slow
@pytest.mark.skipif("FASTSAM_CALLGRIND" not in os.environ, reason="takes minutes; FASTSAM_CALLGRIND=1 asks for it")
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="there is no valgrind")
def test_the_host_s_instructions():
    from torch.utils.benchmark import Timer

    setup = """
import torch
from fastsam import FusedSAM
params = [torch.nn.Parameter(torch.ones(8)) for _ in range(161)]
for p in params:
    p.grad = torch.ones(8)
options = dict(lr=0.1, momentum=0.9)
sam = FusedSAM(params, torch.optim.SGD, backend="cpu", **options)
base = torch.optim.SGD(params, fused=True, **options)
for _ in range(3):
    sam.first_step(); sam.step(); base.step()
"""
    counts = [
        Timer(work, setup).collect_callgrind(number=10, collect_baseline=False).counts(denoise=True)
        for work in ("sam.first_step(); sam.step()", "base.step()")
    ]
    assert counts[0] <= INSTRUCTIONS * counts[1], counts
