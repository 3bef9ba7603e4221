"""Flip one operator or constant at a time and see which test notices. Run by hand:

    python tests/mutate.py              all mutants; prints a Markdown table
    python tests/mutate.py 3 17         these only
    python tests/mutate.py --check      only see that each text occurs exactly once

It works in a temporary copy of the repository and builds the library there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TESTS = [  # quick ones first
    "test_precision.py",
    "test_lost_nothing.py",
    "test_gradscaler.py",
    "test_parity.py",
    "test_layouts.py",
    "test_schedulers.py",
    "test_native.py",
    "test_clipping.py",
    "test_general_p.py",
    "test_dot_combine.py",
]
SLOWEST = 300  # seconds a run of the tests may take; a mutant that hangs is dead


class Mutant(NamedTuple):
    """`old` occurs once in `file` and becomes `new`."""

    file: str
    old: str
    new: str


REFERENCE, REFERENCE_RULES, REFERENCE_NUMBERS = (
    f"fastsam/ops/{name}.py" for name in ("reference", "reference_rules", "numbers")
)
NUMBERS, NORM, PERTURB, RULES, COMBINE = (
    f"csrc/math/{name}.h" for name in ("numbers", "norm", "perturb", "rules", "combine")
)
TILE, KERNELS, LAUNCH = "csrc/cpu/tile.h", "csrc/cpu/kernels.cpp", "csrc/cpu/launch.cpp"
OPERATIONS = "csrc/ops.cpp"
MUTANTS = [
    Mutant(REFERENCE, "NORM_EPS = 1e-12", "NORM_EPS = 1e-10"),
    Mutant(REFERENCE, "_ordered_sum(sums)) + NORM_EPS", "_ordered_sum(sums)) - NORM_EPS"),
    Mutant(
        REFERENCE,
        "segment.backup.copy_(source)",
        "segment.backup.copy_(torch.where(norm.isfinite(), source, segment.backup))",
    ),
    Mutant(
        REFERENCE,
        "scale = torch.where(norm.isfinite(), torch.full_like(norm, row.rho) / norm, 0.0)",
        "scale = (torch.full_like(norm, row.rho) / norm)",
    ),
    Mutant(REFERENCE, "torch.where(scale != 0, w + e, w)", "w + e"),
    Mutant(REFERENCE, "scale = -scale", "scale = scale"),
    Mutant(REFERENCE, "source = segment.source(perturbed)", "source = segment.source(True)"),
    Mutant(REFERENCE, "source = segment.source(perturbed)", "source = segment.source(False)"),
    Mutant(REFERENCE, "            if perturbed:\n", "            if not perturbed:\n"),
    Mutant(REFERENCE, "found_inf.reshape(()) != 0", "found_inf.reshape(()) == 0"),
    Mutant(REFERENCE, "after if skip is None else torch.where(skip, before, after)", "after"),
    Mutant(REFERENCE, "torch.where(skip, 0.0, 1.0)", "1.0"),
    Mutant(REFERENCE, "w if skip is None else torch.where(skip, source.to(w.dtype), w)", "w"),
    Mutant(REFERENCE, "(1.0 / grad_scale", "(2.0 / grad_scale"),
    Mutant(REFERENCE, "(w.abs() + row.eta) * g", "(w + row.eta) * g"),
    Mutant(REFERENCE, "((w * w) * g) * scale", "(w.abs() * g) * scale"),
    Mutant(REFERENCE, "(t * (t * g)) * scale", "((t * t) * g) * scale"),
    Mutant(REFERENCE_RULES, "fma(1 - dampening, g, buf * momentum)", "fma(1.0, g, buf * momentum)"),
    Mutant(REFERENCE_RULES, "torch.where(first != 0, g, fma", "torch.where(first > 1, g, fma"),
    Mutant(REFERENCE_RULES, "fma(momentum, buf, g) if", "fma(momentum, buf, buf) if"),
    Mutant(REFERENCE_RULES, "return fma(-lr, g, w), [buf", "return w - lr * g, [buf"),
    Mutant(REFERENCE_RULES, "-(c.lr / correction1)", "-c.lr"),
    Mutant(REFERENCE_RULES, "to(torch.int64) + 1", "to(torch.int64) + 2"),
    Mutant(REFERENCE_RULES, "w = w * (1 - row.lr * row.weight_decay)", "w = w - w * (row.lr * row.weight_decay)"),
    Mutant(
        REFERENCE_RULES,
        "fma((1 - row.beta2) * g, g, exp_avg_sq * row.beta2)\n    second",
        "fma(g * g, torch.full_like(g, 1 - row.beta2), exp_avg_sq * row.beta2)\n    second",
    ),
    Mutant(REFERENCE_RULES, "torch.maximum(max_exp_avg_sq, exp_avg_sq)", "exp_avg_sq"),
    Mutant(
        REFERENCE_RULES, "sqrt32(second) / correction2_sqrt + row.eps", "(sqrt32(second) + row.eps) / correction2_sqrt"
    ),
    Mutant(REFERENCE_NUMBERS, "if weight < 0.5 else", "if weight < 0.9 else"),
    Mutant(REFERENCE_NUMBERS, "STEP_BITS = 24", "STEP_BITS = 2"),
    Mutant(REFERENCE, "x[..., 0::2] + x[..., 1::2]", "x[..., : x.shape[-1] // 2] + x[..., x.shape[-1] // 2 :]"),
    Mutant(REFERENCE, "for k in range(1, CHUNK // LANES)", "for k in range(1, CHUNK // LANES - 1)"),
    Mutant(REFERENCE, "lanes[: part.numel()] += part", "lanes[: part.numel()] = part"),
    Mutant(REFERENCE_NUMBERS, "torch.float64) else x.float()", "torch.float64) else x"),
    Mutant(REFERENCE_NUMBERS, "x.double().sqrt().float()", "x.sqrt()"),
    Mutant(NUMBERS, "if (n & 1) result *= base;", "if (n & 2) result *= base;"),
    Mutant(NUMBERS, "select(weight < T(0.5),", "select(weight < T(0.9),"),
    Mutant(NUMBERS, "return (b > a) | (b != b) ? b : a;", "return (b < a) | (b != b) ? b : a;"),
    Mutant(NUMBERS, "bits + 0x7fff + (bits >> 16 & 1)", "bits + 0x8000"),
    Mutant(NUMBERS, "clamped + 0xfff + (clamped >> 13 & 1)", "clamped + 0x1000"),
    Mutant(NORM, "(abs(w) + eta) * g", "(w + eta) * g"),
    Mutant(PERTURB, "sqrt(sum) + kNormEps", "sqrt(sum) - kNormEps"),
    Mutant(PERTURB, "  if (!is_finite(norm)) return 0;\n", ""),
    Mutant(PERTURB, "has(row, kMaximize) ? -scale : scale", "scale"),
    Mutant(PERTURB, "t * (t * g)", "(t * t) * g"),
    Mutant(PERTURB, "(w * w) * g", "w * (w * g)"),
    Mutant(PERTURB, "return w + e;", "return fma(g, scale, w);"),
    Mutant(RULES, "has_grad && !found_inf", "has_grad"),
    Mutant(RULES, "perturbed ? Source::kBackup", "perturbed && rule ? Source::kBackup"),
    Mutant(RULES, "progress.step += row.beta1 != 0;", "progress.step += 1;"),
    Mutant(
        RULES,
        "static_cast<T>(1.0 / static_cast<double>(*grad_scale))",
        "static_cast<T>(2.0 / static_cast<double>(*grad_scale))",
    ),
    Mutant(RULES, "select(clip == 0, T(0), (g * inverse) * clip)", "(g * inverse) * clip"),
    Mutant(RULES, "one_minus_dampening(static_cast<T>(1.0 - row.beta2))", "one_minus_dampening(T(1))"),
    Mutant(RULES, "first(progress.step == 0)", "first(progress.step == 1)"),
    Mutant(RULES, "fma(momentum, buf, g)", "fma(momentum, buf, buf)"),
    Mutant(RULES, "return fma(neg_lr, g, w);", "return w + neg_lr * g;"),
    Mutant(
        RULES,
        ": factor(static_cast<T>(1.0 - row.lr * row.weight_decay))",
        ": factor(T(1) - static_cast<T>(row.lr * row.weight_decay))",
    ),
    Mutant(
        RULES,
        "Adam(const Row& row, const Progress& progress)\n      : one_minus_beta1(static_cast<T>(1.0 - row.beta1))",
        "Adam(const Row& row, const Progress& progress)\n      : one_minus_beta1(T(1) - static_cast<T>(row.beta1))",
    ),
    Mutant(
        RULES,
        "static_cast<uint32_t>(progress.step) + 1;\n    const double correction1",
        "static_cast<uint32_t>(progress.step) + 2;\n    const double correction1",
    ),
    Mutant(
        RULES,
        "fma(one_minus_beta2 * g, g, state[1] * beta2);\n    T second",
        "fma(g * g, one_minus_beta2, state[1] * beta2);\n    T second",
    ),
    Mutant(RULES, "state[2] = second = maximum", "second = maximum"),
    Mutant(RULES, "sqrt(second) / correction2_sqrt + eps", "(sqrt(second) + eps) / correction2_sqrt"),
    Mutant(RULES, "(step_size * exp_avg) / denom", "step_size * (exp_avg / denom)"),
    Mutant(RULES, "decoupled(row.weight_decay != 0 && has(row, kDecoupled))", "decoupled(row.weight_decay != 0)"),
    Mutant(
        REFERENCE_RULES,
        "fma((1 - alpha) * g, g, square_avg * alpha)",
        "fma(g * g, torch.full_like(g, 1 - alpha), square_avg * alpha)",
    ),
    Mutant(REFERENCE_RULES, "lerp(grad_avg, g, 1 - alpha)", "lerp(grad_avg, g, alpha)"),
    Mutant(REFERENCE_RULES, "fma(-grad_avg, grad_avg, second)", "second - grad_avg * grad_avg"),
    Mutant(REFERENCE_RULES, "sqrt32(second) + row.eps\n    if", "sqrt32(second + row.eps)\n    if"),
    Mutant(REFERENCE_RULES, "buf * momentum + g / denom", "fma(momentum, buf, g / denom)"),
    Mutant(REFERENCE_RULES, "return w + (-lr * g) / denom", "return w + -lr * (g / denom)"),
    Mutant(REFERENCE_RULES, "(c.t - 1) * c.extra", "c.t * c.extra"),
    Mutant(REFERENCE_RULES, "total = fma(g, g, total)", "total = g * g + total"),
    Mutant(REFERENCE_RULES, "sqrt32(total) + row.eps", "sqrt32(total + row.eps)"),
    Mutant(REFERENCE_RULES, "1 - 0.5 * power(c.extra, t)", "1 - power(c.extra, t)"),
    Mutant(REFERENCE_RULES, "(c.t, c.t + 1)", "(c.t, c.t)"),
    Mutant(REFERENCE_RULES, "(c.mu_product.float() * mu.float()).double()", "c.mu_product"),
    Mutant(REFERENCE_RULES, "(1 - product * next_mu)", "(1 - product)"),
    Mutant(REFERENCE_RULES, "sqrt32(exp_avg_sq / correction2) + row.eps", "sqrt32(exp_avg_sq) / correction2 + row.eps"),
    Mutant(REFERENCE, "torch.where(skip, segment.mu_product, product)", "product"),
    Mutant(REFERENCE_RULES, "rectified = rho_t > 5", "rectified = rho_t > 4"),
    Mutant(REFERENCE_RULES, "2.0 * c.t * power2 / bias2", "2.0 * c.t * power2"),
    Mutant(REFERENCE_RULES, "(rho_inf - 2) * rho_t)", "(rho_inf - 2) * rho_inf)"),
    Mutant(
        REFERENCE_RULES,
        "(1 / (sqrt32(exp_avg_sq) + row.eps)) * correction2_sqrt",
        "correction2_sqrt / (sqrt32(exp_avg_sq) + row.eps)",
    ),
    Mutant(REFERENCE_RULES, "(exp_avg / correction1) * row.lr", "exp_avg * (row.lr / correction1)"),
    Mutant(REFERENCE_RULES, "c = lerp(exp_avg, g, 1 - row.beta1)", "c = lerp(exp_avg, g, 1 - row.beta2)"),
    Mutant(REFERENCE_RULES, "w * (1 - row.lr * row.weight_decay)  # a", "w - w * (row.lr * row.weight_decay)  # a"),
    Mutant(REFERENCE_RULES, "c.sign()", "c"),
    Mutant(RULES, "fma(one_minus_alpha * g, g,", "fma(g * g, one_minus_alpha,"),
    Mutant(RULES, "lerp(state[2], g, one_minus_alpha)", "lerp(state[2], g, alpha)"),
    Mutant(RULES, "fma(-grad_avg, grad_avg, second)", "second - grad_avg * grad_avg"),
    Mutant(RULES, "sqrt(second) + eps;\n    if", "sqrt(second + eps);\n    if"),
    Mutant(RULES, "state[1] * momentum + g / denom", "fma(state[1], momentum, g / denom)"),
    Mutant(RULES, "(neg_lr * g) / denom", "neg_lr * (g / denom)"),
    Mutant(RULES, "row.beta1 > 0 ? 2 : 0", "row.beta1 > 0.75 ? 2 : 0"),
    Mutant(
        RULES,
        "static_cast<double>(progress.step) * row.extra",
        "(1.0 + static_cast<double>(progress.step)) * row.extra",
    ),
    Mutant(RULES, "fma(g, g, state[0])", "g * g + state[0]"),
    Mutant(RULES, "sqrt(sum) + eps", "sqrt(sum + eps)"),
    Mutant(RULES, "1.0 - 0.5 * ipow(row.extra, t)", "1.0 - ipow(row.extra, t)"),
    Mutant(RULES, "next_mu = momentum(row, t + 1)", "next_mu = momentum(row, t)"),
    Mutant(RULES, "static_cast<double>(after.mu_product)", "static_cast<double>(progress.mu_product)"),
    Mutant(RULES, "(1.0 - product * next_mu)", "(1.0 - product)"),
    Mutant(RULES, "sqrt(exp_avg_sq / correction2) + eps", "sqrt(exp_avg_sq) / correction2 + eps"),
    Mutant(
        RULES,
        "progress.mu_product *= static_cast<float>(momentum(row, static_cast<uint32_t>(progress.step)));",
        "progress.mu_product *= static_cast<float>(momentum(row, static_cast<uint32_t>(progress.step) + 1));",
    ),
    Mutant(RULES, "rectified = rho_t > 5.0", "rectified = rho_t > 4.0"),
    Mutant(RULES, "2.0 * t * power2 / bias2", "2.0 * t * power2"),
    Mutant(RULES, "(rho_inf - 2.0) * rho_t)", "(rho_inf - 2.0) * rho_inf)"),
    Mutant(
        RULES, "(T(1) / (sqrt(exp_avg_sq) + eps)) * correction2_sqrt", "correction2_sqrt / (sqrt(exp_avg_sq) + eps)"
    ),
    Mutant(RULES, "(exp_avg / correction1) * lr", "exp_avg * (lr / correction1)"),
    Mutant(RULES, "const T c = lerp(state[0], g, one_minus_beta1)", "const T c = lerp(state[0], g, one_minus_beta2)"),
    Mutant(
        RULES,
        "decay_factor(static_cast<T>(1.0 - row.lr * row.weight_decay))",
        "decay_factor(T(1) - static_cast<T>(row.lr * row.weight_decay))",
    ),
    Mutant(NUMBERS, "(x > 0) - (x < 0)", "(x > 0) - (x <= 0)"),
    # Clipping, other norms, the decay in the loss, overflow counts.
    Mutant(REFERENCE, "factor.clamp(max=1.0)", "factor"),
    Mutant(REFERENCE, "(norm + CLIP_EPS)", "(norm - 1e4 * CLIP_EPS)"),
    Mutant(REFERENCE, "raised(x.abs() / norm, q - 1)", "raised(x.abs() / norm, q)"),
    Mutant(REFERENCE, "tables.overflows[0] += ~norm", "tables.overflows[0] += norm"),
    Mutant(REFERENCE, "fma(-row.weight_decay if", "fma(row.weight_decay if"),
    Mutant(NORM, "factor < 1.0 ? factor : 1.0", "factor"),
    Mutant(NORM, "norm *= 1.0 / static_cast<double>(*grad_scale)", "norm /= 1.0 / static_cast<double>(*grad_scale)"),
    Mutant(PERTURB, "exponent(q - 1)", "exponent(q)"),
    Mutant(PERTURB, "is_finite(norm) ? rho * (norm / (norm + kNormEps)) : 0", "rho * (norm / (norm + kNormEps))"),
    Mutant(NORM, "kMaximize) ? -row.weight_decay", "kMaximize) ? row.weight_decay"),
    # Masters and stochastic rounding.
    Mutant(REFERENCE_NUMBERS, "PHILOX_ROUNDS = 7", "PHILOX_ROUNDS = 6"),
    Mutant(REFERENCE_NUMBERS, "a * 0xD2511F53, c * 0xCD9E8D57", "a * 0xCD9E8D57, c * 0xD2511F53"),
    Mutant(REFERENCE_NUMBERS, "i * 0x9E3779B9", "i * 0x9E3779B1"),
    Mutant(REFERENCE_NUMBERS, "& 0xFFFFFFFF) ^ b ^ k0", "& 0xFFFFFFFF) ^ d ^ k0"),
    Mutant(REFERENCE, "(words & 0xFFFF, words >> 16)", "(words >> 16, words & 0xFFFF)"),
    Mutant(REFERENCE, "(segment.index, 0, stream)", "(segment.group, 0, stream)"),
    Mutant(REFERENCE, "(seed & 0xFFFFFFFF, seed >> 32)", "(seed & 0xFFFFFFFF, 0)"),
    Mutant(REFERENCE, "tables.rounding & 0xFFFFFFFF", "tables.rounding"),
    Mutant(REFERENCE_NUMBERS, "(bits + noise) >> 16", "(bits + 0x8000) >> 16"),
    Mutant(REFERENCE_NUMBERS, "x.isnan(), 0x7FC0,", "x.isinf(), bits >> 16,"),
    Mutant(REFERENCE_NUMBERS, "noise = noise >> 3", "noise = noise & 0x1FFF"),
    Mutant(REFERENCE_NUMBERS, "magnitude.clamp(max=0x47800000)", "magnitude.clamp(max=0x47000000)"),
    Mutant(REFERENCE_NUMBERS, "noise.float() * 2.0**-13", "noise.float() * 2.0**-14"),
    Mutant(REFERENCE_NUMBERS, "magnitude < 0x38800000, subnormal", "magnitude < 0x38000000, subnormal"),
    Mutant(REFERENCE, "CLIMB, STEP, STATES = 0, 1, 2", "CLIMB, STEP, STATES = 0, 0, 1"),
    Mutant(REFERENCE, "state.dtype, STATES + k", "state.dtype, STATES"),
    Mutant(REFERENCE, "tables.rounding += 1", "tables.rounding += 2"),
    Mutant(REFERENCE, "segment.master.copy_(w)", "segment.master.copy_(w.to(tables.dtype))"),
    Mutant(REFERENCE, "w if segment.master is not None else _rounded", "_rounded"),
    Mutant(REFERENCE, "w, g = widen(segment.source(False))", "w, g = widen(segment.flat(segment.param))"),
    Mutant(REFERENCE, "        source = segment.source(False)\n", "        source = segment.flat(segment.param)\n"),
    Mutant(NUMBERS, "kPhiloxRounds = 7", "kPhiloxRounds = 6"),
    Mutant(NUMBERS, "kPhilox0 = 0xD2511F53u", "kPhilox0 = 0xD2511F51u"),
    Mutant(NUMBERS, "kWeyl1 = 0xBB67AE85u", "kWeyl1 = 0xBB67AE87u"),
    Mutant(NUMBERS, "(second >> 32) ^ b ^ key0", "(second >> 32) ^ d ^ key0"),
    Mutant(NUMBERS, ">> 16 * (i % 2)", ">> 16 * (1 - i % 2)"),
    Mutant(NUMBERS, "static_cast<uint64_t>(row.seed) >> 32", "static_cast<uint64_t>(row.seed) >> 31"),
    Mutant(NUMBERS, "index, step, static_cast<uint32_t>(stream)", "step, index, static_cast<uint32_t>(stream)"),
    Mutant(NUMBERS, "(bits + noise) >> 16", "(bits + 0x7fff) >> 16"),
    Mutant(NUMBERS, "> 0x7f800000 ? 0x7fc0 : (bits", "> 0x7fffffff ? 0x7fc0 : (bits"),
    Mutant(NUMBERS, "static_cast<int32_t>(noise >> 3)", "static_cast<int32_t>(noise & 0x1fff)"),
    Mutant(
        NUMBERS,
        "static_cast<int32_t>(magnitude < 0x47800000 ? magnitude : 0x47800000)",
        "static_cast<int32_t>(magnitude < 0x47800000 ? magnitude : 0x47000000)",
    ),
    Mutant(NUMBERS, "static_cast<float>(short_noise) * 0x1p-13f", "static_cast<float>(short_noise) * 0x1p-14f"),
    Mutant(NUMBERS, "const int32_t finite = magnitude < 0x38800000", "const int32_t finite = magnitude < 0x38000000"),
    Mutant(
        TILE, "_mm512_xor_si512(_mm512_srli_epi64(second, 32), b)", "_mm512_xor_si512(_mm512_srli_epi64(second, 32), d)"
    ),
    Mutant(TILE, "lanes(first / 8 + i), ascending", "lanes(first / 8), ascending"),
    Mutant(TILE, "_mm256_permute2x128_si256(even, odd, 0x31)", "_mm256_permute2x128_si256(even, odd, 0x20)"),
    Mutant(
        KERNELS, "format.masters() ? segment.master : segment.weight, format.source", "segment.weight, format.weight"
    ),
    Mutant(KERNELS, "  if (nothing && masters) return;  // the weights are the masters, rounded\n", ""),
    Mutant(KERNELS, "first_ + start, kStateStream + slot", "first_ + start, kStateStream"),
    Mutant(KERNELS, "first_ + start, stream", "start, stream"),
    Mutant(KERNELS, "stochastic && !launch.format.masters() &&", "stochastic &&"),
    Mutant(KERNELS, "start, kClimbStream", "start, kStepStream"),
    Mutant(KERNELS, "if (format.masters()) write(new_w", "if (false) write(new_w"),
    Mutant(LAUNCH, "++*launch.rounding", "*launch.rounding += 2"),
    Mutant(LAUNCH, "launch.rounding && launch.rule != kNoRule", "launch.rounding"),
    # The norm for every p.
    Mutant(REFERENCE_NUMBERS, "norm = largest * raised(", "norm = raised("),
    Mutant(REFERENCE_NUMBERS, "raised(x / largest, q).sum(), 1 / q)", "raised(x / largest, q).sum(), 1)"),
    Mutant(REFERENCE_NUMBERS, "(largest > 0) & largest.isfinite()", "largest > 0"),
    Mutant(REFERENCE_NUMBERS, "(largest > 0) & largest.isfinite()", "largest.isfinite()"),
    Mutant(REFERENCE, "q_norm(tables.partials, tables.q) if powers", "tables.partials.sum() if powers"),
    Mutant(REFERENCE, "else q_norm(sums, tables.q)", "else sums.sum()"),
    Mutant(
        REFERENCE,
        "return _loss_gradient(w, g, row).double() * _metric(w, row)",
        "return (_loss_gradient(w, g, row).double() * _metric(w, row)).to(w.dtype).double()",
    ),
    Mutant(REFERENCE, "rho * (norm / (norm + NORM_EPS))", "rho"),
    Mutant(REFERENCE, "rho * (norm / (norm + NORM_EPS))", "rho * (norm / (norm - NORM_EPS))"),
    Mutant(NORM, "return largest * power(sum_of", "return power(sum_of"),
    Mutant(NORM, "power(x / largest, q); }), 1 / q)", "power(x / largest, q); }), 1)"),
    Mutant(NORM, "if (largest == 0 || !is_finite(largest))", "if (largest == 0)"),
    Mutant(NORM, "if (largest == 0 || !is_finite(largest))", "if (!is_finite(largest))"),
    Mutant(NORM, "largest = maximum(largest, x);", "largest = x > largest ? x : largest;"),
    Mutant(
        NORM,
        "static_cast<double>(loss_gradient(w, g)) * metric(w)",
        "static_cast<double>(loss_gradient(w, g) * static_cast<T>(metric(w)))",
    ),
    Mutant(PERTURB, "rho * (norm / (norm + kNormEps))", "rho * (norm / (norm - kNormEps))"),
    Mutant(KERNELS, "f(abs(steepest(wt[i], gt[i])))", "f(steepest(wt[i], gt[i]))"),
    Mutant(LAUNCH, "f(launch.partials[i]);", "f(launch.partials[0]);"),
    Mutant(
        OPERATIONS,
        "if (q != 2) return baseline::q_norm(q, each_slot);",
        "if (q < 0) return baseline::q_norm(q, each_slot);",
    ),
    # Inner products and linear combinations.
    Mutant(REFERENCE, "((x, x), (x, y), (y, y))", "((x, x), (y, y), (y, y))"),
    Mutant(REFERENCE, "torch.where(c != 0, added, total), begun", "added, begun"),
    Mutant(REFERENCE, "fma(left[:, k], right[:, k], acc)", "left[:, k] * right[:, k] + acc"),
    Mutant(COMBINE, "if (cast == 0 || !there) return;", "if (!there) return;"),
    Mutant(COMBINE, "if (cast == 0 ||", "if (coefficient == 0 ||"),
    Mutant(COMBINE, "total = fma(c[k], x[k], total)", "total = c[k] * x[k] + total"),
    Mutant(KERNELS, "xy[i] = fma(x[i], y[i], xy[i])", "xy[i] = fma(x[i], x[i], xy[i])"),
    Mutant(KERNELS, "there[k] ? fold(lanes[k], pairs, width) : 0", "fold(lanes[k], pairs, width)"),
    Mutant(KERNELS, "if (terms.n == 2) combine_chunk<2>", "if (terms.n == 2) combine_chunk<1>"),
    Mutant(LAUNCH, "if (term.address) term.coefficient = *term.address;", ""),
    Mutant(LAUNCH, "slot_sum(launch.partials + i * launch.n_chunks,", "slot_sum(launch.partials,"),
]


def tests_of(mutant: Mutant) -> list[str]:
    # The reference is also what other backends are compared with.
    backend = "reference or whole_steps" if mutant.file == REFERENCE else "cpu or native"
    return [*(f"tests/{name}" for name in TESTS if (ROOT / "tests" / name).exists()), "-k", backend]


def run(command: list[str], where: Path) -> subprocess.CompletedProcess[str]:
    env = dict(os.environ, PYTHONPATH=str(where), FASTSAM_NATIVE="1", FASTSAM_CUDA="0", PYTHONDONTWRITEBYTECODE="1")
    return subprocess.run(
        command, cwd=where, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SLOWEST
    )


def build(where: Path) -> None:
    done = run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], where)
    if done.returncode != 0:
        raise RuntimeError(done.stdout[-3000:])


def killer(mutant: Mutant | None, where: Path) -> str:
    """The first test that fails, with how many others were not asked; '' if all pass."""
    selection = tests_of(mutant) if mutant else [f"tests/{name}" for name in TESTS[:2]]
    try:
        done = run([sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "-p", "no:cacheprovider", *selection], where)
    except subprocess.TimeoutExpired:
        return "(hangs)"
    if done.returncode == 0:
        return ""
    found = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, re.MULTILINE)
    return found.group(1) if found else f"(exit code {done.returncode}) {done.stdout[-300:]}"


def check() -> None:
    for i, mutant in enumerate(MUTANTS, 1):
        count = (ROOT / mutant.file).read_text().count(mutant.old)
        if count != 1:
            raise SystemExit(f"mutant {i}: {mutant.old!r} occurs {count} times in {mutant.file}")


def main(arguments: list[str]) -> int:
    check()
    if "--check" in arguments:
        return 0
    chosen = [int(a) for a in arguments] or range(1, len(MUTANTS) + 1)
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder) / "repo"
        shutil.copytree(ROOT, where, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", "benchmarks", ".ci"))
        build(where)
        if failed := killer(None, where):
            raise SystemExit(f"without any mutant: {failed}")
        print(
            "| # | file | text | becomes | killed by | s |",
            "| --- | --- | --- | --- | --- | --- |",
            sep="\n",
            flush=True,
        )
        for i in chosen:
            mutant = MUTANTS[i - 1]
            path, start = where / mutant.file, time.time()
            original = path.read_text()
            path.write_text(original.replace(mutant.old, mutant.new))
            try:
                if mutant.file.startswith("csrc/"):
                    build(where)
                test = killer(mutant, where)
            finally:
                path.write_text(original)
            survivors += not test
            cells = [f"`{text.strip()}`".replace("|", "\\|").replace("\n", " ") for text in (mutant.old, mutant.new)]
            name = f"`{test}`" if test else "**nobody**"
            print(f"| {i} | {path.name} | {cells[0]} | {cells[1]} | {name} | {time.time() - start:.0f} |", flush=True)
    print(f"\n{survivors} of {len(list(chosen))} mutants survive.")
    return survivors


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
