# SPDX-License-Identifier: Apache-2.0
"""The truth, from the definitions ŷ_k = exp(z_k) / Σ_j exp(z_j) and L = −Σ_k y_k log ŷ_k.

`truth` has two engines that share nothing with the library: up to 1000 classes mpmath at 80
digits evaluates the definitions literally; above, NumPy in long double sums "all others" instead
of subtracting. Next to each quantity stands the error that docs/forms.md section 11 allows a
computation in the given accumulation dtype, so that a test has no tolerance of its own.

Everything else (losses, gradients) is combined from these in long double, in forms that do not
cancel. Convention, as in the design: a target of 0 at a logit of −inf contributes 0.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import mpmath
import numpy as np

DIGITS = 80
LITERAL_UP_TO = 1000  # classes
Wide = np.longdouble


class Value(NamedTuple):
    """A true value and the absolute error allowed to a computation in the accumulation dtype."""

    value: np.ndarray
    bound: np.ndarray


class Truth(NamedTuple):
    """What every function of the rows `z [R, V]` is made of."""

    p: Value  # ŷ [R, V]
    complement: Value  # 1 − ŷ [R, V]
    nll: Value  # −log ŷ [R, V]
    lse: Value  # [R]
    top: np.ndarray  # [R] the first argmax
    confident: np.ndarray  # [R] r < 1: the maximum holds more than half
    u: float  # unit roundoff of the accumulation dtype
    tiny: float  # its smallest normal number: XLA may give 0 for anything smaller
    chain: float  # d of section 11
    z: np.ndarray  # the rows themselves
    accumulate: np.dtype


def _apply(function, numbers):
    return np.vectorize(function, otypes=[object])(numbers)


def wide(numbers):
    """From mpf to long double: the nearest float64 and the rest."""
    high = np.vectorize(float, otypes=[np.float64])(numbers)
    finite = np.isfinite(high)
    rest = np.where(finite, numbers, 0) - np.where(finite, high, 0)
    return high.astype(Wide) + np.vectorize(float, otypes=[np.float64])(rest)


def _literal(z):
    return [np.stack(parts) for parts in zip(*map(_literal_row, z), strict=True)]


def _literal_row(z):
    # 1 − ŷ at the top is as small as the next term, and keeps 80 digits for all float64 has.
    small = min(np.ptp(z[np.isfinite(z)]), -np.log(np.finfo(np.float64).tiny))
    with mpmath.workdps(DIGITS + int(small / np.log(10))):
        exponentials = _apply(lambda v: mpmath.exp(mpmath.mpf(float(v))), z)
        total = exponentials.sum()
        p = exponentials / total
        nll = _apply(lambda v: -mpmath.log(v), p)
        return wide(p), wide(1 - p), wide(nll), wide(np.array(mpmath.log(total)))


def _long_double(z):
    z = z.astype(Wide)
    rows, top = np.arange(len(z)), z.argmax(axis=-1)
    m = z[rows, top]
    e = np.exp(z - m[:, None])
    total = e.sum(axis=-1)[:, None]
    without_top = e.copy()
    without_top[rows, top] = 0
    others = total - e  # exact enough anywhere but at the top, where e = 1
    others[rows, top] = without_top.sum(axis=-1)
    with np.errstate(divide="ignore"):
        nll = np.log1p(others / e)
    return e / total, others / total, nll, m + np.log1p(without_top.sum(axis=-1))


def truth(z: np.ndarray, accumulate, *, engine: str | None = None) -> Truth:
    """The truth about rows with a finite maximum, and the bounds for sums in `accumulate`.

    Section 11 with α = 2, λ = 4. Its d is the depth of a tree up to 1000 classes. Above, the
    section's last remark: terms are also added one after the other, roundings have either sign,
    and d grows as √V.
    """
    z = np.asarray(z, np.float64)
    classes = z.shape[-1]
    literal = classes <= LITERAL_UP_TO if engine is None else engine == "literal"
    p, complement, nll, lse = _literal(z) if literal else _long_double(z)

    info = np.finfo(accumulate)
    u, tiny = float(info.eps) / 2, float(info.tiny)
    chain = _chain(classes)
    rows, top = np.arange(len(z)), z.argmax(axis=-1)
    m = z[rows, top]
    gap = np.where(np.isneginf(z), 0, m[:, None] - z)  # γ_k; a class at −inf has no terms
    mean = (p * gap).sum(axis=-1)  # Γ
    rest = complement[rows, top]
    mean_of_rest = mean / np.where(rest > 0, rest, 1)  # γ̄
    at_top = np.zeros(z.shape, bool)
    at_top[rows, top] = True
    base = 6 + chain
    # Where exp underflows it may give 0: one smallest normal number for each class.
    floor = tiny * classes
    finite_nll = np.where(np.isfinite(nll), nll, 0)
    p_bound = (base + gap + mean[:, None]) * u * p + np.where(np.isneginf(z), 0, tiny)
    own = np.where(at_top, mean_of_rest[:, None], mean[:, None])
    complement_bound = (base + own) * u * complement + floor
    nll_bound = u * (base * finite_nll + np.where(at_top, own * finite_nll, own)) + floor
    lse_bound = u * np.abs(lse) + nll_bound[rows, top]
    return Truth(
        Value(p, p_bound),
        Value(complement, complement_bound),
        Value(nll, nll_bound),
        Value(lse, lse_bound),
        top,
        rest < p[rows, top],
        u,
        tiny,
        chain,
        z,
        np.dtype(accumulate),
    )


def _chain(classes: int) -> float:
    return max(10.0, classes**0.5) if classes > 1000 else 10.0


# Values: of a Truth, and targets where the function has some.


def nll(t: Truth, labels: np.ndarray) -> Value:
    """The loss of an integer label, or of several `[R, K]`."""
    rows = np.arange(len(labels)).reshape(-1, *(1,) * (labels.ndim - 1))
    return Value(t.nll.value[rows, labels], t.nll.bound[rows, labels])


def cross_entropy(t: Truth, y: np.ndarray) -> Value:
    """−Σ_k y_k log ŷ_k: the errors of its terms, and of adding them."""
    y = y.astype(Wide)
    terms = np.where(y == 0, 0, y * np.where(y == 0, 0, t.nll.value))
    bound = (np.abs(y) * t.nll.bound).sum(-1) + (t.chain + 1) * t.u * np.abs(terms).sum(-1)
    return Value(terms.sum(-1), bound)


def log_probabilities(t: Truth) -> Value:
    return Value(-t.nll.value, t.nll.bound)


# Gradients with respect to the logits, for the cotangent g.


def nll_gradient(t: Truth, labels: np.ndarray, g: np.ndarray) -> Value:
    """The gradient g (ŷ − y) for a one-hot y: relative to each entry, also at the label."""
    rows = np.arange(len(labels))
    value, bound = t.p.value.copy(), t.p.bound.copy()
    value[rows, labels] = -t.complement.value[rows, labels]
    bound[rows, labels] = t.complement.bound[rows, labels]
    return _scaled(Value(value, bound), g, t)


def several_gradient(t: Truth, labels: np.ndarray, g: np.ndarray) -> Value:
    """Of Σ_k g_k nll_k with `labels` and g `[R, K]`: R ŷ_i − Γ_i (1 − ŷ_i), equation (66).

    Γ_i sums g over the labels that are class i, and R over the others. Where an entry is at most
    1/2, ŷ_i − 1 may be formed by subtraction; K terms are added in any order, twice.
    """
    g, (n, count) = g.astype(Wide), labels.shape
    own, size = np.zeros_like(t.p.value), np.zeros_like(t.p.value)
    at = np.arange(n)[:, None], labels
    np.add.at(own, at, g)
    np.add.at(size, at, np.abs(g))
    is_own = np.arange(t.p.value.shape[-1])[:, None] == labels[:, None, :]
    others = np.where(is_own, 0, g[:, None, :])
    rest, rest_size = others.sum(-1), np.abs(others).sum(-1)
    (p, p_error), (complement, error) = t.p, t.complement
    error = error + np.where(complement < 0.5, 0, p_error)
    terms = rest_size * p + size * complement
    bound = size * error + rest_size * p_error + 2 * (count + 6) * t.u * terms
    return Value(rest * p - own * complement, _or_underflow(bound, t))


def cross_entropy_gradient(t: Truth, y: np.ndarray, g: np.ndarray) -> Value:
    """The gradient g (Y ŷ − y), relative to Y ŷ + y: no form does better (section 6)."""
    y = y.astype(Wide)
    total = y.sum(-1, keepdims=True)
    size = np.abs(y).sum(-1, keepdims=True)
    value = (total - y) * t.p.value - y * t.complement.value
    bound = (
        size * t.p.bound
        + np.abs(y) * t.complement.bound
        + (t.chain + 6) * t.u * (size * t.p.value + np.abs(y))
    )
    return _scaled(Value(value, bound), g, t)


def cross_entropy_label_gradient(t: Truth, y: np.ndarray, g: np.ndarray) -> Value:
    """With respect to the targets: g (lse − z) = −g log ŷ."""
    del y
    return _scaled(t.nll, g, t)


def lse_gradient(t: Truth, g: np.ndarray) -> Value:
    return _scaled(t.p, g, t)


def softmax_gradient(t: Truth, g: np.ndarray) -> Value:
    """ŷ_i (g_i − Σ_k g_k ŷ_k), relative to ŷ_i (|g_i − c| + Σ_k |g_k − c| ŷ_k), section 7."""
    g, p = g.astype(Wide), t.p.value
    at_top = g[np.arange(len(g)), t.top][:, None]
    shifted = g - at_top
    bracket = shifted - (shifted * p).sum(-1, keepdims=True)
    distance = np.abs(g - np.where(t.confident[:, None], at_top, 0))
    size = distance + (distance * p).sum(-1, keepdims=True)
    spread = (distance * t.p.bound).sum(-1, keepdims=True)
    bound = t.p.bound * size + p * (spread + (t.chain + 4) * t.u * size)
    return Value(p * bracket, _or_underflow(bound, t))


def log_softmax_gradient(t: Truth, g: np.ndarray) -> Value:
    """g_i − ŷ_i Σ g: minus the cross-entropy's gradient with g for the targets."""
    value, bound = cross_entropy_gradient(t, g, np.ones(len(g)))
    return Value(-value, bound)


def _scaled(v: Value, g: np.ndarray, t: Truth) -> Value:
    g = g.astype(Wide)[:, None]
    return Value(g * v.value, _or_underflow(np.abs(g) * (v.bound + t.u * np.abs(v.value)), t))


def _or_underflow(bound: np.ndarray, t: Truth, times: int = 1) -> np.ndarray:
    """XLA may give 0 for what is smaller than normal numbers; what is exactly 0 stays exactly 0."""
    return bound + np.where(bound > 0, times * t.tiny, 0)


# Log-probabilities with lse and entropy, and the Jacobian of softmax.


def rounded(v: Value, t, roundings) -> Value:
    finite = np.where(np.isfinite(v.value), np.abs(v.value), 0)
    return Value(v.value, v.bound + roundings * t.u * finite)


def _first(a, t):
    return a[np.arange(len(a)), t.top]


def _gaps(t):
    """γ_k; their mean Γ over ŷ; its bound: that of ŷ, half an ulp of γ, product and sum."""
    first = _first(t.nll.value, t)[:, None]
    gap = np.where(np.isfinite(t.nll.value), t.nll.value, first) - first
    mean = (t.p.value * gap).sum(-1)
    return gap, mean, (t.p.bound * gap).sum(-1) + (t.chain + 3) * t.u * mean


def log_probs(t, labels) -> Value:
    """The three fields in a last axis, K numbers of K labels; the entropy is log1p(r) + Γ."""
    _, mean, bound = _gaps(t)
    entropy = Value(_first(t.nll.value, t) + mean, bound + _first(t.nll.bound, t))
    loss, error = nll(t, labels)
    fields = (Value(-loss, error), t.lse, rounded(entropy, t, 1))
    columns = ([a.reshape(len(a), -1) for a in part] for part in zip(*fields, strict=True))
    return Value(*(np.concatenate(part, -1) for part in columns))


def log_probs_gradient(t, labels, g) -> Value:
    """ŷ_i (γ_i − Γ) for the entropy: the errors of ŷ and of the bracket, and four roundings."""
    gap, mean, mean_bound = _gaps(t)
    bracket, of_entropy = gap - mean[:, None], g[:, -1:].astype(Wide)
    inner = mean_bound[:, None] + t.u * (gap + 4 * np.abs(bracket))
    bound = np.abs(of_entropy) * (t.p.bound * np.abs(bracket) + t.p.value * inner)
    terms = [
        nll_gradient(t, labels, -g[:, 0])
        if labels.ndim == 1
        else several_gradient(t, labels, -g[:, :-2]),
        lse_gradient(t, g[:, -2]),
        Value(of_entropy * t.p.value * bracket, _or_underflow(bound, t)),
    ]
    value, bound = (np.sum(a, axis=0) for a in zip(*terms, strict=True))
    return Value(value, bound + 3 * t.u * sum(np.abs(v.value) for v in terms))


def _factors(p, complement):
    """1 − ŷ_j on the diagonal, ŷ_j off it."""
    return np.where(np.eye(p.shape[-1], dtype=bool), complement[:, None, :], p[:, None, :])


def jacobian(t) -> Value:
    """ŷ_i (δ_ij − ŷ_j): the errors of both factors, and the product's."""
    factor, error = (_factors(*pair) for pair in zip(t.p, t.complement, strict=True))
    p, p_bound = (a[:, :, None] for a in t.p)
    bound = p_bound * (factor + error) + p * error + 2 * t.u * p * factor
    return Value(p * factor * (2 * np.eye(p.shape[1]) - 1), _or_underflow(bound, t))


def jacobian_gradient(t, g) -> Value:
    """ŷ_k (c_k − Σ c ŷ) with c_k = G_kk − Σ_j (G_kj + G_jk) ŷ_j, through ŷ_i and 1 − ŷ_j.

    S sums the absolute terms on every way from G to dz_k. Bound: S with each ŷ and 1 − ŷ at the end
    of its own bound, less S; and the roundings of three nested sums and a dozen products.
    """
    g, p = g.astype(Wide), t.p.value

    def terms(p, complement):
        of_own = np.abs(np.einsum("nii->ni", g)) * p
        a = (np.abs(g) * _factors(p, complement)).sum(-1) + (np.abs(g) * p[:, :, None]).sum(1)
        every = (of_own * (1 + complement) + a * p).sum(-1, keepdims=True)
        return p * (a + of_own + every)

    s = terms(p, t.complement.value)
    widest = terms(*(v.value + v.bound for v in (t.p, t.complement)))
    c = np.einsum("nii->ni", g) - ((g + g.swapaxes(1, 2)) * p[:, None, :]).sum(-1)
    bound = _or_underflow((widest - s) + (3 * t.chain + 12) * t.u * s, t, p.shape[-1])
    return Value(p * (c - (c * p).sum(-1, keepdims=True)), bound)


# Two softmaxes, q of the logits z and p of the target's t, and the divergences of the two.


class Pair(NamedTuple):
    """What the divergences of the rows z and t `[R, V]` are made of; in a column what is `[R, 1]`.

    The errors are those of section 11 in the accumulation dtype. The larger of p and q has a
    relative one, δ an absolute one; the smaller is the larger times e^−|δ|.
    """

    p: np.ndarray
    q: np.ndarray
    delta: np.ndarray  # log q − log p; ±inf where one is 0, and 0 where both are
    x: np.ndarray  # δ + D = (z − max z) − (t − max t), or 0 where that is not finite
    excess: np.ndarray  # q − p
    larger_error: np.ndarray
    delta_error: np.ndarray  # of each class, besides that of D
    change_error: np.ndarray  # of D, a column
    floor: float  # a smallest normal number for each class: below that, XLA may give 0
    u: float
    chain: float

    @property
    def smaller_error(self) -> np.ndarray:
        """Relative, of the smaller of p and q, beside that of the larger: δ's, and e^−|δ|."""
        return self.delta_error + self.change_error + 3 * self.u


def pair(z: np.ndarray, t: np.ndarray, accumulate, *, engine: str | None = None) -> Pair:
    """Of rows with finite maxima, and the bounds for sums in `accumulate`."""
    z, t = (np.ascontiguousarray(a, np.float64) for a in (z, t))
    return _pair(z.shape, z.tobytes(), t.tobytes(), np.dtype(accumulate), engine)


@lru_cache(maxsize=8)
def _pair(shape, z, t, accumulate, engine):
    z, t = (np.frombuffer(a).reshape(shape) for a in (z, t))
    classes = shape[-1]
    literal = classes <= LITERAL_UP_TO if engine is None else engine == "literal"
    x, change, p, q = _literal_pair(z, t) if literal else _long_double_pair(z, t)
    in_z, in_t = np.isfinite(z), np.isfinite(t)
    finite = np.where(in_z & in_t, x - change, 0)
    delta = np.where(in_z == in_t, finite, np.where(in_z, np.inf, -np.inf))
    near = np.abs(finite) < 1
    excess = np.where(near & (in_z == in_t), p * np.expm1(np.where(near, finite, 0)), q - p)

    info = np.finfo(accumulate)
    u, chain = float(info.eps) / 2, _chain(classes)
    base = 6 + chain
    (gap_q, mean_q, log_q), (gap_p, mean_p, log_p) = _spread(z, q), _spread(t, p)
    larger = base + np.where(q < p, gap_p + mean_p, gap_q + mean_q)
    # D = log1p(Σ), Σ = Σ p (e^x − 1) = e^D − 1: of each term x is rounded once. Where Σ is far from
    # 0, log1p of one remainder less that of the other.
    bounded = np.minimum(x, 50), np.minimum(change, 50)
    grown = q * np.exp(bounded[1])  # p e^x
    terms = np.abs(grown - p) * (larger + chain + 4) + np.maximum(grown, p) * np.abs(x)
    by_sum = 2 * terms.sum(-1, keepdims=True) + 6 * np.abs(change)
    by_remainders = base * (log_q + log_p) + mean_q + mean_p
    return Pair(
        p,
        q,
        delta,
        x,
        excess,
        u * larger,
        u * (np.abs(x) + np.abs(finite)),
        u * np.where(np.abs(change) < 0.3, by_sum, np.maximum(by_sum, by_remainders)),
        float(info.tiny) * classes,
        u,
        chain,
    )


def _spread(z, p):
    """γ of each class; their mean Γ over p, and log1p(r), in columns."""
    gap = np.where(np.isfinite(z), z.max(-1, keepdims=True) - z, 0)
    return gap, (p * gap).sum(-1, keepdims=True), -np.log(p.max(-1, keepdims=True))


def _literal_pair(z, t):
    parts = (_literal_pair_of_row(*rows) for rows in zip(z, t, strict=True))
    x, change, p, q = (np.stack(part) for part in zip(*parts, strict=True))
    return x, change[:, None], p, q


def _literal_pair_of_row(z, t):
    counts = np.isfinite(z) & np.isfinite(t)
    with mpmath.workdps(DIGITS):
        z, t = (_apply(lambda v: mpmath.mpf(float(v)), row) for row in (z, t))
        z, t = z - z.max(), t - t.max()
        e_z, e_t = (_apply(mpmath.exp, row) for row in (z, t))
        change = mpmath.log(e_z.sum() / e_t.sum())
        x = np.where(counts, z, 0) - np.where(counts, t, 0)
        return wide(x), wide(np.array(change)), wide(e_t / e_t.sum()), wide(e_z / e_z.sum())


def _long_double_pair(z, t):
    """With D from e^x − 1 where it is small: a difference of logarithms would lose digits.

    Enough for float32; for float64 where δ ~ 1, as x is rounded once.
    """
    counts = np.isfinite(z) & np.isfinite(t)
    z, t = (row.astype(Wide) - row.max(-1, keepdims=True) for row in (z, t))
    x = np.where(counts, z, 0) - np.where(counts, t, 0)
    e_z, e_t = np.exp(z), np.exp(t)
    total, total_t = (e.sum(-1, keepdims=True) for e in (e_z, e_t))
    grown = np.where(np.abs(x) < 1, e_t * np.expm1(np.where(np.abs(x) < 1, x, 0)), e_z - e_t)
    change = grown.sum(-1, keepdims=True) / total_t
    apart = np.log(total) - np.log(total_t)
    change = np.where(np.abs(change) < 0.5, np.log1p(np.maximum(change, -0.5)), apart)
    return x, change, e_t / total_t, e_z / total


def _beyond(function, x, coefficient):
    """Σ_n c_n x^n from n = 2 on where x is small, the function itself elsewhere."""
    near = np.abs(x) < 0.125
    small, series = np.where(near, x, 0).astype(Wide), Wide(0)
    for n in range(22, 1, -1):
        series = small * series + coefficient(n)
    return np.where(near, small * small * series, function(x))


def exp_beyond_linear(x):
    """The rest e^x − 1 − x."""
    return _beyond(lambda x: np.expm1(x) - x, x, lambda n: 1 / Wide(math.factorial(n)))


def log_beyond_linear(x):
    """The rest x − log(1 + x)."""
    return _beyond(lambda x: x - np.log1p(x), x, lambda n: Wide(-1) ** n / n)


def kl_divergence(t: Pair) -> Value:
    """Σ p (e^δ − 1 − δ). What the δ share, an error of D, changes it by its square: Σ (q − p) = 0.

    Where |δ| ≥ ½ a term is the difference of q − p and p δ.
    """
    d = np.where(np.isfinite(t.delta), t.delta, 0)
    near = np.abs(d) < 0.5
    terms = t.p * exp_beyond_linear(np.where(near, d, 0))
    terms = np.where(near & np.isfinite(t.delta), terms, t.excess - t.p * d)
    terms = np.where(np.isneginf(t.delta), np.inf, terms)
    finite = np.where(np.isfinite(terms), terms, 0)
    larger, smaller = np.maximum(t.p, t.q), np.minimum(t.p, t.q)
    parts = np.where(near, 10 * finite, 4 * larger + 3 * t.p * np.abs(d))
    bound = (t.larger_error + (t.chain + 2) * t.u) * finite + t.u * parts
    bound += np.abs(t.excess) * t.delta_error + smaller * t.change_error**2
    return Value(terms.sum(-1), bound.sum(-1) + t.floor)


def kl_gradient(t: Pair, g: np.ndarray) -> Value:
    """By the logits, g (q − p): relative to it and, by δ's error, to the smaller of the two."""
    bound = (t.larger_error + 4 * t.u) * np.abs(t.excess)
    bound += 2 * np.minimum(t.p, t.q) * t.smaller_error
    return _of_cotangent(t.excess, bound, g, t)


def kl_target_gradient(t: Pair, g: np.ndarray) -> Value:
    """By the target's logits, g p (δ̄ − δ). D drops out, and x has one rounding."""
    return _own_gradient(t, g, t.p, t.p < t.q, t.x, t.u * np.abs(t.x))


def _own_gradient(t, g, p, is_smaller, v, error):  # noqa: PLR0917
    """The gradient g p (v̄ − v) with v̄ = Σ p v, where v has an absolute error.

    All are measured from v at the maximum, so that nothing is subtracted there.
    """
    p_error = t.larger_error + is_smaller * t.smaller_error
    top = p == p.max(-1, keepdims=True)
    alone = top & (top.sum(-1, keepdims=True) == 1)
    mean_at_top = lambda a: (np.where(top, a, 0).sum(-1) / top.sum(-1))[:, None]  # noqa: E731
    reference, reference_error = mean_at_top(v), mean_at_top(error + 2 * t.u * np.abs(v))
    distance = np.where(alone, 0, v - reference)
    error = np.where(alone, 0, error + reference_error + 2 * t.u * np.abs(distance))
    of_mean = p * (error + (p_error + (2 * t.chain + 6) * t.u) * (np.abs(v) + np.abs(reference)))
    mean = (p * distance).sum(-1, keepdims=True)
    bracket = mean - distance
    error = error + np.where(alone, 0, of_mean).sum(-1, keepdims=True) + t.u * np.abs(bracket)
    bound = p * error + p_error * np.abs(p * bracket)
    # An underflow of p leaves out as much times v.
    return _of_cotangent(p * bracket, bound + np.where(p > 0, np.abs(v).max() * t.floor, 0), g, t)


def _of_cotangent(value, bound, g, t):
    g = np.asarray(g, Wide)[:, None]
    value = g * value
    bound = np.abs(g) * bound + 2 * t.u * np.abs(value)
    return Value(value, np.where(bound > 0, bound + (1 + np.abs(g)) * t.floor, 0))


class Mixed(NamedTuple):
    """Of p or q and the mixture m, for each class."""

    log: Value  # log(m / probability), 0 where that is infinite
    cost: Value  # probability · λ(m / probability − 1) with λ(v) = v − log(1 + v)


def _mixed(t: Pair, weight) -> tuple[Mixed, Mixed]:
    """Of p and of q, for m = (1 − w) p + w q.

    With v = m / probability − 1 the error of λ is λ'(v) = v / (1 + v) times that of v; where |v| is
    not small, v and log(1 + v) are subtracted.
    """
    w = _column(weight)
    both = t.p + t.q > 0
    m = np.where(both, (1 - w) * t.p + w * t.q, 1)
    largest = 1 + np.abs(np.log(w)) + np.abs(np.log(1 - w))
    parts = []
    for own, other, delta, rest in ((t.p, t.q, t.delta, w), (t.q, t.p, -t.delta, 1 - w)):
        counts = both & ~np.isposinf(delta)
        v = rest * np.expm1(np.where(counts, delta, 0))
        log = np.log1p(v)
        change, is_smaller = rest * np.abs(t.excess), own < other  # |v| times the probability
        error = 6 * t.u * change + rest * np.minimum(own, other) * t.smaller_error
        error = np.where(is_smaller, error + rest * other * t.smaller_error, error)
        log_error = np.where(both, error / m, 0) + 6 * t.u * np.abs(log)
        log_error += np.where(is_smaller & (v > 0.4), 6 * t.u * largest, 0)
        cost = np.where(counts, own * log_beyond_linear(v), rest * other)
        bound = cost * (t.larger_error + is_smaller * t.smaller_error + 12 * t.u)
        bound += change * error / m
        apart = 4 * t.u * (change + own * np.abs(log)) + own * log_error
        bound += np.where((v < -0.4) | (v > 0.4), apart, 0)
        parts.append(Mixed(Value(log, log_error), Value(cost, bound)))
    return parts[0], parts[1]


def js_divergence(t: Pair, weight) -> Value:
    """(1 − w) Σ p λ(m/p − 1) + w Σ q λ(m/q − 1): terms ≥ 0."""
    of_p, of_q = (part.cost for part in _mixed(t, weight))
    w = _column(weight)
    terms = (1 - w) * of_p.value + w * of_q.value
    bound = (1 - w) * of_p.bound + w * of_q.bound + (t.chain + 4) * t.u * terms
    return Value(terms.sum(-1), bound.sum(-1) + t.floor)


def js_gradient(t: Pair, weight, g: np.ndarray) -> Value:
    """By the logits, g w q (v̄ − v) with v = log(m / q)."""
    log, error = _mixed(t, weight)[1].log
    return _own_gradient(t, np.asarray(weight, Wide) * g, t.q, t.q < t.p, log, error)


def js_target_gradient(t: Pair, weight, g: np.ndarray) -> Value:
    """By the target's logits, g (1 − w) p (v̄ − v) with v = log(m / p)."""
    log, error = _mixed(t, weight)[0].log
    return _own_gradient(t, (1 - np.asarray(weight, Wide)) * g, t.p, t.p < t.q, log, error)


def js_weight_gradient(t: Pair, weight, g: np.ndarray) -> Value:
    """The gradient g (KL(q ‖ m) − KL(p ‖ m)), relative to what is subtracted."""
    of_p, of_q = (part.cost for part in _mixed(t, weight))
    bound = of_q.bound + of_p.bound + (t.chain + 4) * t.u * (of_q.value + of_p.value)
    true = (of_q.value - of_p.value).sum(-1)
    return Value(g * true, np.abs(g) * (bound.sum(-1) + 2 * t.u * np.abs(true) + t.floor))


def _column(weight):
    """One for all rows, or one for each."""
    return np.asarray(weight, Wide).reshape(-1, 1)


# The weighted log-sum-exp of one row, literally at 80 digits.


def weighted_logsumexp(a: np.ndarray, b: np.ndarray):
    """(log |S|, sign S, ∂/∂a, ∂/∂b, Σ |b| exp(a) / |S|) of one row, S = Σ b exp(a)."""
    with mpmath.workdps(DIGITS):
        e = _apply(lambda v: mpmath.exp(mpmath.mpf(float(v))), np.asarray(a, np.float64))
        terms = _apply(lambda v: mpmath.mpf(float(v)), np.asarray(b, np.float64)) * e
        total = terms.sum()
        condition = float(np.abs(terms).sum() / abs(total))
        out = float(mpmath.log(abs(total)))
        return out, float(mpmath.sign(total)), wide(terms / total), wide(e / total), condition
