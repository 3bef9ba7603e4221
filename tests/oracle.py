"""SAM by hand around torch.optim, in eager PyTorch; it shares no code with fastsam.

Two ways to the norm: `norm="tree"` adds the squares in the documented canonical order, in numpy, so that the scale has
fastsam's bits and everything after it can be compared bit for bit; `norm="float64"` knows of no order and is compared
with a tolerance.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

SAM_DEFAULTS = dict(rho=0.05, adaptive=False, eta=0.0, perturb=True)


class SamByHand:
    """w + e, gradient, w, torch.optim's for-loop step."""

    def __init__(
        self, groups: list[dict[str, Any]], base: type[torch.optim.Optimizer], norm: str = "tree", **options: Any
    ) -> None:
        defaults = {key: options.pop(key, value) for key, value in SAM_DEFAULTS.items()}
        self.sam = [{key: group.get(key, value) for key, value in defaults.items()} for group in groups]
        if "foreach" in inspect.signature(base).parameters:
            options.setdefault("foreach", False)
        self.base = base([{k: v for k, v in g.items() if k not in defaults} for g in groups], **options)
        self.sum_of_squares = tree_sum if norm == "tree" else float64_sum
        self.old: dict[Tensor, Tensor] = {}

    def _climbers(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        for group, sam in zip(self.base.param_groups, self.sam, strict=True):
            for p in group["params"]:
                if p.grad is not None and sam["perturb"]:
                    yield p, dict(sam, sign=-1 if group.get("maximize") else 1)

    @torch.no_grad()
    def norm(self) -> float:
        return math.sqrt(sum(self.sum_of_squares(steepest(p, p.grad, sam), p) for p, sam in self._climbers()))

    @torch.no_grad()
    def climb(self) -> None:
        norm = self.norm()
        for p, sam in self._climbers():
            self.old[p] = p.clone()
            scale = sam["sign"] * sam["rho"] / (norm + 1e-12) if math.isfinite(norm) else 0.0
            if p.dtype != torch.float64:
                scale = float(np.float32(scale))
            if scale != 0:
                p.add_(direction(p, p.grad, sam) * scale)

    @torch.no_grad()
    def back(self) -> None:
        for p, w in self.old.items():
            p.copy_(w)
        self.old.clear()

    def descend(self, found_inf: bool = False) -> None:
        self.back()
        if not found_inf:
            self.base.step()

    def step(self, closure: Callable[[], Any]) -> Any:
        loss = closure()
        self.climb()
        closure()
        self.descend()
        return loss


def steepest(w: Tensor, g: Tensor, sam: dict[str, Any]) -> Tensor:
    """T g, the tensor that the norm is of."""
    if not sam["adaptive"]:
        return g
    return w * g if sam["eta"] == 0 else (w.abs() + sam["eta"]) * g


def direction(w: Tensor, g: Tensor, sam: dict[str, Any]) -> Tensor:
    """T^2 g, in the order of the rounding plan."""
    if not sam["adaptive"]:
        return g
    if sam["eta"] == 0:
        return (w * w) * g
    t = w.abs() + sam["eta"]
    return t * (t * g)


def float64_sum(x: Tensor, like: Tensor) -> float:
    return float(x.abs().double().square().sum())


def tree_sum(x: Tensor, like: Tensor) -> float:
    """Sum of squares in the canonical order: chunks of 8,192 elements, 4 rows of 2,048 lanes, adjacent pairs."""
    if x.is_complex():
        x, like = torch.view_as_real(x), torch.view_as_real(like)
    if x.dtype == torch.float64:
        return float64_sum(x, like)
    order = sorted(range(like.dim()), key=lambda d: -like.stride(d))
    flat = x.detach().cpu().permute(order).reshape(-1).float().numpy()
    rows = np.zeros((-(-flat.size // 8192), 4, 2048), np.float32)
    rows.reshape(-1)[: flat.size] = flat
    with np.errstate(all="ignore"):
        acc = np.zeros((rows.shape[0], 2048), np.float32)
        for k in range(4):
            acc = fma32(rows[:, k], rows[:, k], acc)
        while acc.shape[1] > 1:
            acc = acc[:, 0::2] + acc[:, 1::2]
        return float(acc.astype(np.float64).sum())


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c rounded once: an inexact float64 sum is made odd, so that the second rounding is the only one."""
    with np.errstate(all="ignore"):
        p, c = a.astype(np.float64) * b, c.astype(np.float64)
        s = p + c
        t = s - p
        error = (p - (s - t)) + (c - t)
        odd = np.nextafter(s, np.where(error > 0, np.inf, -np.inf))
        inexact = np.isfinite(s) & (error != 0) & (s.view(np.int64) % 2 == 0)
        return np.where(inexact, odd, s).astype(np.float32)


def torch_fuses() -> bool:
    """Whether ATen's `add(alpha=)` and `addcmul` round once on this CPU; without AVX2 they do not."""
    x = torch.linspace(1, 2, 1027)
    once = torch.from_numpy(fma32(x.numpy(), x.flip(0).numpy(), -x.numpy()))
    scaled = torch.from_numpy(fma32(np.full(1027, np.float32(1.1)), x.numpy(), -x.numpy()))
    return torch.equal(torch.addcmul(-x, x, x.flip(0)), once) and torch.equal(torch.add(-x, x, alpha=1.1), scaled)


def assert_same(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Equal values in every element; NaN equals NaN, and 0.0 equals -0.0."""
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    if actual.dtype != expected.dtype or not torch.equal(actual, expected):  # the quick answer first
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}")


def bits(t: Tensor) -> bytes:
    """The bits of a tensor, signs of zeros and NaN payloads included."""
    return t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""


def assert_within_ulp(actual: Tensor, expected: Tensor, before: Tensor, what: str = "", ulps: int = 2) -> None:
    """One ulp of the weight and two of its change: a root that is one ulp off, then two roundings."""
    actual, expected, before = (t.detach().cpu().double() for t in (actual, expected, before))
    allowed = 2.0**-23 * (expected.abs() + ulps * (expected - before).abs())
    worst = (actual - expected).abs() - allowed
    assert bool((worst <= 0).all()), f"{what}: off by {float((actual - expected).abs().max())}"


def saved_state(opt: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """What a checkpoint holds: parameter number to state."""
    return opt.state_dict()["state"]


def assert_same_state(
    actual: torch.optim.Optimizer, expected: torch.optim.Optimizer, compare: Callable[..., None] = assert_same
) -> None:
    """The same parameters have state, under the same keys, with the same values."""
    a, b = saved_state(actual), saved_state(expected)
    assert {k: set(v) for k, v in a.items()} == {k: set(v) for k, v in b.items()}
    for k, entry in b.items():
        for key, value in entry.items():
            if isinstance(value, Tensor):
                compare(a[k][key], value, what=f"state[{k}][{key!r}]")
            else:
                assert a[k][key] == value, f"state[{k}][{key!r}]"


def hand_over(source: list[Any], target: list[Any]) -> None:
    """Copy the oracle's weights, where a documented ulp would otherwise reach the next step."""
    with torch.no_grad():
        for a, b in zip(source, target, strict=True):
            b.copy_(a)
