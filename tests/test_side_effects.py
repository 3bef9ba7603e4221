"""What a step leaves behind and what it must not touch: memory, versions, syncs, bits."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import cases
import pytest
import torch
from oracle import bits
from torch.nn import Parameter
from torch.optim import SGD, AdamW
from torch.utils._python_dispatch import TorchDispatchMode

from fastsam import FusedSAM

NAMES = ["matrix", "scalar", "63", "transposed"]


@pytest.mark.parametrize("base", [SGD, AdamW, torch.optim.RMSprop])
def test_addresses_stay(backend, device, base):
    params = cases.make_params(names=NAMES, device=device)
    opt = FusedSAM(params, base, lr=0.1, backend=backend, **(dict(momentum=0.9) if base is SGD else {}))
    addresses = None
    for step in range(10):
        opt.step(cases.closure_of(params, 0, NAMES))
        state = [t.data_ptr() for entry in opt.state.values() for t in entry.values() if isinstance(t, torch.Tensor)]
        now = [p.data_ptr() for p in params] + (state if base is not torch.optim.RMSprop else [])
        addresses = addresses or now
        assert now == addresses, f"step {step}"


def test_versions_are_bumped_and_a_stale_graph_raises(backend, device):
    params = cases.make_params(names=NAMES, device=device)
    opt, p = FusedSAM(params, SGD, lr=0.1, backend=backend), params[0]
    for act in (opt.first_step, opt.restore, opt.first_step, opt.second_step):
        cases.set_gradients(params, 0, 1, NAMES)
        stale, version = (p * p).sum(), p._version
        act()
        assert p._version > version
        with pytest.raises(RuntimeError, match="inplace"):
            stale.backward()


class NoSync(TorchDispatchMode):
    """Refuses what copies a value to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read back"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("config", **cases.ids(c for c in cases.CONFIGS if c.name in ("groups", "adamw_groups")))
def test_no_value_is_read_back(backend, device, config, scaled):
    params = cases.make_params(device=device)
    opt = cases.fused(params, config, backend)
    for step in range(3):
        cases.set_gradients(params, step, 1)
        with NoSync():
            opt.first_step()
        cases.set_gradients(params, step, 2)
        if scaled:
            opt.grad_scale, opt.found_inf = torch.tensor(8.0, device=device), torch.tensor(0.0, device=device)
        with NoSync():
            opt.step()


@pytest.mark.parametrize("config", **cases.ids(c for c in cases.CONFIGS if c.name in ("groups", "adamw_groups")))
def test_same_bits_in_each_run_and_with_one_thread(backend, device, config):
    large = torch.randn(100_003)

    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            params = [*cases.make_params(device=device), Parameter(large.to(device, copy=True))]
            opt = cases.fused(params, config, backend)
            for step in range(4):
                opt.step(cases.closure_of(params, step, [*cases.NAMES, "large"]))
            return [bits(p) for p in params]
        finally:
            torch.set_num_threads(before)

    assert run(2) == run(2) == run(1)


def test_importing_touches_no_accelerator():
    code = "import fastsam, torch; assert not torch.cuda.is_initialized(); print(fastsam.__version__)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("base", [SGD, AdamW, torch.optim.Rprop])
def test_a_dropped_optimizer_is_freed_at_once(backend, device, base, masters):
    """Without the cycle collector, which may not run for long: what it holds is of the size of the model."""
    p = Parameter(torch.ones(70, device=device, dtype=torch.bfloat16))
    opt = FusedSAM([p], base, lr=0.1, rho=0.3, backend=backend, master_weights=masters)
    for half in (opt.first_step, opt.step):
        p.grad = torch.ones_like(p)
        half()
    held = [*opt.state[p].values(), *(s.backup for b in opt._sam.buckets.items for s in b.segments)]
    tensors = [item for item in held if isinstance(item, torch.Tensor)]
    watched = [weakref.ref(item) for item in (p, opt, opt.base_optimizer, *tensors)]
    gc.disable()
    try:
        del p, opt, held, half, tensors
        assert [ref() for ref in watched] == [None] * len(watched)
    finally:
        gc.enable()
