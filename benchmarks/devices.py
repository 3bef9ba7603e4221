"""What the benchmarks ask of the device that they measure, by the name that `--device` gives it.

cuda    a GPU
cpu     the host
stub    the host in the place of a GPU: everything that is done for a GPU is done, in the same order, but for the
        few lines of `Gpu` below. Its numbers mean nothing; that no line fails is what it shows.
"""

import gc
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

ROOT = Path(__file__).resolve().parent.parent
WARMUP = 3  # passes before a capture


class Cpu:
    """The host."""

    name = "cpu"
    backend = "cpu"  # FusedSAM's, whose kernels are in the library
    gpu = False  # whether what only a GPU has is measured: launches, peak memory, captured graphs
    activities = (ProfilerActivity.CPU,)

    def __init__(self, index: str = "") -> None:
        """The device of torch whose tensors are stepped."""
        self.torch = torch.device("cpu")

    def clock(self) -> "HostClock":
        """What measures work on the device."""
        return HostClock(self)

    def synchronize(self) -> None:
        """Wait for all queued work."""

    def hold(self) -> None:
        """Keep the device busy for a while, so that what is queued next waits."""

    def free(self) -> None:
        """Give back memory that nobody uses."""
        gc.collect()  # optimizers and their wrapped methods refer to each other

    def profile(self, work: Callable[[], Any]) -> list[Any]:
        """The profiler's events of `work`."""
        with torch.profiler.profile(activities=self.activities) as found:
            work()
            self.synchronize()
        return list(found.events())

    def kernels(self, events: list[Any]) -> list[Any]:
        """What ran on a GPU (kernels, copies and fills), in order."""
        return []

    def peak_bytes(self, work: Callable[[], Any]) -> int:
        """The most memory of a GPU that `work` takes beyond what is taken before."""
        return 0

    def capture(self, step: Callable[[], Any], forget: Callable[[], Any]) -> Callable[[], Any]:
        """A CUDA graph of `step`: what replays it. `forget` drops gradients, which are to lie in the graph's memory."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """What a number on this device depends on."""
        return {}


class Gpu(Cpu):
    """A GPU of NVIDIA's."""

    name = "cuda"
    backend = "cuda"
    gpu = True
    activities = (ProfilerActivity.CPU, ProfilerActivity.CUDA)

    def __init__(self, index: str = "") -> None:
        """The device of torch whose tensors are stepped."""
        self.torch = torch.device("cuda" + index)

    def clock(self) -> "CudaClock":
        """What measures work on the device."""
        return CudaClock(self)

    def synchronize(self) -> None:
        """Wait for all queued work."""
        torch.cuda.synchronize(self.torch)

    def hold(self) -> None:
        """Keep the device busy for a while, so that what is queued next waits."""
        torch.cuda._sleep(100_000_000)  # cycles: 50 ms, ten times what queueing takes with 9,000 tensors

    def free(self) -> None:
        """Give back memory that nobody uses."""
        super().free()
        torch.cuda.empty_cache()

    def kernels(self, events: list[Any]) -> list[Any]:
        """What ran on a GPU, in order; the ranges that are drawn around these are left out."""
        found = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
        return sorted(found, key=lambda event: event.time_range.start)

    def peak_bytes(self, work: Callable[[], Any]) -> int:
        """The most memory that `work` takes beyond what is taken before."""
        gc.collect()
        before = torch.cuda.memory_allocated(self.torch)
        torch.cuda.reset_peak_memory_stats(self.torch)
        kept = work()
        taken: int = torch.cuda.max_memory_allocated(self.torch) - before
        del kept
        return taken

    def capture(self, step: Callable[[], Any], forget: Callable[[], Any]) -> Callable[[], Any]:
        """A CUDA graph of `step`, after the warm-up on another stream that torch asks for."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        forget()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    def facts(self) -> dict[str, Any]:
        """What a number on this device depends on."""
        properties = torch.cuda.get_device_properties(self.torch)
        return {
            "gpu": properties.name,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
        }


class Stub(Cpu):
    """The host in the place of a GPU: operations stand for kernels, a graph's replay is a step."""

    name = "stub"
    gpu = True

    def kernels(self, events: list[Any]) -> list[Any]:
        """The operations of fastsam's and torch's in-place ones."""
        found = [event for event in events if event.name.startswith(("fastsam::", "aten::"))]
        return sorted(found, key=lambda event: event.time_range.start)

    def peak_bytes(self, work: Callable[[], Any]) -> int:
        """What is done is the same."""
        work()
        return 0

    def capture(self, step: Callable[[], Any], forget: Callable[[], Any]) -> Callable[[], Any]:
        """The step itself, after the same passes."""
        for _ in range(WARMUP + 1):
            step()
        forget()
        return step

    def facts(self) -> dict[str, Any]:
        """What stands where a GPU's are."""
        driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        return {"gpu": "none, a CPU stands in", "gpu_memory_gib": 0, "driver": driver, "cuda": None}


def device_named(name: str) -> Cpu:
    """The device that `--device` means: cuda, cuda:1, cpu, stub."""
    kind, colon, index = name.partition(":")
    return {device.name: device for device in (Cpu, Gpu, Stub)}[kind](colon + index)


class HostClock:
    """Wall time of a call: on a CPU the work is done when it returns, on a GPU it is queued.

    A GPU is not waited for between calls. Its queue of some 1,000 launches does not fill as long as the GPU needs less
    time than the host, as it does for tensors that hold next to nothing: then no launch has to wait.
    """

    def __init__(self, device: Cpu) -> None:
        """Remember whose work is queued."""
        self.device = device

    def __call__(self, work: Callable[[], Any]) -> float:
        """Seconds until `work` returns."""
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def settle(self) -> None:
        """Empty a GPU's queue."""
        self.device.synchronize()


class CudaClock:
    """Device time between two events around a call that finds a cold L2 cache and a busy device.

    The device is kept busy, and the cache filled with something else, by overwriting 1 GiB: 0.25 ms on an H200. That
    is the host's lead: launches that take it no longer than that are hidden, as they are behind a backward pass, and
    what takes longer is seen, as is every wait for the device.
    """

    def __init__(self, device: Cpu) -> None:
        """Allocate the memory to overwrite."""
        self.device = device
        size = max(4 * torch.cuda.get_device_properties(device.torch).L2_cache_size, 2**30)
        self.scrub = torch.empty(size, dtype=torch.uint8, device=device.torch)

    def __call__(self, work: Callable[[], Any]) -> float:
        """Seconds between the events."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.scrub.zero_()
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def settle(self) -> None:
        """Wait for all queued work."""
        self.device.synchronize()


def output(*command: str) -> str | None:
    """What a program prints, run in the repository; None if it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
