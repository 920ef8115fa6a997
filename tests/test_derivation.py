# SPDX-License-Identifier: Apache-2.0
r"""Every numbered equation of docs/derivation.md, under its number.

An equation's left-hand side is taken from the definitions (1) and (2) in 540-digit arithmetic,
its derivatives as central differences with a step of 1e-130 (an error of order 1e-260), and its
right-hand side is computed as written, in float64. The two may differ by what rounding makes of
the right-hand side: ``UNITS`` u times ``scale``, the sum of the absolute values of its terms.
Rows have at most 6 classes, so a side takes at most some 30 operations of error u or 2u, and each
logit's gap adds as many u again (equation 41). Where the document says that nothing cancels,
``scale`` is the true value: the tolerance is relative, down to probabilities of e^-200.

The bounds of section 11 are checked in float32, with correctly rounded exp and log1p
(alpha = lambda = 1) and a sum in a tree, so that they must hold as they stand.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mpmath
import numpy as np
import pytest

DOCUMENT = (Path(__file__).parents[1] / "docs" / "derivation.md").read_text(encoding="utf-8")
EQUATIONS: dict[int, str] = {}
STEP = mpmath.mpf(10) ** -130
FLOOR = mpmath.mpf(10) ** -240  # what a difference may leave of a derivative that is 0
U = 2.0**-53
UNITS = 40


@pytest.fixture(autouse=True)
def _precision():
    with mpmath.workdps(540):
        yield


def equation(number: int, latex: str):
    """Mark a test as the check of the equation `number`, which the document displays as `latex`."""

    def mark(test):
        assert number not in EQUATIONS, f"two tests for equation ({number})"
        EQUATIONS[number] = latex
        return test

    return mark


def _squeeze(latex: str) -> str:
    return re.sub(r"\s+", "", latex)


def test_every_displayed_equation_is_numbered_and_tested_as_displayed():
    blocks = re.findall(r"^\$\$\n(.*?)\n\$\$$", DOCUMENT, re.DOTALL | re.MULTILINE)
    tagged = [re.fullmatch(r"(.*)\\tag\{(\d+)\}", block, re.DOTALL) for block in blocks]
    assert len(blocks) * 2 == DOCUMENT.count("$$")
    assert all(tagged), "an equation without a number"
    shown = {int(match[2]): _squeeze(match[1]) for match in tagged if match}
    assert list(shown) == list(range(1, len(blocks) + 1))
    tested = {number: _squeeze(latex) for number, latex in EQUATIONS.items()}
    assert sorted(tested) == sorted(shown)
    assert tested == shown


# The rows. `MILD` rows also suit the textbook's forms; the others overflow or cancel in them.


class Case(NamedTuple):
    z: np.ndarray
    y: np.ndarray


def _one_hot(size: int, label: int | np.integer) -> np.ndarray:
    return np.eye(size)[label]


_RNG = np.random.default_rng(20)
MILD = {
    "any targets": Case(_RNG.normal(size=5), _RNG.uniform(size=5)),
    "a distribution": Case(_RNG.normal(size=6), _RNG.dirichlet(np.ones(6))),
    "a large target sum": Case(3 * _RNG.normal(size=4), 7 * _RNG.uniform(size=4)),
    "targets all zero": Case(_RNG.normal(size=3), np.zeros(3)),
    "one class": Case(np.array([0.3]), np.array([0.7])),
    "one-hot": Case(_RNG.normal(size=5), _one_hot(5, 2)),
    "all equal": Case(np.full(4, 0.25), _RNG.uniform(size=4)),
    "two maxima": Case(np.array([1.5, -0.5, 1.5, 0.1]), _RNG.uniform(size=4)),
}
HARD = {
    "gap 17": Case(np.array([0.1, 17.0, -0.2, 0.4]), _one_hot(4, 1)),
    "gap 200": Case(np.array([0.5, 200.0, -1.0, 0.25, 3.0]), _one_hot(5, 1)),
    "gap 200, wrong": Case(np.array([0.5, 200.0, -1.0, 0.25, 3.0]), _one_hot(5, 3)),
    "three maxima, others far": Case(np.array([2.0, 2.0, -150.0, 2.0]), _RNG.uniform(size=4)),
    "nearly two maxima": Case(np.array([1.0, 1.0 - 1e-9, -3.0]), _one_hot(3, 1)),
    "offset": Case(1e4 + _RNG.normal(size=5), 2 * _RNG.uniform(size=5)),
    "negative offset": Case(-1e4 + 5 * _RNG.normal(size=5), _one_hot(5, 0)),
}


def _over(cases: dict[str, Case]):
    return pytest.mark.parametrize("case", list(cases.values()), ids=list(cases))


textbook = _over(MILD)
exact = _over(MILD | HARD)


# The truth: definitions (1) and (2), in 540 digits.

Row = Sequence[Any]


def _mp(row) -> list:
    return [mpmath.mpf(float(x)) for x in row]


def _softmax(o: Row) -> list:
    exps = [mpmath.exp(x) for x in o]
    total = mpmath.fsum(exps)
    return [x / total for x in exps]


def _loss(o: Row, y: Row):
    return -mpmath.fsum(t * mpmath.log(p) for t, p in zip(y, _softmax(o), strict=True))


def _lse(o: Row):
    return mpmath.log(mpmath.fsum(mpmath.exp(x) for x in o))


def _entropy(o: Row):
    return -mpmath.fsum(p * mpmath.log(p) for p in _softmax(o))


def _moved(o: Row, i: int, by) -> list:
    return [x + by if k == i else x for k, x in enumerate(o)]


def _slope(f: Callable[[Row], Any], o: Row, i: int):
    """The derivative of `f` by its argument `i`, a central difference."""
    return (f(_moved(o, i, STEP)) - f(_moved(o, i, -STEP))) / (2 * STEP)


def _gradient(f: Callable[[Row], Any], o: Row) -> list:
    return [_slope(f, o, i) for i in range(len(o))]


def _jacobian(f: Callable[[Row], list], o: Row) -> list:
    """Entry [i][j] is the derivative of output j by input i."""
    columns = []
    for i in range(len(o)):
        above, below = f(_moved(o, i, STEP)), f(_moved(o, i, -STEP))
        columns.append([(a - b) / (2 * STEP) for a, b in zip(above, below, strict=True)])
    return columns


def _hessian(f: Callable[[Row], Any], o: Row) -> list:
    return [_gradient(lambda x, i=i: _slope(f, x, i), o) for i in range(len(o))]


def _flat(values) -> list:
    if isinstance(values, np.ndarray):
        return _mp(values.ravel())
    if isinstance(values, list):
        return [x for value in values for x in _flat(value)]
    return [mpmath.mpf(values)]


def assert_close(actual: Any, truth: Any, scale: Any = None, units: Any = UNITS):
    """|actual - truth| <= units u scale + FLOOR in every entry; `scale` is the truth by default."""
    actual, truth = _flat(actual), _flat(truth)
    scale = [abs(x) for x in truth] if scale is None else _flat(np.broadcast_to(scale, len(truth)))
    allowed = _flat(np.broadcast_to(units, len(truth)))
    assert len(actual) == len(truth)
    for index, (a, t, s, n) in enumerate(zip(actual, truth, scale, allowed, strict=True)):
        error = abs(a - t)
        assert error <= n * U * s + FLOOR, (index, mpmath.nstr(a, 17), mpmath.nstr(t, 17))


# The right-hand sides' ingredients in float64.


class Stats(NamedTuple):
    m: float
    j: int
    e: np.ndarray
    r: float
    gap: np.ndarray
    units: float  # relative error allowed to a form that does not cancel, in u


def _stats(z: np.ndarray) -> Stats:
    """Equation (18)."""
    j = int(np.argmax(z))
    e = np.exp(z - z[j])
    gap = z[j] - z
    return Stats(z[j], j, e, np.delete(e, j).sum(), gap, UNITS + 2 * gap.max())


def _textbook_softmax(o: np.ndarray) -> np.ndarray:
    return np.exp(o) / np.exp(o).sum()


def _cotangent(case: Case) -> np.ndarray:
    return np.random.default_rng(len(case.z)).normal(size=case.z.shape)


# 1-4. The textbook.


@equation(1, r"\hat y_i = \frac{\exp(o_i)}{\sum_j \exp(o_j)}")
@textbook
def test_softmax(case):
    total = sum(np.exp(o) for o in case.z)
    assert_close(np.array([np.exp(o) / total for o in case.z]), _softmax(_mp(case.z)))


@equation(2, r"L = -\sum_j y_j \log \hat y_j")
@textbook
def test_loss(case):
    log_p = np.log(_textbook_softmax(case.z))
    assert_close(
        -(case.y * log_p).sum(),
        _loss(_mp(case.z), _mp(case.y)),
        scale=(case.y * (1 + abs(log_p))).sum(),
    )


@equation(
    3,
    r"\frac{\partial \hat y_i}{\partial o_i}"
    r"= \frac{\exp(o_i) S - \exp(o_i) \exp(o_i)}{S^2} = \hat y_i (1 - \hat y_i)",
)
@textbook
def test_quotient_rule_same_index(case):
    e, p = np.exp(case.z), _textbook_softmax(case.z)
    truth = [row[i] for i, row in enumerate(_jacobian(_softmax, _mp(case.z)))]
    assert_close((e * e.sum() - e * e) / e.sum() ** 2, truth, scale=p)
    assert_close(p * (1 - p), truth, scale=p)


@equation(
    4,
    r"\frac{\partial \hat y_j}{\partial o_i} = \frac{0 \cdot S - \exp(o_j) \exp(o_i)}{S^2}"
    r"= -\hat y_i \hat y_j \qquad (i \ne j)",
)
@textbook
def test_quotient_rule_different_indices(case):
    e, p = np.exp(case.z), _textbook_softmax(case.z)
    different = ~np.eye(len(e), dtype=bool)
    jacobian = _jacobian(_softmax, _mp(case.z))
    truth = [x for i, row in enumerate(jacobian) for j, x in enumerate(row) if i != j]
    assert_close(((0 * e.sum() - np.outer(e, e)) / e.sum() ** 2)[different], truth)
    assert_close(-np.outer(p, p)[different], truth)


@equation(5, r"\frac{\partial \hat y_j}{\partial o_i} = \hat y_i (\delta_{ij} - \hat y_j)")
@textbook
def test_softmax_jacobian(case):
    p, delta = _textbook_softmax(case.z), np.eye(len(case.z))
    scale = (p[:, None] * (delta + p)).ravel()
    assert_close(p[:, None] * (delta - p), _jacobian(_softmax, _mp(case.z)), scale)


def _loss_gradient(case: Case) -> list:
    return _gradient(lambda o: _loss(o, _mp(case.y)), _mp(case.z))


def _gradient_scale(case: Case) -> np.ndarray:
    return _textbook_softmax(case.z - case.z.max()) * case.y.sum() + case.y


@equation(
    6,
    r"\frac{\partial L}{\partial o_i}"
    r"= -\sum_k y_k \frac{1}{\hat y_k} \frac{\partial \hat y_k}{\partial o_i}",
)
@textbook
def test_chain_rule(case):
    jacobian = np.array(_jacobian(_softmax, _mp(case.z)), dtype=float)
    total = -(case.y * (1 / _textbook_softmax(case.z)) * jacobian).sum(axis=1)
    assert_close(total, _loss_gradient(case), _gradient_scale(case))


@equation(
    7,
    r"\frac{\partial L}{\partial o_i} = -y_i (1 - \hat y_i) + \sum_{k \ne i} y_k \hat y_i",
)
@textbook
def test_gradient_term_by_term(case):
    p, y = _textbook_softmax(case.z), case.y
    others = np.array([sum(y[k] * p[i] for k in range(len(y)) if k != i) for i in range(len(y))])
    assert_close(-y * (1 - p) + others, _loss_gradient(case), _gradient_scale(case))


@equation(
    8,
    r"\frac{\partial L}{\partial o_i} = \hat y_i \sum_k y_k - y_i = Y \hat y_i - y_i",
)
@textbook
def test_gradient_for_any_target_sum(case):
    p = _textbook_softmax(case.z)
    assert_close(p * case.y.sum() - case.y, _loss_gradient(case), _gradient_scale(case))


@equation(9, r"\frac{\partial L}{\partial o_i} = \hat y_i - y_i \qquad (Y = 1)")
@textbook
def test_gradient_for_a_distribution(case):
    case = Case(case.z, (case.y + 0.1) / (case.y + 0.1).sum())
    p = _textbook_softmax(case.z)
    assert_close(p - case.y, _loss_gradient(case), _gradient_scale(case))


@equation(
    10,
    r"\mathrm{lse} = \log \sum_k \exp(o_k), \qquad \log \hat y_i = o_i - \mathrm{lse}",
)
@textbook
def test_lse(case):
    o, lse = _mp(case.z), np.log(np.exp(case.z).sum())
    assert_close(lse, _lse(o), scale=1 + abs(lse))
    truth = [mpmath.log(p) for p in _softmax(o)]
    assert_close(case.z - lse, truth, scale=1 + abs(case.z) + abs(lse))


@equation(11, r"\frac{\partial \mathrm{lse}}{\partial o_i} = \frac{\exp(o_i)}{S} = \hat y_i")
@textbook
def test_lse_gradient(case):
    assert_close(_textbook_softmax(case.z), _gradient(_lse, _mp(case.z)))


@equation(12, r"\frac{\partial L}{\partial y_i} = -\log \hat y_i = \mathrm{lse} - o_i")
@textbook
def test_gradient_by_the_targets(case):
    truth = _gradient(lambda y: _loss(_mp(case.z), y), _mp(case.y))
    lse = np.log(np.exp(case.z).sum())
    scale = 1 + abs(lse) + abs(case.z)
    assert_close(-np.log(_textbook_softmax(case.z)), truth, scale)
    assert_close(lse - case.z, truth, scale)


@equation(13, r"H = -\sum_k \hat y_k \log \hat y_k = \mathrm{lse} - \sum_k \hat y_k o_k")
@textbook
def test_entropy(case):
    p, lse, truth = (
        _textbook_softmax(case.z),
        np.log(np.exp(case.z).sum()),
        _entropy(_mp(case.z)),
    )
    assert_close(-(p * np.log(p)).sum(), truth, scale=1 + (p * abs(np.log(p))).sum())
    assert_close(lse - (p * case.z).sum(), truth, scale=1 + abs(lse) + (p * abs(case.z)).sum())


@equation(
    14,
    r"\frac{\partial H}{\partial o_i} = -\sum_k o_k \hat y_i (\delta_{ik} - \hat y_k)"
    r"= -\hat y_i (o_i - \mathrm{lse} + H)",
)
@textbook
def test_entropy_gradient(case):
    z, p, delta = case.z, _textbook_softmax(case.z), np.eye(len(case.z))
    lse, entropy = np.log(np.exp(z).sum()), -(p * np.log(p)).sum()
    truth = _gradient(_entropy, _mp(z))
    scale = p * (1 + abs(z) + abs(lse) + entropy + (p * abs(z)).sum())
    assert_close(-(z * p[:, None] * (delta - p)).sum(axis=1), truth, scale)
    assert_close(-p * (z - lse + entropy), truth, scale)


def _log_softmax_vjp(case: Case, g: np.ndarray) -> list:
    def inner(o):
        return mpmath.fsum(a * mpmath.log(p) for a, p in zip(_mp(g), _softmax(o), strict=True))

    return _gradient(inner, _mp(case.z))


def _softmax_vjp(case: Case, g: np.ndarray) -> list:
    def inner(o):
        return mpmath.fsum(a * p for a, p in zip(_mp(g), _softmax(o), strict=True))

    return _gradient(inner, _mp(case.z))


@equation(
    15,
    r"\sum_k g_k \frac{\partial \log \hat y_k}{\partial o_i} = g_i - \hat y_i G",
)
@textbook
def test_log_softmax_vjp(case):
    p, g = _textbook_softmax(case.z), _cotangent(case)
    assert_close(g - p * g.sum(), _log_softmax_vjp(case, g), abs(g) + p * abs(g).sum())


@equation(
    16,
    r"\sum_k g_k \frac{\partial \hat y_k}{\partial o_i}"
    r"= \hat y_i \Big(g_i - \sum_k g_k \hat y_k\Big)",
)
@textbook
def test_softmax_vjp(case):
    p, g = _textbook_softmax(case.z), _cotangent(case)
    scale = p * (abs(g) + (p * abs(g)).sum())
    assert_close(p * (g - (g * p).sum()), _softmax_vjp(case, g), scale)


def _loss_hessian(case: Case) -> list:
    return _hessian(lambda o: _loss(o, _mp(case.y)), _mp(case.z))


@equation(
    17,
    r"\frac{\partial^2 L}{\partial o_i \partial o_k} = Y \hat y_i (\delta_{ik} - \hat y_k)",
)
@textbook
def test_hessian(case):
    p, delta, total = _textbook_softmax(case.z), np.eye(len(case.z)), case.y.sum()
    scale = (total * p[:, None] * (delta + p)).ravel()
    assert_close(total * p[:, None] * (delta - p), _loss_hessian(case), scale)


# 5. The same functions in (m, r).


def _true_remainder(z: Row):
    largest = max(z)
    return mpmath.fsum(mpmath.exp(x - largest) for x in z) - 1


@equation(
    18,
    r"m = z_j = \max_k z_k, \qquad e_k = \exp(z_k - m), \qquad r = \sum_{k \ne j} e_k",
)
@exact
def test_remainder(case):
    m, j, e, r, _, units = _stats(case.z)
    assert m == case.z.max()
    assert e[j] == 1
    assert (e <= 1).all()
    assert_close(r, _true_remainder(_mp(case.z)), units=units)


@equation(
    19,
    r"r = \sum_{z_k \lt m} e_k + (n - 1), \qquad n = \text{the number of } k \text{ with } z_k = m",
)
@exact
def test_remainder_with_ties(case):
    m, _, e, _, _, units = _stats(case.z)
    r = e[case.z < m].sum() + ((case.z == m).sum() - 1)
    assert_close(r, _true_remainder(_mp(case.z)), units=units)
    for j in np.flatnonzero(case.z == m):
        assert_close(np.delete(e, j).sum(), _true_remainder(_mp(case.z)), units=units)


@equation(20, r"\hat y_k = \frac{e_k}{1 + r}")
@exact
def test_softmax_from_the_remainder(case):
    s = _stats(case.z)
    assert_close(s.e / (1 + s.r), _softmax(_mp(case.z)), units=s.units)


@equation(21, r"\mathrm{lse} = m + \log(1 + r) = m + \mathrm{log1p}(r)")
@exact
def test_lse_from_the_remainder(case):
    s = _stats(case.z)
    truth, scale = _lse(_mp(case.z)), 1 + abs(s.m) + np.log1p(s.r)
    assert_close(s.m + np.log(1 + s.r), truth, scale)
    assert_close(s.m + np.log1p(s.r), truth, scale)


@equation(22, r"\log \hat y_k = -\big((m - z_k) + \mathrm{log1p}(r)\big)")
@exact
def test_log_softmax_from_the_remainder(case):
    s = _stats(case.z)
    truth = [mpmath.log(p) for p in _softmax(_mp(case.z))]
    assert_close(-(s.gap + np.log1p(s.r)), truth, units=s.units)


@equation(23, r"L = \sum_k y_k (m - z_k) + Y \mathrm{log1p}(r)")
@exact
def test_dense_loss_from_the_remainder(case):
    s = _stats(case.z)
    loss = (case.y * s.gap).sum() + case.y.sum() * np.log1p(s.r)
    assert_close(loss, _loss(_mp(case.z), _mp(case.y)), units=s.units)


@equation(24, r"\mathrm{nll}_t = (m - z_t) + \mathrm{log1p}(r)")
@exact
def test_integer_label_loss_from_the_remainder(case):
    s = _stats(case.z)
    for t in range(len(case.z)):
        truth = _loss(_mp(case.z), _mp(_one_hot(len(case.z), t)))
        assert_close((s.m - case.z[t]) + np.log1p(s.r), truth, units=s.units)


@equation(25, r"H = \mathrm{log1p}(r) + \sum_k \hat y_k (m - z_k)")
@exact
def test_entropy_from_the_remainder(case):
    s = _stats(case.z)
    entropy = np.log1p(s.r) + (s.e / (1 + s.r) * s.gap).sum()
    assert_close(entropy, _entropy(_mp(case.z)), units=s.units)


@equation(26, r"\frac{\partial L}{\partial y_i} = (m - z_i) + \mathrm{log1p}(r)")
@exact
def test_gradient_by_the_targets_from_the_remainder(case):
    s = _stats(case.z)
    truth = _gradient(lambda y: _loss(_mp(case.z), y), _mp(case.y))
    assert_close(s.gap + np.log1p(s.r), truth, units=s.units)


# 6. The gradient.


def _exact_gradient(s: Stats, y: np.ndarray) -> np.ndarray:
    return ((y.sum() * s.e - y) - y * s.r) / (1 + s.r)


@equation(27, r"Y \hat y_i - y_i = \frac{(Y e_i - y_i) - y_i r}{1 + r}")
@exact
def test_gradient_without_cancellation(case):
    s = _stats(case.z)
    truth = _loss_gradient(case)
    assert_close(_exact_gradient(s, case.y), truth, _gradient_scale(case), units=s.units)
    for t in range(len(case.z)):  # one-hot: relative, at every entry
        one_hot = _one_hot(len(case.z), t)
        truth = _loss_gradient(Case(case.z, one_hot))
        assert_close(_exact_gradient(s, one_hot), truth, units=s.units)


@equation(28, r"\hat y_j - 1 = -\frac{r}{1 + r}")
@exact
def test_gradient_at_the_maximum(case):
    s = _stats(case.z)
    truth = [_softmax(_mp(case.z))[j] - 1 for j in np.flatnonzero(case.z == s.m)]
    assert_close([float(-s.r / (1 + s.r))] * len(truth), truth, units=s.units)
    for j in np.flatnonzero(case.z == s.m):
        assert _exact_gradient(s, _one_hot(len(case.z), j))[j] == -s.r / (1 + s.r)


@equation(29, r"1 - \hat y_i = \frac{(1 - e_i) + r}{1 + r}")
@exact
def test_complement_of_a_probability(case):
    s = _stats(case.z)
    truth = [1 - p for p in _softmax(_mp(case.z))]
    assert_close(((1 - s.e) + s.r) / (1 + s.r), truth, units=s.units)


@equation(30, r"g_i - \hat y_i G = -\frac{(G e_i - g_i) - g_i r}{1 + r}")
@exact
def test_log_softmax_vjp_without_cancellation(case):
    s, g = _stats(case.z), _cotangent(case)
    scale = abs(g) + s.e / (1 + s.r) * abs(g).sum()
    assert_close(-_exact_gradient(s, g), _log_softmax_vjp(case, g), scale, units=s.units)
    for t in range(len(case.z)):
        one = -2.5 * _one_hot(len(case.z), t)
        assert_close(-_exact_gradient(s, one), _log_softmax_vjp(case, one), units=s.units)


# 7. The vjp of softmax.


@equation(
    31,
    r"\hat y_i \Big(g_i - \sum_k g_k \hat y_k\Big)"
    r"= \hat y_i \Big((g_i - c) - \sum_k (g_k - c) \hat y_k\Big)",
)
@exact
def test_softmax_vjp_with_a_reference(case):
    s, g = _stats(case.z), _cotangent(case)
    p, truth = s.e / (1 + s.r), _softmax_vjp(case, g)
    for c in (0, -1.75, g[s.j]):
        scale = p * (abs(g - c) + (p * abs(g - c)).sum())
        assert_close(p * ((g - c) - ((g - c) * p).sum()), truth, scale, units=s.units)
    if s.r > 1:  # c = 0 never cancels for a row of the Jacobian
        for g in np.eye(len(p)):
            assert_close(p * (g - (g * p).sum()), _softmax_vjp(case, g), units=s.units)


@equation(
    32,
    r"\hat y_i \Big(g_i - \sum_k g_k \hat y_k\Big)"
    r"= \hat y_i \Big(\frac{s}{1 + r} - h_i\Big), \qquad s = \sum_k h_k e_k",
)
@exact
def test_softmax_vjp_without_cancellation(case):
    s = _stats(case.z)
    p = s.e / (1 + s.r)

    def exact_form(g):
        h = g[s.j] - g
        assert h[s.j] == 0
        return p * ((h * s.e).sum() / (1 + s.r) - h), p * ((p * abs(h)).sum() + abs(h))

    g = _cotangent(case)
    actual, scale = exact_form(g)
    assert_close(actual, _softmax_vjp(case, g), scale, units=s.units)
    if s.r <= 1:  # relative, for a row of the Jacobian
        for g in np.eye(len(p)):
            assert_close(exact_form(g)[0], _softmax_vjp(case, g), units=s.units)


@equation(
    33,
    r"\frac{\partial H}{\partial z_i}"
    r"= \hat y_i \Big((m - z_i) - \sum_k \hat y_k (m - z_k)\Big)",
)
@exact
def test_entropy_gradient_without_cancellation(case):
    s = _stats(case.z)
    p, truth = s.e / (1 + s.r), _gradient(_entropy, _mp(case.z))
    actual = p * (s.gap - (p * s.gap).sum())
    assert_close(actual, truth, p * (s.gap + (p * s.gap).sum()), units=s.units)
    assert_close(actual[s.j], truth[s.j], units=s.units)


# 8. The derivative of the derivative.


@equation(
    34,
    r"\frac{\partial e_i}{\partial z_k} = \delta_{ik} e_i, \qquad"
    r"\frac{\partial r}{\partial z_k} = e_k \qquad (m \text{ constant})",
)
@exact
def test_derivative_of_the_remainder(case):
    s, m = _stats(case.z), mpmath.mpf(float(case.z.max()))
    exps = _jacobian(lambda z: [mpmath.exp(x - m) for x in z], _mp(case.z))
    assert_close(np.diag(s.e), exps, units=s.units)
    remainder = _gradient(lambda z: mpmath.fsum(mpmath.exp(x - m) for x in z) - 1, _mp(case.z))
    assert_close(s.e, remainder, units=s.units)


@equation(
    35,
    r"\frac{\partial}{\partial z_k} \frac{(Y e_i - y_i) - y_i r}{1 + r}"
    r"= \frac{Y \delta_{ik} e_i - y_i e_k}{1 + r} - (Y \hat y_i - y_i) \hat y_k"
    r"= Y \hat y_i (\delta_{ik} - \hat y_k)",
)
@exact
def test_derivative_of_the_gradient(case):
    s, y, total, delta = _stats(case.z), case.y, case.y.sum(), np.eye(len(case.z))
    p, m = s.e / (1 + s.r), mpmath.mpf(float(s.m))
    right = total * p[:, None] * (delta - p)
    scale = total * p[:, None] * (delta + p)

    def gradient(z):  # (27), its m a constant, its r the function of (34)
        e = [mpmath.exp(x - m) for x in z]
        r, big = mpmath.fsum(e) - 1, mpmath.fsum(_mp(y))
        return [((big * a - b) - b * r) / (1 + r) for a, b in zip(e, _mp(y), strict=True)]

    left = np.array(_jacobian(gradient, _mp(case.z)), dtype=object).T.tolist()  # [i][k]
    middle = (total * delta * s.e[:, None] - np.outer(y, s.e)) / (1 + s.r) - np.outer(
        _exact_gradient(s, y), p
    )
    middle_scale = scale + 2 * np.outer(y, p)
    truth = _loss_hessian(case)
    assert_close(right, left, scale.ravel(), units=s.units)
    assert_close(right, truth, scale.ravel(), units=s.units)
    assert_close(middle, truth, middle_scale.ravel(), units=s.units)


# 9. Blocks.


def _merge(ms: list, rs: list) -> tuple:
    """Equations (36) and (37)."""
    biggest = max(ms)
    parts = [
        r if m == biggest else (1 + r) * np.exp(m - biggest) for m, r in zip(ms, rs, strict=True)
    ]
    return biggest, sum(parts) + (sum(m == biggest for m in ms) - 1)


@equation(
    36,
    r"m = M, \qquad r = \sum_b c_b + (n_M - 1), \qquad"
    r"n_M = \text{the number of } b \text{ with } m_b = M",
)
@exact
def test_merging_many_blocks(case):
    units = 2 * _stats(case.z).units
    blocks = [_stats(z) for z in np.array_split(case.z, min(3, len(case.z)))]
    truth = _true_remainder(_mp(case.z))
    m, r = _merge([b.m for b in blocks], [b.r for b in blocks])
    assert m == case.z.max()
    assert_close(r, truth, units=units)
    for order in (blocks, blocks[::-1]):  # and in a loop
        m, r = order[0].m, order[0].r
        for block in order[1:]:
            m, r = _merge([m, block.m], [r, block.r])
        assert m == case.z.max()
        assert_close(r, truth, units=units)


@equation(
    37,
    r"c_b = r_b \quad (m_b = M), \qquad c_b = (1 + r_b) \exp(m_b - M) \quad (m_b \lt M)",
)
@exact
def test_contribution_of_a_block(case):
    units, row, biggest = 2 * _stats(case.z).units, _mp(case.z), case.z.max()
    for split in range(1, len(case.z)):
        for block in (slice(None, split), slice(split, None)):
            b = _stats(case.z[block])
            reaches = b.m == biggest
            part = b.r if reaches else (1 + b.r) * np.exp(b.m - biggest)
            total = mpmath.fsum(mpmath.exp(x - max(row)) for x in row[block])
            assert_close(part, total - 1 if reaches else total, units=units)


# 10. Signed weights.

WEIGHTS = {
    "ones": (np.array([0.5, 30.0, -1.0]), np.ones(3)),
    "minus ones": (np.array([0.5, 30.0, -1.0]), -np.ones(3)),
    "mixed signs": (np.array([0.5, 1.2, -1.0, 1.1]), np.array([0.7, -1.3, 2.0, 0.4])),
    "sign of the others": (np.array([0.5, 1.2, 1.1]), np.array([3.0, -1.0, 2.0])),
    "large": (np.array([0.5, 1.2, 1.1]), np.array([3.0, 1e10, 2.0])),
    "small": (np.array([-9.0, 1.2, -7.0]), np.array([1e-10, 1e-10, 1e-9])),
}
weighted = pytest.mark.parametrize(("a", "b"), list(WEIGHTS.values()), ids=list(WEIGHTS))


def _true_log_abs_sum(a: np.ndarray, b: np.ndarray):
    """The logarithm of |sum b exp(a - max a)|."""
    largest = mpmath.mpf(float(a.max()))
    return mpmath.log(
        abs(mpmath.fsum(w * mpmath.exp(x - largest) for x, w in zip(_mp(a), _mp(b), strict=True)))
    )


@equation(
    38,
    r"\log \Big\lvert \sum_k b_k \exp(a_k) \Big\rvert = m + \log \lvert S \rvert, \qquad"
    r"S = 1 + r_b, \qquad r_b = (b_j - 1) + \sum_{k \ne j} b_k e_k",
)
@weighted
def test_weighted_logsumexp(a, b):
    s = _stats(a)
    r_b = (b[s.j] - 1) + np.delete(b * s.e, s.j).sum()
    total, size = 1 + r_b, 1 + (abs(b) * s.e).sum()
    truth = mpmath.log(
        abs(mpmath.fsum(w * mpmath.exp(x) for x, w in zip(_mp(a), _mp(b), strict=True)))
    )
    value = s.m + np.log(abs(total))
    assert_close(value, truth, abs(s.m) + abs(value - s.m) + size / abs(total), units=s.units)


@equation(
    39,
    r"\log \lvert S \rvert = \mathrm{log1p}(r_b) \quad (S \gt 0), \qquad"
    r"\log \lvert S \rvert = \mathrm{log1p}(-2 - r_b) \quad (S \lt 0)",
)
@weighted
def test_log_of_a_signed_sum(a, b):
    s = _stats(a)
    r_b = (b[s.j] - 1) + np.delete(b * s.e, s.j).sum()
    total, size = 1 + r_b, 1 + (abs(b) * s.e).sum()
    value = np.log1p(r_b) if total > 0 else np.log1p(-2 - r_b)
    assert_close(value, _true_log_abs_sum(a, b), abs(value) + size / abs(total), units=s.units)


@equation(
    40,
    r"\log \lvert S \rvert = \mathrm{log1p}(q), \qquad"
    r"q = (\lvert b_j \rvert - 1) + \sigma \sum_{k \ne j} b_k e_k \qquad (q \gt -1)",
)
@weighted
def test_log_of_a_signed_sum_at_full_accuracy(a, b):
    s = _stats(a)
    others = np.delete(b * s.e, s.j)
    q = (abs(b[s.j]) - 1) + np.sign(b[s.j]) * others.sum()
    truth = _true_log_abs_sum(a, b)
    if q > -1:  # absolute: 1 + q is rounded at the size of the terms
        size = 1 + (abs(b) * s.e).sum()
        value = np.log1p(q)
        assert_close(value, truth, abs(value) + size / abs(1 + q), units=s.units)
    if q >= -0.5:  # relative to the terms of q, which may all be tiny
        size = abs(abs(b[s.j]) - 1) + abs(others).sum()
        assert_close(np.log1p(q), truth, 2 * size, units=s.units)
    else:
        total = b[s.j] + others.sum()
        size = (abs(b) * s.e).sum()
        scale = abs(np.log(abs(total))) + size / abs(total)
        assert_close(np.log(abs(total)), truth, scale, units=s.units)


# 11. The error bounds, in float32.

U32 = 2.0**-24
ALPHA = LAMBDA = 1.0  # a correctly rounded exp and log1p
SLACK = 1 + 2e-5  # the terms of second order in u


class Errors(NamedTuple):
    z: np.ndarray  # float32 logits
    j: int
    e: np.ndarray  # computed in float32, as is r
    r: np.float32
    d: int
    gap: np.ndarray  # the truth in float64, 2^29 times finer, as are the rest
    true_e: np.ndarray
    true_r: np.float64
    mean_gap: np.float64  # bar gamma
    row_gap: np.float64  # Gamma


def _tree_sum(x: np.ndarray) -> tuple[np.float32, int]:
    depth = 0
    while len(x) > 1:
        even = np.append(x, np.zeros(len(x) % 2, x.dtype))
        x, depth = even[::2] + even[1::2], depth + 1
    return (x[0] if len(x) else np.float32(0)), depth


def _rounded(f: Callable, x: Any) -> Any:
    """`f`, correctly rounded to float32 (but for double rounding, which SLACK covers)."""
    return f(np.asarray(x, np.float64)).astype(np.float32)


def _errors(z: np.ndarray) -> Errors:
    j = int(np.argmax(z))
    e = _rounded(np.exp, z - z[j])
    assert z.dtype == e.dtype == np.float32
    assert e.min() >= np.finfo(np.float32).tiny
    r, d = _tree_sum(np.delete(e, j))
    gap = np.float64(z[j]) - z.astype(np.float64)
    true_e = np.exp(-gap)
    true_r = np.delete(true_e, j).sum()
    mean_gap = (true_e * gap).sum() / true_r
    row_gap = (true_e * gap).sum() / (1 + true_r)
    return Errors(z, j, e, r, d, gap, true_e, true_r, mean_gap, row_gap)


def _rows() -> list[Errors]:
    rng = np.random.default_rng(24)
    rows = []
    for size in (2, 3, 10, 127, 300, 1000):
        for gap in (0, 1, 5, 10, 17, 30, 60, 80):
            for offset in (0, 100):
                z = (rng.normal(size=size) + offset).astype(np.float32)
                z[rng.integers(size)] += np.float32(gap)
                rows.append(_errors(z))
        rows.append(_errors(np.zeros(size, np.float32)))
    return rows


ROWS = _rows()


def _err(computed, truth) -> np.ndarray:
    return abs(np.asarray(computed, np.float64) / truth - 1) / U32


def _labels(row: Errors) -> list[int]:
    """The labels to try: the maximum, the runner-up, the smallest logit and two more."""
    order = np.argsort(row.gap, kind="stable")
    return sorted({row.j, int(order[1]), int(order[-1]), 0, len(row.z) // 2})


def _gradient32(row: Errors, t: int) -> np.ndarray:
    """Equation (27) for a one-hot target at `t`, in float32."""
    y = np.zeros_like(row.e)
    y[t] = 1
    gradient = ((y.sum() * row.e - y) - y * row.r) / (np.float32(1) + row.r)
    assert gradient.dtype == np.float32
    return gradient


def _true_gradient(row: Errors, t: int) -> np.ndarray:
    gradient = row.true_e / (1 + row.true_r)
    gradient[t] = -np.delete(row.true_e, t).sum() / (1 + row.true_r)
    return gradient


def _log_true_sum(row: Errors) -> np.float64:
    return np.log1p(row.true_r)


@equation(41, r"\mathrm{err}(e_k) \le (\gamma_k + \alpha) u")
def test_error_of_an_exponential():
    worst = 0.0
    for row in ROWS:
        error = _err(row.e, row.true_e)
        assert (error <= (row.gap + ALPHA) * SLACK).all()
        worst = max(worst, (error / (row.gap + ALPHA))[row.gap > 8].max(initial=0.0))
    assert worst > 0.5  # the bound is no exaggeration


@equation(
    42,
    r"\mathrm{err}(r) \le (\bar\gamma + \alpha + d) u, \qquad"
    r"\bar\gamma = \frac{1}{r} \sum_{k \ne j} e_k \gamma_k",
)
def test_error_of_the_remainder():
    for row in ROWS:
        assert _err(row.r, row.true_r) <= (row.mean_gap + ALPHA + row.d) * SLACK


@equation(
    43,
    r"\Gamma = \sum_k \hat y_k \gamma_k = \frac{r}{1 + r} \bar\gamma"
    r"= H - \mathrm{log1p}(r) \le \log V - \mathrm{log1p}(r)",
)
@exact
def test_mean_gap(case):
    s = _stats(case.z)
    p, row = s.e / (1 + s.r), _mp(case.z)
    log_sum = _lse(row) - max(row)
    truth = _entropy(row) - log_sum
    assert_close((p * s.gap).sum(), truth, units=s.units)
    if s.r > 0:
        mean_gap = np.delete(s.e * s.gap, s.j).sum() / s.r
        assert_close(s.r / (1 + s.r) * mean_gap, truth, units=s.units)
    assert truth <= mpmath.log(len(row)) - log_sum + FLOOR


@equation(
    44,
    r"\mathrm{err}(1 + r) \le \Big(\Gamma + \frac{r}{1 + r} (\alpha + d) + 1\Big) u",
)
def test_error_of_the_denominator():
    for row in ROWS:
        bound = row.row_gap + row.true_r / (1 + row.true_r) * (ALPHA + row.d) + 1
        assert _err(np.float32(1) + row.r, 1 + row.true_r) <= bound * SLACK


@equation(
    45,
    r"\mathrm{err}(\hat y_i) \le"
    r"\Big(\gamma_i + \Gamma + \alpha + \frac{r}{1 + r} (\alpha + d) + 2\Big) u",
)
def test_error_of_a_probability():
    for row in ROWS:
        weight = row.true_r / (1 + row.true_r)
        bound = row.gap + row.row_gap + ALPHA + weight * (ALPHA + row.d) + 2
        error = _err(row.e / (np.float32(1) + row.r), row.true_e / (1 + row.true_r))
        assert (error <= bound * SLACK).all()
        for t in _labels(row):
            error = _err(_gradient32(row, t), _true_gradient(row, t))
            assert (np.delete(error, t) <= np.delete(bound, t) * SLACK).all()


@equation(
    46,
    r"\mathrm{err}(\hat y_j - 1) \le \Big(\frac{\bar\gamma + \alpha + d}{1 + r} + 2\Big) u",
)
def test_error_of_the_target_at_the_maximum():
    for row in ROWS:
        bound = (row.mean_gap + ALPHA + row.d) / (1 + row.true_r) + 2
        error = _err(_gradient32(row, row.j), _true_gradient(row, row.j))
        assert error[row.j] <= bound * SLACK


@equation(
    47,
    r"\mathrm{err}(\hat y_t - 1) \le"
    r"\Big(\Gamma + \frac{\alpha + d}{2} + \alpha + 4 + \frac{1}{\mathrm{e}}\Big) u"
    r"\qquad (t \ne j)",
)
def test_error_of_the_target_elsewhere():
    for row in ROWS:
        bound = row.row_gap + (ALPHA + row.d) / 2 + ALPHA + 4 + np.exp(-1)
        for t in _labels(row):
            if t != row.j:
                error = _err(_gradient32(row, t), _true_gradient(row, t))
                assert error[t] <= bound * SLACK


@equation(
    48,
    r"\mathrm{err} \le (16 + \gamma + \Gamma) u"
    r"= \Big(8 + \frac{\gamma + \Gamma}{2}\Big) 2^{-23}",
)
def test_error_of_every_entry():
    assert (16 + 3 + 1) * U32 == (8 + (3 + 1) / 2) * 2.0**-23
    alpha, d = 2, 10
    for row in ROWS:
        assert row.d <= d
        r, rest = row.true_r, row.row_gap
        # It contains (45), (46) and (47) with their own gaps ...
        assert (row.gap + rest + alpha + r / (1 + r) * (alpha + d) + 2).max() <= (
            16 + row.gap.max() + rest
        )
        assert (row.mean_gap + alpha + d) / (1 + r) + 2 <= 16 + row.mean_gap + rest
        assert rest + (alpha + d) / 2 + alpha + 4 + np.exp(-1) <= 16 + rest
        # ... and the errors.
        for t in _labels(row):
            gap = row.gap.copy()
            gap[t] = row.mean_gap if t == row.j else 0
            error = _err(_gradient32(row, t), _true_gradient(row, t))
            assert (error <= (16 + gap + rest) * SLACK).all()


def _nll32(row: Errors, t: int) -> np.float32:
    loss = (row.z[row.j] - row.z[t]) + _rounded(np.log1p, row.r)
    assert loss.dtype == np.float32
    return loss


@equation(49, r"\mathrm{err}(\mathrm{nll}_j) \le (\bar\gamma + \alpha + d + \lambda) u")
def test_error_of_the_loss_at_the_maximum():
    for row in ROWS:
        bound = row.mean_gap + ALPHA + row.d + LAMBDA
        assert _err(_nll32(row, row.j), _log_true_sum(row)) <= bound * SLACK


@equation(
    50,
    r"\mathrm{err}(\mathrm{nll}_t) \le"
    r"\Big(\frac{\Gamma}{\mathrm{nll}_t} + \frac34 (\alpha + d) + \max(\lambda, 1) + 1\Big) u"
    r"\qquad (t \ne j)",
)
def test_error_of_the_loss_elsewhere():
    for row in ROWS:
        for t in _labels(row):
            if t != row.j:
                nll = row.gap[t] + _log_true_sum(row)
                assert row.true_r / (1 + row.true_r) <= 0.75 * nll
                bound = row.row_gap / nll + 0.75 * (ALPHA + row.d) + max(LAMBDA, 1) + 1
                assert _err(_nll32(row, t), nll) <= bound * SLACK


CAPS = [(x, c) for x in (-40.0, -3.0, -1e-3, 0.0, 0.7, 12.0) for c in (0.5, 5.0, 30.0)]


def _capped(x, c):
    return c * mpmath.tanh(x / c)


@pytest.mark.parametrize(("x", "c"), CAPS)
@equation(51, r"z = c \tanh(x / c)")
def test_soft_cap(x, c):
    assert c * np.tanh(x / c) == pytest.approx(float(_capped(x, c)), rel=1e-15)


@pytest.mark.parametrize(("x", "c"), CAPS)
@equation(
    52, r"\frac{\partial z}{\partial x} = \Big(1 - \frac{z}{c}\Big) \Big(1 + \frac{z}{c}\Big)"
)
def test_slope_of_the_soft_cap(x, c):
    t = _capped(mpmath.mpf(x), c) / c
    truth = mpmath.diff(lambda x: _capped(x, c), mpmath.mpf(x))
    assert abs((1 - t) * (1 + t) - truth) <= 1e-100 * truth
    # In float64, with the roundings that the text counts.
    t = float(c * np.tanh(x / c)) / c
    if abs(t) < 1:
        bound = 2 * (3 + 1) / (1 - abs(t)) * 2.0**-53
        assert (1 - t) * (1 + t) == pytest.approx(float(truth), rel=bound)


@pytest.mark.parametrize(("x", "c"), CAPS)
@equation(
    53,
    r"\frac{\partial z}{\partial c} = \frac{z}{c} - \frac{x}{c} \frac{\partial z}{\partial x}",
)
def test_derivative_in_the_cap(x, c):
    x, c = mpmath.mpf(x), mpmath.mpf(c)
    z = _capped(x, c)
    slope = (1 - z / c) * (1 + z / c)
    truth = mpmath.diff(lambda c: _capped(x, c), c)
    assert abs((z / c - x / c * slope) - truth) <= 1e-100 * max(abs(truth), 1)


# 13. From the label.


@equation(54, r"r_t = \sum_{k \ne t} e^{z_k - z_t}")
@exact
def test_remainder_from_the_label(case):
    for t in range(len(case.z)):
        r_t = np.delete(np.exp(case.z - case.z[t]), t).sum()
        truth = 1 / _softmax(_mp(case.z))[t] - 1
        assert_close(r_t, truth, units=_stats(case.z).units)


@equation(
    55,
    r"\mathrm{nll}_t = \mathrm{log1p}(r_t), \qquad"
    r"\frac{\partial\, \mathrm{nll}_t}{\partial z_i} = \frac{e^{z_i - z_t}}{1 + r_t}"
    r"\quad (i \ne t), \qquad"
    r"\frac{\partial\, \mathrm{nll}_t}{\partial z_t} = -\frac{r_t}{1 + r_t}",
)
@exact
def test_loss_and_gradient_from_the_label(case):
    units = _stats(case.z).units
    for t in range(len(case.z)):
        one_hot = _one_hot(len(case.z), t)
        e = np.exp(case.z - case.z[t])
        r_t = np.delete(e, t).sum()
        assert_close(np.log1p(r_t), _loss(_mp(case.z), _mp(one_hot)), units=units)
        gradient = e / (1 + r_t)
        gradient[t] = -r_t / (1 + r_t)
        assert_close(gradient, _loss_gradient(Case(case.z, one_hot)), units=units)


class FromLabel(NamedTuple):
    e: np.ndarray  # computed in float32, as is r
    r: np.float32
    d: int
    distance: np.ndarray  # the truth in float64, as are the rest
    true_e: np.ndarray
    true_r: np.float64
    mean_of_rest: np.float64  # bar tau
    mean: np.float64  # tau
    t: int


def _from_label(z: np.ndarray, t: int) -> FromLabel:
    e = _rounded(np.exp, z - z[t])
    assert z.dtype == e.dtype == np.float32
    r, d = _tree_sum(np.delete(e, t))
    difference = z.astype(np.float64) - np.float64(z[t])
    distance, true_e = abs(difference), np.exp(difference)
    true_r = np.delete(true_e, t).sum()
    total = (true_e * distance).sum()
    return FromLabel(e, r, d, distance, true_e, true_r, total / true_r, total / (1 + true_r), t)


LABELLED = [(row, _from_label(row.z, t)) for row in ROWS for t in _labels(row)]


@equation(
    56,
    r"\mathrm{err}(r_t) \le (\bar\tau + \alpha + d) u, \qquad"
    r"\bar\tau = \frac{1}{r_t} \sum_{k \ne t} e^{z_k - z_t} \tau_k",
)
def test_error_of_the_remainder_from_the_label():
    for _, row in LABELLED:
        assert _err(row.r, row.true_r) <= (row.mean_of_rest + ALPHA + row.d) * SLACK


@equation(
    57,
    r"\mathrm{err}(\hat y_i) \le"
    r"\Big(\tau_i + \tau + \alpha + \frac{r_t}{1 + r_t} (\alpha + d) + 2\Big) u",
)
def test_error_of_a_probability_from_the_label():
    for _, row in LABELLED:
        weight = row.true_r / (1 + row.true_r)
        bound = row.distance + row.mean + ALPHA + weight * (ALPHA + row.d) + 2
        error = _err(row.e / (np.float32(1) + row.r), row.true_e / (1 + row.true_r))
        assert (error <= bound * SLACK).all()


@equation(
    58,
    r"\mathrm{err}(\hat y_t - 1) \le \Big(\frac{\bar\tau + \alpha + d}{1 + r_t} + 2\Big) u",
)
def test_error_of_the_target_from_the_label():
    for _, row in LABELLED:
        bound = (row.mean_of_rest + ALPHA + row.d) / (1 + row.true_r) + 2
        got, truth = -row.r / (np.float32(1) + row.r), -row.true_r / (1 + row.true_r)
        assert _err(got, truth) <= bound * SLACK


@equation(
    59,
    r"\mathrm{err}(\mathrm{nll}_t) \le"
    r"\Big(\frac{r_t (\bar\tau + \alpha + d)}{(1 + r_t)\, \mathrm{nll}_t} + \lambda\Big) u",
)
def test_error_of_the_loss_from_the_label():
    for _, row in LABELLED:
        nll = np.log1p(row.true_r)
        error_of_r = row.mean_of_rest + ALPHA + row.d
        bound = row.true_r * error_of_r / ((1 + row.true_r) * nll) + LAMBDA
        assert _err(_rounded(np.log1p, row.r), nll) <= bound * SLACK


@equation(60, r"\tau_k \le \max(\gamma_k, \log r_t)")
def test_distances_from_the_label():
    for row, of_label in LABELLED:
        others = np.arange(len(row.z)) != of_label.t
        limit = np.maximum(row.gap, np.log(of_label.true_r))
        assert (of_label.distance <= limit * (1 + 1e-12))[others].all()
    assert 16.6 < 24 * np.log(2) < 16.7
    assert 2 * 16.7 * U32 < 2e-6


@equation(61, r"\mathrm{nll}_t = (z_c - z_t) + \mathrm{log1p}(r_c)")
@pytest.mark.parametrize("case", MILD.values(), ids=MILD)
def test_loss_from_any_class(case):
    """Nothing cancels from a class above the label; from one below, the difference may."""
    units = _stats(case.z).units
    for t in range(len(case.z)):
        truth = _loss(_mp(case.z), _mp(_one_hot(len(case.z), t)))
        for c in range(len(case.z)):
            r_c = np.delete(np.exp(case.z - case.z[c]), c).sum()
            terms = np.array([case.z[c] - case.z[t], np.log1p(r_c)])
            scale = None if terms[0] >= 0 else abs(terms).sum()
            assert_close(terms.sum(), truth, units=units, scale=scale)


# What the document computes in passing.


def _shown(x: float) -> str:
    return f"{x:.5e}".replace("-", "−", 1) if x else "0"


def test_the_table_of_what_the_usual_form_loses():
    for gap in (10, 17, 20, 30):
        r = 9 * mpmath.exp(-gap)
        truth = -r / (1 + r)
        usual = float(np.float32(float(1 / (1 + r))) - np.float32(1))
        lost = f"{float(1 - usual / truth):.1%}" if usual else "100%"
        row = f"| {gap} | {_shown(float(truth))} | {_shown(usual)} | {lost.replace('%', ' %')} |"
        assert row in DOCUMENT, row
        z = np.zeros(10, np.float32)
        z[3] = gap
        # (46), but an integer gap is exact: alpha + d + 2.
        assert _err(_gradient32(_errors(z), 3)[3], float(truth)) <= 7 * SLACK


def test_the_reference_must_be_chosen_by_the_row():
    z = np.zeros(1000, np.float32)
    e = _errors(z)
    p = e.e / (np.float32(1) + e.r)
    g = (np.arange(1000) == e.j).astype(np.float32)
    usual = p * (g - (g * p).sum())  # c = 0
    h = g[e.j] - g
    at_the_maximum = p * ((h * e.e).sum() / (np.float32(1) + e.r) - h)  # c = g_j
    truth = -1e-6
    assert _err(usual[-1], truth) <= 4
    assert _err(at_the_maximum[-1], truth) > 100


def test_a_small_weight_needs_the_direct_sum():
    b = np.float32(1e-10)
    assert b - np.float32(1) == -1
    assert round(float(np.log(b)), 2) == -23.03


def test_the_mean_gap_of_normal_logits_is_about_two():
    z = np.random.default_rng(0).normal(size=(200, 1000))
    gaps = z.max(axis=1, keepdims=True) - z
    p = np.exp(-gaps) / np.exp(-gaps).sum(axis=1, keepdims=True)
    assert 2 <= (p * gaps).sum(axis=1).mean() <= 2.5
