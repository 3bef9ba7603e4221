"""The base optimizers' formulas in Triton, and the arithmetic they are written in; twins of `reference_rules.py`.

Every line is one rounding, as in `csrc/math/`: `tl.fma` stands where a product and a sum are rounded once, and nothing
else is fused (`enable_fp_fusion=False`). Scalars are float64 until one final cast to the type the kernel computes in
(WIDE: float64 for float64, else float32).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from fastsam.bases import rules

# Columns of a group's row: `rules.Row` says what they hold.
LR, WEIGHT_DECAY, BETA1, BETA2, EPS, RHO, ETA, FLAGS = (tl.constexpr(i) for i in range(8))
EXTRA, LR_ADDRESS, SEED = (tl.constexpr(rules.Row._fields.index(name)) for name in ("extra", "lr_address", "seed"))
ROW_COLUMNS = tl.constexpr(len(rules.Row._fields))

ADAPTIVE = tl.constexpr(rules.ADAPTIVE)
NESTEROV = tl.constexpr(rules.NESTEROV)
MAXIMIZE = tl.constexpr(rules.MAXIMIZE)
DECOUPLED = tl.constexpr(rules.DECOUPLED)
DECAYS = tl.constexpr(rules.DECAYS)
AMSGRAD = tl.constexpr(rules.AMSGRAD)
CENTERED = tl.constexpr(rules.CENTERED)
LR_FLOAT64 = tl.constexpr(rules.LR_FLOAT64)
SGD, ADAM, RMSPROP = (tl.constexpr(rule.code) for rule in (rules.SGD, rules.ADAM, rules.RMSPROP))
ADAGRAD, NADAM, RADAM = (tl.constexpr(rule.code) for rule in (rules.ADAGRAD, rules.NADAM, rules.RADAM))
LION = tl.constexpr(rules.LION.code)


# Arithmetic that Triton spells differently for float32 and float64.


@triton.jit
def _fma(a, b, c):
    # a b + c, rounded once; a may be a scalar.
    return tl.fma(tl.broadcast_to(a, c.shape), b, c)


@triton.jit
def _sqrt(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def _div(a, b):
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, tl.broadcast_to(b, a.shape))


@triton.jit
def _maximum(a, b):
    # torch.maximum: a NaN on either side stays.
    return tl.where((b > a) | (b != b), b, a)


@triton.jit
def _lerp(a, b, weight):
    # a + weight (b - a), from whichever end is nearer.
    near = weight < 0.5
    return _fma(tl.where(near, weight, weight - 1.0), b - a, tl.where(near, a, b))


@triton.jit
def _power(base, n):
    # base^n by repeated squaring: the same bits on every machine, which `pow` is not.
    result = tl.full([], 1.0, tl.float64)
    while n > 0:
        if n & 1 == 1:
            result = result * base
        base = base * base
        n = n >> 1
    return result


# Rows.


@triton.jit
def _flag(row, FLAG: tl.constexpr):
    return tl.load(row + FLAGS).to(tl.int32) & FLAG != 0


@triton.jit
def _lr(row):
    # A tensor lr is read where it is: whoever changes it need not tell a captured graph.
    lr = tl.load(row + LR)
    address = tl.load(row + LR_ADDRESS).to(tl.int64)
    if address != 0:
        if _flag(row, LR_FLOAT64):
            lr = tl.load(address.to(tl.pointer_type(tl.float64)))
        else:
            lr = tl.load(address.to(tl.pointer_type(tl.float32))).to(tl.float64)
    return lr


# The rules. STATES is the set of state slots that a group reads and writes, as bits. Of each rule: the scalars, from
# the group's row and the segment's progress (step count, NAdam's product of momenta), and the formula.


@triton.jit
def _sgd_scalars(row, progress, WIDE: tl.constexpr):
    lr, weight_decay = _lr(row), tl.load(row + WEIGHT_DECAY)
    momentum, dampening = tl.load(row + BETA1), tl.load(row + BETA2)
    return (
        (-lr).to(WIDE),
        weight_decay.to(WIDE),
        momentum.to(WIDE),
        (1.0 - dampening).to(WIDE),
        weight_decay != 0,
        progress[0] == 0,
        _flag(row, NESTEROV),
    )


@triton.jit
def _sgd(w, g, buf, scalars, STATES: tl.constexpr):
    # torch.optim.SGD; `first` is true where there is no momentum yet (dampening does not apply there).
    neg_lr, weight_decay, momentum, one_minus_dampening, decay, first, nesterov = scalars
    g = tl.where(decay, _fma(weight_decay, w, g), g)
    if STATES & 1:
        buf = tl.where(first, g, _fma(one_minus_dampening, g, buf * momentum))
        g = tl.where(nesterov, _fma(momentum, buf, g), buf)
    return _fma(neg_lr, g, w), buf


@triton.jit
def _decay_scalars(row, WIDE: tl.constexpr):
    lr, weight_decay = _lr(row), tl.load(row + WEIGHT_DECAY)
    return (
        (1.0 - lr * weight_decay).to(WIDE),
        weight_decay.to(WIDE),
        (weight_decay != 0) & _flag(row, DECOUPLED),
        (weight_decay != 0) & (_flag(row, DECOUPLED) == 0),
    )


@triton.jit
def _decay(w, g, scalars):
    # Weight decay of Adam's family: of the weights themselves (decoupled), or through the gradient.
    factor, weight_decay, decoupled, coupled = scalars
    return tl.where(decoupled, w * factor, w), tl.where(coupled, _fma(weight_decay, w, g), g)


@triton.jit
def _moment_scalars(row, WIDE: tl.constexpr):
    beta1, beta2 = tl.load(row + BETA1), tl.load(row + BETA2)
    return (1.0 - beta1).to(WIDE), beta2.to(WIDE), (1.0 - beta2).to(WIDE), tl.load(row + EPS).to(WIDE)


@triton.jit
def _adam_scalars(row, progress, WIDE: tl.constexpr):
    t = progress[0].to(tl.int32) + 1  # the count of the step being made
    correction1, correction2 = 1.0 - _power(tl.load(row + BETA1), t), 1.0 - _power(tl.load(row + BETA2), t)
    own = (-(_lr(row) / correction1)).to(WIDE), tl.sqrt(correction2).to(WIDE)
    return own, _moment_scalars(row, WIDE), _decay_scalars(row, WIDE)


@triton.jit
def _adam(w, g, exp_avg, exp_avg_sq, max_exp_avg_sq, scalars, STATES: tl.constexpr):
    # torch.optim.Adam and AdamW (arXiv 1412.6980, 1711.05101); the third state is amsgrad's.
    own, moments, decay = scalars
    step_size, correction2_sqrt = own
    one_minus_beta1, beta2, one_minus_beta2, eps = moments
    w, g = _decay(w, g, decay)
    exp_avg = _lerp(exp_avg, g, one_minus_beta1)
    exp_avg_sq = _fma(one_minus_beta2 * g, g, exp_avg_sq * beta2)
    second = exp_avg_sq
    if STATES & 4:
        max_exp_avg_sq = _maximum(max_exp_avg_sq, exp_avg_sq)
        second = max_exp_avg_sq
    denom = _div(_sqrt(second), correction2_sqrt) + eps
    return w + _div(step_size * exp_avg, denom), exp_avg, exp_avg_sq, max_exp_avg_sq


@triton.jit
def _rmsprop_scalars(row, progress, WIDE: tl.constexpr):
    weight_decay, alpha = tl.load(row + WEIGHT_DECAY), tl.load(row + BETA2)
    return (
        (-_lr(row)).to(WIDE),
        weight_decay.to(WIDE),
        tl.load(row + BETA1).to(WIDE),
        alpha.to(WIDE),
        (1.0 - alpha).to(WIDE),
        tl.load(row + EPS).to(WIDE),
        weight_decay != 0,
    )


@triton.jit
def _rmsprop(w, g, square_avg, buf, grad_avg, scalars, STATES: tl.constexpr):
    # torch.optim.RMSprop (centered: Graves, arXiv 1308.0850).
    neg_lr, weight_decay, momentum, alpha, one_minus_alpha, eps, decay = scalars
    g = tl.where(decay, _fma(weight_decay, w, g), g)
    square_avg = _fma(one_minus_alpha * g, g, square_avg * alpha)
    second = square_avg
    if STATES & 4:
        grad_avg = _lerp(grad_avg, g, one_minus_alpha)
        second = _fma(-grad_avg, grad_avg, second)
    denom = _sqrt(second) + eps
    if STATES & 2:
        buf = buf * momentum + _div(g, denom)
        w = _fma(neg_lr, buf, w)
    else:
        w = w + _div(neg_lr * g, denom)
    return w, square_avg, buf, grad_avg


@triton.jit
def _adagrad_scalars(row, progress, WIDE: tl.constexpr):
    weight_decay = tl.load(row + WEIGHT_DECAY)
    clr = _lr(row) / (1.0 + progress[0].to(tl.float64) * tl.load(row + EXTRA))
    return (-clr).to(WIDE), weight_decay.to(WIDE), tl.load(row + EPS).to(WIDE), weight_decay != 0


@triton.jit
def _adagrad(w, g, total, scalars):
    # torch.optim.Adagrad (Duchi et al., JMLR 12, 2011).
    neg_clr, weight_decay, eps, decay = scalars
    g = tl.where(decay, _fma(weight_decay, w, g), g)
    total = _fma(g, g, total)
    denom = _sqrt(total) + eps
    return w + _div(neg_clr * g, denom), total


@triton.jit
def _nadam_scalars(row, progress, WIDE: tl.constexpr):
    step, product = progress
    t, lr = step.to(tl.int32) + 1, _lr(row)
    beta1, q = tl.load(row + BETA1), tl.load(row + EXTRA)
    mu, next_mu = beta1 * (1.0 - 0.5 * _power(q, t)), beta1 * (1.0 - 0.5 * _power(q, t + 1))
    product = (product * mu.to(tl.float32)).to(tl.float64)
    grad_size = ((-lr * (1.0 - mu)) / (1.0 - product)).to(WIDE)
    avg_size = ((-lr * next_mu) / (1.0 - product * next_mu)).to(WIDE)
    own = grad_size, avg_size, (1.0 - _power(tl.load(row + BETA2), t)).to(WIDE)
    return own, _moment_scalars(row, WIDE), _decay_scalars(row, WIDE)


@triton.jit
def _nadam(w, g, exp_avg, exp_avg_sq, scalars):
    # torch.optim.NAdam (Dozat, ICLR workshop 2016).
    own, moments, decay = scalars
    grad_size, avg_size, correction2 = own
    one_minus_beta1, beta2, one_minus_beta2, eps = moments
    w, g = _decay(w, g, decay)
    exp_avg = _lerp(exp_avg, g, one_minus_beta1)
    exp_avg_sq = _fma(one_minus_beta2 * g, g, exp_avg_sq * beta2)
    denom = _sqrt(_div(exp_avg_sq, correction2)) + eps
    w = w + _div(grad_size * g, denom)
    return w + _div(avg_size * exp_avg, denom), exp_avg, exp_avg_sq


@triton.jit
def _radam_scalars(row, progress, WIDE: tl.constexpr):
    t, beta2 = progress[0].to(tl.int32) + 1, tl.load(row + BETA2)
    power2 = _power(beta2, t)
    bias2, rho_inf = 1.0 - power2, 2.0 / (1.0 - beta2) - 1.0
    rho_t = rho_inf - 2.0 * t.to(tl.float64) * power2 / bias2
    ratio = (rho_t - 4.0) * (rho_t - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho_t)
    rectified = rho_t > 5.0
    own = (
        _lr(row).to(WIDE),
        (1.0 - _power(tl.load(row + BETA1), t)).to(WIDE),
        tl.sqrt(bias2).to(WIDE),
        tl.sqrt(tl.where(rectified, ratio, 0.0)).to(WIDE),
        rectified,
    )
    return own, _moment_scalars(row, WIDE), _decay_scalars(row, WIDE)


@triton.jit
def _radam(w, g, exp_avg, exp_avg_sq, scalars):
    # torch.optim.RAdam (Liu et al., arXiv 1908.03265), without denominator while rho_t <= 5.
    own, moments, decay = scalars
    lr, correction1, correction2_sqrt, rect, rectified = own
    one_minus_beta1, beta2, one_minus_beta2, eps = moments
    w, g = _decay(w, g, decay)
    exp_avg = _lerp(exp_avg, g, one_minus_beta1)
    exp_avg_sq = _fma(one_minus_beta2 * g, g, exp_avg_sq * beta2)
    step = _div(exp_avg, correction1) * lr
    adaptive = _div(tl.full(w.shape, 1.0, w.dtype), _sqrt(exp_avg_sq) + eps) * correction2_sqrt
    return w - tl.where(rectified, (step * adaptive) * rect, step), exp_avg, exp_avg_sq


@triton.jit
def _lion_scalars(row, progress, WIDE: tl.constexpr):
    lr = _lr(row)
    decay_factor = 1.0 - lr * tl.load(row + WEIGHT_DECAY)
    one_minus_beta1, one_minus_beta2 = 1.0 - tl.load(row + BETA1), 1.0 - tl.load(row + BETA2)
    return (-lr).to(WIDE), decay_factor.to(WIDE), one_minus_beta1.to(WIDE), one_minus_beta2.to(WIDE)


@triton.jit
def _lion(w, g, exp_avg, scalars):
    # Lion (Chen et al., arXiv 2302.06675).
    neg_lr, decay_factor, one_minus_beta1, one_minus_beta2 = scalars
    c = _lerp(exp_avg, g, one_minus_beta1)
    exp_avg = _lerp(exp_avg, g, one_minus_beta2)
    w = w * decay_factor  # a factor of 1 rounds nothing
    return _fma(neg_lr, (c > 0).to(w.dtype) - (c < 0).to(w.dtype), w), exp_avg


# The rules by code: scalars, formula, states of a group.


@triton.jit
def _scalars(row, progress, RULE: tl.constexpr, WIDE: tl.constexpr):
    if RULE == SGD:
        return _sgd_scalars(row, progress, WIDE)
    elif RULE == ADAM:
        return _adam_scalars(row, progress, WIDE)
    elif RULE == RMSPROP:
        return _rmsprop_scalars(row, progress, WIDE)
    elif RULE == ADAGRAD:
        return _adagrad_scalars(row, progress, WIDE)
    elif RULE == NADAM:
        return _nadam_scalars(row, progress, WIDE)
    elif RULE == RADAM:
        return _radam_scalars(row, progress, WIDE)
    else:
        return _lion_scalars(row, progress, WIDE)


@triton.jit
def _apply(w, g, s0, s1, s2, scalars, RULE: tl.constexpr, STATES: tl.constexpr):
    if RULE == SGD:
        w, s0 = _sgd(w, g, s0, scalars, STATES)
    elif RULE == ADAM:
        w, s0, s1, s2 = _adam(w, g, s0, s1, s2, scalars, STATES)
    elif RULE == RMSPROP:
        w, s0, s1, s2 = _rmsprop(w, g, s0, s1, s2, scalars, STATES)
    elif RULE == ADAGRAD:
        w, s0 = _adagrad(w, g, s0, scalars)
    elif RULE == NADAM:
        w, s0, s1 = _nadam(w, g, s0, s1, scalars)
    elif RULE == RADAM:
        w, s0, s1 = _radam(w, g, s0, s1, scalars)
    else:
        w, s0 = _lion(w, g, s0, scalars)
    return w, s0, s1, s2


@triton.jit
def _states(row, RULE: tl.constexpr):
    if RULE == SGD:
        return (tl.load(row + BETA1) != 0).to(tl.int32)
    elif RULE == ADAM:
        return 3 + 4 * _flag(row, AMSGRAD).to(tl.int32)
    elif RULE == RMSPROP:
        return 1 + 2 * (tl.load(row + BETA1) > 0).to(tl.int32) + 4 * _flag(row, CENTERED).to(tl.int32)
    else:  # always the same
        return 0
