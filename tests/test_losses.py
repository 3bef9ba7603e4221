"""SAF and MESA against their formulas by hand; what is stored, exchanged between ranks, saved and refused."""

from __future__ import annotations

import copy
import math
import re
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, StackDataset, TensorDataset

import fastsam
from fastsam.losses import MESA, SAF

N, CLASSES = 11, 3
OPTIONS = dict(lmbda=0.7, temperature=2.5, lag=2, start=2)
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
CUDA = pytest.param("cuda", marks=[pytest.mark.cuda, NO_GPU])
PLACES = ["cpu", "file", CUDA]


def outputs_of(epoch, index, shift=0.0):
    """[len(index), CLASSES] float64: what a model gave for these samples in an epoch; exact in float32."""
    rows = torch.as_tensor(index)[:, None] * 0.5 + torch.arange(CLASSES) * 0.75
    return torch.sin(rows * (epoch + 1) + shift).mul(1024).round().div(256).double()


def divergence(then, now, temperature):
    """KL(softmax(then / T) || softmax(now / T)) of two rows, with Python's numbers."""

    def softmax(row):
        exps = [math.exp(value / temperature) for value in row.tolist()]
        return [value / sum(exps) for value in exps]

    return sum(p * math.log(p / q) for p, q in zip(softmax(then), softmax(now), strict=True))


def by_hand(outputs, targets, then, lmbda, temperature):
    """Cross entropy, and the divergence from rows `then`, of which those that are None fall out."""
    rows = outputs.detach().cpu()
    base = -sum(row.log_softmax(0)[target] for row, target in zip(rows, targets.tolist(), strict=True)) / len(rows)
    parts = [divergence(old, row, temperature) for old, row in zip(then, rows, strict=True) if old is not None]
    return float(base) + (lmbda * temperature**2 * sum(parts) / len(parts) if parts else 0.0)


def make(place, tmp_path, **options):
    options = OPTIONS | dict(dtype=torch.float32) | options
    return (
        SAF(N, CLASSES, path=tmp_path / "store", **options)
        if place == "file"
        else SAF(N, CLASSES, device=place, **options)
    )


def batches(epoch, size=4):
    """Reshuffled each epoch, with a part of a batch at the end."""
    return torch.randperm(N, generator=torch.Generator().manual_seed(epoch)).split(size)


def train(saf, epochs, compare=True):
    """Losses of all batches, compared with the formula."""
    losses = []
    for epoch in epochs:
        saf.set_epoch(epoch)
        for indices in batches(epoch):
            outputs, targets = outputs_of(epoch, indices).to(saf.outputs.device), indices % CLASSES
            loss = saf(outputs, targets.to(outputs.device), indices)
            losses.append(loss.item())
            if compare:
                then = list(outputs_of(epoch - saf.lag, indices)) if epoch > saf.start else [None] * len(indices)
                expected = by_hand(outputs, targets, then, saf.lmbda, saf.temperature)
                assert losses[-1] == pytest.approx(expected, rel=1e-12)
    return losses


@pytest.mark.parametrize("place", PLACES)
def test_saf_is_its_formula_under_reshuffling(place, tmp_path):
    saf = make(place, tmp_path)
    assert train(saf, range(8)) != train(make("cpu", tmp_path, lmbda=0), range(8), compare=False)


@pytest.mark.parametrize("lag, start", [(1, 0), (1, -1), (4, 1)])
def test_the_first_epochs_are_the_base_loss(lag, start, tmp_path):
    """Where the lag is longer than the start, there is nothing to compare with at first."""
    saf, base = make("cpu", tmp_path, lag=lag, start=start), nn.CrossEntropyLoss()
    for epoch in range(7):
        saf.new_epoch()
        assert saf.epoch == epoch
        index = torch.arange(N)
        outputs = outputs_of(epoch, index)
        loss, plain = saf(outputs, index % CLASSES, index), base(outputs, index % CLASSES)
        assert torch.equal(loss, plain) == (epoch <= start or epoch < lag)


def test_defaults_are_the_authors():
    saf, mesa = SAF(N, CLASSES), MESA(nn.Linear(2, CLASSES))
    assert (saf.lmbda, saf.temperature, saf.lag, saf.start) == (0.3, 5, 3, 5)
    assert (mesa.lmbda, mesa.temperature, mesa.beta, mesa.start) == (0.8, 5, 0.9998, 5)
    assert isinstance(saf.base_loss, nn.CrossEntropyLoss)


def test_unseen_samples_and_outputs_that_are_not_finite_fall_out(tmp_path):
    saf = make("cpu", tmp_path, dtype=torch.float16)
    index = torch.arange(6)
    for epoch, rows in ((1, outputs_of(1, index)), (2, outputs_of(2, index)), (3, outputs_of(3, index))):
        if epoch == 1:
            rows[1, 0], rows[2, 1], rows[3, 2] = math.nan, -math.inf, 1e5  # the last is infinite in float16
        saf.set_epoch(epoch)
        known = torch.tensor([0, 1, 2, 3]) if epoch == 1 else index
        outputs = rows[known].requires_grad_()
        loss = saf(outputs, known % CLASSES, known)
    then = [outputs_of(1, [0])[0].half().double()] + [None] * 5
    assert loss.item() == pytest.approx(by_hand(outputs, index % CLASSES, then, 0.7, 2.5), rel=1e-12)
    loss.backward()
    assert outputs.grad.isfinite().all()
    saf.set_epoch(9)  # nobody has an output of epoch 7: epochs were left out
    assert saf(outputs, index % CLASSES, index).item() == nn.CrossEntropyLoss()(outputs, index % CLASSES).item()


def test_an_index_more_than_once(tmp_path):
    """All see the output of epochs ago, in the batch and later in the epoch, and the last one is kept."""
    saf, index = make("cpu", tmp_path, lag=1, start=0), torch.tensor([4, 7, 4, 4, 0])
    saf.set_epoch(0)
    saf(outputs_of(0, index) + torch.arange(5)[:, None] * torch.tensor([0, 1, 0]), index % CLASSES, index)
    saf.set_epoch(1)
    kept = outputs_of(0, index) + torch.tensor([3, 1, 3, 3, 4])[:, None] * torch.tensor([0, 1, 0])
    for shift in (0, 1):
        outputs = outputs_of(1, index, shift)
        expected = by_hand(outputs, index % CLASSES, list(kept), 0.7, 2.5)
        assert saf(outputs, index % CLASSES, index).item() == pytest.approx(expected, rel=1e-12)


def test_what_is_not_recorded_is_not_stored(tmp_path):
    saf, index = make("cpu", tmp_path), torch.arange(N)
    saf.set_epoch(0)
    saf(outputs_of(0, index), index % CLASSES, index)
    before = copy.deepcopy(saf.state_dict())
    saf(outputs_of(5, index), index % CLASSES, index, record=False)
    saf.eval()
    saf(outputs_of(5, index), index % CLASSES, index)
    assert_same(saf.state_dict(), before)
    saf.set_epoch(8)
    outputs, targets = outputs_of(5, index), index % CLASSES
    assert torch.equal(saf(outputs, targets, index), nn.CrossEntropyLoss()(outputs, targets))


def test_outputs_may_be_overwritten_afterwards(tmp_path):
    saf, index = make("cpu", tmp_path), torch.arange(N)
    saf.set_epoch(0)
    outputs = outputs_of(0, index).float()
    saf(outputs, index % CLASSES, index)
    outputs.zero_()
    saf.state_dict()
    assert torch.equal(saf.outputs[0].double(), outputs_of(0, index))


def test_with_sam(tmp_path):
    """Both passes are compared with the same outputs, and those at w are stored."""
    model, x, index = nn.Linear(4, CLASSES).double(), torch.randn(N, 4, dtype=torch.float64), torch.arange(N)
    saf, passes = make("cpu", tmp_path, lag=1, start=-1, dtype=torch.float64), []
    optimizer = fastsam.FusedSAM(model.parameters(), torch.optim.SGD, lr=0.5, rho=0.3)

    def closure():
        optimizer.zero_grad()
        outputs = model(x)
        loss = saf(outputs, index % CLASSES, index, record=not optimizer.perturbed)
        passes.append((outputs.detach(), loss.item()))
        loss.backward()
        return loss

    for _ in range(3):
        saf.new_epoch()
        optimizer.step(closure)
    for (then, _), *both in (passes[0], *passes[2:4]), (passes[2], *passes[4:6]):
        for outputs, loss in both:
            assert loss == pytest.approx(by_hand(outputs, index % CLASSES, list(then), 0.7, 2.5), rel=1e-12)


def test_gradients_flow_through_the_present_outputs_only(tmp_path):
    saf, index = make("cpu", tmp_path), torch.arange(4)
    rows = [outputs_of(epoch, index).requires_grad_() for epoch in range(4)]
    for epoch, outputs in enumerate(rows):
        saf.set_epoch(epoch)
        loss = saf(outputs * 1, index % CLASSES, index)
    loss.backward()
    assert [outputs.grad is None for outputs in rows] == [True, True, True, False]
    then, now = (rows[epoch].detach().div(2.5).softmax(1) for epoch in (1, 3))
    expected = rows[3].detach().softmax(1) - nn.functional.one_hot(index % CLASSES, CLASSES)
    expected += 0.7 * 2.5 * (now - then)  # T^2 / T
    torch.testing.assert_close(rows[3].grad, expected / 4, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("place", ["cpu", "file"])
def test_the_store_rounds_and_says_its_bytes(dtype, place, tmp_path, caplog):
    with caplog.at_level("INFO", "fastsam.losses"):
        saf = make(place, tmp_path, dtype=dtype)
    size = N * 3 * (CLASSES * dtype.itemsize + 4)
    assert SAF.store_bytes(N, CLASSES, 2, dtype) == size == saf.outputs.nbytes + saf.stamps.nbytes
    assert f"a store of {size} bytes" in caplog.text
    if place == "file":
        assert 0 <= (tmp_path / "store").stat().st_size - size < 64
    index = torch.arange(N)
    for epoch in range(4):
        outputs = outputs_of(epoch, index, 0.1).mul(1 / 3)
        saf.set_epoch(epoch)
        loss = saf(outputs, index % CLASSES, index).item()
    then = list(outputs_of(1, index, 0.1).mul(1 / 3).to(dtype).double())
    assert loss == pytest.approx(by_hand(outputs, index % CLASSES, then, 0.7, 2.5), rel=1e-12)


def test_outputs_of_low_precision_are_compared_in_float32(tmp_path):
    saf, index = make("cpu", tmp_path), torch.arange(N)
    for epoch in range(4):
        outputs = outputs_of(epoch, index).bfloat16().requires_grad_()
        saf.set_epoch(epoch)
        loss = saf(outputs, index % CLASSES, index)
    assert loss.dtype == torch.float32
    base = nn.CrossEntropyLoss()(outputs, index % CLASSES).item()
    parts = [
        divergence(a, b, 2.5)
        for a, b in zip(outputs_of(1, index).bfloat16().double(), outputs.detach().double(), strict=True)
    ]
    assert loss.item() == pytest.approx(base + 0.7 * 2.5**2 * sum(parts) / N, rel=1e-5)
    loss.backward()
    assert outputs.grad.dtype == torch.bfloat16


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]) if isinstance(value, torch.Tensor) else value == expected[name]


@pytest.mark.parametrize("in_epoch", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_resumed_half_way(place, in_epoch, tmp_path):
    """As without the stop; a file also where the stopped run went on for a while after its checkpoint."""

    def part(saf, index):
        saf.set_epoch(4)
        device = saf.outputs.device
        return saf(outputs_of(4, index).to(device), (index % CLASSES).to(device), index).item()

    def finish(saf):
        first = [part(saf, torch.arange(6, N))] if in_epoch else []
        return first + train(saf, range(5, 8))

    saf = make(place, tmp_path)
    train(saf, range(4 if in_epoch else 5))
    if in_epoch:
        part(saf, torch.arange(6))
    torch.save(saf.state_dict(), tmp_path / "checkpoint")
    content = (tmp_path / "store").read_bytes() if place == "file" else b""
    losses = finish(saf)
    if place == "file":
        (tmp_path / "store").write_bytes(content)
    resumed = make(place, tmp_path)
    resumed.load_state_dict(torch.load(tmp_path / "checkpoint"))
    assert resumed.epoch == 4
    assert finish(resumed) == losses
    if place != "file":  # back again, in the same object
        resumed.load_state_dict(torch.load(tmp_path / "checkpoint"))
        assert finish(resumed) == losses
    assert_same(resumed.state_dict(), saf.state_dict())


def test_a_file_that_went_on_after_the_checkpoint(tmp_path):
    """What the stopped run wrote is written again; what it overwrote too early falls out, and is never mistaken."""
    saf, losses = make("file", tmp_path), {}
    for epoch in range(5):
        losses[epoch] = train(saf, [epoch])
        torch.save(saf.state_dict(), tmp_path / f"checkpoint{epoch}")
    losses[5] = train(saf, [5])
    del saf
    resumed = make("file", tmp_path)
    resumed.load_state_dict(torch.load(tmp_path / "checkpoint4"))
    assert train(resumed, [5]) == losses[5]
    resumed = make("file", tmp_path)
    resumed.load_state_dict(torch.load(tmp_path / "checkpoint3"))
    base = make("cpu", tmp_path)  # epoch 2 has been overwritten by 5
    assert train(resumed, [4], compare=False) == train(base, [4], compare=False)
    again = make("file", tmp_path)  # no checkpoint: another training, which begins the file anew
    again.set_epoch(5)
    outputs, index = outputs_of(5, range(N)), torch.arange(N)
    assert torch.equal(again(outputs, index % CLASSES, index), nn.CrossEntropyLoss()(outputs, index % CLASSES))
    again = make("file", tmp_path)
    assert train(again, range(4)) == [loss for epoch in range(4) for loss in losses[epoch]]


def test_a_file_survives_the_process(tmp_path):
    code = """if True:
        import sys, torch
        sys.path.insert(0, sys.argv[1])
        import test_losses as t
        saf = t.make("file", t.Path(sys.argv[2]))
        t.train(saf, range(5))
        torch.save(saf.state_dict(), sys.argv[2] + "/checkpoint")
    """
    subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)], check=True, timeout=120)
    saf = make("file", tmp_path)
    saf.load_state_dict(torch.load(tmp_path / "checkpoint"))
    train(saf, range(5, 8))


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has GPUs of its own")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_nothing_mixes_devices(tmp_path):
    """Store, outputs and indices each on the CPU or a GPU, as fake tensors: see losses_devices.py."""
    here, torch_here = Path(__file__).parent, Path(torch.__file__).parent
    guard, include = str(tmp_path / "guard.so"), str(torch_here / "include")
    build = ["g++", "-std=c++20", "-shared", "-fPIC", "-I", include, "-o", guard, str(here / "cuda_guard.cpp")]
    subprocess.run([*build, "-L", str(torch_here / "lib"), "-lc10"], check=True, timeout=120)
    run = [sys.executable, str(here / "losses_devices.py"), guard]
    ran = subprocess.run(run, capture_output=True, text=True, timeout=120, check=False)
    assert ran.stdout.split() == ["checked"], ran.stderr


def test_moves_and_copies(tmp_path):
    """The store stays where and as it is, the base loss moves; a copy in memory has a store of its own."""
    saf = make("cpu", tmp_path, base_loss=nn.CrossEntropyLoss(weight=torch.ones(CLASSES)))
    saf.to("meta").double()
    assert saf.outputs.device.type == "cpu" and saf.outputs.dtype == torch.float32 and saf.stamps.dtype == torch.int32
    assert saf.base_loss.weight.is_meta and saf.base_loss.weight.dtype == torch.float64
    saf = make("cpu", tmp_path)
    train(saf, range(3))
    twin = copy.deepcopy(saf)
    assert train(twin, range(3, 6)) == train(saf, range(3, 6))
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(make("file", tmp_path))
    assert "lag=2" in repr(saf)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(n_samples=0), "n_samples must be a whole number >= 1, got 0"),
        (dict(n_classes=2.0), "n_classes must be a whole number >= 1, got 2.0"),
        (dict(lag=0), "lag must be a whole number >= 1, got 0"),
        (dict(start=-2), "start must be a whole number >= -1, got -2"),
        (dict(lmbda=-0.1), "lmbda must be >= 0, got -0.1"),
        (dict(temperature=0), "temperature must be > 0, got 0"),
        (dict(temperature=math.inf), "temperature must be > 0, got inf"),
        (dict(dtype=torch.int8), "dtype must be one of"),
        (dict(path="x", device="meta"), "a memory-mapped store is on the CPU"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=re.escape(f"SAF: {message}")):
        SAF(**dict(n_samples=N, n_classes=CLASSES) | options)


def test_wrong_calls(tmp_path):
    saf, index = make("cpu", tmp_path), torch.arange(4)
    outputs, targets = outputs_of(0, index), index % CLASSES
    with pytest.raises(RuntimeError, match="call new_epoch"):
        saf(outputs, targets, index)
    saf.set_epoch(3)
    for wrong, message in (
        (index + 8, r"indices must be in \[0, 10\], got 11"),
        (index - 1, r"indices must be in \[0, 10\], got -1"),
        (index[:3], r"indices must be \[4\]"),
        (index.double(), "whole numbers"),
        ([0, 1, 2, 3], "whole numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            saf(outputs, targets, wrong)
    with pytest.raises(ValueError, match=r"outputs must be \[batch, 3\], got shape \[4, 2\]"):
        saf(outputs[:, :2], targets % 2, index)
    with pytest.raises(ValueError, match="got 2 after 3"):
        saf.set_epoch(2)
    for epoch in (-1, 1.0, True):
        with pytest.raises(ValueError, match="epoch must be a whole number"):
            saf.set_epoch(epoch)
    with pytest.raises(ValueError, match="one number"):
        make("cpu", tmp_path, base_loss=nn.CrossEntropyLoss(reduction="none"))(outputs, targets, index)


def test_a_forgotten_epoch_is_noticed_once(tmp_path):
    saf, index = make("cpu", tmp_path), torch.arange(N)
    saf.new_epoch()
    with pytest.warns(UserWarning, match="call new_epoch") as caught:
        for _ in range(9):
            saf(outputs_of(0, index), index % CLASSES, index)
    assert len(caught) == 1 and caught[0].filename == __file__


def test_checkpoints_that_do_not_fit(tmp_path):
    mapped, memory = make("file", tmp_path), make("cpu", tmp_path)
    for saf in (mapped, memory):
        train(saf, range(2))
    saved = mapped.state_dict()
    with pytest.raises(ValueError, match="the checkpoint's store is in memory"):
        mapped.load_state_dict(memory.state_dict())
    with pytest.raises(ValueError, match="and this one in memory"):
        memory.load_state_dict(saved)
    with pytest.raises(RuntimeError, match="size mismatch"):
        make("cpu", tmp_path, lag=3).load_state_dict(memory.state_dict())
    with pytest.raises(ValueError, match="was new"):
        SAF(N, CLASSES, path=tmp_path / "other", dtype=torch.float32, **OPTIONS).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"shape \[3, 11, 3\], this one has \[3, 3, 11\]"):
        SAF(CLASSES, N, path=tmp_path / "turned", dtype=torch.float32, **OPTIONS).load_state_dict(saved)
    with pytest.raises(ValueError, match="bytes, and a store of 11 samples"):
        make("file", tmp_path, lag=3)
    with open(tmp_path / "store", "r+b") as file:
        file.truncate(100)
    with pytest.raises(ValueError, match="has 100 bytes"):
        mapped.load_state_dict(saved)


def rank_main(rank, directory, place):
    """A rank of two: every loss is that of the formula, as the other rank's outputs arrive at each epoch's end."""
    torch.set_num_threads(1)
    timeout = timedelta(seconds=30)
    dist.init_process_group("gloo", f"file://{directory}/{place}", timeout=timeout, rank=rank, world_size=2)
    try:
        dtype = torch.float32 if place == "cpu" else torch.float16
        fastsam.losses.saf._CHUNK = 2 * CLASSES * dtype.itemsize  # two rows
        saf = make(place, Path(directory), dtype=dtype)
        sampler = DistributedSampler(range(N), 2, rank, seed=3)  # 6 each: one sample twice
        for epoch in range(6):
            sampler.set_epoch(epoch)
            saf.set_epoch(epoch)
            for indices in torch.tensor(list(sampler)).split(4):
                outputs, targets = outputs_of(epoch, indices), indices % CLASSES
                then = list(outputs_of(epoch - 2, indices)) if epoch > 2 else [None] * len(indices)
                expected = by_hand(outputs, targets, then, 0.7, 2.5)
                assert saf(outputs, targets, indices).item() == pytest.approx(expected, rel=1e-12)
            if epoch == 3:
                saf.exchange()
                if rank == 0:  # something new on one rank only
                    saf(outputs_of(3, [5], 0.5), torch.tensor([2]), torch.tensor([5]))
                saf.exchange()
                assert torch.equal(saf.outputs[0, 5].double(), outputs_of(3, [5], 0.5)[0])
                saf(outputs_of(3, [5]), torch.tensor([2]), torch.tensor([5]))
        saf.set_epoch(6)  # five samples here and three there, neither a whole number of chunks
        seen = torch.arange(1, 6) if rank == 0 else torch.arange(6, 9)
        saf(outputs_of(6, seen), seen % CLASSES, seen)
        saf.exchange()
        assert torch.equal(saf.outputs[0, 1:9].double(), outputs_of(6, range(1, 9)))
        torch.save([saf.outputs.clone(), saf.stamps.clone()], f"{directory}/{place}.{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_ranks(tmp_path):
    """Two processes with gloo, stores in memory and then in a file for each."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import test_losses as t; " + (
        "[t.rank_main(int(sys.argv[2]), sys.argv[3], place) for place in ('cpu', 'file')]"
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(Path(__file__).parent), str(rank), str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=100)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(errors)
    for place in ("cpu", "file"):
        stores = [torch.load(tmp_path / f"{place}.{rank}.pt") for rank in range(2)]
        for first, second in zip(*stores, strict=True):
            assert torch.equal(first, second)
        assert stores[0][1].tolist() == [[-1, *[6] * 8, -1, -1], [4] * N, [5] * N]
    assert sorted(path.name for path in tmp_path.glob("store*")) == ["store.0", "store.1"]


# MESA


class Net(nn.Module):
    """BatchNorm's buffers, dropout, a frozen weight and one of whole numbers."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.drop, self.last = nn.Dropout(0.5), nn.Linear(6, 3)
        self.last.bias.requires_grad_(False)
        self.levels = nn.Parameter(torch.arange(3), requires_grad=False)
        self.double()

    def forward(self, x):
        return self.last(self.drop(self.norm(self.first(x)))) + self.levels


def mesa_losses(model, mesa, optimizer, epochs, check=None):
    losses = []
    for epoch in epochs:
        mesa.set_epoch(epoch)
        for step in range(2):
            torch.manual_seed(10 * epoch + step)
            x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
            optimizer.zero_grad()
            outputs = model(x)
            loss = mesa(outputs, y, x)
            if check:
                check(epoch, x, y, outputs, loss)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                model.levels.add_(1)
            mesa.update()
            losses.append(loss.item())
    return losses


def test_mesa_is_its_recursion():
    model = Net()
    by_formula = {name: value.clone() for name, value in model.state_dict().items()}
    mesa = MESA(model, lmbda=0.6, temperature=1.5, beta=0.75, start=0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3, momentum=0.7)
    weights = {name for name, _ in model.named_parameters()}
    calls = []

    def check(epoch, x, y, outputs, loss):
        if calls:  # the model's values after the step before this one, which ran through check
            for name, value in calls[-1].items():
                averaged = name in weights and value.is_floating_point()
                by_formula[name] = 0.75 * by_formula[name] + 0.25 * value if averaged else value
        teacher = copy.deepcopy(model).eval()
        teacher.load_state_dict(by_formula)
        for name, value in mesa.teacher.state_dict().items():
            torch.testing.assert_close(value, by_formula[name], rtol=1e-13, atol=1e-15, msg=name)
        then = list(teacher(x).detach()) if epoch > 0 else [None] * 8
        assert loss.item() == pytest.approx(by_hand(outputs, y, then, 0.6, 1.5), rel=1e-12)

    hook = mesa.update

    def update():
        calls.append({name: value.clone() for name, value in model.state_dict().items()})
        hook()

    mesa.update = update
    mesa_losses(model, mesa, optimizer, range(4), check)
    assert len(calls) == 8


def test_mesa_resumed_half_way_and_moved():
    def parts():
        torch.manual_seed(1)
        model = Net()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3, momentum=0.7)
        return model, MESA(model, beta=0.75, start=1), optimizer

    whole = parts()
    mesa_losses(*whole, range(3))
    saved = [copy.deepcopy(part.state_dict()) for part in whole]
    losses = mesa_losses(*whole, range(3, 5))
    again = parts()
    for part, state in zip(again, saved, strict=True):
        part.load_state_dict(state)
    assert mesa_losses(*again, range(3, 5)) == losses
    assert_same(again[1].state_dict(), whole[1].state_dict())
    assert not any(name.startswith("_model") for name in saved[1])
    mesa = again[1].float()  # the model stays as it is
    assert {p.dtype for p in mesa.teacher.parameters()} == {torch.float32, torch.int64}
    assert again[0].first.weight.dtype == torch.float64
    mesa.update()


def test_mesa_follows_the_local_replica():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.Linear(4, 3)
        parallel = DistributedDataParallel(model)
        mesa, optimizer = MESA(parallel, beta=0.5, start=-1), torch.optim.SGD(parallel.parameters(), lr=0.5)
        mesa.new_epoch()
        average = model.weight.detach().clone()
        for _ in range(3):
            x, y = torch.randn(5, 4), torch.randint(3, (5,))
            optimizer.zero_grad()
            mesa(parallel(x), y, x).backward()
            optimizer.step()
            mesa.update()
            average = (average + model.weight.detach()) / 2
        assert sorted(mesa.teacher.state_dict()) == ["bias", "weight"]
        torch.testing.assert_close(mesa.teacher.weight, average)
    finally:
        dist.destroy_process_group()


def test_the_teacher_leaves_no_trace():
    """No gradients, no statistics of its own, no random numbers; the model's mode and gradients are as before."""
    model = Net()
    model(torch.randn(8, 4, dtype=torch.float64)).sum().backward()
    mesa = MESA(model, start=-1)
    assert all(p.grad is None and not p.requires_grad for p in mesa.teacher.parameters())
    assert model.training and model.first.weight.requires_grad and model.first.weight.grad is not None
    mesa.train()
    assert mesa.training and not any(module.training for module in mesa.teacher.modules())
    mesa.new_epoch()
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
    outputs = model(x).detach().requires_grad_()
    before, numbers = copy.deepcopy(mesa.teacher.state_dict()), torch.get_rng_state()
    mesa(outputs, y, x).backward()
    assert torch.equal(torch.get_rng_state(), numbers)
    assert_same(mesa.teacher.state_dict(), before)
    assert all(p.grad is None for p in mesa.teacher.parameters())
    then, now = (rows.div(5).softmax(1) for rows in (mesa.teacher(x), outputs.detach()))
    expected = outputs.detach().softmax(1) - nn.functional.one_hot(y, 3) + 0.8 * 5 * (now - then)
    torch.testing.assert_close(outputs.grad, expected / 8, rtol=1e-12, atol=1e-15)
    assert torch.equal(mesa(outputs, y, (x,)), mesa(outputs, y, dict(x=x)))
    mesa.eval()
    assert torch.equal(mesa(outputs, y, x), nn.CrossEntropyLoss()(outputs, y))


def test_mesa_refuses():
    model = Net()
    for beta in (-0.1, 1, math.nan):
        with pytest.raises(ValueError, match=r"MESA: beta must be in \[0, 1\)"):
            MESA(model, beta=beta)
    with pytest.raises(ValueError, match="32 bits or more.*bfloat16 for 'weight'"):
        MESA(nn.Linear(2, 3).bfloat16())
    mesa = MESA(model, start=-1)
    x, y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
    with pytest.raises(RuntimeError, match="MESA: call new_epoch"):
        mesa(model(x), y, x)
    mesa.new_epoch()
    with pytest.raises(ValueError, match="the teacher's of the same shape"):
        mesa(model(x)[:4], y[:4], x)
    mesa(model(x), y, x)
    with pytest.raises(RuntimeError, match=r"no update\(\) in epoch 0"):
        mesa.new_epoch()
    mesa.update()
    mesa.new_epoch()
    copy.deepcopy(mesa).update()  # it follows the same model
    model.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="other parameters or buffers"):
        mesa.update()
    del model
    with pytest.raises(RuntimeError, match="the model is gone"):
        mesa.update()


def test_the_documented_example():
    """Its code as it stands: both losses train, and SAF's divergence has begun."""
    page = (Path(__file__).parents[1] / "docs" / "methods" / "losses.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "losses.SAF" in block]
    x = torch.randn(64, 8)
    names = dict(fastsam=fastsam, torch=torch, DataLoader=DataLoader, StackDataset=StackDataset)
    names |= dict(n_classes=4, epochs=8, dataset=TensorDataset(x, x[:, :4].argmax(1)), model=nn.Linear(8, 4))
    exec(code, names)
    assert names["saf"].epoch == 7 and names["loss"].item() < 1.2
    assert names["saf"].state_dict()["stamps"].unique().tolist() == [4, 5, 6, 7]
