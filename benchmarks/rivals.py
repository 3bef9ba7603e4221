"""The contenders: SAM's optimizer side in several line-ups, each stepping its own copy of the weights.

All do the same arithmetic up to rounding, SAM's first-order step (Foret et al., arXiv 2010.01412) and ASAM's
(Kwon et al., arXiv 2102.11600, with eta = 0):

    w' = w + rho * t^2 g1 / (||t g1|| + 1e-12),    t = 1 (SAM) or |w| (ASAM)
    w  = base(w, g2)

Gradients are handed over before each part, outside the timing, and are never written. Nobody zeroes them.
"""

import ctypes
import functools
import importlib
import importlib.metadata
import inspect
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from cases import BASES, PRECISIONS, Problem
from shapes import SHRUNK
from timing import last_level_cache
from torch import Tensor

EPS = 1e-12
PACKAGE = "pytorch_optimizer"


class Stepper:
    """A contender that steps the weights of a `Problem`; `base` is the optimizer that steps with g2."""

    perturbs = True  # whether `first` leaves w' in the weights

    def __init__(self, name: str, problem: Problem) -> None:
        """Copy the starting weights."""
        self.name = name
        self.problem = problem
        self.params: list[Any] = [torch.nn.Parameter(weight.clone()) for weight in problem.start]

    def base(self, **options: Any) -> torch.optim.Optimizer:
        """The case's base optimizer on this contender's weights."""
        return BASES[self.problem.case.base](self.problem.groups(self.params), **options)

    def prepare_first(self) -> None:
        """Hand over g1."""
        self._hand_over(self.problem.gradients[0])

    def prepare_second(self) -> None:
        """Hand over g2."""
        self._hand_over(self.problem.gradients[1])

    def _hand_over(self, gradients: list[Tensor | None]) -> None:
        for param, gradient in zip(self.params, gradients, strict=True):
            param.grad = gradient

    def first(self) -> None:
        """Nothing between the passes."""

    def second(self) -> None:
        """To be defined."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """A whole step whose closure is called for either pass."""
        with torch.enable_grad():
            loss = closure()
        self.first()
        with torch.enable_grad():
            closure()
        self.second()
        return loss


class EagerSAM(Stepper):
    """The formula, one tensor and one operation at a time; the old weights return by rebinding `p.data`."""

    def __init__(self, name: str, problem: Problem, **options: Any) -> None:
        """`options` (foreach, fused) are the base optimizer's."""
        super().__init__(name, problem)
        self.optimizer = self.base(**options)
        self.old: dict[Tensor, Tensor] = {}

    def first(self) -> None:
        """Climb to w'."""
        eager_climb(self.optimizer.param_groups, self.old)

    def second(self) -> None:
        """Return to w and step."""
        eager_return(self.optimizer.param_groups, self.old)
        self.optimizer.step()


@torch.no_grad()
def eager_climb(groups: Sequence[dict[str, Any]], old: dict[Tensor, Tensor]) -> None:
    """Climb to w', with a clone of each tensor in `old`."""
    norms = [
        ((param.abs() if group["adaptive"] else 1.0) * param.grad).norm()
        for group in groups
        for param in group["params"]
        if param.grad is not None
    ]
    norm = torch.stack(norms).norm()
    for group in groups:
        scale = group["rho"] / (norm + EPS)
        for param in group["params"]:
            if param.grad is None:
                continue
            old[param] = param.clone()
            square = param * param if group["adaptive"] else 1.0
            param.add_(square * param.grad * scale.to(param))


def eager_return(groups: Sequence[dict[str, Any]], old: dict[Tensor, Tensor]) -> None:
    """Return to w."""
    for group in groups:
        for param in group["params"]:
            if param.grad is not None:
                param.data = old[param]


class ForeachSAM(Stepper):
    """The strongest line-up of what PyTorch has: list operations in place, and a fused base where that works.

    `alpha=False` multiplies by the scale and adds (no host sync); `alpha=True` reads the scale on the host and adds in
    one operation.
    """

    def __init__(self, name: str, problem: Problem, alpha: bool) -> None:
        """Allocate the backup once."""
        super().__init__(name, problem)
        self.alpha = alpha
        self.optimizer = self.base(**fastest(problem))
        self.backup = [torch.empty_like(param.data) for param in self.params]
        self.backup_of = dict(zip(self.params, self.backup, strict=True))

    def _lists(self, group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        params = [param for param in group["params"] if param.grad is not None]
        return params, [param.grad for param in params], [self.backup_of[param] for param in params]

    @torch.no_grad()
    def first(self) -> None:
        """Climb to w'."""
        lists = [(group, *self._lists(group)) for group in self.optimizer.param_groups]
        norms: list[Tensor] = []
        for group, params, grads, _ in lists:
            norms += torch._foreach_norm(torch._foreach_mul(params, grads) if group["adaptive"] else grads)
        norm = torch.linalg.vector_norm(torch.stack(norms))
        for group, params, grads, backup in lists:
            scale = group["rho"] / (norm + EPS)
            torch._foreach_copy_(backup, params)
            if group["adaptive"]:
                grads = torch._foreach_mul(params, grads)
                torch._foreach_mul_(grads, params)
            if self.alpha:
                torch._foreach_add_(params, grads, alpha=scale.item())
            else:
                torch._foreach_add_(params, torch._foreach_mul(grads, scale))

    @torch.no_grad()
    def second(self) -> None:
        """Return to w and step."""
        for group in self.optimizer.param_groups:
            params, _, backup = self._lists(group)
            torch._foreach_copy_(params, backup)
        self.optimizer.step()


class CompiledSAM(ForeachSAM):
    """The same lists, either part compiled whole by torch.compile, the base optimizer's step within the second.

    The base is torch's own for lists: a fused one is a kernel that the compiler cannot open.
    """

    def __init__(self, name: str, problem: Problem) -> None:
        """Compilation waits for the first step; it takes about a second a tensor on a CPU."""
        super().__init__(name, problem, alpha=False)
        knows = inspect.signature(BASES[problem.case.base]).parameters
        self.optimizer = self.base(**({"foreach": True} if "foreach" in knows else {}))
        self.first = torch.compile(super().first, fullgraph=True)
        self.second = torch.compile(super().second)


class MasterSAM(Stepper):
    """The same with float32 masters of low-precision weights: list operations, and a fused base on the masters."""

    def __init__(self, name: str, problem: Problem) -> None:
        """Make the masters, which are the backup, and room for gradients and perturbed weights in float32."""
        super().__init__(name, problem)
        self.masters, self.wide = ([param.detach().float() for param in self.params] for _ in range(2))
        self.optimizer = BASES[problem.case.base](problem.groups(self.masters), **fastest(problem))

    @torch.no_grad()
    def first(self) -> None:
        """Climb to w', from the masters."""
        grads, masters, wide, params = self._lists()
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, dtype=torch.float32)))
        torch._foreach_copy_(wide, grads)
        torch._foreach_mul_(wide, self.problem.rho / (norm + EPS))
        torch._foreach_add_(wide, masters)
        torch._foreach_copy_(params, wide)

    @torch.no_grad()
    def second(self) -> None:
        """Step the masters and round them."""
        grads, masters, wide, params = self._lists()
        torch._foreach_copy_(wide, grads)
        for master, grad in zip(masters, wide, strict=True):
            master.grad = grad
        self.optimizer.step()
        torch._foreach_copy_(params, masters)

    def _lists(self) -> tuple[list[Tensor], ...]:
        rows = zip(self.params, self.masters, self.wide, strict=True)
        lists = zip(*((p.grad, master, wide, p) for p, master, wide in rows if p.grad is not None), strict=True)
        return tuple(map(list, lists))


class PackagedSAM(Stepper):
    """SAM of the package pytorch_optimizer, over the fastest base of torch's."""

    def __init__(self, name: str, problem: Problem) -> None:
        """Make it."""
        super().__init__(name, problem)
        package = importlib.import_module(PACKAGE)
        groups, base = problem.groups(self.params), BASES[problem.case.base]
        self.optimizer = package.SAM(groups, base, rho=problem.rho, **fastest(problem))
        self.first = self.optimizer.first_step
        self.second = self.optimizer.second_step


def package_version() -> str | None:
    """That of pytorch_optimizer, None where it is not installed."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None


class PlainBase(Stepper):
    """The base optimizer alone, `fused=True`: a step without SAM."""

    perturbs = False

    def __init__(self, name: str, problem: Problem) -> None:
        """Make the base."""
        super().__init__(name, problem)
        self.optimizer = self.base(fused=True)

    def second(self) -> None:
        """Step."""
        self.optimizer.step()


def fused_base_works(problem: Problem) -> bool:
    """Whether this torch's `fused=True` base steps such weights at all.

    Up to torch 2.13 fused SGD on the CPU leaves bfloat16 and float16 weights as they are (pytorch issue 191763), and a
    rival that does nothing is no rival.
    """
    dtype = torch.float32 if problem.case.precision == "masters" else problem.dtype
    return _fused_base_steps(problem.case.base, dtype, problem.device)


def fastest(problem: Problem) -> dict[str, bool]:
    """The options that make the case's base as fast as it can be; Lion knows none."""
    if fused_base_works(problem):
        return {"fused": True}
    knows = inspect.signature(BASES[problem.case.base]).parameters
    return {"foreach": True} if "foreach" in knows else {}


@functools.cache
def _fused_base_steps(base: str, dtype: torch.dtype, device: torch.device) -> bool:
    if "fused" not in inspect.signature(BASES[base]).parameters:
        return False
    param = torch.nn.Parameter(torch.ones(64, dtype=dtype, device=device))
    param.grad = torch.ones_like(param)
    BASES[base]([param], lr=0.5, fused=True).step()
    return bool((param < 0.9).all())


class Fastsam(Stepper):
    """FusedSAM on one backend."""

    def __init__(self, name: str, problem: Problem, backend: str, **extra: Any) -> None:
        """Make the optimizer; `extra` are FusedSAM's options beyond what the case says."""
        import fastsam  # not needed to time the rivals alone

        super().__init__(name, problem)
        case = problem.case
        options: dict[str, Any] = {"rho": problem.rho, "flatten": case.flattened, "backend": backend}
        options |= PRECISIONS[case.precision]
        groups = problem.groups(self.params)
        for group in groups:
            group.update((name, extra[name]) for name in group.keys() & extra.keys())
        self.optimizer = fastsam.FusedSAM(groups, BASES[case.base], **options | extra)
        self.first = self.optimizer.first_step
        self.second = self.optimizer.step
        self.step = self.optimizer.step


def backends_for(device: torch.device, dtype: torch.dtype) -> list[str]:
    """FusedSAM's backends that can serve such parameters here, the reference last."""
    try:
        from fastsam import ops
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error}; install it: pip install -e .  (or leave it out: --contenders eager ...)") from None
    usable = [name for name, reason in ops.backends().items() if reason is None]
    return sorted((name for name in usable if ops.choose(name, device, dtype) == name), key="reference".__eq__)


def kernel_backends(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Those of `backends_for` that have kernels of their own."""
    return [name for name in backends_for(device, dtype) if name != "reference"]


class Triad:
    """Streaming triad over 400 MB or 12 caches, whichever is more: the bandwidth that the machine gives right now."""

    name = "triad"

    def __init__(self, threads: int) -> None:
        """Compile it; RuntimeError with the reason where that is impossible."""
        self.threads = threads
        library = _compile(Path(__file__).with_name("triad.cpp"))
        self.streams = bool(library.triad_streams())
        self._triad = library.triad
        pointer = ctypes.c_void_p
        self._triad.argtypes = [pointer, pointer, pointer, ctypes.c_float, ctypes.c_int64, ctypes.c_int]
        self.elements = 2**16 if SHRUNK else -(-max(2**25, last_level_cache()) // 16) * 16
        self.bytes = 12 * self.elements
        self.arrays = [torch.ones(self.elements) for _ in range(3)]

    def prepare_first(self) -> None:
        """Nothing to hand over."""

    def first(self) -> None:
        """One triad."""
        a, b, c = (array.data_ptr() for array in self.arrays)
        self._triad(a, b, c, 0.5, self.elements, self.threads)

    def prepare_second(self) -> None:
        """Nothing to hand over."""

    def second(self) -> None:
        """Nothing to do."""


class DeviceCopy(Triad):
    """Device-to-device copy of 1 GiB: the same yardstick on a GPU, 8 bytes an element."""

    name = "copy"

    def __init__(self, device: torch.device) -> None:
        """Allocate source and destination."""
        self.streams = True
        self.elements = 2**16 if SHRUNK else 2**28
        self.bytes = 8 * self.elements
        self.arrays = [torch.ones(self.elements, device=device) for _ in range(2)]

    def first(self) -> None:
        """One copy."""
        self.arrays[0].copy_(self.arrays[1])


def _compile(source: Path) -> ctypes.CDLL:
    """Compile a C++ file into a library; torch is imported, so it shares torch's OpenMP threads."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "library.so"
        for flags in (["-march=native"], []):
            command = ["g++", "-O3", *flags, "-fopenmp", "-shared", "-fPIC", str(source), "-o", str(library)]
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=False)
            except FileNotFoundError:
                raise RuntimeError("no g++ on PATH") from None
            if done.returncode == 0:
                return ctypes.CDLL(str(library))
        raise RuntimeError(f"g++ failed: {done.stderr.strip().splitlines()[0] if done.stderr else done.returncode}")


RIVALS: dict[str, Callable[[Problem], Stepper]] = {
    "eager": lambda problem: EagerSAM("eager", problem),
    "eager_foreach": lambda problem: EagerSAM("eager_foreach", problem, foreach=True),
    "eager_fused": lambda problem: EagerSAM("eager_fused", problem, fused=True),
    "foreach_mul": lambda problem: ForeachSAM("foreach_mul", problem, alpha=False),
    "foreach_alpha": lambda problem: ForeachSAM("foreach_alpha", problem, alpha=True),
    "compiled": lambda problem: CompiledSAM("compiled", problem),
    "foreach_masters": lambda problem: MasterSAM("foreach_masters", problem),
    PACKAGE: lambda problem: PackagedSAM(PACKAGE, problem),
    "base_fused": lambda problem: PlainBase("base_fused", problem),
}

SLOW_TO_START = ("compiled",)  # by name only: minutes pass before its first step
NEED_FUSED_BASE = ("eager_fused", "base_fused")
