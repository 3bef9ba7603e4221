"""The arithmetic of the reference: roundings as the plan has them, powers, roots and random numbers."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

STEP_BITS = 24  # a float32 step count is exact up to 2^24
PHILOX_ROUNDS = 7  # the fewest that pass the tests of its authors


def number_on(device: torch.device, value: float | Tensor) -> Tensor:
    """[] float64: a number on a device, without a copy that the host would wait for."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float64, non_blocking=True)
    return torch.full((), value, dtype=torch.float64, device=device)


def widen(x: Tensor) -> Tensor:
    """What is computed in: float32 for lower precision, else the tensor's own dtype."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def fma(a: Tensor | float, b: Tensor, c: Tensor) -> Tensor:
    """The sum a * b + c, rounded once."""
    if not isinstance(a, Tensor):
        a = torch.full((), a, dtype=c.dtype, device=c.device)
    if c.dtype == torch.float64 or addcmul_fuses(c.device):
        return torch.addcmul(c, a, b)
    return exact_fma(a, b, c)


@cache
def addcmul_fuses(device: torch.device) -> bool:
    """Whether `addcmul` rounds once there, asked with values that decide: it does on x86 with AVX2, not before."""
    x = torch.linspace(1.0, 2.0, 1027, dtype=torch.float32, device=device)
    return torch.equal(torch.addcmul(-x, x, x.flip(0)), exact_fma(x, x.flip(0), -x))


def exact_fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """float32 fma by way of float64 with round-to-odd: an inexact, even sum moves one ulp towards its error."""
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    bits = total.view(torch.int64)
    inexact = (error != 0) & error.isfinite() & (bits & 1 == 0)
    towards = torch.where((error > 0) == (total > 0), 1, -1)
    return torch.where(inexact, bits + towards, bits).view(torch.float64).float()


def lerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Interpolate: a + weight (b - a), from whichever end is nearer."""
    cast = float if a.dtype == torch.float64 else _float32
    weight = cast(weight)  # the choice is made in the compute type, as in ATen
    return fma(weight, b - a, a) if weight < 0.5 else fma(cast(weight - 1), b - a, b)


def _float32(x: float) -> float:
    return ctypes.c_float(x).value


def power(base: Tensor, n: Tensor) -> Tensor:
    """base^n in float64 by repeated squaring: the same bits on every machine, which `pow` is not."""
    result = torch.ones_like(base)
    for bit in range(STEP_BITS):
        result = torch.where((n >> bit) & 1 == 1, result * base, result)
        base = base * base
    return result


def sqrt(x: Tensor) -> Tensor:
    """Correctly rounded float64 root: torch's may be one ulp off, so one Newton correction with the exact residual."""
    root = x.sqrt()
    high = root * 134217729.0  # 2^27 + 1 splits a float64 into two halves whose products are exact (Dekker)
    high = high - (high - root)
    low = root - high
    residual = ((x - high * high) - 2 * high * low) - low * low
    return torch.where((root > 0) & root.isfinite(), root + residual / (2 * root), root)


def sqrt32(x: Tensor) -> Tensor:
    """Root in x's dtype, by way of float64: torch's float32 root is one ulp off in 17 % of values on x86."""
    return x.sqrt() if x.dtype == torch.float64 else x.double().sqrt().float()


def raised(x: Tensor, exponent: float) -> Tensor:
    """x^exponent for x >= 0, in float64, as the kernels take it."""
    return torch.where(x == 0, 0.0, torch.exp2(exponent * torch.log2(x)))


def q_norm(x: Tensor, q: float) -> Tensor:
    """[]: the norm `sum(x^q)^(1/q)` of `x` [n] float64, >= 0, as m sum((x / m)^q)^(1/q) where m is the largest.

    It is m where that is 0, infinite or NaN.
    """
    if x.numel() == 0:
        return x.new_zeros(())
    largest = x.amax()
    norm = largest * raised(raised(x / largest, q).sum(), 1 / q)
    return torch.where((largest > 0) & largest.isfinite(), norm, largest)


def round_stochastically(x: Tensor, noise: Tensor, dtype: torch.dtype) -> Tensor:
    """Round x (float32) to bfloat16 or float16, up or down with the odds that make the result right on average.

    A value that the dtype holds stays, and so do infinities and NaN.

    Args:
        x: [n] float32.
        noise: [n] int64 in [0, 2^16).
        dtype: bfloat16 or float16.
    """
    bits = x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    if dtype == torch.bfloat16:  # what is cut off carries into what stays
        rounded = torch.where(x.isnan(), 0x7FC0, (bits + noise) >> 16)
    else:
        noise = noise >> 3  # float16 has 13 bits less than float32
        magnitude = bits & 0x7FFFFFFF
        clamped = magnitude.clamp(max=0x47800000)  # 2^16 and beyond are infinity
        normal = ((clamped + noise) >> 13) - (112 << 10)
        subnormal = (x.abs() * 2.0**24 + noise.float() * 2.0**-13).clamp(max=2048.0).to(torch.int64)
        finite = torch.where(magnitude < 0x38800000, subnormal, normal)  # 2^-14, the smallest normal number
        rounded = (bits >> 16 & 0x8000) | torch.where(x.isnan(), 0x7E00, finite)
    return torch.where(rounded >= 0x8000, rounded - 0x10000, rounded).to(torch.int16).view(dtype)


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-7 (Salmon et al., SC 2011): four words of random bits for each counter of four words, in int64."""
    a, b, c, d = counter
    for i in range(PHILOX_ROUNDS):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57  # the bits of unsigned products
        k0, k1 = (key[0] + i * 0x9E3779B9) & 0xFFFFFFFF, (key[1] + i * 0xBB67AE85) & 0xFFFFFFFF
        a, b = (second >> 32 & 0xFFFFFFFF) ^ b ^ k0, second & 0xFFFFFFFF
        c, d = (first >> 32 & 0xFFFFFFFF) ^ d ^ k1, first & 0xFFFFFFFF
    return a, b, c, d
