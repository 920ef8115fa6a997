# SPDX-License-Identifier: Apache-2.0
"""`python -m bench accuracy --op divergence`: error of KL and JS as two softmaxes come closer."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
from jax.typing import ArrayLike
from matplotlib.figure import Figure

from bench import accuracy_tables, contenders, environment, figures, results, tables
from bench.accuracy_tables import DIGITS, TRUTH, percent
from bench.cases import Divergence, Dtype, Op
from bench.tables import Table

DELTAS = (
    *(1e-7, 3e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3),
    *(3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
)
TABLE_DELTAS = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0)  # those that the tables show

QUANTITIES = {
    "kl": "KL",
    "by_logits": "KL's gradient by the logits",
    "by_target": "KL's gradient by the target",
    "js": "JS",
}
IN_FIGURE = ("kl", "by_logits")


def measure(
    dtypes: Sequence[Dtype], deltas: Sequence[float], *, tokens: int, classes: int
) -> dict[str, Any]:
    """Measure every contender's largest and median relative errors at every distance.

    Returns:
        A section of the results file. A series has an error, or None, for each of `deltas`, and
        how many of the divergences came back negative.
    """
    found = {dtype: _load(dtype, tokens, classes) for dtype in dtypes}
    left_out = list(dict.fromkeys(line for _, lines in found.values() for line in lines))
    tables.say(*left_out)

    series = []
    with tables.progress(len(dtypes) * len(deltas)) as now:
        for dtype in dtypes:
            seen: dict[str, dict[str, list[Any]]] = {}
            for delta in deltas:
                now(f"{dtype}, δ {delta:g}")
                pair = draw(dtype, delta, tokens, classes)
                truth = exact(*pair)
                for divergence, one in found[dtype][0]:
                    for quantity, computed in evaluate(divergence, one, *pair).items():
                        errors = relative_errors(computed, truth[quantity], dtype)
                        of_name = seen.setdefault(one.name, {})
                        of_name.setdefault(quantity, []).append(errors)
                now(done=1)
            series += [
                {"dtype": dtype.value, "name": name}
                | {quantity: _by_delta(errors) for quantity, errors in of_name.items()}
                for name, of_name in seen.items()
            ]

    return {
        "environment": environment.describe(),
        "op": Op.DIVERGENCE.value,
        "tokens": tokens,
        "classes": classes,
        "deltas": list(deltas),
        "left_out": left_out,
        "series": series,
    }


def _load(
    dtype: Dtype, tokens: int, classes: int
) -> tuple[list[tuple[Divergence, contenders.Contender]], list[str]]:
    pair = draw(dtype, 1.0, tokens, classes)
    able, left_out = [], []
    for divergence in Divergence:
        entries = contenders.DIVERGENCES[divergence] + contenders.TORCH_DIVERGENCES[divergence]
        found, lines = contenders.load(entries, dtype)
        left_out += lines
        for one in found:
            with contenders.may_fail(one, f"{dtype} {divergence}", left_out):
                evaluate(divergence, one, *pair)
                able.append((divergence, one))
    return able, left_out


def _by_delta(errors: Sequence[dict[str, float] | None]) -> dict[str, list[float | None]]:
    whichs = list(dict.fromkeys(which for error in errors for which in error or ()))
    return {
        which: [results.short(error[which]) if error else None for error in errors]
        for which in whichs or ("max", "median")
    }


def draw(dtype: Dtype, delta: float, tokens: int, classes: int) -> tuple[jax.Array, jax.Array]:
    """Draw normal target logits, and logits that differ from them by `delta` times normal numbers.

    Returns:
        Logits and target logits `[tokens, classes]`, both rounded to `dtype`.
    """
    rng = np.random.default_rng(0)
    target, change = rng.standard_normal((2, tokens, classes))
    return jnp.asarray(target + delta * change, dtype), jnp.asarray(target, dtype)


def exact(logits: ArrayLike, target: ArrayLike) -> dict[str, np.ndarray]:
    """Compute divergences and gradients from the definitions, with `DIGITS` digits.

    It starts from the rounded logits, so their rounding does not count as an error.

    Returns:
        KL and JS `[tokens]`, and KL's gradients `[tokens, classes]`, rounded to float64 at the end.
    """
    found: dict[str, list[Any]] = {quantity: [] for quantity in QUANTITIES}
    with mpmath.workdps(DIGITS):
        for rows in zip(
            *(np.asarray(array, np.float64) for array in (logits, target)), strict=True
        ):
            powers = [[mpmath.exp(mpmath.mpf(float(logit))) for logit in row] for row in rows]
            totals = [mpmath.fsum(row) for row in powers]
            q, p = ([x / total for x in row] for row, total in zip(powers, totals, strict=True))
            less = mpmath.log(totals[0]) - mpmath.log(totals[1])
            ratios = [
                mpmath.mpf(float(z)) - mpmath.mpf(float(t)) - less
                for z, t in zip(*rows, strict=True)
            ]  # log q − log p
            kl = -mpmath.fsum(a * ratio for a, ratio in zip(p, ratios, strict=True))
            found["kl"].append(float(kl))
            found["by_logits"].append([float(b - a) for a, b in zip(p, q, strict=True)])
            found["by_target"].append(
                [float(-a * (kl + ratio)) for a, ratio in zip(p, ratios, strict=True)]
            )
            to_mixture = [mpmath.log((a + b) / 2 / a) for a, b in zip(p, q, strict=True)]
            js = mpmath.fsum(
                -a * up + b * (ratio - up)
                for a, b, ratio, up in zip(p, q, ratios, to_mixture, strict=True)
            )
            found["js"].append(float(js / 2))
    return {quantity: np.array(values) for quantity, values in found.items()}


def evaluate(
    divergence: Divergence, contender: contenders.Contender, logits: jax.Array, target: jax.Array
) -> dict[str, np.ndarray]:
    """Run a contender: what it computes of `QUANTITIES`."""
    values, gradients = contenders.losses_and_gradients(contender, 2, logits, target)
    arrays = [np.asarray(array, np.float64) for array in (values, *gradients)]
    if divergence is Divergence.JS:
        return {"js": arrays[0]}
    return dict(zip(("kl", "by_logits", "by_target"), arrays, strict=True))


def relative_errors(
    computed: np.ndarray, truth: np.ndarray, dtype: Dtype
) -> dict[str, float] | None:
    """Reduce to the largest and the median relative error of all rows.

    Of divergences `[tokens]` also how many are negative. Of gradients `[tokens, classes]` the error
    of a row is the norm of its entries' errors over the norm of its entries: one by one they pass
    through 0. As in `bench.accuracy`, values below the smallest normal number do not count; None if
    no value counts.
    """
    smallest = jnp.float32 if truth.ndim == 1 else dtype
    counts = np.abs(truth) >= float(jnp.finfo(smallest).tiny)
    wrong, size = (
        np.linalg.norm(np.where(counts, array, 0).reshape(len(truth), -1), axis=-1)
        for array in (computed - truth, truth)
    )
    if not counts.any():
        return None
    errors = wrong[size > 0] / size[size > 0]
    found = {"max": float(errors.max()), "median": float(np.median(errors))}
    return found | ({"negative": int((computed < 0).sum())} if truth.ndim == 1 else {})


def in_docs(section: dict[str, Any]) -> list[Table]:
    """Lay largest and median errors out for the terminal and docs/benchmarks.md, by dtype."""

    def cell(one: dict[str, Any], place: int) -> str:
        largest, median = (percent(one[which][place]) for which in ("max", "median"))
        words = largest if largest == median else f"{largest} ({median})"
        return words + _mark(one, place)

    found = [
        _table(section, dtype, list(QUANTITIES), cell)
        for dtype in dict.fromkeys(one["dtype"] for one in section["series"])
    ]
    notes = (
        f"{TRUTH}, and the median where it differs. {_drawn(section)}, then both rounded to the "
        f"dtype. {_meaning(section)} –: equal logits, or the truth is below the smallest normal "
        "number of the dtype.",
        f"{_explained(section)} {contenders.MIXTURE}",
        tables.origin(section),
    )
    return [*found[:-1], found[-1]._replace(notes=notes)]


def _table(section: dict[str, Any], dtype: str, quantities: Sequence[str], cell: Any) -> Table:
    deltas = section["deltas"]
    shown = [delta for delta in TABLE_DELTAS if delta in deltas] or deltas
    places = [deltas.index(delta) for delta in shown]
    rows = []
    for quantity in quantities:
        series = [one for one in section["series"] if one["dtype"] == dtype and quantity in one]
        rows += [
            [
                QUANTITIES[quantity] if one is series[0] else "",
                one["name"],
                *(cell(one[quantity], place) for place in places),
            ]
            for one in series
        ]
    first, *others = (f"{delta:g}".replace("e-0", "e-") for delta in shown)
    headings = [f"{dtype}: relative error of", "by", f"δ = {first}", *others]
    return Table(headings, rows)


def _mark(one: dict[str, Any], place: int) -> str:
    return "†" * bool(one.get("negative") and one["negative"][place])


def _drawn(section: dict[str, Any]) -> str:
    return (
        f"Target logits: {section['tokens']} rows of {section['classes']} standard normal numbers; "
        "logits: those plus δ times others"
    )


def _meaning(section: dict[str, Any]) -> str:
    negative = any(
        count
        for one in section["series"]
        for quantity in QUANTITIES.keys() & one.keys()
        for count in one[quantity].get("negative", ())
    )
    first = "1e4: wrong by ten thousand times the value. A gradient's error is the norm of a row's."
    return first + " †: some came back negative." * negative


def _explained(section: dict[str, Any]) -> str:
    names = (one["name"] for one in section["series"])
    return contenders.explain(names, Op.DIVERGENCE)


def figure(section: dict[str, Any]) -> Figure:
    """Draw KL and its gradient by the logits against the distance, one panel per dtype."""
    deltas = np.array(section["deltas"])

    def errors(dtype: str, name: str, quantity: str, which: str) -> np.ndarray:
        (one,) = (one for one in section["series"] if (one["dtype"], one["name"]) == (dtype, name))
        return np.array(one[quantity][which], np.float64)

    drawn, grid = accuracy_tables.panels(
        section,
        {quantity: QUANTITIES[quantity] for quantity in IN_FIGURE},
        "δ: logits = target logits + δ · normal numbers",
        deltas,
        errors,
        at_one=("as large as the value", "right"),
        most=1e9,
        marker="",
    )
    for (quantity, dtype), axes in grid.items():
        axes.set_xscale("log")
        axes.set_xlim(deltas[0], deltas[-1])
        held = ~np.isnan(errors(dtype, contenders.OURS, quantity, "max"))
        if not held.all():
            last = deltas[held][0] if held.any() else deltas[-1]
            equal = np.isnan(errors(dtype, contenders.OURS, "kl", "max"))[0]
            below = f"the truth is below {dtype}'s\nsmallest normal number"
            words, style = ("equal logits", {"rotation": 90}) if equal else (below, {})
            figures.shade(axes, deltas[0], last, words, at=10.0, va="center", **style)
    return drawn
