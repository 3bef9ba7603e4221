"""SAF (Du et al., arXiv 2205.14083): stay near the outputs of epochs ago, which a store holds."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastsam.losses.trajectory import TrajectoryLoss

_CHUNK = 32 << 20  # bytes of outputs that a rank sends at once
_ALIGNMENT = 64  # of the outputs in a file, behind the stamps
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _Written(NamedTuple):
    """Outputs of a batch on their way to the store."""

    indices: Tensor  # [batch] int64, on the store's device
    rows: Tensor  # [batch, classes], there too
    arrival: torch.cuda.Event | None  # when `rows` may be read; at once if none


class SAF(TrajectoryLoss):
    """Sharpness-aware training for free (Du et al., arXiv 2205.14083, eq. 8): stay near one's outputs of epochs ago.

        loss = base_loss + lmbda T^2 mean_i KL(softmax(z_i^(e - lag) / T) || softmax(z_i / T))    if e > start

    z_i is the output (the logits) for sample i now, z_i^(e - lag) the stored one of `lag` epochs ago. The factor T^2
    is that of the authors' code, their eq. 8 has none. Epochs count from 0. Defaults are the authors'.

    It costs one forward and one backward pass as the base loss does, no perturbation, and a store of
    `SAF.store_bytes(...)` bytes: (lag + 1) copies of n_samples x n_classes outputs, and 4 bytes a sample and copy for
    the epoch that wrote it. That is `lag` copies to read from and one to write to, so that a sample may come up again
    in its epoch. The size is logged before it is allocated. It is a loss for the plain base optimizer, but may be
    combined with anything: with SAM both passes read the same stored outputs, and `record=not optimizer.perturbed`
    keeps those at w.

    What falls out of the mean: samples without an output of that epoch (not seen then, or by `drop_last`), and those
    whose output was not finite in the store's dtype. If an index comes up more than once in an epoch, the last output
    is kept. In evaluation mode (`saf.eval()`) it is the base loss, and nothing is stored.

    Data parallel: each rank keeps a whole store, and at the end of an epoch the ranks send each other what they wrote,
    because a reshuffled sample is another rank's next time. `new_epoch()` and `set_epoch()` do it, so all ranks call
    them; where a checkpoint of one rank is to serve all, all call `exchange()` before it is made. Make the loss after
    `init_process_group`, and keep it out of the model: DistributedDataParallel would broadcast the store.

    Saving: `state_dict()` holds the store and the epoch. Of a memory-mapped store it holds path and size, and the file
    is the checkpoint's other part: load it with a loss that was made with the file's path. What a run wrote to it
    after the checkpoint is written again, and falls out of the mean where that comes too late. A loss that loads
    nothing begins the file anew.

    Args:
        n_samples: indices are from 0 to n_samples - 1.
        n_classes: outputs are [batch, n_classes].
        base_loss: `base_loss(outputs, targets)` gives one number; cross entropy if None.
        lmbda: weight of the divergence.
        temperature: T.
        lag: how many epochs ago, the authors' E~.
        start: the divergence counts from epoch start + 1 on, the authors' E_start.
        dtype: of the store; float16, bfloat16, float32 or float64.
        device: where the store stays, whatever device the loss is moved to. With outputs on a GPU, a store on the CPU
            gets and gives batches through pinned memory; leave `indices` on the CPU then.
        path: a file to map as the store; a rank adds its number to it (".0", ".1", ...).
        process_group: whose ranks exchange their outputs; all if None.
        exchange: False leaves that out: a rank knows what it has seen itself.

    Example:
        >>> saf = SAF(len(dataset), n_classes)
        >>> loader = DataLoader(StackDataset(dataset, range(len(dataset))), batch_size=128, shuffle=True)
        >>> for epoch in range(epochs):
        ...     saf.set_epoch(epoch)
        ...     for (x, y), indices in loader:
        ...         optimizer.zero_grad()
        ...         saf(model(x), y, indices).backward()
        ...         optimizer.step()
    """

    outputs: Tensor  # [lag + 1, n_samples, n_classes]; epoch e is at e % (lag + 1)
    stamps: Tensor  # [lag + 1, n_samples] int32: the epoch of each output, -1 if there is none

    def __init__(
        self,
        n_samples: int,
        n_classes: int,
        base_loss: Callable[[Tensor, Any], Tensor] | None = None,
        *,
        lmbda: float = 0.3,
        temperature: float = 5.0,
        lag: int = 3,
        start: int = 5,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str = "cpu",
        path: str | os.PathLike[str] | None = None,
        process_group: dist.ProcessGroup | None = None,
        exchange: bool = True,
    ) -> None:
        """Allocate the store, or map it."""
        super().__init__(base_loss, lmbda, temperature, start)
        self.n_samples = self._whole("n_samples", n_samples, 1)
        self.n_classes = self._whole("n_classes", n_classes, 1)
        self.lag = self._whole("lag", lag, 1)
        if dtype not in _DTYPES:
            raise ValueError(f"SAF: dtype must be one of {', '.join(map(str, _DTYPES))}, got {dtype}")
        device = torch.device(device)
        if path is not None and device.type != "cpu":
            raise ValueError(f"SAF: a memory-mapped store is on the CPU, got path={str(path)!r} and device='{device}'")
        self._group, self._exchange = process_group, exchange
        self._path = None if path is None else os.fspath(path)
        self._file = self._path  # of this rank
        self._in_ranks = _in_ranks()
        if self._file is not None and self._in_ranks:
            self._file += f".{dist.get_rank()}"
        self._pending: _Written | None = None
        self._exchanged = False
        self._recorded = 0  # outputs since the epoch began
        self._fresh = True  # nothing was written to the store yet
        self._allocate(dtype, device)

    @staticmethod
    def store_bytes(n_samples: int, n_classes: int, lag: int = 3, dtype: torch.dtype = torch.float16) -> int:
        """What the store takes: n_samples * (lag + 1) * (n_classes * itemsize + 4), at most 63 more in a file."""
        return n_samples * (lag + 1) * (n_classes * dtype.itemsize + 4)

    def _allocate(self, dtype: torch.dtype, device: torch.device) -> None:
        shape = (self.lag + 1, self.n_samples, self.n_classes)
        size = self.store_bytes(self.n_samples, self.n_classes, self.lag, dtype)
        logging.getLogger(__name__).info(
            "SAF: a store of %d bytes (%.1f MiB) for %d x %d outputs of %d epochs in %s, %s",
            *(size, size / 2**20, self.n_samples, self.n_classes, self.lag + 1, dtype),
            f"on {device}" if self._file is None else f"in {self._file}",
        )
        if self._file is None:
            outputs = torch.zeros(shape, dtype=dtype, device=device)
            stamps = torch.full(shape[:2], -1, dtype=torch.int32, device=device)
        else:
            n_stamps = shape[0] * shape[1]
            begin = -(-4 * n_stamps // _ALIGNMENT) * _ALIGNMENT
            self._file_size = begin + size - 4 * n_stamps
            self._fresh = not os.path.exists(self._file)
            if not self._fresh:
                self._check_file_size()
            content = torch.from_file(self._file, shared=True, size=self._file_size, dtype=torch.uint8, device="cpu")
            stamps = content[: 4 * n_stamps].view(torch.int32).view(shape[:2])
            outputs = content[begin:].view(dtype).view(shape)
        self.register_buffer("outputs", outputs, persistent=self._file is None)
        self.register_buffer("stamps", stamps, persistent=self._file is None)

    def extra_repr(self) -> str:
        """The options."""
        place = self.outputs.device if self._file is None else repr(self._file)
        return (
            f"{self.n_samples}, {self.n_classes}, {super().extra_repr()}, lag={self.lag}, "
            f"dtype={self.outputs.dtype}, store on {place}"
        )

    def forward(self, outputs: Tensor, targets: Any, indices: Tensor, record: bool = True) -> Tensor:
        """[]: the loss of a batch, whose outputs are stored.

        Args:
            outputs: [batch, n_classes], the model's.
            targets: what the base loss takes.
            indices: [batch] of whole numbers, which samples these are. Whether they are in range is looked at on the
                CPU; where store and indices both are on a GPU, to look would wait for it.
            record: False stores nothing.
        """
        loss = self._base(outputs, targets)
        if not self.training:
            return loss
        started = self._started()
        assert self.epoch is not None
        if outputs.dim() != 2 or outputs.shape[1] != self.n_classes:
            raise ValueError(f"SAF: outputs must be [batch, {self.n_classes}], got shape {list(outputs.shape)}")
        rows = self._rows(indices, len(outputs))
        self._flush()
        then = self.epoch - self.lag
        if started and then >= 0:
            slot = then % (self.lag + 1)
            known = self.stamps[slot][rows] == then
            known = known.to(outputs.device, non_blocking=outputs.is_cuda)  # on the CPU it is read at once
            loss = loss + self._divergence(outputs, self._read(slot, rows, outputs.device), known)
        if record:
            self._write(rows, outputs.detach())
        return loss

    def _rows(self, indices: Tensor, batch: int) -> Tensor:
        """[batch] int64 on the store's device: the indices."""
        if not isinstance(indices, Tensor) or indices.dtype.is_floating_point or indices.dtype == torch.bool:
            raise ValueError(f"SAF: indices must be a tensor of whole numbers, got {indices!r}")
        if indices.shape != (batch,):
            raise ValueError(f"SAF: indices must be [{batch}] as there are outputs, got shape {list(indices.shape)}")
        rows = indices.to(self.outputs.device, torch.int64)
        for known in (indices, rows):
            if known.device.type == "cpu" and batch:  # on a GPU a look would wait for it
                self._check_bounds(known)
                break
        return rows

    def _check_bounds(self, rows: Tensor) -> None:
        least, most = (int(bound) for bound in rows.aminmax())
        if least < 0 or most >= self.n_samples:
            raise ValueError(
                f"SAF: indices must be in [0, {self.n_samples - 1}], got {least if least < 0 else most}; "
                "n_samples is the size of the whole data set"
            )

    def _read(self, slot: int, rows: Tensor, device: torch.device) -> Tensor:
        """[batch, n_classes] on a device: stored outputs."""
        store = self.outputs[slot]
        if device.type != "cuda" or store.is_cuda:
            return store[rows].to(device)
        pinned = torch.empty((len(rows), self.n_classes), dtype=store.dtype, pin_memory=True)
        return torch.index_select(store, 0, rows, out=pinned).to(device, non_blocking=True)

    def _write(self, rows: Tensor, outputs: Tensor) -> None:
        """Send outputs to the store's device; they enter the store before it is used next, so that nothing waits."""
        outputs = outputs.to(self.outputs.dtype, copy=True)
        arrival = None
        if outputs.is_cuda and not self.outputs.is_cuda:
            pinned = torch.empty(outputs.shape, dtype=outputs.dtype, pin_memory=True)
            pinned.copy_(outputs, non_blocking=True)
            arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrival.record(torch.cuda.current_stream(outputs.device))
            outputs = pinned
        self._pending = _Written(rows, outputs.to(self.outputs.device), arrival)
        self._exchanged = self._fresh = False
        self._recorded += len(rows)
        if self._recorded - len(rows) <= 4 * self.n_samples < self._recorded:
            warnings.warn(
                f"SAF: more than {4 * self.n_samples} outputs were stored in epoch {self.epoch}, of {self.n_samples} "
                "samples; call new_epoch() or set_epoch(epoch) before each epoch",
                stacklevel=5,
            )

    def _flush(self) -> None:
        """Put outputs that are on their way into the store."""
        if self._pending is None:
            return
        (rows, outputs, arrival), self._pending = self._pending, None
        if arrival is not None:
            arrival.synchronize()
        assert self.epoch is not None
        slot = self.epoch % (self.lag + 1)
        ordered, order = rows.sort(stable=True)
        last = order[torch.searchsorted(ordered, rows, right=True) - 1]  # of equal rows, so that all write the same
        outputs = outputs[last]
        self.outputs[slot][rows] = outputs
        self.stamps[slot][rows] = torch.where(outputs.isfinite().all(1), self.epoch, -1).to(torch.int32)

    def _leave_epoch(self) -> None:
        if self.epoch is None:
            self.stamps.fill_(-1)  # a file's outputs are another training's, unless a checkpoint says otherwise
        else:
            self.exchange()

    def _enter_epoch(self) -> None:
        assert self.epoch is not None
        self._exchanged, self._recorded = False, 0
        self.stamps[self.epoch % (self.lag + 1)] = -1

    @torch.no_grad()
    def exchange(self) -> None:
        """Send this epoch's outputs to all ranks and take theirs; then all stores are equal. All ranks must call it.

        Of a sample that several ranks have seen, all keep the same output. Each rank sends its rows once, in chunks of
        32 MiB, and nothing if it wrote nothing since the last time. Without other ranks nothing happens.
        """
        self._flush()
        if self.epoch is None or not self._exchange or not _in_ranks(self._group):
            return
        if self._file is not None and not self._in_ranks:
            raise RuntimeError("SAF: make the loss after init_process_group, so that each rank has a file of its own")
        outputs, stamps = (part[self.epoch % (self.lag + 1)] for part in (self.outputs, self.stamps))
        on_cpu = "cpu:" in dist.get_backend_config(self._group)
        device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
        mine = (stamps == self.epoch).nonzero().squeeze(1)
        if self._exchanged:  # the others may have something new
            mine = mine[:0]
        counts = [int(count) for count in self._gather(torch.tensor([len(mine)], device=device))]
        width = self.n_classes * outputs.dtype.itemsize
        most = max(1, _CHUNK // width)
        for begin in range(0, max(counts), most):
            length = min(most, max(counts) - begin)  # of the chunk; ranks with fewer rows fill up with zeros
            part = mine[begin : begin + length]
            rows = torch.zeros(length, dtype=torch.int64, device=device)
            content = torch.zeros((length, width), dtype=torch.uint8, device=device)  # gloo knows no bfloat16
            rows[: len(part)] = part.to(device)
            content[: len(part)] = outputs[part].view(torch.uint8).to(device)
            for count, theirs, row in zip(counts, self._gather(rows), self._gather(content), strict=True):
                here = theirs[: max(0, count - begin)].to(outputs.device)
                outputs[here] = row[: len(here)].to(outputs.device).view(outputs.dtype)
                stamps[here] = self.epoch
        self._exchanged = True

    def _gather(self, part: Tensor) -> list[Tensor]:
        """What each rank has there, in the order of ranks."""
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(parts, part, group=self._group)
        return parts

    def get_extra_state(self) -> dict[str, Any]:
        """What `state_dict()` holds beside the tensors."""
        mapped = {"shape": list(self.outputs.shape), "dtype": str(self.outputs.dtype), "bytes": 0}
        if self._file is not None:
            mapped["bytes"] = self._file_size
        return {**super().get_extra_state(), "exchanged": self._exchanged, "path": self._path, **mapped}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take up what `get_extra_state` gave."""
        super().set_extra_state(state)
        self._exchanged = state["exchanged"]

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._flush()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        state = state_dict.get(prefix + "_extra_state")
        if state is not None:  # else torch says what is missing
            self._check_saved(state)
        self._pending, self._recorded = None, 0
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_saved(self, state: dict[str, Any]) -> None:
        """Refuse a checkpoint of another kind of store, and a file that is not the checkpoint's.

        Raises:
            ValueError: it is.
        """
        if (state["path"] is None) != (self._file is None):
            saved, here = ("in memory" if path is None else repr(path) for path in (state["path"], self._path))
            raise ValueError(f"SAF: the checkpoint's store is {saved}, and this one {here}; give the same path=")
        if self._file is None:
            return
        found = {"shape": list(self.outputs.shape), "dtype": str(self.outputs.dtype), "bytes": self._file_size}
        for name, value in found.items():
            if state[name] != value:
                raise ValueError(f"SAF: the checkpoint's store has {name} {state[name]}, this one has {value}")
        if self._fresh:
            raise ValueError(
                f"SAF: the checkpoint's store is the file {state['path']!r}, and {self._file!r} was new; give "
                "the file's path= to the loss that loads the checkpoint"
            )
        self._check_file_size()

    def _check_file_size(self) -> None:
        assert self._file is not None
        if (size := os.path.getsize(self._file)) != self._file_size:
            raise ValueError(
                f"SAF: {self._file!r} has {size} bytes, and a store of {self.n_samples} samples, {self.n_classes} "
                f"classes and lag {self.lag} takes {self._file_size}; give another path, or remove the file"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SAF:
        """Moves and casts leave the store where and as it is."""
        store, self._buffers = self._buffers, {}
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers = store
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles."""
        if self._file is not None:
            raise TypeError("SAF: a memory-mapped store cannot be copied or pickled; use state_dict()")
        self._flush()
        return self.__dict__.copy()


def _in_ranks(group: dist.ProcessGroup | None = None) -> bool:
    """Whether there is more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1
