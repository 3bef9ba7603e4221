"""The diagnosis: what is installed, which backend each device gets and why, and whether the backends agree."""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Collection, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam import __version__, ops
from fastsam.ops import native
from fastsam.optimizer import FusedSAM

STEPS = 3
# Tails of every kind, more than a chunk of 8,192 elements, nothing at all; two layouts that are not row-major.
SHAPES = ((), (0,), (1,), (63,), (65, 3), (8193,), (4, 1, 5000), (2, 3, 5, 7), (31, 9))
CHANNELS_LAST, TRANSPOSED = 7, 8
# What ptxas takes for the kernels of SAM around SGD or AdamW, from PTX of 7.5 for an H200, in seconds on one core.
COMPILED_BY_DRIVER = 6
_WAIT = (
    "the driver, which must be no older than the nvcc, compiles a kernel when it is first used and keeps the result; "
    f"the first step waits about {COMPILED_BY_DRIVER} s"
)


class Case(NamedTuple):
    """An optimizer that the self-check runs, with no option at its default."""

    base: type[Optimizer]
    kwargs: dict[str, Any]
    adaptive: bool

    @property
    def name(self) -> str:
        """For readers."""
        return f"{'ASAM' if self.adaptive else 'SAM'} {self.base.__name__}"


_SGD = {"lr": 0.05, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.02}
_ADAMW = {"lr": 0.004, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.03}
CASES = [
    Case(base, kwargs, adaptive)
    for base, kwargs in ((torch.optim.SGD, _SGD), (torch.optim.AdamW, _ADAMW))
    for adaptive in (False, True)
]


def main() -> int:
    """Print everything; returns 0 only if every available backend agrees with the reference on every device."""
    _print_section(f"fastsam {__version__}", _versions())
    _print_section("Machine", _machine())
    if (record := build_record()) is not None:
        print("\n".join(["Build", *("  " + line for line in [*record.splitlines(), *_served(record)]), ""]))
    _print_section("Backends", _backends())
    try:
        asked = ops.resolve("auto")
    except ValueError as error:
        print(f"Devices\n  {error}\n")
        return 1
    for device in devices():
        _print_section(f"Backend of tensors on {device}", _choices(asked, device))
    return _self_check()


def _print_section(title: str, rows: list[list[str]]) -> None:
    print("\n".join([title, *("  " + line for line in aligned(rows)), ""]))


def aligned(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Lines in which the rows' cells stand in columns; those in `right` end, the others begin together."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def metadata_version(package: str) -> str | None:
    """The version of an installed package, None if it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _versions() -> list[list[str]]:
    cuda = "without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
    return [
        ["python", f"{platform.python_version()} on {platform.platform()}"],
        ["torch", f"{torch.__version__} ({cuda})"],
        ["triton", metadata_version("triton") or "not installed"],
        ["nvcc", _nvcc() or "not found"],
    ]


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = shutil.which("nvcc") or (shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None)
    release = re.search(r"release [\d.]+, V([\d.]+)", _output([path, "--version"]) if path else "")
    return None if path is None else f"{release[1] if release else 'version unknown'} ({path})"


def _output(command: list[str]) -> str:
    """What a command prints, nothing if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _machine() -> list[list[str]]:
    rows = [
        ["CPU", f"{_cpu_model()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"],
        ["CPU features", f"{torch.backends.cpu.get_cpu_capability()} (torch)"],
    ]
    if (library := _library()) is not None:
        rows[-1][1] += f"; {', '.join(library.cpu_isas())}, {library.cpu_isa()} in use (fastsam)"
    seen = _output(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]).splitlines()
    if torch.cuda.is_available():
        driver = f", driver {seen[0].rpartition(', ')[2]}" if seen else ""
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            rows.append([f"GPU {i}", f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}{driver}"])
    elif seen:
        why = "torch is a build without CUDA" if torch.version.cuda is None else "torch cannot use it"
        rows.append(["GPU", f"{seen[0]} (name, driver), but {why}"])
    else:
        rows.append(["GPU", "none"])
    return rows


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()


def _library() -> Any:
    """The native library's module, None where it cannot be used."""
    return importlib.import_module(native.LIBRARY) if ops.backends()["cpu"] is None else None


def build_record() -> str | None:
    """What was written beside the library about its build, None if nothing was."""
    path = native.folder() / "_build.txt"
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def _served(record: str) -> list[str]:
    """One line for each GPU here, of this machine's driver: what the library has for it; for any, if there is none."""
    if not re.search(r"\b(sm|compute)_\d", record):
        return []
    gpus = [torch.cuda.get_device_capability(device) for device in devices()[1:]]
    if not gpus:
        seen = _output(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
        gpus = [(int(major), int(minor)) for major, minor in re.findall(r"^(\d+)\.(\d)\s*$", seen, re.MULTILINE)]
    lines = [f"GPU {i} (compute capability {a}.{b}): {served(record, (a, b))}" for i, (a, b) in enumerate(gpus)]
    return lines or [f"no GPU here; what one would need: {'; '.join(_needed(record))}"]


def _needed(record: str) -> list[str]:
    code, ptx = ([int(n) for n in re.findall(rf"\b{kind}_(\d+)\b", record)] for kind in ("sm", "compute"))
    found = []
    if code:
        found.append(f"machine code is there for compute capability {', '.join(f'{n // 10}.{n % 10}' for n in code)}")
    if ptx:
        least = f"{min(ptx) // 10}.{min(ptx) % 10}"
        other = "any other of compute capability" if code else "compute capability"
        found.append(f"{other} {least} or newer is served through PTX: {_WAIT}")
    return found


def served(record: str, capability: tuple[int, int]) -> str:
    """What a library with this record has for a GPU, and what to do if that is not the best.

    Machine code runs on GPUs of its own generation that are as new or newer, PTX is compiled by the driver of any that
    is as new or newer; with the letter a, both are for that architecture alone.
    """
    number = 10 * capability[0] + capability[1]
    if capability < ops.LEAST_CAPABILITY:
        return "not served: the kernels need compute capability 7.5 or newer"
    rebuild = f'TORCH_CUDA_ARCH_LIST="{capability[0]}.{capability[1]}" pip install -e .'
    names = re.findall(r"\b(sm|compute)_(\d+)([af]?)\b", record)
    fits = [(kind, int(n), n + a) for kind, n, a in names if int(n) == number or (int(n) < number and not a)]
    code = [found for found in fits if found[0] == "sm" and found[1] // 10 == capability[0]]
    if code:
        _, best, name = max(code)
        return f"served by machine code, sm_{name}" + ("" if best == number else f"; to have its own: {rebuild}")
    ptx = [found for found in fits if found[0] == "compute"]
    if ptx:
        return f"served through PTX, compute_{max(ptx)[2]}: {_WAIT}; to have machine code: {rebuild}"
    return f"not served, the library was built for others; rebuild: {rebuild}"


def _backends() -> list[list[str]]:
    return [[name, "available"] if why is None else [name, f"no: {why}"] for name, why in ops.backends().items()]


def devices() -> list[torch.device]:
    """The CPU and every GPU that torch can use."""
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in gpus)]


def _choices(asked: str, device: torch.device) -> list[list[str]]:
    """One row a backend: taken, or why not."""
    taken = ops.choose(asked, device, torch.float32)
    source = "" if asked == "auto" else f", as FASTSAM_BACKEND={asked} says"
    rows = [] if taken is not None else [["none", f"FASTSAM_BACKEND={asked} cannot serve this device; unset it"]]
    for name, why in ops.backends().items():
        if name == taken:
            rows.append([name, f"taken{source}"])
        elif why is not None:
            rows.append([name, "not available, see above"])
        elif (why := ops.device_reason(name, device)) is not None:
            rows.append([name, f"no: {why}"])
        elif ops.choose(name, device, torch.float32) is None:
            rows.append([name, f"does not serve {device.type} tensors"])
        elif name == "reference":
            rows.append([name, "plain PyTorch, slower; takes what no kernel can; backend='reference' asks for it"])
        else:
            rows.append([name, f"works too; backend='{name}' asks for it"])
    return rows


# --- self-check ------------------------------------------------------------------------------------------------------


class EagerSAM:
    """SAM and ASAM by hand, one tensor and one operation at a time around a torch optimizer.

    What the self-check holds the reference against, and what the demo's timings compare with.
    """

    def __init__(self, groups: list[dict[str, Any]], base: type[Optimizer], **base_kwargs: Any) -> None:
        """Groups as for FusedSAM: with rho and, for ASAM, adaptive and eta."""
        self.base_optimizer = base([dict(group) for group in groups], **base_kwargs)
        self.state = self.base_optimizer.state
        self.old: list[tuple[Tensor, Tensor]] = []

    def _with_gradient(self) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
        for group in self.base_optimizer.param_groups:
            yield from ((p, p.grad, group) for p in group["params"] if p.grad is not None)

    @torch.no_grad()
    def first_step(self) -> None:
        """Climb to w + e: e = rho T^2 g / (||T g|| + 1e-12), T = abs(w) + eta where adaptive, else 1."""
        norms = []
        for p, grad, group in self._with_gradient():
            norms.append(((p.abs() + group["eta"]) * grad if group.get("adaptive") else grad).norm())
        norm = torch.stack(norms).norm()
        self.old = []
        for p, grad, group in self._with_gradient():
            self.old.append((p, p.clone()))
            scale = group["rho"] / (norm + 1e-12)
            p.add_(((p.abs() + group["eta"]).square() * grad if group.get("adaptive") else grad) * scale)

    @torch.no_grad()
    def second_step(self) -> None:
        """Return to w and let the base optimizer step."""
        for p, old in self.old:
            p.copy_(old)
        self.base_optimizer.step()


def awkward_params(device: torch.device) -> list[Tensor]:
    """The self-check's parameters, the same on every device."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator, device="cpu") for shape in SHAPES]
    params[CHANNELS_LAST] = params[CHANNELS_LAST].contiguous(memory_format=torch.channels_last)
    params[TRANSPOSED] = params[TRANSPOSED].t()
    return [p.to(device).requires_grad_() for p in params]


def run_steps(params: list[Tensor], optimizer: FusedSAM | EagerSAM) -> list[Tensor]:
    """Take STEPS steps with random gradients, the same for all.

    Returns:
        On the CPU: the weights after every half step, perturbed and not, and the state at the end.
    """
    generator = torch.Generator().manual_seed(1)
    seen: list[Tensor] = []
    for step in range(STEPS):
        for i, half in enumerate((optimizer.first_step, optimizer.second_step)):
            for j, p in enumerate(params):
                grad = torch.randn(p.shape, generator=generator, device="cpu")
                missing = j == 3 and step == 1  # a parameter that takes no part in a step
                p.grad = None if missing else torch.empty_like(p).copy_(grad * (1 + i))
            half()
            seen += [p.detach().to("cpu", copy=True) for p in params]
    return seen + [v.cpu() for p in params for v in optimizer.state[p].values() if isinstance(v, Tensor)]


def groups_of(params: list[Tensor], adaptive: bool) -> list[dict[str, Any]]:
    """Two groups; in ASAM one of the two is adaptive."""
    own = {"rho": 0.3, "adaptive": adaptive, "eta": 0.01}
    return [{"params": params[::2], **own}, {"params": params[1::2], "rho": 0.1, "adaptive": False, "eta": 0.0}]


def fused_result(case: Case, backend: str, device: torch.device) -> list[Tensor]:
    """Weights and state in the self-check's steps with FusedSAM."""
    params = awkward_params(device)
    return run_steps(params, FusedSAM(groups_of(params, case.adaptive), case.base, backend=backend, **case.kwargs))


def eager_result(case: Case, device: torch.device) -> list[Tensor]:
    """The same by hand around torch.optim."""
    params = awkward_params(device)
    return run_steps(params, EagerSAM(groups_of(params, case.adaptive), case.base, foreach=False, **case.kwargs))


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest absolute difference, infinite where one is NaN or a tensor is missing."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return float("inf")
    gaps = [(a - b).abs().max().item() for a, b in zip(found, expected, strict=True) if a.numel()]
    return max((float("inf") if gap != gap else gap for gap in gaps), default=0.0)


def close(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether all agree within what float32 allows (torch.testing's defaults)."""
    same = len(found) == len(expected)
    return same and all(torch.allclose(a, b, 1.3e-6, 1e-5) for a, b in zip(found, expected, strict=True))


def _self_check() -> int:
    """Print a row for every backend on every device that it serves; 0 if all agree."""
    rows = [["backend", "device", "compared with", *(case.name for case in CASES), ""]]
    failures = []
    library = _library()
    for device in devices():
        for backend, why in ops.backends().items():
            if why is not None or ops.choose(backend, device, torch.float32) is None:
                continue
            isas = list(library.cpu_isas()) if backend == "cpu" else [None]
            before = library.cpu_isa() if backend == "cpu" else None
            for isa in isas:
                if isa is not None:
                    library.use_cpu_isa(isa)
                label = backend if isa is None else f"{backend} ({isa})"
                try:
                    rows.append([label, str(device), *compare(backend, device)])
                except Exception as error:  # whatever a broken backend raises: the other rows are still wanted
                    rows.append([label, str(device), "", *[""] * len(CASES), "FAILED"])
                    failures.append(f"{label} on {device}: {type(error).__name__}: {error}")
            if before is not None:
                library.use_cpu_isa(before)
    print(f"Self-check: largest difference after {STEPS} steps, float32, {len(SHAPES)} tensors of awkward shapes")
    print("\n".join("  " + line for line in aligned(rows)))
    print("".join(f"  {failure}\n" for failure in failures))
    good = all(row[-1] == "agrees" for row in rows[1:])
    print("All backends agree." if good else "Backends disagree: please report this, with everything above.")
    return 0 if good else 1


def compare(backend: str, device: torch.device) -> list[str]:
    """What the backend was held against, the difference in each case, and the judgement.

    On the CPU a backend has to give the reference's very bits. To be close is enough for the reference itself, for
    tensors on a GPU, whose PyTorch operations may round differently, and for Triton's interpreter, which rounds a
    product and its sum twice up to Triton 3.6.
    """
    is_reference = backend == "reference"
    exact = device.type == "cpu" and backend not in ("reference", "triton")
    against = f"eager SAM on {device}" if is_reference else "reference on cpu"
    cells, good = [], True
    for case in CASES:
        found = fused_result(case, backend, device)
        expected = eager_result(case, device) if is_reference else fused_result(case, "reference", torch.device("cpu"))
        gap = difference(found, expected)
        good &= gap == 0 or (close(found, expected) and not exact)
        cells.append("bit-equal" if gap == 0 else f"{gap:.1e}")
    return [against, *cells, "agrees" if good else "DISAGREES"]
