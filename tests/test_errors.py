# SPDX-License-Identifier: Apache-2.0
"""Each wrong argument of each public function, and the whole text of its error."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arguments import ARRAY, CHOICES, HEAD, INTEGER, LABELS, MORE_RIGHT, RIGHT, WRONG, X, call

import jaxsoftmax
from jaxsoftmax import forward_mode

# Each argument has both kinds of error in the table; these are the ones that cannot, and why. An
# argument of which nothing can be wrong would have both kinds here: there is none.
CANNOT_BE = {
    ("keepdims", ValueError): "True and False are both right",
    ("return_sign", ValueError): "likewise",
    ("with_entropy", ValueError): "likewise",
    ("with_predictions", ValueError): "likewise",
    ("transpose_kernel", ValueError): "likewise",
    ("ignore_index", ValueError): "any integer may mark what is ignored",
    ("reduction", TypeError): "a choice: what is none of them is a wrong value, whatever its type",
    ("gradients", TypeError): "likewise",
    ("precision", TypeError): "likewise: JAX says so",
}
LOGITS = [name for name in RIGHT if hasattr(forward_mode, name)]
PARAMETERS = {
    name: list(inspect.signature(getattr(jaxsoftmax, name)).parameters)
    for name in jaxsoftmax.__all__
    if inspect.isfunction(getattr(jaxsoftmax, name))
}


def test_every_argument_has_its_errors_or_a_reason_for_none():
    wrong = {(name, case.argument, case.error) for name, cases in WRONG.items() for case in cases}
    assert wrong == {
        (name, parameter, error)
        for name, parameters in PARAMETERS.items()
        for parameter in parameters
        for error in (TypeError, ValueError)
        if (parameter, error) not in CANNOT_BE
    }


def test_every_argument_is_given_rightly():
    given = {(name, p) for name, least in RIGHT.items() for p in least}
    given |= {(name, p) for name, calls in MORE_RIGHT.items() for c in calls for p in c}
    assert given == {(name, p) for name, parameters in PARAMETERS.items() for p in parameters}


@pytest.mark.parametrize("name", WRONG)
def test_the_whole_message(name):
    for wrong in WRONG[name]:
        check_message(name, wrong)


def check_message(name, wrong):
    with pytest.raises(wrong.error) as caught:
        call(name, **{wrong.argument: wrong.value, **wrong.others})
    assert type(caught.value) is wrong.error
    assert str(caught.value) == f"{name}: {wrong.message}"


@pytest.mark.parametrize("name", RIGHT)
def test_right_arguments_are_taken(name):
    for changes in [{}, *MORE_RIGHT[name]]:
        jax.block_until_ready(call(name, **changes))


@pytest.mark.parametrize("name", LOGITS)
def test_the_same_in_forward_mode(name, monkeypatch):
    monkeypatch.setattr(jaxsoftmax, name, getattr(forward_mode, name))
    check_message(name, WRONG[name][0])


@pytest.mark.parametrize("transform", [jax.jit, jax.grad, jax.vmap, jax.checkpoint])
def test_the_same_inside_a_transform(transform):
    with pytest.raises(ValueError, match=r"^softmax_cross_entropy: labels must broadcast to "):
        transform(lambda x: call("softmax_cross_entropy", logits=x, labels=jnp.zeros((3, 5))))(X)


@pytest.mark.parametrize("name", [INTEGER, HEAD])
def test_a_number_known_inside_jit_is_checked_there(name):
    array = ARRAY[name]
    with pytest.raises(ValueError, match=f"^{name}: temperature must be positive and finite"):
        jax.jit(lambda x: call(name, **{array: x}, temperature=-1.0))(RIGHT[name][array])


@pytest.mark.parametrize("option", ["label_smoothing", "z_loss", "soft_cap", "temperature"])
def test_a_traced_number_is_not_checked_but_its_type_is(option):
    logits = jnp.asarray(X)
    jax.jit(lambda v: call(INTEGER, logits=logits, **{option: v}))(-1.0)
    with pytest.raises(TypeError, match=rf": {option} must be a real number; got bool\[\]"):
        jax.jit(lambda v: call(INTEGER, logits=logits, **{option: v}))(True)


def test_what_is_static_cannot_be_traced():
    said = r"ignore_index must be an integer or None; got \w*Tracer int32\[\]"
    with pytest.raises(TypeError, match=said):
        jax.jit(lambda i: call(INTEGER, ignore_index=i))(3)
    with pytest.raises(TypeError, match=r"^check_labels: labels must be known, not traced \(outsi"):
        jax.jit(lambda y: call("check_labels", labels=y))(LABELS)


def test_a_long_argument_is_cut():
    with pytest.raises(TypeError) as caught:
        call("softmax", x=list(range(1000)))
    assert str(caught.value).endswith("...")
    assert len(str(caught.value)) < 130


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_no_rows_are_no_error(name):
    assert call(name, x=np.zeros((0, 8), np.float32)).shape == (0, 8)


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("softmax", "axis", 0),
        ("logsumexp", "keepdims", True),
        (INTEGER, "ignore_index", 3),
        (HEAD, "ignore_index", 3),
        (HEAD, "chunk_size", 3),
        ("linear_log_probs", "with_entropy", True),
        ("label_log_probs", "with_predictions", True),
        ("linear_loss", "transpose_kernel", False),
        ("linear_top_k", "k", 3),
        ("linear_sample", "top_k", 3),
    ],
)
def test_what_decides_what_is_computed_cannot_be_traced(name, argument, value):
    remedy = "traced: name it in static_argnames of jax.jit, or bind it with partial"
    with pytest.raises(TypeError, match=f"^{name}: {argument} must be .*{remedy}"):
        jax.jit(lambda value: call(name, **{argument: value}))(value)


@pytest.mark.parametrize(
    "name",
    [name for name in RIGHT if name not in {"softmax_jacobian", "check_labels", *CHOICES}],
)
def test_forward_mode_alone_says_what_to_do(name):
    f = lambda x: call(name, **{ARRAY[name]: x})  # noqa: E731
    x = RIGHT[name][ARRAY[name]]
    remedy = "jaxsoftmax.forward_mode" if name in LOGITS else "jax.jvp of jax.grad"
    with pytest.raises(TypeError, match=f"custom_vjp(.|\\n)*{name}: .*{remedy}"):
        jax.jvp(f, (x,), (x,))


def test_dtypes_that_do_not_promote():
    narrow = jnp.ones((4, 16), jnp.float8_e4m3fn)
    said = "must have dtypes that JAX promotes to one; got"
    with jax.numpy_dtype_promotion("standard"):
        with pytest.raises(TypeError, match=rf"^logsumexp: a and b {said} float8_e4m3fn, float32"):
            jaxsoftmax.logsumexp(narrow, b=jnp.ones(16))
        for name in (HEAD, "linear_log_probs"):
            said_of = rf"^{name}: hidden and kernel {said} bfloat16, float8_e4m3fn"
            with pytest.raises(TypeError, match=said_of):
                getattr(jaxsoftmax, name)(jnp.ones((4, 4), "bfloat16"), narrow, LABELS[:4])


def test_check_labels_of_any_width():
    jaxsoftmax.check_labels(jnp.array([0, 1], "int4"), 3)
    with pytest.raises(ValueError, match=rf"got 1 that are not, the first {2**70} at index \(\)"):
        jaxsoftmax.check_labels(2**70, 3)


def test_integers_of_any_size_are_numbers():
    mean = call(HEAD, denominator=2**31)
    np.testing.assert_allclose(mean, call(HEAD, reduction="sum") / np.float32(2**31), rtol=1e-6)
