# SPDX-License-Identifier: Apache-2.0
"""What must hold for any logits: hypothesis looks for the ones where it does not.

Logits are multiples of 1/64 with |z| ≤ 32, so float32 holds them, their gaps and their shifts
exactly; the products of the heads, of small multiples of 1/8 over H = 3, are exact too. What is
left of docs/forms.md section 11 is, in units of u = 2^-24 and to first order, with C terms
added in any order: exp 2, log1p 4, C for a sum, 1 for each other operation. So every loss, every
probability and every term of a gradient is known to `units(C) = C + 16` (48), and each block of
the vocabulary merged adds 5. Two results of the same thing differ by at most twice that.
"""

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from assertions import assert_within
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsoftmax as js

U = 2.0**-24
integer = js.softmax_cross_entropy_with_integer_labels
dense = js.softmax_cross_entropy
# Few shapes, each compiled once; the middle one for what costs most.
SHAPES = [(1, 1), (5, 17), (3, 130)]
N, C = SHAPES[1]
H = 3

a_few = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def units(classes, blocks=0):
    return (classes + 16 + 5 * blocks) * U


def grid(shape, most=32, step=64):
    whole = hnp.arrays(np.int32, shape, elements=st.integers(-most * step, most * step))
    return whole.map(lambda k: (k / step).astype(np.float32))


def labels_of(shape, least=0):
    return hnp.arrays(np.int32, shape[0], elements=st.integers(least, shape[1] - 1))


def fractions(shape):
    return hnp.arrays(np.float32, shape, elements=st.integers(0, 16).map(lambda k: k / 16))


def tuples(*parts):
    """One shape, and what is drawn for it."""
    return st.sampled_from(SHAPES).flatmap(lambda s: st.tuples(*(part(s) for part in parts)))


def wide(*arrays):
    return [np.asarray(a, np.float64) for a in arrays]


def value_and_gradient(f):
    """Losses of all rows, and the gradient of their sum."""

    def both(z, *rest):
        value, pull = jax.vjp(lambda z: f(z, *rest), z)
        return value, pull(jnp.ones_like(value))[0]

    return jax.jit(both)


LOSSES = {
    "integer": value_and_gradient(integer),
    "dense": value_and_gradient(dense),
    "smoothed": value_and_gradient(lambda z, y: integer(z, y, label_smoothing=0.25)),
    "log_prob": value_and_gradient(lambda z, y: js.label_log_probs(z, y).log_probs),
}
every_loss = pytest.mark.parametrize("name", LOSSES)
family = jax.jit(
    lambda z: (js.softmax(z), js.log_softmax(z), js.softmax_jacobian(z), js.logsumexp(z, axis=-1))
)


def target(name, labels, y):
    return y if name == "dense" else labels


@given(tuples(grid, labels_of, fractions, lambda s: grid((s[0], 1), 2**10)))
@a_few
def test_a_shift_of_a_row_changes_no_bit(drawn):
    z, labels, y, shift = drawn
    for name, loss in LOSSES.items():
        pair = (loss(x, target(name, labels, y)) for x in (z, z + shift))
        jax.tree.map(np.testing.assert_array_equal, *pair)
    (*base, lse), (*moved, moved_lse) = family(z), family(z + shift)
    jax.tree.map(np.testing.assert_array_equal, base, moved)
    lse, moved_lse = wide(lse, moved_lse)
    # The one rounding of each: m + log1p(r).
    assert_within(moved_lse - lse, shift[:, 0], U * (np.abs(lse) + np.abs(moved_lse)) * 1.01)


@every_loss
@given(tuples(grid, labels_of, fractions, lambda s: st.permutations(range(s[1]))))
@a_few
def test_classes_have_no_order(name, drawn):
    z, labels, y, order = drawn
    order = np.array(order)
    error = 2 * units(z.shape[-1])
    value, gradient = LOSSES[name](z, target(name, labels, y))
    moved = target(name, np.argsort(order)[labels].astype(np.int32), y[:, order])
    other, other_gradient = LOSSES[name](z[:, order], moved)
    assert_within(other, value, error * np.abs(value))
    size = np.abs(gradient) if name in ("integer", "log_prob") else sizes(name, z, labels, y)
    assert_within(other_gradient, gradient[:, order], error * np.asarray(size)[:, order])
    for a, b in zip(family(z)[:2], family(z[:, order])[:2], strict=True):
        assert_within(b, a[:, order], error * np.abs(a[:, order]))


def sizes(name, z, labels, y):
    """Y ŷ + y: what the two terms of a gradient are, which for several targets may cancel."""
    one_hot = np.eye(z.shape[-1])[labels]
    y = {"dense": y, "smoothed": 0.75 * one_hot + 0.25 / z.shape[-1]}.get(name, one_hot)
    return np.asarray(js.softmax(z)) * y.sum(-1, keepdims=True) + y


@every_loss
@given(tuples(grid, labels_of, fractions))
@a_few
def test_a_gradient_sums_to_zero_over_the_classes(name, drawn):
    z, labels, y = drawn
    _, gradient = LOSSES[name](z, target(name, labels, y))
    bound = units(z.shape[-1]) * sizes(name, z, labels, y).sum(-1)
    assert_within(wide(gradient)[0].sum(-1), 0, bound)
    p, _, jacobian, _ = wide(*family(z))
    assert_within(p.sum(-1), np.ones(len(p)), units(z.shape[-1]))
    for axis in (-1, -2):
        bound = 2 * units(z.shape[-1]) * np.abs(jacobian).sum(axis)
        assert_within(jacobian.sum(axis), 0, bound + 1e-37)


z_and_temperature = jax.jit(
    jax.grad(lambda z, y, scale, t: jnp.sum(integer(z, y, z_loss=scale, temperature=t)))
)


@given(grid((N, C)), labels_of((N, C)), st.integers(1, 16), st.sampled_from([0.5, 1.0, 2.0]))
@a_few
def test_a_gradient_of_the_z_loss_sums_to_its_slope(z, labels, scale, temperature):
    """Σ_i dz_i = 2 λ lse / T; powers of two keep z / T exact."""
    scale, t = np.float32(scale / 16), np.float32(temperature)
    gradient = wide(z_and_temperature(z, labels, scale, t))[0]
    x = z.astype(np.float64) / temperature
    m = x.max(-1)
    lse = m + np.log(np.exp(x - m[:, None]).sum(-1))
    slope = 2 * scale * lse / temperature
    # lse itself is rounded with m and log1p(r): both are at most |m| + log C.
    size = 2 / temperature + np.abs(slope) + 2 * scale * (np.abs(m) + np.log(C)) / temperature
    assert_within(gradient.sum(-1), slope, units(C) * size)


@every_loss
@given(tuples(grid, grid, labels_of, fractions), st.integers(0, 8))
@a_few
def test_a_loss_is_convex_and_above_its_tangent(name, drawn, eighths):
    a, b, labels, y = drawn
    sign = -1 if name == "log_prob" else 1
    y, error = target(name, labels, y), units(a.shape[-1])
    between = (a * np.float32(eighths) + b * np.float32(8 - eighths)) / 8
    assert np.array_equal(between, (wide(a)[0] * eighths + wide(b)[0] * (8 - eighths)) / 8)
    (at_a, slope), (at_b, _), (at_c, _) = (LOSSES[name](z, y) for z in (a, b, between))
    at_a, at_b, at_c, slope = (sign * v for v in wide(at_a, at_b, at_c, slope))
    chord = (at_a * eighths + at_b * (8 - eighths)) / 8
    assert np.all(at_c <= chord + error * (at_c + chord))
    step = wide(b)[0] - a
    tangent = at_a + (slope * step).sum(-1)
    size = (sizes(name, a, labels, drawn[3]) * np.abs(step)).sum(-1)
    assert np.all(at_b >= tangent - error * (at_a + at_b + size))


# Divergences: |δ| ≤ 128 here, so that each term is known to units(C) and 3 |δ| more


@jax.jit
def divergences(z, t, weight):
    def js_divergence(z, t, weight):
        return js.softmax_js_divergence(z, t, weight=weight)

    kl = value_and_gradient(js.softmax_kl_divergence)
    return kl(z, t), js_divergence(z, t, weight), js_divergence(t, z, 1 - weight)


@given(
    tuples(grid, grid, lambda s: grid((s[0], 1), 2**10), lambda s: st.permutations(range(s[1]))),
    st.integers(1, 15),
)
@a_few
def test_divergences_of_any_two_rows(drawn, sixteenths):
    """At least 0, without an order of the classes, the same after a shift, exchanged with 1 − w.

    JS is at most the entropy of its weight, and convex in it: between 0 and w KL(q ‖ p).
    """
    z, t, shift, order = drawn
    weight = np.float32(sixteenths / 16)
    (kl, gradient), mixed, exchanged = divergences(z, t, weight)
    (moved, moved_gradient), moved_mixed, _ = divergences(z + shift, t - shift, weight)
    for one, other in ((kl, moved), (gradient, moved_gradient), (mixed, moved_mixed)):
        np.testing.assert_array_equal(one, other)
    order = np.array(order)
    (other, _), other_mixed, _ = divergences(z[:, order], t[:, order], weight)
    error = 2 * (units(z.shape[-1]) + 3 * 128 * U)
    kl, mixed = wide(kl, mixed)
    assert (kl >= 0).all()
    assert (mixed >= 0).all()
    tiny = 1e-37 * z.shape[-1]
    assert_within(other, kl, error * kl + tiny)
    for found in (other_mixed, exchanged):
        assert_within(found, mixed, error * mixed + tiny)
    w = float(weight)
    assert (mixed <= (-w * np.log(w) - (1 - w) * np.log1p(-w)) * (1 + error)).all()
    (reverse, _), *_ = divergences(t, z, weight)
    assert (mixed <= w * wide(reverse)[0] * (1 + error) + tiny).all()
    assert (mixed <= (1 - w) * kl * (1 + error) + tiny).all()


# The head: N tokens, chunks of any size

OPERANDS = st.tuples(grid((N, H), 4, 8), grid((H, C), 3, 8), grid((C,), 3, 8))
CHUNKS = {"in_forward": (1, 2, 3, 9), "recompute": (1, 5, 16, 40)}


def _head(path, chunk):
    ways = {"reduction": "sum", "ignore_index": -1, "gradients": path, "chunk_size": chunk}

    def loss(hidden, kernel, bias, labels, weights):
        head = js.linear_softmax_cross_entropy
        return head(hidden, kernel, labels, bias=bias, weights=weights, **ways)

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))


HEADS = {(path, chunk): _head(path, chunk) for path, chunks in CHUNKS.items() for chunk in chunks}


@pytest.mark.parametrize("gradients", CHUNKS)
@given(OPERANDS, labels_of((N, C), -1), fractions((N,)))
@a_few
def test_the_chunks_of_a_head_do_not_matter(gradients, operands, labels, weights):
    """Each against the loss on the logits, whose gradient goes through exact products in NumPy."""
    h, k, b, w = wide(*operands, np.where(labels < 0, 0, weights))
    z = h @ k + b
    assert np.array_equal(z, z.astype(np.float32))
    losses, dz = wide(*LOSSES["integer"](z.astype(np.float32), np.maximum(labels, 0)))
    dz *= w[:, None]
    size = np.abs(dz)
    want = ((w * losses).sum(), dz @ k.T, h.T @ dz, dz.sum(0))
    magnitude = (want[0], size @ np.abs(k).T, np.abs(h).T @ size, size.sum(0))
    # Of dz twice units(C), 3 for weight and cotangent, then a product's sum over C or N terms.
    error = 2 * units(C, C) + (C + N + 3) * U
    for chunk in CHUNKS[gradients]:
        got, d = HEADS[gradients, chunk](*operands, labels, weights)
        for a, e, m in zip((got, *d), want, magnitude, strict=True):
            assert_within(a, e, error * m)


# One loss in the words of every function


def _entries(z, y, o) -> dict[str, jax.Array]:
    """Losses [N], the label 0 ignored, of logits z and every option."""
    eye, one_hot, used = jnp.eye(N), jax.nn.one_hot(y, C), y != 0
    transform = {k: o[k] for k in ("soft_cap", "temperature")}
    u, epsilon, lam = o["class_weights"], o["label_smoothing"], o["z_loss"]
    targets = (1 - epsilon) * u[y][:, None] * one_hot + epsilon / C * u[None]
    x = o["soft_cap"] * jnp.tanh(z / o["soft_cap"]) / o["temperature"]
    log_p = js.log_softmax(x)
    spread = -jnp.sum(epsilon / C * u[None] * log_p, axis=-1)

    def of_log_probs(out):
        nll = -(1 - epsilon) * u[y] * out.log_probs + spread
        return jnp.where(used, nll + lam * out.log_normalizers**2, 0)

    def by_token(hidden, label):  # a sum of one token each
        of_sum = js.linear_softmax_cross_entropy
        return of_sum(hidden[None], z, label[None], ignore_index=0, reduction="sum", **o)

    def loss(z, y):
        return integer(z, y, ignore_index=0, **o)

    ways = {"reduction": None, "gradients": "recompute", "chunk_size": 5, "ignore_index": 0}
    return {
        "integer": loss(z, y),
        "dense": jnp.where(used, dense(z, targets, z_loss=lam, **transform), 0),
        "log_softmax": jnp.where(
            used,
            lam * jnp.square(jnp.asarray(js.logsumexp(x, axis=-1)))
            - jnp.sum(targets * log_p, axis=-1),
            0,
        ),
        "label_log_probs": of_log_probs(js.label_log_probs(z, y, **transform)),
        "linear_log_probs": of_log_probs(js.linear_log_probs(eye, z, y, chunk_size=5, **transform)),
        "linear_loss": js.linear_loss(loss, eye, z, y, reduction=None, chunk_size=2),
        "recompute": js.linear_softmax_cross_entropy(eye, z, y, **ways, **o),
        "in_forward": jax.vmap(by_token)(eye, y),
    }


@jax.jit
def entries(z, y, o):
    """The losses by name, and the gradient in z of each one's sum."""
    losses, pull = jax.vjp(lambda z: _entries(z, y, o), z)
    names = list(losses)
    one = jnp.broadcast_to(jnp.eye(len(names))[:, :, None], (len(names), len(names), N))
    gradients = jax.vmap(pull)({name: one[:, i] for i, name in enumerate(names)})[0]
    return losses, dict(zip(names, gradients, strict=True))


def numbers(*values):
    return st.sampled_from([np.float32(v) for v in values])


OPTIONS = {
    "label_smoothing": numbers(0, 0.1, 0.5, 1),
    "z_loss": numbers(0, 1e-4, 0.3, 1),
    "soft_cap": numbers(1, 5, 30, 1000),
    "temperature": numbers(0.5, 1, 1.7),
    "class_weights": fractions((C,)),
}


@given(grid((N, C)), labels_of((N, C)), st.fixed_dictionaries(OPTIONS))
@a_few
def test_every_function_says_the_same_loss(z, y, options):
    """Terms t_k (lse − x_k), λ lse²; of the gradient (Y ŷ_i + t_i) / T, 2 λ lse ŷ_i / T.

    With t the targets, T the temperature and x the transformed logits. x is rounded by tanh (8 u),
    two quotients and a product, δ = 11 u |x| in all, which moves lse and log ŷ by 2 δ; the slope
    1 − tanh² by 20 u. Ten more roundings join each function's terms.
    """
    losses, gradients = entries(z, y, options)
    epsilon, lam, cap, t, u = wide(*(options[k] for k in OPTIONS))
    x, used = cap * np.tanh(z / cap) / t, (y != 0)[:, None]
    m = x.max(-1, keepdims=True)
    lse = m + np.log(np.exp(x - m).sum(-1, keepdims=True))
    p, targets = np.exp(x - lse), (1 - epsilon) * np.eye(C)[y] * u[y][:, None] + epsilon / C * u
    top, total = np.abs(m) + np.log(C), targets.sum(-1, keepdims=True)
    delta = 11 * U * np.abs(x).max(-1, keepdims=True)
    error = units(C, 4) + 10 * U
    size = (targets * (lse - x)).sum(-1, keepdims=True) + 2 * lam * top**2
    bound = 2 * (error * size + 2 * delta * (total + 2 * lam * top))
    dz_size = (total * p + targets + 2 * lam * (top + 1) * p) / t
    dz_bound = 2 * (error + 20 * U + 4 * delta) * dz_size
    for name in losses:
        assert_within(losses[name], losses["integer"], (used * bound)[:, 0])
        assert_within(gradients[name], gradients["integer"], used * dz_bound + 1e-37)
