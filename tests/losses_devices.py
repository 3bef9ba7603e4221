"""What tests/test_losses.py runs in a process of its own: SAF and MESA on fake GPUs, which know where a tensor is.

An operation that would fail for tensors on two devices fails here, too; values are not computed.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastsam.losses import MESA, SAF

aten = torch.ops.aten
INDEXED = (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default, aten.index_select.default)


class Gpus(TorchDispatchMode):
    """Refuses indices that a tensor does not take, and notes copies to the CPU that may be read before they arrive."""

    def __init__(self) -> None:
        super().__init__()
        self.early = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in INDEXED:
            for index in tree_leaves(args[1:3] if func is aten.index_select.default else args[1]):
                if isinstance(index, torch.Tensor):
                    assert index.device in (args[0].device, torch.device("cpu")), "indices on another device"
        out = func(*args, **(kwargs or {}))
        if func is aten._to_copy.default and (kwargs or {}).get("non_blocking"):
            self.early += args[0].is_cuda and out.device.type == "cpu"
        return out


class Event(SimpleNamespace):
    """torch.cuda.Event."""

    recorded = waited = 0

    def record(self, stream: object) -> None:
        Event.recorded += 1

    def synchronize(self) -> None:
        Event.waited += 1


def train(store: str, outputs: str, indices: str, epochs: int = 4) -> None:
    saf = SAF(11, 3, lag=1, start=0, device=store, dtype=torch.float16)
    for epoch in range(epochs):
        saf.set_epoch(epoch)
        for _ in range(2):
            z = torch.randn(4, 3, device=outputs, requires_grad=True)
            y, i = (torch.zeros(4, dtype=torch.int64, device=d) for d in (outputs, indices))
            loss = saf(z, y, i, record=epoch != 2)
            assert loss.device == z.device
    held = saf.state_dict()
    assert all(t.device == torch.device(store) for t in tree_leaves(held) if isinstance(t, torch.Tensor))
    saf.load_state_dict(held)


def main() -> None:
    ctypes.CDLL(sys.argv[1])
    torch._C._cuda_getDevice = lambda: 0
    torch.cuda.Event, torch.cuda.current_stream = Event, lambda device: None
    SAF._check_bounds = lambda self, rows: None  # fake tensors have no values to look at
    for store, outputs, indices in itertools.product(("cpu", "cuda:0", "cuda:1"), ("cpu", "cuda:0"), ("cpu", "cuda:0")):
        Event.recorded = Event.waited = 0
        with FakeTensorMode(), Gpus() as gpus:
            train(store, outputs, indices)
        assert gpus.early == 0, (store, outputs, indices)
        pinned = store == "cpu" and outputs != "cpu"
        assert (Event.recorded, Event.waited) == ((6, 6) if pinned else (0, 0)), (store, outputs, indices)
    FakeTensorMode.__deepcopy__ = lambda self, memo: self  # copies are fakes of the same kind
    with FakeTensorMode(), Gpus():
        for wrong in (lambda a, b: a[b.long()], lambda a, b: a + b):  # what is checked here at all
            try:
                wrong(torch.zeros(3), torch.zeros(3, device="cuda:0"))
            except (AssertionError, RuntimeError):
                continue
            raise SystemExit("a fake tensor takes others from any device")
        model = torch.nn.Sequential(torch.nn.Linear(4, 3, device="cuda:0"), torch.nn.BatchNorm1d(3, device="cuda:0"))
        mesa = MESA(model, start=-1)
        mesa.new_epoch()
        x, y = torch.randn(8, 4, device="cuda:0"), torch.zeros(8, dtype=torch.int64, device="cuda:0")
        assert mesa(model(x), y, x).device == x.device
        mesa.update()
        assert all(t.is_cuda for t in mesa.teacher.state_dict().values())
    print("checked")


if __name__ == "__main__":
    main()
